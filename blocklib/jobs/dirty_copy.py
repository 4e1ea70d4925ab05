"""Copying a disk that is being written: what a `CopyState` says is to be copied, until nothing is left."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar, get_args

from blocklib import graph, plan, status
from blocklib.errors import BlocklibError, StorageError, UsageError
from blocklib.jobs.block_copy import BlockCopy, Compression, Packed, Writer
from blocklib.jobs.control import Control
from blocklib.jobs.runs import COPY, PIECE, SKIP, ZERO, Piece, Run, in_units
from blocklib.node import CONSISTENT_READ
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
        self._base = base
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

    def runs(self, offset: int, length: int) -> list[Run]:
        """What the range reads as now, COPY or ZERO; SKIP for what the base, or what is below it, holds."""
        absent = COPY if self._base is None else SKIP
        return [
            (extent.offset, extent.length, ZERO if extent.zero else COPY if extent.present else absent)
            for extent in reading(lambda: list(status.extents(self.node, offset, length, self._base)))
        ]

    @contextmanager
    def request(self) -> Iterator[None]:
        self.tracker.enter()
        try:
            yield
        finally:
            self.tracker.leave()


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
        compression: Compression | None = None,
        unmap: bool = True,
    ) -> None:
        super().__init__(
            control,
            source,
            target,
            block=block,
            zero_known=zero_known,
            unordered=True,
            compression=compression,
            unmap=unmap,
        )
        self.bytes_done = 0
        """Bytes of the disk that `sweep` is done with, read or known to be zero."""
        self._state = state
        self._from = source
        self._progress = control

    def sweep(self) -> None:
        """Copy what is marked, once from the beginning to the end of the disk, with all threads."""
        self.run((offset, length, COPY) for offset, length in self._state.sweep())

    def _do(self, piece: Piece, buffer: memoryview) -> None:
        for offset, length, _what, at in piece.runs:
            with self._from.request():  # before anything is reserved: a drain waits for us, and we for nobody it holds back
                self.copy_range(offset, length, buffer[at : at + length])
            with self._lock:
                self.bytes_done += length
            self._progress.advance(length)

    def copy_range(self, offset: int, length: int, buffer: memoryview) -> None:
        """Copy what is marked in the pieces that a range touches, for a thread whose request a drain waits for.

        Waits for no drain.
        """

        def copy(start: int, n: int) -> None:  # pieces are whole, even where the range and the buffer hold only part of one
            for position in range(start, start + n, len(buffer)):
                self._copy_taken(position, min(len(buffer), start + n - position), buffer)

        self._state.copy(offset, length, copy)

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

    def _copy_taken(self, offset: int, length: int, buffer: memoryview) -> None:
        writes = []
        copied = 0
        runs: Iterable[Run] = self._from.runs(offset, length)
        # Only what has no place in the target yet can be compressed there, and only whole clusters can.
        compressor = self._compression.compressor if self._compression and not self._state.torn(offset, length) else None
        if compressor is not None:
            runs = in_units(runs, compressor.unit)
        for start, n, what in runs:
            if what == SKIP:
                continue
            if what == ZERO:
                writes.append(self.zeroes(start, n))
                continue
            view = buffer[start - offset : start - offset + n]
            self._read(start, view)
            copied += n
            self._add_writes(writes, start, view)
        if compressor is not None:
            compress = compressor.compress
            writes = [write if write.data is None else write._replace(packed=compress(write.data)) for write in writes]
        self._write(writes, _nothing)
        written = sum(write.length for write in writes if write.data is not None)
        with self._lock:
            self.bytes_read += copied
            self.bytes_written += written


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
