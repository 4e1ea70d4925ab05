"""mirror: copy a disk in use to another place, keep the copy equal, and let the disk become the copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from blocklib import graph
from blocklib.disk import Disk
from blocklib.errors import UsageError
from blocklib.jobs.control import Task
from blocklib.jobs.convergence import DEFAULT_GRANULARITY, Convergence
from blocklib.jobs.copy_target import BitmapMode, CopyTarget, Marks, Sync
from blocklib.jobs.dirty_copy import ErrorPolicy, check_policy
from blocklib.jobs.job import Job, started
from blocklib.records import Record
from blocklib.reports import MirrorResult
from blocklib.sizes import MiB

if TYPE_CHECKING:
    from blocklib.jobs.control import Control, ProgressCallback
    from blocklib.options import OptionValue
    from blocklib.policy import Target


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
    replaces: str | None = None,
    granularity: int | None = None,
    buf_size: int | None = None,
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
    - `replaces`: the name of the node that the copy takes the place of on `complete`: by default the top image, which keeps
      the filters above it; the name of one of these, and it goes, with what is between it and the image.
    - `granularity`: bytes that are copied again when one of them is written, a power of two.  `buf_size`: bytes that are on
      their way together at most, no fewer than the granularity.  `unmap`: give back zeroes.
    - `on_source_error`, `on_target_error`: see `ErrorPolicy`.

    Raises UsageError, OptionError, NameNotFoundError (`replaces`), GraphConflictError (another job changes this chain),
    OutOfRangeError (the target is too small), and what opening and making the target raise.
    """
    check_policy("on_source_error", on_source_error)
    check_policy("on_target_error", on_target_error)
    if copy_mode not in ("background", "write-blocking"):
        raise UsageError(f"copy_mode is 'background' or 'write-blocking', not {copy_mode!r}")
    if sync not in get_args(Sync):
        raise UsageError(f"sync is one of {', '.join(get_args(Sync))}, not {sync!r}")
    if granularity is not None and (granularity & (granularity - 1) or not 512 <= granularity <= 64 * MiB):
        raise UsageError(f"a granularity is a power of two from 512 bytes to 64 MiB, not {granularity}")
    least = granularity or DEFAULT_GRANULARITY
    if buf_size is not None and buf_size < least:
        raise UsageError(f"buf_size is at least the granularity, {least} bytes, not {buf_size}")
    marks = Marks(disk, sync, bitmap, bitmap_mode)
    end = CopyTarget(disk, target, sync, format, options or {}, existing=existing, overwrite=overwrite, replaces=replaces)
    marks.copied_to(end)
    task = _Mirror(
        disk,
        end,
        marks,
        copy_mode == "write-blocking",
        granularity,
        buf_size,
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
    granularity: int | None
    buf_size: int | None
    unmap: bool
    policies: tuple[ErrorPolicy, ErrorPolicy]

    def claim(self) -> None:
        top = self.disk.node
        self._claim = graph.Claim(self.verb, graph.chain(top))
        self._work = Convergence(
            self.verb,
            top,
            self.end,
            self.marks,
            self.policies,
            blocking=self.blocking,
            granularity=self.granularity,
            in_flight=self.buf_size,
            unmap=self.unmap,
        )

    def run(self, control: Control) -> MirrorResult:
        return MirrorResult(*self._work.run(control))

    def finalize(self, control: Control, result: MirrorResult) -> MirrorResult:
        copied = self._work.finalize(control, pivots=result.pivoted)
        self._claim.release()
        return MirrorResult(result.bytes_copied + copied, result.pivoted)

    def abort(self) -> None:
        try:
            self._work.abort()
        finally:
            self._claim.release()
