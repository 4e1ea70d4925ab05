"""The ends of a job: disks that the caller has opened and keeps, or targets that the job opens and closes."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from blocklib.buffers import zero_fill
from blocklib.disk import Disk
from blocklib.errors import ReadOnlyError
from blocklib.jobs.runs import ZERO, Run, runs_of
from blocklib.opening import open_disk

if TYPE_CHECKING:
    from blocklib.policy import References, Target

SECTOR = 512
"""The size of a disk is a multiple of this, except that a raw file may end anywhere."""


@contextmanager
def opened(
    disk: Disk | Target,
    mode: Literal["r", "r+"] = "r",
    *,
    format: str | None = None,
    references: References = "deny",
) -> Iterator[Disk]:
    """An open disk: the caller's, which stays open, or one for as long as the block lasts.

    Raises ReadOnlyError for a caller's disk that was opened for reading and has to be written.
    """
    if not isinstance(disk, Disk):
        with open_disk(disk, mode, format=format, references=references) as own:
            yield own
        return
    if mode == "r+" and disk.mode == "r":
        name = disk.node.filename or disk.node.name
        raise ReadOnlyError(f"{name}: opened for reading; mode 'r+' writes", node=disk.node.name)
    yield disk


def same_file(first: str | None, second: str | None) -> bool:
    """Whether two file names mean the same existing file."""
    if first is None or second is None:
        return False
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


class Concatenation:
    """Disks one after the other, read as one; each is filled up to a whole sector with zeroes.

    With `size` it ends there, or goes on to there as zeroes.
    """

    def __init__(self, disks: Sequence[Disk], size: int | None = None) -> None:
        self.disks = tuple(disks)
        self.size = 0
        self._parts: list[tuple[int, Disk | None, int]] = []  # (offset in the whole, disk or None for zeroes, length)
        for disk in disks:
            self._add(disk, disk.size if size is None else min(disk.size, size - self.size))
            if size is None:
                self._add(None, -self.size % SECTOR)
        if size is not None:
            self._add(None, size - self.size)
        self._starts = [start for start, _disk, _length in self._parts]

    def _add(self, disk: Disk | None, length: int) -> None:
        if length > 0:
            self._parts.append((self.size, disk, length))
            self.size += length

    def readinto(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer` from `offset`; the range lies inside and may reach over several disks."""
        done = 0
        while done < len(buffer):
            start, disk, length = self._parts[bisect_right(self._starts, offset + done) - 1]
            inside = offset + done - start
            part = buffer[done : done + length - inside]
            if disk is None:
                zero_fill(part)
            else:
                disk.readinto(inside, part)
            done += len(part)

    def runs(self) -> Iterator[Run]:
        """As `runs_of`, over all of it."""
        for start, disk, length in self._parts:
            if disk is None:
                yield start, length, ZERO
                continue
            for offset, n, what in runs_of(disk, 0, length):
                yield start + offset, n, what
