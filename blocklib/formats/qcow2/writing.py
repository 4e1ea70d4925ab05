"""Allocating writes: reserving fresh host clusters for a write, and linking them once the bytes are there.

Changes of the tables run under the image's lock, in memory only.  Nobody sees a cluster before it is linked.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.cow import AllocationTicket

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import WriteRun


def prepare(node: Qcow2Node, offset: int, length: int) -> WriteRun:
    """Where the first part of the range is to be written, as `Node.prepare_write` says.  Runs under the image's lock."""
    node.check_writable()
    mapping, geometry = node.mapping, node.geometry
    bits = geometry.cluster_bits
    in_cluster = offset & geometry.cluster_mask
    first = offset >> bits
    stop_cluster = node.allocations.wait_for(first, (offset + length + geometry.cluster_mask) >> bits)
    slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
    index = mapping.index_in_slice(offset)
    stop = min(len(table), index + stop_cluster - first)
    host_offset, n = mapping.in_place_run(table, index, stop)
    ticket = None
    if n:
        if mapping.external:
            mapping.check_external(host_offset | layout.FLAG_COPIED, first << bits)
        node.guard.trust(slice_offset, len(table), index, host_offset, n)
    else:
        host_offset, n = mapping.preallocated_run(table, index, stop)
        preallocated = n > 0
        if mapping.external:  # the place is the guest cluster's own, mapped or not
            host_offset, n, preallocated = first << bits, n or mapping.new_run(table, index, stop), True
        elif preallocated:
            node.guard.check(host_offset, n << bits, "guest data")
        else:
            host_cluster, n = node.refcounts.allocate(mapping.new_run(table, index, stop), for_data=True)
            host_offset = host_cluster << bits
        ticket = AllocationTicket(node, first, first + n, host_offset >> bits, preallocated=preallocated)
        node.allocations.add(ticket)
    length = min(length, (n << bits) - in_cluster)
    if ticket is not None:
        used = (in_cluster + length + geometry.cluster_mask) >> bits
        assert used == n
        ticket.head = in_cluster
        ticket.tail = (n << bits) - in_cluster - length
        if mapping.external:  # a data file ends with the disk
            ticket.tail = max(0, min(ticket.tail, node.size - offset - length))
    return node.data, host_offset + in_cluster, length, ticket


def link(node: Qcow2Node, ticket: AllocationTicket) -> None:
    """Point the L2 entries of a ticket at its host clusters: the write is part of the image from now on."""
    mapping = node.mapping
    offset = ticket.first << node.geometry.cluster_bits
    n = ticket.stop - ticket.first

    def change() -> None:
        slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
        index = mapping.index_in_slice(offset)
        lost = [] if ticket.preallocated else mapping.host_clusters_of(table[index : index + n])
        mapping.link(slice_offset, table, index, ticket.host_cluster << node.geometry.cluster_bits, n)
        node.writeback.freed.extend(lost)
        node.allocations.remove(ticket)

    try:
        node.retry(change)
    except BaseException:
        if node.poisoned is None and node.corruption is None:  # nothing was linked
            unreserve(node, ticket)
        else:
            _forget(node, ticket)
        raise
    node.writeback.relieve()


def unreserve(node: Qcow2Node, ticket: AllocationTicket) -> None:
    """Give back the host clusters of a ticket whose write failed; nobody has seen them."""

    if node.corruption is not None:  # counts are not changed any more
        _forget(node, ticket)
        return

    def change() -> None:
        if not ticket.preallocated:
            node.refcounts.release(ticket.host_cluster, ticket.stop - ticket.first)
        node.allocations.remove(ticket)

    try:
        node.retry(change)
    except BaseException:
        _forget(node, ticket)  # its host clusters leak, but nobody waits for it
        raise


def _forget(node: Qcow2Node, ticket: AllocationTicket) -> None:
    with node.lock:
        if node.allocations.holds(ticket):
            node.allocations.remove(ticket)


def zero_part(node: Qcow2Node, offset: int) -> bool:
    """Whether the cluster reads as zero already, or could be made a zero cluster because nothing else is in it.

    Runs under the image's lock.
    """
    mapping = node.mapping
    first = offset >> node.geometry.cluster_bits
    node.allocations.wait_for_all(first, first + 1)
    slice_offset = mapping.slice_at(offset)
    entry = 0
    if slice_offset is not None:
        entry = mapping.cache.need(slice_offset)[mapping.index_in_slice(offset)]
    if entry & layout.FLAG_COMPRESSED:
        return False
    if entry & layout.FLAG_ZERO:
        return True
    if entry & mapping.allocated_mask or node.has_backing:
        return False
    if node.header.version > layout.VERSION_2:
        slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
        mapping.replace(slice_offset, table, mapping.index_in_slice(offset), array("Q", (layout.FLAG_ZERO,)))
    return True
