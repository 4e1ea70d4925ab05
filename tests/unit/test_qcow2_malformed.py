"""Images whose tables say what cannot be: an ImageError that names the place, soon, and the image goes on being usable."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blocklib import jobs, plan
from blocklib.disk import Disk
from blocklib.errors import ImageCorruptError, ImageError, StorageError
from blocklib.formats.qcow2.create import header_for, write_empty_image
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.formats.qcow2.snapshots import tally
from blocklib.formats.raw import RawNode
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE
from blocklib.options import check_options
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image

MiB = 1 << 20
COPIED = 1 << 63
COMPRESSED = 1 << 62


class Image:
    """The bytes of a small image with one data cluster, to be spoilt."""

    def __init__(self, **options: int | str) -> None:
        host = RecordingNode(data=new_image(MiB, options))
        with disk_on(host) as disk:
            disk.write(0, b"x" * 512)
            node = disk.node
            assert isinstance(node, Qcow2Node)
            self.l1 = node.mapping.l1_offset
            self.l2 = node.mapping.l1[0] & ~COPIED
            self.refcount_table = node.refcounts.table_offset
            self.block = node.refcounts.table[0]
            self.bits = node.geometry.cluster_bits
        self.bytes = bytearray(host.data)

    def put(self, offset: int, entry: int, length: int = 8) -> None:
        self.bytes[offset : offset + length] = entry.to_bytes(length, "big")

    def opened(self) -> Disk:
        return disk_on(RecordingNode(data=bytes(self.bytes)))


def spoilt(offset: Callable[[Image], int], entry: int, **options: int | str) -> Image:
    image = Image(**options)
    image.put(offset(image), entry)
    return image


BAD_ENTRIES = {
    "L1 entry outside the file": spoilt(lambda image: image.l1, COPIED | 1 << 40),
    "unaligned L1 entry": spoilt(lambda image: image.l1, COPIED | 512),
    "unaligned data": spoilt(lambda image: image.l2, COPIED | 0x10200),
    "unaligned zero cluster": spoilt(lambda image: image.l2, COPIED | 0x10200 | 1),
    "reserved bits": spoilt(lambda image: image.l2, 1 << 57),
    "zero flag in version 2": spoilt(lambda image: image.l2, 1, compat="0.10"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_reading_and_mapping_refuse_the_same_entries(name: str) -> None:
    disk = BAD_ENTRIES[name].opened()
    requests: list[Callable[[], object]] = [
        lambda: disk.read(0, 512),
        lambda: list(disk.extents(0, 512)),
        lambda: disk.map(0, 512),
    ]
    for request in requests:
        with pytest.raises(ImageCorruptError) as caught:
            request()
        assert caught.value.structure in ("L1 entry", "L2 entry", "L2 table")
    disk.abandon()


def test_an_l1_entry_with_nothing_but_the_copied_flag_is_an_absent_table() -> None:
    with spoilt(lambda image: image.l1, COPIED).opened() as disk:
        assert disk.read(0, 512) == bytes(512)
        disk.write(0, b"y" * 512)
        assert disk.read(0, 512) == b"y" * 512


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 16, 64])
def test_refcounts_that_call_everything_used_do_not_keep_a_write_busy(refcount_bits: int) -> None:
    image = Image(cluster_size=2 * MiB, refcount_bits=refcount_bits)
    size = 2 * MiB
    image.bytes[image.refcount_table : image.refcount_table + size] = image.block.to_bytes(8, "big") * (size // 8)
    image.bytes[image.block : image.block + size] = b"\xff" * size
    disk = image.opened()
    disk.discard(0, MiB)
    with pytest.raises(ImageCorruptError) as caught:
        disk.write(0, b"y")
    assert caught.value.structure == "refcount table"
    disk.abandon()


@pytest.mark.parametrize("what", ["header", "L1 table", "refcount table", "refcount block"])
def test_a_write_does_not_take_clusters_of_the_image_itself_that_are_counted_as_free(what: str) -> None:
    image = Image()
    place = {"header": 0, "L1 table": image.l1, "refcount table": image.refcount_table, "refcount block": image.block}
    image.put(image.block + 2 * (place[what] >> image.bits), 0, 2)
    disk = image.opened()
    with pytest.raises(ImageCorruptError) as caught:
        disk.write(512 << 10, b"y")
    assert what in str(caught.value)
    assert disk.read(0, 512) == b"x" * 512
    disk.abandon()


def test_a_refcount_block_outside_the_file_is_not_taken_for_zeroes() -> None:
    disk = spoilt(lambda image: image.refcount_table, 1 << 40).opened()
    with pytest.raises(ImageCorruptError) as caught:
        disk.write(512 << 10, b"y")
    assert caught.value.structure == "refcount block"
    assert caught.value.host_offset == 1 << 40
    disk.abandon()


@pytest.mark.parametrize("offset", [1 << 40, (1 << 64) - 65536], ids=["far away", "no offset of a file"])
@pytest.mark.parametrize("width", [8, 64])
def test_a_change_of_the_refcount_width_does_not_take_a_block_outside_the_file_for_zeroes(width: int, offset: int) -> None:
    disk = spoilt(lambda image: image.refcount_table + 8, offset).opened()
    with pytest.raises(ImageCorruptError) as caught, jobs.amend(disk, {"refcount_bits": width}) as job:
        job.wait()
    assert (caught.value.structure, caught.value.host_offset) == ("refcount block", offset)
    disk.abandon()


def test_the_refcount_width_of_an_image_that_counts_nothing_is_not_changed() -> None:
    image = Image()
    image.put(image.refcount_table, 0)
    disk = image.opened()
    with pytest.raises(ImageCorruptError), jobs.amend(disk, {"refcount_bits": 64}) as job:
        job.wait()
    assert disk.read(0, 512) == b"x" * 512
    disk.abandon()


@pytest.mark.parametrize("small", [-1, 1 << 40], ids=["numpy", "python"])
@pytest.mark.parametrize("offset", [1 << 40, (1 << 64) - 65536], ids=["far away", "no offset of a file"])
def test_a_snapshot_counts_nothing_in_a_block_outside_the_file(
    offset: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "_SMALL", small)
    image = Image(cluster_size=512, refcount_bits=64)
    with disk_on(RecordingNode(data=bytes(image.bytes))) as disk:
        file = disk.node.children["file"].node
        assert isinstance(file, RecordingNode)
        disk.write(0, b"y" * 65536)
    image.bytes = bytearray(file.data)
    image.put(image.refcount_table + 8, offset)
    disk = image.opened()
    with pytest.raises(ImageCorruptError) as caught:
        disk.snapshots.create("one")
    assert caught.value.host_offset == offset
    disk.abandon()


@pytest.mark.parametrize("request_name", ["write", "discard", "zero"])
def test_a_compressed_descriptor_out_of_range_spoils_only_its_own_request(request_name: str) -> None:
    disk = spoilt(lambda image: image.l2, COMPRESSED | 1 << 57, cluster_size=512).opened()
    requests: dict[str, Callable[[], object]] = {
        "write": lambda: disk.write(0, b"y" * 512),
        "discard": lambda: disk.discard(0, 512),
        "zero": lambda: disk.write_zeroes(0, 512),
    }
    with pytest.raises(ImageError):
        requests[request_name]()
    disk.write(512, b"z" * 512)
    disk.flush()
    assert disk.read(512, 512) == b"z" * 512
    disk.close()


def test_a_disk_is_whole_sectors() -> None:
    image = Image()
    image.put(24, MiB - 1)
    with image.opened() as disk:
        assert disk.size == MiB - 512


# Where an image is stored ---------------------------------------------------------------------------------------------


def raw_over(host: RecordingNode, *, size: int | None = None) -> RawNode:
    node = RawNode(None, None, read_only=False, size=size)
    with Transaction() as change:
        change.attach(node, "file", host)
    node.load()
    return node


def test_an_image_in_a_window_of_a_file_does_not_grow_out_of_it() -> None:
    start = new_image(MiB, {"cluster_size": 4096})
    behind = b"\xaa" * 65536
    host = RecordingNode(data=start + behind)
    disk = disk_on(raw_over(host, size=len(start)))
    with pytest.raises(StorageError):
        disk.write(0, b"x" * 65536)
    assert host.data[len(start) :] == behind
    disk.abandon()


def test_an_image_in_a_raw_image_grows_with_it() -> None:
    host = RecordingNode(data=new_image(MiB, {"cluster_size": 4096}))
    with disk_on(raw_over(host)) as disk:
        disk.write(0, b"x" * MiB)
        disk.flush()
        assert disk.read(0, MiB) == b"x" * MiB
    with disk_on(RecordingNode(data=bytes(host.data)), writable=False) as disk:
        assert disk.read(0, MiB) == b"x" * MiB


def test_an_image_in_an_image_ends_where_that_ends() -> None:
    inner = new_image(MiB, {"cluster_size": 4096})
    outer = RecordingNode(data=new_image(-(-len(inner) // 512) * 512, {"cluster_size": 512}))
    with disk_on(outer) as disk:
        disk.write(0, inner)
    with disk_on(RecordingNode(data=bytes(outer.data)), writable=False) as disk:
        below = disk.node
        above = Qcow2Node.from_options(check_options("qcow2", {"file": {}}), read_only=True)
        with Transaction() as change:
            edge = change.attach(above, "file", below)
        buffer = memoryview(bytearray(1024))
        edge.read(disk.size - 512, buffer)
        edge.read(1 << 50, buffer)
        assert buffer == bytes(1024)
        with pytest.raises(StorageError):
            edge.write(disk.size - 512, (bytes(1024),))
        with pytest.raises(StorageError):
            edge.write_zeroes(1 << 50, 512, unmap=False)
        with Transaction() as change:
            change.detach(edge)


def test_an_image_made_where_something_else_was_is_empty() -> None:
    host = RecordingNode(data=b"\xff" * (4 * MiB))
    with Transaction() as change:
        edge = change.attach(None, "create", host, wanted=CONSISTENT_READ | WRITE | RESIZE)
    host.truncate = lambda size, preallocation="off": None  # type: ignore[method-assign]
    write_empty_image(edge, header_for(MiB, check_options("qcow2", {}, table="create")))
    with disk_on(RecordingNode(data=bytes(host.data)), writable=False) as disk:
        assert disk.read(0, MiB) == bytes(MiB)


def test_a_run_longer_than_a_refcount_block_can_count_is_found() -> None:
    """The L1 table of a disk that grows needs more clusters in a row than lie between two refcount blocks."""
    host = RecordingNode(data=new_image(MiB, {"cluster_size": 512, "refcount_bits": 64}))
    with disk_on(host) as disk:
        plan.truncate(disk.node, 40 << 30)
        disk.write((40 << 30) - 512, b"x" * 512)
        assert disk.read((40 << 30) - 512, 512) == b"x" * 512
    assert len(host.data) < 64 * MiB
