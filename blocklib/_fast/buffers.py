"""Runs in buffers: which blocks are data, and which differ from those of another buffer.

Both begin with a few bytes of each block, which settle most data, and look at the rest of a block only where those say
nothing.  That is memcmp's work, unless so many short stretches are in doubt that a kernel is the better choice.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from blocklib._fast.kernel import U64, Family, Kernel
from blocklib._fast.pointer import Pointer

Part: TypeAlias = tuple[int, int]
"""(start, stop) in a buffer, bytes."""

family = Family(__name__)

_NONE = U64(0)
_WORD: Final = 8
_SAVED_PER_STRETCH: Final = 900
"""What a kernel saves for each stretch of blocks that has to be looked at, in nanoseconds."""
_DOUBTFUL: Final = re.compile(b"\0+")
_WITH_LOCK: Final = 128 << 10
"""Comparing so many bytes takes no longer than letting another thread in and waiting for it."""


def data_parts(view: memoryview, block: int) -> list[Part]:
    """The parts of `view`, a whole number of blocks of `block` bytes (a multiple of 8), that are not all zero.

    Ascending, apart from each other, whole blocks.
    """
    assert block % _WORD == 0
    assert len(view) % block == 0
    marks = 0
    for column in (0, block >> 1, block - 1):
        marks |= int.from_bytes(view[column::block], "little")
    return _unlike_parts(marks, view, None, block, _data_switches)


def changed_parts(view: memoryview, other: memoryview, block: int) -> list[Part]:
    """The parts of `view` that differ from `other`, which is as long; otherwise as `data_parts`."""
    assert block % _WORD == 0
    assert len(view) % block == 0
    assert len(view) == len(other)
    marks = 0
    for column in (0, block >> 1, block - 1):
        marks |= int.from_bytes(view[column::block], "little") ^ int.from_bytes(other[column::block], "little")
    return _unlike_parts(marks, view, other, block, _difference_switches)


def _unlike_parts(marks: int, view: memoryview, other: memoryview | None, block: int, kernel: Kernel) -> list[Part]:
    """The parts that are not zero, or not like `other`, where byte i of `marks` is 0 if block i may be."""
    blocks = len(view) // block
    doubtful = [match.span() for match in _DOUBTFUL.finditer(marks.to_bytes(blocks, "little"))]
    if not doubtful:
        return [(0, len(view))] if blocks else []
    compiled = kernel.worth(len(doubtful) * _SAVED_PER_STRETCH)
    if compiled is not None and _is_aligned(view) and (other is None or _is_aligned(other)):
        return _parts_by_kernel(compiled, view, other, block)
    alike = _comparing(view, other)
    parts: list[Part] = []
    done = 0
    for first, stop in doubtful:
        for start, end in _alike_parts(alike, first, stop, block):
            if done < start:
                parts.append((done, start))
            done = end
    if done < len(view):
        parts.append((done, len(view)))
    return parts


def _is_aligned(view: memoryview) -> bool:
    """Whether a kernel can take it for words: a buffer may begin anywhere in memory, so blocks of the disk may, too."""
    return Pointer(view, "B").address % _WORD == 0


def _alike_parts(alike: Callable[[int, int], bool], first: int, stop: int, block: int) -> Iterator[Part]:
    """The parts of blocks [first, stop) that are alike, by halving: what differs mostly does so early on."""
    if alike(first * block, stop * block):
        yield first * block, stop * block
    elif stop - first > 1:
        middle = (first + stop) >> 1
        yield from _alike_parts(alike, first, middle, block)
        yield from _alike_parts(alike, middle, stop, block)


def _comparing(view: memoryview, other: memoryview | None) -> Callable[[int, int], bool]:
    """What tells whether bytes [start, stop), at least one, are those of `other`, or zero."""
    pointer = Pointer(view, "B")
    first = pointer.address
    if other is None:

        def is_zero(start: int, stop: int) -> bool:
            # Zero where the first byte is, and each other is like the one before it.
            return not view[start] and not _memcmp(first + start, first + start + 1, stop - start - 1)

        return is_zero
    other_pointer = Pointer(other, "B")
    second = other_pointer.address

    def is_same(start: int, stop: int) -> bool:
        return not _memcmp(first + start, second + start, stop - start)

    return is_same


def _memcmp(first: int, second: int, length: int) -> int:
    keeping, releasing = _functions or _load_functions()
    return keeping(first, second, length) if length <= _WITH_LOCK else releasing(first, second, length)


_functions: tuple[Callable[[int, int, int], int], Callable[[int, int, int], int]] | None = None


def _load_functions() -> tuple[Callable[[int, int, int], int], Callable[[int, int, int], int]]:
    """``memcmp`` called with the interpreter's lock, and without it."""
    global _functions
    import ctypes

    library = "msvcrt" if sys.platform == "win32" else None
    keeping, releasing = ctypes.PyDLL(library).memcmp, ctypes.CDLL(library).memcmp
    for function in (keeping, releasing):
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        function.restype = ctypes.c_int
    _functions = keeping, releasing
    return _functions


def _parts_by_kernel(
    kernel: Callable[..., int], view: memoryview, other: memoryview | None, block: int
) -> list[Part]:
    blocks = len(view) // block
    switches = array("q", bytes(_WORD * (blocks + 1)))
    pointers = [Pointer(one, "Q") for one in (view, other) if one is not None]
    count = kernel(*pointers, blocks, block // _WORD, Pointer(switches, "q", writable=True))
    found = switches[:count].tolist()
    return [(start * block, stop * block) for start, stop in zip(found[::2], found[1::2], strict=True)]


@family.kernel("i64(u64*, i64, i64, i64*)")
def _data_switches(words: Any, blocks: int, per_block: int, switches: Any) -> int:
    """Write the numbers of the blocks where data begins and where it ends, by turns; how many they are."""
    count = 0
    inside = False
    for block in range(blocks):
        bits = _NONE
        for index in range(block * per_block, (block + 1) * per_block):
            bits |= words[index]
            if bits != _NONE:
                break
        if (bits != _NONE) != inside:
            inside = not inside
            switches[count] = block
            count += 1
    if inside:
        switches[count] = blocks
        count += 1
    return count


@family.kernel("i64(u64*, u64*, i64, i64, i64*)")
def _difference_switches(first: Any, second: Any, blocks: int, per_block: int, switches: Any) -> int:
    """The same, of blocks that differ."""
    count = 0
    inside = False
    for block in range(blocks):
        differs = False
        for index in range(block * per_block, (block + 1) * per_block):
            if first[index] != second[index]:
                differs = True
                break
        if differs != inside:
            inside = differs
            switches[count] = block
            count += 1
    if inside:
        switches[count] = blocks
        count += 1
    return count
