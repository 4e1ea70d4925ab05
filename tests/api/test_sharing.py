"""What may be shared: between threads, by pickling, across a fork; and what becomes of a disk that nobody closed."""

from __future__ import annotations

import copy
import dataclasses
import errno
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import Disk, Extent, KiB, Limits, MiB, Reference, errors, graph, jobs, policy, reports
from blocklib.buffers import aligned_pool
from blocklib.policy import PlainPath, RestrictedFile
from tests.api.images import PATTERN, ROOT, in_child, make_disk, make_raw
from tests.programs import Program

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of CPython 3.12, for any thread alive

REFERENCE = Reference("backing", "base.qcow2", "qcow2", "dir/top.qcow2", 1)
FINDING = blocklib.Finding("leak", "refcount block entry", 65536, "0", "1")
CHECK = blocklib.CheckReport("disk.qcow2", "qcow2", (FINDING,), leaks=1, image_end_offset=1 << 20)
PASSED = blocklib.Check("header", True, "fine")
STEP = blocklib.RepairStep("lower", "refcount", 65536, "1", "0")
SNAPSHOT = blocklib.SnapshotInfo("1", "monday", datetime(2024, 1, 2, tzinfo=UTC), 0, 5, 1 << 30)
PROGRESS = blocklib.Progress(1, 2, 3.0, 4.0)

VALUES: list[object] = [
    Extent(0, 65536, 1, 327680, True, False, True, False),
    Limits(chain_depth=3),
    REFERENCE,
    policy.SameDirectory(max_depth=2),
    policy.AllowList(["base.qcow2"]),
    PlainPath("json:{}"),
    RestrictedFile("dir", "base.qcow2", REFERENCE),
    SNAPSHOT,
    blocklib.ImageInfo("a", "qcow2", 1, 2, 3, "b", "c", "raw", True, True, (SNAPSHOT,), {"compat": "1.1"}),
    blocklib.NodeInfo("n", "qcow2", "a", 1, False),
    PROGRESS,
    jobs.JobEvent("running", PROGRESS, None),
    blocklib.ConvertResult(1, 2, 3.0, ((0, 512),)),
    blocklib.CommitResult(1, "base.qcow2"),
    blocklib.BackupResult(1),
    blocklib.BackupResult(1),
    blocklib.MirrorResult(1, True),
    blocklib.RebaseResult(1, None),
    blocklib.StreamResult(1, None),
    blocklib.CompareResult(False, "content", 5, True, False),
    blocklib.MeasureResult(1, 2, 3),
    PASSED,
    blocklib.Inspection(("qcow2",), 1, (REFERENCE,), ("bitmaps",), True, ("l1_bytes",), reports.Checks((PASSED,))),
    FINDING,
    CHECK,
    STEP,
    blocklib.RepairReport((STEP,), CHECK, CHECK),
]
_IMAGE = {"structure": "L1 entry", "host_offset": 8, "expected": "a", "found": "b", "node": "n"}
_STORAGE: dict[str, Any] = {"errno": 5, "operation": "pread", "filename": "f", "node": "n"}
ERRORS: list[errors.BlocklibError] = [
    errors.BlocklibError("text", node="n"),
    errors.UsageError("text", node="n"),
    errors.OptionError("text", option="cache", driver="file", choices=("a", "b"), node="n"),
    errors.OutOfRangeError("text", node="n"),
    errors.ReadOnlyError("text", node="n"),
    errors.ClosedError("text", node="n"),
    errors.StalePlanError("text", node="n"),
    errors.NameNotFoundError("text", node="n"),
    errors.ImageError("text", **_IMAGE),  # type: ignore[arg-type]
    errors.FormatMismatchError("text", **_IMAGE),  # type: ignore[arg-type]
    errors.ImageCorruptError("text", **_IMAGE),  # type: ignore[arg-type]
    errors.ImageLimitError("text", **_IMAGE),  # type: ignore[arg-type]
    errors.UnsupportedFeatureError("text", features=("x",), **_IMAGE),  # type: ignore[arg-type]
    errors.PolicyError("text", reference=REFERENCE, node="n"),
    errors.StorageError("text", **_STORAGE),
    errors.ImageNotFoundError("text", **_STORAGE),
    errors.ImageExistsError("text", **_STORAGE),
    errors.LockedError("text", filename="f", permission="write", pid=7, node="n"),
    errors.BatchError("text", errnos=(0, 5, 0), operation="read_batch", node="n"),
    errors.NbdError("text", node="n"),
    errors.RequestError("text"),
    errors.RemoteProtocolError("text"),
    errors.LocalProtocolError("text"),
    errors.PoisonedError("text", node="n"),
    errors.GraphConflictError("text", other="o", node="n"),
    errors.JobError("text"),
    errors.JobStateError("text", status="running", verb="complete"),
    errors.JobCancelled("text"),
    errors.MissingExtraError("text", extra="encryption"),
]


def _name(value: object) -> str:
    return type(value).__name__


# -- pickling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=_name)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_value_pickles(value: object, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(value, protocol))
    assert again == value
    assert type(again) is type(value)
    assert copy.deepcopy(value) == value


def test_no_value_was_forgotten() -> None:
    made = {type(value) for value in VALUES}
    told = {one for one in vars(reports).values() if isinstance(one, type) and dataclasses.is_dataclass(one)}
    assert told <= made
    for value in VALUES:
        with pytest.raises(AttributeError):
            setattr(value, "another", None)  # noqa: B010 - mypy would refuse the plain assignment, too


@pytest.mark.parametrize("error", ERRORS, ids=_name)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_error_pickles_with_its_fields(error: errors.BlocklibError, protocol: int) -> None:
    error.add_note("while testing")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert str(again) == str(error) == "text"
    assert again.__notes__ == error.__notes__
    if isinstance(error, OSError):
        assert (again.errno, again.filename) == (error.errno, error.filename)
    assert vars(again) == vars(error)
    assert type(again) is type(error)


def test_no_error_was_forgotten() -> None:
    assert {type(error).__name__ for error in ERRORS} == set(errors.__all__)


def test_an_error_that_was_raised_pickles() -> None:
    with pytest.raises(blocklib.ImageNotFoundError) as caught:
        blocklib.open("missing.qcow2")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.errno, again.operation, again.filename, str(again)) == (
        errno.ENOENT,
        "open",
        "missing.qcow2",
        str(caught.value),
    )


def test_what_is_at_work_does_not_pickle() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with blocklib.open("disk.qcow2") as disk, jobs.convert(disk, "copy.img", format="raw") as job:
        with pytest.raises(TypeError, match="open it again in the worker"):
            pickle.dumps(disk)
        with pytest.raises(TypeError, match="open it again in the worker"):
            copy.copy(disk)
        with pytest.raises(TypeError, match="job"):
            pickle.dumps(job)
        for part in (disk.as_file(), disk.extents()):
            with pytest.raises(TypeError):
                pickle.dumps(part)
        job.wait()


# -- threads -----------------------------------------------------------------------------------------------------------


def test_one_disk_serves_many_threads() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    failures: list[object] = []

    def work(disk: Disk, number: int) -> None:
        for round_ in range(8):
            offset = (8 * round_ + number) * 96 * KiB + 2 * MiB
            disk.write(offset, bytes((number + 1,)) * (96 * KiB))
            if disk.read(offset, 96 * KiB) != bytes((number + 1,)) * (96 * KiB):
                failures.append((number, round_))
            own = disk.as_file(offset, 96 * KiB)
            own.seek(-1, io.SEEK_END)
            if own.read() != bytes((number + 1,)):
                failures.append((number, round_, "as_file"))
            disk.flush()

    with blocklib.open("disk.qcow2", "r+") as disk:
        threads = [threading.Thread(target=work, args=(disk, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        written = disk.read(2 * MiB, 64 * 96 * KiB)
    assert written == b"".join(bytes((number + 1,)) * (96 * KiB) for number in range(8)) * 8
    assert blocklib.check("disk.qcow2").clean


def test_closing_waits_for_nobody_once_it_is_done() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    disk = blocklib.open("disk.qcow2")
    extents = disk.extents()
    file = disk.as_file()
    disk.close()
    disk.close()
    assert disk.closed
    assert repr(disk) == "<Disk closed>"
    calls: list[Callable[[], object]] = [*_all_calls(disk), lambda: next(extents), lambda: file.read(1), disk.__enter__]
    for call in calls:
        with pytest.raises(blocklib.ClosedError):
            call()
    with pytest.raises(blocklib.ClosedError):
        blocklib.open("disk.qcow2", backing=disk)


def _all_calls(disk: Disk) -> list[Callable[[], object]]:
    """Every method and property that is about the disk's content or graph."""
    return [
        lambda: disk.read(0, 512),
        lambda: disk.readinto(0, bytearray(512)),
        lambda: disk.write(0, b"x"),
        lambda: disk.write_zeroes(0, 512),
        lambda: disk.discard(0, 512),
        lambda: disk.flush(),
        lambda: disk.truncate(1 << 30),
        lambda: next(disk.extents(0, 512)),
        lambda: disk.map(0, 512),
        lambda: disk.as_file(0, 512),
        lambda: disk.size,
        lambda: disk.chain(),
        lambda: disk.info(),
        lambda: disk.node,
    ]


# -- fork --------------------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_after_a_fork_the_childs_disk_raises_and_writes_nothing() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        disk.write(8 * MiB, PATTERN)
        before = Path("disk.qcow2").read_bytes()
        for call in _all_calls(disk):
            assert in_child(call) == "ClosedError"
        # Not even closing writes there, and leaving a `with` block is no error.
        assert in_child(disk.close) == "None"
        assert in_child(disk.abandon) == "None"
        assert in_child(lambda: disk.__exit__(None, None, None)) == "None"
        assert in_child(lambda: disk.closed) == "True"
        assert in_child(lambda: disk) == "<Disk closed>"
        assert Path("disk.qcow2").read_bytes() == before
        assert disk.read(8 * MiB, 4096) == PATTERN
        disk.write(16 * MiB, PATTERN)
    with blocklib.open("disk.qcow2") as disk:
        assert disk.read(16 * MiB, 4096) == disk.read(8 * MiB, 4096) == PATTERN
    assert blocklib.check("disk.qcow2").clean


@needs_fork
def test_what_hangs_on_a_disk_raises_in_the_child_too() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2") as disk, jobs.convert(disk, "copy.img", format="raw") as job:
        extents, file = disk.extents(), disk.as_file()
        assert in_child(lambda: next(extents)) == "ClosedError"
        assert in_child(lambda: file.read(1)) == "ClosedError"
        assert in_child(lambda: job.wait()) == "ClosedError"
        assert in_child(lambda: blocklib.open("disk.qcow2", backing=disk)) == "ClosedError"
        job.wait()


@needs_fork
def test_the_parents_lock_survives_the_end_of_the_child() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with blocklib.open("disk.qcow2", "r+") as disk:
        assert in_child(disk.close) == "None"
        with pytest.raises(blocklib.LockedError):
            blocklib.open("disk.qcow2", "r+")


@needs_fork
def test_the_child_of_a_fork_can_open_a_disk_whatever_other_threads_were_doing() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    busy, done = threading.Event(), threading.Event()

    def hold() -> None:
        while not done.is_set():
            with graph.lock:
                busy.set()

    def read_it() -> bytes:
        with blocklib.open("disk.qcow2") as disk:
            return disk.read(0, 4)

    with blocklib.open("disk.qcow2"):
        thread = threading.Thread(target=hold)
        thread.start()
        busy.wait()
        answers = [in_child(read_it) for _ in range(10)]
        done.set()
        thread.join()
    assert answers == [repr(PATTERN[:4])] * 10


@needs_fork
def test_memory_for_direct_io_is_not_shared_with_the_child() -> None:
    buffer = aligned_pool.take()
    buffer[:4] = b"ours"
    aligned_pool.give(buffer)

    def overwrite() -> bytes:
        theirs = aligned_pool.take()
        theirs[:4] = b"mine"
        return bytes(theirs[:4])

    assert in_child(overwrite) == repr(b"mine")
    assert bytes(buffer[:4]) == b"ours"


# -- the end -----------------------------------------------------------------------------------------------------------


def _lose_a_disk() -> int:
    """Opens a disk, writes and drops it; the line where it was opened."""
    disk = blocklib.open("disk.qcow2", "r+")
    line = sys._getframe().f_lineno - 1
    disk.write(8 * MiB, PATTERN)
    disk.write(0, b"in place")
    del disk
    gc.collect()
    return line


def test_a_collected_disk_warns_where_it_was_opened_and_writes_nothing(qemu_img: Program) -> None:
    make_disk("disk.qcow2", 64 * MiB)
    header = Path("disk.qcow2").read_bytes()[: 256 * KiB]
    with pytest.warns(ResourceWarning, match="was not closed") as caught:
        line = _lose_a_disk()
    (warning,) = caught
    assert f"{__file__}:{line} " in str(warning.message)
    assert Path("disk.qcow2").read_bytes()[: 256 * KiB] == header  # all tables, as they were
    with blocklib.open("disk.qcow2", "r+") as disk:  # and nothing is locked
        assert disk.read(8 * MiB, 4096) == bytes(4096)
    qemu_img("check", "disk.qcow2")


def test_a_collected_disk_lets_go_even_where_warnings_are_errors() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    code = (
        "import sys, gc, blocklib\n"
        "sys.unraisablehook = lambda what: print(type(what.exc_value).__name__)\n"
        "disk = blocklib.open('disk.qcow2', 'r+')\n"
        "del disk; gc.collect()\n"
        "blocklib.open('disk.qcow2', 'r+').close()\n"
    )
    assert _python("-W", "error", "-c", code).stdout == "ResourceWarning\n"


def test_a_disk_alive_at_exit_warns_and_writes_nothing() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    header = Path("disk.qcow2").read_bytes()[: 256 * KiB]
    code = "import blocklib\ndisk = blocklib.open('disk.qcow2', 'r+')\ndisk.write(8 << 20, b'lost')\n"
    Path("script.py").write_text(code)
    done = _python("-W", "default", "script.py")
    assert "ResourceWarning: a disk opened at " in done.stderr
    assert "script.py:2 was not closed" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path("disk.qcow2").read_bytes()[: 256 * KiB] == header


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


class BodyError(Exception):
    """What a `with` body of these tests raises."""


def _failing_sync(_fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_failing_close_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk("disk.qcow2", 64 * MiB)
    disk = blocklib.open("disk.qcow2", "r+")
    with monkeypatch.context() as broken:
        with pytest.raises(blocklib.StorageError) as caught:
            with disk:
                disk.write(8 * MiB, PATTERN)
                broken.setattr(os, "fdatasync", _failing_sync)
    assert (caught.value.errno, caught.value.operation, caught.value.filename) == (errno.EIO, "fdatasync", "disk.qcow2")
    assert disk.closed
    blocklib.open("disk.qcow2", "r+").close()  # its file was closed all the same


def test_a_failing_close_is_a_note_on_what_the_body_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with pytest.raises(BodyError) as caught:
        with blocklib.open("disk.qcow2", "r+") as disk:
            disk.write(8 * MiB, PATTERN)
            monkeypatch.setattr(os, "fdatasync", _failing_sync)
            raise BodyError
    (note,) = caught.value.__notes__
    assert "closing" in note
    assert "fdatasync failed" in note
    assert disk.closed


def test_a_body_that_raises_leaves_what_was_written(qemu_img: Program) -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with pytest.raises(BodyError) as caught:
        with blocklib.open("disk.qcow2", "r+") as disk:
            disk.write(8 * MiB, PATTERN)
            raise BodyError
    assert not hasattr(caught.value, "__notes__")
    with blocklib.open("disk.qcow2") as disk:
        assert disk.read(8 * MiB, 4096) == PATTERN
    qemu_img("check", "disk.qcow2")


def test_a_disk_that_was_only_read_is_not_written() -> None:
    make_raw("disk.img", 1 * MiB)
    before = Path("disk.img").stat().st_mtime_ns
    with blocklib.open("disk.img", "r+", format="raw") as disk:
        disk.read(0, 1 * MiB)
    assert Path("disk.img").stat().st_mtime_ns == before
