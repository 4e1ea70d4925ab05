"""Reference counts and the allocation of host clusters.

Everything here is memory only and runs under the image's lock: a refcount block that is not cached raises
MissingTableError before anything was changed, and blocks and tables that are new reach the file with the next flush, in the
order that survives a crash (blocks, then the table that points at them, then the header that points at the table).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blocklib.errors import ImageCorruptError, ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.cache import TableCache
from blocklib.formats.qcow2.packing import Packing
from blocklib.formats.qcow2.tables import Table, zero_table

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.overlap import OverlapGuard
    from blocklib.graph import Edge

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
_FAR: Final = 1 << 40
"""Bytes: more than one flush can leave counted as used behind the end of the file when the host crashes."""
_SEARCH_BYTES: Final = 4096
_HAS_FREE: Final = {
    width: bytes(
        any(not byte >> shift & ((1 << width) - 1) for shift in range(0, 8, width)) for byte in range(256)
    )
    for width in (1, 2, 4)
}
"""Refcount width in bits -> for each byte of a block, whether one of the counts in it is zero."""


class Refcounts:
    """Counts every host cluster.  Numbers are host cluster indices unless they are called offsets (bytes)."""

    def __init__(
        self, file: Edge, geometry: Geometry, table: Table, table_offset: int, *, cache_bytes: int, node: str | None
    ) -> None:
        self.geometry = geometry
        self.table = table
        self.table_offset = table_offset
        self._node = node
        self._width = geometry.refcount_bits
        self._block_bits = geometry.refcount_block_bits
        self._block_mask = geometry.refcount_block_entries - 1
        self._file = file
        typecode = _TYPECODES.get(geometry.refcount_order, "B")
        self.cache = TableCache(
            file,
            typecode,
            geometry.cluster_size,
            cache_bytes,
            structure="refcount block",
            event="refblock_load",
            node=node,
        )
        self._hint = 0
        self._end = 0  # behind the last cluster that was taken here
        self.l1_clusters = (0, 0)
        """(first cluster, number) of the L1 table, for `allocate` to keep off."""
        self.guard: OverlapGuard | None = None
        """Looks at what is about to be taken, before it is."""
        self.new_blocks: set[int] = set()
        """Host offsets of blocks that no flush has taken to the file yet."""
        self.unbacked: set[int] = set()
        """Host offsets of new tables, blocks and L2 tables, that may have no space on the host yet."""
        self.packing = Packing(self)
        self.dirty_table_entries: set[int] = set()
        """Indices of refcount table entries that the file does not have yet."""
        self.table_moved = False
        """The whole table, and the header that points at it, must be written."""
        self.outgrown_tables: list[tuple[int, int]] = []
        """(first cluster, number) of tables that were replaced, to be freed once the header points elsewhere."""

    @property
    def has_changes(self) -> bool:
        """Whether the file does not have everything yet."""
        return self.cache.dirty or self.table_moved or bool(self.dirty_table_entries)

    @property
    def may_wait(self) -> bool:
        """Whether a repair after a crash could make up for what the file does not have yet, and memory can hold it.

        The table in the file must have room for blocks that count everything, where the repair puts them: at the end.
        """
        if self.table_moved or self.cache.crowded:
            return False
        end = max(self._end, self._file.size >> self.geometry.cluster_bits)
        return (end + 2 * len(self.dirty_table_entries) + 2) >> self._block_bits < len(self.table)

    # -- looking ------------------------------------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        """The refcount of a host cluster."""
        block_index = cluster >> self._block_bits
        if block_index >= len(self.table) or not self.table[block_index]:
            return 0
        return self._get(self.block(block_index), cluster & self._block_mask)

    def block(self, block_index: int) -> Table:
        """The refcount block that table entry `block_index`, which is not 0, points at."""
        return self.cache.need(self.block_offset(block_index))

    def block_offset(self, block_index: int) -> int:
        """Where the refcount block of table entry `block_index`, which is not 0, lies.  Raises ImageCorruptError."""
        entry = self.table[block_index]
        if entry & (layout.REFCOUNT_TABLE_RESERVED_MASK | self.geometry.cluster_mask):
            raise ImageCorruptError(
                f"{self._node}: refcount table entry {block_index} is {entry:#x}",
                structure="refcount table entry",
                host_offset=self.table_offset + block_index * 8,
                expected="the cluster aligned offset of a refcount block",
                found=f"{entry:#x}",
                node=self._node,
            )
        return entry

    def _get(self, block: Table, index: int) -> int:
        if self._width >= 8:
            return block[index]
        position = index * self._width
        return block[position >> 3] >> (position & 7) & ((1 << self._width) - 1)

    # -- changing -----------------------------------------------------------------------------------------------------

    def add(self, cluster: int, change: int) -> int:
        """Raise or lower one refcount; returns the new one.

        Raises ImageCorruptError when it would fall below zero, ImageLimitError when the width cannot hold it.
        """
        block_index = cluster >> self._block_bits
        if block_index >= len(self.table) or not self.table[block_index]:
            raise self._wrong_count(cluster, 0, change)
        block = self.block(block_index)
        index = cluster & self._block_mask
        count = self._get(block, index) + change
        if count < 0:
            raise self._wrong_count(cluster, count - change, change)
        if count > self.geometry.max_refcount:
            raise ImageLimitError(
                f"{self._node}: the refcount of cluster {cluster} does not fit {self._width} bits",
                structure="refcount block entry",
                expected=f"at most {self.geometry.max_refcount}",
                found=str(count),
                node=self._node,
            )
        if count == 0:
            self.packing.before_freeing(cluster, 1)
        self._set(block_index, block, index, count)
        if count == 0:
            self._hint = min(self._hint, cluster)
        return count

    def _set(self, block_index: int, block: Table, index: int, count: int) -> None:
        if self._width >= 8:
            block[index] = count
            unit = index
        else:
            position = index * self._width
            unit = position >> 3
            shift = position & 7
            block[unit] = block[unit] & ~(((1 << self._width) - 1) << shift) | count << shift
        self.cache.mark_dirty(self.table[block_index], unit, unit + 1)

    def _wrong_count(self, cluster: int, count: int, change: int) -> ImageCorruptError:
        return ImageCorruptError(
            f"{self._node}: host cluster {cluster} has refcount {count} and cannot change by {change}",
            structure="refcount block entry",
            host_offset=cluster << self.geometry.cluster_bits,
            expected=f"at least {-change}",
            found=str(count),
            node=self._node,
        )

    # -- allocating ---------------------------------------------------------------------------------------------------

    def allocate(self, n_clusters: int, *, exactly: bool = False, for_data: bool = False) -> tuple[int, int]:
        """Take a run of free clusters, first fit: (first cluster, number taken, at least one).

        With `exactly` the run has all `n_clusters`.  Each gets refcount 1.  Who asks says so if no table is put there.

        Raises MissingTableError, ImageLimitError; ImageCorruptError where what should be free cannot be.
        """
        self._file.node.hear("cluster_alloc")
        start = self._hint
        while True:
            block_index = start >> self._block_bits
            index = None
            if block_index >= len(self.table) or not self.table[block_index]:
                if self._is_beyond_the_file(block_index):
                    self._add_blocks(block_index, n_clusters if exactly else 0)
                    continue
            else:
                index = self._find_free(self.block(block_index), start & self._block_mask)
            if index is None:
                start = (block_index + 1) << self._block_bits
                self._refuse_far(start)
                if not exactly:
                    self._hint = start
                continue
            first = (block_index << self._block_bits) + index
            if not exactly:
                self._hint = first
            got = self._free_run(first, n_clusters, across_blocks=exactly)
            if exactly and got < n_clusters:
                start = first + got
                continue
            self._refuse_metadata(first, got)
            self._look_at(first, got, "guest data" if for_data else "a new table", is_table=not for_data)
            self._take(first, got)
            return first, got

    def _look_at(self, first: int, n_clusters: int, what: str, *, is_table: bool) -> None:
        if self.guard is not None:
            bits = self.geometry.cluster_bits
            self.guard.check(first << bits, n_clusters << bits, what)
            if is_table:
                self.guard.table_placed()

    def _refuse_far(self, cluster: int) -> None:
        """Raises ImageCorruptError where full blocks go on far behind all that is there: they would keep us busy for hours."""
        known = max(self._file.size, self._end << self.geometry.cluster_bits)
        if cluster << self.geometry.cluster_bits > known + _FAR:
            raise ImageCorruptError(
                f"{self._node}: the refcounts call everything up to {cluster << self.geometry.cluster_bits:#x} used, "
                f"but the image ends at {known:#x}",
                structure="refcount table",
                host_offset=self.table_offset,
                expected=f"free clusters soon after {known:#x}",
                found=f"none before {cluster << self.geometry.cluster_bits:#x}",
                node=self._node,
            )

    def _refuse_metadata(self, first: int, n_clusters: int) -> None:
        """Raises ImageCorruptError where counts call free what cannot be: taking it would overwrite the image's own tables."""
        bits = self.geometry.cluster_bits
        block_index = first >> self._block_bits
        for start, length, what in (
            (0, 1, "header"),
            (self.table_offset >> bits, len(self.table) * 8 >> bits, "refcount table"),
            (*self.l1_clusters, "L1 table"),
            (self.table[block_index] >> bits, 1, "refcount block"),
        ):
            if start < first + n_clusters and first < start + length:
                raise ImageCorruptError(
                    f"{self._node}: the {what}, at {start << bits:#x}, has refcount 0; repair the image first",
                    structure="refcount block entry",
                    host_offset=self.table[block_index],
                    expected=f"a refcount of 1 for the {what}",
                    found="0",
                    node=self._node,
                )

    def release(self, first: int, n_clusters: int) -> list[tuple[int, int]]:
        """Lower the refcounts of a run by one; the runs (first cluster, number) that nobody uses any more.

        Raises MissingTableError with nothing changed, or ImageCorruptError.
        """
        self._need_blocks(first, n_clusters)
        freed: list[tuple[int, int]] = []
        cluster, end = first, first + n_clusters
        while cluster < end:
            index = cluster & self._block_mask
            n = min(end - cluster, self._block_mask + 1 - index)
            if not (n > 1 and self._release_ones(cluster, n)):
                n = 1
                if self.add(cluster, -1):
                    cluster += 1
                    continue
            if freed and freed[-1][0] + freed[-1][1] == cluster:
                freed[-1] = (freed[-1][0], freed[-1][1] + n)
            else:
                freed.append((cluster, n))
            cluster += n
        return freed

    def free_from(self, cluster: int) -> None:
        """Counts have fallen to zero from this cluster on, around the cache."""
        self._hint = min(self._hint, cluster)

    def sole_runs(self, first: int, n_clusters: int) -> list[tuple[int, int]]:
        """The parts of a run that `release` would free, (first cluster, number) each: those with a refcount of one.

        No compressed cluster is packed into them any more.  Raises MissingTableError.
        """
        self._need_blocks(first, n_clusters)
        runs: list[tuple[int, int]] = []
        cluster, end = first, first + n_clusters
        while cluster < end:
            n = min(end - cluster, self._block_mask + 1 - (cluster & self._block_mask))
            if not (n > 1 and self._are_ones(cluster, n)):
                n = 1
                if self.get(cluster) != 1:
                    cluster += 1
                    continue
            if runs and runs[-1][0] + runs[-1][1] == cluster:
                runs[-1] = (runs[-1][0], runs[-1][1] + n)
            else:
                runs.append((cluster, n))
            self.packing.before_freeing(cluster, n)
            cluster += n
        return runs

    def _need_blocks(self, first: int, n_clusters: int) -> None:
        for block_index in range(first >> self._block_bits, ((first + n_clusters - 1) >> self._block_bits) + 1):
            if block_index < len(self.table) and self.table[block_index]:
                self.block(block_index)

    def _are_ones(self, cluster: int, n: int) -> bool:
        """Whether each count of a run inside one block is one; may say no where counts are no whole bytes."""
        block_index = cluster >> self._block_bits
        if self._width < 8 or block_index >= len(self.table) or not self.table[block_index]:
            return False
        block = self.block(block_index)
        index = cluster & self._block_mask
        return block[index : index + n] == array(block.typecode, (1,)) * n

    def _release_ones(self, cluster: int, n: int) -> bool:
        """The whole run in one step, where it lies in one block and each count is one; False otherwise."""
        if not self._are_ones(cluster, n):
            return False
        block_index = cluster >> self._block_bits
        self.packing.before_freeing(cluster, n)
        block = self.block(block_index)
        index = cluster & self._block_mask
        block[index : index + n] = zero_table(block.typecode, n * block.itemsize)
        self.cache.mark_dirty(self.table[block_index], index, index + n)
        self._hint = min(self._hint, cluster)
        return True

    def _find_free(self, block: Table, index: int) -> int | None:
        if self._width >= 8:
            try:
                return block.index(0, index)
            except ValueError:
                return None
        per_byte = 8 // self._width
        while index % per_byte:  # the rest of a byte
            if self._get(block, index) == 0:
                return index
            index += 1
        has_free = _HAS_FREE[self._width]
        for start in range(index // per_byte, len(block), _SEARCH_BYTES):
            found = block[start : start + _SEARCH_BYTES].tobytes().translate(has_free).find(1)
            if found >= 0:
                index = (start + found) * per_byte
                while self._get(block, index):
                    index += 1
                return index
        return None

    def _free_run(self, first: int, n_clusters: int, *, across_blocks: bool) -> int:
        """How many clusters from `first` are free, up to `n_clusters`."""
        got = 0
        while got < n_clusters:
            cluster = first + got
            block_index = cluster >> self._block_bits
            if block_index >= len(self.table) or not self.table[block_index]:
                if not across_blocks or not self._is_beyond_the_file(block_index):
                    return got
                self._add_blocks(block_index, n_clusters)
                continue
            if got and not cluster & self._block_mask and not across_blocks:
                return got
            block = self.block(block_index)
            index = cluster & self._block_mask
            n = min(n_clusters - got, self._block_mask + 1 - index)
            free = self._zeroes_at(block, index, n)
            got += free
            if free < n:
                return got
        return got

    def _zeroes_at(self, block: Table, index: int, n: int) -> int:
        """How many of the `n` entries from `index` are zero before the first that is not."""
        if self._width >= 8:
            part = block[index : index + n]
            if part.tobytes() == bytes(n * block.itemsize):
                return n
        for i in range(n):
            if self._get(block, index + i):
                return i
        return n

    def _take(self, first: int, n_clusters: int) -> None:
        """Set the refcount of free clusters to 1."""
        for block_index in range(first >> self._block_bits, ((first + n_clusters - 1) >> self._block_bits) + 1):
            self.block(block_index)  # all of them must be here before the first is changed
        done = 0
        while done < n_clusters:
            cluster = first + done
            block_index = cluster >> self._block_bits
            block = self.block(block_index)
            index = cluster & self._block_mask
            n = min(n_clusters - done, self._block_mask + 1 - index)
            if self._width >= 8:
                block[index : index + n] = array(block.typecode, (1,)) * n
                self.cache.mark_dirty(self.table[block_index], index, index + n)
            else:
                for i in range(index, index + n):
                    self._set(block_index, block, i, 1)
            done += n
        self._hint = max(self._hint, first + n_clusters) if self._hint >= first else self._hint
        self._end = max(self._end, first + n_clusters)

    def _is_beyond_the_file(self, block_index: int) -> bool:
        """Whether clusters that no block counts may be taken into use.

        Inside the file an absent block means counts of zero, but also what a damaged table looks like: what lies there is
        left alone.  A device has no end that says what was written; only its first clusters are known to be in use.
        """
        if self._file.node.is_device:
            return block_index > 0
        return (block_index << self._block_bits) << self.geometry.cluster_bits >= self._file.size

    # -- growing ------------------------------------------------------------------------------------------------------

    def _add_blocks(self, block_index: int, run: int = 0) -> None:
        """Make refcount blocks for the clusters of table entry `block_index`, in the first of those clusters.

        Nothing can be in use there yet, so the blocks count themselves and no other block has to change.  Small clusters
        get several at once: a table entry costs a barrier at the flush that first uses it.  Where the table has room, a
        run of `run` clusters fits behind the blocks without meeting another.
        """
        if block_index >= len(self.table):
            self._grow_table(block_index)
            return
        n_blocks = 1
        coverage = self.geometry.cluster_size << self._block_bits
        while (
            ((n_blocks * coverage < 16 << 20 and n_blocks * 4 < self._block_mask) or n_blocks * self._block_mask < run)
            and block_index + n_blocks < len(self.table)
            and not self.table[block_index + n_blocks]
        ):
            n_blocks += 1
        self._place_blocks(block_index, n_blocks)

    def _place_blocks(self, block_index: int, n_blocks: int) -> None:
        first = block_index << self._block_bits
        cluster_bits = self.geometry.cluster_bits
        self._check_room(block_index, n_blocks)
        self._file.node.hear("refblock_alloc")
        self._look_at(first, n_blocks, "a new refcount block", is_table=True)
        for i in range(n_blocks):
            offset = (first + i) << cluster_bits
            self.new_blocks.add(offset)
            self.unbacked.add(offset)
            self.table[block_index + i] = offset
            self.dirty_table_entries.add(block_index + i)
            self.cache.insert(offset, zero_table(self.cache.typecode, self.geometry.cluster_size), dirty=True)
        self._take(first, n_blocks)

    def _check_room(self, block_index: int, n_clusters: int) -> None:
        end = ((block_index << self._block_bits) + n_clusters) << self.geometry.cluster_bits
        if end >= layout.MAX_HOST_OFFSET:
            raise ImageLimitError(
                f"{self._node}: the image file cannot grow beyond 64 PiB",
                structure="refcount table",
                expected=f"clusters below {layout.MAX_HOST_OFFSET:#x}",
                found=f"{end:#x}",
                node=self._node,
            )

    def _grow_table(self, block_index: int) -> None:
        """A larger refcount table, placed with the blocks that count it in clusters that no block counted so far."""
        geometry = self.geometry
        old_clusters = len(self.table) * 8 >> geometry.cluster_bits
        most = layout.MAX_REFCOUNT_TABLE_BYTES >> geometry.cluster_bits
        wanted = min(old_clusters * 3 // 2, most)
        n_blocks = 0
        while n_blocks * self._block_mask < wanted:  # each block counts itself and block_mask other clusters
            n_blocks += 1
            wanted = max(wanted, geometry.clusters_for((block_index + n_blocks) * 8))
        if wanted > most:
            raise ImageLimitError(
                f"{self._node}: the refcount table cannot grow beyond {layout.MAX_REFCOUNT_TABLE_BYTES} bytes",
                structure="refcount table",
                expected=f"at most {most} clusters",
                found=str(wanted),
                node=self._node,
            )
        self._check_room(block_index, n_blocks + wanted)
        self._file.node.hear("reftable_grow")
        first = block_index << self._block_bits
        self._look_at(first, n_blocks + wanted, "a new refcount table", is_table=True)
        old_first = self.table_offset >> geometry.cluster_bits
        self.table.extend(array("Q", bytes((wanted << geometry.cluster_bits) - len(self.table) * 8)))
        self._place_blocks(block_index, n_blocks)
        table_first = first + n_blocks
        self._take(table_first, wanted)
        self.outgrown_tables.append((old_first, old_clusters))
        self.table_offset = table_first << geometry.cluster_bits
        self.table_moved = True
