"""External data files between blocklib and QEMU: what one writes the other reads, checks and maps the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from tests.cli.running import CommandLine
from tests.programs import Program

SIZE = 3 * MiB + 5 * 512
OPEN: Any = {"format": "qcow2", "references": "allow", "discard": "unmap"}
KINDS = {
    "plain": "cluster_size=64k",
    "raw": "cluster_size=64k,data_file_raw=on",
    "small clusters": "cluster_size=512,refcount_bits=1",
    "raw, small clusters": "cluster_size=4k,data_file_raw=on,refcount_bits=64",
    "subclusters": "cluster_size=64k,extended_l2=on",
    "raw, subclusters": "cluster_size=32k,extended_l2=on,data_file_raw=on",
    "preallocated": "cluster_size=4k,preallocation=metadata",
    "preallocated in full": "cluster_size=64k,preallocation=full",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def requests(seed: int) -> list[tuple[str, int, int, int]]:
    """(kind, offset, length, byte): writes, zeroes with and without unmap, and discards, at odd places."""
    rng = random.Random(seed)
    kinds = ["write", "write", "write", "zero", "unmap", "discard"]
    found = []
    for _ in range(40):
        length = min(rng.choice([512, 4096, 64 * KiB, 200 * KiB]), SIZE)
        offset = rng.choice([0, SIZE - length, rng.randrange(0, SIZE - length + 1) // 512 * 512])
        found.append((rng.choice(kinds), offset, length, rng.randrange(1, 256)))
    return found


def write_with_blocklib(name: str, seed: int) -> bytes:
    """The content of the disk after the requests; a discard inside a cluster leaves it as it was."""
    with blocklib.open(name, "r+", **OPEN) as disk:
        for kind, offset, length, byte in requests(seed):
            match kind:
                case "write":
                    disk.write(offset, bytes((byte,)) * length)
                case "discard":
                    disk.discard(offset, length)
                case _:
                    disk.write_zeroes(offset, length, unmap=kind == "unmap")
        return disk.read(0, disk.size)


def write_with_qemu(qemu_io: Program, name: str, seed: int) -> None:
    words = {"write": "write -P {3} {1} {2}", "zero": "write -z {1} {2}", "unmap": "write -z -u {1} {2}"}
    words["discard"] = "discard {1} {2}"
    commands = []
    for request in requests(seed):
        commands += ["-c", words[request[0]].format(*request)]
    qemu_io("-f", "qcow2", "-d", "unmap", *commands, name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_blocklib_writes_qemu_reads(kind: str, qemu_img: Program) -> None:
    line = CommandLine()
    line("create", "-q", "-f", "qcow2", "-o", f"data_file=data.img,{KINDS[kind]}", "disk.qcow2", SIZE)
    content = write_with_blocklib("disk.qcow2", seed=len(kind))
    qemu_img("check", "-f", "qcow2", "disk.qcow2")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "flat.img")
    assert Path("flat.img").read_bytes() == content
    if "raw" in kind:
        assert Path("data.img").read_bytes() == content
    assert Path("data.img").stat().st_size == SIZE
    _assert_told_the_same(line, qemu_img)


@pytest.mark.parametrize("kind", KINDS)
def test_what_qemu_writes_blocklib_reads(kind: str, qemu_img: Program, qemu_io: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file=data.img,{KINDS[kind]}", "disk.qcow2", SIZE)
    write_with_qemu(qemu_io, "disk.qcow2", seed=len(kind))
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "flat.img")
    with blocklib.open("disk.qcow2", **OPEN) as disk:
        assert disk.read(0, SIZE) == Path("flat.img").read_bytes()
    _assert_told_the_same(CommandLine(), qemu_img)
    content = write_with_blocklib("disk.qcow2", seed=99)
    qemu_img("check", "-f", "qcow2", "disk.qcow2")
    if "raw" in kind:
        assert Path("data.img").read_bytes()[:SIZE] == content


def _assert_told_the_same(line: CommandLine, qemu_img: Program) -> None:
    for command in ("info", "map", "check"):
        assert line.json(command, "disk.qcow2") == qemu_img.json(command, "disk.qcow2"), command
        assert line(command, "disk.qcow2") == qemu_img(command, "disk.qcow2"), command


@pytest.mark.parametrize("raw", ["off", "on"])
def test_resizing_is_as_in_qemu(raw: str, qemu_img: Program) -> None:
    line = CommandLine()
    for name in ("ours", "theirs"):
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={name}.img,data_file_raw={raw}", f"{name}.qcow2", "1M")
    for words in (["2M"], ["--shrink", "512k"], *(["--preallocation", mode, "+1M"] for mode in ("metadata", "falloc", "full"))):
        *options, size = words
        assert line("resize", *options, "ours.qcow2", size) == qemu_img("resize", *options, "theirs.qcow2", size)
        assert Path("ours.img").stat().st_size == Path("theirs.img").stat().st_size
        assert Path("ours.img").stat().st_blocks == Path("theirs.img").stat().st_blocks
        assert line("map", "ours.qcow2").replace("ours", "theirs") == qemu_img("map", "theirs.qcow2")
        assert qemu_img.json("map", "ours.qcow2") == qemu_img.json("map", "theirs.qcow2")
        qemu_img("check", "ours.qcow2")


@pytest.mark.parametrize("raw", ["off", "on"])
def test_a_grown_disk_does_not_show_what_the_data_file_held_behind_its_end(raw: str, qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file=data.img,data_file_raw={raw}", "disk.qcow2", "1M")
    with Path("data.img").open("ab") as file:
        file.write(b"stale" * 300_000)
    with blocklib.open("disk.qcow2", "r+", **OPEN) as disk:
        disk.truncate(2 * MiB, preallocation="metadata")
        assert disk.read(0, disk.size) == bytes(2 * MiB)
    assert Path("data.img").read_bytes() == bytes(2 * MiB)


def test_a_resize_without_the_data_file_changes_nothing(qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.img", "disk.qcow2", "1M")
    Path("data.img").unlink()
    before = Path("disk.qcow2").read_bytes()
    assert "data.img" in CommandLine().fails("resize", "disk.qcow2", "2M")
    assert Path("disk.qcow2").read_bytes() == before


@pytest.mark.parametrize("raw", ["off", "on"])
def test_convert_writes_into_a_data_file(raw: str, qemu_img: Program, qemu_io: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "source.qcow2", SIZE)
    write_with_qemu(qemu_io, "source.qcow2", seed=5)
    qemu_img("convert", "-O", "raw", "source.qcow2", "flat.img")
    options = f"data_file=data.img,data_file_raw={raw}"
    CommandLine()("convert", "-O", "qcow2", "-o", options, "source.qcow2", "disk.qcow2")
    qemu_img("check", "disk.qcow2")
    assert "identical" in qemu_img("compare", "source.qcow2", "disk.qcow2")
    if raw == "on":
        assert Path("data.img").read_bytes() == Path("flat.img").read_bytes()


def test_no_file_of_a_backing_chain_becomes_a_data_file(qemu_img: Program) -> None:
    line = CommandLine()
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.img", "base.qcow2", "1M")
    Path("data.img").write_bytes(b"x" * MiB)
    Path("plain.img").write_bytes(b"x" * MiB)
    for name, base, format in (("data.img", "base.qcow2", "qcow2"), ("plain.img", "plain.img", "raw")):
        line.fails("create", "-f", "qcow2", "-o", f"data_file={name}", "-b", base, "-F", format, "disk.qcow2")
        line.fails("convert", "-f", format, "-O", "qcow2", "-o", f"data_file={name}", base, "disk.qcow2")
        assert Path(name).read_bytes() == b"x" * MiB
    line.fails("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "data.img")
    assert Path("data.img").read_bytes() == b"x" * MiB


def test_the_command_line_opens_a_data_file_but_not_of_an_untrusted_image(qemu_img: Program) -> None:
    line = CommandLine()
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.img", "disk.qcow2", "1M")
    line("map", "disk.qcow2")
    assert "data file 'data.img'" in line.fails("map", "--untrusted", "disk.qcow2")
    line("info", "--untrusted", "disk.qcow2")
    Path("data.img").rename("moved.img")
    options = "driver=qcow2,file.filename=disk.qcow2,data-file.driver=file,data-file.filename=moved.img"
    assert line("map", "--image-opts", options) == qemu_img("map", "--image-opts", options)


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        (0x8000_0000_0002_0000, 0),  # another guest cluster's: qemu-img check does not look, reading refuses
        (0x8000_0000_0001_0200, 1),
        (0x4000_0000_0001_0000, 1),
        (0x0000_0000_0001_0000, 1),
        (0x0000_0000_0001_0001, 1),
        (0x8000_0000_0001_0001, 0),
        (0x8000_0000_0000_0000, 0),
        (0x8000_0000_0000_0001, 0),
    ],
)
def test_damaged_entries_are_counted_as_qemu_counts_them(entry: int, count: int, qemu_img: Program) -> None:
    blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"data_file": "data.img"})
    with blocklib.open("disk.qcow2", "r+", **OPEN) as disk:
        disk.write(0, b"x" * (256 * KiB))
    data = bytearray(Path("disk.qcow2").read_bytes())
    place = data.index((0x8000_0000_0001_0000).to_bytes(8, "big"))
    data[place : place + 8] = entry.to_bytes(8, "big")
    Path("disk.qcow2").write_bytes(data)
    ours = CommandLine().json("check", "disk.qcow2", code=2 if count else 0)
    theirs = qemu_img.run("check", "--output=json", "disk.qcow2")
    assert ours.get("corruptions", 0) == count
    assert ours == json.loads(theirs.stdout)
    if entry & 0xFF_FFFF_FFFF_FE01 not in (0x10000, 0x10001, 1) or entry >> 62 == 1:
        with blocklib.open("disk.qcow2", "r+", **OPEN) as disk:
            for request in (lambda: disk.read(64 * KiB, 512), lambda: disk.map()):
                with pytest.raises(blocklib.ImageCorruptError):
                    request()
            if entry >> 63:
                with pytest.raises(blocklib.ImageCorruptError):
                    disk.write(64 * KiB, b"y" * 512)


def test_a_repair_sets_the_copied_flags(qemu_img: Program) -> None:
    blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"data_file": "data.img"})
    with blocklib.open("disk.qcow2", "r+", **OPEN) as disk:
        disk.write(0, b"x" * (256 * KiB))
    data = bytearray(Path("disk.qcow2").read_bytes())
    place = data.index((0x8000_0000_0001_0000).to_bytes(8, "big"))
    data[place] = 0
    Path("disk.qcow2").write_bytes(data)
    blocklib.repair("disk.qcow2", "all")
    qemu_img("check", "disk.qcow2")
    with blocklib.open("disk.qcow2", **OPEN) as disk:
        assert disk.read(0, 256 * KiB) == b"x" * (256 * KiB)
