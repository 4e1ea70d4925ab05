"""Data counted in rows: the kernel in each of its ways against the definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import totals
from blocklib._fast.extents import COMPRESSED, DATA, DEPTH_SHIFT, PLACED, PRESENT, ZERO, Rows
from blocklib._fast.kernel import Kernel
from tests.kernels import WAYS, way

WORDS = st.builds(
    lambda flags, depth: flags | depth << DEPTH_SHIFT,
    st.sampled_from([0, ZERO, PRESENT | ZERO, DATA, PRESENT | DATA | PLACED, PRESENT | DATA | COMPRESSED, DATA | ZERO]),
    st.integers(0, 3),
)
ROWS = st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(-1, 1 << 41), WORDS), max_size=30)


@pytest.mark.parametrize("name", WAYS)
@given(found=ROWS, depth=st.integers(0, 3), size=st.integers(0, 1 << 41))
def test_data_is_counted_as_the_definition_counts_it(
    name: str, found: list[tuple[int, int, int]], depth: int, size: int
) -> None:
    rows = Rows(len(found) + 1)
    offset = 0
    for length, place, word in found:
        rows.append(offset, length, place, word)
        offset += length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "worth", lambda kernel, _saving: way(kernel, name))
        assert totals.data_bytes(rows, depth, size) == totals.data_bytes_definition(rows, depth, size)


def test_only_plain_data_in_the_file_of_one_image_counts() -> None:
    rows = Rows(10)
    for index, (place, word) in enumerate(
        [(0, DATA | PLACED), (90, DATA | PLACED), (-1, DATA), (0, DATA | COMPRESSED), (0, ZERO), (0, DATA | 1 << DEPTH_SHIFT)]
    ):
        rows.append(20 * index, 20, place, word)
    assert totals.data_bytes_definition(rows, 0, 100) == 40
    assert totals.data_bytes_definition(rows, 1, 100) == 20
