"""A filter that counts what it sees, and notes it, for tests of who passes filters by."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from blocklib import graph
from blocklib.dirty_bits import DirtyBits
from blocklib.disk import Disk
from blocklib.jobs.dirty_copy import Placement
from blocklib.node import Node
from blocklib.passing import PassingFilter


class CountingNode(PassingFilter):
    """Counts bytes by what is done to them, and marks where: "read", "write", "packed", "zero", "discard"."""

    driver = "counting"
    sees_reads: ClassVar[bool] = True
    sees_writes: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = True

    def __init__(self, size: int, *, read_only: bool = False, filename: str | None = None) -> None:
        super().__init__(None, filename, read_only=read_only)
        self._lock = threading.Lock()
        self._space = size
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.bytes: Counter[str] = Counter()
        self._seen: dict[str, DirtyBits] = {}
        self.log: list[tuple[str, int, int]] = []

    def ranges(self, what: str) -> list[tuple[int, int]]:
        """(offset, length) of what was seen, each byte once."""
        seen = self._seen.get(what)
        return list(seen.ranges()) if seen is not None else []

    def bytes_inside(self, what: str, ranges: Iterable[tuple[int, int]]) -> int:
        """Bytes, each as often as it was seen, inside some ranges (offset, length)."""
        inside = 0
        for start, n in ranges:
            for kind, offset, length in self.log:
                if kind == what:
                    inside += max(0, min(start + n, offset + length) - max(start, offset))
        return inside

    def _count(self, what: str, offset: int, length: int) -> None:
        with self._lock:
            self.log.append((what, offset, length))
            self.bytes[what] += length
            self._seen.setdefault(what, DirtyBits(self._space, 512)).set_range(offset, length)

    def read_special(self, offset: int, view: memoryview) -> bool:
        self._count("read", offset, len(view))
        return super().read_special(offset, view)

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self._count("write", offset, sum(len(view) for view in views))
        super().write_special(offset, place, views)

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        self._count("packed", offset, len(data))
        super().pass_packed(offset, data, packed, unit)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self._count("zero", offset, length)
        super().zero_range(offset, length, unmap=unmap)

    def discard_range(self, offset: int, length: int) -> None:
        self._count("discard", offset, length)
        super().discard_range(offset, length)


@contextmanager
def counting(disk: Disk, node: Node | None = None) -> Iterator[CountingNode]:
    """A counting filter above the top image of a disk, or above another `node` of it, while the block runs."""
    below = node if node is not None else disk.node
    # Behind the end of an image file there is room for it to grow.
    counter = CountingNode(max(below.size * 4, 64 << 20), read_only=below.read_only, filename=below.filename)
    with graph.alone(below):
        placement = Placement(counter, below)
    try:
        yield counter
    finally:
        with graph.alone(below):
            placement.take_away()
