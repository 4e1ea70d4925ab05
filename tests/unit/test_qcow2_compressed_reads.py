"""Reading compressed clusters: many with one request, parts of one from memory, and damage by name."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import pytest
import zstandard

from blocklib import KiB, MiB
from blocklib.disk import Disk
from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.node import Qcow2Node
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image
from tests.unit.test_qcow2_packing import CLUSTER, host_range, text

N = 24
KINDS = pytest.mark.parametrize(
    "options",
    [{}, {"compression_type": "zstd"}, {"extended_l2": True, "cluster_size": 16 * KiB}],
    ids=["zlib", "zstd", "extended"],
)


class CountingNode(RecordingNode):
    """Notes the requests that read from it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data=data)
        self.reads: list[tuple[int, int]] = []

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        self.reads.append((offset, sum(map(len, views))))
        super().preadv(offset, views)


def one_stream(kind: str, data: bytes) -> bytes:
    """All of `data` as one stream."""
    if kind == "zlib":
        deflate = zlib.compressobj(wbits=-12)
        return deflate.compress(data) + deflate.flush()
    frame = zstandard.ZstdCompressor(write_content_size="unknown" not in kind).compressobj(len(data) if kind == "zstd" else -1)
    return frame.compress(data) + frame.flush()


class Made(NamedTuple):
    file: CountingNode
    disk: Disk
    node: Qcow2Node
    data: bytes


Make: TypeAlias = Callable[..., Made]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes disks with a compressed cluster for each number in `order`, in that order in the file."""
    disks = []

    def made(order: Sequence[int], **options: Any) -> Made:
        file = CountingNode(new_image(MiB, {"cluster_size": CLUSTER, **options}))
        disk = disk_on(file)
        disks.append(disk)
        assert isinstance(disk.node, Qcow2Node)
        size = disk.node.geometry.cluster_size
        data = text(len(order) * size)
        for number in order:
            disk.write_compressed(number * size, data[number * size : (number + 1) * size])
        file.reads.clear()
        return Made(file, disk, disk.node, data)

    yield made
    for disk in disks:
        disk.close()


@KINDS
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_neighbours_in_the_file_are_read_with_one_request(make: Make, options: dict[str, object], shuffled: bool) -> None:
    order = random.Random(3).sample(range(N), N) if shuffled else range(N)
    file, disk, _node, data = make(order, **options)
    assert disk.read(0, len(data)) == data
    assert len(file.reads) == 1
    assert [(extent.offset, extent.length) for extent in disk.extents() if extent.compressed] == [(0, len(data))]


@KINDS
def test_any_range_is_read_as_it_was_written(make: Make, options: dict[str, object]) -> None:
    _file, disk, node, data = make(range(N), **options)
    size = node.geometry.cluster_size
    disk.write(5 * size, b"\x05" * size)
    disk.write(9 * size + 512, b"\x09" * 512)
    disk.discard(12 * size, 3 * size)
    expected = bytearray(data)
    expected[5 * size : 6 * size] = b"\x05" * size
    expected[9 * size + 512 : 9 * size + KiB] = b"\x09" * 512
    expected[12 * size : 15 * size] = bytes(3 * size)
    choose = random.Random(4)
    ranges = [(0, len(data)), (1, len(data) - 2), (size - 1, 2), (size, 2 * size), (size - 1, size + 2)]
    for _ in range(100):
        start = choose.randrange(len(data))
        ranges.append((start, choose.randrange(1, len(data) - start + 1)))
    for start, length in ranges:
        assert disk.read(start, length) == expected[start : start + length]


def test_what_lies_far_apart_is_read_apart(make: Make) -> None:
    file, disk, node, data = make([0])
    disk.write(512 * KiB, random.Random(1).randbytes(64 * KiB))
    node.refcounts.packing.leave()
    disk.write_compressed(CLUSTER, data[:CLUSTER])
    file.reads.clear()
    assert disk.read(0, 2 * CLUSTER) == data * 2
    assert len(file.reads) == 2
    assert all(length <= CLUSTER for _offset, length in file.reads)


def test_the_cluster_that_was_read_in_part_is_kept_until_another_is_written_in_its_place(make: Make) -> None:
    file, disk, node, data = make([0])
    for start in range(0, CLUSTER, 512):
        assert disk.read(start, 512) == data[start : start + 512]
    assert len(file.reads) == 1
    place = host_range(node, 0)
    disk.discard(0, CLUSTER)
    disk.flush()
    other = text(64 * CLUSTER, seed=9)
    candidates = [other[start : start + CLUSTER] for start in range(0, len(other), CLUSTER)]
    for cluster in candidates:  # until a stream takes exactly the sectors of the first
        disk.write_compressed(CLUSTER, cluster)
        found = host_range(node, CLUSTER)
        assert disk.read(CLUSTER, 512) == cluster[:512]
        if found == place:
            break
        disk.discard(CLUSTER, CLUSTER)
        disk.flush()
    else:
        raise AssertionError("no other stream came to lie where the first was")


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_damaged_stream_among_others_is_named(make: Make, kind: str) -> None:
    file, disk, node, data = make(range(N), compression_type=kind)
    start, length = host_range(node, 7 * CLUSTER)
    file.data[start : start + length // 2] = b"\xff" * (length // 2)
    with pytest.raises(ImageCorruptError, match="cannot be decompressed") as caught:
        disk.read(0, len(data))
    assert caught.value.host_offset == start
    assert disk.read(0, 7 * CLUSTER) == data[: 7 * CLUSTER]


@pytest.mark.parametrize("kind", ["zlib", "zstd", "zstd of unknown size"])
def test_a_stream_that_ends_early_is_named_and_one_that_goes_on_is_cut_off(make: Make, kind: str) -> None:
    file, disk, node, data = make(range(N), compression_type=kind.split()[0])
    short, long = one_stream(kind, data[: CLUSTER // 2]), one_stream(kind, b"\x33" * 2 * CLUSTER)
    start, length = host_range(node, 7 * CLUSTER)
    assert max(len(short), len(long)) <= length
    file.data[start : start + len(long)] = long
    assert disk.read(0, len(data)) == data[: 7 * CLUSTER] + b"\x33" * CLUSTER + data[8 * CLUSTER :]
    node.mapping.decompressed = None
    file.data[start : start + len(short)] = short
    with pytest.raises(ImageCorruptError, match=f"{CLUSTER // 2} bytes"):
        disk.read(0, len(data))


def test_a_descriptor_outside_the_file_is_named(make: Make) -> None:
    file, disk, node, data = make(range(N))
    slice_offset = node.mapping.slice_at(0)
    assert slice_offset is not None
    table = node.mapping.cache.need(slice_offset)
    table[3] = layout.FLAG_COMPRESSED | file.size + 512
    with pytest.raises(ImageCorruptError, match="lies outside the file"):
        disk.read(0, len(data))
