"""Arrays of bits, as dirty bitmaps keep them: where they turn from 0 to 1 and back, and merging two of different granularity.

Bit n is bit n % 8, from the least significant, of byte n // 8.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from blocklib._fast.kernel import Family
from blocklib._fast.pointer import Pointer

if TYPE_CHECKING:
    from mmap import mmap

Bits: TypeAlias = "bytearray | mmap"
"""Bytes of bits; where they are many, in memory that takes no room before they are changed."""

family = Family(__name__)

_PART: Final = 1 << 16
"""Switches that are found together."""
_SAVED_PER_BYTE: Final = 40
"""Nanoseconds that a kernel saves, against going from one run of ones to the next, where there are some."""


def switches(bits: Bits, first: int, stop: int) -> array[int]:
    """Where bits [first, stop) turn from 0 to 1 and back, as if zeroes lay around them: an even number of positions."""
    assert 0 <= first <= stop <= len(bits) * 8
    kernel = _switches.worth(((stop - first) >> 3) * _SAVED_PER_BYTE)
    if kernel is None:
        return switches_definition(bits, first, stop)
    state = array("q", (first, 0, 0))
    part = array("q", bytes(8 * _PART))
    pointers = Pointer(part, "q", writable=True), Pointer(state, "q", writable=True)
    view = Pointer(bits, "B")
    found = array("q")
    while True:
        kernel(view, stop, *pointers, _PART)
        found += part[: state[2]]
        if state[2] < _PART:
            break
    if state[1]:
        found.append(stop)
    return found


def switches_definition(bits: Bits, first: int, stop: int) -> array[int]:
    """What `switches` answers."""
    found = array("q")
    before = 0
    position = first
    while position < stop:
        byte = bits[position >> 3]
        if byte == 0xFF * before:  # more of the same
            position = (position | 7) + 1
            continue
        bit = byte >> (position & 7) & 1
        if bit != before:
            found.append(position)
            before = bit
        position += 1
    if before:
        found.append(stop)
    return found


def merge_scaled(bits: Bits, n: int, other: Bits, shift: int) -> None:
    """Set what is set in `other` in the first `n` bits of `bits`, too.

    A bit of `other` is worth ``1 << shift`` of ours, or with a negative shift a part of one.
    """
    assert n <= len(bits) * 8
    assert abs(shift) < 32
    kernel = _merge.worth((len(other) + (len(bits) >> 6)) * _SAVED_PER_BYTE)
    if kernel is None:
        merge_scaled_definition(bits, n, other, shift)
    else:
        kernel(Pointer(bits, "B", writable=True), n, Pointer(other, "B"), len(other), shift)


def merge_scaled_definition(bits: Bits, n: int, other: Bits, shift: int) -> None:
    """What `merge_scaled` does."""
    found = switches_definition(other, 0, len(other) * 8)
    for start, stop in zip(found[0::2], found[1::2], strict=True):
        first = start << shift if shift > 0 else start >> -shift
        last = min(stop << shift if shift > 0 else (stop - 1 >> -shift) + 1, n)
        low, high = -(-first // 8), last // 8  # whole bytes
        if low < high:
            bits[low:high] = b"\xff" * (high - low)
            edges = [*range(first, low * 8), *range(high * 8, last)]
        else:
            edges = [*range(first, last)]
        for bit in edges:
            bits[bit >> 3] |= 1 << (bit & 7)


@family.kernel("i64(u8*, i64, i64*, i64*, i64)")
def _switches(bits: Any, stop: int, found: Any, state: Any, most: int) -> int:
    """Find at most `most` switches from bit state[0] on, where the bit before is state[1]; state[2] is how many they are."""
    position = state[0]
    before = state[1]
    count = 0
    while position < stop and count < most:
        byte = bits[position >> 3]
        if byte == 255 * before:
            position = (position | 7) + 1
            continue
        bit = (byte >> (position & 7)) & 1
        if bit != before:
            found[count] = position
            count += 1
            before = bit
        position += 1
    state[0] = position
    state[1] = before
    state[2] = count
    return 0


@family.helper
def _set(bits: Any, first: int, stop: int) -> None:
    position = first
    while position < stop:
        if position & 7 == 0 and stop - position >= 8:
            bits[position >> 3] = 255
            position += 8
        else:
            bits[position >> 3] |= 1 << (position & 7)
            position += 1


@family.kernel("i64(u8*, i64, u8*, i64, i64)")
def _merge(bits: Any, n: int, other: Any, length: int, shift: int) -> int:
    for index in range(length):
        byte = other[index]
        if byte == 0:
            continue
        for bit in range(8):
            if (byte >> bit) & 1 != 0:
                place = index * 8 + bit
                if shift > 0:
                    _set(bits, place << shift, min((place + 1) << shift, n))
                else:
                    place = place >> -shift
                    if place < n:
                        bits[place >> 3] |= 1 << (place & 7)
    return 0
