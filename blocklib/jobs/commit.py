"""commit: copy what images of a chain hold down into one below them; of disks in use see `live_commit`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from blocklib import graph
from blocklib.disk import Disk
from blocklib.errors import UsageError
from blocklib.jobs.block_copy import BlockCopy
from blocklib.jobs.chain_images import Image, WrittenImage, check_changeable, node_below
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.dirty_copy import ErrorPolicy, check_policy
from blocklib.jobs.ends import Source, image_below, images_below, is_image, opened
from blocklib.jobs.job import Job, started
from blocklib.jobs.live_commit import VERB, ActiveCommit, IntermediateCommit
from blocklib.jobs.runs import COMPARE, SKIP, ZERO, Run, coalesced
from blocklib.records import Record
from blocklib.reports import CommitResult, NodeInfo

if TYPE_CHECKING:
    from blocklib.policy import References, Target


@started
def commit(
    target: Disk | Target,
    *,
    base: Image | None = None,
    top: Image | None = None,
    backing_file: str | None = None,
    empty: bool | None = None,
    format: str | None = None,
    references: References = "deny",
    on_source_error: ErrorPolicy = "report",
    on_target_error: ErrorPolicy = "report",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[CommitResult]:
    """Copy what images of a chain hold down into one below them, `base`, which is written for that and grows if it is shorter.

    An open Disk may be in use meanwhile, and the images that were copied leave its chain; they are no longer valid on their
    own.  `base` and `top` are images of ``disk.chain()`` or file names; without `base` everything goes into the last image.

    - Without `top` the top image is committed, too.  Once the base is equal to the disk, and is kept so, the job is ready:
      `complete` makes the disk continue on the base, as large as that is, and `cancel` without `force` ends with the chain
      as it was, over a base that is a copy of that moment.  (``blocklib.commit`` completes.)
    - With `top`, an image below that, the job ends by itself, and the image above `top` is over the base then.
      `backing_file` is the name to be stored there, by default the one by which the chain names the base.
    - `on_source_error`, `on_target_error`: see `ErrorPolicy`.

    A `target` that is opened here, or a Disk where `empty` is given, keeps its chain, which nobody else may write to: as
    ``qemu-img commit`` does it.  What it holds goes into its backing file, and it is emptied unless `empty` is False.  With
    `base`, an image further down, everything above goes there, and nothing is emptied: images in between are no longer valid
    on their own, while `target` still is.  A `target` that is opened here needs `references` to open its chain.

    When it is cancelled, part of the data is in the base as well, and the disk reads as before.

    Raises UsageError (no backing file), NameNotFoundError (an image that is not in the chain), GraphConflictError (another
    job changes the chain, or somebody else uses the base), ReadOnlyError, LockedError, StorageError.
    """
    check_policy("on_source_error", on_source_error)
    check_policy("on_target_error", on_target_error)
    task: Task[CommitResult]
    if isinstance(target, Disk) and empty is None:
        task = _live(target, base, top, backing_file, (on_source_error, on_target_error))
    else:
        if top is not None or backing_file is not None or {on_source_error, on_target_error} != {"report"}:
            raise UsageError("top, backing_file, on_source_error and on_target_error are for an open disk, without empty")
        task = _Commit(target, base, empty is not False and base is None, format, references)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


def _live(
    disk: Disk, base: Image | None, top: Image | None, backing_file: str | None, policies: tuple[ErrorPolicy, ErrorPolicy]
) -> ActiveCommit | IntermediateCommit:
    check_changeable(disk)
    node = node_below(disk, images_below(disk)[-1] if base is None else base)
    if top is None or is_image(disk.chain()[0], top):
        if backing_file is not None:
            raise UsageError("backing_file is the name that the image above top is to store, and there is none above it")
        return ActiveCommit(disk, node, policies)
    above = node_below(disk, top)
    if node not in graph.chain(above)[1:]:
        name, over = (image.filename or image.name for image in (node, above))
        raise UsageError(f"{name}: a base is below the top, and that is not below {over}", node=node.name)
    return IntermediateCommit(disk, above, node, backing_file, policies)


class _Commit(Record, Task[CommitResult]):
    verb: ClassVar[str] = VERB

    target: Disk | Target
    base: Image | None
    empty: bool
    format: str | None
    references: References

    def run(self, control: Control) -> CommitResult:
        mode: Literal["r", "r+"] = "r+" if self.empty else "r"
        with opened(self.target, mode, format=self.format, references=self.references) as top:
            base = images_below(top)[0] if self.base is None else image_below(top, self.base)
            node = next(node for node in graph.chain(top.node) if node.name == base.name)
            control.set_total(top.size)
            with WrittenImage(self.verb, top.node, node) as written:
                copied = self._copy(control, top, base, written)
        return CommitResult(bytes_copied=copied, base=base.filename)

    def _copy(self, control: Control, top: Disk, base: NodeInfo, written: WrittenImage) -> int:
        old_size = written.size
        written.grow_to(top.size)
        source = Source(top, base)
        copy = BlockCopy(control, source, written, unit=written.node.data_unit() or 1)
        copy.run(coalesced(_zeroed_below(source.runs_above(absent=SKIP, absent_zero=COMPARE), old_size)))
        written.flush()
        if self.empty:
            with graph.alone(top.node):
                top.node.make_empty()
        return copy.bytes_written


def _zeroed_below(runs: Iterable[Run], old_size: int) -> Iterator[Run]:
    """The same runs, where zeroes that the end of an image in between makes are written over what the base has there."""
    for offset, length, what in runs:
        if what != COMPARE:
            yield offset, length, what
            continue
        inside = max(0, min(length, old_size - offset))
        yield offset, inside, ZERO
        yield offset + inside, length - inside, SKIP
