"""Dirty bitmaps between blocklib and QEMU, both directions: the same states, and images that qemu-img check finds clean."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import GiB, KiB, MiB
from tests.programs import Program, find_program

Ranges = list[tuple[int, int]]


@pytest.fixture
def seen(qemu_nbd: Program, tmp_path: Path) -> Callable[[Path, str], Ranges]:
    """The dirty ranges of a stored bitmap as QEMU serves them."""
    nbdinfo = find_program("nbdinfo")
    assert nbdinfo is not None

    def ranges(image: Path, name: str) -> Ranges:
        context = f"qemu:dirty-bitmap:{name}"
        # nbdinfo starts the server itself and ends it.
        server = [qemu_nbd.path, "-r", "-f", "qcow2", "-B", name, str(image)]
        command = [nbdinfo, "--json", f"--map={context}", "--", "[", *server, "]"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return [(part["offset"], part["length"]) for part in json.loads(done.stdout) if part["type"]]

    return ranges


pytestmark = pytest.mark.requires("nbdinfo", "qemu-nbd", "qemu-img", "qemu-io")


def ours(image: Path, name: str) -> Ranges:
    with blocklib.open(image) as disk:
        return list(map(tuple, disk.bitmaps[name].dirty_ranges().tolist()))


def info_of(qemu_img: Program, image: Path) -> Any:
    return qemu_img.json("info", image)["format-specific"]["data"].get("bitmaps")


def our_info_of(image: Path) -> Any:
    return blocklib.info(image).format_specific.get("bitmaps")


WRITES: list[tuple[int, int]] = [(0, 512), (1 * MiB + 512, 70000), (9 * MiB, 3 * MiB), (63 * MiB + 65024, 512)]


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MiB])
@pytest.mark.parametrize("granularity", [512, 65536, 2 * GiB])
def test_qemu_sees_what_we_noted(
    cluster_size: int, granularity: int, tmp_path: Path, qemu_img: Program, seen: Callable[[Path, str], Ranges]
) -> None:
    image = tmp_path / "a.qcow2"
    blocklib.create(image, 64 * MiB + 512, format="qcow2", options={"cluster_size": cluster_size})
    with blocklib.open(image, "r+") as disk:
        disk.bitmaps.add("b", granularity=granularity, persistent=True)
        disk.bitmaps.add("idle", persistent=True, enabled=False)
        for offset, length in WRITES:
            disk.write(offset, b"x" * length)
    assert "No errors" in qemu_img("check", image)
    assert seen(image, "b") == ours(image, "b") != []
    assert seen(image, "idle") == ours(image, "idle") == []
    assert info_of(qemu_img, image) == our_info_of(image)


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("granularity", [512, 4096])
def test_we_see_what_qemu_noted(
    cluster_size: int, granularity: int, tmp_path: Path, qemu_img: Program, qemu_io: Program,
    seen: Callable[[Path, str], Ranges],
) -> None:  # fmt: skip
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", image, 64 * MiB + 512)
    qemu_img("bitmap", "--add", "-g", granularity, image, "b")
    qemu_img("bitmap", "--add", "--disable", image, "idle")
    for offset, length in WRITES:
        qemu_io("-c", f"write {offset} {length}", image)
    assert ours(image, "b") == seen(image, "b") != []
    assert ours(image, "idle") == []
    assert our_info_of(image) == info_of(qemu_img, image)


def test_both_write_in_turn_and_lose_nothing(
    tmp_path: Path, qemu_img: Program, qemu_io: Program, seen: Callable[[Path, str], Ranges]
) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "256M")
    qemu_img("bitmap", "--add", "-g", "64k", image, "b")
    qemu_img("bitmap", "--add", "-g", "1M", "--disable", image, "other")
    expected: Ranges = []
    for turn in range(6):
        offset = turn * 2 * MiB
        if turn % 2:
            qemu_io("-c", f"write {offset} 64k", image)
        else:
            with blocklib.open(image, "r+") as disk:
                disk.write(offset, b"y" * 65536)
        expected.append((offset, 65536))
        assert seen(image, "b") == ours(image, "b") == expected
        assert "No errors" in qemu_img("check", image)
    with blocklib.open(image, "r+") as disk:
        disk.bitmaps["other"].merge(disk.bitmaps["b"])
        disk.bitmaps["b"].clear()
        disk.truncate(300 * MiB)
    assert seen(image, "other") == [(turn * 2 * MiB, MiB) for turn in range(6)]
    assert seen(image, "b") == []
    qemu_img("bitmap", "--merge", "other", image, "b")
    assert ours(image, "b") == seen(image, "b")
    with blocklib.open(image, "r+") as disk:
        for bitmap in disk.bitmaps:
            bitmap.remove()
    assert info_of(qemu_img, image) is None
    assert "No errors" in qemu_img("check", image)


def test_whole_clusters_of_bits_that_are_set_need_no_space(
    tmp_path: Path, qemu_img: Program, seen: Callable[[Path, str], Ranges]
) -> None:
    image = tmp_path / "a.qcow2"
    blocklib.create(image, 64 * MiB, format="qcow2", options={"cluster_size": 512})
    with blocklib.open(image, "r+") as disk:
        disk.write_zeroes(1 * MiB, 40 * MiB)
    before = image.stat().st_size
    with blocklib.open(image, "r+") as disk:
        disk.bitmaps.add("b", granularity=512, persistent=True)
        disk.write_zeroes(1 * MiB, 40 * MiB)
    assert seen(image, "b") == ours(image, "b") == [(1 * MiB, 40 * MiB)]
    assert image.stat().st_size - before <= 2 * KiB  # 10 KiB of bits, in a table of 32 entries
    assert "No errors" in qemu_img("check", image)


def test_many_bitmaps_and_long_names(tmp_path: Path, qemu_img: Program) -> None:
    image = tmp_path / "a.qcow2"
    blocklib.create(image, 1 * MiB, format="qcow2", options={"cluster_size": 512})
    names = [f"{number:03}" + "ä" * (number % 511) for number in range(200)]
    with blocklib.open(image, "r+") as disk:
        for name in names:
            disk.bitmaps.add(name, persistent=True)
    assert "No errors" in qemu_img("check", image)
    assert [bitmap["name"] for bitmap in info_of(qemu_img, image)] == names
    assert our_info_of(image) == info_of(qemu_img, image)


def _flags(image: Path, flags: int) -> None:
    """Set the flags of the first bitmap."""
    data = bytearray(image.read_bytes())
    extension = data.index(struct.pack(">II", 0x23852875, 24))
    directory = struct.unpack_from(">Q", data, extension + 24)[0]
    struct.pack_into(">I", data, directory + 12, flags)
    image.write_bytes(data)


def test_a_bitmap_in_use_stays_as_it_is_until_it_is_removed(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "broken")
    qemu_img("bitmap", "--add", image, "sound")
    qemu_io("-c", "write 0 64k", image)
    _flags(image, 3)
    with blocklib.open(image, "r+") as disk:
        broken, sound = disk.bitmaps
        assert (broken.inconsistent, broken.recording, broken.count) == (True, False, 0)
        for refused in (
            broken.clear, broken.enable, broken.disable, broken.dirty_ranges, lambda: broken.merge(sound),
            lambda: sound.merge(broken), lambda: disk.truncate(32 * MiB),
        ):  # fmt: skip
            with pytest.raises(blocklib.UsageError, match="inconsistent"):
                refused()
        assert disk.size == 16 * MiB
        disk.write(1 * MiB, b"x")
    assert info_of(qemu_img, image) == our_info_of(image)
    assert [bitmap["flags"] for bitmap in our_info_of(image)] == [["in-use", "auto"], ["auto"]]
    assert ours(image, "sound") == [(0, 65536), (1 * MiB, 65536)]
    assert "No errors" in qemu_img("check", image)
    with blocklib.open(image, "r+") as disk:
        disk.bitmaps["broken"].remove()
    assert "No errors" in qemu_img("check", image)
    assert [bitmap["name"] for bitmap in info_of(qemu_img, image)] == ["sound"]


def test_bitmaps_that_a_program_without_them_left_behind_are_dropped_as_qemu_does(tmp_path: Path, qemu_img: Program) -> None:
    image, theirs = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "b")
    data = bytearray(image.read_bytes())
    data[88:96] = bytes(8)
    image.write_bytes(data)
    theirs.write_bytes(data)
    assert info_of(qemu_img, image) == our_info_of(image) is None
    with blocklib.open(image) as disk:
        assert len(disk.bitmaps) == 0
    assert image.read_bytes() == data
    with blocklib.open(image, "r+") as disk:
        assert len(disk.bitmaps) == 0
    qemu_img("resize", "-q", theirs, "16M")
    assert b"\x23\x85\x28\x75" not in image.read_bytes()[:512]
    assert qemu_img("check", image, codes=(3,)) == qemu_img("check", theirs, codes=(3,))


@contextmanager
def left_open(image: Path) -> Iterator[blocklib.Disk]:
    """A disk that is left as a crash leaves it: nothing more is written."""
    disk = blocklib.open(image, "r+")
    try:
        yield disk
    finally:
        disk.abandon()


def test_a_disk_that_was_not_closed_leaves_its_bitmaps_in_use(tmp_path: Path, qemu_img: Program) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "on")
    qemu_img("bitmap", "--add", "--disable", image, "off")
    qemu_img("bitmap", "--add", "--disable", image, "changed")
    with left_open(image) as disk:
        disk.bitmaps["changed"].merge(disk.bitmaps["off"])
        disk.write(0, b"x")
        disk.flush()
    assert {b["name"]: "in-use" in b["flags"] for b in info_of(qemu_img, image)} == {"on": True, "off": False, "changed": True}
    assert "No errors" in qemu_img("check", image)


def test_without_a_write_nothing_is_in_use(tmp_path: Path, qemu_img: Program) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "b")
    before = image.read_bytes()
    with left_open(image) as disk:
        disk.bitmaps["b"].clear()
        disk.bitmaps["b"].disable()
    assert image.read_bytes() == before


def _put(host_offset: Callable[[int, int], int], raw: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        extension = data.index(struct.pack(">II", 0x23852875, 24)) + 8
        directory = struct.unpack_from(">Q", data, extension + 16)[0]
        offset = host_offset(extension, directory)
        data[offset : offset + len(raw)] = raw

    return change


MALFORMED = {
    "no bitmaps": _put(lambda e, d: e, struct.pack(">I", 0)),
    "one too many": _put(lambda e, d: e, struct.pack(">I", 3)),
    "one too few": _put(lambda e, d: e, struct.pack(">I", 1)),
    "reserved": _put(lambda e, d: e + 4, b"\1"),
    "directory too long": _put(lambda e, d: e + 8, struct.pack(">Q", 72)),
    "directory behind the end": _put(lambda e, d: e + 16, struct.pack(">Q", 1 << 40)),
    "directory not aligned": _put(lambda e, d: e + 16, struct.pack(">Q", 512)),
    "unknown flag": _put(lambda e, d: d + 12, struct.pack(">I", 10)),
    "unknown type that is enabled": _put(lambda e, d: d + 16, b"\2"),
    "granularity of 256 that is enabled": _put(lambda e, d: d + 17, b"\x08"),
    "extra data that is enabled": _put(lambda e, d: d + 20, struct.pack(">I", 1)),
    "a table too long": _put(lambda e, d: d + 8, struct.pack(">I", 2)),
    "two of one name": _put(lambda e, d: d + 32 + 24, b"a"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_qemu_refuses_we_do_not_write_and_say_why(name: str, tmp_path: Path, qemu_img: Program) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "a")
    qemu_img("bitmap", "--add", image, "b")
    data = bytearray(image.read_bytes())
    MALFORMED[name](data)
    image.write_bytes(data)
    assert qemu_img.run("bitmap", "--clear", image, "b").returncode == 1
    with pytest.raises(blocklib.ImageError) as caught:
        blocklib.open(image, "r+")
    assert "bitmap" in str(caught.value)
    assert image.read_bytes() == data
    with blocklib.open(image) as disk:  # its data can be had
        assert disk.read(0, 512) == bytes(512)


def test_a_damaged_table_refuses_writes_and_lets_the_bitmap_be_removed(tmp_path: Path, qemu_img: Program) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "a")
    data = bytearray(image.read_bytes())
    extension = data.index(struct.pack(">II", 0x23852875, 24)) + 8
    directory = struct.unpack_from(">Q", data, extension + 16)[0]
    table = struct.unpack_from(">Q", data, directory)[0]
    for entry in (struct.pack(">Q", 2), struct.pack(">Q", 1 << 50)):
        data[table : table + 8] = entry
        image.write_bytes(data)
        with blocklib.open(image, "r+") as disk:
            with pytest.raises(blocklib.ImageCorruptError, match="bitmap table"):
                disk.write(0, b"x")
            assert disk.read(0, 512) == bytes(512)
        assert image.read_bytes() == data
    with blocklib.open(image, "r+") as disk:
        disk.bitmaps["a"].remove()
        disk.write(0, b"x")
    assert qemu_img.run("check", image).returncode in (0, 3)
    assert info_of(qemu_img, image) is None


@pytest.mark.parametrize("loaded", [False, True])
def test_a_repair_of_an_open_disk_that_drops_a_bitmap_is_followed(loaded: bool, tmp_path: Path, qemu_img: Program) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "a")
    qemu_img("bitmap", "--add", image, "b")
    data = bytearray(image.read_bytes())
    extension = data.index(struct.pack(">II", 0x23852875, 24)) + 8
    directory = struct.unpack_from(">Q", data, extension + 16)[0]
    table = struct.unpack_from(">Q", data, directory)[0]
    with blocklib.open(image, "r+") as disk:
        if loaded:
            disk.write(0, b"x")
        with image.open("r+b") as file:
            file.seek(table)
            file.write(struct.pack(">Q", 2))
        blocklib.repair(disk, what="all")
        assert {bitmap.name for bitmap in disk.bitmaps} == ({"a", "b"} if loaded else {"b"})
        disk.write(1 * MiB, b"x")
    assert "No errors" in qemu_img("check", image)
    assert ours(image, "b") == [*([(0, 65536)] if loaded else []), (1 * MiB, 65536)]
    assert [bitmap["flags"] for bitmap in info_of(qemu_img, image)] == [["auto"]] * (1 + loaded)
