"""What `tally` does, for many tables: a batch of L2 tables and a whole refcount block at a time, with numpy."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.counts import compressed_ranges, count_type, pack_refcounts, unpack_refcounts
from blocklib.formats.qcow2.check.l2 import read_l2_tables
from blocklib.formats.qcow2.snapshots.tally import Tally, Write, l2_offsets
from blocklib.formats.qcow2.tables import Table, numpy_view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blocklib.formats.qcow2.node import Qcow2Node

_BATCH_BYTES: Final = 4 << 20
"""L2 tables treated at a time."""
_DENSE: Final = 8
"""Clusters are counted in a window of at most this many times their number, otherwise sorted."""


class TableTally(Tally):
    """The numpy form.  Changes are summed up per refcount block."""

    def __init__(self, node: Qcow2Node, sign: int) -> None:
        super().__init__(node, sign)
        self._sums: dict[int, NDArray[np.int32]] = {}
        self._arrays: dict[int, NDArray[Any]] = {}

    # -- collecting ---------------------------------------------------------------------------------------------------

    def add_l1(self, l1: Table) -> None:
        geometry = self._geometry
        bits = np.uint64(geometry.cluster_bits)
        for offsets, words in self._batches(l1):
            self._sum(offsets >> bits)
            entries = words[:, :: geometry.l2_entry_length // layout.L2_ENTRY_LENGTH]
            compressed = (entries & np.uint64(layout.FLAG_COMPRESSED)) != 0
            hosts = entries & np.uint64(layout.OFFSET_MASK)
            hosts[compressed] = 0
            bad = (hosts & np.uint64(geometry.cluster_mask)) != 0
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise self.misaligned(int(offsets[row]), int(hosts[row, column]))
            self._sum(hosts[hosts != 0] >> bits)
            if compressed.any():
                self._sum_compressed(entries[compressed])

    def _batches(self, l1: Table) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        """(host offsets, ascending; the tables there, one a row)."""
        geometry = self._geometry
        offsets = np.array(l2_offsets(l1, geometry.cluster_mask, self._file.size, self._node), dtype=np.uint64)
        offsets.sort()
        per_batch = max(1, _BATCH_BYTES >> geometry.cluster_bits)
        for start in range(0, offsets.size, per_batch):
            part = offsets[start : start + per_batch]
            words = read_l2_tables(self._file, part, geometry.cluster_size)
            yield part, words.reshape(part.size, -1)

    def _sum_compressed(self, entries: NDArray[np.uint64]) -> None:
        bits = np.uint64(self._geometry.cluster_bits)
        offsets, lengths = compressed_ranges(entries, self._geometry.compressed_offset_bits)
        beyond = offsets >= np.uint64(layout.MAX_HOST_OFFSET)
        if beyond.any():
            self._geometry.decode_compressed(int(entries[int(np.argmax(beyond))]))  # raises
        clusters = offsets >> bits
        last = (offsets + lengths - np.uint64(1)) >> bits
        while clusters.size:  # a descriptor reaches over three clusters at most
            self._sum(clusters)
            more = clusters < last
            clusters, last = clusters[more] + np.uint64(1), last[more]

    def _add(self, clusters: Iterable[int]) -> None:
        self._sum(np.fromiter(clusters, dtype=np.uint64))

    def _sum(self, clusters: NDArray[np.uint64]) -> None:
        if not clusters.size:
            return
        first = int(clusters.min())
        self._refuse_outside(int(clusters.max()))
        window = int(clusters.max()) - first + 1
        if window <= max(_DENSE * clusters.size, 1 << 16):
            found = np.bincount((clusters - np.uint64(first)).astype(np.intp))
            distinct = np.flatnonzero(found)
            times = found[distinct]
            distinct += first
        else:
            distinct, times = np.unique(clusters.astype(np.intp), return_counts=True)
        for index, part in self._by_block(distinct):
            places = distinct[part] & (self._geometry.refcount_block_entries - 1)
            self._sum_of(index)[places] += times[part].astype(np.int32)

    def _by_block(self, clusters: NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
        """(index of a refcount block, which of the ascending `clusters` it counts)."""
        blocks = clusters >> self._geometry.refcount_block_bits
        starts = np.concatenate(([0], np.flatnonzero(np.diff(blocks)) + 1))
        stops = np.append(starts[1:], clusters.size)
        for start, stop in zip(starts.tolist(), stops.tolist()):
            yield int(blocks[start]), slice(start, stop)

    def _sum_of(self, index: int) -> NDArray[np.int32]:
        sums = self._sums.get(index)
        if sums is None:
            sums = self._sums[index] = np.zeros(self._geometry.refcount_block_entries, dtype=np.int32)
        return sums

    # -- counts -------------------------------------------------------------------------------------------------------

    def block_offsets(self) -> list[int]:
        return [self._table[index] for index in sorted(self._sums)]

    def check(self) -> None:
        super().check()
        self._arrays.clear()

    def block_writes(self) -> Iterator[Write]:
        return self._changed_blocks()

    def _changed_blocks(self) -> Iterator[Write]:
        self._arrays.clear()
        self.freed.clear()
        geometry = self._geometry
        for index in sorted(self._sums):
            times = self._sums[index].astype(np.uint64)
            counts = self._counts(index)
            used = times != 0
            if counts is None:
                raise self.wrong_count((index << geometry.refcount_block_bits) + int(np.argmax(used)), 0)
            before = counts.astype(np.uint64)
            if self.sign > 0:
                bad = used & ((before == 0) | (np.uint64(geometry.max_refcount) - before < times))
            else:
                bad = before < times
            if bad.any():
                place = int(np.argmax(bad))
                raise self.wrong_count((index << geometry.refcount_block_bits) + place, int(before[place]))
            after = before + times if self.sign > 0 else before - times
            self._arrays[index] = changed = after.astype(count_type(geometry.refcount_order))
            if self.sign < 0:
                gone = np.flatnonzero(np.diff(used & (after == 0), prepend=False, append=False))
                gone += index << geometry.refcount_block_bits
                for first, stop in zip(gone[0::2].tolist(), gone[1::2].tolist()):
                    self._note_freed(first, stop - first)
            yield self._table[index], pack_refcounts(changed, geometry.refcount_order)

    def _counts(self, index: int) -> NDArray[Any] | None:
        counts = self._arrays.get(index)
        if counts is None:
            offset = self.block_offset(index)
            if offset is None:
                return None
            raw = np.empty(self._geometry.cluster_size, dtype=np.uint8)
            self._file.read(offset, raw.data, "metadata")
            counts = self._arrays[index] = unpack_refcounts(raw, self._geometry.refcount_order)
        return counts

    # -- flags --------------------------------------------------------------------------------------------------------

    def flag_writes(self, l1: Table) -> Iterator[Write]:
        step = self._geometry.l2_entry_length // layout.L2_ENTRY_LENGTH
        for offsets, words in self._batches(l1):
            entries = words[:, ::step]
            flagged = self._flagged(entries)
            for row in np.flatnonzero((flagged != entries).any(axis=1)).tolist():
                words[row, ::step] = flagged[row]
                yield int(offsets[row]), words[row].astype(">u8").tobytes()

    def flagged_l1(self, l1: Table) -> Table:
        return array("Q", self._flagged(numpy_view(l1)).tobytes())

    def _flagged(self, entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
        plain = np.bitwise_and(entries, np.uint64(~layout.FLAG_COPIED & 0xFFFF_FFFF_FFFF_FFFF), order="C")
        hosts = entries & np.uint64(layout.OFFSET_MASK)
        hosts[(entries & np.uint64(layout.FLAG_COMPRESSED)) != 0] = 0
        places = np.flatnonzero(hosts)
        if places.size:
            clusters = hosts.reshape(-1)[places] >> np.uint64(self._geometry.cluster_bits)
            sole = places[self._are_one(clusters)]
            plain.reshape(-1)[sole] |= np.uint64(layout.FLAG_COPIED)
        return plain

    def _are_one(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        self._refuse_outside(int(clusters.max()))
        order = np.argsort(clusters, kind="stable")
        ascending = clusters[order].astype(np.intp)
        answers = np.zeros(clusters.size, dtype=bool)
        for index, part in self._by_block(ascending):
            counts = self._counts(index)
            if counts is not None:
                answers[part] = counts[ascending[part] & (self._geometry.refcount_block_entries - 1)] == 1
        found = np.empty_like(answers)
        found[order] = answers
        return found
