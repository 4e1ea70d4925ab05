"""Disks in memory that tests look into: what is stored, in which order it came, and hooks that make requests fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

from blocklib.errors import StorageError
from blocklib.extents import FLAG_ALLOCATED, FLAG_DATA, FLAG_OFFSET_VALID, KIND_DATA, Run
from blocklib.node import Node, Preallocation

SECTOR: Final = 512
PUNCHED: Final = 0xDD
"""What a discarded byte reads as: nobody may count on zeroes."""

Event: TypeAlias = tuple[Literal["write"], int, bytes] | tuple[Literal["barrier"], int, bytes]
"""("write", offset, bytes), or ("barrier", position in the log where it began, b"")."""


class Drive(Node):
    """A small disk in memory.  Safe from any thread."""

    driver = "drive"
    is_leaf = True

    def __init__(self, filename: str | None = None, *, data: bytes = b"") -> None:
        super().__init__(None, filename, read_only=False)
        self.discard_passes = True
        self.data = bytearray(data)
        self.size = len(data)
        self.capacity: int | None = None
        """Bytes after which the host is full; None: never."""
        self.before_write: Callable[[int, int], object] | None = None
        """Called with (offset, length) before a write takes place; may raise, or run something in between."""
        self.before_barrier: Callable[[], object] | None = None
        self.before_discard: Callable[[int, int], object] | None = None
        self._lock = threading.Lock()

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        with self._lock:
            for view in views:
                part = self.data[offset : offset + len(view)]
                view[: len(part)] = part
                view[len(part) :] = bytes(len(view) - len(part))
                offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        data = b"".join(bytes(view) for view in views)
        if self.before_write is not None:
            self.before_write(offset, len(data))
        if self.capacity is not None and offset + len(data) > max(self.capacity, self.size):
            raise StorageError("no space left on the drive", errno=28, operation="injected")
        with self._lock:
            self._change(offset, data)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self.pwritev(offset, (bytes(length),))

    def discard_range(self, offset: int, length: int) -> None:
        if self.before_discard is not None:
            self.before_discard(offset, length)
        with self._lock:
            length = min(length, self.size - offset)
            if length > 0:
                self._change(offset, bytes((PUNCHED,)) * length)

    def _change(self, offset: int, data: bytes) -> None:
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.size = len(self.data)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        with self._lock:
            if size < self.size:
                del self.data[size:]
            else:
                self.data.extend(bytes(size - self.size))
            self.size = size

    def flush(self) -> None:
        if self.before_barrier is not None:
            self.before_barrier()

    def resolve(self, offset: int, length: int) -> Run:
        return KIND_DATA, None, offset, length, FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID


class RecordingNode(Drive):
    """A drive with a list of what reached it, for tests of the order of requests; crashes are replayed from `blklogwrites`."""

    driver = "recording"

    def __init__(self, *, data: bytes = b"") -> None:
        super().__init__(data=data)
        self.log: list[Event] = []

    def _change(self, offset: int, data: bytes) -> None:
        super()._change(offset, data)
        self.log.append(("write", offset, data))

    def flush(self) -> None:
        begun = len(self.log)
        super().flush()
        with self._lock:
            self.log.append(("barrier", begun, b""))
