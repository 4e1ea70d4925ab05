"""Where a run begins: which program are we called as, which command is wanted, and how does it end.

Called through a link named ``qemu-img``, ``qemu-io`` or ``qemu-nbd`` this is that program.  Commands are imported by name
when they are called, so that ``info`` of a small image does not pay for the others.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blocklib.cli.getopt import HELP, Given, Syntax, UsageFailure, help_text, parse
from blocklib.cli.output import print_error
from blocklib.cli.session import EXIT_INTERRUPTED, Failure, Interrupted, Session, run_in_worker
from blocklib.errors import BlocklibError, JobCancelled

if TYPE_CHECKING:
    from typing import Protocol

    class Command(Protocol):
        """What a command's module has, and perhaps `prepare`, which runs before any thread does: its exit code, if it has one,
        is that of the command."""

        SYNTAX: Syntax
        run: Callable[[Session, Given], int]


COMMANDS = {
    "amend": "change options that an image was made with",
    "bench": "time many requests to an image",
    "bitmap": "add, remove, merge and change the dirty bitmaps of an image",
    "check": "look for damage and leaked clusters, and repair them",
    "commit": "write what an image holds into one below it",
    "compare": "tell whether two images read the same",
    "convert": "copy one or more images into a new one, of any format",
    "create": "make a new image",
    "dd": "copy a range of blocks between images",
    "info": "show what an image says of itself",
    "inspect": "tell whether a file is safe to hand on, without trusting it",
    "io": "read and write single ranges, in qemu-io's language",
    "map": "show where every range of an image lives",
    "measure": "tell how many bytes a new image needs",
    "nbd": "give out an image over the network, or list what somebody gives out",
    "rebase": "change the image below an image",
    "resize": "change the size of an image",
    "snapshot": "keep states of a disk inside its image, and go back to them",
}
"""Every command, and what it does.  Each is the module of its name beside this one."""

_COMMAND_OF_PROGRAM = {"qemu-io": "io", "qemu-nbd": "nbd"}
"""Programs that are one command."""
_QEMU_VERSION = "7.2.0"
"""Whose options, output and exit codes are ours."""
_EXIT_FAILED = 1
_GARBAGE = 50_000
"""New objects between two searches for cycles: the interpreter's 700 would make many while modules are loaded."""
_EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: what a shell reports of a program whose reader has gone."""


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line and return the exit code.  Without `arguments`: those of this process."""
    is_process = arguments is None
    if arguments is None:
        arguments = sys.argv[1:]
        _prepare_streams()
        gc.set_threshold(_GARBAGE)
    session = Session(program or _program_name(sys.argv[0]))
    try:
        code = _dispatch(session, list(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:  # before or after the command's own work, where there is nothing to undo
        return EXIT_INTERRUPTED
    except Exception as exc:  # the edge: whatever went wrong becomes one line
        if isinstance(exc, OSError) and not isinstance(exc, BlocklibError):
            return _give_up_output(session, exc)
        return _report(session, exc)
    if is_process:
        gc.freeze()  # what is still there goes with the process, and need not be searched for cycles first
    return code


def _program_name(path: str) -> str:
    name = os.path.basename(path)
    # `python -m blocklib` puts the module's file there.
    return "blocklib" if name in ("__main__.py", "-c", "") else name


def _prepare_streams() -> None:
    """Print file names that are no valid text as the bytes they are, and print into nothing where a stream is closed.

    An image could otherwise get the number of a closed stream, and what is printed there.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")


def _dispatch(session: Session, arguments: list[str]) -> int:
    if arguments[:1] in (["-V"], ["--version"]):
        print(_version(session.program))
        return 0
    command = _COMMAND_OF_PROGRAM.get(session.program)
    spelled = session.program
    if command is None:
        if not arguments:
            raise UsageFailure(f"no command given (see '{spelled} --help')")
        command = arguments.pop(0)
        if command in HELP.names:
            print(_overview(session.program))
            return 0
        if command not in COMMANDS:
            kind = "option" if command.startswith("-") else "command"
            raise UsageFailure(f"unknown {kind} '{command}' (see '{spelled} --help')")
        spelled = f"{spelled} {command}"
    module = _load(command)
    try:
        given = parse(module.SYNTAX, arguments)
        session.debug = given.has("--debug")
        if given.has(HELP.names[0]):
            print(help_text(spelled, module.SYNTAX))
            return 0
        prepare: Callable[[Session, Given], int | None] | None = getattr(module, "prepare", None)
        code = prepare(session, given) if prepare is not None else None
        return run_in_worker(session, lambda: module.run(session, given)) if code is None else code
    except UsageFailure as exc:
        raise UsageFailure(f"{exc} (see '{spelled} --help')") from exc


def _load(command: str) -> Command:
    from importlib import import_module

    module: Command = import_module(f"blocklib.cli.{command}")
    return module


def _version(program: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("pyblocklib")
    except PackageNotFoundError:
        number = "(not installed)"
    ours = f"blocklib {number}"
    # Programs that call qemu-img look for its name and number at the beginning of this line.
    return ours if program == "blocklib" else f"{program} version {_QEMU_VERSION} ({ours})"


def _overview(program: str) -> str:
    lines = [f"usage: {program} COMMAND [options] ...", "", "Work with virtual disk images.", "", "commands:"]
    lines += [f"  {name:<10}  {about}" for name, about in COMMANDS.items()]
    lines += ["", f"'{program} COMMAND --help' tells what a command accepts, '{program} --version' which one this is."]
    return "\n".join(lines)


def _report(session: Session, exc: Exception) -> int:
    """Say in one line what went wrong, and give the exit code for it."""
    from blocklib.cli.common import explain

    if session.debug:
        from traceback import print_exception

        print_exception(exc)
    if session.interrupted and isinstance(exc, (Interrupted, JobCancelled)):
        print_error(session.program, "interrupted")
        return EXIT_INTERRUPTED
    if isinstance(exc, (Failure, UsageFailure)):
        text = str(exc)
    elif isinstance(exc, BlocklibError):
        text = explain(exc)
    elif isinstance(exc, OSError):
        text = f"{exc.filename or 'output'}: {exc.strerror}"
    else:
        about = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        text = f"internal error: {about} (--debug shows where)"
    print_error(session.program, text)
    return exc.code if isinstance(exc, Failure) else _EXIT_FAILED


def _give_up_output(session: Session, exc: OSError) -> int:
    """What we print cannot be written: the reader has gone, which is no error of ours, or there is no space.

    What is still buffered must go somewhere, or the interpreter would complain about it when it exits.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return _EXIT_BROKEN_PIPE if isinstance(exc, BrokenPipeError) else _report(session, exc)
