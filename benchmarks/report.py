"""Results as lines for people and as JSON with the facts of the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.machine import facts
from benchmarks.measure import Result

HEADING = (
    f"{'case':24} {'ratio':>6} {'target':>6}   {'ours':>8} {'cpu':>6} {'peak':>7}   {'theirs':>8} {'cpu':>6} {'peak':>7}"
)


def line(case: Case, result: Result) -> str:
    """One result: ratio and target; seconds, CPU seconds and MiB at the peak of both sides; what is missed."""
    target = "" if case.target is None else f"{case.target:.2f}"
    text = f"{case.name:24} {result.ratio:6.2f} {target:>6}"
    for side in (result.ours, result.theirs):
        text += f"   {side.seconds:7.3f}s {side.cpu_seconds:6.2f} {side.peak_bytes / 2**20:4.0f}MiB"
    return text + "".join(f"  {word}" for word in missed(case, result))


def missed(case: Case, result: Result) -> list[str]:
    """The targets that `result` misses, in a word each."""
    words = []
    if case.target is not None and result.ratio > case.target:
        words.append("SLOWER")
    if case.peak_mib is not None and result.ours.peak_bytes > case.peak_mib * 2**20:
        words.append(f"PEAK>{case.peak_mib}")
    return words


def save(path: Path, results: Iterable[Result]) -> None:
    """Write results and machine facts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts(), "results": [one.as_json() for one in results]}, indent=2) + "\n")
