"""What a repair of a qcow2 image would change: refcounts, missing refcount blocks, copied flags.  Nothing is written here.

A repair never guesses.  It changes a count only in a refcount block that nothing else uses, lowers counts only when every
reference of the image could be followed (a cluster without references may be what a damaged entry meant), and corrects the
flag of an entry only when the count of its cluster will be right.  The rest stays, and the check after it says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check_counts import BoolArray, CountArray, IndexArray, U64Array, pack_refcounts
from blocklib.formats.qcow2.check_l2 import read_l2_tables
from blocklib.formats.qcow2.check_stored import read_entries
from blocklib.reports import RepairStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklib.formats.qcow2.check_scan import Scan

What = Literal["leaks", "all"]

_ACTIVE_L1: Final = "active L1 table"
_BATCH_BYTES: Final = 2 << 20
_RUNS_TOLD: Final = 4
"""Runs of equal changes that one step describes one by one."""


class CountChanges:
    """New refcounts: `values[i]` for host cluster `clusters[i]`, ascending."""

    __slots__ = ("clusters", "values")

    def __init__(self, clusters: IndexArray, values: U64Array) -> None:
        self.clusters = clusters
        self.values = values

    def by_block(self, block_bits: int) -> Iterator[tuple[int, IndexArray, U64Array]]:
        """(refcount block, entries in it, their new values) for each block with changes."""
        if not self.clusters.size:
            return
        blocks = self.clusters >> block_bits
        breaks = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
        for first, stop in zip([0, *breaks], [*breaks, blocks.size]):
            block = int(blocks[first])
            yield block, self.clusters[first:stop] - (block << block_bits), self.values[first:stop]


class FlagFixes:
    """Corrects the copied flags of table entries so that they agree with the counts that a repair leaves."""

    def __init__(self, scan: Scan, target: CountArray) -> None:
        self._scan = scan
        self._target = target

    def fix(self, entries: U64Array, *, reserved: int) -> tuple[U64Array, int]:
        """(the entries with correct flags, how many flags are wrong and have to stay).

        `reserved` are the bits that make an entry doubtful: it is left as it is, and was counted as damaged before.
        """
        scan = self._scan
        offsets = entries & np.uint64(layout.OFFSET_MASK)
        doubtful = np.uint64(reserved | layout.FLAG_COMPRESSED)
        sound = ((entries & doubtful) == 0) & (offsets != 0)
        sound &= (offsets & np.uint64(scan.geometry.cluster_mask)) == 0
        is_external = scan.header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE
        if is_external and reserved == layout.L2_RESERVED_MASK:  # of a data file, every cluster is its entry's own
            return np.where(sound, entries | np.uint64(layout.FLAG_COPIED), entries), 0
        sound &= ~scan.beyond(offsets)
        places = np.flatnonzero(sound)
        clusters = (offsets[places] >> np.uint64(scan.geometry.cluster_bits)).astype(np.intp)
        target = self._target[clusters]
        copied = (entries[places] & np.uint64(layout.FLAG_COPIED)) != 0
        wrong = copied != (target == 1)
        settled = target == scan.counts[clusters]
        fixed = entries.copy()
        fixed[places[wrong & settled]] ^= np.uint64(layout.FLAG_COPIED)
        return fixed, int(np.count_nonzero(wrong & ~settled))


class RepairPlan:
    """All changes of a repair, in the order in which they have to reach the disk."""

    def __init__(self, scan: Scan, what: What) -> None:
        self.scan = scan
        self.what = what
        self.new_blocks: dict[int, int] = {}
        """Refcount table index -> the host cluster where its new block goes."""
        self.flag_tables: list[tuple[str, int, int]] = []
        """(structure, host offset, number of wrong flags) of each table with flags to correct."""
        self._flags_left = 0
        self._usable = scan.usable_blocks
        self._missing = self.scan.stored.table == 0
        self._plan_counts()
        self._plan_flags()

    # -- counts -------------------------------------------------------------------------------------------------------

    def _plan_counts(self) -> None:
        scan = self.scan
        counts, stored = np.minimum(scan.counts[: scan.end], scan.most), scan.stored.counts[: scan.end]
        low = np.flatnonzero(counts > stored)
        high = np.flatnonzero(counts < stored)
        if self.what == "all":
            self.new_blocks = self._place_new_blocks(low)
        writable = self._usable.copy()
        writable[list(self.new_blocks)] = True
        up = low[self._in(low, writable)]
        down = high[self._in(high, self._usable)]
        if self.what == "leaks":
            up = up[:0]
        if scan.references_lost:
            down = down[:0]
        self.n_raised, self.n_lowered = up.size, down.size
        self.low_left, self.high_left = low.size - up.size, high.size - down.size
        self.target = scan.stored.counts.copy()
        self.target[up] = counts[up]
        self.target[down] = counts[down]
        self.lowered = CountChanges(down, counts[down].astype(np.uint64))
        new = np.array(list(self.new_blocks.values()), dtype=np.intp)
        raised = np.concatenate((counts[up].astype(np.uint64), np.ones(new.size, dtype=np.uint64)))
        self.raised = CountChanges(np.concatenate((up, new)), raised)
        self._flags_follow = bool((counts[up] > 0).any() or (counts[down] > 0).any())

    def _in(self, clusters: IndexArray, blocks: BoolArray) -> BoolArray:
        """For each cluster what `blocks` says of its refcount block; False where the refcount table has no entry."""
        index = clusters >> self.scan.geometry.refcount_block_bits
        answer = np.zeros(clusters.size, dtype=bool)
        inside = index < blocks.size
        answer[inside] = blocks[index[inside]]
        return answer

    def _place_new_blocks(self, low: IndexArray) -> dict[int, int]:
        """Where blocks go that do not exist although clusters they would count are in use: behind the end of the file.

        They are counted by each other or by blocks that exist.  All or none: where there is no room in the refcount table,
        where they could not be counted, or where a damaged entry may point at just that place, the answer is empty.
        """
        scan = self.scan
        block_bits = scan.geometry.refcount_block_bits
        pending = np.unique(low[self._in(low, self._missing)] >> block_bits).tolist()
        if scan.references_lost or not (self._missing | self._usable).all():
            return {}
        placed: dict[int, int] = {}
        wanted = set(pending)
        for block in pending:  # grows while it is walked
            placed[block] = scan.end + len(placed)
            counted_by = placed[block] >> block_bits
            if counted_by >= self._missing.size:
                return {}
            if self._missing[counted_by] and counted_by not in wanted:
                wanted.add(counted_by)
                pending.append(counted_by)
        return placed

    # -- flags --------------------------------------------------------------------------------------------------------

    def _plan_flags(self) -> None:
        scan = self.scan
        if not (scan.wrong_flags or self._flags_follow):
            return
        offset = scan.header.l1_table_offset
        fixes = FlagFixes(scan, self.target)
        fixed, left = fixes.fix(scan.active_l1, reserved=layout.L1_RESERVED_MASK)
        self._flags_left += left
        self._note_flags(_ACTIVE_L1, offset, scan.active_l1, fixed)
        cluster_size, per_table = scan.geometry.cluster_size, scan.geometry.l2_entries
        tables = scan.walk.tables
        per_batch = max(1, _BATCH_BYTES // cluster_size)
        for start in range(0, tables.size, per_batch):
            offsets = tables[start : start + per_batch]
            entries = read_l2_tables(scan.file, offsets, cluster_size)
            fixed, left = fixes.fix(entries, reserved=layout.L2_RESERVED_MASK)
            self._flags_left += left
            if not left and (fixed == entries).all():
                continue
            for row, offset in enumerate(offsets.tolist()):
                part = slice(row * per_table, (row + 1) * per_table)
                self._note_flags("L2 table", offset, entries[part], fixed[part])

    def _note_flags(self, structure: str, offset: int, entries: U64Array, fixed: U64Array) -> None:
        wrong = int(np.count_nonzero(entries != fixed))
        if wrong and self._is_own(offset):
            self.flag_tables.append((structure, offset, wrong))
        else:
            self._flags_left += wrong

    def _is_own(self, table_offset: int) -> bool:
        """Nothing else lies where this table lies, so writing it harms nothing."""
        scan = self.scan
        if table_offset & scan.geometry.cluster_mask or not table_offset:
            return False
        length = scan.active_l1.nbytes if table_offset == scan.header.l1_table_offset else scan.geometry.cluster_size
        first = table_offset >> scan.geometry.cluster_bits
        last = (table_offset + length - 1) >> scan.geometry.cluster_bits
        near = scan.shared[np.searchsorted(scan.shared, first) :]
        return not near.size or bool(near[0] > last)

    # -- as bytes -----------------------------------------------------------------------------------------------------

    def count_writes(self, changes: CountChanges) -> Iterator[tuple[int, bytes]]:
        """(host offset, bytes) for each refcount block with changes, from what is on disk now."""
        geometry, stored = self.scan.geometry, self.scan.stored
        width = geometry.refcount_bits
        for block, places, values in changes.by_block(geometry.refcount_block_bits):
            offset = self._block_offset(block)
            counts = stored.load_block(offset)  # a new one reads as zero, past the end of the file
            counts[places] = values.astype(counts.dtype)
            raw = pack_refcounts(counts, geometry.refcount_order)
            first, stop = int(places[0]) * width // 8, -(-(int(places[-1]) + 1) * width // 8)
            yield (offset, raw) if block in self.new_blocks else (offset + first, raw[first:stop])

    def link_writes(self) -> Iterator[tuple[int, bytes]]:
        """The refcount table entries of the new blocks."""
        for block in self.new_blocks:
            place = self.scan.header.refcount_table_offset + block * layout.TABLE_ENTRY_LENGTH
            yield place, self._block_offset(block).to_bytes(layout.TABLE_ENTRY_LENGTH, "big")

    def flag_writes(self) -> Iterator[tuple[int, bytes]]:
        """The changed part of each table with flags to correct."""
        scan = self.scan
        fixes = FlagFixes(scan, self.target)
        for structure, offset, _ in self.flag_tables:
            is_l1 = structure == _ACTIVE_L1
            n_entries = scan.active_l1.size if is_l1 else scan.geometry.l2_entries
            entries = read_entries(scan.file, offset, n_entries)
            reserved = layout.L1_RESERVED_MASK if is_l1 else layout.L2_RESERVED_MASK
            fixed, _ = fixes.fix(entries, reserved=reserved)
            changed = np.flatnonzero(fixed != entries)
            first, stop = int(changed[0]), int(changed[-1]) + 1
            yield offset + first * layout.TABLE_ENTRY_LENGTH, fixed[first:stop].astype(">u8").tobytes()

    def _block_offset(self, block: int) -> int:
        """Where the refcount block of that refcount table entry is, or will be."""
        if block in self.new_blocks:
            return self.new_blocks[block] << self.scan.geometry.cluster_bits
        return int(self.scan.stored.offsets[block])

    # -- telling ------------------------------------------------------------------------------------------------------

    @property
    def n_flags(self) -> int:
        return sum(wrong for _, _, wrong in self.flag_tables)

    @property
    def changes_tables(self) -> bool:
        return bool(self.n_raised or self.n_lowered or self.flag_tables)

    @property
    def counts_will_suffice(self) -> bool:
        """No cluster in use will have too low a count, nor one that is not known."""
        return not (self.low_left or self.scan.findings.totals["check-error"])

    @property
    def will_be_clean(self) -> bool:
        left = self.low_left or self.high_left or self._flags_left
        return not (left or self.scan.findings.beyond_repair or self.scan.shared.size)

    def steps(self) -> Iterator[RepairStep]:
        """The changes in words, in the order in which they are made; those of the header are the caller's."""
        scan = self.scan
        yield from self._count_steps("raise refcounts", self.raised)
        for block, cluster in self.new_blocks.items():
            place = scan.header.refcount_table_offset + block * layout.TABLE_ENTRY_LENGTH
            after = f"a new refcount block at {cluster << scan.geometry.cluster_bits:#x}"
            yield RepairStep("link refcount block", f"refcount table entry {block}", place, "no refcount block", after)
        for structure, offset, wrong in self.flag_tables:
            before = f"{wrong} copied flags disagree with the refcounts"
            yield RepairStep("correct copied flags", structure, offset, before, "flags that agree")
        yield from self._count_steps("lower refcounts", self.lowered)

    def _count_steps(self, action: str, changes: CountChanges) -> Iterator[RepairStep]:
        geometry = self.scan.geometry
        for block, places, values in changes.by_block(geometry.refcount_block_bits):
            first = block << geometry.refcount_block_bits
            clusters = places + first
            inside = clusters < self.scan.stored.counts.size
            before = np.zeros(clusters.size, dtype=np.uint64)
            before[inside] = self.scan.stored.counts[clusters[inside]]
            before_text, after_text = _describe(clusters, before), _describe(clusters, values)
            yield RepairStep(action, f"refcount block {block}", self._block_offset(block), before_text, after_text)


def _describe(clusters: IndexArray, values: U64Array) -> str:
    """'clusters 5-8: 1, cluster 12: 0', shortened where it would be long."""
    same = (np.diff(clusters) == 1) & (np.diff(values) == 0)
    breaks = (np.flatnonzero(~same) + 1).tolist()
    runs = list(zip([0, *breaks[:_RUNS_TOLD]], [*breaks, clusters.size]))
    texts = []
    for first, stop in runs[:_RUNS_TOLD]:
        start, last = int(clusters[first]), int(clusters[stop - 1])
        name = f"cluster {start}" if start == last else f"clusters {start}-{last}"
        texts.append(f"{name}: {int(values[first])}")
    if len(breaks) >= _RUNS_TOLD:
        texts.append(f"and {clusters.size - runs[_RUNS_TOLD - 1][1]} more")
    return ", ".join(texts)
