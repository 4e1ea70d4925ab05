"""compare: do two disks have the same content?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.crew import Crew
from blocklib.jobs.ends import Concatenation, opened
from blocklib.jobs.job import Job
from blocklib.jobs.runs import COMPARE, COPY, PIECE, SKIP, ZERO, Piece, Run, coalesced, pieces, zipped
from blocklib.reports import CompareResult

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.policy import Target


def compare(
    a: Disk | Target,
    b: Disk | Target,
    *,
    strict: bool = False,
    speed: int = 0,
    auto_finalize: bool = True,
    progress: ProgressCallback | None = None,
) -> Job[CompareResult]:
    """Compare what two disks read as; where the longer one has more, that has to be zero.

    With `strict` they must also be of one size, and store the same ranges in the same way: as data, as zeroes, or not at
    all.  The first difference ends it.
    """
    return Job(_Compare(a, b, strict), speed=speed, auto_finalize=auto_finalize, progress=progress).start()


@dataclass(eq=False)
class _Compare(Task[CompareResult]):
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
            comparison = _Comparison(control, a, b, size, strict=self.strict)
            return comparison.run()


class _Comparison:
    def __init__(self, control: Control, a: Disk, b: Disk, size: int, *, strict: bool) -> None:
        self._control = control
        self._a = a
        self._b = b
        self._wholes = Concatenation([a], size=size), Concatenation([b], size=size)
        self._strict = strict
        self._lock = threading.Lock()
        self._difference: int | None = None
        """The lowest guest offset that differs, of those looked at; pieces are looked at in order."""
        self._mismatch: int | None = None
        """Where the status of both differs: nothing after it is looked at."""

    def run(self) -> CompareResult:
        crew = Crew(self._look, 2)
        try:
            for piece in pieces(self._runs()):
                if self._control.stop_requested:
                    crew.settle()
                self._control.pause_point(2 * piece.copied)
                if self._difference is not None:
                    break
                crew.submit(piece)
            crew.settle()
        finally:
            crew.close()
        size_mismatch = self._a.size != self._b.size
        if self._difference is not None:
            beyond = self._difference >= min(self._a.size, self._b.size)
            return CompareResult(False, "content", self._difference, size_mismatch, beyond)
        if self._mismatch is not None:
            return CompareResult(False, "status", self._mismatch)
        return CompareResult(True, size_mismatch=size_mismatch)

    def _runs(self) -> Iterator[Run]:
        """What has to be read: where not both are known to be zero."""
        runs = (
            (offset, n, SKIP if first == second == ZERO else COMPARE)
            for offset, n, first, second in zipped(self._wholes[0].runs(), self._wholes[1].runs())
        )
        if not self._strict:
            return coalesced(runs)
        self._mismatch = self._first_mismatch()
        return coalesced(_until(runs, self._mismatch))
...
