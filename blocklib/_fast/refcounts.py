"""Counts in a refcount block: looked for, compared and changed many at a time, of every width from 1 to 64 bits.

A block is an ``array`` of native integers, "B", "H", "I" or "Q" by the width of a count; below 8 bits, the least significant
bits of a byte are its first count.  On a little-endian host that is, for every width, one row of bits from the first word on,
which is what the kernels work with; on another the definitions do the work.  Blocks are tables that other threads change:
the kernels keep the interpreter's lock, and their callers the lock of the image.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from blocklib._fast.kernel import U64, Family, Kernel
from blocklib._fast.pointer import Pointer

Block: TypeAlias = "array[int]"

family = Family(__name__)

_NONE = U64(0)
_ONE = U64(1)
_ALL = U64(0xFFFF_FFFF_FFFF_FFFF)
_LITTLE: Final = sys.byteorder == "little"
# What a kernel saves for a count against the definitions, in nanoseconds, below 8 bits and from there on.
_SAVED_NARROW: Final = 150
_SAVED_WIDE: Final = 10


def get(block: Block, width: int, index: int) -> int:
    """Count number `index` of a block of counts of `width` bits."""
    if width >= 8:
        return block[index]
    position = index * width
    return block[position >> 3] >> (position & 7) & ((1 << width) - 1)


def put(block: Block, width: int, index: int, count: int) -> None:
    """Change count number `index` to `count`, which fits."""
    if width >= 8:
        block[index] = count
        return
    position = index * width
    shift = position & 7
    block[position >> 3] = block[position >> 3] & ~(((1 << width) - 1) << shift) | count << shift


def find_free(block: Block, width: int, index: int, stop: int) -> int | None:
    """The first of the counts [index, stop) that is zero."""
    kernel = _worth(_find_free, block, width, index, stop)
    if kernel is None:
        return find_free_definition(block, width, index, stop)
    found = kernel(_words(block), _order(width), index, stop)
    return found if found < stop else None


def find_free_definition(block: Block, width: int, index: int, stop: int) -> int | None:
    """What `find_free` answers."""
    if width >= 8:
        try:
            return block.index(0, index, stop)
        except ValueError:
            return None
    return next((place for place in range(index, stop) if not get(block, width, place)), None)


def run_of(block: Block, width: int, index: int, stop: int, count: int) -> int:
    """How many of the counts [index, stop) are `count` before the first that is not."""
    kernel = _worth(_run_of, block, width, index, stop)
    if kernel is None:
        return run_of_definition(block, width, index, stop, count)
    return kernel(_words(block), _order(width), index, stop, count)


def run_of_definition(block: Block, width: int, index: int, stop: int, count: int) -> int:
    """What `run_of` answers."""
    if width >= 8 and block[index:stop] == array(block.typecode, (count,)) * (stop - index):
        return stop - index
    place = index
    while place < stop and get(block, width, place) == count:
        place += 1
    return place - index


def fill(block: Block, width: int, index: int, stop: int, count: int) -> None:
    """Make all of the counts [index, stop) `count`, which fits."""
    kernel = _worth(_fill, block, width, index, stop)
    if kernel is None:
        fill_definition(block, width, index, stop, count)
    else:
        kernel(_words(block), _order(width), index, stop, count)


def fill_definition(block: Block, width: int, index: int, stop: int, count: int) -> None:
    """What `fill` does."""
    if width >= 8:
        block[index:stop] = array(block.typecode, (count,)) * (stop - index)
        return
    for place in range(index, stop):
        put(block, width, place, count)


def add(block: Block, width: int, index: int, stop: int, change: int) -> int:
    """Raise or lower the counts [index, stop) by `change`, 1 or -1, up to the first that has no room for it.

    How many were changed.
    """
    kernel = _worth(_add, block, width, index, stop)
    if kernel is None:
        return add_definition(block, width, index, stop, change)
    return kernel(_words(block), _order(width), index, stop, change)


def add_definition(block: Block, width: int, index: int, stop: int, change: int) -> int:
    """What `add` does and answers."""
    full = (1 << width) - 1 if change > 0 else 0
    for place in range(index, stop):
        count = get(block, width, place)
        if count == full:
            return place - index
        put(block, width, place, count + change)
    return stop - index


def _words(block: Block) -> Pointer:
    return Pointer(memoryview(block).cast("B"), "Q", writable=True)


def _order(width: int) -> int:
    return width.bit_length() - 1


def _worth(kernel: Kernel, block: Block, width: int, index: int, stop: int) -> Callable[..., int] | None:
    assert 0 <= index <= stop
    assert stop * width <= len(block) * block.itemsize * 8
    if not _LITTLE:
        return None
    return kernel.worth((stop - index) * (_SAVED_NARROW if width < 8 else _SAVED_WIDE))


@family.helper
def _count(words: Any, width: int, index: int) -> Any:
    position = index * width
    mask = _ALL >> U64(64 - width)
    return (words[position >> 6] >> U64(position & 63)) & mask


@family.helper
def _change(words: Any, width: int, index: int, count: Any) -> None:
    position = index * width
    shift = U64(position & 63)
    mask = _ALL >> U64(64 - width)
    word = words[position >> 6]
    words[position >> 6] = (word & ((mask << shift) ^ _ALL)) | (count << shift)


@family.helper
def _repeated(width: int, count: Any) -> Any:
    """A word full of `count`."""
    word = count
    bits = width
    while bits < 64:
        word |= word << U64(bits)
        bits += bits
    return word


@family.kernel("i64(u64*, i64, i64, i64)", holds_lock=True)
def _find_free(words: Any, order: int, index: int, stop: int) -> int:
    """The first count from `index` on that is zero, or `stop`."""
    width = 1 << order
    per_word = 64 >> order
    lows = _repeated(width, _ONE)
    highs = lows << U64(width - 1)
    place = index
    while place < stop:
        if place & (per_word - 1) == 0:
            word = words[place * width >> 6]
            # A borrow reaches the highest bit of a count that is zero, and of no other below the first such.
            if ((word - lows) & _ALL) & (word ^ _ALL) & highs == _NONE:
                place += per_word
                continue
        if _count(words, width, place) == _NONE:
            return place
        place += 1
    return stop


@family.kernel("i64(u64*, i64, i64, i64, u64)", holds_lock=True)
def _run_of(words: Any, order: int, index: int, stop: int, count: Any) -> int:
    """How many counts from `index` on, up to `stop`, are `count`."""
    width = 1 << order
    per_word = 64 >> order
    full = _repeated(width, count)
    place = index
    while place < stop:
        if place & (per_word - 1) == 0 and stop - place >= per_word and words[place * width >> 6] == full:
            place += per_word
            continue
        if _count(words, width, place) != count:
            break
        place += 1
    return place - index


@family.kernel("i64(u64*, i64, i64, i64, u64)", holds_lock=True)
def _fill(words: Any, order: int, index: int, stop: int, count: Any) -> int:
    width = 1 << order
    per_word = 64 >> order
    full = _repeated(width, count)
    place = index
    while place < stop:
        if place & (per_word - 1) == 0 and stop - place >= per_word:
            words[place * width >> 6] = full
            place += per_word
        else:
            _change(words, width, place, count)
            place += 1
    return 0


@family.kernel("i64(u64*, i64, i64, i64, i64)", holds_lock=True)
def _add(words: Any, order: int, index: int, stop: int, change: int) -> int:
    """How many counts from `index` on could be changed by `change`, 1 or -1; they are."""
    width = 1 << order
    most = _ALL >> U64(64 - width)
    for place in range(index, stop):
        count = _count(words, width, place)
        if change > 0:
            if count == most:
                return place - index
            _change(words, width, place, count + _ONE)
        else:
            if count == _NONE:
                return place - index
            _change(words, width, place, count - _ONE)
    return stop - index
