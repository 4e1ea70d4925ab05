"""The external programs that tests compare blocklib with: finding them, running them, saying which are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

Argument = str | int | os.PathLike[str]

PACKAGES = {
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
}
"""The Debian package that a program comes in."""

TIMEOUT = 240.0
"""Seconds after which a program is killed: less than a test's own limit, so that the report names the program."""


def find_program(name: str) -> str | None:
    """The path of `name`, or None.  Looks into the system folders too, which an ordinary user's PATH leaves out."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class Program:
    """An external program as a callable: `qemu_img("check", path)` runs it and gives what it printed.

    Arguments may be strings, numbers and paths.  The environment is ours with LC_ALL=C.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def run(
        self, *arguments: Argument, input: str | None = None, cwd: str | os.PathLike[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and return all of it, whatever the exit code."""
        return subprocess.run(
            [self.path, *(str(item) if isinstance(item, int) else os.fspath(item) for item in arguments)],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=TIMEOUT,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )

    def __call__(
        self,
        *arguments: Argument,
        codes: Collection[int] = (0,),
        input: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> str:
        """Run and return standard output; an exit code outside `codes` fails the test with all that was printed."""
        done = self.run(*arguments, input=input, cwd=cwd)
        assert done.returncode in codes, (
            f"{Path(self.path).name} {' '.join(map(str, arguments))}: exit code {done.returncode}\n"
            f"{done.stdout}{done.stderr}"
        )
        return done.stdout

    def json(
        self, *arguments: Argument, codes: Collection[int] = (0,), cwd: str | os.PathLike[str] | None = None
    ) -> Any:
        """Run with `--output=json` after the command name and return what it printed, parsed."""
        return json.loads(self(arguments[0], "--output=json", *arguments[1:], codes=codes, cwd=cwd))
