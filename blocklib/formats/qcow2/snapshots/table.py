"""The snapshot table: bytes to `Snapshot` and back, and which snapshot a name or an ID means.

Source: section "Snapshots" of ``docs/interop/qcow2.rst``.  What an entry has beyond what we know is kept and written back.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from blocklib.errors import ImageCorruptError, ImageLimitError, NameNotFoundError, UsageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header_checks import prefix
from blocklib.reports import SnapshotInfo

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header
    from blocklib.graph import Edge

_ENTRY: Final = struct.Struct(layout.SNAPSHOT_ENTRY_FORMAT)
_EXTRA: Final = struct.Struct(layout.SNAPSHOT_EXTRA_FORMAT)
_NO_ICOUNT: Final = (1 << 64) - 1
_PIECE: Final = 1 << 16
MAX_NAME_LENGTH: Final = 255
"""Bytes.  The format has room for 65,535, but QEMU cuts a longer name off and then does not find it."""


class Snapshot(NamedTuple):
    """One entry of the table.  `extra` is the extra data as stored, known fields and unknown ones."""

    l1_offset: int
    l1_size: int
    """Entries of its L1 table."""
    id: bytes
    name: bytes
    seconds: int
    nanoseconds: int
    vm_clock_ns: int
    vm_state_size_32: int
    extra: bytes

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state behind the end of the disk."""
        return int.from_bytes(self.extra[:8], "big") if len(self.extra) >= 8 else self.vm_state_size_32

    @property
    def disk_size(self) -> int | None:
        """Bytes, or None where the entry does not say: then the disk had the size that it has."""
        return int.from_bytes(self.extra[8:16], "big") if len(self.extra) >= 16 else None

    @property
    def icount(self) -> int | None:
        """Instructions that the guest had executed, where they were counted."""
        count = int.from_bytes(self.extra[16:24], "big") if len(self.extra) >= 24 else _NO_ICOUNT
        return None if count == _NO_ICOUNT else count

    @property
    def length(self) -> int:
        """Bytes that the entry takes in the table."""
        return _padded(_ENTRY.size + len(self.extra) + len(self.id) + len(self.name))

    def is_called(self, id: bytes | None, name: bytes | None) -> bool:
        """Whether it has this ID and this name, as far as they are given."""
        return (id is None or self.id == id) and (name is None or self.name == name)

    def info(self, disk_size: int) -> SnapshotInfo:
        """For people; `disk_size` is the image's, for an entry that does not say its own."""
        from datetime import UTC, datetime

        moment = datetime.fromtimestamp(self.seconds, UTC)
        return SnapshotInfo(
            id=os.fsdecode(self.id),
            name=os.fsdecode(self.name),
            created=moment.replace(microsecond=min(self.nanoseconds // 1000, 999_999)),
            vm_state_size=self.vm_state_size,
            vm_clock_ns=self.vm_clock_ns,
            size=disk_size if self.disk_size is None else self.disk_size,
            icount=self.icount,
            created_nsec=self.nanoseconds,
        )


def extra_data(*, vm_state_size: int, disk_size: int, icount: int = 0) -> bytes:
    """The extra data of a new snapshot, as QEMU 7.2 writes it."""
    return _EXTRA.pack(vm_state_size, disk_size, icount)


def read_snapshots(file: Edge, header: Header, *, node: str | None) -> list[Snapshot]:
    """The snapshots of an image whose header was accepted.

    Raises ImageCorruptError, ImageLimitError, both with the host offset of the entry; StorageError.
    """
    table = TableReader(file, header, node)
    return [table.next(index) for index in range(header.nb_snapshots)]


class TableFile(Protocol):
    """What a table is read from."""

    @property
    def size(self) -> int: ...
    def read(self, offset: int, view: memoryview, event: str | None, /) -> None: ...


class TableReader:
    """Reads entry after entry; only the entries say how long the table is."""

    def __init__(self, file: TableFile, header: Header, node: str | None) -> None:
        self._file = file
        self._start = header.snapshots_offset
        self._node = node
        self._data = bytearray()
        self._gone = 0
        """Where in the table `_data` begins: what is before it has been read."""
        self._position = 0

    def next(self, index: int) -> Snapshot:
        position = self._position
        if position - self._gone > _PIECE:  # names and ids may add up to 64 MiB, once is enough of them
            del self._data[: position - self._gone]
            self._gone = position
        self._need(index, position + _ENTRY.size)
        l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, clock, state_size, extra_length = (
            _ENTRY.unpack_from(self._data, position - self._gone)
        )
        if extra_length > layout.MAX_SNAPSHOT_EXTRA_BYTES:
            found = f"{extra_length} bytes"
            raise self._bad(index, f"at most {layout.MAX_SNAPSHOT_EXTRA_BYTES} bytes of extra data", found, ImageLimitError)
        start = position + _ENTRY.size
        id_start = start + extra_length
        name_start = id_start + id_length
        end = name_start + name_length
        self._need(index, end)
        if _padded(end) > layout.MAX_SNAPSHOT_TABLE_BYTES:
            expected = f"a table of at most {layout.MAX_SNAPSHOT_TABLE_BYTES} bytes"
            raise self._bad(index, expected, f"{_padded(end)} bytes", ImageLimitError)
        self._position = _padded(end)
        return Snapshot(
            l1_offset,
            l1_size,
            self._part(id_start, name_start),
            self._part(name_start, end),
            seconds,
            nanoseconds,
            clock,
            state_size,
            self._part(start, id_start),
        )

    def _part(self, start: int, end: int) -> bytes:
        return bytes(self._data[start - self._gone : end - self._gone])

    def _need(self, index: int, end: int) -> None:
        """Have the table in memory up to `end`."""
        if self._start + end > self._file.size:
            raise self._bad(index, f"an entry inside the file of {self._file.size} bytes", f"one that ends at {end}")
        known = self._gone + len(self._data)
        if end > known:
            piece = bytearray(min(max(_PIECE, end - known), self._file.size - self._start - known))
            self._file.read(self._start + known, memoryview(piece), "metadata")
            self._data += piece

    def _bad(
        self, index: int, expected: str, found: str, kind: type[ImageCorruptError | ImageLimitError] = ImageCorruptError
    ) -> ImageCorruptError | ImageLimitError:
        return kind(
            f"{prefix(self._node)}snapshot table entry {index}: {found} where {expected} was expected",
            structure=f"snapshot table entry {index}",
            host_offset=self._start + self._position,
            expected=expected,
            found=found,
            node=self._node,
        )


def table_bytes(snapshots: Iterable[Snapshot], *, version: int, disk_size: int) -> bytes:
    """The table as it is stored.  Version 3 demands some extra data: entries without it get it, with `disk_size`.

    Raises ImageLimitError for a table longer than any reader accepts.
    """
    table = bytearray()
    for entry in snapshots:
        extra = entry.extra
        if version >= layout.VERSION_3 and len(extra) < layout.SNAPSHOT_V3_EXTRA_LENGTH:
            extra = extra_data(vm_state_size=entry.vm_state_size, disk_size=disk_size)[: layout.SNAPSHOT_V3_EXTRA_LENGTH]
        table += _ENTRY.pack(
            entry.l1_offset,
            entry.l1_size,
            len(entry.id),
            len(entry.name),
            entry.seconds,
            entry.nanoseconds,
            entry.vm_clock_ns,
            entry.vm_state_size_32,
            len(extra),
        )
        table += extra + entry.id + entry.name
        table += bytes(_padded(len(table)) - len(table))
    if len(table) > layout.MAX_SNAPSHOT_TABLE_BYTES:
        raise ImageLimitError(
            f"a snapshot table of {len(table)} bytes is longer than any reader accepts",
            structure="snapshot table",
            expected=f"at most {layout.MAX_SNAPSHOT_TABLE_BYTES} bytes",
            found=str(len(table)),
        )
    return bytes(table)


def _padded(length: int) -> int:
    return -(-length // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT


def new_id(snapshots: Iterable[Snapshot]) -> bytes:
    """The ID of the next snapshot, as QEMU gives them: one more than the highest number that there is."""
    highest = 0
    for entry in snapshots:
        digits = re.match(rb"\d+", entry.id)
        if digits is not None and len(digits[0]) < 19:
            highest = max(highest, int(digits[0]))
    return str(highest + 1).encode()


def checked_name(name: str) -> bytes:
    """`name` as it is stored.  Raises UsageError for one that QEMU could not tell from others."""
    stored = os.fsencode(name)
    if b"\0" in stored:
        raise UsageError("the name of a snapshot has no zero bytes")
    if len(stored) > MAX_NAME_LENGTH:
        raise UsageError(f"the name of a snapshot has at most {MAX_NAME_LENGTH} bytes, not {len(stored)}")
    return stored


def find_snapshot(
    snapshots: Sequence[Snapshot], *, id: str | None = None, name: str | None = None, node: str | None = None
) -> int:
    """The index of the first snapshot that has this ID and this name, as far as they are given.

    Raises NameNotFoundError.
    """
    stored_id = None if id is None else os.fsencode(id)
    stored_name = None if name is None else os.fsencode(name)
    for index, entry in enumerate(snapshots):
        if entry.is_called(stored_id, stored_name):
            return index
    wanted = " and ".join(f"the {what} {text!r}" for what, text in (("ID", id), ("name", name)) if text is not None)
    raise NameNotFoundError(f"{node}: there is no snapshot with {wanted}", node=node)
