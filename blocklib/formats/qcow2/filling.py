"""Copying what lies below into an image: a place for it, if the image holds nothing there, decided and reserved in one step."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklib.extents import KIND_BACKING
from blocklib.formats.qcow2 import layout, writing

if TYPE_CHECKING:
    from blocklib.formats.qcow2.mapping import Mapping
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.formats.qcow2.tables import Table
    from blocklib.node import WriteRun


def prepare(node: Qcow2Node, offset: int, length: int) -> tuple[int, WriteRun | None]:
    """What `Node.prepare_fill` says."""
    n, run = node.retry(lambda: _prepare(node, offset, length))
    if run is not None and node.refcounts.unbacked:
        from blocklib.formats.qcow2.reserve import back_tables

        back_tables(node, offset, run[3])
    return n, run


def _prepare(node: Qcow2Node, offset: int, length: int) -> tuple[int, WriteRun | None]:
    mapping = node.mapping
    first = offset >> node.geometry.cluster_bits
    node.allocations.wait_for(first, first + 1)  # a guest's write to the cluster: what it holds is known afterwards
    slice_offset = mapping.slice_at(offset)
    if slice_offset is None:
        n = mapping.unmapped_length(offset, length)
    else:
        table = mapping.cache.need(slice_offset)
        kind, _edge, _place, n, _flags = mapping.resolve(table, mapping.index_in_slice(offset), offset, length, node.data)
        if kind != KIND_BACKING:
            return n, None
    run = writing.prepare(node, offset, n)
    return run[2], run


def fill_zeroes(node: Qcow2Node, offset: int, length: int) -> bool:
    """What `Node.fill_zeroes` says: of whole clusters, by their L2 entries, one slice after the other."""
    mapping, bits = node.mapping, node.geometry.cluster_bits
    if node.header.version == layout.VERSION_2 or mapping.external:
        return False
    node.check_usable()
    node.check_writable()
    end = node.geometry.round_up(offset + length)
    slice_bytes = mapping.slice_entries << bits
    while offset < end:
        stop = min(end, (offset // slice_bytes + 1) * slice_bytes)
        node.retry(lambda offset=offset, stop=stop: _fill_slice(node, offset, stop))  # type: ignore[misc]
        node.writeback.relieve()
        offset = stop
    return True


def _fill_slice(node: Qcow2Node, offset: int, end: int) -> None:
    mapping, bits = node.mapping, node.geometry.cluster_bits
    node.allocations.wait_for_all(offset >> bits, end >> bits)
    slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
    index = mapping.index_in_slice(offset)
    words = table[index : index + ((end - offset) >> bits) * mapping.words]
    mapping.replace(slice_offset, table, index, _filled(mapping, words))


def _filled(mapping: Mapping, words: Table) -> Table:
    """The same L2 entries, that read as zero where nothing was said."""
    zero = array("Q", (mapping.zero_flag, mapping.zero_bitmap)[: mapping.words])
    if words.tobytes() == bytes(len(words) * words.itemsize):
        return zero * (len(words) // mapping.words)
    after = words[:]
    for index in range(0, len(words), mapping.words):
        if mapping.words == 1:
            after[index] = words[index] or zero[0]
        elif not words[index] & layout.FLAG_COMPRESSED:
            bitmap = words[index + 1]
            after[index + 1] = bitmap | (~(bitmap | bitmap >> 32) & 0xFFFF_FFFF) << 32
    return after
