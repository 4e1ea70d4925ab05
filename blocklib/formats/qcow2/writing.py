"""Allocating writes: reserving fresh host clusters for a write, and linking them once the bytes are there.

Changes of the tables run under the image's lock, in memory only.  Nobody sees a cluster before it is linked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.cow import AllocationTicket

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import WriteRun


def prepare(node: Qcow2Node, offset: int, length: int) -> WriteRun:
    """Where the first part of the range is to be written, as `Node.prepare_write` says.  Runs under the image's lock."""
    node.check_writable()
    child = node.data if node.crypt is None else None
    mapping, geometry = node.mapping, node.geometry
    bits = geometry.cluster_bits
    in_cluster = offset & geometry.cluster_mask
    first = offset >> bits
    stop_cluster = node.allocations.wait_for(first, (offset + length + geometry.cluster_mask) >> bits)
    slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
    index = mapping.index_in_slice(offset)
    length = min(length, ((stop_cluster - first) << bits) - in_cluster)
    host_offset, n = mapping.in_place(table, offset, length)
    if n:
        if mapping.external:
            mapping.check_external(host_offset - in_cluster | layout.FLAG_COPIED, first << bits)
        n_clusters = (in_cluster + n + geometry.cluster_mask) >> bits
        node.guard.trust(slice_offset, len(table), index, host_offset - in_cluster, n_clusters)
        return child, host_offset, n, None
    stop = min(len(table), index + (stop_cluster - first) * mapping.words)
    host_offset, n = mapping.own_run(table, offset, stop)
    preallocated = n > 0
    if mapping.external:  # the place is the guest cluster's own, mapped or not
        host_offset, n, preallocated = first << bits, n or mapping.new_run(table, offset, stop), True
    elif preallocated:
        node.guard.check(host_offset, n << bits, "guest data")
    else:
        host_cluster, n = node.refcounts.allocate(mapping.new_run(table, offset, stop), for_data=True)
        host_offset = host_cluster << bits
    length = min(length, (n << bits) - in_cluster)
    ticket = AllocationTicket(node, first, first + n, host_offset >> bits, preallocated=preallocated)
    start, end = mapping.cow_range(table, index, in_cluster, in_cluster + length, own=preallocated)
    if mapping.external:  # a data file ends with the disk
        end = max(in_cluster + length, min(end, node.size - (first << bits)))
    ticket.start, ticket.end = start, end
    ticket.head = in_cluster - start
    ticket.tail = end - in_cluster - length
    node.allocations.add(ticket)
    return child, host_offset + in_cluster, length, ticket


def link(node: Qcow2Node, ticket: AllocationTicket) -> None:
    """Point the L2 entries of a ticket at its host clusters: the write is part of the image from now on."""
    mapping = node.mapping
    offset = ticket.first << node.geometry.cluster_bits
    n = ticket.stop - ticket.first

    def change() -> None:
        slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
        index = mapping.index_in_slice(offset)
        words = mapping.words
        lost = [] if ticket.preallocated else mapping.host_clusters_of(table[index : index + n * words : words])
        host_offset = ticket.host_cluster << node.geometry.cluster_bits
        mapping.link(slice_offset, table, index, host_offset, n, ticket.start, ticket.end)
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


def zero_part(node: Qcow2Node, offset: int, length: int) -> bool | None:
    """Whether part of a cluster reads as zero already, or could be made so because nothing else is in its way.

    None where a table must be made for that first.  Runs under the image's lock.
    """
    mapping = node.mapping
    first = offset >> node.geometry.cluster_bits
    node.allocations.wait_for_all(first, first + 1)
    if offset + length == node.size:  # nothing else is in the last subcluster
        length += -node.size % node.geometry.subcluster_size
    slice_offset = mapping.slice_at(offset)
    before = 0, 0
    if slice_offset is not None:
        before = mapping.entry_at(mapping.cache.need(slice_offset), mapping.index_in_slice(offset))
    after = mapping.zeroed_part(*before, offset, length, shows_backing=node.has_backing)
    if after is None:
        return False
    if after != before:
        if not mapping.has_own_table(offset):
            return None
        slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
        mapping.set_entry(slice_offset, table, mapping.index_in_slice(offset), *after)
    return True
