"""Ranges that lose their content: made zero, discarded, or forgotten so that the backing file shows through.

All of them replace L2 entries and leave the host clusters to the write-back, which frees them once that is safe.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from blocklib.formats.qcow2 import data_file, layout
from blocklib.formats.qcow2.tables import Table

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

def zero_range(node: Qcow2Node, offset: int, length: int, *, unmap: bool) -> None:
    """Make whole clusters read as zero.  With `unmap` their host clusters are given back, otherwise kept.

    ``discard-no-unref`` keeps them too, but not their space on the host.
    """
    if node.header.version == layout.VERSION_2:
        # An absent cluster is the only zero there is; the node offers this only where nothing lies below.
        _each_slice(node, offset, length, lambda _entry: 0, skip_unmapped=True)
        return

    keep = _keeps_clusters(node)
    placed = node.mapping.allocated_mask

    def choose(entry: int) -> int:
        has_cluster = entry & placed and not entry & layout.FLAG_COMPRESSED
        stays = has_cluster and (not unmap or (keep and _is_own(entry, placed)))
        return entry | layout.FLAG_ZERO if stays else layout.FLAG_ZERO

    data_file.before_zeroing(node, offset, length, unmap=unmap)
    # Not even an image without a backing file leaves them out: it may be given one.
    _each_slice(node, offset, length, choose, skip_unmapped=False, punch=unmap and keep and node.punches_holes)
    if unmap:
        data_file.after_unmapping(node, offset, length)


def discard_range(node: Qcow2Node, offset: int, length: int) -> None:
    """Give whole clusters back.  They read as zero afterwards; where that cannot be said, nothing is done.

    With ``discard-no-unref`` only their space on the host is given back, and a later write finds them where they were.
    """
    shows_backing = node.has_backing
    if node.header.version == layout.VERSION_2:
        if not shows_backing:
            _each_slice(node, offset, length, lambda _entry: 0, skip_unmapped=True)
        return

    keep = _keeps_clusters(node)
    placed = node.mapping.allocated_mask

    def choose(entry: int) -> int:
        if keep and _is_own(entry, placed):
            return entry | layout.FLAG_ZERO
        return layout.FLAG_ZERO if shows_backing or entry & (layout.FLAG_COMPRESSED | placed) else entry

    data_file.before_zeroing(node, offset, length, unmap=True)
    _each_slice(node, offset, length, choose, skip_unmapped=not shows_backing, punch=keep and node.punches_holes)
    data_file.after_unmapping(node, offset, length)


def forget_range(node: Qcow2Node, offset: int, length: int) -> None:
    """Unmap whole clusters, and the L2 tables that map nothing else; the caller has drained the node."""
    _each_slice(node, offset, length, lambda _entry: 0, skip_unmapped=True)
    mapping = node.mapping
    shift = node.geometry.l1_shift
    first = -(-offset >> shift)
    stop = min((offset + length) >> shift, len(mapping.l1))
    if offset + length >= node.geometry.round_up(node.size):
        stop = len(mapping.l1)  # nothing lies behind: the last table goes, however little of the disk it maps
    for l1_index in range(first, stop):
        node.retry(lambda l1_index=l1_index: _forget_table(node, l1_index))  # type: ignore[misc]


def _forget_table(node: Qcow2Node, l1_index: int) -> None:
    mapping = node.mapping
    host_offset = mapping.l1[l1_index] & layout.OFFSET_MASK
    if not host_offset:
        return
    for start in range(0, node.geometry.cluster_size, mapping.slice_length):
        mapping.cache.drop(host_offset + start)
    mapping.new_tables.discard(host_offset)
    mapping.doubtful_tables.discard(host_offset)
    mapping.l1[l1_index] = 0
    mapping.dirty_l1.add(l1_index)
    node.writeback.freed.append((host_offset >> node.geometry.cluster_bits, 1))


def _keeps_clusters(node: Qcow2Node) -> bool:
    return bool(node.options.get("discard-no-unref"))


def _is_own(entry: int, placed: int) -> bool:
    """Whether an entry has a whole host cluster (any of the bits `placed`) that nothing else refers to."""
    return bool(entry & layout.FLAG_COPIED and entry & placed and not entry & layout.FLAG_COMPRESSED)


def _each_slice(
    node: Qcow2Node, offset: int, length: int, choose: Callable[[int], int], *, skip_unmapped: bool, punch: bool = False
) -> None:
    """Replace the L2 entries of a range by what `choose` makes of each, one L2 slice at a time.

    With `punch`, the host gets the space of the clusters that are the range's own afterwards.
    """
    node.check_usable()
    node.check_writable()
    mapping = node.mapping
    slice_bytes = mapping.slice_entries << node.geometry.cluster_bits
    end = node.geometry.round_up(offset + length)
    while offset < end:
        if skip_unmapped and node.retry(lambda offset=offset: mapping.slice_at(offset)) is None:  # type: ignore[misc]
            offset += mapping.unmapped_length(offset, min(end, node.geometry.round_up(node.size)) - offset)
            continue
        stop = min(end, (offset // slice_bytes + 1) * slice_bytes)
        kept = node.retry(lambda offset=offset, stop=stop: _change(node, offset, stop, choose, punch=punch))  # type: ignore[misc]
        # At once: whether the old entries or the new ones survive a crash, the range reads as zero.
        for first, n in kept:
            node.punch(first, n)
        node.writeback.relieve()
        offset = stop


def _change(
    node: Qcow2Node, offset: int, end: int, choose: Callable[[int], int], *, punch: bool
) -> list[tuple[int, int]]:
    """Returns the runs of host clusters to be punched."""
    mapping, bits = node.mapping, node.geometry.cluster_bits
    placed = mapping.allocated_mask
    node.allocations.wait_for_all(offset >> bits, end >> bits)
    slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
    index = mapping.index_in_slice(offset)
    before = table[index : index + ((end - offset) >> bits)]
    after = _chosen(before, choose)
    lost = [
        old
        for old, new in zip(before, after, strict=True)
        if old & (layout.FLAG_COMPRESSED | placed) and (old & layout.FLAG_COMPRESSED or not new & placed)
    ]
    freed = mapping.host_clusters_of(lost)  # may raise: nothing has changed yet
    mapping.replace(slice_offset, table, index, after)
    node.writeback.freed.extend(freed)
    return mapping.host_clusters_of([entry for entry in after if _is_own(entry, placed)]) if punch else []


def _chosen(entries: Table, choose: Callable[[int], int]) -> Table:
    if entries.tobytes() == bytes(len(entries) * entries.itemsize):
        return array("Q", (choose(0),)) * len(entries)
    return array("Q", map(choose, entries))
