"""Guest clusters in an external data file: each lies at its guest offset, and nobody counts it.

Sources: 'External data file bit' and 'Raw external data bit' in section "Header" of ``docs/interop/qcow2.rst``, and the
Standard Cluster Descriptor in section "Cluster mapping".  Of what a crash may leave: data is durable in the data file
before an entry says that it is there (see `writeback`), and a range that is discarded reads as zero whether its entry or
its bytes were lost first.  With the raw bit the data file is changed before the entry, so that it reads as the guest does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.extents import KIND_BACKING, KIND_ZERO
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.cow import RangeTicket

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import Preallocation

CHILD = "data-file"


def is_external(header: Header) -> bool:
    """Whether guest clusters lie in a file of their own."""
    return bool(header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE)


def is_raw(header: Header) -> bool:
    """Whether the data file reads as the guest does, without this image."""
    return is_external(header) and bool(header.autoclear_features & layout.AUTOCLEAR_RAW_EXTERNAL)


def before_zeroing(node: Qcow2Node, offset: int, length: int, *, unmap: bool) -> None:
    """Zero a range, which ends with the disk if not with a cluster, in a raw data file before the entries say so."""
    if is_raw(node.header):
        node.data.write_zeroes(offset, _inside(node, offset, length), unmap=unmap)


def after_unmapping(node: Qcow2Node, offset: int, length: int) -> None:
    """Give the host the space of a range that reads as zero now; a raw data file has given it already.

    At once, since a later write goes to the same place: zeroed and not just discarded, for the entries may yet be lost.
    """
    if not is_external(node.header) or is_raw(node.header) or not node.punches_holes:
        return
    slice_bytes = node.mapping.slice_entries << node.geometry.cluster_bits
    end = offset + _inside(node, offset, length)
    while offset < end:
        stop = min(end, (offset // slice_bytes + 1) * slice_bytes)
        _punch(node, offset, stop)
        offset = stop


def _punch(node: Qcow2Node, offset: int, end: int) -> None:
    """Zero in the file what still is not mapped of a range that one L2 slice maps; who wants to write there waits.

    A writer may have mapped some of it again since: its place is the same, and an encrypted zero would be noise to it.
    """
    bits = node.geometry.cluster_bits
    claim = RangeTicket()
    claim.first, claim.stop = offset >> bits, -(-end >> bits)
    runs = node.retry(lambda: _unmapped(node, offset, end, claim))
    try:
        for start, n in runs:
            node.data.write_zeroes(start, n, unmap=True)
    finally:
        with node.lock:
            node.allocations.remove(claim)


def _unmapped(node: Qcow2Node, offset: int, end: int, claim: RangeTicket) -> list[tuple[int, int]]:
    """(guest offset, bytes) of what is not mapped, which stays so until `claim` is taken back.  Runs under the image's lock."""
    mapping = node.mapping
    node.allocations.wait_for_all(claim.first, claim.stop)
    runs = []
    slice_offset = mapping.slice_at(offset)
    if slice_offset is None:
        runs.append((offset, end - offset))
    else:
        table = mapping.cache.need(slice_offset)
        while offset < end:
            index = mapping.index_in_slice(offset)
            kind, _child, _place, n, _flags = mapping.resolve(table, index, offset, end - offset, node.data)
            if kind in (KIND_ZERO, KIND_BACKING):
                runs.append((offset, n))
            offset += n
    node.allocations.add(claim)
    return runs


def _inside(node: Qcow2Node, offset: int, length: int) -> int:
    return max(0, min(length, node.size - offset))


def grow(node: Qcow2Node, old_size: int, size: int, preallocation: Preallocation) -> None:
    """Make the data file `size` bytes long; from `old_size` on it reads as zero.

    Clusters that are mapped show the data file, so what an earlier, longer disk may have left there goes.  In an encrypted
    one it stays: zeroes there are noise, and the part that had to be made zero is stored by now.
    """
    data = node.data
    kept = data.size
    if kept > old_size and node.crypt is None:
        if data.node.is_device:
            data.write_zeroes(old_size, min(kept, size) - old_size, unmap=True)
        else:
            data.truncate(old_size)
    if data.size < size:
        data.truncate(size, "off" if preallocation == "metadata" else preallocation)


def occupied(node: Qcow2Node, in_file: int | None) -> int | None:
    """Bytes on the host of an image whose own file occupies `in_file`, None where that is unknown."""
    edge = node.children.get(CHILD)
    if edge is None or in_file is None:
        return in_file
    in_data_file = edge.node.allocated_size()
    return None if in_data_file is None else in_file + in_data_file
