"""Arrays of bits: the kernels against their definitions."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import bits
from blocklib._fast.pointer import Pointer
from tests.kernels import WAYS, way

ARRAYS = st.lists(st.sampled_from([0, 0, 0xFF, 0xFF, 1, 0x80, 0x3C, 0xF0, 0x0F]), min_size=1, max_size=24).map(bytearray)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("most", [1, 3, 100])
@given(content=ARRAYS, first=st.integers(0, 30), length=st.integers(0, 200))
def test_switches_are_found_bit_by_bit(name: str, most: int, content: bytearray, first: int, length: int) -> None:
    first = min(first, len(content) * 8)
    stop = min(first + length, len(content) * 8)
    kernel = way(bits._switches, name)
    state, part = array("q", (first, 0, 0)), array("q", bytes(8 * most))
    found: list[int] = []
    while True:
        kernel(Pointer(content, "B"), stop, Pointer(part, "q", writable=True), Pointer(state, "q", writable=True), most)
        found += part[: state[2]]
        if state[2] < most:
            break
    if state[1]:
        found.append(stop)
    assert found == bits.switches_definition(content, first, stop).tolist()
    ones = [index for index in range(first, stop) if content[index >> 3] >> (index & 7) & 1]
    assert ones == [index for start, end in zip(found[::2], found[1::2], strict=True) for index in range(start, end)]


@pytest.mark.parametrize("name", WAYS)
@given(content=ARRAYS, other=ARRAYS, shift=st.integers(-5, 5), cut=st.integers(0, 7))
def test_a_merge_sets_what_the_other_stands_for(name: str, content: bytearray, other: bytearray, shift: int, cut: int) -> None:
    n = len(content) * 8 - cut
    expected, found = bytearray(content), bytearray(content)
    for index in range(len(other) * 8):
        if other[index >> 3] >> (index & 7) & 1:
            scaled = range(index << shift, (index + 1) << shift) if shift > 0 else [index >> -shift]
            for bit in scaled:
                if bit < n:
                    expected[bit >> 3] |= 1 << (bit & 7)
    way(bits._merge, name)(Pointer(found, "B", writable=True), n, Pointer(other, "B"), len(other), shift)
    assert found == expected
    by_definition = bytearray(content)
    bits.merge_scaled_definition(by_definition, n, other, shift)
    assert by_definition == expected


def test_the_public_functions_say_the_same_with_kernels() -> None:
    content = bytearray(1 << 18)
    content[5] = content[-1] = 0x81
    expected = bits.switches_definition(content, 0, len(content) * 8)
    assert bits.switches(content, 0, len(content) * 8) == expected
    content = bytearray(b"\x55" * (1 << 15))  # more switches than are found together
    for kernel in (bits._switches, bits._merge):
        kernel.loaded()
    assert bits.switches(content, 0, len(content) * 8) == bits.switches_definition(content, 0, len(content) * 8)
    merged = bytearray(1 << 12)
    bits.merge_scaled(merged, len(merged) * 8, content, -3)
    assert merged == b"\xff" * (1 << 12)
