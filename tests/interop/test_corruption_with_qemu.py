"""Images damaged in named ways and then written: blocklib and QEMU mark the same ones corrupt, and respect the mark."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.errors import ImageCorruptError
from tests.programs import Program

CLUSTER = 4 * KiB
COPIED = 1 << 63


class Damaged:
    """An image by QEMU with data at 0 and 1 MiB, and one thing in it changed."""

    def __init__(self, path: Path, qemu_img: Program, qemu_io: Program, compat: str = "1.1") -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size=4k,compat={compat}", path, "64M")
        qemu_io("-c", "write -P 1 0 64k", "-c", "write -P 2 1M 64k", path)
        self.path = path
        self.bytes = bytearray(path.read_bytes())
        self.l1 = self.entry(40)
        self.refcount_table = self.entry(48)
        self.l2 = self.entry(self.l1) & ~COPIED
        self.block = self.entry(self.refcount_table)

    def entry(self, offset: int) -> int:
        return int.from_bytes(self.bytes[offset : offset + 8], "big")

    def put(self, offset: int, entry: int) -> None:
        struct.pack_into(">Q", self.bytes, offset, entry)

    def call_free(self, offset: int) -> None:
        struct.pack_into(">H", self.bytes, self.block + 2 * (offset // CLUSTER), 0)

    def store(self) -> None:
        self.path.write_bytes(self.bytes)


OLD, FRESH, NEW_TABLE = 0, 512 * KiB, 2 * MiB

DAMAGE: dict[str, tuple[int, Callable[[Damaged], None]]] = {
    "data in the L1 table": (OLD, lambda it: it.put(it.l2, COPIED | it.l1)),
    "data in the L2 table": (OLD, lambda it: it.put(it.l2, COPIED | it.l2)),
    "data in the refcount table": (OLD, lambda it: it.put(it.l2, COPIED | it.refcount_table)),
    "data in the refcount block": (OLD, lambda it: it.put(it.l2, COPIED | it.block)),
    "zero cluster in the L1 table": (OLD, lambda it: it.put(it.l2, COPIED | it.l1 | 1)),
    "unaligned data": (OLD, lambda it: it.put(it.l2, it.entry(it.l2) | 0x200)),
    "unaligned zero cluster": (OLD, lambda it: it.put(it.l2, it.entry(it.l2) | 0x201)),
    "unaligned L2 table": (OLD, lambda it: it.put(it.l1, it.entry(it.l1) | 0x200)),
    "unaligned refcount block": (FRESH, lambda it: it.put(it.refcount_table, it.block | 0x200)),
    "header called free": (FRESH, lambda it: it.call_free(0)),
    "L1 table called free": (FRESH, lambda it: it.call_free(it.l1)),
    "L1 table called free, for an L2 table": (NEW_TABLE, lambda it: it.call_free(it.l1)),
    "L2 table called free": (FRESH, lambda it: it.call_free(it.l2)),
    "refcount table called free": (FRESH, lambda it: it.call_free(it.refcount_table)),
    "refcount block called free": (FRESH, lambda it: it.call_free(it.block)),
}


def _is_marked(path: Path, qemu_img: Program) -> bool:
    by_qemu = qemu_img.json("info", path)["format-specific"]["data"]["corrupt"]
    assert blocklib.info(path).format_specific["corrupt"] == by_qemu
    return bool(by_qemu)


@pytest.mark.parametrize("name", DAMAGE)
def test_the_same_write_marks_the_same_image_corrupt(name: str, tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    offset, damage = DAMAGE[name]
    image = Damaged(tmp_path / "image.qcow2", qemu_img, qemu_io)
    damage(image)
    image.store()
    assert "failed" in qemu_io.run("-c", f"write -P 9 {offset} 4k", image.path).stdout
    assert _is_marked(image.path, qemu_img)
    with pytest.raises(ImageCorruptError, match="marked corrupt"):
        blocklib.open(image.path, "r+")
    blocklib.open(image.path).close()

    image.store()
    before = bytes(image.bytes)
    with blocklib.open(image.path, "r+") as disk, pytest.raises(ImageCorruptError):
        disk.write(offset, b"\x09" * CLUSTER)
    assert _is_marked(image.path, qemu_img)
    after = image.path.read_bytes()
    assert after[:72] + before[72:80] + after[80:] == before
    refused = qemu_io.run("-c", "quit", image.path)
    assert "can't open" in refused.stderr
    qemu_io("-r", "-c", "read 16M 4k", image.path)


@pytest.mark.parametrize("name", ["data in the refcount block", "L2 table called free"])
def test_a_repair_clears_the_bit_that_the_other_has_set(
    name: str, tmp_path: Path, qemu_img: Program, qemu_io: Program
) -> None:
    offset, damage = DAMAGE[name]
    image = Damaged(tmp_path / "image.qcow2", qemu_img, qemu_io)
    damage(image)
    image.store()
    with blocklib.open(image.path, "r+") as disk, pytest.raises(ImageCorruptError):
        disk.write(offset, b"\x09" * CLUSTER)
    qemu_img("check", "-q", "-r", "all", image.path, codes=(0, 2))
    if name == "L2 table called free":
        assert not _is_marked(image.path, qemu_img)
        image.store()
        qemu_io.run("-c", f"write -P 9 {offset} 4k", image.path)
        assert _is_marked(image.path, qemu_img)
        blocklib.repair(image.path, "all", format="qcow2")
        assert not _is_marked(image.path, qemu_img)
        with blocklib.open(image.path, "r+") as disk:
            disk.write(offset, b"\x09" * CLUSTER)
    qemu_img("check", "-q", image.path, codes=(0, 2))


def test_version_2_is_refused_without_a_mark(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    image = Damaged(tmp_path / "image.qcow2", qemu_img, qemu_io, "0.10")
    image.put(image.l2, COPIED | image.l1)
    image.store()
    qemu_io.run("-c", "write 0 4k", image.path)
    assert image.path.read_bytes() == image.bytes
    with blocklib.open(image.path, "r+") as disk:
        for offset in (0, 1 * MiB):
            with pytest.raises(ImageCorruptError):
                disk.write(offset, b"z")
    assert image.path.read_bytes() == image.bytes


@pytest.mark.parametrize("name", ["data in the L1 table", "data in the refcount block", "data in the refcount table"])
@pytest.mark.parametrize(
    "options",
    [
        "overlap-check=none",
        "overlap-check=constant",
        "overlap-check.template=none,overlap-check.active-l1=on",
        "overlap-check.active-l1=off",
    ],
)
def test_the_options_mean_what_they_mean_in_qemu(
    name: str, options: str, tmp_path: Path, qemu_img: Program, qemu_io: Program
) -> None:
    offset, damage = DAMAGE[name]
    image = Damaged(tmp_path / "image.qcow2", qemu_img, qemu_io)
    damage(image)
    image.store()
    qemu_io.run("-c", f"write -P 9 {offset} 4k", "--image-opts", f"driver=qcow2,file.filename={image.path},{options}")
    by_qemu = image.path.read_bytes()
    image.store()
    given = blocklib.parse_options(options)
    try:
        with blocklib.open(image.path, "r+", options=given) as disk:
            disk.write(offset, b"\x09" * CLUSTER)
    except ImageCorruptError:
        assert by_qemu[79] == 2
    else:
        assert by_qemu[79] == 0
    assert image.path.read_bytes() == by_qemu


@pytest.mark.parametrize(
    "options",
    ["overlap-check=some", "overlap-check.template=some", "overlap-check.foo=on", "overlap-check.active-l1=maybe"],
)
def test_bad_values_are_refused_by_both(options: str, tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    image = Damaged(tmp_path / "image.qcow2", qemu_img, qemu_io)
    done = qemu_io.run("-c", "quit", "--image-opts", f"driver=qcow2,file.filename={image.path},{options}")
    assert "can't open" in done.stderr
    with pytest.raises(blocklib.OptionError):
        blocklib.open(image.path, options=blocklib.parse_options(options))
