"""Overlap checks: before anything is written, whether it would hit a structure of the image that it must not touch.

The kinds, their names and templates are those of ``Qcow2OverlapChecks`` in QEMU's ``qapi/block-core.json``.  Each kind of
table is looked up in a sorted index, so that a check costs a few binary searches however large the image is; a run of guest
clusters is checked when it is first handed out for writing in place, and trusted until a table comes into being somewhere.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.tables import Table, numpy_view, read_table

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.formats.qcow2.snapshots.table import Snapshot

MAIN_HEADER: Final = 1 << 0
ACTIVE_L1: Final = 1 << 1
ACTIVE_L2: Final = 1 << 2
REFCOUNT_TABLE: Final = 1 << 3
REFCOUNT_BLOCK: Final = 1 << 4
SNAPSHOT_TABLE: Final = 1 << 5
INACTIVE_L1: Final = 1 << 6
INACTIVE_L2: Final = 1 << 7
BITMAP_DIRECTORY: Final = 1 << 8

OPTION_KINDS: Final = {
    "overlap-check.main-header": MAIN_HEADER,
    "overlap-check.active-l1": ACTIVE_L1,
    "overlap-check.active-l2": ACTIVE_L2,
    "overlap-check.refcount-table": REFCOUNT_TABLE,
    "overlap-check.refcount-block": REFCOUNT_BLOCK,
    "overlap-check.snapshot-table": SNAPSHOT_TABLE,
    "overlap-check.inactive-l1": INACTIVE_L1,
    "overlap-check.inactive-l2": INACTIVE_L2,
    "overlap-check.bitmap-directory": BITMAP_DIRECTORY,
}
"""Option -> kind."""

_CONSTANT: Final = MAIN_HEADER | ACTIVE_L1 | REFCOUNT_TABLE | SNAPSHOT_TABLE | BITMAP_DIRECTORY
_CACHED: Final = _CONSTANT | ACTIVE_L2 | REFCOUNT_BLOCK | INACTIVE_L1
TEMPLATES: Final = {"none": 0, "constant": _CONSTANT, "cached": _CACHED, "all": _CACHED | INACTIVE_L2}
"""What each template checks: nothing; what takes the same time in any image; what is in memory; what must be read, too."""

KIND_NAMES: Final = {
    MAIN_HEADER: "header",
    ACTIVE_L1: "active L1 table",
    ACTIVE_L2: "active L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    INACTIVE_L1: "inactive L1 table",
    INACTIVE_L2: "inactive L2 table",
    BITMAP_DIRECTORY: "bitmap directory",
}

_BITMAPS_EXTENSION = struct.Struct(layout.BITMAPS_EXTENSION_FORMAT)
_MANY: Final = 1 << 14
"""Table entries; with more it pays to use numpy."""
_MOST_TRUSTED: Final = 4096
"""L2 slices with runs that were checked; with more, all of them are forgotten."""


def kinds_for(options: Mapping[str, Any]) -> int:
    """The kinds that checked options ask for: a template, and single ones that differ from it."""
    kinds = TEMPLATES[options.get("overlap-check.template") or options.get("overlap-check") or "cached"]
    for name, kind in OPTION_KINDS.items():
        wanted = options.get(name)
        if wanted is not None:
            kinds = kinds | kind if wanted else kinds & ~kind
    return kinds


class _TableIndex:
    """Where the tables of one size are that a parent table points at: sorted, each with the index of its pointer."""

    __slots__ = ("_owners", "_parent", "_starts")

    def __init__(self, parent: Table) -> None:
        self._parent = parent
        self._starts: Table
        self._owners: Table
        if len(parent) > _MANY:
            self._build_large(parent)
        else:
            pairs = sorted((entry & layout.OFFSET_MASK, i) for i, entry in enumerate(parent) if entry & layout.OFFSET_MASK)
            self._starts = array("Q", [start for start, _i in pairs])
            self._owners = array("L", [i for _start, i in pairs])

    def _build_large(self, parent: Table) -> None:
        import numpy as np

        starts = numpy_view(parent) & np.uint64(layout.OFFSET_MASK)
        owners = np.flatnonzero(starts)
        owners = owners[np.argsort(starts[owners], kind="stable")]
        self._starts = array("Q", starts[owners].tobytes())
        self._owners = array("L", owners.astype(f"u{array('L').itemsize}").tobytes())

    def is_of(self, parent: Table) -> bool:
        return self._parent is parent

    def add(self, owner: int) -> None:
        """The parent has got entry `owner`."""
        start = self._parent[owner] & layout.OFFSET_MASK
        if start:
            place = bisect_left(self._starts, start)
            self._starts.insert(place, start)
            self._owners.insert(place, owner)

    def find(self, start: int, end: int, length: int) -> int | None:
        """Where the first table of `length` bytes is that the parent still points at and that reaches into [start, end)."""
        starts, owners = self._starts, self._owners
        place = bisect_left(starts, start - length + 1) if start >= length else 0
        while place < len(starts) and starts[place] < end:
            if self._parent[owners[place]] & layout.OFFSET_MASK == starts[place]:
                return starts[place]
            del starts[place], owners[place]
        return None


class _Snapshots(NamedTuple):
    """What a list of snapshots means: the length of their table in bytes, and where L1 and L2 tables are."""

    entries: Sequence[Snapshot]
    length: int
    l1_tables: Sequence[tuple[int, int]]  # (host offset, bytes), ascending
    longest_l1: int
    l2_tables: Table  # host offsets, ascending


class OverlapGuard:
    """Knows where the structures of one image are.  Its methods run under the image's lock, but `refresh`, which reads."""

    def __init__(self, node: Qcow2Node, kinds: int) -> None:
        self._node = node
        self.kinds = kinds
        self._l2_tables: _TableIndex | None = None
        self._refcount_blocks: _TableIndex | None = None
        self._snapshots = _Snapshots((), 0, (), 0, array("Q"))
        self.trusted: dict[int, Table] = {}
        """L2 slice (host offset) -> for each word of it, whether the cluster its entry points at may be written in place.

        Read without the lock."""

    # -- trust ----------------------------------------------------------------------------------------------------------

    def trust(self, slice_offset: int, slice_words: int, index: int, host_offset: int, n_clusters: int) -> None:
        """Check a run of clusters that is about to be handed out for writing in place, and remember that.

        Raises ImageCorruptError, as `check`.
        """
        bits = self._node.geometry.cluster_bits
        if self.kinds and self._node.data is self._node.file:
            self.check(host_offset, n_clusters << bits, "guest data")
        n_words = n_clusters * self._node.mapping.words
        self.marks(slice_offset, slice_words)[index : index + n_words] = array("B", b"\1" * n_words)

    def marks(self, slice_offset: int, slice_words: int) -> Table:
        """What is known of the clusters that a slice maps, to be added to."""
        marks = self.trusted.get(slice_offset)
        if marks is None:
            if len(self.trusted) >= _MOST_TRUSTED:
                self.distrust()
            marks = self.trusted[slice_offset] = array("B", bytes(slice_words))
        return marks

    def distrust(self) -> None:
        """All runs must be checked again before they are written in place."""
        self.trusted = {}
        index = self._node.mapping.cache.index
        if index is not None:
            index.distrust()

    def table_placed(self) -> None:
        """A table is about to take clusters that an entry may (wrongly) point at."""
        self.distrust()

    # -- checks ---------------------------------------------------------------------------------------------------------

    def check(self, host_offset: int, length: int, what: str, ignored: int = 0) -> None:
        """Raises ImageCorruptError if writing `length` bytes of `what` would overlap a structure of no `ignored` kind."""
        found = self.find(host_offset, length, ignored)
        if found is not None:
            kind, place = found
            name = self._node.filename or self._node.name
            raise ImageCorruptError(
                f"{name}: writing {what} to {host_offset:#x} would overwrite the {KIND_NAMES[kind]} at {place:#x}; "
                "repair the image first",
                structure=what,
                host_offset=host_offset,
                expected="clusters that nothing else uses",
                found=f"the {KIND_NAMES[kind]} at {place:#x}",
                node=self._node.filename,
            )

    def find(self, host_offset: int, length: int, ignored: int = 0) -> tuple[int, int] | None:
        """(kind, host offset) of a structure that the range overlaps, among those that are checked, or None."""
        kinds = self.kinds & ~ignored
        end = host_offset + length
        node = self._node
        cluster_size = node.geometry.cluster_size
        mapping, refcounts = node.mapping, node.refcounts
        if kinds & MAIN_HEADER and host_offset < cluster_size:
            return MAIN_HEADER, 0
        if kinds & ACTIVE_L1:
            place = mapping.l1_offset
            if host_offset < place + len(mapping.l1) * layout.TABLE_ENTRY_LENGTH and place < end:
                return ACTIVE_L1, place
        if kinds & REFCOUNT_TABLE:
            place = refcounts.table_offset
            if host_offset < place + len(refcounts.table) * layout.TABLE_ENTRY_LENGTH and place < end:
                return REFCOUNT_TABLE, place
        if kinds & REFCOUNT_BLOCK:
            index = self._refcount_blocks
            if index is None or not index.is_of(refcounts.table):
                index = self._refcount_blocks = _TableIndex(refcounts.table)
                refcounts.new_blocks.clear()
            found = index.find(host_offset, end, cluster_size)
            if found is None and refcounts.new_blocks:
                found = _find_new(refcounts.new_blocks, host_offset, end, cluster_size)
            if found is not None:
                return REFCOUNT_BLOCK, found
        if kinds & ACTIVE_L2:
            index = self._l2_tables
            if index is None or not index.is_of(mapping.l1):
                index = self._l2_tables = _TableIndex(mapping.l1)
            found = index.find(host_offset, end, cluster_size)
            if found is None and mapping.new_tables:
                found = _find_new(mapping.new_tables, host_offset, end, cluster_size)
            if found is not None:
                return ACTIVE_L2, found
        return self._find_rare(kinds, host_offset, end)

    def _find_rare(self, kinds: int, host_offset: int, end: int) -> tuple[int, int] | None:
        header = self._node.header
        snapshots = self._snapshots
        if kinds & SNAPSHOT_TABLE and header.nb_snapshots:
            place = header.snapshots_offset
            if host_offset < place + snapshots.length and place < end:
                return SNAPSHOT_TABLE, place
        if kinds & INACTIVE_L1 and snapshots.l1_tables:
            tables = snapshots.l1_tables
            i = bisect_left(tables, (host_offset - snapshots.longest_l1, 0))
            while i < len(tables) and tables[i][0] < end:
                place, length = tables[i]
                if host_offset < place + length:
                    return INACTIVE_L1, place
                i += 1
        if kinds & INACTIVE_L2 and snapshots.l2_tables:
            l2_tables, size = snapshots.l2_tables, self._node.geometry.cluster_size
            i = bisect_left(l2_tables, max(0, host_offset - size + 1))
            if i < len(l2_tables) and l2_tables[i] < end:
                return INACTIVE_L2, l2_tables[i]
        if kinds & BITMAP_DIRECTORY:
            data = header.extension(layout.EXTENSION_BITMAPS)
            if data is not None and len(data) >= _BITMAPS_EXTENSION.size:
                _n, _reserved, length, place = _BITMAPS_EXTENSION.unpack_from(data)
                if host_offset < place + length and place < end:
                    return BITMAP_DIRECTORY, place
        return None

    def tables_linked(self, l1_indices: Sequence[int], refcount_indices: Sequence[int]) -> None:
        """A flush takes these entries of the L1 table and of the refcount table to the file."""
        node = self._node
        if self._l2_tables is not None and self._l2_tables.is_of(node.mapping.l1):
            for index in l1_indices:
                self._l2_tables.add(index)
        if self._refcount_blocks is not None and self._refcount_blocks.is_of(node.refcounts.table):
            for index in refcount_indices:
                self._refcount_blocks.add(index)
        if refcount_indices:
            node.refcounts.new_blocks.clear()

    # -- snapshots ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look where the snapshots' tables are, if there are other snapshots than before.  Called without the lock.

        Raises StorageError.
        """
        entries = self._node.snapshots
        if entries is self._snapshots.entries or not self.kinds & (SNAPSHOT_TABLE | INACTIVE_L1 | INACTIVE_L2):
            return
        tables: dict[int, int] = {}
        for entry in entries:
            length = entry.l1_size * layout.TABLE_ENTRY_LENGTH
            if 0 < length <= layout.MAX_L1_BYTES:
                tables[entry.l1_offset] = max(tables.get(entry.l1_offset, 0), length)
        l1_tables = sorted(tables.items())
        l2_tables = self._read_inactive_l2(l1_tables) if self.kinds & INACTIVE_L2 else array("Q")
        length = sum(entry.length for entry in entries)
        self._snapshots = _Snapshots(entries, length, l1_tables, max(tables.values(), default=0), l2_tables)

    def _read_inactive_l2(self, l1_tables: Sequence[tuple[int, int]]) -> Table:
        found: set[int] = set()
        for place, length in l1_tables:
            table = read_table(self._node.file, "Q", place, length)
            if len(table) > _MANY:
                import numpy as np

                found.update(np.unique(numpy_view(table) & np.uint64(layout.OFFSET_MASK)).tolist())
            else:
                found.update(entry & layout.OFFSET_MASK for entry in table)
        found.discard(0)
        return array("Q", sorted(found))


def _find_new(tables: set[int], start: int, end: int, cluster_size: int) -> int | None:
    """A table of one cluster that reaches into [start, end), of those that no index has yet."""
    if (end - start) // cluster_size < len(tables):
        first = start // cluster_size * cluster_size
        return next((place for place in range(first, end, cluster_size) if place in tables), None)
    return next((place for place in tables if place < end and start < place + cluster_size), None)
