"""Counting references on whole tables: the numpy definitions that a check is made of (pure, no I/O).

Every function takes and gives native-endian, C-contiguous arrays and treats all of one at once, so that each can be replaced
by a kernel with the same signature.  Entries are `uint64`; host cluster indices are `intp` and were range-checked by
the caller.  Source: sections "Host cluster management" and "Cluster mapping" of ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blocklib.formats.qcow2 import layout

U64Array: TypeAlias = NDArray[np.uint64]
IndexArray: TypeAlias = NDArray[np.intp]
BoolArray: TypeAlias = NDArray[np.bool_]
CountArray: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""uint8, uint16, uint32 or uint64."""

_COUNT_TYPES: Final[dict[int, type[np.unsignedinteger[Any]]]] = {3: np.uint8, 4: np.uint16, 5: np.uint32, 6: np.uint64}
_DENSE: Final = 4
"""Cluster indices are counted in a window of at most this many times their number, otherwise one by one."""


def count_type(refcount_order: int) -> type[np.unsignedinteger[Any]]:
    """The smallest array type that holds refcounts of 1 << `refcount_order` bits."""
    return _COUNT_TYPES[max(refcount_order, 3)]


def unpack_refcounts(raw: NDArray[np.uint8], refcount_order: int) -> CountArray:
    """The entries of a refcount block; `raw` holds its bytes, shape (cluster_size,).

    Shape (cluster_size * 8 >> refcount_order,), dtype `count_type(refcount_order)`.  Below one byte, the least significant
    bits of a byte are its first entry.
    """
    if refcount_order >= 3:
        return raw.view(np.dtype(_COUNT_TYPES[refcount_order]).newbyteorder(">")).astype(_COUNT_TYPES[refcount_order])
    width = 1 << refcount_order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return ((raw[:, np.newaxis] >> shifts) & np.uint8((1 << width) - 1)).reshape(-1)


def pack_refcounts(counts: CountArray, refcount_order: int) -> bytes:
    """The inverse of `unpack_refcounts`; every count fits the width."""
    if refcount_order >= 3:
        return counts.astype(np.dtype(_COUNT_TYPES[refcount_order]).newbyteorder(">")).tobytes()
    width = 1 << refcount_order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    parts: NDArray[np.uint8] = counts.astype(np.uint8).reshape(-1, 8 // width) << shifts
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=1)
    return packed.tobytes()


def add_references(counts: CountArray, clusters: IndexArray, weights: U64Array | None = None) -> None:
    """counts[clusters[i]] += weights[i] (1 without weights) for every i; the same cluster may stand there many times.

    The caller makes sure that no count overflows and that the weights add up to less than 2**53.
    """
    if not clusters.size:
        return
    first = int(clusters.min())
    window = int(clusters.max()) - first + 1
    if window <= _DENSE * clusters.size:
        found = np.bincount(clusters - first, weights)
        counts[first : first + window] += found.astype(counts.dtype)
    elif weights is None:
        np.add.at(counts, clusters, counts.dtype.type(1))
    else:
        np.add.at(counts, clusters, weights.astype(counts.dtype))


def compressed_ranges(entries: U64Array, offset_bits: int) -> tuple[U64Array, U64Array]:
    """(host offset, length) in bytes of what compressed descriptors point at, to the end of the last sector.

    `offset_bits` is the specification's x.  Offsets may be anything below 2**61: nothing is checked here.
    """
    fields = entries & np.uint64(layout.FLAG_COMPRESSED - 1)
    offsets = fields & np.uint64((1 << offset_bits) - 1)
    sector = np.uint64(layout.COMPRESSED_SECTOR_LENGTH)
    sectors = (fields >> np.uint64(offset_bits)) + np.uint64(1)
    return offsets, sectors * sector - (offsets & (sector - np.uint64(1)))


def contradictory(bitmaps: U64Array, allocated: BoolArray) -> BoolArray:
    """Which subcluster bitmaps say that a subcluster is both allocated and zero, or allocated in no host cluster."""
    data, zero = bitmaps & np.uint64(layout.SUBCLUSTER_ALLOCATED_MASK), bitmaps >> np.uint64(layout.SUBCLUSTERS_PER_CLUSTER)
    wrong: BoolArray = ((data & zero) != 0) | ((data != 0) & ~allocated)
    return wrong


def reads_as_zero(entries: U64Array, bitmaps: U64Array | None) -> BoolArray:
    """Which of these entries with a host cluster take no guest data from it."""
    if bitmaps is None:
        return (entries & np.uint64(layout.FLAG_ZERO)).astype(bool)
    return ~(bitmaps & np.uint64(layout.SUBCLUSTER_ALLOCATED_MASK)).astype(bool)


def count_fragments(offsets: U64Array, rows: IndexArray, cluster_size: int) -> IndexArray:
    """Positions of the clusters that do not follow the one before them in the same L2 table.

    `offsets` are the host offsets of the allocated standard clusters in guest order, `rows` the table that each is in.
    """
    follows = offsets[1:] == offsets[:-1] + np.uint64(cluster_size)
    return np.flatnonzero(~follows & (rows[1:] == rows[:-1])) + 1


def merge_weights(offsets: U64Array, *weights: U64Array) -> tuple[U64Array, ...]:
    """(the distinct offsets in ascending order, and for each array of weights their sums)."""
    distinct, inverse = np.unique(offsets, return_inverse=True)
    sums = []
    for column in weights:
        total = np.zeros(distinct.size, dtype=np.uint64)
        np.add.at(total, inverse, column)
        sums.append(total)
    return distinct, *sums
