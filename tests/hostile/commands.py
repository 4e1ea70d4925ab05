"""The commands that every hostile image meets, and the judgement of how each of them ended.

The image is refused with an error that names what is wrong, or the command works; either way it costs little, opens no file but
its own, and leaves alone what it has no business to change.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import pytest

from tests.hostile.runner import MOST_MEMORY, MOST_SECONDS, SLOWER, MiB, Outcome, Runner

ON_LINUX: Final = pytest.mark.skipif(sys.platform != "linux", reason="what a process costs and opens is asked of Linux")

IMAGE: Final = "image.qcow2"
OUTPUT: Final = "output"
SECRET: Final = "secret,id=s,data=hunter2"


@dataclass(frozen=True)
class Command:
    """`arguments` of the command line, or of the function `function` of `tests.hostile.uses`."""

    arguments: tuple[str, ...]
    changes: bool = False
    """It may change the image, if that is not refused."""
    codes: tuple[int, ...] = (0,)
    """Exit codes of a correct result; 1 is an error, with one line that says which."""
    errors: tuple[int, ...] = (1,)
    function: str | None = None


def _io(*commands: str) -> tuple[str, ...]:
    return ("io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), IMAGE)


COMMANDS: Final[dict[str, Command]] = {
    "info": Command(("info", "-f", "qcow2", IMAGE)),
    "info --output=json": Command(("info", "-f", "qcow2", "--output=json", IMAGE)),
    "inspect": Command(("inspect", IMAGE), codes=(0, 1)),
    "map": Command(("map", "-f", "qcow2", "--output=json", IMAGE)),
    "check": Command(("check", "-f", "qcow2", IMAGE), codes=(0, 2, 3)),
    "check --plan": Command(("check", "-f", "qcow2", "-r", "all", "--plan", IMAGE), codes=(0, 2, 3)),
    "convert to raw": Command(("convert", "-f", "qcow2", "-O", "raw", IMAGE, OUTPUT)),
    "convert to qcow2": Command(("convert", "-f", "qcow2", "-O", "qcow2", IMAGE, OUTPUT)),
    "measure": Command(("measure", "-f", "qcow2", "-O", "qcow2", IMAGE)),
    "compare": Command(("compare", "-f", "qcow2", "-F", "qcow2", IMAGE, IMAGE), errors=(2, 3, 4)),
    "snapshot -l": Command(("snapshot", "-l", IMAGE)),
    "read": Command(("read",), function="read_everywhere"),
    "read with io": Command(("io", "-r", *_io("read 0 64k", "read 1280k 128k", "map")[1:])),
    "dd": Command(("dd", "-f", "qcow2", "-O", "raw", "bs=64k", "count=20", f"if={IMAGE}", f"of={OUTPUT}")),
    "serve": Command((IMAGE, "socket"), function="serve_and_read"),
    "open for writing": Command((IMAGE,), function="open_for_writing", changes=True),
    "check -r leaks": Command(("check", "-f", "qcow2", "-r", "leaks", IMAGE), changes=True, codes=(0, 2, 3)),
    "check -r all": Command(("check", "-f", "qcow2", "-r", "all", IMAGE), changes=True, codes=(0, 2, 3)),
    "bitmap --add": Command(("bitmap", "--add", "-f", "qcow2", IMAGE, "third"), changes=True),
    "bitmap --remove": Command(("bitmap", "--remove", "-f", "qcow2", IMAGE, "first"), changes=True),
    "bitmap --merge": Command(("bitmap", "--merge", "second", "-f", "qcow2", IMAGE, "first"), changes=True),
    "amend down": Command(("amend", "-f", "qcow2", "-o", "compat=0.10", IMAGE), changes=True),
    "amend up": Command(("amend", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", IMAGE), changes=True),
    "amend width": Command(("amend", "-f", "qcow2", "-o", "refcount_bits=64", IMAGE), changes=True),
    "resize": Command(("resize", "-f", "qcow2", IMAGE, "+1M"), changes=True),
    "resize --shrink": Command(("resize", "-f", "qcow2", "--shrink", IMAGE, "1M"), changes=True),
    "rebase -u": Command(("rebase", "-u", "-f", "qcow2", "-b", "decoy.qcow2", "-F", "qcow2", IMAGE), changes=True),
    "rebase to none": Command(("rebase", "-u", "-f", "qcow2", "-b", "", IMAGE), changes=True),
    "commit": Command(("commit", "-f", "qcow2", IMAGE), changes=True),
    "write": Command(_io("write -P 9 0 64k", "write -P 9 1280k 4k", "write -P 9 3M 4k", "flush"), changes=True),
    "write compressed": Command(_io("write -c -P 9 3M 128k", "flush"), changes=True),
    "discard": Command(_io("discard 0 256k", "discard 1280k 128k", "flush"), changes=True),
    "write zeroes": Command(_io("write -z 0 192k", "write -z -u 1280k 64k", "flush"), changes=True),
    "snapshot -c": Command(("snapshot", "-c", "another", IMAGE), changes=True),
    "snapshot -a": Command(("snapshot", "-a", "1", IMAGE), changes=True),
    "snapshot -d": Command(("snapshot", "-d", "snapshot 0", IMAGE), changes=True),
}
"""Every command by its name.  --untrusted is added to each: what is promised of it is what the library does by default."""


def spelled(command: Command, *, secret: bool, trusted: bool) -> list[str]:
    """The arguments for an image, which `secret` opens."""
    words = list(command.arguments)
    if command.function is not None:
        return [IMAGE] if words == ["read"] else words
    if secret and words[0] in ("check", "convert", "compare", "io", "map", "measure", "amend", "resize", "commit"):
        options = f"driver=qcow2,file.filename={IMAGE},encrypt.key-secret=s"
        kept = [word for word in words if word not in ("-f", "-F", "qcow2")]
        if words[0] == "convert":
            kept = ["convert", "-O", words[words.index("-O") + 1], IMAGE, OUTPUT]
        words = [options if word == IMAGE else word for word in kept]
        words[1:1] = ["--image-opts", "--object", SECRET]
    if not trusted:
        words.insert(1, "--untrusted")
    return words


# -- files -------------------------------------------------------------------------------------------------------------


def _pieces(fd: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a file stores; holes are left out, so that a sparse terabyte costs nothing."""
    position, end = 0, os.fstat(fd).st_size
    while position < end:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole follows
            return
        hole = os.lseek(fd, position, os.SEEK_HOLE)
        while position < hole:
            length = min(hole - position, 4 * MiB)
            yield position, length
            position += length


def state_of(path: Path) -> tuple[int, int]:
    """Length and time of the last change: no write, truncation or hole leaves both as they are, see `_age`."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def digest_of(path: Path) -> str:
    """The content of a file."""
    digest = blake2b()
    with path.open("rb") as file:
        for offset, length in _pieces(file.fileno()):
            part = os.pread(file.fileno(), length, offset)
            if part.count(0) != len(part):  # a hole and zeroes are the same content
                digest.update(offset.to_bytes(8, "big") + part)
    return digest.hexdigest()


def _age(path: Path) -> None:
    """Say that a file was changed long ago: clocks of file systems tick slowly, and a test is soon done."""
    os.utime(path, ns=(0, 10**18))


def copy_sparse(source: Path, target: Path) -> None:
    with source.open("rb") as origin, target.open("wb") as copy:
        for offset, length in _pieces(origin.fileno()):
            os.pwrite(copy.fileno(), os.pread(origin.fileno(), length, offset), offset)
        copy.truncate(source.stat().st_size)


# -- the judgement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How a command on an image ended, and what is wrong with that."""

    case: str
    command: str
    outcome: Outcome
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        outcome = self.outcome
        cost = f"exit {outcome.code}, {outcome.seconds:.2f} s, {outcome.memory / MiB:.0f} MiB"
        return f"{self.case!r} {self.command!r}: {'; '.join(self.wrong) or 'fine'} ({cost})\n  {outcome.err.strip()[:600]}"


def _wrong_with_end(command: Command, outcome: Outcome) -> Iterator[str]:
    if "internal error" in outcome.err or "Traceback" in outcome.err:
        yield "an internal error"
    if outcome.code in command.codes:
        return
    if outcome.code not in command.errors:
        yield f"exit code {outcome.code}"
        return
    if command.arguments[0] == "check" and "check-error: " in outcome.err + outcome.out:
        return  # it was made, and not all could be looked at; the findings are told line by line
    lines = outcome.err.splitlines() + ([] if command.arguments[0] != "io" else _io_errors(outcome))
    if not lines or any(not line.startswith("blocklib: ") for line in outcome.err.splitlines()):
        yield "not one line that says what is wrong"
    error = outcome.error
    if error is not None and "ImageError" in error["kinds"]:
        due = ("features",) if "UnsupportedFeatureError" in error["kinds"] else ("structure", "expected", "found")
        missing = [name for name in due if not error[name]]
        if missing:
            yield f"an error without {', '.join(missing)}"


def _io_errors(outcome: Outcome) -> list[str]:
    """The shell goes on after a failed request and prints the error among its output."""
    return [line for line in outcome.out.splitlines() if "failed" in line]


def wrong_with(command: Command, outcome: Outcome, *, may_open: frozenset[str]) -> Iterator[str]:
    yield from _wrong_with_end(command, outcome)
    if outcome.seconds > MOST_SECONDS * SLOWER:
        yield f"{outcome.seconds:.2f} s of a processor"
    if outcome.memory > MOST_MEMORY:
        yield f"{outcome.memory / MiB:.0f} MiB of memory"
    others = {Path(path).name for path in outcome.opened} | set(outcome.seen)
    if others - may_open:
        yield f"opened {', '.join(sorted(others - may_open))}"


class Trial:
    """A folder with one hostile image, and what else it may name, for one command after another."""

    def __init__(self, runner: Runner, folder: Path, case: str, *, secret: bool = False, trusted: bool = False) -> None:
        self.runner = runner
        self.folder = folder
        self.case = case
        self.secret = secret
        self.trusted = trusted
        self._image = folder / IMAGE
        self._pristine = folder.with_name(folder.name + ".pristine")
        for path in folder.iterdir():
            _age(path)
        self._state = state_of(self._image)
        self._digest = digest_of(self._image)
        self._others = {path: state_of(path) for path in self.folder.iterdir() if path.name != IMAGE}
        self.refused = False

    def judge(self) -> None:
        """Find out whether the image is refused: what cannot be opened to be written must never be changed."""
        outcome = self._run(COMMANDS["open for writing"])
        self.refused = outcome.error is not None and "ImageError" in outcome.error["kinds"]
        if "data_file=" in outcome.err:  # what only changes metadata needs no data file
            self.refused = False
        self._restore(force=state_of(self._image) != self._state)

    def _run(self, command: Command) -> Outcome:
        if command.changes and not self._pristine.exists():
            copy_sparse(self._image, self._pristine)
        words = spelled(command, secret=self.secret, trusted=self.trusted)
        if command.function is not None:
            return self.runner.call(command.function, words, self.folder)
        return self.runner.run(words, self.folder)

    def run(self, name: str) -> Verdict:
        command = COMMANDS[name]
        outcome = self._run(command)
        may_open = {IMAGE, OUTPUT} | ({path.name for path in self._others} if self.trusted else set())
        wrong = list(wrong_with(command, outcome, may_open=frozenset(may_open)))
        changed = state_of(self._image) != self._state
        if self.refused and not changed and command.changes:
            changed = digest_of(self._image) != self._digest
        if changed and not command.changes:
            wrong.append("the image was changed")
        if changed and command.changes and self.refused and not name.startswith("check -r"):
            wrong.append("the image was changed although it is refused")
        if changed and command.changes and outcome.code in command.errors and name.startswith("check -r"):
            wrong.append("the image was changed although its repair is refused")
        for path, state in self._others.items():
            if state_of(path) != state and not (self.trusted and command.changes):
                wrong.append(f"{path.name} was changed")
        self._restore(force=changed)
        return Verdict(self.case, name, outcome, tuple(wrong))

    def _restore(self, *, force: bool) -> None:
        for path in self.folder.iterdir():
            if path.name != IMAGE and path not in self._others:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if force and self._pristine.exists():
            copy_sparse(self._pristine, self._image)
            _age(self._image)

    def close(self) -> None:
        self._pristine.unlink(missing_ok=True)
