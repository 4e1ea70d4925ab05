"""Which parts of a buffer are data, or differ from another buffer, in blocks that are aligned on the disk."""

from __future__ import annotations

from blocklib._fast.buffers import Part, changed_parts, data_parts
from blocklib.buffers import is_zero


class BlockScanner:
    """Looks at buffers in blocks of `block` bytes, a multiple of 8; blocks begin at multiples of it on the disk.

    Any number of threads may use it.
    """

    def __init__(self, block: int) -> None:
        self.block = block

    def data_parts(self, view: memoryview, offset: int) -> list[Part]:
        """The parts of `view` (the disk from guest `offset` on) that are not zero: ascending, apart from each other."""
        return self._parts(view, None, offset)

    def changed_parts(self, view: memoryview, other: memoryview, offset: int) -> list[Part]:
        """The parts of `view` (the disk from guest `offset` on) that differ from `other`, which is as long."""
        return self._parts(view, other, offset)

    def _parts(self, view: memoryview, other: memoryview | None, offset: int) -> list[Part]:
        length = len(view)
        head = min(-offset % self.block, length)
        tail = head + (length - head) // self.block * self.block
        parts: list[Part] = []
        if _matters(view, other, 0, head):
            parts.append((0, head))
        middle = view[head:tail]
        found = data_parts(middle, self.block) if other is None else changed_parts(middle, other[head:tail], self.block)
        for start, stop in found:
            _add(parts, head + start, head + stop)
        if _matters(view, other, tail, length):
            _add(parts, tail, length)
        return parts


def _matters(view: memoryview, other: memoryview | None, start: int, stop: int) -> bool:
    if other is None:
        return not is_zero(view[start:stop])
    return bytes(view[start:stop]) != bytes(other[start:stop])


def _add(parts: list[Part], start: int, stop: int) -> None:
    if parts and parts[-1][1] == start:
        start = parts.pop()[0]
    parts.append((start, stop))
