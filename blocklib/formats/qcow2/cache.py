"""The write-back cache of equal-sized tables: L2 slices and refcount blocks.

Entries are keyed by host offset.  All methods but `load` are memory only and run under the image's lock (`peek` may run
without: a table object stays valid after it was evicted, it is merely no longer the one that changes go to).  Nothing is
written here: `take_dirty` hands the changed ranges to the flush, which knows the order that survives a crash.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2.tables import Table, read_table, table_to_bytes

if TYPE_CHECKING:
    from blocklib.formats.qcow2.table_index import TableIndex
    from blocklib.graph import Edge


class MissingTableError(Exception):
    """A table is needed that is not in the cache: load it without the lock, then start again.  Never leaves the driver."""

    def __init__(self, cache: TableCache, host_offset: int) -> None:
        super().__init__(host_offset)
        self.cache = cache
        self.host_offset = host_offset


class DirtyRange(NamedTuple):
    """A copy of changed entries: where they belong, their bytes, and the entry indices they came from."""

    table_offset: int
    first: int
    data: bytes
    itemsize: int

    @property
    def host_offset(self) -> int:
        return self.table_offset + self.first * self.itemsize


class _Entry:
    __slots__ = ("busy", "first", "seen", "stop", "table", "used")

    def __init__(self, table: Table, now: float) -> None:
        self.table = table
        self.first = len(table)  # entries [first, stop) are dirty
        self.stop = 0
        self.busy = False  # a copy of it is on its way to the file: not to be dropped and read back
        self.used = True
        self.seen = now  # when it was last known to be in use


class TableCache:
    """At most about `capacity` bytes of tables of `length` bytes each, more only while they are dirty.

    Tables that nobody has used for `clean_interval` seconds are dropped when the next one comes in, or at a flush; 0: never.
    """

    def __init__(
        self,
        file: Edge,
        typecode: str,
        length: int,
        capacity: int,
        *,
        structure: str = "table",
        event: str = "l2_load",
        node: str | None = None,
    ) -> None:
        self._file = file
        self.typecode = typecode
        self.length = length
        self._structure = structure
        self._event = event  # what loading one is
        self._node = node
        self.max_entries = max(2, capacity // length)
        self._spare = self.max_entries // 16
        self.clean_interval = 0
        self.clock: Callable[[], float] = time.monotonic
        self._now = 0.0  # when it was last looked for unused tables
        self.changes = 0
        """How often a table was changed, made or given up."""
        self._entries: dict[int, _Entry] = {}
        self._dirty: set[int] = set()
        self.index: TableIndex | None = None
        """Where the tables are in memory, if kernels look things up in them."""
        self._loading: dict[int, threading.Event] = {}
        self._loading_lock = threading.Lock()  # guards: _loading

    def peek(self, host_offset: int) -> Table | None:
        entry = self._entries.get(host_offset)
        if entry is None:
            return None
        entry.used = True
        return entry.table

    def need(self, host_offset: int) -> Table:
        """The table, which must be there: raises MissingTableError where it is not."""
        entry = self._entries.get(host_offset)
        if entry is None:
            raise MissingTableError(self, host_offset)
        entry.used = True
        return entry.table

    def load(self, host_offset: int, lock: threading.Lock) -> Table:
        """Bring a table in; of several threads that ask for one, one reads and the others wait.  Call without `lock`.

        Raises ImageCorruptError for a table outside the file, StorageError.
        """
        while True:
            mine = threading.Event()
            try:
                with self._loading_lock:
                    event = self._loading.setdefault(host_offset, mine)
                if event is mine:
                    return self._read(host_offset, lock)
            finally:
                with self._loading_lock:
                    if self._loading.get(host_offset) is mine:
                        del self._loading[host_offset]
                mine.set()
            event.wait()
            table = self.peek(host_offset)
            if table is not None:
                return table

    def _read(self, host_offset: int, lock: threading.Lock) -> Table:
        self.check_inside_file(host_offset)
        read = read_table(self._file, self.typecode, host_offset, self.length, self._event)
        with lock:
            table = self.peek(host_offset)  # the place may have been given to a new table meanwhile
            if table is None:
                self.insert(host_offset, read)
                table = read
            return table

    def check_inside_file(self, host_offset: int) -> None:
        """Raises ImageCorruptError for a table that begins past the end of the file and is not cached.

        Only who reads from the file asks this: a new table lies past the end until the next flush has written it.
        """
        if host_offset >= self._file.size:
            raise ImageCorruptError(
                f"{self._node}: {self._structure} at {host_offset:#x} lies outside the file",
                structure=self._structure,
                host_offset=host_offset,
                expected=f"an offset below {self._file.size}",
                found=f"{host_offset:#x}",
                node=self._node,
            )

    def insert(self, host_offset: int, table: Table, *, dirty: bool = False) -> None:
        """Add a table that was read (clean) or made (dirty)."""
        self._forget(host_offset)
        self.drop_unused()
        self._entries[host_offset] = entry = _Entry(table, self._now)
        if dirty:
            self.changes += 1
            entry.first, entry.stop = 0, len(table)
            self._dirty.add(host_offset)
        if len(self._entries) > self.max_entries:
            self._evict()

    def mark_dirty(self, host_offset: int, first: int, stop: int) -> None:
        """Entries [first, stop) of a cached table were changed."""
        self.changes += 1
        entry = self._entries[host_offset]
        self._dirty.add(host_offset)
        entry.first = min(entry.first, first)
        entry.stop = max(entry.stop, stop)

    def drop(self, host_offset: int) -> None:
        """Forget a table whose cluster was freed; its changes must never reach the file."""
        self.changes += 1
        self._forget(host_offset)

    def _forget(self, host_offset: int) -> None:
        self._dirty.discard(host_offset)
        if host_offset in self._entries:
            self._let_go(host_offset)

    def _let_go(self, host_offset: int) -> None:
        del self._entries[host_offset]
        if self.index is not None:
            self.index.forget(host_offset)

    def _was_used(self, host_offset: int, entry: _Entry) -> bool:
        """Whether the table was used since this was last asked."""
        used = entry.used
        entry.used = False
        return (self.index is not None and self.index.take_used(host_offset)) or used

    def drop_unused(self) -> None:
        """Drop the clean tables that nobody has used for the interval, if it is time to look for them."""
        interval = self.clean_interval
        if not interval:
            return
        now = self.clock()
        if now - self._now < interval:
            return
        for host_offset, entry in list(self._entries.items()):
            if self._was_used(host_offset, entry):
                entry.seen = now
            elif now - entry.seen >= interval and not entry.busy and host_offset not in self._dirty:
                self._let_go(host_offset)
        self._now = now

    @property
    def used_bytes(self) -> int:
        """Memory that the tables take."""
        return len(self._entries) * self.length

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    @property
    def crowded(self) -> bool:
        """Whether dirty tables fill most of the cache: time to write back."""
        return len(self._dirty) * 4 > self.max_entries * 3

    def take_dirty(self) -> list[DirtyRange]:
        """Copy every changed range and call the tables clean; give the list to `written` or `put_back` afterwards."""
        self.drop_unused()
        ranges = []
        for host_offset in sorted(self._dirty):
            entry = self._entries[host_offset]
            data = table_to_bytes(entry.table[entry.first : entry.stop])
            ranges.append(DirtyRange(host_offset, entry.first, data, entry.table.itemsize))
            entry.first, entry.stop = len(entry.table), 0
            entry.busy = True
        self._dirty.clear()
        return ranges

    def written(self, ranges: list[DirtyRange]) -> None:
        """The copies have reached the file."""
        for dirty in ranges:
            entry = self._entries.get(dirty.table_offset)
            if entry is not None:
                entry.busy = False
        if len(self._entries) > self.max_entries:
            self._evict()

    def put_back(self, ranges: list[DirtyRange]) -> None:
        """The copies may not have reached the file: their ranges are dirty again."""
        for dirty in ranges:
            entry = self._entries.get(dirty.table_offset)
            if entry is not None:
                entry.busy = False
                self.mark_dirty(dirty.table_offset, dirty.first, dirty.first + len(dirty.data) // dirty.itemsize)

    def clear(self) -> None:
        """Forget everything, written or not."""
        self._entries.clear()
        self._dirty.clear()
        if self.index is not None:
            self.index.forget_all()

    def _evict(self) -> None:
        """Drop clean tables that were not used since the last look, oldest first; some more than must go, because it looks
        at every table."""
        surplus = len(self._entries) - self.max_entries + self._spare
        for host_offset in list(self._entries):
            if surplus <= 0:
                return
            entry = self._entries[host_offset]
            if entry.busy or host_offset in self._dirty:
                continue
            if self._was_used(host_offset, entry):
                entry.seen = self._now
                self._entries[host_offset] = self._entries.pop(host_offset)  # to the young end
            else:
                self._let_go(host_offset)
                surplus -= 1
