"""What both sides of an NBD connection speak of: exports, what was negotiated, the events of a handshake.

The engines themselves are `engine_server` and `engine_client`: bytes in, events out, no socket, no clock, no thread.  A
handshake engine is driven so: send what `data_to_send` gives, pass what arrives to `receive_data`, answer the event that it
gives, and begin again.  Whatever a peer says wrong is a RemoteProtocolError; what we are about to do wrong is a
LocalProtocolError, and nothing was sent.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from blocklib.errors import LocalProtocolError, RemoteProtocolError
from blocklib.nbd import wire

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
    """The client asked for the block sizes and keeps them."""
    tls: bool = False

    def context_id(self, name: str) -> int | None:
        """The ID of a context, or None where it was not selected."""
        return next((number for number, other in self.contexts.items() if other == name), None)


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

