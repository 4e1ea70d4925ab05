"""Writes of many requests at once: the kernels against what each step is to do, said in plain Python."""

from __future__ import annotations

from array import array
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklib._fast import lookups, placing
from blocklib._fast import work as w
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import Work
from tests.kernels import WAYS, Tables, way
from tests.unit.test_fast_lookups import BITS, CLUSTER, COPIED, PLACE, SIZE, SLICE_CLUSTERS, TABLE_SPAN, laid_out, shape

Piece = tuple[int, int, int, int]
REQUESTS: Final = st.lists(st.tuples(st.integers(0, SIZE - 20), st.integers(1, 20)), min_size=1, max_size=12)


def pieces(work: Work, area: int, count: int) -> list[Piece]:
    words = work.words[area : area + w.PIECE * count].tolist()
    return [(words[i], words[i + 1], words[i + 2], words[i + 3]) for i in range(0, len(words), w.PIECE)]


def cut(requests: list[tuple[int, int]]) -> list[Piece]:
    """The pieces, of one cluster at most, of requests that are laid out."""
    found = []
    address = 1000
    for number, (offset, length) in enumerate(requests):
        end = offset + length
        while offset < end:
            n = min(end - offset, CLUSTER - offset % CLUSTER)
            found.append((offset, address, n, number))
            offset, address = offset + n, address + n
    return found


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60)
@given(
    entries=st.lists(
        st.sampled_from((0, COPIED | 0x20000, 0x20200, COPIED | 0x20400 | 1, 1 << 62 | COPIED, COPIED)), min_size=4
    ),
    marks=st.lists(st.booleans(), min_size=4, max_size=4),
    trusts=st.booleans(),
    external=st.booleans(),
    requests=REQUESTS,
)
def test_only_what_is_ours_and_was_checked_is_written_in_place(
    name: str, entries: list[int], marks: list[bool], trusts: bool, external: bool, requests: list[tuple[int, int]]
) -> None:
    slot = w.slot_of(PLACE, 5, 7)
    keys = array("q", bytes(64))
    keys[slot] = PLACE
    table = array("Q", entries[:SLICE_CLUSTERS])
    marked = array("B", marks)
    tables = Tables([table if i == slot else None for i in range(8)])
    all_marks = Tables([marked if i == slot and trusts else None for i in range(8)])
    if not trusts:
        all_marks.tables = [marked if i == slot else None for i in range(8)]  # there, but its address is not
    l1 = Pointer(array("Q", (COPIED | PLACE, 0, 0)), "Q")
    work = laid_out(requests)
    addresses = Pointer(all_marks.addresses, "Q")
    used = Pointer(array("B", bytes(8)), "B", writable=True)
    keys_pointer = Pointer(keys, "q")
    way(placing._look_up_places, name)(
        work.pointer, shape(external=external), l1, keys_pointer, tables, addresses, all_marks, used
    )
    moves, rest = {}, []
    for offset, address, length, number in cut(requests):
        cluster = offset // CLUSTER
        entry = table[cluster] if cluster < SLICE_CLUSTERS else 0
        plain = entry & COPIED and not entry & (1 << 62 | 1) and (external or entry != COPIED)
        if plain and trusts and marks[cluster]:
            moves.update({address + i: (entry & 0xFFFFFE00) + offset % CLUSTER + i for i in range(length)})
        else:
            rest.append((offset, address, length, number))
    found = {}
    for move in range(work.words[w.MOVES]):
        address, offset = work.words[w.ADDRESSES + move], work.words[w.OFFSETS + move]
        found.update({address + i: offset + i for i in range(work.words[w.LENGTHS + move])})
    assert found == moves
    assert pieces(work, w.BELOW, work.words[w.FOUND_BELOW]) == rest


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60)
@given(offsets=st.lists(st.integers(0, 50), max_size=100))
def test_pieces_are_sorted_by_place_and_then_by_request(name: str, offsets: list[int]) -> None:
    work = laid_out([(offset, 1 + number) for number, offset in enumerate(offsets)])
    before = pieces(work, w.PIECES, len(offsets))
    way(placing._sort, name)(work.pointer, w.PIECES, len(offsets))
    assert pieces(work, w.PIECES, len(offsets)) == sorted(before, key=lambda piece: (piece[0], piece[3]))


def in_pieces(requests: list[tuple[int, int]]) -> Work:
    """What `look_up_places` leaves of requests none of which can be written in place."""
    work = laid_out(requests)
    cut_up = sorted(cut(requests), key=lambda piece: (piece[0], piece[3]))
    for number, piece in enumerate(cut_up):
        at = w.PIECES + w.PIECE * number
        work.words[at : at + w.PIECE] = array("q", piece)
    work.begin(w.PIECES, len(cut_up))
    return work


def rows(work: Work) -> list[list[int]]:
    words = work.words[w.ROWS : w.ROWS + w.ROW * work.words[w.FOUND_ROWS]].tolist()
    return [words[i : i + w.ROW] for i in range(0, len(words), w.ROW)]


def solid_at(parts: list[Piece], cluster: int, alignment: int) -> int:
    """Where in memory the whole of a cluster lies, as the parts say that were cut from it; else 0."""
    reach, memory = cluster * CLUSTER, parts[0][1]
    for offset, address, length, _number in parts:
        if offset != reach or address != memory + offset - cluster * CLUSTER:
            return 0
        reach = offset + length
    return memory if reach == (cluster + 1) * CLUSTER and memory % alignment == 0 else 0


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60)
@given(requests=REQUESTS, most_rows=st.integers(1, 5), most_tables=st.integers(1, 2), alignment=st.sampled_from((1, 8)))
def test_rows_are_the_clusters_of_the_pieces(
    name: str, requests: list[tuple[int, int]], most_rows: int, most_tables: int, alignment: int
) -> None:
    work = in_pieces(requests)
    wanted: dict[int, list[Piece]] = {}
    for piece in pieces(work, w.PIECES, work.words[w.COUNT]):
        wanted.setdefault(piece[0] // CLUSTER, []).append(piece)
    make_rows = way(placing._make_rows, name)
    while work.words[w.AT] < work.words[w.COUNT]:
        first = work.words[w.AT]
        n_tables = make_rows(work.pointer, BITS, BITS + 2, most_rows, most_tables, alignment)
        bounds = work.words[w.TABLES : w.TABLES + 2 * n_tables].tolist()
        assert 1 <= n_tables <= most_tables
        assert 1 <= work.words[w.FOUND_ROWS] <= most_rows
        slices = sorted({row[w.CLUSTER] // SLICE_CLUSTERS for row in rows(work)})
        for row in rows(work):
            cluster = row[w.CLUSTER]
            parts = wanted.pop(cluster)
            assert row[w.FIRST_PIECE] == first
            assert row[w.N_PIECES] == len(parts)
            first += len(parts)
            assert row[w.SOLID] == solid_at(parts, cluster, alignment)
            assert row[w.TABLE] == slices.index(cluster // SLICE_CLUSTERS)
            assert bounds[2 * row[w.TABLE]] <= cluster <= bounds[2 * row[w.TABLE] + 1]
        ends = {row[w.CLUSTER] for row in rows(work)}
        assert set(bounds) <= ends
        assert first == work.words[w.AT]
    assert not wanted


@pytest.mark.parametrize("name", WAYS)
def test_rows_are_fresh_or_our_own_or_not_for_us(name: str) -> None:
    work = in_pieces([(CLUSTER * i, CLUSTER) for i in range(8)])
    make_rows, classify = way(placing._make_rows, name), way(placing._classify, name)
    assert make_rows(work.pointer, BITS, BITS + 2, 9, 9, 1) == 2
    first = array("Q", (0, COPIED | 0x20000, 0x20200, COPIED | 0x20400 | 1))
    second = array("Q", (1 << 62 | COPIED | 0x123, 1, COPIED, COPIED | 0x20600))
    work.words[w.ROWS + w.ROW * 7 + w.KIND] = w.OTHER  # as it was said before
    assert classify(work.pointer, 3, Tables([first, second])) == 5
    kinds = [row[w.KIND] for row in rows(work)]
    assert kinds == [w.FRESH, w.OWN, w.FRESH, w.OTHER, w.FRESH, w.FRESH, w.FRESH, w.OTHER]
    assert rows(work)[1][w.HOST] == 0x20000
    runs = Pointer(array("q", (100, 2, 200, 1, 300, 9)), "q")
    way(placing._give_places, name)(work.pointer, runs, 3)
    hosts = [row[w.HOST] >> BITS for row in rows(work) if row[w.KIND] == w.FRESH]
    assert hosts == [100, 101, 200, 300, 301]
    way(placing._add_own, name)(work.pointer)
    assert work.words[w.MOVES] == 1
    assert (work.words[w.OFFSETS], work.words[w.ADDRESSES], work.words[w.LENGTHS]) == (0x20000, 1000 + CLUSTER, CLUSTER)
    assert lookups.rest(work) == [3, 7]
    marks = [array("B", bytes(4)), array("B", bytes(4))]
    assert way(placing._link, name)(work.pointer, 3, Tables([first, second]), Tables(marks)) == 3
    assert first.tolist() == [COPIED | 800, COPIED | 0x20000, COPIED | 808, COPIED | 0x20400 | 1]
    assert second.tolist() == [COPIED | 1600, COPIED | 2400, COPIED | 2408, COPIED | 0x20600]
    assert [mark.tolist() for mark in marks] == [[1, 0, 1, 0], [1, 1, 1, 0]]
    assert [row[w.BEFORE] for row in rows(work) if row[w.KIND] == w.FRESH] == [0, 0x20200, 1 << 62 | 0x123, 1, 0]
    way(placing._hand_rows_back, name)(work.pointer)
    assert lookups.rest(work) == list(range(8))


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60)
@given(requests=REQUESTS, others=st.sets(st.integers(0, 30)))
def test_clusters_are_put_together_of_requests_and_of_what_is_around_them(
    name: str, requests: list[tuple[int, int]], others: set[int]
) -> None:
    """What is written is `-` where nobody wrote, and for each request its letter, of the last where they overlap."""
    requests = [(offset, length) for offset, length in requests if offset + length <= TABLE_SPAN * 3]
    total = sum(length for _offset, length in requests)
    memory = Pointer(bytearray(total), "B", writable=True)
    disk = bytearray(b"-" * TABLE_SPAN * 3)
    work = in_pieces(requests)
    for number in range(work.words[w.COUNT]):
        work.words[w.PIECES + w.PIECE * number + 1] += memory.address - 1000
    at = 0
    for number, (_offset, length) in enumerate(requests):
        memory.view[at : at + length] = bytes([65 + number]) * length
        at += length
    for offset, address, length, _number in pieces(work, w.PIECES, work.words[w.COUNT]):
        start = address - memory.address
        disk[offset : offset + length] = memory.view[start : start + length]
    way(placing._make_rows, name)(work.pointer, BITS, BITS + 2, 100, 100, 1)
    for number, row in enumerate(rows(work)):
        work.words[w.ROWS + w.ROW * number + w.KIND] = w.OTHER if row[w.CLUSTER] in others else w.FRESH
        work.words[w.ROWS + w.ROW * number + w.HOST] = row[w.CLUSTER] * 2 * CLUSTER  # nobody's neighbour
    gaps = Work()
    bounce = Pointer(bytearray(CLUSTER * 100), "B", writable=True)
    way(placing._find_gaps, name)(work.pointer, gaps.pointer, bounce.address)
    for number, (_offset, address, length, request) in enumerate(pieces(gaps, w.PIECES, gaps.words[w.COUNT])):
        assert request == number
        start = address - bounce.address
        bounce.view[start : start + length] = b"-" * length
    way(placing._fill_in, name)(work.pointer, bounce.address)
    fresh = [row[w.CLUSTER] for row in rows(work) if row[w.KIND] == w.FRESH]
    assert work.words[w.MOVES] == len(fresh)
    for move, cluster in enumerate(fresh):
        assert work.words[w.OFFSETS + move] == cluster * 2 * CLUSTER
        assert work.words[w.LENGTHS + move] == CLUSTER
        address = work.words[w.ADDRESSES + move]
        source = bounce if bounce.address <= address < bounce.address + bounce.length else memory
        start = address - source.address
        assert bytes(source.view[start : start + CLUSTER]) == disk[cluster * CLUSTER : (cluster + 1) * CLUSTER]
