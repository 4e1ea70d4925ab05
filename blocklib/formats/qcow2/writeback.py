"""The order that survives any crash: what a flush writes, and when a freed cluster may be used again.

What a pointer points at is durable and counted before the pointer is written; what lost its last pointer is given back
only after that removal is durable, and after every request begun before it has ended.  So a flush is: refcount blocks, new
L2 tables (guest data went straight to the file, or to an external data file, which has a barrier of its own first) -
barrier - refcount table entries, if there are new blocks - barrier - L1 and L2 entries - barrier; and then the clusters
those entries no longer point at are on their way to being free.

With lazy refcounts the counts stay in memory until the image is closed, or their cache is crowded: a flush writes only the
pointers and what they point at, after it has set the dirty bit, durably, so that whoever opens the image after a crash
counts everything anew.

After a flush that failed nobody knows which of its pointers the file has: what it was about to link is then written as if
it were linked, and linked as if it were not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from blocklib.errors import BlocklibError
from blocklib.formats.qcow2 import header_change, layout
from blocklib.formats.qcow2.cache import DirtyRange
from blocklib.formats.qcow2.corruption import change_features
from blocklib.formats.qcow2.overlap import ACTIVE_L1, ACTIVE_L2, REFCOUNT_BLOCK, REFCOUNT_TABLE
from blocklib.formats.qcow2.tables import table_to_bytes

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_MAX_WAITING_CLUSTERS = 1 << 16
"""Freed clusters that may wait for a flush before the image flushes itself."""


class _Batch(NamedTuple):
    """A copy of everything that one flush takes to the file: what changes meanwhile is for the next."""

    blocks: list[DirtyRange]
    table_offset: int
    table_entries: list[tuple[int, int]]  # (index, entry)
    moved_table: bytes | None  # all of it, where it lies in a new place
    new_slices: list[DirtyRange]
    doubtful_slices: list[DirtyRange]
    slices: list[DirtyRange]
    l1_entries: list[tuple[int, int]]  # (index, entry)
    new_tables: set[int]
    doubtful_tables: set[int]
    freed: list[tuple[int, int]]
    discarded: list[tuple[int, int]]
    counts_wait: bool
    """Counts were changed that the file does not get yet."""


class WriteBack:
    """Flushes one image and keeps the clusters that wait to be free."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._structure = threading.RLock()
        """Serialises flushes and whatever rewrites the header; may span I/O; taken before the image's lock."""
        self.reserving = threading.Lock()
        """Held while a new table gets its space, and when a flush takes the new tables; taken before the image's lock."""
        self.lazy = False
        """Reference counts may be postponed."""
        self._exact = 0
        self._is_dirty = False  # the dirty bit in the file is ours
        self._begun = 0
        self._succeeded = 0  # the number of the last flush, counted by _begun, that made everything durable
        self._counted = 0, 0
        self._freed_clusters = 0  # in the first _counted runs of `freed` and `discarded`
        self.freed: list[tuple[int, int]] = []
        """Runs of host clusters that lost a reference since the last flush.  Guarded by the image's lock."""
        self.discarded: list[tuple[int, int]] = []
        """The same, because the guest gave up what they held: whether the host gets them is another option."""
        self._waiting: list[tuple[int, list[tuple[int, int]], bool]] = []
        """(epoch, runs, whether to punch them): the removal is durable; free once requests from before `epoch` have ended."""

    @property
    def structure(self) -> threading.RLock:
        return self._structure

    def flush(self) -> None:
        """Make everything written so far durable.  A caller that waited for a flush begun after its call needs no other.

        Raises StorageError, PoisonedError; ImageCorruptError when all is durable but freed clusters were not counted.
        """
        asked = self._begun
        with self._structure:
            if self._succeeded > asked:
                return
            failure = self._write_back()
        if failure is not None:
            raise failure

    def relieve(self) -> None:
        """Flush if caches are crowded with changes or too many clusters wait to be free."""
        if self._is_pressed():
            with self._structure:
                if not self._is_pressed():  # another thread's flush has relieved us too
                    return
                failure = self._write_back()
            if failure is not None:
                raise failure

    def _is_pressed(self) -> bool:
        node = self._node
        if node.mapping.cache.crowded or node.refcounts.cache.crowded:
            return True
        if len(self.freed) + len(self.discarded) > sum(self._counted):
            with node.lock:
                freed, discarded = self._counted
                self._freed_clusters += sum(n for _first, n in self.freed[freed:])
                self._freed_clusters += sum(n for _first, n in self.discarded[discarded:])
                self._counted = len(self.freed), len(self.discarded)
        return self._freed_clusters > _MAX_WAITING_CLUSTERS

    def finish(self) -> None:
        """Flush, and flush the counts of what that set free, until nothing is left to write.  No request is in flight."""
        with self.exact_counts():
            self._node.retry(lambda: self._node.refcounts.packing.leave())
            failure = self._write_back()
            while self.has_changes:
                failure = self._write_back() or failure
            if self._is_dirty and failure is None:
                change_features(self._node, remove=layout.INCOMPATIBLE_DIRTY)
                self._is_dirty = False
        if failure is not None:
            raise failure

    @contextmanager
    def exact_counts(self) -> Iterator[None]:
        """Hold the structure lock, and let flushes write all counts, even with lazy refcounts."""
        with self._structure:
            self._exact += 1
            try:
                yield
            finally:
                self._exact -= 1

    @property
    def gives_back(self) -> bool:
        """Whether a flush sets clusters free."""
        return bool(self._waiting or self.freed or self.discarded)

    @property
    def has_changes(self) -> bool:
        """Whether anything is left to be written or given back."""
        mapping, refcounts = self._node.mapping, self._node.refcounts
        return bool(self.gives_back or refcounts.has_changes or mapping.cache.dirty or mapping.dirty_l1)

    def barrier(self, *, data: bool = False) -> None:
        """Make what was written to the file durable, with `data` to an external data file too; a failure poisons the image."""
        node = self._node
        try:
            edge = node.data_edge() if data else None
            if edge is not None and edge is not node.file:
                edge.flush()
            node.file.flush()
        except BlocklibError:
            # The kernel reports a lost write once; no later success may pretend otherwise.
            self._node.poison("a flush failed, and what was written before it may be lost")
            raise

    def _write_back(self) -> BlocklibError | None:
        """One flush.  What goes wrong with giving clusters back costs only those clusters and is returned."""
        node = self._node
        node.check_usable()
        node.file.node.hear("flush_to_os")
        self._begun += 1
        node.guard.refresh()
        failure = self._free_waiting()
        batch: _Batch | None = None
        try:
            with self.reserving:
                batch = node.retry(self._take)
            self._refuse_overlaps(batch)
            self._write(batch)
        except BaseException as error:
            if batch is not None:
                taken = batch
                node.retry(lambda: self._put_back(taken), marks=False)
            elif not isinstance(error, BlocklibError):
                node.poison("a flush was interrupted when it had begun")  # what it took is lost
            raise
        with node.lock:
            node.refcounts.cache.written(batch.blocks)
            node.mapping.cache.written(batch.new_slices + batch.doubtful_slices + batch.slices)
            if batch.freed or batch.discarded:
                epoch = node.tracker.next_epoch() if node.tracker is not None else 0
                self._waiting.append((epoch, _joined(batch.freed), node.punches_others))
                self._waiting.append((epoch, _joined(batch.discarded), node.punches_holes))
        self._succeeded = self._begun
        return self._free_waiting() or failure

    def _take(self) -> _Batch:
        mapping, refcounts = self._node.mapping, self._node.refcounts
        cluster_mask = ~self._node.geometry.cluster_mask
        new_tables, mapping.new_tables = mapping.new_tables, set()
        doubtful_tables, mapping.doubtful_tables = mapping.doubtful_tables, set()
        new_slices, doubtful_slices, slices = [], [], []
        for entry in mapping.cache.take_dirty():
            table_offset = entry.table_offset & cluster_mask
            if table_offset in new_tables:
                new_slices.append(entry)
            elif table_offset in doubtful_tables:
                doubtful_slices.append(entry)
            else:
                slices.append(entry)
        l1_entries = [(index, mapping.l1[index]) for index in sorted(mapping.dirty_l1)]
        mapping.dirty_l1 = set()
        freed, self.freed = self.freed, []
        discarded, self.discarded = self.discarded, []
        self._counted, self._freed_clusters = (0, 0), 0
        postponed = self.lazy and refcounts.may_wait and not self._exact
        moved_table, blocks, table_entries = None, [], []
        if not postponed:
            moved_table = table_to_bytes(refcounts.table) if refcounts.table_moved else None
            refcounts.table_moved = False
            freed = freed + refcounts.outgrown_tables
            refcounts.outgrown_tables = []
            table_entries = [(index, refcounts.table[index]) for index in sorted(refcounts.dirty_table_entries)]
            refcounts.dirty_table_entries = set()
            # After the L2 slices: a count is raised before the entry that relies on it is made.
            blocks = refcounts.cache.take_dirty()
        self._node.guard.tables_linked([index for index, _ in l1_entries], [index for index, _ in table_entries])
        return _Batch(
            blocks=blocks,
            table_offset=refcounts.table_offset,
            table_entries=table_entries,
            moved_table=moved_table,
            new_slices=new_slices,
            doubtful_slices=doubtful_slices,
            slices=slices,
            l1_entries=l1_entries,
            new_tables=new_tables,
            doubtful_tables=doubtful_tables,
            freed=freed,
            discarded=discarded,
            counts_wait=postponed and refcounts.has_changes,
        )

    def _put_back(self, batch: _Batch) -> None:
        mapping, refcounts = self._node.mapping, self._node.refcounts
        refcounts.cache.put_back(batch.blocks)
        mapping.cache.put_back(batch.new_slices + batch.doubtful_slices + batch.slices)
        mapping.doubtful_tables |= batch.new_tables | batch.doubtful_tables
        mapping.dirty_l1.update(index for index, _entry in batch.l1_entries)
        refcounts.table_moved = refcounts.table_moved or batch.moved_table is not None
        refcounts.dirty_table_entries.update(index for index, _entry in batch.table_entries)
        self.freed = batch.freed + self.freed
        self.discarded = batch.discarded + self.discarded
        self._counted, self._freed_clusters = (0, 0), 0

    def _refuse_overlaps(self, batch: _Batch) -> None:
        """Raises ImageCorruptError, with nothing written, where a part of the batch would overwrite something else."""
        node = self._node

        def check() -> None:
            guard, mapping = node.guard, node.mapping
            for dirty in batch.blocks:
                guard.check(dirty.host_offset, len(dirty.data), "a refcount block", REFCOUNT_BLOCK)
            for slices in (batch.new_slices, batch.doubtful_slices, batch.slices):
                for dirty in slices:
                    guard.check(dirty.host_offset, len(dirty.data), "an L2 table", ACTIVE_L2)
            for index, _entry in batch.l1_entries:
                guard.check(mapping.l1_offset + index * 8, 8, "the L1 table", ACTIVE_L1)
            for index, _entry in batch.table_entries:
                guard.check(batch.table_offset + index * 8, 8, "the refcount table", REFCOUNT_TABLE)

        if node.guard.kinds:
            node.retry(check)

    def _write(self, batch: _Batch) -> None:
        node = self._node
        file = node.file
        mapping = node.mapping
        if batch.counts_wait and not self._is_dirty:
            change_features(node, add=layout.INCOMPATIBLE_DIRTY)
            self._is_dirty = True
        for dirty in batch.blocks:
            file.write(dirty.host_offset, (dirty.data,), "refblock_update_part")
        for dirty in batch.new_slices:
            file.write(dirty.host_offset, (dirty.data,), "l2_alloc_write")
        self.barrier(data=True)
        if batch.moved_table is not None:
            file.write(batch.table_offset, (batch.moved_table,), "refblock_alloc_write_table")
            self.barrier()
            file.node.hear("refblock_alloc_switch_table")
            node.header.refcount_table_offset = batch.table_offset
            node.header.refcount_table_clusters = len(batch.moved_table) >> node.geometry.cluster_bits
            header_change.rewrite(node)
            self.barrier()
        elif batch.table_entries:
            for index, entry in batch.table_entries:
                file.write(batch.table_offset + index * 8, (entry.to_bytes(8, "big"),), "reftable_update")
            self.barrier()
        if batch.doubtful_slices:
            for dirty in batch.doubtful_slices:
                file.write(dirty.host_offset, (dirty.data,), "l2_update")
            self.barrier()
        if not batch.slices and not batch.l1_entries:
            return
        for index, entry in batch.l1_entries:
            file.write(mapping.l1_offset + index * 8, (entry.to_bytes(8, "big"),), "l1_update")
        for dirty in batch.slices:
            file.write(dirty.host_offset, (dirty.data,), "l2_update")
        self.barrier()

    def _free_waiting(self) -> BlocklibError | None:
        """Give back what nobody can be reading any more.  Returns the first failure: its clusters stay allocated."""
        node = self._node
        failure = None
        while self._waiting:
            epoch, runs, punches = self._waiting[0]
            if node.tracker is not None and not node.tracker.left(epoch):
                break
            while runs:
                first, n = runs.pop()
                try:
                    self._give_back(first, n, punches=punches)
                except BlocklibError as exc:
                    failure = failure or exc
            del self._waiting[0]
        return failure

    def _give_back(self, first: int, n: int, *, punches: bool) -> None:
        """Lower the counts of a run, which must be nobody's any more before the host gets its space.

        Nobody can allocate it before its counts fall, so it is punched before that: afterwards it may be somebody's again.
        """
        node = self._node
        try:
            node.file.node.hear("cluster_free")
            if punches:
                for start, length in node.retry(lambda: node.refcounts.sole_runs(first, n), marks=False):
                    node.punch(start, length)
        finally:
            node.retry(lambda: node.refcounts.release(first, n), marks=False)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs (first cluster, number), ascending; neighbours are one, and so cost one change of counts and one hole."""
    joined: list[tuple[int, int]] = []
    for first, n in sorted(runs):
        if joined and sum(joined[-1]) == first:
            joined[-1] = joined[-1][0], joined[-1][1] + n
        else:
            joined.append((first, n))
    return joined
