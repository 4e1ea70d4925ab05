"""Changing how many bits a refcount has: new blocks and a new table beside the old ones, then one switch of the header.

Until the switch the image is what it was, with the new structures counted in the old ones; from then on the new ones count
what the image uses, without the old.  So no crash can leave a count that is too low.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from blocklib.errors import ImageCorruptError, ImageLimitError
from blocklib.formats.qcow2 import header_change, layout
from blocklib.formats.qcow2.check.counts import CountArray, pack_refcounts, unpack_refcounts
from blocklib.formats.qcow2.sharing import refuse_shared_refcount_blocks

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.node import Qcow2Node


class _New(NamedTuple):
    """Where the new structures go: the table first, then a block for each index in `blocks`, ascending."""

    first: int
    n_clusters: int
    table_clusters: int
    blocks: list[int]


def check_counts(node: Qcow2Node, width: int) -> None:
    """Raises ImageLimitError for a refcount that does not fit `width` bits, with the host offset of its cluster, and
    ImageCorruptError for a refcount table with more blocks than the file has room for.

    The caller has written everything that was only in memory.
    """
    table, place = node.refcounts.table, node.refcounts.table_offset
    refuse_shared_refcount_blocks(table, node.geometry, node.file.size, host_offset=place, node=node.filename)
    most = (1 << width) - 1
    if most >= node.geometry.max_refcount:
        return
    for index, entry in enumerate(node.refcounts.table):
        if not entry:
            continue
        counts = _block(node, index)
        if int(counts.max()) > most:
            place = int(np.argmax(counts > most))
            cluster = (index << node.geometry.refcount_block_bits) + place
            raise ImageLimitError(
                f"{node.filename}: the cluster at {cluster << node.geometry.cluster_bits:#x} has {int(counts[place])} "
                f"references, more than {width} bits can count",
                structure="refcount block entry",
                host_offset=cluster << node.geometry.cluster_bits,
                expected=f"at most {most}",
                found=str(int(counts[place])),
                node=node.filename,
            )


def change_width(node: Qcow2Node, width: int, progress: Callable[[int, int], object]) -> None:
    """Count with `width` bits from now on; durable on return.  The caller has drained the node and loads it anew.

    Raises ImageLimitError where a count or the table does not fit, ImageCorruptError, StorageError; the image then counts
    as before.
    """
    from blocklib.formats.qcow2.geometry import Geometry

    node.writeback.finish()
    check_counts(node, width)
    old = node.geometry
    geometry = Geometry(old.cluster_bits, width.bit_length() - 1, old.extended_l2)
    new = _reserve(node, geometry)
    try:
        _write(node, geometry, new, progress)
        node.writeback.barrier()
        replaced = _structures(node)
        header = node.header
        header.refcount_order = geometry.refcount_order
        header.refcount_table_offset = new.first << geometry.cluster_bits
        header.refcount_table_clusters = new.table_clusters
        header_change.switch(node)
    except BaseException:
        if node.poisoned is None:
            node.retry(lambda: node.refcounts.release(new.first, new.n_clusters))
        raise
    header_change.reload(node)
    if node.punches_others:
        for cluster in replaced:
            node.punch(cluster, 1)


def _block(node: Qcow2Node, index: int) -> CountArray:
    """The counts of the old block `index`, which is there, from the file.  Raises ImageCorruptError for one outside of it."""
    geometry = node.geometry
    offset = node.refcounts.block_offset(index)
    node.refcounts.cache.check_inside_file(offset)
    raw = np.zeros(geometry.cluster_size, dtype=np.uint8)
    node.file.read(offset, raw.data, "refblock_load")
    return unpack_refcounts(raw, geometry.refcount_order)


def _structures(node: Qcow2Node) -> list[int]:
    """The clusters of the present table and blocks."""
    bits = node.geometry.cluster_bits
    first = node.refcounts.table_offset >> bits
    table = range(first, first + (len(node.refcounts.table) * layout.TABLE_ENTRY_LENGTH >> bits))
    return [*table, *(entry >> bits for entry in node.refcounts.table if entry)]


def _used_blocks(node: Qcow2Node, geometry: Geometry) -> set[int]:
    """The indices of the new blocks in which something is counted."""
    found: set[int] = set()
    for index, entry in enumerate(node.refcounts.table):
        if entry:
            used = np.flatnonzero(_block(node, index)) + (index << node.geometry.refcount_block_bits)
            found.update(np.unique(used >> geometry.refcount_block_bits).tolist())
    return found


def _reserve(node: Qcow2Node, geometry: Geometry) -> _New:
    """Clusters for the new structures, durably counted in the old ones.

    Taking them changes what has to be counted, hence the rounds: each asks for what the one before has found missing.
    """
    blocks = _used_blocks(node, geometry)
    if not blocks:
        raise ImageCorruptError(
            f"{node.filename}: no cluster is counted as used, not even that of the header; repair the image first",
            structure="refcount table",
            host_offset=node.refcounts.table_offset,
            expected="a reference for each use",
            found="none",
            node=node.filename,
        )
    while True:
        table_clusters = _table_clusters(blocks, geometry)
        needed = len(blocks) + table_clusters
        wanted = needed + 2 + (needed >> geometry.refcount_block_bits)  # what is taken has to be counted, too
        first, n_clusters = node.retry(lambda n=wanted: node.refcounts.allocate(n, exactly=True))  # type: ignore[misc]
        node.writeback.flush()
        blocks = _used_blocks(node, geometry)
        table_clusters = _table_clusters(blocks, geometry)
        too_large = table_clusters << geometry.cluster_bits > layout.MAX_REFCOUNT_TABLE_BYTES
        if len(blocks) + table_clusters <= n_clusters and not too_large:
            return _New(first, n_clusters, table_clusters, sorted(blocks))
        node.retry(lambda first=first, n=n_clusters: node.refcounts.release(first, n))  # type: ignore[misc]
        node.writeback.flush()
        if too_large:
            raise ImageLimitError(
                f"{node.filename}: with refcounts of {geometry.refcount_bits} bits the table would grow too large",
                structure="refcount table",
                expected=f"at most {layout.MAX_REFCOUNT_TABLE_BYTES} bytes",
                found=str(table_clusters << geometry.cluster_bits),
                node=node.filename,
            )


def _table_clusters(blocks: set[int], geometry: Geometry) -> int:
    return geometry.clusters_for((max(blocks) + 1) * layout.TABLE_ENTRY_LENGTH)


def _write(node: Qcow2Node, geometry: Geometry, new: _New, progress: Callable[[int, int], object]) -> None:
    """Write the new blocks and the table that points at them."""
    bits = geometry.cluster_bits
    left_over = range(new.first + new.table_clusters + len(new.blocks), new.first + new.n_clusters)
    unused = np.array(sorted([*_structures(node), *left_over]), dtype=np.int64)
    table = np.zeros(geometry.refcount_table_entries(new.table_clusters), dtype=np.uint64)
    for number, index in enumerate(new.blocks):
        counts = _counts(node, index << geometry.refcount_block_bits, geometry.refcount_block_entries)
        start = index << geometry.refcount_block_bits
        low, high = np.searchsorted(unused, [start, start + geometry.refcount_block_entries])
        counts[unused[low:high] - start] = 0
        place = (new.first + new.table_clusters + number) << bits
        table[index] = place
        node.file.write(place, (pack_refcounts(counts, geometry.refcount_order),), "refblock_alloc_write_blocks")
        progress(number + 1, len(new.blocks) + 1)
    node.file.write(new.first << bits, (table.astype(">u8").tobytes(),), "refblock_alloc_write_table")


def _counts(node: Qcow2Node, first: int, n: int) -> CountArray:
    """The old counts of `n` clusters from `first` on."""
    counts = np.zeros(n, dtype=np.uint64)
    entries = node.geometry.refcount_block_entries
    table = node.refcounts.table
    cluster = first
    while cluster < first + n:
        index, within = divmod(cluster, entries)
        length = min(entries - within, first + n - cluster)
        if index < len(table) and table[index]:
            counts[cluster - first : cluster - first + length] = _block(node, index)[within : within + length]
        cluster += length
    return counts
