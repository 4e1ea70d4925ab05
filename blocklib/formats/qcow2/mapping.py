"""Guest clusters to host clusters: looking up, and linking what was newly written.

`Mapping` is for standard L2 entries; `SubclusterMapping` for extended ones overrides what is said of an entry.

Lookups take no lock: an L2 entry is eight bytes, read once.  Changes are made under the image's lock, in memory only; a
table that is not cached raises MissingTableError before anything was changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from blocklib.errors import ImageCorruptError
from blocklib.extents import (
    FLAG_ALLOCATED,
    FLAG_COMPRESSED,
    FLAG_DATA,
    FLAG_OFFSET_VALID,
    FLAG_RECURSE,
    FLAG_ZERO,
    KIND_BACKING,
    KIND_DATA,
    KIND_SPECIAL,
    KIND_ZERO,
    Run,
)
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.cache import TableCache
from blocklib.formats.qcow2.tables import Table, zeroes_end

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.refcounts import Refcounts
    from blocklib.graph import Edge

_OFFSET_MASK = layout.OFFSET_MASK
_COPIED = layout.FLAG_COPIED
_COMPRESSED = layout.FLAG_COMPRESSED
_ZERO = layout.FLAG_ZERO


class Mapping:
    """The L1 table and a cache of L2 slices.  `l1` has an entry for every part of the disk.

    A slice is a table of 64-bit words.  The *index* of an entry is that of its first word: ``table[index]`` is the standard
    descriptor, and the next entry is `words` further on.
    """

    words: ClassVar[int] = 1
    """The words of an L2 entry."""
    zero_flag: ClassVar[int] = layout.FLAG_ZERO
    """What in the first word of an entry makes the whole cluster read as zero."""
    zero_bitmap: ClassVar[int] = 0
    """And in the second."""

    def __init__(
        self,
        file: Edge,
        geometry: Geometry,
        l1: Table,
        l1_offset: int,
        *,
        version: int,
        external: bool = False,
        slice_length: int,
        cache_bytes: int,
        node: str | None,
    ) -> None:
        self.geometry = geometry
        self.l1 = l1
        self.l1_offset = l1_offset
        self._node = node
        self.zero_flag_allowed = version >= layout.VERSION_3
        self.external = external
        """Guest clusters lie in an external data file, each at its guest offset."""
        self.allocated_mask = _OFFSET_MASK | (_COPIED if external else 0)
        """An entry without zero flag has a host cluster if any of these bits is set: offset 0 is one in a data file."""
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._misaligned = _OFFSET_MASK & geometry.cluster_mask
        self._l1_shift = geometry.l1_shift
        self.slice_length = slice_length
        self.slice_entries = slice_length // geometry.l2_entry_length
        """Guest clusters that one slice maps."""
        self._slice_shift = geometry.cluster_bits + self.slice_entries.bit_length() - 1
        self._slices_mask = (1 << (geometry.l1_shift - self._slice_shift)) - 1
        # Copying a table needs all of its slices at once, old and new.
        cache_bytes = max(cache_bytes, 2 << geometry.cluster_bits)
        self.cache = TableCache(file, "Q", slice_length, cache_bytes, structure="L2 table", node=node)
        self.dirty_l1: set[int] = set()
        self.new_tables: set[int] = set()
        self.copied_tables: dict[int, int] = {}
        """Host offsets of new tables that are copies and may have no space yet -> L1 entries that they have replaced."""
        """Host offsets of L2 tables that the file's L1 table does not point at yet."""
        self.doubtful_tables: set[int] = set()
        """Those that it may point at or not, because a flush failed."""
        self.data_flags = FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID
        """What to report of a plain data cluster; FLAG_RECURSE is added for preallocated images."""
        self.decompressed: tuple[int, bytes] | None = None
        """A compressed descriptor and the cluster behind it, the last of which a part was read.

        Only a compressed write puts another stream where one was, and forgets this before its descriptor can be found.
        """

    def report_holes(self) -> None:
        """Data clusters may be holes in the file (preallocation): let block status ask it."""
        self.data_flags |= FLAG_RECURSE

    # -- looking up ---------------------------------------------------------------------------------------------------

    def slice_at(self, guest_offset: int) -> int | None:
        """Host offset of the L2 slice that maps `guest_offset`, or None where there is no L2 table."""
        entry = self.l1[guest_offset >> self._l1_shift]
        host_offset = entry & _OFFSET_MASK
        if not host_offset:
            return None
        if host_offset & self._cluster_mask:
            raise self._bad_l1_entry(guest_offset, entry)
        return host_offset + (guest_offset >> self._slice_shift & self._slices_mask) * self.slice_length

    def resolve(self, table: Table, index: int, offset: int, length: int, edge: Edge) -> Run:
        """The run at guest `offset`, which entry `index` of the L2 slice `table` maps; ends with the slice."""
        entry = table[index]
        in_cluster = offset & self._cluster_mask
        stop = min(len(table), index + ((in_cluster + length + self._cluster_mask) >> self._cluster_bits))
        host_offset = entry & _OFFSET_MASK
        j = index + 1
        if self.external:
            self.check_external(entry, offset - in_cluster)
        if entry & _COMPRESSED:
            while j < stop and table[j] & _COMPRESSED:
                j += 1
            n = min(length, ((j - index) << self._cluster_bits) - in_cluster)
            return KIND_SPECIAL, None, 0, n, FLAG_DATA | FLAG_ALLOCATED | FLAG_COMPRESSED
        if entry & _ZERO:
            if not self.zero_flag_allowed:
                raise self.bad_entry(offset, entry, "no zero flag in a version 2 image")
            if host_offset:  # 0 is none, even in a data file: so QEMU reads it
                if host_offset & self._cluster_mask:
                    raise self.bad_entry(offset, entry, "a cluster aligned offset")
                expected = entry + self._cluster_size
                while j < stop and table[j] == expected:
                    expected += self._cluster_size
                    j += 1
                flags = FLAG_ZERO | FLAG_ALLOCATED | FLAG_OFFSET_VALID
            else:
                while j < stop and table[j] & ~_COPIED == _ZERO:
                    j += 1
                flags = FLAG_ZERO | FLAG_ALLOCATED
            n = min(length, ((j - index) << self._cluster_bits) - in_cluster)
            return KIND_ZERO, edge, host_offset + in_cluster, n, flags
        if not entry & self.allocated_mask:
            if entry & ~_COPIED:
                raise self.bad_entry(offset, entry, "reserved bits of zero")
            while j < stop and not table[j] & ~_COPIED:
                j += 1
            n = min(length, ((j - index) << self._cluster_bits) - in_cluster)
            return KIND_BACKING, None, 0, n, 0
        if host_offset & self._cluster_mask:
            raise self.bad_entry(offset, entry, "a cluster aligned offset")
        expected = entry + self._cluster_size
        while j < stop and table[j] == expected:
            expected += self._cluster_size
            j += 1
        n = min(length, ((j - index) << self._cluster_bits) - in_cluster)
        return KIND_DATA, edge, host_offset + in_cluster, n, self.data_flags

    def unmapped_length(self, offset: int, length: int) -> int:
        """How many of the `length` bytes from guest `offset`, which has no L2 table, have none either."""
        index = (offset >> self._l1_shift) + 1
        stop = ((offset + length - 1) >> self._l1_shift) + 1
        l1 = self.l1
        while index < stop and not l1[index] & _OFFSET_MASK:
            index = max(index + 1, zeroes_end(l1, index, stop))
        return min(length, (index << self._l1_shift) - offset)

    def mapped_length(self, offset: int, length: int, most: int) -> int:
        """How many of the `length` bytes from guest `offset`, which has an L2 table, have one, of `most` bytes of tables."""
        index = (offset >> self._l1_shift) + 1
        stop = min((offset + length - 1) >> self._l1_shift, index + (most >> self._cluster_bits) - 2) + 1
        l1 = self.l1
        while index < stop and l1[index] & _OFFSET_MASK:
            index += 1
        return min(length, (index << self._l1_shift) - offset)

    def entries(self, offset: int, length: int) -> int:
        """How many L2 entries there are for the range."""
        first, stop = offset >> self._l1_shift, (offset + length + (1 << self._l1_shift) - 1) >> self._l1_shift
        present = self.l1[zeroes_end(self.l1, first, min(stop, len(self.l1))) : stop]
        return (len(present) - present.count(0)) << self.geometry.l2_bits

    def index_in_slice(self, offset: int) -> int:
        return offset >> self._cluster_bits & (self.slice_entries - 1)

    def check_external(self, entry: int, guest_offset: int) -> None:
        """Raises ImageCorruptError where an entry of an image with a data file is not for the cluster at `guest_offset`.

        'The offset field in the Standard Cluster Descriptor must match the guest offset.'
        """
        if entry & _COMPRESSED:
            raise self.bad_entry(guest_offset, entry, "no compressed cluster in an image with an external data file")
        if entry & (_OFFSET_MASK if entry & _ZERO else self.allocated_mask) and entry & _OFFSET_MASK != guest_offset:
            raise self.bad_entry(guest_offset, entry, f"the guest offset {guest_offset:#x} as the offset in the data file")

    def are_set(self, marks: Table, index: int, offset: int, length: int) -> bool:
        """Whether all is marked that maps the range, which begins at `index`; there is a mark for each word of the slice."""
        clusters = ((offset & self._cluster_mask) + length + self._cluster_mask) >> self._cluster_bits
        return 0 not in marks[index : index + clusters * self.words]

    def entry_at(self, table: Table, index: int) -> tuple[int, int]:
        """Both words of an entry, as they were at one moment; the second is 0 where entries have one only."""
        return table[index], 0

    def bad_entry(self, guest_offset: int, entry: int, expected: str, found: str = "") -> ImageCorruptError:
        """The error for the L2 entry that maps `guest_offset`."""
        found = found or f"{entry:#x}"
        slice_offset = self.slice_at(guest_offset)
        assert slice_offset is not None
        return self._bad("L2 entry", slice_offset + self.index_in_slice(guest_offset) * 8, found, expected)

    def misplaced(self, entry: int) -> ImageCorruptError:
        """The error for an L2 entry, wherever it is, that refers to no whole cluster."""
        return self._bad("L2 entry", None, f"{entry:#x}", "a cluster aligned offset")

    def _bad_l1_entry(self, guest_offset: int, entry: int) -> ImageCorruptError:
        place = self.l1_offset + (guest_offset >> self._l1_shift) * 8
        return self._bad("L1 entry", place, f"{entry:#x}", "a cluster aligned offset")

    def _bad(self, structure: str, host_offset: int | None, found: str, expected: str) -> ImageCorruptError:
        place = f" at {host_offset:#x}" if host_offset is not None else ""
        return ImageCorruptError(
            f"{self._node}: {structure} {found}{place} where {expected} was expected",
            structure=structure,
            host_offset=host_offset,
            expected=expected,
            found=found,
            node=self._node,
        )

    # -- changing -----------------------------------------------------------------------------------------------------

    def has_own_table(self, guest_offset: int) -> bool:
        """Whether `slice_for_change` would make no table for this offset."""
        return self.slice_at(guest_offset) is not None and bool(self.l1[guest_offset >> self._l1_shift] & _COPIED)

    def slice_for_change(self, guest_offset: int, refcounts: Refcounts, freed: list[tuple[int, int]]) -> tuple[int, Table]:
        """(host offset, table) of the L2 slice that maps `guest_offset`, in an L2 table that is ours to change.

        A missing L2 table is allocated; one shared with a snapshot is copied, its old cluster added to `freed`.
        """
        l1_index = guest_offset >> self._l1_shift
        entry = self.l1[l1_index]
        host_offset = self.slice_at(guest_offset)
        if host_offset is not None and entry & _COPIED:
            return host_offset, self.cache.need(host_offset)
        old_offset = entry & _OFFSET_MASK
        slices = range(0, self._cluster_size, self.slice_length)
        old = [self.cache.need(old_offset + start) for start in slices] if host_offset is not None else []
        cluster, _n = refcounts.allocate(1)
        new_offset = cluster << self._cluster_bits
        for number, start in enumerate(slices):
            table = old[number][:] if old else array("Q", bytes(self.slice_length))
            self.cache.insert(new_offset + start, table, dirty=True)
        self.l1[l1_index] = new_offset | _COPIED
        self.dirty_l1.add(l1_index)
        self.new_tables.add(new_offset)
        refcounts.unbacked.add(new_offset)
        if old:
            freed.append((old_offset >> self._cluster_bits, 1))
            self.copied_tables[new_offset] = entry
        start = (guest_offset >> self._slice_shift & self._slices_mask) * self.slice_length
        return new_offset + start, self.cache.need(new_offset + start)

    def in_place(self, table: Table, offset: int, length: int) -> tuple[int, int]:
        """(host offset of guest `offset`, bytes) of what may be written where it is: plain, ours alone and contiguous."""
        index = offset >> self._cluster_bits & (self.slice_entries - 1)
        entry = table[index]  # once: it may change under a reader without the lock
        if not entry & _COPIED or entry & (_COMPRESSED | _ZERO):
            return 0, 0
        in_cluster = offset & self._cluster_mask
        stop = min(len(table), index + ((in_cluster + length + self._cluster_mask) >> self._cluster_bits))
        host_offset, n = self._contiguous_run(table, offset, index, stop, entry)
        return host_offset + in_cluster, min(length, (n << self._cluster_bits) - in_cluster) if n else 0

    def own_run(self, table: Table, offset: int, stop: int) -> tuple[int, int]:
        """(host offset, number) of the clusters from guest `offset`, before index `stop`, that cannot be written in place,
        but have a place of their own to be written to, contiguous on the host."""
        index = self.index_in_slice(offset)
        entry = table[index]
        if not entry & _COPIED or not entry & _ZERO or entry & _COMPRESSED:
            return 0, 0
        return self._contiguous_run(table, offset, index, stop, entry)

    def _contiguous_run(self, table: Table, offset: int, index: int, stop: int, entry: int) -> tuple[int, int]:
        host_offset = entry & _OFFSET_MASK
        if not entry & self.allocated_mask:
            return 0, 0
        if host_offset & self._cluster_mask:
            raise self.bad_entry(offset, entry, "a cluster aligned offset")
        j = index + 1
        expected = entry + self._cluster_size
        while j < stop and table[j] == expected:
            expected += self._cluster_size
            j += 1
        return host_offset, j - index

    def new_run(self, table: Table, offset: int, stop: int) -> int:
        """How many clusters from guest `offset`, before index `stop`, need a fresh host cluster to be written."""
        index = j = self.index_in_slice(offset)
        while j < stop:
            entry = table[j]
            if entry & _COPIED and not entry & _COMPRESSED and entry & self.allocated_mask:
                break
            if entry & self._misaligned and not entry & _COMPRESSED:
                raise self.bad_entry(offset + ((j - index) << self._cluster_bits), entry, "a cluster aligned offset")
            j += 1
        return j - index

    def cow_range(self, table: Table, index: int, start: int, end: int, *, own: bool) -> tuple[int, int]:
        """How far what is written must reach, so that bytes [start, end) from the cluster at `index` can be linked.

        Bytes count from the start of that cluster.  `own`: they go to the place that the clusters have already.
        """
        return 0, (end + self._cluster_mask) & ~self._cluster_mask

    def link(self, slice_offset: int, table: Table, index: int, host_offset: int, n: int, start: int, end: int) -> None:
        """Point `n` entries at consecutive host clusters of our own, of which bytes [start, end) were written."""
        first = host_offset | _COPIED
        if n == 1:
            table[index] = first
        else:
            table[index : index + n] = array("Q", range(first, first + n * self._cluster_size, self._cluster_size))
        self.cache.mark_dirty(slice_offset, index, index + n)

    def absent_run(self, table: Table, index: int, stop: int) -> int:
        """How many clusters from `index`, before `stop`, could be given a host cluster that is never written."""
        part = table[index:stop]
        if part.tobytes() == bytes(len(part) * part.itemsize):
            return len(part)
        return next((i for i, entry in enumerate(part) if entry), len(part))

    def give_place(self, slice_offset: int, table: Table, index: int, host_offset: int, n: int) -> None:
        """Point `n` entries that `absent_run` found at consecutive host clusters, which read as zero, of our own."""
        self.link(slice_offset, table, index, host_offset, n, 0, n << self._cluster_bits)

    def zeroed_part(
        self, entry: int, bitmap: int, offset: int, length: int, *, shows_backing: bool
    ) -> tuple[int, int] | None:
        """The words of an entry once part of its cluster, from guest `offset`, reads as zero; None where bytes must be
        written.  The part is some subclusters, or lies inside one."""
        if entry & _COMPRESSED:
            return None
        if entry & _ZERO:
            return entry, 0
        if entry & self.allocated_mask or shows_backing:
            return None
        return (_ZERO if self.zero_flag_allowed else entry), 0

    def set_entry(self, slice_offset: int, table: Table, index: int, entry: int, bitmap: int = 0) -> None:
        """Put another entry in."""
        self.replace(slice_offset, table, index, array("Q", (entry,)))

    def replace(self, slice_offset: int, table: Table, index: int, entries: Table) -> None:
        """Put other entries in, all of their words."""
        if table[index : index + len(entries)] != entries:
            table[index : index + len(entries)] = entries
            self.cache.mark_dirty(slice_offset, index, index + len(entries))

    def host_clusters_of(self, entries: Iterable[int]) -> list[tuple[int, int]]:
        """The runs (first cluster, number) of counted host clusters that first words of entries refer to, one reference each.

        Raises ImageCorruptError where an entry refers to no whole cluster: which count it has a share in, nobody knows.
        """
        runs: list[tuple[int, int]] = []
        if self.external:  # nobody counts what lies in a data file
            return runs
        bits = self._cluster_bits
        for entry in entries:
            if entry & _COMPRESSED:
                host_offset, length = self.geometry.decode_compressed(entry)
                first = host_offset >> bits
                n = ((host_offset + length - 1) >> bits) - first + 1
            else:
                host_offset = entry & _OFFSET_MASK
                if not host_offset:
                    continue
                if entry & self._misaligned:
                    raise self.misplaced(entry)
                first = host_offset >> bits
                n = 1
            if runs and runs[-1][0] + runs[-1][1] == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + n)
            else:
                runs.append((first, n))
        return runs
