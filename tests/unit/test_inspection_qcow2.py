"""Inspection of qcow2: what the header says, also of an image that nobody could open, and what it points at."""

from __future__ import annotations

import functools
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import blocklib
from blocklib import Inspection, Inspector, KiB, MiB, Secret
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import header_span, parse_header
from blocklib.options import OptionValue
from blocklib.policy import Limits
from tests import foreign
from tests.qcow2_bytes import Qcow2Bytes

OPENSTACK = ("backing_file", "data_file", "unknown_features")
BITS_64 = {name for name in layout.FIELD_OFFSETS if name.endswith(("_offset", "_features")) or name == "size"}


def changed(data: bytes, field: str, value: int) -> bytes:
    length = 8 if field in BITS_64 else 4
    start = layout.FIELD_OFFSETS[field]
    return data[:start] + (value & (1 << 8 * length) - 1).to_bytes(length, "big") + data[start + length :]


def number(data: bytes, field: str) -> int:
    start = layout.FIELD_OFFSETS[field]
    return int.from_bytes(data[start : start + (8 if field in BITS_64 else 4)], "big")


def inspect_bytes(data: bytes, limits: Limits = Limits()) -> Inspection:  # noqa: B008 - immutable
    return blocklib.inspect(io.BytesIO(data), limits=limits)


def failed(found: Inspection) -> set[str]:
    return {check.name for check in found.failures}


@functools.cache
def plain(version: int = 3) -> bytes:
    return bytes(Qcow2Bytes(cluster_bits=12, version=version).bytes)


@functools.cache
def rich(cluster_size: int = 512) -> bytes:
    """An image with snapshots and bitmaps, made by blocklib itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rich.qcow2"
        blocklib.create(path, 256 * KiB, format="qcow2", options={"cluster_size": cluster_size})
        with blocklib.open(path, "r+") as disk:
            disk.write(0, b"\xaa" * 4096)
            for index in range(3):
                disk.snapshots.create(f"snapshot {index}")
                disk.write(8192 * index, bytes([index]) * 4096)
            for index in range(2):
                disk.bitmaps.add(f"bitmap {index}", persistent=True)
        return path.read_bytes()


@functools.cache
def encrypted() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "secret.qcow2"
        options: Mapping[str, OptionValue]
        options = {"encrypt.format": "luks", "encrypt.key-secret": Secret("hunter2"), "encrypt.iter-time": 10}
        blocklib.create(path, 1 * MiB, format="qcow2", options=options)
        return path.read_bytes()


def test_a_sound_image_passes_every_check() -> None:
    for data in (plain(), plain(2), rich(), encrypted()):
        found = inspect_bytes(data)
        assert found.safe, found.failures
        assert found.formats == ("qcow2",)
        assert found.virtual_size == number(data, "size")
        assert set(OPENSTACK) < set(found.checks)
        assert found.limits_exceeded == ()
    found = inspect_bytes(rich())
    assert "3 internal snapshots" in found.checks["snapshots"].message
    assert "2 bitmaps" in found.checks["bitmaps"].message
    assert found.features == ("bitmaps",)
    assert not found.encrypted
    assert inspect_bytes(encrypted()).encrypted
    assert inspect_bytes(encrypted()).checks["encryption"].passed


# -- OpenStack's checks ------------------------------------------------------------------------------------------------


def with_backing(name: bytes, format: bytes | None = None) -> bytes:
    data = bytearray(plain())
    data[8:20] = (1000).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    data[1000 : 1000 + len(name)] = name
    if format is not None:
        data[104:112] = layout.EXTENSION_BACKING_FORMAT.to_bytes(4, "big") + len(format).to_bytes(4, "big")
        data[112 : 112 + len(format)] = format
    return bytes(data)


def with_data_file(name: bytes | None) -> bytes:
    data = bytearray(changed(plain(), "incompatible_features", layout.INCOMPATIBLE_DATA_FILE))
    if name is not None:
        data[104:112] = layout.EXTENSION_DATA_FILE.to_bytes(4, "big") + len(name).to_bytes(4, "big")
        data[112 : 112 + len(name)] = name
    return bytes(data)


@pytest.mark.parametrize("name", ["base.qcow2", "/etc/passwd", 'json:{"driver": "nbd"}', "nbd://host/x", "\udcff"])
@pytest.mark.parametrize("format", [None, "raw"])
def test_a_backing_file_is_told_as_the_image_spells_it(name: str, format: str | None) -> None:
    found = inspect_bytes(with_backing(os.fsencode(name), format.encode() if format else None))
    assert failed(found) == {"backing_file"}
    assert repr(name) in found.checks["backing_file"].message
    assert found.references == (blocklib.Reference("backing", name, format, None, 1),)


@pytest.mark.parametrize("offset", [1, 50, 1 << 20, (1 << 64) - 1])
def test_a_backing_file_whose_name_cannot_be_read_is_one_all_the_same(offset: int) -> None:
    found = inspect_bytes(changed(with_backing(b"base"), "backing_file_offset", offset))
    assert failed(found) >= {"backing_file", "header"}
    assert found.references == ()


def test_an_empty_backing_name_is_a_backing_file_too() -> None:
    assert failed(inspect_bytes(with_backing(b""))) == {"backing_file"}
    assert failed(inspect_bytes(with_backing(b"base\0other"))) == {"backing_file", "header"}


def test_a_data_file_is_told_with_its_name_or_without() -> None:
    found = inspect_bytes(with_data_file(b"/etc/shadow"))
    assert failed(found) == {"data_file"}
    assert found.references == (blocklib.Reference("data-file", "/etc/shadow", "raw", None, 1),)
    assert found.features == ("external data file",)
    assert failed(inspect_bytes(with_data_file(None))) == {"data_file"}
    # Without its feature bit the name means nothing.
    assert inspect_bytes(changed(with_data_file(b"/etc/shadow"), "incompatible_features", 0)).safe


@pytest.mark.parametrize("bit", [5, 6, 17, 63])
def test_an_unknown_incompatible_feature_is_unsafe_and_named_by_its_bit(bit: int) -> None:
    found = inspect_bytes(changed(plain(), "incompatible_features", 1 << bit))
    assert failed(found) == {"unknown_features"}
    assert found.features == (f"unknown incompatible feature bit {bit}",)


def test_known_and_harmless_feature_bits_are_told_by_name() -> None:
    found = inspect_bytes(changed(plain(), "incompatible_features", 3))
    assert found.features == ("dirty bit", "corrupt bit")
    assert found.safe
    found = inspect_bytes(changed(changed(plain(), "compatible_features", 1 | 1 << 40), "autoclear_features", 1 << 63))
    assert found.features == (
        "lazy refcounts",
        "unknown compatible feature bit 40",
        "unknown autoclear feature bit 63",
    )
    assert found.safe


@pytest.mark.parametrize("version", [0, 4, (1 << 32) - 1])
def test_an_unknown_version_is_an_unknown_feature_and_its_references_are_told(version: int) -> None:
    found = inspect_bytes(changed(with_backing(b"base"), "version", version))
    assert failed(found) == {"backing_file", "unknown_features"}
    assert found.virtual_size == number(plain(), "size")


@pytest.mark.parametrize("length", [4, 8, 71, 72, 103])
def test_a_header_that_is_cut_off_fails_every_check(length: int) -> None:
    assert failed(inspect_bytes(plain()[:length])) == {*OPENSTACK, "header"}


def test_an_unknown_encryption_is_told() -> None:
    found = inspect_bytes(changed(plain(), "crypt_method", 7))
    assert found.encrypted
    assert failed(found) == {"unknown_features"}
    old = inspect_bytes(changed(plain(), "crypt_method", 1))
    assert old.encrypted
    assert old.safe


# -- the header --------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[str, int]] = {
    "cluster_bits": ("header", 8),
    "header_length": ("header", 9999),
    "refcount_order": ("header", 7),
    "l1_size": ("header", 0),
    "l1_table_offset": ("header", 512),
    "refcount_table_offset": ("header", 1 << 40),
    "refcount_table_clusters": ("header", 0),
}


@pytest.mark.parametrize("field", DAMAGES)
def test_a_malformed_field_fails_the_header_and_answers_the_rest(field: str) -> None:
    check, value = DAMAGES[field]
    found = inspect_bytes(changed(with_backing(b"base"), field, value))
    assert failed(found) == {check, "backing_file"}
    assert field in found.checks["header"].message
    assert found.checks["data_file"].passed


LIMITS: dict[str, tuple[str, int, Limits]] = {
    "virtual_size": ("size", 1 << 40, Limits(virtual_size=1 << 39)),
    "l1_bytes": ("l1_size", (4 << 20) + 1, Limits()),
    "refcount_table_bytes": ("refcount_table_clusters", 4096, Limits()),
    "snapshots": ("nb_snapshots", 65537, Limits()),
    "cluster_size": ("cluster_bits", 22, Limits()),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_told_by_its_name(limit: str) -> None:
    field, value, limits = LIMITS[limit]
    found = inspect_bytes(changed(plain(), field, value), limits)
    assert limit in found.limits_exceeded
    assert not found.checks["limits"].passed
    assert limit in found.checks["limits"].message


def test_every_limit_is_told_not_only_the_first() -> None:
    data = changed(changed(changed(plain(), "size", 1 << 62), "nb_snapshots", 1 << 31), "l1_size", 1 << 31)
    assert inspect_bytes(data, Limits(virtual_size=1)).limits_exceeded == ("l1_bytes", "snapshots", "virtual_size")


EXTREMES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 9, 12, 21, 22, 104, 512, 4096, 8192, 1 << 16, 1 << 31, (1 << 32) - 1]),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.integers(0, (1 << 64) - 1),
)
CHANGES = st.lists(st.tuples(st.sampled_from(sorted(set(layout.FIELD_OFFSETS) - {"magic", "compression_type"})), EXTREMES))


@given(base=st.sampled_from([plain, rich, encrypted]), changes=CHANGES, cut=st.none() | st.integers(8, 2000))
@example(base=plain, changes=[("cluster_bits", (1 << 32) - 1)], cut=None)
def test_the_verdict_on_a_header_is_that_of_the_parser(
    base: Callable[[], bytes], changes: list[tuple[str, int]], cut: int | None
) -> None:
    data = base()
    for field, value in changes:
        data = changed(data, field, value)
    data = data[:cut]
    found = inspect_bytes(data)
    if found.formats != ("qcow2",):
        return
    accepted = False
    with suppress(blocklib.ImageError):
        parse_header(data[: header_span(data)], limits=Limits(), file_length=len(data))
        accepted = True
    about_header = {"header", "unknown_features", "limits"}
    if accepted:
        assert not failed(found) & (about_header - {"limits"})
    else:
        assert failed(found) & about_header
    if found.safe:  # then it can be opened
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            blocklib.open(file.name, format="qcow2", options=_key(data)).close()


def _key(data: bytes) -> Mapping[str, OptionValue] | None:
    # Version 2 has no LUKS; the old method takes any passphrase.
    return {"encrypt.key-secret": Secret("hunter2")} if number(data, "crypt_method") else None


# -- what the header points at -----------------------------------------------------------------------------------------


def damaged(data: bytes, place: int, value: int, length: int = 8) -> bytes:
    return data[:place] + value.to_bytes(length, "big") + data[place + length :]


def test_a_snapshot_table_is_looked_into() -> None:
    data = rich()
    table = number(data, "snapshots_offset")
    for place, value, length in ((0, 511, 8), (0, 1 << 40, 8), (12, 60000, 2), (36, 2000, 4), (36, 1 << 31, 4)):
        found = inspect_bytes(damaged(data, table + place, value, length))
        assert failed(found) == {"snapshots"}, (place, value)
    found = inspect_bytes(damaged(data, table + 8, (4 << 20) + 1, 4))
    assert found.limits_exceeded == ("l1_bytes",)
    disk_size = table + layout.SNAPSHOT_ENTRY_LENGTH + 8
    assert inspect_bytes(damaged(data, disk_size, 1 << 50), Limits(virtual_size=1 << 40)).limits_exceeded == ("virtual_size",)
    assert failed(inspect_bytes(changed(data, "nb_snapshots", 65536))) == {"snapshots"}


def test_a_snapshot_table_that_is_too_long_to_keep_fails() -> None:
    entry = bytearray(layout.SNAPSHOT_ENTRY_LENGTH + 16 + 60_000)
    entry[14:16] = (60_000).to_bytes(2, "big")
    entry[36:40] = (16).to_bytes(4, "big")
    data = plain() + bytes(entry) * 20
    data = changed(changed(data, "snapshots_offset", len(plain())), "nb_snapshots", 20)
    found = inspect_bytes(data)
    assert failed(found) == {"snapshots"}
    assert "more than the 1048576 bytes" in found.checks["snapshots"].message


def test_a_bitmap_directory_is_looked_into() -> None:
    data = rich()
    header = parse_header(data[:512], limits=Limits())
    extension = header.extension(layout.EXTENSION_BITMAPS)
    assert extension is not None
    place = data.index(extension)
    directory = int.from_bytes(extension[16:24], "big")
    for where, value, length in (
        (place + 4, 1, 4),
        (place + 8, 1 << 20, 8),
        (place + 16, 1 << 40, 8),
        (place + 16, 513, 8),
        (directory, 5, 8),
        (directory + 12, 0xFF, 4),
        (directory + 18, 2000, 2),
    ):
        found = inspect_bytes(damaged(data, where, value, length))
        assert failed(found) == {"bitmaps"}, (where, value)
    assert inspect_bytes(damaged(data, place, 65536, 4)).limits_exceeded == ("bitmaps",)
    assert inspect_bytes(data, Limits(bitmaps=1)).limits_exceeded == ("bitmaps",)
    assert inspect_bytes(data, Limits(bitmap_bytes=1)).limits_exceeded == ("bitmap_bytes",)
    # Without the bit that says that they are consistent, nobody reads them.
    assert inspect_bytes(changed(damaged(data, directory, 5), "autoclear_features", 0)).safe


def test_a_long_bitmap_directory_fails() -> None:
    data = bytearray(changed(plain(), "autoclear_features", 1))
    extension = (1).to_bytes(4, "big") + bytes(4) + (2 << 20).to_bytes(8, "big") + len(data).to_bytes(8, "big")
    data[104:112] = layout.EXTENSION_BITMAPS.to_bytes(4, "big") + (24).to_bytes(4, "big")
    data[112:136] = extension
    assert failed(inspect_bytes(bytes(data) + bytes(2 << 20))) == {"bitmaps"}


def test_the_luks_header_inside_is_looked_into() -> None:
    data = encrypted()
    pointer = parse_header(data[:4096], limits=Limits()).extension(layout.EXTENSION_ENCRYPTION)
    assert pointer is not None
    place = int.from_bytes(pointer[:8], "big")
    for where, value, length in ((place, 0, 4), (place + 6, 2, 2), (place + 104, 0, 4), (place + 108, 7, 4)):
        found = inspect_bytes(damaged(data, where, value, length))
        assert failed(found) == {"encryption"}, (where, value)
        assert found.encrypted
    assert failed(inspect_bytes(data[: place + 1000])) >= {"encryption"}
    assert inspect_bytes(data, Limits(key_iterations=10)).limits_exceeded == ("key_iterations",)


# -- streams -----------------------------------------------------------------------------------------------------------


def tables_out_of_order() -> bytes:
    """Bitmap directory before the snapshot table, each found from the header only."""
    data = bytearray(rich())
    table = number(bytes(data), "snapshots_offset")
    end = len(data) // 512 * 512 + 4096
    data += bytes(end - len(data)) + data[table : table + 512]
    return changed(bytes(data), "snapshots_offset", end)


FILES: list[Callable[[], bytes]] = [
    plain,
    rich,
    functools.partial(rich, 65536),
    encrypted,
    tables_out_of_order,
    lambda: with_backing(b"base.qcow2", b"raw"),
    lambda: with_data_file(b"data"),
    lambda: changed(plain(), "cluster_bits", 21),
    lambda: changed(rich(), "snapshots_offset", 0),
    lambda: changed(rich(), "snapshots_offset", 512),
    lambda: plain()[:100],
    lambda: b"",
    lambda: bytes(70_000),
    lambda: foreign.lay((0, foreign.GPT), (foreign.ISO_OFFSET, foreign.ISO), length=70_000),
    lambda: foreign.lay((99_488, foreign.vhd_footer()), length=100_000),
    lambda: foreign.lay(
        (0, foreign.vmdk_header(grain_directory=(1 << 64) - 1, descriptor=(150, 20))),
        (150 * 512, foreign.vmdk_descriptor()),
        (100_000 - 1024, foreign.vmdk_header()),
        length=100_000,
    ),
    lambda: foreign.lay((0, foreign.vmdk_header()), (512, foreign.vmdk_descriptor()), length=100_000),
    lambda: foreign.lay((0, foreign.luks_header()), length=3 * MiB),
    lambda: foreign.lay(*foreign.vhdx(), length=4 * MiB),
]


PLACES = st.integers(0, 120) | st.integers(0, 600) | st.integers(0, 70_000) | st.integers(0, 4 * MiB)
MAGICS = [b"QFI\xfb\0\0\0\3", b"KDMV", b"CD001", b"conectix", b"\x55\xaa", b"LUKS\xba\xbe\0\1"]
EXTREME_BYTES = [bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7]
PIECES = st.binary(min_size=1, max_size=8) | st.sampled_from(MAGICS + EXTREME_BYTES)


@given(
    file=st.sampled_from(FILES),
    changes=st.lists(st.tuples(PLACES, PIECES), max_size=4),
    sizes=st.lists(st.integers(0, 70_000), min_size=1, max_size=20),
    cut=st.none() | st.integers(0, 300_000),
)
def test_whatever_it_holds_chunks_of_any_size_give_what_the_path_gives(
    file: Callable[[], bytes], changes: list[tuple[int, bytes]], sizes: list[int], cut: int | None
) -> None:
    whole = bytearray(file())
    for place, piece in changes:
        whole[place : place + len(piece)] = piece if place < len(whole) else b""
    data = bytes(whole[:cut])
    inspector = Inspector()
    position = turn = 0
    while position < len(data):
        size = sizes[turn % len(sizes)] or 1 + 30_000 * (turn % 2)
        inspector.feed(memoryview(data)[position : position + size])
        position += size
        turn += 1
    with tempfile.NamedTemporaryFile() as saved:
        saved.write(data)
        saved.flush()
        assert inspector.finish() == blocklib.inspect(saved.name)


@pytest.mark.parametrize("file", FILES[:2] + FILES[4:7])
def test_bytes_one_by_one_give_what_the_whole_gives(file: Callable[[], bytes]) -> None:
    data = file()
    inspector = Inspector()
    for index in range(len(data)):
        inspector.feed(data[index : index + 1])
    assert inspector.finish() == inspect_bytes(data)


def test_the_checks_come_in_the_same_order_from_a_path_and_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(tables_out_of_order())
    assert list(blocklib.inspect(path).checks) == list(inspect_bytes(path.read_bytes()).checks)


def test_a_stream_is_kept_in_bounded_memory() -> None:
    import tracemalloc

    header = changed(changed(plain(), "cluster_bits", 21), "size", 1 << 40)
    chunk = bytes(MiB)
    tracemalloc.start()
    try:
        inspector = Inspector()
        inspector.feed(changed(header, "nb_snapshots", 60_000))
        for _ in range(64):
            inspector.feed(chunk)
        inspector.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MiB
