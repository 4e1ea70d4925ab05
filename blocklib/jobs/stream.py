"""stream: copy what the images below hold up into the top image of a disk in use, and take them out of the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, ClassVar, TypeVar

from blocklib import graph, plan, status
from blocklib._fast.extents import DEPTH_SHIFT
from blocklib.buffers import zero_fill
from blocklib.errors import StorageError, UsageError
from blocklib.extents import FLAG_ZERO
from blocklib.jobs.block_copy import BlockCopy
from blocklib.jobs.chain_images import Image, check_changeable, node_below, shorten
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.dirty_copy import ErrorPolicy, Errors, check_policy
from blocklib.jobs.ends import image_below, images_below
from blocklib.jobs.job import Job, started
from blocklib.jobs.runs import COMPARE, COPY, SKIP, ZERO, Piece, Run, coalesced, in_units, runs_above, zipped
from blocklib.node import CONSISTENT_READ, WRITE_UNCHANGED
from blocklib.places import Places
from blocklib.records import Record
from blocklib.reports import NodeInfo, StreamResult
from blocklib.requests import RequestTracker

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.node import Node

_T = TypeVar("_T")


@started
def stream(
    disk: Disk,
    *,
    base: Image | None = None,
    bottom: Image | None = None,
    backing_file: str | None = None,
    on_error: ErrorPolicy = "report",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[StreamResult]:
    """Copy into the top image of `disk` what the images below it hold, down to `base`, which becomes its backing file.

    Without `base` the disk ends as one image without a backing file.  `base` is an image of ``disk.chain()`` or a file name;
    `bottom`, instead of it, the last image that is copied.
    `backing_file` is the name to be stored for it, by default the one by which the chain names it.  The disk may be written
    meanwhile.  When it is cancelled, part of the data is in the top image, and the chain is as before.  `on_error`: see
    `ErrorPolicy`; to "ignore" an error is to go on without what could not be copied, and to fail with it at the end.

    Raises UsageError (no backing file, a name without a base, `base` and `bottom`), NameNotFoundError (`base` or `bottom` is
    not below the top image), ReadOnlyError, StorageError.
    """
    if bottom is not None:
        if base is not None:
            raise UsageError("base and bottom say the same thing in two ways; one of them is enough")
        base = _below(disk, bottom)
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
        unit = top.data_unit() or 1
        base = _find_base(disk, self.base)
        with _user_of(top) as edge:
            while True:
                control.pause_point()  # where an error has stopped the job; what is found below is read even before a piece
                with control.changed:
                    done = control.snapshot().done
                control.set_total(done + top.size)
                below = _Below(edge, base)
                copy = _Filling(control, below, _Filler(edge), unit=unit, skips=self.on_error == "ignore")
                # Again from the beginning: what was copied is in the top image now.
                is_done = errors.attempt(partial(copy.run, in_units(_runs_between(disk, below), unit)))
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


def _below(disk: Disk, bottom: Image) -> NodeInfo | None:
    """The image below `bottom`, if there is one."""
    names = [image.name for image in images_below(disk)]
    below = names.index(image_below(disk, bottom).name) + 1
    return images_below(disk)[below] if below < len(names) else None


def _find_base(disk: Disk, base: Image | None) -> Node | None:
    if base is None:
        images_below(disk)
        return None
    return node_below(disk, base)


def _runs_between(disk: Disk, below: _Below) -> Iterator[Run]:
    """What the images between the top one and the base hold, and the top one does not."""
    own = runs_above(disk, 0, disk.size, disk.chain()[1], absent=COMPARE, absent_zero=COMPARE)
    # Zeroes need not be kept where nothing will lie below any more.
    zeroes = SKIP if below.base is None else ZERO
    return coalesced(
        (start, n, SKIP if mine != COMPARE else zeroes if there == ZERO else there)
        for start, n, mine, there in zipped(own, below.runs(disk.size))
    )


class _Below:
    """What lies below the top image, down to `base`, looked up once: nobody writes there."""

    def __init__(self, edge: graph.Edge, base: Node | None) -> None:
        assert edge.tracker is not None
        self.base = base
        self._node = edge.node.children["backing"].node
        self._tracker = edge.tracker
        self._places = Places(self._node)

    def runs(self, size: int) -> Iterator[Run]:
        """COPY or ZERO what the images above the base hold, SKIP what they do not; of so many bytes."""
        inside = min(size, self._node.size)
        if self._node is not self.base:
            images = graph.chain(self._node)
            depth = images.index(self.base) if self.base is not None else len(images)
            windows = self._places.remember(status.row_windows(self._node, 0, inside))
            while (rows := self._counted(lambda: next(windows, None))) is not None:
                for start, n, _place, word in rows:
                    yield start, n, SKIP if word >> DEPTH_SHIFT >= depth else ZERO if word & FLAG_ZERO else COPY
        elif inside:
            yield 0, inside, SKIP
        if inside < size:
            yield inside, size - inside, ZERO

    def readinto(self, offset: int, buffer: memoryview, /) -> None:
        self.read_runs([(offset, buffer)])

    def read_runs(self, runs: Sequence[tuple[int, memoryview]], /) -> None:
        """Fill each view from its offset; behind the end of the images it is zero."""
        inside = []
        for offset, view in runs:
            n = max(0, min(len(view), self._node.size - offset))
            zero_fill(view[n:])
            if n:
                inside.append((offset, view[:n]))
        if inside:
            self._counted(lambda: self._read(inside))

    def _read(self, runs: Sequence[tuple[int, memoryview]]) -> None:
        for offset, view in self._places.read(self._node, runs):
            plan.read(self._node, offset, view)

    def _counted(self, request: Callable[[], _T]) -> _T:
        self._tracker.enter()
        try:
            return request()
        finally:
            self._tracker.leave()


class _Filling(BlockCopy):
    """Fills an image; with `skips`, pieces that fail are left out, and `skipped` is the first error."""

    def __init__(self, control: Control, below: _Below, filler: _Filler, *, unit: int, skips: bool) -> None:
        super().__init__(control, below, filler, unit=unit, unordered=True)
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
            plan.fill_runs(self._top, runs)
        finally:
            self._tracker.leave()

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        self._tracker.enter()
        try:
            plan.fill_zeroes(self._top, offset, length)
        finally:
            self._tracker.leave()
