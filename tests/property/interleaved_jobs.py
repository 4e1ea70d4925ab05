"""Scenarios of jobs and changes of the graph beside requests; each is (folder, seed) -> None, and raises what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import blocklib
from blocklib import jobs
from blocklib.disk import Disk
from blocklib.errors import GraphConflictError, JobCancelled, JobStateError, UsageError
from tests.property.interleaving import CLUSTER, SECTOR, SIZE, Bench, base, check_content, sectors
from tests.scheduling import Schedule


def _write_over(disk: Disk, bench: Bench, number: int) -> None:
    for offset in (number * SECTOR, 10 * CLUSTER, 20 * CLUSTER + number * SECTOR):
        length = CLUSTER if offset == 10 * CLUSTER else SECTOR
        disk.write(offset, sectors(number, length // SECTOR))
        if length == SECTOR:
            bench.becomes(offset, SECTOR, number)


def _pivot(job: jobs.Job[Any]) -> None:
    """Let a job that becomes ready end by continuing on its copy."""
    with job:
        job.wait(until="ready")
        job.complete()
        job.wait()


def stream_beside_writes(folder: Path, seed: int) -> None:
    """A stream fills the image; nothing older goes over what was written."""
    bench = Bench(folder, "overlay")
    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(lambda: jobs.stream(disk).wait(), lambda: _write_over(disk, bench, 1), lambda: _write_over(disk, bench, 2))
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1, 2)
    bench.check()
    assert blocklib.info(bench.path).backing_filename is None


def mirror_beside_writes(folder: Path, seed: int) -> None:
    """The disk becomes the copy while it is written, and has all of it."""
    bench = Bench(folder, "overlay")
    copy_mode: Any = ("background", "write-blocking")[seed % 2]
    copy = folder / "copy.qcow2"

    with Schedule(seed) as schedule:
        disk = bench.open()

        def mirror() -> None:
            _pivot(jobs.mirror(disk, copy, format="qcow2", copy_mode=copy_mode, granularity=CLUSTER))

        schedule.run(mirror, lambda: _write_over(disk, bench, 1), lambda: _write_over(disk, bench, 2))
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1, 2)
    bench.check(copy)


def commit_beside_writes(folder: Path, seed: int) -> None:
    """The disk continues on the image below it, which has all of it."""
    bench = Bench(folder, "overlay")

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(
            lambda: _pivot(jobs.commit(disk)),
            lambda: _write_over(disk, bench, 1),
            lambda: _write_over(disk, bench, 2),
        )
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1, 2)
    check_content((folder / "base.raw").read_bytes(), bench.allowed)
    assert blocklib.check(bench.path, format="qcow2").clean


def backup_beside_writes(folder: Path, seed: int) -> None:
    """The backup is the disk of the instant in which it was started."""
    bench = Bench(folder, "overlay")
    copy = folder / "copy.qcow2"
    with Schedule(seed) as schedule:
        disk = bench.open()
        job = jobs.backup(disk, copy, format="qcow2")
        schedule.run(job.wait, lambda: _write_over(disk, bench, 1), lambda: _write_over(disk, bench, 2))
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1, 2)
    bench.check()
    with blocklib.open(copy) as disk:
        assert disk.read(0, SIZE) == base()


def overlay_beside_writes(folder: Path, seed: int) -> None:
    """An overlay is put over the disk: each write is in the one image or the other, and the lower one stands still."""
    bench = Bench(folder, "overlay")
    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(
            lambda: disk.add_overlay(folder / "top.qcow2", format="qcow2"),
            lambda: _write_over(disk, bench, 1),
            lambda: _write_over(disk, bench, 2),
        )
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1, 2)
    bench.check(folder / "top.qcow2")


def filters_beside_requests(folder: Path, seed: int) -> None:
    """A filter comes and goes while requests are under way, and another one too."""
    bench = Bench(folder, "overlay")

    def change() -> None:
        throttle = disk.insert_filter("throttle", {"throttle-group": blocklib.ThrottleGroup({"iops-total": 1_000_000})})
        disk.insert_filter("copy-on-read", {})
        throttle.remove()

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(change, lambda: _write_over(disk, bench, 1), lambda: disk.read(0, 4 * CLUSTER))
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1)
    bench.check()


def steering_beside_a_stream(folder: Path, seed: int) -> None:
    """Pausing, resuming and cancelling at any moment: the job ends, the disk is what it was, another can be started."""
    bench = Bench(folder, "overlay")
    ends: list[str] = []

    def work() -> None:
        try:
            job.wait()
            ends.append("done")
        except JobCancelled:
            ends.append("cancelled")

    def steer() -> None:
        for verb in (job.pause, job.resume, job.pause, job.resume):
            try:
                verb()
            except JobStateError:
                return  # it has ended

    with Schedule(seed) as schedule:
        disk = bench.open()
        job = jobs.stream(disk)
        schedule.run(work, steer, lambda: job.cancel() if seed % 2 else None, lambda: _write_over(disk, bench, 1))
        assert ends in (["done"], ["cancelled"])
        if ends == ["cancelled"]:
            jobs.stream(disk).wait()
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1)
    bench.check()


def end_of_a_mirror_beside_its_beginning(folder: Path, seed: int) -> None:
    """One thread completes the mirror when it is ready, another cancels it, at any moment: it ends in one of the ways."""
    bench = Bench(folder, "overlay")
    copy = folder / "copy.qcow2"

    def complete() -> None:
        job.wait(until="ready")
        job.complete()

    def ending() -> None:
        try:
            complete()
        except (JobStateError, JobCancelled):
            pass  # the other one came first

    with Schedule(seed) as schedule:
        disk = bench.open()
        job = jobs.mirror(disk, copy, format="qcow2", granularity=CLUSTER)
        schedule.run(ending, lambda: job.cancel(force=bool(seed % 2)), lambda: _write_over(disk, bench, 1))
        try:
            pivoted = job.wait().pivoted
        except JobCancelled:
            pivoted = False
            assert not copy.exists()
        disk.close()
    bench.becomes(10 * CLUSTER, CLUSTER, 1)
    bench.check(copy if pivoted else None)


def two_jobs_at_once(folder: Path, seed: int) -> None:
    """Two jobs want to change one chain: one of them does, the other is told its name, or comes when nothing is left to do."""
    bench = Bench(folder, "overlay")
    told: list[str] = []

    def stream() -> None:
        try:
            jobs.stream(disk).wait()
        except (GraphConflictError, UsageError) as error:
            told.append(str(error))

    with Schedule(seed) as schedule:
        disk = bench.open()
        schedule.run(stream, stream, lambda: _write_over(disk, bench, 1))
        disk.close()
    assert len(told) < 2
    assert all("stream" in text or "no backing file" in text for text in told)
    bench.becomes(10 * CLUSTER, CLUSTER, 1)
    bench.check()


SCENARIOS = (
    stream_beside_writes,
    mirror_beside_writes,
    commit_beside_writes,
    backup_beside_writes,
    overlay_beside_writes,
    filters_beside_requests,
    steering_beside_a_stream,
    end_of_a_mirror_beside_its_beginning,
    two_jobs_at_once,
)
