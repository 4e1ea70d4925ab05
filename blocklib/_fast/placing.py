"""Writes of many requests at once: which may be written in place, and what must be known and done of the other clusters.

As in `lookups`, kernels that read or change tables keep the interpreter's lock; they are loaded when those are.
"""

from __future__ import annotations

from typing import Any

from blocklib._fast import lookups
from blocklib._fast.compiler import External
from blocklib._fast.kernel import U64, Family, i64
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import (
    AT,
    BEFORE,
    CLUSTER,
    CLUSTER_BITS,
    COUNT,
    EXTERNAL,
    FINISHED,
    FIRST_PIECE,
    FOUND_BELOW,
    FOUND_ROWS,
    FRESH,
    HOST,
    KIND,
    L1_BITS,
    L1_ENTRIES,
    MOST,
    MOVES,
    N_PIECES,
    OTHER,
    OWN,
    PIECE,
    PIECES,
    REST,
    ROUND,
    ROW,
    ROWS,
    SLICE_BITS,
    SLICE_LENGTH_BITS,
    SLOT_MASK,
    SOLID,
    SOURCE,
    TABLE,
    TABLES,
    TARGET,
    UNIT_BITS,
    Work,
    add_move,
    give_up,
    slot_of,
)

family = Family(__name__)
for _function in (give_up, add_move, slot_of):
    family.helper(_function)

_NONE = U64(0)
_OFFSET = U64(0x00FF_FFFF_FFFF_FE00)
_COPIED = U64(1 << 63)
_NOT_COPIED = U64((1 << 63) - 1)
_COMPRESSED = U64(1 << 62)
_ZERO = U64(1)


def look_up_places(
    work: Work, shape: Pointer, l1: Pointer, keys: Pointer, tables: Pointer, marks: Pointer, used: Pointer
) -> None:
    """Make moves of what may be written in place; the rest, in pieces of one cluster at most, goes to the target area, in
    the order of guest offsets."""
    _look_up_places.loaded()(work.pointer, shape, l1, keys, tables, marks, marks, used)
    words = work.words
    _sort.loaded()(work.pointer, words[TARGET], words[FOUND_BELOW])


def are_ready(requests: int) -> bool:
    """As `lookups.are_ready`, of the kernels for writing."""
    return lookups.are_ready(requests, writing=True) and bool(family.load())


def make_rows(work: Work, cluster_bits: int, slice_bits: int, most_rows: int, most_tables: int, alignment: int) -> int:
    """Make rows of the clusters that the pieces from AT on lie in, as many as there may be; how many L2 slices map them.

    A cluster counts as lying in one piece of memory only where that is a multiple of `alignment`.
    """
    return _make_rows.loaded()(work.pointer, cluster_bits, slice_bits, min(most_rows, ROUND), most_tables, alignment)


def classify(work: Work, slice_mask: int, tables: Pointer) -> int:
    """Say of each row that is not OTHER what its entry in `tables` makes of it; how many need a fresh host cluster."""
    return _classify.loaded()(work.pointer, slice_mask, tables)


def give_places(work: Work, runs: Pointer) -> None:
    """Give the fresh rows the host clusters of `runs`, pairs (first, number), which are enough."""
    _give_places.loaded()(work.pointer, runs, runs.length // 2)


def add_own(work: Work) -> None:
    """Make moves of the requests in rows that can be written in place after all; hand those in OTHER rows back."""
    _add_own.loaded()(work.pointer)


def find_gaps(work: Work, gaps: Work, bounce: int) -> None:
    """Make pieces in `gaps` of what no request writes of the fresh rows.

    Rows that are not solid have their clusters one behind the other in the memory at `bounce`.
    """
    _find_gaps.loaded()(work.pointer, gaps.pointer, bounce)
    gaps.begin(PIECES, gaps.words[COUNT])


def fill_in(work: Work, bounce: int) -> None:
    """Copy what requests write of the fresh rows into their clusters at `bounce`, and make moves of whole clusters."""
    _fill_in.loaded()(work.pointer, bounce)


def link(work: Work, slice_mask: int, tables: Pointer, marks: Pointer) -> int:
    """Make the entries of fresh rows, in `tables`, point at their places, and mark in `marks` that those may be written to.

    How many entries referred to anything before; what they were is kept with the rows.
    """
    return _link.loaded()(work.pointer, slice_mask, tables, marks)


def hand_rows_back(work: Work) -> None:
    """Hand the requests back that have a part in the rows."""
    _hand_rows_back.loaded()(work.pointer)


# -- the C library ----------------------------------------------------------------------------------------------------


def _copy_memory(target: int, source: int, length: int) -> int:
    import ctypes

    ctypes.memmove(target, source, length)
    return target


_memcpy = External("memcpy", "i64", ("i64", "i64", "i64"), _copy_memory)


# -- kernels ----------------------------------------------------------------------------------------------------------


@family.helper
def _is_own(entry: Any, external: bool) -> bool:
    """Whether an L2 entry is for a plain cluster that nothing else refers to."""
    if entry & _COPIED == _NONE or entry & _COMPRESSED != _NONE or entry & _ZERO != _NONE:
        return False
    return external or bool(entry & _OFFSET != _NONE)


@family.kernel("i64(i64*, i64*, u64*, i64*, u64**, u64*, u8**, u8*)", holds_lock=True)
def _look_up_places(work: Any, shape: Any, l1: Any, keys: Any, tables: Any, marked: Any, marks: Any, used: Any) -> int:
    """What may be written in place becomes moves; the rest, in pieces of one cluster at most, goes to the target area."""
    bits = shape[CLUSTER_BITS]
    cluster_size = 1 << bits
    misaligned = U64(cluster_size - 1) & _OFFSET
    slice_bits = shape[SLICE_BITS]
    entries = 1 << (slice_bits - bits)
    slices_mask = (1 << (shape[L1_BITS] - slice_bits)) - 1
    external = shape[EXTERNAL] != 0
    source = work[SOURCE]
    count = work[COUNT]
    target = work[TARGET]
    while work[AT] < count:
        piece = source + PIECE * work[AT]
        guest = work[piece]
        address = work[piece + 1]
        left = work[piece + 2]
        request = work[piece + 3]
        while left > 0:
            in_cluster = guest & (cluster_size - 1)
            n = min(left, cluster_size - in_cluster)
            number = guest >> shape[L1_BITS]
            place = -1
            if number < shape[L1_ENTRIES] and l1[number] & misaligned == _NONE:
                table_offset = i64(l1[number] & _OFFSET)
                host_offset = table_offset + ((guest >> slice_bits & slices_mask) << shape[SLICE_LENGTH_BITS])
                slot = slot_of(host_offset, shape[SLICE_LENGTH_BITS], shape[SLOT_MASK])
                index = guest >> bits & (entries - 1)
                if table_offset != 0 and keys[slot] == host_offset:
                    used[slot] = 1
                    if marked[slot] != _NONE and marks[slot][index] != 0:
                        entry = tables[slot][index]
                        if _is_own(entry, external) and entry & misaligned == _NONE:
                            place = i64(entry & _OFFSET) + in_cluster
            if place >= 0:
                add_move(work, place, address, n, request)
            elif work[FOUND_BELOW] == MOST:
                give_up(work, request)
                break
            else:
                new = target + PIECE * work[FOUND_BELOW]
                work[new] = guest
                work[new + 1] = address
                work[new + 2] = n
                work[new + 3] = request
                work[FOUND_BELOW] += 1
            guest += n
            address += n
            left -= n
        work[AT] += 1
    return FINISHED


@family.kernel("i64(i64*, i64, i64)", holds_lock=True)
def _sort(work: Any, area: int, count: int) -> int:
    """Sort pieces by guest offset, and by request where they begin at the same."""
    gap = 1
    while gap < count // 9:
        gap = 3 * gap + 1
    while gap > 0:
        for number in range(gap, count):
            this = area + PIECE * number
            guest = work[this]
            address = work[this + 1]
            length = work[this + 2]
            request = work[this + 3]
            place = number
            while place >= gap:
                before = area + PIECE * (place - gap)
                if work[before] < guest or (work[before] == guest and work[before + 3] < request):
                    break
                at = area + PIECE * place
                for word in range(PIECE):
                    work[at + word] = work[before + word]
                place -= gap
            at = area + PIECE * place
            work[at] = guest
            work[at + 1] = address
            work[at + 2] = length
            work[at + 3] = request
        gap //= 3
    return FINISHED


@family.kernel("i64(i64*, i64, i64, i64, i64, i64)", holds_lock=True)
def _make_rows(work: Any, cluster_bits: int, slice_bits: int, most_rows: int, most_tables: int, alignment: int) -> int:
    """Rows for the clusters that the next pieces are in, in order; how many tables map them."""
    source = work[SOURCE]
    count = work[COUNT]
    work[UNIT_BITS] = cluster_bits
    rows = 0
    tables = 0
    last_slice = -1
    while work[AT] < count and rows < most_rows:
        piece = source + PIECE * work[AT]
        cluster = work[piece] >> cluster_bits
        slice_number = work[piece] >> slice_bits
        if slice_number != last_slice:
            if tables == most_tables:
                break
            work[TABLES + 2 * tables] = cluster
            tables += 1
            last_slice = slice_number
        work[TABLES + 2 * tables - 1] = cluster
        row = ROWS + ROW * rows
        start = cluster << cluster_bits
        solid = work[piece + 1]
        reach = start
        if solid % alignment != 0:
            solid = 0
        first = work[AT]
        while work[AT] < count and work[piece] >> cluster_bits == cluster:
            if work[piece] != reach or work[piece + 1] != solid + reach - start:
                solid = 0
            reach = work[piece] + work[piece + 2]
            work[AT] += 1
            piece += PIECE
        if reach != start + (1 << cluster_bits):
            solid = 0
        work[row + CLUSTER] = cluster
        work[row + FIRST_PIECE] = first
        work[row + N_PIECES] = work[AT] - first
        work[row + TABLE] = tables - 1
        work[row + SOLID] = solid
        work[row + KIND] = FRESH
        work[row + HOST] = 0
        rows += 1
    work[FOUND_ROWS] = rows
    return tables


@family.kernel("i64(i64*, i64, u64**)", holds_lock=True)
def _classify(work: Any, slice_mask: int, tables: Any) -> int:
    """Say of each row of what kind it is; how many need fresh clusters."""
    fresh = 0
    misaligned = U64((1 << work[UNIT_BITS]) - 1) & _OFFSET
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        entry = tables[work[row + TABLE]][work[row + CLUSTER] & slice_mask]
        if work[row + KIND] == OTHER:
            continue
        kind = FRESH
        if entry & _COMPRESSED == _NONE:
            if entry & misaligned != _NONE:
                kind = OTHER
            elif entry & _COPIED != _NONE and entry & _OFFSET != _NONE:
                kind = OTHER if entry & _ZERO != _NONE else OWN
        work[row + KIND] = kind
        work[row + HOST] = i64(entry & _OFFSET)
        if kind == FRESH:
            fresh += 1
    return fresh


@family.kernel("i64(i64*, i64*, i64)", holds_lock=True)
def _give_places(work: Any, runs: Any, n_runs: int) -> int:
    """Give the fresh rows the clusters of `runs`, pairs (first cluster, number), one after the other."""
    run = 0
    used = 0
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        if work[row + KIND] == FRESH:
            while run < n_runs and used == runs[2 * run + 1]:
                run += 1
                used = 0
            work[row + HOST] = (runs[2 * run] + used) << work[UNIT_BITS]
            used += 1
    return FINISHED


@family.kernel("i64(i64*, i64*, i64)", holds_lock=True)
def _find_gaps(work: Any, gaps: Any, bounce: int) -> int:
    source = work[SOURCE]
    cluster_bits = work[UNIT_BITS]
    found = 0
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        if work[row + KIND] != FRESH or work[row + SOLID] != 0:
            continue
        start = work[row + CLUSTER] << cluster_bits
        end = start + (1 << cluster_bits)
        reach = start
        for index in range(work[row + N_PIECES] + 1):
            piece = source + PIECE * (work[row + FIRST_PIECE] + index)
            begins = end if index == work[row + N_PIECES] else work[piece]
            if begins > reach:
                new = PIECES + PIECE * found
                gaps[new] = reach
                gaps[new + 1] = bounce + reach - start
                gaps[new + 2] = begins - reach
                gaps[new + 3] = found
                gaps[REST + found] = 0
                found += 1
            if index < work[row + N_PIECES]:
                reach = max(reach, work[piece] + work[piece + 2])
        bounce += 1 << cluster_bits
    gaps[COUNT] = found
    return FINISHED


@family.kernel("i64(i64*, i64)")
def _fill_in(work: Any, bounce: int) -> int:
    """Copy what requests write into the clusters that are put together in memory, and make moves of all clusters."""
    source = work[SOURCE]
    cluster_bits = work[UNIT_BITS]
    work[MOVES] = 0
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        if work[row + KIND] != FRESH:
            continue
        memory = work[row + SOLID]
        if memory == 0:
            memory = bounce
            bounce += 1 << cluster_bits
            start = work[row + CLUSTER] << cluster_bits
            for index in range(work[row + FIRST_PIECE], work[row + FIRST_PIECE] + work[row + N_PIECES]):
                piece = source + PIECE * index
                _memcpy(memory + work[piece] - start, work[piece + 1], work[piece + 2])
        add_move(work, work[row + HOST], memory, 1 << cluster_bits, number)
    return FINISHED


@family.kernel("i64(i64*)", holds_lock=True)
def _add_own(work: Any) -> int:
    """Make moves of the pieces in rows that can be written in place after all, and hand those of other rows back."""
    source = work[SOURCE]
    work[MOVES] = 0
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        for index in range(work[row + FIRST_PIECE], work[row + FIRST_PIECE] + work[row + N_PIECES]):
            piece = source + PIECE * index
            if work[row + KIND] == OWN:
                place = work[row + HOST] + work[piece] - (work[row + CLUSTER] << work[UNIT_BITS])
                add_move(work, place, work[piece + 1], work[piece + 2], work[piece + 3])
            elif work[row + KIND] == OTHER:
                give_up(work, work[piece + 3])
    return FINISHED


@family.kernel("i64(i64*, i64, u64**, u8**)", holds_lock=True)
def _link(work: Any, slice_mask: int, tables: Any, marks: Any) -> int:
    lost = 0
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        if work[row + KIND] != FRESH:
            continue
        index = work[row + CLUSTER] & slice_mask
        before = tables[work[row + TABLE]][index]
        work[row + BEFORE] = i64(before & _NOT_COPIED)
        if before & _NOT_COPIED != _NONE:
            lost += 1
        tables[work[row + TABLE]][index] = U64(work[row + HOST]) | _COPIED
        marks[work[row + TABLE]][index] = 1
    return lost


@family.kernel("i64(i64*)", holds_lock=True)
def _hand_rows_back(work: Any) -> int:
    source = work[SOURCE]
    for number in range(work[FOUND_ROWS]):
        row = ROWS + ROW * number
        for index in range(work[row + FIRST_PIECE], work[row + FIRST_PIECE] + work[row + N_PIECES]):
            give_up(work, work[source + PIECE * index + 3])
    return FINISHED
