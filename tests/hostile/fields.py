"""Every field of every structure of a qcow2 image, by name, and the values that a hostile image would put there.

`fields_of` finds the fields of an image that is whole; `values_of` tells what each may be made: the extremes, one more and one
less, misaligned, on top of each structure of the image and of itself, at the end of the file and beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from blocklib.formats.qcow2 import layout
from tests.damage import OFFSET, ImagePath

Kind = Literal["number", "offset", "entry", "text"]

_EXTENSION_FIELDS: Final[dict[int, tuple[tuple[str, int, int, Kind], ...]]] = {
    layout.EXTENSION_BITMAPS: (
        ("nb_bitmaps", 0, 4, "number"),
        ("reserved", 4, 4, "number"),
        ("bitmap_directory_size", 8, 8, "number"),
        ("bitmap_directory_offset", 16, 8, "offset"),
    ),
    layout.EXTENSION_ENCRYPTION: (("offset", 0, 8, "offset"), ("length", 8, 8, "number")),
    layout.EXTENSION_FEATURE_NAMES: (("type", 0, 1, "number"), ("bit", 1, 1, "number"), ("name", 2, 46, "text")),
}
_SNAPSHOT_FIELDS: Final[tuple[tuple[str, int, int, Kind], ...]] = (
    ("l1_table_offset", 0, 8, "offset"),
    ("l1_size", 8, 4, "number"),
    ("id length", 12, 2, "number"),
    ("name length", 14, 2, "number"),
    ("seconds", 16, 4, "number"),
    ("nanoseconds", 20, 4, "number"),
    ("guest run time", 24, 8, "number"),
    ("VM state size", 32, 4, "number"),
    ("extra data length", 36, 4, "number"),
    ("extra VM state size", 40, 8, "number"),
    ("extra disk size", 48, 8, "number"),
    ("extra icount", 56, 8, "number"),
)
_BITMAP_FIELDS: Final[tuple[tuple[str, int, int, Kind], ...]] = (
    ("bitmap_table_offset", 0, 8, "offset"),
    ("bitmap_table_size", 8, 4, "number"),
    ("flags", 12, 4, "number"),
    ("type", 16, 1, "number"),
    ("granularity_bits", 17, 1, "number"),
    ("name_size", 18, 2, "number"),
    ("extra_data_size", 20, 4, "number"),
    ("name", 24, 5, "text"),
)
_LUKS_FIELDS: Final[tuple[tuple[str, int, int, Kind], ...]] = (
    ("magic", 0, 6, "text"),
    ("version", 6, 2, "number"),
    ("cipher name", 8, 32, "text"),
    ("cipher mode", 40, 32, "text"),
    ("hash", 72, 32, "text"),
    ("payload offset", 104, 4, "number"),
    ("key length", 108, 4, "number"),
    ("digest", 112, 20, "text"),
    ("digest salt", 132, 32, "text"),
    ("digest iterations", 164, 4, "number"),
    ("uuid", 168, 40, "text"),
)
_SLOT_FIELDS: Final[tuple[tuple[str, int, int, Kind], ...]] = (
    ("state", 0, 4, "number"),
    ("iterations", 4, 4, "number"),
    ("salt", 8, 32, "text"),
    ("key material offset", 40, 4, "number"),
    ("stripes", 44, 4, "number"),
)
_WIDE: Final = frozenset(
    name for name in layout.FIELD_OFFSETS if name.endswith(("_offset", "_features")) or name == "size"
)


@dataclass(frozen=True)
class Field:
    """`length` bytes at a host offset."""

    name: str
    place: int
    length: int
    kind: Kind
    home: int
    """Where the structure that it is in begins."""


def fields_of(image: ImagePath) -> Iterator[Field]:
    version = image.field("version")
    yield Field("header.magic", 0, 4, "number", 0)
    for name, place in layout.FIELD_OFFSETS.items():
        if name == "magic" or (version < 3 and place >= layout.HEADER_V2_LENGTH):
            continue
        length = 8 if name in _WIDE else 1 if name == "compression_type" else 4
        kind: Kind = "offset" if name.endswith("_offset") else "number"
        yield Field(f"header.{name}", place, length, kind, 0)
    yield from _extensions(image)
    if place := image.field("backing_file_offset"):
        yield Field("backing file name", place, image.field("backing_file_size"), "text", 0)
    yield from _tables(image)
    yield from _snapshots(image)
    yield from _bitmaps(image)
    yield from _encryption(image)


def _extensions(image: ImagePath) -> Iterator[Field]:
    place = image.field("header_length") if image.field("version") > 2 else layout.HEADER_V2_LENGTH
    while True:
        kind, length = image.number(place, 4), image.number(place + 4, 4)
        name = layout.EXTENSION_NAMES.get(kind, "end of the extensions")
        yield Field(f"{name}.type", place, 4, "number", 0)
        yield Field(f"{name}.length", place + 4, 4, "number", 0)
        if not kind:
            return
        for field, offset, size, of_kind in _EXTENSION_FIELDS.get(kind, ()):
            yield Field(f"{name}.{field}", place + 8 + offset, size, of_kind, 0)
        if kind not in _EXTENSION_FIELDS:
            yield Field(f"{name}.text", place + 8, length, "text", 0)
        place += layout.extension_span(length)


def _tables(image: ImagePath) -> Iterator[Field]:
    last = image.field("l1_size") - 1
    yield Field("L1 entry", image.l1, 8, "entry", image.l1)
    if last:
        yield Field("last L1 entry", image.l1 + 8 * last, 8, "entry", image.l1)
    yield Field("refcount table entry", image.refcount_table, 8, "entry", image.refcount_table)
    yield Field("second refcount table entry", image.refcount_table + 8, 8, "entry", image.refcount_table)
    order = image.number(96, 4) if image.field("version") > 2 else 4
    width = max(1, (1 << order) // 8)
    block = image.refcount_block()
    for name, place in (("header", 0), ("L1 table", image.l1), ("L2 table", image.l2()), ("end", image.size)):
        at = block + (place // image.cluster_size) * (1 << order) // 8
        if at < block + image.cluster_size:
            yield Field(f"refcount of the {name}", at, width, "number", block)
    extended = image.l2_entry(1) - image.l2() == 16
    seen = set()
    for index in range(min(400, image.cluster_size // (16 if extended else 8))):
        entry = image.number(image.l2_entry(index))
        bitmap = image.number(image.l2_entry(index) + 8) if extended else 0
        what = _what(entry, bitmap)
        if what in seen:
            continue
        seen.add(what)
        yield Field(f"L2 entry of {what}", image.l2_entry(index), 8, "entry", image.l2())
        if extended:
            yield Field(f"subclusters of {what}", image.l2_entry(index) + 8, 8, "number", image.l2())


def _what(entry: int, bitmap: int) -> str:
    if entry & layout.FLAG_COMPRESSED:
        return "compressed data"
    host = "data" if entry & OFFSET else "nothing"
    return f"{host} that reads as zero" if entry & 1 or bitmap >> 32 else host


def _snapshots(image: ImagePath) -> Iterator[Field]:
    n_snapshots = image.field("nb_snapshots")
    place = image.snapshots
    for number in range(n_snapshots):
        prefix = f"snapshot {number}"
        for name, offset, length, kind in _SNAPSHOT_FIELDS:
            yield Field(f"{prefix}.{name}", place + offset, length, kind, image.snapshots)
        extra, id_length, name_length = (
            image.number(place + at, size) for at, size in ((36, 4), (12, 2), (14, 2))
        )
        yield Field(f"{prefix}.id", place + 40 + extra, id_length, "text", image.snapshots)
        yield Field(f"{prefix}.name", place + 40 + extra + id_length, name_length, "text", image.snapshots)
        l1 = image.number(place)
        yield Field(f"{prefix}, L1 entry", l1, 8, "entry", l1)
        place += -(-(40 + extra + id_length + name_length) // 8) * 8
    if n_snapshots:
        l2 = image.number(image.number(image.snapshots)) & OFFSET
        yield Field("snapshot 0, L2 entry", l2 + 8 * 5, 8, "entry", l2)


def _bitmaps(image: ImagePath) -> Iterator[Field]:
    try:
        extension = image.extension(layout.EXTENSION_BITMAPS)
    except LookupError:
        return
    place = directory = image.bitmap_directory
    for number in range(image.number(extension, 4)):
        for name, offset, length, kind in _BITMAP_FIELDS:
            yield Field(f"bitmap {number}.{name}", place + offset, length, kind, directory)
        table = image.number(place)
        yield Field(f"bitmap {number}, table entry", table, 8, "entry", table)
        place += -(-(24 + image.number(place + 18, 2) + image.number(place + 20, 4)) // 8) * 8


def _encryption(image: ImagePath) -> Iterator[Field]:
    try:
        header = image.number(image.extension(layout.EXTENSION_ENCRYPTION))
    except LookupError:
        return
    for name, offset, length, kind in _LUKS_FIELDS:
        yield Field(f"LUKS header.{name}", header + offset, length, kind, header)
    for slot in (0, 1, 7):
        for name, offset, length, kind in _SLOT_FIELDS:
            yield Field(f"LUKS key slot {slot}.{name}", header + 208 + 48 * slot + offset, length, kind, header)


# -- values ------------------------------------------------------------------------------------------------------------

_TEXTS: Final = {
    "empty": b"",
    "0": b"\0",
    "all ones": b"\xff" * 64,
    "itself": b"image.qcow2",
    "a decoy": b"decoy.qcow2",
    "/etc/passwd": b"/etc/passwd",
    "a device": b"/dev/zero",
    "json": b'json:{"driver":"raw","file":{"driver":"file","filename":"decoy.qcow2"}}',
    "a URL": b"nbd://127.0.0.1:1/x",
    "a NUL inside": b"decoy\0.qcow2",
    "controls": b"\x1b[31m\r\n\x07",
    "dots": b"../../../../etc/passwd",
}


def values_of(image: ImagePath, field: Field) -> Iterator[tuple[str, bytes]]:
    """(the value's name, its bytes); none is what stands there."""
    before = bytearray(field.length)
    image.read(field.place, memoryview(before))
    seen = {bytes(before)}
    for name, value in _texts(field) if field.kind == "text" else _numbers(image, field, int.from_bytes(before, "big")):
        if value not in seen:
            seen.add(value)
            yield name, value


def _texts(field: Field) -> Iterator[tuple[str, bytes]]:
    """A text fills its field, with NULs behind it where it is shorter; one that is longer is cut off."""
    for name, text in _TEXTS.items():
        yield name, text[: field.length].ljust(field.length, b"\0")


def _numbers(image: ImagePath, field: Field, now: int) -> Iterator[tuple[str, bytes]]:
    bits = 8 * field.length
    top = (1 << bits) - 1
    numbers = {
        "0": 0,
        "1": 1,
        "one less": now - 1,
        "one more": now + 1,
        "twice": now * 2,
        "sign bit": 1 << (bits - 1),
        "below the sign bit": (1 << (bits - 1)) - 1,
        "max": top,
        "a sector more": now + 512,
        "a cluster more": now + image.cluster_size,
    }
    for power in (16, 22, 31, 32, 56, 62):
        numbers[f"2**{power}"] = 1 << power
    if field.kind in ("offset", "entry"):
        numbers |= _places(image, field)
    if field.kind == "entry":
        flags = now & (3 << 62)
        numbers |= {f"{name} with its flags": flags | value for name, value in _places(image, field).items()}
        numbers |= {f"bit {bit} flipped": now ^ 1 << bit for bit in (0, 1, 2, 8, 9, 54, 55, 56, 57, 60, 61, 62, 63)}
    for name, value in numbers.items():
        if 0 <= value <= top:
            yield name, value.to_bytes(field.length, "big")


def _places(image: ImagePath, field: Field) -> dict[str, int]:
    """Where the structures of the image are, and places where none can be."""
    end = -(-image.size // image.cluster_size) * image.cluster_size
    places = {
        "on its own structure": field.home & ~(image.cluster_size - 1),
        "on itself": field.place,
        "on the L1 table": image.l1,
        "on an L2 table": image.l2(),
        "on the refcount table": image.refcount_table,
        "on a refcount block": image.refcount_block(),
        "on data": image.data(0),
        "on the last cluster": end - image.cluster_size,
        "at the end": end,
        "behind the end": end + image.cluster_size,
        "a terabyte away": 1 << 40,
        "the last cluster of all": OFFSET & ~(image.cluster_size - 1),
        "misaligned": image.l1 + 512,
    }
    if image.field("nb_snapshots"):
        places["on the snapshot table"] = image.snapshots
    return places
