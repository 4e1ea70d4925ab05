"""``python -m tests.fuzz [TARGET...] [--seconds 60]``: coverage-guided fuzzing of each target in turn, two at a time.

What a run has learnt is kept in ``.fuzz/``, an input that fails as a line of hexadecimal digits in ``tests/fuzz/found/``, where
it belongs to the tests.  Exit code 1 if any did.  Without atheris, which there is for CPython 3.11 to 3.13 on Linux (x86-64),
one line says that nothing was done; in CI, there, that is a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import seeds
from tests.fuzz.targets import LONGEST, TARGETS

_ROOT = Path(__file__).parent.parent.parent
_PROGRESS = re.compile(r"#\d+|stat::|INFO:|\"\\")
_STEP = re.compile(r"^#(\d+)\s.* cov: (\d+) ft: (\d+)", re.MULTILINE)


class Outcome(NamedTuple):
    target: str
    code: int
    log: str
    found: list[Path]

    def __str__(self) -> str:
        steps = _STEP.findall(self.log)
        executions, edges, features = steps[-1] if steps else ("0", "0", "0")
        word = "sound" if not self.code and not self.found else f"FAILED, {len(self.found)} inputs kept"
        return f"{self.target:<12} {int(executions):>9} executions  {edges:>6} edges  {features:>7} features  {word}"


def _fuzz(target: str, options: argparse.Namespace) -> Outcome:
    corpus = Path(options.folder) / target
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        found, begin, dictionary = folder / "found", folder / "seeds", folder / "words"
        for part in (found, begin):
            part.mkdir()
        inputs = [*seeds.made(target), *seeds.kept(target).values()]
        for number, data in enumerate(inputs):
            (begin / str(number)).write_bytes(data)
        words = seeds.words(target)
        dictionary.write_text("".join(f'"{_quoted(word)}"\n' for word in words))
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.engine",
            target,
            str(found),
            *(["--goes-on"] if options.goes_on else []),
            f"-max_total_time={options.seconds}",
            f"-max_len={LONGEST.get(target, 200)}",
            f"-rss_limit_mb={options.megabytes}",
            f"-seed={options.seed}",
            "-timeout=20",
            "-report_slow_units=600",
            "-print_final_stats=1",
            f"-artifact_prefix={found}/",
            *([f"-runs={options.runs}"] if options.runs else []),
            *([f"-dict={dictionary}"] if words else []),
            str(corpus),
            str(begin),
        ]
        ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, errors="replace", check=False)
        kept = [seeds.keep(target, path.stem, path.read_bytes()) for path in sorted(found.iterdir())]
    return Outcome(target, ran.returncode, ran.stdout + ran.stderr, kept)


def _quoted(word: str) -> str:
    return "".join(char if char.isalnum() else f"\\x{ord(char):02x}" for char in word)


def _has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def _has_wheel() -> bool:
    """Whether this is a platform that atheris has a wheel for."""
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and sys.implementation.name == "cpython"
        and (3, 11) <= sys.version_info[:2] <= (3, 13)
        and platform.libc_ver()[0] == "glibc"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; without any, all of them")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--runs", type=int, default=0, help="at most so many inputs for each target")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried; 0 is another one each time (0)")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (2)")
    parser.add_argument("--megabytes", type=int, default=512, help="of memory that a target may use (512)")
    parser.add_argument("--folder", default=str(_ROOT / ".fuzz"), help="where what was learnt is kept (.fuzz)")
    parser.add_argument("--goes-on", action="store_true", help="go on after an input that fails")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    if not _has_atheris():
        print("nothing was fuzzed: there is no atheris here (pip install 'pyblocklib[fuzz]', CPython 3.11 to 3.13 on Linux)")
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        return 1 if in_ci and _has_wheel() else 0
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = []
        for outcome in pool.map(lambda target: _fuzz(target, options), options.targets or TARGETS):
            print(outcome, flush=True)
            outcomes.append(outcome)
    for outcome in outcomes:
        if outcome.code or outcome.found:
            print(f"\n{outcome.target} ended with {outcome.code}; the end of what it said:")
            print("\n".join([line for line in outcome.log.splitlines() if not _PROGRESS.match(line)][-120:]))
            for path in outcome.found:
                print(f"kept: {path.relative_to(_ROOT)}")
    return 1 if any(outcome.code or outcome.found for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
