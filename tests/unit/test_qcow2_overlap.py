"""Writes that would hit a structure of the image: nothing is written, and the image is marked corrupt from then on."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from blocklib.disk import Disk
from blocklib.errors import ImageCorruptError, StorageError
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.formats.qcow2.overlap import (
    ACTIVE_L1,
    ACTIVE_L2,
    BITMAP_DIRECTORY,
    INACTIVE_L1,
    INACTIVE_L2,
    KIND_NAMES,
    MAIN_HEADER,
    OPTION_KINDS,
    REFCOUNT_BLOCK,
    REFCOUNT_TABLE,
    SNAPSHOT_TABLE,
    TEMPLATES,
    _TableIndex,
    kinds_for,
)
from blocklib.formats.qcow2.tables import table_from_bytes
from blocklib.options import check_options
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image

KiB = 1024
MiB = 1 << 20
COPIED = 1 << 63
CLUSTER = 4096
CORRUPT = 2


class Image:
    """An image of 4 KiB clusters with two L2 tables and data at 0 and 2 MiB, to be spoilt byte by byte."""

    def __init__(self, **options: int | str) -> None:
        host = RecordingNode(data=new_image(64 * MiB, {"cluster_size": CLUSTER, **options}))
        with disk_on(host) as disk:
            disk.write(0, b"x" * (4 * CLUSTER))
            disk.write(2 * MiB, b"x" * CLUSTER)
            node = disk.node
            assert isinstance(node, Qcow2Node)
            self.l1 = node.mapping.l1_offset
            self.l2 = node.mapping.l1[0] & ~COPIED
            self.other_l2 = node.mapping.l1[1] & ~COPIED
            self.refcount_table = node.refcounts.table_offset
            self.block = node.refcounts.table[0]
        self.bytes = bytearray(host.data)
        self.host = RecordingNode()

    def put(self, offset: int, entry: int, length: int = 8) -> None:
        self.bytes[offset : offset + length] = entry.to_bytes(length, "big")

    def set_refcount(self, host_offset: int, count: int) -> None:
        self.put(self.block + 2 * (host_offset // CLUSTER), count, 2)

    def append(self, data: bytes) -> int:
        """More clusters, counted; their host offset."""
        offset = len(self.bytes)
        self.bytes += data.ljust(-(-len(data) // CLUSTER) * CLUSTER, b"\0")
        for place in range(offset, len(self.bytes), CLUSTER):
            self.set_refcount(place, 1)
        return offset

    def opened(self, **options: Any) -> Disk:
        self.host = RecordingNode(data=bytes(self.bytes))
        return disk_on(self.host, options={name.replace("_", "-"): value for name, value in options.items()})

    @property
    def changes(self) -> list[tuple[int, bytes]]:
        return [(event[1], event[2]) for event in self.host.log if event[0] == "write"]


FEATURES_CORRUPT = (72, CORRUPT.to_bytes(8, "big"))
"""The one write that marks an image corrupt."""


def refused(image: Image, disk: Disk, request: Callable[[], object], *names: str) -> None:
    """The request fails with an error that has all the names, writes the corrupt bit durably, and no write succeeds then."""
    before = len(image.host.log)
    with pytest.raises(ImageCorruptError) as caught:
        request()
    for name in names:
        assert name in str(caught.value)
    assert image.changes == [FEATURES_CORRUPT]
    assert [event[0] for event in image.host.log[before:]][-2:] == ["write", "barrier"]
    later_requests: list[Callable[[], object]] = [
        lambda: disk.write(32 * MiB, b"z"),
        lambda: disk.write(2 * MiB, b"z"),
        lambda: disk.write_compressed(48 * MiB, bytes(CLUSTER)),
        lambda: disk.write_zeroes(32 * MiB, MiB),
        lambda: disk.discard(0, MiB),
        lambda: disk.truncate(128 * MiB),
    ]
    for later in later_requests:
        with pytest.raises(ImageCorruptError, match="corrupt image"):
            later()
    assert image.changes == [FEATURES_CORRUPT]
    assert disk.read(2 * MiB, CLUSTER) == b"x" * CLUSTER
    info = disk.info().format_specific
    assert info["corrupt"] is True


# What the data of the guest may not hit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["active L1 table", "active L2 table", "refcount table", "refcount block"])
@pytest.mark.parametrize("zero_flag", [0, 1])
def test_an_entry_that_points_at_a_table_is_not_written_through(what: str, zero_flag: int) -> None:
    image = Image()
    places = {
        "active L1 table": image.l1,
        "active L2 table": image.other_l2,
        "refcount table": image.refcount_table,
        "refcount block": image.block,
    }
    image.put(image.l2, COPIED | places[what] | zero_flag)
    disk = image.opened()
    refused(image, disk, lambda: disk.write(100, b"y"), "guest data", what, f"{places[what]:#x}")
    disk.close()
    with pytest.raises(ImageCorruptError, match="marked corrupt"):
        disk_on(RecordingNode(data=bytes(image.host.data)))
    with disk_on(RecordingNode(data=bytes(image.host.data)), writable=False) as again:
        assert again.read(CLUSTER, CLUSTER) == b"x" * CLUSTER


def test_the_middle_of_a_run_is_looked_at_as_well() -> None:
    image = Image()
    image.put(image.l2, COPIED | (image.l1 - CLUSTER))
    image.put(image.l2 + 8, COPIED | image.l1)
    image.put(image.l2 + 16, COPIED | (image.l1 + CLUSTER))
    disk = image.opened(**{"overlap-check.template": "none", "overlap-check.active-l1": True})
    refused(image, disk, lambda: disk.write(0, b"y" * (3 * CLUSTER)), "active L1 table")
    disk.close()


def _with_snapshot() -> tuple[Image, dict[str, int]]:
    """An image with an internal snapshot, and a bitmap directory; where their structures are."""
    image = Image()
    l2 = image.append(bytes(CLUSTER))
    l1 = image.append((l2 | COPIED).to_bytes(8, "big"))
    extra = struct.pack(">QQ", 0, 64 * MiB)
    table = image.append(struct.pack(">QIHHIIQII", l1, 32, 1, 1, 0, 0, 0, 0, 16) + extra + b"1a")
    image.put(60, 1, 4)
    image.put(64, table)
    directory = image.append(b"directory")
    return image, {
        "snapshot table": table,
        "inactive L1 table": l1,
        "inactive L2 table": l2,
        "bitmap directory": directory,
    }


@pytest.mark.parametrize("what", ["snapshot table", "inactive L1 table", "inactive L2 table", "bitmap directory"])
def test_what_snapshots_and_bitmaps_need_is_not_overwritten(what: str) -> None:
    image, places = _with_snapshot()
    image.put(image.l2, COPIED | places[what])
    disk = image.opened(overlap_check="all")
    node = disk.node
    assert isinstance(node, Qcow2Node)
    node.header.extensions = [
        *node.header.extensions,
        type(node.header.extensions[0])(0x23852875, struct.pack(">IIQQ", 1, 0, 9, places["bitmap directory"])),
    ]
    refused(image, disk, lambda: disk.write(0, b"y"), what, f"{places[what]:#x}")
    disk.close()


def test_tables_that_are_read_for_it_are_looked_at_only_where_that_is_asked_for() -> None:
    image, places = _with_snapshot()
    image.put(image.l2, COPIED | places["inactive L2 table"])
    disk = image.opened()
    disk.write(0, b"y")
    disk.abandon()


# What the tables of the image may not hit -------------------------------------------------------------------------------


def test_an_l2_table_is_not_written_over_a_refcount_block() -> None:
    image = Image()
    image.put(image.l1, COPIED | image.block)
    disk = image.opened()
    disk.write_zeroes(100 * CLUSTER, CLUSTER)
    refused(image, disk, disk.flush, "an L2 table", "refcount block", f"{image.block:#x}")
    with pytest.raises(ImageCorruptError):
        disk.close()


def test_a_refcount_block_is_not_written_over_an_l2_table() -> None:
    image = Image()
    image.bytes[image.other_l2 : image.other_l2 + CLUSTER] = image.bytes[image.block : image.block + CLUSTER]
    image.put(image.refcount_table, image.other_l2)
    disk = image.opened()
    disk.write(512 * KiB, b"y" * CLUSTER)
    before = len(image.changes)
    with pytest.raises(ImageCorruptError, match=f"a refcount block.*active L2 table at {image.other_l2:#x}"):
        disk.flush()
    assert image.changes[before:] == [FEATURES_CORRUPT]
    disk.abandon()


def test_a_new_refcount_block_is_not_put_where_an_entry_points() -> None:
    """Behind the end of the file nothing is counted, but a damaged L1 entry may point there."""
    image = Image()
    place = 2048 * CLUSTER  # what the second block counts, and where it goes
    image.put(image.l1 + 8 * 20, COPIED | place)
    for cluster in range(2048):
        image.set_refcount(cluster * CLUSTER, 1)
    disk = image.opened()
    refused(image, disk, lambda: disk.write(512 * KiB, b"y"), "a new refcount block", "active L2 table")
    disk.close()


@pytest.mark.parametrize("what", ["header", "active L1 table", "active L2 table", "refcount table", "refcount block"])
@pytest.mark.parametrize("compressed", [False, True])
def test_what_the_counts_call_free_is_not_taken_where_it_cannot_be(what: str, compressed: bool) -> None:
    image = Image()
    places = {
        "header": 0,
        "active L1 table": image.l1,
        "active L2 table": image.other_l2,
        "refcount table": image.refcount_table,
        "refcount block": image.block,
    }
    image.set_refcount(places[what], 0)
    disk = image.opened()
    write = disk.write_compressed if compressed else disk.write
    refused(image, disk, lambda: write(512 * KiB, b"y" * CLUSTER), what.removeprefix("active "))
    disk.close()


def test_a_table_put_where_an_entry_pointed_wrongly_is_found_at_the_next_write() -> None:
    """The run was checked before, when nothing was there."""
    image = Image()
    data = int.from_bytes(image.bytes[image.l2 : image.l2 + 8], "big") & ~COPIED
    image.set_refcount(data, 0)
    disk = image.opened()
    disk.write(0, b"y" * 512)
    disk.write(0, b"y" * 512)
    disk.write(40 * MiB, b"z")  # its new L2 table goes to the cluster that nobody counts
    with pytest.raises(ImageCorruptError, match=f"guest data.*active L2 table at {data:#x}"):
        disk.write(0, b"y" * 512)
    disk.abandon()


def test_a_new_table_is_known_before_and_after_it_was_flushed() -> None:
    image = Image()
    disk = image.opened()
    disk.write(0, b"y")
    disk.write(40 * MiB, b"z")
    node = disk.node
    assert isinstance(node, Qcow2Node)
    place = node.mapping.l1[20] & ~COPIED
    for _ in range(2):
        assert node.guard.find(place + 100, 10) == (ACTIVE_L2, place)
        assert node.guard.find(place + 100, 10, ACTIVE_L2) is None
        disk.flush()
    disk.discard(40 * MiB, 2 * MiB)
    node.make_empty()
    assert node.guard.find(place, CLUSTER) is None
    disk.close()


def test_a_new_refcount_block_is_known_before_and_after_it_was_flushed() -> None:
    host = RecordingNode(data=new_image(8 * MiB, {"cluster_size": 512, "refcount_bits": 64}))
    disk = disk_on(host)
    node = disk.node
    assert isinstance(node, Qcow2Node)
    disk.write(0, b"a" * MiB)
    for _ in range(2):
        for block in node.refcounts.table:
            assert not block or node.guard.find(block, 512) == (REFCOUNT_BLOCK, block)
        disk.flush()
    disk.close()


# Corruption that is no overlap ------------------------------------------------------------------------------------------


BAD: dict[str, Callable[[Image], None]] = {
    "unaligned data": lambda image: image.put(image.l2, COPIED | (image.other_l2 + 0x200)),
    "unaligned shared data": lambda image: image.put(image.l2, image.other_l2 + 0x200),
    "unaligned zero cluster": lambda image: image.put(image.l2, COPIED | (image.other_l2 + 0x201)),
    "unaligned L2 table": lambda image: image.put(image.l1, COPIED | (image.l2 + 0x200)),
    "L2 table outside the file": lambda image: image.put(image.l1, COPIED | 1 << 40),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_on_the_way_to_a_write_marks_the_image(name: str) -> None:
    image = Image()
    BAD[name](image)
    disk = image.opened()
    refused(image, disk, lambda: disk.write(0, b"y" * CLUSTER))
    disk.close()


def test_a_bad_refcount_table_entry_on_the_way_to_a_write_marks_the_image() -> None:
    image = Image()
    image.put(image.refcount_table, image.block | 0x200)
    disk = image.opened()
    refused(image, disk, lambda: disk.write(512 * KiB, b"y"), "refcount table entry")
    disk.close()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("writable", [True, False])
def test_reading_what_is_corrupt_writes_nothing(name: str, writable: bool) -> None:
    image = Image()
    BAD[name](image)
    host = RecordingNode(data=bytes(image.bytes))
    with disk_on(host, writable=writable) as disk:
        with pytest.raises(ImageCorruptError):
            disk.read(0, CLUSTER)
        assert disk.read(2 * MiB, CLUSTER) == b"x" * CLUSTER
    assert bytes(host.data) == image.bytes


def test_version_2_has_no_bit_but_refuses_further_writes_all_the_same() -> None:
    image = Image(compat="0.10")
    image.put(image.l2, COPIED | image.l1)
    disk = image.opened()
    for _ in range(2):
        with pytest.raises(ImageCorruptError):
            disk.write(0, b"y")
    with pytest.raises(ImageCorruptError, match="corrupt image"):
        disk.write(2 * MiB, b"y")
    disk.close()
    assert bytes(image.host.data) == image.bytes


def test_an_image_that_cannot_be_marked_still_refuses_further_writes() -> None:
    image = Image()
    image.put(image.l2, COPIED | image.l1)
    disk = image.opened()

    def fail(*_: object) -> None:
        raise StorageError("no", errno=5, operation="injected")

    image.host.before_write = fail
    with pytest.raises(ImageCorruptError) as caught:
        disk.write(0, b"y")
    assert "could not be marked" in caught.value.__notes__[0]
    image.host.before_write = None
    with pytest.raises(ImageCorruptError, match="corrupt image"):
        disk.write(2 * MiB, b"y")
    disk.close()
    assert bytes(image.host.data) == image.bytes


def test_closing_says_what_corruption_kept_from_being_written() -> None:
    image = Image()
    image.put(image.l2, COPIED | image.l1)
    disk = image.opened()
    disk.write(512 * KiB, b"never flushed")
    with pytest.raises(ImageCorruptError):
        disk.write(0, b"y")
    with pytest.raises(ImageCorruptError, match="corrupt image"):
        disk.flush()
    with pytest.raises(ImageCorruptError, match="corrupt image"):
        disk.close()
    with pytest.raises(ImageCorruptError, match="marked corrupt"):
        disk_on(image.host)


# The options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_each_kind_can_be_left_out_or_looked_at_alone(kind: int) -> None:
    name = next(option for option, value in OPTION_KINDS.items() if value == kind)
    assert kinds_for({"overlap-check": "all", name: False}) == TEMPLATES["all"] & ~kind
    assert kinds_for({"overlap-check.template": "none", name: True}) == kind


def test_templates_are_those_of_qemu() -> None:
    constant = MAIN_HEADER | ACTIVE_L1 | REFCOUNT_TABLE | SNAPSHOT_TABLE | BITMAP_DIRECTORY
    cached = constant | ACTIVE_L2 | REFCOUNT_BLOCK | INACTIVE_L1
    assert {"none": 0, "constant": constant, "cached": cached, "all": cached | INACTIVE_L2} == TEMPLATES
    assert kinds_for({}) == kinds_for(check_options("qcow2", {"file": "x"})) == cached
    assert kinds_for(check_options("qcow2", {"file": "x", "overlap-check": "constant"})) == constant
    assert kinds_for(check_options("qcow2", {"file": "x", "overlap-check": {"active-l1": "off"}})) == cached & ~ACTIVE_L1


def test_what_is_not_looked_at_can_be_hit() -> None:
    image = Image()
    image.put(image.l2, COPIED | image.other_l2)
    disk = image.opened(overlap_check="constant")
    disk.write(0, b"y" * 512)
    assert image.changes == [(image.other_l2, b"y" * 512)]
    disk.abandon()


def test_large_and_small_tables_are_indexed_alike() -> None:
    def parent(n: int) -> Any:
        entries = [0 if i % 3 else COPIED | (n - i) * CLUSTER for i in range(n)]
        return table_from_bytes("Q", b"".join(entry.to_bytes(8, "big") for entry in entries))

    small = parent(3000)
    large = small + table_from_bytes("Q", bytes(8 * 20000))
    indices = [_TableIndex(table) for table in (small, large)]
    for cluster in range(3001):
        place = cluster * CLUSTER
        expected = place if place and (3000 - cluster) % 3 == 0 else None
        assert [index.find(place + 1, place + 2, CLUSTER) for index in indices] == [expected] * 2
