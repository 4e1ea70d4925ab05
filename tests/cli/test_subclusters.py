"""Images with subclusters on the command line: what is said of them is qemu-img's, and so is what ends up in their entries."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.programs import Program

SUB = 2048
"""Bytes of one of the 32 subclusters of a cluster of 64 KiB."""


def entries(name: str, n: int = 40) -> list[tuple[bool, str, str]]:
    """Of the first guest clusters: whether there is a host cluster, the allocated subclusters and the zero ones."""
    image = Path(name).read_bytes()
    (l1,) = struct.unpack_from(">Q", image, 40)
    l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FF_FFFF_FFFF_FE00
    pairs = struct.iter_unpack(">QQ", image[l2 : l2 + 16 * n] if l2 else bytes(16 * n))
    return [(entry & 0x00FF_FFFF_FFFF_FE00 != 0, f"{word & 0xFFFF_FFFF:08x}", f"{word >> 32:08x}") for entry, word in pairs]


def script(*commands: str) -> list[str]:
    return [word for command in commands for word in ("-c", command)]


@pytest.fixture
def base(qemu_img: Program, qemu_io: Program, here: Path) -> str:
    qemu_img("create", "-q", "-f", "raw", "base.raw", "2M")
    qemu_io("-f", "raw", "-c", "write -P 187 0 2M", "base.raw")
    return "base.raw"


CREATIONS = (
    ["-o", "extended_l2=on", "1M"],
    ["-o", "extended_l2=on,cluster_size=16k", "1M"],
    ["-o", "extended_l2=on,preallocation=metadata", "1M"],
    ["-o", "extended_l2=on,preallocation=falloc,cluster_size=2M", "5M"],
    ["-o", "extended_l2=on,preallocation=full", "1000k"],
    ["-o", "extended_l2=on", "-b", "base.raw", "-F", "raw"],
    ["-o", "extended_l2=on,preallocation=metadata", "-b", "base.raw", "-F", "raw"],
    ["-o", "extended_l2=on,preallocation=falloc", "-b", "base.raw", "-F", "raw", "3M"],
    ["-o", "extended_l2=on,preallocation=full", "-b", "base.raw", "-F", "raw", "1M"],
)


@pytest.mark.parametrize("arguments", CREATIONS, ids=lambda arguments: ",".join(arguments[1:]))
def test_images_are_created_as_by_qemu_img(
    blocklib: CommandLine, qemu_img: Program, base: str, arguments: list[str]
) -> None:
    *options, size = arguments if arguments[-1] != "raw" else [*arguments, ""]
    place = [size] if size else []
    said = qemu_img("create", "-f", "qcow2", *options, "image", *place)
    theirs = qemu_img("info", "image"), qemu_img.json("map", "image"), entries("image")
    assert blocklib("create", "-f", "qcow2", *options, "image", *place) == said
    qemu_img("check", "image")
    # The space that a file takes on its host is the file system's business.
    assert [line for line in qemu_img("info", "image").split("\n") if "disk size" not in line] == [
        line for line in theirs[0].split("\n") if "disk size" not in line
    ]
    assert blocklib("info", "image") == qemu_img("info", "image")
    assert blocklib.json("info", "image")["format-specific"]["data"]["extended-l2"] is True
    assert blocklib.json("map", "image") == qemu_img.json("map", "image")
    ours = qemu_img.json("map", "image")
    assert [{**extent, "offset": 0} for extent in ours] == [{**extent, "offset": 0} for extent in theirs[1]]
    assert entries("image") == theirs[2]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["-o", "extended_l2=on,cluster_size=8k", "image", "1M"], "16384"),
        (["-o", "extended_l2=on,compat=0.10", "image", "1M"], "compat=1.1"),
        (["-o", "extended_l2=perhaps", "image", "1M"], "perhaps"),
        (["-o", "preallocation=metadata", "-b", "base.raw", "-F", "raw", "image"], "extended_l2"),
    ],
)
def test_what_cannot_be_created_is_one_line_and_no_file(
    blocklib: CommandLine, qemu_img: Program, base: str, arguments: list[str], part: str
) -> None:
    assert qemu_img.run("create", "-f", "qcow2", *arguments).returncode == 1
    Path("image").unlink(missing_ok=True)
    assert part in blocklib.fails("create", "-f", "qcow2", *arguments)
    assert not Path("image").exists()


SCRIPTS = {
    "partial writes": ("write -P 1 3k 1k", "write -P 2 70k 2k", "write -P 3 127k 3k", "write -P 4 100k 1k"),
    "whole clusters": ("write -P 1 60k 200k", "write -P 2 62k 4k", "write -P 3 512k 128k"),
    "zeroes": ("write -z 64k 8k", "write -P 1 128k 128k", "write -z 140k 4k", "write -z -u 200k 8k", "write -z 256k 64k"),
    "writes into zeroes": ("write -z 0 256k", "write -P 1 3k 9k", "write -z -u 128k 64k", "write -P 2 130k 2k"),
    "discards": ("write -P 1 0 192k", "discard 64k 64k", "discard 130k 4k", "discard 256k 64k", "write -P 2 70k 2k"),
    "compressed": ("write -c -P 1 64k 64k", "write -P 2 70k 2k", "write -c -P 3 256k 64k", "write -z 256k 64k"),
}


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_requests_leave_the_entries_that_qemu_io_leaves(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, base: str, name: str, backing: bool
) -> None:
    below = ["-b", base, "-F", "raw"] if backing else []
    commands = SCRIPTS[name]
    first = [command for command in commands if "write -c" in command]
    rest = [command for command in commands if command not in first]
    for image in ("theirs", "ours"):
        qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", *below, image, "2M")
        if first:
            qemu_io("-f", "qcow2", *script(*first), image)
    qemu_io("-f", "qcow2", "-d", "unmap", *script(*rest), "theirs")
    blocklib("io", "-f", "qcow2", "-d", "unmap", *script(*rest), "ours")
    assert entries("ours") == entries("theirs")
    qemu_img("check", "ours")
    qemu_img("compare", "ours", "theirs")
    assert blocklib.json("map", "ours") == qemu_img.json("map", "ours")


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("backing", [False, True])
def test_what_a_disk_gains_reads_as_zero_preallocated_or_not(
    blocklib: CommandLine, qemu_img: Program, base: str, mode: str, backing: bool
) -> None:
    below = ["-b", base, "-F", "raw"] if backing else []
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", *below, "ours", "1000k")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", *below, "theirs", "1000k")
    blocklib("resize", f"--preallocation={mode}", "ours", "1500k")
    qemu_img("resize", f"--preallocation={mode}", "theirs", "1500k")
    qemu_img("check", "ours")
    qemu_img("compare", "ours", "theirs")
    if backing and mode in ("falloc", "full"):  # QEMU calls the new space data
        assert entries("ours")[16:23] == [(True, "00000000", "ffffffff")] * 7
    else:
        assert entries("ours")[16:23] == entries("theirs")[16:23]
    assert blocklib.json("map", "ours") == qemu_img.json("map", "ours")


def test_convert_and_rebase_write_the_subclusters_that_are_needed(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, base: str
) -> None:
    qemu_img("create", "-q", "-f", "raw", "source.raw", "1M")
    qemu_io("-f", "raw", *script("write -P 5 4k 4k", "write -P 5 200k 3k", "write -P 6 512k 64k"), "source.raw")
    for program, name in ((qemu_img, "theirs"), (blocklib, "ours")):
        program("convert", "-f", "raw", "-O", "qcow2", "-o", "extended_l2=on", "source.raw", name)
    qemu_img("check", "ours")
    qemu_img("compare", "ours", "theirs")
    assert entries("ours") == entries("theirs")

    qemu_img("create", "-q", "-f", "raw", "other.raw", "2M")
    qemu_io("-f", "raw", *script("write -P 187 0 2M", "write -P 6 100k 3k", "write -z 512k 64k"), "other.raw")
    for program, name in ((qemu_img, "theirs"), (blocklib, "ours")):
        qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", base, "-F", "raw", name)
        qemu_io("-f", "qcow2", "-c", "write -P 1 104k 2k", name)
        program("rebase", "-b", "other.raw", "-F", "raw", name)
    qemu_img("check", "ours")
    qemu_img("compare", "-F", "qcow2", "ours", "theirs")
    assert entries("ours") == entries("theirs")


def test_commit_takes_down_what_the_overlay_holds_and_no_more(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, base: str
) -> None:
    for image, below, format in (("middle", base, "raw"), ("top", "middle", "qcow2")):
        qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", below, "-F", format, image)
    qemu_io("-f", "qcow2", *script("write -P 1 10k 2k", "write -P 2 128k 2k"), "middle")
    qemu_io("-f", "qcow2", *script("write -P 3 14k 2k", "write -z 132k 2k"), "top")
    qemu_img("convert", "-O", "raw", "top", "before.raw")
    blocklib("commit", "top")
    qemu_img("compare", "-F", "raw", "top", "before.raw")
    for image in ("middle", "top"):
        qemu_img("check", image)
    # What the overlay never held is still the base's.
    assert entries("middle")[0] == (True, f"{0b101 << 5:08x}", "00000000")
    assert entries("middle")[2] == (True, "00000001", "00000004")
    assert entries("top") == [(False, "00000000", "00000000")] * 40


def test_snapshots_share_clusters_whose_subclusters_are_then_copied(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "image", "1M")
    qemu_io("-f", "qcow2", *script("write -P 1 10k 4k", "write -P 2 64k 64k"), "image")
    qemu_img("snapshot", "-c", "theirs", "image")
    blocklib("io", "-f", "qcow2", *script("write -P 3 20k 2k", "write -P 4 70k 2k", "write -z 128k 2k"), "image")
    qemu_img("check", "image")
    # From what was allocated to what was written, and all of the full one.
    assert [bits for _placed, bits, _zero in entries("image")[:2]] == [f"{0b11_1111 << 5:08x}", "ffffffff"]
    blocklib("snapshot", "-c", "ours", "image")
    blocklib("io", "-f", "qcow2", *script("write -P 5 20k 4k", "discard 64k 64k"), "image")
    blocklib("io", "-f", "qcow2", *script("read -P 1 10k 4k", "read -P 0 14k 6k", "read -P 5 20k 4k"), "image")
    blocklib("snapshot", "-a", "theirs", "image")
    qemu_io("-f", "qcow2", *script("read -P 1 10k 4k", "read -P 0 14k 50k", "read -P 2 64k 64k"), "image")
    qemu_img("check", "image")
    blocklib("snapshot", "-d", "theirs", "image")
    qemu_img("snapshot", "-a", "ours", "image")
    blocklib("io", "-f", "qcow2", *script("read -P 3 20k 2k", "read -P 4 70k 2k", "read -P 0 128k 2k"), "image")
    blocklib("snapshot", "-d", "ours", "image")
    qemu_img("check", "image")


@pytest.mark.parametrize("options", ["extended_l2=on", "extended_l2=on,cluster_size=16k,preallocation=falloc"])
def test_measure_says_what_qemu_img_says(blocklib: CommandLine, qemu_img: Program, base: str, options: str) -> None:
    for what in (["--size", "10G"], ["--size", "100k"], ["-f", "raw", base]):
        arguments = ("measure", "-O", "qcow2", "-o", options, *what)
        assert blocklib(*arguments) == qemu_img(*arguments)
        assert blocklib.json(*arguments) == qemu_img.json(*arguments)


@pytest.mark.parametrize("size", ["8M", "256M", "300M"])
def test_the_vm_state_begins_where_qemu_io_says(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, size: str
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "image", size)
    assert blocklib("io", "-c", "info", "image") == qemu_io("-c", "info", "image")
