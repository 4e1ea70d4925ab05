"""The targets by name, and how one is run: whatever it raises is a bug."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.fuzz import image_targets, nbd_targets, text_targets

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "header": image_targets.header,
    "tables": image_targets.tables,
    "snapshots": image_targets.snapshots,
    "bitmaps": image_targets.bitmaps,
    "luks": image_targets.luks,
    "inspect": image_targets.inspect,
    "nbd-server": nbd_targets.nbd_server,
    "nbd-client": nbd_targets.nbd_client,
    "options": text_targets.options,
    "commands": text_targets.commands,
}
LONGEST: Final[dict[str, int]] = {"header": 1200, "inspect": 600, "options": 400, "commands": 300}
"""Bytes of an input that are worth trying, where that is not 200."""


def run(target: str, data: bytes) -> None:
    """Raises what the target raises, and AssertionError where it has wanted to open something that nobody named."""
    with _sealed():
        TARGETS[target](data)
    assert not _opened or target in _NAMING, f"something was opened: {_opened}"


# -- nothing is opened -----------------------------------------------------------------------------------------------------

_REFUSED: Final = frozenset(
    {
        "open",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.link",
        "os.mkdir",
        "os.posix_spawn",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "subprocess.Popen",
    }
)
_NAMING: Final = ("commands",)
"""Targets in whose inputs users name files: those cannot be opened, and to say so is all that is due."""
_CODE: Final = (".py", ".pyc", ".so", ".pem", ".cnf")
_sealed_threads: set[int] = set()
_opened: list[str] = []
_is_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _REFUSED or threading.get_ident() not in _sealed_threads:
        return
    what = str(arguments[0]) if arguments else ""
    if event == "open" and (what.endswith(_CODE) or what == "/proc/cpuinfo"):  # an import
        return
    _opened.append(f"{event} {what}")
    raise PermissionError(13, "nothing is opened here", what)


@contextlib.contextmanager
def _sealed() -> Iterator[None]:
    """While the block runs, this thread opens no file but modules, makes no connection and no process."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        sys.addaudithook(_watch)
    _opened.clear()
    _sealed_threads.add(threading.get_ident())
    try:
        yield
    finally:
        _sealed_threads.discard(threading.get_ident())
