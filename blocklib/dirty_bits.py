"""One bit for each piece of a disk: the compact array that a dirty bitmap keeps its state in (pure, no locks, no I/O).

Bits lie as bitmaps are stored in qcow2: bit n is bit n % 8, from the least significant, of byte n // 8, and bits behind the
last piece are zero.  Whatever may touch many of them works on whole bytes or, where ranges are told apart, by kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from blocklib._fast.bits import Bits, merge_scaled, switches

if TYPE_CHECKING:
    from blocklib.extents import RangeTable

_STEP: Final = 1 << 16
"""Bytes of bits that are looked at in one go."""
_ONES: Final = b"\xff" * _STEP
_ZEROES: Final = bytes(_STEP)
_FIRST_LOOK: Final = 32
_LAZY: Final = 1 << 20
"""Bytes of bits that are not all kept in memory: most of a large disk is not marked."""


class DirtyBits:
    """The bits of a disk of `size` bytes, one for each `granularity` bytes, which is a power of two."""

    __slots__ = ("_bits", "granularity", "shift", "size")

    def __init__(self, size: int, granularity: int) -> None:
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.size = size
        self._bits = zero_bits(bytes_for(size, self.shift))

    @classmethod
    def from_bytes(cls, size: int, granularity: int, data: Bits) -> DirtyBits:
        """Bits as `to_bytes` gave them; takes `data` over."""
        self = cls(0, granularity)
        self._bits = data
        self.truncate(size)
        return self

    def to_bytes(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) of the array, as far as it reaches."""
        return bytearray(self._bits[start:stop])

    def copy(self) -> DirtyBits:
        """The same bits, to be changed on their own."""
        return DirtyBits.from_bytes(self.size, self.granularity, _lengthened(self._bits, len(self._bits)))

    def part_is(self, start: int, stop: int) -> int | None:
        """0 or 1 where the bytes [start, stop) are all zeroes or all ones and the array reaches that far, else None.

        Bytes behind the end of the array count as zero.
        """
        first = self._bits[start] if start < len(self._bits) else 0
        if first not in (0, 0xFF) or (first and stop > len(self._bits)):
            return None
        found = self._first_unlike(first, start, min(stop, len(self._bits)))
        return None if found is not None else first & 1

    @property
    def length(self) -> int:
        """Bytes of the array."""
        return len(self._bits)

    @property
    def n_bits(self) -> int:
        return (self.size + self.granularity - 1) >> self.shift

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBits):
            return NotImplemented
        same = (self.size, self.granularity) == (other.size, other.granularity)
        return same and memoryview(self._bits) == memoryview(other._bits)

    __hash__ = None  # type: ignore[assignment]

    # -- changing -----------------------------------------------------------------------------------------------------

    def set_range(self, offset: int, length: int) -> None:
        """Mark every piece that [offset, offset + length), in bytes, touches; what lies outside the disk is left out."""
        end = min(offset + length, self.size)
        if offset < end:
            self._set(offset >> self.shift, ((end - 1) >> self.shift) + 1)

    def clear_range(self, offset: int, length: int) -> None:
        """Unmark every piece that lies wholly inside the range, or from inside it to the end of the disk."""
        end = min(offset + length, self.size)
        first = (offset + self.granularity - 1) >> self.shift
        last = self.n_bits if end == self.size else end >> self.shift
        if first < last:
            self._clear(first, last)

    def clear(self) -> None:
        """Unmark everything."""
        self._bits = zero_bits(len(self._bits))

    def _set(self, first: int, last: int) -> None:
        bits = self._bits
        low, high = first >> 3, last >> 3
        head = 0xFF << (first & 7) & 0xFF
        tail = (1 << (last & 7)) - 1
        if low == high:
            bits[low] |= head & tail
            return
        bits[low] |= head
        _fill(bits, low + 1, high, _ONES)
        if tail:
            bits[high] |= tail

    def _clear(self, first: int, last: int) -> None:
        bits = self._bits
        low, high = first >> 3, last >> 3
        head = 0xFF << (first & 7) & 0xFF
        tail = (1 << (last & 7)) - 1
        if low == high:
            bits[low] &= ~(head & tail)
            return
        bits[low] &= ~head
        _fill(bits, low + 1, high, _ZEROES)
        if tail:
            bits[high] &= ~tail

    def truncate(self, size: int) -> None:
        """Follow the disk to another size; new pieces are not marked."""
        length = bytes_for(size, self.shift)
        if length != len(self._bits):
            self._bits = _lengthened(self._bits, length)
        self.size = size
        self._cut_tail()

    def merge(self, other: DirtyBits) -> None:
        """Mark whatever is marked in `other` as well, which may have another granularity."""
        if other.granularity == self.granularity:
            _or_into(self._bits, other._bits)
        else:
            merge_scaled(self._bits, self.n_bits, other._bits, other.shift - self.shift)
        self._cut_tail()

    def _cut_tail(self) -> None:
        rest = self.n_bits & 7
        if rest:
            self._bits[-1] &= (1 << rest) - 1

    # -- looking ------------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """Dirty bytes: whole pieces, but for the last, which ends with the disk."""
        bits = self._bits
        marked = 0
        for start in range(0, len(bits), _STEP):
            marked += int.from_bytes(bits[start : start + _STEP], "little").bit_count()
        total = marked << self.shift
        last = self.n_bits - 1
        if last >= 0 and bits[last >> 3] >> (last & 7) & 1:
            total -= ((last + 1) << self.shift) - self.size
        return total

    def any(self) -> bool:
        return self._first_unlike(0, 0, len(self._bits)) is not None

    def next_dirty(self, offset: int = 0) -> tuple[int, int] | None:
        """(offset, length) of the first dirty range at or after `offset`, in bytes, clipped to it and the disk."""
        if offset >= self.size:
            return None
        first = self._next(offset >> self.shift, 1)
        if first is None:
            return None
        last = self._next(first, 0)
        start = max(offset, first << self.shift)
        end = self.size if last is None else min(last << self.shift, self.size)
        return start, end - start

    def ranges(self, offset: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, length) of every dirty range, ascending, in bytes."""
        found = self.next_dirty(offset)
        while found is not None:
            yield found
            found = self.next_dirty(sum(found))

    def _next(self, index: int, value: int) -> int | None:
        """The first bit from `index` that is `value`; None where the disk ends first."""
        n_bits = self.n_bits
        if index >= n_bits:
            return None
        bits = self._bits
        position = index >> 3
        flip = 0 if value else 0xFF
        here = (bits[position] ^ flip) >> (index & 7)
        if not here:
            found = self._first_unlike(flip, position + 1, len(bits))
            if found is None:
                return None
            position, index = found, found << 3
            here = bits[position] ^ flip
        index += (here & -here).bit_length() - 1
        return index if index < n_bits else None

    def _first_unlike(self, byte: int, start: int, stop: int) -> int | None:
        """The first byte of [start, stop) that is not `byte`, which is 0 or 255."""
        strip = b"\xff" if byte else b"\0"
        step = _FIRST_LOOK
        while start < stop:
            part = self._bits[start : min(start + step, stop)]
            left = len(part.lstrip(strip))
            if left:
                return start + len(part) - left
            start += len(part)
            step = min(step * 8, _STEP)
        return None

    def table(self, offset: int, length: int) -> RangeTable:
        """The dirty ranges inside [offset, offset + length) as rows of RANGE_DTYPE: ascending, apart, clipped to it."""
        import numpy as np

        from blocklib import extents

        end = min(offset + length, self.size)
        if offset >= end:
            return np.empty(0, dtype=extents.RANGE_DTYPE)
        first, last = offset >> self.shift, ((end - 1) >> self.shift) + 1
        changes = np.array(switches(self._bits, first, last))
        table = np.empty(len(changes) // 2, dtype=extents.RANGE_DTYPE)
        starts = np.maximum(changes[0::2] << self.shift, offset)
        table["offset"] = starts
        table["length"] = np.minimum(changes[1::2] << self.shift, end) - starts
        return table


def bytes_for(size: int, shift: int) -> int:
    """Bytes of bits for a disk of `size` bytes with pieces of ``1 << shift``."""
    return (((size + (1 << shift) - 1) >> shift) + 7) >> 3


def zero_bits(length: int) -> Bits:
    """So many bytes of zeroes."""
    if length < _LAZY or sys.platform == "win32":
        return bytearray(length)
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

    return mmap(-1, length, MAP_PRIVATE | MAP_ANONYMOUS)


def _lengthened(bits: Bits, length: int) -> Bits:
    """The same bytes, cut off or with zeroes behind them, in memory of their own."""
    found = zero_bits(length)
    _or_into(found, bits)
    return found


def _fill(bits: Bits, start: int, stop: int, pattern: bytes) -> None:
    for position in range(start, stop, _STEP):
        n = min(_STEP, stop - position)
        bits[position : position + n] = pattern if n == _STEP else pattern[:n]


def _or_into(bits: Bits, other: Bits) -> None:
    for start in range(0, min(len(bits), len(other)), _STEP):
        theirs = other[start : min(start + _STEP, len(bits))]
        if theirs.count(0) == len(theirs):
            continue
        ours = bits[start : start + len(theirs)]
        joined = int.from_bytes(ours, "little") | int.from_bytes(theirs, "little")
        bits[start : start + len(theirs)] = joined.to_bytes(len(theirs), "little")
