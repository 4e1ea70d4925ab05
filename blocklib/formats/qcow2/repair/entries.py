"""Repairing L1 and L2 tables: copied flags that contradict the counts, and host clusters of zero clusters that cannot be.

Tables are treated a batch at a time; of one that changes, the part from its first to its last change is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from blocklib.errors import ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.counts import BoolArray, U64Array, reads_as_zero
from blocklib.formats.qcow2.check.l2 import read_l2_tables, split_entries
from blocklib.formats.qcow2.check.stored import StoredRefcounts, read_bytes
from blocklib.formats.qcow2.repair.draft import ENTRIES
from blocklib.reports import RepairStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.repair.draft import Draft

_BATCH_BYTES: Final = 2 << 20
_MAX_MOVED_BYTES: Final = 256 << 20


class TableFixer:
    """Changes table entries of a draft, and counts how many."""

    def __init__(self, draft: Draft, scan: Scan) -> None:
        self._draft = draft
        self._scan = scan
        self.n_fixed = 0

    def forget_zeroes(self) -> Iterator[RepairStep]:
        """Take unaligned host offsets out of zero clusters, which do not need them: the guest reads the same."""
        geometry = self._scan.geometry

        def fix(entries: U64Array, bitmaps: U64Array | None) -> U64Array:
            compressed = (entries & np.uint64(layout.FLAG_COMPRESSED)) != 0
            unaligned = (entries & np.uint64(layout.OFFSET_MASK & geometry.cluster_mask)) != 0
            chosen = unaligned & ~compressed & reads_as_zero(entries, bitmaps)
            left = np.uint64(0 if geometry.extended_l2 else layout.FLAG_ZERO)
            return np.where(chosen, left, entries)

        action, before = "forget unaligned host clusters", "zero clusters with an unaligned host offset"
        yield from self._fix_l2_tables(self._scan.walk.all_tables, fix, action, before, "zero clusters without one")

    def move_data_off_metadata(self) -> Iterator[RepairStep]:
        """Give guest data that lies on metadata a cluster of its own, with what the guest reads there now."""
        scan, draft, bits = self._scan, self._draft, self._scan.geometry.cluster_bits
        places: dict[int, int] = {}
        shared = scan.shared[scan.shared < scan.end]
        shared = shared[scan.refcount_references(scan.end)[shared] == 0]  # refcounts move away themselves

        def fix(entries: U64Array, bitmaps: U64Array | None) -> U64Array:
            offsets = entries & np.uint64(layout.OFFSET_MASK)
            chosen = (entries & np.uint64(layout.FLAG_COMPRESSED)) == 0
            chosen &= ((offsets & np.uint64(scan.geometry.cluster_mask)) == 0) & ~scan.beyond(offsets) & (offsets != 0)
            chosen[chosen] = np.isin((offsets[chosen] >> np.uint64(bits)).astype(np.intp), shared)
            fixed = entries.copy()
            for place in np.flatnonzero(chosen).tolist():
                old = int(offsets[place])
                if old not in places:
                    self._refuse_many(len(places) + 1)
                    places[old] = draft.put(scan, read_bytes(draft, old, scan.geometry.cluster_size).tobytes())
                fixed[place] = np.uint64(int(entries[place]) ^ old ^ places[old])
            return fixed

        action, before = "move data off metadata", "clusters of guest data lie on metadata"
        yield from self._fix_l2_tables(scan.walk.all_tables, fix, action, before, "clusters of their own")

    def _refuse_many(self, n_clusters: int) -> None:
        """Raises ImageLimitError for more moved clusters than any accident leaves: a draft holds them in memory."""
        length = n_clusters << self._scan.geometry.cluster_bits
        if length > _MAX_MOVED_BYTES:
            raise ImageLimitError(
                "too much guest data lies on metadata for a repair to move it",
                structure="host clusters",
                expected=f"at most {_MAX_MOVED_BYTES} bytes",
                found=f"at least {length} bytes",
            )

    def correct_flags(self) -> Iterator[RepairStep]:
        """Make the copied flags of the active tables agree with the counts that the draft has by now."""
        scan, draft = self._scan, self._draft
        n_clusters = scan.geometry.clusters_for(draft.size) + 1
        stored = StoredRefcounts(draft, draft.header, scan.geometry, n_clusters)

        def wrong(entries: U64Array) -> BoolArray:
            offsets = entries & np.uint64(layout.OFFSET_MASK)
            copied = (entries & np.uint64(layout.FLAG_COPIED)) != 0
            disagrees: BoolArray = copied != stored.are_one(offsets)
            disagrees &= stored.are_known(offsets)
            disagrees &= offsets != 0
            return disagrees

        def fix(entries: U64Array, bitmaps: U64Array | None) -> U64Array:
            standard = (entries & np.uint64(layout.FLAG_COMPRESSED)) == 0
            if scan.has_data_file:
                allocated = (entries & np.uint64(layout.OFFSET_MASK)) != 0
                return np.where(standard & allocated, entries | np.uint64(layout.FLAG_COPIED), entries)
            return np.where(standard & wrong(entries), entries ^ np.uint64(layout.FLAG_COPIED), entries)

        action, before, after = "correct copied flags", "copied flags disagree with the refcounts", "flags that agree"
        l1, l1_offset = scan.active_l1, draft.header.l1_table_offset
        fixed = np.where(wrong(l1), l1 ^ np.uint64(layout.FLAG_COPIED), l1)
        changed = np.flatnonzero(fixed != l1)
        if changed.size and self._is_own(l1_offset, l1.nbytes):
            self._write(l1_offset, fixed, int(changed[0]), int(changed[-1]) + 1)
            self.n_fixed += changed.size
            yield RepairStep(action, "active L1 table", l1_offset, f"{changed.size} {before}", after)
        yield from self._fix_l2_tables(scan.walk.tables, fix, action, before, after)

    def _fix_l2_tables(
        self,
        tables: U64Array,
        fix: Callable[[U64Array, U64Array | None], U64Array],
        action: str,
        before: str,
        after: str,
    ) -> Iterator[RepairStep]:
        geometry = self._scan.geometry
        cluster_size, words_each = geometry.cluster_size, geometry.cluster_size // 8
        stride = geometry.l2_entry_length // 8
        tables = tables[(tables & np.uint64(geometry.cluster_mask)) == 0]
        per_batch = max(1, _BATCH_BYTES // cluster_size)
        for start in range(0, tables.size, per_batch):
            offsets = tables[start : start + per_batch]
            words = read_l2_tables(self._draft, offsets, cluster_size)
            entries, bitmaps = split_entries(words, geometry)
            fixed = fix(entries, bitmaps)
            changed = np.flatnonzero(fixed != entries)
            if not changed.size:
                continue
            words[::stride] = fixed
            rows = changed >> geometry.l2_bits
            for row in np.unique(rows).tolist():
                offset = int(offsets[row])
                if not self._is_own(offset, cluster_size):
                    continue
                places = changed[rows == row] - (row << geometry.l2_bits)
                table = words[row * words_each : (row + 1) * words_each]
                self._write(offset, table, int(places[0]) * stride, int(places[-1]) * stride + 1)
                self.n_fixed += places.size
                yield RepairStep(action, "L2 table", offset, f"{places.size} {before}", after)

    def _write(self, offset: int, words: U64Array, first: int, stop: int) -> None:
        self._draft.write(ENTRIES, offset + first * layout.TABLE_ENTRY_LENGTH, words[first:stop].astype(">u8").tobytes())

    def _is_own(self, offset: int, length: int) -> bool:
        """No metadata of another kind lies where this table lies, so writing it harms no other table."""
        scan = self._scan
        if not offset or offset & scan.geometry.cluster_mask:
            return False
        first = offset >> scan.geometry.cluster_bits
        last = (offset + length - 1) >> scan.geometry.cluster_bits
        near = scan.mixed[np.searchsorted(scan.mixed, first) :]
        return not near.size or bool(near[0] > last)
