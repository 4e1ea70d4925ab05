"""Counts in refcount blocks of every width: the kernels against their definitions."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import refcounts
from blocklib._fast.kernel import Kernel
from tests.kernels import WAYS, way

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
N = 128


def _block(width: int, counts: list[int]) -> refcounts.Block:
    typecode = {8: "B", 16: "H", 32: "I", 64: "Q"}.get(width, "B")
    block = array(typecode, bytes(N * width // 8))
    most = (1 << width) - 1
    for index, count in enumerate(counts):
        refcounts.put(block, width, index, most if count == 3 else min(count, most))
    return block


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(counts, where 3 stands for the largest; a range of them)."""
    counts: list[int] = []
    while len(counts) < N:
        counts += [draw(st.integers(0, 3))] * draw(st.integers(1, 40))
    index = draw(st.integers(0, N))
    return counts[:N], index, draw(st.integers(index, N))


def _way(kernel: Kernel, name: str) -> Callable[..., int]:
    run: Callable[..., int] = way(kernel, name)
    return lambda block, width, *rest: run(refcounts._words(block), refcounts._order(width), *rest)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_do_what_their_definitions_do(name: str, width: int) -> None:
    find_free, run_of = _way(refcounts._find_free, name), _way(refcounts._run_of, name)
    fill, add = _way(refcounts._fill, name), _way(refcounts._add, name)

    def check(changing: Callable[..., Any], defined: Callable[..., Any], counts: list[int], *arguments: int) -> None:
        ours, theirs = _block(width, counts), _block(width, counts)
        assert (changing(ours, width, *arguments) or None) == (defined(theirs, width, *arguments) or None)
        assert ours == theirs

    @given(case=blocks(), count=st.integers(0, min(3, (1 << width) - 1)))
    def compare(case: tuple[list[int], int, int], count: int) -> None:
        counts, index, stop = case
        block = _block(width, counts)
        found = find_free(block, width, index, stop)
        assert (found if found < stop else None) == refcounts.find_free_definition(block, width, index, stop)
        assert run_of(block, width, index, stop, count) == refcounts.run_of_definition(block, width, index, stop, count)
        check(fill, refcounts.fill_definition, counts, index, stop, count)
        check(add, refcounts.add_definition, counts, index, stop, 1)
        check(add, refcounts.add_definition, counts, index, stop, -1)

    compare()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_public_functions_say_the_same_with_kernels(width: int) -> None:
    for kernel in (refcounts._find_free, refcounts._run_of, refcounts._fill, refcounts._add):
        kernel.loaded()
    block = _block(width, [1] * N)
    assert refcounts.find_free(block, width, 0, N) is None
    assert refcounts.add(block, width, 70, 80, -1) == 10
    assert refcounts.find_free(block, width, 3, N) == 70
    assert refcounts.run_of(block, width, 70, N, 0) == 10
    refcounts.fill(block, width, 70, 80, 1)
    assert refcounts.run_of(block, width, 0, N, 1) == N
    assert block == _block(width, [1] * N)
