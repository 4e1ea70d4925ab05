"""``python -m benchmarks.run CASE...``: measure cases without pytest, one line each, as soon as it is known."""

from __future__ import annotations

import argparse
import fnmatch
import signal
import sys
from pathlib import Path

from benchmarks.cases import CASES, TABLE, Case
from benchmarks.environments import Images
from benchmarks.measure import BUDGET, ROOT, BenchmarkError, Comparison, Runner
from benchmarks.report import HEADING, line, save


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure blocklib beside qemu-img.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="name or pattern; without any: the table of targets")
    parser.add_argument("--list", action="store_true", help="show the cases and their commands, and measure nothing")
    parser.add_argument("--rounds", type=int, help="runs of each side; without it what the case says")
    parser.add_argument("--images", type=Path, default=ROOT / ".benchmarks" / "images", help="where images are kept")
    parser.add_argument("--json", type=Path, help="save the results there, with the facts of the machine")
    options = parser.parse_args()
    chosen = _chosen(options.cases)
    if not chosen:
        parser.error("no such case; --list shows them")
    if options.list:
        for case in chosen:
            print(f"{case.name:24} {case.about}")
            for steps in (case.ours, *case.theirs):
                print(f"{'':24}   {' ; '.join(steps)}")
        return 0
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # what is on the disk is removed
    failed = False
    results = []
    with Runner(Images(options.images)) as runner:
        print(HEADING, flush=True)
        for case in chosen:
            try:
                comparison = Comparison(runner, case)
                for _ in range(options.rounds or comparison.rounds(BUDGET)):
                    comparison.run_theirs()
                    comparison.run_ours()
                result = comparison.result()
            except BenchmarkError as exc:
                print(f"{case.name:24} {exc}", flush=True)
                failed = True
                continue
            results.append(result)
            print(line(case, result), flush=True)
    if options.json:
        save(options.json, results)
    return int(failed)


def _chosen(patterns: list[str]) -> list[Case]:
    if not patterns:
        return list(TABLE)
    return [case for case in CASES if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


if __name__ == "__main__":
    sys.exit(main())
