"""Whole L2 tables that lose their content at once.  The scalar definition is in `zeroing`."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.tables import Table, numpy_view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blocklib.formats.qcow2.mapping import Mapping
    from blocklib.formats.qcow2.zeroing import Erasure

_OFFSET_MASK = np.uint64(layout.OFFSET_MASK)
_COMPRESSED = np.uint64(layout.FLAG_COMPRESSED)
_COPIED = np.uint64(layout.FLAG_COPIED)
_ZERO = np.uint64(layout.FLAG_ZERO)


def erased(
    mapping: Mapping, words: Table, erasure: Erasure, *, tell_kept: bool
) -> tuple[Table, list[tuple[int, int]], list[tuple[int, int]]]:
    """(the entries afterwards, runs of host clusters that lose a reference, and of those of the range's own that stay)."""
    view = numpy_view(words)
    entries = view[:: mapping.words]
    placed = np.uint64(mapping.allocated_mask)
    plain = ((entries & placed) != 0) & ((entries & _COMPRESSED) == 0)
    own = plain & ((entries & _COPIED) != 0)
    kept = {"all": plain, "own": own, "none": np.zeros_like(plain)}[erasure.keeps]
    referring = (entries & (placed | _COMPRESSED)) != 0
    changed = kept | referring if erasure.spares_absent else np.ones_like(plain)
    dropped = changed & ~kept
    after = view.copy()
    after[:: mapping.words][kept] = entries[kept] & ~_ZERO | np.uint64(mapping.zero_flag)
    after[:: mapping.words][dropped] = mapping.zero_flag if erasure.zero else 0
    if mapping.words > 1:
        after[1::2][changed] = mapping.zero_bitmap if erasure.zero else 0
    freed = host_runs(mapping, entries[dropped & referring])
    return array("Q", after.tobytes()), freed, host_runs(mapping, entries[kept & own]) if tell_kept else []


def host_runs(mapping: Mapping, entries: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """`Mapping.host_clusters_of` for entries that all refer to something.  Raises ImageCorruptError."""
    if mapping.external or not len(entries):
        return []
    geometry = mapping.geometry
    bits = np.uint64(geometry.cluster_bits)
    compressed = (entries & _COMPRESSED) != 0
    misplaced = ((entries & _OFFSET_MASK & np.uint64(geometry.cluster_mask)) != 0) & ~compressed
    if misplaced.any():
        raise mapping.misplaced(int(entries[int(np.argmax(misplaced))]))
    first = ((entries & _OFFSET_MASK) >> bits).astype(np.int64)
    n = np.ones(len(entries), dtype=np.int64)
    if compressed.any():
        descriptors = entries[compressed]
        offsets = descriptors & np.uint64((1 << geometry.compressed_offset_bits) - 1)
        geometry.decode_compressed(int(descriptors[int(np.argmax(offsets))]))  # raises where one is beyond 56 bits
        extra = (descriptors & (_COMPRESSED - np.uint64(1))) >> np.uint64(geometry.compressed_offset_bits)
        sector = np.uint64(layout.COMPRESSED_SECTOR_LENGTH)
        ends = (offsets // sector + extra + np.uint64(1)) * sector
        starts = (offsets >> bits).astype(np.int64)
        first[compressed] = starts
        n[compressed] = ((ends - np.uint64(1)) >> bits).astype(np.int64) - starts + 1
    index = np.flatnonzero(np.concatenate(([True], first[1:] != first[:-1] + n[:-1])))
    last = np.append(index[1:], len(first)) - 1
    return list(zip(first[index].tolist(), (first[last] + n[last] - first[index]).tolist(), strict=True))
