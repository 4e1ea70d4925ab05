"""block_copy: the one loop that copies a disk, in pieces, by a few threads, within bounded memory.

The job's own thread cuts the work into pieces and hands them out; workers read in any order.  They write in the order of
the disk unless told otherwise, so that a new image is laid out as if one thread had written it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

from blocklib.buffers import zero_fill
from blocklib.errors import StorageError
from blocklib.jobs.control import Control
from blocklib.jobs.crew import Crew, default_threads, piece_size
from blocklib.jobs.runs import COMPARE, COPY, SMALL_PIECE, ZERO, Piece, Run, pieces
from blocklib.jobs.zero_runs import BlockScanner

if TYPE_CHECKING:
    from blocklib.node import Compressor

_SECTOR: Final = 512


class Reader(Protocol):
    """What is copied from: a disk, or several one after the other."""

    def readinto(self, offset: int, buffer: memoryview, /) -> None: ...


@runtime_checkable
class RunReader(Protocol):
    """One that reads many runs, ascending, as fast as a few."""

    def read_runs(self, runs: Sequence[tuple[int, memoryview]], /) -> None: ...


class Writer(Protocol):
    """What is copied to: a disk, or an image inside a chain."""

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None: ...
    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None: ...


Packed: TypeAlias = "Sequence[bytes | None]"
"""What a compressor makes of the units of a write."""


class Compression(NamedTuple):
    """How the target's clusters are compressed, and what writes them: (guest offset, data, streams, unit)."""

    compressor: Compressor
    write: Callable[[int, memoryview, Packed, int], None]


class Write(NamedTuple):
    offset: int
    length: int
    data: memoryview | None  # None: zeroes
    packed: Packed | None = None


def _read_runs(reader: Reader, runs: list[tuple[int, memoryview]]) -> None:
    if not runs:
        return
    if isinstance(reader, RunReader):
        reader.read_runs(runs)
    else:
        for offset, view in runs:
            reader.readinto(offset, view)


def _later() -> None:
    """Nobody waits for where a write goes."""


class BlockCopy:
    """Copies runs from `source` to `target`, at equal offsets.

    - `block`: leave out zeroes of that many bytes, aligned to it, although they are stored as data; 0 copies them.
    - `unit`: runs are cut at its multiples (at most SMALL_PIECE), so that no cluster of the target is written in two steps.
    - `zero_known`: the target reads as zero where nothing was written yet, so zeroes are left out altogether.
    - `shown`: what the target reads as where it has nothing of its own; runs to COMPARE are compared with it.
    - `compression`: data is compressed by the workers; `block`, where it is not 0, and all runs are multiples of its unit.
    - `unordered`: workers write whenever they have something.
    - `salvage`: what cannot be read becomes zero and is listed in `unreadable`.
    - `unmap`: zeroes may give their space in the target back.
    """

    def __init__(
        self,
        control: Control,
        source: Reader,
        target: Writer,
        *,
        block: int = 0,
        unit: int = 1,
        zero_known: bool = False,
        shown: Reader | None = None,
        threads: int | None = None,
        in_flight: int | None = None,
        unordered: bool = False,
        salvage: bool = False,
        compression: Compression | None = None,
        unmap: bool = True,
    ) -> None:
        self._control = control
        self._source = source
        self._target = target
        self._scanner = BlockScanner(block or _SECTOR)
        self._unit = unit
        self._drop_zeroes = block > 0
        self._zero_known = zero_known
        self._shown = shown
        self._unordered = unordered
        self._salvage = salvage
        self._compression = compression
        self._unmap = unmap
        threads = threads or default_threads(thinking=compression is not None)
        self._piece = SMALL_PIECE if compression is not None else piece_size(threads)
        if in_flight is not None:  # bytes that all buffers may have together
            threads = min(threads, max(1, in_flight // SMALL_PIECE))
            self._piece = min(self._piece, 1 << (in_flight // threads).bit_length() - 1)
        self._crew = Crew(control, self._do, threads, buffer=self._piece * (2 if shown is not None else 1))
        self._lock = threading.Lock()  # guards what follows
        self.bytes_read = 0
        self.bytes_written = 0
        self._unreadable: list[tuple[int, int]] = []

    @property
    def unreadable(self) -> tuple[tuple[int, int], ...]:
        """(guest offset, length) of what could not be read, ascending."""
        joined: list[tuple[int, int]] = []
        for offset, length in sorted(self._unreadable):
            if joined and sum(joined[-1]) == offset:
                joined[-1] = joined[-1][0], joined[-1][1] + length
            else:
                joined.append((offset, length))
        return tuple(joined)

    def run(self, runs: Iterable[Run]) -> None:
        """Do all of `runs`, ascending, once.  When it raises, requests in flight have ended."""
        self._crew.run(pieces(runs, self._unit, self._most))

    def _most(self) -> int:
        """Bytes of the next piece: where the speed is limited, small ones spread the work more evenly."""
        return min(SMALL_PIECE, self._piece) if self._control.is_limited else self._piece

    # -- in a worker --------------------------------------------------------------------------------------------------

    def _do(self, piece: Piece, buffer: memoryview) -> None:
        self._read_all([(offset, buffer[at : at + n]) for offset, n, what, at in piece.runs if what != ZERO])
        other = buffer[self._piece :]
        if self._shown is not None:
            _read_runs(self._shown, [(start, other[at : at + n]) for start, n, what, at in piece.runs if what == COMPARE])
        writes: list[Write] = []
        for offset, length, what, at in piece.runs:
            view = buffer[at : at + length]
            if what == ZERO:
                writes.append(Write(offset, length, None))
            elif what == COPY:
                self._add_writes(writes, offset, view)
            else:
                for first, last in self._scanner.changed_parts(view, other[at : at + length], offset):
                    self._add_writes(writes, offset + first, view[first:last])
        writes = self._packed(writes, piece.index)
        if self._unordered:
            self._write(writes, _later)
        elif self._crew.take_turn(piece):
            self._write(writes, lambda: self._crew.end_turn(piece))
            self._crew.end_turn(piece)
        else:
            return
        with self._lock:
            self.bytes_read += piece.copied
            self.bytes_written += sum(write.length for write in writes if write.data is not None)
        self._control.advance(piece.length)

    def _packed(self, writes: list[Write], index: int) -> list[Write]:
        """The same writes, with what the compressor makes of their data, as the piece of this number."""
        if self._compression is None:
            return writes
        parts = [write.data for write in writes if write.data is not None]
        packed = iter(self._compression.compressor.compress_piece(index, parts))
        return [write if write.data is None else write._replace(packed=next(packed)) for write in writes]

    def _add_writes(self, writes: list[Write], offset: int, view: memoryview) -> None:
        """Plan the writing of `view`, without its zeroes."""
        if not self._drop_zeroes:
            writes.append(Write(offset, len(view), view))
            return
        done = 0
        for first, last in self._scanner.data_parts(view, offset):
            if done < first:
                writes.append(Write(offset + done, first - done, None))
            writes.append(Write(offset + first, last - first, view[first:last]))
            done = last
        if done < len(view):
            writes.append(Write(offset + done, len(view) - done, None))

    def _write(self, writes: list[Write], placed: Callable[[], None]) -> None:
        """Do all of `writes`; `placed` may be called before the end, when those of another piece may begin."""
        runs: list[tuple[int, memoryview]] = []
        for offset, length, data, packed in writes:
            if data is not None and packed is None:
                runs.append((offset, data))
            elif data is None:
                if not self._zero_known:
                    self._target.write_zeroes(offset, length, unmap=self._unmap)
            elif packed is not None and self._compression is not None:
                self._compression.write(offset, data, packed, self._compression.compressor.unit)
        if runs:
            self._target.write_runs(runs, placed=placed)

    def _read_all(self, runs: list[tuple[int, memoryview]]) -> None:
        try:
            _read_runs(self._source, runs)
        except StorageError:
            if not self._salvage:
                raise
            for offset, view in runs:
                self._read(offset, view)

    def _read(self, offset: int, view: memoryview) -> None:
        try:
            self._source.readinto(offset, view)
        except StorageError:
            if not self._salvage:
                raise
            if len(view) <= _SECTOR:
                zero_fill(view)
                with self._lock:
                    self._unreadable.append((offset, len(view)))
                return
            # Halving finds a bad sector in few reads, and costs nothing where all is well.
            middle = -(-len(view) // (2 * _SECTOR)) * _SECTOR
            self._read(offset, view[:middle])
            self._read(offset + middle, view[middle:])
