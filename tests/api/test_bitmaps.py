"""Dirty bitmaps as a user meets them: what is noted, by which paths, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklib
from blocklib import Bitmap, GiB, KiB, MiB, TiB, jobs
from blocklib.disk import Disk
from tests.api.images import in_child, make_chain, make_disk, make_raw


def ranges(bitmap: Bitmap) -> list[tuple[int, int]]:
    table = bitmap.dirty_ranges()
    assert table.dtype == blocklib.RANGE_DTYPE
    found: list[tuple[int, int]] = table.tolist()
    assert bitmap.count == sum(length for _offset, length in found)
    return found


def test_the_collection_is_a_mapping_by_name_that_iterates_over_bitmaps() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        assert len(disk.bitmaps) == 0
        nightly = disk.bitmaps.add("nightly")
        hourly = disk.bitmaps.add("hourly", granularity=4 * KiB, persistent=True, enabled=False)
        assert isinstance(nightly, Bitmap)
        assert (nightly.name, nightly.granularity, nightly.persistent, nightly.enabled) == ("nightly", 64 * KiB, False, True)
        assert (hourly.granularity, hourly.persistent, hourly.enabled, hourly.recording) == (4 * KiB, True, False, False)
        assert (nightly.recording, nightly.busy, nightly.inconsistent, nightly.count) == (True, False, False, 0)
        assert [bitmap.name for bitmap in disk.bitmaps] == ["nightly", "hourly"]
        assert "hourly" in disk.bitmaps
        assert "daily" not in disk.bitmaps
        assert disk.bitmaps["hourly"].granularity == 4 * KiB
        with pytest.raises(KeyError):
            disk.bitmaps["daily"]
        nightly.remove()
        assert [bitmap.name for bitmap in disk.bitmaps] == ["hourly"]
        with pytest.raises(blocklib.NameNotFoundError):
            nightly.clear()


@pytest.mark.parametrize(("cluster_size", "granularity"), [(512, 4 * KiB), (16 * KiB, 16 * KiB), (2 * MiB, 64 * KiB)])
def test_the_default_granularity_is_the_cluster_size_within_bounds(cluster_size: int, granularity: int) -> None:
    blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"cluster_size": cluster_size})
    with blocklib.open("disk.qcow2", "r+") as disk:
        assert disk.bitmaps.add("b").granularity == granularity


WRITERS: dict[str, tuple[Callable[[Disk], object], list[tuple[int, int]]]] = {
    "write": (lambda disk: disk.write(5 * MiB + 1, b"x"), [(5 * MiB, 64 * KiB)]),
    "write across granules": (lambda disk: disk.write(MiB - 1, b"xy"), [(MiB - 64 * KiB, 128 * KiB)]),
    "write_zeroes": (lambda disk: disk.write_zeroes(2 * MiB, 100 * KiB), [(2 * MiB, 128 * KiB)]),
    "unmap": (lambda disk: disk.write_zeroes(2 * MiB, 64 * KiB, unmap=True), [(2 * MiB, 64 * KiB)]),
    "discard": (lambda disk: disk.discard(MiB + 5, 200 * KiB), [(MiB + 64 * KiB, 128 * KiB)]),
    "detected zeroes": (lambda disk: disk.write(3 * MiB, bytes(64 * KiB)), [(3 * MiB, 64 * KiB)]),
    "an empty write": (lambda disk: disk.write(3 * MiB, b""), []),
    "a read": (lambda disk: disk.read(0, MiB), []),
    "a file": (lambda disk: _through_file(disk), [(7 * MiB, 64 * KiB)]),
}


def _through_file(disk: Disk) -> None:
    file = disk.as_file(7 * MiB)
    file.seek(5)
    file.write(b"abc")
    file.close()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_whatever_changes_the_disk_is_noted_and_nothing_else(name: str, format: str) -> None:
    blocklib.create("disk", 64 * MiB, format=format)
    with blocklib.open("disk", "r+", format=format, discard="unmap", detect_zeroes="unmap") as disk:
        disk.write(1 * MiB, b"old" * 100000)
        bitmap = disk.bitmaps.add("b", granularity=64 * KiB)
        write, expected = WRITERS[name]
        write(disk)
        if name == "discard" and format == "raw":
            expected = [(MiB, 256 * KiB)]  # a raw image discards to the byte
        assert ranges(bitmap) == expected


def test_a_compressed_write_is_noted() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b", granularity=64 * KiB)
        disk.write_compressed(4 * MiB, b"compress" * (16 * KiB))
        assert ranges(bitmap) == [(4 * MiB, 128 * KiB)]


def test_a_disabled_bitmap_notes_nothing_and_keeps_what_it_has() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b", granularity=512)
        disk.write(0, b"x")
        bitmap.disable()
        disk.write(1024, b"x")
        assert ranges(bitmap) == [(0, 512)]
        bitmap.enable()
        disk.write(2048, b"x")
        assert ranges(bitmap) == [(0, 512), (2048, 512)]
        assert bitmap.dirty_ranges(100, 2000).tolist() == [(100, 412), (2048, 52)]
        bitmap.clear()
        assert ranges(bitmap) == []


def test_jobs_that_write_into_an_open_disk_are_noted() -> None:
    make_raw("source.img", 2 * MiB, b"s" * 100)
    make_disk("disk.qcow2", 4 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b", granularity=64 * KiB)
        jobs.convert({"driver": "raw", "file.filename": "source.img"}, disk).wait()
        assert ranges(bitmap)[0] == (0, 2 * MiB)


def test_a_commit_is_noted_in_the_stored_bitmaps_of_the_base() -> None:
    make_chain(8 * MiB)
    with blocklib.open("base.qcow2", "r+", format="qcow2", references="allow") as base:
        base.bitmaps.add("b", granularity=64 * KiB, persistent=True)
    with blocklib.open("top.qcow2", "r+", format="qcow2", references="allow") as top:
        blocklib.commit(top, empty=True)
        assert len(top.bitmaps) == 0
    with blocklib.open("base.qcow2", format="qcow2", references="allow") as base:
        assert ranges(base.bitmaps["b"]) == [(128 * KiB, 64 * KiB)]


def test_what_a_grown_disk_gained_is_clean_and_what_it_lost_is_forgotten() -> None:
    make_chain(8 * MiB)
    with blocklib.open("top.qcow2", "r+", format="qcow2", references="allow") as disk:
        bitmap = disk.bitmaps.add("b", granularity=512, persistent=True)
        disk.write(8 * MiB - 100, b"x" * 100)
        disk.truncate(8 * MiB + 512)
        assert ranges(bitmap) == [(8 * MiB - 512, 512)]
        disk.write(8 * MiB + 1, b"x")
        disk.truncate(8 * MiB - 512, shrink=True)
        disk.truncate(9 * MiB)
        assert ranges(bitmap) == []
    with blocklib.open("top.qcow2", format="qcow2", references="allow") as disk:
        assert ranges(disk.bitmaps["b"]) == []


def test_only_bitmaps_are_merged() -> None:
    make_disk("one.qcow2", 8 * MiB)
    with blocklib.open("one.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("one")
        with pytest.raises(blocklib.UsageError, match="not with str"):
            bitmap.merge("one")  # type: ignore[arg-type]


def test_bitmaps_merge_across_granularities_and_images_all_or_nothing() -> None:
    make_disk("one.qcow2", 8 * MiB)
    make_disk("two.qcow2", 8 * MiB)
    make_disk("other.qcow2", 9 * MiB)
    with (
        blocklib.open("one.qcow2", "r+") as one,
        blocklib.open("two.qcow2", "r+") as two,
        blocklib.open("other.qcow2", "r+") as other,
    ):
        fine, coarse = one.bitmaps.add("fine", granularity=512), two.bitmaps.add("coarse", granularity=1 * MiB)
        one.write(MiB + 5, b"x")
        two.write(3 * MiB + 5, b"x")
        with pytest.raises(ValueError, match="for a disk of"):
            fine.merge(coarse, other.bitmaps.add("b"))
        assert ranges(fine) == [(MiB, 512)]
        fine.merge(coarse)
        assert ranges(fine) == [(MiB, 512), (3 * MiB, MiB)]
        coarse.merge(fine, fine)
        assert ranges(coarse) == [(MiB, MiB), (3 * MiB, MiB)]


@pytest.mark.parametrize("granularity", [0, 1, 256, 513, 3 * KiB, 4 * GiB, -512])
def test_a_granularity_that_cannot_be_is_refused(granularity: int) -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk, pytest.raises(ValueError, match="power of two"):
        disk.bitmaps.add("b", granularity=granularity)


@pytest.mark.parametrize("name", ["", "n" * 1024, "ü" * 512, "a\0b", "\ud800\udc00" * 300])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        with pytest.raises(ValueError, match="bitmap"):
            disk.bitmaps.add(name)
        assert len(disk.bitmaps) == 0


def test_a_name_that_is_taken_and_what_cannot_be_stored_are_refused_and_the_image_stays_as_it_is() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    blocklib.create("old.qcow2", 8 * MiB, format="qcow2", options={"compat": "0.10"})
    blocklib.create("huge.qcow2", 512 * TiB, format="qcow2", options={"cluster_size": 2 * MiB})
    make_raw("disk.img", MiB)
    before = {name: Path(name).read_bytes() for name in ("disk.qcow2", "old.qcow2", "disk.img")}
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b")
        with pytest.raises(blocklib.UsageError, match="already"):
            disk.bitmaps.add("b", persistent=True)
        bitmap.remove()
    with blocklib.open("old.qcow2", "r+") as disk, pytest.raises(blocklib.UnsupportedFeatureError, match=r"0\.10"):
        disk.bitmaps.add("b", persistent=True)
    with blocklib.open("disk.img", "r+", format="raw") as disk, pytest.raises(blocklib.UsageError, match="raw"):
        disk.bitmaps.add("b", persistent=True)
    with blocklib.open("disk.qcow2") as disk, pytest.raises(blocklib.ReadOnlyError):
        disk.bitmaps.add("b", persistent=True)
    with blocklib.open("huge.qcow2", "r+") as disk:
        with pytest.raises(blocklib.UsageError, match="granularity"):
            disk.bitmaps.add("b", granularity=4 * KiB)
        disk.bitmaps.add("b", granularity=1 * MiB)
        with pytest.raises(blocklib.UsageError, match="granularity"):
            disk.bitmaps.add("c", granularity=64 * KiB)
    assert before == {name: Path(name).read_bytes() for name in before}


def test_a_disk_that_is_open_for_reading_shows_stored_bitmaps_and_changes_none() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        disk.bitmaps.add("b", persistent=True)
        disk.write(0, b"x")
    before = Path("disk.qcow2").read_bytes()
    with blocklib.open("disk.qcow2") as disk:
        bitmap = disk.bitmaps["b"]
        assert ranges(bitmap) == [(0, 64 * KiB)]
        for change in (bitmap.clear, bitmap.enable, bitmap.disable, bitmap.remove, lambda: bitmap.merge(bitmap)):
            with pytest.raises(blocklib.ReadOnlyError):
                change()
        own = disk.bitmaps.add("own")
        own.merge(bitmap)
        assert ranges(own) == [(0, 64 * KiB)]
    assert Path("disk.qcow2").read_bytes() == before


def test_opening_for_writing_and_looking_writes_nothing() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        disk.bitmaps.add("b", persistent=True)
        disk.write(0, b"x")
    before = Path("disk.qcow2").read_bytes()
    with blocklib.open("disk.qcow2", "r+") as disk:
        assert ranges(disk.bitmaps["b"]) == [(0, 64 * KiB)]
        disk.read(0, MiB)
        disk.flush()
    assert Path("disk.qcow2").read_bytes() == before


def test_a_closed_disk_a_fork_and_pickling_answer_nothing() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmaps = disk.bitmaps
        bitmap = bitmaps.add("b")
        assert in_child(lambda: bitmap.count) == "ClosedError"
        for part in (bitmap, bitmaps):
            with pytest.raises(TypeError, match="open the disk again in the worker"):
                pickle.dumps(part)
            with pytest.raises(TypeError, match="open the disk again in the worker"):
                copy.copy(part)
    calls: list[Callable[[], object]] = [
        lambda: disk.bitmaps, lambda: bitmaps.add("c"), lambda: len(bitmaps), lambda: list(bitmaps), lambda: "b" in bitmaps,
        lambda: bitmap.count, bitmap.dirty_ranges, bitmap.clear, bitmap.enable, bitmap.disable, bitmap.remove,
        lambda: bitmap.merge(bitmap),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(blocklib.ClosedError):
            call()


def test_writes_of_many_threads_are_all_noted_while_bitmaps_come_and_go() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b", granularity=512, persistent=True)

        def work(number: int) -> None:
            for i in range(50):
                disk.write((i * 8 + number) * 1024, bytes((number + 1,)) * 512)
                if i % 10 == 0:
                    disk.bitmaps.add(f"{number} {i}").remove()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ranges(bitmap) == [(i * 1024, 512) for i in range(400)]


def test_a_held_bitmap_is_busy() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b")
        with bitmap.held():
            assert bitmap.busy
            assert "busy" in repr(bitmap)
            with pytest.raises(blocklib.GraphConflictError):
                bitmap.remove()
            disk.write(0, b"x")
        assert not bitmap.busy
        assert ranges(bitmap) == [(0, 64 * KiB)]


def test_a_terabyte_that_is_made_zero_is_noted_at_once() -> None:
    blocklib.create("disk.qcow2", 16 * TiB, format="qcow2", options={"cluster_size": 2 * MiB})
    with blocklib.open("disk.qcow2", "r+") as disk:
        bitmap = disk.bitmaps.add("b", granularity=64 * KiB, persistent=True)
        disk.write_zeroes(1 * TiB + 5, 1 * MiB)
        disk.discard(0, 16 * TiB)
        assert ranges(bitmap) == [(TiB, MiB + 64 * KiB)]
    with blocklib.open("disk.qcow2") as disk:
        assert ranges(disk.bitmaps["b"]) == [(TiB, MiB + 64 * KiB)]


def test_applying_an_internal_snapshot_marks_everything_and_follows_its_size() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        snapshot = disk.snapshots.create("small")
        bitmap = disk.bitmaps.add("b", persistent=True)
        off = disk.bitmaps.add("off", persistent=True, enabled=False)
        snapshot.apply()
        assert ranges(bitmap) == [(0, 8 * MiB)]
        bitmap.clear()
        disk.truncate(12 * MiB)
        large = disk.snapshots.create("large")
        snapshot.apply()
        assert ranges(bitmap) == [(0, 8 * MiB)]
        bitmap.clear()
        large.apply()
        assert ranges(bitmap) == [(0, 12 * MiB)]
        assert ranges(off) == []
    with blocklib.open("disk.qcow2") as disk:
        assert ranges(disk.bitmaps["b"]) == [(0, 12 * MiB)]


def test_an_apply_that_is_refused_marks_nothing() -> None:
    blocklib.create("disk.qcow2", MiB, format="qcow2", options={"refcount_bits": 2, "cluster_size": 4096})
    with blocklib.open("disk.qcow2", "r+") as disk:
        disk.write(0, b"x" * 4096)
        disk.snapshots.create("one")
        disk.snapshots.create("two")
        bitmap = disk.bitmaps.add("marks", granularity=4096)
        disk.write(8192, b"y")
        with pytest.raises(blocklib.ImageLimitError):  # the first cluster has the three references that two bits can count
            disk.snapshots["one"].apply()
        assert ranges(bitmap) == [(8192, 4096)]
