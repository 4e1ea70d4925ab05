"""Ctrl-C at chosen moments of a plain library verb: the call ends, and so does the job, wherever the interrupt comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import MiB
from blocklib.jobs.job import Job

MOMENTS = [
    "before the job starts",
    "before its thread starts",
    "when its thread has started",
    "when the job has started",
    "before the wait",
    "in the wait",
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[blocklib.Disk]:
    path = tmp_path / "image.qcow2"
    blocklib.create(path, 64 * MiB, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"x" * (32 * MiB))
        yield disk


def _interrupt(moment: str, monkeypatch: pytest.MonkeyPatch, jobs: list[Job[Any]]) -> None:
    start, wait, thread_start = Job.start, Job.wait, threading.Thread.start

    def around(real: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, Job):
                jobs.append(self)
            elif not self.name.startswith("blocklib compare"):
                return real(self, *args, **kwargs)
            if not before:
                real(self, *args, **kwargs)
            raise KeyboardInterrupt

        return call

    def noting(self: Job[Any]) -> Job[Any]:
        jobs.append(self)
        return start(self)

    monkeypatch.setattr(Job, "start", noting)
    if moment == "before the job starts":
        monkeypatch.setattr(Job, "start", around(start, before=True))
    elif moment == "when the job has started":
        monkeypatch.setattr(Job, "start", around(start, before=False))
    elif moment == "before its thread starts":
        monkeypatch.setattr(threading.Thread, "start", around(thread_start, before=True))
    elif moment == "when its thread has started":
        monkeypatch.setattr(threading.Thread, "start", around(thread_start, before=False))
    elif moment == "before the wait":
        monkeypatch.setattr(Job, "wait", around(wait, before=True))
    else:

        def interrupted(self: Any, condition: threading.Condition, timeout: float | None) -> None:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            condition.wait(timeout)

        monkeypatch.setattr("blocklib.jobs.control.Clock.wait", interrupted)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_ends_the_call_and_the_job(
    moment: str, disk: blocklib.Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job[Any]] = []
    other = tmp_path / "other.raw"
    other.write_bytes(b"x" * (32 * MiB) + bytes(32 * MiB))
    with blocklib.open(other, format="raw") as second, monkeypatch.context() as patch:
        _interrupt(moment, patch, jobs)
        with pytest.raises(KeyboardInterrupt):
            # So slow that it would take days: it ends because it is told to.
            blocklib.compare(disk, second, speed=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blocklib compare")]
    assert jobs
    disk.write(0, b"y")  # nobody holds it
    disk.close()


def test_a_job_that_was_interrupted_before_its_thread_could_be_seen_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.test_job import Steps

    task = Steps(3)
    job = Job(task)
    real = threading.Thread.start
    late: list[threading.Thread] = []

    def start(self: threading.Thread) -> None:
        late.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt), job:
        job.start()
    real(late[0])  # what the system had begun all the same
    late[0].join()
    assert task.steps == []
    with pytest.raises(blocklib.JobCancelled):
        job.wait()
