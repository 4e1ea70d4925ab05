"""``io``: reads and writes of single ranges, in qemu-io's command language and with its output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from blocklib.cli.common import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, check_objects, name_of, target_of
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.io_commands import run_lines
from blocklib.cli.io_shell import OPENING, Shell, opening_of
from blocklib.cli.session import Failure, Session

SYNTAX = Syntax(
    "[FILE]",
    "Read and write ranges of an image by commands: those of -c, or without -c the lines of standard input."
    " 'io -c help' lists them.",
    (
        Option(("-c", "--cmd"), "COMMAND", "run this command; may be repeated"),
        FORMAT,
        *OPENING,
        FORCE_SHARE,
        IMAGE_OPTS,
        OBJECT,
        Option(("-m", "--misalign"), None, "use buffers at odd addresses"),
        Option(("-T", "--trace"), "EVENTS", "trace events (not supported)"),
    ),
)

_PROMPT = "qemu-io> "
_STANDARD_INPUT = 0
_READ_SIZE = 1 << 16


def run(session: Session, given: Given) -> int:
    check_objects(given)
    if given.has("-T"):
        raise Failure("-T: tracing is not supported")
    if len(given.operands) > 1:
        raise UsageFailure("expects at most one file name")
    untrusted = given.has("--untrusted")
    with Shell(
        session,
        image_opts=given.has("--image-opts"),
        untrusted=untrusted,
        misaligned=given.has("-m"),
        secrets=given.secrets,
    ) as shell:
        if given.operands:
            name = name_of(given, given.operands[0])
            shell.open(opening_of(given, target_of(name, untrusted=untrusted), name.format, {}))
        return run_lines(shell, given.all("-c") if given.has("-c") else _prompted_lines(session))


def _prompted_lines(session: Session) -> Iterator[str]:
    """The lines of standard input, with a prompt before each, as qemu-io prints it for a script too.

    Raises Interrupted at once when the user interrupts while a line is waited for.
    """
    import select

    if sys.stdin is None:  # the caller has closed it
        return
    waiting, wake = os.pipe()
    try:
        with session.cancelling(lambda: os.write(wake, b"\0")):
            rest = b""
            while True:
                print(_PROMPT, end="", flush=True)
                while b"\n" not in rest:
                    select.select([_STANDARD_INPUT, waiting], [], [])
                    session.check()
                    data = os.read(_STANDARD_INPUT, _READ_SIZE)
                    if not data:
                        break
                    rest += data
                line, newline, rest = rest.partition(b"\n")
                if not line and not newline:
                    break
                yield os.fsdecode(line)
        if os.isatty(_STANDARD_INPUT):
            print()
    finally:
        os.close(wake)
        os.close(waiting)
