"""Runs both sides of a case in turn, as whole processes, and makes medians and ratios of what they took."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from benchmarks.cases import Case
from benchmarks.environments import Images

ROOT = Path(__file__).parent.parent
_SCRIPT = "import sys\nfrom blocklib.cli.main import main\nsys.exit(main())\n"
"""What an installer writes for the entry point `blocklib`."""


BUDGET = 60.0
"""Seconds that the rounds of one case may take."""


class BenchmarkError(Exception):
    """A case cannot be measured: a program is missing or a command failed."""


@dataclass(frozen=True)
class Sample:
    """What one side took once: wall-clock and CPU seconds of all its processes, and the highest peak of memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Result:
    """The medians of a case.  `chosen` is which of the alternatives of the other side was the fastest here."""

    name: str
    ours: Sample
    theirs: Sample
    rounds: int
    chosen: str

    @property
    def ratio(self) -> float:
        """The median wall-clock time of ours over that of theirs."""
        return self.ours.seconds / self.theirs.seconds

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        fields = {key: value for key, value in saved.items() if key != "ratio"}
        return cls(**{**fields, "ours": Sample(**saved["ours"]), "theirs": Sample(**saved["theirs"])})


class Runner:
    """Runs commands in the folder of one side, by a process that stays small (see `benchmarks.launcher`)."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self._scratch = {side: images.folder / f"scratch-{os.getpid()}-{side}" for side in ("ours", "theirs")}
        for folder in self._scratch.values():
            folder.mkdir()
        # Not below the scratch folders: those are emptied.
        self._script = images.folder / f"scratch-{os.getpid()}-script" / "blocklib"
        self._script.parent.mkdir()
        self._script.write_text(_SCRIPT)
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C",
        }
        self._launcher = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).with_name("launcher.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            env=self.environment,
        )

    def folder(self, side: str) -> Path:
        """Where the commands of `side` run."""
        return self._scratch[side]

    def prepare(self, side: str, copies: Sequence[tuple[str, str]]) -> None:
        """Empty the folders of both sides and copy images into that of `side`.

        What the last run has written would otherwise go to the disk while the next one runs.
        """
        for folder in self._scratch.values():
            for path in folder.iterdir():
                path.unlink()
        for name, image in copies:
            target = self._scratch[side] / name
            subprocess.run(["cp", "--sparse=always", str(self.images[image]), str(target)], check=True)
        if copies:
            os.sync()

    def run(self, side: str, steps: Sequence[str]) -> Sample:
        """Run the commands `steps` one after the other."""
        samples = [self._step(side, step) for step in steps]
        return Sample(
            sum(sample.seconds for sample in samples),
            sum(sample.cpu_seconds for sample in samples),
            max(sample.peak_bytes for sample in samples),
        )

    def _step(self, side: str, step: str) -> Sample:
        argv = self.arguments(step)
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps([argv, str(self._scratch[side])]) + "\n")
        self._launcher.stdin.flush()
        seconds, cpu_seconds, peak_bytes, code = json.loads(self._launcher.stdout.readline())
        if code != 0:
            raise BenchmarkError(f"exit code {code} of {' '.join(argv)}")
        return Sample(seconds, cpu_seconds, peak_bytes)

    def arguments(self, step: str) -> list[str]:
        """The words of `step`: its program found, ``{image}`` replaced by a path."""
        program, *words = step.split()
        return [
            *self._program(program),
            *(re.sub(r"\{([^}]+)\}", lambda match: str(self.images[match[1]]), word) for word in words),
        ]

    def _program(self, name: str) -> list[str]:
        if name == "python":
            return [sys.executable]
        if name == "blocklib":
            return [sys.executable, str(self._script)]
        if name == "job":
            return [sys.executable, str(Path(__file__).with_name("live_job.py"))]
        found = shutil.which(name)
        if found is None:
            raise BenchmarkError(f"{name} is not installed: there is nothing to compare with")
        return [found]

    def close(self) -> None:
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.close()
        self._launcher.stdout.close()
        self._launcher.wait()
        for folder in (*self._scratch.values(), self._script.parent):
            shutil.rmtree(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Comparison:
    """One case, measured round by round: `run_theirs`, `run_ours`, again and again, then `result`.

    Making one warms the page cache and the compiled modules: both sides run once, uncounted, and of the other side's
    alternatives the fastest stays.  Not so for a case that is long: its first round counts.
    """

    def __init__(self, runner: Runner, case: Case) -> None:
        self.case = case
        self._runner = runner
        self._ours: list[Sample] = []
        self._theirs: list[Sample] = []
        self._chosen = case.theirs[0]
        self._pair_seconds = 0.0
        if case.long:
            return
        # The very first run also reads the images into the page cache, so the first alternative has a second chance.
        alternatives = (*case.theirs, case.theirs[0]) if len(case.theirs) > 1 else case.theirs
        seconds, self._chosen = min((self._run_theirs(steps).seconds, steps) for steps in alternatives)
        runner.prepare("ours", case.copies)
        self._pair_seconds = seconds + runner.run("ours", case.ours).seconds

    def rounds(self, budget: float) -> int:
        """As many as the case asks for, fewer where they would take more than `budget` seconds, at least one."""
        if self.case.long:
            return self.case.rounds if budget >= BUDGET else 1
        return max(1, min(self.case.rounds, int(budget / self._pair_seconds)))

    def run_theirs(self) -> None:
        """The first half of a round; ends with everything in place for the second."""
        self._theirs.append(self._run_theirs(self._chosen))
        self._runner.prepare("ours", self.case.copies)

    def run_ours(self) -> None:
        """The second half."""
        self._ours.append(self._runner.run("ours", self.case.ours))

    def result(self) -> Result:
        return Result(
            self.case.name, _medians(self._ours), _medians(self._theirs), len(self._ours), " ; ".join(self._chosen)
        )

    def _run_theirs(self, steps: Sequence[str]) -> Sample:
        self._runner.prepare("theirs", self.case.copies)
        return self._runner.run("theirs", steps)


def _medians(samples: Sequence[Sample]) -> Sample:
    return Sample(
        median(sample.seconds for sample in samples),
        median(sample.cpu_seconds for sample in samples),
        round(median(sample.peak_bytes for sample in samples)),
    )
