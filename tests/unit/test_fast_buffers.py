"""Runs of zeroes and of differences: the kernels against their definitions."""

from __future__ import annotations

import random
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


def _parts(block: int, first: bytes | bytearray, second: bytes | bytearray) -> list[tuple[int, int]]:
    """The parts that differ, a block at a time."""
    parts: list[tuple[int, int]] = []
    for at in range(0, len(first), block):
        if first[at : at + block] != second[at : at + block]:
            start = parts.pop()[0] if parts and parts[-1][1] == at else at
            parts.append((start, at + block))
    return parts


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
    assert _switches(buffers._data_switches, name, BLOCK, data) == _parts(BLOCK, data, bytes(len(data)))


@pytest.mark.parametrize("name", WAYS)
@given(contents=COUNTS)
def test_differences_are_found_block_by_block(name: str, contents: list[int]) -> None:
    first = bytes(range(BLOCK)) * len(contents)
    second = bytearray(first)
    for index, one in enumerate(contents):
        if one:
            second[index * BLOCK + (0 if one == 1 else BLOCK - 1)] ^= 0x40
    expected = _parts(BLOCK, first, second)
    assert _switches(buffers._difference_switches, name, BLOCK, first, bytes(second)) == expected


@pytest.fixture(params=["memcmp", "kernel"])
def doubt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at blocks of which a few bytes say nothing."""
    for kernel in (buffers._data_switches, buffers._difference_switches):
        answer = kernel.loaded() if request.param == "kernel" else None
        monkeypatch.setattr(kernel, "_compiled", answer)
        monkeypatch.setattr(buffers.family, "worth", lambda _name, _saving: None)


@pytest.mark.usefixtures("doubt")
@pytest.mark.parametrize("block", [8, 512, 4096])
@pytest.mark.parametrize("spread", [1, 20, 400])
def test_single_bytes_are_found_wherever_they_are(block: int, spread: int) -> None:
    rng = random.Random(block * spread)
    for _ in range(20):
        size = block * rng.randrange(1, 65536 // block)
        data, other = bytearray(size), bytearray(rng.randbytes(size))
        for _ in range(spread):
            data[rng.randrange(size)] = rng.randrange(256)
        changed = bytearray(x ^ y for x, y in zip(data, other, strict=True))
        assert buffers.data_parts(memoryview(data), block) == _parts(block, data, bytes(size))
        assert buffers.changed_parts(memoryview(changed), memoryview(bytes(other)), block) == _parts(block, data, bytes(size))


@pytest.mark.usefixtures("doubt")
def test_all_nothing_and_an_empty_buffer() -> None:
    ones, zeroes = memoryview(b"\1" * (1 << 20)), memoryview(bytes(1 << 20))
    assert buffers.data_parts(ones, 4096) == buffers.changed_parts(ones, zeroes, 4096) == [(0, 1 << 20)]
    assert buffers.data_parts(zeroes, 4096) == buffers.changed_parts(ones, ones, 4096) == []
    assert buffers.data_parts(ones[:0], 4096) == buffers.changed_parts(ones[:0], zeroes[:0], 4096) == []


def test_the_public_functions_say_the_same_with_a_kernel() -> None:
    buffers._data_switches.loaded()
    data = bytearray(1 << 16)
    data[4096] = 1
    view = memoryview(data)
    assert buffers.data_parts(view, 512) == [(4096, 4608)]
    assert buffers.changed_parts(view, memoryview(bytes(1 << 16)), 4096) == [(4096, 8192)]
