"""The refcounts that an image stores, loaded for a check: all of them for the clusters of the file, the others on demand.

Nothing here trusts the refcount table: an entry that cannot be followed makes its counts unknown (unaligned, or beyond what a
file can be) or zero (past the end of the file, where everything reads as zero), and never costs more than the file has bytes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from blocklib.errors import ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.counts import BoolArray, CountArray, IndexArray, U64Array, count_type, unpack_refcounts

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header

MAX_FILE_OFFSET: Final = 1 << 63
"""File offsets are signed: no host offset from here on can be read."""
_MAX_CLUSTERS: Final = 1 << 32
"""Host clusters that a check takes on: 16 GiB of counts.  A sparse file can claim any length."""
_BITS_KEPT: Final = 64 << 20
"""Bytes spent on the counts of clusters past the end of the file."""


class ImageFile(Protocol):
    """What a check needs of the edge to the image file.  Past its end the file reads as zero."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, view: memoryview, /) -> None: ...


def read_bytes(file: ImageFile, host_offset: int, length: int) -> NDArray[np.uint8]:
    """`length` bytes, zeros past the end of the file; the host is not asked for offsets that no file can have."""
    inside = max(0, min(length, file.size - host_offset))
    raw = np.zeros(length, dtype=np.uint8)
    if inside:
        file.read(host_offset, raw.data[:inside])
    return raw


def read_entries(file: ImageFile, host_offset: int, n_entries: int) -> U64Array:
    """The entries of a table of 64-bit numbers, as far as the file reaches; those past its end would be zero."""
    inside = max(0, min(n_entries * layout.TABLE_ENTRY_LENGTH, file.size - host_offset))
    whole = -(-inside // layout.TABLE_ENTRY_LENGTH) * layout.TABLE_ENTRY_LENGTH
    entries = read_bytes(file, host_offset, whole).view(np.uint64)
    return entries.byteswap(inplace=True) if sys.byteorder == "little" else entries


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
        self.file_size = file.size
        self._geometry = geometry
        n_entries = geometry.refcount_table_entries(header.refcount_table_clusters)
        self.table = read_entries(file, header.refcount_table_offset, n_entries)
        """Every entry of the refcount table that lies inside the file."""
        self.counts = np.zeros(n_clusters, dtype=count_type(geometry.refcount_order))
        """Shape (n_clusters,): the stored count of each cluster of the file; 0 where it is unknown."""
        self.offsets = self.table & np.uint64(layout.REFCOUNT_TABLE_OFFSET_MASK)
        """Host offsets of the refcount blocks, as the table has them."""
        self.unknown = (self.offsets & np.uint64(geometry.cluster_mask)) != 0
        """For each entry: its block cannot be read, so the counts in it are not known."""
        self.unknown |= self.offsets >= np.uint64(MAX_FILE_OFFSET)
        self.any_unknown = bool(self.unknown.any())
        self._beyond: _OnesByBlock | None = None
        self._load()

    def _load(self) -> None:
        per_block = self._geometry.refcount_block_entries
        n_blocks = min(-(-self.counts.size // per_block), self.table.size)
        for index in range(n_blocks):
            offset = int(self.offsets[index])
            if offset and not self.unknown[index] and offset < self.file_size:
                self._load_into(self.counts[index * per_block : (index + 1) * per_block], offset)

    def _load_into(self, part: CountArray, host_offset: int) -> None:
        """The first counts of a block, in place where they are whole bytes."""
        raw = part.view(np.uint8)
        if self._geometry.refcount_order < 3 or host_offset + raw.size > self.file_size:
            part[:] = self.load_block(host_offset)[: part.size]
            return
        self._file.read(host_offset, raw.data)
        if sys.byteorder == "little":
            part.byteswap(inplace=True)

    def load_block(self, host_offset: int) -> CountArray:
        """The counts of the refcount block at `host_offset`, one for each cluster that it covers."""
        return self.unpack(read_bytes(self._file, host_offset, self._geometry.cluster_size))

    def unpack(self, raw: NDArray[np.uint8]) -> CountArray:
        """The counts in the bytes of a refcount block."""
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
        counted = blocks < np.uint64(self.table.size)
        index = blocks[counted].astype(np.intp)
        within = clusters[counted] & np.uint64(self._geometry.refcount_block_entries - 1)
        if self._beyond is None:
            self._beyond = _OnesByBlock(self, self._geometry.refcount_block_entries)
        answer[counted] = self._beyond.look_up(index, within)
        return answer


class _OnesByBlock:
    """Which counts are one in refcount blocks that are loaded when they are first asked for, a bit for each count.

    Each block of the file is loaded once, however many table entries point at it.  Past `_BITS_KEPT` in all, counts are
    taken for zero: every entry that leads there is damaged anyway.
    """

    def __init__(self, stored: StoredRefcounts, per_block: int) -> None:
        self._stored = stored
        self._row_bytes = -(-per_block // 8)
        self._rows = np.zeros((1, self._row_bytes), dtype=np.uint8)  # row 0: no count is one
        self._n_rows = 1
        self._row_of = np.full(stored.table.size, -1, dtype=np.int32)
        self._row_at: dict[int, int] = {}

    def look_up(self, blocks: IndexArray, within: U64Array) -> BoolArray:
        """Is count number `within[i]` of the refcount block of table entry `blocks[i]` one?"""
        for block in np.unique(blocks[self._row_of[blocks] < 0]).tolist():
            self._row_of[block] = self._load(block)
        bits = self._rows[self._row_of[blocks], (within >> np.uint64(3)).astype(np.intp)]
        ones: BoolArray = ((bits >> (within & np.uint64(7)).astype(np.uint8)) & np.uint8(1)) != 0
        return ones

    def _load(self, block: int) -> int:
        """The row of a block; 0 for one that cannot be read."""
        stored = self._stored
        offset = int(stored.offsets[block])
        if not offset or stored.unknown[block] or offset >= stored.file_size:
            return 0
        row = self._row_at.get(offset)
        if row is not None:
            return row
        if self._n_rows * self._row_bytes >= _BITS_KEPT:
            return 0
        if self._n_rows == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        row = self._n_rows
        self._rows[row] = np.packbits(stored.load_block(offset) == 1, bitorder="little")
        self._row_at[offset] = row
        self._n_rows += 1
        return row
