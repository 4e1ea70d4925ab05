"""The server's side of the handshake, without a socket.

``hs = ServerHandshake(tls="allow")``; send ``hs.data_to_send()`` (the greeting first) after every call;
``events = hs.receive_data(data)`` gives at most one event (see `engine`), which is answered by ``send_exports``,
``send_export``, ``send_contexts``, ``start_tls`` / ``tls_started`` or ``refuse``; each of these returns the next events.
Unknown options, malformed data, and whatever must not be told before TLS are answered by the engine itself.  `Ready` ends
it: its terms and trailing bytes are what `engine_server.ServerTransmission` begins with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from blocklib.errors import LocalProtocolError, RemoteProtocolError
from blocklib.nbd import wire
from blocklib.nbd.engine import (
    Closed,
    ContextsWanted,
    Event,
    Export,
    ExportWanted,
    Handshake,
    ListExports,
    Ready,
    StartTls,
    Steps,
    Terms,
    TlsMode,
)

_SKIPPED_AT_ONCE: Final = 1 << 16


class ServerHandshake(Handshake):
    """Fixed newstyle negotiation with one client, and the older newstyle as far as EXPORT_NAME.

    `tls`: "off" refuses TLS, "allow" leaves it to the client, "require" says nothing about any export before it.  More
    than `max_options` options, or option data of more than `max_skipped` bytes, end the session; more than `max_data` are
    skipped and refused.
    """

    def __init__(
        self,
        *,
        tls: TlsMode = "off",
        structured: bool = True,
        extended: bool = True,
        max_options: int = 1024,
        max_data: int = 1 << 16,
        max_skipped: int = 1 << 20,
    ) -> None:
        super().__init__(self._converse())
        self.shutting_down = False
        """Every option but ABORT is refused from now on."""
        self._tls: TlsMode = tls
        self._offers_structured = structured
        self._offers_extended = extended
        self._max_options = max_options
        self._max_data = max_data
        self._max_skipped = max_skipped
        self._under_tls = False
        self._between_options = False
        self._option = 0
        self._forget()

    def _forget(self) -> None:
        """What was negotiated is void: "the server MUST NOT preserve any negotiation state" across STARTTLS."""
        self._structured = False
        self._extended = False
        self._contexts: dict[int, str] = {}
        self._contexts_of: str | None = None

    # -- answers ------------------------------------------------------------------------------------------------------

    def send_exports(self, exports: Iterable[tuple[str, str]]) -> list[Event]:
        """Answer ListExports by (name, description) of each export."""
        return self._answer((ListExports,), [wire.server_data(name, description) for name, description in exports])

    def send_export(self, export: Export) -> list[Event]:
        """Answer ExportWanted: there it is."""
        return self._answer((ExportWanted,), export)

    def send_contexts(self, names: Iterable[str]) -> list[Event]:
        """Answer ContextsWanted by the names of the contexts that its queries find; they are numbered from 0."""
        return self._answer((ContextsWanted,), tuple(dict.fromkeys(names)))

    def start_tls(self) -> list[Event]:
        """Answer StartTls: yes."""
        return self._answer((StartTls,), True)

    def refuse(self, reply_type: int, message: str = "") -> list[Event]:
        """Answer any question: no, by one of NBD_REP_ERR_..., with a message for the client's user."""
        if not reply_type & wire.NBD_REP_FLAG_ERROR:
            raise LocalProtocolError(f"{reply_type} is no error reply")
        return self._answer((ListExports, ExportWanted, ContextsWanted, StartTls), _Refusal(reply_type, message))

    # -- the conversation ---------------------------------------------------------------------------------------------

    def _converse(self) -> Steps:
        offered = wire.NBD_FLAG_FIXED_NEWSTYLE | wire.NBD_FLAG_NO_ZEROES
        self._output.append(wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, offered))
        (client_flags,) = wire.CLIENT_FLAGS.unpack((yield wire.CLIENT_FLAGS.size))
        if client_flags & ~offered:  # "the server MUST drop the TCP connection if the client sets an unknown flag"
            raise RemoteProtocolError(f"unknown client flags {client_flags:#x}")
        fixed = bool(client_flags & wire.NBD_FLAG_FIXED_NEWSTYLE)
        with_zeroes = not client_flags & wire.NBD_FLAG_NO_ZEROES
        for _ in range(self._max_options):
            self._between_options = True
            magic, option, length = wire.OPTION.unpack((yield wire.OPTION.size))
            self._between_options = False
            if magic != wire.NBD_OPTS_MAGIC:
                raise RemoteProtocolError(f"the magic of an option is {magic:#x}")
            if not fixed and option != wire.NBD_OPT_EXPORT_NAME:
                raise RemoteProtocolError(f"{wire.option_name(option)} without fixed newstyle negotiation")
            self._option = option
            if length > self._max_data:
                yield from self._skip(length)
                continue
            data = (yield length) if length else b""
            event = yield from self._handle(option, data, with_zeroes)
            if event is not None:
                yield event
                return
        raise RemoteProtocolError(f"more than {self._max_options} options")

    def _skip(self, length: int) -> Steps:
        """Option data of a length that no option of ours has."""
        if length > self._max_skipped or self._option == wire.NBD_OPT_EXPORT_NAME:
            raise RemoteProtocolError(f"{wire.option_name(self._option)} with {length} bytes of data")
        while length:
            skipped = min(length, _SKIPPED_AT_ONCE)
            yield skipped
            length -= skipped
        self._error(wire.NBD_REP_ERR_TOO_BIG, "option data is too long")

    def _handle(self, option: int, data: bytes, with_zeroes: bool) -> Steps:
        """Answer one option; returns the event that ends the handshake, or None."""
        if option == wire.NBD_OPT_ABORT:
            self._reply(wire.NBD_REP_ACK)
            return Closed("the client has aborted the negotiation")
        if self.shutting_down:
            if option == wire.NBD_OPT_EXPORT_NAME:
                return Closed("the server is shutting down")
            self._error(wire.NBD_REP_ERR_SHUTDOWN, "the server is shutting down")
        elif option == wire.NBD_OPT_STARTTLS:
            yield from self._handle_tls(data)
        elif self._tls == "require" and not self._under_tls:
            if option == wire.NBD_OPT_EXPORT_NAME:  # "as this request cannot error, it MUST terminate the session"
                return Closed("the client wants an export without TLS")
            self._error(wire.NBD_REP_ERR_TLS_REQD, "this server demands TLS")
        elif option == wire.NBD_OPT_EXPORT_NAME:
            return (yield from self._handle_export_name(data, with_zeroes))
        elif option in (wire.NBD_OPT_INFO, wire.NBD_OPT_GO):
            return (yield from self._handle_go(option, data))
        elif option in (wire.NBD_OPT_LIST_META_CONTEXT, wire.NBD_OPT_SET_META_CONTEXT):
            yield from self._handle_contexts(option, data)
        elif option == wire.NBD_OPT_LIST:
            yield from self._handle_list(data)
        elif option == wire.NBD_OPT_STRUCTURED_REPLY and self._offers_structured:
            self._handle_structured(data)
        elif option == wire.NBD_OPT_EXTENDED_HEADERS and self._offers_extended:
            if data:
                self._error(wire.NBD_REP_ERR_INVALID, "this option has no data")
            else:
                self._extended = True
                self._reply(wire.NBD_REP_ACK)
        else:
            self._error(wire.NBD_REP_ERR_UNSUP, f"{wire.option_name(option)} is not known here")
        return None

    def _handle_tls(self, data: bytes) -> Steps:
        if data:
            self._error(wire.NBD_REP_ERR_INVALID, "this option has no data")
        elif self._under_tls:
            self._error(wire.NBD_REP_ERR_INVALID, "TLS is in use already")
        elif self._tls == "off":
            self._error(wire.NBD_REP_ERR_POLICY, "this server does not speak TLS")
        else:
            answer = yield StartTls()
            if isinstance(answer, _Refusal):
                self._error(answer.reply_type, answer.message)
                return
            self._reply(wire.NBD_REP_ACK)
            yield from self._switch_to_tls()
            self._under_tls = True
            self._forget()

    def _handle_structured(self, data: bytes) -> None:
        if data:
            self._error(wire.NBD_REP_ERR_INVALID, "this option has no data")
        elif self._extended:
            self._error(wire.NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are in use already")
        else:
            self._structured = True
            self._reply(wire.NBD_REP_ACK)

    def _handle_list(self, data: bytes) -> Steps:
        if data:
            self._error(wire.NBD_REP_ERR_INVALID, "this option has no data")
            return
        answer = yield ListExports()
        if isinstance(answer, _Refusal):
            self._error(answer.reply_type, answer.message)
            return
        for entry in answer:
            self._reply(wire.NBD_REP_SERVER, entry)
        self._reply(wire.NBD_REP_ACK)

    def _handle_contexts(self, option: int, data: bytes) -> Steps:
        setting = option == wire.NBD_OPT_SET_META_CONTEXT
        if setting:  # "replaces all previously-set metadata contexts (including when this command fails)"
            self._contexts, self._contexts_of = {}, None
        if not self._structured and not self._extended:
            self._error(wire.NBD_REP_ERR_INVALID, "structured replies come first")
            return
        try:
            name, queries = wire.parse_contexts_data(data)
        except RemoteProtocolError as exc:
            self._error(wire.NBD_REP_ERR_INVALID, str(exc))
            return
        for query in queries:
            if ":" not in query:
                self._error(wire.NBD_REP_ERR_INVALID, "a query without a namespace")
                return
        answer = yield ContextsWanted(option, name, queries)
        if isinstance(answer, _Refusal):
            self._error(answer.reply_type, answer.message)
            return
        for number, context in enumerate(answer):
            self._reply(wire.NBD_REP_META_CONTEXT, wire.context_data(number if setting else 0, context))
        if setting:
            self._contexts, self._contexts_of = dict(enumerate(answer)), name
        self._reply(wire.NBD_REP_ACK)

    def _handle_go(self, option: int, data: bytes) -> Steps:
        try:
            name, infos = wire.parse_go_data(data)
        except RemoteProtocolError as exc:
            self._error(wire.NBD_REP_ERR_INVALID, str(exc))
            return None
        answer = yield ExportWanted(option, name, infos)
        if isinstance(answer, _Refusal):
            self._error(answer.reply_type, answer.message)
            return None
        terms = self._terms(answer, name, block_sizes=wire.NBD_INFO_BLOCK_SIZE in infos)
        export = terms.export
        self._reply(wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(wire.NBD_INFO_EXPORT, export.size, export.flags))
        if wire.NBD_INFO_NAME in infos:
            self._reply(wire.NBD_REP_INFO, _info_text(wire.NBD_INFO_NAME, export.name))
        if wire.NBD_INFO_DESCRIPTION in infos and export.description:
            self._reply(wire.NBD_REP_INFO, _info_text(wire.NBD_INFO_DESCRIPTION, export.description))
        if wire.NBD_INFO_BLOCK_SIZE in infos:
            sizes = wire.INFO_BLOCK_SIZE.pack(
                wire.NBD_INFO_BLOCK_SIZE, export.min_block, export.preferred_block, export.max_payload
            )
            self._reply(wire.NBD_REP_INFO, sizes)
        self._reply(wire.NBD_REP_ACK)
        return self._ready(terms) if option == wire.NBD_OPT_GO else None

    def _handle_export_name(self, data: bytes, with_zeroes: bool) -> Steps:
        if self._extended:
            raise RemoteProtocolError("NBD_OPT_EXPORT_NAME after extended headers were negotiated")
        name = wire.parse_string(data, "the export name")
        answer = yield ExportWanted(wire.NBD_OPT_EXPORT_NAME, name)
        if isinstance(answer, _Refusal):  # "If the server is unwilling to allow the export, it MUST terminate the session"
            return Closed(f"export {name!r} refused: {answer.message}")
        terms = self._terms(answer, name, block_sizes=False)
        self._output.append(wire.EXPORT_NAME_REPLY.pack(terms.export.size, terms.export.flags))
        if with_zeroes:
            self._output.append(bytes(wire.EXPORT_NAME_ZEROES))
        return self._ready(terms)

    def _terms(self, export: Export, name: str, *, block_sizes: bool) -> Terms:
        contexts = self._contexts if self._contexts_of == name else {}
        structured = self._structured or self._extended
        return Terms(export, structured, self._extended, contexts, block_sizes, self._under_tls).settled()

    def _ready(self, terms: Terms) -> Ready:
        trailing = bytes(self._input)
        self._input.clear()
        return Ready(terms, trailing)

    def _reply(self, reply_type: int, data: bytes = b"") -> None:
        self._output.append(wire.option_reply(self._option, reply_type, data))

    def _error(self, reply_type: int, message: str) -> None:
        self._reply(reply_type, wire.encode_message(message))

    def _end_of_file(self) -> list[Event]:
        if self._between_options and not self._input:
            self._finished = True
            return [Closed("the client has closed the connection")]
        return super()._end_of_file()


class _Refusal:
    """The answer no."""

    __slots__ = ("message", "reply_type")

    def __init__(self, reply_type: int, message: str) -> None:
        self.reply_type = reply_type
        self.message = message


def _info_text(info: int, text: str) -> bytes:
    return info.to_bytes(2, "big") + wire.encode_string(text)
