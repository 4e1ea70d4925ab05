"""The filter compress, and compressed clusters that pass other filters."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, UnsupportedFeatureError
from tests.writers import writing

SIZE = 4 * MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2")
    return path


def _compressing(path: Path, driver: str = "qcow2") -> dict[str, Any]:
    return {"driver": "compress", "file": {"driver": driver, "file": {"driver": "file", "filename": str(path)}}}


def _compressed(path: Path) -> list[tuple[int, int]]:
    with blocklib.open(path, format="qcow2", references="allow") as disk:
        return [(extent.offset, extent.length) for extent in disk.extents() if extent.compressed]


def test_whole_clusters_and_parts_of_new_ones_are_compressed(path: Path) -> None:
    with blocklib.open(_compressing(path), "r+") as disk:
        disk.write(0, b"a" * 128 * KiB)
        disk.write(200 * KiB, b"b" * 100 * KiB)
        disk.write(SIZE - 10, b"c" * 10)
        assert disk.read(0, 128 * KiB) == b"a" * 128 * KiB
        assert disk.read(192 * KiB, 128 * KiB) == bytes(8 * KiB) + b"b" * 100 * KiB + bytes(20 * KiB)
    assert _compressed(path) == [(0, 128 * KiB), (192 * KiB, 128 * KiB), (SIZE - 64 * KiB, 64 * KiB)]
    assert blocklib.check(path, format="qcow2").clean


def test_what_has_a_place_is_written_over_as_it_is(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(64 * KiB, b"x" * 64 * KiB)
    with blocklib.open(_compressing(path), "r+") as disk:
        disk.write(0, b"a" * 192 * KiB)
        disk.write(5, b"again")
    assert _compressed(path) == [(128 * KiB, 64 * KiB)]
    with blocklib.open(path) as disk:
        assert disk.read(0, 192 * KiB) == b"a" * 5 + b"again" + b"a" * (192 * KiB - 10)
    assert blocklib.check(path, format="qcow2").clean


def test_a_new_cluster_is_completed_with_what_lies_below(path: Path, tmp_path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"base" * 32 * KiB)
    top = tmp_path / "top.qcow2"
    blocklib.create(top, format="qcow2", backing=path, backing_format="qcow2")
    with blocklib.open(_compressing(top), "r+", format="compress", references="allow") as disk:
        disk.write(70_000, b"top!")
        expected = bytearray(b"base" * 32 * KiB)
        expected[70_000:70_004] = b"top!"
        assert disk.read(0, len(expected)) == expected
    assert blocklib.check(top, format="qcow2").clean
    with blocklib.open(top, format="qcow2", backing=None) as disk:
        assert [(extent.offset, extent.compressed) for extent in disk.extents() if extent.present] == [(64 * KiB, True)]


def test_what_cannot_be_compressed_is_written_plainly(path: Path) -> None:
    noise = random.Random(1).randbytes(128 * KiB)
    with blocklib.open(_compressing(path), "r+") as disk:
        disk.write(0, noise[: 64 * KiB] + b"z" * 64 * KiB + noise[64 * KiB :])
        assert disk.read(0, 192 * KiB) == noise[: 64 * KiB] + b"z" * 64 * KiB + noise[64 * KiB :]
    assert _compressed(path) == [(64 * KiB, 64 * KiB)]


def test_zeroed_and_discarded_clusters_are_compressed_when_they_come_back(path: Path) -> None:
    with blocklib.open(_compressing(path), "r+", discard="unmap") as disk:
        disk.write(0, b"a" * 128 * KiB)
        disk.write_zeroes(0, 64 * KiB, unmap=True)
        disk.discard(64 * KiB, 64 * KiB)
        disk.flush()
        disk.write(0, b"b" * 128 * KiB)
        assert disk.read(0, 128 * KiB) == b"b" * 128 * KiB
    assert _compressed(path) == [(0, 128 * KiB)]


def test_an_image_that_compresses_nothing_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    blocklib.create(raw, SIZE, format="raw")
    with pytest.raises(UnsupportedFeatureError, match="compressed"):
        blocklib.open(_compressing(raw, "raw"), "r+")
    with blocklib.open(raw, "r+", format="raw") as disk:
        with pytest.raises(UnsupportedFeatureError, match="compressed"):
            disk.insert_filter("compress", {})
        disk.write(0, b"still works")


def test_parts_of_one_cluster_written_by_many_threads_are_all_there(path: Path) -> None:
    with blocklib.open(_compressing(path), "r+") as disk:
        start = threading.Barrier(8)

        def work(number: int) -> None:
            start.wait(30)
            for cluster in range(16):
                disk.write(cluster * 64 * KiB + number * 8 * KiB, bytes([number + 1]) * 8 * KiB)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        expected = b"".join(bytes([number + 1]) * 8 * KiB for number in range(8)) * 16
        assert disk.read(0, MiB) == expected
    assert blocklib.check(path, format="qcow2").clean


def test_writers_do_not_notice_the_filter(path: Path) -> None:
    model = bytearray(SIZE)
    with blocklib.open(path, "r+", format="qcow2", discard="unmap") as disk:
        with writing(disk, model, 3) as writers:
            for _ in range(10):
                compress = disk.insert_filter("compress", {})
                writers.wait_for(10)
                compress.remove()
        assert disk.read(0, SIZE) == model
    assert blocklib.check(path, format="qcow2").clean


def test_what_comes_compressed_already_passes(path: Path) -> None:
    with blocklib.open(_compressing(path), "r+") as disk:
        disk.write_compressed(64 * KiB, b"p" * 128 * KiB)
        assert disk.read(64 * KiB, 128 * KiB) == b"p" * 128 * KiB
    assert _compressed(path) == [(64 * KiB, 128 * KiB)]
