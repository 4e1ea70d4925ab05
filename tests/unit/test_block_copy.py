"""The copying loop and its parts: runs, pieces, zero detection, order of writes, failures, salvage, cancelling."""

from __future__ import annotations

import errno
import itertools
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blocklib
from blocklib import jobs
from blocklib._fast.kernel import Kernel
from blocklib.disk import Disk
from blocklib.errors import (
    ImageExistsError,
    JobCancelled,
    LockedError,
    OptionError,
    OutOfRangeError,
    StorageError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklib.jobs.block_copy import BlockCopy
from blocklib.jobs.control import Control, Task
from blocklib.jobs.crew import Crew, piece_size
from blocklib.jobs.ends import Concatenation
from blocklib.jobs.job import Job
from blocklib.jobs.runs import (
    COMPARE,
    COPY,
    PIECE,
    SKIP,
    SMALL_PIECE,
    ZERO,
    Piece,
    Run,
    coalesced,
    pieces,
    runs_above,
    runs_of,
    without_equal_zeroes,
    without_small_zeroes,
    zipped,
)
from blocklib.jobs.zero_runs import BlockScanner
from blocklib.protocols.memory import MemoryNode
from blocklib.sizes import KiB, MiB


class Store:
    """Bytes to copy from or to, which remembers how it was written and may have bad sectors."""

    def __init__(self, content: bytes | bytearray, *, bad: range = range(0)) -> None:
        self.content = bytearray(content)
        self.bad = bad
        self.writes: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def readinto(self, offset: int, buffer: memoryview, /) -> None:
        if self.bad and offset < self.bad.stop and offset + len(buffer) > self.bad.start:
            raise StorageError("a bad sector", errno=errno.EIO, operation="pread")
        buffer[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview, /) -> None:
        with self._lock:
            self.writes.append((offset, len(data)))
        self.content[offset : offset + len(data)] = data

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None:
        for offset, data in runs:
            self.write(offset, data)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        with self._lock:
            self.zeroed.append((offset, length))
        self.content[offset : offset + length] = bytes(length)


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def control() -> Control:
    return Control("test")


def whole(store: Store) -> list[Run]:
    return [(0, len(store.content), COPY)]


@pytest.fixture
def memory() -> MemoryNode:
    return MemoryNode(None, 64 * MiB)


# -- runs -------------------------------------------------------------------------------------------------------------


@st.composite
def run_lists(draw: st.DrawFn) -> list[Run]:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    start, found = 0, []
    for length in lengths:
        found.append((start, length, draw(st.sampled_from([SKIP, COPY, ZERO, COMPARE]))))
        start += length
    return found


def bytes_of(found: list[Run]) -> list[int]:
    """What is to be done with each byte."""
    return [what for _start, length, what in found for _ in range(length)]


@given(run_lists())
def test_coalescing_changes_no_byte_and_leaves_no_equal_neighbours(found: list[Run]) -> None:
    joined = list(coalesced(found))
    assert bytes_of(joined) == bytes_of(found)
    assert all(a[2] != b[2] for a, b in itertools.pairwise(joined))
    assert [start for start, _n, _what in joined] == [sum(n for _s, n, _w in joined[:i]) for i in range(len(joined))]


@given(run_lists(), run_lists())
def test_zipping_gives_both_sides_of_every_byte(first: list[Run], second: list[Run]) -> None:
    size = min(len(bytes_of(first)), len(bytes_of(second)))
    cut = [(s, min(n, size - s), w) for s, n, w in first if s < size]
    other = [(s, min(n, size - s), w) for s, n, w in second if s < size]
    both = list(zipped(cut, other))
    assert [a for _s, n, a, _b in both for _ in range(n)] == bytes_of(cut)
    assert [b for _s, n, _a, b in both for _ in range(n)] == bytes_of(other)


def test_small_zeroes_between_data_become_data() -> None:
    found = [(0, 10, COPY), (10, 3, ZERO), (13, 7, COPY), (20, 8, ZERO), (28, 2, COPY)]
    assert list(without_small_zeroes(found, 8)) == [(0, 20, COPY), (20, 8, ZERO), (28, 2, COPY)]


def test_zeroes_are_measured_after_joining_neighbours() -> None:
    assert list(without_small_zeroes([(0, 4, ZERO), (4, 4, ZERO)], 8)) == [(0, 8, ZERO)]


def test_what_is_zero_on_both_sides_is_not_compared() -> None:
    asked = [(0, 30, COMPARE), (30, 10, COPY)]
    source = [(0, 10, ZERO), (10, 10, COPY), (20, 20, ZERO)]
    shown = [(0, 20, ZERO), (20, 20, COPY)]
    assert list(without_equal_zeroes(asked, source, shown)) == [(0, 10, SKIP), (10, 20, COMPARE), (30, 10, COPY)]


def mixed_runs(seed: int) -> list[Run]:
    rng = random.Random(seed)
    found: list[Run] = []
    start = 0
    for _ in range(400):
        length = rng.choice([512, 4096, PIECE // 3, PIECE, 5 * PIECE]) + rng.randrange(0, 8) * 512
        found.append((start, length, rng.choice([SKIP, COPY, ZERO, COMPARE])))
        start += length
    return found


@pytest.mark.parametrize("most", [SMALL_PIECE, PIECE])
@pytest.mark.parametrize("unit", [1, 4096, 65536, SMALL_PIECE])
def test_pieces_cover_everything_once_and_fit_the_buffer(unit: int, most: int) -> None:
    found = mixed_runs(unit)
    cut = list(pieces(found, unit, lambda: most))
    assert [piece.index for piece in cut] == list(range(len(cut)))
    assert sum(piece.length for piece in cut) == sum(found[-1][:2])
    for piece in cut:
        end = 0
        reading = [(s, n, at) for s, n, what, at in piece.runs if what in (COPY, COMPARE)]
        for start, length, at in reading:
            assert end <= at < end + 4096
            assert at % 4096 == start % 4096
            end = at + length
        assert end <= most
        assert piece.copied == sum(n for _s, n, _at in reading)
    kept = [(s, n, what) for piece in cut for s, n, what, _at in piece.runs]
    assert list(coalesced(kept)) == [run for run in coalesced(found) if run[2] != SKIP]


@pytest.mark.parametrize("unit", [4096, 65536, SMALL_PIECE])
def test_a_run_is_cut_between_units_only(unit: int) -> None:
    found = mixed_runs(unit + 1)
    ends = {start + length for start, length, _what in found}
    for piece in pieces(found, unit):
        for start, length, what, _at in piece.runs:
            assert what == ZERO or (start + length) % unit == 0 or start + length in ends


@pytest.mark.parametrize("threads", [1, 3, 4, 8, 9, 16, 64])
def test_the_buffers_of_all_threads_are_bounded(threads: int) -> None:
    size = piece_size(threads)
    assert SMALL_PIECE <= size <= PIECE
    assert size & (size - 1) == 0
    assert threads * size <= 128 * MiB


def test_small_runs_share_a_piece() -> None:
    found = [(i * MiB, 4096, COPY) if i % 2 else (i * MiB, MiB, SKIP) for i in range(100)]
    assert len(list(pieces(found))) == 1


@pytest.mark.parametrize("kinds", [(COPY, ZERO), (SKIP, ZERO), (COPY, SKIP)], ids=["data", "zeroes", "gaps"])
def test_many_small_runs_make_many_pieces(kinds: tuple[int, int]) -> None:
    found = [(i * 512, 512, kinds[i % 2]) for i in range(2 * PIECE // 512)]
    cut = list(pieces(found))
    assert max(len(piece.runs) for piece in cut) <= 1024
    assert sum(piece.length for piece in cut) == 2 * PIECE


# -- zeroes and differences in a buffer -------------------------------------------------------------------------------


@pytest.fixture(params=["kernels", "definitions"])
def scanner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BlockScanner:
    """Kernels take blocks from wherever in memory they begin, once they have been loaded for something large."""
    use_kernels = request.param == "kernels"
    monkeypatch.setattr(Kernel, "worth", lambda kernel, saving: kernel.loaded() if use_kernels else None)
    return BlockScanner(64)


def expected_parts(content: bytes | bytearray, other: bytes | bytearray, offset: int, block: int) -> list[tuple[int, int]]:
    bounds = [0, *(n for n in range(1, len(content)) if (offset + n) % block == 0), len(content)]
    parts: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(bounds):
        if content[start:stop] != other[start:stop]:
            if parts and parts[-1][1] == start:
                start = parts.pop()[0]
            parts.append((start, stop))
    return parts


@pytest.mark.parametrize("offset", [0, 1, 63, 64, 4096])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4096])
def test_data_is_found_in_blocks_of_the_disk(scanner: BlockScanner, offset: int, length: int) -> None:
    rng = random.Random(offset * 10007 + length)
    for _ in range(20):
        content = bytearray(length)
        for _ in range(rng.randrange(4)):
            content[rng.randrange(length)] = 1
        assert scanner.data_parts(memoryview(content), offset) == expected_parts(content, bytes(length), offset, 64)


@pytest.mark.parametrize("offset", [0, 17, 64])
def test_differences_are_found_in_blocks_of_the_disk(scanner: BlockScanner, offset: int) -> None:
    rng = random.Random(offset)
    for length in (5, 640, 1001):
        content, other = bytearray(pattern(length)), bytearray(pattern(length))
        for _ in range(3):
            other[rng.randrange(length)] ^= 0x80
        found = scanner.changed_parts(memoryview(content), memoryview(other), offset)
        assert found == expected_parts(content, other, offset, 64)


# -- the crew ---------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Iterator[Piece]:
    return (Piece(index) for index in range(count))


def test_a_crew_starts_no_thread_for_one_piece() -> None:
    names: list[str] = []
    Crew(control(), lambda _piece, _buffer: names.append(threading.current_thread().name), 4, buffer=4096).run(numbered(1))
    assert names == [threading.current_thread().name]


def test_as_many_threads_work_as_there_may_be() -> None:
    all_here = threading.Barrier(3, timeout=30)
    names: set[str] = set()

    def work(_piece: Piece, _buffer: memoryview) -> None:
        names.add(threading.current_thread().name + str(threading.get_ident()))
        all_here.wait()

    Crew(control(), work, 3, buffer=4096).run(numbered(3))
    assert len(names) == 3


@pytest.mark.parametrize("size", [1, 3])
def test_the_first_failure_is_raised_and_stops_the_rest(size: int) -> None:
    done: list[int] = []

    def work(item: Piece, _buffer: memoryview) -> None:
        if not crew.take_turn(item):
            return
        if item.index == 3:
            raise ValueError("three")
        done.append(item.index)

    crew = Crew(control(), work, size, buffer=4096)
    with pytest.raises(ValueError, match="three"):
        crew.run(numbered(1000))
    assert done == [0, 1, 2]


def test_what_fails_to_find_the_next_piece_is_raised() -> None:
    def broken() -> Iterator[Piece]:
        yield from numbered(2)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        Crew(control(), lambda *_: None, 2, buffer=4096).run(broken())


def test_a_job_that_is_paused_has_nothing_in_flight_and_goes_on_with_all_threads() -> None:
    working = Barred()
    job: Job[int] = Job(Pieces(working, 3)).start()
    with job:
        working.begun.acquire(timeout=30)
        job.pause()
        working.free()
        for event in job.events():
            if event.status == "paused":
                break
        assert working.inside == 0
        before = working.done
        assert before < 1000
        job.resume()
        assert job.wait() == 1000
        assert working.done == 1000


class Barred:
    """Work that begins only when it is set free, and counts who is inside."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.inside = self.done = 0
        self._gate = threading.Event()
        self._lock = threading.Lock()

    def free(self) -> None:
        self._gate.set()

    def __call__(self, _piece: Piece, _buffer: memoryview) -> None:
        with self._lock:
            self.inside += 1
        self.begun.release()
        self._gate.wait(30)
        with self._lock:
            self.inside -= 1
            self.done += 1


class Pieces(Task[int]):
    verb = "test"

    def __init__(self, work: Barred, size: int) -> None:
        self._work = work
        self._size = size

    def run(self, control: Control) -> int:
        Crew(control, self._work, self._size, buffer=4096).run(numbered(1000))
        return self._work.done


def test_the_speed_limit_is_for_all_threads_together() -> None:
    watched = Control("test", speed=100 * MiB)
    began = watched.clock.now()
    BlockCopy(watched, Store(pattern(PIECE)), Store(bytes(PIECE)), threads=3).run([(0, PIECE // 4, COPY)])
    assert watched.wait_to_begin()
    assert watched.clock.now() - began >= PIECE / 4 / (100 * MiB)


# -- copying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("unordered", [False, True])
def test_a_copy_is_equal(threads: int, unordered: bool) -> None:
    source = Store(pattern(3 * PIECE + 12345))
    target = Store(bytes(len(source.content)))
    copy = BlockCopy(control(), source, target, threads=threads, unordered=unordered)
    copy.run(whole(source))
    assert target.content == source.content
    assert copy.bytes_read == copy.bytes_written == len(source.content)


def test_writes_follow_the_order_of_the_disk_whatever_order_they_are_read_in() -> None:
    class Slow(Store):
        """The first piece is read last."""

        later = threading.Event()

        def readinto(self, offset: int, buffer: memoryview, /) -> None:
            if offset == 0:
                self.later.wait(30)
            elif offset >= PIECE:
                self.later.set()
            super().readinto(offset, buffer)

    source = Slow(pattern(6 * PIECE))
    target = Store(bytes(6 * PIECE))
    BlockCopy(control(), source, target, threads=3).run(whole(source))
    assert target.writes == sorted(target.writes)
    assert target.content == source.content


def test_zeroes_stored_as_data_are_left_out_where_the_target_is_zero() -> None:
    content = bytearray(pattern(64 * KiB))
    content[8 * KiB : 24 * KiB] = bytes(16 * KiB)
    source, target = Store(content), Store(bytes(64 * KiB))
    copy = BlockCopy(control(), source, target, block=4096, zero_known=True)
    copy.run(whole(source))
    assert target.content == content
    assert target.writes == [(0, 8 * KiB), (24 * KiB, 40 * KiB)]
    assert target.zeroed == []
    assert (copy.bytes_read, copy.bytes_written) == (64 * KiB, 48 * KiB)


def test_zeroes_are_written_as_zeroes_where_the_target_may_hold_data() -> None:
    content = bytearray(pattern(64 * KiB))
    content[8 * KiB : 24 * KiB] = bytes(16 * KiB)
    source, target = Store(content + bytes(64 * KiB)), Store(pattern(128 * KiB, seed=2))
    BlockCopy(control(), source, target, block=4096).run([(0, 64 * KiB, COPY), (64 * KiB, 64 * KiB, ZERO)])
    assert target.content == source.content
    assert target.zeroed == [(8 * KiB, 16 * KiB), (64 * KiB, 64 * KiB)]


def test_without_a_block_size_every_byte_is_written() -> None:
    source, target = Store(bytes(64 * KiB)), Store(pattern(64 * KiB))
    BlockCopy(control(), source, target).run(whole(source))
    assert target.writes == [(0, 64 * KiB)]


def test_comparing_copies_what_differs_and_nothing_else() -> None:
    source = Store(pattern(64 * KiB))
    shown = Store(bytes(source.content))
    shown.content[5000] ^= 1
    source.content[20 * KiB : 24 * KiB] = bytes(4 * KiB)
    target = Store(bytes(shown.content))
    BlockCopy(control(), source, target, block=4096, shown=shown).run([(0, 64 * KiB, COMPARE)])
    assert target.content == source.content
    assert target.writes == [(4096, 4096)]
    assert target.zeroed == [(20 * KiB, 4 * KiB)]


def test_skipped_runs_count_as_progress_and_are_not_touched() -> None:
    watched = control()
    watched.set_total(PIECE)
    source, target = Store(pattern(PIECE)), Store(bytes(PIECE))
    BlockCopy(watched, source, target).run([(0, PIECE // 2, SKIP), (PIECE // 2, PIECE // 2, COPY)])
    assert watched.snapshot().fraction == 1.0
    assert target.writes == [(PIECE // 2, PIECE // 2)]


def test_a_read_error_goes_up() -> None:
    source = Store(pattern(4 * PIECE), bad=range(PIECE, PIECE + 512))
    with pytest.raises(StorageError, match="bad sector"):
        BlockCopy(control(), source, Store(bytes(4 * PIECE)), threads=2).run(whole(source))


def test_a_write_error_goes_up_and_nothing_after_it_is_written() -> None:
    class Full(Store):
        def write(self, offset: int, data: memoryview, /) -> None:
            if offset >= 2 * PIECE:
                raise StorageError("no space", errno=errno.ENOSPC, operation="pwrite")
            super().write(offset, data)

    source, target = Store(pattern(6 * PIECE)), Full(bytes(6 * PIECE))
    with pytest.raises(StorageError, match="no space"):
        BlockCopy(control(), source, target, threads=3).run(whole(source))
    assert target.writes == [(0, PIECE), (PIECE, PIECE)]


def test_salvage_makes_zeroes_of_unreadable_sectors_only_and_lists_them() -> None:
    source = Store(pattern(2 * PIECE), bad=range(70_000, 71_000))
    target = Store(bytes(2 * PIECE))
    copy = BlockCopy(control(), source, target, salvage=True, threads=2)
    copy.run(whole(source))
    first, last = 70_000 // 512 * 512, -(-71_000 // 512) * 512
    assert copy.unreadable == ((first, last - first),)
    expected = bytearray(source.content)
    expected[first:last] = bytes(last - first)
    assert target.content == expected


def test_cancelling_stops_between_pieces() -> None:
    watched = control()

    class Cancelling(Store):
        def write(self, offset: int, data: memoryview, /) -> None:
            watched.cancelled = True
            super().write(offset, data)

    source, target = Store(pattern(20 * PIECE)), Cancelling(bytes(20 * PIECE))
    with pytest.raises(JobCancelled):
        BlockCopy(watched, source, target, threads=1).run(whole(source))
    assert 1 <= len(target.writes) < 20


# -- disks ------------------------------------------------------------------------------------------------------------


def test_runs_of_a_disk_follow_its_data(memory: MemoryNode) -> None:
    with Disk(memory, "r+") as disk:
        disk.write(1 * MiB, pattern(64 * KiB))
        found = list(coalesced(runs_of(disk, 0, disk.size)))
    assert found == [(0, MiB, ZERO), (MiB, 64 * KiB, COPY), (MiB + 64 * KiB, 63 * MiB - 64 * KiB, ZERO)]


def test_runs_by_tables_equal_runs_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    blocklib.create(base, 4 * MiB, format="qcow2", options={"cluster_size": 4096})
    blocklib.create(top, 8 * MiB, format="qcow2", backing=base, backing_format="qcow2", options={"cluster_size": 512})
    rng = random.Random(3)
    for path, size in ((base, 4 * MiB), (top, 8 * MiB)):
        with blocklib.open(path, "r+", format="qcow2", references="allow") as disk:
            for _ in range(60):
                offset = rng.randrange(size // 4096) * 4096
                if rng.random() < 0.3:
                    disk.write_zeroes(offset, 4096)
                else:
                    disk.write(offset, pattern(512))
    with blocklib.open(top, format="qcow2", references="allow") as disk:
        answers = []
        for worth in (False, True):
            monkeypatch.setattr("blocklib.status.worth_tables", lambda *_range, worth=worth: worth)
            monkeypatch.setattr("blocklib.status._FIRST_WINDOW", 128 * KiB)
            own = runs_above(disk, 0, disk.size, disk.chain()[1], absent=SKIP, absent_zero=COMPARE)
            answers.append((list(coalesced(runs_of(disk, 0, disk.size))), list(coalesced(own))))
    assert answers[0] == answers[1]
    assert {what for _start, _length, what in answers[0][1]} == {SKIP, COPY, ZERO, COMPARE}


def test_disks_one_after_the_other_read_as_one() -> None:
    sizes = [1000, 512, 3 * 512, 1]
    disks = []
    for index, size in enumerate(sizes):
        disk = Disk(MemoryNode(None, size), "r+")
        disk.write(0, bytes([index + 1]) * size)
        disks.append(disk)
    one = Concatenation(disks)
    expected = b"".join(bytes([i + 1]) * n + bytes(-n % 512) for i, n in enumerate(sizes))
    assert one.size == len(expected)
    for offset, length in ((0, one.size), (990, 600), (1023, 2), (one.size - 1, 1)):
        view = memoryview(bytearray(b"?" * length))
        one.readinto(offset, view)
        assert bytes(view) == expected[offset : offset + length]
    assert sum(n for _s, n, _w in one.runs()) == one.size
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("size", [0, 300, 1000, 1024, 5000])
def test_a_disk_can_be_shown_shorter_or_longer_than_it_is(size: int) -> None:
    with Disk(MemoryNode(None, 1000), "r+") as disk:
        disk.write(0, b"x" * 1000)
        shown = Concatenation([disk], size=size)
        view = memoryview(bytearray(size))
        shown.readinto(0, view)
        assert bytes(view) == (b"x" * 1000).ljust(size, b"\0")[:size]
        assert sum(n for _s, n, _w in shown.runs()) == shown.size == size


# -- the verbs, without any other program -----------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A raw image with data, holes, and zeroes stored as data."""
    path = tmp_path / "source.raw"
    with path.open("wb") as file:
        file.truncate(5 * MiB)
        file.seek(64 * KiB)
        file.write(pattern(300 * KiB) + bytes(200 * KiB) + pattern(100 * KiB, seed=5))
        file.seek(4 * MiB + 512)
        file.write(pattern(1000, seed=6))
    return path


def test_convert_there_and_back_is_the_identity(tmp_path: Path, source: Path) -> None:
    with blocklib.open(source, format="raw") as disk:
        result = blocklib.convert(disk, tmp_path / "a.qcow2", format="qcow2")
    blocklib.convert(tmp_path / "a.qcow2", tmp_path / "b.raw", format="raw")
    assert (tmp_path / "b.raw").read_bytes() == source.read_bytes()
    assert 0 < result.bytes_written < 2 * MiB
    assert result.unreadable == ()


def test_convert_refuses_a_file_that_is_there_unless_told_to_overwrite(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "t.raw"
    target.write_bytes(b"precious")
    with blocklib.open(source, format="raw") as disk:
        with pytest.raises(ImageExistsError):
            blocklib.convert(disk, target, format="raw")
        assert target.read_bytes() == b"precious"
        blocklib.convert(disk, target, format="raw", overwrite=True)
    assert target.read_bytes() == source.read_bytes()


def test_convert_onto_its_own_source_is_refused_and_harms_nothing(tmp_path: Path, source: Path) -> None:
    before = source.read_bytes()
    with blocklib.open(source, format="raw") as disk:
        with pytest.raises(LockedError):
            blocklib.convert(disk, source, format="raw", overwrite=True)
    assert source.read_bytes() == before


def test_convert_into_an_open_disk_keeps_what_lies_behind(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "t.raw"
    target.write_bytes(b"x" * 6 * MiB)
    with blocklib.open(source, format="raw") as disk, blocklib.open(target, "r+", format="raw") as other:
        blocklib.convert(disk, other)
    assert target.read_bytes() == source.read_bytes() + b"x" * MiB


def test_convert_into_an_open_disk_that_is_too_small_is_refused(tmp_path: Path, source: Path) -> None:
    with blocklib.open(source, format="raw") as disk, Disk(MemoryNode(None, MiB), "r+") as small:
        with pytest.raises(OutOfRangeError):
            blocklib.convert(disk, small)


def test_convert_of_several_sources_makes_one_disk(tmp_path: Path, source: Path) -> None:
    with blocklib.open(source, format="raw") as disk:
        blocklib.convert([disk, disk], tmp_path / "two.qcow2", format="qcow2")
    with blocklib.open(tmp_path / "two.qcow2") as two:
        assert two.read(0, two.size) == 2 * source.read_bytes()


def test_convert_with_sparse_size_0_allocates_everything(tmp_path: Path, source: Path) -> None:
    with blocklib.open(source, format="raw") as disk:
        blocklib.convert(disk, tmp_path / "full.qcow2", format="qcow2", sparse_size=0)
    with blocklib.open(tmp_path / "full.qcow2") as full:
        assert all(extent.data and not extent.zero for extent in full.extents())
        assert full.read(0, full.size) == source.read_bytes()


def test_convert_into_a_disk_known_to_be_zero_writes_no_zeroes(source: Path) -> None:
    node = MemoryNode(None, 5 * MiB)
    with blocklib.open(source, format="raw") as disk, Disk(node, "r+") as target:
        target.write(2 * MiB, b"kept")  # a lie: what is not written stays
        blocklib.convert(disk, target, target_is_zero=True)
        assert target.read(2 * MiB, 4) == b"kept"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"format": "raw", "sparse_size": 100},
        {"format": "raw", "threads": 0},
        {"format": "qcow2", "backing": "b", "options": {"backing_file": "c"}},
    ],
    ids=["no-format", "odd-sparse-size", "no-threads", "backing-twice"],
)
def test_convert_refuses_what_makes_no_sense_before_it_begins(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        jobs.convert(tmp_path / "nothing", tmp_path / "t", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_convert_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        blocklib.convert([], tmp_path / "t", format="raw")


def test_a_callback_that_raises_stops_a_convert_and_removes_what_it_created(tmp_path: Path, source: Path) -> None:
    class Enough(Exception):
        pass

    def stop(_progress: blocklib.Progress) -> None:
        raise Enough

    with blocklib.open(source, format="raw") as disk:
        with pytest.raises(Enough):
            blocklib.convert(disk, tmp_path / "t.qcow2", format="qcow2", progress=stop)
    assert not (tmp_path / "t.qcow2").exists()


def test_a_callback_that_raises_at_the_end_still_removes_the_file(tmp_path: Path, source: Path) -> None:
    def stop(progress: blocklib.Progress) -> None:
        if progress.done == progress.total:
            raise KeyError("late")

    with blocklib.open(source, format="raw") as disk:
        with pytest.raises(KeyError):
            blocklib.convert(disk, tmp_path / "t.qcow2", format="qcow2", progress=stop)
    assert not (tmp_path / "t.qcow2").exists()


def test_a_cancelled_convert_removes_its_file_but_never_one_that_was_there(tmp_path: Path, source: Path) -> None:
    there = tmp_path / "there.raw"
    there.write_bytes(b"x")
    with blocklib.open(source, format="raw") as disk:
        for target in (tmp_path / "new.raw", there):
            job = jobs.convert(disk, target, format="raw", overwrite=True, auto_finalize=False)
            job.wait(until="pending")
            job.cancel()
            with pytest.raises(JobCancelled):
                job.wait()
    assert not (tmp_path / "new.raw").exists()
    assert there.exists()


def test_ctrl_c_while_waiting_cancels_the_job_and_goes_up(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_job: object, *_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blocklib.jobs.job.Job.wait", interrupted)
    with blocklib.open(source, format="raw") as disk:
        with pytest.raises(KeyboardInterrupt):
            blocklib.convert(disk, tmp_path / "t.raw", format="raw", speed=1)
    assert not (tmp_path / "t.raw").exists()


def test_progress_ends_at_the_size_of_the_disk(tmp_path: Path, source: Path) -> None:
    told: list[blocklib.Progress] = []
    with blocklib.open(source, format="raw") as disk:
        blocklib.convert(disk, tmp_path / "t.raw", format="raw", progress=told.append)
    assert (told[-1].done, told[-1].total) == (5 * MiB, 5 * MiB)


def test_a_small_convert_does_not_import_numpy(tmp_path: Path, source: Path) -> None:
    program = f"""
import sys, blocklib
with blocklib.open({str(source)!r}, format="raw") as disk:
    blocklib.convert(disk, {str(tmp_path / "t.qcow2")!r}, format="qcow2")
    with blocklib.open({str(tmp_path / "t.qcow2")!r}) as other:
        assert blocklib.compare(disk, other).identical
assert "numpy" not in sys.modules, "numpy was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_compare_tells_the_first_byte_that_differs() -> None:
    with Disk(MemoryNode(None, 9 * MiB), "r+") as a, Disk(MemoryNode(None, 9 * MiB), "r+") as b:
        for disk in (a, b):
            disk.write(3 * MiB, pattern(5 * MiB))
        assert blocklib.compare(a, b).identical
        for offset in (7 * MiB + 12345, 3 * MiB + 1, 17):
            b.write(offset, bytes([b.read(offset, 1)[0] ^ 1]))
            result = blocklib.compare(a, b)
            assert (result.identical, result.reason, result.offset) == (False, "content", offset)


def test_compare_takes_zeroes_behind_the_end_of_the_shorter_for_equal() -> None:
    with Disk(MemoryNode(None, 2 * MiB), "r+") as a, Disk(MemoryNode(None, 1 * MiB), "r+") as b:
        assert blocklib.compare(a, b) == blocklib.CompareResult(True, size_mismatch=True)
        assert blocklib.compare(a, b, strict=True).reason == "size"
        a.write(1 * MiB + 5, b"x")
        for result in (blocklib.compare(a, b), blocklib.compare(b, a)):
            assert (result.reason, result.offset, result.beyond_end) == ("content", 1 * MiB + 5, True)


def test_measure_wants_a_source_or_a_size() -> None:
    for arguments in ({}, {"source": "x", "size": 1}, {"size": -1}):
        with pytest.raises(UsageError):
            blocklib.measure(format="raw", **arguments)


def test_measure_of_raw_is_the_size_in_whole_sectors() -> None:
    assert blocklib.measure(size=1000, format="raw") == blocklib.MeasureResult(1024, 1024)


def test_measure_knows_the_options_of_the_format() -> None:
    with pytest.raises(OptionError):
        blocklib.measure(size=1000, format="raw", options={"cluster_size": 65536})


def test_commit_and_rebase_of_an_image_without_backing_file_are_refused(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "a.qcow2", MiB, format="qcow2")
    blocklib.create(tmp_path / "a.raw", MiB, format="raw")
    with pytest.raises(UsageError):
        blocklib.commit(tmp_path / "a.qcow2", format="qcow2")
    with pytest.raises(UnsupportedFeatureError):
        blocklib.rebase(tmp_path / "a.raw", "a.qcow2", backing_format="qcow2", format="raw")
    with pytest.raises(UnsupportedFeatureError):
        blocklib.check(tmp_path / "a.raw", format="raw")


def test_rebase_wants_the_format_of_the_new_backing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        blocklib.rebase(tmp_path / "a.qcow2", "b.qcow2")


def test_commit_to_what_is_not_in_the_chain_is_refused_by_name(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "b.qcow2", MiB, format="qcow2")
    blocklib.create(tmp_path / "t.qcow2", format="qcow2", backing="b.qcow2", backing_format="qcow2")
    with pytest.raises(blocklib.NameNotFoundError, match=r"other\.qcow2"):
        blocklib.commit(tmp_path / "t.qcow2", format="qcow2", references="allow", base="other.qcow2")
    with pytest.raises(blocklib.NameNotFoundError):
        blocklib.commit(tmp_path / "t.qcow2", format="qcow2", references="allow", base=tmp_path / "t.qcow2")


def test_an_open_disk_reads_on_after_commit_and_rebase(tmp_path: Path) -> None:
    for name in ("a", "b"):
        blocklib.create(tmp_path / f"{name}.qcow2", 4 * MiB, format="qcow2")
    blocklib.create(tmp_path / "t.qcow2", format="qcow2", backing="a.qcow2", backing_format="qcow2")
    with blocklib.open(tmp_path / "b.qcow2", "r+", format="qcow2") as disk:
        disk.write(1 * MiB, b"from b")
    with blocklib.open(tmp_path / "t.qcow2", "r+", format="qcow2", references="allow") as disk:
        disk.write(64 * KiB, pattern(100 * KiB))
        before = disk.read(0, disk.size)
        blocklib.commit(disk, empty=True)
        assert disk.read(0, disk.size) == before
        assert not any(extent.depth == 0 and extent.present for extent in disk.extents())
        blocklib.rebase(disk, "b.qcow2", backing_format="qcow2")
        assert disk.read(0, disk.size) == before
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["t.qcow2", "b.qcow2"]
        disk.write(2 * MiB, b"more")
        blocklib.rebase(disk, None)
        assert len(disk.chain()) == 1
        assert disk.read(0, 2 * MiB) == before[: 2 * MiB]
    with blocklib.open(tmp_path / "t.qcow2") as alone:
        assert alone.read(0, 2 * MiB) == before[: 2 * MiB]
        assert alone.read(2 * MiB, 4) == b"more"
        assert blocklib.check(alone).clean


def test_the_base_is_read_only_again_after_a_commit(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "b.qcow2", MiB, format="qcow2")
    blocklib.create(tmp_path / "t.qcow2", 2 * MiB, format="qcow2", backing="b.qcow2", backing_format="qcow2")
    with blocklib.open(tmp_path / "t.qcow2", "r+", format="qcow2", references="allow") as disk:
        disk.write(0, b"x")
        result = blocklib.commit(disk, base=disk.chain()[1], empty=False)
        assert result.base == disk.chain()[1].filename
        assert [image.read_only for image in disk.chain()] == [False, True]
        assert disk.chain()[1].size == 2 * MiB
