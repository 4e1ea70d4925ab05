"""commit: copy what an overlay holds down into an image of its backing chain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

from blocklib import graph, plan
from blocklib.jobs.block_copy import BlockCopy
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.ends import Source, image_below, images_below, opened
from blocklib.jobs.job import Job, started
from blocklib.jobs.runs import COMPARE, SKIP, ZERO, Run, coalesced
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED
from blocklib.records import Record
from blocklib.reports import CommitResult, NodeInfo
from blocklib.requests import RequestTracker

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.node import Node
    from blocklib.policy import References, Target


@started
def commit(
    target: Disk | Target,
    *,
    base: NodeInfo | str | os.PathLike[str] | None = None,
    empty: bool = True,
    format: str | None = None,
    references: References = "deny",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[CommitResult]:
    """Copy what `target` holds into its backing file, which is reopened writable for that and grows if it is shorter.

    Afterwards `target` is emptied, unless `empty` is False: the backing file shows through with the same content.  With
    `base`, an image further down the chain (of ``disk.chain()``, or a file name), everything above it goes there, and
    nothing is emptied: images in between are no longer valid on their own, while `target` still is.

    A `target` that is opened here needs `references` to open its chain.  Nobody else may write to the chain meanwhile.
    When it is cancelled, part of the data is in both images and `target` reads as before.

    Raises UsageError (no backing file), NameNotFoundError (`base` is not in the chain), LockedError, StorageError.
    """
    task = _Commit(target, base, empty and base is None, format, references)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Commit(Record, Task[CommitResult]):
    verb: ClassVar[str] = "commit"

    target: Disk | Target
    base: NodeInfo | str | os.PathLike[str] | None
    empty: bool
    format: str | None
    references: References

    def run(self, control: Control) -> CommitResult:
        mode: Literal["r", "r+"] = "r+" if self.empty else "r"
        with opened(self.target, mode, format=self.format, references=self.references) as top:
            base = images_below(top)[0] if self.base is None else image_below(top, self.base)
            node = next(node for node in graph.chain(top.node) if node.name == base.name)
            control.set_total(top.size)
            with _writable(top, node) as edge:
                old_size = node.size
                if old_size < top.size:
                    with graph.drained(top.node), graph.alone(node):
                        edge.truncate(top.size)
                source = Source(top, base)
                copy = BlockCopy(control, source, _Writer(edge), unit=node.data_unit() or 1)
                runs = source.runs_above(absent=SKIP, absent_zero=COMPARE)
                copy.run(coalesced(_zeroed_below(runs, old_size)))
                edge.flush()
                if self.empty:
                    with graph.alone(top.node):
                        top.node.make_empty()
        return CommitResult(bytes_copied=copy.bytes_written, base=base.filename)


def _zeroed_below(runs: Iterable[Run], old_size: int) -> Iterator[Run]:
    """The same runs, where zeroes that the end of an image in between makes are written over what the base has there."""
    for offset, length, what in runs:
        if what != COMPARE:
            yield offset, length, what
            continue
        inside = max(0, min(length, old_size - offset))
        yield offset, inside, ZERO
        yield offset + inside, length - inside, SKIP


@contextmanager
def _writable(top: Disk, base: Node) -> Iterator[graph.Edge]:
    """An edge that may write and resize `base`, an image below `top`, for as long as the block lasts."""
    was_read_only = base.read_only
    # An image that is written wants what is below it to stand still, but these writes change nothing that it reads as.
    users = {edge: edge.shared for edge in graph.roots_above(top.node)}
    with graph.drained(top.node, base), graph.Transaction() as change:
        for user, shared in users.items():
            change.set_permissions(user, wanted=user.wanted, shared=shared | WRITE | RESIZE)
        change.reopen(base, read_only=False)
        edge = change.attach(
            None,
            "commit",
            base,
            wanted=CONSISTENT_READ | WRITE | RESIZE,
            shared=CONSISTENT_READ | WRITE_UNCHANGED,
            tracker=RequestTracker(),
        )
    try:
        yield edge
    finally:
        with graph.drained(top.node, base), graph.Transaction() as change:
            change.detach(edge)
            change.reopen(base, read_only=was_read_only)
            for user, shared in users.items():
                change.set_permissions(user, wanted=user.wanted, shared=shared)


class _Writer:
    """A root edge as what a copy writes to."""

    def __init__(self, edge: graph.Edge) -> None:
        assert edge.tracker is not None
        self._edge = edge
        self._tracker = edge.tracker

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None:
        self._tracker.enter()
        try:
            plan.write_runs(self._edge.node, runs, placed)
        finally:
            self._tracker.leave()

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        self._tracker.enter()
        try:
            self._edge.write_zeroes(offset, length, unmap=unmap)
        finally:
            self._tracker.leave()
