"""check and repair: is an image consistent, and what would make it so?  The work is the format's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias, get_args

from blocklib import graph
from blocklib.disk import Disk
from blocklib.errors import ReadOnlyError, UsageError
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.job import Job, started
from blocklib.opening import open_metadata
from blocklib.records import Record
from blocklib.reports import CheckReport, RepairReport

if TYPE_CHECKING:
    from blocklib.node import Node
    from blocklib.policy import Target

RepairWhat: TypeAlias = Literal["leaks", "all"]


@started
def check(
    target: Disk | Target,
    *,
    format: str | None = None,
    force_share: bool = False,
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[CheckReport]:
    """Follow every reference of an image and compare with what it counts; changes nothing.

    Damage is what the report is for, and no error.  Opens no file but `target`.  Raises UnsupportedFeatureError for a
    format that cannot be checked.
    """
    task = _Check(target, format, force_share)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


@started
def repair(
    target: Disk | Target,
    what: RepairWhat,
    *,
    format: str | None = None,
    dry_run: bool = False,
    expect: RepairReport | None = None,
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[RepairReport]:
    """Repair an image: its "leaks", or "all" that ``qemu-img check -r all`` repairs.

    With `dry_run` nothing changes, and the steps say what would be done.  With `expect`, the report of a dry run, exactly
    that is done, or nothing (StalePlanError).  Raises what `check` does, ReadOnlyError, LockedError.
    """
    if what not in get_args(RepairWhat):
        raise UsageError(f"what to repair is 'leaks' or 'all', not {what!r}")
    task = _Repair(target, what, format, dry_run, expect)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Check(Record, Task[CheckReport]):
    verb: ClassVar[str] = "check"

    target: Disk | Target
    format: str | None
    force_share: bool

    def run(self, control: Control) -> CheckReport:
        with _at_rest(self.target, "r", self.format, force_share=self.force_share) as node:
            return node.check(_progress(control))


class _Repair(Record, Task[RepairReport]):
    verb: ClassVar[str] = "repair"

    target: Disk | Target
    what: RepairWhat
    format: str | None
    dry_run: bool
    expect: RepairReport | None

    def run(self, control: Control) -> RepairReport:
        with _at_rest(self.target, "r" if self.dry_run else "r+", self.format) as node:
            return node.repair(self.what, dry_run=self.dry_run, expect=self.expect, progress=_progress(control))


@contextmanager
def _at_rest(
    target: Disk | Target, mode: Literal["r", "r+"], format: str | None, *, force_share: bool = False
) -> Iterator[Node]:
    """The top node of `target`, with no request inside and nothing of it only in memory."""
    if not isinstance(target, Disk):
        with open_metadata(target, mode, format=format, force_share=force_share) as disk:
            yield disk.node
        return
    node = target.node
    if mode == "r+" and node.read_only:
        raise ReadOnlyError(f"{node.filename or node.name}: opened for reading; mode 'r+' repairs", node=node.name)
    with graph.alone(node):
        node.flush()
        yield node


def _progress(control: Control) -> Callable[[int, int], object]:
    """What tells a job how far a check is; where it tells, the job may also pause or end."""
    before = 0

    def tell(done: int, total: int) -> None:
        nonlocal before
        control.set_total(total)
        control.advance(done - before)
        before = done
        control.pause_point()

    return tell
