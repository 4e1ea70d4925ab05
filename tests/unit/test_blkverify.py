"""The filter blkverify: what two children do not agree on is an error that says where."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import ImageCorruptError, KiB, MiB, OutOfRangeError
from blocklib.buffers import first_difference
from tests.writers import writing

SIZE = 4 * MiB


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    blocklib.create(tmp_path / "disk.raw", SIZE, format="raw")
    blocklib.create(tmp_path / "disk.qcow2", SIZE, format="qcow2")
    return {
        "driver": "blkverify",
        "raw": {"driver": "raw", "file.driver": "file", "file.filename": str(tmp_path / "disk.raw")},
        "test": {"driver": "qcow2", "file.driver": "file", "file.filename": str(tmp_path / "disk.qcow2")},
    }


def test_both_are_written_and_read(options: dict[str, Any], tmp_path: Path) -> None:
    data = random.Random(3).randbytes(300 * KiB)
    with blocklib.open(options, "r+", discard="unmap") as disk:
        disk.write(12345, data)
        disk.write_zeroes(64 * KiB, 64 * KiB)
        disk.discard(0, 64 * KiB)
        disk.write_batch([0, 4096], b"b" * 8192)
        disk.flush()
        expected = bytearray(disk.read(0, SIZE))
        assert expected[:8192] == b"b" * 8192
        disk.truncate(SIZE + MiB)
        assert disk.size == SIZE + MiB
    with blocklib.open(options["raw"]) as raw, blocklib.open(options["test"]) as test:
        assert raw.read(0, raw.size) == test.read(0, test.size)
    assert (tmp_path / "disk.raw").read_bytes()[:SIZE] == expected


@pytest.mark.parametrize("place", [0, 511, 65_536, 3 * MiB + 7, SIZE - 1])
def test_the_first_byte_that_differs_is_named(options: dict[str, Any], tmp_path: Path, place: int) -> None:
    with blocklib.open(tmp_path / "disk.raw", "r+", format="raw") as raw:
        raw.write(place, b"\x07")
        raw.write(SIZE - 1, b"\x08")
    with blocklib.open(options) as disk:
        with pytest.raises(ImageCorruptError, match=rf"differ at offset {place}\b"):
            disk.read(0, SIZE)
        if place:
            disk.read(0, place)
        with pytest.raises(blocklib.BatchError):
            disk.read_batch([place & -512], 512)


def test_children_of_different_sizes_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with blocklib.open(tmp_path / "disk.qcow2", "r+") as test:
        test.truncate(SIZE + 512)
    with pytest.raises(OutOfRangeError, match="blkverify"):
        blocklib.open(options)


def test_a_file_that_ends_inside_a_sector_is_verified(options: dict[str, Any], tmp_path: Path) -> None:
    options["raw"] = {"driver": "file", "filename": str(tmp_path / "short")}
    (tmp_path / "short").write_bytes(bytes(SIZE - 100))
    with blocklib.open(options, "r+") as disk:
        disk.write(disk.size - 5, b"three")
        assert disk.read(disk.size - 5, 5) == b"three"


def test_a_failing_child_fails_the_write(options: dict[str, Any]) -> None:
    options["test"] |= {"read-only": True}
    with pytest.raises(blocklib.BlocklibError), blocklib.open(options, "r+") as disk:
        disk.write(0, b"x")


def test_writers_and_readers_at_once_see_no_difference_that_is_none(options: dict[str, Any], tmp_path: Path) -> None:
    test = options.pop("test")
    model = bytearray(SIZE)
    with blocklib.open(options["raw"], "r+") as disk:
        verify = disk.insert_filter("blkverify", {"test": test})
        with writing(disk, model, 1) as writers:
            for number in range(300):
                disk.read(number * 8192 % SIZE, 16 * KiB)
            writers.wait_for(50)
        assert disk.read(0, SIZE) == model
        verify.remove()
        disk.write(0, b"raw alone")
    with blocklib.open(tmp_path / "disk.qcow2") as other:
        assert other.read(0, SIZE) == model


def test_the_first_difference_of_buffers() -> None:
    rng = random.Random(1)
    for length in (0, 1, 2, 511, 4096):
        data = rng.randbytes(length)
        assert first_difference(memoryview(data), memoryview(bytearray(data))) is None
        for place in {0, length // 3, length - 1} if length else ():
            other = bytearray(data)
            other[place] ^= 1
            other[-1] ^= 2
            assert first_difference(memoryview(data), memoryview(other)) == place
