"""Whole L2 tables at once: where a long range lives, as a numpy table of runs.

The scalar definition is `Mapping.resolve`; the tests hold the two against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blocklib import extents
from blocklib.extents import (
    FLAG_ALLOCATED,
    FLAG_COMPRESSED,
    FLAG_DATA,
    FLAG_OFFSET_VALID,
    FLAG_ZERO,
    KIND_BACKING,
    KIND_DATA,
    KIND_SPECIAL,
    KIND_ZERO,
)
from blocklib.formats.qcow2 import layout, subclusters
from blocklib.formats.qcow2.subcluster_mapping import SubclusterMapping
from blocklib.formats.qcow2.tables import numpy_view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blocklib.extents import RunTable
    from blocklib.formats.qcow2.mapping import Mapping
    from blocklib.graph import Edge

_OFFSET_MASK = np.uint64(layout.OFFSET_MASK)
_COMPRESSED = np.uint64(layout.FLAG_COMPRESSED)
_ZERO = np.uint64(layout.FLAG_ZERO)
_COPIED = np.uint64(layout.FLAG_COPIED)
_ALL_ALLOCATED = np.uint64(subclusters.ALL_ALLOCATED)
_ALL_ZERO = np.uint64(subclusters.ALL_ZERO)
_ONE = np.uint64(1)
_N = subclusters.N


def resolve_table(mapping: Mapping, file: Edge, offset: int, length: int) -> RunTable:
    """The runs of [offset, offset + length): rows of RUN_DTYPE, ascending, contiguous, coalesced, clipped."""
    parts = []
    position, end = offset, offset + length
    table_bytes = 1 << mapping.geometry.l1_shift
    while position < end:
        if mapping.slice_at(position) is None:
            n = mapping.unmapped_length(position, end - position)
            parts.append(np.array([(position, n, 0, KIND_BACKING, 0)], dtype=extents.RUN_DTYPE))
        else:
            n = min(end, (position // table_bytes + 1) * table_bytes) - position
            entries, first = _load_entries(mapping, file, position, n)
            if isinstance(mapping, SubclusterMapping):
                parts.append(classify_pairs(mapping, entries, first))
            else:
                parts.append(classify(mapping, entries, first))
        position += n
    runs = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return clip_runs(coalesce_runs(runs), offset, length)


def _load_entries(mapping: Mapping, file: Edge, offset: int, length: int) -> tuple[NDArray[np.uint64], int]:
    """The words of the L2 entries that map the range, of one L2 table, and the guest offset of the first.

    Cached slices are taken as they are (they may hold changes); the rest is read around the cache, so that a walk over
    the whole disk does not empty it.
    """
    geometry = mapping.geometry
    slice_bytes = mapping.slice_entries << geometry.cluster_bits
    first_slice = offset // slice_bytes
    last_slice = (offset + length - 1) // slice_bytes
    parts = []
    for number in range(first_slice, last_slice + 1):
        host_offset = mapping.slice_at(number * slice_bytes)
        assert host_offset is not None
        table = mapping.cache.peek(host_offset)
        if table is not None:
            # Copied by the table, in one step: see `SubclusterMapping`.
            parts.append(numpy_view(table[:]))
        else:
            mapping.cache.check_inside_file(host_offset)
            buffer = bytearray(mapping.slice_length)
            file.read(host_offset, memoryview(buffer))
            parts.append(np.frombuffer(buffer, dtype=">u8").astype(np.uint64))
    entries = parts[0] if len(parts) == 1 else np.concatenate(parts)
    first = first_slice * slice_bytes
    low = (offset - first) >> geometry.cluster_bits
    high = (offset + length - first + geometry.cluster_mask) >> geometry.cluster_bits
    return entries[low * mapping.words : high * mapping.words], first + (low << geometry.cluster_bits)


def classify(mapping: Mapping, entries: NDArray[np.uint64], guest_offset: int) -> RunTable:
    """The coalesced runs of consecutive standard L2 entries, the first of which maps `guest_offset`."""
    geometry = mapping.geometry
    cluster_size = np.int64(geometry.cluster_size)
    compressed = (entries & _COMPRESSED) != 0
    zero = ((entries & _ZERO) != 0) & ~compressed
    host = np.where(compressed, np.uint64(0), entries & _OFFSET_MASK).astype(np.int64)
    _refuse(mapping, guest_offset, entries, (host & geometry.cluster_mask) != 0, "a cluster aligned offset")
    if not mapping.zero_flag_allowed:
        _refuse(mapping, guest_offset, entries, zero, "no zero flag in a version 2 image")
    placed = np.where(zero, host != 0, (entries & np.uint64(mapping.allocated_mask)) != 0) & ~compressed
    if mapping.external:
        _check_external(mapping, entries, guest_offset, host, placed)
    absent = ~placed & ~zero & ~compressed
    _refuse(mapping, guest_offset, entries, absent & ((entries & ~_COPIED) != 0), "reserved bits of zero")
    kind = np.full(len(entries), KIND_BACKING, dtype=np.uint8)
    kind[placed] = KIND_DATA
    kind[zero] = KIND_ZERO
    kind[compressed] = KIND_SPECIAL
    starts = np.empty(len(entries), dtype=bool)
    starts[0] = True
    follows = np.where(placed[:-1], host[:-1] + cluster_size, 0)
    np.not_equal(kind[1:], kind[:-1], out=starts[1:])
    starts[1:] |= (host[1:] != follows) | (placed[1:] != placed[:-1])
    index = np.flatnonzero(starts)
    runs = np.empty(len(index), dtype=extents.RUN_DTYPE)
    runs["offset"] = guest_offset + index * cluster_size
    runs["length"] = np.diff(index, append=len(entries)) * cluster_size
    runs["child_offset"] = host[index]
    runs["kind"] = kind[index]
    runs["flags"] = _flags_of(mapping)[kind[index]]
    runs["flags"][(runs["kind"] == KIND_ZERO) & placed[index]] |= FLAG_OFFSET_VALID
    return runs


def _check_external(
    mapping: Mapping, entries: NDArray[np.uint64], guest_offset: int, host: NDArray[np.int64], placed: NDArray[np.bool_]
) -> None:
    """Raises ImageCorruptError for the first entry that is wrong in an image with an external data file."""
    guest = guest_offset + np.arange(len(entries), dtype=np.int64) * mapping.geometry.cluster_size
    wrong = ((entries & _COMPRESSED) != 0) | (placed & (host != guest))
    if wrong.any():
        first = int(np.argmax(wrong))
        mapping.check_external(int(entries[first]), int(guest[first]))


def classify_pairs(mapping: SubclusterMapping, words: NDArray[np.uint64], guest_offset: int) -> RunTable:
    """The same for extended L2 entries.  Clusters whose subclusters are all alike are treated as a whole."""
    geometry = mapping.geometry
    entries, bitmaps = words[::2], words[1::2]
    compressed = (entries & _COMPRESSED) != 0
    host = np.where(compressed, np.uint64(0), entries & _OFFSET_MASK).astype(np.int64)
    placed = ((entries & np.uint64(mapping.allocated_mask)) != 0) & ~compressed
    if mapping.external:
        _check_external(mapping, entries, guest_offset, host, placed)
    _refuse_faulty(mapping, guest_offset, entries, bitmaps, ~placed & ~compressed, compressed)
    alike = compressed | (bitmaps == 0) | (bitmaps == _ALL_ALLOCATED) | (bitmaps == _ALL_ZERO)
    counts = np.where(alike, 1, _N)
    entry = np.repeat(np.arange(len(entries)), counts)
    # Where all are alike, the first stands for them.
    subcluster = np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts)
    shift = subcluster.astype(np.uint64)
    bitmap = bitmaps[entry]
    runs = np.empty(len(entry), dtype=extents.RUN_DTYPE)
    runs["offset"] = guest_offset + (entry << geometry.cluster_bits) + (subcluster << geometry.subcluster_bits)
    runs["length"] = np.where(alike[entry], geometry.cluster_size, geometry.subcluster_size)
    placed = placed[entry]
    runs["child_offset"] = np.where(placed, host[entry] + (subcluster << geometry.subcluster_bits), 0)
    kind = np.full(len(entry), KIND_BACKING, dtype=np.uint8)
    kind[(bitmap >> shift & _ONE) != 0] = KIND_DATA
    kind[(bitmap >> (shift + np.uint64(_N)) & _ONE) != 0] = KIND_ZERO
    kind[compressed[entry]] = KIND_SPECIAL
    runs["kind"] = kind
    runs["flags"] = _flags_of(mapping)[kind]
    runs["flags"][placed & (kind != KIND_DATA)] |= FLAG_OFFSET_VALID
    return coalesce_runs(runs)


def _refuse_faulty(
    mapping: SubclusterMapping,
    guest_offset: int,
    entries: NDArray[np.uint64],
    bitmaps: NDArray[np.uint64],
    absent: NDArray[np.bool_],
    compressed: NDArray[np.bool_],
) -> None:
    """Raises ImageCorruptError where `SubclusterMapping.fault` finds fault."""
    faulty = (entries & _ZERO) != 0
    faulty |= (entries & _OFFSET_MASK & np.uint64(mapping.geometry.cluster_mask)) != 0
    faulty |= (bitmaps & bitmaps >> np.uint64(_N)) != 0
    faulty |= absent & (((entries & ~_COPIED) != 0) | ((bitmaps & _ALL_ALLOCATED) != 0))
    faulty &= ~compressed
    if faulty.any():
        first = int(np.argmax(faulty))
        entry, bitmap = int(entries[first]), int(bitmaps[first])
        fault = mapping.fault(entry, bitmap)
        assert fault is not None
        raise mapping.bad_pair(guest_offset + (first << mapping.geometry.cluster_bits), entry, bitmap, fault)


def _flags_of(mapping: Mapping) -> NDArray[np.uint8]:
    flags = np.zeros(4, dtype=np.uint8)
    flags[KIND_DATA] = mapping.data_flags
    flags[KIND_ZERO] = FLAG_ZERO | FLAG_ALLOCATED
    flags[KIND_SPECIAL] = FLAG_DATA | FLAG_ALLOCATED | FLAG_COMPRESSED
    return flags


def coalesce_runs(runs: RunTable) -> RunTable:
    """Join neighbours that say the same (and, where they have a place, follow each other there)."""
    if len(runs) < 2:
        return runs
    left, right = runs[:-1], runs[1:]
    placed = (left["flags"] & FLAG_OFFSET_VALID) != 0
    follows = np.where(placed, left["child_offset"] + left["length"], left["child_offset"])
    joins = (left["kind"] == right["kind"]) & (left["flags"] == right["flags"]) & (right["child_offset"] == follows)
    if not joins.any():
        return runs
    index = np.flatnonzero(np.concatenate(([True], ~joins)))
    joined = runs[index].copy()
    ends = runs["offset"] + runs["length"]
    joined["length"] = np.append(ends[index[1:] - 1], ends[-1]) - joined["offset"]
    return joined


def clip_runs(runs: RunTable, offset: int, length: int) -> RunTable:
    """The part of `runs`, which cover the range, that lies inside it."""
    first = int(np.searchsorted(runs["offset"], offset, side="right")) - 1
    runs = runs[first : int(np.searchsorted(runs["offset"], offset + length))]
    cut = offset - int(runs["offset"][0])
    if cut > 0:
        if runs["flags"][0] & FLAG_OFFSET_VALID:
            runs["child_offset"][0] += cut
        runs["offset"][0] = offset
        runs["length"][0] -= cut
    surplus = int(runs["offset"][-1] + runs["length"][-1]) - (offset + length)
    if surplus > 0:
        runs["length"][-1] -= surplus
    return runs


def _refuse(
    mapping: Mapping, guest_offset: int, entries: NDArray[np.uint64], bad: NDArray[np.bool_], expected: str
) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        raise mapping.bad_entry(guest_offset + (first << mapping.geometry.cluster_bits), int(entries[first]), expected)
