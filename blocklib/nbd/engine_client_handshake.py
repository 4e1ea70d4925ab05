"""The client's side of the handshake, without a socket.

``hs = ClientHandshake("export")``; send ``hs.data_to_send()`` after every call; ``hs.receive_data(data)`` gives at most one
event: `TlsDue` (do the TLS handshake, then ``hs.tls_started()``), `Ready` at the end, or `ExportList` where the list was
wanted.  A server that refuses what we need is a RequestError, one that breaks the protocol a RemoteProtocolError; after
either, send ``data_to_send()`` if that is possible - we leave politely - and close.
"""

from __future__ import annotations

from collections.abc import Sequence

from blocklib.errors import LocalProtocolError, RemoteProtocolError, RequestError
from blocklib.nbd import wire
from blocklib.nbd.engine import Event, Export, ExportList, Handshake, Listed, Ready, Steps, Terms, TlsMode

_MAX_REPLY = 1 << 16
"""Bytes of one reply to an option; the longest that the protocol knows has two strings of 4096."""
_MOST_FOUND = 64
"""Metadata contexts that are taken of what a server lists: each is told of in every block status from then on."""
_INFOS = (wire.NBD_INFO_BLOCK_SIZE, wire.NBD_INFO_DESCRIPTION)


class ClientHandshake(Handshake):
    """Negotiates the transmission of one export, or with `listing` asks what there is.

    `tls`: "off" does without, "allow" takes it where the server has it, "require" goes no further without it.
    `structured` and `extended` replies are asked for, and with them `contexts`, the names of metadata contexts; one that ends
    with a colon means all that the server lists with such a name, up to some number.  What it does not have is missing from the
    terms.  More than `max_replies` replies to one option end the session.
    """

    def __init__(
        self,
        name: str = "",
        *,
        tls: TlsMode = "off",
        structured: bool = True,
        extended: bool = True,
        contexts: Sequence[str] = (wire.BASE_ALLOCATION,),
        listing: bool = False,
        max_replies: int = 10_000,
    ) -> None:
        super().__init__(self._converse())
        try:
            for text in (name, *contexts):
                wire.encode_string(text)
        except ValueError as exc:
            raise LocalProtocolError(f"not the name of an export or a context: {exc}") from exc
        self._name = name
        self._tls = tls
        self._wants_structured = structured
        self._wants_extended = extended
        self._wanted_contexts = tuple(contexts)
        self._listing = listing
        self._max_replies = max_replies
        self._under_tls = False
        self._structured = False
        self._extended = False
        self._unanswerable = False
        """EXPORT_NAME was sent: the only refusal there is is the end of the connection."""

    def _converse(self) -> Steps:
        magic, second = wire.MAGICS.unpack((yield wire.MAGICS.size))
        if magic != wire.NBD_MAGIC:
            raise RemoteProtocolError(f"no NBD server: it begins with {magic:#018x}")
        if second == wire.NBD_OLDSTYLE_MAGIC:
            raise RemoteProtocolError("the server speaks only the oldstyle negotiation, which has no named exports")
        if second != wire.NBD_OPTS_MAGIC:
            raise RemoteProtocolError(f"no NBD server: its second magic is {second:#018x}")
        (offered,) = wire.SERVER_FLAGS.unpack((yield wire.SERVER_FLAGS.size))
        flags = offered & (wire.NBD_FLAG_FIXED_NEWSTYLE | wire.NBD_FLAG_NO_ZEROES)
        self._output.append(wire.CLIENT_FLAGS.pack(flags))
        zeroes = 0 if flags & wire.NBD_FLAG_NO_ZEROES else wire.EXPORT_NAME_ZEROES
        if not flags & wire.NBD_FLAG_FIXED_NEWSTYLE:
            if self._tls == "require":
                raise RequestError("the server has no TLS: it does not speak fixed newstyle negotiation")
            if self._listing:
                raise RequestError("the server lists no exports: it does not speak fixed newstyle negotiation")
            yield (yield from self._export_name(zeroes))
            return
        yield from self._negotiate_tls()
        yield from self._negotiate_headers()
        yield (yield from (self._list() if self._listing else self._go(zeroes)))

    def _ask(self, option: int, data: bytes = b"") -> Steps:
        """One option and its replies: (final reply type, its data, the other replies as (type, data))."""
        self._output.append(wire.option(option, data))
        found: list[tuple[int, bytes]] = []
        for _ in range(self._max_replies):
            magic, echo, kind, length = wire.OPTION_REPLY.unpack((yield wire.OPTION_REPLY.size))
            if magic != wire.NBD_REP_MAGIC:
                raise RemoteProtocolError(f"the magic of a reply to {wire.option_name(option)} is {magic:#x}")
            if echo != option:
                raise RemoteProtocolError(f"a reply to {wire.option_name(echo)}, where {wire.option_name(option)} was asked")
            if length > _MAX_REPLY:
                raise RemoteProtocolError(f"a reply of {length} bytes to {wire.option_name(option)}")
            payload = (yield length) if length else b""
            if kind == wire.NBD_REP_ACK:
                if payload:
                    raise RemoteProtocolError(f"an NBD_REP_ACK with {length} bytes of data")
                return kind, b"", found
            if kind & wire.NBD_REP_FLAG_ERROR:
                if kind == wire.NBD_REP_ERR_SHUTDOWN:  # "it MUST initiate a soft disconnect"
                    raise self._refused(option, kind, payload)
                return kind, payload, found
            found.append((kind, payload))
        raise RemoteProtocolError(f"more than {self._max_replies} replies to {wire.option_name(option)}")

    def _refused(self, option: int, kind: int, message: bytes) -> RequestError:
        """The error for a refusal that we cannot live with; the session is given up."""
        self._output.append(wire.option(wire.NBD_OPT_ABORT))
        said = f" ({wire.shown(message)})" if message else ""
        what = f"export {self._name!r}" if option in (wire.NBD_OPT_GO, wire.NBD_OPT_INFO) else wire.option_name(option)
        return RequestError(f"{what}: {wire.reply_meaning(kind)}{said}")

    def _acknowledged(self, option: int) -> Steps:
        """Whether the server grants an option that has no data and no replies."""
        kind, _message, found = yield from self._ask(option)
        if found:
            raise RemoteProtocolError(f"a reply of type {found[0][0]} to {wire.option_name(option)}")
        return kind == wire.NBD_REP_ACK

    def _negotiate_tls(self) -> Steps:
        if self._tls == "off":
            return
        kind, message, _found = yield from self._ask(wire.NBD_OPT_STARTTLS)
        if kind == wire.NBD_REP_ACK:
            yield from self._switch_to_tls()
            self._under_tls = True
        elif self._tls == "require":
            raise self._refused(wire.NBD_OPT_STARTTLS, kind, message)

    def _negotiate_headers(self) -> Steps:
        if self._wants_extended:
            self._extended = yield from self._acknowledged(wire.NBD_OPT_EXTENDED_HEADERS)
        if self._wants_structured and not self._extended:
            self._structured = yield from self._acknowledged(wire.NBD_OPT_STRUCTURED_REPLY)

    def _select_contexts(self) -> Steps:
        """ID -> name of the metadata contexts that the server grants."""
        if not self._wanted_contexts or not (self._structured or self._extended):
            return {}
        wanted = yield from self._find_contexts()
        if not wanted:
            return {}
        kind, _message, found = yield from self._ask(
            wire.NBD_OPT_SET_META_CONTEXT, wire.contexts_data(self._name, wanted)
        )
        contexts: dict[int, str] = {}
        for number, name in _contexts_of(found):
            if number in contexts or name in contexts.values():
                raise RemoteProtocolError(f"the metadata context {name!r} or its ID {number} is given twice")
            if name not in wanted:
                raise RemoteProtocolError(f"the metadata context {name!r} was selected unasked")
            contexts[number] = name
        return contexts if kind == wire.NBD_REP_ACK else {}

    def _find_contexts(self) -> Steps:
        """The names of the contexts to ask for."""
        names = [name for name in self._wanted_contexts if not name.endswith(":")]
        for prefix in self._wanted_contexts:
            if prefix in names:
                continue
            data = wire.contexts_data(self._name, (prefix,))
            kind, _message, found = yield from self._ask(wire.NBD_OPT_LIST_META_CONTEXT, data)
            if kind == wire.NBD_REP_ACK:
                listed = [name for _number, name in _contexts_of(found) if name.startswith(prefix)]
                names += [name for name in dict.fromkeys(listed[:_MOST_FOUND]) if name not in names]
        return names

    def _go(self, zeroes: int) -> Steps:
        contexts = yield from self._select_contexts()
        kind, message, found = yield from self._ask(wire.NBD_OPT_GO, wire.go_data(self._name, _INFOS))
        if kind == wire.NBD_REP_ERR_UNSUP and not self._extended:
            return (yield from self._export_name(zeroes, contexts))
        if kind != wire.NBD_REP_ACK:
            raise self._refused(wire.NBD_OPT_GO, kind, message)
        export, told_sizes = _export_of(self._name, found)
        return self._ready(export, contexts, block_sizes=told_sizes)

    def _export_name(self, zeroes: int, contexts: dict[int, str] | None = None) -> Steps:
        self._output.append(wire.option(wire.NBD_OPT_EXPORT_NAME, wire.encode_string(self._name)))
        self._unanswerable = True
        data = yield wire.EXPORT_NAME_REPLY.size + zeroes
        self._unanswerable = False
        size, flags = wire.EXPORT_NAME_REPLY.unpack_from(data)
        return self._ready(_checked_export(self._name, size, flags), contexts or {}, block_sizes=False)

    def _ready(self, export: Export, contexts: dict[int, str], *, block_sizes: bool) -> Ready:
        structured = self._structured or self._extended
        terms = Terms(export, structured, self._extended, contexts, block_sizes, self._under_tls).settled()
        trailing = bytes(self._input)
        self._input.clear()
        return Ready(terms, trailing)

    def _list(self) -> Steps:
        kind, message, found = yield from self._ask(wire.NBD_OPT_LIST)
        if kind != wire.NBD_REP_ACK:
            raise self._refused(wire.NBD_OPT_LIST, kind, message)
        exports = []
        for reply, data in found:
            if reply != wire.NBD_REP_SERVER:
                raise RemoteProtocolError(f"a reply of type {reply} to NBD_OPT_LIST")
            name, description = wire.parse_server_data(data)
            exports.append((yield from self._describe(name, description)))
        self._output.append(wire.option(wire.NBD_OPT_ABORT))
        return ExportList(tuple(exports))

    def _describe(self, name: str, description: str) -> Steps:
        """What the server tells of one export of its list."""
        kind, _message, found = yield from self._ask(wire.NBD_OPT_INFO, wire.go_data(name, _INFOS))
        if kind != wire.NBD_REP_ACK:
            return Listed(name, description)
        export, _told_sizes = _export_of(name, found)
        contexts: tuple[str, ...] = ()
        if self._structured or self._extended:
            data = wire.contexts_data(name, ())
            kind, _message, found = yield from self._ask(wire.NBD_OPT_LIST_META_CONTEXT, data)
            if kind == wire.NBD_REP_ACK:
                contexts = tuple(context for _number, context in _contexts_of(found))
        return Listed(name, description or export.description, export, contexts)

    def _end_of_file(self) -> list[Event]:
        if self._unanswerable:
            self._finished = True
            raise RequestError(f"export {self._name!r}: the server closed the connection; perhaps it has no such export")
        return super()._end_of_file()


def _contexts_of(replies: Sequence[tuple[int, bytes]]) -> list[tuple[int, str]]:
    """(ID, name) of each context in the replies to an option."""
    for kind, _data in replies:
        if kind != wire.NBD_REP_META_CONTEXT:
            raise RemoteProtocolError(f"a reply of type {kind}, where metadata contexts were asked for")
    return [wire.parse_context_data(data) for _kind, data in replies]


def _export_of(name: str, replies: Sequence[tuple[int, bytes]]) -> tuple[Export, bool]:
    """The export that the replies to NBD_OPT_INFO or NBD_OPT_GO describe, and whether they tell its block sizes."""
    export: Export | None = None
    sizes: tuple[int, int, int] | None = None
    description = ""
    for kind, data in replies:
        if kind != wire.NBD_REP_INFO or len(data) < 2:
            raise RemoteProtocolError(f"a reply of type {kind} with {len(data)} bytes, where information was asked for")
        info = int.from_bytes(data[:2], "big")
        if info == wire.NBD_INFO_EXPORT:
            _check_length(data, wire.INFO_EXPORT.size, "NBD_INFO_EXPORT")
            export = _checked_export(name, *wire.INFO_EXPORT.unpack(data)[1:])
        elif info == wire.NBD_INFO_BLOCK_SIZE:
            _check_length(data, wire.INFO_BLOCK_SIZE.size, "NBD_INFO_BLOCK_SIZE")
            sizes = wire.INFO_BLOCK_SIZE.unpack(data)[1:]
            wire.check_block_sizes(*sizes)
        elif info == wire.NBD_INFO_DESCRIPTION:
            description = wire.shown(data[2:])
    if export is None:
        raise RemoteProtocolError("the server accepts the export without telling its size")
    export = export._replace(description=description)
    if sizes is None:
        return export, False
    return export._replace(min_block=sizes[0], preferred_block=sizes[1], max_payload=sizes[2]), True


def _check_length(data: bytes, length: int, what: str) -> None:
    if len(data) != length:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes; it has {length}")


def _checked_export(name: str, size: int, flags: int) -> Export:
    if size > wire.MAX_EXPORT_SIZE:
        raise RemoteProtocolError(f"an export of {size} bytes")
    if not flags & wire.NBD_FLAG_HAS_FLAGS:
        raise RemoteProtocolError(f"transmission flags {flags:#x} without NBD_FLAG_HAS_FLAGS")
    return Export(name, size, flags)
