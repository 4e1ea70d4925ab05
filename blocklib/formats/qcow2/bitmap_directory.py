"""The bitmaps extension, the bitmap directory and bitmap tables: bytes to values and back (pure, no I/O).

Sources: sections "Bitmaps extension", "Bitmap directory" and "Bitmap table" of ``docs/interop/qcow2.rst``.  What is read is
accepted as a whole or not at all; extra data of an entry, which nobody has defined yet, is carried through.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from blocklib.errors import ImageCorruptError, ImageError, ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.tables import Table, table_from_bytes
from blocklib.records import Record, replace

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.policy import Limits

_EXTENSION = struct.Struct(layout.BITMAPS_EXTENSION_FORMAT)
_ENTRY = struct.Struct(layout.BITMAP_ENTRY_FORMAT)


class BitmapsExtension(Record):
    """Where the bitmap directory lies (a host offset), its length in bytes, and how many entries it has."""

    n_bitmaps: int
    directory_length: int
    directory_offset: int


class DirectoryEntry(Record):
    """One bitmap as the directory describes it; the host offset of its table, which has `table_entries` entries."""

    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    name: bytes
    type: int = layout.BITMAP_TYPE_DIRTY_TRACKING
    extra_data: bytes = b""

    @property
    def in_use(self) -> bool:
        """'The bitmap was not saved correctly and may be inconsistent.'"""
        return bool(self.flags & layout.BITMAP_FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """'The bitmap must reflect all changes of the virtual disk.'"""
        return bool(self.flags & layout.BITMAP_FLAG_AUTO)

    @property
    def table_length(self) -> int:
        """Bytes of the bitmap table."""
        return self.table_entries * layout.TABLE_ENTRY_LENGTH

    @property
    def length(self) -> int:
        """Bytes that the entry takes in the directory, its padding included."""
        return entry_length(len(self.name), len(self.extra_data))

    @property
    def obstacle(self) -> str | None:
        """What keeps us from using a bitmap that the format allows, or None."""
        if self.type != layout.BITMAP_TYPE_DIRTY_TRACKING:
            return f"bitmaps of type {self.type}"
        if not layout.MIN_BITMAP_GRANULARITY_BITS <= self.granularity_bits <= layout.MAX_BITMAP_GRANULARITY_BITS:
            return f"bitmaps with a granularity of {1 << self.granularity_bits} bytes"
        if self.extra_data and not self.flags & layout.BITMAP_FLAG_EXTRA_DATA_COMPATIBLE:
            return "bitmaps with extra data of an unknown kind"
        return None

    def with_flag(self, flag: int, on: bool) -> DirectoryEntry:
        return replace(self, flags=self.flags | flag if on else self.flags & ~flag)


def entry_length(name_length: int, extra_length: int = 0) -> int:
    """Bytes of a directory entry, padded 'to the next multiple of 8'."""
    length = layout.BITMAP_ENTRY_LENGTH + extra_length + name_length
    return -(-length // layout.BITMAP_ALIGNMENT) * layout.BITMAP_ALIGNMENT


def data_length(size: int, granularity_bits: int) -> int:
    """Bytes of data that a bitmap of a disk of `size` bytes needs: one bit for each `1 << granularity_bits` bytes."""
    bits = (size + (1 << granularity_bits) - 1) >> granularity_bits
    return (bits + 7) // 8


def measured_length(geometry: Geometry, size: int, bitmaps: Iterable[tuple[bytes, int]]) -> int:
    """Bytes, in whole clusters, that bitmaps (name, granularity_bits) of a disk of `size` bytes take at most."""
    clusters = directory = 0
    for name, granularity_bits in bitmaps:
        data = geometry.clusters_for(data_length(size, granularity_bits))
        clusters += data + geometry.clusters_for(data * layout.TABLE_ENTRY_LENGTH)
        directory += entry_length(len(name))
    return (clusters + geometry.clusters_for(directory)) << geometry.cluster_bits


# The extension -------------------------------------------------------------------------------------------------------


def parse_extension(data: bytes, geometry: Geometry, limits: Limits, *, node: str | None = None) -> BitmapsExtension:
    """The bitmaps extension's data.  Raises ImageCorruptError, ImageLimitError."""
    name = layout.EXTENSION_NAMES[layout.EXTENSION_BITMAPS]
    refuse = _Refusal(name, None, node)
    if len(data) != _EXTENSION.size:
        raise refuse(f"{_EXTENSION.size} bytes of data", f"{len(data)} bytes")
    n_bitmaps, reserved, directory_length, directory_offset = _EXTENSION.unpack(data)
    if reserved:
        raise refuse("zero in the reserved field", f"{reserved:#x}")
    if n_bitmaps == 0:
        raise refuse("at least one bitmap", "none")
    limits.check("bitmaps", n_bitmaps, structure=name, node=node)
    if directory_length > layout.MAX_BITMAP_DIRECTORY_BYTES:
        raise refuse(
            f"a directory of at most {layout.MAX_BITMAP_DIRECTORY_BYTES} bytes",
            f"{directory_length} bytes",
            ImageLimitError,
        )
    smallest = n_bitmaps * entry_length(1)
    if directory_length < smallest:
        raise refuse(f"at least {smallest} bytes for {n_bitmaps} entries", f"{directory_length} bytes")
    if not directory_offset or directory_offset & geometry.cluster_mask or directory_offset >= layout.MAX_HOST_OFFSET:
        raise refuse("a directory at a cluster aligned offset behind the header", f"{directory_offset:#x}")
    return BitmapsExtension(n_bitmaps, directory_length, directory_offset)


def pack_extension(extension: BitmapsExtension) -> bytes:
    return _EXTENSION.pack(extension.n_bitmaps, 0, extension.directory_length, extension.directory_offset)


# The directory -------------------------------------------------------------------------------------------------------


def parse_directory(
    data: bytes | bytearray | memoryview,
    extension: BitmapsExtension,
    geometry: Geometry,
    *,
    size: int | None = None,
    node: str | None = None,
) -> list[DirectoryEntry]:
    """The entries of the directory whose bytes are `data`.

    With the virtual `size` in bytes, a bitmap that is not in use must also have a table of the length that it needs.

    Raises:
        ImageCorruptError: an entry contradicts the specification.
        ImageLimitError: a table, a bitmap or a name larger than QEMU's limits.
    """
    entries: list[DirectoryEntry] = []
    names: set[bytes] = set()
    for entry, refuse in _walk(data, extension, node):
        _check_entry(entry, geometry, size, names, refuse)
        entries.append(entry)
    return entries


def sound_entries(
    data: bytes | bytearray | memoryview, extension: BitmapsExtension, geometry: Geometry, *, size: int
) -> list[DirectoryEntry]:
    """What `parse_directory` would have accepted of a directory that it refuses; nothing where entries cannot be told apart."""
    entries: list[DirectoryEntry] = []
    names: set[bytes] = set()
    try:
        for entry, refuse in _walk(data, extension, None):
            with suppress(ImageError):
                _check_entry(entry, geometry, size, names, refuse)
                entries.append(entry)
    except ImageError:
        return []
    return entries


def _walk(
    data: bytes | bytearray | memoryview, extension: BitmapsExtension, node: str | None
) -> Iterator[tuple[DirectoryEntry, _Refusal]]:
    """Each entry, and what builds the error for it.  Raises where their lengths do not fill the directory, ImageLimitError."""
    view = memoryview(data)
    if len(view) != extension.directory_length:
        raise _Refusal("bitmap directory", extension.directory_offset, node)(
            f"{extension.directory_length} bytes", f"{len(view)} bytes"
        )
    position = 0
    for index in range(extension.n_bitmaps):
        refuse = _Refusal(f"bitmap directory entry {index}", extension.directory_offset + position, node)
        entry = _parse_entry(view[position:], refuse)
        yield entry, refuse
        position += entry.length
    if position != len(view):
        raise _Refusal("bitmap directory", extension.directory_offset, node)(
            f"{extension.n_bitmaps} entries in {len(view)} bytes", f"entries that end after {position} bytes"
        )


def _parse_entry(view: memoryview, refuse: _Refusal) -> DirectoryEntry:
    if len(view) < _ENTRY.size:
        raise refuse(f"an entry of at least {_ENTRY.size} bytes", f"{len(view)} bytes until the end of the directory")
    offset, table_entries, flags, kind, granularity_bits, name_length, extra_length = _ENTRY.unpack_from(view)
    if not name_length:
        raise refuse("a name", "a name of 0 bytes")
    if name_length > layout.MAX_BITMAP_NAME_LENGTH:
        raise refuse(f"a name of at most {layout.MAX_BITMAP_NAME_LENGTH} bytes", f"{name_length} bytes", ImageLimitError)
    length = entry_length(name_length, extra_length)
    if length > len(view):
        raise refuse(f"an entry of at most {len(view)} bytes", f"{length} bytes")
    extra_data = bytes(view[_ENTRY.size : _ENTRY.size + extra_length])
    name_end = _ENTRY.size + extra_length + name_length
    name = bytes(view[name_end - name_length : name_end])
    if any(view[name_end:length]):
        raise refuse("zeroes as padding", bytes(view[name_end:length]).hex())
    return DirectoryEntry(offset, table_entries, flags, granularity_bits, name, kind, extra_data)


def _check_entry(
    entry: DirectoryEntry, geometry: Geometry, size: int | None, names: set[bytes], refuse: _Refusal
) -> None:
    """Raises where an entry contradicts the specification; otherwise its name joins `names`."""
    if entry.flags & layout.BITMAP_RESERVED_FLAGS:
        raise refuse("no reserved flags", f"{entry.flags:#x}")
    if entry.granularity_bits > layout.BITMAP_MAX_GRANULARITY_BITS:
        raise refuse(f"granularity_bits of at most {layout.BITMAP_MAX_GRANULARITY_BITS}", str(entry.granularity_bits))
    if b"\0" in entry.name:
        raise refuse("a name without NUL characters", repr(entry.name))
    if not entry.table_offset or entry.table_offset & geometry.cluster_mask or entry.table_offset >= layout.MAX_HOST_OFFSET:
        raise refuse("a table at a cluster aligned offset behind the header", f"{entry.table_offset:#x}")
    if not entry.table_entries:
        raise refuse("a table with entries", "0 entries")
    most = min(layout.MAX_BITMAP_TABLE_ENTRIES, layout.MAX_BITMAP_BYTES >> geometry.cluster_bits)
    if entry.table_entries > most:
        raise refuse(f"a table of at most {most} entries", f"{entry.table_entries} entries", ImageLimitError)
    if size is not None and not entry.in_use:
        needed = geometry.clusters_for(data_length(size, entry.granularity_bits))
        if entry.table_entries != max(needed, 1):
            raise refuse(f"a table of {max(needed, 1)} entries", f"{entry.table_entries} entries")
    if entry.name in names:
        raise refuse("a name that no other bitmap has", repr(entry.name))
    names.add(entry.name)


def pack_directory(entries: Sequence[DirectoryEntry]) -> bytes:
    """The bytes of a directory with these entries, in their order."""
    packed = bytearray()
    for entry in entries:
        fixed = _ENTRY.pack(
            entry.table_offset,
            entry.table_entries,
            entry.flags,
            entry.type,
            entry.granularity_bits,
            len(entry.name),
            len(entry.extra_data),
        )
        packed += (fixed + entry.extra_data + entry.name).ljust(entry.length, b"\0")
    return bytes(packed)


# Tables --------------------------------------------------------------------------------------------------------------


def parse_table(
    data: bytes | bytearray | memoryview, entry: DirectoryEntry, geometry: Geometry, *, node: str | None = None
) -> Table:
    """The bitmap table whose bytes are `data`.  Raises ImageCorruptError."""
    table = table_from_bytes("Q", data)
    suspect = layout.BITMAP_TABLE_RESERVED_MASK | (geometry.cluster_mask & layout.OFFSET_MASK) | layout.BITMAP_TABLE_ALL_ONES
    for index, value in enumerate(table):
        if value & suspect and value != layout.BITMAP_TABLE_ALL_ONES:
            host_offset = entry.table_offset + index * layout.TABLE_ENTRY_LENGTH
            raise _Refusal(f"bitmap table entry {index}", host_offset, node)(
                "the cluster aligned offset of bitmap data, 0 or 1", f"{value:#x}"
            )
    return table


class _Refusal:
    """Builds the error for one structure: it names it, its place, what was expected and what was found."""

    __slots__ = ("host_offset", "node", "structure")

    def __init__(self, structure: str, host_offset: int | None, node: str | None) -> None:
        self.structure = structure
        self.host_offset = host_offset
        self.node = node

    def __call__(self, expected: str, found: str, kind: type[ImageError] = ImageCorruptError) -> ImageError:
        where = f" at {self.host_offset:#x}" if self.host_offset is not None else ""
        prefix = f"{self.node}: " if self.node else ""
        return kind(
            f"{prefix}{self.structure}{where}: expected {expected}, found {found}",
            structure=self.structure,
            host_offset=self.host_offset,
            expected=expected,
            found=found,
            node=self.node,
        )
