"""Targets that are one side of an NBD connection and hear what an input says.

An engine answers or raises RemoteProtocolError (the client's also RequestError), says the same however what it hears is cut,
lets no request through that breaks a rule, and touches no memory but that of the requests in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from blocklib.errors import BlocklibError, RemoteProtocolError, RequestError
from blocklib.nbd import wire
from blocklib.nbd.engine import Closed, Ready, StartTls, Terms, TlsDue, TlsMode
from blocklib.nbd.engine_client import ClientTransmission, Pending
from blocklib.nbd.engine_client_handshake import ClientHandshake
from blocklib.nbd.engine_server import Request, ServerTransmission
from blocklib.nbd.engine_server_handshake import ServerHandshake
from tests.fuzz.source import Source
from tests.hostile.test_nbd_fuzz import ALL_FLAGS, CONTENT, EXPORT, SIZE, answer, check_request, honest_handshake

_TLS: Final[tuple[TlsMode, ...]] = ("off", "allow", "require")
_NAMES: Final = (b"disk", b"", b"other", b"x" * 300, b"\xff\xfe")
_QUERIES: Final = ("base:allocation", "qemu:", "none", "a:b", "")
_MOST_MESSAGES: Final = 40
_GAP: Final = 64


def nbd_server(data: bytes) -> None:
    """A client's handshake, or its requests."""
    source = Source(data)
    (_serve_handshake if source.byte() & 1 else _serve_requests)(source)


def nbd_client(data: bytes) -> None:
    """A server's handshake, or its replies."""
    source = Source(data)
    (_hear_handshake if source.byte() & 1 else _hear_replies)(source)


def _cut(stream: bytes, piece: int) -> Iterator[bytes]:
    return (stream[start : start + piece] for start in range(0, len(stream), piece))


def _piece(source: Source) -> int:
    return source.chosen((1, 3, 28, 100))


def _compare(told: list[Any], at_once: list[Any]) -> None:
    """What an engine tells of a stream in pieces, and of all of it; the last it tells is an error, where there is one.

    Where there is one, what came with it in one piece need not be told.
    """
    if isinstance(at_once[-1], BlocklibError):
        assert repr(told[-1]) == repr(at_once[-1])
        assert str(at_once[-1]).isprintable()
        told, at_once = told[:-1], at_once[:-1]
        told = told[: len(at_once)]
    assert told == at_once, "what is heard means something else when it is cut in another way"


# -- the server's half -----------------------------------------------------------------------------------------------------


def _option(source: Source) -> bytes:
    kind = source.byte()
    number = kind % 13 if kind < 250 else source.number() & 0xFFFFFFFF
    name = source.chosen(_NAMES)
    match source.byte() % 6:
        case 0:
            data = b""
        case 1:
            data = source.take(source.byte())
        case 2:
            data = name
        case 3:
            data = len(name).to_bytes(4, "big") + name + (n := source.byte() % 5).to_bytes(2, "big") + source.take(2 * n)
        case 4:
            queries = [source.chosen(_QUERIES).encode() for _ in range(source.byte() % 4)]
            data = len(name).to_bytes(4, "big") + name + len(queries).to_bytes(4, "big")
            data += b"".join(len(query).to_bytes(4, "big") + query for query in queries)
        case _:
            data = source.number().to_bytes(8, "big")[-4:] + source.take(source.byte() % 30)
    length = len(data) if source.byte() < 230 else source.number() & 0xFFFFFFFF
    return wire.OPTION.pack(wire.NBD_OPTS_MAGIC, number, length) + data


def _messages(source: Source, honest: Any) -> bytes:
    """Honest messages, or bytes as they come."""
    stream = b""
    for _ in range(_MOST_MESSAGES):
        if source.is_empty:
            break
        stream += honest(source) if source.byte() < 245 else source.take(source.byte() % 40)
    return stream


def _serve_handshake(source: Source) -> None:
    tls, piece, refusals = source.chosen(_TLS), _piece(source), source.byte()
    flags = (source.byte() % 5).to_bytes(4, "big")
    stream = flags + _messages(source, _option)
    told, at_once = (_handshake_told(tls, refusals, _cut(stream, n)) for n in (piece, len(stream)))
    if TlsDue() not in told:  # what comes in clear text with the last word before TLS is an error, and later it is not ours
        _compare(told, at_once)


def _handshake_told(tls: TlsMode, refusals: int, parts: Iterator[bytes]) -> list[Any]:
    """Every event of a handshake, and all that the server says."""
    server = ServerHandshake(tls=tls)
    told: list[Any] = []
    under_tls = False
    said = server.data_to_send()
    try:
        for part in parts:
            events = server.receive_data(part)
            while events:
                (event,) = events
                if isinstance(event, Ready):  # what came behind the last option is told with it
                    return [*told, event.terms, said + server.data_to_send()]
                told.append(event)
                if isinstance(event, Closed):
                    return [*told, said + server.data_to_send()]
                refuses = refusals >> len(told) % 8 & 1
                under_tls |= isinstance(event, TlsDue)
                assert under_tls or tls != "require" or isinstance(event, StartTls), "an export is spoken of before TLS"
                events = answer(server, event, bool(refuses))
    except RemoteProtocolError as exc:
        server.data_to_send()
        return [*told, exc]
    return [*told, said + server.data_to_send()]


def _terms(source: Source) -> Terms:
    kind = source.byte()
    structured, extended = bool(kind & 1), bool(kind & 2)
    contexts = {0: "base:allocation", 9: "x:y"} if kind & 3 and kind & 4 else {}
    flags = ALL_FLAGS if kind & 8 else source.short() & 0x1FFF
    export = EXPORT._replace(flags=flags)
    return Terms(export, structured or extended, extended, contexts, bool(kind & 16)).settled()


def _serve_requests(source: Source) -> None:
    terms, piece = _terms(source), _piece(source)
    stream = _messages(source, lambda source: _request(source, extended=terms.extended))
    _compare(*(_requests_told(terms, _cut(stream, n)) for n in (piece, len(stream) or 1)))


def _request(source: Source, *, extended: bool) -> bytes:
    command, flags = source.byte(), source.byte()
    command = command % 9 if command < 250 else command << 4
    flags = 0 if flags < 128 else flags & 63 if flags < 250 else source.short()
    length = source.number()
    payload = b""
    if extended and source.byte() & 1:
        flags |= wire.NBD_CMD_FLAG_PAYLOAD_LEN
    if command == wire.NBD_CMD_WRITE or flags & wire.NBD_CMD_FLAG_PAYLOAD_LEN:
        kind = source.byte()
        payload = (bytes(512), source.take(kind >> 2), wire.status_request_payload(512, [0, 9][: kind >> 2 & 3]))[kind % 3]
        if source.byte() < 200:
            length = len(payload)
    head = wire.EXTENDED_REQUEST if extended else wire.REQUEST
    magic = wire.NBD_EXTENDED_REQUEST_MAGIC if extended else wire.NBD_REQUEST_MAGIC
    cookie, offset = source.byte(), source.number()
    return head.pack(magic, flags, command, cookie, offset, length if extended else length & 0xFFFFFFFF) + payload


def _allocate(length: int) -> bytearray:
    assert length <= wire.DEFAULT_MAX_PAYLOAD
    return bytearray(length)


def _requests_told(terms: Terms, parts: Iterator[bytes]) -> list[Any]:
    engine = ServerTransmission(terms, b"", allocate=_allocate)
    told: list[Any] = []

    def take(requests: list[Request]) -> None:
        for one in requests:
            check_request(terms, one, engine)
            data = bytes(one.data) if one.data is not None else None
            told.append((one.command, one.flags, one.cookie, one.offset, one.length, one.error, data))

    try:
        for part in parts:
            take(engine.receive_data(part))
        take(engine.buffer_updated(0))
    except RemoteProtocolError as exc:
        return [*told, exc]
    return [*told, None]


# -- the client's half -----------------------------------------------------------------------------------------------------


def _hear_handshake(source: Source) -> None:
    kind, piece = source.byte(), _piece(source)
    said, _ = honest_handshake(extended=bool(kind & 1), structured=bool(kind & 2))
    stream = bytearray(b"".join(said) if kind & 4 else b"".join(said[:1]))
    for _ in range(kind >> 3 & 7):  # bytes changed, lost or added
        place, what = source.short() % (len(stream) + 1), source.byte()
        part = source.take(what >> 2 & 15)
        if what & 3:
            stream[place : place + len(part)] = part
        else:
            stream[place:place] = part
    if not kind & 4:
        stream += _messages(source, _option_reply)
    _compare(*(_client_told(_cut(bytes(stream), n)) for n in (piece, len(stream) or 1)))


def _option_reply(source: Source) -> bytes:
    kind = source.byte()
    option = (wire.NBD_OPT_GO, 8, 10, 11, 5, 1, 3, source.byte())[kind & 7]
    reply = (1, 2, 3, 4, 0x80000001, 0x80000002, 0x80000005, source.number() & 0xFFFFFFFF)[kind >> 3 & 7]
    match source.byte() % 5:
        case 0:
            data = b""
        case 1:
            data = (0).to_bytes(2, "big") + source.number().to_bytes(8, "big") + source.take(2)
        case 2:
            data = (3).to_bytes(2, "big") + source.take(12)
        case 3:
            data = source.take(4) + source.chosen(_QUERIES).encode()
        case _:
            data = source.take(source.byte())
    length = len(data) if source.byte() < 230 else source.number() & 0xFFFFFFFF
    return wire.OPTION_REPLY.pack(wire.NBD_REP_MAGIC, option, reply, length) + data


def _client_told(parts: Iterator[bytes]) -> list[Any]:
    client = ClientHandshake("disk", contexts=("base:allocation",))
    said = b""
    try:
        for part in parts:
            events = client.receive_data(part)
            said += client.data_to_send()
            if events:
                (event,) = events
                assert isinstance(event, (Ready, Closed))
                if isinstance(event, Ready):
                    assert event.terms.export.size <= wire.MAX_EXPORT_SIZE
                    return [event.terms, said]
                return [event, said]
    except (RemoteProtocolError, RequestError) as exc:
        client.data_to_send()
        return [exc]
    return [None, said]


def _hear_replies(source: Source) -> None:
    """Replies to reads and questions that a client has sent, from a server that is honest at times."""
    kind, piece = source.byte(), _piece(source)
    mode = kind % 3
    contexts = {0: "base:allocation"} if mode else {}
    terms = Terms(EXPORT, mode > 0, mode == 2, contexts, True).settled()
    ranges = [(512 * source.byte(), 512 * (source.byte() % 28 + 1)) for _ in range(kind >> 2 & 3)]
    n_status = kind >> 4 & 1 if mode else 0
    client = ClientTransmission(terms)
    memory = bytearray(b"\xee" * (sum(length for _, length in ranges) + _GAP * (len(ranges) + 1)))
    places: list[tuple[Pending, int]] = []
    at = _GAP
    for offset, length in ranges:
        into = memoryview(memory)[at : at + length]
        places.append((client.request(wire.NBD_CMD_READ, min(offset, SIZE - length), length, into=into), at))
        at += length + _GAP
    requests = [pending for pending, _ in places]
    requests += [client.request(wire.NBD_CMD_BLOCK_STATUS, 0, 8192) for _ in range(n_status)]
    requests.append(client.request(wire.NBD_CMD_FLUSH, 0, 0))
    stream = _messages(source, lambda source: _reply(source, requests, mode))
    done: list[Pending] = []
    with suppress(RemoteProtocolError):
        for part in _cut(stream, piece * 10):
            done += client.receive_data(part)
    assert len({pending.cookie for pending in done}) == len(done), "a request has ended twice"
    at = 0
    for pending, start in places:
        assert memory[at:start] == b"\xee" * (start - at), "memory between the buffers was touched"
        at = start + pending.length
    assert memory[at:] == b"\xee" * _GAP, "memory behind the buffers was touched"


def _reply(source: Source, requests: list[Pending], mode: int) -> bytes:
    kind = source.byte()
    one = requests[(kind >> 5) % len(requests)]
    cookie = one.cookie if kind & 31 else source.number()
    if mode == 0 or kind & 31 == 1:
        error = 0 if source.byte() < 200 else source.number() & 0xFFFFFFFF
        length = one.length if one.command == wire.NBD_CMD_READ and not error else 0
        return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, error, cookie) + bytes(length)
    chunk = source.byte()
    types = (0, 1, 2, 3, 5, 6, 0x8001, 0x8002, chunk << 3)
    chunk_type = types[chunk % len(types)]
    flags = 1 if source.byte() & 1 else 0
    start = one.offset + 512 * (source.byte() % 64)
    length = 512 * (source.byte() % 30)
    if source.byte() > 220:
        start, length = source.number(), source.number() & 0xFFFF
    match chunk_type:
        case 0:
            payload = b""
        case 1:
            payload = start.to_bytes(8, "big") + CONTENT[:length]
        case 2:
            payload = start.to_bytes(8, "big") + length.to_bytes(4, "big")
        case 5:
            payload = source.chosen((b"\0\0\0\0", source.take(4))) + source.take(source.byte() % 40)
        case 6:
            n = source.byte() % 4
            payload = bytes(4) + n.to_bytes(4, "big") + source.take(16 * n)
        case _:
            payload = (5).to_bytes(4, "big") + (n := source.byte() % 20).to_bytes(2, "big") + source.take(n + 8)
    size = len(payload) if source.byte() < 235 else source.number() & 0xFFFFFFFF
    if mode == 2:
        magic = wire.NBD_EXTENDED_REPLY_MAGIC
        return wire.EXTENDED_REPLY.pack(magic, flags, chunk_type, cookie, one.offset, size) + payload
    return wire.STRUCTURED_REPLY.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, flags, chunk_type, cookie, size) + payload
