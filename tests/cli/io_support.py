"""Running ``blocklib io`` as qemu-io, and making its output and the real qemu-io's comparable."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from blocklib.cli.main import main

_HUMAN = re.compile(r"^(\S+ \S+, 1 ops; ).* \(.*/sec and .* ops/sec\)$", re.MULTILINE)
_PARSABLE = re.compile(r"^(\d+,1,)\d+:\d\d:\d\d\.\d\d,\d+\.\d{3},\d+\.\d{3}$", re.MULTILINE)


class Ran(NamedTuple):
    """What a run printed, with the times taken out, and its exit code."""

    out: str
    err: str
    code: int


def without_times(text: str) -> str:
    """The output with every duration and rate replaced; a line that is not laid out as it must be stays as it is."""
    return _PARSABLE.sub(r"\1TIMES", _HUMAN.sub(r"\1TIMES", text))


def commands(*lines: str) -> list[str]:
    """`lines` as ``-c`` arguments."""
    return [word for line in lines for word in ("-c", line)]


class OurIo:
    """``blocklib io`` called as qemu-io, in this process: `our_io("-f", "raw", path, "-c", "length")`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ran:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments], program="qemu-io")
        out, err = self._capsys.readouterr()
        return Ran(without_times(out), err, code)


# A crash that is asked for leaves no core file.
_CODE = """
import resource, sys
from blocklib.cli.main import main
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.exit(main(sys.argv[1:], program='qemu-io'))
"""
AS_QEMU_IO = (sys.executable, "-c", _CODE)
"""How to run it in a process of its own."""


def run_process(*arguments: str | Path, script: str = "") -> Ran:
    """Run it in a process of its own, with `script` as its standard input."""
    done = subprocess.run(
        [*AS_QEMU_IO, *map(str, arguments)],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Ran(without_times(done.stdout), done.stderr, done.returncode)
