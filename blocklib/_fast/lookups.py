"""Lookups of many requests at once: which bytes of a file each of them is, found in tables as they lie in memory.

The kernels read tables that other threads change, so they keep the interpreter's lock; they do no I/O.
"""

from __future__ import annotations

from typing import Any, Final

from blocklib._fast.compiler import External
from blocklib._fast.kernel import U64, Family, i64
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import (
    ADDRESSES,
    AT,
    CLUSTER_BITS,
    COUNT,
    EXTERNAL,
    FINISHED,
    FIRSTS,
    FOUND_REST,
    FOUND_ZEROES,
    L1_BITS,
    L1_ENTRIES,
    LASTS,
    LENGTHS,
    MISSING,
    MOVES,
    OFFSETS,
    PIECE,
    PIECES,
    REST,
    RESULTS,
    ROOM,
    SIZE,
    SLICE_BITS,
    SLICE_LENGTH_BITS,
    SLOT_MASK,
    SOURCE,
    STOPPED,
    ZERO_FLAG,
    ZEROES,
    Work,
    add_below,
    add_move,
    add_zeroes,
    give_up,
    slot_of,
)

family = Family(__name__)
for _function in (give_up, add_zeroes, add_move, add_below, slot_of):
    family.helper(_function)

_NONE = U64(0)
_OFFSET = U64(0x00FF_FFFF_FFFF_FE00)
_COPIED = U64(1 << 63)
_NOT_COPIED = U64((1 << 63) - 1)
_COMPRESSED = U64(1 << 62)
_ZERO = U64(1)
_SAVED_BY_READ: Final = 4000
_SAVED_BY_WRITE: Final = 7000
"""Nanoseconds that the kernels save a request; one that needs a cluster saves more."""


def are_ready(requests: int, *, writing: bool = False) -> bool:
    """Whether the kernels are here, or worth to be loaded for so many requests, and those that have been before."""
    return _lay_out.worth(requests * (_SAVED_BY_WRITE if writing else _SAVED_BY_READ)) is not None


def lay_out(work: Work, offsets: Pointer, first: int, stop: int, length: int, address: int) -> None:
    """Make pieces of the requests [first, stop): `length` bytes each, one behind the other in memory from `address` on."""
    words = work.words
    words[FOUND_REST] = 0
    work.begin(PIECES, stop - first)
    _lay_out.loaded()(offsets, first, stop, length, address, work.pointer)


def first_outside(offsets: Pointer, length: int, size: int) -> int:
    """The number of the first request of `length` bytes that is not inside [0, size); -1 if all are."""
    if are_ready(0):
        return _first_outside.loaded()(offsets, offsets.length, size - length)
    return next((i for i, offset in enumerate(offsets.view) if not 0 <= offset <= size - length), -1)


def look_up(work: Work, shape: Pointer, l1: Pointer, keys: Pointer, tables: Pointer, used: Pointer) -> bool:
    """Look the pieces up in L2 tables of standard entries; False where the table at MISSING is needed first."""
    return not _look_up.loaded()(work.pointer, shape, l1, keys, tables, used)


def pass_through(work: Work, shift: int, size: int) -> None:
    """Look the pieces up where guest offsets are those of the file, less `shift`; behind `size` there is nothing."""
    _pass_through.loaded()(work.pointer, shift, size)


def fill_zeroes(work: Work) -> None:
    """Set the memory to zero that was found to read so."""
    _fill_zeroes.loaded()(work.pointer)


def all_made(work: Work) -> bool:
    """Whether no move has failed."""
    return not any(work.area(RESULTS, work.words[MOVES]))


def settle(work: Work) -> None:
    """Hand the requests back whose moves failed."""
    _settle.loaded()(work.pointer)


def refuse_moves(work: Work) -> None:
    """As if all moves had failed."""
    results = work.area(RESULTS, work.words[MOVES])
    for move in range(len(results)):
        results[move] = -1


def are_aligned(work: Work, alignment: int) -> bool:
    """Whether all moves are, in the file and in memory."""
    return not _misaligned.loaded()(work.pointer, alignment - 1)


def fill_pieces(work: Work) -> None:
    """Set the memory of all pieces to zero."""
    _fill_pieces.loaded()(work.pointer)


def rest(work: Work) -> list[int]:
    """The numbers of the requests that were handed back: they take another way."""
    if not work.words[FOUND_REST]:
        return []
    area = work.area(REST, ROOM)
    numbers = [request for request, mark in enumerate(area) if mark]
    for request in numbers:
        area[request] = 0
    work.words[FOUND_REST] = 0
    return numbers


def hand_piece_back(work: Work) -> None:
    """Hand the request back that the lookup has come to, and go on behind this piece."""
    words = work.words
    give_up(words, words[words[SOURCE] + PIECE * words[AT] + 3])
    words[AT] += 1


def hand_back(work: Work) -> None:
    """Hand all the pieces from AT on back."""
    _hand_back.loaded()(work.pointer)


# -- the C library ----------------------------------------------------------------------------------------------------


def _set_memory(address: int, value: int, length: int) -> int:
    import ctypes

    ctypes.memset(address, value, length)
    return address


_memset = External("memset", "i64", ("i64", "i32", "i64"), _set_memory)


# -- kernels ----------------------------------------------------------------------------------------------------------


@family.kernel("i64(i64*, i64, i64, i64, i64, i64*)", holds_lock=True)
def _lay_out(offsets: Any, first: int, stop: int, length: int, address: int, work: Any) -> int:
    at = PIECES
    for request in range(first, stop):
        work[at] = offsets[request]
        work[at + 1] = address + (request - first) * length
        work[at + 2] = length
        work[at + 3] = request - first
        work[REST + request - first] = 0
        at += PIECE
    return 0


@family.kernel("i64(i64*, i64, i64)", holds_lock=True)
def _first_outside(offsets: Any, count: int, last: int) -> int:
    for request in range(count):
        if offsets[request] < 0 or offsets[request] > last:
            return request
    return -1


@family.kernel("i64(i64*, i64*, u64*, i64*, u64**, u8*)", holds_lock=True)
def _look_up(work: Any, shape: Any, l1: Any, keys: Any, tables: Any, used: Any) -> int:
    """As `Mapping.resolve`; whatever looks wrong is handed back, for that to tell what is wrong with it."""
    bits = shape[CLUSTER_BITS]
    cluster_size = 1 << bits
    misaligned = U64(cluster_size - 1) & _OFFSET
    slice_bits = shape[SLICE_BITS]
    entries = 1 << (slice_bits - bits)
    slices_mask = (1 << (shape[L1_BITS] - slice_bits)) - 1
    external = shape[EXTERNAL] != 0
    source = work[SOURCE]
    count = work[COUNT]
    while work[AT] < count:
        piece = source + PIECE * work[AT]
        guest = work[piece]
        address = work[piece + 1]
        left = work[piece + 2]
        request = work[piece + 3]
        while left > 0:
            if guest >= shape[SIZE]:
                add_zeroes(work, address, left, request)
                break
            n = min(left, shape[SIZE] - guest)
            number = guest >> shape[L1_BITS]
            if number >= shape[L1_ENTRIES] or l1[number] & misaligned != _NONE:
                give_up(work, request)
                break
            table_offset = i64(l1[number] & _OFFSET)
            if table_offset == 0:
                n = min(n, ((number + 1) << shape[L1_BITS]) - guest)
                add_below(work, guest, address, n, request)
            else:
                host_offset = table_offset + ((guest >> slice_bits & slices_mask) << shape[SLICE_LENGTH_BITS])
                slot = slot_of(host_offset, shape[SLICE_LENGTH_BITS], shape[SLOT_MASK])
                if keys[slot] != host_offset:
                    work[piece] = guest
                    work[piece + 1] = address
                    work[piece + 2] = left
                    work[MISSING] = host_offset
                    return STOPPED
                used[slot] = 1
                table = tables[slot]
                index = guest >> bits & (entries - 1)
                in_cluster = guest & (cluster_size - 1)
                entry = table[index]
                place = i64(entry & _OFFSET)
                allocated = place != 0 or (external and entry & _COPIED != _NONE)
                if entry & _COMPRESSED != _NONE or entry & misaligned != _NONE:
                    give_up(work, request)
                    break
                if external and allocated and place != guest - in_cluster and (place != 0 or entry & _ZERO == _NONE):
                    give_up(work, request)
                    break
                n = min(n, cluster_size - in_cluster)
                if entry & _ZERO != _NONE:
                    if shape[ZERO_FLAG] == 0:
                        give_up(work, request)
                        break
                    add_zeroes(work, address, n, request)
                elif not allocated:
                    if entry & _NOT_COPIED != _NONE:
                        give_up(work, request)
                        break
                    add_below(work, guest, address, n, request)
                else:
                    add_move(work, place + in_cluster, address, n, request)
            guest += n
            address += n
            left -= n
        work[AT] += 1
    return FINISHED


@family.kernel("i64(i64*, i64, i64)", holds_lock=True)
def _pass_through(work: Any, shift: int, size: int) -> int:
    source = work[SOURCE]
    for number in range(work[AT], work[COUNT]):
        piece = source + PIECE * number
        guest = work[piece]
        length = work[piece + 2]
        n = max(0, min(length, size - guest))
        if n > 0:
            add_move(work, guest + shift, work[piece + 1], n, work[piece + 3])
        if n < length:
            add_zeroes(work, work[piece + 1] + n, length - n, work[piece + 3])
    work[AT] = work[COUNT]
    return FINISHED


@family.kernel("i64(i64*)", holds_lock=True)
def _hand_back(work: Any) -> int:
    source = work[SOURCE]
    while work[AT] < work[COUNT]:
        give_up(work, work[source + PIECE * work[AT] + 3])
        work[AT] += 1
    return FINISHED


@family.kernel("i64(i64*)", holds_lock=True)
def _settle(work: Any) -> int:
    for move in range(work[MOVES]):
        if work[RESULTS + move] != 0:
            for request in range(work[FIRSTS + move], work[LASTS + move] + 1):
                give_up(work, request)
    return FINISHED


@family.kernel("i64(i64*, i64)", holds_lock=True)
def _misaligned(work: Any, mask: int) -> int:
    """Everything that is not aligned, in one number."""
    bits = 0
    for move in range(work[MOVES]):
        bits |= work[OFFSETS + move] | work[ADDRESSES + move] | work[LENGTHS + move]
    return bits & mask


@family.kernel("i64(i64*)")
def _fill_zeroes(work: Any) -> int:
    for number in range(work[FOUND_ZEROES]):
        _memset(work[ZEROES + 2 * number], 0, work[ZEROES + 2 * number + 1])
    return FINISHED


@family.kernel("i64(i64*)")
def _fill_pieces(work: Any) -> int:
    source = work[SOURCE]
    for number in range(work[COUNT]):
        piece = source + PIECE * number
        _memset(work[piece + 1], 0, work[piece + 2])
    return FINISHED
