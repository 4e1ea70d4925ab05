"""Tables and clusters that an image uses more often than its file has room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import Limits
from blocklib.errors import ImageCorruptError, ImageLimitError
from tests.damage import COPIED, KiB, MiB
from tests.hostile import bombs
from tests.hostile.bombs import Forge

CLUSTER = 64 * KiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image.qcow2"


def test_an_l1_table_with_more_l2_tables_than_the_file_has_clusters_is_refused_by_name(path: Path) -> None:
    bombs.one_l2_table_everywhere(path, entries=1000)
    with pytest.raises(ImageCorruptError) as caught:
        blocklib.open(path)
    assert caught.value.structure == "L1 table"
    assert caught.value.host_offset == 3 * CLUSTER
    assert (caught.value.expected, caught.value.found) == ("at most 6 L2 tables, a cluster for each", "1000")
    assert blocklib.info(path).virtual_size == 1000 * 512 * MiB
    assert not blocklib.check(path).clean


def test_l2_tables_that_a_file_has_lost_do_not_count(path: Path) -> None:
    forge = Forge(path, size=100 * 512 * MiB)
    data = forge.put(b"x" * CLUSTER)
    l2 = forge.table([data | COPIED])
    forge.l1([l2 | COPIED, *(COPIED | (100 + number) * CLUSTER for number in range(99))])
    forge.finish()
    with blocklib.open(path) as disk:
        assert disk.read(0, 1) == b"x"
        with pytest.raises(ImageCorruptError):
            disk.read(512 * MiB, 1)


def test_the_l1_table_of_a_snapshot_is_held_to_the_same(path: Path) -> None:
    forge = Forge(path, size=1000 * 512 * MiB)
    l2 = forge.table([0])
    forge.l1([0] * 1000)
    other = forge.table([l2] * 1000)
    entry = bombs._snapshot(other, 1000, 1, size=1000 * 512 * MiB)
    forge.fields |= {"snapshots_offset": forge.put(entry), "nb_snapshots": 1}
    forge.finish()
    blocklib.open(path).close()
    with pytest.raises(ImageCorruptError, match="L1 table of snapshot 1"):
        blocklib.open(path, options={"snapshot.name": "1"})


def test_a_refcount_table_with_more_blocks_than_clusters_is_not_converted(path: Path) -> None:
    bombs.one_refcount_block_everywhere(path)
    before = path.read_bytes()
    with blocklib.open(path, "r+") as disk:
        with pytest.raises(ImageCorruptError) as caught:
            blocklib.jobs.amend(disk, options={"refcount_bits": 64}).wait()
        assert caught.value.structure == "refcount table"
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["map", "measure", "convert", "compare", "extents"])
def test_data_that_is_said_to_be_in_the_same_bytes_many_times_ends_a_walk(path: Path, what: str) -> None:
    forge = Forge(path, size=4 * 512 * MiB)
    data = forge.put(b"x" * CLUSTER)
    l2 = forge.table([data], times=CLUSTER // 8)
    forge.l1([l2] * 4)
    forge.finish()
    uses: dict[str, Any] = {
        "map": lambda disk: disk.map(),
        "measure": lambda disk: blocklib.measure(disk, format="qcow2"),
        "convert": lambda disk: blocklib.convert(disk, path.with_suffix(".raw"), format="raw"),
        "compare": lambda disk: blocklib.compare(disk, disk),
        "extents": lambda disk: list(disk.extents()),
    }
    with blocklib.open(path) as disk:
        assert disk.read(512 * MiB, 1) == b"x"
        with pytest.raises(ImageCorruptError, match="are said to lie in"):
            uses[what](disk)
    assert not path.with_suffix(".raw").exists()


def test_header_extensions_are_limited_by_name(path: Path) -> None:
    forge = Forge(path, size=1 * MiB)
    forge.l1([0])
    forge.extensions = [(0x12345678, b"")] * 1025
    forge.finish()
    with pytest.raises(ImageLimitError, match="header_extensions"):
        blocklib.info(path)
    blocklib.open(path, limits=Limits(header_extensions=1025)).close()


def test_bits_of_bitmaps_that_are_set_are_limited_by_name(path: Path) -> None:
    bombs.bitmap_of_half_a_gigabyte(path)
    with blocklib.open(path, "r+") as disk:
        with pytest.raises(ImageLimitError, match="marked_bytes=67108864"):
            disk.bitmaps["first"].dirty_ranges()
        disk.bitmaps["first"].remove()
        disk.bitmaps["second"].remove()


def test_an_inspection_tells_of_too_many_header_extensions(path: Path) -> None:
    bombs.many_extensions(path)
    found = blocklib.inspect(path)
    assert found.limits_exceeded == ("header_extensions",)
    assert not found.safe
