"""One workload and what crashes leave of it: `python -m tests.crash.campaign "resize" --seed 3 --states 300`.

With ``--state N`` only that state is looked at: what a failure prints.  Workloads with threads do not repeat themselves; a
failure leaves the run in a file, and ``--run FILE`` looks at that.
"""

from __future__ import annotations

import argparse
import pickle
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

from blocklib.crypto import luks
from tests.crash.cases import CASES, Judge
from tests.crash.look import Look
from tests.crash.replay import Recording, State, left_by, states
from tests.programs import Program, find_program

_merge_key = cache(luks.merge_key)
"""Most of the time that opening an encrypted image takes, and the same for all that a crash may leave of it."""


@dataclass(frozen=True)
class Run:
    """A workload that was run."""

    name: str
    seed: str
    recording: Recording
    judge: Judge

    @classmethod
    def of(cls, name: str, seed: str) -> Run:
        host, judge = CASES[name].run(seed)
        return cls(name, seed, host.recording(), judge)

    def look_at(
        self, n: int, folder: Path, qemu_img: Program | None, *, every: int, only: int | None = None
    ) -> int:
        """Look at `n` states (`only`: at this one of them), with qemu-img at one in `every`; their number.

        Raises AssertionError, whose last line is the command that looks at the failing state again.
        """
        chosen = states(self.recording, self.seed, n)
        if only is not None:
            chosen = [state for state in chosen if state.number == only]
        for state, left in left_by(self.recording, self.seed, chosen):
            rnd = random.Random(f"{self.seed}/{state.number}/look")
            asked = qemu_img if only is not None or rnd.randrange(every) == 0 else None
            thorough = only is not None or rnd.randrange(12) == 0
            n_events = len(self.recording.events)
            where = f"{self.name}, seed {self.seed}: after {state.cut} of {n_events} events, state {state.number}"
            try:
                with patch.object(luks, "merge_key", _merge_key):
                    self.judge(left, state.cut, Look(where, folder, rnd, asked, thorough))
            except Exception as exc:
                raise AssertionError(f"{where}: {exc}\nagain: {self._command(n, state)}") from exc
        return len(chosen)

    def _command(self, n: int, state: State) -> str:
        words = ["python", "-m", "tests.crash.campaign"]
        if CASES[self.name].repeats:
            words += [self.name, "--seed", self.seed]
        else:
            file = tempfile.NamedTemporaryFile(prefix="crash-", suffix=".run", delete=False)  # noqa: SIM115 - it shall stay
            with file:
                pickle.dump(self, file)
            words += ["--run", file.name]
        return shlex.join([*words, "--states", str(n), "--state", str(state.number)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="workloads; none: all")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--seeds", type=int, default=1, help="that many seeds, counted from a number that is the first")
    parser.add_argument("--states", type=int, default=300)
    parser.add_argument("--state", type=int)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--every", type=int, default=25, help="qemu-img looks at one state in so many")
    parser.add_argument("--go-on", action="store_true", help="after a failure, with the next seed")
    given = parser.parse_args(arguments)
    program = find_program("qemu-img")
    qemu_img = Program(program) if program else None
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    failures = 0
    try:
        if given.run is not None:
            with given.run.open("rb") as file:
                run: Run = pickle.load(file)
            run.look_at(given.states, folder, qemu_img, every=given.every, only=given.state)
            return 0
        for name in given.name or CASES:
            begun, total = time.monotonic(), 0
            for number in range(given.seeds):
                seed = given.seed if given.seeds == 1 else str(int(given.seed) + number)
                try:
                    run = Run.of(name, seed)
                    total += run.look_at(given.states, folder, qemu_img, every=given.every, only=given.state)
                except Exception as exc:
                    if not given.go_on:
                        raise
                    failures += 1
                    print(f"FAILED {name}, seed {seed}: {exc}", flush=True)
            print(f"{name}: {total} states in {time.monotonic() - begun:.1f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
