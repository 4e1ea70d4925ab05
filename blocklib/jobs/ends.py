"""The ends of a job: disks that the caller has opened and keeps, or targets that the job opens and closes."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from blocklib import graph
from blocklib.buffers import zero_fill
from blocklib.disk import Disk
from blocklib.errors import NameNotFoundError, ReadOnlyError, UsageError
from blocklib.jobs.runs import ZERO, Run, runs_above, runs_of
from blocklib.opening import open_disk
from blocklib.places import Places
from blocklib.reports import NodeInfo

if TYPE_CHECKING:
    from blocklib.policy import References, Target
    from blocklib.reports import NodeInfo

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


class Source:
    """A disk that a job reads where it has looked up what there is to read, in the images above `base`."""

    def __init__(self, disk: Disk, base: NodeInfo | None = None) -> None:
        self._disk = disk
        self._base = base
        chain = graph.chain(disk.node)
        self._places = Places(disk.node, next((node for node in chain if base is not None and node.name == base.name), None))

    def readinto(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer` from `offset`."""
        self.read_runs([(offset, buffer)])

    def read_runs(self, runs: Sequence[tuple[int, memoryview]], /) -> None:
        """Fill each view from its offset; ascending."""
        self._disk.read_placed(runs, self._places)

    def runs(self, length: int) -> Iterator[Run]:
        """As `runs_of`, over its first `length` bytes."""
        return runs_of(self._disk, 0, length, places=self._places)

    def runs_above(self, *, absent: int, absent_zero: int) -> Iterator[Run]:
        """As `runs_above`, over all of it."""
        disk = self._disk
        return runs_above(disk, 0, disk.size, self._base, absent=absent, absent_zero=absent_zero, places=self._places)


def image_below(disk: Disk, wanted: NodeInfo | str | os.PathLike[str]) -> NodeInfo:
    """The image below the top one of `disk` that `wanted`, of ``disk.chain()`` or a file name, means.

    Raises UsageError where there is no backing file, NameNotFoundError.
    """
    for image in images_below(disk):
        if is_image(image, wanted):
            return image
    name = wanted.filename or wanted.name if isinstance(wanted, NodeInfo) else os.fspath(wanted)
    raise NameNotFoundError(f"{name!r} is not in the backing chain of {disk.node.filename or disk.node.name}")


def is_image(image: NodeInfo, wanted: NodeInfo | str | os.PathLike[str]) -> bool:
    """Whether `wanted` means this image: by its node, or by its file."""
    if isinstance(wanted, NodeInfo):
        return image.name == wanted.name
    return image.filename == os.fspath(wanted) or same_file(image.filename, os.fspath(wanted))


def images_below(disk: Disk) -> tuple[NodeInfo, ...]:
    """The images below the top one.  Raises UsageError where there is none."""
    below = disk.chain()[1:]
    if not below:
        raise UsageError(f"{disk.node.filename or disk.node.name}: the image has no backing file", node=disk.node.name)
    return below


class Concatenation:
    """Disks one after the other, read as one; each is filled up to a whole sector with zeroes.

    With `size` it ends there, or goes on to there as zeroes.
    """

    def __init__(self, disks: Sequence[Disk], size: int | None = None) -> None:
        self.disks = tuple(disks)
        self.size = 0
        self._parts: list[tuple[int, Source | None, int]] = []  # (offset in the whole, disk or None for zeroes, length)
        for disk in disks:
            self._add(Source(disk), disk.size if size is None else min(disk.size, size - self.size))
            if size is None:
                self._add(None, -self.size % SECTOR)
        if size is not None:
            self._add(None, size - self.size)
        self._starts = [start for start, _disk, _length in self._parts]

    def _add(self, disk: Source | None, length: int) -> None:
        if length > 0:
            self._parts.append((self.size, disk, length))
            self.size += length

    def readinto(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer` from `offset`."""
        self.read_runs([(offset, buffer)])

    def read_runs(self, runs: Sequence[tuple[int, memoryview]], /) -> None:
        """Fill each view from its offset; they are ascending, lie inside and may reach over several disks."""
        index = bisect_right(self._starts, runs[0][0]) - 1 if runs else 0
        waiting: list[tuple[int, memoryview]] = []
        for offset, view in runs:
            done = 0
            while done < len(view):
                start, disk, length = self._parts[index]
                inside = offset + done - start
                part = view[done : done + max(0, length - inside)]
                if not len(part):  # the next one lies in another disk
                    self._read_part(disk, waiting)
                    index, waiting = index + 1, []
                    continue
                waiting.append((inside, part))
                done += len(part)
        if waiting:
            self._read_part(self._parts[index][1], waiting)

    def _read_part(self, disk: Source | None, runs: Sequence[tuple[int, memoryview]]) -> None:
        if disk is not None and runs:
            disk.read_runs(runs)
        elif disk is None:
            for _offset, view in runs:
                zero_fill(view)

    def runs(self) -> Iterator[Run]:
        """As `runs_of`, over all of it."""
        for start, disk, length in self._parts:
            if disk is None:
                yield start, length, ZERO
                continue
            for offset, n, what in disk.runs(length):
                yield start + offset, n, what
