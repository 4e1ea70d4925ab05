"""Repairing refcounts: in place where their blocks are sound, otherwise all of them anew behind the end of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.counts import CountArray, IndexArray, U64Array, count_type, pack_refcounts
from blocklib.formats.qcow2.repair.draft import COUNTS_DOWN, COUNTS_UP, NEW
from blocklib.reports import RepairStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.repair.draft import Draft

_RUNS_TOLD: Final = 4
"""Runs of equal changes that one step describes one by one."""


class CountRepair:
    """What the counts of an image need: made from a check, then `apply` brings it into a draft."""

    def __init__(
        self, draft: Draft, scan: Scan, rescan: Callable[[], Scan], *, raises: bool, moved: IndexArray
    ) -> None:
        """`moved` are clusters that the draft has freed or taken for structures that it moved: nothing was wrong there."""
        self._draft = draft
        self._moved = moved
        self._scan = scan
        self._rescan = rescan
        self.n_raised = self.n_lowered = 0
        self.n_table_fixes = 0
        """Findings about the refcount table and its entries that are gone with it."""
        self._low, self._high = _differing(scan)
        self._raises = raises

    def apply(self) -> Iterator[RepairStep]:
        """Write the counts into the draft; the steps in words."""
        if self._raises and self._must_rebuild():
            rebuilt = _Rebuild(self._draft, self._scan, self._rescan)
            if rebuilt.fits:
                self._tell(self._low, self._high)
                self.n_table_fixes = self._scan.n_table_findings
                yield rebuilt.apply()
                return
        up = self._low[self._in_usable_blocks(self._low)] if self._raises else self._low[:0]
        down = self._high[self._in_usable_blocks(self._high)]
        self._tell(up, down)
        yield from self._change("raise refcounts", COUNTS_UP, up)
        yield from self._change("lower refcounts", COUNTS_DOWN, down)

    def _tell(self, up: IndexArray, down: IndexArray) -> None:
        self.n_raised = up.size - int(np.isin(up, self._moved).sum())
        self.n_lowered = down.size - int(np.isin(down, self._moved).sum())

    def _must_rebuild(self) -> bool:
        scan = self._scan
        if scan.n_table_findings or scan.stored.any_unknown or scan.refcounts_shared:
            return True
        return not self._in_usable_blocks(self._low).all()

    def _in_usable_blocks(self, clusters: IndexArray) -> IndexArray:
        """Positions in `clusters` of those whose refcount block exists, and is nothing else besides."""
        index = clusters >> self._scan.geometry.refcount_block_bits
        usable = self._scan.usable_blocks
        answer = np.zeros(clusters.size, dtype=bool)
        inside = index < usable.size
        answer[inside] = usable[index[inside]]
        return answer

    def _change(self, action: str, phase: int, clusters: IndexArray) -> Iterator[RepairStep]:
        if not clusters.size:
            return
        scan, geometry = self._scan, self._scan.geometry
        blocks = clusters >> geometry.refcount_block_bits
        breaks = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
        for first, stop in zip([0, *breaks], [*breaks, blocks.size]):
            block, part = int(blocks[first]), clusters[first:stop]
            offset = int(scan.stored.offsets[block])
            yield RepairStep(
                action,
                f"refcount block {block}",
                offset,
                describe(part, scan.stored.counts[part]),
                describe(part, due := np.minimum(scan.counts[part], scan.most)),
            )
            self._write(phase, offset, part - (block << geometry.refcount_block_bits), due)

    def _write(self, phase: int, offset: int, places: IndexArray, values: CountArray) -> None:
        geometry = self._scan.geometry
        raw = np.zeros(geometry.cluster_size, dtype=np.uint8)
        self._draft.read(offset, raw.data)
        counts = self._scan.stored.unpack(raw)
        counts[places] = values.astype(counts.dtype)
        packed = pack_refcounts(counts, geometry.refcount_order)
        width = geometry.refcount_bits
        first, stop = int(places[0]) * width // 8, -(-(int(places[-1]) + 1) * width // 8)
        self._draft.write(phase, offset + first, packed[first:stop])


def _differing(scan: Scan) -> tuple[IndexArray, IndexArray]:
    """The clusters that are counted too low, and those too high."""
    low, high = [], []
    for start, stop in scan.slices():
        counts, stored = np.minimum(scan.counts[start:stop], scan.most), scan.stored.counts[start:stop]
        known = scan.known(start, stop)
        low.append(np.flatnonzero((counts > stored) & known) + start)
        high.append(np.flatnonzero((counts < stored) & known) + start)
    return np.concatenate(low), np.concatenate(high)


class _Rebuild:
    """A new refcount table with new blocks, side by side behind the end of the file; the header then points there."""

    def __init__(self, draft: Draft, scan: Scan, rescan: Callable[[], Scan]) -> None:
        self._draft = draft
        self._scan = scan
        self._rescan = rescan
        self._bits = scan.geometry.refcount_block_bits
        self._blocks = self._used_blocks(scan)
        self._place()
        table_length = self._table_clusters << scan.geometry.cluster_bits
        self.fits = table_length <= layout.MAX_REFCOUNT_TABLE_BYTES

    def _used_blocks(self, scan: Scan) -> set[int]:
        """Refcount blocks with a count that is not zero, the old refcount structures left out."""
        references = scan.refcount_references(scan.end)
        blocks: set[int] = set()
        for start, stop in scan.slices():
            clusters = np.flatnonzero(scan.counts[start:stop] != references[start:stop]) + start
            blocks.update(np.unique(clusters >> self._bits).tolist())
        return blocks

    def _place(self) -> None:
        """Where table and blocks go; they count themselves, which may take more blocks."""
        geometry = self._scan.geometry
        while True:
            indexed = (max(self._blocks, default=0) + 1) * layout.TABLE_ENTRY_LENGTH
            self._table_clusters = geometry.clusters_for(indexed)
            n_clusters = self._table_clusters + len(self._blocks)
            self.start = self._draft.room_for(self._scan, n_clusters)
            self.end = self.start + n_clusters
            # From the old end on, since entries that pointed behind it now point into the file.
            needed = set(range(self._scan.end >> self._bits, ((self.end - 1) >> self._bits) + 1))
            if needed <= self._blocks:
                return
            self._blocks |= needed

    def apply(self) -> RepairStep:
        draft, scan, geometry = self._draft, self._scan, self._scan.geometry
        bits = geometry.cluster_bits
        old = f"{draft.header.refcount_table_clusters} clusters at {draft.header.refcount_table_offset:#x}"
        draft.write(NEW, (self.end << bits) - 1, b"\0")
        if scan.clusters_beyond.size and int(scan.clusters_beyond[0]) < self.end:
            scan = self._rescan()
        end = min(scan.end, self.end)
        references = scan.refcount_references(end)
        table = np.zeros(self._table_clusters << (bits - 3), dtype=np.uint64)
        per_block = geometry.refcount_block_entries
        for number, block in enumerate(sorted(self._blocks)):
            offset = (self.start + self._table_clusters + number) << bits
            table[block] = offset
            values = np.zeros(per_block, dtype=count_type(geometry.refcount_order))
            first = block * per_block
            part = slice(first, min(first + per_block, end))
            counts = np.minimum(scan.counts[part] - references[part], scan.most)
            values[: counts.size] = counts.astype(values.dtype)
            values[max(0, self.start - first) : max(0, self.end - first)] = 1
            draft.write(NEW, offset, pack_refcounts(values, geometry.refcount_order))
        draft.write(NEW, self.start << bits, table.astype(">u8").tobytes())
        draft.header.refcount_table_offset = self.start << bits
        draft.header.refcount_table_clusters = self._table_clusters
        place = layout.FIELD_OFFSETS["refcount_table_offset"]
        new = f"{self._table_clusters} clusters at {self.start << bits:#x}, with {len(self._blocks)} refcount blocks"
        return RepairStep("rebuild refcounts", "refcount table", place, old, new)


def describe(clusters: IndexArray, values: CountArray | U64Array) -> str:
    """'clusters 5-8: 1, cluster 12: 0', shortened where it would be long."""
    same = (np.diff(clusters) == 1) & (values[1:] == values[:-1])
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
