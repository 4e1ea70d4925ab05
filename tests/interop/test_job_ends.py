"""Jobs on a chain in use that end before they were final: cancelled while pending, or in a transaction that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import GraphConflictError, JobCancelled, MiB, jobs
from blocklib.errors import JobStateError
from tests.writers import is_clean, make_chain, qemu_chain, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 8 * MiB


def _open(path: Path) -> blocklib.Disk:
    return blocklib.open(path, "r+", format="qcow2", references="allow")


def _names(disk: blocklib.Disk) -> list[str]:
    return [Path(str(image.filename)).name for image in disk.chain()]


def _start(verb: str, disk: blocklib.Disk, target: Path, **named: Any) -> Any:
    if verb == "stream":
        return jobs.stream(disk, **named)
    return getattr(jobs, verb)(disk, target, format="qcow2", **named)


def _until_pending(job: Any, verb: str) -> None:
    if verb == "mirror":
        job.wait(timeout=60, until="ready")
        job.complete()
    job.wait(timeout=60, until="pending")


@pytest.mark.parametrize("verb", ["stream", "mirror", "backup"])
def test_a_pending_job_has_changed_nothing_yet_and_cancelling_it_leaves_all_as_it_was(tmp_path: Path, verb: str) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        with writing(disk, model) as writers:
            with _start(verb, disk, target, auto_finalize=False) as job:
                _until_pending(job, verb)
                writers.wait_for(20)
                assert _names(disk) == ["2.qcow2", "1.qcow2", "0.qcow2"]
                with pytest.raises(GraphConflictError, match=verb):
                    jobs.stream(disk)
                job.cancel()
                with pytest.raises(JobCancelled):
                    job.wait(timeout=60)
        assert not target.exists()
        assert disk.read(0, SIZE) == model
        assert len(disk.node.parents) == 1
        jobs.stream(disk).wait(timeout=60)
    assert qemu_chain(paths[-1]) == ["2.qcow2"]
    assert qemu_content(paths[-1], tmp_path) == model


def test_a_mirror_follows_the_disk_until_it_is_finalized(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 2, SIZE)
    target = tmp_path / "copy.qcow2"
    with _open(paths[-1]) as disk:
        with writing(disk, model) as writers:
            job = jobs.mirror(disk, target, format="qcow2", auto_finalize=False)
            _until_pending(job, "mirror")
            writers.wait_for(100)
            job.finalize()
            assert job.wait(timeout=60).pivoted
            writers.wait_for(20)
        assert _names(disk) == ["copy.qcow2"]
        assert disk.read(0, SIZE) == model
    assert qemu_content(target, tmp_path) == model
    assert is_clean(target)


def test_a_backup_that_was_cancelled_while_pending_gives_the_bitmap_its_marks_back(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[-1]) as disk:
        bitmap = disk.bitmaps.add("changes")
        disk.write(MiB, b"x")
        named: dict[str, Any] = {"format": "qcow2", "sync": "incremental", "bitmap": "changes"}
        with jobs.backup(disk, tmp_path / "copy.qcow2", auto_finalize=False, **named) as job:
            job.wait(timeout=60, until="pending")
            assert bitmap.busy
        assert bitmap.count == bitmap.granularity
        jobs.backup(disk, tmp_path / "copy.qcow2", **named).wait(timeout=60)
        assert not bitmap.count


def test_a_progress_callback_that_raises_at_the_very_end_leaves_the_disk_where_it_was(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    target = tmp_path / "copy.qcow2"
    ending: list[bool] = []

    def refuse(_progress: blocklib.Progress) -> None:
        if ending:
            raise KeyError("enough")

    with _open(paths[-1]) as disk:
        job = jobs.mirror(disk, target, format="qcow2", progress=refuse)
        job.wait(timeout=60, until="ready")
        ending.append(True)
        job.complete()
        with pytest.raises(KeyError):
            job.wait(timeout=60)
        assert _names(disk) == ["0.qcow2"]
        assert not target.exists()
        assert disk.read(0, SIZE) == model


# -- transactions -----------------------------------------------------------------------------------------------------


class _Failing:
    """A change that cannot be prepared, or not be made, or, well made, is the last."""

    def __init__(self, disk: blocklib.Disk, when: str) -> None:
        self.node = disk.node
        self._when = when

    def _step(self, name: str) -> None:
        if name == self._when:
            raise RuntimeError(f"no {name}")

    def prepare(self) -> None:
        self._step("prepare")

    def begin(self) -> None:
        self._step("begin")

    def undo(self) -> None:
        """Nothing was done."""

    def abort(self) -> None:
        """Nothing was done."""

    def finish(self) -> None:
        self._step("finish")


@pytest.mark.parametrize("when", ["prepare", "begin"])
@pytest.mark.parametrize("position", range(6))
def test_a_change_that_fails_undoes_all_others_wherever_it_stands(tmp_path: Path, position: int, when: str) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    made = []
    for folder in folders:
        folder.mkdir()
        made.append(make_chain(folder, 1, SIZE))
    with _open(made[0][0][0]) as a, _open(made[1][0][0]) as b, _open(made[2][0][0]) as c:
        old = b.bitmaps.add("old")
        b.write(0, b"x")
        made[1][1][0:1] = b"x"
        started: list[Any] = []
        changes: list[Callable[[Any], object]] = [
            lambda tx: a.add_overlay(folders[0] / "over.qcow2", format="qcow2", transaction=tx),
            lambda tx: b.bitmaps.add("new", transaction=tx),
            lambda tx: old.clear(transaction=tx),
            lambda tx: started.append(jobs.backup(b, folders[1] / "copy.qcow2", format="qcow2", transaction=tx)),
            lambda tx: started.append(jobs.backup(c, folders[2] / "copy.qcow2", format="qcow2", transaction=tx)),
        ]
        changes.insert(position, lambda tx: tx.add(_Failing(b, when)))
        with writing(a, made[0][1], 1), writing(c, made[2][1], 1):
            with pytest.raises(RuntimeError, match=f"no {when}"), blocklib.transaction() as tx:
                for change in changes:
                    change(tx)
            for job in started:
                assert job.status == "concluded"
                with pytest.raises(JobCancelled):
                    job.wait()
        for disk in (a, b, c):
            assert len(disk.chain()) == len(disk.node.parents) == 1
            assert disk.node.claim is None
        assert [bitmap.name for bitmap in b.bitmaps] == ["old"]
        assert old.count == old.granularity
        assert not old.busy
        for folder in folders:
            assert [path.name for path in folder.iterdir()] == ["0.qcow2"]
        for disk, (_paths, model) in zip((a, b, c), made, strict=True):
            assert disk.read(0, SIZE) == model
        with blocklib.transaction() as tx:
            del changes[position]
            for change in changes:
                change(tx)
        for job in started[-2:]:
            job.wait(timeout=60)
    assert qemu_chain(folders[0] / "over.qcow2") == ["over.qcow2", "0.qcow2"]
    for folder, (paths, model) in zip(folders, made, strict=True):
        assert is_clean(paths[0])
        for copy in folder.glob("copy.qcow2"):
            assert qemu_content(copy, folder) == model


def test_what_fails_after_all_changes_were_made_keeps_no_job_from_starting(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[0]) as disk:
        with pytest.raises(RuntimeError, match="no finish"), blocklib.transaction() as tx:
            tx.add(_Failing(disk, "finish"))
            job = jobs.backup(disk, tmp_path / "copy.qcow2", format="qcow2", transaction=tx)
        job.wait(timeout=60)
    assert qemu_content(tmp_path / "copy.qcow2", tmp_path) == model


def test_a_job_that_is_cancelled_inside_its_transaction_ends_with_it(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 1, SIZE)
    with _open(paths[0]) as disk:
        with blocklib.transaction() as tx:
            bitmap = disk.bitmaps.add("kept", transaction=tx)
            job = jobs.backup(disk, tmp_path / "copy.qcow2", format="qcow2", transaction=tx)
            with pytest.raises(JobStateError, match="transaction"):
                job.start()
            job.cancel()
        with pytest.raises(JobCancelled):
            job.wait(timeout=60)
        assert bitmap.enabled
        assert not (tmp_path / "copy.qcow2").exists()
        assert len(disk.node.parents) == 1
        assert disk.node.claim is None
        assert disk.read(0, SIZE) == model
