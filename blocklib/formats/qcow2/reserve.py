"""Space on the host for tables that are still in memory: taken when they are made, so that no flush runs out of it.

A new L2 table or refcount block reaches the file with the next flush.  If the disk were full by then, the flush could not write
anything that was written before, either.  So zeroes go to the place at once - nothing points at it yet - and where there is no
room, the write that needed the table fails alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.buffers import zeroes
from blocklib.errors import StorageError
from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import WriteTicket


def back_tables(node: Qcow2Node, offset: int, ticket: WriteTicket | None, *, length: int = 1) -> None:
    """Give the tables that were made for a write to `length` bytes from guest `offset` their space.

    Raises StorageError where there is none: the ticket is given back, and so are tables that hold nothing else.
    """
    try:
        with node.writeback.reserving:  # no flush may begin to write what is in them
            for place in _without_space(node):
                node.file.write(place, (zeroes(node.geometry.cluster_size),), "cluster_alloc_space")
                node.refcounts.unbacked.discard(place)
                node.mapping.copied_tables.pop(place, None)
    except BaseException as error:
        if ticket is not None:  # whatever it was: nobody else will give it back
            ticket.abort()
        if isinstance(error, StorageError):
            shift = node.geometry.l1_shift
            for l1_index in range(offset >> shift, ((offset + length - 1) >> shift) + 1):
                node.retry(lambda l1_index=l1_index: _forget_table(node, l1_index))  # type: ignore[misc]
            node.retry(lambda: _forget_blocks(node))
        raise


def make_table(node: Qcow2Node, offset: int) -> None:
    """See to it that the L2 table of guest `offset` can be changed, and that it has its space.

    Raises StorageError where there is none; nothing has changed then.
    """
    node.retry(lambda: node.mapping.slice_for_change(offset, node.refcounts, node.writeback.freed))
    if node.refcounts.unbacked:
        back_tables(node, offset, None)


def _without_space(node: Qcow2Node) -> list[int]:
    with node.lock:
        refcounts = node.refcounts
        refcounts.unbacked &= node.mapping.new_tables | refcounts.new_blocks  # others have been written since
        return sorted(refcounts.unbacked)


def _forget_table(node: Qcow2Node, index: int) -> None:
    """Unlink the new L2 table of this L1 index if nobody is about to link something into it, and it maps nothing, or what
    the table maps that it is a copy of, which takes its place."""
    mapping, refcounts = node.mapping, node.refcounts
    place = mapping.l1[index] & layout.OFFSET_MASK
    if place not in refcounts.unbacked or place not in mapping.new_tables:
        return
    per_table = node.geometry.l1_shift - node.geometry.cluster_bits
    if node.allocations.overlaps(index << per_table, (index + 1) << per_table):
        return
    starts = range(place, place + node.geometry.cluster_size, mapping.slice_length)
    before = mapping.copied_tables.get(place, 0)
    if before:
        old = before & layout.OFFSET_MASK
        if any(mapping.cache.need(start) != mapping.cache.need(start - place + old) for start in starts):
            return
    elif any(any(mapping.cache.need(start)) for start in starts):
        return
    refcounts.release(place >> node.geometry.cluster_bits, 1)
    for start in starts:
        mapping.cache.drop(start)
    if before:
        node.writeback.freed.remove((old >> node.geometry.cluster_bits, 1))
    mapping.l1[index] = before
    mapping.new_tables.discard(place)
    mapping.copied_tables.pop(place, None)
    refcounts.unbacked.discard(place)


def _forget_blocks(node: Qcow2Node) -> None:
    """Unlink the new refcount blocks without space if all that they count is themselves."""
    refcounts = node.refcounts
    places = {place for place in refcounts.unbacked if place in refcounts.new_blocks}
    indices = [index for index in refcounts.dirty_table_entries if refcounts.table[index] in places]
    if not places or refcounts.table_moved or len(indices) != len(places):
        return
    from blocklib.formats.qcow2.resize import count_used

    used = sum(count_used(refcounts.block(index), node.geometry.refcount_bits) for index in indices)
    if used != len(places):
        return
    for index in indices:
        refcounts.cache.drop(refcounts.table[index])
        refcounts.table[index] = 0
    refcounts.dirty_table_entries.difference_update(indices)
    refcounts.new_blocks -= places
    refcounts.unbacked -= places
