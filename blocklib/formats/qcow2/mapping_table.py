"""Whole L2 tables at once: where a long range lives, as rows of `blocklib._fast.extents`.

The definition is `Mapping.resolve`, which is also asked for entries that the kernel finds fault with: it says what is wrong.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final

from blocklib._fast import extents as kernels
from blocklib._fast.pointer import Pointer
from blocklib.extents import FLAG_OFFSET_VALID

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklib.extents import Run
    from blocklib.formats.qcow2.mapping import Mapping
    from blocklib.formats.qcow2.tables import Table
    from blocklib.graph import Edge

_BATCH: Final = 2 << 20
"""Bytes of L2 tables that are looked at together."""


def resolve_rows(
    mapping: Mapping, file: Edge, resolve: Callable[[int, int], Run], told: int, offset: int, length: int, rows: kernels.Rows
) -> None:
    """The runs of the range as rows, as far as there is room; only flags in `told` are shown.

    `resolve` gives a single run.  Raises what it raises, StorageError, ImageCorruptError.
    """
    bits = mapping.geometry.cluster_bits
    facts = kernels.facts_pointer(_facts(mapping, told))
    position, end = offset, offset + length
    while position < end and not rows.full:
        if mapping.slice_at(position) is None:
            n = mapping.unmapped_length(position, end - position)
            rows.append(position, n, -1, 0)
            position += n
            continue
        words, first = _load(mapping, file, position, mapping.mapped_length(position, end - position, _BATCH))
        index = (position - first) >> bits
        entries = min(len(words) // mapping.words, (end - first + (1 << bits) - 1) >> bits)
        pointer = Pointer(words, "Q")
        while index < entries:
            index = kernels.read_entries(pointer, index, entries, first, facts, rows)
            if index == entries or rows.full:
                break
            place = first + (index << bits)
            _kind, _child, host, n, flags = resolve(place, 1 << bits)  # raises, unless a writer has changed it meanwhile
            rows.append(place, min(n, 1 << bits), host if flags & FLAG_OFFSET_VALID else -1, flags)
            index += 1
        position = first + (index << bits)
    rows.clip(offset, end)


def _facts(mapping: Mapping, told: int) -> kernels.Facts:
    return kernels.Facts(
        mapping.geometry.cluster_bits,
        mapping.allocated_mask,
        mapping.zero_flag_allowed,
        mapping.external,
        mapping.data_flags,
        told & 0xFF,
        mapping.geometry.extended_l2,
    )


def _guest_bytes(mapping: Mapping, table_length: int) -> int:
    """Bytes of the disk that so many bytes of an L2 table map."""
    return table_length // mapping.geometry.l2_entry_length << mapping.geometry.cluster_bits


def _load(mapping: Mapping, file: Edge, offset: int, length: int) -> tuple[Table, int]:
    """The words of L2 entries that map the range, which has L2 tables, and the guest offset of the first.

    What is cached is taken as it is (it may hold changes); the rest is read around the cache, so that a walk over the whole
    disk does not empty it.
    """
    cache = mapping.cache
    unit_length = mapping.geometry.cluster_size
    if cache.used_bytes or length <= _guest_bytes(mapping, mapping.slice_length):
        unit_length = mapping.slice_length
    unit = _guest_bytes(mapping, unit_length)
    first = offset // unit
    n_units = (offset + length - 1) // unit + 1 - first
    words = array("Q", bytes(n_units * unit_length))
    view = memoryview(words).cast("B")
    cached: list[tuple[int, Table]] = []
    missing: list[list[int]] = []  # [host offset, place in `view`, length]
    for number in range(n_units):
        host_offset = mapping.slice_at((first + number) * unit)
        assert host_offset is not None
        table = cache.peek(host_offset) if unit_length == cache.length else None
        place = number * unit_length
        if table is not None:
            cached.append((place // 8, table[:]))  # in one step, see `SubclusterMapping`; and before anything is read
            continue
        cache.check_inside_file(host_offset)
        if missing and (missing[-1][0] + missing[-1][2], missing[-1][1] + missing[-1][2]) == (host_offset, place):
            missing[-1][2] += unit_length
        else:
            missing.append([host_offset, place, unit_length])
    for host_offset, place, size in missing:
        file.read(host_offset, view[place : place + size], "l2_load")
    if sys.byteorder == "little":
        words.byteswap()
    for index, table in cached:
        words[index : index + len(table)] = table
    return words, first * unit
