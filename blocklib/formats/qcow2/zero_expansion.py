"""Zero clusters that become something a version 2 image has: absent where nothing shows through, else stored zeroes.

Every distinct L2 table is treated once, those of snapshots too.  At each moment the disk and its snapshots read as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.l2 import read_l2_tables
from blocklib.formats.qcow2.tables import Table, numpy_view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blocklib.formats.qcow2.node import Qcow2Node

_BATCH_BYTES = 2 << 20


def has_compressed(node: Qcow2Node) -> bool:
    """Whether the disk or a snapshot has a compressed cluster."""
    node.writeback.finish()
    flag = np.uint64(layout.FLAG_COMPRESSED)
    return any(((entries & flag) != 0).any() for _offsets, entries in _tables(node))


def has_zero(node: Qcow2Node) -> bool:
    """Whether the disk or a snapshot has a zero cluster."""
    node.writeback.finish()
    flag = np.uint64(layout.FLAG_COMPRESSED | layout.FLAG_ZERO)
    return any(((entries & flag) == np.uint64(layout.FLAG_ZERO)).any() for _offsets, entries in _tables(node))


def expand_zero_clusters(node: Qcow2Node, progress: Callable[[int, int], object]) -> None:
    """Do away with every zero cluster.  The caller has drained the node, and flushes afterwards."""
    flag = np.uint64(layout.FLAG_COMPRESSED | layout.FLAG_ZERO)
    concerned: list[int] = []
    for offsets, entries in _tables(node):
        zero = ((entries & flag) == np.uint64(layout.FLAG_ZERO)).reshape(offsets.size, -1).any(axis=1)
        concerned += offsets[zero].tolist()
    for done, host_offset in enumerate(concerned):
        for start in range(0, node.geometry.cluster_size, node.mapping.slice_length):
            _expand_slice(node, host_offset, host_offset + start)
            node.writeback.relieve()
        progress(done + 1, len(concerned))


def _tables(node: Qcow2Node) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """(host offsets, all their entries) of the distinct L2 tables of the disk and its snapshots, a batch at a time."""
    from blocklib.formats.qcow2.snapshots.changes import load_l1
    from blocklib.formats.qcow2.snapshots.tally import l2_offsets

    geometry = node.geometry
    l1_tables = [node.mapping.l1, *(load_l1(node, index) for index in range(len(node.snapshots)))]
    found: set[int] = set()
    for l1 in l1_tables:
        found.update(l2_offsets(l1, geometry.cluster_mask, node.file.size, node.filename))
    offsets = np.array(sorted(found), dtype=np.uint64)
    per_batch = max(1, _BATCH_BYTES >> geometry.cluster_bits)
    for start in range(0, offsets.size, per_batch):
        part = offsets[start : start + per_batch]
        yield part, read_l2_tables(node.file, part, geometry.cluster_size)


def _expand_slice(node: Qcow2Node, table_offset: int, slice_offset: int) -> None:
    """Replace the zero clusters of one L2 slice.

    What it points at counts as often as the table itself: so many L1 tables lead there.
    """
    bits = node.geometry.cluster_bits
    uses, kept, fresh, replaced = node.retry(lambda: _look_at(node, table_offset, slice_offset))
    entries = node.retry(lambda: node.mapping.cache.need(slice_offset))[:]
    own = layout.FLAG_COPIED if uses == 1 else 0
    runs: list[tuple[int, int]] = []
    try:
        while fresh:
            wanted = len(fresh)
            first, n = node.retry(lambda n=wanted: node.refcounts.allocate(n, for_data=True))  # type: ignore[misc]
            runs.append((first, n))
            for cluster in range(first, first + n) if uses > 1 else ():
                node.retry(lambda cluster=cluster: node.refcounts.add(cluster, uses - 1))  # type: ignore[misc]
            _store_zeroes(node, first << bits, n << bits)
            for place, cluster in zip(fresh[:n], range(first, first + n), strict=True):
                entries[place] = cluster << bits | own
            fresh = fresh[n:]
        for place in kept:
            host_offset = entries[place] & layout.OFFSET_MASK
            _store_zeroes(node, host_offset, node.geometry.cluster_size)
            entries[place] = host_offset | own
    except BaseException:
        for first, n in runs if node.poisoned is None else ():
            node.retry(lambda first=first, n=n: node.refcounts.release(first, n))  # type: ignore[misc]
        raise
    for place in zero_places(entries):
        entries[place] = 0
    node.retry(lambda: _put(node, slice_offset, entries, replaced * uses))


def _store_zeroes(node: Qcow2Node, host_offset: int, length: int) -> None:
    """Make host clusters hold what the guest reads as zero."""
    if node.crypt is None:
        node.file.write_zeroes(host_offset, length, unmap=False)
        return
    for start in range(0, length, _BATCH_BYTES):
        node.crypt.write_zeroes(node, host_offset + start, min(_BATCH_BYTES, length - start))


def _look_at(
    node: Qcow2Node, table_offset: int, slice_offset: int
) -> tuple[int, list[int], list[int], list[tuple[int, int]]]:
    """(references of the table; the zero entries whose cluster is theirs alone; those that need another one; host clusters
    that are given up).  What is in neither list becomes absent.  Runs under the image's lock and changes nothing.
    """
    bits = node.geometry.cluster_bits
    table = node.mapping.cache.need(slice_offset)
    uses = node.refcounts.get(table_offset >> bits)
    kept, fresh, replaced = [], [], []
    for place in zero_places(table):
        cluster = (table[place] & layout.OFFSET_MASK) >> bits
        if not cluster and not node.has_backing:
            continue
        if cluster and node.refcounts.get(cluster) == uses:
            kept.append(place)
            continue
        fresh.append(place)
        if cluster:
            replaced.append((cluster, 1))
    return uses, kept, fresh, replaced


def zero_places(table: Table) -> list[int]:
    """The indices of the zero clusters in an L2 slice."""
    flags = numpy_view(table) & np.uint64(layout.FLAG_ZERO | layout.FLAG_COMPRESSED)
    places: list[int] = np.flatnonzero(flags == np.uint64(layout.FLAG_ZERO)).tolist()
    return places


def _put(node: Qcow2Node, slice_offset: int, entries: Table, freed: list[tuple[int, int]]) -> None:
    table = node.mapping.cache.need(slice_offset)
    node.mapping.replace(slice_offset, table, 0, entries)
    node.writeback.freed.extend(freed)
