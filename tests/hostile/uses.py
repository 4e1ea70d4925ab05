"""What programs do with an image through the library where no command line does the same: served over NBD and read back.

Each function takes its arguments and gives the work, which returns an exit code; the runner calls it in a child, as the command
line would, so that errors are reported the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import blocklib
from blocklib import nbd
from blocklib.cli.getopt import Syntax

PIECE = 64 << 10


class Work:
    """A command of the command line that is a function here."""

    SYNTAX = Syntax("", "", ())

    def __init__(self, work: Callable[[], int]) -> None:
        self._work = work

    def run(self, _session: Any, _given: Any) -> int:
        return self._work()


def as_command(work: Callable[[], int]) -> Any:
    return Work(work)


def serve_and_read(arguments: list[str]) -> Callable[[], int]:
    """Serve an image over a Unix socket; a client reads its beginning and its end and asks where data is."""
    path, socket = arguments

    def work() -> int:
        with blocklib.open(path, format="qcow2") as disk:
            with nbd.Server(disk, listen=f"nbd+unix:///?socket={Path(socket).resolve()}") as server:
                with blocklib.open(server.uri, format="raw") as client:
                    first = client.read(0, min(client.size, PIECE))
                    assert first == disk.read(0, len(first))
                    length = min(client.size, PIECE)
                    client.read(client.size - length, length)
                    for _number, _extent in zip(range(100), client.extents()):
                        pass
        return 0

    return work


def read_everywhere(arguments: list[str]) -> Callable[[], int]:
    """Read pieces all over the disk one by one, ask for extents and a map, list snapshots and bitmaps."""
    (path,) = arguments

    def work() -> int:
        with blocklib.open(path, format="qcow2") as disk:
            list(disk.snapshots)
            list(disk.bitmaps)
            for number in range(8):
                offset = disk.size * number // 8 // 512 * 512
                disk.read(offset, min(PIECE, disk.size - offset))
            for _number, _extent in zip(range(1000), disk.extents()):
                pass
            disk.map(0, min(disk.size, 1 << 30))
        return 0

    return work


def open_for_writing(arguments: list[str]) -> Callable[[], int]:
    """Open an image to be written, and close it again."""
    (path,) = arguments

    def work() -> int:
        with blocklib.open(path, "r+", format="qcow2"):
            return 0

    return work
