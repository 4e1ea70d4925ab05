"""The export of an NBD server as a node: the driver "nbd", in the room of protocols.

What is told here of where data and holes lie is the server's block status.  An answer is kept for a moment, because who asks
walks through it in small steps; every change made here drops it, and its age does, since others may write to the export.
"""

from __future__ import annotations

import errno
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from blocklib.buffers import is_zero, zero_fill
from blocklib.errors import OptionError, ReadOnlyError, StorageError, UsageError
from blocklib.extents import (
    FLAG_ALLOCATED,
    FLAG_DATA,
    FLAG_EOF,
    FLAG_OFFSET_VALID,
    FLAG_ZERO,
    KIND_DATA,
    KIND_ZERO,
    Run,
)
from blocklib.nbd import wire
from blocklib.nbd.client import MAX_CONNECTIONS, Client
from blocklib.nbd.uri import Address, NbdUri, address_of_options, check_export, parse_uri
from blocklib.node import Node, PendingChange, Preallocation

if TYPE_CHECKING:
    import ssl


_SECTOR: Final = 512
_STATUS_KEPT: Final = 1.0
"""Seconds that an answer about block status is believed."""


class NbdNode(Node):
    """An export: of fixed size, and written in place.

    `context` is the metadata context that tells data from holes.  `no_flush` ignores flushes.  With `auto_read_only` it
    becomes `read_only` where the server lets nobody write.  `client` options are those of `blocklib.nbd.client.Client`.
    """

    driver = "nbd"
    is_leaf = True
    is_device = True

    def __init__(
        self,
        name: str | None,
        uri: NbdUri,
        *,
        read_only: bool,
        tls: ssl.SSLContext | None = None,
        context: str = wire.BASE_ALLOCATION,
        no_flush: bool = False,
        auto_read_only: bool = False,
        **client: Any,
    ) -> None:
        super().__init__(name, str(uri), read_only=read_only)
        self.auto_read_only = auto_read_only
        self.no_flush = no_flush
        self._context = context
        hostname = uri.tls_hostname or uri.address.host or None
        contexts = (context, wire.QEMU_DIRTY_BITMAP)
        self._client = Client(
            uri.address, uri.export, name=str(uri), tls=tls, hostname=hostname, contexts=contexts, **client
        )
        self._flags = 0
        self._served = 0
        """Bytes of the export; the node reaches to the end of the last sector, and what the export lacks reads as zero."""
        self._tells_status = False
        self._status_lock = threading.Lock()  # guards: _status, _changes; never held across I/O
        self._status: _Status | None = None
        self._changes = 0
        """Counts the beginnings and ends of changes: an answer that one of them fell into is not kept."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """A node from options in QEMU's names."""
        uri = _uri_of(options)
        return cls(
            options.get("node-name"),
            uri,
            read_only=read_only,
            tls=options.get("tls-creds") or _default_tls(uri),
            context=options.get("x-dirty-bitmap") or wire.BASE_ALLOCATION,
            no_flush=bool(options.get("cache.no-flush")),
            auto_read_only=bool(options.get("auto-read-only")),
            open_timeout=options.get("open-timeout") or 0,
            reconnect_delay=options.get("reconnect-delay") or 0,
            request_timeout=options.get("request-timeout") or 0,
            connections=options.get("connections") or MAX_CONNECTIONS,
            **extra,
        )

    # -- opening and closing ------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Connect.  Raises StorageError, NbdError, and StorageError (EACCES) where nobody may write and that is wanted."""
        terms = self._client.open()
        export = terms.export
        self._flags = export.flags
        if self._flags & wire.NBD_FLAG_READ_ONLY and not self.read_only:
            if not self.auto_read_only:
                self._client.close()
                raise self._error("the export is read-only", errno.EACCES, "open")
            self.read_only = True
        if terms.block_sizes:
            alignment = export.min_block
        else:  # "a client desiring maximum interoperability SHOULD constrain its requests to a minimum block size of 2^9"
            alignment = 1 if export.size % _SECTOR else _SECTOR
        # A server that forgets that its size SHOULD be a multiple of its block size has a tail that nobody can reach.
        self._served = export.size - export.size % alignment
        self.size = -(-self._served // _SECTOR) * _SECTOR
        self.request_alignment = self.zero_alignment = alignment
        self._tells_status = terms.context_id(self._context) is not None
        if self._context != wire.BASE_ALLOCATION and not self._tells_status:
            self._client.close()
            raise OptionError(
                f"{self.filename}: the server does not tell {self._context!r}",
                option="x-dirty-bitmap",
                driver=self.driver,
                node=self.name,
            )

    def close(self) -> None:
        """Make what was written durable, where that can be asked for, and say good-bye."""
        try:
            if not self.read_only:
                self.flush()
        finally:
            self._client.close()

    def abandon(self) -> None:
        self._client.abandon()

    def prepare_reopen(self, *, read_only: bool) -> PendingChange:
        """The connection stays; only a server that lets us write makes a node writable."""
        if not read_only and self._flags & wire.NBD_FLAG_READ_ONLY:
            raise self._error("the export is read-only", errno.EACCES, "reopen")
        if read_only and not self.read_only:
            self.flush()
        return super().prepare_reopen(read_only=read_only)

    # -- moving bytes -------------------------------------------------------------------------------------------------

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill `views`; bytes past the end of the export read as zero.  Raises StorageError, RemoteProtocolError."""
        for view in views:
            inside = min(len(view), max(self._served - offset, 0))
            if inside:
                self._client.read(offset, view if inside == len(view) else view[:inside])
            if inside < len(view):
                zero_fill(view[inside:])
            offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        """Write all of `views`.  Raises StorageError (ENOSPC past the end), ReadOnlyError, RemoteProtocolError."""
        length = sum(len(view) for view in views)
        if self._served < offset + length <= self.size:
            views, length = self._within_export(offset, views)
        self._check_change(offset, length)
        self._begin_change()
        try:
            if length:
                self._client.write(offset, views)
        finally:
            self._begin_change()

    def transfer(self, offsets: Any, addresses: Any, lengths: Any, results: Any, *, writing: bool) -> None:
        from ctypes import c_char

        length = max(lengths, default=0)
        end = max(map(add, offsets, lengths), default=0)
        if length > self._client.max_transfer or end > self._served or (writing and self.read_only):
            super().transfer(offsets, addresses, lengths, results, writing=writing)
            return
        ranges = [
            (offset, memoryview((c_char * n).from_address(address)).cast("B"))
            for offset, address, n in zip(offsets, addresses, lengths, strict=True)
        ]
        if writing:
            self._begin_change()
        try:
            for index, error in enumerate(self._client.transfer(ranges, writing=writing)):
                results[index] = 0 if error is None else error.errno or errno.EIO
        finally:
            if writing:
                self._begin_change()

    def _within_export(
        self, offset: int, views: Sequence[memoryview | bytes | bytearray]
    ) -> tuple[Sequence[memoryview | bytes | bytearray], int]:
        """A write to the end of the node without its zeroes behind the export, where nothing can be but zeroes."""
        data = memoryview(b"".join(views))
        inside = max(self._served - offset, 0)
        return ([data[:inside]], inside) if is_zero(data[inside:]) else (views, len(data))

    @property
    def zeroes_by_metadata(self) -> bool:
        return bool(self._flags & wire.NBD_FLAG_SEND_WRITE_ZEROES)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        if self._served < offset + length <= self.size:
            length = max(self._served - offset, 0)
        self._check_change(offset, length)
        self._begin_change()
        try:
            self._client.write_zeroes(offset, length, no_hole=not unmap)
        finally:
            self._begin_change()

    def discard_range(self, offset: int, length: int) -> None:
        """Pass the hint on; a server that does not know it keeps what it has."""
        self._check_change(offset, 0)
        length = min(length, self._served - offset)
        if length <= 0 or not self._flags & wire.NBD_FLAG_SEND_TRIM:
            return
        self._begin_change()
        try:
            self._client.trim(offset, length)
        finally:
            self._begin_change()

    def _check_change(self, offset: int, length: int) -> None:
        if self.read_only:
            raise ReadOnlyError(f"{self.filename}: open for reading only", node=self.name)
        if offset + length > self._served:
            text = f"{length} bytes at {offset} do not fit the export of {self._served}"
            raise self._error(text, errno.ENOSPC, "write")

    def flush(self) -> None:
        """Make every completed write durable, where the server has something for that.  Raises StorageError."""
        if not self.no_flush and not self.read_only and self._flags & wire.NBD_FLAG_SEND_FLUSH:
            self._client.flush()

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        """An export keeps its size: less is accepted, because what is stored in it may become smaller."""
        self._check_change(0, 0)
        if preallocation != "off":
            raise UsageError(f"{self.filename}: an export cannot be preallocated", node=self.name)
        if size > self.size:
            raise self._error(f"an export of {self.size} bytes cannot grow to {size}", errno.ENOSPC, "truncate")

    def _error(self, text: str, number: int, operation: str) -> StorageError:
        return StorageError(f"{self.filename}: {text}", errno=number, operation=operation, node=self.name)

    def info_facts(self) -> Mapping[str, Any]:
        return {"dirty": None}  # nothing is known of what lies behind the server

    @property
    def exported(self) -> _ExportedBitmaps:
        return _ExportedBitmaps(self._client, self._served, self.request_alignment)

    # -- where data and holes lie -------------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> Run:
        """Data, zero or neither, as the server says; past the end all is zero."""
        if offset >= self._served:
            return KIND_ZERO, None, offset, length, FLAG_ZERO | FLAG_ALLOCATED | FLAG_EOF
        length = min(length, self._served - offset)
        if not self._tells_status:
            eof = FLAG_EOF if offset + length == self._served else 0
            return KIND_DATA, None, offset, length, FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID | eof
        status = self._status_at(offset)
        index = bisect_right(status.ends, offset)
        end = min(status.ends[index], offset + length)
        kind, flags = _RUN_OF_STATE[status.states[index] & 3]
        if end == self._served:
            flags |= FLAG_EOF
        return kind, None, offset, end - offset, flags

    def _status_at(self, offset: int) -> _Status:
        """An answer of the server that covers `offset`."""
        status = self._status
        if status is not None and status.start <= offset < status.ends[-1] and time.monotonic() < status.until:
            return status
        with self._status_lock:
            changes = self._changes
        lengths, states = self._client.block_status(offset, self._served - offset, self._context)
        ends = array("Q", accumulate(lengths, initial=offset))[1:]
        ends[-1] = min(ends[-1], self._served)
        status = _Status(offset, ends, states, time.monotonic() + _STATUS_KEPT)
        with self._status_lock:
            if changes == self._changes:
                self._status = status
        return status

    def _begin_change(self) -> None:
        """What is known of data and holes is out of date; called before a change and after it."""
        with self._status_lock:
            self._changes += 1
            self._status = None


_RUN_OF_STATE: Final = (
    (KIND_DATA, FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID),
    (KIND_DATA, 0),  # a hole that does not read as zero: what is there is for the server to say
    (KIND_ZERO, FLAG_DATA | FLAG_ZERO | FLAG_ALLOCATED | FLAG_OFFSET_VALID),
    (KIND_ZERO, FLAG_ZERO | FLAG_ALLOCATED | FLAG_OFFSET_VALID),
)
"""By the two low bits of a status, NBD_STATE_HOLE and NBD_STATE_ZERO: (kind, flags)."""


class _ExportedBitmaps:
    """The dirty bitmaps of an export of `size` bytes, asked for anew each time: the server may change them."""

    def __init__(self, client: Client, size: int, granularity: int) -> None:
        self._client = client
        self._size = size
        self.granularity = granularity

    def names(self) -> Sequence[str]:
        prefix = wire.QEMU_DIRTY_BITMAP
        contexts = self._client.terms.contexts.values()
        return [name.removeprefix(prefix) for name in contexts if name.startswith(prefix)]

    def ranges(self, name: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = min(offset + length, self._size)
        position = offset - offset % self.granularity
        stop = min(-(-end // self.granularity) * self.granularity, self._size)
        begin: int | None = None
        while position < stop:
            lengths, states = self._client.block_status(position, stop - position, wire.QEMU_DIRTY_BITMAP + name)
            for n, state in zip(lengths, states, strict=True):
                if not state & wire.NBD_STATE_DIRTY:
                    if begin is not None and position > offset:
                        yield begin, min(position, end) - begin
                    begin = None
                elif begin is None:
                    begin = max(position, offset)
                position += n
        if begin is not None and begin < end:
            yield begin, end - begin


class _Status(NamedTuple):
    """What a server told of a range: `ends` of consecutive extents from `start` on, with their `states`."""

    start: int
    ends: array[int]
    states: array[int]
    until: float


def _uri_of(options: Mapping[str, Any]) -> NbdUri:
    """Which export the options mean.  Raises OptionError for none, or for two."""
    server = {
        "type": options.get("server.type"),
        "host": options.get("server.host"),
        "port": options.get("server.port"),
        "path": options.get("server.path"),
        "abstract": options.get("server.abstract"),
        "str": options.get("server.str"),
    }
    server = {name: value for name, value in server.items() if value is not None}
    old = {name: options[name] for name in ("host", "port", "path") if options.get(name) is not None}
    filename = options.get("filename")
    ways = [name for name, value in (("filename", filename), ("server", server), ("host and path", old)) if value]
    if len(ways) != 1:
        text = f"the server is given twice: by {' and by '.join(ways)}" if ways else "no server is given"
        raise OptionError(f"nbd: {text} (server.type, server.host, server.path)", option="server.type", driver="nbd")
    if filename:
        if options.get("export") is not None:
            raise OptionError("nbd: the export is given twice: in the URI, and here", option="export", driver="nbd")
        uri = parse_uri(filename)
    else:
        if old:
            server = {**old, "type": "unix" if "path" in old else "inet"}
        uri = NbdUri(_address_of(server), _export_of(options))
    tls = uri.tls or options.get("tls-creds") is not None
    return uri._replace(tls=tls, tls_hostname=options.get("tls-hostname") or uri.tls_hostname)


def _export_of(options: Mapping[str, Any]) -> str:
    try:
        return check_export(options.get("export") or "")
    except UsageError as exc:
        raise OptionError(f"nbd: {exc}", option="export", driver="nbd") from exc


def _address_of(server: Mapping[str, Any]) -> Address:
    try:
        return address_of_options(dict(server))
    except UsageError as exc:
        raise OptionError(f"nbd: {exc}", option="server", driver="nbd") from exc


def _default_tls(uri: NbdUri) -> ssl.SSLContext | None:
    """The credentials that a URI asks for: a folder, keys, or by default what this system trusts."""
    if not uri.tls:
        return None
    import ssl

    from blocklib.nbd import tls

    if uri.tls_psk_file is not None:
        return tls.psk_context(uri.tls_psk_file, username=uri.tls_username)
    if uri.tls_certificates is not None:
        context = tls.tls_context(uri.tls_certificates, verify_peer=uri.tls_verify_peer)
        if uri.address.path and uri.tls_hostname is None:
            context.check_hostname = False  # a socket of this host has no name; whose it is, its authority has signed
        return context
    context = ssl.create_default_context()
    if not uri.tls_verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
