"""Fuzzing of the NBD engines: honest conversations, damaged anywhere and cut anywhere, and messages that never were honest.

Whatever comes, an engine answers or raises RemoteProtocolError; it allocates nothing beyond its limits, lets no request
through that breaks a rule, and touches no memory but that of the requests in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given, note
from hypothesis import strategies as st

from blocklib.errors import RemoteProtocolError, RequestError
from blocklib.nbd import wire
from blocklib.nbd.engine import Closed, ContextsWanted, Event, Export, ExportWanted, ListExports, Ready, StartTls, Terms, TlsDue
from blocklib.nbd.engine_client import ClientTransmission, Pending
from blocklib.nbd.engine_client_handshake import ClientHandshake
from blocklib.nbd.engine_server import Request, ServerTransmission
from blocklib.nbd.engine_server_handshake import ServerHandshake

ALL_FLAGS = 0x1FFF & ~(wire.NBD_FLAG_READ_ONLY | wire.NBD_FLAG_SEND_RESIZE)
SIZE = 1 << 16
CONTENT = bytes(range(256)) * (SIZE // 256)
EXPORT = Export("disk", SIZE, ALL_FLAGS, "a disk", 512, 4096, 1 << 14)

numbers = st.one_of(
    st.integers(0, 12),
    st.sampled_from([511, 512, 513, 4096, SIZE - 512, SIZE, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]),
)
kinds = st.sampled_from(["flip", "drop", "double", "insert"])
damages = st.lists(st.tuples(st.integers(0, 4000), kinds, st.binary(min_size=1, max_size=9)), max_size=3)


def damaged(stream: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    """The stream with some of its bytes changed, lost, repeated or added."""
    data = bytearray(stream)
    for place, kind, extra in changes:
        start = place % (len(data) + 1)
        end = start + len(extra)
        if kind == "flip":
            data[start:end] = bytes(old ^ new for old, new in zip(data[start:end], extra, strict=False))
        elif kind == "drop":
            del data[start:end]
        elif kind == "double":
            data[start:start] = data[start:end]
        else:
            data[start:start] = extra
    return bytes(data)


def cut(stream: bytes, piece: int) -> Iterator[bytes]:
    return (stream[start : start + piece] for start in range(0, len(stream), piece))


pieces = st.sampled_from([1, 3, 28, 100, 1 << 20])


# -- the server's half -------------------------------------------------------------------------------------------------


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """One option, honest or nearly so."""
    number = draw(st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF)))
    name = draw(st.sampled_from(["disk", "", "other", "x" * 300]))
    queries = draw(st.lists(st.sampled_from(["base:allocation", "qemu:", "none", "a:b"]), max_size=3))
    data = draw(
        st.one_of(
            st.just(b""),
            st.binary(max_size=40),
            st.just(name.encode()),
            st.builds(wire.go_data, st.just(name), st.lists(st.integers(0, 5), max_size=4)),
            st.just(wire.contexts_data(name, queries)),
        )
    )
    length = draw(st.one_of(st.just(len(data)), st.just(len(data)), numbers.map(lambda n: n & 0xFFFFFFFF)))
    return wire.OPTION.pack(wire.NBD_OPTS_MAGIC, number, length) + data


def answer(server: ServerHandshake, event: Event, refuses: bool) -> list[Event]:
    if refuses and not isinstance(event, TlsDue):
        return server.refuse(wire.NBD_REP_ERR_POLICY, "not today")
    match event:
        case ListExports():
            return server.send_exports([("disk", "a disk"), ("", "")])
        case ExportWanted():
            return server.send_export(EXPORT._replace(name=event.name))
        case ContextsWanted():
            return server.send_contexts([name for name in event.queries if ":" in name] or ["base:allocation"])
        case StartTls():
            return server.start_tls()
        case _:
            return server.tls_started()


@given(
    st.sampled_from([0, 1, 2, 3, 3, 3, 4, 0xFFFFFFFF]),
    st.lists(options(), max_size=6),
    damages,
    pieces,
    st.sampled_from(["off", "allow", "require"]),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_any_options_are_answered_or_end_the_session(
    client_flags: int, messages: list[bytes], changes: list[tuple[int, str, bytes]], piece: int, tls: Any, refusals: list[bool]
) -> None:
    server = ServerHandshake(tls=tls)
    server.data_to_send()
    stream = damaged(wire.CLIENT_FLAGS.pack(client_flags) + b"".join(messages), changes)
    told_before_tls = False
    under_tls = False
    try:
        for part in cut(stream, piece):
            events = server.receive_data(part)
            while events:
                event = events[0]
                if isinstance(event, (Ready, Closed)):
                    return
                under_tls |= isinstance(event, TlsDue)
                told_before_tls |= not under_tls and not isinstance(event, StartTls)
                events = answer(server, event, refusals.pop() if len(refusals) > 1 else False)
    except RemoteProtocolError:
        return
    finally:
        assert not (tls == "require" and told_before_tls), "nothing about an export is asked for before TLS"
        server.data_to_send()


@st.composite
def requests(draw: st.DrawFn, *, extended: bool) -> bytes:
    """One request, honest or nearly so."""
    command = draw(st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)))
    flags = draw(st.one_of(st.just(0), st.integers(0, 63), st.integers(0, 0xFFFF)))
    payload = b""
    length = draw(numbers)
    if extended and draw(st.booleans()):
        flags |= wire.NBD_CMD_FLAG_PAYLOAD_LEN
    if command == wire.NBD_CMD_WRITE or flags & wire.NBD_CMD_FLAG_PAYLOAD_LEN:
        payload = draw(st.one_of(st.just(bytes(512)), st.binary(max_size=24), st.just(wire.status_request_payload(512, [0]))))
        length = draw(st.one_of(st.just(len(payload)), numbers))
    head = wire.EXTENDED_REQUEST if extended else wire.REQUEST
    magic = wire.NBD_EXTENDED_REQUEST_MAGIC if extended else wire.NBD_REQUEST_MAGIC
    cookie, offset = draw(numbers), draw(numbers)
    return head.pack(magic, flags, command, cookie, offset, length if extended else length & 0xFFFFFFFF) + payload


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Terms, bytes]:
    """Terms, and what a client sends under them."""
    structured, extended = draw(st.booleans()), draw(st.booleans())
    contexts = {0: "base:allocation", 9: "x:y"} if (structured or extended) and draw(st.booleans()) else {}
    flags = draw(st.one_of(st.just(ALL_FLAGS), st.integers(0, 0x1FFF)))
    terms = Terms(EXPORT._replace(flags=flags), structured or extended, extended, contexts, draw(st.booleans())).settled()
    stream = b"".join(draw(st.lists(requests(extended=extended), max_size=8)))
    return terms, stream


def check_request(terms: Terms, request: Request, engine: ServerTransmission) -> None:
    """A request that was let through keeps the rules, and any can be answered."""
    if request.error:
        assert engine.error(request, request.error, request.message)
        return
    if request.command == wire.NBD_CMD_DISC:
        return
    assert request.offset + request.length <= SIZE
    if request.command == wire.NBD_CMD_WRITE:
        assert request.data is not None
        assert len(request.data) == request.length
        assert not terms.export.flags & wire.NBD_FLAG_READ_ONLY
    if request.command == wire.NBD_CMD_BLOCK_STATUS:
        assert request.contexts
        for number in request.contexts:
            assert engine.status(request, number, [(512, 0), (SIZE, 3)])
    elif request.command == wire.NBD_CMD_READ:
        assert engine.read_head(request)
    assert engine.done(request)


@given(sessions(), damages, pieces)
def test_any_requests_are_checked_or_end_the_connection(
    session: tuple[Terms, bytes], changes: list[tuple[int, str, bytes]], piece: int
) -> None:
    terms, stream = session

    def allocate(length: int) -> bytearray:
        assert length <= wire.DEFAULT_MAX_PAYLOAD
        return bytearray(min(length, 1 << 20))[:length] if length <= 1 << 20 else bytearray(length)

    engine = ServerTransmission(terms, stream[:5], allocate=allocate)
    try:
        for request in engine.pending():
            check_request(terms, request, engine)
        for part in cut(damaged(stream[5:], changes), piece):
            for request in engine.receive_data(part):
                check_request(terms, request, engine)
        engine.buffer_updated(0)
    except RemoteProtocolError as exc:
        note(str(exc))


# -- the client's half -------------------------------------------------------------------------------------------------


def honest_handshake(*, extended: bool, structured: bool) -> tuple[list[bytes], ClientHandshake]:
    """What a server says to a client, piece by piece, and that client, at its end."""
    client = ClientHandshake("disk", contexts=("base:allocation",))
    server = ServerHandshake(extended=extended, structured=structured)
    said = []
    while True:
        said.append(server.data_to_send())
        if client.receive_data(said[-1]):
            return said, client
        events = server.receive_data(client.data_to_send())
        while events and not isinstance(events[0], Ready):
            events = answer(server, events[0], False)


@given(st.booleans(), st.booleans(), damages, pieces)
def test_any_server_is_understood_or_refused_in_the_handshake(
    extended: bool, structured: bool, changes: list[tuple[int, str, bytes]], piece: int
) -> None:
    said, _ = honest_handshake(extended=extended, structured=structured)
    stream = damaged(b"".join(said), changes)
    client = ClientHandshake("disk", contexts=("base:allocation",))
    try:
        for part in cut(stream, piece):
            if events := client.receive_data(part):
                (event,) = events
                assert isinstance(event, Ready)
                assert event.terms.export.size <= wire.MAX_EXPORT_SIZE
                return
    except (RemoteProtocolError, RequestError) as exc:
        error = str(exc)
    else:
        error = ""
    assert error.isprintable()
    client.data_to_send()


reads = st.tuples(st.integers(0, 100).map(lambda n: 512 * n), st.integers(1, 28).map(lambda n: 512 * n))


@given(
    st.sampled_from(["simple", "structured", "extended"]),
    st.lists(reads, min_size=1, max_size=4),
    st.integers(0, 2),
    damages,
    pieces,
    st.randoms(use_true_random=False),
)
def test_any_replies_fill_the_right_buffers_or_end_the_connection(
    mode: str, ranges: list[tuple[int, int]], n_status: int, changes: list[tuple[int, str, bytes]], piece: int, random: Any
) -> None:
    contexts = {} if mode == "simple" else {0: "base:allocation"}
    terms = Terms(EXPORT, mode != "simple", mode == "extended", contexts, True).settled()
    client, server = ClientTransmission(terms), ServerTransmission(terms)
    memory = bytearray(b"\xee" * (sum(length for _, length in ranges) + 64 * (len(ranges) + 1)))
    places: list[tuple[Pending, int, int]] = []
    at = 64
    for offset, length in ranges:
        pending = client.request(wire.NBD_CMD_READ, offset, length, into=memoryview(memory)[at : at + length])
        places.append((pending, at, offset))
        at += length + 64
    heads = [pending.head for pending, _, _ in places]
    if contexts:
        heads += [client.request(wire.NBD_CMD_BLOCK_STATUS, 0, 8192).head for _ in range(n_status)]
    stream = damaged(b"".join(honest_replies(server, b"".join(heads), random)), changes)
    done: list[Pending] = []
    try:
        for part in cut(stream, piece):
            done += client.receive_data(part)
    except RemoteProtocolError as exc:
        note(str(exc))
        assert changes, "an honest server was accused"
    assert len({pending.cookie for pending in done}) == len(done)
    if not changes:
        assert not client.in_flight
    at = 0
    for pending, start, offset in places:
        assert memory[at:start] == b"\xee" * (start - at), "memory between the buffers was touched"
        at = start + pending.length
        if not changes:
            assert memory[start:at] == CONTENT[offset : offset + pending.length]
    assert memory[at:] == b"\xee" * 64


def honest_replies(server: ServerTransmission, stream: bytes, random: Any) -> Iterator[bytes]:
    for request in server.receive_data(stream):
        assert not request.error
        offset, length = request.offset, request.length
        if request.command == wire.NBD_CMD_BLOCK_STATUS:
            yield server.status(request, 0, [(512, 0), (1024, 3), (SIZE, 0)], done=True)
        elif not server.structured:
            yield server.read_head(request) + CONTENT[offset : offset + length]
        else:
            middle = random.randrange(length)
            parts = [(offset, middle), (offset + middle, length - middle)]
            random.shuffle(parts)
            for start, n in parts:
                if n:
                    yield server.data_head(request, start, n) + CONTENT[start : start + n]
            yield server.done(request)
