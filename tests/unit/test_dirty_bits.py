"""DirtyBits against a set of piece numbers, and what must stay fast at any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklib.dirty_bits import DirtyBits, bytes_for
from blocklib.sizes import GiB, KiB, MiB, TiB

GRANULARITIES = [512, 1024, 4096, 64 * KiB]


class Model:
    """The same as a set of numbers."""

    def __init__(self, size: int, granularity: int) -> None:
        self.size, self.granularity = size, granularity
        self.pieces: set[int] = set()

    @property
    def n(self) -> int:
        return -(-self.size // self.granularity)

    def set_range(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        if offset < end:
            self.pieces |= set(range(offset // self.granularity, (end - 1) // self.granularity + 1))

    def clear_range(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        for piece in list(self.pieces):
            start = piece * self.granularity
            if start >= offset and min(start + self.granularity, self.size) <= end:
                self.pieces.discard(piece)

    def truncate(self, size: int) -> None:
        self.size = size
        self.pieces = {piece for piece in self.pieces if piece < self.n}

    def merge(self, other: Model) -> None:
        for piece in other.pieces:
            self.set_range(piece * other.granularity, min(other.granularity, other.size - piece * other.granularity))

    def ranges(self) -> list[tuple[int, int]]:
        found: list[list[int]] = []
        for piece in sorted(self.pieces):
            start = piece * self.granularity
            end = min(start + self.granularity, self.size)
            if found and found[-1][1] == start:
                found[-1][1] = end
            else:
                found.append([start, end])
        return [(start, end - start) for start, end in found]


def assert_same(bits: DirtyBits, model: Model) -> None:
    assert list(bits.ranges()) == model.ranges()
    assert bits.count() == sum(length for _, length in model.ranges())
    assert bits.any() == bool(model.pieces)
    assert [tuple(row) for row in bits.table(0, bits.size).tolist()] == model.ranges()


SIZES = st.integers(0, 300).map(lambda n: n * 512)
RANGES = st.tuples(st.integers(0, 160 * KiB), st.integers(0, 160 * KiB))
ACTIONS = st.one_of(
    st.tuples(st.just("set"), RANGES),
    st.tuples(st.just("clear"), RANGES),
    st.tuples(st.just("truncate"), SIZES.map(lambda size: (size, 0))),
    st.tuples(st.just("merge"), st.tuples(st.sampled_from(GRANULARITIES), st.integers(0, 1 << 32))),
)


@settings(max_examples=150)
@given(SIZES, st.sampled_from(GRANULARITIES), st.lists(ACTIONS, max_size=12))
def test_bits_do_what_a_set_does(size: int, granularity: int, actions: list[tuple[str, tuple[int, int]]]) -> None:
    bits, model = DirtyBits(size, granularity), Model(size, granularity)
    for name, (a, b) in actions:
        if name == "set":
            bits.set_range(a, b)
            model.set_range(a, b)
        elif name == "clear":
            bits.clear_range(a, b)
            model.clear_range(a, b)
        elif name == "truncate":
            bits.truncate(a)
            model.truncate(a)
        else:
            other, other_model = DirtyBits(bits.size, a), Model(bits.size, a)
            for piece in range(other_model.n):
                if b >> piece % 33 & 1:
                    other.set_range(piece * a, a)
                    other_model.set_range(piece * a, a)
            bits.merge(other)
            model.merge(other_model)
        assert_same(bits, model)
    copy = DirtyBits.from_bytes(bits.size, granularity, bits.to_bytes(0, bits.length))
    assert copy == bits


@settings(max_examples=60)
@given(st.lists(RANGES, max_size=6), RANGES)
def test_a_window_of_the_table_is_the_table_clipped(marks: list[tuple[int, int]], window: tuple[int, int]) -> None:
    bits = DirtyBits(160 * KiB, 512)
    for offset, length in marks:
        bits.set_range(offset, length)
    offset, length = window
    end = offset + length
    clipped = [(max(a, offset), min(a + n, end)) for a, n in bits.ranges()]
    clipped = [(start, stop) for start, stop in clipped if start < stop]
    assert [(a, a + n) for a, n in bits.table(offset, length).tolist()] == clipped


@settings(max_examples=25)
@given(
    st.integers(0, 1 << 32),
    st.sampled_from([(512, 4096), (4096, 512), (512, MiB), (MiB, 512), (1024, 512), (512, GiB)]),
)
def test_large_bitmaps_of_different_granularity_merge_as_small_ones_do(seed: int, shifts: tuple[int, int]) -> None:
    ours, theirs = shifts
    size = 5000 * 8 * theirs - theirs // 512 * 100 if theirs < MiB else 5000 * 8 * theirs - 512
    if bytes_for(size, ours.bit_length() - 1) > 64 * MiB:
        size = 4097 * 8 * theirs
        ours = theirs // 8
    random = np.random.default_rng(seed)
    source = DirtyBits(size, theirs)
    for piece in random.integers(0, source.n_bits, 40).tolist():
        source.set_range(piece * theirs, theirs * int(random.integers(1, 300)))
    merged, one_by_one = DirtyBits(size, ours), DirtyBits(size, ours)
    for bits in (merged, one_by_one):
        bits.set_range(0, 3 * ours)
    merged.merge(source)
    for offset, length in source.ranges():
        one_by_one.set_range(offset, length)
    assert merged == one_by_one


def test_a_tebibyte_is_marked_and_told_as_one_range() -> None:
    bits = DirtyBits(16 * TiB, 64 * KiB)
    assert bits.length == 32 * MiB
    bits.set_range(3 * TiB + 5, TiB)
    assert bits.count() == TiB + 64 * KiB
    assert bits.table(0, 16 * TiB).tolist() == [(3 * TiB, TiB + 64 * KiB)]
    bits.clear_range(3 * TiB, TiB)
    assert list(bits.ranges()) == [(4 * TiB, 64 * KiB)]


def test_ranges_that_cross_the_steps_of_the_search_stay_whole() -> None:
    bits = DirtyBits(4 * MiB * 8 * 512, 512)
    edge = 65536 * 8 * 512  # where one step of the search ends
    bits.set_range(edge - 512, 1024)
    bits.set_range(2 * edge, edge)
    bits.set_range(bits.size - 512, 512)
    expected = [(edge - 512, 1024), (2 * edge, edge), (bits.size - 512, 512)]
    assert list(bits.ranges()) == expected
    assert bits.table(0, bits.size).tolist() == expected


@pytest.mark.parametrize(
    ("marked", "expected"),
    [((0, 0), 0), ((0, 4096 * 8 * 512), 1), ((0, 512), None), ((512, 4096 * 8 * 512), None)],
)
def test_a_part_that_is_all_one_value_is_seen(marked: tuple[int, int], expected: int | None) -> None:
    bits = DirtyBits(6000 * 8 * 512, 512)
    bits.set_range(*marked)
    assert bits.part_is(0, 4096) == expected


def test_a_part_behind_the_end_is_zero_and_never_ones() -> None:
    bits = DirtyBits(100 * 8 * 512, 512)
    bits.set_range(0, bits.size)
    assert bits.part_is(0, 100) == 1
    assert bits.part_is(0, 4096) is None
    assert bits.part_is(200, 4096) == 0
