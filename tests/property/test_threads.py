"""One overlay under eight threads: nothing that was written is lost, nothing turns up where it was not written.

Every sector that is written carries its number, so that bytes from the wrong cluster are recognised wherever they turn up.
"""

from __future__ import annotations

import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import KiB, MiB, batch, graph
from blocklib.disk import Disk
from blocklib.errors import ClosedError
from blocklib.formats.qcow2.node import Qcow2Node
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image
from tests.programs import Program
from tests.property.chains import first_difference

THREADS: Final = 8
SECTOR: Final = 512
PATIENCE: Final = 100.0
"""Seconds after which threads that do not come to an end are called a deadlock."""
BASE: Final = 255

IMAGES: Final = (
    pytest.param({"cluster_size": 64 * KiB}, None, id="64k"),
    pytest.param({"cluster_size": 512, "refcount_bits": 64}, None, id="512-refcount64"),
    pytest.param({"cluster_size": 4096, "compat": "0.10"}, None, id="4k-v2"),
    pytest.param({"cluster_size": 1024, "refcount_bits": 1}, 1, id="1k-refcount1-tiny-cache"),
    pytest.param({"cluster_size": 2 * MiB}, 4096, id="2M-small-cache"),
    pytest.param({"cluster_size": 16 * KiB, "extended_l2": True}, None, id="16k-subclusters"),
)


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    """Threads change places far more often than usual, and batches are done by kernels."""
    batch.expect(1_000_000, writing=True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_together(*works: Callable[[], None]) -> None:
    """Run each in a thread, all starting at once; raises what the first that failed raised."""
    start = threading.Barrier(len(works))
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a deadlock"
    if failures:
        raise failures[0]


def stamp(thread: int, sequence: int, first_sector: int, n: int) -> bytes:
    """`n` sectors that say who wrote them, when, and where they belong."""
    return b"".join(
        struct.pack("<QII", sector + 1, thread + 1, sequence) * (SECTOR // 16)
        for sector in range(first_sector, first_sector + n)
    )


def make_overlay(folder: Path, size: int, options: dict[str, Any]) -> Path:
    blocklib.create(folder / "base.raw", size, format="raw")
    with blocklib.open(folder / "base.raw", "r+", format="raw") as disk:
        disk.write(0, stamp(BASE, 0, 0, size // SECTOR))
    top = folder / "top.qcow2"
    blocklib.create(top, format="qcow2", backing="base.raw", backing_format="raw", options=options)
    return top


def open_overlay(path: Path, mode: Any = "r", l2_cache: int | None = None) -> Disk:
    return blocklib.open(
        path,
        mode,
        format="qcow2",
        references="allow",
        discard="unmap",
        options={"l2-cache-size": l2_cache} if l2_cache is not None else {},
    )


def assert_clean(path: Path, content: bytes | bytearray, qemu_img: Program) -> None:
    """It reads as `content`, by us and by QEMU, and is clean and free of leaks."""
    qemu_img("check", "-q", path)
    with open_overlay(path) as disk:
        assert not first_difference(disk.read(0, disk.size), content)
    copy = path.with_suffix(".converted")
    qemu_img("convert", "-O", "raw", path, copy)
    assert not first_difference(copy.read_bytes(), content)


# -- ranges of their own ---------------------------------------------------------------------------------------------------


@dataclass
class Owner:
    """A thread with a part of the disk to itself, which ends in clusters that the neighbours write too."""

    disk: Disk
    number: int
    start: int
    content: bytearray
    cluster_size: int
    discards_read_zero: bool
    steps: int
    seed: int = 0

    def work(self) -> None:
        choose = random.Random(self.number + THREADS * self.seed)
        for step in range(self.steps):
            offset, length = self._range(choose)
            action = choose.randrange(10)
            if action < 5:
                first = (self.start + offset) // SECTOR
                data = stamp(self.number, step, first, length // SECTOR + 2)
                skip = self.start + offset - first * SECTOR
                self._write(offset, data[skip : skip + length])
            elif action < 7:
                self.disk.write_zeroes(self.start + offset, length, unmap=choose.random() < 0.5)
                self.content[offset : offset + length] = bytes(length)
            elif action == 7:
                self._discard(offset, length)
            elif action == 8:
                assert self.disk.read(self.start + offset, length) == self.content[offset : offset + length]
                offsets = range(self.start, self.start + len(self.content), 5000)
                block = self.disk.read_batch(offsets[:-1], 5000, bytearray(5000 * len(offsets[:-1])))
                assert block == self.content[: len(block)]
            elif step % 5 == 0:
                self.disk.flush()

    def _range(self, choose: random.Random) -> tuple[int, int]:
        offset = choose.randrange(len(self.content))
        length = choose.choice((1, 511, 512, 4096, self.cluster_size, 2 * self.cluster_size + 7, 20 * self.cluster_size))
        return offset, min(length, len(self.content) - offset, 300_000)

    def _write(self, offset: int, data: bytes) -> None:
        length = next((n for n in (4096, 512, 7) if len(data) % n == 0 and len(data) // n < 700), 0)
        if length and offset % 3 == 0:  # the same in pieces
            offsets = range(self.start + offset, self.start + offset + len(data), length)
            self.disk.write_batch(offsets, data)
        else:
            self.disk.write(self.start + offset, data)
        self.content[offset : offset + len(data)] = data

    def _discard(self, offset: int, length: int) -> None:
        self.disk.discard(self.start + offset, length)
        first = -(-(self.start + offset) // self.cluster_size) * self.cluster_size
        end = self.start + offset + length
        if end != self.disk.size:
            end = end // self.cluster_size * self.cluster_size
        if self.discards_read_zero and first < end:
            self.content[first - self.start : end - self.start] = bytes(end - first)


@pytest.mark.parametrize(("options", "l2_cache"), IMAGES)
def test_threads_in_ranges_of_their_own_do_not_disturb_each_other(
    options: dict[str, Any], l2_cache: int | None, tmp_path: Path, qemu_img: Program
) -> None:
    cluster_size = options["cluster_size"]
    part = min(5 * cluster_size, 512 * KiB) + 3 * SECTOR + 40 * KiB
    path = make_overlay(tmp_path, THREADS * part, options)
    with open_overlay(path, "r+", l2_cache) as disk:
        owners = [
            Owner(
                disk,
                number,
                number * part,
                bytearray(disk.read(number * part, part)),
                cluster_size,
                options.get("compat") != "0.10",
                steps=120,
            )
            for number in range(THREADS)
        ]
        run_together(*(owner.work for owner in owners))
        content = b"".join(owner.content for owner in owners)
        assert not first_difference(disk.read(0, disk.size), content)
    assert_clean(path, content, qemu_img)


# -- the same ranges -------------------------------------------------------------------------------------------------------


@dataclass
class Rival:
    """A thread that writes where the others write, in whole sectors, and remembers its last word on each."""

    disk: Disk
    number: int
    cluster_size: int
    steps: int
    last: dict[int, int] = field(default_factory=dict)
    """Sector -> sequence number of the last write to it, or 0 for zeroes."""

    def work(self) -> None:
        choose = random.Random(self.number)
        sectors = self.disk.size // SECTOR
        for step in range(1, self.steps + 1):
            first = choose.randrange(sectors)
            n = min(choose.choice((1, 3, 8, 129, 400, self.cluster_size // SECTOR)), 600, sectors - first)
            action = choose.randrange(10)
            if action < 3:
                self.disk.write(first * SECTOR, stamp(self.number, step, first, n))
                self.last.update(dict.fromkeys(range(first, first + n), step))
            elif action < 5:
                offsets = range(first * SECTOR, (first + n) * SECTOR, SECTOR)
                self.disk.write_batch(offsets, stamp(self.number, step, first, n))
                self.last.update(dict.fromkeys(range(first, first + n), step))
            elif action < 8:
                self.disk.write_zeroes(first * SECTOR, n * SECTOR, unmap=choose.random() < 0.6)
                self.last.update(dict.fromkeys(range(first, first + n), 0))
            elif action == 8:
                self._look(first, n)
            elif step % 3 == 0:
                self.disk.flush()

    def _look(self, first: int, n: int) -> None:
        """What is read may be half of one write and half of another, but it is never what belongs elsewhere."""
        data = self.disk.read(first * SECTOR, n * SECTOR)
        for i in range(n):
            numbers = set(struct.unpack_from(f"<{SECTOR // 8}Q", data, i * SECTOR)[::2])
            assert numbers <= {0, first + i + 1}


@pytest.mark.parametrize(("options", "l2_cache"), IMAGES)
def test_threads_in_the_same_ranges_leave_whole_sectors_of_one_of_them(
    options: dict[str, Any], l2_cache: int | None, tmp_path: Path, qemu_img: Program
) -> None:
    cluster_size = options["cluster_size"]
    size = max(3 * cluster_size, 256 * KiB) + 5 * SECTOR
    path = make_overlay(tmp_path, size, options)
    with open_overlay(path, "r+", l2_cache) as disk:
        rivals = [Rival(disk, number, cluster_size, steps=120) for number in range(THREADS)]
        run_together(*(rival.work for rival in rivals))
        content = disk.read(0, size)
    for sector in range(size // SECTOR):
        found = content[sector * SECTOR : (sector + 1) * SECTOR]
        words = {(rival.number, rival.last[sector]) for rival in rivals if sector in rival.last}
        expected = {stamp(thread, step, sector, 1) if step else bytes(SECTOR) for thread, step in words}
        assert found in (expected or {stamp(BASE, 0, sector, 1)}), sector
    assert_clean(path, content, qemu_img)


# -- one cluster -----------------------------------------------------------------------------------------------------------


def _leave_alone(_path: Path, _size: int, _qemu_io: Program) -> None:
    """The clusters are in the backing file only."""


def _make_zero(path: Path, size: int, _qemu_io: Program) -> None:
    with open_overlay(path, "r+") as disk:
        disk.write_zeroes(0, size, unmap=True)


def _make_zero_but_keep(path: Path, size: int, _qemu_io: Program) -> None:
    with open_overlay(path, "r+") as disk:
        disk.write(0, stamp(9, 9, 0, size // SECTOR))
        disk.write_zeroes(0, size)


def _compress(path: Path, size: int, qemu_io: Program) -> None:
    qemu_io("-f", "qcow2", path, *(a for at in range(0, size, 65536) for a in ("-c", f"write -c -P 7 {at} 64k")))


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("prepare", [_leave_alone, _make_zero, _make_zero_but_keep, _compress])
def test_threads_that_copy_one_cluster_for_different_sectors_lose_nothing(
    prepare: Callable[[Path, int, Program], None],
    extended_l2: bool,
    tmp_path: Path,
    qemu_img: Program,
    qemu_io: Program,
) -> None:
    clusters, per_cluster = 24, 128
    size = clusters * per_cluster * SECTOR
    path = make_overlay(tmp_path, size, {"cluster_size": per_cluster * SECTOR, "extended_l2": extended_l2})
    prepare(path, size, qemu_io)
    with open_overlay(path, "r+") as disk:
        content = bytearray(disk.read(0, size))
        turn = threading.Barrier(THREADS)

        def write_own_sectors(number: int) -> None:
            for cluster in range(clusters):
                turn.wait(PATIENCE)
                for sector in range(cluster * per_cluster + number, (cluster + 1) * per_cluster, 4 * THREADS):
                    data = stamp(number, cluster, sector, 1)
                    disk.write(sector * SECTOR, data)
                    content[sector * SECTOR : (sector + 1) * SECTOR] = data

        run_together(*(partial(write_own_sectors, number) for number in range(THREADS)))
        assert not first_difference(disk.read(0, size), content)
    assert_clean(path, content, qemu_img)


def test_an_extended_entry_is_read_and_written_as_a_pair() -> None:
    """The slice holds pairs whose words are equal; any mixture of two of them shows."""
    disk = disk_on(RecordingNode(data=new_image(1 * MiB, {"extended_l2": "on"})))
    node = disk.node
    assert isinstance(node, Qcow2Node)
    mapping = node.mapping
    slice_offset, table = node.retry(lambda: mapping.slice_for_change(0, node.refcounts, node.writeback.freed))
    done = threading.Event()

    def flip() -> None:
        for turn in range(150_000):
            mapping.set_entry(slice_offset, table, 0, turn & 1, turn & 1)
        done.set()

    def look() -> None:
        looks = 0
        while not done.is_set():
            entry, bitmap = mapping.entry_at(table, 0)
            assert entry == bitmap, looks
            looks += 1

    try:
        run_together(flip, look, look)
    finally:
        disk.abandon()


def test_readers_of_subclusters_that_are_written_and_discarded_see_one_or_the_other(
    tmp_path: Path, qemu_img: Program
) -> None:
    cluster_size = 16 * KiB
    size = 4 * cluster_size
    path = make_overlay(tmp_path, size, {"cluster_size": cluster_size, "extended_l2": True})
    written = stamp(1, 1, 0, size // SECTOR)
    with open_overlay(path, "r+") as disk:
        done = threading.Event()
        seen: set[bytes] = set()

        def flip(cluster: int) -> None:
            start = cluster * cluster_size
            for _ in range(100):
                disk.write(start, written[start : start + cluster_size])
                disk.discard(start, cluster_size)
            disk.write(start, written[start : start + cluster_size])

        def write() -> None:
            try:
                run_together(*(partial(flip, cluster) for cluster in range(4)))
            finally:
                done.set()

        def read(seed: int) -> None:
            choose = random.Random(seed)
            while not done.is_set():
                sector = choose.randrange(size // SECTOR)
                data = disk.read(sector * SECTOR, SECTOR)
                assert data in (bytes(SECTOR), written[sector * SECTOR : (sector + 1) * SECTOR], stamp(BASE, 0, sector, 1))
                seen.add(data[:1])
                list(disk.extents(0, size))
                disk.map(0, size)

        run_together(write, *(partial(read, seed) for seed in range(3)))
        assert disk.read(0, size) == written
        assert len(seen) > 1
    assert_clean(path, written, qemu_img)


# -- clusters that change hands --------------------------------------------------------------------------------------------


class Gate:
    """Holds the first call of a file's method until it is opened."""

    def __init__(self, method: Callable[..., None]) -> None:
        self._method = method
        self._first = True
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, offset: int, views: Sequence[memoryview]) -> None:
        if self._first:
            self._first = False
            self.reached.set()
            assert self.opened.wait(PATIENCE)
        self._method(offset, views)


def _reuse_what_is_free(disk: Disk, cluster_size: int, fill: bytes) -> None:
    """Discard the first cluster, make that durable, and fill others as long as freed space could be given to them."""
    disk.discard(0, cluster_size)
    disk.flush()
    disk.flush()
    for cluster in range(1, disk.size // cluster_size):
        disk.write(cluster * cluster_size, fill * cluster_size)


@pytest.mark.parametrize("method", ["preadv", "pwritev"])
def test_a_cluster_is_not_reused_before_a_request_that_found_it_has_ended(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: Program
) -> None:
    cluster_size = 4 * KiB
    path = make_overlay(tmp_path, 16 * cluster_size, {"cluster_size": cluster_size})
    with open_overlay(path, "r+") as disk:
        disk.write(0, b"a" * cluster_size)
        file = disk.node.children["file"].node
        gate = Gate(getattr(file, method))
        found: list[bytes] = []

        def use_the_cluster() -> None:
            if method == "preadv":
                found.append(disk.read(0, cluster_size))
            else:
                disk.write(0, b"b" * cluster_size)

        def free_the_cluster() -> None:
            try:
                assert gate.reached.wait(PATIENCE)
                _reuse_what_is_free(disk, cluster_size, b"x")
            finally:
                gate.opened.set()

        monkeypatch.setattr(file, method, gate)
        run_together(use_the_cluster, free_the_cluster)
        assert found in ([], [b"a" * cluster_size])
        content = bytes(cluster_size) + b"x" * (15 * cluster_size)
        assert not first_difference(disk.read(0, disk.size), content)
    assert_clean(path, content, qemu_img)


# -- what concerns the whole disk ------------------------------------------------------------------------------------------


def _write_all_over(disk: Disk, number: int, first: int, n: int, content: bytearray) -> None:
    """Write each of `n` sectors from `first` on, in an order of our own, some of them more than once."""
    choose = random.Random(number)
    sectors = list(range(first, first + n)) + choose.choices(range(first, first + n), k=n // 4)
    choose.shuffle(sectors)
    for sequence, sector in enumerate(sectors):
        data = stamp(number, sequence, sector, 1)
        disk.write(sector * SECTOR, data)
        content[sector * SECTOR : (sector + 1) * SECTOR] = data


@pytest.mark.parametrize(("options", "l2_cache"), IMAGES)
def test_writers_beside_flushes_and_truncates_lose_nothing(
    options: dict[str, Any], l2_cache: int | None, tmp_path: Path, qemu_img: Program
) -> None:
    n = 120
    size = 6 * n * SECTOR
    path = make_overlay(tmp_path, size, options)
    with open_overlay(path, "r+", l2_cache) as disk:
        content = bytearray(disk.read(0, size))

        def flush() -> None:
            for _ in range(60):
                disk.flush()

        def resize() -> None:
            choose = random.Random(0)
            for _ in range(30):
                disk.truncate(size + choose.randrange(1, 4000) * SECTOR, shrink=True)
                disk.write(disk.size - 1, b"x")
            disk.truncate(size, shrink=True)

        run_together(
            flush,
            resize,
            *(partial(_write_all_over, disk, number, number * n, n, content) for number in range(6)),
        )
        assert not first_difference(disk.read(0, size), content)
    assert_clean(path, content, qemu_img)


def test_truncates_from_several_threads_take_turns(tmp_path: Path, qemu_img: Program) -> None:
    path = make_overlay(tmp_path, 64 * KiB, {"cluster_size": 512})
    with open_overlay(path, "r+") as disk:

        def resize(number: int) -> None:
            choose = random.Random(number)
            for _ in range(15):
                disk.truncate(choose.randrange(1, 9000) * SECTOR, shrink=True)

        run_together(*(partial(resize, number) for number in range(THREADS)))
        disk.truncate(1 * MiB, shrink=True)
        disk.truncate(64 * KiB, shrink=True)
        content = disk.read(0, 64 * KiB)
    assert_clean(path, content, qemu_img)


def test_new_tables_are_found_while_they_are_on_their_way_to_the_file(tmp_path: Path, qemu_img: Program) -> None:
    """Zeroing makes L2 tables without data behind them: the file may still end before a table that is being flushed."""
    tables = 480
    reach = 64 * 512  # what one L2 table of 512 bytes maps
    path = make_overlay(tmp_path, tables * reach, {"cluster_size": 512})
    with open_overlay(path, "r+") as disk:
        done = threading.Event()

        def zero(number: int) -> None:
            for table in range(number, tables, 4):
                disk.write_zeroes(table * reach, 512)

        def flush() -> None:
            while not done.is_set():
                disk.flush()

        def look() -> None:
            for table in [*range(tables)] * 3:
                assert disk.read(table * reach + 512, 16) == stamp(BASE, 0, table * 64 + 1, 1)[:16]

        def work() -> None:
            try:
                run_together(*(partial(zero, number) for number in range(4)), look, look)
            finally:
                done.set()

        run_together(work, flush)
        content = disk.read(0, disk.size)
    expected = bytearray(stamp(BASE, 0, 0, tables * 64))
    for table in range(tables):
        expected[table * reach : table * reach + 512] = bytes(512)
    assert not first_difference(content, expected)
    assert_clean(path, content, qemu_img)


def test_nothing_reaches_the_file_while_a_disk_is_drained_under_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: Program
) -> None:
    size = 6 * 200 * SECTOR
    path = make_overlay(tmp_path, size, {"cluster_size": 4096})
    with open_overlay(path, "r+") as disk:
        content = bytearray(disk.read(0, size))
        file = disk.node.children["file"].node
        quiet = threading.Event()
        seen: list[str] = []

        def watched(name: str, method: Callable[..., None]) -> Callable[..., None]:
            def call(offset: int, views: Sequence[memoryview]) -> None:
                if quiet.is_set():
                    seen.append(name)
                method(offset, views)
                if quiet.is_set():
                    seen.append(name)

            return call

        monkeypatch.setattr(file, "preadv", watched("preadv", file.preadv))
        monkeypatch.setattr(file, "pwritev", watched("pwritev", file.pwritev))

        def drain() -> None:
            for _ in range(40):
                with graph.drained(disk.node):
                    quiet.set()
                    for _ in range(200):
                        assert not seen
                    quiet.clear()

        run_together(
            drain,
            *(partial(_write_all_over, disk, number, number * 200, 200, content) for number in range(6)),
        )
        assert not seen
    assert_clean(path, content, qemu_img)


def test_closing_under_load_keeps_every_write_that_returned(tmp_path: Path, qemu_img: Program) -> None:
    per_thread = 4000
    size = THREADS * per_thread * SECTOR
    path = make_overlay(tmp_path, size, {"cluster_size": 4096})
    disk = open_overlay(path, "r+")
    content = bytearray(disk.read(0, size))
    under_way = threading.Barrier(THREADS + 2)

    def write(number: int) -> None:
        for sequence in range(per_thread):
            sector = number + sequence * THREADS
            data = stamp(number, sequence, sector, 1)
            if sequence == 50:
                under_way.wait(PATIENCE)
            try:
                disk.write(sector * SECTOR, data)
            except ClosedError:
                return
            content[sector * SECTOR : (sector + 1) * SECTOR] = data

    def close() -> None:
        under_way.wait(PATIENCE)
        disk.close()

    run_together(close, close, *(partial(write, number) for number in range(THREADS)))
    assert_clean(path, content, qemu_img)


def test_closing_waits_for_a_truncate(tmp_path: Path, qemu_img: Program) -> None:
    path = make_overlay(tmp_path, 64 * KiB, {"cluster_size": 512})

    def resize(disk: Disk, under_way: threading.Barrier, seed: int) -> None:
        choose = random.Random(seed)
        try:
            for step in range(1000):
                disk.truncate(choose.randrange(128, 9000) * SECTOR, shrink=True)
                if step == 1:
                    under_way.wait(PATIENCE)
        except ClosedError:
            return

    def close(disk: Disk, under_way: threading.Barrier) -> None:
        under_way.wait(PATIENCE)
        disk.close()

    for turn in range(10):
        disk = open_overlay(path, "r+")
        under_way = threading.Barrier(3)
        run_together(*(partial(resize, disk, under_way, seed) for seed in (turn, -turn)), partial(close, disk, under_way))
        qemu_img("check", "-q", path)
