"""What passes the filters above a disk is seen by them: compressed clusters, and what an NBD server sends by runs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import GraphConflictError, KiB, MiB, StorageError, ThrottleGroup, jobs, nbd
from tests.counting import counting

SIZE = 4 * MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2")
    return path


def _compressed(path: Path) -> list[tuple[int, int]]:
    with blocklib.open(path, format="qcow2") as disk:
        return [(extent.offset, extent.length) for extent in disk.extents() if extent.compressed]


@pytest.mark.parametrize(
    ("driver", "options"), [("throttle", {"throttle-group": ThrottleGroup()}), ("copy-on-read", {})]
)
def test_compressed_writes_pass_filters(path: Path, driver: str, options: dict[str, Any]) -> None:
    with blocklib.open(path, "r+") as disk:
        bitmap = disk.bitmaps.add("dirty")
        disk.insert_filter(driver, options)
        disk.write_compressed(64 * KiB, b"p" * 128 * KiB)
        assert disk.read(64 * KiB, 128 * KiB) == b"p" * 128 * KiB
        assert bitmap.count == 128 * KiB
        with pytest.raises(StorageError):
            disk.write_compressed(64 * KiB, b"q" * 64 * KiB)
    assert _compressed(path) == [(64 * KiB, 128 * KiB)]


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_mirror_copies_what_is_written_compressed(path: Path, tmp_path: Path, mode: Any) -> None:
    copy = tmp_path / "copy.qcow2"
    with blocklib.open(path, "r+") as disk:
        with jobs.mirror(disk, copy, format="qcow2", copy_mode=mode) as job:
            job.wait(until="ready", timeout=60)
            disk.write_compressed(0, b"m" * 128 * KiB)
            job.complete()
            job.wait(timeout=60)
        assert disk.read(0, 128 * KiB) == b"m" * 128 * KiB


def test_a_backup_keeps_what_a_compressed_write_covers(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    with blocklib.open(path, "r+") as disk:
        with jobs.backup(disk, copy, format="qcow2", sync="none") as job:
            job.wait(until="ready", timeout=60)
            disk.write_compressed(0, b"m" * 128 * KiB)
            job.complete()
            job.wait(timeout=60)
    with blocklib.open(copy, format="qcow2", backing=None) as disk:
        assert [extent.present for extent in disk.extents(0, 128 * KiB)] == [True]


def test_a_server_sends_nothing_past_a_filter_above_the_disk(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(MiB, b"x" * MiB)
    with (
        blocklib.open(path, format="qcow2") as disk,
        nbd.Server(disk, listen="nbd://127.0.0.1:0/vm") as server,
        blocklib.open(server.uri, format="raw") as remote,
    ):
        remote.read(0, SIZE)
        with counting(disk) as counter:
            assert remote.read(0, SIZE) == bytes(MiB) + b"x" * MiB + bytes(2 * MiB)
        assert counter.ranges("read") == [(0, SIZE)]


def test_space_is_given_back_below_a_filter_only_where_the_disk_allows_it(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"x" * 128 * KiB)
    with blocklib.open(path, "r+", discard="ignore") as disk:
        disk.insert_filter("throttle", {"throttle-group": ThrottleGroup()})
        disk.write_zeroes(0, 64 * KiB, unmap=True)
        first = next(disk.extents())
        assert (first.zero, first.host_offset is not None) == (True, True)


def test_no_snapshot_is_applied_past_who_follows_the_disk(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    blocklib.create(other, SIZE, format="raw")
    with blocklib.open(path, "r+", format="qcow2", references="allow") as disk:
        snapshot = disk.snapshots.create("old")
        for driver, options in (
            ("copy-before-write", {"target": {"driver": "file", "filename": str(other)}}),
            ("blkverify", {"test": {"driver": "file", "filename": str(other)}}),
            ("blklogwrites", {"log": {"driver": "file", "filename": str(other)}}),
        ):
            inserted = disk.insert_filter(driver, options)
            throttle = disk.insert_filter("throttle", {"throttle-group": ThrottleGroup()})
            with pytest.raises(GraphConflictError, match=driver):
                snapshot.apply()
            inserted.remove()
            snapshot.apply()
            throttle.remove()
        starts: list[Callable[[], jobs.Job[Any]]] = [
            lambda: jobs.mirror(disk, tmp_path / "copy.qcow2", format="qcow2"),
            lambda: jobs.backup(disk, tmp_path / "copy.qcow2", format="qcow2", sync="none"),
        ]
        for start in starts:
            with start() as job:
                job.wait(until="ready", timeout=60)
                with pytest.raises(GraphConflictError, match=r"mirror|backup"):
                    snapshot.apply()
                disk.snapshots.create("meanwhile").delete()
                job.cancel(force=True)
        snapshot.apply()


def test_zeroes_that_must_be_fast_are_refused_below_a_filter_as_without_it(path: Path, tmp_path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"x" * MiB)
    old = tmp_path / "old.qcow2"  # a format that cannot say zero over a backing file
    blocklib.create(old, format="qcow2", backing=path, backing_format="qcow2", options={"compat": "0.10"})
    for image, offset, can in ((path, 64 * KiB, True), (path, 100, False), (old, 64 * KiB, False)):
        with blocklib.open(image, "r+", format="qcow2", references="allow") as disk:
            for driver in (None, "throttle"):
                if driver is not None:
                    disk.insert_filter(driver, {"throttle-group": ThrottleGroup()})
                if can:
                    disk.write_zeroes(offset, 64 * KiB, fallback=False)
                    continue
                with pytest.raises(StorageError) as caught:
                    disk.write_zeroes(offset, 64 * KiB, fallback=False)
                assert caught.value.errno == errno.ENOTSUP
