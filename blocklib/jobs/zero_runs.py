"""Which parts of a buffer are data, or differ from another buffer: in blocks, with no Python work per block where it counts."""

from __future__ import annotations

import sys
from typing import Final, TypeAlias

from blocklib.buffers import is_zero

Part: TypeAlias = tuple[int, int]
"""(start, stop) in a buffer, bytes."""

_FEW_BYTES: Final = 32 << 20
"""Looking at so many bytes block by block costs less than importing numpy."""
_FEW_BLOCKS: Final = 32
"""And in a buffer of so few blocks, less than calling it."""


class BlockScanner:
    """Looks at buffers in blocks of `block` bytes, a multiple of 8; blocks begin at multiples of it on the disk.

    It begins with plain Python and takes numpy once there has been enough to look at.  Any number of threads may use it.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._seen = 0

    def data_parts(self, view: memoryview, offset: int) -> list[Part]:
        """The parts of `view` (the disk from guest `offset` on) that are not zero: ascending, apart from each other."""
        return self._parts(view, None, offset)

    def changed_parts(self, view: memoryview, other: memoryview, offset: int) -> list[Part]:
        """The parts of `view` (the disk from guest `offset` on) that differ from `other`, which is as long."""
        return self._parts(view, other, offset)

    def _parts(self, view: memoryview, other: memoryview | None, offset: int) -> list[Part]:
        length = len(view)
        self._seen += length
        head = min(-offset % self.block, length)
        tail = head + (length - head) // self.block * self.block
        parts: list[Part] = []
        if _matters(view, other, 0, head):
            parts.append((0, head))
        is_large = tail - head > _FEW_BLOCKS * self.block
        if is_large and (self._seen > _FEW_BYTES or "numpy" in sys.modules):
            parts += _vector_parts(view, other, head, tail, self.block)
        else:
            steps = range(head, tail, self.block)
            parts += [(start, start + self.block) for start in steps if _matters(view, other, start, start + self.block)]
        if _matters(view, other, tail, length):
            parts.append((tail, length))
        return _joined(parts)


def _matters(view: memoryview, other: memoryview | None, start: int, stop: int) -> bool:
    if other is None:
        return not is_zero(view[start:stop])
    return bytes(view[start:stop]) != bytes(other[start:stop])


def _vector_parts(view: memoryview, other: memoryview | None, start: int, stop: int, block: int) -> list[Part]:
    """The same for whole blocks, at the speed of memory and mostly without the interpreter's lock."""
    import numpy as np

    words = np.frombuffer(view[start:stop], dtype=np.uint64).reshape(-1, block // 8)
    if other is None:
        flags = np.bitwise_or.reduce(words, axis=1) != 0
    else:
        flags = (words != np.frombuffer(other[start:stop], dtype=np.uint64).reshape(words.shape)).any(axis=1)
    if flags.all():
        return [(start, stop)]
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    first = 0 if flags[0] else 1  # every other stretch between two edges counts
    return [(start + edges[i] * block, start + edges[i + 1] * block) for i in range(first, len(edges) - 1, 2)]


def _joined(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for start, stop in parts:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
