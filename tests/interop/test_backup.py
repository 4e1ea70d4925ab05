"""backup, external snapshots and transactions on disks in use: the copy is the disk of one instant."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import pytest

import blocklib
from blocklib import GraphConflictError, KiB, MiB, UsageError, jobs
from blocklib.copy import CopyState
from blocklib.jobs.backup import _Backup
from blocklib.jobs.dirty_copy import EdgeWriter
from tests.writers import is_clean, make_chain, qemu_chain, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 16 * MiB


def _open(path: Path) -> blocklib.Disk:
    return blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap")


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_backup_is_the_disk_of_the_instant_when_it_began(
    tmp_path: Path, format: str, compress: Literal["zstd"] | None
) -> None:
    if compress and format == "raw":
        with pytest.raises(blocklib.UnsupportedFeatureError), _open(make_chain(tmp_path, 1, SIZE)[0][0]) as disk:
            jobs.backup(disk, tmp_path / "copy.img", format="raw", compress="zstd")
        return
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.img"
    with _open(paths[-1]) as disk:
        moment = bytes(model)
        job = jobs.backup(disk, target, format=format, compress=compress, speed=40 * MiB)
        with writing(disk, model):
            job.wait(timeout=120)
        assert disk.read(0, SIZE) == model
        assert len(disk.node.parents) == 1
    copy = target.read_bytes() if format == "raw" else qemu_content(target, tmp_path)
    assert copy == moment
    assert format == "raw" or is_clean(target)
    assert is_clean(paths[-1])


def test_disks_are_backed_up_at_one_instant(tmp_path: Path) -> None:
    disks, targets = [], []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        blocklib.create(folder / "disk.qcow2", SIZE, format="qcow2")
        disks.append(_open(folder / "disk.qcow2"))
        targets.append(folder / "copy.qcow2")
    stop = threading.Event()
    counter = 0

    def count() -> None:  # the first disk is always written before the second
        nonlocal counter
        while not stop.is_set():
            counter += 1
            for disk in disks:
                disk.write(0, counter.to_bytes(8, "little"))
                disk.write(8 * MiB, counter.to_bytes(8, "little"))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with blocklib.transaction() as tx:
            running = [jobs.backup(disk, target, format="qcow2", transaction=tx) for disk, target in zip(disks, targets)]
            assert all(job.status == "created" for job in running)
        for job in running:
            job.wait(timeout=60)
    finally:
        stop.set()
        thread.join()
        for disk in disks:
            disk.close()
    values = []
    for target in targets:
        with blocklib.open(target, format="qcow2") as copy:
            values += [int.from_bytes(copy.read(offset, 8), "little") for offset in (0, 8 * MiB)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] <= 1


def test_full_and_incremental_backups_restore_each_moment(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    moments, images = [], [tmp_path / "full.qcow2"]
    with _open(paths[0]) as disk:
        with blocklib.transaction() as tx:
            disk.bitmaps.add("nightly", granularity=64 * KiB, persistent=True, transaction=tx)
            job = jobs.backup(disk, images[0], format="qcow2", sync="full", transaction=tx)
        moments.append(bytes(model))
        with writing(disk, model, seed=1) as writers:
            writers.wait_for(20)
            job.wait(timeout=60)
        for number in range(1, 6):
            target = tmp_path / f"inc{number}.qcow2"
            moments.append(bytes(model))
            job = jobs.backup(
                disk,
                target,
                format="qcow2",
                sync="incremental",
                bitmap="nightly",
                backing=images[-1].name,
                backing_format="qcow2",
            )
            job.wait(timeout=60)
            images.append(target)
            with writing(disk, model, seed=number * 10) as writers:
                writers.wait_for(20)
    for image, moment in zip(images, moments, strict=True):
        assert qemu_content(image, tmp_path) == moment
        assert is_clean(image)
    assert qemu_chain(images[-1]) == [image.name for image in reversed(images)]


def test_a_failed_incremental_backup_keeps_what_the_bitmap_marks(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[0]) as disk:
        bitmap = disk.bitmaps.add("nightly")
        disk.write(0, b"x" * MiB)
        before = bitmap.count
        job = jobs.backup(disk, tmp_path / "inc.qcow2", format="qcow2", sync="incremental", bitmap="nightly", speed=1)
        disk.write(4 * MiB, b"y")
        job.cancel()
        with pytest.raises(blocklib.JobCancelled):
            job.wait(timeout=60)
        assert bitmap.count == before + bitmap.granularity
        assert not (tmp_path / "inc.qcow2").exists()


def test_a_backup_of_nothing_keeps_what_is_overwritten(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "old.qcow2"
    moment = bytes(model)
    with _open(paths[0]) as disk:
        job = jobs.backup(disk, target, format="qcow2", sync="none")
        job.wait(timeout=60, until="ready")
        with writing(disk, model) as writers:
            writers.wait_for(30)
        job.cancel()
        job.wait(timeout=60)
    assert qemu_chain(target) == ["old.qcow2", "0.qcow2"]
    assert qemu_content(target, tmp_path) == moment
    assert qemu_content(paths[0], tmp_path) == model


def test_an_overlay_goes_over_a_disk_that_is_being_written(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    overlay = tmp_path / "monday.qcow2"
    with _open(paths[0]) as disk:
        with writing(disk, model) as writers:
            writers.wait_for(10)
            disk.add_overlay(overlay, format="qcow2")
            writers.wait_for(10)
        below = paths[0].read_bytes()
        with writing(disk, model):
            pass
        disk.flush()
        assert paths[0].read_bytes() == below
        assert [Path(str(image.filename)).name for image in disk.chain()] == ["monday.qcow2", "0.qcow2"]
        assert disk.read(0, SIZE) == model
    assert qemu_chain(overlay) == ["monday.qcow2", "0.qcow2"]
    assert qemu_content(overlay, tmp_path) == model
    assert is_clean(overlay)
    assert is_clean(paths[0])
    with _open(overlay) as disk:
        jobs.stream(disk).wait(timeout=60)
        assert disk.read(0, SIZE) == model
    assert qemu_chain(overlay) == ["monday.qcow2"]


def test_overlays_of_several_disks_are_made_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.qcow2" for number in range(2)]
    for path in paths:
        blocklib.create(path, SIZE, format="qcow2")
    (tmp_path / "taken.qcow2").write_bytes(b"something")
    with _open(paths[0]) as first, _open(paths[1]) as second:
        with pytest.raises(blocklib.ImageExistsError), blocklib.transaction() as tx:
            first.add_overlay(tmp_path / "a.qcow2", format="qcow2", transaction=tx)
            second.add_overlay(tmp_path / "taken.qcow2", format="qcow2", transaction=tx)
        assert len(first.chain()) == len(second.chain()) == 1
        assert not (tmp_path / "a.qcow2").exists()
        assert (tmp_path / "taken.qcow2").read_bytes() == b"something"
        with pytest.raises(RuntimeError), blocklib.transaction() as tx:
            first.add_overlay(tmp_path / "a.qcow2", format="qcow2", transaction=tx)
            raise RuntimeError("never mind")
        assert not (tmp_path / "a.qcow2").exists()
        with blocklib.transaction() as tx:
            first.add_overlay(tmp_path / "a.qcow2", format="qcow2", transaction=tx)
            second.add_overlay(tmp_path / "b.qcow2", format="qcow2", transaction=tx)
        assert len(first.chain()) == len(second.chain()) == 2
        first.write(0, b"x")
        second.write(0, b"y")
    assert all(is_clean(tmp_path / name) for name in ("a.qcow2", "b.qcow2", "0.qcow2", "1.qcow2"))


class _Failing:
    """A change that fails at the instant."""

    def __init__(self, disk: blocklib.Disk) -> None:
        self.node = disk.node

    def prepare(self) -> None:
        pass

    def begin(self) -> None:
        raise RuntimeError("at the last moment")

    def undo(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


def test_what_was_changed_is_undone_when_a_later_change_of_a_transaction_fails(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[0]) as disk:
        bitmap = disk.bitmaps.add("old")
        disk.write(0, b"x" * MiB)
        model[:MiB] = b"x" * MiB
        marked = bitmap.count
        with pytest.raises(RuntimeError, match="last moment"), blocklib.transaction() as tx:
            disk.bitmaps.add("new", transaction=tx)
            bitmap.clear(transaction=tx)
            bitmap.disable(transaction=tx)
            job = jobs.backup(disk, tmp_path / "copy.qcow2", format="qcow2", transaction=tx)
            tx.add(_Failing(disk))
        assert job.status == "concluded"
        assert "new" not in disk.bitmaps
        assert bitmap.count == marked
        assert bitmap.enabled
        assert not (tmp_path / "copy.qcow2").exists()
        assert len(disk.node.parents) == 1
        with pytest.raises(RuntimeError, match="last moment"), blocklib.transaction() as tx:
            disk.add_overlay(tmp_path / "over.qcow2", format="qcow2", transaction=tx)
            tx.add(_Failing(disk))
        assert len(disk.chain()) == 1
        with writing(disk, model):
            pass
        assert disk.read(0, SIZE) == model
    assert is_clean(paths[0])


def test_a_transaction_takes_changes_only_while_its_block_runs(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[0]) as disk:
        with blocklib.transaction() as tx:
            pass
        with pytest.raises(UsageError):
            disk.bitmaps.add("late", transaction=tx)
        assert "late" not in disk.bitmaps
        with pytest.raises(UsageError), tx:
            pass


def test_a_job_at_work_stands_against_an_overlay(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
    with _open(paths[-1]) as disk, jobs.mirror(disk, tmp_path / "copy.qcow2", format="qcow2") as job:
        job.wait(timeout=60, until="ready")
        with pytest.raises(GraphConflictError, match="mirror"):
            disk.add_overlay(tmp_path / "over.qcow2", format="qcow2")
        assert not (tmp_path / "over.qcow2").exists()


def test_what_a_writer_could_not_keep_at_the_last_moment_is_still_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    copy_all = _Backup._copy

    def copy_all_but_one(
        self: _Backup, control: Any, errors: Any, state: CopyState, source: Any, end: EdgeWriter
    ) -> int:
        copied = copy_all(self, control, errors, state, source, end)
        end.write_runs([(0, memoryview(b"torn" * 100))], placed=lambda: None)  # torn, and marked again
        state.mark(0, 1)
        return copied

    monkeypatch.setattr(_Backup, "_copy", copy_all_but_one)
    with _open(paths[0]) as disk:
        jobs.backup(disk, target, format="qcow2").wait(timeout=60)
    assert qemu_content(target, tmp_path) == model


class _Stubborn(_Failing):
    """A change that cannot even be taken back."""

    def abort(self) -> None:
        raise UsageError("it stays")


def test_a_change_that_cannot_be_taken_back_keeps_no_other_from_it(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[0]) as disk:
        with pytest.raises(RuntimeError, match="last moment") as caught, blocklib.transaction() as tx:
            disk.add_overlay(tmp_path / "over.qcow2", format="qcow2", transaction=tx)
            tx.add(_Stubborn(disk))
        assert any("it stays" in note for note in caught.value.__notes__)
        assert not (tmp_path / "over.qcow2").exists()
        assert disk.node.claim is None
