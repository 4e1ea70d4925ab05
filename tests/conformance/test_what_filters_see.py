"""A filter that wants to see requests sees the same bytes, whichever way they take: alone, in batches, in bulk, over NBD."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB, batch, jobs, nbd
from tests.counting import CountingNode, counting

SIZE = 8 * MiB
_REQUEST = 64 * KiB


@pytest.fixture(autouse=True)
def _kernels() -> None:
    batch.expect(1_000_000, writing=True)
    batch.expect(1_000_000, writing=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image with data, apart and together, zeroes, and parts that it does not hold."""
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2")
    rng = random.Random(9)
    with blocklib.open(path, "r+") as disk:
        for cluster in [*range(16, 40), 3, 64, 66, 65, 100, 127]:
            disk.write(cluster * _REQUEST, rng.randbytes(_REQUEST))
        disk.write_zeroes(20 * _REQUEST, 2 * _REQUEST)
    return path


def _data(disk: blocklib.Disk) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for extent in disk.extents():
        if extent.data:
            if found and sum(found[-1]) == extent.offset:
                found[-1] = found[-1][0], found[-1][1] + extent.length
            else:
                found.append((extent.offset, extent.length))
    return found


def _open(path: Path, mode: str = "r+") -> blocklib.Disk:
    return blocklib.open(path, mode, format="qcow2", discard="unmap")  # type: ignore[arg-type]


# -- reading --------------------------------------------------------------------------------------------------------------


def _by_read(disk: blocklib.Disk, folder: Path) -> None:
    for offset in range(0, SIZE, _REQUEST):
        disk.read(offset, _REQUEST)


def _by_readinto(disk: blocklib.Disk, folder: Path) -> None:
    disk.readinto(0, bytearray(SIZE))


def _by_batch(disk: blocklib.Disk, folder: Path) -> None:
    disk.read_batch(range(0, SIZE, _REQUEST), _REQUEST, bytearray(SIZE))


def _by_file(disk: blocklib.Disk, folder: Path) -> None:
    assert len(disk.as_file().read()) == SIZE


def _by_nbd(disk: blocklib.Disk, folder: Path) -> None:
    with nbd.Server(disk, listen="nbd://127.0.0.1:0/vm") as server, blocklib.open(server.uri, format="raw") as remote:
        remote.read(0, SIZE)


def _by_convert(disk: blocklib.Disk, folder: Path) -> None:
    blocklib.convert(disk, folder / "copy", format="raw", overwrite=True)


def _by_compressing_convert(disk: blocklib.Disk, folder: Path) -> None:
    blocklib.convert(disk, folder / "copy", format="qcow2", overwrite=True, compress="zlib")


def _by_compare(disk: blocklib.Disk, folder: Path) -> None:
    with blocklib.open({"driver": "null-co", "size": SIZE, "read-zeroes": True}) as zeroes:
        assert not blocklib.compare(disk, zeroes).identical


def _by_mirror(disk: blocklib.Disk, folder: Path) -> None:
    with jobs.mirror(disk, folder / "copy", format="raw", overwrite=True) as job:
        job.wait(until="ready", timeout=60)
        job.cancel()
        job.wait(timeout=60)


def _by_backup(disk: blocklib.Disk, folder: Path) -> None:
    jobs.backup(disk, folder / "copy", format="raw", overwrite=True).wait(timeout=60)


Way = Callable[[blocklib.Disk, Path], None]


@pytest.mark.parametrize("way", [_by_read, _by_readinto, _by_batch, _by_file, _by_nbd])
def test_all_that_is_read_is_seen_above_the_disk(way: Way, path: Path, tmp_path: Path) -> None:
    for mode in ("r", "r+"):
        with _open(path, mode) as disk, counting(disk) as counter:
            way(disk, tmp_path)
            assert (counter.bytes["read"], counter.ranges("read")) == (SIZE, [(0, SIZE)])


@pytest.mark.parametrize("way", [_by_convert, _by_compressing_convert])
def test_all_that_a_copy_reads_is_seen_above_the_disk(way: Way, path: Path, tmp_path: Path) -> None:
    with _open(path, "r") as disk:
        data = _data(disk)
        with counting(disk) as counter:
            way(disk, tmp_path)
            assert (counter.bytes["read"], counter.ranges("read")) == (sum(n for _, n in data), data)


@pytest.mark.parametrize(
    "way",
    [_by_read, _by_readinto, _by_batch, _by_file, _by_nbd, _by_convert, _by_compressing_convert, _by_mirror, _by_backup],
)
def test_all_that_is_read_is_seen_below_the_format(way: Way, path: Path, tmp_path: Path) -> None:
    with _open(path) as disk:
        places = [(extent.host_offset or 0, extent.length) for extent in disk.extents() if extent.data]
        with counting(disk, disk.node.children["file"].node) as counter:
            way(disk, tmp_path)
            assert counter.bytes_inside("read", places) == sum(n for _, n in places)


def test_a_comparison_reads_through_a_filter_up_to_the_difference(path: Path, tmp_path: Path) -> None:
    with _open(path, "r") as disk, counting(disk) as counter:
        _by_compare(disk, tmp_path)
        assert counter.ranges("read")[0][0] == 3 * _REQUEST


# -- writing --------------------------------------------------------------------------------------------------------------


def _each(disk: blocklib.Disk) -> Iterator[tuple[int, bytes]]:
    for offset, length in _data(disk):
        for start in range(offset, offset + length, _REQUEST):
            yield start, disk.read(start, _REQUEST)


def _write_alone(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    for offset, data in _each(disk):
        target.write(offset, data)


def _write_runs(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    target.write_runs([(offset, memoryview(data)) for offset, data in _each(disk)])


def _write_batch(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    offsets, parts = zip(*_each(disk), strict=True)
    target.write_batch(offsets, b"".join(parts))


def _write_file(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    file = target.as_file()
    for offset, data in _each(disk):
        file.seek(offset)
        file.write(data)


def _write_over_nbd(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    with nbd.Server(target, listen="nbd://127.0.0.1:0/vm") as server, blocklib.open(server.uri, "r+", format="raw") as remote:
        _write_batch(disk, remote)


def _write_compressed(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    for offset, data in _each(disk):
        target.write_compressed(offset, data)


def _convert_to(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    blocklib.convert(disk, target)


def _mirror_to(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    with jobs.mirror(disk, target) as job:
        job.wait(until="ready", timeout=60)
        job.cancel()
        job.wait(timeout=60)


def _backup_to(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    jobs.backup(disk, target).wait(timeout=60)


def _keep_in(disk: blocklib.Disk, target: blocklib.Disk) -> None:
    """By copy-before-write, of all that is discarded."""
    kept = disk.insert_filter("copy-before-write", {"target": target})
    disk.discard(0, SIZE)
    kept.remove()


_WRITERS = (
    _write_alone,
    _write_runs,
    _write_batch,
    _write_file,
    _write_over_nbd,
    _write_compressed,
    _convert_to,
    _mirror_to,
    _backup_to,
    _keep_in,
)


@pytest.mark.parametrize("write", _WRITERS)
def test_all_that_is_written_is_seen(
    write: Callable[[blocklib.Disk, blocklib.Disk], None], path: Path, tmp_path: Path
) -> None:
    blocklib.create(tmp_path / "target.qcow2", SIZE, format="qcow2")
    with _open(path) as disk, _open(tmp_path / "target.qcow2") as target:
        data, content = _data(disk), disk.read(0, SIZE)
        with counting(target) as counter:
            write(disk, target)
            kind = "packed" if write is _write_compressed else "write"
            assert (counter.bytes[kind], counter.ranges(kind)) == (sum(n for _, n in data), data)
        assert target.read(0, SIZE) == content


@pytest.mark.parametrize("remotely", [False, True])
def test_zeroes_and_discards_are_seen(path: Path, remotely: bool) -> None:
    def change(disk: blocklib.Disk) -> None:
        disk.write_zeroes(1 * MiB, 1 * MiB)
        disk.write_zeroes(5 * MiB, 64 * KiB, unmap=True)
        disk.discard(6 * MiB, 1 * MiB)
        disk.flush()

    with _open(path) as disk, counting(disk) as counter:
        if remotely:
            with (
                nbd.Server(disk, listen="nbd://127.0.0.1:0/vm") as server,
                blocklib.open(server.uri, "r+", format="raw", discard="unmap") as remote,
            ):
                change(remote)
        else:
            change(disk)
        assert counter.ranges("zero") == [(1 * MiB, 1 * MiB), (5 * MiB, 64 * KiB)]
        assert counter.ranges("discard") == [(6 * MiB, 1 * MiB)]
        assert counter.bytes["zero"] == MiB + 64 * KiB
        assert counter.bytes["discard"] == MiB


def test_what_a_batch_makes_a_file_move_is_seen_by_a_filter_above_the_file(path: Path) -> None:
    with _open(path) as disk:
        places = [(extent.host_offset or 0, extent.length) for extent in disk.extents() if extent.data]
        counted: list[tuple[int, int]] = []

        def note(counter: CountingNode) -> None:
            counted.append((counter.bytes_inside("write", places), counter.bytes_inside("read", places)))

        for way in (_write_alone, _write_batch):
            with counting(disk, disk.node.children["file"].node) as counter:
                way(disk, disk)
                note(counter)
        total = sum(n for _, n in places)
        assert counted == [(total, total)] * 2
