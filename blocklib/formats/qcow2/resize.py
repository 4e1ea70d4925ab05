"""Changing the size of an image, preallocating its clusters, and telling whether that was done."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING, Final

from blocklib.errors import ImageLimitError, UnsupportedFeatureError, UsageError
from blocklib.formats.qcow2 import data_file, header_change, layout
from blocklib.formats.qcow2.tables import Table, table_to_bytes
from blocklib.formats.qcow2.zeroing import forget_range, zero_range

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import Preallocation


def reach(node: Qcow2Node, size: int) -> None:
    """Let requests reach up to `size` (a multiple of 512); the caller has drained the node and makes the new part zero.

    A smaller size than the last one takes that back.
    """
    if size < node.size:
        _take_back(node, size)
        return
    lengthen_l1(node, node.geometry.l1_entries_for(size))
    _forget_vm_state(node, size)
    node.size = size


def _forget_vm_state(node: Qcow2Node, size: int) -> None:
    """A virtual machine's state begins where the disk's last L2 table ends: none of it may become part of the disk."""
    geometry = node.geometry
    first, stop = geometry.l1_entries_for(node.size), geometry.l1_entries_for(size)
    if any(node.mapping.l1[first:stop]):
        forget_range(node, first << geometry.l1_shift, (stop - first) << geometry.l1_shift)


def _refuse_for_snapshots(node: Qcow2Node, size: int) -> None:
    """Raises UnsupportedFeatureError where a snapshot keeps the disk from having this size."""
    if node.header.version == layout.VERSION_2 and node.snapshots:
        raise UnsupportedFeatureError(
            f"{node.filename}: a version 2 image with internal snapshots cannot be resized: "
            "its snapshots do not say what size their disks have",
            features=("internal snapshots",),
            node=node.filename,
        )
    for entry in node.snapshots:
        if entry.disk_size is not None and size < entry.disk_size and size < node.size:
            raise UnsupportedFeatureError(
                f"{node.filename}: {size} bytes is less than the {entry.disk_size} of the disk in snapshot "
                f"{os.fsdecode(entry.name)!r}; delete it first",
                features=("internal snapshots",),
                node=node.filename,
            )


def _take_back(node: Qcow2Node, size: int) -> None:
    """The disk does not grow after all: what was mapped behind its end may never have been made zero."""
    try:
        if node.poisoned is None:
            keep = node.geometry.round_up(size)
            forget_range(node, keep, node.geometry.round_up(node.size) - keep)
    finally:
        node.size = size


def resize(node: Qcow2Node, size: int, preallocation: Preallocation) -> None:
    """Make the disk `size` bytes long, which `check_resize` has accepted, durably; the caller has drained it."""
    old_size = node.header.size // layout.SIZE_UNIT * layout.SIZE_UNIT
    if size < old_size:
        _shrink(node, size)
    elif size > old_size:
        lengthen_l1(node, node.geometry.l1_entries_for(size))
        if data_file.is_external(node.header):
            data_file.grow(node, old_size, size, preallocation)
            if preallocation == "off" and data_file.is_raw(node.header):
                preallocation = "metadata"  # what is not mapped would not be part of the data file
        if preallocation != "off":
            preallocate(node, node.geometry.round_up(old_size), size, preallocation)
        node.writeback.flush()  # the new part must read as it should before the header has it
        with node.writeback.structure:
            node.size = size
            _rewrite_header(node)


def check_resize(node: Qcow2Node, size: int, preallocation: Preallocation) -> None:
    """Raises UsageError for a size that is no multiple of 512 or a preallocation that cannot be, ImageLimitError where the L1
    table would grow too large, UnsupportedFeatureError where a snapshot keeps the disk from having this size."""
    node.check_usable()
    _check_size(node, size)
    _refuse_for_snapshots(node, size)
    grows = size > node.size and preallocation != "off"
    if grows and node.crypt is not None and node.header.version == layout.VERSION_2:
        raise UsageError(f"{node.filename}: preallocation of an encrypted image needs version 3 (compat=1.1)")


def _check_size(node: Qcow2Node, size: int) -> None:
    if size % layout.SIZE_UNIT:  # QEMU shows only whole sectors: it would not see the end of the disk
        raise UsageError(f"{node.filename}: the size of a qcow2 image is a multiple of {layout.SIZE_UNIT}, not {size}")
    entries = node.geometry.l1_entries_for(size)
    if entries * layout.TABLE_ENTRY_LENGTH > node.limits.l1_bytes or size > node.geometry.max_virtual_size:
        raise ImageLimitError(
            f"{node.filename}: {size} bytes need an L1 table of {entries} entries; larger clusters reach further",
            structure="L1 table",
            expected=f"at most {node.limits.l1_bytes} bytes",
            found=str(entries * layout.TABLE_ENTRY_LENGTH),
            node=node.filename,
        )


def lengthen_l1(node: Qcow2Node, entries: int, *, used: bool = False) -> None:
    """Make room for `entries` L1 entries.  With `used` the header counts them all, not only those that the disk needs."""
    geometry, mapping = node.geometry, node.mapping
    with node.writeback.structure:
        node.writeback.flush()
        if entries <= len(mapping.l1):
            if used:
                node.header.l1_size = max(node.header.l1_size, entries)
                _rewrite_header(node)
            return
        new_l1, new_offset = _write_longer_l1(node, entries)
        clusters = new_offset >> geometry.cluster_bits, geometry.l1_clusters_for(len(new_l1))
        node.header.l1_table_offset = new_offset
        if used:
            node.header.l1_size = max(node.header.l1_size, entries)
        try:
            _rewrite_header(node)
        except BaseException:
            if node.poisoned is None:
                node.retry(lambda: node.refcounts.release(*clusters))
            raise
        with node.lock:
            replaced, node.refcounts.l1_clusters = node.refcounts.l1_clusters, clusters
            mapping.l1, mapping.l1_offset = new_l1, new_offset
            node.writeback.freed.append(replaced)


def _write_longer_l1(node: Qcow2Node, entries: int) -> tuple[Table, int]:
    """A copy of the L1 table with room for `entries` entries, durable and counted, and its host offset."""
    geometry = node.geometry
    clusters = geometry.l1_clusters_for(entries)
    first, _n = node.retry(lambda: node.refcounts.allocate(clusters, exactly=True))
    try:
        old = node.mapping.l1
        table = old + array("Q", bytes((clusters << geometry.cluster_bits) - len(old) * 8))
        node.file.write(first << geometry.cluster_bits, (table_to_bytes(table),), "l1_grow_write_table")
        node.writeback.flush()
    except BaseException:
        node.retry(lambda: node.refcounts.release(first, clusters))
        raise
    return table, first << geometry.cluster_bits


def _rewrite_header(node: Qcow2Node) -> None:
    """Bring the size of the disk and the place of the L1 table to the file, durably."""
    header = node.header
    header.size = node.size
    # The table in memory fills its clusters; the one in the file is said to end with the disk.
    header.l1_size = max(header.l1_size, node.geometry.l1_entries_for(node.size))
    header_change.switch(node)


def _shrink(node: Qcow2Node, size: int) -> None:
    geometry = node.geometry
    with node.writeback.structure:
        keep = geometry.round_up(size)
        # To the end of the table: a VM state has its place behind the disk, and moves with its end.
        forget_range(node, keep, (len(node.mapping.l1) << geometry.l1_shift) - keep)
        node.writeback.flush()
        old_size, node.size = node.size, size
        try:
            _rewrite_header(node)
        except BaseException:
            node.size = old_size
            raise
    if data_file.is_external(node.header) and not node.data.node.is_device:
        node.data.truncate(size)


def preallocate(node: Qcow2Node, offset: int, end: int, mode: Preallocation) -> None:
    """Give every unmapped cluster of [offset, end) a host cluster that reads as zero, and the file room for them.

    With extended L2 entries it is used by none of its subclusters: they read as before.
    """
    geometry, mapping = node.geometry, node.mapping
    slice_bytes = mapping.slice_entries << geometry.cluster_bits
    begin = offset
    file_end = node.file.size
    host_end = file_end
    end = geometry.round_up(end)
    while offset < end:
        stop = min(end, (offset // slice_bytes + 1) * slice_bytes)
        runs: list[tuple[int, int]] = []  # outlives the attempts: what one of them has mapped, the next finds mapped
        node.retry(lambda offset=offset, stop=stop, runs=runs: _map_all(node, offset, stop, runs))  # type: ignore[misc]
        for first, n in runs:
            start = first << geometry.cluster_bits
            host_end = max(host_end, start + (n << geometry.cluster_bits))
            if start < file_end:  # space that was used before
                node.file.write_zeroes(start, min(n << geometry.cluster_bits, file_end - start), unmap=False)
        offset = stop
    if node.crypt is not None and mapping.words == 1:  # zeroes in the file are noise: the metadata says zero instead
        zero_range(node, begin, end - begin, unmap=False)
    if host_end > node.file.size:
        node.file.truncate(host_end, "off" if mode == "metadata" else mode)
    node.writeback.flush()


def _map_all(node: Qcow2Node, offset: int, end: int, runs: list[tuple[int, int]]) -> None:
    """Give a fresh host cluster to every unmapped cluster of one L2 slice; adds the runs that were taken to `runs`."""
    mapping, bits = node.mapping, node.geometry.cluster_bits
    slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
    index = begin = mapping.index_in_slice(offset)
    stop = index + ((end - offset) >> bits) * mapping.words
    while index < stop:
        n = mapping.absent_run(table, index, stop)
        if n and mapping.external:
            place = offset + ((index - begin) // mapping.words << bits)
            mapping.give_place(slice_offset, table, index, place, n)
        elif n:
            first, n = node.refcounts.allocate(n, for_data=True)
            mapping.give_place(slice_offset, table, index, first << bits, n)
            runs.append((first, n))
        index += max(n, 1) * mapping.words


def looks_preallocated(node: Qcow2Node) -> bool:
    """Whether clearly more clusters are in use than the file occupies on its host: some of them are holes.

    The thresholds are QEMU's, so that block status says the same for the same image.
    """
    occupied = node.file.node.allocated_size()  # whatever a data file occupies
    if occupied is None:
        return False
    geometry = node.geometry
    real_clusters = occupied >> geometry.cluster_bits
    cutoff = max(real_clusters * 10 // 9, real_clusters + 2)
    file_clusters = geometry.clusters_for(node.file.size)
    if file_clusters < cutoff:
        return False
    used = 0
    refcounts = node.refcounts
    for block_index in range(min(len(refcounts.table), (file_clusters >> geometry.refcount_block_bits) + 1)):
        if refcounts.table[block_index]:
            block = node.retry(lambda block_index=block_index: refcounts.block(block_index), marks=False)  # type: ignore[misc]
            used += count_used(block, geometry.refcount_bits)
            if used >= cutoff:
                return True
    return False


_USED_FIELDS: Final = {
    width: bytes(
        sum(1 for shift in range(0, 8, width) if byte >> shift & ((1 << width) - 1)) for byte in range(256)
    )
    for width in (1, 2, 4)
}


def count_used(block: Table, width: int) -> int:
    """How many counts of a refcount block, `width` bits each, are not zero."""
    if width >= 8:
        return len(block) - block.count(0)
    return sum(block.tobytes().translate(_USED_FIELDS[width]))
