"""Clients that break the rules or the peace: they end alone, and the others do not notice."""

from __future__ import annotations

import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB, nbd
from blocklib.disk import Disk
from blocklib.errors import ClosedError, NameNotFoundError, UsageError
from blocklib.nbd import wire

SIZE = 64 * MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    blocklib.create(tmp_path / "disk", SIZE, format="qcow2")
    with blocklib.open(tmp_path / "disk", "r+", format="qcow2") as opened:
        opened.write(0, bytes(range(256)) * 16384)
        yield opened


class Peer:
    """A client made by hand.  Whatever the server does, waiting for it ends."""

    def __init__(self, server: nbd.Server) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(server.uri.partition("socket=")[2])  # without a limit: with one, a full queue is an error
        self.socket.settimeout(60)
        self.file = self.socket.makefile("rb")

    def greet(self) -> Peer:
        assert len(self.file.read(18)) == 18
        self.socket.sendall(struct.pack(">L", 3))
        return self

    def go(self) -> Peer:
        self.greet()
        self.socket.sendall(wire.option(wire.NBD_OPT_GO, wire.go_data("", ())))
        while True:
            _magic, _option, kind, length = wire.OPTION_REPLY.unpack(self.file.read(20))
            self.file.read(length)
            if kind == wire.NBD_REP_ACK:
                return self
            assert kind == wire.NBD_REP_INFO

    def request(self, command: int, offset: int, length: int, *, flags: int = 0, cookie: int = 1) -> None:
        self.socket.sendall(wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, flags, command, cookie, offset, length))

    def error(self) -> int:
        magic, error, _cookie = wire.SIMPLE_REPLY.unpack(self.file.read(16))
        assert magic == wire.NBD_SIMPLE_REPLY_MAGIC
        return int(error)

    def is_cut_off(self) -> bool:
        try:
            while self.file.read(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def serve(disk: Disk, tmp_path: Path, **limits: float) -> nbd.Server:
    return nbd.Server(
        disk,
        listen=f"nbd+unix:///?socket={tmp_path / 's'}",
        limits=nbd.ServerLimits(**limits),  # type: ignore[arg-type]
    )


def check_service(server: nbd.Server) -> None:
    """Somebody else is served as if nothing were the matter."""
    peer = Peer(server).go()
    peer.request(wire.NBD_CMD_READ, 256, 4096)
    assert peer.error() == 0
    assert peer.file.read(4096) == bytes(range(256)) * 16
    peer.close()


OPTION = struct.Struct(">QLL")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 4,
        struct.pack(">L", 3) + b"\0" * 16,
        struct.pack(">L", 3) + OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_GO, 0xFFFFFFFF),
        struct.pack(">L", 3) + OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_EXPORT_NAME, 0xFFFFFFFF),
        struct.pack(">L", 3) + OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_EXPORT_NAME, 7) + b"nothing",
        struct.pack(">L", 3) + OPTION.pack(wire.NBD_OPTS_MAGIC, 0xFFFFFFFF, 0) * 5000,
        struct.pack(">L", 3) + OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_LIST, 0) * 5000,
    ],
)
def test_a_handshake_that_breaks_the_rules_ends(disk: Disk, tmp_path: Path, data: bytes) -> None:
    with serve(disk, tmp_path) as server:
        peer = Peer(server)
        sender = threading.Thread(target=lambda: _send(peer.socket, data))
        sender.start()
        assert peer.is_cut_off()
        sender.join()
        peer.close()
        check_service(server)


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError:
        return


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0" * 28,
        wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, 0, wire.NBD_CMD_WRITE, 1, 0, 0xFFFFFFFF),
        wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, 0, wire.NBD_CMD_WRITE, 1, 2**64 - 1, 33 * MiB),
    ],
)
def test_a_request_that_cannot_be_followed_ends_the_connection(disk: Disk, tmp_path: Path, request_bytes: bytes) -> None:
    with serve(disk, tmp_path) as server:
        peer = Peer(server).go()
        peer.socket.sendall(request_bytes)
        assert peer.is_cut_off()
        peer.close()
        check_service(server)


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (wire.NBD_CMD_READ, 2**64 - 1, 0xFFFFFFFF, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 0xFFFFFFFF, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, SIZE, 1, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_TRIM, 2**63, 2**31, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_WRITE_ZEROES, SIZE - 1, 2, 0, wire.NBD_ENOSPC),
        (wire.NBD_CMD_BLOCK_STATUS, 0, 4096, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_READ, 0, 512, 0x8000, wire.NBD_EINVAL),
        (999, 0, 512, 0, wire.NBD_EINVAL),
        (wire.NBD_CMD_FLUSH, 5, 5, 0, wire.NBD_EINVAL),
    ],
)
def test_an_impossible_request_is_an_error_and_the_connection_lives(
    disk: Disk, tmp_path: Path, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    with serve(disk, tmp_path) as server:
        peer = Peer(server).go()
        peer.request(command, offset, length, flags=flags)
        assert peer.error() == error
        peer.request(wire.NBD_CMD_FLUSH, 0, 0)
        assert peer.error() == 0
        peer.close()


@pytest.mark.parametrize("command", [wire.NBD_CMD_WRITE, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES])
def test_a_read_only_export_refuses_changes(disk: Disk, tmp_path: Path, command: int) -> None:
    with nbd.Server(disk, listen=f"nbd+unix:///?socket={tmp_path / 's'}", read_only=True) as server:
        peer = Peer(server).go()
        peer.request(command, 0, 4)
        if command == wire.NBD_CMD_WRITE:
            peer.socket.sendall(b"abcd")
        assert peer.error() in (wire.NBD_EPERM, wire.NBD_EINVAL)
        peer.request(wire.NBD_CMD_READ, 0, 4)
        assert (peer.error(), peer.file.read(4)) == (0, b"\0\1\2\3")
        peer.close()


def test_ten_thousand_half_open_handshakes_cost_little_and_stop_nobody(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path) as server, ExitStack() as stack:
        check_service(server)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held: list[socket.socket] = []
        for number in range(10_000):
            half = socket.socket(socket.AF_UNIX)
            half.connect(str(tmp_path / "s"))
            half.sendall(struct.pack(">L", 3) + OPTION.pack(wire.NBD_OPTS_MAGIC, wire.NBD_OPT_GO, 60_000))
            held.append(half)
            if len(held) > 500:
                held.pop(0).close()
            if number % 2500 == 0:
                check_service(server)
        for half in held:
            stack.callback(half.close)
        check_service(server)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KiB
        assert grown < 64 * MiB


def test_a_client_that_takes_no_replies_costs_bounded_memory_and_stops_nobody(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path, stop_seconds=0.5) as server:
        greedy = Peer(server).go()
        greedy.socket.settimeout(0.5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 1 << 20:  # ever more is asked for, until the server takes no more
                greedy.request(wire.NBD_CMD_READ, 0, 1 * MiB, cookie=sent)
                sent += 1
        check_service(server)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KiB < 160 * MiB
    greedy.close()  # the server has stopped although the client held on


def test_a_client_that_stops_in_the_middle_of_a_write_stops_nobody(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path, stop_seconds=0.1) as server:
        peer = Peer(server).go()
        peer.request(wire.NBD_CMD_WRITE, 0, 32 * MiB)
        peer.socket.sendall(b"x" * 100_000)
        check_service(server)
        assert disk.read(0, 4) == b"\0\1\2\3"
    assert peer.is_cut_off()
    peer.close()


def test_a_handshake_that_takes_too_long_ends(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path, handshake_seconds=0.2) as server:
        slow = Peer(server).greet()
        busy = Peer(server).go()
        assert slow.is_cut_off()
        busy.request(wire.NBD_CMD_FLUSH, 0, 0)
        assert busy.error() == 0  # who is at work is not hurried
        slow.close()
        busy.close()


def test_requests_in_flight_are_answered_before_the_server_has_stopped(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path) as server:
        peer = Peer(server).go()
        peer.request(wire.NBD_CMD_WRITE, 0, 4)
        peer.socket.sendall(b"abcd")
        assert peer.error() == 0
        for cookie in range(8):
            peer.request(wire.NBD_CMD_READ, 0, 2 * MiB, cookie=cookie)
        magic, error, _cookie = wire.SIMPLE_REPLY.unpack(peer.file.read(16))
        assert (magic, error) == (wire.NBD_SIMPLE_REPLY_MAGIC, 0)
        assert peer.file.read(4) == b"abcd"
        stopper = threading.Thread(target=server.close)
        stopper.start()
        peer.file.read(2 * MiB - 4)
        while head := peer.file.read(16):
            _magic, error, _cookie = wire.SIMPLE_REPLY.unpack(head)
            assert error in (0, wire.NBD_ESHUTDOWN)
            assert error or len(peer.file.read(2 * MiB)) == 2 * MiB
        stopper.join()
        peer.close()
    assert not (tmp_path / "s").exists()


def test_exports_come_and_go_while_the_server_runs(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path) as server:
        first = Peer(server).go()
        server.add(disk, "second", description="words", read_only=True, offset=MiB, length=MiB)
        with pytest.raises(UsageError):
            server.add(disk, "second")
        assert [(info.name, info.description, info.size) for info in nbd.list_exports(server.uri)] == [
            ("", "", SIZE),
            ("second", "words", MiB),
        ]
        server.remove("")
        assert first.is_cut_off()
        first.close()
        with pytest.raises(NameNotFoundError):
            server.remove("")
        assert server.exports == ("second",)
    with pytest.raises(ClosedError):
        server.add(disk, "third")


def test_clients_beyond_the_shared_number_wait(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with nbd.Server(disk, listen=f"nbd+unix:///?socket={path}", shared=1) as server:
        first = Peer(server).go()
        second = Peer(server)
        second.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.socket.recv(1)
        first.close()
        second.socket.settimeout(60)
        second.file = second.socket.makefile("rb")
        second.go().close()


def test_a_disk_that_is_closed_under_its_clients_gives_errors(disk: Disk, tmp_path: Path) -> None:
    with serve(disk, tmp_path) as server:
        peer = Peer(server).go()
        disk.close()
        peer.request(wire.NBD_CMD_READ, 0, 512)
        assert peer.error() == wire.NBD_ESHUTDOWN
        peer.close()
        late = Peer(server).greet()
        late.socket.sendall(wire.option(wire.NBD_OPT_GO, wire.go_data("", ())))
        assert wire.OPTION_REPLY.unpack(late.file.read(20))[2] == wire.NBD_REP_ERR_SHUTDOWN
        late.close()
