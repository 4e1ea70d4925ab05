"""Walking the L2 tables of an image for a check, a batch of tables at a time."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from blocklib._fast.check import Facts, Walker, most_references, worth_walking
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.counts import (
    IndexArray,
    U64Array,
    compressed_ranges,
    contradictory,
    count_fragments,
    reads_as_zero,
)
from blocklib.reports import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.check.stored import ImageFile
    from blocklib.formats.qcow2.geometry import Geometry

_BATCH_BYTES: Final = 2 << 20
"""L2 tables treated at a time: large enough for numpy, small enough for the processor's cache."""


def describe_flag(copied: bool) -> str:
    return "copied flag set" if copied else "copied flag clear"


def split_entries(words: U64Array, geometry: Geometry) -> tuple[U64Array, U64Array | None]:
    """(the entries of L2 tables, their subcluster bitmaps), from the 64-bit numbers of the tables; without extended L2
    entries there are no bitmaps."""
    if not geometry.extended_l2:
        return words, None
    return words[::2].copy(), words[1::2].copy()


def read_l2_tables(file: ImageFile, offsets: U64Array, cluster_size: int) -> U64Array:
    """The 64-bit numbers of the tables at `offsets` (ascending), one table after the other; adjacent ones are read at once."""
    raw = np.empty(offsets.size * cluster_size, dtype=np.uint8)
    _read_tables(file, offsets, cluster_size, raw.data)
    return raw.view(">u8").astype(np.uint64)


def _read_tables(file: ImageFile, offsets: U64Array, cluster_size: int, view: memoryview) -> None:
    breaks = (np.flatnonzero(np.diff(offsets) != np.uint64(cluster_size)) + 1).tolist()
    for first, stop in zip([0, *breaks], [*breaks, offsets.size]):
        file.read(int(offsets[first]), view[first * cluster_size : stop * cluster_size])


_T = TypeVar("_T")


def _one_ahead(make: Callable[[int], _T], n: int) -> Iterator[_T]:
    """make(0) to make(n - 1): each is made, in a thread, while the one before is used."""
    made: list[_T] = []
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            made.append(make(number))
        except BaseException as error:  # raised where the next one is taken
            failed.append(error)

    thread: threading.Thread | None = None
    try:
        for number in range(n):
            if thread is None:
                run(number)
            else:
                thread.join()
            if failed:
                raise failed[0]
            one = made.pop()
            if number + 1 < n:
                thread = threading.Thread(target=run, args=(number + 1,), name="blocklib check")
                thread.start()
            yield one
    finally:
        if thread is not None:
            thread.join()


class Batch:
    """Some L2 tables as one flat array of entries, in the order of `offsets`, and how many L1 entries use each.

    `words` are the 64-bit numbers of the tables: the entries, or with extended L2 entries these and their bitmaps in turn.
    """

    __slots__ = ("active_uses", "bitmaps", "entries", "entry_length", "offsets", "row_bits", "uses")

    def __init__(self, offsets: U64Array, uses: U64Array, active_uses: U64Array, words: U64Array, geometry: Geometry) -> None:
        self.offsets = offsets
        self.uses = None if (uses == 1).all() else uses
        """None where every table is used once, as nearly always."""
        self.active_uses = None if (active_uses == 1).all() else active_uses
        self.entries, self.bitmaps = split_entries(words, geometry)
        self.row_bits = geometry.l2_bits
        self.entry_length = geometry.l2_entry_length

    def weights(self, places: IndexArray) -> U64Array | None:
        """How many tables lead to each of these entries; None where one does to every one."""
        return None if self.uses is None else self.uses[places >> self.row_bits]

    def times(self, places: IndexArray) -> int:
        """How often these entries count."""
        return places.size if self.uses is None else int(self.uses[places >> self.row_bits].sum())

    def active_times(self, places: IndexArray) -> int:
        """The same, reached from the active L1 table only."""
        return places.size if self.active_uses is None else int(self.active_uses[places >> self.row_bits].sum())

    def host_offset(self, place: int) -> int:
        """Where the entry is in the file."""
        row, column = place >> self.row_bits, place & ((1 << self.row_bits) - 1)
        return int(self.offsets[row]) + column * self.entry_length


class L2Walk:
    """Counts what the entries refer to, judges them, and takes the statistics of the active ones.

    The references and the findings go to the scan; `allocated`, `compressed` and `fragmented` count guest clusters.
    """

    def __init__(self, scan: Scan, progress: Callable[[int, int], object] | None) -> None:
        self._scan = scan
        self._geometry = scan.geometry
        self._progress = progress
        self.allocated = 0
        self.compressed = 0
        self.fragmented = 0
        self.zeroes_unaligned = 0
        """Entries of zero clusters with an unaligned host offset."""
        self.tables: U64Array = np.empty(0, dtype=np.uint64)
        """Host offsets of the L2 tables that the active L1 table uses, ascending."""
        self.all_tables: U64Array = self.tables
        """The same, with those of snapshots."""

    def run(self, offsets: U64Array, uses: U64Array, active_uses: U64Array) -> None:
        """Walk the tables at `offsets`: distinct, ascending, inside the file."""
        scan, geometry = self._scan, self._geometry
        aligned = (offsets & np.uint64(geometry.cluster_mask)) == 0
        scan.set_role("L2 table", offsets[aligned] >> np.uint64(geometry.cluster_bits), uses[aligned])
        self.tables, self.all_tables = offsets[active_uses > 0], offsets
        if offsets.size > scan.n_clusters:  # only unaligned ones, which overlap, can be so many
            found = f"{offsets.size} of them"
            scan.findings.add("check-error", "L2 tables", None, f"at most {scan.n_clusters} L2 tables", found)
            offsets = offsets[: scan.n_clusters]
        per_batch = max(1, _BATCH_BYTES >> geometry.cluster_bits)
        buffers = np.empty((2, min(per_batch, offsets.size) * geometry.cluster_size), dtype=np.uint8)
        fast = worth_walking(offsets.size << geometry.l2_bits) is not None

        def read(number: int) -> NDArray[np.uint8]:
            part = offsets[number * per_batch : (number + 1) * per_batch]
            tables = buffers[number & 1, : part.size * geometry.cluster_size]
            _read_tables(scan.file, part, geometry.cluster_size, tables.data)
            return tables

        for number, tables in enumerate(_one_ahead(read, -(-offsets.size // per_batch))):
            start = number * per_batch
            part = slice(start, start + per_batch)
            if not (fast and self._walk_sound(offsets[part], uses[part], active_uses[part], tables)):
                words = tables.view(">u8").astype(np.uint64)
                self._walk(Batch(offsets[part], uses[part], active_uses[part], words, geometry))
            if self._progress is not None:
                done = min(start + per_batch, offsets.size)
                self._progress(done << geometry.cluster_bits, offsets.size << geometry.cluster_bits)

    def _walk_sound(self, offsets: U64Array, uses: U64Array, active_uses: U64Array, tables: NDArray[np.uint8]) -> bool:
        """Do what `_walk` does, by a kernel, if there is nothing wrong with any entry; False, with nothing done, otherwise."""
        scan, geometry = self._scan, self._geometry
        most = most_references(offsets.size << geometry.l2_bits, int(uses.max()))
        # An L1 entry without offset leads to table 0, of which not all is judged.
        if not offsets[0] or scan.stored.any_unknown or not scan.has_room_for(most):
            return False
        facts = Facts(
            geometry.cluster_bits,
            geometry.l2_bits,
            geometry.extended_l2,
            scan.has_data_file,
            scan.file_size,
            geometry.compressed_offset_bits,
            layout.L2_RESERVED_MASK,
            scan.stored.counts.itemsize,
        )
        found = Walker(facts, scan.stored.counts, scan.counts).walk(tables, uses, active_uses)
        if found is None:
            return False
        scan.note_counted(found.references)
        self.allocated += found.allocated
        self.compressed += found.compressed
        self.fragmented += found.fragmented
        return True

    def _walk(self, batch: Batch) -> None:
        entries = batch.entries
        compressed = (entries & np.uint64(layout.FLAG_COMPRESSED)) != 0
        standard_offsets = entries & np.uint64(layout.OFFSET_MASK)
        allocated = standard_offsets != 0
        if self._scan.has_data_file:  # whose first cluster is at offset 0, told from none by the copied flag
            allocated |= (entries & np.uint64(layout.FLAG_COPIED | layout.FLAG_ZERO)) == np.uint64(layout.FLAG_COPIED)
        reserved = (entries & np.uint64(layout.L2_RESERVED_MASK)) != 0
        if compressed.any():
            allocated &= ~compressed
            reserved &= ~compressed
            self._walk_compressed(batch, np.flatnonzero(compressed))
        if reserved.any():
            self._tell(batch, np.flatnonzero(reserved), "reserved bits clear")
        if batch.bitmaps is not None:
            wrong = ~compressed & contradictory(batch.bitmaps, allocated)
            if wrong.any():
                self._tell(batch, np.flatnonzero(wrong), "subclusters either allocated, in a host cluster, or zero")
        places = np.flatnonzero(allocated)
        if places.size:
            self._walk_standard(batch, places, standard_offsets[places])

    def _walk_standard(self, batch: Batch, places: IndexArray, offsets: U64Array) -> None:
        scan, geometry = self._scan, self._geometry
        self.allocated += batch.active_times(places)
        fragments = count_fragments(offsets, places >> geometry.l2_bits, geometry.cluster_size)
        self.fragmented += batch.active_times(places[fragments])
        self._check_flags(batch, places, offsets)
        unaligned = (offsets & np.uint64(geometry.cluster_mask)) != 0
        if unaligned.any():
            self._tell_unaligned(batch, places[unaligned])
        if scan.has_data_file:
            return
        beyond = scan.beyond(offsets)
        if beyond.any():
            self._tell(batch, places[beyond], f"a cluster inside the file of {scan.file_size} bytes")
            scan.note_beyond(offsets[beyond])
            places, offsets, unaligned = places[~beyond], offsets[~beyond], unaligned[~beyond]
        clusters = (offsets >> np.uint64(geometry.cluster_bits)).astype(np.intp)
        scan.add(clusters, batch.weights(places))
        if unaligned.any():
            scan.add(clusters[unaligned] + 1, batch.weights(places[unaligned]))

    def _tell_unaligned(self, batch: Batch, places: IndexArray) -> None:
        """A zero cluster needs no host cluster, so a repair forgets one that cannot be; anything else stays."""
        bitmaps = None if batch.bitmaps is None else batch.bitmaps[places]
        zero = reads_as_zero(batch.entries[places], bitmaps)
        expected = "a cluster aligned host offset"
        self.zeroes_unaligned += int(np.count_nonzero(zero))
        self._tell(batch, places[zero], expected, repairable=True)
        self._tell(batch, places[~zero], expected)

    def _walk_compressed(self, batch: Batch, places: IndexArray) -> None:
        scan, bits = self._scan, np.uint64(self._geometry.cluster_bits)
        entries = batch.entries[places]
        copied = (entries & np.uint64(layout.FLAG_COPIED)) != 0
        if copied.any():
            self._tell(batch, places[copied], describe_flag(False) + " for a compressed cluster")
        if scan.has_data_file:
            self._tell(batch, places, "no compressed cluster beside an external data file")
            return
        if batch.bitmaps is not None:
            wrong = batch.bitmaps[places] != 0
            if wrong.any():
                self._tell(batch, places[wrong], "no subcluster bitmap for a compressed cluster")
                places, entries = places[~wrong], entries[~wrong]
        n_active = batch.active_times(places)
        self.allocated += n_active
        self.compressed += n_active
        self.fragmented += n_active  # they lie across cluster boundaries by nature
        offsets, lengths = compressed_ranges(entries, self._geometry.compressed_offset_bits)
        ends = offsets + lengths
        beyond = ends >= np.uint64(scan.file_size + self._geometry.cluster_size)
        if beyond.any():
            self._tell(batch, places[beyond], f"compressed data inside the file of {scan.file_size} bytes")
            scan.note_beyond(offsets[beyond])
            places, offsets, ends = places[~beyond], offsets[~beyond], ends[~beyond]
        clusters = (offsets >> bits).astype(np.intp)
        last = ((ends - np.uint64(1)) >> bits).astype(np.intp)
        while clusters.size:  # three rounds at most: the length field has room for two clusters
            scan.add(clusters, batch.weights(places))
            more = clusters < last
            places, clusters, last = places[more], clusters[more] + 1, last[more]

    def _check_flags(self, batch: Batch, places: IndexArray, offsets: U64Array) -> None:
        """'1 for standard clusters whose refcount is exactly one', accurate only below the active L1 table."""
        stored = self._scan.stored
        copied = (batch.entries[places] & np.uint64(layout.FLAG_COPIED)) != 0
        if self._scan.has_data_file:
            wrong = ~copied  # its clusters have no counts, and one user each
        else:
            wrong = copied != stored.are_one(offsets)
            if stored.any_unknown:
                wrong &= stored.are_known(offsets)
        if not batch.offsets[0]:  # reached through an L1 entry without offset: no table, whatever it counts
            wrong &= places >= self._geometry.l2_entries
        if not wrong.any():
            return
        wrong_places = places[wrong]
        times = batch.active_times(wrong_places)
        if batch.active_uses is not None:
            wrong_places = wrong_places[batch.active_uses[wrong_places >> batch.row_bits] > 0]

        self._scan.n_wrong_flags += times

        def describe(place: int) -> Finding:
            entry = int(batch.entries[place])
            expected = describe_flag(not entry & layout.FLAG_COPIED)
            return Finding("corruption", "L2 entry", batch.host_offset(place), expected, f"{entry:#x}")

        self._scan.findings.add_each("corruption", wrong_places, describe, times=times, repairable=True)

    def _tell(self, batch: Batch, places: IndexArray, expected: str, *, repairable: bool = False) -> None:
        def describe(place: int) -> Finding:
            found = f"{int(batch.entries[place]):#x}"
            return Finding("corruption", "L2 entry", batch.host_offset(place), expected, found, repairable)

        self._scan.findings.add_each("corruption", places, describe, times=batch.times(places), repairable=repairable)
