"""The refcounts that an image stores, loaded for a check: all of them for the clusters of the file, the others on demand.

Nothing here trusts the refcount table: an entry that cannot be followed makes its counts unknown (unaligned, or beyond what a
file can be) or zero (past the end of the file, where everything reads as zero), and never costs more than the file has bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from blocklib.errors import ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check_counts import BoolArray, CountArray, U64Array, count_type, unpack_refcounts

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header

MAX_FILE_OFFSET: Final = 1 << 63
"""File offsets are signed: no host offset from here on can be read."""
_MAX_CLUSTERS: Final = 1 << 32
"""Host clusters that a check takes on: 16 GiB of counts.  A sparse file can claim any length."""
_BLOCKS_KEPT: Final = 256


class ImageFile(Protocol):
    """What a check needs of the edge to the image file.  Past its end the file reads as zero."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, view: memoryview, /) -> None: ...


def read_bytes(file: ImageFile, host_offset: int, length: int) -> NDArray[np.uint8]:
    """`length` bytes, zeros past the end of the file."""
    raw = np.empty(length, dtype=np.uint8)
    file.read(host_offset, raw.data)
    return raw


def read_entries(file: ImageFile, host_offset: int, n_entries: int, file_size: int) -> U64Array:
    """The entries of a table of 64-bit numbers, as far as the file reaches; those past its end would be zero."""
    inside = max(0, min(n_entries * layout.TABLE_ENTRY_LENGTH, file_size - host_offset))
    whole = -(-inside // layout.TABLE_ENTRY_LENGTH) * layout.TABLE_ENTRY_LENGTH
    return read_bytes(file, host_offset, whole).view(">u8").astype(np.uint64)


class StoredRefcounts:
    """Refcount table and blocks as they are on disk.  Cluster numbers are indices of host clusters."""

    def __init__(self, file: ImageFile, header: Header, geometry: Geometry, n_clusters: int) -> None:
        if n_clusters > _MAX_CLUSTERS:
            raise ImageLimitError(
                f"the file has {n_clusters} clusters, more than can be counted",
                structure="image file",
                expected=f"at most {_MAX_CLUSTERS} clusters",
                found=str(n_clusters),
            )
        self._file = file
        self._file_size = file.size
        self._geometry = geometry
        n_entries = geometry.refcount_table_entries(header.refcount_table_clusters)
        self.table = read_entries(file, header.refcount_table_offset, n_entries, self._file_size)
        """Every entry of the refcount table that lies inside the file."""
        self.counts = np.zeros(n_clusters, dtype=count_type(geometry.refcount_order))
        """Shape (n_clusters,): the stored count of each cluster of the file; 0 where it is unknown."""
        self.offsets = self.table & np.uint64(layout.REFCOUNT_TABLE_OFFSET_MASK)
        """Host offsets of the refcount blocks, as the table has them."""
        self.unknown = (self.offsets & np.uint64(geometry.cluster_mask)) != 0
        """For each entry: its block cannot be read, so the counts in it are not known."""
        self.unknown |= self.offsets >= np.uint64(MAX_FILE_OFFSET)
        self.any_unknown = bool(self.unknown.any())
        self._beyond: dict[int, BoolArray] = {}
        self._load()

    def _load(self) -> None:
        per_block = self._geometry.refcount_block_entries
        n_blocks = min(-(-self.counts.size // per_block), self.table.size)
        for index in range(n_blocks):
            offset = int(self.offsets[index])
            if offset and not self.unknown[index] and offset < self._file_size:
                part = self.counts[index * per_block : (index + 1) * per_block]
                part[:] = self.load_block(offset)[: part.size]

    def load_block(self, host_offset: int) -> CountArray:
        """The counts of the refcount block at `host_offset`, one for each cluster that it covers."""
        raw = read_bytes(self._file, host_offset, self._geometry.cluster_size)
        return unpack_refcounts(raw, self._geometry.refcount_order)

    def are_one(self, offsets: U64Array) -> BoolArray:
        """For each host offset, inside the file or not: is the stored count of its cluster exactly one?"""
        clusters = offsets >> np.uint64(self._geometry.cluster_bits)
        inside = clusters < np.uint64(self.counts.size)
        if inside.all():
            return np.equal(self.counts[clusters.astype(np.intp)], 1)
        answer = np.zeros(offsets.size, dtype=bool)
        answer[inside] = self.counts[clusters[inside].astype(np.intp)] == 1
        answer[~inside] = self._are_one_beyond(clusters[~inside])
        return answer

    def are_known(self, offsets: U64Array) -> BoolArray:
        """For each host offset: could the stored count of its cluster be read?"""
        blocks = offsets >> np.uint64(self._geometry.cluster_bits + self._geometry.refcount_block_bits)
        known = np.ones(offsets.size, dtype=bool)
        counted = blocks < np.uint64(self.table.size)
        known[counted] = ~self.unknown[blocks[counted].astype(np.intp)]
        return known

    def _are_one_beyond(self, clusters: U64Array) -> BoolArray:
        """The same for clusters past the end of the file, which an image may count all the same."""
        answer = np.zeros(clusters.size, dtype=bool)
        blocks = clusters >> np.uint64(self._geometry.refcount_block_bits)
        for block in np.unique(blocks[blocks < np.uint64(self.table.size)]).tolist():
            offset = int(self.offsets[block])
            if not offset or self.unknown[block] or offset >= self._file_size:
                continue
            here = blocks == np.uint64(block)
            within = clusters[here] & np.uint64(self._geometry.refcount_block_entries - 1)
            answer[here] = self._ones_of(offset)[within.astype(np.intp)]
        return answer

    def _ones_of(self, host_offset: int) -> BoolArray:
        ones = self._beyond.get(host_offset)
        if ones is None:
            if len(self._beyond) >= _BLOCKS_KEPT:
                self._beyond.clear()
            ones = self._beyond[host_offset] = self.load_block(host_offset) == 1
        return ones
