"""CopyState: what is still to be copied, and who is copying it."""

from __future__ import annotations

import threading

import pytest

from blocklib.copy import CopyState
from blocklib.dirty_bits import DirtyBits

SIZE = 10_000
PIECE = 1024


def _state(*ranges: tuple[int, int]) -> CopyState:
    state = CopyState(SIZE, PIECE)
    for offset, length in ranges:
        state.mark(offset, length)
    return state


def test_marks_are_whole_pieces_that_end_with_the_disk() -> None:
    state = _state((1, 1), (9000, 5000))
    assert list(state.sweep()) == [(0, 1024), (8192, SIZE - 8192)]
    assert state.count() == 1024 + SIZE - 8192


def test_what_is_taken_is_marked_no_more() -> None:
    state = _state((0, 4096))
    assert state.take(1500, 100) == [(1024, 1024)]
    assert state.take(1500, 100) == []
    assert list(state.sweep()) == [(0, 1024), (2048, 2048)]
    assert state.take(0, SIZE) == [(0, 1024), (2048, 2048)]
    assert not state.any()


def test_a_sweep_sees_what_is_marked_ahead_of_it_and_not_what_is_behind() -> None:
    state = _state((0, 1), (4096, 1))
    sweep = state.sweep()
    assert next(sweep) == (0, 1024)
    state.mark(2048, 1)
    state.mark(0, 1)
    assert list(sweep) == [(2048, 1024), (4096, 1024)]


def test_a_reserved_piece_is_waited_for_and_others_are_not() -> None:
    state = _state()
    order: list[str] = []
    waiting = threading.Event()

    def other() -> None:
        with state.reserved(5000, 1):
            order.append("elsewhere")
        waiting.set()
        with state.reserved(1500, 1):
            order.append("same piece")

    with state.reserved(1024, 10):
        thread = threading.Thread(target=other)
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["elsewhere", "first", "same piece"]


def test_what_remains_of_finer_bits_is_what_lies_in_pieces_still_to_be_copied() -> None:
    bits = DirtyBits(SIZE, 512)
    for offset in (0, 512, 1536, 4096, 9900):
        bits.set_range(offset, 1)
    state = CopyState(SIZE, PIECE)
    state.merge(bits)
    assert state.take(0, 1024) == [(0, 1024)]
    assert state.take(4096, 1) == [(4096, 1024)]
    assert list(state.remaining(bits).ranges()) == [(1536, 512), (9728, SIZE - 9728)]


def test_what_remains_of_coarser_bits_is_all_that_has_such_a_part() -> None:
    bits = DirtyBits(SIZE, 4096)
    bits.set_range(0, 1)
    bits.set_range(8192, 1)
    state = CopyState(SIZE, PIECE)
    state.merge(bits)
    state.take(8192, SIZE - 8192)
    state.take(0, 3072)
    assert list(state.remaining(bits).ranges()) == [(0, 4096)]
    state.take(3072, 1024)
    assert not state.remaining(bits).any()


def test_what_was_taken_and_not_copied_is_marked_again() -> None:
    state = _state((0, 3000), (5000, 10))
    with pytest.raises(RuntimeError), state.taken(1000, 100) as taken:
        assert taken == [(0, 2048)]
        assert list(state.sweep()) == [(2048, 1024), (4096, 1024)]
        raise RuntimeError
    assert list(state.sweep()) == [(0, 3072), (4096, 1024)]
    with state.taken(0, SIZE) as taken:
        assert taken == [(0, 3072), (4096, 1024)]
    assert not state.any()
