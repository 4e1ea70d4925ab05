"""Rows of extents: the kernels against the driver's own answers, and against their definitions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import extents as kernels
from blocklib._fast.extents import ASK, DATA, PLACED, PRESENT, ZERO, Facts, Rows
from blocklib._fast.kernel import Kernel
from blocklib._fast.pointer import Pointer
from blocklib.errors import ImageCorruptError
from blocklib.extents import FLAG_OFFSET_VALID
from blocklib.formats.qcow2.geometry import Geometry
from blocklib.formats.qcow2.mapping import Mapping
from blocklib.formats.qcow2.mapping_table import _facts
from blocklib.formats.qcow2.subcluster_mapping import SubclusterMapping
from tests.kernels import WAYS, way

CLUSTER_BITS = 14
CLUSTER = 1 << CLUSTER_BITS
COPIED, COMPRESSED = 1 << 63, 1 << 62


@pytest.fixture(params=WAYS, autouse=True)
def _each_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every kernel of the family runs in one of the ways."""
    compiled = kernels.family.load()

    def chosen(kernel: Kernel) -> Callable[..., int]:
        return compiled[kernel.name] if request.param == "compiled" else way(kernel, request.param)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "loaded", chosen)
        patch.setattr(Kernel, "worth", lambda kernel, _saving: chosen(kernel))
        yield


# -- reading tables --------------------------------------------------------------------------------------------------------


def _mapping(*, extended: bool, version: int = 3, external: bool = False) -> Mapping:
    geometry = Geometry(CLUSTER_BITS, 4, extended)
    kind = SubclusterMapping if extended else Mapping
    file = cast(Any, SimpleNamespace(size=1 << 40))
    l1 = array("Q", (CLUSTER | COPIED,))
    return kind(
        file, geometry, l1, 0, version=version, external=external, slice_length=CLUSTER, cache_bytes=0, node="the image"
    )


def _places(n: int) -> st.SearchStrategy[int]:
    return st.integers(0, n).map(lambda number: number * CLUSTER)


def _entries(mapping: Mapping) -> st.SearchStrategy[list[int]]:
    """Words of a few entries; runs of clusters, and now and then what may not be there."""
    one: st.SearchStrategy[Any] = st.one_of(
        st.just(0),
        st.just(COPIED),
        st.just(1),
        st.builds(lambda host: host | COPIED, _places(4)),
        st.builds(lambda host: host | 1, _places(4)),
        st.builds(lambda low: COMPRESSED | low, st.integers(0, 1 << 61)),
        st.sampled_from([CLUSTER + 512, 1 << 57, 1 | 512]),
    )
    if mapping.words == 1:
        return st.lists(one, min_size=1, max_size=24)
    halves = st.sampled_from([0, 0xFFFF_FFFF, 0xF, 0xFFFF_0000, 1 << 31])
    pair = st.tuples(one.map(lambda entry: entry & ~1 if entry >> 62 != 1 else entry), halves, halves)
    return st.lists(pair, min_size=1, max_size=12).map(
        lambda pairs: [word for entry, full, zero in pairs for word in (entry, full | zero << 32)]
    )


def _defined(mapping: Mapping, words: list[int]) -> tuple[list[tuple[int, int, int, int]], int]:
    """(rows, number of the entry where it ended), by asking for one run after the other."""
    table = array("Q", words)
    n = len(words) // mapping.words
    rows = Rows(2000)
    for index in range(n):
        done = 0
        part = Rows(64)
        while done < CLUSTER:
            try:
                _kind, _child, host, length, flags = mapping.resolve(
                    table, index * mapping.words, index * CLUSTER + done, CLUSTER - done, cast(Any, None)
                )
            except ImageCorruptError:
                return list(rows), index
            part.append(index * CLUSTER + done, length, host if flags & FLAG_OFFSET_VALID else -1, flags)
            done += length
        for row in part:
            rows.append(*row)
    return list(rows), n


@pytest.mark.parametrize("extended", [False, True], ids=["standard", "extended"])
@pytest.mark.parametrize(("version", "external"), [(3, False), (2, False), (3, True)], ids=["v3", "v2", "data-file"])
def test_rows_of_tables_are_the_runs_that_the_driver_resolves(extended: bool, version: int, external: bool) -> None:
    if extended and version == 2:
        return  # there are none
    mapping = _mapping(extended=extended, version=version, external=external)
    facts = kernels.facts_pointer(_facts(mapping, -1))

    @given(words=_entries(mapping))
    def compare(words: list[int]) -> None:
        rows = Rows(2000)
        n = len(words) // mapping.words
        ended = kernels.read_entries(Pointer(array("Q", words), "Q"), 0, n, 0, facts, rows)
        assert (list(rows), ended) == _defined(mapping, words)

    compare()


def test_a_full_table_of_rows_ends_the_reading_and_it_goes_on_from_there() -> None:
    mapping = _mapping(extended=False)
    facts = kernels.facts_pointer(_facts(mapping, -1))
    words = array("Q", [0, CLUSTER * 3] * 40)
    found: list[tuple[int, int, int, int]] = []
    index = 0
    while index < 80:
        rows = Rows(34)
        index = kernels.read_entries(Pointer(words, "Q"), index, 80, 0, facts, rows)
        assert rows.full
        found += rows
    assert (found, 80) == _defined(mapping, words.tolist())


def test_an_extended_entry_is_read_whole_or_not_at_all() -> None:
    mapping = _mapping(extended=True)
    words = array("Q", [CLUSTER, 0x5555_5555] * 3)
    rows = Rows(70)
    ended = kernels.read_entries(Pointer(words, "Q"), 0, 3, 0, kernels.facts_pointer(_facts(mapping, -1)), rows)
    assert ended == 2
    assert len(rows) == 64


def test_what_may_not_be_told_is_not() -> None:
    mapping = _mapping(extended=False)
    facts = kernels.facts_pointer(_facts(mapping, ~FLAG_OFFSET_VALID))
    rows = Rows(40)
    kernels.read_entries(Pointer(array("Q", [CLUSTER, CLUSTER * 5]), "Q"), 0, 2, 0, facts, rows)
    assert list(rows) == [(0, 2 * CLUSTER, -1, DATA | PRESENT)]


def test_the_facts_must_be_complete() -> None:
    with pytest.raises(AssertionError):
        kernels.read_entries(
            Pointer(array("Q", [0]), "Q"), 0, 2, 0, kernels.facts_pointer(Facts(16, 0, True, False, 0, 0, False)), Rows(40)
        )


# -- rows ------------------------------------------------------------------------------------------------------------------

WORDS = (0, PLACED, ZERO, ZERO | PLACED, ZERO | PRESENT, DATA | PRESENT | PLACED, DATA | PRESENT)


@st.composite
def rows_of(draw: st.DrawFn, start: int = 0) -> Rows:
    rows = Rows(64)
    offset = start
    for _ in range(draw(st.integers(1, 8))):
        word = draw(st.sampled_from(WORDS))
        length = draw(st.integers(1, 5))
        rows.append(offset, length, draw(st.integers(0, 20)) if word & PLACED else -1, word)
        offset += length
    return rows


def _bytewise(rows: Rows) -> list[tuple[int, int]]:
    """(place, word) of every byte."""
    return [(place + index if place >= 0 else -1, word) for _offset, length, place, word in rows for index in range(length)]


def _joined(rows: Rows) -> bool:
    again = Rows(64)
    for row in rows:
        again.append(*row)
    return list(again) == list(rows)


@given(runs=rows_of(), depth=st.integers(0, 3), zero_from=st.integers(0, 40))
def test_an_image_labels_its_rows_and_ends_where_the_one_below_does(runs: Rows, depth: int, zero_from: int) -> None:
    expected = []
    for offset, (place, word) in enumerate(_bytewise(runs)):
        if word & (ZERO | PRESENT):
            expected.append((place, word | depth << 8))
        else:
            expected.append((place, word | ZERO | depth << 8) if offset >= zero_from else (-1, depth << 8))
    found = kernels.labelled(runs, depth, zero_from)
    assert _bytewise(found) == expected
    assert _joined(found)


@given(data=st.data(), upper=rows_of())
def test_a_lower_image_shows_where_the_upper_leaves_it_open(data: st.DataObject, upper: Rows) -> None:
    upper = kernels.labelled(upper, 0, 1 << 20)
    start, end = kernels.undetermined(upper)
    wide = [offset for offset, (_place, word) in enumerate(_bytewise(upper)) if not word & (ZERO | PRESENT)]
    assert (start, end) == ((wide[0], wide[-1] + 1) if wide else (0, 0))
    if not wide:
        return
    lower = Rows(64)
    while not len(lower) or lower.end < end:
        for offset, length, place, word in data.draw(rows_of(lower.end if len(lower) else start)):
            if offset < end:
                lower.append(offset, min(length, end - offset), place, word | 1 << 8)
    expected = _bytewise(upper)
    for offset, said in enumerate(_bytewise(lower), start):
        if not expected[offset][1] & (ZERO | PRESENT):
            expected[offset] = said
    merged = kernels.merged(upper, lower)
    assert _bytewise(merged) == expected
    assert _joined(merged)


@given(rows=rows_of(), data=st.data())
def test_clipping_leaves_the_bytes_of_the_range(rows: Rows, data: st.DataObject) -> None:
    whole, end = _bytewise(rows), rows.end
    start = data.draw(st.integers(0, end - 1))
    stop = data.draw(st.integers(start + 1, end))
    rows.clip(start, stop)
    assert _bytewise(rows) == whole[start:stop]
    assert (rows.start, rows.end) == (start, stop)


@given(rows=rows_of(), shift=st.integers(0, 3), counted=st.integers(0, 1))
def test_units_with_data_are_counted_once(rows: Rows, shift: int, counted: int) -> None:
    units = {offset >> shift for offset, (_place, word) in enumerate(_bytewise(rows)) if not word & ZERO}
    found = kernels.units_with_data(rows, shift, counted)
    assert found == kernels.units_with_data_definition(rows, shift, counted)
    assert found[0] == len({unit for unit in units if unit >= counted})


@given(rows=rows_of())
def test_what_is_to_be_done_is_joined(rows: Rows) -> None:
    meaning = (3, 1, 1, 2)
    found = kernels.actions(rows, meaning)
    assert found == kernels.actions_definition(rows, meaning)
    said = [meaning[word >> 1 & 2 | word >> 1 & 1] for _place, word in _bytewise(rows)]
    assert [what for _offset, length, what in found for _ in range(length)] == said
    assert all(one[2] != two[2] for one, two in pairwise(found))


def test_text_is_the_same_from_a_kernel() -> None:
    rows = Rows(64)
    offset = 0
    for index, word in enumerate(WORDS * 2):
        length = 10**index
        rows.append(offset, length, index * 7**index if word & PLACED else -1, word | index << 8)
        offset += length
    expected = kernels.json_text_definition(rows)
    for size in (257, 1000, 1 << 16):
        assert b"".join(bytes(part) for part in kernels.json_text(rows, bytearray(size))) == expected


@given(
    runs=st.lists(
        st.tuples(st.sampled_from([0, DATA | PRESENT | PLACED, DATA | PRESENT | PLACED | ASK]), st.integers(0, 60)), max_size=9
    ),
    file=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=9),
)
def test_data_is_split_where_the_file_has_holes(runs: list[tuple[int, int]], file: list[tuple[int, bool]]) -> None:
    state = [zero for length, zero in file for _ in range(length)]
    questions = 0

    def ask(place: int) -> tuple[int, int]:
        nonlocal questions
        questions += 1
        here = state[place] if place < len(state) else True
        end = place
        while end < len(state) and state[end] == here:
            end += 1
        return (1 << 62 if end >= len(state) and here else end), ZERO if here else 0

    rows = Rows(64)
    expected: list[tuple[int, int]] = []
    for number, (word, place) in enumerate(runs):
        rows.append(number * 7, 7, place if word & PLACED else -1, word)
        for byte in range(place, place + 7):
            zero = ZERO if word & ASK and (byte >= len(state) or state[byte]) else 0
            expected.append((byte if word & PLACED else -1, word & ~ASK | zero))
    found = kernels.asked(rows, kernels.Holes(), 200, ask)
    assert _bytewise(found) == expected
    assert questions <= 10 * len(runs)


@given(
    places=st.lists(st.integers(0, 60), max_size=9),
    answers=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=9),
)
def test_a_file_that_is_written_meanwhile_is_not_asked_for_the_same_place_for_ever(
    places: list[int], answers: list[tuple[int, bool]]
) -> None:
    asked: list[int] = []

    def ask(place: int) -> tuple[int, int]:
        assert asked[-1:] != [place]
        asked.append(place)
        length, zero = answers[len(asked) % len(answers)]
        return place + length, ZERO if zero else 0

    rows = Rows(64)
    for number, place in enumerate(places):
        rows.append(number * 7, 7, place, DATA | PRESENT | PLACED | ASK)
    found = kernels.asked(rows, kernels.Holes(), 200, ask)
    assert [(place, word & ~ZERO) for place, word in _bytewise(found)] == [
        (byte, DATA | PRESENT | PLACED) for place in places for byte in range(place, place + 7)
    ]


def test_what_is_known_of_a_file_is_forgotten_where_it_has_changed() -> None:
    holes = kernels.Holes()
    for start, end, zero in [(100, 200, ZERO), (300, 400, 0), (50, 320, 0), (10, 50, ZERO), (400, 400 + 5, 0)]:
        holes.add(start, end, zero)
    assert holes.numbers().tolist() == [10, 50, ZERO, 50, 320, 0, 320, 400, 0, 400, 405, 0]
