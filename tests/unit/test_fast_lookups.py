"""Lookups of many requests at once: the kernels against a lookup of one byte after the other."""

from __future__ import annotations

from array import array
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklib._fast import lookups
from blocklib._fast import work as w
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import Work
from tests.kernels import WAYS, Tables, way

BITS: Final = 3
"""Of an offset in a cluster: the kernels do not mind how small they are."""
CLUSTER: Final = 1 << BITS
SLICE_CLUSTERS: Final = 4
SLICES: Final = 2
"""Slices of an L2 table, each of 32 bytes."""
TABLE_SPAN: Final = CLUSTER * SLICE_CLUSTERS * SLICES
TABLES: Final = 3
SIZE: Final = TABLES * TABLE_SPAN - 5
COPIED: Final = 1 << 63
PLACE: Final = 0x10000
"""Where the L2 tables lie in the file; data lies behind them."""


def shape(*, external: bool = False, zero_flag: bool = True) -> Pointer:
    words = array("q", bytes(8 * w.SHAPE_WORDS))
    words[w.CLUSTER_BITS] = BITS
    words[w.SLICE_BITS] = BITS + 2
    words[w.L1_BITS] = BITS + 3
    words[w.SLICE_LENGTH_BITS] = 5
    words[w.SLOT_MASK] = 7
    words[w.L1_ENTRIES] = TABLES
    words[w.SIZE] = SIZE
    words[w.EXTERNAL] = external
    words[w.ZERO_FLAG] = zero_flag
    return Pointer(words, "q")


class Index:
    """The slices of `tables` in their slots, but those that `absent` names."""

    def __init__(self, slices: dict[int, array[int]], absent: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        keys = array("q", bytes(64))
        tables: list[array[int] | None] = [None] * 8
        for host_offset, table in slices.items():
            slot = w.slot_of(host_offset, 5, 7)
            if host_offset not in absent and not keys[slot]:
                keys[slot], tables[slot] = host_offset, table
        self.slots = keys
        self.keys = Pointer(keys, "q", writable=True)
        self.tables = Tables([table if table is not None else array("Q", bytes(32)) for table in tables])
        self.used = Pointer(array("B", bytes(8)), "B", writable=True)


def laid_out(requests: list[tuple[int, int]]) -> Work:
    """Pieces for (guest offset, length), one behind the other in memory from 1000 on."""
    work = Work()
    work.begin(w.PIECES, len(requests))
    address = 1000
    for number, (offset, length) in enumerate(requests):
        at = w.PIECES + w.PIECE * number
        work.words[at : at + w.PIECE] = array("q", (offset, address, length, number))
        address += length
    return work


def found(work: Work, requests: list[tuple[int, int]]) -> dict[int, tuple[str, int]]:
    """For each address in memory of requests that were not handed back, what it is to be filled with."""
    answer: dict[int, tuple[str, int]] = {}
    words = work.words
    for move in range(words[w.MOVES]):
        for i in range(words[w.LENGTHS + move]):
            assert words[w.ADDRESSES + move] + i not in answer
            answer[words[w.ADDRESSES + move] + i] = "data", words[w.OFFSETS + move] + i
    for number in range(words[w.FOUND_ZEROES]):
        address, length = words[w.ZEROES + 2 * number], words[w.ZEROES + 2 * number + 1]
        answer.update((address + i, ("zero", 0)) for i in range(length))
    for number in range(words[w.FOUND_BELOW]):
        guest, address, length, _request = words[words[w.TARGET] + w.PIECE * number :][: w.PIECE]
        answer.update((address + i, ("below", guest + i)) for i in range(length))
    handed_back = set(lookups.rest(work))
    address = 1000
    for number, (_offset, length) in enumerate(requests):
        if number in handed_back:
            for i in range(length):
                answer[address + i] = "back", 0
        address += length
    return answer


def expected(
    requests: list[tuple[int, int]], l1: array[int], slices: dict[int, array[int]], *, external: bool, zero_flag: bool
) -> dict[int, tuple[str, int]]:
    answer: dict[int, tuple[str, int]] = {}
    address = 1000
    for offset, length in requests:
        part: dict[int, tuple[str, int]] = {}
        for i in range(length):
            part[address + i] = _byte(offset + i, l1, slices, external=external, zero_flag=zero_flag)
        if any(kind == "back" for kind, _place in part.values()):
            part = dict.fromkeys(part, ("back", 0))
        answer |= part
        address += length
    return answer


def _byte(guest: int, l1: array[int], slices: dict[int, array[int]], *, external: bool, zero_flag: bool) -> tuple[str, int]:
    if guest >= SIZE:
        return "zero", 0
    table_offset = l1[guest // TABLE_SPAN] & ~COPIED
    if not table_offset:
        return "below", guest
    cluster = guest // CLUSTER
    entry = slices[table_offset + cluster // SLICE_CLUSTERS % SLICES * 32][cluster % SLICE_CLUSTERS]
    host_offset = entry & 0x00FF_FFFF_FFFF_FE00
    if entry & 1 << 62:
        return "back", 0
    if external and entry & (0x00FF_FFFF_FFFF_FE00 if entry & 1 else COPIED | 0x00FF_FFFF_FFFF_FE00):
        if host_offset != cluster * CLUSTER:
            return "back", 0
        if not entry & 1:
            return "data", guest
    if entry & 1:
        return ("zero", 0) if zero_flag else ("back", 0)
    if not host_offset:
        return ("back", 0) if entry & ~COPIED else ("below", guest)
    return "data", host_offset + guest % CLUSTER


ENTRIES: Final = st.sampled_from(
    (
        0,
        COPIED,
        1,
        COPIED | 1,
        COPIED | PLACE | 0x1000,
        COPIED | PLACE | 0x1200,
        PLACE | 0x1400,
        COPIED | PLACE | 0x1600 | 1,
        1 << 62 | 0x12345,
        0x100,
    )
)
TABLES_OF_ENTRIES: Final = st.lists(ENTRIES, min_size=8, max_size=8)
REQUESTS: Final = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 60)), max_size=12)


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60)
@given(
    tables=st.lists(st.none() | TABLES_OF_ENTRIES, min_size=TABLES, max_size=TABLES),
    requests=REQUESTS,
    external=st.booleans(),
    zero_flag=st.booleans(),
)
def test_every_byte_is_where_its_entry_says(
    name: str, tables: list[list[int] | None], requests: list[tuple[int, int]], external: bool, zero_flag: bool
) -> None:
    l1 = array("Q", bytes(8 * TABLES))
    slices: dict[int, array[int]] = {}
    for number, entries in enumerate(tables):
        if entries is not None:
            place = PLACE + 0x200 * number
            l1[number] = COPIED | place
            for part in range(SLICES):
                slices[place + 32 * part] = array("Q", entries[part * SLICE_CLUSTERS :][:SLICE_CLUSTERS])
    work = laid_out(requests)
    index = Index(slices)
    look_up = way(lookups._look_up, name)
    arguments = work.pointer, shape(external=external, zero_flag=zero_flag), Pointer(l1, "Q"), index.keys
    while look_up(*arguments, index.tables, index.used) == w.STOPPED:
        missing = work.words[w.MISSING]
        assert index.slots[w.slot_of(missing, 5, 7)] != missing
        index.__init__({missing: slices[missing]})  # type: ignore[misc]
        arguments = *arguments[:3], index.keys
    assert found(work, requests) == expected(requests, l1, slices, external=external, zero_flag=zero_flag)


@pytest.mark.parametrize("name", WAYS)
def test_a_misplaced_table_is_handed_back(name: str) -> None:
    work = laid_out([(0, 4), (TABLE_SPAN, 4)])
    index = Index({})
    l1 = Pointer(array("Q", (0, (PLACE + 0x200) >> 1 << 1 | 0x600, 0)), "Q")
    words = shape()
    words.view[w.CLUSTER_BITS : w.SLICE_LENGTH_BITS] = array("q", (12, 14, 15))  # clusters large enough to be misaligned
    words.view[w.SIZE] = 3 << 15
    work.words[w.PIECES + w.PIECE] = 1 << 15
    assert way(lookups._look_up, name)(work.pointer, words, l1, index.keys, index.tables, index.used) == w.FINISHED
    assert lookups.rest(work) == [1]


@pytest.mark.parametrize("name", WAYS)
def test_neighbours_in_the_file_and_in_memory_are_one_move(name: str) -> None:
    work = laid_out([(0, 10), (10, 6), (16, 4), (30, 2)])
    way(lookups._pass_through, name)(work.pointer, 100, 18)
    words = work.words
    assert [words[area] for area in (w.MOVES, w.OFFSETS, w.ADDRESSES, w.LENGTHS, w.FIRSTS, w.LASTS)] == [1, 100, 1000, 18, 0, 2]
    assert words[w.ZEROES : w.ZEROES + 2].tolist() == [1018, 4]
    assert words[w.FOUND_ZEROES] == 1


@pytest.mark.parametrize("name", WAYS)
def test_requests_are_laid_out_one_behind_the_other(name: str) -> None:
    work = Work()
    work.words[w.REST : w.REST + 2] = array("q", (1, 1))
    offsets = Pointer(array("q", (7, 5, 3, 9)), "q")
    way(lookups._lay_out, name)(offsets, 1, 3, 10, 500, work.pointer)
    assert work.words[w.PIECES : w.PIECES + 2 * w.PIECE].tolist() == [5, 500, 10, 0, 3, 510, 10, 1]
    assert work.words[w.REST : w.REST + 2].tolist() == [0, 0]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("offsets", "answer"), [((0, 90), -1), ((0, 91), 1), ((-1, 91), 0), ((), -1)])
def test_the_first_request_outside_is_found(name: str, offsets: tuple[int, ...], answer: int) -> None:
    assert way(lookups._first_outside, name)(Pointer(array("q", offsets or (0,)), "q"), len(offsets), 90) == answer


@pytest.mark.parametrize("name", WAYS)
def test_requests_of_failed_moves_are_handed_back(name: str) -> None:
    work = laid_out([(100, 10), (110, 10), (50, 10)])
    way(lookups._pass_through, name)(work.pointer, 0, 1000)
    assert work.words[w.MOVES] == 2
    assert way(lookups._misaligned, name)(work.pointer, 511) != 0
    assert way(lookups._misaligned, name)(work.pointer, 1) == 0
    work.words[w.RESULTS] = 5
    way(lookups._settle, name)(work.pointer)
    assert lookups.rest(work) == [0, 1]
    assert lookups.rest(work) == []


@pytest.mark.parametrize("name", WAYS)
def test_pieces_from_a_place_on_are_handed_back(name: str) -> None:
    work = laid_out([(0, 1), (1, 1), (2, 1)])
    lookups.hand_piece_back(work)
    assert lookups.rest(work) == [0]
    way(lookups._hand_back, name)(work.pointer)
    assert lookups.rest(work) == [1, 2]


@pytest.mark.parametrize("name", WAYS)
def test_memory_is_set_to_zero(name: str) -> None:
    memory = Pointer(bytearray(b"x" * 100), "B", writable=True)
    work = laid_out([(0, 10), (90, 20)])
    work.words[w.PIECES + 1] = memory.address
    work.words[w.PIECES + w.PIECE + 1] = memory.address + 50
    way(lookups._pass_through, name)(work.pointer, 0, 95)
    way(lookups._fill_zeroes, name)(work.pointer)
    assert bytes(memory.view) == b"x" * 55 + bytes(15) + b"x" * 30
    way(lookups._fill_pieces, name)(work.pointer)
    assert bytes(memory.view) == bytes(10) + b"x" * 40 + bytes(20) + b"x" * 30


@pytest.mark.parametrize("name", WAYS)
def test_what_does_not_fit_is_handed_back(name: str) -> None:
    work = Work()
    work.begin(w.PIECES, w.ROOM)
    for number in range(w.ROOM):
        at = w.PIECES + w.PIECE * number
        work.words[at : at + w.PIECE] = array("q", (1000 * number, 5000 * number, 10, number))
    way(lookups._pass_through, name)(work.pointer, 0, 1 << 40)
    assert work.words[w.MOVES] == w.MOST
    assert lookups.rest(work) == list(range(w.MOST, w.ROOM))


@pytest.mark.parametrize("name", ["plain", "checked"])
def test_tables_that_are_known_by_their_address_have_bounds_where_these_are_checked(name: str) -> None:
    """As the library gives them to kernels; a slot that has a key but no table is a bug, which must not go unseen."""
    table = array("Q", [COPIED | PLACE * 2] * SLICE_CLUSTERS)
    keys, addresses = array("q", bytes(64)), array("Q", bytes(64))
    slot = w.slot_of(PLACE, 5, 7)
    keys[slot], addresses[slot] = PLACE, table.buffer_info()[0]
    arguments = (shape(), Pointer(array("Q", [PLACE] * TABLES), "Q"), Pointer(keys, "q"), Pointer(addresses, "Q"))
    used = Pointer(array("B", bytes(8)), "B", writable=True)

    def look_up(offset: int) -> list[int]:
        work = Work()
        lookups.lay_out(work, Pointer(array("q", [offset]), "q"), 0, 1, 1, 1000)
        assert way(lookups._look_up, name)(work.pointer, *arguments, used) == w.FINISHED
        return [work.words[w.OFFSETS + move] for move in range(work.words[w.MOVES])]

    assert look_up(CLUSTER + 1) == [PLACE * 2 + 1]
    addresses[slot] = 0
    with pytest.raises(IndexError):
        look_up(CLUSTER + 1)
