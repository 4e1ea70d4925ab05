"""Compressed writes: packed into host clusters, written, and then linked, so that nobody sees a cluster before its bytes.

Source: ``docs/interop/qcow2.rst``, "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from blocklib.errors import StorageError, UnsupportedFeatureError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.compression import Compressor
from blocklib.formats.qcow2.cow import RangeTicket
from blocklib.formats.qcow2.reserve import back_tables

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_REFERENCE = layout.FLAG_COMPRESSED | layout.OFFSET_MASK


def compressor(node: Qcow2Node, level: int | None) -> Compressor:
    """Raises UnsupportedFeatureError for an image that has no compressed clusters, UsageError for an unknown level."""
    header = node.header
    for present, feature in (
        (header.crypt_method != layout.CRYPT_NONE, "encryption"),
        (header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE, "an external data file"),
    ):
        if present:
            raise UnsupportedFeatureError(
                f"{node.filename}: an image with {feature} has no compressed clusters",
                features=(feature, "compressed clusters"),
                node=node.name,
            )
    return Compressor(header.compression_type, node.geometry.cluster_size, level)


class _Claim(RangeTicket):
    """The guest clusters of one compressed write, and where their streams go."""

    def __init__(self, node: Qcow2Node, offset: int, packed: Sequence[bytes | None]) -> None:
        cluster_bits = node.geometry.cluster_bits
        self._node = node
        self.first = offset >> cluster_bits
        self.stop = self.first + len(packed)
        self.clusters = [self.first + i for i, stream in enumerate(packed) if stream is not None]
        self.streams = [stream for stream in packed if stream is not None]
        self.lengths = [len(stream) for stream in self.streams]
        self.host_offsets: list[int] = []
        self.linked = 0
        """How many of the streams are part of the image."""

    def abort(self) -> None:
        _give_back(self._node, self)


def write_packed(node: Qcow2Node, offset: int, packed: Sequence[bytes | None]) -> bool:
    """Store streams that `compressor` made: one for each cluster from guest `offset` on, None for one that is left alone.

    False where the image is so large that no descriptor can refer to them: with clusters of 2 MiB, from 512 TiB on.
    Raises StorageError (EIO) where one of the clusters is allocated, ImageLimitError where the image cannot grow; nothing is
    written then.
    """
    node.check_usable()
    node.check_writable()
    claim = _Claim(node, offset, packed)
    if not claim.clusters:
        return True
    try:
        node.retry(lambda: _reserve(node, claim))
        if max(claim.host_offsets) >= node.geometry.max_compressed_offset:
            _give_back(node, claim)
            return False
        if node.refcounts.unbacked:
            back_tables(node, offset, claim, length=len(packed) << node.geometry.cluster_bits)
        _write(node, claim)
        while claim.linked < len(claim.clusters):
            node.retry(lambda: _link_slice(node, claim))
    except BaseException:
        _give_back(node, claim)
        raise
    with node.lock:
        node.allocations.remove(claim)
    node.writeback.relieve()
    return True


def _reserve(node: Qcow2Node, claim: _Claim) -> None:
    """Claim the guest clusters and find a place for the streams.  Goes on where a missing table has stopped it."""
    if not node.allocations.holds(claim):
        node.allocations.wait_for_all(claim.first, claim.stop)
        _refuse_allocated(node, claim)
        node.allocations.add(claim)
    for guest_offset in _slices(node, claim):  # made now, while nothing is lost if the host has no room for them
        node.mapping.slice_for_change(guest_offset, node.refcounts, node.writeback.freed)
    node.refcounts.packing.place(claim.lengths, claim.host_offsets)


def _slices(node: Qcow2Node, claim: _Claim) -> Iterator[int]:
    """A guest offset in each L2 slice that will map one of the streams."""
    mapping, bits = node.mapping, node.geometry.cluster_bits
    last = -1
    for cluster in claim.clusters:
        if cluster // mapping.slice_entries != last:
            last = cluster // mapping.slice_entries
            yield cluster << bits


def _refuse_allocated(node: Qcow2Node, claim: _Claim) -> None:
    mapping = node.mapping
    bits = node.geometry.cluster_bits
    for cluster in claim.clusters:
        guest_offset = cluster << bits
        slice_offset = mapping.slice_at(guest_offset)
        if slice_offset is None:
            continue
        if mapping.cache.need(slice_offset)[mapping.index_in_slice(guest_offset)] & _REFERENCE:
            raise StorageError(
                f"{node.filename}: the cluster at {guest_offset:#x} is allocated; only a new one can be written compressed",
                errno=errno.EIO,
                operation="write compressed",
                node=node.name,
            )


def _write(node: Qcow2Node, claim: _Claim) -> None:
    """Send the streams to the file, neighbours together."""
    node.mapping.decompressed = None
    start = 0
    while start < len(claim.streams):
        stop = start + 1
        end = claim.host_offsets[start] + claim.lengths[start]
        while stop < len(claim.streams) and claim.host_offsets[stop] == end:
            end += claim.lengths[stop]
            stop += 1
        node.file.write(claim.host_offsets[start], (b"".join(claim.streams[start:stop]),), "write_compressed")
        start = stop


def _link_slice(node: Qcow2Node, claim: _Claim) -> None:
    """Point L2 entries at the streams of the next clusters that one L2 slice maps."""
    mapping, geometry = node.mapping, node.geometry
    i = claim.linked
    first = claim.clusters[i]
    slice_offset, table = mapping.slice_for_change(first << geometry.cluster_bits, node.refcounts, node.writeback.freed)
    index = mapping.index_in_slice(first << geometry.cluster_bits)
    words = mapping.words
    entries = table[index : index + (claim.stop - first) * words]
    last = first + len(entries) // words
    while i < len(claim.clusters) and claim.clusters[i] < last:
        word = (claim.clusters[i] - first) * words
        entries[word] = geometry.encode_compressed(claim.host_offsets[i], claim.lengths[i])
        if words > 1:
            entries[word + 1] = 0  # a compressed cluster has no subclusters
        i += 1
    mapping.replace(slice_offset, table, index, entries)
    claim.linked = i


def _give_back(node: Qcow2Node, claim: _Claim) -> None:
    """Let go of what was not linked: nobody has seen it."""
    bits = node.geometry.cluster_bits

    def change() -> None:
        while len(claim.host_offsets) > claim.linked:
            host_offset, length = claim.host_offsets[-1], claim.lengths[len(claim.host_offsets) - 1]
            first = host_offset >> bits
            node.refcounts.release(first, ((host_offset + length - 1) >> bits) - first + 1)
            claim.host_offsets.pop()
        node.refcounts.packing.leave()

    try:
        if node.poisoned is None and node.corruption is None:
            node.retry(change)
    finally:
        with node.lock:
            if node.allocations.holds(claim):
                node.allocations.remove(claim)
