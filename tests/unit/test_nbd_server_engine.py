"""The server's half of the NBD protocol, fed with bytes: what is answered, what is refused, what ends the session."""

from __future__ import annotations

import pytest

from blocklib.errors import LocalProtocolError, RemoteProtocolError
from blocklib.nbd import wire
from blocklib.nbd.engine import (
    Closed,
    ContextsWanted,
    Event,
    Export,
    ExportWanted,
    ListExports,
    Ready,
    StartTls,
    Terms,
    TlsDue,
    TlsMode,
)
from blocklib.nbd.engine_server import Request, ServerTransmission
from blocklib.nbd.engine_server_handshake import ServerHandshake

ALL_FLAGS = 0x1FFF & ~(wire.NBD_FLAG_READ_ONLY | wire.NBD_FLAG_SEND_RESIZE)
EXPORT = Export("disk", 1 << 20, ALL_FLAGS, "a disk", 512, 4096, 1 << 16)


def greeted(client_flags: int = 3, tls: TlsMode = "off", max_options: int = 1024) -> ServerHandshake:
    handshake = ServerHandshake(tls=tls, max_options=max_options)
    assert handshake.data_to_send() == b"NBDMAGICIHAVEOPT\x00\x03"
    assert handshake.receive_data(wire.CLIENT_FLAGS.pack(client_flags)) == []
    return handshake


def replies(handshake: ServerHandshake) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of every reply that is to be sent."""
    data = handshake.data_to_send()
    found = []
    while data:
        magic, option, kind, length = wire.OPTION_REPLY.unpack_from(data)
        assert magic == wire.NBD_REP_MAGIC
        found.append((option, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def ask(handshake: ServerHandshake, option: int, data: bytes = b"") -> list[Event]:
    return handshake.receive_data(wire.option(option, data))


def refusal(handshake: ServerHandshake, option: int, data: bytes = b"") -> int:
    """The error by which the engine itself answers an option."""
    assert ask(handshake, option, data) == []
    ((echo, kind, _),) = replies(handshake)
    assert echo == option
    return kind


def ready(events: list[Event]) -> Ready:
    (event,) = events
    assert isinstance(event, Ready)
    return event


# -- handshake ---------------------------------------------------------------------------------------------------------


def test_go_tells_the_export_and_begins_the_transmission() -> None:
    handshake = greeted()
    infos = (wire.NBD_INFO_NAME, wire.NBD_INFO_DESCRIPTION, wire.NBD_INFO_BLOCK_SIZE)
    events = ask(handshake, wire.NBD_OPT_GO, wire.go_data("disk", infos))
    assert events == [ExportWanted(wire.NBD_OPT_GO, "disk", frozenset(infos))]
    event = ready(handshake.send_export(EXPORT))
    assert event.terms.block_sizes
    assert not event.terms.structured
    flags = ALL_FLAGS & ~(wire.NBD_FLAG_SEND_DF | wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD)
    assert event.terms.export.flags == flags, "what needs structured replies or extended headers is not told without them"
    assert [(kind, data) for _, kind, data in replies(handshake)] == [
        (wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(0, 1 << 20, flags)),
        (wire.NBD_REP_INFO, b"\0\1disk"),
        (wire.NBD_REP_INFO, b"\0\2a disk"),
        (wire.NBD_REP_INFO, wire.INFO_BLOCK_SIZE.pack(3, 512, 4096, 1 << 16)),
        (wire.NBD_REP_ACK, b""),
    ]


def test_info_leaves_the_negotiation_open_and_a_refusal_too() -> None:
    handshake = greeted()
    ask(handshake, wire.NBD_OPT_INFO, wire.go_data("disk", ()))
    assert handshake.send_export(EXPORT) == []
    assert [kind for _, kind, _ in replies(handshake)] == [wire.NBD_REP_INFO, wire.NBD_REP_ACK]
    ask(handshake, wire.NBD_OPT_GO, wire.go_data("other", ()))
    assert handshake.refuse(wire.NBD_REP_ERR_UNKNOWN, "no such export") == []
    assert replies(handshake) == [(wire.NBD_OPT_GO, wire.NBD_REP_ERR_UNKNOWN, b"no such export")]
    assert ask(handshake, wire.NBD_OPT_LIST) == [ListExports()]


@pytest.mark.parametrize(("client_flags", "zeroes"), [(3, 0), (1, 124), (0, 124)])
def test_export_name_is_answered_without_a_reply_header(client_flags: int, zeroes: int) -> None:
    handshake = greeted(client_flags)
    ask(handshake, wire.NBD_OPT_EXPORT_NAME, b"disk")
    event = ready(handshake.send_export(EXPORT))
    assert handshake.data_to_send() == wire.EXPORT_NAME_REPLY.pack(1 << 20, event.terms.export.flags) + bytes(zeroes)
    assert not event.terms.block_sizes


def test_export_name_cannot_be_refused_but_by_closing() -> None:
    handshake = greeted()
    ask(handshake, wire.NBD_OPT_EXPORT_NAME, b"other")
    (event,) = handshake.refuse(wire.NBD_REP_ERR_UNKNOWN, "no such export")
    assert isinstance(event, Closed)
    assert handshake.data_to_send() == b""


def test_the_list_gives_each_export() -> None:
    handshake = greeted()
    assert ask(handshake, wire.NBD_OPT_LIST) == [ListExports()]
    assert handshake.send_exports([("a", "first"), ("", "")]) == []
    assert [data for _, _, data in replies(handshake)] == [b"\0\0\0\1afirst", b"\0\0\0\0", b""]
    assert refusal(handshake, wire.NBD_OPT_LIST, b"x") == wire.NBD_REP_ERR_INVALID


def test_contexts_are_numbered_and_hold_for_the_export_they_were_selected_for() -> None:
    handshake = greeted()
    query = wire.contexts_data("disk", ["base:allocation", "other:thing"])
    assert refusal(handshake, wire.NBD_OPT_SET_META_CONTEXT, query) == wire.NBD_REP_ERR_INVALID
    assert refusal(handshake, wire.NBD_OPT_STRUCTURED_REPLY) == wire.NBD_REP_ACK
    assert ask(handshake, wire.NBD_OPT_SET_META_CONTEXT, query) == [
        ContextsWanted(wire.NBD_OPT_SET_META_CONTEXT, "disk", ("base:allocation", "other:thing"))
    ]
    handshake.send_contexts(["base:allocation", "qemu:allocation-depth"])
    assert [data for _, _, data in replies(handshake)] == [
        b"\0\0\0\0base:allocation",
        b"\0\0\0\1qemu:allocation-depth",
        b"",
    ]
    ask(handshake, wire.NBD_OPT_INFO, wire.go_data("other", ()))
    handshake.refuse(wire.NBD_REP_ERR_UNKNOWN)
    ask(handshake, wire.NBD_OPT_GO, wire.go_data("disk", ()))
    event = ready(handshake.send_export(EXPORT))
    assert event.terms.contexts == {0: "base:allocation", 1: "qemu:allocation-depth"}
    assert event.terms.export.flags & wire.NBD_FLAG_SEND_DF


def test_contexts_of_another_export_are_not_carried_over() -> None:
    handshake = greeted()
    ask(handshake, wire.NBD_OPT_EXTENDED_HEADERS)
    ask(handshake, wire.NBD_OPT_SET_META_CONTEXT, wire.contexts_data("disk", ["base:allocation"]))
    handshake.send_contexts(["base:allocation"])
    ask(handshake, wire.NBD_OPT_GO, wire.go_data("", ()))
    event = ready(handshake.send_export(EXPORT))
    assert event.terms.contexts == {}
    assert event.terms.extended
    assert not event.terms.export.flags & wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD


def test_a_failed_selection_undoes_the_one_before() -> None:
    handshake = greeted()
    ask(handshake, wire.NBD_OPT_STRUCTURED_REPLY)
    ask(handshake, wire.NBD_OPT_SET_META_CONTEXT, wire.contexts_data("disk", ["base:allocation"]))
    handshake.send_contexts(["base:allocation"])
    replies(handshake)
    assert refusal(handshake, wire.NBD_OPT_SET_META_CONTEXT, b"\xff") == wire.NBD_REP_ERR_INVALID
    ask(handshake, wire.NBD_OPT_GO, wire.go_data("disk", ()))
    assert ready(handshake.send_export(EXPORT)).terms.contexts == {}


def test_nothing_but_tls_and_abort_is_answered_where_tls_is_demanded() -> None:
    handshake = greeted(tls="require")
    for option in (wire.NBD_OPT_LIST, wire.NBD_OPT_STRUCTURED_REPLY, 77):
        assert refusal(handshake, option) == wire.NBD_REP_ERR_TLS_REQD
    for option in (wire.NBD_OPT_GO, wire.NBD_OPT_INFO):
        assert refusal(handshake, option, wire.go_data("disk", ())) == wire.NBD_REP_ERR_TLS_REQD
    assert ask(handshake, wire.NBD_OPT_STARTTLS) == [StartTls()]
    assert handshake.start_tls() == [TlsDue()]
    assert replies(handshake) == [(wire.NBD_OPT_STARTTLS, wire.NBD_REP_ACK, b"")]
    with pytest.raises(LocalProtocolError):
        handshake.receive_data(b"\x16\x03\x01")
    assert handshake.tls_started() == []
    assert refusal(handshake, wire.NBD_OPT_STARTTLS) == wire.NBD_REP_ERR_INVALID
    ask(handshake, wire.NBD_OPT_GO, wire.go_data("disk", ()))
    assert ready(handshake.send_export(EXPORT)).terms.tls


def test_export_name_without_tls_ends_the_session_where_tls_is_demanded() -> None:
    (event,) = ask(greeted(tls="require"), wire.NBD_OPT_EXPORT_NAME, b"disk")
    assert isinstance(event, Closed)


def test_what_was_negotiated_in_clear_text_is_void_under_tls() -> None:
    handshake = greeted(tls="allow")
    ask(handshake, wire.NBD_OPT_STRUCTURED_REPLY)
    ask(handshake, wire.NBD_OPT_STARTTLS)
    handshake.start_tls()
    handshake.tls_started()
    ask(handshake, wire.NBD_OPT_GO, wire.go_data("disk", ()))
    assert not ready(handshake.send_export(EXPORT)).terms.structured


def test_bytes_in_clear_text_behind_starttls_end_the_session() -> None:
    handshake = greeted(tls="allow")
    injected = wire.option(wire.NBD_OPT_STRUCTURED_REPLY)
    assert handshake.receive_data(wire.option(wire.NBD_OPT_STARTTLS) + injected) == [StartTls()]
    with pytest.raises(RemoteProtocolError):
        handshake.start_tls()


def test_tls_is_refused_by_policy_where_there_is_none() -> None:
    assert refusal(greeted(), wire.NBD_OPT_STARTTLS) == wire.NBD_REP_ERR_POLICY


def test_a_server_that_shuts_down_answers_nothing_but_abort() -> None:
    handshake = greeted()
    handshake.shutting_down = True
    assert refusal(handshake, wire.NBD_OPT_LIST) == wire.NBD_REP_ERR_SHUTDOWN
    (event,) = ask(handshake, wire.NBD_OPT_ABORT, b"ignored")
    assert isinstance(event, Closed)
    assert replies(handshake) == [(wire.NBD_OPT_ABORT, wire.NBD_REP_ACK, b"")]


def test_options_may_arrive_byte_by_byte() -> None:
    handshake = ServerHandshake()
    handshake.data_to_send()
    stream = wire.CLIENT_FLAGS.pack(3) + wire.option(wire.NBD_OPT_GO, wire.go_data("disk", (wire.NBD_INFO_NAME,)))
    events = [event for byte in stream for event in handshake.receive_data(bytes([byte]))]
    assert events == [ExportWanted(wire.NBD_OPT_GO, "disk", frozenset({wire.NBD_INFO_NAME}))]


def test_long_option_data_is_skipped_and_refused() -> None:
    handshake = greeted()
    assert refusal(handshake, wire.NBD_OPT_LIST, bytes(1 << 17)) == wire.NBD_REP_ERR_TOO_BIG
    assert ask(handshake, wire.NBD_OPT_LIST) == [ListExports()]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\5disk\0\0",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\0\0\0\4disk\0\2\0\1",
        b"\0\0\0\4disk\0\2\0\1\0\1",
        b"\0\0\0\4di\xffk\0\0",
        b"\0\0\0\4di\0k\0\0",
    ],
)
def test_malformed_option_data_is_answered_by_invalid(data: bytes) -> None:
    assert refusal(greeted(), wire.NBD_OPT_GO, data) == wire.NBD_REP_ERR_INVALID


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\4disk", b"\0\0\0\4disk\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\1\0\0\0\5base:x", b"\0\0\0\0\0\0\0\1\0\0\0\4base"],
)
def test_malformed_queries_are_answered_by_invalid(data: bytes) -> None:
    handshake = greeted()
    ask(handshake, wire.NBD_OPT_STRUCTURED_REPLY)
    replies(handshake)
    assert refusal(handshake, wire.NBD_OPT_LIST_META_CONTEXT, data) == wire.NBD_REP_ERR_INVALID


@pytest.mark.parametrize(
    "stream",
    [
        wire.CLIENT_FLAGS.pack(7),
        wire.CLIENT_FLAGS.pack(0) + wire.option(wire.NBD_OPT_LIST),
        wire.CLIENT_FLAGS.pack(3) + b"GET / HTTP/1.1\r\n",
        wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_LIST, 0xFFFFFFFF),
        wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_EXPORT_NAME, 0x100000),
        wire.CLIENT_FLAGS.pack(3) + wire.option(wire.NBD_OPT_EXPORT_NAME, b"\xff"),
        wire.CLIENT_FLAGS.pack(3)
        + wire.option(wire.NBD_OPT_EXTENDED_HEADERS)
        + wire.option(wire.NBD_OPT_EXPORT_NAME, b"disk"),
    ],
)
def test_what_breaks_the_negotiation_ends_the_session(stream: bytes) -> None:
    handshake = ServerHandshake()
    handshake.data_to_send()
    with pytest.raises(RemoteProtocolError):
        handshake.receive_data(stream)


def test_endless_options_end_the_session() -> None:
    handshake = greeted(max_options=10)
    with pytest.raises(RemoteProtocolError, match="more than 10 options"):
        handshake.receive_data(wire.option(77) * 11)


def test_a_client_that_does_not_wait_for_answers_is_cut_off() -> None:
    handshake = greeted()
    ask(handshake, wire.NBD_OPT_LIST)
    with pytest.raises(RemoteProtocolError, match="without waiting"):
        for _ in range(100):
            handshake.receive_data(bytes(1 << 16))


def test_the_end_of_file_between_options_is_a_close_and_else_an_error() -> None:
    (event,) = greeted().receive_data(b"")
    assert isinstance(event, Closed)
    handshake = greeted()
    handshake.receive_data(b"IHAVE")
    with pytest.raises(RemoteProtocolError):
        handshake.receive_data(b"")


def test_an_answer_to_a_question_that_was_not_asked_is_our_mistake() -> None:
    with pytest.raises(LocalProtocolError):
        greeted().send_export(EXPORT)


# -- transmission ------------------------------------------------------------------------------------------------------


def terms(*, extended: bool = False, structured: bool = True, flags: int = ALL_FLAGS, block_sizes: bool = True) -> Terms:
    contexts = {0: "base:allocation", 3: "qemu:allocation-depth"} if structured else {}
    return Terms(EXPORT._replace(flags=flags), structured, extended, contexts, block_sizes)


def request(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, *, extended: bool = False, payload: bytes = b""
) -> bytes:
    head, magic = (wire.REQUEST, wire.NBD_REQUEST_MAGIC)
    if extended:
        head, magic = (wire.EXTENDED_REQUEST, wire.NBD_EXTENDED_REQUEST_MAGIC)
    return head.pack(magic, flags, command, 0xC00C1E, offset, length) + payload


def only(requests: list[Request]) -> Request:
    (one,) = requests
    return one


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 20])
def test_requests_are_found_however_the_bytes_are_cut(extended: bool, piece: int) -> None:
    engine = ServerTransmission(terms(extended=extended))
    flag = wire.NBD_CMD_FLAG_PAYLOAD_LEN if extended else 0
    data = bytes(range(256)) * 36
    stream = (
        request(wire.NBD_CMD_READ, 512, 1024, extended=extended)
        + request(wire.NBD_CMD_WRITE, 1024, len(data), flag, extended=extended, payload=data)
        + request(wire.NBD_CMD_WRITE, 1024, 0, flag, extended=extended)
        + request(wire.NBD_CMD_FLUSH, extended=extended)
        + request(wire.NBD_CMD_DISC, extended=extended)
    )
    found = [one for i in range(0, len(stream), piece) for one in engine.receive_data(stream[i : i + piece])]
    assert [(one.command, one.offset, one.length, one.error) for one in found] == [
        (wire.NBD_CMD_READ, 512, 1024, 0),
        (wire.NBD_CMD_WRITE, 1024, len(data), 0),
        (wire.NBD_CMD_WRITE, 1024, 0, 0),
        (wire.NBD_CMD_FLUSH, 0, 0, 0),
        (wire.NBD_CMD_DISC, 0, 0, 0),
    ]
    assert bytes(found[1].data or b"") == data
    assert found[2].data is not None


def test_a_long_payload_is_received_into_the_buffer_of_its_request() -> None:
    buffers: list[bytearray] = []

    def allocate(length: int) -> bytearray:
        buffers.append(bytearray(length))
        return buffers[-1]

    engine = ServerTransmission(terms(), allocate=allocate)
    assert engine.receive_data(request(wire.NBD_CMD_WRITE, 0, 65536)) == []
    view = engine.get_buffer()
    assert view.obj is buffers[0]
    view[:] = b"x" * 65536
    one = only(engine.buffer_updated(65536))
    assert one.data is not None
    assert one.data.obj is buffers[0]
    assert buffers[0] == b"x" * 65536


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (wire.NBD_CMD_READ, 1 << 20, 512, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, (1 << 64) - 512, 1024, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 511, 512, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 513, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 1 << 17, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 512, wire.NBD_CMD_FLAG_NO_HOLE, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 512, 1 << 9, wire.NBD_EINVAL),
        (wire.NBD_CMD_TRIM, 1 << 20, 512, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_WRITE_ZEROES, 1 << 20, 512, 0, wire.NBD_ENOSPC),
        (wire.NBD_CMD_WRITE_ZEROES, 0, 512, wire.NBD_CMD_FLAG_DF, wire.NBD_EINVAL),
        (wire.NBD_CMD_FLUSH, 0, 512, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_BLOCK_STATUS, 0, 1 << 21, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_BLOCK_STATUS, 0, 0, 0, wire.NBD_EINVAL),
        (8, 0, 512, 0, wire.NBD_EINVAL),
        (0xFFFF, 0, 0, 0, wire.NBD_EINVAL),
    ],
)
def test_a_request_that_breaks_a_rule_is_answered_by_its_error(
    command: int, offset: int, length: int, flags: int, error: int
) -> None:
    engine = ServerTransmission(terms())
    one = only(engine.receive_data(request(command, offset, length, flags)))
    assert one.error == error
    assert one.message
    assert not only(engine.receive_data(request(wire.NBD_CMD_READ, 0, 512))).error, "the session goes on"


@pytest.mark.parametrize(
    ("offset", "length", "flags", "error"),
    [
        ((1 << 20) - 512, 1024, 0, wire.NBD_ENOSPC),
        (0, 100, 0, wire.NBD_EINVAL),
        (0, 1 << 17, 0, wire.NBD_EINVAL),
        (0, 512, wire.NBD_CMD_FLAG_REQ_ONE, wire.NBD_EINVAL),
    ],
)
def test_the_payload_of_a_refused_write_is_skipped(offset: int, length: int, flags: int, error: int) -> None:
    engine = ServerTransmission(terms(), allocate=lambda length: pytest.fail("nothing is to be allocated"))
    stream = request(wire.NBD_CMD_WRITE, offset, length, flags, payload=bytes(length)) + request(wire.NBD_CMD_FLUSH)
    refused, flush = engine.receive_data(stream)
    assert refused.error == error
    assert (flush.command, flush.error) == (wire.NBD_CMD_FLUSH, 0)


def test_nothing_is_changed_by_clients_of_a_read_only_export() -> None:
    engine = ServerTransmission(terms(flags=ALL_FLAGS | wire.NBD_FLAG_READ_ONLY))
    stream = request(wire.NBD_CMD_WRITE, 0, 512, payload=bytes(512))
    for command in (wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES):
        stream += request(command, 0, 512)
    assert [one.error for one in engine.receive_data(stream)] == [wire.NBD_EPERM] * 3


def test_what_is_not_offered_is_refused() -> None:
    engine = ServerTransmission(terms(flags=wire.NBD_FLAG_HAS_FLAGS, structured=False))
    for command in (3, 4, 5, 6, 7):
        assert only(engine.receive_data(request(command, 0, 0 if command == 3 else 512))).error == wire.NBD_EINVAL
    fua = request(wire.NBD_CMD_WRITE, 0, 512, wire.NBD_CMD_FLAG_FUA, payload=bytes(512))
    assert only(engine.receive_data(fua)).error == wire.NBD_EINVAL


def test_who_did_not_ask_for_block_sizes_need_not_keep_them() -> None:
    engine = ServerTransmission(terms(block_sizes=False))
    assert not only(engine.receive_data(request(wire.NBD_CMD_READ, 3, 100_001))).error


@pytest.mark.parametrize("length", [(1 << 25) + 1, (1 << 64) - 1])
def test_a_payload_beyond_all_limits_ends_the_connection(length: int) -> None:
    engine = ServerTransmission(terms(extended=True))
    with pytest.raises(RemoteProtocolError):
        engine.receive_data(request(wire.NBD_CMD_WRITE, 0, length, wire.NBD_CMD_FLAG_PAYLOAD_LEN, extended=True))


def test_a_wrong_magic_ends_the_connection() -> None:
    with pytest.raises(RemoteProtocolError):
        ServerTransmission(terms(extended=True)).receive_data(request(wire.NBD_CMD_READ, 0, 512) + bytes(4))


def test_the_end_of_file_is_a_disconnection_between_messages_only() -> None:
    engine = ServerTransmission(terms())
    assert only(engine.buffer_updated(0)).command == wire.NBD_CMD_DISC
    engine = ServerTransmission(terms())
    engine.receive_data(request(wire.NBD_CMD_WRITE, 0, 512, payload=bytes(511)))
    with pytest.raises(RemoteProtocolError):
        engine.buffer_updated(0)


def test_a_status_request_may_name_the_contexts_it_wants() -> None:
    engine = ServerTransmission(terms(extended=True))

    def ask_for(ids: list[int], length: int = 512) -> Request:
        payload = wire.status_request_payload(length, ids)
        stream = request(
            wire.NBD_CMD_BLOCK_STATUS,
            512,
            len(payload),
            wire.NBD_CMD_FLAG_PAYLOAD_LEN,
            extended=True,
            payload=payload,
        )
        return only(engine.receive_data(stream))

    one = ask_for([3])
    assert (one.length, one.contexts, one.error) == (512, (3,), 0)
    for wrong in ([1], [3, 3], [], [0, 3, 4], [0] * 5):
        assert ask_for(wrong).error == wire.NBD_EINVAL
    assert ask_for([3], (1 << 64) - 1).error == wire.NBD_EINVAL
    assert only(engine.receive_data(request(wire.NBD_CMD_BLOCK_STATUS, 0, 512, extended=True))).contexts == (0, 3)


def test_trailing_bytes_of_the_handshake_are_the_first_requests() -> None:
    engine = ServerTransmission(terms(), request(wire.NBD_CMD_READ, 0, 512) + b"\x25")
    assert only(engine.pending()).length == 512
    assert only(engine.receive_data(request(wire.NBD_CMD_FLUSH)[1:])).command == wire.NBD_CMD_FLUSH


def read_request(flags: int = 0) -> Request:
    return Request(wire.NBD_CMD_READ, flags, 0xC00C1E, 4096, 8192)


def test_replies_have_the_layout_that_was_negotiated() -> None:
    one = read_request()
    simple = ServerTransmission(terms(structured=False))
    assert simple.read_head(one) == bytes.fromhex("67446698 00000000 0000000000c00c1e")
    assert simple.done(one) == simple.read_head(one)
    assert simple.error(one, wire.NBD_EIO, "broken") == bytes.fromhex("67446698 00000005 0000000000c00c1e")
    structured = ServerTransmission(terms())
    assert structured.read_head(one) == bytes.fromhex("668e33ef 0001 0001 0000000000c00c1e 00002008 0000000000001000")
    hole = structured.hole(one, 8192, 4096)
    assert hole == bytes.fromhex("668e33ef 0000 0002 0000000000c00c1e 0000000c 0000000000002000 00001000")
    failed = structured.error(one, wire.NBD_EIO, "bad", offset=5000)
    assert failed == bytes.fromhex("668e33ef 0001 8002 0000000000c00c1e 00000011 00000005 0003 626164 0000000000001388")
    extended = ServerTransmission(terms(extended=True))
    assert extended.data_head(one, 5000, 10) == bytes.fromhex(
        "6e8a278c 0000 0001 0000000000c00c1e 0000000000001000 0000000000000012 0000000000001388"
    )
    assert extended.done(Request(wire.NBD_CMD_FLUSH, 0, 1, 0, 0))[:8] == bytes.fromhex("6e8a278c 0001 0000")


def test_status_is_joined_and_cut_as_the_protocol_demands() -> None:
    def sent(engine: ServerTransmission, extents: list[tuple[int, int]], flags: int = 0) -> list[tuple[int, int]]:
        one = Request(wire.NBD_CMD_BLOCK_STATUS, flags, 1, 0, 4096)
        head = wire.EXTENDED_REPLY if engine.extended else wire.STRUCTURED_REPLY
        payload = engine.status(one, 3, extents, done=True)[head.size :]
        context, lengths, states = wire.parse_status_payload(payload, extended=engine.extended)
        assert context == 3
        return list(zip(lengths, states, strict=True))

    for extended in (False, True):
        engine = ServerTransmission(terms(extended=extended))
        assert sent(engine, [(512, 0), (512, 0), (512, 3)]) == [(1024, 0), (512, 3)]
        assert sent(engine, [(512, 0), (9999, 3), (512, 0)]) == [(512, 0), (9999, 3)]
        assert sent(engine, [(4096, 0), (512, 3)]) == [(4096, 0)]
        assert sent(engine, [(512, 0), (512, 3)], wire.NBD_CMD_FLAG_REQ_ONE) == [(512, 0)]
        assert sent(engine, [(9999, 0)], wire.NBD_CMD_FLAG_REQ_ONE) == [(4096, 0)]
        with pytest.raises(LocalProtocolError):
            sent(engine, [])
    assert sent(ServerTransmission(terms()), [(1 << 40, 3)]) == [((1 << 32) - 65536, 3)]
    assert sent(ServerTransmission(terms(extended=True)), [(1 << 40, 3)]) == [(1 << 40, 3)]


def test_chunks_that_would_break_the_protocol_are_our_mistake() -> None:
    engine = ServerTransmission(terms())
    for offset, length in ((0, 4096), (4096, 8193), (4096, 0)):
        with pytest.raises(LocalProtocolError):
            engine.data_head(read_request(), offset, length)
    with pytest.raises(LocalProtocolError):
        engine.hole(read_request(wire.NBD_CMD_FLAG_DF), 4096, 4096)
    with pytest.raises(LocalProtocolError):
        ServerTransmission(terms(structured=False)).data_head(read_request(), 4096, 4096)
