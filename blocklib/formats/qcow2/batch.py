"""Many requests at once: where each of them lives, and the clusters that writes need, reserved and linked together.

What is looked up or written together obeys the same rules as one request: see `mapping` and `writing`.  Clusters that need
more than this knows - compressed, encrypted, preallocated, claimed by another write - are handed back, for those to deal with.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from blocklib._fast import lookups, placing
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import (
    BEFORE,
    CLUSTER,
    FOUND_ROWS,
    FRESH,
    HOST,
    KIND,
    L1_ENTRIES,
    MISSING,
    OTHER,
    OWN,
    ROW,
    ROWS,
    SIZE,
    TABLE,
    TABLES,
    Work,
)
from blocklib.errors import BlocklibError
from blocklib.formats.qcow2.reserve import back_tables
from blocklib.formats.qcow2.table_index import TableIndex
from blocklib.node import WriteTicket

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.formats.qcow2.tables import Table


def find(node: Qcow2Node, work: Work) -> bool:
    """As `Node.find_batch`."""
    if node.crypt is not None or node.geometry.extended_l2:
        return False
    mapping = node.mapping
    index = _index(node)
    l1 = Pointer(mapping.l1, "Q")
    while not lookups.look_up(work, index.shape, l1, index.keys, index.tables, index.used):
        try:
            _bring_in(node, index, work.words[MISSING])
        except BlocklibError:
            lookups.hand_piece_back(work)
    return True


def _index(node: Qcow2Node) -> TableIndex:
    mapping = node.mapping
    index = mapping.cache.index
    if index is None:
        index = TableIndex(mapping)
        with node.lock:
            mapping.cache.index = index
    index.shape.view[L1_ENTRIES] = len(mapping.l1)
    index.shape.view[SIZE] = node.size
    return index


def _bring_in(node: Qcow2Node, index: TableIndex, slice_offset: int) -> None:
    cache = node.mapping.cache
    if cache.peek(slice_offset) is None:
        cache.load(slice_offset, node.lock)
    with node.lock:
        table = cache.peek(slice_offset)
        if table is not None:  # else it has left again, and the lookup will ask again
            index.put(slice_offset, table, node.guard.trusted.get(slice_offset))


# -- writing ----------------------------------------------------------------------------------------------------------


def place(node: Qcow2Node, work: Work) -> bool:
    """As `Node.place_batch`."""
    if node.crypt is not None or node.geometry.extended_l2 or node.mapping.external:
        return False
    node.check_usable()
    index = _index(node)
    l1 = Pointer(node.mapping.l1, "Q")
    placing.look_up_places(work, index.shape, l1, index.keys, index.tables, index.trust, index.used)
    return True


def reserve(node: Qcow2Node, work: Work, most_bytes: int, alignment: int) -> BatchAllocation | None:
    """As `Node.reserve_batch`."""
    mapping = node.mapping
    bits = node.geometry.cluster_bits
    slice_bits = bits + mapping.slice_entries.bit_length() - 1
    most_tables = max(1, mapping.cache.max_entries // 4)  # all of them must be in the cache at once
    n_tables = placing.make_rows(work, bits, slice_bits, max(1, most_bytes >> bits), most_tables, alignment)
    ticket = BatchAllocation(node, work, n_tables)
    try:
        node.retry(ticket.reserve)
    except BaseException:
        ticket.abort()
        raise
    if node.refcounts.unbacked:
        back_tables(node, ticket.first << bits, ticket, length=(ticket.stop - ticket.first) << bits)
    return ticket if ticket.clusters else None


class BatchAllocation(WriteTicket):
    """Host clusters for the fresh ones among the rows of a Work."""

    def __init__(self, node: Qcow2Node, work: Work, n_tables: int) -> None:
        self._bits = node.geometry.cluster_bits
        self._node = node
        self._work = work
        self._slice_mask = node.mapping.slice_entries - 1
        bounds = work.area(TABLES, 2 * n_tables).tolist()
        self._bounds = list(zip(bounds[::2], bounds[1::2], strict=True))  # (first cluster, last) for each slice
        self.first, self.stop = bounds[0], bounds[-1] + 1
        self.clusters: list[int] = []
        """The guest clusters that are claimed, ascending."""
        self._runs: list[tuple[int, int]] = []

    def next_claimed(self, cluster: int) -> int | None:
        clusters = self.clusters
        place = bisect_left(clusters, cluster)
        return clusters[place] if place < len(clusters) else None

    def _rows(self, word: int) -> list[int]:
        """One word of each row."""
        n_rows = self._work.words[FOUND_ROWS]
        return self._work.pointer.view[ROWS + word : ROWS + ROW * n_rows : ROW].tolist()

    def _slices(self) -> list[tuple[int, Table]]:
        node = self._node
        mapping, refcounts, freed = node.mapping, node.refcounts, node.writeback.freed
        bits = self._bits
        return [mapping.slice_for_change(first << bits, refcounts, freed) for first, _last in self._bounds]

    def reserve(self) -> None:
        """Runs under the image's lock; goes on where a missing table has stopped it."""
        node, work = self._node, self._work
        node.check_writable()
        slices = self._slices()
        if node.allocations:
            self._leave_claimed()
        tables = array("Q", [table.buffer_info()[0] for _offset, table in slices])
        n_fresh = placing.classify(work, self._slice_mask, Pointer(tables, "Q"))
        kinds = self._rows(KIND)
        if n_fresh != len(kinds):
            self._trust(slices, kinds)
        self._allocate(n_fresh)
        placing.give_places(work, Pointer(array("q", [word for run in self._runs for word in run]), "q"))
        clusters = self._rows(CLUSTER)
        if n_fresh != len(kinds):
            clusters = [cluster for cluster, kind in zip(clusters, kinds, strict=True) if kind == FRESH]
        self.clusters = clusters
        if clusters:
            node.allocations.add(self)

    def _leave_claimed(self) -> None:
        words, allocations = self._work.words, self._node.allocations
        for number, cluster in enumerate(self._rows(CLUSTER)):
            if allocations.overlaps(cluster, cluster + 1):
                words[ROWS + ROW * number + KIND] = OTHER

    def _trust(self, slices: list[tuple[int, Table]], kinds: list[int]) -> None:
        """Check the clusters that can be written in place as they are."""
        node = self._node
        rows = zip(kinds, self._rows(TABLE), self._rows(CLUSTER), self._rows(HOST), strict=True)
        for kind, number, cluster, host_offset in rows:
            if kind == OWN:
                slice_offset, table = slices[number]
                node.guard.trust(slice_offset, len(table), cluster & self._slice_mask, host_offset, 1)
        self._show(slices)

    def _show(self, slices: list[tuple[int, Table]]) -> None:
        """Let the next lookups find the tables with what is known of them."""
        node = self._node
        index = node.mapping.cache.index
        if index is not None:
            for slice_offset, table in slices:
                index.put(slice_offset, table, node.guard.trusted.get(slice_offset))

    def _allocate(self, wanted: int) -> None:
        """Have so many host clusters."""
        refcounts, runs = self._node.refcounts, self._runs
        missing = wanted - sum(n for _first, n in runs)
        while missing > 0:
            first, n = refcounts.allocate(missing, for_data=True)
            runs.append((first, n))
            missing -= n
        while missing < 0:  # another thread has given a cluster its place while a table was loaded
            first, n = runs[-1]
            surplus = min(n, -missing)
            refcounts.release(first + n - surplus, surplus)
            runs[-1] = first, n - surplus
            if n == surplus:
                runs.pop()
            missing += surplus

    def commit(self) -> None:
        node = self._node
        try:
            node.retry(self._link)
        except BaseException:
            if node.poisoned is None and node.corruption is None:  # nothing was linked
                self.abort()
            else:
                self._forget()
            raise
        node.writeback.relieve()

    def _link(self) -> None:
        """Runs under the image's lock."""
        node, mapping = self._node, self._node.mapping
        slices = self._slices()
        marks = [node.guard.marks(slice_offset, len(table)) for slice_offset, table in slices]
        tables = Pointer(array("Q", [table.buffer_info()[0] for _offset, table in slices]), "Q")
        lost = placing.link(
            self._work, self._slice_mask, tables, Pointer(array("Q", [one.buffer_info()[0] for one in marks]), "Q")
        )
        for (slice_offset, _table), (first, last) in zip(slices, self._bounds, strict=True):
            mapping.cache.mark_dirty(slice_offset, first & self._slice_mask, (last & self._slice_mask) + 1)
        if lost:
            before = [entry for entry, kind in zip(self._rows(BEFORE), self._rows(KIND), strict=True) if kind == FRESH]
            node.writeback.freed.extend(mapping.host_clusters_of(before))
        node.allocations.remove(self)
        self._show(slices)

    def abort(self) -> None:
        node = self._node
        if node.corruption is not None:  # counts are not changed any more
            self._forget()
            return
        try:
            node.retry(self._give_back)
        except BaseException:
            self._forget()  # its host clusters leak, but nobody waits for it
            raise

    def _give_back(self) -> None:
        while self._runs:
            self._node.refcounts.release(*self._runs[-1])
            self._runs.pop()
        if self._node.allocations.holds(self):
            self._node.allocations.remove(self)

    def _forget(self) -> None:
        with self._node.lock:
            if self._node.allocations.holds(self):
                self._node.allocations.remove(self)
