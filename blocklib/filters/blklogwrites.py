"""blklogwrites: whatever changes the child is written down in a log that says in which order it became durable."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from blocklib.errors import OptionError
from blocklib.filters import dm_log_writes as log_format
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Preallocation
from blocklib.passing import PassingFilter
from blocklib.sizes import MAX_SIZE

if TYPE_CHECKING:
    from blocklib.graph import Edge

_SHARED: Final = CONSISTENT_READ


class BlkLogWritesNode(PassingFilter):
    """The child "file", and a log in the child "log" of the writes, zeroes, discards, flushes and sizes that it was given.

    The log is in the format of dm-log-writes (`blocklib.filters.dm_log_writes`).  A request is logged when the child has done
    it, and not acknowledged before; what a flush vouches for stands before it.  Entries are whole sectors: of one that is
    written in part the log gets what is in it afterwards.  Writes that share a sector take turns, so that their order in the
    log is theirs.  A request that fails is not in the log; once the log itself cannot be written, nothing else is.
    """

    driver = "blklogwrites"
    sees_writes: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    written_children: ClassVar[frozenset[str]] = frozenset({"log"})

    def __init__(
        self,
        name: str | None,
        filename: str | None,
        *,
        read_only: bool,
        sector_size: int = log_format.MIN_SECTOR,
        append: bool = False,
        interval: int = 4096,
    ) -> None:
        super().__init__(name, filename, read_only=read_only)
        self.zero_alignment = self._sector_size = sector_size
        self._append = append
        self._interval = interval
        self._lock = threading.Lock()
        """Guards what follows and the log itself; held while an entry is written to it."""
        self._n_entries = 0
        self._end = 0
        """Where the next entry goes; 0 until there is a superblock."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        sector_size = options["log-sector-size"]
        if options["log-append"] and sector_size is not None:
            raise OptionError(
                f"{cls.driver}: log-append goes on with the sectors that the log has; log-sector-size is for a new one",
                option="log-sector-size",
                driver=cls.driver,
            )
        return super().from_options(
            options,
            read_only=read_only,
            sector_size=sector_size or log_format.MIN_SECTOR,
            append=options["log-append"],
            interval=options["log-super-update-interval"],
            **extra,
        )

    @property
    def _log(self) -> Edge:
        return self.children["log"]

    def load(self) -> None:
        """With log-append, find the end of the log.  Raises ImageCorruptError, UnsupportedFeatureError."""
        if self._append:
            node = self._log.node
            name = node.filename or node.name
            _n_entries, self._sector_size = log_format.read_superblock(self._read_log, name)
            self.zero_alignment = self._sector_size
            self._n_entries, self._end = log_format.end_of(self._read_log, node.size, name)

    def activate(self) -> None:
        with self._lock:
            self._begin()

    def close(self) -> None:
        if self._end and not self.read_only:
            with self._lock:
                self._write_superblock()

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        if child_name != "log":
            return wanted | CONSISTENT_READ, shared
        return CONSISTENT_READ | (0 if read_only else WRITE | RESIZE), _SHARED

    # -- what is logged -----------------------------------------------------------------------------------------------

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self.check_usable()
        end = place + sum(len(view) for view in views)
        first = self._down(place)
        last = self._up(end)
        held = self.write_ranges.acquire(first, last, exclusive=True)
        try:
            head, tail = bytearray(place - first), bytearray(last - end)
            if head:
                self.file.read(first, memoryview(head), None)
            if tail:
                self.file.read(end, memoryview(tail), None)
            super().write_special(offset, place, views)
            self._enter(first, last - first, data=(head, *views, tail))
        finally:
            self.write_ranges.release(held)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self.check_usable()
        last = self._up(offset + length)  # past a sector only at the end of the disk
        held = self.write_ranges.acquire(offset, last, exclusive=True)
        try:
            super().zero_range(offset, length, unmap=unmap)
            self._enter(offset, last - offset)
        finally:
            self.write_ranges.release(held)

    def discard_range(self, offset: int, length: int) -> None:
        if not self.file.node.discard_passes:
            return
        self.check_usable()
        last = self._up(offset + length)
        held = self.write_ranges.acquire(offset, last, exclusive=True)
        try:
            super().discard_range(offset, length)
            self._enter(offset, last - offset, flags=log_format.DISCARD)
        finally:
            self.write_ranges.release(held)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self.check_usable()
        held = self.write_ranges.acquire(self._down(min(size, self.size)), MAX_SIZE, exclusive=True)
        try:
            super().truncate(size, preallocation)
            self._enter(0, 0, flags=log_format.MARK, text=f"size {size}")
        finally:
            self.write_ranges.release(held)

    def flush(self) -> None:
        if self.read_only:
            super().flush()
            return
        self.check_usable()
        # Its place is taken before it begins: what is logged from now on may come too late for it.
        index, position = self._enter(0, 0, flags=log_format.MARK, text="flushing")
        self.file.flush()
        with self._writing():
            self._log.write(position, (log_format.pack_entry(0, 0, log_format.FLUSH, self._sector_size),))
            if self._n_entries > index + 1:
                self._add(0, 0, flags=log_format.MARK, text=f"flushed {index}")
            self._write_superblock()
            self._log.flush()

    # -- the log ------------------------------------------------------------------------------------------------------

    def _enter(
        self, offset: int, length: int, *, data: Sequence[memoryview | bytearray] | None = None, flags: int = 0, text: str = ""
    ) -> tuple[int, int]:
        """Put an entry into the log: (its number, its place).  A write without `data` is one of zeroes."""
        with self._writing():
            self._begin()
            entry = self._add(offset, length, data=data, flags=flags, text=text)
            if self._n_entries % self._interval == 0:
                self._write_superblock()
            return entry

    def _writing(self) -> _Writing:
        return _Writing(self, self._lock)

    def _begin(self) -> None:
        if not self._end:
            self._end = self._sector_size
            self._write_superblock()

    def _add(
        self, offset: int, length: int, *, data: Sequence[memoryview | bytearray] | None = None, flags: int = 0, text: str = ""
    ) -> tuple[int, int]:
        position = self._end
        entry = log_format.pack_entry(offset, length, flags, self._sector_size, text)
        self._end += len(entry) + (0 if flags & log_format.DISCARD else length)
        self._log.write(position, (entry, *(part for part in data or () if len(part))))
        if data is None and self._end > position + len(entry):
            self._log.write_zeroes(position + len(entry), length, unmap=True)
        self._n_entries += 1
        return self._n_entries - 1, position

    def _write_superblock(self) -> None:
        self._log.write(0, (log_format.pack_superblock(self._n_entries, self._sector_size),))

    def _read_log(self, offset: int, length: int) -> bytes:
        data = bytearray(min(length, max(0, self._log.size - offset)))
        self._log.read(offset, memoryview(data))
        return bytes(data)

    def _down(self, offset: int) -> int:
        return offset // self._sector_size * self._sector_size

    def _up(self, offset: int) -> int:
        return -(-offset // self._sector_size) * self._sector_size


class _Writing:
    """Alone with the log; what fails meanwhile leaves a gap in it, and ends the use of the node."""

    def __init__(self, node: BlkLogWritesNode, lock: threading.Lock) -> None:
        self._node = node
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None:
            self._node.poison("its log could not be written, and misses something")
        self._lock.release()
