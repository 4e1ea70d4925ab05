"""CRC-32C: the kernel against crcmod."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import crc32c
from blocklib._fast.pointer import Pointer
from tests.kernels import WAYS, way


@pytest.mark.parametrize("name", WAYS)
@given(first=st.binary(max_size=60), second=st.binary(max_size=60))
def test_the_kernel_says_what_crcmod_says(name: str, first: bytes, second: bytes) -> None:
    kernel, tables = way(crc32c._crc32c, name), Pointer(crc32c._tables(), "Q")
    value = kernel(Pointer(first, "B"), len(first), tables, 0)
    assert value == crc32c.crc32c_definition(first)
    assert kernel(Pointer(second, "B"), len(second), tables, value) == crc32c.crc32c_definition(first + second)


def test_the_known_answer_whichever_way() -> None:
    assert crc32c.crc32c(b"123456789") == 0xE306_9283
    crc32c._crc32c.loaded()
    assert crc32c.crc32c(b"123456789") == 0xE306_9283
    data = bytes(range(256)) * 5000
    assert crc32c.crc32c(data) == crc32c.crc32c_definition(data) == crc32c.crc32c(data[777:], crc32c.crc32c(data[:777]))
    assert crc32c.crc32c(memoryview(bytearray(data))) == crc32c.crc32c(data)
