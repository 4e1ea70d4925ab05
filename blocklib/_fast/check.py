"""Checking an image that is as it should be: references of whole L2 tables counted, and counts compared, in one pass.

The kernels know no damage: at the first entry that is not what it should be they say where, and leave it, with all that is
done together with it, to the definition, which is the numpy code of the check and has words for everything.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from blocklib._fast.kernel import U64, Family, i64
from blocklib._fast.pointer import Pointer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    Numbers = Buffer | NDArray[Any]

family = Family(__name__)

_NONE = U64(0)
_ZERO_FLAG = U64(1)
_OFFSET = U64(0x00FF_FFFF_FFFF_FE00)
_COPIED = U64(1 << 63)
_COMPRESSED_FLAG = U64(1 << 62)
_FIELDS = U64((1 << 62) - 1)
_LOW_HALF = U64(0xFFFF_FFFF)
# What a kernel saves against numpy, in nanoseconds.
_SAVED_PER_ENTRY: Final = 30
_SAVED_PER_CLUSTER: Final = 3
_MOST_PER_ENTRY: Final = 4
"""More references than one entry makes."""


class Facts(NamedTuple):
    """What must be known of an image to judge its L2 entries."""

    cluster_bits: int
    l2_bits: int
    extended: bool
    data_file: bool
    """Guest clusters lie in another file, where nothing counts them."""
    file_size: int
    """Of the image's own file: clusters begin below."""
    compressed_offset_bits: int
    reserved: int
    """Bits that standard entries must not have."""
    count_size: int
    """Bytes of a stored count."""


class Totals(NamedTuple):
    """What was counted: references to clusters of the file, and guest clusters of tables in use."""

    references: int
    allocated: int
    compressed: int
    fragmented: int


class Walker:
    """Counts references of L2 tables into `counts` (32 bits each), judging flags by the `stored` counts.

    Both have an element for each cluster of the file and one more.
    """

    def __init__(self, facts: Facts, stored: Numbers, counts: Numbers) -> None:
        assert 9 <= facts.cluster_bits <= 21
        self._facts = facts
        self._fact_pointer = Pointer(array("Q", [int(fact) for fact in facts]), "Q")
        self._stored = Pointer(memoryview(cast(Any, stored)).cast("B"), "B")
        self._counts = Pointer(counts, "I", writable=True)
        n = -(-facts.file_size >> facts.cluster_bits) + 1
        assert self._counts.length >= n
        assert self._stored.length >= n * facts.count_size

    def walk(self, words: Numbers, uses: Numbers, active_uses: Numbers) -> Totals | None:
        """Count what tables, as they are in the file, refer to: each so often as it is used, and in use.

        None, and nothing is counted, where an entry is not what it should be, or where kernels do not pay.
        """
        pointers = Pointer(words, "Q"), Pointer(uses, "Q"), Pointer(active_uses, "Q")
        n_tables = pointers[1].length
        n = n_tables << self._facts.l2_bits
        assert pointers[2].length == n_tables
        assert n << self._facts.extended == pointers[0].length
        kernel = worth_walking(n)
        if kernel is None:
            return None
        totals = array("q", (0, 0, 0, 0))
        rest = (self._fact_pointer, self._stored, self._counts, Pointer(totals, "q", writable=True))
        done = kernel(*pointers, n, 1, *rest)
        if done < n:
            kernel(*pointers, done, -1, *rest)
            return None
        return Totals(*totals)


def worth_walking(entries: int) -> Callable[..., int] | None:
    """The kernel, where it pays for so many L2 entries."""
    return _walk.worth(entries * _SAVED_PER_ENTRY) if sys.byteorder == "little" else None


def most_references(entries: int, most_uses: int) -> int:
    """More references than so many entries make of tables that are used so often."""
    return entries * most_uses * _MOST_PER_ENTRY


def agreeing(stored: Numbers, count_size: int, counts: Numbers, n: int, most: int) -> int | None:
    """Where the first `n` stored counts, of so many bytes each, are the counted ones (or `most`, where those are more).

    The last cluster in use, or -1.  None where they differ, or where a kernel does not pay.
    """
    kernel = _agree.worth(n * _SAVED_PER_CLUSTER) if sys.byteorder == "little" else None
    if kernel is None:
        return None
    stored_pointer, counts_pointer = Pointer(memoryview(cast(Any, stored)).cast("B"), "B"), Pointer(counts, "I")
    assert stored_pointer.length >= n * count_size
    assert counts_pointer.length >= n
    last = array("q", (-1,))
    agree = kernel(stored_pointer, count_size, counts_pointer, n, most, Pointer(last, "q", writable=True))
    return last[0] if agree else None


@family.helper
def _swapped(word: Any) -> Any:
    """A word of the file, whose bytes are the other way round."""
    word = ((word & U64(0x00FF00FF00FF00FF)) << U64(8)) | ((word >> U64(8)) & U64(0x00FF00FF00FF00FF))
    word = ((word & U64(0x0000FFFF0000FFFF)) << U64(16)) | ((word >> U64(16)) & U64(0x0000FFFF0000FFFF))
    return ((word << U64(32)) & U64(0xFFFFFFFF00000000)) | (word >> U64(32))


@family.helper
def _is_one(stored: Any, size: int, index: int) -> bool:
    at = index * size
    others = i64(stored[at + size - 1]) if size > 1 else 0  # all of them, where counts have the usual 16 bits
    for place in range(at + 1, at + size - 1):
        others |= i64(stored[place])
    return stored[at] == 1 and others == 0


@family.kernel("i64(u64*, u64*, u64*, i64, i64, u64*, u8*, u32*, i64*)")
def _walk(
    words: Any, uses: Any, active_uses: Any, n: int, sign: int, facts: Any, stored: Any, counts: Any, totals: Any
) -> int:
    """Add `sign` for each reference of the first `n` entries; ends at the first that is not what it should be."""
    bits = i64(facts[0])
    l2_bits = i64(facts[1])
    step = 1 + i64(facts[2])
    data_file = facts[3] != _NONE
    size = i64(facts[4])
    offset_bits = facts[5]
    reserved = facts[6]
    count_size = i64(facts[7])
    cluster = 1 << bits
    row_mask = (1 << l2_bits) - 1
    references = 0
    allocated = 0
    compressed = 0
    fragmented = 0
    times = 0
    active = 0
    expected = -1
    index = 0
    while index < n:
        if index & row_mask == 0:
            times = i64(uses[index >> l2_bits])
            active = i64(active_uses[index >> l2_bits])
            expected = -1
        entry = _swapped(words[index * step])
        bitmap = _NONE
        if step == 2:
            bitmap = _swapped(words[index * 2 + 1])
        if entry == _NONE and bitmap & _LOW_HALF == _NONE:
            index += 1
            continue
        if entry & _COMPRESSED_FLAG != _NONE:
            if entry & _COPIED != _NONE or data_file or bitmap != _NONE:
                break
            fields = entry & _FIELDS
            start = i64(fields & ((U64(1) << offset_bits) - U64(1)))
            end = start + (i64(fields >> offset_bits) + 1) * 512 - (start & 511)
            if end >= size + cluster:
                break
            allocated += active
            compressed += active
            fragmented += active
            for number in range(start >> bits, ((end - 1) >> bits) + 1):
                counts[number] += sign * times
                references += times
            index += 1
            continue
        host = i64(entry & _OFFSET)
        is_copied = entry & _COPIED != _NONE
        placed = host != 0 or (data_file and is_copied and entry & _ZERO_FLAG == _NONE)
        if entry & reserved != _NONE or host & (cluster - 1) != 0:
            break
        if bitmap & (bitmap >> U64(32)) & _LOW_HALF != _NONE or (bitmap & _LOW_HALF != _NONE and not placed):
            break
        if placed:
            if data_file:
                if active != 0 and not is_copied:
                    break
            else:
                if host >= size or (active != 0 and is_copied != _is_one(stored, count_size, host >> bits)):
                    break
                counts[host >> bits] += sign * times
                references += times
            allocated += active
            if host != expected and expected >= 0:
                fragmented += active
            expected = host + cluster
        index += 1
    totals[0] += sign * references
    totals[1] += sign * allocated
    totals[2] += sign * compressed
    totals[3] += sign * fragmented
    return index


@family.kernel("i64(u8*, i64, u32*, i64, u64, i64*)")
def _agree(stored: Any, size: int, counts: Any, n: int, most: Any, last: Any) -> int:
    last_shift = U64(8 * (size - 1))
    for index in range(n):
        at = index * size
        there: Any = U64(stored[at]) | (U64(stored[at + size - 1]) << last_shift)  # all of it, up to the usual 16 bits
        for place in range(1, size - 1):
            there = there | (U64(stored[at + place]) << U64(8 * place))
        if there != min(U64(counts[index]), most):
            return 0
        if there != _NONE:
            last[0] = index
    return 1
