"""Growing and shrinking a qcow2 image: what the file says afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

import blocklib
from blocklib import KiB
from blocklib.errors import UsageError


def _image(folder: Path, size: int) -> Path:
    path = folder / "disk.qcow2"
    blocklib.create(path, size, format="qcow2", options={"cluster_size": 512})
    return path


def test_growing_within_the_clusters_of_the_l1_table_lengthens_it(tmp_path: Path) -> None:
    path = _image(tmp_path, 32 * KiB)
    with blocklib.open(path, "r+") as disk:
        for tables in range(2, 8):  # a table of 512 bytes maps 32 KiB, and the L1 table has room for 64
            disk.truncate(tables * 32 * KiB)
            disk.write(disk.size - 1, b"x")
    with blocklib.open(path) as disk:
        assert disk.size == 7 * 32 * KiB
        assert [disk.read(tables * 32 * KiB - 1, 1) for tables in range(1, 8)] == [b"\0", *[b"x"] * 6]


@pytest.mark.parametrize("size", [1, 511, 40 * KiB + 1])
def test_a_size_of_part_of_a_sector_is_refused(size: int, tmp_path: Path) -> None:
    path = _image(tmp_path, 32 * KiB)
    with blocklib.open(path, "r+") as disk:
        with pytest.raises(UsageError):
            disk.truncate(size, shrink=True)
        assert disk.size == 32 * KiB


def test_an_image_can_be_emptied_and_grow_again(tmp_path: Path) -> None:
    path = _image(tmp_path, 100 * KiB)
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"x" * 100 * KiB)
        disk.truncate(0, shrink=True)
        disk.truncate(70 * KiB)
    with blocklib.open(path) as disk:
        assert disk.read(0, disk.size) == bytes(70 * KiB)
