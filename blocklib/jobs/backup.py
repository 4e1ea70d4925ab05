"""backup: copy a disk in use as it is at one instant, while its writers go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Literal, cast, get_args

from blocklib import drivers, graph
from blocklib.errors import OutOfRangeError, UsageError
from blocklib.jobs.block_copy import Compression
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.copy_target import BitmapMode, CopyTarget, Marks, Sync
from blocklib.jobs.dirty_copy import CopiedImage, DirtyCopy, EdgeWriter, ErrorPolicy, Errors, Placement, check_policy
from blocklib.jobs.job import Job
from blocklib.node import check_level
from blocklib.records import Record
from blocklib.reports import BackupResult
from blocklib.transactions import DiskTransaction

if TYPE_CHECKING:
    from blocklib.copy import CopyState
    from blocklib.disk import Disk
    from blocklib.filters.copy_before_write import CopyBeforeWriteNode
    from blocklib.node import Node
    from blocklib.options import OptionValue
    from blocklib.policy import Target

_IDLE_SECONDS: Final = 0.1


def backup(
    disk: Disk,
    target: Disk | Target,
    *,
    format: str | None = None,
    existing: bool = False,
    overwrite: bool = False,
    options: Mapping[str, OptionValue] | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    compress: Literal["zlib", "zstd"] | None = None,
    compress_level: int | None = None,
    sync: Sync = "full",
    bitmap: str | None = None,
    bitmap_mode: BitmapMode | None = None,
    on_source_error: ErrorPolicy = "report",
    on_target_error: ErrorPolicy = "report",
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
    transaction: DiskTransaction | None = None,
) -> Job[BackupResult]:
    """Copy `disk` to `target` as it is when this returns; what is about to be overwritten later is copied first.

    With `transaction` it is copied as it is at the instant of that, for all of its disks, and the job starts then.

    - `target`, `sync` and `bitmap` are as for `mirror`.  With ``sync="none"`` only what is about to be overwritten is copied,
      over the disk as backing file; the job is ready at once, and `complete` or `cancel` ends it.
    - `backing`, `backing_format`: the image that an incremental backup is over, as it is to be stored.
    - `compress`, `compress_level`: store compressed clusters, as `convert` does.
    - `on_cbw_error`: where the target fails a write of the disk that has to be copied first, that write fails, or the job does.

    Raises UsageError, OptionError, GraphConflictError, OutOfRangeError, and what opening and making the target raise.
    """
    check_policy("on_source_error", on_source_error)
    check_policy("on_target_error", on_target_error)
    if on_cbw_error not in ("break-guest-write", "break-snapshot"):
        raise UsageError(f"on_cbw_error is 'break-guest-write' or 'break-snapshot', not {on_cbw_error!r}")
    if sync not in get_args(Sync):
        raise UsageError(f"sync is one of {', '.join(get_args(Sync))}, not {sync!r}")
    if compress is None and compress_level is not None:
        raise UsageError("compress_level needs compress")
    if compress is not None:
        check_level(compress, compress_level)
    marks = Marks(disk, sync, bitmap, bitmap_mode)
    end = CopyTarget(
        disk,
        target,
        sync,
        format,
        options or {},
        existing=existing,
        overwrite=overwrite,
        backing=backing,
        backing_format=backing_format,
        compress=compress,
    )
    marks.copied_to(end)
    policies = on_source_error, on_target_error
    task = _Backup(disk, end, marks, sync, compress is not None, compress_level, policies, on_cbw_error == "break-snapshot")
    job = Job(
        task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress, held=True
    )
    started = _Started(task, job)
    if transaction is None:
        with DiskTransaction() as alone:
            alone.add(started)
        return job
    try:
        transaction.add(started)
    except BaseException:
        started.abort()
        raise
    return job


class _Backup(Record, Task[BackupResult], frozen=False):
    verb: ClassVar[str] = "backup"

    disk: Disk
    end: CopyTarget
    marks: Marks
    sync: Sync
    compressed: bool
    level: int | None
    policies: tuple[ErrorPolicy, ErrorPolicy]
    breaks_snapshot: bool

    def __post_init__(self) -> None:
        self._top = self.disk.node
        self._opened: Disk | None = None
        self._filter: CopyBeforeWriteNode | None = None
        self._source: CopiedImage | None = None
        self._placement: Placement | None = None

    def claim(self) -> None:
        self._claim = graph.Claim(self.verb, [self._top])

    # -- the parts of it that belong to a transaction ------------------------------------------------------------------

    @property
    def top(self) -> Node:
        return self._top

    def prepare(self) -> None:
        """Open or make the target."""
        target = self._opened = self.end.open(self._top.size)
        if target.size < self._top.size:
            raise OutOfRangeError(f"the target has {target.size} bytes, the disk {self._top.size}")
        if self.compressed:
            target.node.compressor(self.level)  # raises where there is none

    def begin(self) -> None:
        """The instant: from now on what is about to change is copied first.  The disk is drained."""
        top = self._top
        assert self._opened is not None
        self._source = CopiedImage(top, self.verb)
        kind = cast("type[CopyBeforeWriteNode]", drivers.load("copy-before-write"))
        filter = kind(
            None, top.filename, read_only=top.read_only, breaks_snapshot=self.breaks_snapshot, job=self.verb
        )
        self._placement = Placement(filter, top, self._opened)
        self._filter = filter
        try:
            self.marks.begin(filter.state)
            self.marks.mark(filter.state)
        except BaseException:
            self.undo()
            raise
        if self.sync == "none":
            filter.state.mark(0, top.size)

    def undo(self) -> None:
        """As if it had not begun; the disk is drained.  `abort` does the rest."""
        placement, self._placement = self._placement, None
        if placement is not None:
            placement.take_away()

    def _leave(self) -> None:
        """Let the writers go their own way again."""
        if self._placement is not None:
            with graph.alone(self._top):
                self.undo()
        source, self._source = self._source, None
        if source is not None:
            source.release()

    # -- the job ------------------------------------------------------------------------------------------------------

    def run(self, control: Control) -> BackupResult:
        assert self._filter is not None
        state, source, target = self._filter.state, self._source, self._opened
        assert source is not None
        assert target is not None
        errors = Errors(control, *self.policies)
        writer = EdgeWriter(self._filter.target)
        copied = 0
        while True:
            copied += self._copy(control, errors, state, source, writer)
            rest = DirtyCopy(control, state, source, writer, unit=state.granularity)
            is_done = errors.attempt(partial(self._complete, rest, target))
            copied += rest.bytes_read
            if is_done:
                break
        self._leave()
        return BackupResult(bytes_copied=copied)

    def _complete(self, rest: DirtyCopy, target: Disk) -> None:
        """The end of the work: from now on nobody copies anything first."""
        with graph.alone(self._top):
            if self.sync != "none":
                rest.finish()  # what a writer was to copy first, and could not, is still as it was
            self._raise_failures()
            target.flush()
            self.undo()

    def finalize(self, control: Control, result: BackupResult) -> BackupResult:
        """The target is what it was to be: keep it, and let the bitmap know."""
        assert self._filter is not None
        self.end.close()
        self.marks.end(self._filter.state, succeeded=True)
        self._claim.release()
        return result

    def _copy(self, control: Control, errors: Errors, state: CopyState, source: CopiedImage, target: EdgeWriter) -> int:
        assert self._opened is not None
        compression = None
        if self.compressed:
            compression = Compression(self._opened.node.compressor(self.level), target.write_packed)
        done = copied = 0
        with control.changed:
            if self.sync == "none" and "ready" not in control.reached:
                control.become("ready")
        while True:
            control.pause_point()
            self._raise_failures()
            left = state.count()
            if self.sync == "none":
                with control.changed:
                    if control.completing or control.keeping:
                        return copied
                    control.clock.wait(control.changed, _IDLE_SECONDS)
                continue
            if not left:
                return copied
            control.set_total(done + left)
            copy = DirtyCopy(
                control,
                state,
                source,
                target,
                block=state.granularity if self.end.is_zero else 0,
                zero_known=self.end.is_zero,
                unit=state.granularity,
                compression=compression,
            )
            errors.attempt(copy.sweep)
            done += copy.bytes_done
            copied += copy.bytes_read

    def _raise_failures(self) -> None:
        if self._filter is not None and self._filter.failure is not None:
            raise self._filter.failure

    def abort(self) -> None:
        with ExitStack() as stack:  # all of it, in reverse order, whatever fails
            stack.callback(self._claim.release)
            stack.callback(self.end.remove)
            stack.callback(self.end.close)
            if self._filter is not None:
                stack.callback(self.marks.end, self._filter.state, succeeded=False)
            stack.callback(self._leave)


class _Started:
    """A backup that begins with the other changes of a transaction."""

    def __init__(self, task: _Backup, job: Job[BackupResult]) -> None:
        self._task = task
        self._job = job
        self.node = task.top

    def prepare(self) -> None:
        self._task.prepare()

    def begin(self) -> None:
        self._task.begin()

    def undo(self) -> None:
        self._task.undo()

    def finish(self) -> None:
        self._job.release()

    def abort(self) -> None:
        self._job.drop()
