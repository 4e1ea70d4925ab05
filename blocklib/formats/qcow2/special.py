"""Runs that only the driver itself can decode: compressed clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.compression import decompress

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node


def read(node: Qcow2Node, offset: int, view: memoryview) -> bool:
    """Fill `view` from one compressed cluster; False where the cluster is none (any more)."""
    mapping = node.mapping
    slice_offset = mapping.slice_at(offset)
    table = None if slice_offset is None else mapping.cache.peek(slice_offset)
    if table is None and slice_offset is not None:
        table = mapping.cache.load(slice_offset, node.lock)
    entry = table[mapping.index_in_slice(offset)] if table is not None else 0
    if not entry & layout.FLAG_COMPRESSED:
        return False
    cluster = read_compressed(node, entry)
    start = offset & node.geometry.cluster_mask
    view[:] = memoryview(cluster)[start : start + len(view)]
    return True


def read_compressed(node: Qcow2Node, entry: int) -> bytes:
    """The guest bytes of the cluster that a compressed descriptor points at.  Raises ImageCorruptError, StorageError."""
    host_offset, length = node.geometry.decode_compressed(entry)
    if host_offset >= node.file.size:
        raise ImageCorruptError(
            f"{node.filename}: a compressed cluster at {host_offset:#x} lies outside the file",
            structure="compressed cluster descriptor",
            host_offset=host_offset,
            expected=f"an offset below {node.file.size}",
            found=f"{host_offset:#x}",
            node=node.filename,
        )
    data = bytearray(length)
    node.file.read(host_offset, memoryview(data))
    return decompress(
        data,
        node.geometry.cluster_size,
        node.header.compression_type,
        host_offset=host_offset,
        node=node.filename,
    )
