"""The command language of ``io``: its commands, how a line becomes a call of one, and the help made from the table."""

from __future__ import annotations

import getopt
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from blocklib.cli import io_requests as requests
from blocklib.cli.common import FORCE_SHARE, Name, cache_mode, explain, target_of
from blocklib.cli.getopt import Given, Option, UsageFailure
from blocklib.cli.io_format import size_text
from blocklib.cli.io_requests import FILL, FUA, INVALID, PARSABLE, QUIET, UNMAP, ZEROES, c_integer, size
from blocklib.cli.io_shell import OPENING, Shell, opening_of
from blocklib.cli.output import fact_lines
from blocklib.cli.session import Failure
from blocklib.errors import BlocklibError
from blocklib.options import flatten, parse_create_options, parse_options

if TYPE_CHECKING:
    from blocklib.reports import ImageInfo

_SECTOR = 512
_OPTIONS = Option(("-o",), "options", "options of the driver: driver=...,key=value")


class Command(NamedTuple):
    """One command: its names, what follows them, and what it does.

    `run` returns False when the command failed and has said so.
    """

    names: tuple[str, ...]
    about: str
    run: Callable[[Shell, Given], bool]
    operands: str = ""
    arity: tuple[int, int] = (0, 0)
    """How many operands at least and at most."""
    options: tuple[Option, ...] = ()
    needs_disk: bool = True
    waits: bool = True
    """Lets asynchronous requests finish, so that their answers come first."""


# -- running ----------------------------------------------------------------------------------------------------------


def run_lines(shell: Shell, lines: Iterable[str]) -> int:
    """Run commands until there are none or ``quit``; the exit code is 1 if any of them failed.  Raises Interrupted."""
    code = 0
    for line in lines:
        shell.session.check()
        if not run_line(shell, line):
            code = 1
        if shell.finished:
            break
    return code


def run_line(shell: Shell, line: str) -> bool:
    """Run one line; False when it failed, and one line says why.  Words end at spaces, and there are no quotes."""
    words = [word for word in line.split(" ") if word]
    if not words:
        return True
    called, *rest = words
    command = _BY_NAME.get(called)
    try:
        if command is None:
            raise Failure("no such command ('help' lists them)")
        if command.needs_disk:
            shell.need_disk()
        if command.waits:
            shell.settle()
        return _call(shell, command, rest)
    except UsageFailure as exc:
        assert command is not None
        shell.complain(f"{called}: {exc}; usage: {called}{synopsis(command)}")
    except Failure as exc:
        shell.complain(f"{called}: {exc}")
    except BlocklibError as exc:
        shell.complain(f"{called}: {explain(exc)}")
    except MemoryError:
        shell.complain(f"{called}: not enough memory for that many bytes")
    return False


def _call(shell: Shell, command: Command, words: list[str]) -> bool:
    flags = "".join(option.names[0][1:] + (":" if option.metavar else "") for option in command.options)
    try:
        found, operands = getopt.gnu_getopt(words, flags)
    except getopt.GetoptError as exc:
        flag = f"-{exc.opt}"
        is_known = any(option.names[0] == flag for option in command.options)
        raise UsageFailure(f"option '{flag}' needs a value" if is_known else f"unknown option '{flag}'") from None
    least, most = command.arity
    if not least <= len(operands) <= most:
        raise UsageFailure("wrong number of arguments")
    values: dict[str, list[str]] = {}
    for name, value in found:
        values.setdefault(name, []).append(value)
    return command.run(shell, Given(values, operands))


# -- help -------------------------------------------------------------------------------------------------------------


def synopsis(command: Command) -> str:
    """What follows the name of a command, with a space before it: `` [-Cq] off len``."""
    names = [option.names[0] for option in command.options if option.metavar is None]
    flags = "".join(name[1:] for name in sorted(names, key=str.lower))
    parts = [f"[-{flags}]"] if flags else []
    parts += [f"[{option.names[0]} {option.metavar}]" for option in command.options if option.metavar is not None]
    if command.operands:
        parts.append(command.operands)
    return "".join(f" {part}" for part in parts)


def _headline(command: Command, called: str) -> str:
    return f"{called}{synopsis(command)} -- {command.about}"


def _help(shell: Shell, given: Given) -> bool:
    if not given.operands:
        for command in COMMANDS:
            shell.say(_headline(command, command.names[0]))
        shell.say("\nUse 'help commandname' for extended help.")
        return True
    called = given.operands[0]
    found = _BY_NAME.get(called)
    if found is None:
        raise Failure(f"there is no command '{called}'")
    shell.say(_headline(found, called))
    for option in sorted(found.options, key=lambda option: option.names[0].lower()):
        spelled = " ".join(filter(None, (option.names[0], option.metavar)))
        shell.say(f"  {spelled:<16}  {option.help}")
    return True


# -- telling ----------------------------------------------------------------------------------------------------------


def _length(shell: Shell, given: Given) -> bool:
    shell.say(size_text(shell.need_disk().size))
    return True


def _info(shell: Shell, given: Given) -> bool:
    info = shell.need_disk().info()
    shell.say(f"format name: {info.format}")
    shell.say(f"cluster size: {size_text(info.cluster_size or 0)}")
    shell.say(f"vm state offset: {size_text(_vm_state_offset(info))}")
    if info.format_specific:
        shell.say("\n".join(["Format specific information:", *fact_lines(info.format_specific, 1)]))
    return True


def _vm_state_offset(info: ImageInfo) -> int:
    """Where the guest offsets of a VM state begin: in qcow2 after the last L2 table of the disk, elsewhere nowhere."""
    if info.format != "qcow2" or info.cluster_size is None:
        return 0
    entry_length = 16 if (info.format_specific or {}).get("extended-l2") else 8
    per_table = info.cluster_size // entry_length * info.cluster_size
    return -(-info.virtual_size // per_table) * per_table


def _alloc(shell: Shell, given: Given) -> bool:
    disk = shell.need_disk()
    start = size(given.operands[0])
    wanted = size(given.operands[1]) if len(given.operands) == 2 else _SECTOR
    length = max(0, min(wanted, disk.size - start))
    allocated = sum(run for _, run, held in _held_runs(shell, start, length) if held)
    shell.say(f"{allocated}/{length} bytes allocated at offset {size_text(start)}")
    return True


def _map(shell: Shell, given: Given) -> bool:
    for start, length, held in _held_runs(shell, 0, shell.need_disk().size):
        word = "    allocated" if held else "not allocated"
        place = f"{size_text(start)} ({start:#x})"
        shell.say(f"{size_text(length)} ({length:#x}) bytes {word} at offset {place}")
    return True


def _held_runs(shell: Shell, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, held) of ranges that the top image holds itself or does not, in turn."""
    if not length:
        return
    start, end, held = offset, offset, False
    for extent in shell.need_disk().extents(offset, length):
        shell.session.check()
        here = extent.present and extent.depth == 0
        if here != held:
            if end > start:
                yield start, end - start, held
            start, held = extent.offset, here
        end = extent.offset + extent.length
    yield start, end - start, held


# -- opening and closing ----------------------------------------------------------------------------------------------


def _open(shell: Shell, given: Given) -> bool:
    if shell.image_opts:
        if given.has("-o"):
            raise Failure("with --image-opts the name is options already, and there is no -o")
        if not given.operands:
            raise UsageFailure("needs options")
        shell.open(opening_of(given, parse_options(given.operands[0]), None, {}))
        return True
    options = parse_create_options(given.all("-o"))
    if given.operands:
        image_format = options.pop("driver", None)
        name = Name(given.operands[0], None, is_options=False)
        shell.open(opening_of(given, target_of(name, untrusted=shell.untrusted), image_format, options))
    elif options:
        shell.open(opening_of(given, options, None, {}))
    else:
        raise UsageFailure("needs a path, or options that say which file")
    return True


def _reopen(shell: Shell, given: Given) -> bool:
    opening = shell.opening
    assert opening is not None
    if opening.snapshot:
        raise Failure("what was opened with -s cannot be reopened: its overlay would be lost")
    if given.has("-r") and given.has("-w"):
        raise UsageFailure("-r and -w exclude each other")
    changes = parse_create_options(given.all("-o"))
    for name in changes:
        if name.rpartition(".")[2] in ("driver", "filename", "node-name"):
            raise Failure(f"option '{name}' cannot be changed")
    # A format that was guessed stays what it is, whatever the bytes look like by now.
    is_said = isinstance(opening.target, Mapping) and "driver" in opening.target
    image_format = None if is_said else shell.need_disk().chain()[0].driver
    changed = opening._replace(
        format=image_format,
        options={**flatten(opening.options), **changes},
        write=opening.write if not given.has("-r") and not given.has("-w") else given.has("-w"),
        cache=cache_mode(given, "-c", opening.cache),
    )
    shell.reopen(changed)
    return True


def _close(shell: Shell, given: Given) -> bool:
    shell.close()
    return True


# -- the process ------------------------------------------------------------------------------------------------------


def _quit(shell: Shell, given: Given) -> bool:
    shell.finished = True
    return True


def _nothing(shell: Shell, given: Given) -> bool:
    """``aio_flush``: that asynchronous requests are waited for is said by the table."""
    return True


def _sleep(shell: Shell, given: Given) -> bool:
    milliseconds = c_integer(given.operands[0])
    if milliseconds is None:
        raise Failure(f"'{given.operands[0]}' is not a number of milliseconds")
    # In short steps, so that an interrupt is seen.
    end = time.monotonic() + milliseconds / 1000
    while (left := end - time.monotonic()) > 0:
        shell.session.check()
        time.sleep(min(left, 0.1))
    return True


def _abort(shell: Shell, given: Given) -> bool:
    """Die as in a crash: nothing is written or closed.  What was printed is kept: it tells how far the script came."""
    sys.stdout.flush()
    os.abort()


def _sigraise(shell: Shell, given: Given) -> bool:
    number = size(given.operands[0])
    if number >= signal.NSIG:
        raise Failure(f"there is no signal {number}")
    sys.stdout.flush()
    # Sent to the process, so that the main thread, which alone runs handlers, is woken by it.
    os.kill(os.getpid(), number)
    return True


def _no_breakpoints(shell: Shell, given: Given) -> bool:
    raise Failure("breakpoints are not supported: they need QEMU's blkdebug driver")


# -- the table --------------------------------------------------------------------------------------------------------

_VECTOR = "off len [len..]"
_TWO = (2, 2)
_MANY = (2, sys.maxsize)
_READV = (PARSABLE, QUIET, requests.DUMP, requests.VERIFY)
_WRITEV = (PARSABLE, FUA, QUIET, FILL)
_OPEN = tuple(Option((option.names[0],), option.metavar, option.help) for option in (*OPENING, FORCE_SHARE))
_REOPEN = (
    Option(("-r",), None, "for reading only"),
    Option(("-w",), None, "for writing too"),
    Option(("-c",), "cache", "with this cache mode"),
)
_PREALLOCATION = Option(("-m",), "prealloc_mode", "how the new part is allocated: off, metadata, falloc or full")

COMMANDS = (
    Command(("abort",), "crash: end by abort(3), as the image is", _abort, needs_disk=False),
    Command(("aio_flush",), "wait for all asynchronous requests", _nothing),
    Command(("aio_read",), "read, and do not wait", requests.aio_read, _VECTOR, _MANY, (*_READV, INVALID), waits=False),
    Command(
        ("aio_write",),
        "write, and do not wait",
        requests.aio_write,
        _VECTOR,
        _MANY,
        (*_WRITEV, INVALID, UNMAP, ZEROES),
        waits=False,
    ),
    Command(("alloc", "a"), "count the bytes of a range that the image itself holds", _alloc, "offset [count]", (1, 2)),
    Command(("break",), "set a breakpoint (not supported)", _no_breakpoints, "event tag", _TWO),
    Command(("close", "c"), "close the open file", _close),
    Command(("discard", "d"), "give up a range", requests.discard, "off len", _TWO, (PARSABLE, QUIET)),
    Command(("flush", "f"), "make everything that was written durable", requests.flush),
    Command(("help", "?"), "list the commands", _help, "[command]", (0, 1), needs_disk=False, waits=False),
    Command(("info", "i"), "tell what kind of image is open", _info, waits=False),
    Command(("length", "l"), "tell the size of the disk", _length, waits=False),
    Command(("map",), "list which ranges the image itself holds", _map),
    Command(
        ("open", "o"),
        "open a file, for writing unless -r is given",
        _open,
        "[path]",
        (0, 1),
        (*_OPEN, _OPTIONS),
        needs_disk=False,
    ),
    Command(("quit", "q"), "end the program", _quit, arity=(0, sys.maxsize), needs_disk=False),
    Command(("read", "r"), "read a range", requests.read, "off len", _TWO, requests.READ),
    Command(("readv",), "read a range that is given in parts", requests.readv, _VECTOR, _MANY, _READV),
    Command(("remove_break",), "remove a breakpoint (not supported)", _no_breakpoints, "tag", (1, 1)),
    Command(("reopen",), "open the same file again in another way", _reopen, options=(*_REOPEN, _OPTIONS)),
    Command(("resume",), "resume what a breakpoint stopped (not supported)", _no_breakpoints, "tag", (1, 1)),
    Command(("sigraise",), "send a signal to this process", _sigraise, "signal", (1, 1), needs_disk=False),
    Command(("sleep",), "wait", _sleep, "milliseconds", (1, 1), needs_disk=False),
    Command(("truncate", "t"), "change the size of the disk", requests.truncate, "off", (1, 1), (_PREALLOCATION,)),
    Command(("wait_break",), "wait for a breakpoint (not supported)", _no_breakpoints, "tag", (1, 1)),
    Command(("write", "w"), "write a range", requests.write, "off len", _TWO, requests.WRITE),
    Command(("writev",), "write a range that is given in parts", requests.writev, _VECTOR, _MANY, _WRITEV),
)

_BY_NAME = {name: command for command in COMMANDS for name in command.names}
