"""The check of a qcow2 image: what it counts, what it calls wrong, and what it survives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib._fast import check as kernels
from blocklib._fast.kernel import Kernel
from blocklib.errors import ImageError, ImageLimitError, StorageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.counts import (
    add_references,
    compressed_ranges,
    count_fragments,
    count_type,
    pack_refcounts,
    unpack_refcounts,
)
from blocklib.formats.qcow2.check.image import check_image
from blocklib.formats.qcow2.geometry import Geometry
from blocklib.reports import CheckReport, Finding
from tests.kernels import WAYS, way
from tests.qcow2_bytes import COMPRESSED, COPIED, Qcow2Bytes

WIDTHS = pytest.mark.parametrize("refcount_order", range(7), ids=lambda order: f"{1 << order}-bit")


def check(image: Qcow2Bytes, **arguments: Any) -> CheckReport:
    """The report of the definition, and of the kernels: it is the same."""
    report = check_with(None, image, **arguments)
    assert check_with("compiled", image, **arguments) == report
    return report


def check_with(name: str | None, image: Qcow2Bytes, **arguments: Any) -> CheckReport:
    """The report, with the kernels of the check running in one of the ways, or not at all."""
    header = image.header()
    compiled = kernels.family.load()

    def chosen(kernel: Kernel, _saving: int) -> Callable[..., int] | None:
        return None if name is None else compiled[kernel.name] if name == "compiled" else way(kernel, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "worth", chosen)
        return check_image(image, header, header.geometry(), filename="test.qcow2", **arguments)


def numbers(report: CheckReport) -> tuple[int, int, int]:
    return report.corruptions, report.leaks, report.check_errors


def only_finding(report: CheckReport) -> Finding:
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


ENTRIES = st.one_of(
    st.just(0),
    st.builds(lambda place, flags: place | flags, st.integers(1, 12), st.sampled_from([0, 1, COPIED, COPIED | 1])),
    st.builds(lambda low, flags: COMPRESSED | flags | low, st.integers(0, 1 << 14), st.sampled_from([0, 0, 0, COPIED])),
)
"""L2 entries, with a cluster in place of an offset unless they are compressed."""


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("features", [0, 4, 16], ids=["plain", "data-file", "extended"])
@given(
    entries=st.lists(st.tuples(st.integers(0, 40), ENTRIES, st.sampled_from([0, 1, 1 << 32, 3 << 32 | 5])), max_size=12),
    odd=st.sampled_from([0, 0, 0, 1 << 57, 512, 1 << 40]),
    tables=st.lists(st.integers(0, 1), min_size=2, max_size=2),
    shrunk=st.booleans(),
)
def test_kernels_report_what_numpy_reports(
    name: str, features: int, entries: list[tuple[int, int, int]], odd: int, tables: list[int], shrunk: bool
) -> None:
    image = Qcow2Bytes(cluster_bits=14 if features == 16 else 9, n_l2=2, n_data=5, features=features)
    for index, table in enumerate(tables):
        image.set_entry(image.l1 + 8 * index, image.l2[table] | COPIED)
    words = 2 if features == 16 else 1
    image.set_entry(24, image.cluster_size**2 * 2 // (8 * words))  # the size of the disk, which two tables map
    for index, entry, bitmap in entries:
        if not entry & COMPRESSED:
            entry = entry & (COPIED | 1) | (entry & 62) * (image.cluster_size // 2)
        image.set_entry(image.l2_entry(index * words, index & 1), entry)
        if words == 2:
            image.set_entry(image.l2_entry(index * words + 1, index & 1), bitmap)
    if odd:
        image.set_entry(image.l2_entry(0), image.entry(image.l2_entry(0)) ^ odd)
    if shrunk:
        del image.bytes[-300:]
    assert check_with(name, image) == check_with(None, image)


# A sound image ------------------------------------------------------------------------------------------------------


@WIDTHS
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_a_sound_image_has_no_findings(cluster_bits: int, refcount_order: int) -> None:
    image = Qcow2Bytes(cluster_bits=cluster_bits, refcount_order=refcount_order, n_l2=2, n_data=60)
    report = check(image)
    assert report.clean
    assert report.findings == ()
    assert report.image_end_offset == image.size
    assert report.total_clusters == 2 * image.cluster_size // 8
    assert (report.allocated_clusters, report.fragmented_clusters, report.compressed_clusters) == (60, 0, 0)


def test_version_2_has_16_bit_refcounts_and_no_feature_bits() -> None:
    assert check(Qcow2Bytes(version=2)).clean


def test_a_check_writes_nothing() -> None:
    image = Qcow2Bytes()
    image.set_refcount(3, 5)
    before = bytes(image.bytes)
    check(image)
    assert image.log == []
    assert image.bytes == before


def test_progress_ends_with_everything_done() -> None:
    calls: list[tuple[int, int]] = []
    check(Qcow2Bytes(n_l2=3), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (3 << 12, 3 << 12)


def test_clusters_out_of_order_are_fragmented_and_holes_between_them_are_not() -> None:
    image = Qcow2Bytes()
    first, second, third = (image.entry(image.l2_entry(i)) for i in range(3))
    image.set_entry(image.l2_entry(0), second)
    image.set_entry(image.l2_entry(1), first)
    image.set_entry(image.l2_entry(2), 0)
    image.set_entry(image.l2_entry(100), third)
    report = check(image)
    assert report.clean
    assert report.fragmented_clusters == 3  # in guest order the file has 1 | 0 | 3 4 5 | 2


# Refcounts ----------------------------------------------------------------------------------------------------------


@WIDTHS
def test_a_count_above_the_references_is_a_leak(refcount_order: int) -> None:
    image = Qcow2Bytes(refcount_order=refcount_order)
    image.set_entry(image.l2_entry(5), 0)
    report = check(image)
    assert numbers(report) == (0, 1, 0)
    finding = only_finding(report)
    assert (finding.kind, finding.host_offset, finding.expected, finding.found) == ("leak", image.data[5], "0", "1")
    assert finding.repairable


@WIDTHS
def test_a_count_below_the_references_is_a_corruption(refcount_order: int) -> None:
    image = Qcow2Bytes(refcount_order=refcount_order)
    image.set_refcount(image.l1 // image.cluster_size, 0)
    report = check(image)
    assert numbers(report) == (1, 0, 0)
    finding = only_finding(report)
    assert (finding.kind, finding.host_offset, finding.expected, finding.found) == ("corruption", image.l1, "1", "0")


def test_counts_past_the_end_of_the_file_mean_nothing() -> None:
    image = Qcow2Bytes()
    image.set_refcount(image.n_clusters, 1)
    image.set_refcount(image.n_clusters + 7, 1)
    assert check(image).clean


def test_the_image_ends_after_the_last_cluster_that_is_counted_or_used() -> None:
    image = Qcow2Bytes()
    used = image.size
    image.grow(5)
    assert check(image).image_end_offset == used
    image.set_refcount(image.n_clusters + 2, 1)
    report = check(image)
    assert (report.leaks, report.image_end_offset) == (1, used + 3 * image.cluster_size)


def test_more_references_than_the_width_can_say_are_a_corruption_each() -> None:
    image = Qcow2Bytes(refcount_order=0)
    for index in (6, 7, 8):
        image.set_entry(image.l2_entry(index), image.data[0] | COPIED)
    assert numbers(check(image)) == (3, 0, 0)


def test_a_refcount_block_that_does_not_exist_counts_nothing() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.table, 0)
    report = check(image)
    in_use = image.n_clusters - 1
    assert numbers(report) == (in_use + len(image.l2) + len(image.data), 0, 0)


# Flags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["l1", "l2"])
def test_the_copied_flag_says_that_the_count_is_one(place: str) -> None:
    image = Qcow2Bytes()
    offset = image.l1 if place == "l1" else image.l2_entry(2)
    image.set_entry(offset, image.entry(offset) ^ COPIED)
    report = check(image)
    assert numbers(report) == (1, 0, 0)
    assert only_finding(report).host_offset == offset
    assert only_finding(report).expected == "copied flag set"


def test_a_shared_cluster_must_not_have_the_copied_flag() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(6), image.data[0])
    image.set_refcount(image.data[0] // image.cluster_size, 2)
    assert numbers(check(image)) == (1, 0, 0)
    image.set_entry(image.l2_entry(0), image.data[0])
    assert check(image).clean


def test_a_zero_cluster_with_a_host_cluster_is_allocated() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(0), image.entry(image.l2_entry(0)) | 1)
    image.set_entry(image.l2_entry(9), 1)
    report = check(image)
    assert report.clean
    assert report.allocated_clusters == 6


# Damaged entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "corruptions"),
    [
        (lambda old, image: old | 2, 1),
        (lambda old, image: old | 1 << 56, 1),
        (lambda old, image: COPIED | 1 << 40, 2),  # outside the file, and nothing is counted there
        (lambda old, image: COPIED | image.size, 2),
        (lambda old, image: COPIED | COMPRESSED | image.data[0], 1),
    ],
    ids=["reserved low", "reserved high", "far outside", "at the end", "compressed and copied"],
)
def test_a_damaged_l2_entry_is_found(change: Any, corruptions: int) -> None:
    image = Qcow2Bytes()
    offset = image.l2_entry(0)
    image.set_entry(offset, change(image.entry(offset), image))
    report = check(image)
    assert report.corruptions == corruptions
    assert offset in [finding.host_offset for finding in report.findings]


def test_an_unaligned_cluster_counts_for_both_that_it_touches() -> None:
    image = Qcow2Bytes()
    offset = image.l2_entry(0)
    image.set_entry(offset, image.entry(offset) | 512)
    report = check(image)
    assert numbers(report) == (2, 0, 0)  # the entry, and the second cluster's count


def test_what_an_l1_entry_outside_the_file_led_to_looks_leaked() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l1, COPIED | 1 << 40)
    report = check(image)
    assert numbers(report) == (2, 1 + len(image.data), 0)


def test_an_unaligned_l2_table_is_read_where_it_points() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l1, image.entry(image.l1) | 512)
    report = check(image)
    assert report.corruptions > 0
    assert report.allocated_clusters == 0


def test_a_structure_may_end_in_a_cluster_that_the_file_only_begins() -> None:
    image = Qcow2Bytes()
    del image.bytes[-2048:]
    assert check(image).clean
    del image.bytes[-2048:]
    assert numbers(check(image)) == (1, 0, 0)


def test_guest_data_on_metadata_is_a_corruption_even_when_the_counts_agree() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(6), image.l1)
    image.set_refcount(image.l1 // image.cluster_size, 2)
    report = check(image)
    assert numbers(report) == (1, 0, 0)
    assert only_finding(report).host_offset == image.l1


# Refcount table -----------------------------------------------------------------------------------------------------


def test_an_unaligned_refcount_block_cannot_be_read() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.table, image.blocks[0] | 512)
    report = check(image)
    assert numbers(report) == (1, 0, image.n_clusters)


@pytest.mark.parametrize("entry", [1 << 40, 1 << 62, 0x40], ids=["outside", "far outside", "reserved"])
def test_a_damaged_refcount_table_entry_is_found(entry: int) -> None:
    image = Qcow2Bytes()
    image.set_entry(image.table + 8 * 5, entry)
    report = check(image)
    assert numbers(report) == (1, 0, 0)
    assert only_finding(report).host_offset == image.table + 8 * 5


def test_a_refcount_block_used_twice_is_found() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.table + 8, image.blocks[0])
    assert numbers(check(image)) == (2, 0, 0)  # the entry, and the block's own count


# Compressed clusters ------------------------------------------------------------------------------------------------


def test_compressed_data_counts_for_every_cluster_that_its_sectors_touch() -> None:
    image = Qcow2Bytes()
    shift = 62 - (image.cluster_bits - 8)
    sectors = 16  # 8 KiB from the last byte of a cluster on: three clusters of 4 KiB
    image.set_entry(image.l2_entry(0), COMPRESSED | (sectors - 1) << shift | image.data[1] - 1)
    for data in image.data[0:3]:
        image.set_refcount(data // image.cluster_size, 2)
    for index in (1, 2):
        image.set_entry(image.l2_entry(index), image.data[index])
    report = check(image)
    # The first cluster had one reference of its own, from the entry that is now compressed.
    assert numbers(report) == (0, 1, 0)
    assert (report.compressed_clusters, report.allocated_clusters) == (1, 6)


def test_compressed_data_outside_the_file_is_found() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(9), COMPRESSED | image.size + image.cluster_size)
    assert numbers(check(image)) == (1, 0, 0)


# Snapshots ----------------------------------------------------------------------------------------------------------


def with_snapshot(image: Qcow2Bytes, *, l1_entry: int | None = None, extra_length: int = 16) -> Qcow2Bytes:
    """Add a snapshot of the disk as it is: its L1 table in one new cluster, the snapshot table in another."""
    l1 = image.grow(2)
    table = l1 + image.cluster_size
    image.set_entry(l1, (image.l2[0] if l1_entry is None else l1_entry))
    head = l1.to_bytes(8, "big") + (1).to_bytes(4, "big") + b"\0\1\0\1" + bytes(20) + extra_length.to_bytes(4, "big")
    image.apply(table, head + bytes(extra_length) + b"1a")
    image.bytes[60:64] = (1).to_bytes(4, "big")
    image.set_entry(64, table)
    for cluster in (image.n_clusters, image.n_clusters + 1):
        image.set_refcount(cluster, 1)
    image.set_entry(image.l1, image.l2[0])
    for offset in (image.l2[0], *image.data):
        image.set_refcount(offset // image.cluster_size, 2)
    for index, data in enumerate(image.data):
        image.set_entry(image.l2_entry(index), data)
    return image


def test_what_a_snapshot_uses_is_no_leak() -> None:
    report = check(with_snapshot(Qcow2Bytes()))
    assert report.clean, report.findings
    assert report.allocated_clusters == 6  # of the active disk only


def test_damage_in_a_table_counts_for_every_table_that_leads_there() -> None:
    image = with_snapshot(Qcow2Bytes())
    image.set_entry(image.l2_entry(0), image.entry(image.l2_entry(0)) | 2)
    assert numbers(check(image)) == (2, 0, 0)


def test_flags_below_a_snapshot_are_not_looked_at() -> None:
    image = with_snapshot(Qcow2Bytes(n_l2=2))
    snapshot_l1 = image.n_clusters * image.cluster_size
    image.set_entry(snapshot_l1, image.entry(snapshot_l1) | COPIED)
    assert check(image).clean


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (0, 0x201, "corruption"),
        (8, 0xFFFF_FFFF_0000_0000, "corruption"),
        (32, 0x1000_0000, "check-error"),
    ],
    ids=["L1 table unaligned", "L1 table too large", "extra data too long"],
)
def test_a_damaged_snapshot_table_is_found_and_its_clusters_stay(place: int, value: int, found: str) -> None:
    image = with_snapshot(Qcow2Bytes())
    table = image.entry(64)
    image.set_entry(table + place, value)
    report = check(image)
    assert found in [finding.kind for finding in report.findings]


def test_version_3_snapshots_have_extra_data() -> None:
    assert numbers(check(with_snapshot(Qcow2Bytes(), extra_length=0))) == (1, 0, 0)
    assert check(with_snapshot(Qcow2Bytes(version=2), extra_length=0)).clean


# Limits and hostile images ------------------------------------------------------------------------------------------


def test_findings_are_bounded_and_the_numbers_are_not() -> None:
    image = Qcow2Bytes(n_data=500)
    for index in range(500):
        image.set_entry(image.l2_entry(index), image.entry(image.l2_entry(index)) | 2)
    report = check(image, max_findings=10)
    assert report.corruptions == 500
    assert len(report.findings) == 10


def test_a_table_used_a_hundred_thousand_times_is_read_once() -> None:
    image = Qcow2Bytes()
    n_uses = 100_000
    l1 = image.grow(n_uses * 8 // image.cluster_size + 1)
    image.apply(l1, image.l2[0].to_bytes(8, "big") * n_uses)
    image.set_entry(40, l1)
    image.bytes[36:40] = n_uses.to_bytes(4, "big")
    reads: list[int] = []
    read = image.read

    def counting_read(offset: int, view: memoryview) -> None:
        reads.append(offset)
        read(offset, view)

    image.read = counting_read  # type: ignore[method-assign]
    report = check_with(None, image)
    assert reads.count(image.l2[0]) == 1
    assert report.allocated_clusters == n_uses * len(image.data)


class ClaimedSize(Qcow2Bytes):
    """A sparse file says it is larger than any disk."""

    claimed = 0

    @property
    def size(self) -> int:
        return self.claimed or super().size


def test_a_file_too_large_to_count_is_refused() -> None:
    image = ClaimedSize()
    image.claimed = 1 << 62
    with pytest.raises(ImageLimitError):
        check(image)


@given(data=st.data())
def test_garbage_ends_in_findings(data: st.DataObject) -> None:
    image = with_snapshot(Qcow2Bytes(cluster_bits=9, n_l2=2, n_data=20))
    places = st.integers(104 // 8, image.size // 8 - 1)
    values = st.one_of(
        st.integers(0, 2**64 - 1),
        st.builds(lambda cluster, flags: cluster << 9 | flags, st.integers(0, 80), st.sampled_from([0, 1, COPIED, COMPRESSED])),
    )
    for place, value in data.draw(st.lists(st.tuples(places, values), max_size=30)):
        image.set_entry(place * 8, value)
    cut = data.draw(st.integers(0, image.size - 2048))
    if cut % 3 == 0:
        del image.bytes[image.size - cut :]
    before = bytes(image.bytes)
    try:
        report = check(image, max_findings=20)
    except ImageError:
        return
    assert len(report.findings) <= 20
    assert report.corruptions >= sum(finding.kind == "corruption" for finding in report.findings)
    assert image.bytes == before


def test_a_check_needs_numpy_only_when_it_runs() -> None:
    code = "import sys, blocklib.formats.qcow2.check.image, blocklib.formats.qcow2.repair.image; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# The counting functions ---------------------------------------------------------------------------------------------


@WIDTHS
@given(data=st.data())
def test_refcounts_survive_packing(refcount_order: int, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=64, max_size=64))
    counts = unpack_refcounts(np.frombuffer(raw, dtype=np.uint8), refcount_order)
    assert counts.dtype == count_type(refcount_order)
    assert counts.size == 64 * 8 >> refcount_order
    assert pack_refcounts(counts, refcount_order) == raw


@pytest.mark.parametrize(
    ("refcount_order", "expected"),
    [
        (0, [1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        (1, [1, 3, 0, 1, 1, 0, 0, 0]),
        (2, [13, 4, 1, 0]),
        (3, [0x4D, 1]),
        (4, [0x4D01]),
    ],
)
def test_the_low_bits_of_a_byte_are_its_first_refcount(refcount_order: int, expected: list[int]) -> None:
    raw = np.frombuffer(b"\x4d\x01", dtype=np.uint8)
    assert unpack_refcounts(raw, refcount_order).tolist() == expected


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1000)), max_size=60),
    st.booleans(),
    st.sampled_from([1, 1000]),
)
def test_references_are_added_one_by_one(references: list[tuple[int, int]], weighted: bool, spread: int) -> None:
    counts = np.zeros(100 * spread, dtype=np.uint32)
    clusters = np.array([cluster * spread for cluster, _ in references], dtype=np.intp)
    weights = np.array([weight for _, weight in references], dtype=np.uint64) if weighted else None
    add_references(counts, clusters, weights)
    expected = [0] * 100
    for cluster, weight in references:
        expected[cluster] += weight if weighted else 1
    assert counts[::spread].tolist() == expected
    assert int(counts.sum()) == sum(expected)


@given(st.integers(9, 21), st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=20))
def test_compressed_descriptors_say_what_geometry_says(cluster_bits: int, entries: list[int]) -> None:
    geometry = Geometry(cluster_bits)
    array = np.array(entries, dtype=np.uint64) | np.uint64(COMPRESSED)
    offsets, lengths = compressed_ranges(array, geometry.compressed_offset_bits)
    for entry, offset, length in zip(array.tolist(), offsets.tolist(), lengths.tolist()):
        if offset < layout.MAX_HOST_OFFSET:
            assert geometry.decode_compressed(entry) == (offset, length)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=40))
def test_a_fragment_does_not_follow_its_predecessor_in_the_same_table(clusters: list[tuple[int, int]]) -> None:
    clusters = sorted(clusters, key=lambda item: item[1])
    offsets = np.array([cluster * 4096 for cluster, _ in clusters], dtype=np.uint64)
    rows = np.array([row for _, row in clusters], dtype=np.intp)
    expected = [
        index
        for index in range(1, len(clusters))
        if clusters[index][1] == clusters[index - 1][1] and clusters[index][0] != clusters[index - 1][0] + 1
    ]
    assert count_fragments(offsets, rows, 4096).tolist() == expected


def test_a_table_that_cannot_be_read_ends_the_check_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocklib.formats.qcow2.check.l2._BATCH_BYTES", 1)
    for bad in range(3):
        image = Qcow2Bytes(n_l2=3)
        read = image.read

        def failing(offset: int, view: memoryview, bad: int = bad, image: Qcow2Bytes = image, read: Any = read) -> None:
            if offset == image.l2[bad]:
                raise StorageError("a bad sector", errno=5, operation="read")
            read(offset, view)

        image.read = failing  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="bad sector"):
            check_with("compiled", image)
