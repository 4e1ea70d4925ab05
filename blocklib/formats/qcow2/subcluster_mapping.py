"""The mapping of images with extended L2 entries: 32 subclusters that are each allocated, zero, or neither.

An entry is two words that are true only together.  Lookups take no lock, so a pair is never read or written in two steps:
it is read by one call of `Struct.unpack_from` and written by one slice assignment.  Each is a single C call that copies the
bytes while it holds the interpreter's lock, so that no thread sees one new word beside an old one.  For the same reason
tables are copied by ``array`` (``table[:]``, ``tobytes``) before numpy, which lets go of that lock, may look at them.
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import TYPE_CHECKING, ClassVar

from blocklib.extents import (
    FLAG_ALLOCATED,
    FLAG_COMPRESSED,
    FLAG_DATA,
    FLAG_OFFSET_VALID,
    FLAG_ZERO,
    KIND_BACKING,
    KIND_DATA,
    KIND_SPECIAL,
    KIND_ZERO,
    Run,
)
from blocklib.formats.qcow2 import layout, subclusters
from blocklib.formats.qcow2.mapping import Mapping

if TYPE_CHECKING:
    from blocklib.errors import ImageCorruptError
    from blocklib.formats.qcow2.tables import Table
    from blocklib.graph import Edge

_OFFSET_MASK = layout.OFFSET_MASK
_COPIED = layout.FLAG_COPIED
_COMPRESSED = layout.FLAG_COMPRESSED
_ZERO = layout.FLAG_ZERO

_N = subclusters.N
_ALL = subclusters.ALL
_pair = Struct("=QQ").unpack_from

_NEEDS = {
    "zero flag": "no zero flag beside a subcluster bitmap",
    "alignment": "a cluster aligned offset",
    "reserved": "reserved bits of zero",
    "absent": "no allocated subclusters without a host cluster",
    "both": "no subcluster that is both allocated and zero",
}


class SubclusterMapping(Mapping):
    """The same for extended L2 entries."""

    words: ClassVar[int] = 2
    zero_flag: ClassVar[int] = 0
    zero_bitmap: ClassVar[int] = subclusters.ALL_ZERO

    # -- looking up ---------------------------------------------------------------------------------------------------

    def index_in_slice(self, offset: int) -> int:
        return (offset >> self._cluster_bits & (self.slice_entries - 1)) << 1

    def entry_at(self, table: Table, index: int) -> tuple[int, int]:
        entry, bitmap = _pair(table, index << 3)
        return entry, bitmap

    def resolve(self, table: Table, index: int, offset: int, length: int, edge: Edge) -> Run:
        entry, bitmap = _pair(table, index << 3)
        in_cluster = offset & self._cluster_mask
        if self.external:
            self.check_external(entry, offset - in_cluster)
        if entry & _COMPRESSED:
            j, stop = index + 2, index + ((in_cluster + length + self._cluster_mask) >> self._cluster_bits << 1)
            while j < min(stop, len(table)) and table[j] & _COMPRESSED:
                j += 2
            n = min(length, ((j - index) >> 1 << self._cluster_bits) - in_cluster)
            return KIND_SPECIAL, None, 0, n, FLAG_DATA | FLAG_ALLOCATED | FLAG_COMPRESSED
        host_offset = self._checked(offset, entry, bitmap)
        first = in_cluster >> self.geometry.subcluster_bits
        n = min(length, self._alike(table, index, in_cluster, length, entry, bitmap) - in_cluster)
        placed = FLAG_OFFSET_VALID if entry & self.allocated_mask else 0
        if bitmap >> first & 1:
            return KIND_DATA, edge, host_offset + in_cluster, n, self.data_flags
        if bitmap >> (_N + first) & 1:
            return KIND_ZERO, edge, host_offset + in_cluster if placed else 0, n, FLAG_ZERO | FLAG_ALLOCATED | placed
        # A place that is not in use yet: block status tells it where nothing lies below.
        return KIND_BACKING, edge if placed else None, host_offset + in_cluster if placed else 0, n, placed

    def _alike(self, table: Table, index: int, start: int, length: int, entry: int, bitmap: int) -> int:
        """Where the run ends that begins at byte `start` of the cluster at `index`: one state, and one place on the host.

        Counted from the start of the cluster; looks no further than `length` bytes need.
        """
        bits = self.geometry.subcluster_bits
        first = start >> bits
        stop = first + subclusters.run_length(subclusters.like(bitmap, first), first)
        end = stop << bits
        limit = start + length
        state = bitmap >> first & 1 | (bitmap >> (_N + first) & 1) << 1
        placed = entry & self.allocated_mask
        place = entry & _OFFSET_MASK
        while stop == _N and end < limit:
            index += 2
            if index >= len(table):
                break
            entry, bitmap = _pair(table, index << 3)
            place += self._cluster_size
            if entry & _COMPRESSED or (entry & _OFFSET_MASK != place if placed else entry & self.allocated_mask):
                break
            if self.fault(entry, bitmap):
                break
            if bitmap & 1 | (bitmap >> _N & 1) << 1 != state:
                break
            stop = subclusters.run_length(subclusters.like(bitmap, 0), 0)
            end += stop << bits
        return end

    def fault(self, entry: int, bitmap: int) -> str | None:
        """What is wrong with an entry that is not compressed, a key of _NEEDS."""
        if entry & _ZERO:
            return "zero flag"
        if entry & _OFFSET_MASK & self._cluster_mask:
            return "alignment"
        if not entry & self.allocated_mask:
            if entry & ~_COPIED:
                return "reserved"
            if bitmap & _ALL:
                return "absent"
        if bitmap & bitmap >> _N:
            return "both"
        return None

    def _checked(self, offset: int, entry: int, bitmap: int) -> int:
        """The host offset of the cluster that guest `offset` is in, 0 where there is none.  Raises ImageCorruptError."""
        fault = self.fault(entry, bitmap)
        if fault is not None:
            raise self.bad_pair(offset, entry, bitmap, fault)
        return entry & _OFFSET_MASK

    def bad_pair(self, guest_offset: int, entry: int, bitmap: int, fault: str) -> ImageCorruptError:
        return self.bad_entry(guest_offset, entry, _NEEDS[fault], f"{entry:#x}, subclusters {bitmap:#018x},")

    # -- changing -----------------------------------------------------------------------------------------------------

    def in_place(self, table: Table, offset: int, length: int) -> tuple[int, int]:
        index = (offset >> self._cluster_bits & (self.slice_entries - 1)) << 1
        entry, bitmap = _pair(table, index << 3)
        if not entry & _COPIED or entry & _COMPRESSED:
            return 0, 0
        in_cluster = offset & self._cluster_mask
        sub_bits = self.geometry.subcluster_bits
        if not bitmap >> (in_cluster >> sub_bits) & 1:
            return 0, 0
        host_offset = self._checked(offset, entry, bitmap)
        first = in_cluster >> sub_bits
        stop = first + subclusters.run_length(bitmap & _ALL, first)
        end = stop << sub_bits
        limit = in_cluster + length
        while stop == _N and end < limit:
            index += 2
            if index >= len(table):
                break
            entry += self._cluster_size
            found, bitmap = _pair(table, index << 3)
            if found != entry or self.fault(found, bitmap):
                break
            stop = subclusters.run_length(bitmap & _ALL, 0)
            end += stop << sub_bits
        return host_offset + in_cluster, min(length, end - in_cluster)

    def own_run(self, table: Table, offset: int, stop: int) -> tuple[int, int]:
        index = self.index_in_slice(offset)
        entry, bitmap = _pair(table, index << 3)
        if not entry & _COPIED or entry & _COMPRESSED or not entry & self.allocated_mask:
            return 0, 0
        host_offset = self._checked(offset, entry, bitmap)
        j = index + 2
        while j < stop:
            entry += self._cluster_size
            found, bitmap = _pair(table, j << 3)
            if found != entry or self.fault(found, bitmap):
                break
            j += 2
        return host_offset, (j - index) >> 1

    def new_run(self, table: Table, offset: int, stop: int) -> int:
        index = j = self.index_in_slice(offset)
        while j < stop:
            entry, bitmap = _pair(table, j << 3)
            if not entry & _COMPRESSED:
                if entry & _COPIED and entry & self.allocated_mask:
                    break
                fault = self.fault(entry, bitmap)
                if fault is not None:
                    if j == index:
                        raise self.bad_pair(offset, entry, bitmap, fault)
                    break
            j += 2
        return (j - index) >> 1

    def cow_range(self, table: Table, index: int, start: int, end: int, *, own: bool) -> tuple[int, int]:
        sub_bits = self.geometry.subcluster_bits
        last_cluster = (end - 1) >> self._cluster_bits
        first = start >> sub_bits
        stop = ((end - 1 & self._cluster_mask) >> sub_bits) + 1
        entry, bitmap = _pair(table, index << 3)
        last_entry, last_bitmap = _pair(table, (index + 2 * last_cluster) << 3)
        if own:
            # What is allocated stays where it is, so only subclusters that are not need the rest of their bytes.
            if not bitmap >> first & 1:
                start = first << sub_bits
            if not last_bitmap >> (stop - 1) & 1:
                end = (last_cluster << self._cluster_bits) + (stop << sub_bits)
            return start, end
        # What is allocated must come along.  In between lies what needs no copy, but one vector is one write.
        if entry & _COMPRESSED:
            first = 0
        elif bitmap & _ALL:
            first = min(first, subclusters.lowest(bitmap & _ALL))
        if last_entry & _COMPRESSED:
            stop = _N
        else:
            stop = max(stop, (last_bitmap & _ALL).bit_length())
        return first << sub_bits, (last_cluster << self._cluster_bits) + (stop << sub_bits)

    def link(self, slice_offset: int, table: Table, index: int, host_offset: int, n: int, start: int, end: int) -> None:
        sub_bits = self.geometry.subcluster_bits
        first, stop = start >> sub_bits, -(-end >> sub_bits)  # counted from the first cluster on
        entries = self._placed(table, index, host_offset, n)
        if n > 2:
            entries[3:-2:2] = array("Q", (subclusters.ALL_ALLOCATED,)) * (n - 2)
        for i in {0, n - 1}:
            covered = subclusters.span(max(0, first - i * _N), min(_N, stop - i * _N))
            old, bitmap = _pair(table, (index + 2 * i) << 3)
            entries[2 * i + 1] = subclusters.written(0 if old & _COMPRESSED else bitmap, covered)
        self._put(slice_offset, table, index, entries)

    def absent_run(self, table: Table, index: int, stop: int) -> int:
        part = table[index:stop:2]
        if part.tobytes() == bytes(len(part) * part.itemsize):
            return len(part)
        return next((i for i, entry in enumerate(part) if entry & (_COMPRESSED | self.allocated_mask)), len(part))

    def give_place(self, slice_offset: int, table: Table, index: int, host_offset: int, n: int) -> None:
        # No subcluster becomes allocated by it: what they read as stays as it is.
        self._put(slice_offset, table, index, self._placed(table, index, host_offset, n))

    def _placed(self, table: Table, index: int, host_offset: int, n: int) -> Table:
        """The entries from `index`, with other host clusters."""
        entries = table[index : index + 2 * n]
        first = host_offset | _COPIED
        entries[::2] = array("Q", range(first, first + n * self._cluster_size, self._cluster_size))
        return entries

    def _put(self, slice_offset: int, table: Table, index: int, entries: Table) -> None:
        table[index : index + len(entries)] = entries
        self.cache.mark_dirty(slice_offset, index, index + len(entries))

    def zeroed_part(
        self, entry: int, bitmap: int, offset: int, length: int, *, shows_backing: bool
    ) -> tuple[int, int] | None:
        if entry & _COMPRESSED:
            return None
        self._checked(offset, entry, bitmap)
        sub_bits = self.geometry.subcluster_bits
        start = offset & self._cluster_mask
        end = start + length
        first = start >> sub_bits
        if (start | end) & (self.geometry.subcluster_size - 1):
            if bitmap >> (_N + first) & 1:
                return entry, bitmap
            if bitmap >> first & 1 or shows_backing:
                return None
        return entry, subclusters.zeroed(bitmap, subclusters.span(first, -(-end >> sub_bits)))

    def set_entry(self, slice_offset: int, table: Table, index: int, entry: int, bitmap: int = 0) -> None:
        self.replace(slice_offset, table, index, array("Q", (entry, bitmap)))
