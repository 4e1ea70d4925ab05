"""Runs in buffers: which blocks are data, and which differ from those of another buffer."""

from __future__ import annotations

from array import array
from typing import Any, Final, TypeAlias

from blocklib._fast.kernel import U64, Family
from blocklib._fast.pointer import Pointer

Part: TypeAlias = tuple[int, int]
"""(start, stop) in a buffer, bytes."""

family = Family(__name__)

_NONE = U64(0)
_WORD: Final = 8
_ZEROES: Final = bytes(1 << 16)
# What a kernel saves against the definitions, in nanoseconds.
_SAVED_PER_BLOCK: Final = 450
_SAVED_PER_KIB: Final = 100


def data_parts(view: memoryview, block: int) -> list[Part]:
    """The parts of `view`, a whole number of blocks of `block` bytes (a multiple of 8), that are not all zero.

    Ascending, apart from each other, whole blocks.
    """
    kernel = _data_switches.worth(_saving(view, block))
    if kernel is None:
        return data_parts_definition(view, block)
    blocks = len(view) // block
    switches = array("q", bytes(_WORD * (blocks + 1)))
    count = kernel(Pointer(view, "Q"), blocks, block // _WORD, Pointer(switches, "q", writable=True))
    return _parts(switches[:count].tolist(), block)


def changed_parts(view: memoryview, other: memoryview, block: int) -> list[Part]:
    """The parts of `view` that differ from `other`, which is as long; otherwise as `data_parts`."""
    assert len(view) == len(other)
    kernel = _difference_switches.worth(_saving(view, block))
    if kernel is None:
        return changed_parts_definition(view, other, block)
    blocks = len(view) // block
    switches = array("q", bytes(_WORD * (blocks + 1)))
    pointer = Pointer(switches, "q", writable=True)
    count = kernel(Pointer(view, "Q"), Pointer(other, "Q"), blocks, block // _WORD, pointer)
    return _parts(switches[:count].tolist(), block)


def _saving(view: memoryview, block: int) -> int:
    assert block % _WORD == 0
    assert len(view) % block == 0
    return len(view) // block * _SAVED_PER_BLOCK + (len(view) >> 10) * _SAVED_PER_KIB


def _parts(switches: list[int], block: int) -> list[Part]:
    return [(start * block, stop * block) for start, stop in zip(switches[::2], switches[1::2], strict=True)]


def data_parts_definition(view: memoryview, block: int) -> list[Part]:
    """What `data_parts` answers."""
    return _joined([(at, at + block) for at in range(0, len(view), block) if not _is_zero(view[at : at + block])])


def changed_parts_definition(view: memoryview, other: memoryview, block: int) -> list[Part]:
    """What `changed_parts` answers."""
    return _joined(
        [(at, at + block) for at in range(0, len(view), block) if bytes(view[at : at + block]) != other[at : at + block]]
    )


def _is_zero(view: memoryview) -> bool:
    # Comparing memoryviews goes byte by byte; comparing bytes is memcmp, and worth the copy.
    return all(bytes(view[at : at + len(_ZEROES)]) == _ZEROES[: len(view) - at] for at in range(0, len(view), len(_ZEROES)))


def _joined(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for start, stop in parts:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


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
