"""Runs of zeroes and of differences: the kernels against their definitions."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import buffers
from blocklib._fast.kernel import Kernel
from blocklib._fast.pointer import Pointer
from tests.kernels import WAYS, way

BLOCK = 16
COUNTS = st.lists(st.integers(0, 2), max_size=40)


def _switches(kernel: Kernel, name: str, block: int, *views: bytes) -> list[tuple[int, int]]:
    out = array("q", bytes(8 * (len(views[0]) // block + 1)))
    pointers = [Pointer(view, "Q") for view in views]
    n = way(kernel, name)(*pointers, len(views[0]) // block, block // 8, Pointer(out, "q", writable=True))
    found = out[:n].tolist()
    return [(start * block, stop * block) for start, stop in zip(found[::2], found[1::2], strict=True)]


@pytest.mark.parametrize("name", WAYS)
@given(contents=COUNTS)
def test_data_is_found_block_by_block(name: str, contents: list[int]) -> None:
    data = b"".join((b"\0" * BLOCK, b"\1" + b"\0" * (BLOCK - 1), b"\0" * (BLOCK - 1) + b"\x80")[one] for one in contents)
    assert _switches(buffers._data_switches, name, BLOCK, data) == buffers.data_parts_definition(memoryview(data), BLOCK)


@pytest.mark.parametrize("name", WAYS)
@given(contents=COUNTS)
def test_differences_are_found_block_by_block(name: str, contents: list[int]) -> None:
    first = bytes(range(BLOCK)) * len(contents)
    second = bytearray(first)
    for index, one in enumerate(contents):
        if one:
            second[index * BLOCK + (0 if one == 1 else BLOCK - 1)] ^= 0x40
    expected = buffers.changed_parts_definition(memoryview(first), memoryview(second), BLOCK)
    assert _switches(buffers._difference_switches, name, BLOCK, first, bytes(second)) == expected


def test_definitions_join_neighbours_and_know_large_blocks() -> None:
    block = 1 << 17
    data = bytearray(block * 4)
    data[block] = data[3 * block - 1] = 1
    view = memoryview(data)
    assert buffers.data_parts_definition(view, block) == [(block, 3 * block)]
    assert buffers.changed_parts_definition(view, memoryview(bytes(len(data))), block) == [(block, 3 * block)]


def test_the_public_functions_say_the_same_with_a_kernel() -> None:
    buffers._data_switches.loaded()
    data = bytearray(1 << 16)
    data[4096] = 1
    view = memoryview(data)
    assert buffers.data_parts(view, 512) == [(4096, 4608)]
    assert buffers.changed_parts(view, memoryview(bytes(1 << 16)), 4096) == [(4096, 8192)]
