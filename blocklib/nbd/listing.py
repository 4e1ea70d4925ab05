"""What a server gives out: `blocklib.nbd.list_exports`."""

from __future__ import annotations

import ssl

from blocklib.nbd import wire
from blocklib.nbd.client import list_exports as ask
from blocklib.nbd.tls import psk_context, tls_context
from blocklib.nbd.uri import parse_uri
from blocklib.records import Record

_FLAG_NAMES = {
    wire.NBD_FLAG_READ_ONLY: "readonly",
    wire.NBD_FLAG_SEND_FLUSH: "flush",
    wire.NBD_FLAG_SEND_FUA: "fua",
    wire.NBD_FLAG_ROTATIONAL: "rotational",
    wire.NBD_FLAG_SEND_TRIM: "trim",
    wire.NBD_FLAG_SEND_WRITE_ZEROES: "zeroes",
    wire.NBD_FLAG_SEND_DF: "df",
    wire.NBD_FLAG_CAN_MULTI_CONN: "multi",
    wire.NBD_FLAG_SEND_RESIZE: "resize",
    wire.NBD_FLAG_SEND_CACHE: "cache",
    wire.NBD_FLAG_SEND_FAST_ZERO: "fast-zero",
    wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD: "block-status-payload",
}


class ExportInfo(Record):
    """What a server tells of one export; sizes are bytes.  Where it tells no more than the name, `size` is None."""

    name: str
    description: str = ""
    size: int | None = None
    flags: int = 0
    """The transmission flags as they were sent."""
    min_block: int = 1
    preferred_block: int = 4096
    max_block: int = 0
    contexts: tuple[str, ...] = ()
    """Names of the metadata contexts."""

    @property
    def read_only(self) -> bool:
        return bool(self.flags & wire.NBD_FLAG_READ_ONLY)

    @property
    def flag_names(self) -> tuple[str, ...]:
        """The flags in qemu-nbd's words."""
        return tuple(name for flag, name in _FLAG_NAMES.items() if self.flags & flag)


def list_exports(uri: str, *, tls: ssl.SSLContext | None = None, hostname: str | None = None) -> tuple[ExportInfo, ...]:
    """What the server at `uri` gives out; the export in it counts for nothing.

    With `tls`, or for a URI of the scheme nbds, nothing is asked without TLS; `hostname` is the name that its certificate
    must have, if not the host's.  Raises UsageError, StorageError where there is no server, RequestError where it tells
    nothing, RemoteProtocolError.
    """
    parsed = parse_uri(uri)
    if tls is None and parsed.tls:
        if parsed.tls_psk_file is not None:
            tls = psk_context(parsed.tls_psk_file, username=parsed.tls_username)
        elif parsed.tls_certificates is not None:
            tls = tls_context(parsed.tls_certificates, verify_peer=parsed.tls_verify_peer)
        else:
            tls = ssl.create_default_context()
    found = []
    for listed in ask(parsed.address, tls=tls, hostname=hostname or parsed.tls_hostname):
        export = listed.export
        if export is None:
            found.append(ExportInfo(listed.name, listed.description))
            continue
        found.append(
            ExportInfo(
                listed.name,
                listed.description or export.description,
                export.size,
                export.flags,
                export.min_block,
                export.preferred_block,
                export.max_payload,
                listed.contexts,
            )
        )
    return tuple(found)
