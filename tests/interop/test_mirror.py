"""mirror of disks in use: the copy is the disk, the disk becomes the copy, and QEMU agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

import blocklib
from blocklib import (
    GraphConflictError,
    KiB,
    MiB,
    NameNotFoundError,
    OutOfRangeError,
    ReadOnlyError,
    ThrottleGroup,
    UsageError,
    jobs,
)
from blocklib.jobs.crew import Crew
from tests.writers import is_clean, make_chain, qemu_chain, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 16 * MiB
CopyMode = Literal["background", "write-blocking"]
MODES = pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])


def _open(path: Path) -> blocklib.Disk:
    return blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap")


@MODES
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_the_disk_becomes_the_copy_under_writers(tmp_path: Path, copy_mode: CopyMode, format: str) -> None:
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.img"
    with _open(paths[-1]) as disk:
        with writing(disk, model) as writers:
            job = jobs.mirror(disk, target, format=format, copy_mode=copy_mode)
            job.wait(timeout=120, until="ready")
            assert job.status == "ready"
            writers.wait_for(50)
            job.complete()
            assert job.wait(timeout=120).pivoted
            writers.wait_for(50)
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["copy.img"]
        assert disk.read(0, SIZE) == model
        before = disk.read(0, SIZE)
        disk.write(12345, b"after")
        model[12345:12350] = b"after"
    assert before[12345:12350] != b"after"
    if format == "qcow2":
        assert qemu_chain(target) == ["copy.img"]
        assert qemu_content(target, tmp_path) == model
        assert is_clean(target)
    else:
        assert target.read_bytes() == model
    assert all(is_clean(path) for path in paths)
    assert qemu_content(paths[-1], tmp_path) != model  # nobody writes to the old images any more


@MODES
def test_a_cancelled_mirror_leaves_a_copy_of_that_moment(tmp_path: Path, copy_mode: CopyMode) -> None:
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        with writing(disk, model):
            job = jobs.mirror(disk, target, format="qcow2", copy_mode=copy_mode)
            job.wait(timeout=120, until="ready")
        moment = bytes(model)
        job.cancel()
        assert not job.wait(timeout=60).pivoted
        disk.write(0, b"later")
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["1.qcow2", "0.qcow2"]
    assert qemu_content(target, tmp_path) == moment
    assert is_clean(target)
    assert is_clean(paths[-1])


@MODES
def test_a_mirror_of_the_top_image_keeps_the_backing_file(tmp_path: Path, copy_mode: CopyMode) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        with writing(disk, model):
            job = jobs.mirror(disk, target, format="qcow2", sync="top", copy_mode=copy_mode)
            job.wait(timeout=120, until="ready")
            job.complete()
            job.wait(timeout=120)
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["copy.qcow2", "1.qcow2", "0.qcow2"]
        assert disk.read(0, SIZE) == model
    assert qemu_chain(target) == ["copy.qcow2", "1.qcow2", "0.qcow2"]
    assert qemu_content(target, tmp_path) == model
    assert is_clean(target)


def test_a_mirror_of_nothing_but_new_writes_lies_over_the_disk(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        job = jobs.mirror(disk, target, format="qcow2", sync="none")
        job.wait(timeout=60, until="ready")
        with writing(disk, model) as writers:
            writers.wait_for(50)
        job.complete()
        job.wait(timeout=60)
        assert disk.read(0, SIZE) == model
        disk.write(0, b"new")
        model[0:3] = b"new"
    assert qemu_chain(target) == ["copy.qcow2", "0.qcow2"]
    assert qemu_content(target, tmp_path) == model
    assert is_clean(paths[0])


def test_a_mirror_into_what_is_there_already_replaces_its_content(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    blocklib.create(target, SIZE, format="qcow2")
    with blocklib.open(target, "r+", format="qcow2") as other:
        other.write(0, b"\xee" * SIZE)
    with _open(paths[-1]) as disk, writing(disk, model):
        job = jobs.mirror(disk, target, format="qcow2", existing=True)
        job.wait(timeout=120, until="ready")
        job.complete()
        job.wait(timeout=120)
    assert qemu_content(target, tmp_path) == model


def test_a_disk_that_the_caller_has_opened_can_be_the_target(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    blocklib.create(target, SIZE, format="qcow2")
    with _open(paths[-1]) as disk, _open(target) as other:
        with writing(disk, model):
            with jobs.mirror(disk, other) as job:
                job.wait(timeout=120, until="ready")
                job.complete()
                job.wait(timeout=120)
        assert other.read(0, SIZE) == model
        assert disk.read(0, SIZE) == model
    assert qemu_content(target, tmp_path) == model


@pytest.mark.parametrize("mode", ["on-success", "never", "always"])
def test_a_mirror_of_what_a_bitmap_marks_brings_an_older_copy_up_to_date(tmp_path: Path, mode: Any) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    blocklib.convert(paths[0], target, format="qcow2")
    with _open(paths[-1]) as disk:
        bitmap = disk.bitmaps.add("changes", persistent=True)
        disk.write(5 * MiB, b"changed")
        model[5 * MiB : 5 * MiB + 7] = b"changed"
        marked = bitmap.count
        job = jobs.mirror(disk, target, format="qcow2", existing=True, sync="bitmap", bitmap="changes", bitmap_mode=mode)
        job.wait(timeout=60, until="ready")
        assert bitmap.busy
        with pytest.raises(GraphConflictError):
            bitmap.clear()
        job.cancel()
        job.wait(timeout=60)
        assert bitmap.count == (marked if mode == "never" else 0)
        assert not bitmap.busy
    assert qemu_content(target, tmp_path) == model


def test_a_mirror_that_was_cancelled_early_removes_its_target_and_keeps_the_bitmap(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        bitmap = disk.bitmaps.add("changes")
        disk.write(0, b"x" * MiB)
        model[0:MiB] = b"x" * MiB
        with writing(disk, model):
            job = jobs.mirror(disk, target, format="qcow2", sync="incremental", bitmap="changes", speed=1)
            job.cancel()
            with pytest.raises(blocklib.JobCancelled):
                job.wait(timeout=60)
        assert bitmap.count >= MiB
        assert not target.exists()
        assert disk.read(0, SIZE) == model
        assert len(disk.node.parents) == 1


def test_a_second_job_on_the_same_chain_is_refused_and_names_the_first(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
    with _open(paths[-1]) as disk:
        with jobs.mirror(disk, tmp_path / "a.qcow2", format="qcow2", speed=1):
            with pytest.raises(GraphConflictError, match="mirror") as caught:
                jobs.stream(disk)
            assert caught.value.other == "mirror"
            with pytest.raises(GraphConflictError):
                jobs.mirror(disk, tmp_path / "b.qcow2", format="qcow2")
        jobs.stream(disk).wait(timeout=60)
    assert not (tmp_path / "b.qcow2").exists()


def test_a_disk_keeps_its_size_while_it_is_mirrored(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[-1]) as disk:
        with jobs.mirror(disk, tmp_path / "a.qcow2", format="qcow2") as job:
            job.wait(timeout=60, until="ready")
            with pytest.raises(GraphConflictError, match="size"):
                disk.truncate(2 * SIZE)
        disk.truncate(2 * SIZE)


def test_targets_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 1, SIZE)
    small = tmp_path / "small.qcow2"
    blocklib.create(small, SIZE // 2, format="qcow2")
    with _open(paths[-1]) as disk:
        with pytest.raises(GraphConflictError, match="onto itself"):
            jobs.mirror(disk, paths[-1], format="qcow2", overwrite=True)
        with pytest.raises(OutOfRangeError):
            jobs.mirror(disk, small, format="qcow2", existing=True).wait(timeout=60)
        with pytest.raises(blocklib.ImageExistsError):
            jobs.mirror(disk, small, format="qcow2").wait(timeout=60)
        with pytest.raises(UsageError):
            jobs.mirror(disk, small, sync="incremental", existing=True)
        with blocklib.open(small, format="qcow2") as other, pytest.raises(ReadOnlyError):
            jobs.mirror(disk, other)
        assert len(disk.node.parents) == 1
        assert disk.node.claim is None
    assert small.exists()


@MODES
def test_pieces_may_be_larger_than_what_is_copied_in_one_go(tmp_path: Path, copy_mode: CopyMode) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk, writing(disk, model):
        job = jobs.mirror(disk, target, format="qcow2", copy_mode=copy_mode, granularity=64 * MiB, speed=200 * MiB)
        job.wait(timeout=120, until="ready")
        progress = job.progress
        assert progress.done <= progress.total
        job.complete()
        job.wait(timeout=120)
    assert qemu_content(target, tmp_path) == model
    assert is_clean(target)


@pytest.mark.parametrize("buf_size", [64 * KiB, 3 * MiB, 5 * MiB])
def test_no_more_is_on_its_way_than_the_buffers_hold_together(
    tmp_path: Path, buf_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[int] = []
    make = Crew.__init__

    def watched(crew: Crew, control: Any, work: Any, size: int, *, buffer: int, reads: int = 1) -> None:
        buffers.append(size * buffer)
        make(crew, control, work, size, buffer=buffer, reads=reads)

    monkeypatch.setattr(Crew, "__init__", watched)
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        with pytest.raises(UsageError, match="at least the granularity"):
            jobs.mirror(disk, target, format="qcow2", buf_size=buf_size, granularity=8 * MiB)
        with writing(disk, model):
            job = jobs.mirror(disk, target, format="qcow2", buf_size=buf_size)
            job.wait(timeout=120, until="ready")
            job.complete()
            job.wait(timeout=120)
    assert buffers
    assert buf_size // 4 < max(buffers) <= buf_size
    assert qemu_content(target, tmp_path) == model


def test_clusters_over_a_backing_file_are_copied_as_a_whole_however_small_the_buffers_are(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.qcow2"
    options = {"cluster_size": 2 * MiB}
    with _open(paths[-1]) as disk, jobs.mirror(
        disk, target, format="qcow2", options=options, sync="top", buf_size=64 * KiB
    ) as job:
        job.wait(timeout=60, until="ready")
        job.cancel()
        job.wait(timeout=60)
    assert qemu_content(target, tmp_path) == model


@MODES
def test_an_older_copy_over_a_backing_file_keeps_what_shows_through(tmp_path: Path, copy_mode: CopyMode) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    options = {"cluster_size": 2 * MiB}
    blocklib.convert(paths[0], tmp_path / "full.qcow2", format="qcow2")
    blocklib.create(target, format="qcow2", backing="full.qcow2", backing_format="qcow2", options=options)
    with _open(paths[-1]) as disk:
        disk.bitmaps.add("changes")
        disk.write(5 * MiB + 1000, b"changed")
        model[5 * MiB + 1000 : 5 * MiB + 1007] = b"changed"
        job = jobs.mirror(
            disk, target, format="qcow2", existing=True, sync="incremental", bitmap="changes", copy_mode=copy_mode
        )
        job.wait(timeout=60, until="ready")
        disk.write(9 * MiB + 1000, b"again")
        model[9 * MiB + 1000 : 9 * MiB + 1005] = b"again"
        job.cancel()
        job.wait(timeout=60)
    assert qemu_content(target, tmp_path) == model
    assert is_clean(target)


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_give_their_space_back_only_if_that_is_wanted(tmp_path: Path, unmap: bool) -> None:
    paths = [tmp_path / "source.qcow2", tmp_path / "target.qcow2"]
    for path in paths:
        blocklib.create(path, SIZE, format="qcow2")
    with _open(paths[0]) as disk, _open(paths[1]) as other:
        other.write(0, b"\xee" * SIZE)
        other.flush()
        before = paths[1].stat().st_blocks
        job = jobs.mirror(disk, other, unmap=unmap)
        job.wait(timeout=60, until="ready")
        job.cancel()
        job.wait(timeout=60)
        other.flush()
        assert other.read(0, SIZE) == bytes(SIZE)
        assert (paths[1].stat().st_blocks < before // 2) is unmap


@pytest.mark.parametrize("replaces", [None, "image", "limit", "keeper"])
def test_the_copy_takes_the_place_of_the_node_that_is_named(tmp_path: Path, replaces: str | None) -> None:
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.qcow2"
    named = {"node-name": "image"}
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow", options=named) as disk:
        keeper = disk.insert_filter("copy-on-read", {"node-name": "keeper"})
        limit = disk.insert_filter("throttle", {"node-name": "limit", "throttle-group": ThrottleGroup({"iops-total": 10**6})})
        with writing(disk, model) as writers:
            job = jobs.mirror(disk, target, format="qcow2", replaces=replaces)
            job.wait(timeout=120, until="ready")
            job.complete()
            assert job.wait(timeout=120).pivoted
            writers.wait_for(30)
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["copy.qcow2"]
        assert disk.read(0, SIZE) == model
        assert bool(limit.node.parents) is (replaces != "limit")
        assert bool(keeper.node.parents) is (replaces not in ("limit", "keeper"))
        for filter in (limit, keeper):
            if filter.node.parents:
                filter.remove()
            else:
                with pytest.raises(UsageError, match="stands above nothing"):
                    filter.remove()
        assert disk.read(0, SIZE) == model
        assert len(disk.node.parents) == 1
    assert qemu_content(target, tmp_path) == model
    assert all(is_clean(path) for path in paths)


def test_only_what_shows_the_disk_can_be_replaced(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
    with _open(paths[-1]) as disk:
        with pytest.raises(UsageError, match="does not show"):
            jobs.mirror(disk, tmp_path / "a.qcow2", format="qcow2", replaces=disk.chain()[1].name)
        with pytest.raises(NameNotFoundError, match="elsewhere"):
            jobs.mirror(disk, tmp_path / "a.qcow2", format="qcow2", replaces="elsewhere")
        limit = disk.insert_filter("throttle", {"node-name": "limit", "throttle-group": ThrottleGroup({})})
        job = jobs.mirror(disk, tmp_path / "a.qcow2", format="qcow2", replaces="limit")
        job.wait(timeout=60, until="ready")
        limit.remove()
        job.complete()
        with pytest.raises(NameNotFoundError, match="limit"):  # it is gone since
            job.wait(timeout=60)
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["1.qcow2", "0.qcow2"]
        assert disk.node.claim is None


def test_a_job_that_cannot_be_made_leaves_no_claim(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
    with _open(paths[-1]) as disk:
        for make in (
            lambda: jobs.mirror(disk, tmp_path / "a.qcow2", format="qcow2", speed=-1),
            lambda: jobs.stream(disk, speed=-1),
            lambda: jobs.backup(disk, tmp_path / "a.qcow2", format="qcow2", speed=-1),
        ):
            with pytest.raises(UsageError, match="speed"):
                make()
            assert all(node.claim is None for node in (disk.node, disk.node.children["backing"].node))
        with blocklib.transaction() as over:
            pass
        with pytest.raises(UsageError, match="block"):
            jobs.backup(disk, tmp_path / "a.qcow2", format="qcow2", transaction=over)
        assert disk.node.claim is None
        assert not (tmp_path / "a.qcow2").exists()
