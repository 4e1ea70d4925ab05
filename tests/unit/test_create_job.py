"""create and amend as jobs: the same results, progress, and what a cancelled one leaves."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import ImageExistsError, JobCancelled, MiB, OptionError, creating, jobs
from blocklib.jobs.control import Control


def test_a_created_image_is_the_one_that_the_plain_function_makes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cluster_size": 4096, "data_file": "job.data", "preallocation": "falloc"}
    seen: list[blocklib.Progress] = []
    job = jobs.create(tmp_path / "job.qcow2", 8 * MiB, format="qcow2", options=options, progress=seen.append)
    info = job.wait(timeout=60)
    plain = blocklib.create(tmp_path / "plain.qcow2", 8 * MiB, format="qcow2", options=options | {"data_file": "plain.data"})
    assert (info.virtual_size, info.cluster_size, info.format) == (plain.virtual_size, plain.cluster_size, plain.format)
    assert (tmp_path / "job.data").stat().st_blocks == (tmp_path / "plain.data").stat().st_blocks
    assert (seen[-1].done, seen[-1].total) == (8 * MiB, 8 * MiB)
    overlay = jobs.create(tmp_path / "top.qcow2", format="qcow2", backing="job.qcow2", backing_format="qcow2").wait(timeout=60)
    assert overlay.virtual_size == 8 * MiB


def test_the_job_takes_what_the_plain_function_takes() -> None:
    plain, job = (inspect.signature(function).parameters for function in (blocklib.create, jobs.create))
    assert list(job)[: len(plain)] == list(plain)
    assert all(job[name] == plain[name] for name in plain)


def test_a_failed_one_raises_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"mine")
    with pytest.raises(ImageExistsError):
        jobs.create(tmp_path / "disk", MiB, format="qcow2").wait(timeout=60)
    assert (tmp_path / "disk").read_bytes() == b"mine"
    with pytest.raises(OptionError):
        jobs.create(tmp_path / "other", MiB, format="qcow2", options={"cluster_size": 3}).wait(timeout=60)
    assert not (tmp_path / "other").exists()
    job = jobs.create(tmp_path / "other", MiB, format="qcow2", options={"data_file": "disk"})
    with pytest.raises(ImageExistsError):
        job.wait(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_cancelled_one_removes_what_it_made(tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "disk", MiB, format="qcow2", options={"data_file": "data"}, auto_finalize=False)
    job.wait(timeout=60, until="pending")
    assert (tmp_path / "disk").exists()
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait(timeout=60)
    assert not list(tmp_path.iterdir())


def test_one_that_waits_for_its_end_can_be_finalized(tmp_path: Path) -> None:
    job = jobs.create(tmp_path / "disk", MiB, format="raw", auto_finalize=False)
    job.wait(timeout=60, until="pending")
    job.finalize()
    assert job.wait(timeout=60).virtual_size == MiB
    assert (tmp_path / "disk").stat().st_size == MiB


@pytest.mark.parametrize("verb", ["create", "amend"])
def test_one_that_is_cancelled_while_it_is_paused_changes_nothing(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocklib.create(tmp_path / "old", MiB, format="qcow2")
    before = (tmp_path / "old").read_bytes()
    begin = Control.pause_point

    def paused(self: Control, length: int = 0) -> None:
        with self.changed:
            self.pausing = True
        begin(self, length)

    monkeypatch.setattr(Control, "pause_point", paused)
    job: jobs.Job[Any]
    if verb == "create":
        job = jobs.create(tmp_path / "new", MiB, format="qcow2")
    else:
        job = jobs.amend(tmp_path / "old", {"compat": "0.10"}, format="qcow2")
    assert any(event.status == "paused" for event in job.events())
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait(timeout=60)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "old").read_bytes() == before


def test_amending_tells_how_far_it_is(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "disk", 64 * MiB, format="qcow2", options={"preallocation": "metadata"})
    seen: list[blocklib.Progress] = []
    with jobs.amend(tmp_path / "disk", {"refcount_bits": 64}, format="qcow2", progress=seen.append) as job:
        assert job.wait(timeout=60).format_specific["refcount-bits"] == 64
    assert seen[-1].done == seen[-1].total > 0


def test_the_plain_function_is_no_job() -> None:
    assert blocklib.create is creating.create
