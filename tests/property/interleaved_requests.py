"""Scenarios of requests to one image beside each other; each is (folder, seed) -> None, and raises what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import blocklib
from blocklib import KiB
from blocklib.disk import Disk
from blocklib.errors import ClosedError
from tests.property.interleaving import CLUSTER, SECTOR, SIZE, SMALL_CACHES, Bench, check_content, sectors
from tests.scheduling import Schedule


def _move(disk: Disk, old: int, new: int, number: int) -> None:
    """Discard a cluster and, once that is durable, write another, which may get its place."""
    disk.discard(old, CLUSTER)
    disk.flush()
    disk.write(new, sectors(number, 8))


def free_beside_a_read(folder: Path, seed: int) -> None:
    """A cluster is discarded and its place used again while somebody reads it: the reader never sees what came there."""
    bench = Bench(folder, "filled")
    seen: list[bytes] = []

    def read() -> None:
        seen.extend(disk.read(0, 2 * CLUSTER) for _ in range(6))

    def free() -> None:
        disk.discard(0, 2 * CLUSTER)
        disk.flush()

    def reuse() -> None:
        for cluster in range(8, 12):
            disk.discard(cluster * CLUSTER, CLUSTER)
            disk.write(cluster * CLUSTER, sectors(1, 8))
            disk.flush()

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(read, free, reuse)
        disk.close()
    bench.becomes(0, 2 * CLUSTER, 0)
    bench.becomes(8 * CLUSTER, 4 * CLUSTER, 1)
    bench.check()
    for content in seen:
        check_content(content, [{0, 100 + sector} for sector in range(16)])


def copies_of_one_cluster(folder: Path, seed: int) -> None:
    """Three writers to one cluster that is not there yet: nobody's sectors are lost, nor those from below."""
    bench = Bench(folder, "overlay")
    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(
            lambda: disk.write(0, sectors(1, 1)),
            lambda: disk.write(3 * SECTOR, sectors(2, 2)),
            lambda: disk.write(6 * SECTOR, sectors(3, 4)),  # into the next one too
        )
        disk.close()
    bench.becomes(0, SECTOR, 1)
    bench.becomes(3 * SECTOR, 2 * SECTOR, 2)
    bench.becomes(6 * SECTOR, 4 * SECTOR, 3)
    bench.check()


def flush_beside_eviction(folder: Path, seed: int) -> None:
    """With room for one table, others are evicted while a flush works: what it promised is in the file when it returns."""
    bench = Bench(folder, "overlay, small clusters")
    acknowledged: list[tuple[int, int]] = []
    copies: list[tuple[Path, tuple[tuple[int, int], ...]]] = []

    def write(first: int) -> None:
        for turn, place in enumerate((0, 40 * KiB, 80 * KiB, 120 * KiB)):
            offset = place + first * SECTOR
            disk.write(offset, sectors(1 + turn, 1))
            acknowledged.append((offset, 1 + turn))

    def flush() -> None:
        for number in range(3):
            before = tuple(acknowledged)
            disk.flush()
            copy = folder / f"copy{number}.qcow2"
            copy.write_bytes(bench.path.read_bytes())
            copies.append((copy, before))

    with Schedule(seed) as schedule:
        disk = bench.open(options=SMALL_CACHES)
        schedule.run(lambda: write(0), lambda: write(2), flush)
        disk.close()
    for copy, before in copies:
        with blocklib.open(copy, format="qcow2", references="allow") as old:
            for offset, number in before:
                assert old.read(offset, SECTOR) == sectors(number, 1), (copy.name, offset)
        assert not blocklib.check(copy, format="qcow2").corruptions
    for offset, number in acknowledged:
        bench.becomes(offset, SECTOR, number)
    bench.check()


def snapshot_beside_writes(folder: Path, seed: int) -> None:
    """A snapshot is one instant: of writes that came one after the other it has the first few."""
    bench = Bench(folder, "filled")
    order = [0, 5 * CLUSTER, SECTOR, 9 * CLUSTER + 3 * SECTOR, 5 * CLUSTER + SECTOR]

    def write() -> None:
        for number, offset in enumerate(order, 1):
            disk.write(offset, sectors(number, 1))

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(write, lambda: disk.snapshots.create("now"), lambda: disk.write(20 * CLUSTER, sectors(9, 8)))
        disk.close()
    for number, offset in enumerate(order, 1):
        bench.becomes(offset, SECTOR, number)
    bench.becomes(20 * CLUSTER, CLUSTER, 9)
    bench.check()
    with blocklib.open(bench.path, options={"snapshot.name": "now"}) as past:
        has = [past.read(offset, SECTOR) == sectors(number, 1) for number, offset in enumerate(order, 1)]
    assert has == sorted(has, reverse=True), f"of five writes the snapshot has {has}"


def snapshots_come_and_go_beside_writes(folder: Path, seed: int) -> None:
    """Applying and deleting change who owns clusters that are written meanwhile."""
    bench = Bench(folder, "filled")

    def change() -> None:
        disk.snapshots["old"].delete()
        disk.snapshots.create("new")
        disk.snapshots["new"].delete()

    with Schedule(seed) as schedule:
        disk = bench.open()
        disk.snapshots.create("old")
        schedule.run(
            change,
            lambda: disk.write(SECTOR, sectors(1, 8)),
            lambda: _move(disk, 4 * CLUSTER, 6 * CLUSTER, 2),
        )
        disk.close()
    bench.becomes(SECTOR, CLUSTER, 1)
    bench.becomes(4 * CLUSTER, CLUSTER, 0)
    bench.becomes(6 * CLUSTER, CLUSTER, 2)
    bench.check()


def discard_beside_a_write(folder: Path, seed: int) -> None:
    """Both to the same cluster: each sector is the one or the other, the rest is gone."""
    bench = Bench(folder, "filled")
    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(
            lambda: disk.write(2 * SECTOR, sectors(1, 2)),
            lambda: disk.discard(0, 2 * CLUSTER),
            lambda: disk.write_zeroes(CLUSTER, 2 * CLUSTER, unmap=True),
            lambda: disk.write(2 * CLUSTER + SECTOR, sectors(2, 1)),
        )
        disk.close()
    bench.becomes(0, 3 * CLUSTER, 0)
    bench.becomes(2 * SECTOR, 2 * SECTOR, 0, 1)
    bench.becomes(2 * CLUSTER + SECTOR, SECTOR, 0, 2)
    bench.check()


def zeroes_beside_a_copy(folder: Path, seed: int) -> None:
    """A cluster is made zero while a part of it is written over what lies below."""
    bench = Bench(folder, "overlay")
    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(
            lambda: disk.write_zeroes(0, CLUSTER),
            lambda: disk.write(3 * SECTOR, sectors(1, 1)),
            lambda: disk.write_zeroes(CLUSTER - SECTOR, 2 * SECTOR),
        )
        disk.close()
    bench.becomes(0, CLUSTER + SECTOR, 0)
    bench.becomes(3 * SECTOR, SECTOR, 0, 1)
    bench.check()


def batches_beside_frees(folder: Path, seed: int) -> None:
    """Batches to clusters that others free, and to free ones that others take."""
    import numpy as np

    bench = Bench(folder, "filled")
    offsets = np.array([0, 3 * CLUSTER, 7 * CLUSTER], dtype=np.int64)
    seen: list[Any] = []

    def write() -> None:
        disk.write_batch(offsets, np.frombuffer(sectors(1, 24), dtype=np.uint8).reshape(3, CLUSTER))

    def free() -> None:
        disk.discard(3 * CLUSTER, CLUSTER)
        disk.flush()
        disk.write(12 * CLUSTER, sectors(2, 8))

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(write, free, lambda: seen.append(disk.read_batch(offsets, CLUSTER)))
        disk.close()
    for offset in offsets.tolist():
        bench.becomes(offset, CLUSTER, 1)
    bench.becomes(3 * CLUSTER, CLUSTER, 0, 1)
    bench.becomes(12 * CLUSTER, CLUSTER, 2)
    bench.check()
    for offset, block in zip(offsets.tolist(), seen[0], strict=True):
        first = offset // SECTOR
        check_content(bytes(block), [{0, 1, 100 + (first + sector) % 100} for sector in range(8)])


def compressed_beside_others(folder: Path, seed: int) -> None:
    """Compressed clusters share host clusters with each other; one is discarded, one written over."""
    bench = Bench(folder, "empty")
    with Schedule(seed) as schedule:
        disk = bench.open()
        disk.write_compressed(0, sectors(1, 8))
        disk.write_compressed(CLUSTER, sectors(2, 8))
        schedule.run(
            lambda: disk.write_compressed(2 * CLUSTER, sectors(3, 8)),
            lambda: _move(disk, 0, 5 * CLUSTER, 4),
            lambda: disk.write(CLUSTER + SECTOR, sectors(5, 1)),
            disk.flush,
        )
        disk.close()
    bench.becomes(0, CLUSTER, 0)
    bench.becomes(CLUSTER, CLUSTER, 2)
    bench.becomes(CLUSTER + SECTOR, SECTOR, 5)
    bench.becomes(2 * CLUSTER, CLUSTER, 3)
    bench.becomes(5 * CLUSTER, CLUSTER, 4)
    bench.check()


def truncate_beside_writes(folder: Path, seed: int) -> None:
    """The disk grows and shrinks at its end while what stays is written."""
    bench = Bench(folder, "overlay")

    def resize() -> None:
        disk.truncate(SIZE + 9 * CLUSTER)
        disk.write(SIZE + CLUSTER, sectors(9, 1))
        disk.truncate(SIZE, shrink=True)

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(resize, lambda: disk.write(SIZE - 3 * SECTOR, sectors(1, 3)), lambda: disk.write(0, sectors(2, 1)))
        disk.close()
    bench.becomes(SIZE - 3 * SECTOR, 3 * SECTOR, 1)
    bench.becomes(0, SECTOR, 2)
    bench.check()


def close_beside_a_write(folder: Path, seed: int) -> None:
    """A write is refused, or it is in the file."""
    bench = Bench(folder, "overlay")

    def write(number: int) -> None:
        offset = number * CLUSTER + SECTOR
        try:
            disk.write(offset, sectors(number, 1))
        except ClosedError:
            return
        bench.becomes(offset, SECTOR, number)

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(lambda: write(1), lambda: write(2), disk.close, disk.close)
    bench.check()


def copy_on_read_beside_a_write(folder: Path, seed: int) -> None:
    """What was read from below is never put over what was written meanwhile."""
    bench = Bench(folder, "overlay")
    with Schedule(seed) as schedule:
        disk = bench.open()
        disk.insert_filter("copy-on-read", {})
        schedule.run(
            lambda: disk.read(0, 2 * CLUSTER),
            lambda: disk.write(SECTOR, sectors(1, 1)),
            lambda: disk.discard(CLUSTER, CLUSTER),
        )
        disk.close()
    bench.becomes(SECTOR, SECTOR, 1)
    bench.becomes(CLUSTER, CLUSTER, 0)
    bench.check()


SCENARIOS = (
    free_beside_a_read,
    copies_of_one_cluster,
    flush_beside_eviction,
    snapshot_beside_writes,
    snapshots_come_and_go_beside_writes,
    discard_beside_a_write,
    zeroes_beside_a_copy,
    batches_beside_frees,
    compressed_beside_others,
    truncate_beside_writes,
    close_beside_a_write,
    copy_on_read_beside_a_write,
)
