"""What a copying job has to do where: runs of a disk, coalesced, and the bounded pieces that the work is done in.

A run is (guest offset, length, what): COPY its data, ZERO the target there, SKIP it because the target has it already, or
COMPARE it with what the target shows through there and copy what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Final, TypeAlias

from blocklib._fast.extents import actions

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.places import Places
    from blocklib.reports import NodeInfo

SKIP: Final = 0
COPY: Final = 1
ZERO: Final = 2
COMPARE: Final = 3

Run: TypeAlias = tuple[int, int, int]
"""(guest offset, length, what to do): bytes."""

PIECE: Final = 8 << 20
"""A piece of work copies at most so many bytes; the larger, the less is said for each byte."""
SMALL_PIECE: Final = 2 << 20
"""Where it is to be small all the same: as large as a cluster can be."""
_MOST_RUNS: Final = 1024
"""And it has at most so many runs."""
_PAGE: Final = 4096
_READ: Final = (COPY, COMPARE)


def runs_of(disk: Disk, offset: int, length: int, *, places: Places | None = None) -> Iterator[Run]:
    """The runs of a range of `disk`, COPY or ZERO: ascending, contiguous; `places` remembers where they live."""
    return _runs(disk, offset, length, None, _WHOLE, places)


def runs_above(
    disk: Disk,
    offset: int,
    length: int,
    base: NodeInfo | None,
    *,
    absent: int,
    absent_zero: int,
    places: Places | None = None,
) -> Iterator[Run]:
    """The runs of what the images above `base` hold (None: all images of the chain), COPY or ZERO.

    What none of them holds is `absent`, or `absent_zero` where it is zero because an image above `base`, or the chain, ends.
    """
    # By what an extent says: (not present, not present but zero, data, zero).
    return _runs(disk, offset, length, base, (absent, absent_zero, COPY, ZERO), places)


_WHOLE: Final = (COPY, ZERO, COPY, ZERO)


def _runs(
    disk: Disk,
    offset: int,
    length: int,
    base: NodeInfo | None,
    meaning: tuple[int, int, int, int],
    places: Places | None,
) -> Iterator[Run]:
    windows = disk.row_windows(offset, length, base=base)
    for rows in windows if places is None else places.remember(windows):
        yield from actions(rows, meaning)


def without_small_zeroes(runs: Iterable[Run], least: int) -> Iterator[Run]:
    """The same runs, where zeroes of fewer than `least` bytes are data: one larger write is better than two."""
    return coalesced((start, n, COPY if what == ZERO and n < least else what) for start, n, what in coalesced(runs))


def coalesced(runs: Iterable[Run]) -> Iterator[Run]:
    """The same runs with neighbours joined that say the same."""
    start = length = 0
    what = -1
    for run_start, n, run_what in runs:
        if run_what == what and run_start == start + length:
            length += n
            continue
        if length:
            yield start, length, what
        start, length, what = run_start, n, run_what
    if length:
        yield start, length, what


def in_units(runs: Iterable[Run], unit: int, begins: int = 0) -> Iterator[Run]:
    """The same runs, none of which ends inside a unit, other than the last: a unit of which some is copied is copied whole.

    The first begins at `begins`, a multiple of the unit.  One with something to COMPARE is compared whole, and one that mixes
    zeroes with what the target has is copied.
    """
    return coalesced(_in_units(runs, unit, begins) if unit > 1 else runs)


def _in_units(runs: Iterable[Run], unit: int, begins: int) -> Iterator[Run]:
    begun, mixed = begins, -1  # the unit that is not complete begins there; what is in it so far
    end = begins
    for start, length, what in runs:
        end = start + length
        if begun < start:
            mixed = _mixed(mixed, what)
            if end < begun + unit:
                continue
            yield begun, unit, mixed
            begun += unit
        whole = (end - begun) // unit * unit
        if whole:
            yield begun, whole, what
            begun += whole
        mixed = what
    if begun < end:
        yield begun, end - begun, mixed


def _mixed(first: int, second: int) -> int:
    if first == second:
        return first
    return COMPARE if COMPARE in (first, second) and COPY not in (first, second) else COPY


def zipped(first: Iterable[Run], second: Iterable[Run]) -> Iterator[tuple[int, int, int, int]]:
    """(offset, length, what of `first`, what of `second`) over two lists of runs that cover the same range."""
    others = iter(second)
    other_start = other_end = other_what = 0
    for start, n, what in first:
        end = start + n
        while start < end:
            if start >= other_end:
                other_start, length, other_what = next(others)
                other_end = other_start + length
            stop = min(end, other_end)
            yield start, stop - start, what, other_what
            start = stop


def without_equal_zeroes(runs: Iterable[Run], source: Iterable[Run], shown: Iterable[Run]) -> Iterator[Run]:
    """The same runs, with nothing to COMPARE where `source` and `shown`, over the same range, are both known to be zero."""
    zeroes = coalesced((start, n, ZERO if a == b == ZERO else COPY) for start, n, a, b in zipped(source, shown))
    return coalesced((start, n, SKIP if a == COMPARE and b == ZERO else a) for start, n, a, b in zipped(runs, zeroes))


class Piece:
    """Runs that one worker does with one buffer."""

    __slots__ = ("after", "before", "copied", "filled", "index", "is_written", "length", "runs")

    def __init__(self, index: int) -> None:
        self.index = index
        self.runs: list[tuple[int, int, int, int]] = []
        """(guest offset, length, what, where in the buffer its bytes go)"""
        self.length = 0
        """Bytes of the disk that are done with the piece."""
        self.copied = 0
        """Bytes of them that have to be read."""
        self.filled = 0
        """Bytes of the buffer that are taken."""
        self.before: Lock | None = None
        """Free once the pieces before this one have been written."""
        self.after = Lock()
        """Free once this one has been, too."""
        self.after.acquire()
        self.is_written = False

    def add(self, offset: int, length: int, what: int, at: int) -> None:
        if what != SKIP:
            self.runs.append((offset, length, what, at))
        self.length += length
        if what in _READ:
            self.copied += length
            self.filled = at + length


def pieces(runs: Iterable[Run], unit: int = 1, most: Callable[[], int] = lambda: PIECE) -> Iterator[Piece]:
    """Cut runs into pieces of at most `most()` bytes, in order; one that is read is cut only at multiples of `unit`.

    Those are no larger than a piece.  In the buffer it lies as it does in a page, which is how direct I/O wants it.
    """
    piece = Piece(0)
    room = most()
    for offset, length, what in runs:
        end = offset + length
        while offset < end:
            n, at = end - offset, 0
            if what in _READ:
                at = piece.filled + (offset - piece.filled) % _PAGE
                n = min(end, (offset + room - at) // unit * unit) - offset
            if n <= 0 or len(piece.runs) >= _MOST_RUNS:
                yield piece
                piece, room = Piece(piece.index + 1), most()
                continue
            piece.add(offset, n, what, at)
            offset += n
    if piece.length:
        yield piece
