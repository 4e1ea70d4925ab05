"""mirror: copy a disk in use to another place, keep the copy equal, and let the disk become the copy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Literal, get_args

from blocklib import graph
from blocklib.copy import CopyState
from blocklib.disk import Disk
from blocklib.errors import BlocklibError, OutOfRangeError, UsageError
from blocklib.jobs.control import Task
from blocklib.jobs.copy_target import BitmapMode, CopyTarget, Marks, Sync
from blocklib.jobs.dirty_copy import CopiedImage, DirtyCopy, ErrorPolicy, Errors, Placement, check_policy
from blocklib.jobs.job import Job, started
from blocklib.jobs.tops import MirrorTop
from blocklib.records import Record
from blocklib.reports import MirrorResult
from blocklib.sizes import KiB, MiB

if TYPE_CHECKING:
    from blocklib.jobs.control import Control, ProgressCallback
    from blocklib.options import OptionValue
    from blocklib.policy import Target


_DEFAULT_GRANULARITY: Final = 64 * KiB
_SMALL_REST: Final = 16 * MiB
"""What may be left to copy while nobody can write: with no more than that, a job is ready."""
_IDLE_SECONDS: Final = 0.1


@started
def mirror(
    disk: Disk,
    target: Disk | Target,
    *,
    format: str | None = None,
    existing: bool = False,
    overwrite: bool = False,
    options: Mapping[str, OptionValue] | None = None,
    sync: Sync = "full",
    bitmap: str | None = None,
    bitmap_mode: BitmapMode | None = None,
    copy_mode: Literal["background", "write-blocking"] = "background",
    granularity: int | None = None,
    unmap: bool = True,
    on_source_error: ErrorPolicy = "report",
    on_target_error: ErrorPolicy = "report",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[MirrorResult]:
    """Copy `disk`, which may be written meanwhile, to `target`, and keep both equal once the job is ready.

    `complete` of a job that is ready makes the disk continue on the copy: the Disk object stays, its images are others.
    `cancel` of one that is ready, without `force`, ends it with a target that is the disk of that moment.

    - `target`: a path where an image of `format` is made with creation `options` (ImageExistsError if there is one, unless
      `overwrite`); with `existing`, what is there, as large as the disk or larger; a URL; options; or an open Disk.
    - `sync`: "full" copies the whole chain into one image; "top" what the top image holds, over the same backing file;
      "none" only what is written from now on; "incremental" and "bitmap" what the bitmap of the top image marks, which
      afterwards is as `bitmap_mode` says: "on-success" (always so for incremental) begins anew if the job succeeds, "never"
      is as before, "always" begins anew for what was copied even if the job fails.
    - `copy_mode`: "background" copies what is written afterwards; "write-blocking" before the write returns, so that the job
      becomes ready under any writer.
    - `granularity`: bytes that are copied again when one of them is written, a power of two.  `unmap`: give back zeroes.
    - `on_source_error`, `on_target_error`: see `ErrorPolicy`.

    Raises UsageError, OptionError, GraphConflictError (another job changes this chain), OutOfRangeError (the target is too
    small), and what opening and making the target raise.
    """
    check_policy("on_source_error", on_source_error)
    check_policy("on_target_error", on_target_error)
    if copy_mode not in ("background", "write-blocking"):
        raise UsageError(f"copy_mode is 'background' or 'write-blocking', not {copy_mode!r}")
    if sync not in get_args(Sync):
        raise UsageError(f"sync is one of {', '.join(get_args(Sync))}, not {sync!r}")
    if granularity is not None and (granularity & (granularity - 1) or not 512 <= granularity <= 64 * MiB):
        raise UsageError(f"a granularity is a power of two from 512 bytes to 64 MiB, not {granularity}")
    marks = Marks(disk, sync, bitmap, bitmap_mode)
    end = CopyTarget(disk, target, sync, format, options or {}, existing=existing, overwrite=overwrite)
    task = _Mirror(
        disk,
        end,
        marks,
        copy_mode == "write-blocking",
        granularity or _DEFAULT_GRANULARITY,
        unmap,
        (on_source_error, on_target_error),
    )
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Mirror(Record, Task[MirrorResult], frozen=False):
    verb: ClassVar[str] = "mirror"

    disk: Disk
    end: CopyTarget
    marks: Marks
    blocking: bool
    granularity: int
    unmap: bool
    policies: tuple[ErrorPolicy, ErrorPolicy]

    def __post_init__(self) -> None:
        self._top = self.disk.node
        self._failures: list[BlocklibError] = []
        self._state: CopyState | None = None
        self._source: CopiedImage | None = None
        self._placement: Placement | None = None

    def claim(self) -> None:
        self._claim = graph.Claim(self.verb, graph.chain(self._top))

    def run(self, control: Control) -> MirrorResult:
        """Copy until little is left and the end was asked for."""
        target = self.end.open(self._top.size)
        if target.size < self._top.size:
            raise OutOfRangeError(f"the target has {target.size} bytes, the disk {self._top.size}")
        # A cluster of a target over a backing file, which is not open, is copied as a whole or not at all.
        unit = (target.node.cluster_size() or 1) if self.end.has_backing else 1
        state = self._state = CopyState(self._top.size, max(self.granularity, unit))
        source = self._source = CopiedImage(self._top, "mirror")
        self._begin(control, state, source, target)
        self.marks.mark(state)
        self._target = target
        return self._copy(control, state, source, target)

    def _begin(self, control: Control, state: CopyState, source: CopiedImage, target: Disk) -> None:
        """From now on what is written is marked, or copied."""
        top = self._top
        around = DirtyCopy(control, state, source, target, unmap=self.unmap)
        self._filter = MirrorTop(
            top.filename,
            state,
            read_only=top.read_only,
            target=target if self.blocking and not self.end.has_backing else None,
            copy=around.copy_around if self.blocking and self.end.has_backing else None,
            failed=self._failures.append,
        )
        with graph.alone(top):
            self._placement = Placement(self._filter, top)
            self.marks.begin(state)

    def _copy(self, control: Control, state: CopyState, source: CopiedImage, target: Disk) -> MirrorResult:
        errors = Errors(control, *self.policies)
        # A writer of ours may have put something there already.
        zero_known = self.end.is_zero and not self.blocking
        done = copied = 0
        swept = False
        while True:
            left = state.count()
            with control.changed:
                ready = control.status == "ready"
                if not ready and left <= (_SMALL_REST if swept else 0):
                    control.become("ready")
                    ready = True
                ending = ready and (control.completing or control.keeping)
            if ending and left <= _SMALL_REST:
                # Here an error may still stop the job, or make it try again; in `finalize` it is too late for that.
                rest = DirtyCopy(control, state, source, target, unmap=self.unmap)
                if errors.attempt(partial(self._equal, rest, target)):
                    return MirrorResult(bytes_copied=copied + rest.bytes_read, pivoted=control.completing)
                copied += rest.bytes_read
                control.pause_point()
                continue
            control.set_total(done + left)
            if left:
                block = self.granularity if zero_known else 0
                copy = DirtyCopy(control, state, source, target, block=block, zero_known=zero_known, unmap=self.unmap)
                swept = errors.attempt(copy.sweep) or swept
                done += copy.bytes_done
                copied += copy.bytes_read
                zero_known = False  # what is copied again may have been something else before
            else:
                control.pause_point()
                state.wait_for_marks(_IDLE_SECONDS)
            self._raise_failures(errors)

    def _equal(self, rest: DirtyCopy, target: Disk) -> None:
        """Make both equal for a moment, in which nobody writes."""
        with graph.alone(self._top):
            rest.finish()
            target.flush()

    def _raise_failures(self, errors: Errors) -> None:
        while self._failures:
            failure = self._failures.pop()

            def fail(failure: BlocklibError = failure) -> None:
                raise failure

            errors.attempt(fail)

    def finalize(self, control: Control, result: MirrorResult) -> MirrorResult:
        """Copy what was written since, and end in the same moment."""
        state, source, target = self._state, self._source, self._target
        assert state is not None
        assert source is not None
        while state.count() > _SMALL_REST:
            DirtyCopy(control, state, source, target, unmap=self.unmap).sweep()
        rest = DirtyCopy(control, state, source, target, unmap=self.unmap)
        with graph.alone(self._top):
            if state.any():
                rest.finish()
                target.flush()
            if result.pivoted:
                self.end.become(self._filter)
            self._take_away()
        self._forget_source()
        self.marks.end(state, succeeded=True)
        self._claim.release()
        self.end.close()
        return MirrorResult(bytes_copied=result.bytes_copied + rest.bytes_read, pivoted=result.pivoted)

    def _take_away(self) -> None:
        placement, self._placement = self._placement, None
        if placement is not None:
            placement.take_away()

    def _forget_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with graph.Transaction() as change:
                change.detach(source.edge)

    def abort(self) -> None:
        with ExitStack() as stack:  # all of it, in reverse order, whatever fails
            stack.callback(self._claim.release)
            stack.callback(self.end.remove)
            stack.callback(self.end.close)
            if self._state is not None:
                stack.callback(self.marks.end, self._state, succeeded=False)
            stack.callback(self._forget_source)
            if self._placement is not None:
                stack.enter_context(graph.alone(self._top))
                stack.callback(self._take_away)
