"""Two jobs at once: on one chain the second is refused when it is started and names the first; on chains apart both run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import GraphConflictError, MiB, jobs
from tests.jobs_model import busy
from tests.writers import make_chain, qemu_content

pytestmark = pytest.mark.requires("qemu-img")

SIZE: Final = 4 * MiB
JOBS: Final[dict[str, Callable[..., Any]]] = {
    "stream": lambda disk, _target, **named: jobs.stream(disk, **named),
    "mirror": lambda disk, target, **named: jobs.mirror(disk, target, format="qcow2", **named),
    "backup": lambda disk, target, **named: jobs.backup(disk, target, format="qcow2", **named),
    "commit": lambda disk, _target, **named: jobs.commit(disk, **named),
}


def _open(path: Path) -> blocklib.Disk:
    return blocklib.open(path, "r+", format="qcow2", references="allow")


def _ended(job: Any, verb: str) -> None:
    if verb in ("mirror", "commit"):
        job.wait(timeout=60, until="ready")
        job.complete()
    job.wait(timeout=60)


@pytest.mark.parametrize("second", JOBS)
@pytest.mark.parametrize("first", JOBS)
def test_the_second_job_on_a_chain_is_refused_at_once_and_names_the_first(tmp_path: Path, first: str, second: str) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with _open(paths[-1]) as disk:
        with busy(disk, model) as guests:
            with JOBS[first](disk, tmp_path / "first.qcow2", auto_finalize=False):  # never ends by itself
                with pytest.raises(GraphConflictError, match=first) as caught:
                    JOBS[second](disk, tmp_path / "second.qcow2")
                assert caught.value.other == first
                with pytest.raises(GraphConflictError, match=first):
                    disk.add_overlay(tmp_path / "over.qcow2", format="qcow2")
                guests.wait_for(5)
            assert not any((tmp_path / f"{name}.qcow2").exists() for name in ("first", "second", "over"))
            _ended(JOBS[second](disk, tmp_path / "second.qcow2"), second)
        assert disk.read(0, SIZE) == guests.content()


@pytest.mark.parametrize(("first", "second"), [("stream", "mirror"), ("backup", "commit"), ("mirror", "backup")])
def test_jobs_on_chains_apart_run_together(tmp_path: Path, first: str, second: str) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    (a, a_model), (b, b_model) = (make_chain(folder, 2, SIZE) for folder in folders)
    with _open(a[-1]) as one, _open(b[-1]) as other:
        with busy(one, a_model) as guests, busy(other, b_model, seed=1) as others:
            job = JOBS[first](one, folders[0] / "copy.qcow2", auto_finalize=False)  # it is there until it is told to go
            _ended(JOBS[second](other, folders[1] / "copy.qcow2"), second)
            if first == "mirror":
                job.wait(timeout=60, until="ready")
                job.complete()
            job.wait(timeout=60, until="pending")
            job.finalize()
            job.wait(timeout=60)
        assert one.read(0, SIZE) == guests.content()
        assert other.read(0, SIZE) == others.content()
        tops = [Path(str(disk.chain()[0].filename)) for disk in (one, other)]
    for top, folder, content in zip(tops, folders, (guests.content(), others.content()), strict=True):
        assert qemu_content(top, folder) == content


def test_several_disks_are_backed_up_at_one_instant(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    (a, a_model), (b, b_model) = (make_chain(folder, 2, SIZE) for folder in folders)
    copies = [folder / "copy.qcow2" for folder in folders]
    with _open(a[-1]) as one, _open(b[-1]) as other:
        with busy(one, a_model) as guests, busy(other, b_model, seed=1) as others:
            guests.wait_for(10)
            before = guests.now(), others.now()
            with blocklib.transaction() as tx:
                started = [
                    jobs.backup(disk, copy, format="qcow2", transaction=tx)
                    for disk, copy in zip((one, other), copies, strict=True)
                ]
            after = guests.now(), others.now()
            for job in started:
                job.wait(timeout=60)
    for known, copy, folder, first, last in zip((guests, others), copies, folders, before, after, strict=True):
        assert known.was_at(qemu_content(copy, folder), first, last)
