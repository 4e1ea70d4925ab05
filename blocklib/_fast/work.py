"""The memory that the kernels for many requests at once share: a `Work`, one block of 64-bit words with areas of their own.

A *piece* is a part of a request that is still looked for: (guest offset, address in memory, length, number of the request).
A *move* is one that was found: (offset in the file, address, length), with the first and the last request that it serves;
neighbours in the file and in memory are one move.  A *row* is a guest cluster that needs more than writing in place.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

from blocklib._fast.pointer import Pointer

ROUND: Final = 1024
"""Requests that are looked up together."""
MOST: Final = 2 * ROUND
"""Pieces and moves that a lookup may find; a request that needs more is handed back."""
ROOM: Final = 2 * MOST
"""Pieces that there is room for: the gaps between pieces, in clusters, are some more."""
PIECE: Final = 4
"""Words of a piece."""

# Areas of a Work, in words.
PIECES: Final = 0
BELOW: Final = PIECES + PIECE * ROOM
OFFSETS: Final = BELOW + PIECE * ROOM
ADDRESSES: Final = OFFSETS + MOST
LENGTHS: Final = ADDRESSES + MOST
RESULTS: Final = LENGTHS + MOST
FIRSTS: Final = RESULTS + MOST
LASTS: Final = FIRSTS + MOST
ZEROES: Final = LASTS + MOST
REST: Final = ZEROES + 2 * MOST
ROWS: Final = REST + ROOM
TABLES: Final = ROWS + 8 * ROUND
"""For each L2 slice that maps rows: the first and the last of their clusters."""
STATE: Final = TABLES + 2 * ROUND
_WORDS: Final = STATE + 11

# Words of the state.
SOURCE: Final = STATE
"""The area of the pieces to look up: PIECES or BELOW."""
COUNT: Final = STATE + 1
"""How many they are."""
AT: Final = STATE + 2
"""The piece that the lookup has come to."""
TARGET: Final = STATE + 3
"""The area for pieces that are to be looked up in the image below."""
FOUND_BELOW: Final = STATE + 4
"""How many there are, and so on for the other areas."""
MOVES: Final = STATE + 5
FOUND_ZEROES: Final = STATE + 6
FOUND_REST: Final = STATE + 7
"""Whether any request was handed back: those have a mark in REST."""
MISSING: Final = STATE + 8
"""The table that a lookup stopped for: its place in the file."""
FOUND_ROWS: Final = STATE + 9
UNIT_BITS: Final = STATE + 10
"""Bits of an offset in a cluster of the rows."""

# Words of a row: one guest cluster that a batch writes to, and that cannot simply be written in place.
ROW: Final = 8
CLUSTER: Final = 0
"""Its number."""
FIRST_PIECE: Final = 1
N_PIECES: Final = 2
TABLE: Final = 3
"""The number of its L2 slice among those of the rows."""
SOLID: Final = 4
"""Where in memory the whole cluster lies in one piece, or 0."""
KIND: Final = 5
"""What the L2 entry says, as below."""
HOST: Final = 6
"""The host offset to write to."""
BEFORE: Final = 7
"""The L2 entry that the new one replaces, without its COPIED flag."""

# Kinds of rows.
FRESH: Final = 0
"""The cluster needs a fresh host cluster."""
OWN: Final = 1
"""It can be written in place, once that was checked."""
OTHER: Final = 2
"""Anything else: its requests are handed back."""

# Words of the shape of a mapping.
CLUSTER_BITS: Final = 0
SLICE_BITS: Final = 1
"""Bits of the guest offset below the number of a slice."""
L1_BITS: Final = 2
SLICE_LENGTH_BITS: Final = 3
SLOT_MASK: Final = 4
L1_ENTRIES: Final = 5
SIZE: Final = 6
EXTERNAL: Final = 7
ZERO_FLAG: Final = 8
SHAPE_WORDS: Final = 9

FINISHED: Final = 0
STOPPED: Final = 1

_HASH_SHIFT: Final = 13


class Work:
    """Memory for a round of requests."""

    __slots__ = ("pointer", "words")

    def __init__(self) -> None:
        self.words = array("q", bytes(8 * _WORDS))
        self.pointer = Pointer(self.words, "q", writable=True)

    def moves(self) -> tuple[memoryview, memoryview, memoryview, memoryview]:
        """Offsets, addresses, lengths and results of the moves there are."""
        view, count = self.pointer.view, self.words[MOVES]
        return (
            view[OFFSETS : OFFSETS + count],
            view[ADDRESSES : ADDRESSES + count],
            view[LENGTHS : LENGTHS + count],
            view[RESULTS : RESULTS + count],
        )

    def area(self, start: int, length: int) -> memoryview:
        return self.pointer.view[start : start + length]

    def begin(self, source: int, count: int) -> None:
        """The next level: the pieces to look up are `count` in the area `source`."""
        words = self.words
        words[SOURCE] = source
        words[COUNT] = count
        words[AT] = 0
        words[TARGET] = PIECES + BELOW - source
        words[FOUND_BELOW] = words[MOVES] = words[FOUND_ZEROES] = 0


# -- what kernels call ------------------------------------------------------------------------------------------------


def give_up(work: Any, request: int) -> None:
    """Hand a request back."""
    work[REST + request] = 1
    work[FOUND_REST] = 1


def add_zeroes(work: Any, address: int, length: int, request: int) -> None:
    found = work[FOUND_ZEROES]
    if found > 0:
        last = ZEROES + 2 * (found - 1)
        if work[last] + work[last + 1] == address:
            work[last + 1] += length
            return
    if found == MOST:
        give_up(work, request)
        return
    work[ZEROES + 2 * found] = address
    work[ZEROES + 2 * found + 1] = length
    work[FOUND_ZEROES] = found + 1


def add_move(work: Any, offset: int, address: int, length: int, request: int) -> None:
    found = work[MOVES]
    last = found - 1
    if (
        found > 0
        and work[OFFSETS + last] + work[LENGTHS + last] == offset
        and work[ADDRESSES + last] + work[LENGTHS + last] == address
    ):
        work[LENGTHS + last] += length
        work[LASTS + last] = request
        return
    if found == MOST:
        give_up(work, request)
        return
    work[OFFSETS + found] = offset
    work[ADDRESSES + found] = address
    work[LENGTHS + found] = length
    work[FIRSTS + found] = request
    work[LASTS + found] = request
    work[MOVES] = found + 1


def add_below(work: Any, guest: int, address: int, length: int, request: int) -> None:
    found = work[FOUND_BELOW]
    target = work[TARGET]
    if found > 0:
        last = target + PIECE * (found - 1)
        if work[last] + work[last + 2] == guest and work[last + 1] + work[last + 2] == address and work[last + 3] == request:
            work[last + 2] += length
            return
    if found == MOST:
        give_up(work, request)
        return
    new = target + PIECE * found
    work[new] = guest
    work[new + 1] = address
    work[new + 2] = length
    work[new + 3] = request
    work[FOUND_BELOW] = found + 1


def slot_of(host_offset: int, length_bits: int, mask: int) -> int:
    number = host_offset >> length_bits
    return (number ^ number >> _HASH_SHIFT) & mask
