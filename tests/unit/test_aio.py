"""The engines of the file driver: many transfers of one call, by threads or through an io_uring."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blocklib
from blocklib._fast import lookups, placing, transfers
from blocklib._fast.pointer import Pointer
from blocklib.errors import ClosedError, ReadOnlyError, StorageError
from blocklib.node import Node
from blocklib.protocols import engines, host, uring
from blocklib.protocols.file import FileNode
from blocklib.protocols.memory import MemoryNode
from blocklib.protocols.opened import Aio

BLOCK = 4096
BLOCKS = 100
CONTENT = b"".join(bytes([1 + index]) * BLOCK for index in range(BLOCKS))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


AIO: tuple[Aio, ...] = ("threads", "io_uring", "native")
ENGINES: tuple[tuple[Aio, bool], ...] = (
    ("threads", True),
    ("threads", False),
    ("io_uring", True),
    ("io_uring", False),
    ("native", True),
)
"""(aio, whether with direct I/O)"""


@pytest.fixture(params=ENGINES, ids=lambda one: f"{one[0]}-{'direct' if one[1] else 'cached'}")
def node(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileNode]:
    aio, direct = request.param
    _load_kernels(monkeypatch)
    node = FileNode(None, str(path), read_only=False, direct=direct, aio=aio, locking="off")
    try:
        node.load()
    except StorageError as exc:
        pytest.skip(f"no direct I/O here: {exc}")
    yield node
    node.close()


def _load_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few transfers do not pay for kernels; here they are used all the same."""
    for kernel in transfers.family.kernels.values():
        monkeypatch.setattr(kernel, "_compiled", kernel.loaded())


class Request:
    """Blocks of a node and the memory they go to or come from, one after the other."""

    def __init__(self, blocks: list[int]) -> None:
        self.memory = mmap.mmap(-1, BLOCK * len(blocks))
        base = Pointer(self.memory, "B").address
        self.offsets = array("q", [block * BLOCK for block in blocks])
        self.addresses = array("q", [base + index * BLOCK for index in range(len(blocks))])
        self.lengths = array("q", [BLOCK]) * len(blocks)
        self.results = array("q", [77]) * len(blocks)

    def run(self, node: Node, *, writing: bool = False) -> list[int]:
        node.transfer(self.offsets, self.addresses, self.lengths, self.results, writing=writing)
        return self.results.tolist()


def test_many_blocks_are_read_at_once(node: FileNode) -> None:
    blocks = [(index * 37) % BLOCKS for index in range(300)]
    request = Request(blocks)
    assert set(request.run(node)) == {0}
    assert request.memory[:] == b"".join(bytes([1 + block]) * BLOCK for block in blocks)


def test_what_lies_past_the_end_reads_as_zero(node: FileNode, path: Path) -> None:
    os.truncate(path, BLOCKS * BLOCK - 100)
    request = Request([BLOCKS - 1, BLOCKS + 5])
    request.memory[:] = b"?" * len(request.memory)
    assert request.run(node) == [0, 0]
    assert request.memory[:] == (bytes([BLOCKS]) * (BLOCK - 100)).ljust(2 * BLOCK, b"\0")


def test_many_blocks_are_written_at_once_and_the_file_grows(node: FileNode, path: Path) -> None:
    blocks = [*range(0, BLOCKS, 2), BLOCKS + 3]
    request = Request(blocks)
    request.memory[:] = b"w" * len(request.memory)
    assert set(request.run(node, writing=True)) == {0}
    assert node.size == (BLOCKS + 4) * BLOCK
    content = path.read_bytes()
    assert len(content) == node.size
    for block in range(BLOCKS):
        expected = b"w" if block in blocks else bytes([1 + block])
        assert content[block * BLOCK : (block + 1) * BLOCK] == expected * BLOCK


def test_one_failure_leaves_the_others_alone(node: FileNode) -> None:
    request = Request([0, 1, 2])
    request.addresses[1] = BLOCK  # nothing is mapped there
    assert request.run(node) == [0, errno.EFAULT, 0]


def test_no_transfers_are_nothing_to_do(node: FileNode) -> None:
    node.transfer(array("q"), array("q"), array("q"), array("q"), writing=True)
    assert node.size == len(CONTENT)


def test_a_closed_node_and_one_for_reading_refuse(path: Path) -> None:
    node = FileNode(None, str(path), read_only=True, locking="off")
    node.load()
    with pytest.raises(ReadOnlyError):
        Request([0]).run(node, writing=True)
    node.close()
    with pytest.raises(ClosedError):
        Request([0]).run(node)


def test_every_leaf_has_transfers() -> None:
    node = MemoryNode(None, 2 * BLOCK, read_only=False)
    node.load()
    request = Request([1, 0])
    request.memory[:] = b"m" * len(request.memory)
    assert request.run(node, writing=True) == [0, 0]
    again = Request([0])
    assert again.run(node) == [0]
    assert again.memory[:] == b"m" * BLOCK


def test_threads_make_as_many_transfers_at_once_as_there_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(8, timeout=30)

    def wait(*_arguments: object, **_named: object) -> None:
        barrier.wait()

    monkeypatch.setattr(engines, "move_one_by_one", wait)
    moves = _moves(8)
    engines.move("threads", -1, moves, writing=False, alignment=1, waits=True)
    assert not barrier.broken


def test_what_a_thread_raises_is_raised_by_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, first: int, **_named: object) -> None:
        if first == 1:
            raise MemoryError

    monkeypatch.setattr(engines, "move_one_by_one", fail)
    with pytest.raises(MemoryError):
        engines.move("threads", -1, _moves(3), writing=False, alignment=1, waits=True)


def test_an_interrupt_is_raised_when_nothing_is_on_its_way_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, began, ended = threading.Event(), threading.Event(), []

    def slow(*_arguments: object, first: int, **_named: object) -> None:
        began.set()
        go_on.wait(30)
        ended.append(first)

    class Interrupted:
        """A queue whose reader is interrupted."""

        def get(self) -> BaseException | None:
            began.wait(30)
            raise KeyboardInterrupt

        def put(self, _error: BaseException | None) -> None:
            pass

    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            raise KeyboardInterrupt  # a second Ctrl-C
        go_on.set()

    monkeypatch.setattr(engines, "move_one_by_one", slow)
    monkeypatch.setattr(engines, "SimpleQueue", Interrupted)
    monkeypatch.setattr(engines, "sleep", nap)
    work: list[engines._Work] = []
    made = engines._Work

    def remember(*arguments: Any) -> engines._Work:
        work.append(made(*arguments))
        return work[-1]

    monkeypatch.setattr(engines, "_Work", remember)
    with pytest.raises(KeyboardInterrupt):
        engines.move("threads", -1, _moves(1 + 1), writing=False, alignment=1, waits=True)
    assert ended
    assert not any(work[0].running)
    assert len(naps) >= 2


def _moves(count: int) -> transfers.Moves:
    return transfers.Moves(*(array("q", bytes(8 * count)) for _ in range(4)))


@pytest.mark.parametrize("aio", AIO)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_batches_of_a_disk_with_direct_io(aio: Aio, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (transfers.family, lookups.family, placing.family):
        for kernel in family.kernels.values():
            monkeypatch.setattr(kernel, "_compiled", kernel.loaded())
    path = tmp_path / "disk"
    size = 2 * BLOCKS * BLOCK
    blocklib.create(path, size, format=format)
    rows = np.frombuffer(CONTENT, dtype=np.uint8).reshape(BLOCKS, BLOCK)
    data = np.frombuffer(mmap.mmap(-1, len(CONTENT)), dtype=np.uint8).reshape(BLOCKS, BLOCK)
    data[:] = rows
    offsets = np.arange(BLOCKS, dtype=np.int64)[::-1] * 2 * BLOCK
    try:
        disk = blocklib.open(path, "r+", format=format, cache="none", options={"file.aio": aio})
    except StorageError as exc:
        pytest.skip(f"no direct I/O here: {exc}")
    with disk:
        for _ in range(2):  # into nothing, and then in place
            disk.write_batch(offsets, data)
        back = np.frombuffer(mmap.mmap(-1, len(CONTENT)), dtype=np.uint8).reshape(BLOCKS, BLOCK)
        disk.read_batch(offsets, BLOCK, out=back)
        assert (back == rows).all()
        disk.read_batch(offsets + BLOCK, BLOCK, out=back)
        assert not back.any()
    with blocklib.open(path, format=format) as disk:
        assert (disk.read_batch(offsets, BLOCK) == rows).all()


# -- where there is no io_uring -------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it, and the kernel has no ring for us."""

    def refuse(number: int) -> None:
        def no_ring(*_arguments: int) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(engines, "_rings", [])
        monkeypatch.setattr(engines, "_told", False)
        monkeypatch.setattr(host, "system_call", no_ring)

    return refuse


@pytest.mark.parametrize(("number", "why"), [(errno.ENOSYS, "this kernel has none"), (errno.EPERM, "Operation not permitted")])
def test_a_kernel_without_io_uring_is_told_once_and_threads_do_it(
    number: int, why: str, path: Path, refused: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    refused(number)
    with caplog.at_level(logging.WARNING, "blocklib"):
        for _ in range(2):
            node = FileNode(None, str(path), read_only=True, aio="io_uring", locking="off")
            node.load()
            request = Request([5])
            assert request.run(node) == [0]
            assert request.memory[:] == bytes([6]) * BLOCK
            node.close()
    (record,) = caplog.records
    assert f"{path}: io_uring is not available ({'the kernel says: ' * (number == errno.EPERM)}{why})" in record.getMessage()


def test_native_falls_back_without_a_word(path: Path, refused: Callable[[int], None], caplog: pytest.LogCaptureFixture) -> None:
    refused(errno.ENOMEM)
    node = FileNode(None, str(path), read_only=True, direct=True, aio="native", locking="off")
    try:
        node.load()
    except StorageError as exc:
        pytest.skip(f"no direct I/O here: {exc}")
    assert Request([0, 1]).run(node) == [0, 0]
    node.close()
    assert not caplog.records


def test_an_io_uring_without_what_we_need_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(_number: int, _depth: int, address: int) -> int:
        ctypes.memmove(address, bytes(uring._PARAMETERS.size), uring._PARAMETERS.size)
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(host, "system_call", old)
    with pytest.raises(OSError) as caught:
        uring.Ring()
    assert caught.value.errno == errno.ENOSYS


def test_a_ring_that_stops_working_is_replaced_by_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _load_kernels(monkeypatch)
    monkeypatch.setattr(transfers, "_through_ring", _Refusing())
    node = FileNode(None, str(path), read_only=True, aio="io_uring", locking="off")
    node.load()
    request = Request([3])
    assert request.run(node) == [0]
    assert request.memory[:] == bytes([4]) * BLOCK
    node.close()


class _Refusing:
    """A kernel whose ring takes nothing."""

    def worth(self, _saving: int) -> Callable[..., int]:
        return lambda *_arguments: -errno.EBADR


def test_the_child_of_a_fork_has_its_own_threads_and_rings(path: Path) -> None:
    code = """
import os, sys
from tests.unit.test_aio import Request, BLOCK
from blocklib._fast import transfers
from blocklib.protocols import engines
from blocklib.protocols.file import FileNode

for kernel in transfers.family.kernels.values():
    kernel._compiled = kernel.loaded()

def read(aio):
    node = FileNode(None, sys.argv[1], read_only=True, aio=aio, locking="off")
    node.load()
    node.direct = True  # for the engines: it waits
    request = Request([7, 8, 9])
    assert request.run(node) == [0, 0, 0]
    assert request.memory[:BLOCK] == bytes([8]) * BLOCK
    node.close()

for aio in ("threads", "io_uring"):
    read(aio)
child = os.fork()
if child == 0:
    assert not engines._rings
    for aio in ("threads", "io_uring"):
        read(aio)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for aio in ("threads", "io_uring"):
    read(aio)
"""
    root = Path(__file__).parent.parent.parent
    subprocess.run(
        [sys.executable, "-c", code, path], check=True, timeout=60, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
