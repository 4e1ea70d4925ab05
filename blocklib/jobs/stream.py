"""stream: copy what the images below hold up into the top image of a disk in use, and take them out of the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from blocklib import graph, plan
from blocklib.buffers import zeroes
from blocklib.errors import StorageError, UsageError
from blocklib.jobs.block_copy import BlockCopy
from blocklib.jobs.chain_images import Image, check_changeable, node_below, shorten
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.dirty_copy import ErrorPolicy, Errors, check_policy
from blocklib.jobs.ends import images_below
from blocklib.jobs.job import Job, started
from blocklib.jobs.runs import COMPARE, SKIP, ZERO, Piece, Run, coalesced, runs_above, zipped
from blocklib.node import CONSISTENT_READ, WRITE_UNCHANGED
from blocklib.records import Record
from blocklib.reports import StreamResult
from blocklib.requests import RequestTracker

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.node import Node


@started
def stream(
    disk: Disk,
    *,
    base: Image | None = None,
    backing_file: str | None = None,
    on_error: ErrorPolicy = "report",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[StreamResult]:
    """Copy into the top image of `disk` what the images below it hold, down to `base`, which becomes its backing file.

    Without `base` the disk ends as one image without a backing file.  `base` is an image of ``disk.chain()`` or a file name;
    `backing_file` is the name to be stored for it, by default the one by which the chain names it.  The disk may be written
    meanwhile.  When it is cancelled, part of the data is in the top image, and the chain is as before.  `on_error`: see
    `ErrorPolicy`; to "ignore" an error is to go on without what could not be copied, and to fail with it at the end.

    Raises UsageError (no backing file, or a name without `base`), NameNotFoundError (`base` is not below the top image),
    ReadOnlyError, StorageError.
    """
    if base is None and backing_file is not None:
        raise UsageError("backing_file is the name of a base, and there is none")
    check_changeable(disk)
    _find_base(disk, base)
    check_policy("on_error", on_error)
    task = _Stream(disk, base, backing_file, on_error)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Stream(Record, Task[StreamResult], frozen=False):
    verb: ClassVar[str] = "stream"

    disk: Disk
    base: Image | None
    backing_file: str | None
    on_error: ErrorPolicy

    def claim(self) -> None:
        self._claim = graph.Claim(self.verb, graph.chain(self.disk.node))

    def run(self, control: Control) -> StreamResult:
        """Copy all that the top image does not hold."""
        disk = self.disk
        top = disk.node
        errors = Errors(control, self.on_error, self.on_error)
        copied = 0
        with _user_of(top) as edge:
            while True:
                with control.changed:
                    done = control.snapshot().done
                control.set_total(done + top.size)
                copy = _Filling(
                    control, disk, _Filler(edge), unit=top.data_unit() or 1, skips=self.on_error == "ignore"
                )
                # Again from the beginning: what was copied is in the top image now.
                is_done = errors.attempt(partial(copy.run, _runs_between(disk, _find_base(disk, self.base))))
                copied += copy.bytes_written
                if copy.skipped is not None:
                    raise copy.skipped
                if is_done:
                    return StreamResult(bytes_copied=copied, backing=None)

    def finalize(self, control: Control, result: StreamResult) -> StreamResult:
        """Take what lies between out of the chain."""
        top = self.disk.node
        with graph.alone(top):
            base = _find_base(self.disk, self.base)  # again: the chain may have changed
            name = shorten(top, base, self.backing_file)
        self._claim.release()
        return StreamResult(bytes_copied=result.bytes_copied, backing=name)

    def abort(self) -> None:
        self._claim.release()


def _find_base(disk: Disk, base: Image | None) -> Node | None:
    if base is None:
        images_below(disk)
        return None
    return node_below(disk, base)


def _runs_between(disk: Disk, base: Node | None) -> Iterator[Run]:
    """What the images between the top one and `base` hold, and the top one does not."""
    chain = disk.chain()
    end = disk.size
    last = next((image for image in chain if base is not None and image.name == base.name), None)
    own = runs_above(disk, 0, end, chain[1], absent=COMPARE, absent_zero=COMPARE)
    between = runs_above(disk, 0, end, last, absent=SKIP, absent_zero=ZERO)
    # Zeroes need not be kept where nothing will lie below any more.
    zeroes = SKIP if last is None else ZERO
    return coalesced(
        (start, n, SKIP if mine != COMPARE else zeroes if there == ZERO else there)
        for start, n, mine, there in zipped(own, between)
    )


class _Filling(BlockCopy):
    """Fills an image; with `skips`, pieces that fail are left out, and `skipped` is the first error."""

    def __init__(self, control: Control, disk: Disk, filler: _Filler, *, unit: int, skips: bool) -> None:
        super().__init__(control, disk, filler, unit=unit, unordered=True)
        self._skips = skips
        self._told = control
        self.skipped: StorageError | None = None

    def _do(self, piece: Piece, buffer: memoryview) -> None:
        try:
            super()._do(piece, buffer)
        except StorageError as error:
            if not self._skips:
                raise
            self.skipped = self.skipped or error
            self._told.advance(piece.length)


@contextmanager
def _user_of(top: Node) -> Iterator[graph.Edge]:
    """An edge that may write to `top`, which others are writing, what does not change what it reads as."""
    wanted = CONSISTENT_READ | WRITE_UNCHANGED
    with graph.Transaction() as change:
        edge = change.attach(None, "stream", top, wanted=wanted, shared=graph.ALL, tracker=RequestTracker())
    try:
        yield edge
    finally:
        with graph.Transaction() as change:
            change.detach(edge)


class _Filler:
    """Writes to an image what lies below it, and only where it holds nothing itself."""

    def __init__(self, edge: graph.Edge) -> None:
        assert edge.tracker is not None
        self._top = edge.node
        self._tracker = edge.tracker

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None:
        self._tracker.enter()
        try:
            for offset, data in runs:
                plan.write_unallocated(self._top, offset, data)
        finally:
            self._tracker.leave()

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        while length > 0:
            part = zeroes(length)
            self.write_runs([(offset, part)], placed=lambda: None)
            offset += len(part)
            length -= len(part)
