"""Compressed writes from inside: streams, how they share host clusters, and what is refused without a trace."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, jobs
from blocklib.disk import Disk
from blocklib.errors import OptionError, StorageError, UnsupportedFeatureError, UsageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.compression import Compressor, decompress
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.jobs.runs import COMPARE, COPY, SKIP, ZERO, in_units
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image
from tests.unit.test_qcow2_full_host import SmallHost, assert_sound

CLUSTER = 4 * KiB


@functools.cache
def text(length: int, seed: int = 0) -> bytes:
    """Words, as prose has them: it compresses to about half."""
    choose = random.Random(seed)
    words = [bytes(choose.choices(b"abcdefghijklmnopqrstuvwxyz", k=choose.randrange(2, 11))) for _ in range(3000)]
    out = bytearray()
    while len(out) < length:
        out += choose.choice(words[: choose.choice((20, 300, 3000))]) + b" "
    return bytes(out[:length])


def raw(path: Path) -> dict[str, Any]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def image(size: int = MiB, **options: Any) -> tuple[RecordingNode, Disk, Qcow2Node]:
    file = RecordingNode(data=new_image(size, {"cluster_size": CLUSTER, **options}))
    disk = disk_on(file)
    assert isinstance(disk.node, Qcow2Node)
    return file, disk, disk.node


def host_range(node: Qcow2Node, offset: int) -> tuple[int, int]:
    slice_offset = node.mapping.slice_at(offset)
    assert slice_offset is not None
    entry = node.mapping.cache.need(slice_offset)[node.mapping.index_in_slice(offset)]
    assert entry & layout.FLAG_COMPRESSED
    return node.geometry.decode_compressed(entry)


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [None, *range(1, 10)])
def test_deflate_streams_reach_back_no_more_than_four_kib(level: int | None) -> None:
    data = text(100 * KiB) * 3
    unit = 64 * KiB
    packed = Compressor(layout.COMPRESSION_DEFLATE, unit, level).compress(memoryview(data))
    for number, stream in enumerate(packed):
        assert stream is not None
        reader = zlib.decompressobj(-12)
        out = bytearray()
        while not reader.eof:  # in small steps, so that the window is all that it remembers
            out += reader.decompress(stream, 64)
            stream = reader.unconsumed_tail
        assert out == data[number * unit : (number + 1) * unit].ljust(unit, b"\0")


@pytest.mark.parametrize("kind", [layout.COMPRESSION_DEFLATE, layout.COMPRESSION_ZSTD])
@pytest.mark.parametrize("unit", [512, 4 * KiB, 2 * MiB])
def test_what_is_compressed_comes_back_and_noise_is_left_alone(kind: int, unit: int) -> None:
    data = text(unit) + random.Random(1).randbytes(unit) + bytes(unit) + text(unit // 2)
    packed = Compressor(kind, unit).compress(memoryview(data))
    assert packed[1] is None
    for number in (0, 2, 3):
        stream = packed[number]
        assert stream is not None
        assert len(stream) < unit
        found = decompress(stream + b"rest of the sector", unit, kind, host_offset=0, node=None)
        assert found == data[number * unit : (number + 1) * unit].ljust(unit, b"\0")


@pytest.mark.parametrize("unit", [512, 4 * KiB, 64 * KiB, 2 * MiB])
def test_the_default_level_stays_within_six_percent_of_level_six(unit: int) -> None:
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    data = memoryview(b"".join(path.read_bytes() for path in sources)[: 2 * MiB])

    def total(level: int | None) -> int:
        compressor = Compressor(layout.COMPRESSION_DEFLATE, unit, level)
        parts = [compressor.compress(data[start : start + 2 * MiB]) for start in range(0, len(data), 2 * MiB)]
        return sum(unit if stream is None else len(stream) for packed in parts for stream in packed)

    assert total(None) <= 1.06 * total(6)
    assert total(9) <= total(6) < total(1)


def test_streams_do_not_depend_on_what_was_compressed_before() -> None:
    data = memoryview(text(640 * KiB))
    compressor = Compressor(layout.COMPRESSION_DEFLATE, 64 * KiB)
    first = compressor.compress(data)
    compressor.compress(memoryview(text(256 * KiB, seed=5)))
    assert compressor.compress(data) == first


def pieces_of_all_kinds(n: int, length: int) -> list[list[memoryview]]:
    """Text, noise and zeroes, several stretches a piece, the last of which ends early."""
    choose = random.Random(5)
    data = text(2 * MiB)
    made = []
    for number in range(n):
        start = choose.randrange(len(data) - length)
        first, last = data[start : start + length], data[start : start + length // 4 + 99]
        parts = [] if number == 3 else [first, choose.randbytes(length // 2), bytes(length // 4), last]
        made.append([memoryview(part) for part in parts])
    return made


@pytest.mark.parametrize("unit", [4 * KiB, 128 * KiB])
def test_streams_of_many_pieces_do_not_depend_on_which_is_done_first(unit: int) -> None:
    """Up to 64 at a time: what is known of a piece 64 before is always there."""
    pieces = pieces_of_all_kinds(80, 2 * unit)
    expected: dict[int, Any] = {}
    for seed in range(3):
        compressor = Compressor(layout.COMPRESSION_DEFLATE, unit)
        order = list(range(len(pieces)))
        if seed:
            choose = random.Random(seed)
            order = [*choose.sample(range(40), 40), *choose.sample(range(40, 80), 40)]
        found: dict[int, Any] = dict(sorted((number, compressor.compress_piece(number, pieces[number])) for number in order))
        expected = expected or found
        assert found == expected
    for number, parts in enumerate(pieces):
        for part, streams in zip(parts, expected[number], strict=True):
            for start, stream in zip(range(0, len(part), unit), streams, strict=True):
                cluster = bytes(part[start : start + unit]).ljust(unit, b"\0")
                if stream is not None:
                    assert decompress(stream, unit, layout.COMPRESSION_DEFLATE, host_offset=0, node=None) == cluster


@pytest.mark.parametrize("unit", [16 * KiB, 128 * KiB])
def test_what_noise_leaves_is_spent_on_speed_and_the_whole_stays_within_six_percent(unit: int) -> None:
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    data = memoryview(b"".join(path.read_bytes() for path in sources)[: 6 * MiB])
    noise = memoryview(random.Random(6).randbytes(128 * KiB))
    fast, good = (Compressor(layout.COMPRESSION_DEFLATE, unit, level) for level in (3, 6))

    def total(made: Iterable[Sequence[bytes | None]]) -> int:
        return sum(unit if stream is None else len(stream) for streams in made for stream in streams)

    parts = [data[start : start + 512 * KiB] for start in range(0, len(data), 512 * KiB)]
    texts, mixed = (Compressor(layout.COMPRESSION_DEFLATE, unit) for _ in range(2))
    only_text = total(streams for n, part in enumerate(parts) for streams in texts.compress_piece(n, [part]))
    with_noise = total(streams for n, part in enumerate(parts) for streams in mixed.compress_piece(n, [noise, part]))
    limit = total(good.compress(part) for part in parts)
    assert only_text <= 1.06 * limit < total(fast.compress(part) for part in parts)
    assert with_noise - len(noise) * len(parts) > only_text
    assert with_noise <= 1.06 * (limit + len(noise) * len(parts))


@pytest.mark.parametrize(("kind", "level"), [("zlib", 0), ("zlib", 10), ("zlib", -1), ("zstd", 0), ("zstd", 23)])
def test_levels_that_there_are_not_are_refused_before_anything_is_made(kind: Any, level: int, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(KiB))
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    with pytest.raises(UsageError, match="levels"):
        blocklib.convert(
            raw(tmp_path / "source"), target, format="qcow2", overwrite=True, compress=kind, compress_level=level
        )
    assert target.read_bytes() == b"kept"


# -- packing ----------------------------------------------------------------------------------------------------------


def test_streams_lie_byte_after_byte_over_the_borders_of_host_clusters() -> None:
    file, disk, node = image()
    data = text(16 * CLUSTER)
    disk.write_compressed(0, data)
    disk.write_compressed(len(data), data[:CLUSTER])
    ranges = [host_range(node, number * CLUSTER) for number in range(17)]
    for (start, length), (following, _) in itertools.pairwise(ranges):
        assert start < following < start + length  # the next begins in the last sector of the one before, or right behind
    assert any(start // CLUSTER != (start + length - 1) // CLUSTER for start, length in ranges)
    disk.close()
    assert_sound(file, {0: data, len(data): data[:CLUSTER]})


def test_a_discard_of_all_that_was_packed_ends_the_packing() -> None:
    """QEMU goes on in the cluster that it has given away meanwhile, and the image is corrupt."""
    file, disk, _node = image(16 * MiB, cluster_size=64 * KiB)
    data = text(64 * KiB)
    disk.write_compressed(0, data)
    disk.write_compressed(64 * KiB, data)
    disk.discard(0, 128 * KiB)
    disk.flush()
    plain = b"\x55" * (64 * KiB)
    disk.write(256 * KiB, plain)
    disk.write_compressed(384 * KiB, data)
    disk.close()
    assert_sound(file, {0: bytes(128 * KiB), 256 * KiB: plain, 384 * KiB: data})


@pytest.mark.parametrize("flushed", [False, True])
def test_packing_goes_on_where_somebody_is_left(flushed: bool) -> None:
    file, disk, node = image()
    data = text(3 * CLUSTER)
    disk.write_compressed(0, data[:CLUSTER])
    disk.write_compressed(CLUSTER, data[CLUSTER : 2 * CLUSTER])
    disk.discard(0, CLUSTER)
    if flushed:
        disk.flush()
    before = sum(host_range(node, CLUSTER))
    disk.write_compressed(2 * CLUSTER, data[2 * CLUSTER :])
    assert host_range(node, 2 * CLUSTER)[0] <= before
    disk.close()
    assert_sound(file, {0: bytes(CLUSTER), CLUSTER: data[CLUSTER:]})


@pytest.mark.parametrize(("bits", "most"), [(1, 1), (2, 3), (4, 15)])
def test_a_full_refcount_ends_the_packing(bits: int, most: int) -> None:
    file, disk, node = image(refcount_bits=bits)
    data = b"".join(bytes((number,)) * CLUSTER for number in range(1, 41))  # each becomes a few bytes
    disk.write_compressed(0, data)
    used: dict[int, int] = {}
    for number in range(40):
        place = host_range(node, number * CLUSTER)[0] // CLUSTER
        used[place] = used.get(place, 0) + 1
    assert max(used.values()) == most
    assert all(node.refcounts.get(place) == n for place, n in used.items())
    disk.close()
    assert_sound(file, {0: data})


def test_close_ends_the_packing_and_leaves_no_leak() -> None:
    file, disk, _node = image()
    data = text(2 * CLUSTER)
    disk.write_compressed(0, data[:CLUSTER])
    disk.close()
    file = RecordingNode(data=bytes(file.data))
    disk = disk_on(file)
    disk.write_compressed(CLUSTER, data[CLUSTER:])
    disk.close()
    assert_sound(file, {0: data})


def test_what_no_descriptor_can_refer_to_is_written_as_it_is() -> None:
    file, disk, node = image()
    object.__setattr__(node.geometry, "max_compressed_offset", 1)
    data = text(3 * CLUSTER)
    disk.write_compressed(0, data)
    assert not any(extent.compressed for extent in disk.extents())
    disk.close()
    assert_sound(file, {0: data})


def test_noise_among_text_is_written_as_it_is() -> None:
    file, disk, _node = image()
    data = text(CLUSTER) + random.Random(2).randbytes(2 * CLUSTER) + text(CLUSTER, 1)
    disk.write_compressed(8 * CLUSTER, data)
    assert [(e.offset, e.length) for e in disk.extents() if e.compressed] == [(8 * CLUSTER, CLUSTER), (11 * CLUSTER, CLUSTER)]
    disk.close()
    assert_sound(file, {8 * CLUSTER: data})


def test_a_new_block_that_fails_to_be_written_leaves_no_leak() -> None:
    file, disk, _node = image()
    data = text(8 * CLUSTER)
    disk.write_compressed(0, data[: 4 * CLUSTER])

    def fail(_offset: int, _length: int) -> None:
        raise StorageError("injected", errno=errno.EIO, operation="injected")

    file.before_write = fail
    with pytest.raises(StorageError, match="injected"):
        disk.write_compressed(4 * CLUSTER, data[4 * CLUSTER :])
    file.before_write = lambda _offset, _length: None
    disk.write(12 * CLUSTER, data)
    disk.write_compressed(4 * CLUSTER, data[4 * CLUSTER :])
    disk.close()
    assert_sound(file, {0: data, 12 * CLUSTER: data})


@pytest.mark.parametrize("extra", range(0, 8 * 512, 512))
def test_a_full_host_costs_the_compressed_write_and_no_other(extra: int) -> None:
    host = SmallHost(new_image(4 * MiB, {"cluster_size": 512}))
    disk = disk_on(host)
    disk.write(0, b"a" * 512)
    disk.flush()
    host.room = host.size + extra
    written = {0: b"a" * 512}
    for number in range(1, 60):
        data = text(2048, seed=number)
        try:
            disk.write_compressed(number * 33 * KiB // 512 * 512, data)
        except StorageError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            break
        written[number * 33 * KiB // 512 * 512] = data
    else:
        pytest.fail("the host was never full")
    disk.close()
    assert_sound(host, written)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_an_allocated_cluster_is_not_written_compressed(compressed: bool) -> None:
    file, disk, _node = image()
    data = text(4 * CLUSTER)
    (disk.write_compressed if compressed else disk.write)(2 * CLUSTER, data[:CLUSTER])
    disk.flush()
    before = bytes(file.data)
    with pytest.raises(StorageError) as caught:
        disk.write_compressed(0, data)
    assert caught.value.errno == errno.EIO
    disk.close()
    assert bytes(file.data) == before


@pytest.mark.parametrize(("offset", "length"), [(512, CLUSTER), (0, CLUSTER - 1), (CLUSTER, 3 * CLUSTER // 2)])
def test_parts_of_clusters_are_refused(offset: int, length: int) -> None:
    _file, disk, _node = image()
    with disk, pytest.raises(UsageError, match="whole clusters"):
        disk.write_compressed(offset, bytes(length))


def test_the_last_cluster_of_a_disk_may_be_short() -> None:
    file, disk, _node = image(10 * CLUSTER + 1024)
    data = text(CLUSTER + 1024)
    disk.write_compressed(9 * CLUSTER, data)
    disk.close()
    assert_sound(file, {9 * CLUSTER: data})


def test_formats_and_images_without_compressed_clusters_refuse_by_name(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "raw", MiB, format="raw")
    blocklib.create(tmp_path / "with", MiB, format="qcow2", options={"data_file": str(tmp_path / "data")})
    for disk in (
        blocklib.open(tmp_path / "raw", "r+", format="raw"),
        blocklib.open(tmp_path / "with", "r+", format="qcow2", references="allow"),
    ):
        with disk, pytest.raises(UnsupportedFeatureError) as caught:
            disk.write_compressed(0, bytes(64 * KiB))
        assert "compressed clusters" in caught.value.features


# -- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"compress_level": 3}, UsageError),
        ({"compress": "lz4"}, UsageError),
        ({"compress": "zlib", "options": {"compression_type": "zstd"}}, OptionError),
        ({"compress": "zstd", "options": {"compat": "0.10"}}, OptionError),
        ({"compress": "zlib", "options": {"preallocation": "metadata"}}, OptionError),
        ({"compress": "zlib", "options": {"data_file": "d"}}, OptionError),
        ({"compress": "zlib", "format": "raw"}, UnsupportedFeatureError),
    ],
)
def test_what_contradicts_compression_is_refused_and_leaves_no_file(
    arguments: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(text(MiB))
    with pytest.raises(error):
        blocklib.convert(raw(source), tmp_path / "target", **{"format": "qcow2", **arguments})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_open_disk_says_how_it_is_compressed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(text(MiB))
    blocklib.create(target, MiB, format="qcow2", options={"compression_type": "zstd"})
    with blocklib.open(target, "r+", format="qcow2") as disk:
        with pytest.raises(OptionError, match="zstd"):
            blocklib.convert(raw(source), disk, compress="zlib")
        blocklib.convert(raw(source), disk, compress="zstd", compress_level=19)
        assert disk.read(0, MiB) == text(MiB)
        assert all(extent.compressed for extent in disk.extents())


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("threads", [1, 5])
def test_convert_compresses_whole_clusters_whatever_the_source_has_where(
    threads: int, unordered: bool, tmp_path: Path
) -> None:
    choose = random.Random(threads)
    source = tmp_path / "source"
    content = bytearray(9 * MiB + 1536)
    for _ in range(60):
        start, n = choose.randrange(len(content)), choose.randrange(1, 200 * KiB)
        part = choose.choice((text(n, 1), choose.randbytes(n), bytes(n)))
        content[start : start + n] = part[: len(content) - start]
    content[5 * MiB : 6 * MiB] = bytes(MiB)
    source.write_bytes(content)
    target = tmp_path / "target"
    blocklib.convert(raw(source), target, format="qcow2", compress="zlib", threads=threads, unordered=unordered)
    assert blocklib.check(target, format="qcow2").clean
    with blocklib.open(target, format="qcow2") as disk:
        assert disk.read(0, disk.size) == content
        assert not any(extent.present for extent in disk.extents(5 * MiB, MiB))


def test_a_compressed_copy_above_a_backing_file_has_whole_clusters_of_what_differs(tmp_path: Path) -> None:
    base, source, target = tmp_path / "base", tmp_path / "source", tmp_path / "target"
    content = bytearray(text(4 * MiB))
    base.write_bytes(content)
    below: dict[str, Any] = {"backing": base, "backing_format": "raw"}
    blocklib.create(source, format="qcow2", options={"cluster_size": 4 * KiB}, **below)
    with blocklib.open(source, "r+", format="qcow2", references="allow") as disk:
        for offset, data in ((MiB, bytes(100)), (3 * MiB + 5000, bytes(295000)), (2 * MiB, text(70 * KiB, 3))):
            disk.write(offset, data)
            content[offset : offset + len(data)] = data
        blocklib.convert(disk, target, format="qcow2", compress="zlib", references="allow", **below)
    with blocklib.open(target, format="qcow2", references="allow") as disk:
        assert disk.read(0, 4 * MiB) == content
        kept = {extent.offset // (64 * KiB) for extent in disk.extents() if extent.depth == 0}
        assert sum(extent.length for extent in disk.extents() if extent.depth == 0) == 8 * 64 * KiB
        assert min(kept) == 16


def test_bitmaps_note_compressed_writes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    blocklib.create(path, MiB, format="qcow2")
    with blocklib.open(path, "r+", format="qcow2") as disk:
        bitmap = disk.bitmaps.add("b")
        disk.write_compressed(128 * KiB, text(64 * KiB))
        assert bitmap.count == 64 * KiB


@pytest.mark.parametrize("detect", ["on", "unmap"])
def test_detected_zeroes_are_not_compressed_and_may_replace_what_is_allocated(detect: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    blocklib.create(path, MiB, format="qcow2")
    with blocklib.open(path, "r+", format="qcow2", discard="unmap", detect_zeroes=detect) as disk:
        disk.write(128 * KiB, text(64 * KiB))
        disk.write_compressed(64 * KiB, bytes(128 * KiB))
        assert not any(extent.compressed or extent.data for extent in disk.extents())
        assert all(extent.zero and extent.present for extent in disk.extents(64 * KiB, 128 * KiB))
        disk.write_compressed(256 * KiB, bytes(64 * KiB) + text(64 * KiB))  # all of a request, or nothing
        assert all(extent.compressed for extent in disk.extents(256 * KiB, 128 * KiB))


def test_runs_are_rounded_to_units() -> None:
    def rounded(*runs: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        return list(in_units(runs, 10))

    assert rounded((0, 30, COPY)) == [(0, 30, COPY)]
    assert rounded((0, 5, COPY), (5, 20, ZERO), (25, 5, COPY)) == [(0, 10, COPY), (10, 10, ZERO), (20, 10, COPY)]
    assert rounded((0, 5, SKIP), (5, 5, ZERO)) == [(0, 10, COPY)]
    assert rounded((0, 5, SKIP), (5, 5, COMPARE), (10, 7, SKIP)) == [(0, 10, COMPARE), (10, 7, SKIP)]
    assert rounded((0, 3, ZERO), (3, 3, COMPARE), (6, 14, COPY)) == [(0, 20, COPY)]
    assert rounded((0, 12, ZERO), (12, 1, ZERO), (13, 1, SKIP)) == [(0, 10, ZERO), (10, 4, COPY)]
    assert rounded() == []
    assert list(in_units([(20, 5, SKIP), (25, 30, COPY)], 10, 20)) == [(20, 35, COPY)]
    assert list(in_units([(20, 5, ZERO), (25, 5, ZERO), (30, 3, COPY)], 1, 20)) == [(20, 10, ZERO), (30, 3, COPY)]


def test_a_compressing_convert_is_a_job_like_others(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(text(5 * MiB))
    job = jobs.convert(raw(tmp_path / "source"), tmp_path / "target", format="qcow2", compress="zstd")
    assert job.wait().bytes_read == 5 * MiB
