"""How much data is in rows of extents, for what must not exceed the file that it is said to lie in."""

from __future__ import annotations

from typing import Any, Final

from blocklib._fast.extents import COMPRESSED, DATA, DEPTH_SHIFT, ZERO, Rows
from blocklib._fast.kernel import Family

family = Family(__name__)

_SAVED_PER_ROW: Final = 80


def data_bytes(rows: Rows, depth: int, size: int) -> int:
    """Bytes of the rows with data of the image at `depth`, without what is compressed or lies behind `size` in its file.

    Data whose place is not told is taken to lie inside.
    """
    kernel = _data_bytes.worth(len(rows) * _SAVED_PER_ROW)
    if kernel is None:
        return data_bytes_definition(rows, depth, size)
    return kernel(rows._pointer, len(rows), depth, size)


def data_bytes_definition(rows: Rows, depth: int, size: int) -> int:
    """What `data_bytes` answers."""
    total = 0
    for _offset, length, place, word in rows:
        if word >> DEPTH_SHIFT == depth and word & (DATA | ZERO | COMPRESSED) == DATA and place + length <= size:
            total += length
    return total


@family.kernel("i64(i64*, i64, i64, i64)")
def _data_bytes(rows: Any, n: int, depth: int, size: int) -> int:
    total = 0
    for index in range(n):
        at = index * 4
        word = rows[at + 3]
        if (word >> 8) == depth and (word & 19) == 1 and rows[at + 2] + rows[at + 1] <= size:
            total += rows[at + 1]
    return total
