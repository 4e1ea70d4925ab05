"""The order that survives any crash: what a flush writes, and when a freed cluster may be used again.

What a pointer points at is durable and counted before the pointer is written; what lost its last pointer is given back
only after that removal is durable, and after every request begun before it has ended.  So a flush is: refcount blocks, new
L2 tables (guest data went straight to the file) - barrier - refcount table entries, if there are new blocks - barrier -
L1 and L2 entries - barrier; and then the clusters those entries no longer point at are on their way to being free.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from blocklib.errors import StorageError
from blocklib.formats.qcow2.cache import DirtyRange, MissingTableError
from blocklib.formats.qcow2.tables import table_to_bytes

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_MAX_WAITING_CLUSTERS = 1 << 16
"""Freed clusters that may wait for a flush before the image flushes itself."""


class _Batch(NamedTuple):
    """A copy of everything that one flush takes to the file."""

    blocks: list[DirtyRange]
    table_entries: list[int]
    table_moved: bool
    new_slices: list[DirtyRange]
    slices: list[DirtyRange]
    l1_entries: list[tuple[int, int]]  # (index, entry)
    new_tables: dict[int, int]
    freed: list[tuple[int, int]]


class WriteBack:
    """Flushes one image and keeps the clusters that wait to be free."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._structure = threading.RLock()
        """Serialises flushes and whatever rewrites the header; may span I/O; taken before the image's lock."""
        self._begun = 0
        self.freed: list[tuple[int, int]] = []
        """Runs of host clusters that lost a reference since the last flush.  Guarded by the image's lock."""
        self._waiting: list[tuple[int, list[tuple[int, int]]]] = []
        """(epoch, runs): the removal is durable; free once all requests from before `epoch` have ended."""

    @property
    def structure(self) -> threading.RLock:
        return self._structure

    def flush(self) -> None:
        """Make everything written so far durable.  A caller that waited for a flush begun after its call needs no other."""
        asked = self._begun
        with self._structure:
            if self._begun > asked:
                return
            self._begun += 1
            self._node.check_usable()
            self._write_back()

    def relieve(self) -> None:
        """Flush if caches are crowded with changes or too many clusters wait to be free."""
        node = self._node
        if (
            node.mapping.cache.crowded
            or node.refcounts.cache.crowded
            or sum(n for _first, n in self.freed[-64:]) > _MAX_WAITING_CLUSTERS
            or len(self.freed) > _MAX_WAITING_CLUSTERS
        ):
            self.flush()

    def finish(self) -> None:
        """Flush, and flush the counts of what that set free, until nothing is left to write.  No request is in flight."""
        with self._structure:
            self.flush()
            while self._waiting or self.freed or self._node.refcounts.cache.dirty:
                self.flush()

    def _write_back(self) -> None:
        node = self._node
        self._free_waiting()
        with node.lock:
            batch = self._take()
        try:
            self._write(batch)
        except BaseException:
            with node.lock:
                self._put_back(batch)
            raise
        with node.lock:
            node.refcounts.cache.written(batch.blocks)
            node.mapping.cache.written(batch.new_slices + batch.slices)
            if batch.freed:
                epoch = node.tracker.next_epoch() if node.tracker is not None else 0
                self._waiting.append((epoch, batch.freed))
        self._free_waiting()

    def _take(self) -> _Batch:
        mapping, refcounts = self._node.mapping, self._node.refcounts
        dirty = mapping.cache.take_dirty()
        cluster_mask = ~self._node.geometry.cluster_mask
        new_tables, mapping.new_tables = mapping.new_tables, {}
        l1_entries = [(index, mapping.l1[index]) for index in sorted(mapping.dirty_l1)]
        mapping.dirty_l1 = set()
        table_moved, refcounts.table_moved = refcounts.table_moved, False
        freed, self.freed = self.freed + refcounts.outgrown_tables, []
        refcounts.outgrown_tables = []
        table_entries = sorted(refcounts.dirty_table_entries)
        refcounts.dirty_table_entries = set()
        return _Batch(
            # After the L2 slices: a count is raised before the entry that relies on it is made.
            blocks=refcounts.cache.take_dirty(),
            table_entries=table_entries,
            table_moved=table_moved,
            new_slices=[entry for entry in dirty if entry.table_offset & cluster_mask in new_tables],
            slices=[entry for entry in dirty if entry.table_offset & cluster_mask not in new_tables],
            l1_entries=l1_entries,
            new_tables=new_tables,
            freed=freed,
        )

    def _put_back(self, batch: _Batch) -> None:
        mapping, refcounts = self._node.mapping, self._node.refcounts
        refcounts.cache.put_back(batch.blocks)
        mapping.cache.put_back(batch.new_slices + batch.slices)
        mapping.new_tables = {**batch.new_tables, **mapping.new_tables}
        mapping.dirty_l1.update(index for index, _entry in batch.l1_entries)
        refcounts.table_moved = refcounts.table_moved or batch.table_moved
        refcounts.dirty_table_entries.update(batch.table_entries)
        self.freed = batch.freed + self.freed

    def _write(self, batch: _Batch) -> None:
        node = self._node
        file = node.file
        refcounts, mapping = node.refcounts, node.mapping
        for dirty in batch.blocks:
            file.write(dirty.host_offset, (dirty.data,))
        for dirty in batch.new_slices:
            file.write(dirty.host_offset, (dirty.data,))
        if batch.table_moved:
            file.write(refcounts.table_offset, (table_to_bytes(refcounts.table),))
        self._barrier()
        if batch.table_moved:
            node.header.refcount_table_offset = refcounts.table_offset
            node.header.refcount_table_clusters = len(refcounts.table) * 8 >> node.geometry.cluster_bits
            node.rewrite_header()
            self._barrier()
        elif batch.table_entries:
            for index in batch.table_entries:
                file.write(refcounts.table_offset + index * 8, (refcounts.table[index].to_bytes(8, "big"),))
            self._barrier()
        if not batch.slices and not batch.l1_entries:
            return
        for index, entry in batch.l1_entries:
            file.write(mapping.l1_offset + index * 8, (entry.to_bytes(8, "big"),))
        for dirty in batch.slices:
            file.write(dirty.host_offset, (dirty.data,))
        self._barrier()

    def _barrier(self) -> None:
        try:
            self._node.file.flush()
        except StorageError:
            # The kernel reports a lost write once; no later success may pretend otherwise.
            self._node.poison("a flush failed, and what was written before it may be lost")
            raise

    def _free_waiting(self) -> None:
        """Give back what nobody can be reading any more."""
        node = self._node
        while self._waiting:
            epoch, runs = self._waiting[0]
            if node.tracker is not None and not node.tracker.left(epoch):
                return
            del self._waiting[0]
            for first, n in runs:
                node.give_back(self._release(first, n))

    def _release(self, first: int, n: int) -> list[tuple[int, int]]:
        node = self._node
        while True:
            try:
                with node.lock:
                    return node.refcounts.release(first, n)
            except MissingTableError as missing:
                missing.cache.load(missing.host_offset, node.lock)
