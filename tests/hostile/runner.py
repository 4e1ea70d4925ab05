"""Runs commands of blocklib on images that nobody trusts, each in a process of its own, and tells what it cost and touched.

A runner is a process that imports blocklib and loads the kernels once, and then forks for every command: a child begins warm,
single-threaded and without any image, as a service's worker would.  `Runner` is the test's end of it; run as a program, this
module is the other end, which reads requests and writes outcomes as lines of JSON.

What a child opens is told by an audit hook, which every open of the interpreter passes, and by inotify on the folder that
it works in, which sees those of compiled code as well.  What it costs is the kernel's account of it: processor seconds from
`wait4`, and the peak of its resident memory from a mark that is reset when the child begins.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

MiB: Final = 1 << 20
MOST_SECONDS: Final = 2.0
"""Processor seconds that one command may take, all its threads together."""
SLOWER: Final = 3
"""How much slower than where those were measured a machine may be, and one that runs other tests beside."""
MOST_MEMORY: Final = 256 * MiB
"""What a command may have in memory, the interpreter, numpy and the kernels included (they are about half of it)."""
MOST_ADDRESSES: Final = 2048 * MiB
"""RLIMIT_AS: what keeps a bomb from taking the machine with it.  That it strikes shows as a MemoryError."""
PATIENCE: Final = 60.0
"""Wall-clock seconds after which a command hangs: it may wait for a processor, but not for ever."""
_TEXT_KEPT: Final = 4000


@dataclass
class Outcome:
    """How one command ended."""

    code: int
    """The exit code; below zero: the signal that ended it."""
    out: str = ""
    err: str = ""
    error: dict[str, Any] | None = None
    """The class and the fields of the exception that the command line reported, where it was one."""
    seconds: float = 0.0
    memory: int = 0
    """Peak of the resident memory in bytes."""
    opened: list[str] = field(default_factory=list)
    """Paths that were opened, without those of Python itself."""
    seen: list[str] = field(default_factory=list)
    """Names in the folder that were opened, as the kernel tells it."""


class Runner:
    """The runner's process.  `run` may be called any number of times; `close` ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def run(self, arguments: Sequence[str], folder: Path) -> Outcome:
        """`blocklib ARGUMENTS` in `folder`."""
        return self._ask({"arguments": list(arguments), "folder": str(folder)})

    def call(self, function: str, arguments: Sequence[str], folder: Path) -> Outcome:
        """A function of `tests.hostile.uses` by its name, in `folder`; what it returns is the exit code."""
        return self._ask({"function": function, "arguments": list(arguments), "folder": str(folder)})

    def _ask(self, request: dict[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the runner has ended"
        return Outcome(**json.loads(line))

    def close(self) -> None:
        self._process.communicate()


# -- the other end -----------------------------------------------------------------------------------------------------

_IN_OPEN, _IN_NONBLOCK = 0x20, 0o4000
_EVENT = struct.Struct("iIII")


class _Watch:
    """Which names in one folder are opened, by whomever: Linux's inotify, or nothing where that is not."""

    def __init__(self, folder: str) -> None:
        self._fd = -1
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "inotify_init1"):
            self._fd = libc.inotify_init1(_IN_NONBLOCK | os.O_CLOEXEC)
            if libc.inotify_add_watch(self._fd, os.fsencode(folder), _IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), f"inotify of {folder}")

    def names(self) -> Iterator[str]:
        """The names that were opened since the beginning."""
        if self._fd < 0:
            return
        while select.select([self._fd], [], [], 0)[0]:
            data, position = os.read(self._fd, 1 << 16), 0
            while position < len(data):
                length = _EVENT.unpack_from(data, position)[3]
                position += _EVENT.size + length
                name = os.fsdecode(data[position - length : position].rstrip(b"\0"))
                if name:
                    yield name

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _warm() -> None:
    """Everything that a command would import or compile."""
    from importlib import import_module
    from pkgutil import walk_packages

    import blocklib
    from blocklib import _fast

    for module in walk_packages(blocklib.__path__, "blocklib."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    _fast.warm()
    import_module("tests.hostile.uses")


def _python_folders() -> tuple[str, ...]:
    import blocklib

    package = str(Path(blocklib.__file__).parent)
    return tuple({os.path.realpath(folder) + os.sep for folder in (sys.prefix, sys.base_prefix, sys.exec_prefix, package)})


def _child(request: dict[str, Any], result: int, streams: tuple[int, int]) -> int:
    """In the child: the work of one request.  Writes to `result` what only the child knows; returns the exit code."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((nowhere, *streams)):
        os.dup2(fd, number)
    faulthandler.dump_traceback_later(PATIENCE - 2, file=2)
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from blocklib.cli import main as command_line
    from blocklib.cli.session import Failure

    ours = _python_folders()
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            if path not in opened and not path.startswith("/proc/self/") and not os.path.realpath(path).startswith(ours):
                opened.append(path)

    error: dict[str, Any] | None = None
    report = command_line._report

    def remember(session: Any, exc: Exception) -> int:
        nonlocal error
        shown = exc.__cause__ if type(exc) is Failure and exc.__cause__ is not None else exc
        names = ("structure", "host_offset", "expected", "found", "features", "errno")
        error = {name: getattr(shown, name, None) for name in names}
        error["kinds"] = [kind.__name__ for kind in type(shown).__mro__]
        return report(session, exc)

    command_line._report = remember
    function = request.get("function")
    arguments = request["arguments"]
    if function is not None:
        from tests.hostile import uses

        work: Callable[[], int] = getattr(uses, function)(arguments)
        command_line.COMMANDS["hostile"] = ""
        command_line._load = lambda command: uses.as_command(work)
        arguments = ["hostile"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    sys.addaudithook(watch)
    code = command_line.main(arguments, program="blocklib")
    mine = list(opened)
    sys.stdout.flush()
    sys.stderr.flush()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    os.write(result, json.dumps({"error": error, "opened": mine, "memory": peak}).encode())
    return code


def _text(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    return os.read(fd, _TEXT_KEPT).decode(errors="replace")


def _serve_one(request: dict[str, Any]) -> Outcome:
    streams = os.memfd_create("out"), os.memfd_create("err")
    watch = _Watch(request["folder"])
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 99
        try:
            code = _child(request, writer, streams)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    deadline = time.monotonic() + PATIENCE
    known = b""
    hung = False
    child = os.pidfd_open(pid)
    while not select.select([child], [], [], max(0.0, deadline - time.monotonic()))[0]:
        os.kill(pid, signal.SIGKILL)
        hung = True
    while part := os.read(reader, 1 << 16):
        known += part
    os.close(reader)
    os.close(child)
    _, status, used = os.wait4(pid, 0)
    outcome = Outcome(
        code=os.waitstatus_to_exitcode(status),
        out=_text(streams[0]),
        err=_text(streams[1]) + ("(hung)\n" if hung else ""),
        seconds=used.ru_utime + used.ru_stime,
        memory=used.ru_maxrss * 1024,
        seen=sorted(set(watch.names())),
    )
    if known:
        for name, value in json.loads(known).items():
            setattr(outcome, name, value)
    watch.close()
    for fd in streams:
        os.close(fd)
    return outcome


def _serve() -> None:
    _warm()
    gc.freeze()  # a search for cycles would touch, and so copy, all of it in every child
    for line in sys.stdin:
        print(json.dumps(asdict(_serve_one(json.loads(line)))), flush=True)


if __name__ == "__main__":
    _serve()
