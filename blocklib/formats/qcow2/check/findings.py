"""What a check has found so far: exact numbers, and as many findings in words as were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from blocklib.reports import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklib.formats.qcow2.check.counts import IndexArray

Kind = Literal["leak", "corruption", "check-error"]


class Findings:
    """Counts everything, keeps the first `limit` findings: an image of garbage must not cost memory for its description."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: list[Finding] = []
        self.totals: dict[Kind, int] = {"leak": 0, "corruption": 0, "check-error": 0}

    def add(
        self,
        kind: Kind,
        structure: str,
        host_offset: int | None,
        expected: str,
        found: str,
        *,
        times: int = 1,
        repairable: bool = False,
    ) -> None:
        """One finding, which counts `times` times where several tables lead to it."""
        self.totals[kind] += times
        if len(self.kept) < self.limit:
            self.kept.append(Finding(kind, structure, host_offset, expected, found, repairable))

    def add_each(
        self, kind: Kind, places: IndexArray, describe: Callable[[int], Finding], *, times: int, repairable: bool = False
    ) -> None:
        """A finding for each of `places`, `times` in all; only those that are kept are described."""
        self.totals[kind] += times
        room = self.limit - len(self.kept)
        if room > 0:
            self.kept.extend(describe(place) for place in places[:room].tolist())
