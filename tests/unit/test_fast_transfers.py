"""Many transfers in one call, one after the other and through an io_uring, in every way that kernels run."""

from __future__ import annotations

import errno
import os
import random
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from blocklib._fast import transfers
from blocklib._fast.pointer import Pointer
from blocklib._fast.transfers import Moves
from blocklib.protocols.uring import Ring
from tests.kernels import WAYS, way

Mover = Callable[[int, Moves, bool], None]
"""(descriptor, transfers, whether they write)"""

SIZE = 100_000
CONTENT = random.Random(1).randbytes(SIZE)


def _ring() -> Ring:
    try:
        return Ring()
    except OSError as exc:
        pytest.skip(f"this kernel has no io_uring for us: {exc}")


@cache
def _kernel(how: str, name: str) -> Callable[..., int]:
    return way(transfers._through_ring if how == "ring" else transfers._one_by_one, name)


@pytest.fixture(params=[(how, name) for how in ("loop", "ring") for name in WAYS], ids="-".join)
def mover(request: pytest.FixtureRequest) -> Iterator[Mover]:
    how, name = request.param
    ring = _ring() if how == "ring" else None
    kernel = _kernel(how, name)

    def move(fd: int, moves: Moves, writing: bool) -> None:
        first = 0
        while first < moves.count:
            if ring is not None:
                first = kernel(fd, int(writing), 1, first, moves.count, *ring.memory.pointers(), *moves.pointers())
            else:
                first = kernel(fd, int(writing), 1, first, 1, moves.count, *moves.pointers())
            assert first > 0

    yield move
    if ring is not None:
        ring.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def _moves(memory: bytearray, ranges: list[tuple[int, int, int]]) -> Moves:
    """Transfers of (file offset, place in memory, length)."""
    base = Pointer(memory, "B").address
    offsets, places, lengths = (array("q", column) for column in zip(*ranges))
    return Moves(offsets, array("q", [base + place for place in places]), lengths, array("q", [77]) * len(offsets))


def _random_ranges(count: int, length: int) -> list[tuple[int, int, int]]:
    choose = random.Random(2)
    return [(choose.randrange(SIZE), index * length, choose.randint(0, length)) for index in range(count)]


def test_what_is_read_is_what_the_file_has_and_zeroes_past_its_end(mover: Mover, fd: int) -> None:
    ranges = [*_random_ranges(700, 300), (SIZE - 5, 700 * 300, 10), (SIZE + 50, 701 * 300, 10)]
    memory = bytearray(b"?" * (702 * 300))
    moves = _moves(memory, ranges)
    mover(fd, moves, False)
    assert set(moves.results.view) == {0}
    expected = bytearray(b"?" * len(memory))
    for offset, place, length in ranges:
        expected[place : place + length] = CONTENT[offset : offset + length].ljust(length, b"\0")
    assert memory == expected


def test_what_is_written_is_in_the_file_which_grows(mover: Mover, fd: int) -> None:
    memory = bytearray(random.Random(3).randbytes(400 * 250))
    ranges = [(2 * index * 250, index * 250, 250) for index in range(400)]
    moves = _moves(memory, ranges)
    mover(fd, moves, True)
    assert set(moves.results.view) == {0}
    expected = bytearray(CONTENT.ljust(ranges[-1][0] + 250, b"\0"))
    for offset, place, length in ranges:
        expected[offset : offset + length] = memory[place : place + length]
    assert os.pread(fd, 1 << 20, 0) == expected


def test_a_failed_transfer_has_its_error_number_and_the_others_are_made(mover: Mover, fd: int) -> None:
    memory = bytearray(30)
    moves = _moves(memory, [(0, 0, 10), (0, 10, 10), (10, 20, 10), (-1, 0, 10), (0, 0, -1)])
    moves.addresses.view[1] = 8
    mover(fd, moves, False)
    assert moves.results.view.tolist() == [0, errno.EFAULT, 0, errno.EINVAL, errno.EINVAL]
    assert memory == CONTENT[:10] + bytes(10) + CONTENT[10:20]


def test_more_transfers_than_one_call_begins_are_all_made(mover: Mover, fd: int) -> None:
    count = transfers._MOST + 100
    memory = bytearray(count)
    moves = _moves(memory, [(index, index, 1) for index in range(count)])
    mover(fd, moves, False)
    assert (set(moves.results.view), bytes(memory)) == ({0}, CONTENT[:count])


def test_a_descriptor_that_may_not_write_says_so(mover: Mover, tmp_path: Path) -> None:
    path = tmp_path / "read-only"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    try:
        moves = _moves(bytearray(10), [(0, 0, 10)])
        mover(fd, moves, True)
        assert moves.results.view.tolist() == [errno.EBADF]
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", WAYS)
def test_a_ring_that_the_kernel_refuses_leaves_nothing_on_its_way(name: str, fd: int) -> None:
    ring = _ring()
    ring.close()
    pointers = list(ring.memory.pointers())
    pointers[0] = Pointer(array("q", [-1, *pointers[0].view[1:]]), "q")
    moves = _moves(bytearray(10), [(0, 0, 10)])
    place = pointers[0].view[1]
    before = pointers[1].view[place]
    assert _kernel("ring", name)(fd, 0, 1, 0, 1, *pointers, *moves.pointers()) == -errno.EBADF
    assert pointers[1].view[place] == before


@pytest.mark.parametrize(
    ("moved", "result"),
    [
        (-errno.EINTR, -1),
        (-errno.EAGAIN, -1),
        (-errno.EIO, errno.EIO),
        (1024, 0),
        (512, -1),
    ],
)
@pytest.mark.parametrize("writing", [0, 1])
def test_interrupted_and_short_transfers_go_on(moved: int, result: int, writing: int) -> None:
    assert transfers._result(writing, 512, 4096, 0, 1024, moved) == result


def test_a_write_of_nothing_is_a_full_disk() -> None:
    assert transfers._result(1, 1, 0, 0, 1024, 0) == errno.ENOSPC


def test_the_end_of_a_file_in_the_middle_of_a_direct_read_is_filled_up() -> None:
    memory = bytearray(b"?" * 1024)
    assert transfers._result(0, 512, 4096, Pointer(memory, "B").address, 1024, 700) == 0
    assert memory == b"?" * 700 + bytes(324)


def test_counters_of_a_ring_go_round() -> None:
    assert [transfers._wrapped(number) for number in (5, (1 << 31) - 1, 1 << 31, (1 << 32) + 1, -(1 << 31))] == [
        5,
        (1 << 31) - 1,
        -(1 << 31),
        1,
        -(1 << 31),
    ]


def test_buffers_of_different_lengths_are_refused() -> None:
    one, two = array("q", [0]), array("q", [0, 0])
    with pytest.raises(ValueError, match="a different number"):
        Moves(one, one, two, one)
