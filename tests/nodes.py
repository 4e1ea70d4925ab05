"""What tests of single nodes share: putting nodes together, using them with permissions, looking at locks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocklib import status
from blocklib._fast import extents as table_kernels
from blocklib.extents import Extent
from blocklib.graph import ALL, Edge, Transaction
from blocklib.node import CONSISTENT_READ, Node
from tests.programs import find_program


def attached(parent: Node, child: Node, name: str = "file") -> Node:
    """`parent` with `child` below it, loaded."""
    with Transaction() as change:
        change.attach(parent, name, child)
    parent.load()
    return parent


@contextmanager
def used(node: Node, wanted: int = CONSISTENT_READ, shared: int = ALL) -> Iterator[Edge]:
    """A user of a loaded node, with these permissions; the node is closed at the end if nobody else uses it."""
    with Transaction() as change:
        edge = change.attach(None, "user", node, wanted=wanted, shared=shared)
    try:
        yield edge
    finally:
        with Transaction() as change:
            change.detach(edge)


def tabled(node: Node, offset: int, length: int, base: Node | None = None) -> list[Extent]:
    """The extents of a range, found by kernels however little there is, in windows that are soon full.

    Where kernels are off, they are found as always.
    """
    are_here = bool(table_kernels.family.load())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status, "worth_tables", lambda *_range: are_here)
        patch.setattr(status, "_FIRST_WINDOW", 1 << 17)
        patch.setattr(status, "_MANY_ROWS", 64)
        return list(status.extents(node, offset, length, base))


def join_extents(first: Extent, second: Extent) -> Extent | None:
    """Both as one extent if they say the same and follow each other (on the host too), else None."""
    if first[2] != second[2] or first[4:] != second[4:]:
        return None
    if first.host_offset is None or second.host_offset is None:
        if first.host_offset is not second.host_offset:
            return None
    elif first.host_offset + first.length != second.host_offset:
        return None
    return first._replace(length=first.length + second.length)


@contextmanager
def loop_device(file: Path, size: int) -> Iterator[str]:
    """The path of a block device over `file`; the test is skipped where none can be made, which needs privileges."""
    losetup = find_program("losetup")
    if losetup is None:
        pytest.skip("no losetup here")
    with file.open("wb") as backing:
        backing.truncate(size)
    done = subprocess.run([losetup, "--find", "--show", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    path = done.stdout.strip()
    try:
        yield path
    finally:
        subprocess.run([losetup, "--detach", path], check=True)


def descriptors_of(path: str | Path) -> list[int]:
    """Our own descriptors of a file."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if link.samefile(path):
                found.append(int(link.name))
        except OSError:  # the one that lists them
            continue
    return found


def locked_bytes(path: str | Path, pid: int | str = "self") -> set[int]:
    """The bytes of a file that a process has read-locked through open file descriptions."""
    found: set[int] = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        info = Path(f"/proc/{pid}/fdinfo") / link.name
        try:
            if not link.samefile(path):
                continue
            lines = info.read_text().splitlines()
        except OSError:  # closed since, or no file at all
            continue
        for words in (line.split() for line in lines if line.startswith("lock:")):
            assert words[2:5] == ["OFDLCK", "ADVISORY", "READ"]
            found.update(range(int(words[-2]), int(words[-1]) + 1))
    return found
