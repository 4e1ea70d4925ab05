"""The format of dm-log-writes: a superblock, then one entry after the other, each followed by what was written.

Source: Documentation/admin-guide/device-mapper/log-writes.rst of Linux.  All integers are little-endian; sectors are of
the size that the superblock says, in the entries too.  A FLUSH entry says that whatever stands before it is durable.

What the format has no entry for is in marks, which other programs pass over:

``size N``          the disk has N bytes from here on
``flushing``        a flush began here and failed, or has not ended yet
``flushed N``       the flush of entry N ended here; without such a mark it ended before the next entry
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from blocklib.errors import ImageCorruptError, ImageError, UnsupportedFeatureError

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
FLUSH: Final = 1
FUA: Final = 2
"""The write was durable when it ended."""
DISCARD: Final = 4
"""The sectors were no longer needed; nothing follows the entry."""
MARK: Final = 8
"""A remark: its text follows the entry in the same sector."""
MIN_SECTOR: Final = 512
MAX_SECTOR: Final = 8 << 20

_SUPERBLOCK: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")

Reader = Callable[[int, int], bytes]
"""(offset, length) -> the bytes there, fewer where the log ends."""


class LogEntry(NamedTuple):
    """One request; `offset` and `length` are bytes of the disk, `position` and `data_position` bytes of the log."""

    number: int
    flags: int
    offset: int
    length: int
    position: int
    data_position: int
    text: str
    """What a mark says."""

    @property
    def is_write(self) -> bool:
        """Whether `length` bytes of data are at `data_position`."""
        return self.length > 0 and not self.flags & DISCARD


def pack_superblock(n_entries: int, sector_size: int) -> bytes:
    """The first sector of a log."""
    return _SUPERBLOCK.pack(MAGIC, VERSION, n_entries, sector_size).ljust(sector_size, b"\0")


def pack_entry(offset: int, length: int, flags: int, sector_size: int, text: str = "") -> bytes:
    """The sector of one entry; `offset` and `length` are whole sectors."""
    data = text.encode()
    return (_ENTRY.pack(offset // sector_size, length // sector_size, flags, len(data)) + data).ljust(sector_size, b"\0")


def read_superblock(read: Reader, name: str) -> tuple[int, int]:
    """(number of entries, sector size) of the log called `name`.  Raises ImageCorruptError, UnsupportedFeatureError."""
    raw = read(0, _SUPERBLOCK.size)
    if len(raw) < _SUPERBLOCK.size:
        raise _corrupt(name, "log superblock", 0, f"{_SUPERBLOCK.size} bytes", f"{len(raw)} bytes")
    magic, version, n_entries, sector_size = _SUPERBLOCK.unpack(raw)
    if magic != MAGIC:
        raise _corrupt(name, "log superblock magic", 0, f"{MAGIC:#x}", f"{magic:#x}")
    if version != VERSION:
        raise UnsupportedFeatureError(
            f"{name}: version {version} of the log format is not known", features=(f"log version {version}",), node=name
        )
    if not MIN_SECTOR <= sector_size <= MAX_SECTOR or sector_size & (sector_size - 1):
        raise _corrupt(name, "log sector size", 24, f"a power of two from {MIN_SECTOR} to {MAX_SECTOR}", str(sector_size))
    return n_entries, sector_size


def entries(read: Reader, size: int, name: str = "log") -> Iterator[LogEntry]:
    """The entries of a log of `size` bytes, in order.  Raises as `read_superblock`, and where an entry does not fit the log."""
    n_entries, sector_size = read_superblock(read, name)
    position = sector_size
    for number in range(n_entries):
        raw = read(position, _ENTRY.size)
        if len(raw) < _ENTRY.size:
            raise _corrupt(name, f"log entry {number}", position, f"an entry, of {n_entries}", "the end of the log")
        sector, n_sectors, flags, data_length = _ENTRY.unpack(raw)
        text = ""
        if flags & MARK:
            if data_length > sector_size - _ENTRY.size:
                raise _corrupt(name, f"log entry {number}", position, "a text within its sector", f"{data_length} bytes")
            text = read(position + _ENTRY.size, data_length).decode(errors="replace")
        data_position = position + sector_size
        following = n_sectors * sector_size if not flags & DISCARD else 0
        if data_position + following > size:
            raise _corrupt(name, f"log entry {number}", position, "data within the log", f"{following} bytes")
        yield LogEntry(number, flags, sector * sector_size, n_sectors * sector_size, position, data_position, text)
        position = data_position + following


def end_of(read: Reader, size: int, name: str) -> tuple[int, int]:
    """(number of entries, the byte of the log where the next one goes)."""
    n_entries, position = 0, read_superblock(read, name)[1]
    for entry in entries(read, size, name):
        n_entries = entry.number + 1
        position = entry.data_position + (entry.length if entry.is_write else 0)
    return n_entries, position


def _corrupt(name: str, structure: str, host_offset: int, expected: str, found: str) -> ImageError:
    return ImageCorruptError(
        f"{name}: no log of writes that we can read: {structure} at {host_offset} is {found}, expected {expected}",
        structure=structure,
        host_offset=host_offset,
        expected=expected,
        found=found,
        node=name,
    )
