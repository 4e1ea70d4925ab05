"""What copying beside a writer stands on: which parts are still to be copied, and which are being copied right now.

The order that makes it right, for every copying job: reserve a range, clear its bits, find out where its data lives, read it,
write it to the target, release it.  Who writes to the disk meanwhile either marks what it wrote once it is there, so that it
is copied again, or reserves the range itself and so waits for a copy that is under way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from blocklib.dirty_bits import DirtyBits


class CopyState:
    """The state of one copy of a disk of `size` bytes, in pieces of `granularity` bytes (a power of two).

    Safe from any thread.
    """

    def __init__(self, size: int, granularity: int) -> None:
        self.size = size
        self.granularity = granularity
        self._bits = DirtyBits(size, granularity)
        self._torn: DirtyBits | None = None
        self._reserved: list[tuple[int, int]] = []
        self._changed = threading.Condition(threading.Lock())  # guards all of it

    # -- what is to be copied -----------------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """The range is to be copied, again if it was before."""
        with self._changed:
            self._bits.set_range(offset, length)
            self._changed.notify_all()

    def merge(self, bits: DirtyBits) -> None:
        """All that is marked there is to be copied."""
        with self._changed:
            self._bits.merge(bits)
            self._changed.notify_all()

    def any(self) -> bool:
        with self._changed:
            return self._bits.any()

    def count(self) -> int:
        """Bytes that are to be copied."""
        with self._changed:
            return self._bits.count()

    def sweep(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is to be copied, once from the beginning to the end, as it is when each is asked for."""
        position = 0
        while True:
            with self._changed:
                found = self._bits.next_dirty(position)
            if found is None:
                return
            yield found
            position = sum(found)

    def remaining(self, bits: DirtyBits) -> DirtyBits:
        """What of `bits` is still to be copied; what lies in a piece with such a part counts."""
        left = DirtyBits(bits.size, bits.granularity)
        with self._changed:
            left.merge(self._bits)
        mine = DirtyBits(bits.size, bits.granularity)
        for offset, length in left.ranges():
            for start, n in bits.ranges(offset):
                if start >= offset + length:
                    break
                mine.set_range(start, min(n, offset + length - start))
        return mine

    # -- what is being copied -----------------------------------------------------------------------------------------

    @contextmanager
    def reserved(self, offset: int, length: int) -> Iterator[None]:
        """Whole pieces around a range are ours while the block runs; waits while they are somebody else's."""
        mine = self._pieces(offset, length)
        with self._changed:
            self._changed.wait_for(lambda: not self._is_reserved(*mine))
            self._reserved.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._reserved.remove(mine)
                self._changed.notify_all()

    def concerns(self, offset: int, length: int) -> bool:
        """Whether something of the whole pieces around a range is to be copied, or being copied."""
        start, end = self._pieces(offset, length)
        with self._changed:
            found = self._bits.next_dirty(start)
            return (found is not None and found[0] < end) or self._is_reserved(start, end)

    @contextmanager
    def taken(self, offset: int, length: int) -> Iterator[list[tuple[int, int]]]:
        """Reserve the pieces that a range touches; what is to be copied of them, (offset, length) each, ascending.

        What was not copied when the block raises is to be copied still, and is `torn`.
        """
        with self.reserved(offset, length):
            taken = self.take(offset, length)
            try:
                yield taken
            except BaseException:
                with self._changed:
                    if self._torn is None:
                        self._torn = DirtyBits(self.size, self.granularity)
                    for start, n in taken:
                        self._bits.set_range(start, n)
                        self._torn.set_range(start, n)
                    self._changed.notify_all()
                raise

    def torn(self, offset: int, length: int) -> bool:
        """Whether a copy of something of this range has failed once, so that the target may hold part of it already."""
        with self._changed:
            found = self._torn.next_dirty(offset) if self._torn is not None else None
        return found is not None and found[0] < offset + length

    def take(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What of a range is to be copied, in whole pieces, which are no longer marked.  The caller has reserved them."""
        position, end = self._pieces(offset, length)
        taken = []
        with self._changed:
            while (found := self._bits.next_dirty(position)) is not None and found[0] < end:
                stop = min(end, sum(found))
                taken.append((found[0], stop - found[0]))
                position = stop
            for start, n in taken:
                self._bits.clear_range(start, n)
        return taken

    def _pieces(self, offset: int, length: int) -> tuple[int, int]:
        """[start, end) of the pieces that a range touches."""
        return offset & -self.granularity, min(self.size, -(-(offset + length) // self.granularity) * self.granularity)

    def _is_reserved(self, start: int, end: int) -> bool:
        return any(start < other_end and other < end for other, other_end in self._reserved)
