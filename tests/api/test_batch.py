"""`Disk.read_batch` and `Disk.write_batch`: many requests are what each of them would be by itself."""

from __future__ import annotations

import errno
import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blocklib
from blocklib import KiB, MiB, batch
from blocklib._fast import lookups, placing
from blocklib.errors import BatchError, OutOfRangeError, ReadOnlyError, StorageError, UsageError
from blocklib.protocols.file import FileNode
from tests.programs import Program

SIZE = 4 * MiB


@pytest.fixture(params=("kernels", "one by one"), autouse=True)
def the_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With kernels, and as it is where there are none."""
    if request.param == "kernels":
        lookups.family.load()
        assert placing.are_ready(1_000_000)
    else:
        monkeypatch.setattr(lookups, "are_ready", lambda _requests, writing=False: False)
    return str(request.param)


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture
def disk(folder: Path) -> Iterator[blocklib.Disk]:
    """An overlay over an overlay over a raw image, each with a part of the content."""
    content = noise(SIZE)
    blocklib.create("base.raw", SIZE, format="raw")
    with blocklib.open("base.raw", "r+", format="raw") as base:
        base.write(0, content[: 3 * MiB])
    blocklib.create("middle.qcow2", format="qcow2", backing="base.raw", backing_format="raw", options={"cluster_size": 4 * KiB})
    with blocklib.open("middle.qcow2", "r+", format="qcow2", references="allow") as middle:
        for offset in range(MiB, 2 * MiB, 32 * KiB):
            middle.write(offset, noise(10_000, offset))
    blocklib.create("top.qcow2", SIZE + 512, format="qcow2", backing="middle.qcow2", backing_format="qcow2")
    with blocklib.open("top.qcow2", "r+", format="qcow2", references="allow") as top:
        top.write(2 * MiB - 100, noise(300_000, 7))
        top.write_zeroes(100_000, 200_000)
        top.write_compressed(512 * KiB, bytes(range(256)) * 256)
        yield top


def everything(disk: blocklib.Disk) -> bytearray:
    return bytearray(disk.read(0, disk.size))


@pytest.mark.parametrize("length", [1, 512, 4096, 100_000])
def test_a_batch_reads_what_single_requests_read(disk: blocklib.Disk, length: int) -> None:
    offsets = np.random.default_rng(length).integers(0, disk.size - length + 1, 200)
    blocks = disk.read_batch(offsets, length)
    assert blocks.shape == (200, length)
    assert blocks.dtype == np.uint8
    for offset, block in zip(offsets.tolist(), blocks, strict=True):
        assert block.tobytes() == disk.read(offset, length)


@pytest.mark.parametrize("offsets", [[8192, 0], (8192, 0), array("q", (8192, 0)), array("i", (8192, 0)), np.array([8192, 0])])
def test_offsets_may_be_any_integers(disk: blocklib.Disk, offsets: Any) -> None:
    out = bytearray(1024)
    assert disk.read_batch(offsets, 512, out) is out
    assert out == disk.read(8192, 512) + disk.read(0, 512)
    assert disk.read_batch(offsets, 512, out=np.empty((2, 512), np.uint8)).tobytes() == out


@pytest.mark.parametrize("length", [1, 512, 4096, 65536, 150_000])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_a_batch_writes_what_single_requests_write(disk: blocklib.Disk, length: int, order: str, qemu_img: Program) -> None:
    content = everything(disk)
    rng = random.Random(length)
    for _ in range(3):
        numbers = rng.sample(range(disk.size // length), min(64, disk.size // length))
        offsets = sorted(numbers) if order == "ascending" else numbers
        offsets = [number * length for number in offsets]
        data = rng.randbytes(length * len(offsets))
        disk.write_batch(offsets, data)
        for number, offset in enumerate(offsets):
            content[offset : offset + length] = data[number * length : (number + 1) * length]
        assert everything(disk) == content
    disk.close()
    qemu_img("check", "-q", "top.qcow2")
    qemu_img("convert", "-O", "raw", "top.qcow2", "copy.raw")
    assert Path("copy.raw").read_bytes() == content


def test_small_requests_fill_fresh_clusters_together(disk: blocklib.Disk) -> None:
    content = everything(disk)
    offsets = [*range(3 * MiB, 3 * MiB + 200_000, 1000), *range(700_000, 800_000, 3000)]
    data = noise(700 * len(offsets))
    disk.write_batch(offsets, data)
    for number, offset in enumerate(offsets):
        content[offset : offset + 700] = data[number * 700 : (number + 1) * 700]
    assert everything(disk) == content


def test_the_last_cluster_reaches_past_the_end(disk: blocklib.Disk) -> None:
    content = everything(disk)
    disk.write_batch([disk.size - 512, disk.size - 3000], b"x" * 1024)
    content[-512:] = content[-3000:-2488] = b"x" * 512
    assert everything(disk) == content


def test_no_requests_are_no_work(disk: blocklib.Disk) -> None:
    assert disk.read_batch([], 512).shape == (0, 512)
    disk.write_batch([], b"")
    disk.write_batch([0, 1], b"")
    disk.read_batch([0, 1], 0, bytearray())


@pytest.mark.parametrize("offsets", [[0, SIZE + 1], [-1, 0], [0, 1 << 63]])
def test_a_request_outside_stops_the_batch_before_it_begins(disk: blocklib.Disk, offsets: list[int]) -> None:
    before = everything(disk)
    with pytest.raises(OutOfRangeError):
        disk.write_batch(offsets, bytes(1024))
    out = bytearray(b"x" * 1024)
    with pytest.raises(OutOfRangeError):
        disk.read_batch(offsets, 512, out)
    assert out == b"x" * 1024
    assert everything(disk) == before


def test_what_is_no_batch_is_refused(disk: blocklib.Disk) -> None:
    with pytest.raises(UsageError):
        disk.read_batch([0], 512, bytearray(513))
    with pytest.raises(UsageError):
        disk.read_batch([0], 512, bytes(512))
    with pytest.raises(UsageError):
        disk.read_batch([0.5], 512)  # type: ignore[list-item]
    with pytest.raises(UsageError):
        disk.read_batch([0], -1)
    with pytest.raises(UsageError):
        disk.write_batch([0, 1], bytes(3))
    with pytest.raises(UsageError):
        disk.write_batch([], bytes(3))


def test_a_disk_open_for_reading_is_not_written(folder: Path) -> None:
    blocklib.create("a.qcow2", MiB, format="qcow2")
    with blocklib.open("a.qcow2") as disk, pytest.raises(ReadOnlyError):
        disk.write_batch([0], bytes(512))


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
def test_failures_are_told_by_request(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of three places the middle one is broken: the others are done."""
    blocklib.create(name, MiB, format=name[5:])
    with blocklib.open(name, "r+", format=name[5:]) as disk:
        disk.write(0, noise(MiB))
        disk.flush()
        (broken,) = [extent.host_offset for extent in disk.extents(70_000, 1)]
        assert broken is not None

        def breaks(offset: int, length: int) -> bool:
            return offset <= broken < offset + length

        def transfer(self: FileNode, offsets: Any, addresses: Any, lengths: Any, results: Any, *, writing: bool) -> None:
            whole(self, offsets, addresses, lengths, results, writing=writing)
            for move, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
                if breaks(offset, length):
                    results[move] = errno.EIO

        def single(method: Any) -> Any:
            def call(self: FileNode, offset: int, views: Any) -> None:
                if breaks(offset, sum(map(len, views))):
                    raise StorageError("broken", errno=errno.ENXIO, operation="test")
                method(self, offset, views)

            return call

        whole = FileNode.transfer
        with monkeypatch.context() as patch:
            patch.setattr(FileNode, "transfer", transfer)
            patch.setattr(FileNode, "preadv", single(FileNode.preadv))
            patch.setattr(FileNode, "pwritev", single(FileNode.pwritev))
            out = bytearray(3 * 512)
            with pytest.raises(BatchError) as caught:
                disk.read_batch([0, 69_900, 500_000], 512, out)
            assert caught.value.errnos == (0, errno.ENXIO, 0)
            assert isinstance(caught.value.__cause__, StorageError)
            assert out[:512] == noise(MiB)[:512]
            assert out[1024:] == noise(MiB)[500_000:500_512]
            with pytest.raises(BatchError) as caught:
                disk.write_batch([0, 69_900, 500_000], b"x" * 1536)
            assert caught.value.errnos == (0, errno.ENXIO, 0)
        assert disk.read(0, 512) == disk.read(500_000, 512) == b"x" * 512


def test_a_batch_is_marked_in_bitmaps(disk: blocklib.Disk) -> None:
    bitmap = disk.bitmaps.add("changes", granularity=4096)
    disk.write_batch([0, 3 * MiB, 2 * MiB], bytes(3 * 512))
    assert bitmap.dirty_ranges()["offset"].tolist() == [0, 2 * MiB, 3 * MiB]
    assert bitmap.count == 3 * 4096


def test_zeroes_are_detected(folder: Path) -> None:
    blocklib.create("a.qcow2", MiB, format="qcow2")
    with blocklib.open("a.qcow2", "r+", detect_zeroes="unmap", discard="unmap") as disk:
        disk.write_batch([0, 65536, 131072], bytes(65536) + b"x" * 65536 + bytes(65536))
        assert [extent.length for extent in disk.extents() if not extent.zero] == [65536]


@pytest.mark.parametrize("cache", ["none", "directsync", "writethrough", "unsafe"])
def test_every_cache_mode_serves_batches(folder: Path, cache: Any) -> None:
    blocklib.create("a.qcow2", MiB, format="qcow2", options={"cluster_size": 4096})
    try:
        disk = blocklib.open("a.qcow2", "r+", cache=cache)
    except StorageError as exc:
        pytest.skip(f"cache={cache} is not possible here: {exc}")
    content = bytearray(MiB)
    with disk:
        for length, offsets in (
            (512, range(100, 100_000, 1100)),
            (4096, range(0, MiB, 12288)),
            (8192, range(4096, MiB, 65536)),
        ):
            data = noise(length * len(offsets))
            disk.write_batch(offsets, data)
            for number, offset in enumerate(offsets):
                content[offset : offset + length] = data[number * length : (number + 1) * length]
            assert bytes(disk.read_batch(offsets, length)) == data
        assert everything(disk) == content


@pytest.mark.parametrize(
    "options",
    [{"extended_l2": True}, {"compat": "0.10"}, {"refcount_bits": 1}, {"data_file": "data", "data_file_raw": True}],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_image_serves_batches(folder: Path, options: dict[str, Any], qemu_img: Program) -> None:
    blocklib.create("a.qcow2", 2 * MiB, format="qcow2", options={"cluster_size": 16 * KiB, **options})
    content = bytearray(2 * MiB)
    rng = random.Random(3)
    with blocklib.open("a.qcow2", "r+", format="qcow2", references="allow") as disk:
        for _ in range(6):
            offsets = [number * 3000 for number in rng.sample(range(2 * MiB // 3000), 40)]
            data = rng.randbytes(3000 * 40)
            disk.write_batch(offsets, data)
            for number, offset in enumerate(offsets):
                content[offset : offset + 3000] = data[number * 3000 : (number + 1) * 3000]
            assert everything(disk) == content
            assert bytes(disk.read_batch(offsets, 3000)) == data
    qemu_img("check", "-q", "a.qcow2")


def test_rounds_are_as_large_as_their_bytes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """More requests than are looked up together."""
    blocklib.create("a.qcow2", MiB, format="qcow2", options={"cluster_size": 512})
    monkeypatch.setattr(batch, "_BOUNCE", 8192)
    offsets = np.random.default_rng(1).permutation(2048)[:1500] * 512
    data = noise(1500 * 512)
    with blocklib.open("a.qcow2", "r+", options={"l2-cache-size": 1}) as disk:
        disk.write_batch(offsets, data)
        assert disk.read_batch(offsets, 512).tobytes() == data


def test_a_full_host_fails_single_requests(folder: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: Program) -> None:
    blocklib.create("a.qcow2", MiB, format="qcow2")
    full = StorageError("full", errno=errno.ENOSPC, operation="test")

    def pwritev(self: FileNode, offset: int, views: Any) -> None:
        if offset + sum(map(len, views)) > 600_000:
            raise full
        write(self, offset, views)

    def transfer(self: FileNode, offsets: Any, addresses: Any, lengths: Any, results: Any, *, writing: bool) -> None:
        whole(self, offsets, addresses, lengths, results, writing=writing)
        results[0] = errno.ENOSPC

    write, whole = FileNode.pwritev, FileNode.transfer
    with blocklib.open("a.qcow2", "r+") as disk:
        offsets = [number * 65536 for number in range(16)]
        with monkeypatch.context() as patch:
            patch.setattr(FileNode, "pwritev", pwritev)
            patch.setattr(FileNode, "transfer", transfer)
            with pytest.raises(BatchError) as caught:
                disk.write_batch(offsets, b"x" * 16 * 4096)
        failed = caught.value.errnos
        assert set(failed) == {0, errno.ENOSPC}
        for offset, number in zip(offsets, failed, strict=True):
            assert disk.read(offset, 4096) == (bytes(4096) if number else b"x" * 4096)
    qemu_img("check", "-q", "a.qcow2")
