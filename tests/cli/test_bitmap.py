"""``bitmap``, and the bitmaps of ``info``, ``convert`` and ``measure``, as qemu-img has them."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import CommandLine
from tests.programs import Program


@pytest.fixture
def image(qemu_img: Program, qemu_io: Program, here: Path) -> str:
    """An image with the bitmaps `on` (a MiB of it dirty) and `off` (4 KiB, disabled)."""
    qemu_img("create", "-q", "-f", "qcow2", "image", "64M")
    qemu_img("bitmap", "--add", "image", "on")
    qemu_img("bitmap", "--add", "--disable", "-g", "4k", "image", "off")
    qemu_io("-f", "qcow2", "-c", "write 2M 1M", "image")
    return "image"


def break_first(name: str) -> None:
    """Set the in-use flag of the first bitmap."""
    data = bytearray(Path(name).read_bytes())
    extension = data.index(struct.pack(">II", 0x23852875, 24))
    directory = struct.unpack_from(">Q", data, extension + 24)[0]
    data[directory + 15] |= 1
    Path(name).write_bytes(data)


def bitmaps_in(qemu_img: Program, name: str) -> Any:
    return qemu_img.json("info", name)["format-specific"]["data"].get("bitmaps")


def without_names(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(("image:", "disk size:")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--add", "image", "new"],
        ["--add", "-g", "512", "image", "new"],
        ["--add", "--granularity=2G", "image", "new"],
        ["--add", "-g", "0", "image", "new"],
        ["--add", "--disable", "image", "new"],
        ["--add", "--disable", "--enable", "image", "new"],
        ["--add", "--merge", "on", "--merge", "off", "image", "new"],
        ["--add", "--merge=on", "-g", "1M", "image", "new"],
        ["--remove", "image", "on"],
        ["--remove", "--add", "-g", "8k", "image", "on"],
        ["--add", "--remove", "image", "new"],
        ["--clear", "image", "on"],
        ["--disable", "image", "on"],
        ["--enable", "image", "off"],
        ["--enable", "image", "on"],
        ["--merge", "on", "image", "off"],
        ["--merge", "on", "image", "on"],
        ["image", "--merge", "on", "-f", "qcow2", "off", "--disable", "--clear"],
        ["--image-opts", "--clear", "driver=qcow2,file.filename=image", "on"],
        ["--add", "--merge", "on", "-b", "other", "-F", "qcow2", "image", "new"],
        ["--add", "--merge", "on", "--source-file=other", "--source-format=qcow2", "image", "new"],
    ],
    ids=" ".join,
)
def test_actions_do_what_they_do_in_qemu_img(
    blocklib: CommandLine, qemu_img: Program, image: str, arguments: list[str]
) -> None:
    shutil.copy(image, "other")
    shutil.copy(image, "before")
    qemu_img("bitmap", *arguments)
    Path(image).rename("theirs")
    Path("before").rename(image)
    assert blocklib("bitmap", *arguments) == ""
    assert bitmaps_in(qemu_img, image) == bitmaps_in(qemu_img, "theirs")
    assert without_names(blocklib("info", image)) == without_names(qemu_img("info", image))
    assert blocklib.json("info", image)["format-specific"] == qemu_img.json("info", image)["format-specific"]
    assert "No errors" in qemu_img("check", image)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--add", "image", "on"], "already"),
        (["--remove", "image", "none"], "none"),
        (["--clear", "image", "none"], "none"),
        (["--enable", "image", "none"], "none"),
        (["--disable", "image", "none"], "none"),
        (["--merge", "none", "image", "on"], "none"),
        (["--merge", "on", "image", "none"], "none"),
        (["--add", "-g", "1000", "image", "new"], "1000"),
        (["--add", "-g", "256", "image", "new"], "256"),
        (["--add", "-g", "4G", "image", "new"], "power of two"),
        (["--add", "-g", "foo", "image", "new"], "foo"),
        (["--add", "image", ""], "name"),
        (["--add", "image", "n" * 1024], "1023"),
        (["-g", "4k", "--clear", "image", "on"], "--add"),
        (["-b", "other", "--clear", "image", "on"], "--merge"),
        (["-F", "qcow2", "--merge", "off", "image", "on"], "-b"),
        (["image", "on"], "nothing to do"),
        (["--add", "image"], "name"),
        (["--add", "image", "a", "b"], "name"),
        (["--add", "missing", "new"], "missing"),
        (["--add", "-f", "raw", "image", "new"], "raw"),
        (["--merge", "on", "-b", "missing", "image", "off"], "missing"),
        (["--merge", "on", "-b", "other", "-F", "raw", "image", "off"], "on"),
        (["--merge", "on", "-b", "larger", "-F", "qcow2", "image", "off"], "67108864"),
        (["--merge", "broken", "image", "on"], "inconsistent"),
        (["--add", "--clear", "--merge", "none", "image", "new"], "none"),
        (["--image-opts", "-f", "qcow2", "--clear", "driver=qcow2,file.filename=image", "on"], "--image-opts"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_leaves_the_image_as_it_is(
    blocklib: CommandLine, qemu_img: Program, image: str, arguments: list[str], told: str
) -> None:
    shutil.copy(image, "other")
    shutil.copy(image, "larger")
    qemu_img("resize", "-q", "larger", "128M")
    qemu_img("bitmap", "--remove", "--add", image, "off")
    qemu_img("bitmap", "--add", image, "broken")
    data = bytearray(Path(image).read_bytes())
    extension = data.index(struct.pack(">II", 0x23852875, 24))
    directory = struct.unpack_from(">Q", data, extension + 24)[0]
    place = data.index(b"broken", directory) - 24
    data[place + 15] |= 1
    Path(image).write_bytes(data)
    assert told in blocklib.fails("bitmap", *arguments)
    assert Path(image).read_bytes() == data
    assert qemu_img.run("bitmap", *arguments).returncode == 1


def test_an_image_of_version_2_stores_no_bitmaps(blocklib: CommandLine, qemu_img: Program, here: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "image", "1M")
    before = Path("image").read_bytes()
    assert "0.10" in blocklib.fails("bitmap", "--add", "image", "b")
    assert Path("image").read_bytes() == before


def test_a_broken_bitmap_is_listed_and_can_only_be_removed(blocklib: CommandLine, qemu_img: Program, image: str) -> None:
    break_first(image)
    assert without_names(blocklib("info", image)) == without_names(qemu_img("info", image))
    before = Path(image).read_bytes()
    for action in ("--clear", "--enable", "--disable", "--merge=off"):
        assert "inconsistent" in blocklib.fails("bitmap", action, image, "on")
    assert Path(image).read_bytes() == before
    blocklib("bitmap", "--remove", image, "on")
    assert bitmaps_in(qemu_img, image) == [{"flags": [], "name": "off", "granularity": 4096}]
    assert "No errors" in qemu_img("check", image)


# -- convert -----------------------------------------------------------------------------------------------------------


def test_convert_takes_bitmaps_along(blocklib: CommandLine, qemu_img: Program, image: str) -> None:
    qemu_img("bitmap", "--merge", "on", image, "off")
    blocklib("convert", "-O", "qcow2", "--bitmaps", image, "ours")
    qemu_img("convert", "-O", "qcow2", "--bitmaps", image, "theirs")
    assert bitmaps_in(qemu_img, "ours") == bitmaps_in(qemu_img, "theirs") == bitmaps_in(qemu_img, image)
    assert "No errors" in qemu_img("check", "ours")
    import blocklib as library

    with library.open("ours") as ours, library.open("theirs") as theirs:
        for bitmap in theirs.bitmaps:
            found = ours.bitmaps[bitmap.name].dirty_ranges().tolist()
            assert found == bitmap.dirty_ranges().tolist() == [(2 << 20, 1 << 20)]


def test_convert_into_an_image_that_is_there(blocklib: CommandLine, qemu_img: Program, image: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "target", "64M")
    blocklib("convert", "-n", "-O", "qcow2", "--bitmaps", image, "target")
    assert bitmaps_in(qemu_img, "target") == bitmaps_in(qemu_img, image)
    assert "already" in blocklib.fails("convert", "-n", "-O", "qcow2", "--bitmaps", image, "target")
    assert bitmaps_in(qemu_img, "target") == bitmaps_in(qemu_img, image)
    assert "No errors" in qemu_img("check", "target")
    qemu_img("create", "-q", "-f", "qcow2", "larger", "128M")
    assert "67108864" in blocklib.fails("convert", "-n", "-O", "qcow2", "--bitmaps", image, "larger")
    assert bitmaps_in(qemu_img, "larger") is None


def test_convert_skips_broken_bitmaps_only_when_told(blocklib: CommandLine, qemu_img: Program, image: str) -> None:
    break_first(image)
    assert "inconsistent" in blocklib.fails("convert", "-O", "qcow2", "--bitmaps", image, "ours")
    assert not Path("ours").exists()
    result = blocklib.run("convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", image, "ours")
    assert result.code == 0
    assert result.err.startswith("blocklib: warning: ")
    assert "'on'" in result.err
    assert [bitmap["name"] for bitmap in bitmaps_in(qemu_img, "ours")] == ["off"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-O", "raw", "--bitmaps", "image", "ours"],
        ["-O", "qcow2", "-o", "compat=0.10", "--bitmaps", "image", "ours"],
        ["-O", "qcow2", "--bitmaps", "image", "image", "ours"],
        ["-O", "qcow2", "--skip-broken-bitmaps", "image", "ours"],
        ["-O", "qcow2", "-f", "raw", "--bitmaps", "image", "ours"],
    ],
    ids=" ".join,
)
def test_convert_says_where_bitmaps_cannot_go_and_makes_nothing(
    blocklib: CommandLine, qemu_img: Program, image: str, arguments: list[str]
) -> None:
    assert "bitmap" in blocklib.fails("convert", *arguments)
    assert not Path("ours").exists()
    assert qemu_img.run("convert", *arguments).returncode == 1


# -- measure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=64k", "cluster_size=2M", "compat=0.10"])
def test_measure_counts_bitmaps(blocklib: CommandLine, qemu_img: Program, image: str, options: str) -> None:
    for granularity in (512, 65536):
        for length in (1, 40, 200):
            qemu_img("bitmap", "--add", "-g", granularity, image, f"{granularity}".ljust(length, "x")[-length:] + str(length))
    arguments = ("measure", "-O", "qcow2", "-o", options, image)
    assert blocklib.json(*arguments) == qemu_img.json(*arguments)
    assert blocklib(*arguments) == qemu_img(*arguments)


def test_measure_counts_broken_bitmaps_and_none_of_what_is_below(
    blocklib: CommandLine, qemu_img: Program, image: str
) -> None:
    break_first(image)
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", "overlay")
    for name in (image, "overlay"):
        assert blocklib.json("measure", "-O", "qcow2", name) == qemu_img.json("measure", "-O", "qcow2", name)
        assert blocklib.json("measure", "-O", "raw", name) == qemu_img.json("measure", "-O", "raw", name)
