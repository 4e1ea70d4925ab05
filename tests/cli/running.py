"""Runs the command line inside the test's process, and takes down what it printed."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from blocklib.cli.main import main
from tests.programs import Argument


class Result(NamedTuple):
    """How a run ended and what it printed."""

    code: int
    out: str
    err: str


class CommandLine:
    """``run("info", path)`` runs a command whatever comes of it; calling it fails the test on another code than `code`."""

    def __init__(self, program: str = "blocklib") -> None:
        self.program = program

    def run(self, *arguments: Argument) -> Result:
        words = [str(item) if isinstance(item, int) else os.fspath(item) for item in arguments]
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words, program=self.program)
        return Result(code, out.getvalue(), err.getvalue())

    def __call__(self, *arguments: Argument, code: int = 0) -> str:
        result = self.run(*arguments)
        assert result.code == code, f"{self.program} {' '.join(map(str, arguments))}: {result}"
        return result.out

    def json(self, *arguments: Argument, code: int = 0) -> Any:
        """Standard output with `--output=json` after the command name, parsed."""
        return json.loads(self(arguments[0], "--output=json", *arguments[1:], code=code))

    def fails(self, *arguments: Argument, code: int = 1) -> str:
        """The one line that a failing run prints, without the name of the program."""
        result = self.run(*arguments)
        assert result.code == code, f"{self.program} {' '.join(map(str, arguments))}: {result}"
        assert result.err.count("\n") == 1, result.err
        assert result.err.startswith(f"{self.program}: ")
        assert "internal error" not in result.err
        return result.err.removeprefix(f"{self.program}: ").removesuffix("\n")
