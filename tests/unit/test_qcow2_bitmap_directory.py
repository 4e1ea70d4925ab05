"""The bitmaps extension, the directory and bitmap tables: round trips, and malformed input one by one."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib.errors import ImageCorruptError, ImageError, ImageLimitError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.bitmap_directory import (
    BitmapsExtension,
    DirectoryEntry,
    data_length,
    entry_length,
    pack_directory,
    pack_extension,
    parse_directory,
    parse_extension,
    parse_table,
)
from blocklib.formats.qcow2.geometry import Geometry
from blocklib.formats.qcow2.tables import table_to_bytes
from blocklib.policy import Limits

GEOMETRY = Geometry(16)
ENTRY = DirectoryEntry(0x30000, 1, layout.BITMAP_FLAG_AUTO, 16, b"nightly")


def extension_for(entries: list[DirectoryEntry], offset: int = 0x50000) -> BitmapsExtension:
    return BitmapsExtension(len(entries), len(pack_directory(entries)), offset)


def parse(data: bytes, entries: list[DirectoryEntry], size: int | None = None) -> list[DirectoryEntry]:
    return parse_directory(data, extension_for(entries), GEOMETRY, size=size, node="a.qcow2")


@given(
    st.lists(
        st.builds(
            DirectoryEntry,
            table_offset=st.integers(1, 1 << 30).map(lambda n: n << 16),
            table_entries=st.integers(1, 8192),
            flags=st.integers(0, 7),
            granularity_bits=st.integers(0, 63),
            name=st.binary(min_size=1, max_size=60).filter(lambda name: b"\0" not in name),
            type=st.integers(0, 255),
            extra_data=st.binary(max_size=40),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda entry: entry.name,
    )
)
def test_a_directory_comes_back_as_it_was_packed(entries: list[DirectoryEntry]) -> None:
    data = pack_directory(entries)
    assert len(data) == sum(entry.length for entry in entries)
    assert len(data) % 8 == 0
    assert parse(data, entries) == entries


def test_an_extension_comes_back_as_it_was_packed() -> None:
    extension = BitmapsExtension(3, 96, 0x70000)
    assert parse_extension(pack_extension(extension), GEOMETRY, Limits()) == extension


@pytest.mark.parametrize(
    ("packed", "found"),
    [
        (struct.pack(">IIQ", 1, 0, 32), "16 bytes"),
        (struct.pack(">IIQQ", 1, 7, 32, 0x50000), "0x7"),
        (struct.pack(">IIQQ", 0, 0, 32, 0x50000), "none"),
        (struct.pack(">IIQQ", 1, 0, 24, 0x50000), "24 bytes"),
        (struct.pack(">IIQQ", 2, 0, 32, 0x50000), "32 bytes"),
        (struct.pack(">IIQQ", 1, 0, 32, 0), "0x0"),
        (struct.pack(">IIQQ", 1, 0, 32, 0x50200), "0x50200"),
        (struct.pack(">IIQQ", 1, 0, 32, 1 << 56), hex(1 << 56)),
    ],
)
def test_an_extension_that_makes_no_sense_is_corrupt(packed: bytes, found: str) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse_extension(packed, GEOMETRY, Limits(), node="a.qcow2")
    assert (caught.value.structure, caught.value.found, caught.value.node) == ("bitmaps extension", found, "a.qcow2")


@pytest.mark.parametrize(
    "packed",
    [
        struct.pack(">IIQQ", 65536, 0, 65536 * 32, 0x50000),
        struct.pack(">IIQQ", 1, 0, layout.MAX_BITMAP_DIRECTORY_BYTES + 8, 0x50000),
    ],
)
def test_an_extension_above_the_limits_is_refused(packed: bytes) -> None:
    with pytest.raises(ImageLimitError):
        parse_extension(packed, GEOMETRY, Limits())


@pytest.mark.parametrize(
    ("entry", "found", "kind"),
    [
        (replace(ENTRY, flags=8), "0x8", ImageCorruptError),
        (replace(ENTRY, granularity_bits=64), "64", ImageCorruptError),
        (replace(ENTRY, name=b"a\0b"), repr(b"a\0b"), ImageCorruptError),
        (replace(ENTRY, name=b""), "a name of 0 bytes", ImageCorruptError),
        (replace(ENTRY, name=b"n" * 1024), "1024 bytes", ImageLimitError),
        (replace(ENTRY, table_offset=0), "0x0", ImageCorruptError),
        (replace(ENTRY, table_offset=0x30200), "0x30200", ImageCorruptError),
        (replace(ENTRY, table_offset=1 << 56), hex(1 << 56), ImageCorruptError),
        (replace(ENTRY, table_entries=0), "0 entries", ImageCorruptError),
        (replace(ENTRY, table_entries=8193), "8193 entries", ImageLimitError),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused_with_its_place(
    entry: DirectoryEntry, found: str, kind: type[ImageError]
) -> None:
    entries = [ENTRY, entry]
    with pytest.raises(kind) as caught:
        parse(pack_directory(entries), entries)
    assert caught.value.structure == "bitmap directory entry 1"
    assert caught.value.host_offset == 0x50000 + ENTRY.length
    assert caught.value.found == found


def _put(position: int, raw: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + raw + data[position + len(raw) :]


@pytest.mark.parametrize(
    ("change", "structure"),
    [
        (_put(18, b"\x00\x10"), "bitmap directory entry 0"),  # a name longer than the directory
        (_put(20, b"\xff\xff\xff\xff"), "bitmap directory entry 0"),
        (_put(31, b"\x01"), "bitmap directory entry 0"),  # padding
        (lambda data: data[:-8], "bitmap directory"),
    ],
)
def test_a_directory_whose_bytes_make_no_sense_is_corrupt(change: Callable[[bytes], bytes], structure: str) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse(change(pack_directory([ENTRY])), [ENTRY])
    assert caught.value.structure == structure


def test_a_directory_longer_than_its_entries_is_corrupt() -> None:
    data = pack_directory([ENTRY]) + bytes(8)
    with pytest.raises(ImageCorruptError, match="entries that end after 32 bytes"):
        parse_directory(data, BitmapsExtension(1, len(data), 0x50000), GEOMETRY)


def test_two_bitmaps_of_one_name_are_corrupt() -> None:
    entries = [ENTRY, replace(ENTRY, table_offset=0x90000)]
    with pytest.raises(ImageCorruptError, match="a name that no other bitmap has"):
        parse(pack_directory(entries), entries)


def test_the_table_must_fit_the_disk_unless_the_bitmap_is_in_use() -> None:
    size = 1 << 36  # 2 MiB of 64 KiB pieces: 128 KiB of bits, two clusters
    assert data_length(size, 16) == 128 << 10
    right, wrong = replace(ENTRY, table_entries=2), replace(ENTRY, table_entries=3)
    in_use = wrong.with_flag(layout.BITMAP_FLAG_IN_USE, True)
    assert parse(pack_directory([right]), [right], size) == [right]
    assert parse(pack_directory([in_use]), [in_use], size) == [in_use]
    with pytest.raises(ImageCorruptError, match="a table of 2 entries"):
        parse(pack_directory([wrong]), [wrong], size)


@pytest.mark.parametrize(
    ("entry", "obstacle"),
    [
        (ENTRY, None),
        (replace(ENTRY, type=2), "type 2"),
        (replace(ENTRY, granularity_bits=8), "256 bytes"),
        (replace(ENTRY, granularity_bits=32), "4294967296 bytes"),
        (replace(ENTRY, extra_data=b"x"), "extra data"),
        (replace(ENTRY, extra_data=b"x", flags=layout.BITMAP_FLAG_EXTRA_DATA_COMPATIBLE), None),
    ],
)
def test_what_the_format_allows_and_we_cannot_use_is_told(entry: DirectoryEntry, obstacle: str | None) -> None:
    if obstacle is None:
        assert entry.obstacle is None
    else:
        assert entry.obstacle is not None
        assert obstacle in entry.obstacle


def test_a_table_of_offsets_zeroes_and_ones_is_accepted() -> None:
    table = array("Q", (0, 1, 0x30000, (1 << 56) - 0x10000))
    assert parse_table(table_to_bytes(table), ENTRY, GEOMETRY) == table


@pytest.mark.parametrize("value", [0x30001, 2, 0x100, 0x200, 0x30200, 1 << 56, 1 << 63, 3])
def test_a_table_entry_with_other_bits_is_corrupt(value: int) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse_table(table_to_bytes(array("Q", (0, value))), ENTRY, GEOMETRY)
    assert (caught.value.structure, caught.value.host_offset) == ("bitmap table entry 1", ENTRY.table_offset + 8)


def test_an_entry_takes_whole_multiples_of_eight_bytes() -> None:
    assert [entry_length(n) for n in (1, 8, 9)] == [32, 32, 40]
    assert entry_length(1, 8) == 40
