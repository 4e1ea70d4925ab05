"""What both sides of an NBD connection speak of: exports, what was negotiated, the events of a handshake.

The engines themselves are `engine_server` and `engine_client`: bytes in, events out, no socket, no clock, no thread.  A
handshake engine is driven so: send what `data_to_send` gives, pass what arrives to `receive_data`, answer the event that it
gives, and begin again.  Whatever a peer says wrong is a RemoteProtocolError; what we are about to do wrong is a
LocalProtocolError, and nothing was sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from blocklib.errors import LocalProtocolError, RemoteProtocolError
from blocklib.nbd import wire

_M = TypeVar("_M")

TlsMode: TypeAlias = Literal["off", "allow", "require"]
"""TLS is not spoken; either way; nothing about an export is said without it."""


class Export(NamedTuple):
    """An export as a handshake tells it.  `flags` are transmission flags; sizes are bytes."""

    name: str
    size: int
    flags: int
    description: str = ""
    min_block: int = 1
    preferred_block: int = 4096
    max_payload: int = wire.DEFAULT_MAX_PAYLOAD


class Terms(NamedTuple):
    """What was negotiated for the transmission phase."""

    export: Export
    structured: bool = False
    """Structured replies, or the extended ones that include them."""
    extended: bool = False
    contexts: Mapping[int, str] = {}
    """Metadata context ID -> name."""
    block_sizes: bool = False
    """The block sizes of the export were asked for and told, and are kept."""
    tls: bool = False

    def context_id(self, name: str) -> int | None:
        """The ID of a context, or None where it was not selected."""
        return next((number for number, other in self.contexts.items() if other == name), None)

    def settled(self) -> Terms:
        """The same without the flags of features that need more than was negotiated: see "Transmission flags"."""
        flags = self.export.flags | wire.NBD_FLAG_HAS_FLAGS
        if not self.structured:
            flags &= ~wire.NBD_FLAG_SEND_DF
        if not self.extended or not self.contexts:
            flags &= ~wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD
        if not flags & wire.NBD_FLAG_SEND_WRITE_ZEROES:
            flags &= ~wire.NBD_FLAG_SEND_FAST_ZERO
        return self._replace(export=self.export._replace(flags=flags))


class Rules:
    """What may be requested under some terms: "Request types", "Command flags", "Size constraints" and "Error values".

    The server holds each request against them, the client each of its own.
    """

    __slots__ = ("flags_of", "max_transfer", "misaligned", "read_only", "size")

    def __init__(self, terms: Terms) -> None:
        export = terms.export
        self.size = export.size
        self.read_only = bool(export.flags & wire.NBD_FLAG_READ_ONLY)
        # Who was not told otherwise may rely on any alignment and on payloads of 32 MiB.
        self.misaligned = export.min_block - 1 if terms.block_sizes else 0
        """The bits that no offset and no length may have."""
        self.max_transfer = export.max_payload if terms.block_sizes else max(export.max_payload, wire.DEFAULT_MAX_PAYLOAD)
        """Bytes that one read or write may ask for."""
        self.flags_of = _allowed_flags(terms)
        """Command -> the flags that it takes; without the commands that are not offered."""

    def broken(self, command: int, flags: int, offset: int, length: int) -> tuple[int, str] | None:
        """The NBD error that a request deserves, and why; None for one that keeps the rules."""
        allowed = self.flags_of.get(command)
        if allowed is None:
            return wire.NBD_EINVAL, f"{wire.command_name(command)} is not offered by this export"
        if flags & ~allowed:
            return wire.NBD_EINVAL, f"{wire.command_name(command)} does not take the flags {flags:#x} here"
        if command in _CHANGES and self.read_only:
            return wire.NBD_EPERM, "the export is read-only"
        if command == wire.NBD_CMD_FLUSH:
            return (wire.NBD_EINVAL, "a flush with an offset or a length") if offset or length else None
        if offset + length > self.size:
            error = wire.NBD_ENOSPC if command in (wire.NBD_CMD_WRITE, wire.NBD_CMD_WRITE_ZEROES) else wire.NBD_EINVAL
            return error, f"{length} bytes at {offset} reach outside the export of {self.size}"
        if command == wire.NBD_CMD_BLOCK_STATUS:
            return None if length else (wire.NBD_EINVAL, "block status of no bytes")
        if (offset | length) & self.misaligned:
            return wire.NBD_EINVAL, f"{length} bytes at {offset} are not aligned to {self.misaligned + 1}"
        if length > self.max_transfer and command in (wire.NBD_CMD_READ, wire.NBD_CMD_WRITE):
            return wire.NBD_EINVAL, f"{length} bytes are more than the maximum of {self.max_transfer}"
        return None


_CHANGES: Final = frozenset({wire.NBD_CMD_WRITE, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES})


def _allowed_flags(terms: Terms) -> dict[int, int]:
    """Command -> the flags that it takes; without those that the export does not offer."""
    offered = terms.export.flags
    payload = wire.NBD_CMD_FLAG_PAYLOAD_LEN
    fua = wire.NBD_CMD_FLAG_FUA if offered & wire.NBD_FLAG_SEND_FUA else 0
    df = wire.NBD_CMD_FLAG_DF if offered & wire.NBD_FLAG_SEND_DF else 0
    fast = wire.NBD_CMD_FLAG_FAST_ZERO if offered & wire.NBD_FLAG_SEND_FAST_ZERO else 0
    allowed = {wire.NBD_CMD_READ: fua | df, wire.NBD_CMD_WRITE: fua | (payload if terms.extended else 0)}
    if offered & wire.NBD_FLAG_SEND_FLUSH:
        allowed[wire.NBD_CMD_FLUSH] = fua
    if offered & wire.NBD_FLAG_SEND_TRIM:
        allowed[wire.NBD_CMD_TRIM] = fua
    if offered & wire.NBD_FLAG_SEND_CACHE:
        allowed[wire.NBD_CMD_CACHE] = fua
    if offered & wire.NBD_FLAG_SEND_WRITE_ZEROES:
        allowed[wire.NBD_CMD_WRITE_ZEROES] = fua | fast | wire.NBD_CMD_FLAG_NO_HOLE
    if terms.contexts:
        filters = payload if offered & wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD else 0
        allowed[wire.NBD_CMD_BLOCK_STATUS] = fua | filters | wire.NBD_CMD_FLAG_REQ_ONE
    return allowed


class Listed(NamedTuple):
    """An export in a server's list, with what the server tells of it: `export` and `contexts` None and () if nothing."""

    name: str
    description: str
    export: Export | None = None
    contexts: tuple[str, ...] = ()


# -- events ------------------------------------------------------------------------------------------------------------


class ListExports(NamedTuple):
    """The client wants the list: answer by `send_exports`."""


class ExportWanted(NamedTuple):
    """The client names an export: answer by `send_export` or `refuse`.

    `option` is NBD_OPT_INFO, NBD_OPT_GO or NBD_OPT_EXPORT_NAME; `infos` are the information types that were asked for.
    """

    option: int
    name: str
    infos: frozenset[int] = frozenset()


class ContextsWanted(NamedTuple):
    """The client lists or selects metadata contexts of an export: answer by `send_contexts` or `refuse`.

    `option` is NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT; without `queries` the first means all there are.
    """

    option: int
    name: str
    queries: tuple[str, ...]


class StartTls(NamedTuple):
    """The client wants TLS: answer by `start_tls` or `refuse`."""


class TlsDue(NamedTuple):
    """Send `data_to_send`, do the TLS handshake now, on either side, and call `tls_started`."""


class Ready(NamedTuple):
    """The transmission phase begins with `terms`; `trailing` are bytes that came behind the handshake."""

    terms: Terms
    trailing: bytes


class ExportList(NamedTuple):
    """What a client that only looks has found; the connection may be closed once `data_to_send` is sent."""

    exports: tuple[Listed, ...]


class Closed(NamedTuple):
    """Negotiation ends without transmission, by right: send `data_to_send` and close."""

    reason: str


Event: TypeAlias = ListExports | ExportWanted | ContextsWanted | StartTls | TlsDue | Ready | ExportList | Closed
Steps: TypeAlias = Generator["int | Event", Any, Any]
"""A conversation as a generator: it yields how many bytes it needs next, or an event that it waits to be answered."""


class Handshake:
    """The common half of both handshakes: a conversation, what has come for it, what it has to say."""

    max_waiting: int = 1 << 20
    """Bytes that a peer may send ahead of us before it is cut off."""

    def __init__(self, steps: Steps) -> None:
        self._input = bytearray()
        self._output: list[bytes] = []
        self._finished = False
        self._steps = steps
        self._waiting_for: int | Event = 0
        """Bytes, or an event that is not answered yet; 0: the conversation has not begun."""

    def data_to_send(self) -> bytes:
        """What is to be sent now; it is given once."""
        if self._waiting_for == 0 and not self._finished:
            self._resume(None)
        data = b"".join(self._output)
        self._output.clear()
        return data

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take what has arrived (nothing: the peer has closed) and give the event that it completes, if it does.

        Raises RemoteProtocolError: send `data_to_send` if that is possible, and close.
        """
        if self._finished or isinstance(self._waiting_for, TlsDue):
            raise LocalProtocolError("these bytes belong to what follows here, not to the handshake")
        if not data:
            return self._end_of_file()
        self._input += data
        if len(self._input) > self.max_waiting and not isinstance(self._waiting_for, int):
            raise RemoteProtocolError(f"the peer sent {len(self._input)} bytes without waiting for an answer")
        return self._pump()

    def _end_of_file(self) -> list[Event]:
        self._finished = True
        raise RemoteProtocolError("the peer closed the connection in the middle of the handshake")

    def _pump(self) -> list[Event]:
        """Feed the conversation while there is enough for it."""
        if self._waiting_for == 0:
            self._resume(None)
        while isinstance(self._waiting_for, int):
            length = self._waiting_for
            if len(self._input) < length:
                return []
            data = bytes(self._input[:length])
            del self._input[:length]
            self._resume(data)
        event = self._waiting_for
        if isinstance(event, (Ready, ExportList, Closed)):
            self._finished = True
        return [event]

    def _resume(self, value: Any) -> None:
        try:
            self._waiting_for = self._steps.send(value)
        except RemoteProtocolError:
            self._finished = True
            raise

    def _answer(self, expected: tuple[type, ...], value: Any) -> list[Event]:
        if not isinstance(self._waiting_for, expected) or self._finished:
            raise LocalProtocolError("there is no such question to be answered now")
        self._resume(value)
        return self._pump()

    def _switch_to_tls(self) -> Steps:
        """What came in clear text behind the change to TLS would be taken for what TLS protects: it ends the session."""
        if self._input:
            raise RemoteProtocolError(f"{len(self._input)} bytes in clear text where TLS was to begin")
        yield TlsDue()

    def tls_started(self) -> list[Event]:
        """The TLS handshake has succeeded; from now on everything goes through it."""
        return self._answer((TlsDue,), None)


class Receiver(ABC, Generic[_M]):
    """How both halves take bytes in: into memory of their own, or straight to where a payload belongs."""

    _input: memoryview
    _start: int
    _end: int
    """What of `_input` has been received and not looked at."""
    _sink: memoryview | None
    _missing: int
    """Where a payload goes, and how many of its bytes are still to come."""

    @property
    @abstractmethod
    def in_payload(self) -> bool:
        """Whether all of `get_buffer` is the rest of one payload, so that waiting for all of it holds nothing up."""

    @abstractmethod
    def buffer_updated(self, n: int) -> list[_M]:
        """`n` bytes were received into `get_buffer()`: the messages that are complete now, in their order."""

    def get_buffer(self) -> memoryview:
        """Where the next bytes are to be received; valid until `buffer_updated`."""
        if self.in_payload:
            assert self._sink is not None
            return self._sink[len(self._sink) - self._missing :]
        if self._start:
            length = self._end - self._start
            self._input[:length] = bytes(self._input[self._start : self._end])
            self._start, self._end = 0, length
        return self._input[self._end :]

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[_M]:
        """The same for bytes that are somewhere else already."""
        messages: list[_M] = []
        rest = memoryview(data)
        while rest:
            buffer = self.get_buffer()
            n = min(len(buffer), len(rest))
            buffer[:n] = rest[:n]
            rest = rest[n:]
            messages += self.buffer_updated(n)
        return messages
