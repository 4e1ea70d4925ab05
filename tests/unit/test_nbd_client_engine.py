"""The client's half of the NBD protocol: against our server's half, and against servers that break the protocol."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from blocklib.errors import LocalProtocolError, RemoteProtocolError, RequestError
from blocklib.nbd import wire
from blocklib.nbd.engine import (
    Closed,
    ContextsWanted,
    Event,
    Export,
    ExportList,
    ExportWanted,
    ListExports,
    Ready,
    StartTls,
    Terms,
    TlsDue,
    TlsMode,
)
from blocklib.nbd.engine_client import ClientTransmission, Pending
from blocklib.nbd.engine_client_handshake import ClientHandshake
from blocklib.nbd.engine_server import Request, ServerTransmission
from blocklib.nbd.engine_server_handshake import ServerHandshake

ALL_FLAGS = 0x1FFF & ~(wire.NBD_FLAG_READ_ONLY | wire.NBD_FLAG_SEND_RESIZE)
EXPORT = Export("disk", 1 << 20, ALL_FLAGS, "a disk", 512, 4096, 1 << 16)
GREETING = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 3)


# -- handshake ---------------------------------------------------------------------------------------------------------


def answer(server: ServerHandshake, event: Event) -> list[Event]:
    """What a server with one export and two contexts says."""
    match event:
        case ListExports():
            return server.send_exports([("disk", "a disk"), ("secret", "")])
        case ExportWanted(name="disk"):
            return server.send_export(EXPORT)
        case ExportWanted():
            return server.refuse(wire.NBD_REP_ERR_UNKNOWN, "there is only 'disk'")
        case ContextsWanted(queries=queries):
            known = ["base:allocation", "qemu:allocation-depth"]
            return server.send_contexts([name for name in known if name in queries or not queries])
        case StartTls():
            return server.start_tls()
        case TlsDue():
            return server.tls_started()
        case _:
            return []


def talk(client: ClientHandshake, server: ServerHandshake) -> tuple[Event, Event | None]:
    """Let both halves speak until the client has its answer: that, and what the server made of it."""
    at_server: Event | None = None
    while True:
        data = server.data_to_send()
        events = client.receive_data(data) if data else []
        if events and not isinstance(events[0], TlsDue):
            return events[0], at_server
        if events:
            client.tls_started()
        data = client.data_to_send()
        events = server.receive_data(data) if data else []
        while events and not isinstance(events[0], (Ready, Closed)):
            events = answer(server, events[0])
        at_server = events[0] if events else at_server


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("tls", ["off", "allow", "require"])
def test_both_halves_agree_on_the_terms(extended: bool, structured: bool, tls: TlsMode) -> None:
    client = ClientHandshake("disk", tls=tls, contexts=("base:allocation", "other:context"))
    server = ServerHandshake(tls=tls, structured=structured, extended=extended)
    ready, at_server = talk(client, server)
    assert isinstance(ready, Ready)
    assert isinstance(at_server, Ready)
    theirs, ours = at_server.terms, ready.terms
    assert (ours.structured, ours.extended, ours.tls) == (structured or extended, extended, tls != "off")
    assert ours == theirs._replace(export=theirs.export._replace(description=ours.export.description))
    assert ours.contexts == ({0: "base:allocation"} if structured or extended else {})
    assert ours.block_sizes


def test_a_server_without_tls_is_left_where_tls_is_demanded() -> None:
    client = ClientHandshake("disk", tls="require")
    with pytest.raises(RequestError, match="policy"):
        talk(client, ServerHandshake(tls="off"))
    assert client.data_to_send() == wire.option(wire.NBD_OPT_ABORT)


def test_a_server_that_demands_tls_refuses_a_client_without() -> None:
    with pytest.raises(RequestError, match="demands TLS"):
        talk(ClientHandshake("disk"), ServerHandshake(tls="require"))


def test_an_unknown_export_is_refused_by_name_and_with_the_servers_words() -> None:
    client = ClientHandshake("other")
    with pytest.raises(RequestError, match=r"'other'.*there is only 'disk'"):
        talk(client, ServerHandshake())
    assert client.data_to_send() == wire.option(wire.NBD_OPT_ABORT)


def test_the_list_comes_with_what_the_server_tells_of_each_export() -> None:
    found, _ = talk(ClientHandshake(listing=True), ServerHandshake())
    assert isinstance(found, ExportList)
    disk, secret = found.exports
    assert (disk.name, disk.description, disk.contexts) == ("disk", "a disk", ("base:allocation", "qemu:allocation-depth"))
    assert disk.export is not None
    assert disk.export.size == 1 << 20
    assert (secret.name, secret.export) == ("secret", None)


def scripted(client: ClientHandshake, replies: Sequence[bytes]) -> Event:
    """The event at the end of a conversation in which the server says `replies`, one for each thing the client says."""
    client.data_to_send()
    events: list[Event] = []
    for reply in replies:
        events = client.receive_data(reply)
        if events:
            return events[0]
        client.data_to_send()
    raise AssertionError("the conversation has not ended")


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.option_reply(option, kind, data)


ACK, UNSUP = wire.NBD_REP_ACK, wire.NBD_REP_ERR_UNSUP
NO_EXTENDED = reply(wire.NBD_OPT_EXTENDED_HEADERS, UNSUP)
NO_STRUCTURED = reply(wire.NBD_OPT_STRUCTURED_REPLY, UNSUP)
INFO = reply(wire.NBD_OPT_GO, wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(0, 4096, 1))
GO = INFO + reply(wire.NBD_OPT_GO, ACK)


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_a_server_without_go_is_asked_by_export_name(flags: int) -> None:
    greeting = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, flags)
    options = [NO_EXTENDED, NO_STRUCTURED, reply(wire.NBD_OPT_GO, UNSUP)] if flags & 1 else []
    size = wire.EXPORT_NAME_REPLY.pack(4096, 1) + (b"" if flags & 2 else bytes(124))
    ready = scripted(ClientHandshake("disk"), [greeting, *options, size])
    assert isinstance(ready, Ready)
    assert ready.terms == Terms(Export("disk", 4096, 1))


def test_a_server_that_closes_after_export_name_has_refused() -> None:
    client = ClientHandshake("disk")
    client.receive_data(wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 0))
    with pytest.raises(RequestError, match="'disk'"):
        client.receive_data(b"")


def test_errors_of_other_options_than_go_are_lived_with() -> None:
    contexts = reply(wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_META_CONTEXT, b"\0\0\0\1base:allocation")
    failed = contexts + reply(wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_ERR_UNKNOWN, b"sorry")
    structured = reply(wire.NBD_OPT_STRUCTURED_REPLY, ACK)
    ready = scripted(ClientHandshake("disk"), [GREETING, NO_EXTENDED, structured, failed, GO])
    assert isinstance(ready, Ready)
    assert ready.terms.contexts == {}, "contexts before an error do not count"


def context_reply(*names: tuple[int, str]) -> list[bytes]:
    option = wire.NBD_OPT_SET_META_CONTEXT
    found = b"".join(reply(option, wire.NBD_REP_META_CONTEXT, wire.context_data(*name)) for name in names)
    return [GREETING, reply(wire.NBD_OPT_EXTENDED_HEADERS, ACK), found + reply(option, ACK)]


def listed_reply(*names: str) -> bytes:
    option = wire.NBD_OPT_LIST_META_CONTEXT
    found = [reply(option, wire.NBD_REP_META_CONTEXT, wire.context_data(0, name)) for name in names]
    return b"".join(found) + reply(option, ACK)


def test_a_name_that_ends_with_a_colon_is_asked_for_and_what_it_finds_is_selected() -> None:
    listed = listed_reply("qemu:dirty-bitmap:b", "qemu:dirty-bitmap:a", "other:c", "qemu:dirty-bitmap:b")
    greeting, headers, selected = context_reply((0, "base:allocation"), (1, "qemu:dirty-bitmap:b"), (2, "qemu:dirty-bitmap:a"))
    client = ClientHandshake("disk", contexts=("base:allocation", "qemu:dirty-bitmap:"))
    ready = scripted(client, [greeting, headers, listed, selected, GO])
    assert isinstance(ready, Ready)
    assert list(ready.terms.contexts.values()) == ["base:allocation", "qemu:dirty-bitmap:b", "qemu:dirty-bitmap:a"]


def test_a_server_that_lists_no_contexts_is_asked_for_the_others() -> None:
    greeting, headers, selected = context_reply((0, "base:allocation"))
    refused = reply(wire.NBD_OPT_LIST_META_CONTEXT, UNSUP)
    ready = scripted(ClientHandshake("disk", contexts=("base:allocation", "x:")), [greeting, headers, refused, selected, GO])
    assert isinstance(ready, Ready)
    assert list(ready.terms.contexts.values()) == ["base:allocation"]
    ready = scripted(ClientHandshake("disk", contexts=("x:",)), [greeting, headers, refused, GO])
    assert isinstance(ready, Ready)
    assert ready.terms.contexts == {}


def test_a_server_that_lists_without_end_is_believed_up_to_some_number() -> None:
    names = [f"x:{index}" for index in range(1000)]
    greeting, headers, _selected = context_reply()
    client = ClientHandshake("disk", contexts=("x:",))
    client.data_to_send()
    for data in (greeting, headers, listed_reply(*names)):
        assert client.receive_data(data) == []
        said = client.data_to_send()
    assert said == wire.option(wire.NBD_OPT_SET_META_CONTEXT, wire.contexts_data("disk", names[:64]))


def go_reply(*infos: bytes) -> list[bytes]:
    replies = b"".join(reply(wire.NBD_OPT_GO, wire.NBD_REP_INFO, info) for info in infos)
    return [GREETING, NO_EXTENDED, NO_STRUCTURED, replies + reply(wire.NBD_OPT_GO, ACK)]


def block_sizes(*sizes: int) -> list[bytes]:
    return go_reply(wire.INFO_EXPORT.pack(0, 4096, 1), wire.INFO_BLOCK_SIZE.pack(3, *sizes))


BROKEN_HANDSHAKES: dict[str, list[bytes]] = {
    "another protocol": [b"SSH-2.0-OpenSSH_9.2p1\r\n"],
    "a wrong second magic": [wire.GREETING.pack(wire.NBD_MAGIC, 7, 3)],
    "oldstyle": [wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OLDSTYLE_MAGIC, 3)],
    "a wrong reply magic": [GREETING, wire.OPTION_REPLY.pack(1, wire.NBD_OPT_EXTENDED_HEADERS, ACK, 0)],
    "a reply to something else": [GREETING, reply(wire.NBD_OPT_LIST, ACK)],
    "data with an acknowledgement": [GREETING, reply(wire.NBD_OPT_EXTENDED_HEADERS, ACK, b"x")],
    "an unexpected reply": [GREETING, reply(wire.NBD_OPT_EXTENDED_HEADERS, wire.NBD_REP_SERVER) + NO_EXTENDED],
    "a huge reply": [GREETING, wire.OPTION_REPLY.pack(wire.NBD_REP_MAGIC, wire.NBD_OPT_EXTENDED_HEADERS, ACK, 0xFFFFFFFF)],
    "endless replies": [GREETING, NO_EXTENDED, NO_STRUCTURED, INFO * 11_000],
    "an export without its size": [GREETING, NO_EXTENDED, NO_STRUCTURED, reply(wire.NBD_OPT_GO, ACK)],
    "information of the wrong length": go_reply(wire.INFO_EXPORT.pack(0, 4096, 1) + b"x"),
    "information of one byte": go_reply(b"x"),
    "an export of 2^64-1 bytes": go_reply(wire.INFO_EXPORT.pack(0, (1 << 64) - 1, 1)),
    "flags without HAS_FLAGS": go_reply(wire.INFO_EXPORT.pack(0, 4096, 2)),
    "a minimum block of 0": block_sizes(0, 4096, 65536),
    "a minimum block of 3": block_sizes(3, 4096, 65536),
    "a minimum block of 128K": block_sizes(131072, 131072, 131072),
    "a preferred block of 1000": block_sizes(1, 1000, 65536),
    "a preferred block below the minimum": block_sizes(4096, 512, 65536),
    "a maximum below the preferred block": block_sizes(1, 4096, 4095),
    "a context that was not asked for": context_reply((1, "qemu:dirty-bitmap:x")),
    "one context twice": context_reply((1, "base:allocation"), (2, "base:allocation")),
    "one ID twice": context_reply((1, "base:allocation"), (1, "x:y")),
    "a context in three bytes": [
        GREETING,
        reply(wire.NBD_OPT_EXTENDED_HEADERS, ACK),
        reply(wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_META_CONTEXT, b"abc") + reply(wire.NBD_OPT_SET_META_CONTEXT, ACK),
    ],
    "a context that is no text": [
        GREETING,
        reply(wire.NBD_OPT_EXTENDED_HEADERS, ACK),
        reply(wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_META_CONTEXT, b"\0\0\0\0\xff")
        + reply(wire.NBD_OPT_SET_META_CONTEXT, ACK),
    ],
    "the end of the file": [GREETING, b""],
}


@pytest.mark.parametrize("replies", BROKEN_HANDSHAKES.values(), ids=BROKEN_HANDSHAKES.keys())
def test_what_breaks_the_handshake_is_a_remote_protocol_error(replies: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        scripted(ClientHandshake("disk", contexts=("base:allocation", "x:y")), replies)


def test_bytes_in_clear_text_behind_the_change_to_tls_are_refused() -> None:
    starttls = reply(wire.NBD_OPT_STARTTLS, ACK)
    with pytest.raises(RemoteProtocolError, match="clear text"):
        scripted(ClientHandshake("disk", tls="require"), [GREETING, starttls + NO_EXTENDED])


def test_a_server_that_shuts_down_is_left_politely() -> None:
    client = ClientHandshake("disk")
    with pytest.raises(RequestError, match="shutting down"):
        scripted(client, [GREETING, reply(wire.NBD_OPT_EXTENDED_HEADERS, wire.NBD_REP_ERR_SHUTDOWN)])
    assert client.data_to_send() == wire.option(wire.NBD_OPT_ABORT)


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097])
def test_names_that_the_protocol_forbids_are_our_mistake(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        ClientHandshake(name)


def test_what_a_server_says_is_shown_in_one_line() -> None:
    refused = reply(wire.NBD_OPT_GO, wire.NBD_REP_ERR_POLICY, b"no\n\x1b[31m\xff way")
    with pytest.raises(RequestError) as caught:
        scripted(ClientHandshake("disk"), [GREETING, NO_EXTENDED, NO_STRUCTURED, refused])
    assert str(caught.value).isprintable()


# -- transmission ------------------------------------------------------------------------------------------------------


def terms(*, extended: bool = False, structured: bool = True, flags: int = ALL_FLAGS) -> Terms:
    contexts = {4: "base:allocation", 7: "qemu:allocation-depth"} if structured else {}
    return Terms(EXPORT._replace(flags=flags), structured, extended, contexts, True).settled()


MODES = pytest.mark.parametrize(
    "agreed",
    [terms(structured=False), terms(), terms(extended=True)],
    ids=["simple", "structured", "extended"],
)


@MODES
@pytest.mark.parametrize("piece", [1, 13, 4096, 1 << 20])
def test_replies_in_any_order_and_pieces_reach_their_requests(agreed: Terms, piece: int) -> None:
    random.seed(piece)
    content = random.randbytes(1 << 20)
    client, server = ClientTransmission(agreed), ServerTransmission(agreed)
    buffers: list[tuple[int, bytearray]] = []
    pendings: list[Pending] = []
    for _ in range(20):
        length = 512 * random.randrange(1, 40)
        offset = 512 * random.randrange((1 << 20) // 512 - 40)
        buffers.append((offset, bytearray(length)))
        pendings.append(client.request(wire.NBD_CMD_READ, offset, length, into=memoryview(buffers[-1][1])))
    pendings.append(client.request(wire.NBD_CMD_FLUSH))
    pendings.append(client.request(wire.NBD_CMD_WRITE, 512, 1024, flags=wire.NBD_CMD_FLAG_FUA))
    requests = server.receive_data(b"".join(pending.head for pending in pendings) + bytes(1024))
    random.shuffle(requests)
    stream = b"".join(answer_to(server, request, content) for request in requests)
    done = [one for start in range(0, len(stream), piece) for one in client.receive_data(stream[start : start + piece])]
    assert {one.cookie for one in done} == {one.cookie for one in pendings}
    assert all(one.answered and not one.error for one in done)
    assert not client.in_flight
    for offset, buffer in buffers:
        assert buffer == content[offset : offset + len(buffer)]


def answer_to(server: ServerTransmission, request: Request, content: bytes) -> bytes:
    """A reply, for a read in chunks and out of order where that is allowed."""
    assert not request.error, request
    offset, length = request.offset, request.length
    if request.command != wire.NBD_CMD_READ:
        return server.done(request)
    data = content[offset : offset + length]
    if not server.structured or random.random() < 0.3:
        return server.read_head(request) + data
    cuts = sorted({0, length, *(random.randrange(length) for _ in range(4))})
    chunks = list(itertools.pairwise(cuts))
    random.shuffle(chunks)
    parts = [server.data_head(request, offset + start, end - start) + data[start:end] for start, end in chunks]
    return b"".join(parts) + server.done(request)


def test_a_long_read_is_received_into_its_own_buffer() -> None:
    client = ClientTransmission(terms())
    buffer = bytearray(65536)
    pending = client.request(wire.NBD_CMD_READ, 0, 65536, into=memoryview(buffer))
    server = ServerTransmission(terms())
    (request,) = server.receive_data(pending.head)
    assert client.receive_data(server.read_head(request)) == []
    assert client.get_buffer().obj is buffer


def test_holes_are_zeroes_and_errors_come_with_their_words() -> None:
    for agreed in (terms(), terms(extended=True)):
        client, server = ClientTransmission(agreed), ServerTransmission(agreed)
        buffer = bytearray(b"x" * 4096)
        (request,) = server.receive_data(client.request(wire.NBD_CMD_READ, 512, 4096, into=memoryview(buffer)).head)
        stream = server.data_head(request, 1024, 512) + b"y" * 512 + server.hole(request, 512, 512)
        (done,) = client.receive_data(stream + server.hole(request, 1536, 3072, done=True))
        assert not done.error
        assert buffer == bytes(512) + b"y" * 512 + bytes(3072)
        (request,) = server.receive_data(client.request(wire.NBD_CMD_READ, 512, 4096, into=memoryview(buffer)).head)
        (done,) = client.receive_data(server.hole(request, 512, 512) + server.error(request, wire.NBD_EIO, "bad", offset=600))
        assert (done.error, done.message) == (wire.NBD_EIO, "bad")


def test_status_of_all_contexts_or_of_some() -> None:
    agreed = terms(extended=True)
    client, server = ClientTransmission(agreed), ServerTransmission(agreed)
    (request,) = server.receive_data(client.request(wire.NBD_CMD_BLOCK_STATUS, 512, 4096).head)
    assert set(request.contexts) == {4, 7}
    stream = server.status(request, 7, [(1024, 2), (1 << 40, 1)]) + server.status(request, 4, [(512, 3)], done=True)
    (done,) = client.receive_data(stream)
    assert {number: [list(column) for column in columns] for number, columns in done.status.items()} == {
        7: [[1024, 1 << 40], [2, 1]],
        4: [[512], [3]],
    }
    (request,) = server.receive_data(client.request(wire.NBD_CMD_BLOCK_STATUS, 512, 4096, contexts=(4,)).head)
    assert (request.contexts, request.length) == ((4,), 4096)
    (done,) = client.receive_data(server.status(request, 4, [(512, 3)], done=True))
    assert list(done.status) == [4]


def test_what_the_terms_do_not_allow_is_our_mistake() -> None:
    client = ClientTransmission(terms(flags=wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_READ_ONLY))
    calls: list[Callable[[], object]] = [
        lambda: client.request(wire.NBD_CMD_FLUSH),
        lambda: client.request(wire.NBD_CMD_TRIM, 0, 512),
        lambda: client.request(wire.NBD_CMD_WRITE, 0, 512),
        lambda: client.request(wire.NBD_CMD_READ, 0, 512),
        lambda: client.request(wire.NBD_CMD_READ, 0, 512, into=memoryview(bytearray(511))),
        lambda: client.request(wire.NBD_CMD_READ, 1, 512, into=memoryview(bytearray(512))),
        lambda: client.request(wire.NBD_CMD_READ, 1 << 20, 512, into=memoryview(bytearray(512))),
        lambda: client.request(wire.NBD_CMD_READ, 0, 1 << 17, into=memoryview(bytearray(1 << 17))),
        lambda: client.request(wire.NBD_CMD_READ, 0, 512, flags=wire.NBD_CMD_FLAG_DF, into=memoryview(bytearray(512))),
        lambda: client.request(wire.NBD_CMD_BLOCK_STATUS, 0, 512, contexts=(4,)),
        lambda: client.request(wire.NBD_CMD_BLOCK_STATUS, 0, 512, flags=wire.NBD_CMD_FLAG_PAYLOAD_LEN),
    ]
    for call in calls:
        with pytest.raises(LocalProtocolError):
            call()
    assert not client.in_flight


COOKIE = 1
"""Of the first request on a connection."""
EXTENDED_ID = wire.EXTENDED_REPLY.pack(wire.NBD_EXTENDED_REPLY_MAGIC, 1, 0, COOKIE, 4096, 0)


def chunk(kind: int, payload: bytes, *, done: bool = True, cookie: int = COOKIE, length: int | None = None) -> bytes:
    stated = len(payload) if length is None else length
    return wire.STRUCTURED_REPLY.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, stated) + payload


def data(offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(wire.NBD_REPLY_TYPE_OFFSET_DATA, wire.OFFSET.pack(offset) + b"z" * length, done=done)


def hole(offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(wire.NBD_REPLY_TYPE_OFFSET_HOLE, wire.OFFSET_HOLE.pack(offset, length), done=done)


def simple(error: int = 0, cookie: int = COOKIE) -> bytes:
    return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, error, cookie)


ERROR, ERROR_OFFSET = wire.NBD_REPLY_TYPE_ERROR, wire.NBD_REPLY_TYPE_ERROR_OFFSET
BROKEN_READS: dict[str, bytes] = {
    "a wrong magic": bytes(20),
    "a request's magic": wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, 0, 0, COOKIE, 0, 0),
    "an extended reply": EXTENDED_ID,
    "an unknown cookie": chunk(0, b"", cookie=7),
    "a simple reply": simple() + bytes(8192),
    "a simple error": simple(5),
    "success without data": chunk(0, b""),
    "too little data": data(4096, 8191, done=True),
    "data in front of the range": data(4095, 10),
    "data behind the range": data(12287, 2),
    "data at 2^64-1": data((1 << 64) - 1, 1),
    "data of no bytes": data(4096, 0),
    "data shorter than its offset": chunk(1, b"abc"),
    "data of 4 GiB": chunk(1, wire.OFFSET.pack(4096), length=0xFFFFFFFF),
    "data twice": data(4096, 100) + data(4096, 100),
    "data that overlap at the end": data(4096, 100) + data(4195, 100),
    "data that overlap at the start": data(4200, 100) + data(4100, 101),
    "data that cover others": data(4200, 100) + data(4600, 100) + data(4100, 1000),
    "data inside others": data(5000, 1000) + data(4096, 100) + data(5500, 10),
    "a hole over data": data(4096, 100) + hole(4100, 10),
    "a hole in front of the range": hole(0, 8192),
    "a hole of 4 GiB": hole(4096, 0xFFFFFFFF),
    "a hole of no bytes": hole(4096, 0),
    "a hole in 13 bytes": chunk(2, wire.OFFSET_HOLE.pack(4096, 8192) + b"x"),
    "an empty chunk that is not the last": chunk(0, b"", done=False),
    "an empty chunk with a payload": chunk(0, b"x"),
    "a status": chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(12)),
    "an unknown type": chunk(99, b"abc"),
    "an error of five bytes": chunk(ERROR, b"abcde"),
    "an error that is none": chunk(ERROR, wire.ERROR.pack(0, 0)),
    "an error with a message longer than itself": chunk(ERROR, wire.ERROR.pack(5, 100) + b"short"),
    "an error with more than a message": chunk(ERROR, wire.ERROR.pack(5, 1) + b"longer"),
    "an error of 4 GiB": chunk(ERROR, wire.ERROR.pack(5, 0), length=0xFFFFFFFF),
    "an error outside the range": chunk(ERROR_OFFSET, wire.error_payload(5, "", 12288)),
    "an unknown error with a message longer than itself": chunk(0x8077, wire.ERROR.pack(5, 100)),
    "endless errors": chunk(ERROR_OFFSET, wire.error_payload(5, "", 4096), done=False) * 1025,
    "a second reply": data(4096, 8192, done=True) + chunk(0, b""),
    "every other byte": b"".join(data(4096 + 2 * i, 1) for i in range(4096)),
}


@pytest.mark.parametrize("stream", BROKEN_READS.values(), ids=BROKEN_READS.keys())
def test_a_server_that_lies_about_a_read_is_found_out(stream: bytes) -> None:
    client = ClientTransmission(terms())
    memory = bytearray(b"-" * (512 + 8192 + 512))
    client.request(wire.NBD_CMD_READ, 4096, 8192, into=memoryview(memory)[512:-512])
    with pytest.raises(RemoteProtocolError):
        client.receive_data(stream)
    assert memory[:512] == memory[-512:] == b"-" * 512, "nothing outside the buffer of the request was touched"


def test_an_unfragmented_read_comes_in_one_chunk() -> None:
    client = ClientTransmission(terms())
    buffer = bytearray(8192)
    client.request(wire.NBD_CMD_READ, 4096, 8192, flags=wire.NBD_CMD_FLAG_DF, into=memoryview(buffer))
    with pytest.raises(RemoteProtocolError, match="second chunk"):
        client.receive_data(data(4096, 4096) + data(8192, 4096, done=True))


def test_an_unknown_kind_of_error_is_an_error_and_the_session_goes_on() -> None:
    client = ClientTransmission(terms())
    buffer = bytearray(8192)
    client.request(wire.NBD_CMD_READ, 4096, 8192, into=memoryview(buffer))
    (done,) = client.receive_data(chunk(0x8077, wire.ERROR.pack(wire.NBD_EIO, 3) + b"badand more"))
    assert (done.error, done.message) == (wire.NBD_EIO, "bad")


def status(context: int, *extents: tuple[int, int], done: bool = True) -> bytes:
    return chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS, wire.status_payload(context, extents, extended=False), done=done)


BROKEN_STATUSES: dict[str, bytes] = {
    "a simple reply": simple(),
    "success without a status": chunk(0, b""),
    "one context of two": status(4, (512, 0)),
    "one context twice": status(4, (512, 0), done=False) * 2,
    "an unknown context": status(5, (512, 0)),
    "no extent": chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS, b"\0\0\0\4"),
    "an extent and a half": chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(16)),
    "an extent of no bytes": status(4, (512, 0), (0, 1)),
    "extents behind the range": status(4, (4096, 0), (512, 1)),
    "more extents than there can be": chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS, b"", length=4 + 8 * 5000),
    "extents of 4 GiB": chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS, b"", length=0xFFFFFFFC),
    "the extended form": chunk(wire.NBD_REPLY_TYPE_BLOCK_STATUS_EXT, bytes(24)),
    "data": data(4096, 512),
}


@pytest.mark.parametrize("stream", BROKEN_STATUSES.values(), ids=BROKEN_STATUSES.keys())
def test_a_server_that_lies_about_a_status_is_found_out(stream: bytes) -> None:
    client = ClientTransmission(terms())
    client.request(wire.NBD_CMD_BLOCK_STATUS, 4096, 4096)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(stream)


@pytest.mark.parametrize("extents", [[(512, 0), (512, 1)], [(8192, 0)]])
def test_a_status_that_was_to_be_one_extent_is_not_more(extents: list[tuple[int, int]]) -> None:
    client = ClientTransmission(terms())
    client.request(wire.NBD_CMD_BLOCK_STATUS, 4096, 4096, flags=wire.NBD_CMD_FLAG_REQ_ONE)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(status(4, *extents))


BROKEN_EXTENDED: dict[str, bytes] = {
    "a simple reply": simple(),
    "a structured reply": chunk(0, b"") + bytes(32),
    "the offset of another request": wire.EXTENDED_REPLY.pack(wire.NBD_EXTENDED_REPLY_MAGIC, 1, 0, COOKIE, 4097, 0),
    "a payload of 2^64-1 bytes": wire.EXTENDED_REPLY.pack(wire.NBD_EXTENDED_REPLY_MAGIC, 1, 6, COOKIE, 4096, (1 << 64) - 1),
    "a compact status": wire.EXTENDED_REPLY.pack(wire.NBD_EXTENDED_REPLY_MAGIC, 1, 5, COOKIE, 4096, 12) + bytes(12),
    "a wrong number of extents": wire.EXTENDED_REPLY.pack(wire.NBD_EXTENDED_REPLY_MAGIC, 1, 6, COOKIE, 4096, 24)
    + wire.STATUS_EXT_ID.pack(4, 2)
    + wire.STATUS_EXT_DESCRIPTOR.pack(512, 0),
}


@pytest.mark.parametrize("stream", BROKEN_EXTENDED.values(), ids=BROKEN_EXTENDED.keys())
def test_a_server_that_breaks_the_extended_layout_is_found_out(stream: bytes) -> None:
    client = ClientTransmission(terms(extended=True))
    client.request(wire.NBD_CMD_BLOCK_STATUS, 4096, 4096)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(stream)


def test_a_structured_reply_that_was_not_agreed_on_is_refused() -> None:
    client = ClientTransmission(terms(structured=False))
    client.request(wire.NBD_CMD_FLUSH)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(chunk(0, b""))


def test_a_server_may_not_leave_first() -> None:
    with pytest.raises(RemoteProtocolError, match="closed"):
        ClientTransmission(terms()).buffer_updated(0)
