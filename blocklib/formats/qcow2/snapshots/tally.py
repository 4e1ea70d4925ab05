"""References of whole L1 tables at once, for snapshots: how refcounts and copied flags change when one comes or goes.

Works on the file, around the caches: the caller has drained the image and written everything back.  Nothing is written
here; a change that the counts do not allow raises before anybody has written anything.  This is the scalar definition;
`tally_table` does the same with numpy where there is much.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from blocklib.errors import BlocklibError, ImageCorruptError, ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.tables import Table, read_table, table_to_bytes

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_SMALL: Final = 1 << 20
"""Bytes of L2 tables up to which importing numpy would take longer than working without it."""
_TYPECODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}

Write = tuple[int, bytes]
"""(host offset, bytes)."""


def tally_for(node: Qcow2Node, tables: Iterable[Table]) -> type[Tally]:
    """The class that is faster for these L1 tables together."""
    n_tables = sum(len(table) - table.count(0) for table in tables)
    if n_tables << node.geometry.cluster_bits <= _SMALL:
        return Tally
    from blocklib.formats.qcow2.snapshots.tally_table import TableTally

    return TableTally


class Tally:
    """How often host clusters are referred to, in addition to (or, with `sign` -1, less than) what is counted now."""

    def __init__(self, node: Qcow2Node, sign: int) -> None:
        self._file = node.file
        self._geometry = node.geometry
        self._table = node.refcounts.table
        self._cache = node.refcounts.cache
        self._node = node.filename
        self.sign = sign
        self._changes: Counter[int] = Counter()
        self._blocks: dict[int, Table] = {}
        """Refcount blocks by index, as they are or, once `block_writes` has run, will be."""
        self.freed: list[tuple[int, int]] = []
        """Runs (first cluster, number) of host clusters, ascending, whose count `block_writes` has brought to zero."""

    # -- collecting ---------------------------------------------------------------------------------------------------

    def add_l1(self, l1: Table) -> None:
        """Everything that an L1 table refers to: its L2 tables and what their entries point at.

        Raises ImageCorruptError, StorageError.
        """
        offsets = l2_offsets(l1, self._geometry.cluster_mask, self._file.size, self._node)
        self._add(offset >> self._geometry.cluster_bits for offset in offsets)
        for offset in offsets:
            self._add_entries(offset)

    def add_run(self, first: int, n: int) -> None:
        """Host clusters [first, first + n)."""
        self._add(range(first, first + n))

    def _add(self, clusters: Iterable[int]) -> None:
        self._changes.update(clusters)

    def _add_entries(self, offset: int) -> None:
        geometry = self._geometry
        bits, mask = geometry.cluster_bits, geometry.cluster_mask
        entries = self._entries(offset)
        plain = [entry for entry in entries if entry]
        if any(entry & layout.FLAG_COMPRESSED for entry in plain):
            for entry in plain:
                if entry & layout.FLAG_COMPRESSED:
                    self._add(self._compressed_clusters(entry))
            plain = [entry for entry in plain if not entry & layout.FLAG_COMPRESSED]
        hosts = [entry & layout.OFFSET_MASK for entry in plain]
        if any(host & mask for host in hosts):
            raise self.misaligned(offset, next(host for host in hosts if host & mask))
        self._add([host >> bits for host in hosts if host])

    def _compressed_clusters(self, entry: int) -> range:
        host_offset, length = self._geometry.decode_compressed(entry)
        bits = self._geometry.cluster_bits
        return range(host_offset >> bits, ((host_offset + length - 1) >> bits) + 1)

    def _entries(self, offset: int) -> Table:
        """The first word of each entry of the L2 table at host `offset`."""
        words = read_table(self._file, "Q", offset, self._geometry.cluster_size)
        return words[:: self._geometry.l2_entry_length // layout.L2_ENTRY_LENGTH]

    def misaligned(self, table_offset: int, host_offset: int) -> ImageCorruptError:
        return ImageCorruptError(
            f"{self._node}: an L2 entry of the table at {table_offset:#x} points at {host_offset:#x}",
            structure="L2 entry",
            host_offset=table_offset,
            expected="a cluster aligned offset",
            found=f"{host_offset:#x}",
            node=self._node,
        )

    # -- counts -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ImageLimitError where a count would outgrow its width, ImageCorruptError where there is none to change."""
        for _write in self._changed_blocks():
            pass
        self._blocks.clear()
        self.freed.clear()

    def block_writes(self) -> Iterator[Write]:
        """The refcount blocks with the change in them.  Raises as `check`, as long as nothing was taken from it."""
        yield from list(self._changed_blocks())

    def _changed_blocks(self) -> Iterator[Write]:
        self._blocks.clear()
        self.freed.clear()
        block_bits = self._geometry.refcount_block_bits
        block_mask = self._geometry.refcount_block_entries - 1
        touched = set()
        for cluster in sorted(self._changes):
            self._refuse_outside(cluster)
            index = cluster >> block_bits
            block = self._block(index)
            if block is None:
                raise self.wrong_count(cluster, 0)
            before = self._get(block, cluster & block_mask)
            count = before + self.sign * self._changes[cluster]
            if not before or not 0 <= count <= self._geometry.max_refcount:
                raise self.wrong_count(cluster, before)
            self._set(block, cluster & block_mask, count)
            touched.add(index)
            if not count:
                self._note_freed(cluster, 1)
        for index in sorted(touched):
            yield self._table[index], table_to_bytes(self._blocks[index])

    def _note_freed(self, first: int, n: int) -> None:
        if self.freed and sum(self.freed[-1]) == first:
            self.freed[-1] = self.freed[-1][0], self.freed[-1][1] + n
        else:
            self.freed.append((first, n))

    def block_offsets(self) -> list[int]:
        """Host offsets of the refcount blocks that change; `check` has passed."""
        block_bits = self._geometry.refcount_block_bits
        return [self._table[index] for index in sorted({cluster >> block_bits for cluster in self._changes})]

    def _refuse_outside(self, cluster: int) -> None:
        """Raises ImageCorruptError for a cluster behind the end of the file: arrays are as long as their last index."""
        if cluster >= self._geometry.clusters_for(self._file.size):
            raise ImageCorruptError(
                f"{self._node}: an entry points at host cluster {cluster}, outside the file",
                structure="L2 entry",
                expected=f"a cluster inside the file of {self._file.size} bytes",
                found=f"{cluster << self._geometry.cluster_bits:#x}",
                node=self._node,
            )

    def wrong_count(self, cluster: int, count: int) -> BlocklibError:
        """Why a count cannot change as it should."""
        if self.sign > 0 and count:
            return ImageLimitError(
                f"{self._node}: host cluster {cluster} has a reference count of {count}, and with "
                f"{self._geometry.refcount_bits} bits for it no more references can be counted",
                structure="refcount block entry",
                host_offset=cluster << self._geometry.cluster_bits,
                expected=f"room below {self._geometry.max_refcount}",
                found=str(count),
                node=self._node,
            )
        return ImageCorruptError(
            f"{self._node}: host cluster {cluster} is in use more often than its reference count of {count} says; "
            "repair the image first",
            structure="refcount block entry",
            host_offset=cluster << self._geometry.cluster_bits,
            expected="a reference for each use",
            found=str(count),
            node=self._node,
        )

    def block_offset(self, index: int) -> int | None:
        """Host offset of the refcount block with this index, None where there is none."""
        if index >= len(self._table) or not self._table[index]:
            return None
        offset = self._table[index]
        if offset & (layout.REFCOUNT_TABLE_RESERVED_MASK | self._geometry.cluster_mask):
            raise ImageCorruptError(
                f"{self._node}: refcount table entry {index} is {offset:#x}",
                structure="refcount table entry",
                expected="the cluster aligned offset of a refcount block",
                found=f"{offset:#x}",
                node=self._node,
            )
        self._cache.check_inside_file(offset)
        return offset

    def _block(self, index: int) -> Table | None:
        block = self._blocks.get(index)
        if block is None:
            offset = self.block_offset(index)
            if offset is None:
                return None
            typecode = _TYPECODES.get(self._geometry.refcount_order, "B")
            block = self._blocks[index] = read_table(self._file, typecode, offset, self._geometry.cluster_size)
        return block

    def _get(self, block: Table, index: int) -> int:
        width = self._geometry.refcount_bits
        if width >= 8:
            return block[index]
        position = index * width
        return block[position >> 3] >> (position & 7) & ((1 << width) - 1)

    def _set(self, block: Table, index: int, count: int) -> None:
        width = self._geometry.refcount_bits
        if width >= 8:
            block[index] = count
            return
        unit, shift = index * width >> 3, index * width & 7
        block[unit] = block[unit] & ~(((1 << width) - 1) << shift) | count << shift

    # -- flags --------------------------------------------------------------------------------------------------------

    def flag_writes(self, l1: Table) -> Iterator[Write]:
        """The L2 tables below an L1 table whose copied flags are not what the counts, with the change, say."""
        offsets = l2_offsets(l1, self._geometry.cluster_mask, self._file.size, self._node)
        for offset in dict.fromkeys(offsets):
            words = read_table(self._file, "Q", offset, self._geometry.cluster_size)
            changed = False
            step = self._geometry.l2_entry_length // layout.L2_ENTRY_LENGTH
            for index in range(0, len(words), step):
                entry = words[index]
                if entry:
                    flagged = self._with_flag(entry)
                    if flagged != entry:
                        words[index] = flagged
                        changed = True
            if changed:
                yield offset, table_to_bytes(words)

    def flagged_l1(self, l1: Table) -> Table:
        """An L1 table with the copied flags that its L2 tables' counts call for."""
        return array("Q", [entry and self._with_flag(entry) for entry in l1])

    def _with_flag(self, entry: int) -> int:
        entry &= ~layout.FLAG_COPIED
        if entry & layout.FLAG_COMPRESSED or not entry & layout.OFFSET_MASK:
            return entry
        cluster = (entry & layout.OFFSET_MASK) >> self._geometry.cluster_bits
        block = self._block(cluster >> self._geometry.refcount_block_bits)
        if block is None or self._get(block, cluster & (self._geometry.refcount_block_entries - 1)) != 1:
            return entry
        return entry | layout.FLAG_COPIED


def l2_offsets(l1: Sequence[int], cluster_mask: int, file_size: int, node: str | None) -> list[int]:
    """Host offsets of the L2 tables of an L1 table, in its order.  Raises ImageCorruptError for one that cannot be."""
    offsets = [entry & layout.OFFSET_MASK for entry in l1 if entry & layout.OFFSET_MASK]
    for offset in offsets:
        if offset & cluster_mask or offset >= file_size:
            raise ImageCorruptError(
                f"{node}: an L1 entry points at {offset:#x}",
                structure="L1 entry",
                expected=f"a cluster aligned offset inside the file of {file_size} bytes",
                found=f"{offset:#x}",
                node=node,
            )
    return offsets
