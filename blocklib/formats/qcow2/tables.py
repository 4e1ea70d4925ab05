"""qcow2 tables in memory: arrays of native integers, byte-swapped once where they meet the file.

A table is an ``array`` ("Q" for L1, L2 and the refcount table; "B", "H", "I" or "Q" for refcount blocks), so that scalar
code indexes it cheaply and numpy and kernels can wrap the same memory when the work is large.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from blocklib.graph import Edge

Table: TypeAlias = "array[int]"

_SWAP = sys.byteorder == "little"


def table_from_bytes(typecode: str, data: bytes | bytearray | memoryview) -> Table:
    """The big-endian integers in `data`, as a table of native ones."""
    table = array(typecode)
    table.frombytes(data)
    if _SWAP and table.itemsize > 1:
        table.byteswap()
    return table


def table_to_bytes(table: Table) -> bytes:
    """The inverse of `table_from_bytes`; the table itself is left as it is."""
    if _SWAP and table.itemsize > 1:
        table = table[:]
        table.byteswap()
    return table.tobytes()


def zero_table(typecode: str, length: int) -> Table:
    """A table of `length` bytes, all zero."""
    return array(typecode, bytes(length))


def zeroes_end(table: Table, index: int, stop: int) -> int:
    """The first of the entries [index, stop) that is not zero, or `stop`: nothing is done for each of many."""
    step = 16
    while index < stop:
        part = table[index : min(index + step, stop)].tobytes()
        left = len(part.lstrip(b"\0"))
        if left:
            return index + (len(part) - left) // table.itemsize
        index += step
        step = min(step * 8, 1 << 16)
    return stop


def read_table(file: Edge, typecode: str, host_offset: int, length: int, event: str = "metadata") -> Table:
    """Load a table of `length` bytes from `host_offset`; what lies past the end of the file reads as zero."""
    buffer = bytearray(length)
    file.read(host_offset, memoryview(buffer), event)
    return table_from_bytes(typecode, buffer)


def numpy_view(table: Table) -> Any:
    """The same memory as a numpy array."""
    import numpy as np

    return np.frombuffer(table, dtype=f"u{table.itemsize}")
