"""qcow2 arithmetic against its definition in the specification, by small brute force where there is one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib.errors import ImageCorruptError, ImageLimitError, UsageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.geometry import Geometry, MeasuredSize, measure_size

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

cluster_bits = st.integers(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS)
refcount_orders = st.integers(0, layout.MAX_REFCOUNT_ORDER)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    bits = draw(cluster_bits)
    return Geometry(bits, draw(refcount_orders), bits >= layout.EXTENDED_L2_MIN_CLUSTER_BITS and draw(st.booleans()))


def test_default_image_has_the_numbers_of_the_specification() -> None:
    geometry = Geometry(16)
    assert geometry.cluster_size == 64 * KIB
    assert geometry.cluster_mask == 0xFFFF
    assert (geometry.l2_entries, geometry.l2_bits, geometry.l2_entry_length) == (8192, 13, 8)
    assert 1 << geometry.l1_shift == 512 * MIB
    assert (geometry.subclusters, geometry.subcluster_size) == (1, 64 * KIB)
    assert (geometry.refcount_bits, geometry.max_refcount, geometry.refcount_block_entries) == (16, 65535, 32768)
    assert geometry.compressed_offset_bits == 54


def test_extended_l2_entries_halve_the_table_and_split_clusters() -> None:
    geometry = Geometry(16, extended_l2=True)
    assert (geometry.l2_entries, geometry.l2_entry_length) == (4096, 16)
    assert (geometry.subclusters, geometry.subcluster_size) == (32, 2 * KIB)


@pytest.mark.parametrize(("order", "entries"), [(0, 4096), (3, 512), (4, 256), (6, 64)])
def test_refcount_width_sets_entries_of_a_block(order: int, entries: int) -> None:
    geometry = Geometry(9, order)
    assert geometry.refcount_block_entries == entries
    assert geometry.max_refcount == 2 ** (2**order) - 1


@pytest.mark.parametrize(
    ("bits", "order", "extended"), [(8, 4, False), (22, 4, False), (16, 7, False), (16, -1, False)]
)
def test_geometry_outside_the_format_is_refused(bits: int, order: int, extended: bool) -> None:
    with pytest.raises(UsageError):
        Geometry(bits, order, extended)


def test_extended_l2_entries_are_refused_below_16_kib_clusters() -> None:
    Geometry(14, extended_l2=True)
    with pytest.raises(UsageError):
        Geometry(13, extended_l2=True)


def test_geometry_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Geometry(16).cluster_size = 1  # type: ignore[misc]


@given(geometries(), st.integers(0, layout.MAX_VIRTUAL_SIZE))
def test_guest_offset_is_put_together_from_its_parts(geometry: Geometry, offset: int) -> None:
    l1_index, l2_index = geometry.l1_index(offset), geometry.l2_index(offset)
    l2_entries = geometry.cluster_size // geometry.l2_entry_length
    assert l2_index == offset // geometry.cluster_size % l2_entries
    assert l1_index == offset // geometry.cluster_size // l2_entries
    assert geometry.guest_offset(l1_index, l2_index) + geometry.offset_in_cluster(offset) == offset


@given(geometries(), st.integers(0, layout.MAX_HOST_OFFSET - 1))
def test_refcount_indices_follow_the_specification(geometry: Geometry, offset: int) -> None:
    entries = geometry.cluster_size * 8 // geometry.refcount_bits
    assert geometry.refcount_block_index(offset) == offset // geometry.cluster_size % entries
    assert geometry.refcount_table_index(offset) == offset // geometry.cluster_size // entries


@given(geometries(), st.integers(0, 1 << 60))
def test_rounding_keeps_to_clusters(geometry: Geometry, offset: int) -> None:
    down, up = geometry.round_down(offset), geometry.round_up(offset)
    assert down <= offset <= up
    assert up - down in (0, geometry.cluster_size)
    assert geometry.is_aligned(down)
    assert geometry.is_aligned(up)
    assert geometry.is_aligned(offset) == (down == up)
    assert geometry.clusters_for(offset) == up // geometry.cluster_size


@pytest.mark.parametrize(("size", "entries"), [(0, 0), (1, 1), (512 * MIB, 1), (512 * MIB + 1, 2), (10 * TIB, 20480)])
def test_l1_entries_cover_the_size(size: int, entries: int) -> None:
    assert Geometry(16).l1_entries_for(size) == entries


def test_tables_take_whole_clusters() -> None:
    geometry = Geometry(9)
    assert [geometry.l1_clusters_for(entries) for entries in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert geometry.refcount_table_entries(3) == 3 * 64


@given(geometries())
def test_l1_table_of_the_largest_disk_is_exactly_at_the_limit(geometry: Geometry) -> None:
    entries = geometry.l1_entries_for(geometry.max_virtual_size)
    assert entries * layout.TABLE_ENTRY_LENGTH == layout.MAX_L1_BYTES


# Refcount metadata ----------------------------------------------------------------------------------------------------


def _covers(geometry: Geometry, clusters: int, blocks: int, table_clusters: int, headroom: int = 0) -> bool:
    total = clusters + blocks + table_clusters
    entries = geometry.refcount_block_entries
    indexed = -(-(total + headroom) // entries)
    return blocks * entries >= total and table_clusters * geometry.cluster_size // 8 >= indexed


@given(st.integers(9, 12), refcount_orders, st.integers(1, 300_000))
def test_refcount_metadata_counts_itself_and_is_the_least_that_does(bits: int, order: int, clusters: int) -> None:
    geometry = Geometry(bits, order)
    found = geometry.refcount_metadata(clusters)
    assert _covers(geometry, clusters, found.blocks, found.table_clusters)
    assert not _covers(geometry, clusters, found.blocks - 1, found.table_clusters)
    assert not _covers(geometry, clusters, found.blocks, found.table_clusters - 1)
    assert found.clusters == found.blocks + found.table_clusters


@given(st.integers(9, 12), refcount_orders, st.integers(1, 100_000), st.integers(0, 1_000_000))
def test_headroom_enlarges_the_table_only(bits: int, order: int, clusters: int, headroom: int) -> None:
    geometry = Geometry(bits, order)
    found = geometry.refcount_metadata(clusters, headroom=headroom)
    assert _covers(geometry, clusters, found.blocks, found.table_clusters, headroom)
    assert (found.blocks - 1) * geometry.refcount_block_entries < clusters + found.clusters
    assert found.table_clusters >= geometry.refcount_metadata(clusters).table_clusters


def test_block_that_fills_up_with_its_own_metadata_gets_a_second() -> None:
    geometry = Geometry(9)  # 256 entries to a block
    assert geometry.refcount_metadata(254) == geometry.refcount_metadata(1)
    assert geometry.refcount_metadata(255).blocks == 2


def test_largest_image_is_solved_in_a_few_rounds() -> None:
    geometry = Geometry(9, layout.MAX_REFCOUNT_ORDER)
    found = geometry.refcount_metadata(1 << 47)
    assert _covers(geometry, 1 << 47, found.blocks, found.table_clusters)


# Compressed descriptors -----------------------------------------------------------------------------------------------


@given(cluster_bits, st.data())
def test_compressed_descriptor_survives_the_round_trip(bits: int, data: st.DataObject) -> None:
    geometry = Geometry(bits)
    host_offset = data.draw(st.integers(0, geometry.max_compressed_offset - 1))
    length = data.draw(st.integers(1, geometry.cluster_size))
    entry = geometry.encode_compressed(host_offset, length)
    assert entry & layout.FLAG_COMPRESSED
    assert not entry & layout.FLAG_COPIED
    assert entry < 1 << 64
    found_offset, found_length = geometry.decode_compressed(entry)
    assert found_offset == host_offset
    assert 0 <= found_length - length < layout.COMPRESSED_SECTOR_LENGTH
    assert (found_offset + found_length) % layout.COMPRESSED_SECTOR_LENGTH == 0


def test_compressed_descriptor_of_the_specification() -> None:
    geometry = Geometry(16)  # x = 54
    entry = layout.FLAG_COMPRESSED | 3 << 54 | 0x50123
    assert geometry.decode_compressed(entry) == (0x50123, 4 * 512 - 0x123)
    assert geometry.encode_compressed(0x50123, 3 * 512) == entry


def test_copied_bit_of_a_compressed_entry_is_no_part_of_its_length() -> None:
    entry = Geometry(16).encode_compressed(0x50000, 512)
    assert Geometry(16).decode_compressed(entry | layout.FLAG_COPIED) == (0x50000, 512)


def test_compressed_offset_beyond_56_bits_is_corruption() -> None:
    with pytest.raises(ImageCorruptError) as caught:
        Geometry(9).decode_compressed(layout.FLAG_COMPRESSED | 1 << 56)
    assert caught.value.structure == "compressed cluster descriptor"
    assert caught.value.found == hex(1 << 56)


def test_compressed_data_is_refused_where_the_descriptor_cannot_point() -> None:
    geometry = Geometry(21)
    assert geometry.max_compressed_offset == 512 * TIB
    with pytest.raises(ImageLimitError):
        geometry.encode_compressed(512 * TIB, 512)


@pytest.mark.parametrize("length", [0, -1, 64 * KIB + 1])
def test_compressed_length_is_one_to_a_cluster(length: int) -> None:
    with pytest.raises(UsageError):
        Geometry(16).encode_compressed(0, length)


# Sizes; tests/interop/test_measure_numbers.py compares them with qemu-img --------------------------------------------


def test_empty_image_is_header_refcount_table_and_block() -> None:
    assert measure_size(Geometry(16), 0) == MeasuredSize(3 * 64 * KIB, 3 * 64 * KIB)


def test_measured_size_adds_tables_for_the_whole_disk_and_data_as_allocated() -> None:
    metadata = 5 * 64 * KIB  # header, refcount table, refcount block, L1, one L2
    assert measure_size(Geometry(16), MIB) == MeasuredSize(metadata, metadata + MIB)
    assert measure_size(Geometry(16), MIB, 1) == MeasuredSize(metadata + 64 * KIB, metadata + MIB)
    assert measure_size(Geometry(16), MIB, MIB) == MeasuredSize(metadata + MIB, metadata + MIB)


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_preallocated_data_is_required(preallocation: str) -> None:
    measured = measure_size(Geometry(16), GIB, preallocation=preallocation)
    assert measured.required == measured.fully_allocated


def test_metadata_preallocation_changes_nothing() -> None:
    assert measure_size(Geometry(16), GIB, preallocation="metadata") == measure_size(Geometry(16), GIB)


def test_disk_that_needs_larger_clusters_is_refused_in_words() -> None:
    geometry = Geometry(9)
    measure_size(geometry, 128 * GIB)
    with pytest.raises(UsageError, match="larger than 512 bytes"):
        measure_size(geometry, 128 * GIB + 1)
    with pytest.raises(UsageError):
        measure_size(geometry, -1)
