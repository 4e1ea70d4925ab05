"""What becomes of a mirror or a backup whose source or target fails: it fails, stops, or tries again, as it was told to."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

import blocklib
from blocklib import MiB, StorageError, UsageError, jobs
from blocklib.jobs.copy_target import CopyTarget
from tests.jobs_model import Fault, put_fault

SIZE = 8 * MiB
Verb = Literal["mirror", "backup"]
VERBS = pytest.mark.parametrize("verb", ["mirror", "backup"])


class _Failing:
    """A method of a file that fails from its n-th call on, until it is mended."""

    def __init__(self, method: Any, number: int, good: int) -> None:
        self._method = method
        self._number = number
        self._left = good
        self.mended = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.mended:
            self._left -= 1
            if self._left < 0:
                raise StorageError("the test says no", errno=self._number, operation="test")
        return self._method(*arguments, **named)


@contextmanager
def _disks(folder: Path) -> Iterator[tuple[blocklib.Disk, blocklib.Disk, bytes]]:
    """A disk with content, an empty target for it, and the content."""
    content = random.Random(0).randbytes(SIZE)
    for name in ("source", "target"):
        blocklib.create(folder / f"{name}.qcow2", SIZE, format="qcow2", options={"preallocation": "metadata"})
    with blocklib.open(folder / "source.qcow2", "r+") as source, blocklib.open(folder / "target.qcow2", "r+") as target:
        source.write(0, content)
        source.flush()
        yield source, target, content


def _fail(disk: blocklib.Disk, method: str, number: int, good: int = 0) -> _Failing:
    file = disk.node.children["file"].node
    failing = _Failing(getattr(file, method), number, good)
    setattr(file, method, failing)
    return failing


def _start(verb: Verb, source: blocklib.Disk, target: blocklib.Disk, **policies: Any) -> Any:
    return jobs.mirror(source, target, **policies) if verb == "mirror" else jobs.backup(source, target, **policies)


def _end(verb: Verb, job: Any) -> None:
    if verb == "mirror":
        job.wait(timeout=60, until="ready")
        job.cancel()
    job.wait(timeout=60)


@VERBS
def test_a_target_that_fails_ends_the_job_and_leaves_the_source(tmp_path: Path, verb: Verb) -> None:
    with _disks(tmp_path) as (source, target, content):
        failing = _fail(target, "pwritev", errno.EIO)
        job = _start(verb, source, target)
        with pytest.raises(StorageError) as caught:
            job.wait(timeout=60)
        assert caught.value.errno == errno.EIO
        failing.mended = True
        assert source.read(0, SIZE) == content
        source.write(0, b"goes on")
        assert len(source.node.parents) == 1
        assert source.node.claim is None
        _end(verb, _start(verb, source, target))
        assert target.read(0, 7) == b"goes on"
        assert target.read(7, SIZE - 7) == content[7:]


@VERBS
@pytest.mark.parametrize(("policy", "number"), [("stop", errno.EIO), ("enospc", errno.ENOSPC)])
def test_a_job_that_stops_for_its_target_goes_on_when_it_is_resumed(
    tmp_path: Path, verb: Verb, policy: str, number: int
) -> None:
    with _disks(tmp_path) as (source, target, content):
        failing = _fail(target, "pwritev", number)
        job = _start(verb, source, target, on_target_error=policy)
        for event in job.events():
            if event.status == "paused":
                break
        assert isinstance(job.io_error, StorageError)
        if verb == "mirror":  # whose disk is not held up; what a backup could not keep first is not overwritten
            source.write(0, content[:100])
        failing.mended = True
        job.resume()
        assert job.io_error is None
        _end(verb, job)
        assert target.read(0, SIZE) == content


@VERBS
def test_the_policy_for_full_disks_reports_other_errors(tmp_path: Path, verb: Verb) -> None:
    with _disks(tmp_path) as (source, target, _content):
        failing = _fail(target, "pwritev", errno.EIO)
        with pytest.raises(StorageError):
            _start(verb, source, target, on_target_error="enospc").wait(timeout=60)
        failing.mended = True


@VERBS
def test_a_job_that_ignores_errors_tries_again_until_it_works(tmp_path: Path, verb: Verb) -> None:
    with _disks(tmp_path) as (source, target, content):
        failing = _fail(target, "pwritev", errno.EIO)
        job = _start(verb, source, target, on_target_error="ignore")
        with pytest.raises(TimeoutError):
            job.wait(timeout=0.2)
        failing.mended = True
        _end(verb, job)
        assert target.read(0, SIZE) == content


@VERBS
def test_a_source_that_cannot_be_read_ends_the_job_with_its_error(tmp_path: Path, verb: Verb) -> None:
    with _disks(tmp_path) as (source, target, content):
        failing = _fail(source, "preadv", errno.EIO)
        with pytest.raises(StorageError) as caught:
            job = _start(verb, source, target)
            job.wait(timeout=60)
        assert caught.value.errno == errno.EIO
        failing.mended = True
        assert source.read(0, SIZE) == content
        assert len(source.node.parents) == 1


@VERBS
def test_a_job_that_stops_for_its_source_goes_on_when_it_is_resumed(tmp_path: Path, verb: Verb) -> None:
    with _disks(tmp_path) as (source, target, content):
        failing = _fail(source, "preadv", errno.EIO)
        job = _start(verb, source, target, on_source_error="stop")
        for event in job.events():
            if event.status == "paused":
                break
        failing.mended = True
        job.resume()
        _end(verb, job)
        assert target.read(0, SIZE) == content


@pytest.mark.parametrize("breaks", ["break-guest-write", "break-snapshot"])
def test_who_is_told_that_old_data_could_not_be_kept(tmp_path: Path, breaks: Any) -> None:
    with _disks(tmp_path) as (source, target, content):
        job = jobs.backup(source, target, sync="none", on_cbw_error=breaks)
        job.wait(timeout=60, until="ready")
        failing = _fail(target, "pwritev", errno.EIO)
        if breaks == "break-guest-write":
            with pytest.raises(StorageError):
                source.write(0, b"new")
            assert source.read(0, 3) == content[:3]
            failing.mended = True
            source.write(0, b"new")
            job.cancel()
            job.wait(timeout=60)
            assert target.read(0, 3) == content[:3]
        else:
            source.write(0, b"new")
            with pytest.raises(StorageError):
                job.wait(timeout=60)
            failing.mended = True
        assert source.read(0, 3) == b"new"


@pytest.mark.parametrize("compress", ["zlib", "zstd"])
def test_a_compressed_backup_goes_on_where_it_has_written_part_of_a_piece(tmp_path: Path, compress: Any) -> None:
    content = b"compressible" * (SIZE // 12) + bytes(SIZE % 12)
    for name, options in (("source", {"cluster_size": 4096}), ("target", {"compression_type": compress})):
        blocklib.create(tmp_path / f"{name}.qcow2", SIZE, format="qcow2", options=options)
    with blocklib.open(tmp_path / "source.qcow2", "r+") as source:
        source.write(0, content)
        source.write_zeroes(4096, 8192)
        source.write_zeroes(MiB, 100 * 1024)
        expected = source.read(0, SIZE)
        failing: list[_Failing] = []
        open_target = CopyTarget.open

        def open_and_break(end: CopyTarget, size: int) -> blocklib.Disk:
            made = open_target(end, size)
            failing.append(_fail(made, "pwritev", errno.EIO, good=2))
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CopyTarget, "open", open_and_break)
            job = jobs.backup(source, tmp_path / "copy.qcow2", format="qcow2", compress=compress, on_target_error="stop")
        for event in job.events():
            if event.status == "paused":
                failing[0].mended = True
                job.resume()
        job.wait(timeout=60)
    with blocklib.open(tmp_path / "copy.qcow2") as copy:
        assert copy.read(0, SIZE) == expected
        assert any(extent.compressed for extent in copy.extents())
    assert blocklib.check(tmp_path / "copy.qcow2").clean


@pytest.mark.parametrize("policy", ["report", "ignore", "enospc", "stop"])
def test_a_stream_that_cannot_read_does_what_it_was_told_to(tmp_path: Path, policy: Any) -> None:
    content = random.Random(0).randbytes(SIZE)
    blocklib.create(tmp_path / "base.qcow2", SIZE, format="qcow2", options={"preallocation": "metadata"})
    with blocklib.open(tmp_path / "base.qcow2", "r+") as base:
        base.write(0, content)
    blocklib.create(tmp_path / "top.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2")
    with blocklib.open(tmp_path / "top.qcow2", "r+", format="qcow2", references="allow") as disk:
        below = disk.node.children["backing"].node
        number = errno.ENOSPC if policy == "enospc" else errno.EIO
        fault = put_fault(below, Fault(("read",), 1, number, None if policy != "ignore" else 1))
        job = jobs.stream(disk, on_error=policy)
        for event in job.events():
            if event.status == "paused":
                assert isinstance(job.io_error, StorageError)
                fault.mended = True
                job.resume()
        if policy in ("report", "ignore"):
            with pytest.raises(StorageError):
                job.wait(timeout=60)
            assert len(disk.chain()) == 2
            fault.mended = True
            jobs.stream(disk).wait(timeout=60)
        else:
            job.wait(timeout=60)
        assert fault.hits
        assert len(disk.chain()) == 1
        assert disk.read(0, SIZE) == content


@pytest.mark.parametrize("loss", ["flush", "removed", "nothing"])
def test_a_bitmap_forgets_only_what_a_failed_job_has_left_in_its_target(tmp_path: Path, loss: str) -> None:
    with _disks(tmp_path) as (source, target, content):
        bitmap = source.bitmaps.add("changes")
        source.write(0, content)
        with pytest.MonkeyPatch.context() as patch:
            where: Any = target
            if loss == "removed":
                where = tmp_path / "copy.qcow2"
                open_target = CopyTarget.open

                def open_and_break(end: CopyTarget, size: int) -> blocklib.Disk:
                    made = open_target(end, size)
                    put_fault(made.node, Fault(("flush",), 0, errno.EIO, 1))
                    return made

                patch.setattr(CopyTarget, "open", open_and_break)
            elif loss == "flush":
                _fail(target, "flush", errno.EIO)
            else:
                put_fault(target.node, Fault(("write",), 2, errno.EIO, 1))
            job = jobs.backup(
                source,
                where,
                format=None if where is target else "qcow2",
                sync="bitmap",
                bitmap="changes",
                bitmap_mode="always",
                speed=8 * MiB if loss == "nothing" else 0,
            )
        with pytest.raises(StorageError):
            job.wait(timeout=60)
        assert bitmap.count == SIZE or (loss == "nothing" and bitmap.count)
        if loss == "flush":
            target.abandon()


def test_an_unknown_policy_is_refused_at_once(tmp_path: Path) -> None:
    with _disks(tmp_path) as (source, target, _content):
        with pytest.raises(UsageError, match="on_target_error"):
            jobs.mirror(source, target, on_target_error="panic")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="on_cbw_error"):
            jobs.backup(source, target, on_cbw_error="panic")  # type: ignore[arg-type]
        assert source.node.claim is None
