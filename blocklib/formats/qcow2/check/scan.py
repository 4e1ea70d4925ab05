"""One pass over all metadata of an image: who refers to which host cluster, and what is wrong with the references.

Python is spent per table, numpy on their entries.  Every distinct L2 table is read once however often it is used, in the
order of the file; its findings then count as often as tables lead to it.  What is counted, and how often, follows
``qemu-img check`` (found by damaging images and comparing).
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from blocklib._fast.check import agreeing
from blocklib.errors import ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.bitmaps import BitmapScan
from blocklib.formats.qcow2.check.counts import (
    BoolArray,
    CountArray,
    IndexArray,
    U64Array,
    add_references,
    merge_weights,
)
from blocklib.formats.qcow2.check.l2 import L2Walk, describe_flag
from blocklib.formats.qcow2.check.snapshots import load_snapshot_tables
from blocklib.formats.qcow2.check.stored import ImageFile, StoredRefcounts, read_entries
from blocklib.reports import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blocklib.formats.qcow2.check.findings import Findings, Kind
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header

_MAX_WEIGHT: Final = 1 << 31
"""More users of one table than this are not told apart: it keeps every sum exact."""
_PENDING: Final = 1 << 20
"""L1 entries that are collected before equal ones are merged."""
_L1_PART: Final = 1 << 18
"""L1 entries that are looked at together: a table may have four million of them."""
_SECTOR: Final = 512
_ENCRYPTION_POINTER: Final = struct.Struct(layout.ENCRYPTION_EXTENSION_FORMAT)
_SLICE: Final = 1 << 20
"""Clusters compared at a time."""


class Scan:
    """Counts references while it runs; afterwards holds what a report and a repair need.

    Host clusters are numbered from the start of the file.  `n_clusters` of them lie in the file, the last one perhaps
    in part; a structure may reach up to one cluster past the end of the file, so the arrays have one element more.
    """

    def __init__(
        self,
        file: ImageFile,
        header: Header,
        geometry: Geometry,
        findings: Findings,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self.file = file
        self.header = header
        self.geometry = geometry
        self.findings = findings
        self.file_size = -(-file.size // _SECTOR) * _SECTOR
        """In whole sectors: that is how ``qemu-img check`` measures what reaches past the end."""
        self.n_clusters = geometry.clusters_for(self.file_size)
        try:
            self.stored = StoredRefcounts(file, header, geometry, self.n_clusters + 1)
            self.counts: CountArray = np.zeros(self.n_clusters + 1, dtype=np.uint32)
        except MemoryError as exc:
            raise ImageLimitError(
                f"counting the {self.n_clusters} clusters of the file takes more memory than there is",
                structure="image file",
                expected="a file whose clusters can be counted in memory",
                found=f"{self.n_clusters} clusters",
            ) from exc
        self.has_data_file = bool(header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE)
        """Guest clusters lie in another file, where nothing counts them."""
        self.highest_cluster = 0
        self.shared: IndexArray = np.empty(0, dtype=np.intp)
        """Clusters of metadata that something else refers to as well, ascending."""
        self.mixed: IndexArray = np.empty(0, dtype=np.intp)
        """Clusters that hold metadata of two kinds, ascending."""
        self.n_table_findings = 0
        """What is wrong with the refcount table: its place, and its entries."""
        self.active_l1: U64Array = np.empty(0, dtype=np.uint64)
        self.n_too_low = 0
        """Clusters with more references than the stored count says."""
        self.n_wrong_flags = 0
        """How often a copied flag of an active table contradicts the stored count."""
        self.usable_blocks: BoolArray = np.empty(0, dtype=bool)
        """For each refcount table entry: its block is where it should be and nothing else is there."""
        self.walk = L2Walk(self, progress)
        self._n_references = 0
        self._roles: list[tuple[str, U64Array, U64Array]] = []
        none = np.empty(0, dtype=np.uint64)
        self._l2_uses: list[tuple[U64Array, U64Array, U64Array]] = [(none, none, none)]
        self._n_pending = 0  # entries in `_l2_uses`
        self._beyond: list[U64Array] = []
        self._refcount_uses: list[tuple[U64Array, U64Array]] = []
        self._run()

    @property
    def end(self) -> int:
        """The first cluster after everything: the end of the file, or of a structure that reaches past it."""
        return self.n_clusters + int(self.counts[self.n_clusters] > 0)

    @property
    def counts_suffice(self) -> bool:
        """No cluster in use has too low a count, or one that is not known: nothing can be overwritten by mistake."""
        return not (self.n_too_low or self.findings.totals["check-error"])

    def _run(self) -> None:
        header, cluster_size = self.header, self.geometry.cluster_size
        self.count_region("header", 0, cluster_size, role="header")
        self._count_l1(header.l1_table_offset, header.l1_size, "active L1 table", active=True)
        self._count_snapshots()
        self.walk.run(*self._merged_l2_uses())
        self._count_encryption_header()
        self.bitmaps = BitmapScan(self)
        table_length = header.refcount_table_clusters * cluster_size
        structure = "refcount table"
        if not self.count_region(structure, header.refcount_table_offset, table_length, role=structure, repairable=True):
            self.n_table_findings += 1
        elif table_length:
            first = header.refcount_table_offset >> self.geometry.cluster_bits
            clusters = np.arange(first, first + header.refcount_table_clusters, dtype=np.uint64)
            self._refcount_uses.append((clusters, np.ones_like(clusters)))
        self._count_refcount_blocks()
        self._find_overflows()
        self._find_shared()
        self.usable_blocks = self._find_usable_blocks()
        self._compare()

    # -- counting -----------------------------------------------------------------------------------------------------

    def add(self, clusters: IndexArray, weights: U64Array | None = None) -> None:
        """Count references to clusters, all of them below `n_clusters + 1`."""
        self._n_references += clusters.size if weights is None else int(weights.sum())
        if self.counts.dtype != np.uint64 and self._n_references >= 1 << 32:
            self.counts = self.counts.astype(np.uint64)
        add_references(self.counts, clusters, weights)

    def has_room_for(self, references: int) -> bool:
        """Whether so many more, counted by a kernel, fit the counts as they are."""
        return self.counts.dtype == np.uint32 and self._n_references + references < 1 << 32

    def note_counted(self, references: int) -> None:
        """So many were counted by a kernel."""
        self._n_references += references

    def count_region(
        self, structure: str, offset: int, length: int, *, role: str, times: int = 1, repairable: bool = False
    ) -> bool:
        """Count a contiguous structure; False (and a finding) if it ends a whole cluster or more past the file's end."""
        if not length:
            return True
        if offset + length >= self.file_size + self.geometry.cluster_size:
            expected, found = f"inside the file of {self.file_size} bytes", f"{length} bytes at {offset:#x}"
            self.findings.add("corruption", structure, offset, expected, found, times=times, repairable=repairable)
            return False
        bits = self.geometry.cluster_bits
        clusters = np.arange(offset >> bits, ((offset + length - 1) >> bits) + 1, dtype=np.intp)
        self.add(clusters, None if times == 1 else np.full(clusters.size, times, dtype=np.uint64))
        self.set_role(role, clusters.astype(np.uint64), np.full(clusters.size, times, dtype=np.uint64))
        return True

    def set_role(self, role: str, clusters: U64Array, references: U64Array) -> None:
        """These clusters hold metadata of one kind, which accounts for so many references to each of them."""
        self._roles.append((role, clusters, references))

    def clusters_of(self, role: str) -> list[int]:
        """The host clusters with metadata of that kind."""
        return [cluster for name, clusters, _ in self._roles if name == role for cluster in clusters.tolist()]

    def beyond(self, offsets: U64Array) -> BoolArray:
        """Which clusters, by host offset, lie a whole cluster or more past the end of the file."""
        return offsets >= np.uint64(self.file_size)

    def note_beyond(self, offsets: U64Array) -> None:
        """Damaged entries point there: a repair that makes the file longer puts nothing in these places."""
        self._beyond.append(np.unique(offsets >> np.uint64(self.geometry.cluster_bits)))

    @cached_property
    def clusters_beyond(self) -> U64Array:
        """Host clusters past the end of the file that entries point at, ascending; all are known when the scan is made."""
        return np.unique(np.concatenate(self._beyond)) if self._beyond else np.empty(0, dtype=np.uint64)

    # -- L1 tables ----------------------------------------------------------------------------------------------------

    def _count_snapshots(self) -> None:
        header = self.header
        mask = self.geometry.cluster_mask
        tables = load_snapshot_tables(self.file, header, mask, self.findings)
        budget = self.file_size  # the tables of honest snapshots lie side by side in it
        for (offset, n_entries), times in tables.l1_tables.items():
            budget -= max(0, min(n_entries * layout.TABLE_ENTRY_LENGTH, self.file_size - offset))
            if budget < 0:
                found = "more bytes of them than the file has"
                self.findings.add("check-error", "snapshot L1 tables", None, "tables that do not overlap", found)
                break
            self._count_l1(offset, n_entries, "snapshot L1 table", active=False, times=times)
        structure = "snapshot table"
        self.count_region(structure, header.snapshots_offset, tables.length, role=structure)

    def _count_l1(self, offset: int, n_entries: int, structure: str, *, active: bool, times: int = 1) -> None:
        self.count_region(structure, offset, n_entries * layout.TABLE_ENTRY_LENGTH, role=structure, times=times)
        table = read_entries(self.file, offset, n_entries)
        if active:
            self.active_l1 = table
        for start in range(0, table.size, _L1_PART):
            part = table[start : start + _L1_PART]
            self._count_l1_part(offset + start * layout.TABLE_ENTRY_LENGTH, part, structure, active=active, times=times)

    def _count_l1_part(self, offset: int, table: U64Array, structure: str, *, active: bool, times: int) -> None:
        places = np.flatnonzero(table)
        if not places.size:
            return
        entries = table[places]
        l2_offsets = entries & np.uint64(layout.OFFSET_MASK)
        reserved = (entries & np.uint64(layout.L1_RESERVED_MASK)) != 0
        beyond = self.beyond(l2_offsets)
        unaligned = (l2_offsets & np.uint64(self.geometry.cluster_mask)) != 0

        def tell(wrong: BoolArray, expected: str) -> None:
            if wrong.any():

                def describe(place: int) -> Finding:
                    host_offset, found = offset + place * layout.TABLE_ENTRY_LENGTH, f"{int(table[place]):#x}"
                    return Finding("corruption", f"entry of the {structure}", host_offset, expected, found, False)

                wrong_places = places[wrong]
                self.findings.add_each("corruption", wrong_places, describe, times=wrong_places.size * times)

        tell(reserved, "reserved bits clear")
        tell(beyond, f"an L2 table inside the file of {self.file_size} bytes")
        tell(unaligned, "a cluster aligned L2 table")
        if active:
            self._check_l1_flags(offset, table, places, l2_offsets)
        if beyond.any():
            self.note_beyond(l2_offsets[beyond])
        self._use_l2_tables(l2_offsets[~beyond], active, times)

    def _check_l1_flags(self, offset: int, table: U64Array, places: IndexArray, l2_offsets: U64Array) -> None:
        copied = (table[places] & np.uint64(layout.FLAG_COPIED)) != 0
        wrong = (copied != self.stored.are_one(l2_offsets)) & (l2_offsets != 0)
        if self.stored.any_unknown:
            wrong &= self.stored.are_known(l2_offsets)

        def describe(place: int) -> Finding:
            flag = int(table[place]) & layout.FLAG_COPIED
            host_offset, expected = offset + place * layout.TABLE_ENTRY_LENGTH, describe_flag(not flag)
            return Finding("corruption", "entry of the active L1 table", host_offset, expected, f"{int(table[place]):#x}")

        wrong_places = places[wrong]
        self.n_wrong_flags += wrong_places.size
        self.findings.add_each("corruption", wrong_places, describe, times=wrong_places.size, repairable=True)

    def _use_l2_tables(self, l2_offsets: U64Array, active: bool, times: int) -> None:
        bits = np.uint64(self.geometry.cluster_bits)
        clusters = (l2_offsets >> bits).astype(np.intp)
        weights = np.full(l2_offsets.size, times, dtype=np.uint64)
        self.add(clusters, None if times == 1 else weights)
        astride = (l2_offsets & np.uint64(self.geometry.cluster_mask)) != 0
        self.add(clusters[astride] + 1, None if times == 1 else weights[astride])
        if not astride.any() and self.n_clusters <= l2_offsets.size:  # they cannot all be different
            uses = np.bincount(clusters)
            distinct = np.flatnonzero(uses).astype(np.uint64)
            l2_offsets, weights = distinct << bits, uses[distinct].astype(np.uint64) * np.uint64(times)
        self._l2_uses.append((l2_offsets, weights, weights if active else np.zeros_like(weights)))
        self._n_pending += l2_offsets.size
        if self._n_pending > _PENDING:
            self._l2_uses = [self._merged_l2_uses()]
            self._n_pending = self._l2_uses[0][0].size

    def _merged_l2_uses(self) -> tuple[U64Array, U64Array, U64Array]:
        """(host offsets of the L2 tables, ascending; how many L1 entries use each; how many active ones)."""
        columns = (np.concatenate(column) for column in zip(*self._l2_uses))
        offsets, uses, active_uses = merge_weights(*columns)
        most = np.uint64(_MAX_WEIGHT)
        return offsets, np.minimum(uses, most), np.minimum(active_uses, most)

    def _count_encryption_header(self) -> None:
        data = self.header.extension(layout.EXTENSION_ENCRYPTION)
        if data is not None:
            offset, length = _ENCRYPTION_POINTER.unpack(data)
            self.count_region("encryption header", offset, length, role="encryption header")

    # -- refcount structures ------------------------------------------------------------------------------------------

    def _count_refcount_blocks(self) -> None:
        table, offsets = self.stored.table, self.stored.offsets
        bits = np.uint64(self.geometry.cluster_bits)
        reserved = (table & np.uint64(layout.REFCOUNT_TABLE_RESERVED_MASK)) != 0
        unaligned = (offsets & np.uint64(self.geometry.cluster_mask)) != 0
        # Reserved bits may be those of an unaligned offset, and what is unaligned is looked at no further.
        beyond = (offsets >> bits >= np.uint64(self.end)) & ~unaligned & ~reserved
        self._tell_table(reserved, "reserved bits clear")
        self._tell_table(unaligned & ~reserved, "a cluster aligned refcount block")
        self._tell_table(beyond, f"a refcount block inside the file of {self.file_size} bytes")
        usable = np.flatnonzero((offsets != 0) & ~reserved & ~unaligned & ~beyond)
        clusters, first, uses = np.unique(offsets[usable] >> bits, return_index=True, return_counts=True)
        used_otherwise = self.counts[clusters.astype(np.intp)] > 0
        wrong = np.ones(usable.size, dtype=bool)
        wrong[first[~used_otherwise]] = False
        if self.geometry.max_refcount > 1:  # otherwise it is the count that overflows
            places = np.zeros(table.size, dtype=bool)
            places[usable[wrong]] = True
            self._tell_table(places, "a refcount block that nothing else uses")
        self._refcount_uses.append((clusters, uses.astype(np.uint64)))
        self.add(clusters.astype(np.intp), uses.astype(np.uint64))
        self.set_role("refcount block", clusters, np.ones(clusters.size, dtype=np.uint64))

    def _tell_table(self, wrong: BoolArray, expected: str) -> None:
        places = np.flatnonzero(wrong)

        def describe(place: int) -> Finding:
            host_offset = self.header.refcount_table_offset + place * layout.TABLE_ENTRY_LENGTH
            found = f"{int(self.stored.table[place]):#x}"
            return Finding("corruption", "refcount table entry", host_offset, expected, found)

        self.n_table_findings += places.size
        self.findings.add_each("corruption", places, describe, times=places.size, repairable=True)

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _find_overflows(self) -> None:
        """More references than a refcount of this width can say: each one too many is a corruption."""
        most = self.geometry.max_refcount
        if self.counts.max() > most:  # looked at first: the array of answers would have an element for every cluster
            places = np.flatnonzero(self.counts > most)
            excess = int((self.counts[places] - self.counts.dtype.type(most)).sum(dtype=np.uint64))

            def describe(place: int) -> Finding:
                expected, found = f"at most {most} references", f"{int(self.counts[place])}"
                return Finding("corruption", "host cluster", self._offset(place), expected, found, False)

            self.findings.add_each("corruption", places, describe, times=excess)

    def _find_shared(self) -> None:
        """Metadata that guest data, or metadata of another kind, lies on; a stored count that agrees makes it no better."""
        parts, held = [], []
        for role in dict.fromkeys(role for role, _, _ in self._roles):
            clusters, references = merge_weights(
                np.concatenate([clusters for name, clusters, _ in self._roles if name == role]),
                np.concatenate([references for name, _, references in self._roles if name == role]),
            )
            places = clusters.astype(np.intp)
            held.append(places)
            parts.append(places[self.counts[places] != references])
        self.shared = np.unique(np.concatenate(parts))
        distinct, n_roles = np.unique(np.concatenate(held), return_counts=True)
        self.mixed = distinct[n_roles > 1]
        if not self.shared.size:
            return
        agreed = self.shared[self.stored.counts[self.shared] == self.counts[self.shared]]

        def describe(place: int) -> Finding:
            expected, found = "metadata that nothing else uses", f"{int(self.counts[place])} references"
            return Finding("corruption", "host cluster", self._offset(place), expected, found, False)

        self.findings.add_each("corruption", agreed, describe, times=agreed.size)

    @property
    def refcounts_shared(self) -> bool:
        """Something else lies on the refcount table or on a refcount block."""
        return bool((self.refcount_references(self.end)[self.shared[self.shared < self.end]] != 0).any())

    def refcount_references(self, end: int) -> CountArray:
        """For each cluster below `end`: how many of its references are those of the refcount table and its blocks."""
        references = np.zeros(end, dtype=self.counts.dtype)
        for clusters, uses in self._refcount_uses:
            places = clusters.astype(np.intp)
            inside = places < end
            references[places[inside]] += uses[inside].astype(references.dtype)
        return references

    def _find_usable_blocks(self) -> BoolArray:
        stored = self.stored
        usable: BoolArray = (stored.offsets != 0) & ~stored.unknown & ~self.beyond(stored.offsets)
        usable &= (stored.table & np.uint64(layout.REFCOUNT_TABLE_RESERVED_MASK)) == 0
        clusters = stored.offsets[usable] >> np.uint64(self.geometry.cluster_bits)
        usable[usable] = ~np.isin(clusters.astype(np.intp), self.shared)
        return usable

    def slices(self) -> Iterator[tuple[int, int]]:
        """All clusters, some at a time: an array with an element for each is large where a sparse file claims to be."""
        for start in range(0, self.end, _SLICE):
            yield start, min(start + _SLICE, self.end)

    def _compare(self) -> None:
        """Stored counts against references, cluster by cluster."""
        if self._counts_agree():
            return
        for start, stop in self.slices():
            stored = self.stored.counts[start:stop]
            counts = np.minimum(self.counts[start:stop], self.most)
            known = self._known(start, stop)
            used = (stored | counts) != 0
            if known is not None:
                unknown = np.flatnonzero(~known) + start
                self.findings.add_each("check-error", unknown, self._describe_unknown, times=unknown.size)
                used &= known
            if used.any():
                self.highest_cluster = start + int(np.flatnonzero(used)[-1])
            wrong = stored != counts
            if known is not None:
                wrong &= known
            if wrong.any():
                self._tell_wrong(np.flatnonzero(wrong) + start)

    def _counts_agree(self) -> bool:
        """Whether a kernel finds that all do, so that there is nothing to tell; `highest_cluster` is then known."""
        if self.stored.any_unknown or self.counts.dtype != np.uint32:
            return False
        stored = self.stored.counts
        last = agreeing(stored, stored.itemsize, self.counts, self.end, int(self.most))
        if last is None:
            return False
        self.highest_cluster = max(last, 0)
        return True

    @property
    def most(self) -> np.unsignedinteger[Any]:
        """The largest refcount that the image can store, or that `counts` can hold."""
        return self.counts.dtype.type(min(self.geometry.max_refcount, np.iinfo(self.counts.dtype).max))

    def known(self, start: int, stop: int) -> BoolArray:
        """For each of these clusters: could its stored count be read?"""
        known = self._known(start, stop)
        return np.ones(stop - start, dtype=bool) if known is None else known

    def _known(self, start: int, stop: int) -> BoolArray | None:
        if not self.stored.any_unknown:
            return None
        blocks = np.arange(start, stop) >> self.geometry.refcount_block_bits
        known = np.ones(stop - start, dtype=bool)
        counted = blocks < self.stored.unknown.size
        known[counted] = ~self.stored.unknown[blocks[counted]]
        return known

    def _tell_wrong(self, places: IndexArray) -> None:
        too_high = self.stored.counts[places] > self.counts[places]
        leaks, low = places[too_high], places[~too_high]
        self.n_too_low += low.size
        self.findings.add_each("leak", leaks, self._describe_leak, times=leaks.size, repairable=True)
        self.findings.add_each("corruption", low, self._describe_low, times=low.size, repairable=True)

    def _describe_leak(self, place: int) -> Finding:
        return self._describe_count("leak", place)

    def _describe_low(self, place: int) -> Finding:
        return self._describe_count("corruption", place)

    def _describe_count(self, kind: Kind, place: int) -> Finding:
        expected, found = str(int(self.counts[place])), str(int(self.stored.counts[place]))
        return Finding(kind, "refcount of a host cluster", self._offset(place), expected, found)

    def _describe_unknown(self, place: int) -> Finding:
        expected = str(int(self.counts[place]))
        structure, host_offset = "refcount of a host cluster", self._offset(place)
        return Finding("check-error", structure, host_offset, expected, "a refcount block that cannot be read")

    def _offset(self, cluster: int) -> int:
        return cluster << self.geometry.cluster_bits
