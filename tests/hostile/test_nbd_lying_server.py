"""NBD servers that lie, stall, die or never end: a clear error, a closed connection, bounded memory, and no hang."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import threading
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import blocklib
from blocklib.disk import Disk
from blocklib.errors import BlocklibError, NbdError, PoisonedError, RemoteProtocolError, StorageError
from blocklib.nbd import wire
from blocklib.nbd.engine import Closed, ContextsWanted, Export, ExportWanted, Ready, Terms
from blocklib.nbd.engine_server import Request, ServerTransmission
from blocklib.nbd.engine_server_handshake import ServerHandshake
from blocklib.options import OptionValue
from blocklib.sizes import MiB

Script = Callable[[socket.socket], None]

SIZE = 16 * MiB
FLAGS = wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_WRITE_ZEROES | wire.NBD_FLAG_SEND_TRIM
GREETING = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 3)


class FakeServer:
    """Listens on a Unix socket; each connection goes through the next of its scripts, the last one again and again."""

    def __init__(self, path: Path, *scripts: Script) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self.n_connections = 0
        self._scripts = scripts
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self._open: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts[min(self.n_connections, len(self._scripts) - 1)]
            self.n_connections += 1
            self._open.append(sock)
            self._threads.append(threading.Thread(target=self._run, args=(script, sock)))
            self._threads[-1].start()

    def _run(self, script: Script, sock: socket.socket) -> None:
        with sock:
            try:
                script(sock)
            except OSError:
                return  # the client has gone, which is what most scripts make it do

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join()


@contextmanager
def fake(tmp_path: Path, *scripts: Script) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path / "s", *scripts)
    try:
        yield server
    finally:
        server.close()


def handshake(sock: socket.socket, *, flags: int = FLAGS, size: int = SIZE, structured: bool = True) -> ServerTransmission:
    """Negotiate as an honest server does."""
    engine = ServerHandshake(structured=structured, extended=False)
    while True:
        sock.sendall(engine.data_to_send())
        data = sock.recv(65536)
        events = engine.receive_data(data)
        while events:
            event = events[0]
            if isinstance(event, ExportWanted):
                events = engine.send_export(Export(event.name, size, flags))
            elif isinstance(event, ContextsWanted):
                events = engine.send_contexts(["base:allocation"])
            elif isinstance(event, Ready):
                sock.sendall(engine.data_to_send())
                return ServerTransmission(event.terms, event.trailing)
            else:
                raise OSError(f"the client is gone: {event}")


def requests_of(sock: socket.socket, engine: ServerTransmission) -> Iterator[Request]:
    yield from engine.pending()
    while True:
        for request in engine.buffer_updated(sock.recv_into(engine.get_buffer())):
            if request.command == wire.NBD_CMD_DISC:
                return
            yield request


def honest(sock: socket.socket, requests: int | None = None) -> ServerTransmission:
    """Answer `requests` requests, or all, as a disk of zeroes does."""
    engine = handshake(sock)
    if requests == 0:
        return engine
    for number, request in enumerate(requests_of(sock, engine), 1):
        if request.command == wire.NBD_CMD_READ:
            sock.sendall(engine.read_head(request) + bytes(request.length))
        elif request.command == wire.NBD_CMD_BLOCK_STATUS:
            sock.sendall(engine.status(request, 0, [(request.length, 3)], done=True))
        else:
            sock.sendall(engine.done(request))
        if number == requests:
            break
    return engine


def honest_for(requests: int) -> Script:
    """Answers so many requests, and dies."""

    def script(sock: socket.socket) -> None:
        honest(sock, requests)

    return script


def honest_always(sock: socket.socket) -> None:
    honest(sock)


def next_request(sock: socket.socket, engine: ServerTransmission) -> Request:
    for request in requests_of(sock, engine):
        return request
    raise OSError("the client has gone")


def open_raw(server: FakeServer, mode: str = "r", **options: OptionValue) -> Disk:
    file: dict[str, OptionValue] = {"file." + name.replace("_", "-"): value for name, value in options.items()}
    return blocklib.open(server.uri, "r+" if mode == "r+" else "r", format="raw", options=file)


# -- in the handshake --------------------------------------------------------------------------------------------------


def saying(*parts: bytes) -> Script:
    def script(sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)
        while sock.recv(65536):
            pass

    return script


def endless(beginning: bytes, part: bytes) -> Script:
    def script(sock: socket.socket) -> None:
        sock.sendall(beginning)
        while True:
            sock.sendall(part)

    return script


def silent(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


LIST_ENTRY = wire.option_reply(wire.NBD_OPT_EXTENDED_HEADERS, wire.NBD_REP_SERVER, wire.server_data("x" * 4000, ""))
HOSTILE_HANDSHAKES: dict[str, Script] = {
    "a web server": saying(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100)),
    "noise without end": endless(b"", b"\xa5" * 65536),
    "replies without end": endless(GREETING, LIST_ENTRY * 100),
    "a reply of 4 GiB": saying(GREETING, wire.OPTION_REPLY.pack(wire.NBD_REP_MAGIC, 11, 1, 0xFFFFFFFF)),
    "closed at once": lambda sock: None,
    "closed after its greeting": lambda sock: sock.sendall(GREETING),
}


@pytest.mark.parametrize("script", HOSTILE_HANDSHAKES.values(), ids=HOSTILE_HANDSHAKES.keys())
def test_a_hostile_handshake_ends_in_an_error(tmp_path: Path, script: Script) -> None:
    with fake(tmp_path, script) as server:
        tracemalloc.start()
        try:
            with pytest.raises(BlocklibError) as caught:
                open_raw(server)
            assert tracemalloc.get_traced_memory()[1] < 64 * MiB
        finally:
            tracemalloc.stop()
    assert str(tmp_path) in str(caught.value) or str(tmp_path) in str(caught.value.node)


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocklib.nbd.client._CONNECT_TIMEOUT", 0.2)
    for script in (silent, saying(GREETING)):
        (tmp_path / "s").unlink(missing_ok=True)
        with fake(tmp_path, script) as server, pytest.raises(StorageError) as caught:
            open_raw(server)
        assert caught.value.errno == errno.ETIMEDOUT


def test_a_server_that_drips_its_handshake_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocklib.nbd.client._CONNECT_TIMEOUT", 0.3)
    pause = threading.Event()

    def dripping(sock: socket.socket) -> None:
        for byte in GREETING * 100:
            sock.sendall(bytes([byte]))
            pause.wait(0.05)

    with fake(tmp_path, dripping) as server, pytest.raises(StorageError) as caught:
        open_raw(server)
    assert caught.value.errno == errno.ETIMEDOUT


# -- in the transmission ----------------------------------------------------------------------------------------------


def lying(lie: Callable[[ServerTransmission, Request], bytes]) -> Script:
    """Answers the first request by a lie, and then waits for the client to leave."""

    def script(sock: socket.socket) -> None:
        engine = handshake(sock)
        sock.sendall(lie(engine, next_request(sock, engine)))
        while sock.recv(65536):
            pass

    return script


def chunk(request: Request, kind: int, length: int, payload: bytes = b"") -> bytes:
    return wire.STRUCTURED_REPLY.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 0, kind, request.cookie, length) + payload


def data(request: Request, offset: int, length: int) -> bytes:
    return chunk(request, wire.NBD_REPLY_TYPE_OFFSET_DATA, length + 8, wire.OFFSET.pack(offset) + b"L" * length)


LIES: dict[str, Callable[[ServerTransmission, Request], bytes]] = {
    "a wrong magic": lambda engine, request: b"\xff" * 64,
    "a wrong cookie": lambda engine, request: engine.done(Request(0, 0, request.cookie + 1, 0, 0)),
    "success without data": lambda engine, request: engine.done(request),
    "another offset": lambda engine, request: data(request, request.offset + 512, request.length),
    "overlapping chunks": lambda engine, request: data(request, request.offset, 4096) * 2,
    "4 GiB of data": lambda engine, request: chunk(request, 1, 0xFFFFFFFF, wire.OFFSET.pack(request.offset) + bytes(65536)),
    "4 GiB of error message": lambda engine, request: chunk(request, 0x8001, 0xFFFFFFFF, bytes(65536)),
    "a status for a read": lambda engine, request: chunk(request, 5, 12, bytes(12)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_closes_the_connection_and_leaves_other_memory_alone(
    tmp_path: Path, lie: Callable[[ServerTransmission, Request], bytes]
) -> None:
    memory = bytearray(b"-" * 3 * 8192)
    with fake(tmp_path, lying(lie)) as server:
        disk = open_raw(server, reconnect_delay=60)
        with pytest.raises(RemoteProtocolError):
            disk.readinto(65536, memoryview(memory)[8192:-8192])
        with pytest.raises(RemoteProtocolError):
            disk.read(0, 512)
        assert server.n_connections == 1, "who lies is not asked again"
        disk.abandon()
    assert memory[:8192] == memory[-8192:] == b"-" * 8192


def test_every_thread_that_waits_hears_of_a_lie(tmp_path: Path) -> None:
    gathered = threading.Event()

    def script(sock: socket.socket) -> None:
        engine = handshake(sock)
        requests = requests_of(sock, engine)
        for _ in range(4):
            next(requests)
        gathered.set()
        sock.sendall(b"\xff" * 64)
        while sock.recv(65536):
            pass

    errors: list[BaseException] = []
    with fake(tmp_path, script) as server:
        disk = open_raw(server)

        def read(offset: int) -> None:
            try:
                disk.read(offset, 512)
            except BlocklibError as exc:
                errors.append(exc)

        threads = [threading.Thread(target=read, args=(512 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disk.abandon()
    assert [type(error) for error in errors] == [RemoteProtocolError] * 4
    assert len({id(error) for error in errors}) == 4


def test_a_lying_block_status_is_found_out(tmp_path: Path) -> None:
    def lie(engine: ServerTransmission, request: Request) -> bytes:
        assert request.command == wire.NBD_CMD_BLOCK_STATUS
        return chunk(request, 5, 4 + 16, wire.status_payload(0, [(0, 3), (512, 0)], extended=False))

    with fake(tmp_path, lying(lie)) as server:
        disk = open_raw(server)
        with pytest.raises(RemoteProtocolError):
            list(disk.extents())
        disk.abandon()


def test_a_status_that_reaches_behind_the_export_is_cut(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        engine = handshake(sock)
        for request in requests_of(sock, engine):
            sock.sendall(engine.status(request, 0, [(SIZE // 2, 0), ((1 << 32) - 65536, 3)], done=True))

    with fake(tmp_path, script) as server, open_raw(server) as disk:
        assert [(extent.offset, extent.length) for extent in disk.extents()] == [(0, SIZE // 2), (SIZE // 2, SIZE // 2)]
        assert disk.map()["length"].tolist() == [SIZE // 2, SIZE // 2]


def test_a_million_extents_are_a_table(tmp_path: Path) -> None:
    size = 1 << 32

    def script(sock: socket.socket) -> None:
        engine = handshake(sock, size=size)
        for request in requests_of(sock, engine):
            count = min(wire.MAX_STATUS_EXTENTS, request.length // 512)
            state = request.offset // 512 % 2 * 3
            payload = b"\0\0\0\0" + struct.pack(">LLLL", 512, state, 512, 3 - state) * (count // 2)
            sock.sendall(
                wire.STRUCTURED_REPLY.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 5, request.cookie, len(payload)) + payload
            )

    with fake(tmp_path, script) as server, open_raw(server) as disk:
        table = disk.map(0, 1 << 28)
        assert len(table) == 1 << 19
        assert table["data"].tolist() == [True, False] * (1 << 18)


# -- many requests at once --------------------------------------------------------------------------------------------


def transfer(disk: Disk, offsets: list[int], memory: bytearray, *, writing: bool = False) -> list[int]:
    """Transfer 512 bytes of `memory` for each offset: the error numbers."""
    base = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    addresses = array("q", (base + 512 * number for number in range(len(offsets))))
    results = array("q", [-1] * len(offsets))
    node = disk.node.children["file"].node
    node.transfer(array("q", offsets), addresses, array("q", [512] * len(offsets)), results, writing=writing)
    return results.tolist()


def numbered(sock: socket.socket, *, dies_after: int | None = None, fails: frozenset[int] = frozenset()) -> None:
    """Serves sectors that say their number; the sectors `fails` fail."""
    engine = handshake(sock)
    for count, request in enumerate(requests_of(sock, engine)):
        if count == dies_after:
            return
        number = request.offset // 512
        if number in fails:
            sock.sendall(engine.error(request, wire.NBD_EIO, "a bad sector"))
        elif request.command == wire.NBD_CMD_READ:
            sock.sendall(engine.read_head(request) + number.to_bytes(8, "big") * 64)
        else:
            sock.sendall(engine.done(request))


def test_a_transfer_fills_every_buffer_and_tells_each_error(tmp_path: Path) -> None:
    offsets = [512 * ((7 * number) % 1000) for number in range(1000)]
    memory = bytearray(512 * 1000)
    bad = frozenset({3, 500})
    found = [offset // 512 for offset in offsets if offset // 512 in bad]
    with fake(tmp_path, lambda sock: numbered(sock, fails=bad)) as server, open_raw(server, "r+") as disk:
        results = transfer(disk, offsets, memory)
        assert [offset // 512 for offset, result in zip(offsets, results, strict=True) if result] == found
        assert set(results) == {0, errno.EIO}
        for index, offset in enumerate(offsets):
            if not results[index]:
                assert memory[512 * index : 512 * index + 512] == (offset // 512).to_bytes(8, "big") * 64
        results = transfer(disk, offsets, memory, writing=True)
        assert [offset // 512 for offset, result in zip(offsets, results, strict=True) if result] == found


@pytest.mark.parametrize("writing", [False, True])
def test_a_transfer_goes_on_with_the_next_connection(tmp_path: Path, writing: bool) -> None:
    memory = bytearray(512 * 300)
    scripts = (lambda sock: numbered(sock, dies_after=100), numbered)
    with fake(tmp_path, *scripts) as server, open_raw(server, "r+", reconnect_delay=60) as disk:
        assert transfer(disk, [512 * number for number in range(300)], memory, writing=writing) == [0] * 300
        assert server.n_connections == 2
    if not writing:
        assert memory == b"".join(number.to_bytes(8, "big") * 64 for number in range(300))


def test_without_a_delay_the_rest_of_a_transfer_fails(tmp_path: Path) -> None:
    memory = bytearray(512 * 300)
    with fake(tmp_path, lambda sock: numbered(sock, dies_after=100)) as server:
        disk = open_raw(server)
        results = transfer(disk, [512 * number for number in range(300)], memory)
        assert results == [0] * 100 + [errno.EIO] * 200
        disk.abandon()


def test_a_lie_in_a_transfer_ends_it(tmp_path: Path) -> None:
    memory = bytearray(512 * 300)
    with fake(tmp_path, lying(LIES["overlapping chunks"])) as server:
        disk = open_raw(server)
        with pytest.raises(RemoteProtocolError):
            transfer(disk, [512 * number for number in range(300)], memory)
        with pytest.raises(RemoteProtocolError):
            disk.read(0, 512)
        disk.abandon()


# -- servers that stall or die ----------------------------------------------------------------------------------------


def dying_after(part: Callable[[ServerTransmission, Request], bytes]) -> Script:
    """Sends a part of the first reply and closes the connection."""

    def script(sock: socket.socket) -> None:
        engine = handshake(sock)
        sock.sendall(part(engine, next_request(sock, engine)))

    return script


DEATHS: dict[str, Callable[[ServerTransmission, Request], bytes]] = {
    "before the reply": lambda engine, request: b"",
    "in a header": lambda engine, request: engine.read_head(request)[:7],
    "in the data": lambda engine, request: engine.read_head(request) + bytes(100),
    "between chunks": lambda engine, request: data(request, request.offset, 512),
}


@pytest.mark.parametrize("part", DEATHS.values(), ids=DEATHS.keys())
def test_a_server_that_dies_in_a_read_fails_it(tmp_path: Path, part: Callable[[ServerTransmission, Request], bytes]) -> None:
    with fake(tmp_path, dying_after(part)) as server:
        disk = open_raw(server)
        with pytest.raises(StorageError) as caught:
            disk.read(0, 4096)
        assert caught.value.errno == errno.EIO
        disk.abandon()


@pytest.mark.parametrize("part", DEATHS.values(), ids=DEATHS.keys())
def test_with_a_delay_the_read_is_done_by_the_next_connection(
    tmp_path: Path, part: Callable[[ServerTransmission, Request], bytes]
) -> None:
    with fake(tmp_path, dying_after(part), honest_always) as server, open_raw(server, reconnect_delay=60) as disk:
        assert disk.read(0, 4096) == bytes(4096)
        assert server.n_connections == 2


def test_a_server_that_dies_in_a_write_gets_it_again(tmp_path: Path) -> None:
    written: list[tuple[int, bytes]] = []

    def dies(sock: socket.socket) -> None:
        engine = handshake(sock)
        requests = requests_of(sock, engine)
        first = next(requests)
        sock.sendall(engine.done(first))
        next(requests)

    def keeps(sock: socket.socket) -> None:
        engine = handshake(sock)
        for request in requests_of(sock, engine):
            if request.data is not None:
                written.append((request.offset, bytes(request.data)))
            sock.sendall(engine.done(request))

    with fake(tmp_path, dies, keeps) as server, open_raw(server, "r+", reconnect_delay=60) as disk:
        disk.write(0, b"a" * 512)
        disk.write(512, b"b" * 512)
    assert written == [(0, b"a" * 512), (512, b"b" * 512)], "what was acknowledged and not flushed comes first"


def test_what_was_flushed_is_not_written_again(tmp_path: Path) -> None:
    commands: list[int] = []

    def keeps(sock: socket.socket) -> None:
        engine = handshake(sock)
        for request in requests_of(sock, engine):
            commands.append(request.command)
            sock.sendall(engine.read_head(request) + bytes(512) if request.command == 0 else engine.done(request))

    with fake(tmp_path, honest_for(3), keeps) as server, open_raw(server, "r+", reconnect_delay=60) as disk:
        disk.write(0, b"a" * 512)
        disk.flush()
        disk.write_zeroes(4096, 4096)
        assert disk.read(0, 512) == bytes(512)
    assert commands == [wire.NBD_CMD_WRITE_ZEROES, wire.NBD_CMD_READ, wire.NBD_CMD_FLUSH]


def test_a_write_that_cannot_be_repeated_fails_everything_after_it(tmp_path: Path) -> None:
    def full(sock: socket.socket) -> None:
        engine = handshake(sock)
        for request in requests_of(sock, engine):
            sock.sendall(engine.error(request, wire.NBD_ENOSPC, "full"))

    with fake(tmp_path, honest_for(1), full) as server:
        disk = open_raw(server, "r+", reconnect_delay=60)
        disk.write(0, b"a" * 512)
        for request in (lambda: disk.write(512, b"b" * 512), disk.flush, lambda: disk.read(0, 512)):
            with pytest.raises(StorageError, match="writes are lost"):
                request()
        with pytest.raises(PoisonedError, match="a flush failed"):
            disk.close()


def test_an_export_that_has_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    def smaller(sock: socket.socket) -> None:
        handshake(sock, size=SIZE // 2)
        silent(sock)

    with fake(tmp_path, honest_for(1), smaller) as server:
        disk = open_raw(server, reconnect_delay=60)
        disk.read(0, 512)
        with pytest.raises(NbdError, match="has changed"):
            disk.read(0, 512)
        with pytest.raises(NbdError, match="has changed"):
            disk.read(0, 512)
        disk.abandon()


def test_a_server_that_stalls_is_given_up(tmp_path: Path) -> None:
    def stalls(sock: socket.socket) -> None:
        handshake(sock)
        silent(sock)

    with fake(tmp_path, stalls) as server:
        disk = open_raw(server, request_timeout=1)
        with pytest.raises(StorageError, match="no sign of life"):
            disk.read(0, 512)
        disk.abandon()


def test_a_server_that_reads_nothing_cannot_hold_up_a_writer(tmp_path: Path) -> None:
    hold = threading.Event()

    def deaf(sock: socket.socket) -> None:
        handshake(sock)
        hold.wait()

    with fake(tmp_path, deaf) as server:
        disk = open_raw(server, "r+", request_timeout=1)
        with pytest.raises(StorageError, match="no sign of life"):
            disk.write(0, bytes(8 * MiB))
        disk.abandon()
        hold.set()


def test_a_server_that_answers_before_it_reads_on_is_no_deadlock(tmp_path: Path) -> None:
    """It sends long replies while we send a long write, and takes nothing of that until the replies are taken."""

    def script(sock: socket.socket) -> None:
        engine = handshake(sock)
        for request in requests_of(sock, engine):
            if request.command == wire.NBD_CMD_READ:
                sock.sendall(engine.read_head(request) + bytes(request.length))
            else:
                sock.sendall(engine.done(request))

    with fake(tmp_path, script) as server, open_raw(server, "r+") as disk:
        threads = [threading.Thread(target=disk.read, args=(0, 8 * MiB)) for _ in range(3)]
        threads += [threading.Thread(target=disk.write, args=(0, bytes(8 * MiB))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_closing_while_requests_wait_for_a_server_ends_them(tmp_path: Path) -> None:
    with fake(tmp_path, honest_for(0)) as server:
        disk = open_raw(server, reconnect_delay=600)
        server.close()
        node = disk.node.children["file"].node
        failed: list[BaseException] = []

        def read() -> None:
            try:
                disk.read(0, 512)
            except BlocklibError as exc:
                failed.append(exc)

        thread = threading.Thread(target=read)
        thread.start()
        node.close()
        thread.join()
        assert len(failed) == 1
        disk.abandon()


def test_terms_are_told_as_they_were_negotiated(tmp_path: Path) -> None:
    agreed: list[Terms | Closed] = []

    def script(sock: socket.socket) -> None:
        agreed.append(honest(sock).terms)

    with fake(tmp_path, script) as server, open_raw(server) as disk:
        assert disk.read(0, 512) == bytes(512)
    (terms,) = agreed
    assert isinstance(terms, Terms)
    assert terms.structured
    assert terms.block_sizes
