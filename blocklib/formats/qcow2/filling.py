"""Copying what lies below into an image: a place for it, if the image holds nothing there, decided and reserved in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.extents import KIND_BACKING
from blocklib.formats.qcow2 import writing

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
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
