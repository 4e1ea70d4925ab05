"""``python -m benchmarks.costs CASE...``: what a case asks of the kernel: system calls on image files, and bytes.

It runs both sides once under strace, which must be installed.  Calls that a ring or a kernel of numba makes are counted like
any other, except what io_uring does inside the kernel: that is seen as waits on the ring only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.environments import Images
from benchmarks.measure import ROOT, Runner

_KINDS = {
    "pread64": "read",
    "preadv": "read",
    "preadv2": "read",
    "read": "read",
    "pwrite64": "write",
    "pwritev": "write",
    "pwritev2": "write",
    "write": "write",
    "copy_file_range": "copy",
    "fdatasync": "flush",
    "fsync": "flush",
    "lseek": "seek",
    "fallocate": "allocate",
}
"""System calls that count, and as what."""
MOVES = ("read", "write", "copy")
"""Those whose result is a number of bytes."""
COLUMNS = (*MOVES, "seek", "allocate", "flush")

_CALL = re.compile(r"^(?P<pid>\d+) +(?P<name>\w+)\((?:\d+<(?P<path>[^>]*)>)?(?P<rest>.*)$")
_RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)$")
_RESULT = re.compile(r"= (-?\d+)[^=]*$")


def count(lines: Iterable[str], folder: str) -> tuple[Counter[str], Counter[str]]:
    """(calls, bytes) by kind in the lines of ``strace -f -y``, of files below `folder`."""
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    unfinished: dict[tuple[str, str], bool] = {}
    for line in lines:
        started = _CALL.match(line)
        found = started or _RESUMED.match(line)
        if found is None:
            continue
        key = (found["pid"], found["name"])
        wanted = (started["path"] or "").startswith(folder) if started else unfinished.pop(key, False)
        if found["rest"].endswith("<unfinished ...>"):
            unfinished[key] = wanted
            continue
        result = _RESULT.search(found["rest"])
        kind = _KINDS.get(found["name"])
        if wanted and kind is not None and result is not None:
            calls[kind] += 1
            moved[kind] += max(0, int(result[1])) if kind in MOVES else 0
    return calls, moved


def trace(runner: Runner, side: str, steps: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """Run `steps` under strace and count."""
    log = runner.folder(side).with_suffix(".strace")
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for step in steps:
        command = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", f"trace={','.join(_KINDS)}", "-o", str(log)]
        subprocess.run(
            [*command, *runner.arguments(step)],
            cwd=runner.folder(side),
            env=runner.environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        with log.open(errors="replace") as lines:
            found = count(lines, str(runner.images.folder))
        calls += found[0]
        moved += found[1]
        log.unlink()
    return calls, moved


def main() -> int:
    parser = argparse.ArgumentParser(description="Count system calls and bytes of both sides.")
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--images", type=Path, default=ROOT / ".benchmarks" / "images")
    parser.add_argument("--json", type=Path, help="save the counts there")
    options = parser.parse_args()
    by_name = {case.name: case for case in CASES}
    if unknown := [name for name in options.cases if name not in by_name]:
        parser.error(f"no such case: {', '.join(unknown)}")
    if shutil.which("strace") is None:
        parser.error("strace is not installed")
    saved: dict[str, dict[str, dict[str, list[int]]]] = {}
    with Runner(Images(options.images)) as runner:
        for name in options.cases:
            case = by_name[name]
            saved[name] = {}
            for side, steps in (("ours", case.ours), ("theirs", case.theirs[0])):
                runner.prepare(side, case.copies)
                calls, moved = trace(runner, side, steps)
                saved[name][side] = {kind: [calls[kind], moved[kind]] for kind in COLUMNS if calls[kind]}
                shown = (
                    f"{kind} {calls[kind]}" + (f" ({moved[kind] / 2**20:.1f} MiB)" if kind in MOVES else "")
                    for kind in COLUMNS
                    if calls[kind]
                )
                print(f"{name:20} {side:6}  {', '.join(shown)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"costs": saved}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
