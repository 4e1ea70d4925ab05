"""The qcow2 header from `Header` to bytes, and how to replace the one on disk in one atomic write (pure, no I/O).

A disk writes a sector or does not, so what switches an image from one header to the next must lie inside the first 512
bytes.  Sources: section "Header extensions" of ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from blocklib.errors import UsageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import Extension, Header, parse_accepted_header
from blocklib.records import Record, replace

_V2_FIELDS = struct.Struct(layout.HEADER_V2_FORMAT)
_V3_FIELDS = struct.Struct(layout.HEADER_V3_FORMAT)
_EXTENSION_HEADER = struct.Struct(layout.EXTENSION_HEADER_FORMAT)

_EXTENSION_ORDER = {
    layout.EXTENSION_BACKING_FORMAT: 0,
    layout.EXTENSION_DATA_FILE: 1,
    layout.EXTENSION_ENCRYPTION: 2,
    layout.EXTENSION_BITMAPS: 3,
    layout.EXTENSION_FEATURE_NAMES: 5,
}
_UNKNOWN_EXTENSION_ORDER = 4
"""What an image cannot do without lies first, so that it shares the sector that is written in one step."""


class HeaderWrite(Record):
    """How to bring a header to disk: write `rest`, make it durable, then write `first`, 512 bytes at offset 0.

    `rest` holds (host offset, bytes) behind the first sector, only what differs from the disk.  With `atomic` no byte
    of it is one that the header on disk refers to, so a crash at any point leaves the old header or the new one.
    `header` is what parsing the result gives: the extensions that were written, and where the name went.
    """

    header: Header
    first: bytes
    rest: tuple[tuple[int, bytes], ...]
    atomic: bool


def serialize_header(header: Header) -> bytes:
    """The start of a new image: whole sectors, from offset 0 to the end of the backing file name.

    The first 512 bytes hold, in this order, the fields, the extensions (format name, data file name, encryption
    pointer, bitmaps, unknown ones, feature name table), the end marker and the backing file name.  The feature name
    table is left out where the name fits into them without it, or nothing fits the cluster with it.  A name that does
    not fit into the first sector follows in the header cluster.

    Raises:
        UsageError: it does not fit the header cluster, or the fields contradict each other.
    """
    write = plan_rewrite(header, b"")
    end = max([len(write.first), *(offset + len(part) for offset, part in write.rest)])
    image = bytearray(-(-end // layout.ATOMIC_WRITE_LENGTH) * layout.ATOMIC_WRITE_LENGTH)
    image[: len(write.first)] = write.first
    for offset, part in write.rest:
        image[offset : offset + len(part)] = part
    return bytes(image)


def plan_rewrite(header: Header, on_disk: bytes) -> HeaderWrite:
    """How to replace the header whose first `header_span` bytes are `on_disk` (b"" where there is none) by `header`.

    Where only fields change, extensions and name stay where they lie.  Otherwise all is laid out as
    `serialize_header` says, with a long backing name in bytes that the current header does not refer to.  The result
    is atomic unless the header cluster is too small for that; before it gives that up it leaves out the feature name
    table.

    Raises:
        UsageError: it does not fit the header cluster, or the fields contradict each other.
    """
    old = _OnDisk(on_disk)
    if old.header is not None and old.holds_the_same_parts(header):
        placed = replace(
            header,
            extensions=list(header.extensions),
            backing_file_offset=old.header.backing_file_offset,
            backing_file_size=old.header.backing_file_size,
        )
        kept = on_disk[header.header_length : layout.ATOMIC_WRITE_LENGTH]
        return old.plan(placed, [(0, _pack_fields(placed) + kept)])
    best = None
    for placed, parts in _layouts(header, old):
        if all(start + len(part) <= 1 << header.cluster_bits for start, part in parts):
            best = old.plan(placed, parts)
            if best.atomic:
                break
    if best is None:
        name_length = len(header.backing_name_bytes or b"")
        raise UsageError(
            f"the header with a backing file name of {name_length} bytes and {len(header.extensions)} extensions "
            f"does not fit a cluster of {1 << header.cluster_bits} bytes"
        )
    return best


class _OnDisk:
    """The header that is about to be replaced: its bytes, and which of them it refers to."""

    __slots__ = ("data", "header", "referenced")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.header: Header | None = None
        self.referenced: list[tuple[int, int]] = []
        if not data:
            return
        self.header, area_end = parse_accepted_header(data)
        name_start = self.header.backing_file_offset
        name_end = name_start + len(self.header.backing_name_bytes or b"")
        self.referenced = [(0, area_end), (name_start, name_end)]

    def holds_the_same_parts(self, new: Header) -> bool:
        old = self.header
        return old is not None and (old.version, old.header_length, old.extensions, old.backing_name_bytes) == (
            new.version,
            new.header_length,
            new.extensions,
            new.backing_name_bytes,
        )

    def plan(self, header: Header, parts: list[tuple[int, bytes]]) -> HeaderWrite:
        first = bytearray(layout.ATOMIC_WRITE_LENGTH)
        rest = []
        for start, part in parts:
            in_first = part[: max(0, len(first) - start)]
            first[start : start + len(in_first)] = in_first
            behind, behind_start = part[len(in_first) :], start + len(in_first)
            if behind != self.data[behind_start : behind_start + len(behind)]:
                rest.append((behind_start, behind))
        atomic = not any(self._changes_referenced(start, part) for start, part in rest)
        return HeaderWrite(header, bytes(first), tuple(rest), atomic)

    def _changes_referenced(self, start: int, part: bytes) -> bool:
        for low, high in self.referenced:
            low, high = max(low, start), min(high, start + len(part))
            if low < high and part[low - start : high - start] != self.data[low:high]:
                return True
        return False


def _layouts(header: Header, old: _OnDisk) -> Iterator[tuple[Header, list[tuple[int, bytes]]]]:
    """(header as placed, its parts with their host offsets) in order of preference; each may overrun the cluster."""
    name = header.backing_name_bytes or b""
    full = sorted(header.extensions, key=lambda item: _EXTENSION_ORDER.get(item.type, _UNKNOWN_EXTENSION_ORDER))
    bare = [item for item in full if item.type != layout.EXTENSION_FEATURE_NAMES]

    def fits(extensions: list[Extension]) -> bool:
        area = sum(layout.extension_span(len(item.data)) for item in extensions) + layout.EXTENSION_HEADER_LENGTH
        return header.header_length + area + len(name) <= layout.ATOMIC_WRITE_LENGTH

    choices = [bare] if name and fits(bare) and not fits(full) else [full, bare]
    for extensions in choices:
        area = _pack_extensions(extensions)
        end = header.header_length + len(area)
        for name_offset in _name_offsets(name, end, old):
            placed = replace(
                header, extensions=list(extensions), backing_file_offset=name_offset, backing_file_size=len(name)
            )
            parts = [(0, _pack_fields(placed) + area)]
            if name:
                parts.append((name_offset, name))
            yield placed, parts


def _name_offsets(name: bytes, area_end: int, old: _OnDisk) -> list[int]:
    if not name:
        return [0]
    sector = layout.ATOMIC_WRITE_LENGTH
    if area_end + len(name) <= sector:
        return [area_end]
    free = max(area_end, sector)
    offsets = [free, *(high for _, high in old.referenced if high > free), area_end]
    if old.header is not None and old.header.backing_name_bytes == name and old.header.backing_file_offset >= area_end:
        offsets.insert(0, old.header.backing_file_offset)
    return offsets


def _pack_extensions(extensions: list[Extension]) -> bytes:
    packed = bytearray()
    for item in extensions:
        packed += _EXTENSION_HEADER.pack(item.type, len(item.data))
        packed += item.data.ljust(layout.extension_span(len(item.data)) - layout.EXTENSION_HEADER_LENGTH, b"\0")
    return bytes(packed + bytes(layout.EXTENSION_HEADER_LENGTH))


def _pack_fields(header: Header) -> bytes:
    packed = _V2_FIELDS.pack(
        layout.MAGIC,
        header.version,
        header.backing_file_offset,
        header.backing_file_size,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    )
    additional = b""
    if header.version != layout.VERSION_2:
        packed += _V3_FIELDS.pack(
            header.incompatible_features,
            header.compatible_features,
            header.autoclear_features,
            header.refcount_order,
            header.header_length,
        )
        additional = (bytes((header.compression_type,)) + header.unknown_fields).rstrip(b"\0")
    packed += additional
    if len(packed) > header.header_length:
        raise UsageError(f"header fields of {len(packed)} bytes in a header of {header.header_length}")
    return packed.ljust(header.header_length, b"\0")
