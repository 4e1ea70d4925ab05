"""Many runs into an image that holds nothing there: where they lie, how they are written, and what is left to the slow way."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.disk import Disk
from blocklib.errors import OutOfRangeError, ReadOnlyError, StorageError
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image


def made(size: int = 64 * MiB, **options: Any) -> tuple[RecordingNode, Disk]:
    file = RecordingNode(data=new_image(size, options))
    return file, disk_on(file)


def views(*runs: tuple[int, int]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(os.urandom(length))) for offset, length in runs]


def assert_holds(file: RecordingNode, runs: list[tuple[int, memoryview]]) -> None:
    with disk_on(RecordingNode(data=bytes(file.data)), writable=False) as disk:
        for offset, data in runs:
            assert disk.read(offset, len(data)) == data
        assert sum(extent.length for extent in disk.extents() if extent.data) == sum(len(data) for _offset, data in runs)
        assert disk.node.check().clean


@pytest.mark.parametrize("extended", [False, True], ids=["clusters", "subclusters"])
def test_runs_lie_one_behind_the_other_and_are_one_write(extended: bool) -> None:
    file, disk = made(cluster_size=64 * KiB, extended_l2="on" if extended else "off")
    runs = views((MiB, 64 * KiB), (5 * MiB, 192 * KiB), (40 * MiB, 64 * KiB))
    lengths: list[int] = []
    file.before_write = lambda _offset, length: lengths.append(length)
    disk.write_runs(runs)
    assert [length for length in lengths if length > 64 * KiB] == [320 * KiB]
    places = [extent.host_offset or 0 for extent in disk.extents() if extent.data]
    first = places[0]
    assert places == [first, first + 64 * KiB, first + 256 * KiB]
    assert file.data[first : first + 320 * KiB] == b"".join(data for _offset, data in runs)
    disk.close()
    assert_holds(file, runs)


def test_where_new_runs_go_is_settled_before_they_are_written() -> None:
    file, disk = made(cluster_size=64 * KiB)
    disk.write(0, b"x")
    before = len(file.data)
    seen: list[int] = []
    disk.write_runs(views((MiB, 128 * KiB)), placed=lambda: seen.append(len(file.data)))
    assert seen == [before]
    disk.write_runs(views((MiB, 128 * KiB)), placed=lambda: seen.append(0))  # nothing new
    assert len(seen) == 1
    disk.close()


def test_the_end_of_the_disk_may_lie_inside_a_cluster() -> None:
    file, disk = made(size=MiB + 512, cluster_size=64 * KiB)
    runs = views((MiB - 64 * KiB, 64 * KiB + 512))
    disk.write_runs(runs)
    disk.close()
    assert_holds(file, runs)


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_runs_reach_over_refcount_blocks_and_l2_tables(refcount_bits: int) -> None:
    file, disk = made(cluster_size=512, refcount_bits=refcount_bits)
    runs = views(*((MiB * i, 300 * 512) for i in range(10)))
    disk.write_runs(runs)
    disk.close()
    assert_holds(file, runs)


def test_holes_between_host_clusters_are_filled() -> None:
    file, disk = made(cluster_size=4096)
    disk.write(0, os.urandom(40 * 4096))
    disk.flush()
    for cluster in range(0, 40, 3):
        disk.discard(cluster * 4096, 4096)
    disk.flush()
    disk.flush()
    end = len(file.data)
    runs = views((MiB, 10 * 4096))
    disk.write_runs(runs)
    assert disk.read(MiB, 10 * 4096) == runs[0][1]
    assert len(file.data) <= end
    disk.close()
    with disk_on(RecordingNode(data=bytes(file.data)), writable=False) as again:
        assert again.read(MiB, 10 * 4096) == runs[0][1]
        assert again.node.check().clean


def test_runs_with_parts_that_are_there_already_are_written_too(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "base.qcow2", 4 * MiB, format="qcow2")
    blocklib.create(tmp_path / "top.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2")
    with blocklib.open(tmp_path / "base.qcow2", "r+", format="qcow2") as base:
        base.write(0, b"b" * (4 * MiB))
    expected = bytearray(b"b" * (4 * MiB))
    with blocklib.open(tmp_path / "top.qcow2", "r+", format="qcow2", references="allow") as disk:
        disk.write(MiB, b"t" * 1000)
        expected[MiB : MiB + 1000] = b"t" * 1000
        disk.snapshots.create("s")
        runs = views((64 * KiB, 64 * KiB), (MiB - 128 * KiB, 256 * KiB), (2 * MiB + 5, 100), (3 * MiB, 128 * KiB))
        disk.write_runs(runs)
        for offset, data in runs:
            expected[offset : offset + len(data)] = data
        assert disk.read(0, disk.size) == expected
        assert blocklib.check(disk).clean


def test_runs_mark_dirty_bitmaps() -> None:
    _file, disk = made()
    bitmap = disk.bitmaps.add("b", granularity=64 * KiB)
    disk.write_runs(views((MiB, 64 * KiB), (3 * MiB, 64 * KiB)))
    assert bitmap.count == 128 * KiB
    disk.close()


def test_zeroes_are_detected_in_runs() -> None:
    _file, disk = made()
    disk.node.detect_zeroes = "unmap"
    disk.write_runs([(MiB, memoryview(bytes(64 * KiB)))])
    assert not any(extent.data for extent in disk.extents())
    disk.close()


def test_bad_requests_are_refused() -> None:
    file, disk = made(size=MiB)
    with pytest.raises(OutOfRangeError):
        disk.write_runs(views((0, 4096), (MiB - 4096, 8192)))
    disk.write_runs([])
    disk.close()
    with disk_on(RecordingNode(data=bytes(file.data)), writable=False) as reading, pytest.raises(ReadOnlyError):
        reading.write_runs(views((0, 4096)))


def test_clusters_of_a_write_that_failed_are_used_again() -> None:
    file, disk = made(cluster_size=64 * KiB)
    disk.write(0, b"x")

    def fail(_offset: int, length: int) -> None:
        if length > 64 * KiB:
            raise StorageError("no", operation="injected")

    file.before_write = fail
    runs = views((MiB, 128 * KiB), (8 * MiB, 64 * KiB))
    with pytest.raises(StorageError):
        disk.write_runs(runs)
    assert disk.read(MiB, 128 * KiB) == bytes(128 * KiB)
    file.before_write = lambda _offset, _length: None
    disk.write_runs(runs)
    disk.write(0, os.urandom(64 * KiB))
    disk.close()
    assert len(file.data) == 64 * KiB * 9  # header, table, block, L1, L2 and four of data
    with disk_on(RecordingNode(data=bytes(file.data)), writable=False) as again:
        assert again.node.check().clean


def test_writers_to_the_same_clusters_lose_nothing() -> None:
    file, disk = made(cluster_size=4096)
    together = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(60):
                together.wait(60)
                place = i * 64 * KiB
                if number % 2:
                    disk.write(place + number * 512, bytes([number]) * 512)
                else:
                    data = memoryview(bytes([number + 1]) * 4096)
                    disk.write_runs([(place + j * 8192 + number * 2048, data) for j in range(8)])
        except BaseException as exc:
            failures.append(exc)
            together.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for i in range(60):
        for j in range(8):
            for number in (0, 2):
                data = disk.read(i * 64 * KiB + j * 8192 + number * 2048, 4096)
                others = {1, 3} if j == 0 else set()
                assert set(data) <= {number + 1, *others}
    disk.close()
    with disk_on(RecordingNode(data=bytes(file.data)), writable=False) as again:
        assert again.node.check().clean
