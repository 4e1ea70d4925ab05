"""Snapshots made, applied and deleted, so that a crash at any point leaves the state before or after, and at worst leaks.

The caller has drained the image.  One atomic write of the header switches from one state to the next.  What the new state
needs is durable and counted before it; what the old one alone needed is given back after it.  In between counts are too
high and copied flags may be wrong: a version 3 image carries the dirty bit as long.  In version 2, where there is none,
flags are cleared before counts rise and set after counts have fallen: one that a crash leaves wrong is missing, which costs a
copy.  A change that fails for another reason than a barrier is mended as one that a crash has cut short.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blocklib.errors import BlocklibError, ImageCorruptError, ImageLimitError, UnsupportedFeatureError
from blocklib.formats.qcow2 import header_change, layout
from blocklib.formats.qcow2.corruption import change_features
from blocklib.formats.qcow2.overlap import ACTIVE_L1, ACTIVE_L2, INACTIVE_L2, REFCOUNT_BLOCK
from blocklib.formats.qcow2.sharing import refuse_shared_l2_tables
from blocklib.formats.qcow2.snapshots.table import Snapshot, checked_name, extra_data, new_id, table_bytes
from blocklib.formats.qcow2.snapshots.tally import Tally, Write, l2_offsets, tally_for
from blocklib.formats.qcow2.tables import Table, read_table, table_to_bytes

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_SECOND = 10**9


def create(
    node: Qcow2Node, name: str, *, vm_state_size: int = 0, vm_clock_ns: int = 0, created_ns: int | None = None
) -> Snapshot:
    """Keep the disk as it is now, VM state included, under `name`.

    Raises UsageError for a name that cannot be stored, ImageLimitError where there is no room for the snapshot or its
    references, UnsupportedFeatureError with a data file; all with the image unchanged.
    """
    _refuse_data_file(node)
    stored_name = checked_name(name)
    with _changing(node) as change:
        if len(node.snapshots) >= node.limits.snapshots:
            raise ImageLimitError(
                f"{node.filename}: there are {len(node.snapshots)} snapshots already",
                structure="snapshot table",
                expected=f"at most {node.limits.snapshots} snapshots",
                found=str(len(node.snapshots) + 1),
                node=node.filename,
            )
        moment = time.time_ns() // 1000 * 1000 if created_ns is None else created_ns
        entry = Snapshot(
            0,
            node.header.l1_size,
            new_id(node.snapshots),
            stored_name,
            moment // _SECOND,
            moment % _SECOND,
            vm_clock_ns,
            0,  # QEMU leaves the old field alone, too
            extra_data(vm_state_size=vm_state_size, disk_size=node.header.size),
        )
        l1 = node.mapping.l1[: node.header.l1_size]
        tally = tally_for(node, [l1])(node, +1)
        tally.add_l1(l1)
        change.check(tally, l1)
        copy = array("Q", [item & ~layout.FLAG_COPIED for item in l1])
        entry = entry._replace(l1_offset=change.place(table_to_bytes(copy)))
        change.place_table([*node.snapshots, entry])
        change.begin()
        blocks = list(tally.block_writes())  # first: flags are what the new counts make of them
        change.write(tally.flag_writes(l1))
        change.write([(node.header.l1_table_offset, table_to_bytes(tally.flagged_l1(l1)))])
        change.settle()
        change.write(blocks)
        change.switch(still_dirty=False)
    return entry


def apply(node: Qcow2Node, index: int, begin: Callable[[], None] | None = None) -> None:
    """Bring the disk back to what a snapshot holds, its size and VM state included; what it holds now is lost.

    `begin` is called before the first write, once the tables and counts are known to allow the change.

    Raises ImageCorruptError, with the image unchanged, for a snapshot whose tables make no sense.
    """
    _refuse_data_file(node)
    with _changing(node) as change:
        entry = node.snapshots[index]
        old_l1 = node.mapping.l1[: node.header.l1_size]
        new_l1 = load_l1(node, index)
        kind = tally_for(node, [old_l1, new_l1])
        gained, lost = kind(node, +1), kind(node, -1)
        gained.add_l1(new_l1)
        lost.add_l1(old_l1)
        lost.add_run(*node.active_l1_clusters())
        change.check(gained, new_l1)
        change.check(lost, array("Q"))
        if begin is not None:
            begin()
        clear = array("Q", [item & ~layout.FLAG_COPIED for item in new_l1])
        offset = change.place(table_to_bytes(clear))
        # Counts that are too high leak, no more: the dirty bit can wait for the switch.
        change.start()
        blocks = list(gained.block_writes())
        change.write(gained.flag_writes(new_l1))
        change.settle()
        change.write(blocks)
        header = node.header
        header.l1_table_offset, header.l1_size = offset, len(new_l1)
        if entry.disk_size is not None:
            header.size = entry.disk_size
        change.switch(still_dirty=True)
        change.write(lost.block_writes())
        change.finish(lost)


def delete(node: Qcow2Node, index: int) -> None:
    """Forget a snapshot; what only it used is free afterwards.

    Raises ImageCorruptError, with the image unchanged, for a snapshot whose tables make no sense.
    """
    _refuse_data_file(node)
    with _changing(node) as change:
        entry = node.snapshots[index]
        active = node.mapping.l1[: node.header.l1_size]
        l1 = load_l1(node, index)
        tally = tally_for(node, [active, l1])(node, -1)
        tally.add_l1(l1)
        geometry = node.geometry
        tally.add_run(entry.l1_offset >> geometry.cluster_bits, geometry.l1_clusters_for(entry.l1_size))
        change.check(tally, active)
        change.place_table([*node.snapshots[:index], *node.snapshots[index + 1 :]])
        change.switch(still_dirty=True)
        change.write(tally.block_writes())
        change.settle()
        change.write(tally.flag_writes(active))
        change.write([(node.header.l1_table_offset, table_to_bytes(tally.flagged_l1(active)))])
        change.finish(tally)


def load_l1(node: Qcow2Node, index: int) -> Table:
    """The L1 table of a snapshot, with an entry for every part of its disk.

    Raises ImageCorruptError, ImageLimitError, StorageError.
    """
    entry = node.snapshots[index]
    length = entry.l1_size * layout.TABLE_ENTRY_LENGTH
    size = snapshot_size(node, entry)
    needed = node.geometry.l1_entries_for(size)
    structure = f"L1 table of snapshot {entry.id.decode(errors='backslashreplace')}"
    node.limits.check("l1_bytes", max(length, needed * layout.TABLE_ENTRY_LENGTH), structure=structure, node=node.filename)
    if entry.l1_offset & node.geometry.cluster_mask or entry.l1_offset + length > node.file.size:
        raise ImageCorruptError(
            f"{node.filename}: the {structure} is said to be at {entry.l1_offset:#x}",
            structure=structure,
            host_offset=entry.l1_offset,
            expected=f"{length} bytes at a cluster aligned offset inside the file of {node.file.size} bytes",
            found=f"{entry.l1_offset:#x}",
            node=node.filename,
        )
    table = read_table(node.file, "Q", entry.l1_offset, length)
    place = entry.l1_offset
    refuse_shared_l2_tables(table, node.geometry, node.file.size, structure=structure, host_offset=place, node=node.filename)
    if len(table) < needed:  # made by a program that did not write down the end of the disk
        table.extend(array("Q", bytes((needed - len(table)) * layout.TABLE_ENTRY_LENGTH)))
    return table


def snapshot_size(node: Qcow2Node, entry: Snapshot) -> int:
    """The size of a snapshot's disk in bytes: whole sectors, as for the image itself."""
    size = node.header.size if entry.disk_size is None else entry.disk_size
    return size // layout.SIZE_UNIT * layout.SIZE_UNIT


def _refuse_data_file(node: Qcow2Node) -> None:
    node.check_usable()
    node.check_writable()
    if node.header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE:
        raise UnsupportedFeatureError(
            f"{node.filename}: snapshots cannot hold what is in an external data file",
            features=("internal snapshots", "external data file"),
            node=node.filename,
        )


@contextmanager
def _changing(node: Qcow2Node) -> Iterator[_Change]:
    """A change of the snapshot table.  What fails before the first write of it gives back what it has taken."""
    with node.writeback.exact_counts():
        node.writeback.finish()
        change = _Change(node)
        try:
            yield change
        except BaseException as error:
            change.undo(error)
            raise
        change.free_old_table()


class _Change:
    """The steps that the three changes are made of."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._placed: list[tuple[int, int]] = []
        self._snapshots = node.snapshots
        self._started = False
        """Something is written that the state before does not know of."""
        self._finished = False
        self._was_dirty = bool(node.header.incompatible_features & layout.INCOMPATIBLE_DIRTY)
        self._old_table = node.header.snapshots_offset, sum(entry.length for entry in node.snapshots)

    def check(self, tally: Tally, l1: Table) -> None:
        """Raises ImageError, with nothing written, where counts or copied flags cannot be changed as they have to be.

        `l1`: whose L2 tables may have other flags afterwards.
        """
        node, geometry = self._node, self._node.geometry
        tally.check()
        guard = node.guard
        if not guard.kinds:
            return

        def check() -> None:
            for offset in tally.block_offsets():
                guard.check(offset, geometry.cluster_size, "a refcount block", REFCOUNT_BLOCK)
            for offset in l2_offsets(l1, geometry.cluster_mask, node.file.size, node.filename):
                guard.check(offset, geometry.cluster_size, "an L2 table", ACTIVE_L2 | INACTIVE_L2)
            guard.check(node.mapping.l1_offset, len(node.mapping.l1) * 8, "the L1 table", ACTIVE_L1)

        node.retry(check)

    def place(self, data: bytes) -> int:
        """Write `data` to clusters of its own; returns their host offset, 0 where there is nothing to write."""
        node, geometry = self._node, self._node.geometry
        n = geometry.clusters_for(len(data))
        if not n:
            return 0
        first, _n = node.retry(lambda: node.refcounts.allocate(n, exactly=True))
        self._placed.append((first, n))
        offset = first << geometry.cluster_bits
        node.file.write(offset, (data, bytes((n << geometry.cluster_bits) - len(data))), "metadata")
        return offset

    def start(self) -> None:
        """What was placed is durable and counted before anything else is written."""
        if not self._started:
            self._node.writeback.flush()
            self._started = True

    def place_table(self, snapshots: list[Snapshot]) -> None:
        """Write a snapshot table, for `switch` to make it the image's."""
        node = self._node
        data = table_bytes(snapshots, version=node.header.version, disk_size=node.header.size)
        offset = self.place(data)
        self._snapshots = snapshots
        node.header.nb_snapshots, node.header.snapshots_offset = len(snapshots), offset

    def begin(self) -> None:
        """Say on disk that counts and flags cannot be relied on from now on."""
        self.start()
        change_features(self._node, add=layout.INCOMPATIBLE_DIRTY)

    def write(self, writes: Iterable[Write]) -> None:
        """Write what the order of the change allows now; durable with the next switch."""
        self.start()
        for offset, data in writes:
            self._node.file.write(offset, (data,), "metadata")

    def settle(self) -> None:
        """What was written is durable before what comes, in version 2, where nothing says that flags and counts differ."""
        if self._node.header.version == layout.VERSION_2:
            self._node.writeback.barrier()

    def switch(self, *, still_dirty: bool) -> None:
        """Make the new state the image's, in one step."""
        node = self._node
        self.start()
        node.writeback.barrier()
        self._set_dirty(still_dirty)
        header_change.switch(node)
        self._reload()

    def finish(self, tally: Tally) -> None:
        """The counts have gone down: make that durable, say so, and give the host the space of what is free."""
        node = self._node
        node.writeback.barrier()
        self._set_dirty(False)
        header_change.switch(node)
        self._reload()
        self._finished = True
        runs = tally.freed
        if runs:
            with node.lock:
                node.refcounts.free_from(runs[0][0])
        if node.options.get("pass-discard-snapshot", True):
            for first, n in runs:
                node.punch(first, n)

    def _set_dirty(self, dirty: bool) -> None:
        header = self._node.header
        if header.version >= layout.VERSION_3 and not self._was_dirty:
            header.incompatible_features &= ~layout.INCOMPATIBLE_DIRTY
            header.incompatible_features |= layout.INCOMPATIBLE_DIRTY if dirty else 0

    def _reload(self) -> None:
        """Take from the file what was written around the caches, which hold no changes of their own."""
        node = self._node
        header = node.header
        entries = header.l1_size
        if header.l1_table_offset == node.mapping.l1_offset:  # it may have been made with room to grow
            entries = max(entries, len(node.mapping.l1))
        l1 = read_table(node.file, "Q", header.l1_table_offset, entries * layout.TABLE_ENTRY_LENGTH)
        with node.lock:
            node.mapping.cache.clear()
            node.refcounts.cache.clear()
            node.mapping.l1, node.mapping.l1_offset = l1, header.l1_table_offset
            node.refcounts.l1_clusters = node.active_l1_clusters()
            node.snapshots = self._snapshots
            node.guard.table_placed()
            node.size = header.size // layout.SIZE_UNIT * layout.SIZE_UNIT
        node.guard.refresh()

    def free_old_table(self) -> None:
        """Give back, with the next flush, the clusters of the table that the header does not point at any more."""
        node, geometry = self._node, self._node.geometry
        offset, length = self._old_table
        if length and offset != node.header.snapshots_offset:
            with node.lock:
                node.writeback.freed.append((offset >> geometry.cluster_bits, geometry.clusters_for(length)))

    def undo(self, error: BaseException) -> None:
        node = self._node
        if self._finished:  # all that is missing is space that the host could have back
            return
        if self._started:
            if node.poisoned is None and not (isinstance(error, BlocklibError) and self._mend(error)):
                node.poison("a change of the snapshots was interrupted")
            return
        node.header.nb_snapshots, node.header.snapshots_offset = len(node.snapshots), self._old_table[0]
        for first, n in self._placed:
            node.retry(lambda first=first, n=n: node.refcounts.release(first, n))  # type: ignore[misc]

    def _mend(self, error: BlocklibError) -> bool:
        """Do what opening the image would do after a crash; whether it is sound, as before the change or as after it."""
        from blocklib.formats.qcow2.repair.image import repair_after_crash

        node = self._node
        try:
            header_change.reload(node)
            repair_after_crash(node)
            if node.bitmaps is not None:
                node.bitmaps.read_again()
        except BlocklibError as failure:
            error.add_note(f"and the image could not be mended: {failure}")
            return False
        return True
