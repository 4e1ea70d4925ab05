"""Copying a disk that is being written: what a `CopyState` says is to be copied, until nothing is left."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar, get_args

from blocklib import graph, plan, status
from blocklib._fast.extents import DEPTH_SHIFT, actions
from blocklib.errors import BlocklibError, StorageError, UsageError
from blocklib.extents import FLAG_ZERO
from blocklib.jobs.block_copy import BlockCopy, Compression, Packed, Write, Writer
from blocklib.jobs.control import Control
from blocklib.jobs.runs import COPY, PIECE, SKIP, ZERO, Piece, Run, in_units, zipped
from blocklib.node import CONSISTENT_READ
from blocklib.places import Places
from blocklib.requests import RequestTracker

if TYPE_CHECKING:
    from blocklib.copy import CopyState
    from blocklib.disk import Disk
    from blocklib.node import Filter, Node

_T = TypeVar("_T")

ErrorPolicy: TypeAlias = Literal["report", "ignore", "enospc", "stop"]
"""What becomes of a job when reading or writing fails: it fails; it tries again; it stops for a full disk, or for anything,
until it is resumed, and then tries again."""

_RETRY_SECONDS: Final = 0.05
_WHOLE: Final = (COPY, ZERO, COPY, ZERO)
"""What to do, by what is known of a run: see `actions`."""


def _nothing() -> None:
    """For whom it does not matter when writes are placed."""


class SourceError(Exception):
    """Wraps what reading the source raised, until it is known what becomes of it.  Never leaves the job."""

    def __init__(self, error: StorageError) -> None:
        super().__init__(error)
        self.error = error


def reading(work: Callable[[], _T]) -> _T:
    """What `work`, which only reads, returns.  Raises SourceError for what goes wrong."""
    try:
        return work()
    except StorageError as error:
        raise SourceError(error) from error


@contextmanager
def plain_errors() -> Iterator[None]:
    """For who asks nobody what becomes of an error: what reading the source raised is raised as it was."""
    try:
        yield
    except SourceError as failure:
        raise failure.error from None


def check_policy(name: str, policy: str) -> None:
    """Raises UsageError for what is no error policy."""
    if policy not in get_args(ErrorPolicy):
        raise UsageError(f"{name} is one of {', '.join(get_args(ErrorPolicy))}, not {policy!r}")


class CopiedImage:
    """The image that is copied, as the job's own user of it: an edge beside those of its writers.

    With `base` only what the images above that hold is to be copied.  Requests in it are counted, so that a change of the
    graph waits for them, except on behalf of who is inside one already.
    """

    def __init__(self, node: Node, name: str, base: Node | None = None) -> None:
        self.node = node
        self._depth = graph.chain(node).index(base) if base is not None else None
        self.tracker = RequestTracker()
        with graph.Transaction() as change:
            self.edge = change.attach(
                None, name, node, wanted=CONSISTENT_READ, shared=graph.ALL, tracker=self.tracker
            )

    def release(self) -> None:
        """The job is done with it."""
        with graph.Transaction() as change:
            change.detach(self.edge)

    def readinto(self, offset: int, buffer: memoryview, /) -> None:
        reading(lambda: plan.read(self.node, offset, buffer))

    @contextmanager
    def look(self) -> Iterator[Look]:
        """Look at it: what is found is read in its place until the end of the block.  Inside a request."""
        places = Places(self.node)
        with places.pinned():
            yield Look(self.node, self._depth, places)

    @contextmanager
    def request(self) -> Iterator[None]:
        self.tracker.enter()
        try:
            yield
        finally:
            self.tracker.leave()


class Look:
    """Parts of an image, looked up once for what is to be done and for reading them.

    What comes from images at `depth` or below is not to be copied.
    """

    def __init__(self, node: Node, depth: int | None, places: Places) -> None:
        self._node = node
        self._depth = depth
        self._places = places

    def runs(self, offset: int, length: int) -> list[Run]:
        """What the range reads as now: COPY, ZERO, or SKIP."""

        def look_up() -> list[Run]:
            windows = self._places.remember(status.row_windows(self._node, offset, length))
            if self._depth is None:
                return [run for rows in windows for run in actions(rows, _WHOLE)]
            below = self._depth << DEPTH_SHIFT
            return [
                (start, n, SKIP if word >= below else ZERO if word & FLAG_ZERO else COPY)
                for rows in windows
                for start, n, _place, word in rows
            ]

        return reading(look_up)

    def read_runs(self, runs: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view from its offset; ascending."""

        def read() -> None:
            for offset, view in self._places.read(self._node, runs):
                plan.read(self._node, offset, view)

        reading(read)


class EdgeWriter:
    """Writes to a child of a filter, for who is inside a request to the filter's disk: a drain of either waits for that."""

    def __init__(self, edge: graph.Edge) -> None:
        self._edge = edge

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None:
        plan.write_runs(self._edge.node, runs, placed)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        self._edge.write_zeroes(offset, length, unmap=unmap and self._edge.node.discard_passes)

    def write_packed(self, offset: int, data: memoryview, packed: Packed, unit: int, /) -> None:
        self._edge.write_packed(offset, data, packed, unit)


class DirtyCopy(BlockCopy):
    """Copies what `state` marks, in pieces that are reserved while they are copied."""

    def __init__(
        self,
        control: Control,
        state: CopyState,
        source: CopiedImage,
        target: Writer,
        *,
        block: int = 0,
        zero_known: bool = False,
        unit: int = 1,
        in_flight: int | None = None,
        compression: Compression | None = None,
        unmap: bool = True,
    ) -> None:
        """`unit`: what is copied is copied in such parts of the target, where pieces of the state are no smaller."""
        super().__init__(
            control,
            source,
            target,
            block=block,
            zero_known=zero_known,
            in_flight=in_flight,
            unordered=True,
            compression=compression,
            unmap=unmap,
        )
        self.bytes_done = 0
        """Bytes of the disk that `sweep` is done with, read or known to be zero."""
        self._state = state
        self._from = source
        self._whole = min(unit, state.granularity)
        self._progress = control

    def sweep(self) -> None:
        """Copy what is marked, once from the beginning to the end of the disk, with all threads."""
        self.run((offset, length, COPY) for offset, length in self._state.sweep())

    def _do(self, piece: Piece, buffer: memoryview) -> None:
        for offset, length, marked in _together(piece.runs, len(buffer)):
            with self._from.request():  # before anything is reserved: a drain waits for us, and we for nobody it holds back
                self.copy_range(offset, length, buffer)
            with self._lock:
                self.bytes_done += marked
            self._progress.advance(marked)

    def copy_range(self, offset: int, length: int, buffer: memoryview) -> None:
        """Copy what is marked in the pieces that a range touches, for a thread whose request a drain waits for.

        Waits for no drain.
        """
        with self._state.taken(offset, length) as taken:
            for ranges in _fitting(taken, len(buffer)):
                self._copy_taken(ranges, buffer)

    def copy_around(self, offset: int, length: int) -> None:
        """The same, for pieces that a range touches, in memory of its own, for who knows nothing of sources."""
        with plain_errors():
            self._copy_in_steps(offset, length)

    def _copy_in_steps(self, offset: int, length: int) -> None:
        end = min(self._state.size, offset + length)
        granularity = self._state.granularity
        buffer = memoryview(bytearray(min(PIECE, (length // granularity + 2) * granularity)))
        while offset < end:
            n = min(PIECE - offset % PIECE, end - offset)
            self.copy_range(offset, n, buffer)
            offset += n

    def finish(self) -> None:
        """Copy all that is marked, by this thread alone, while nobody else is inside the disk."""
        for offset, length in self._state.sweep():
            self._copy_in_steps(offset, length)

    def _copy_taken(self, ranges: list[tuple[int, int]], buffer: memoryview) -> None:
        """Copy ranges, ascending, that the buffer has room for with what lies between them."""
        first = ranges[0][0]
        length = sum(ranges[-1]) - first
        # Only what has no place in the target yet can be compressed there, and only whole clusters can.
        compressor = self._compression.compressor if self._compression and not self._state.torn(first, length) else None
        with self._from.look() as image:
            found = image.runs(first, length)
            if len(ranges) > 1:
                both = zipped(_with_gaps(ranges), found)
                found = [(start, n, what if taken else SKIP) for start, n, taken, what in both]
            runs = list(in_units(found, compressor.unit if compressor is not None else self._whole, first))
            reads = [(start, buffer[start - first : start - first + n]) for start, n, what in runs if what == COPY]
            if reads:
                image.read_runs(reads)
        views = iter(reads)
        writes: list[Write] = []
        for start, n, what in runs:
            if what == ZERO:
                writes.append(Write(start, n, None))
            elif what == COPY:
                self._add_writes(writes, start, next(views)[1])
        if compressor is not None:
            compress = compressor.compress
            writes = [write if write.data is None else write._replace(packed=compress(write.data)) for write in writes]
        self._write(writes, _nothing)
        with self._lock:
            self.bytes_read += sum(len(view) for _offset, view in reads)
            self.bytes_written += sum(write.length for write in writes if write.data is not None)


def _together(runs: Iterable[tuple[int, int, int, int]], most: int) -> Iterator[tuple[int, int, int]]:
    """The runs of a piece, as many at a time as lie in `most` bytes of the disk: (offset, length, bytes of them)."""
    start = end = marked = 0
    for offset, length, _what, _at in runs:
        if marked and offset + length > start + most:
            yield start, end - start, marked
            marked = 0
        if not marked:
            start = offset
        end = offset + length
        marked += length
    if marked:
        yield start, end - start, marked


def _with_gaps(ranges: Iterable[tuple[int, int]]) -> Iterator[Run]:
    """The ranges, to COPY, and what lies between them, to SKIP."""
    end = -1
    for offset, length in ranges:
        if 0 <= end < offset:
            yield end, offset - end, SKIP
        yield offset, length, COPY
        end = offset + length


def _fitting(ranges: Iterable[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """The same ranges, cut where they are longer, as many at a time as lie in `most` bytes of the disk."""
    found: list[tuple[int, int]] = []
    for offset, length in ranges:
        for position in range(offset, offset + length, most):
            n = min(most, offset + length - position)
            if found and position + n > found[0][0] + most:
                yield found
                found = []
            found.append((position, n))
    if found:
        yield found


class Placement:
    """A filter above an image: all who use the image reach it through the filter.  Made with the image drained.

    A `target` is lent to the filter, as the child of that name.
    """

    def __init__(self, filter: Filter, node: Node, target: Disk | None = None) -> None:
        self._filter = filter
        self._node = node
        self._loans: list[graph.Loan] = []
        with graph.Transaction() as change:
            users = tuple(node.parents)
            change.attach(filter, "file", node)
            if target is not None:
                self._loans.append(graph.Loan(target.root, change))
                change.attach(filter, "target", target.root.node)
            filter.load()
            for edge in users:
                change.redirect(edge, filter)

    def take_away(self) -> None:
        """Let them reach the image itself; the caller has drained it.  Where nobody uses the filter any more, nothing."""
        with graph.lent(self._loans), graph.Transaction() as change:
            for edge in tuple(self._filter.parents):
                change.redirect(edge, self._node)


class Errors:
    """Decides what becomes of a job whose reading or writing failed."""

    def __init__(self, control: Control, on_source: ErrorPolicy, on_target: ErrorPolicy) -> None:
        self._control = control
        self._policies = on_source, on_target

    def attempt(self, work: Callable[[], None]) -> bool:
        """Whether `work` was done; False if it is to be tried again.  Raises what ends the job."""
        try:
            work()
            return True
        except SourceError as failure:
            self._settle(self._policies[0], failure.error)
        except StorageError as failure:
            self._settle(self._policies[1], failure)
        return False

    def _settle(self, policy: ErrorPolicy, error: BlocklibError) -> None:
        if policy == "enospc":
            policy = "stop" if isinstance(error, StorageError) and error.errno == errno.ENOSPC else "report"
        if policy == "report":
            raise error
        with self._control.changed:
            if policy == "stop":
                self._control.stop(error)
            else:
                self._control.clock.wait(self._control.changed, _RETRY_SECONDS)
