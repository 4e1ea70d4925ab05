"""Runs that only the driver itself can decode: compressed clusters.

Neighbours in the file are read together, and a few MiB at a time: what a convert reads takes one request and one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.compression import decompress, decompress_all

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_AT_ONCE: Final = 2 << 20
"""Bytes of the guest that are decompressed from one set of buffers; a single cluster may be as large."""
_GAP: Final = 16 << 10
"""Bytes of the file that are read for nothing rather than with another request."""
_SPAN: Final = 2 * _AT_ONCE
"""Bytes of the file that are read with one request, at most, where they belong to more than one cluster."""


class _Stream(NamedTuple):
    """One compressed cluster: `length` bytes in the file, at most, and where its guest bytes go."""

    host_offset: int
    length: int
    at: int


def read(node: Qcow2Node, offset: int, view: memoryview) -> bool:
    """Fill `view` from compressed clusters that one L2 slice maps; False where one of them is none (any more).

    Raises ImageCorruptError, StorageError.
    """
    mapping, geometry = node.mapping, node.geometry
    slice_offset = mapping.slice_at(offset)
    table = None if slice_offset is None else mapping.cache.peek(slice_offset)
    if table is None and slice_offset is not None:
        table = mapping.cache.load(slice_offset, node.lock)
    if table is None:
        return False
    skip = offset & geometry.cluster_mask
    n = geometry.clusters_for(skip + len(view))
    index = mapping.index_in_slice(offset)
    entries = table[index : index + n * mapping.words : mapping.words]
    if len(entries) < n or not all(entry & layout.FLAG_COMPRESSED for entry in entries):
        return False
    size = geometry.cluster_size
    if len(view) < size:  # at most two clusters, neither of them whole
        for number, entry in enumerate(entries):
            start = max(number * size - skip, 0)
            stop = min((number + 1) * size - skip, len(view))
            inside = skip + start - number * size
            view[start:stop] = memoryview(_kept(node, entry))[inside : inside + stop - start]
        return True
    if skip:
        return read(node, offset, view[: size - skip]) and read(node, offset + size - skip, view[size - skip :])
    whole = len(view) >> geometry.cluster_bits
    step = max(_AT_ONCE >> geometry.cluster_bits, 1)
    for first in range(0, whole, step):
        _read_whole(node, entries[first : min(first + step, whole)], view[first * size :])
    done = whole * size
    return done == len(view) or read(node, offset + done, view[done:])


def _kept(node: Qcow2Node, entry: int) -> bytes:
    """The guest bytes behind a descriptor of which only a part is wanted: the next request often wants the next part."""
    kept = node.mapping.decompressed
    if kept is not None and kept[0] == entry:
        return kept[1]
    cluster = read_compressed(node, entry)
    node.mapping.decompressed = entry, cluster
    return cluster


def _read_whole(node: Qcow2Node, entries: Sequence[int], view: memoryview) -> None:
    size, end = node.geometry.cluster_size, node.file.size
    streams = []
    for number, entry in enumerate(entries):
        host_offset, length = node.geometry.decode_compressed(entry)
        if host_offset >= end:
            raise _outside(node, host_offset)
        streams.append(_Stream(host_offset, length, number * size))
    for group in _groups(streams):
        start = group[0].host_offset
        data = bytearray(max(stream.host_offset + stream.length for stream in group) - start)
        node.file.read(start, memoryview(data), "read_compressed")
        decompress_all(
            memoryview(data),
            [(stream.host_offset - start, stream.length, view[stream.at : stream.at + size]) for stream in group],
            node.header.compression_type,
            host_offset=start,
            node=node.filename,
        )


def _groups(streams: list[_Stream]) -> Iterator[list[_Stream]]:
    """The streams in the order of the file, those together that lie close to each other."""
    group: list[_Stream] = []
    start = end = 0
    for stream in sorted(streams):
        stop = stream.host_offset + stream.length
        if group and (stream.host_offset > end + _GAP or stop > start + _SPAN):
            yield group
            group = []
        if not group:
            start = end = stream.host_offset
        group.append(stream)
        end = max(end, stop)
    yield group


def read_compressed(node: Qcow2Node, entry: int) -> bytes:
    """The guest bytes of the cluster that a compressed descriptor points at.  Raises ImageCorruptError, StorageError."""
    host_offset, length = node.geometry.decode_compressed(entry)
    if host_offset >= node.file.size:
        raise _outside(node, host_offset)
    data = bytearray(length)
    node.file.read(host_offset, memoryview(data), "read_compressed")
    return decompress(
        data,
        node.geometry.cluster_size,
        node.header.compression_type,
        host_offset=host_offset,
        node=node.filename,
    )


def _outside(node: Qcow2Node, host_offset: int) -> ImageCorruptError:
    return ImageCorruptError(
        f"{node.filename}: a compressed cluster at {host_offset:#x} lies outside the file",
        structure="compressed cluster descriptor",
        host_offset=host_offset,
        expected=f"an offset below {node.file.size}",
        found=f"{host_offset:#x}",
        node=node.filename,
    )
