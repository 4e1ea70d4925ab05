"""compare: do two disks have the same content?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.crew import Crew, default_threads
from blocklib.jobs.ends import Concatenation, opened
from blocklib.jobs.job import Job, started
from blocklib.jobs.runs import COMPARE, PIECE, SKIP, ZERO, Piece, Run, coalesced, pieces, zipped
from blocklib.jobs.zero_runs import BlockScanner
from blocklib.records import Record
from blocklib.reports import CompareResult

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.policy import Target

_BLOCK: Final = 4096
"""A difference is first found to this many bytes."""


@started
def compare(
    a: Disk | Target,
    b: Disk | Target,
    *,
    strict: bool = False,
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[CompareResult]:
    """Compare what two disks read as; where the longer one has more, that has to be zero.

    With `strict` they must also be of one size, and store the same ranges in the same way: as data, as zeroes, or not at
    all.  The first difference ends it.
    """
    return Job(_Compare(a, b, strict), speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Compare(Record, Task[CompareResult]):
    verb: ClassVar[str] = "compare"

    a: Disk | Target
    b: Disk | Target
    strict: bool

    def run(self, control: Control) -> CompareResult:
        with opened(self.a) as a, opened(self.b) as b:
            if self.strict and a.size != b.size:
                return CompareResult(False, "size", size_mismatch=True)
            size = max(a.size, b.size)
            control.set_total(size)
            return _Comparison(control, a, b, size, strict=self.strict).run()


class _Comparison:
    def __init__(self, control: Control, a: Disk, b: Disk, size: int, *, strict: bool) -> None:
        self._control = control
        self._a = a
        self._b = b
        self._wholes = Concatenation([a], size=size), Concatenation([b], size=size)
        self._mismatch = _status_mismatch(a, b) if strict else None
        self._scanner = BlockScanner(_BLOCK)
        self._lock = threading.Lock()
        self._difference: int | None = None  # the lowest guest offset found so far; guarded by _lock

    def run(self) -> CompareResult:
        Crew(self._control, self._look, default_threads(), buffer=2 * PIECE, reads=2).run(self._pieces())
        size_mismatch = self._a.size != self._b.size
        if self._difference is not None:
            beyond_end = self._difference >= min(self._a.size, self._b.size)
            return CompareResult(False, "content", self._difference, size_mismatch, beyond_end)
        if self._mismatch is not None:
            return CompareResult(False, "status", self._mismatch)
        return CompareResult(True, size_mismatch=size_mismatch)

    def _pieces(self) -> Iterator[Piece]:
        for piece in pieces(self._runs()):
            if self._difference is not None:
                return  # they are taken in order, so none after this one matters
            yield piece

    def _runs(self) -> Iterator[Run]:
        """What has to be read: where not both are known to be zero, before the status differs."""
        a, b = self._wholes
        for offset, length, first, second in zipped(coalesced(a.runs()), coalesced(b.runs())):
            if self._mismatch is not None:
                length = min(length, self._mismatch - offset)
                if length <= 0:
                    return
            yield offset, length, SKIP if first == second == ZERO else COMPARE

    def _look(self, piece: Piece, buffer: memoryview) -> None:
        """In a worker: compare the runs of a piece up to the first difference."""
        a, b = self._wholes
        for whole, memory in ((a, buffer), (b, buffer[PIECE:])):
            if piece.runs:
                whole.read_runs([(offset, memory[at : at + length]) for offset, length, _what, at in piece.runs])
        for offset, length, _what, at in piece.runs:
            view, other = buffer[at : at + length], buffer[PIECE + at : PIECE + at + length]
            for first, last in self._scanner.changed_parts(view, other, offset):
                found = offset + next(i for i in range(first, last) if view[i] != other[i])
                with self._lock:
                    self._difference = found if self._difference is None else min(self._difference, found)
                return
        self._control.advance(piece.length)


def _status_mismatch(a: Disk, b: Disk) -> int | None:
    """The first guest offset that two disks of one size store in different ways."""
    runs = zipped(coalesced(_statuses(a)), coalesced(_statuses(b)))
    return next((offset for offset, _length, first, second in runs if first != second), None)


def _statuses(disk: Disk) -> Iterator[Run]:
    for extent in disk.extents():
        has_place = extent.host_offset is not None
        said = extent.data | extent.zero << 1 | extent.present << 2 | extent.compressed << 3 | has_place << 4
        yield extent.offset, extent.length, said
