"""amend against qemu-img: the same changes succeed, and leave an image that says the same; the others leave it as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from tests.cli.running import CommandLine
from tests.programs import Program

OPEN: Any = {"format": "qcow2", "references": "allow"}
CASES = [
    # made with, changed to; each program does it to a copy
    ("compat=0.10", "compat=1.1"),
    ("compat=0.10,cluster_size=4k", "compat=v3,lazy_refcounts=on,refcount_bits=64"),
    ("compat=0.10", "compat=0.10"),
    ("compat=0.10", "refcount_bits=8"),
    ("compat=0.10", "refcount_bits=16"),
    ("compat=0.10", "lazy_refcounts=on"),
    ("compat=0.10", "lazy_refcounts=off"),
    ("compat=0.10", "data_file_raw=off"),
    ("compat=0.10", "size=3M"),
    ("cluster_size=64k", "compat=0.10"),
    ("cluster_size=64k", "compat=0.10,lazy_refcounts=on"),
    ("cluster_size=64k", "compat=0.10,lazy_refcounts=off,size=3M"),
    ("cluster_size=512", "compat=0.10"),
    ("cluster_size=2M", "compat=0.10"),
    ("lazy_refcounts=on", "compat=0.10"),
    ("lazy_refcounts=on", "lazy_refcounts=off"),
    ("compression_type=zstd", "compat=0.10"),
    ("refcount_bits=8", "compat=0.10"),
    ("cluster_size=4k,refcount_bits=1", "compat=0.10,refcount_bits=16"),
    ("extended_l2=on", "compat=0.10"),
    ("cluster_size=64k", "refcount_bits=1,compat=0.10"),
    ("cluster_size=64k", "refcount_bits=3"),
    ("cluster_size=64k", "refcount_bits=128"),
    ("cluster_size=64k", "cluster_size=32k"),
    ("cluster_size=64k", "preallocation=full"),
    ("cluster_size=64k", "nonsense=on"),
    ("cluster_size=64k", "compat=0.12"),
    ("cluster_size=64k", "size=1000"),
    ("cluster_size=64k", "size=0"),
    ("cluster_size=64k", "size=1M"),
    ("cluster_size=4k", "size=4M,refcount_bits=8"),
    ("cluster_size=64k", "size=-1"),
    ("cluster_size=64k", "data_file_raw=on"),
    ("cluster_size=64k", "data_file_raw=off"),
    ("cluster_size=64k", "data_file=data.img"),
    ("cluster_size=64k", "backing_file=other.qcow2,backing_fmt=qcow2"),
    ("cluster_size=64k", "backing_fmt=raw"),
    ("data_file=data.img", "compat=0.10"),
    ("data_file=data.img", "data_file=data.img,data_file_raw=on"),
    ("data_file=data.img", "data_file=moved.img"),
    ("data_file=data.img", "data_file="),
    ("data_file=data.img,data_file_raw=on", "data_file_raw=off,refcount_bits=32"),
    ("data_file=data.img,data_file_raw=on", "data_file_raw=on,size=1M"),
    *((f"cluster_size=512,refcount_bits={old}", f"refcount_bits={new}") for old, new in ((64, 1), (16, 32), (1, 64), (8, 4))),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(qemu_img: Program, qemu_io: Program, options: str, *, size: str = "2M", backing: str | None = None) -> None:
    below = [] if backing is None else ["-b", backing, "-F", "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, "disk.qcow2", size)
    commands = ["write -P 1 0 300k", "write -P 2 1M 100k", "write -z 64k 64k", "write -z 512k 200k", "write -z -u 1M 64k"]
    qemu_io("-f", "qcow2", *(word for command in commands for word in ("-c", command)), "disk.qcow2")


def flat(qemu_img: Program, name: str) -> bytes:
    qemu_img("convert", "-f", "qcow2", "-O", "raw", name, "flat.img")
    return Path("flat.img").read_bytes()


@pytest.mark.parametrize(("made", "change"), CASES, ids=[f"{made} -> {change}" for made, change in CASES])
def test_the_outcome_is_qemus(made: str, change: str, qemu_img: Program, qemu_io: Program) -> None:
    make(qemu_img, qemu_io, made)
    content = flat(qemu_img, "disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    theirs = qemu_img.run("amend", "-f", "qcow2", "-o", change, "disk.qcow2")
    expected = qemu_img.json("info", "-f", "qcow2", "disk.qcow2")
    if "data_file" in made:  # it may have been cut off
        make(qemu_img, qemu_io, made)
    Path("disk.qcow2").write_bytes(before)
    line = CommandLine()
    if theirs.returncode:
        line.fails("amend", "-f", "qcow2", "-o", change, "disk.qcow2")
        assert Path("disk.qcow2").read_bytes() == before
        return
    assert line("amend", "-f", "qcow2", "-o", change, "disk.qcow2") == ""
    found = line.json("info", "disk.qcow2")
    assert {**found, "actual-size": 0} == {**expected, "actual-size": 0}
    if change not in ("data_file=moved.img", "data_file="):
        qemu_img("check", "-f", "qcow2", "disk.qcow2")
        now = flat(qemu_img, "disk.qcow2")
        assert now == content[: len(now)].ljust(len(now), b"\0")


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize("backing", [False, True])
def test_zero_clusters_are_expanded_when_an_image_goes_down(
    backing: bool, snapshots: bool, qemu_img: Program, qemu_io: Program
) -> None:
    if backing:
        make(qemu_img, qemu_io, "cluster_size=64k")
        Path("disk.qcow2").rename("base.qcow2")
    make(qemu_img, qemu_io, "cluster_size=4k", backing="base.qcow2" if backing else None)
    states = []
    for number in range(2 if snapshots else 0):
        states.append(flat(qemu_img, "disk.qcow2"))
        qemu_img("snapshot", "-c", f"s{number}", "disk.qcow2")
        qemu_io("-c", f"write -z {number * 128}k 90k", "-c", f"write -P {number + 5} {600 + number * 50}k 60k", "disk.qcow2")
    states.append(flat(qemu_img, "disk.qcow2"))
    shutil.copy("disk.qcow2", "theirs.qcow2")
    blocklib.amend("disk.qcow2", {"compat": "0.10"}, format="qcow2")
    qemu_img("check", "disk.qcow2")
    qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", "theirs.qcow2")
    if not snapshots:
        assert _layers(qemu_img, "disk.qcow2") == _layers(qemu_img, "theirs.qcow2")
    assert flat(qemu_img, "disk.qcow2") == states.pop()
    for number in reversed(range(len(states))):
        qemu_img("snapshot", "-a", f"s{number}", "disk.qcow2")
        qemu_img("check", "disk.qcow2")
        assert flat(qemu_img, "disk.qcow2") == states[number]


def _layers(qemu_img: Program, name: str) -> list[tuple[int, int, bool]]:
    """(start, depth, present) wherever that changes."""
    found: list[tuple[int, int, bool]] = []
    for row in qemu_img.json("map", name):
        if not found or found[-1][1:] != (row["depth"], row["present"]):
            found.append((row["start"], row["depth"], row["present"]))
    return found


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
def test_counts_of_snapshots_fit_or_nothing_changes(bits: int, qemu_img: Program, qemu_io: Program) -> None:
    make(qemu_img, qemu_io, "cluster_size=64k")
    for number in range(3):
        qemu_img("snapshot", "-c", f"s{number}", "disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    if bits < 4:
        with pytest.raises(blocklib.ImageLimitError, match="4 references") as caught:
            blocklib.amend("disk.qcow2", {"refcount_bits": bits}, format="qcow2")
        assert caught.value.host_offset is not None
        assert Path("disk.qcow2").read_bytes() == before
        return
    made = blocklib.amend("disk.qcow2", {"refcount_bits": bits}, format="qcow2")
    assert made.format_specific["refcount-bits"] == bits
    qemu_img("check", "disk.qcow2")


def test_snapshots_of_another_size_keep_an_image_up(qemu_img: Program, qemu_io: Program) -> None:
    make(qemu_img, qemu_io, "cluster_size=64k")
    qemu_img("snapshot", "-c", "s", "disk.qcow2")
    qemu_img("resize", "-q", "disk.qcow2", "4M")
    before = Path("disk.qcow2").read_bytes()
    assert "snapshots" in CommandLine().fails("amend", "-o", "compat=0.10", "disk.qcow2")
    assert Path("disk.qcow2").read_bytes() == before


def test_compressed_zstd_clusters_keep_an_image_up(qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "raw", "flat.img", "1M")
    Path("flat.img").write_bytes(b"x" * MiB)
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "flat.img", "disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    assert "zstd" in CommandLine().fails("amend", "-o", "compat=0.10", "disk.qcow2")
    assert Path("disk.qcow2").read_bytes() == before


def test_version_2_snapshots_get_what_version_3_demands(qemu_img: Program, qemu_io: Program) -> None:
    make(qemu_img, qemu_io, "compat=0.10")
    qemu_img("snapshot", "-c", "s", "disk.qcow2")
    data = bytearray(Path("disk.qcow2").read_bytes())
    table = int.from_bytes(data[64:72], "big")
    # As an old program wrote it: no extra data, id and name at its place.
    data[table + 36 : table + 40] = bytes(4)
    data[table + 40 : table + 42] = b"1s"
    Path("disk.qcow2").write_bytes(data)
    content = flat(qemu_img, "disk.qcow2")
    blocklib.amend("disk.qcow2", {"compat": "1.1"}, format="qcow2")
    qemu_img("check", "disk.qcow2")
    header = Path("disk.qcow2").read_bytes()
    table = int.from_bytes(header[64:72], "big")
    assert int.from_bytes(header[table + 36 : table + 40], "big") >= 16
    qemu_img("snapshot", "-a", "s", "disk.qcow2")
    assert flat(qemu_img, "disk.qcow2") == content


def test_the_help_lists_what_can_be_changed(qemu_img: Program) -> None:
    def names(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if "encrypt." not in line]
        return [line.partition(" - ")[0] for line in lines]

    assert names(CommandLine()("amend", "-f", "qcow2", "-o", "help")) == names(qemu_img("amend", "-f", "qcow2", "-o", "help"))


# -- the library -----------------------------------------------------------------------------------------------------------


def test_an_open_disk_is_amended_and_goes_on(qemu_img: Program) -> None:
    blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"cluster_size": 512})
    with blocklib.open("disk.qcow2", "r+", format="qcow2") as disk:
        disk.write(0, b"a" * 100 * KiB)
        info = blocklib.amend(disk, {"refcount_bits": 64, "size": 2 * MiB})
        assert (info.virtual_size, info.format_specific["refcount-bits"]) == (2 * MiB, 64)
        disk.write(1 * MiB, b"b" * 100 * KiB)
        blocklib.amend(disk, {"compat": "0.10", "refcount_bits": 16})
        disk.write_zeroes(0, 64 * KiB)
        content = disk.read(0, disk.size)
    qemu_img("check", "disk.qcow2")
    assert flat(qemu_img, "disk.qcow2") == content == (bytes(64 * KiB) + b"a" * 36 * KiB).ljust(
        1 * MiB, b"\0"
    ) + (b"b" * 100 * KiB).ljust(1 * MiB, b"\0")


def test_amend_opens_no_other_file(qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.img", "disk.qcow2", "1M")
    Path("data.img").unlink()
    blocklib.amend("disk.qcow2", {"data_file": "moved.img", "lazy_refcounts": True})
    assert blocklib.info("disk.qcow2").format_specific["data-file"] == "moved.img"
    before = Path("disk.qcow2").read_bytes()
    with pytest.raises(blocklib.PolicyError):
        blocklib.amend("disk.qcow2", {"size": 2 * MiB})
    assert Path("disk.qcow2").read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"data_file": "x" * 70_000}, {"data_file": "a\0b"}, {"encrypt.state": "active"}])
def test_bad_requests_change_nothing(options: dict[str, Any]) -> None:
    blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"data_file": "data.img"})
    before = Path("disk.qcow2").read_bytes()
    with pytest.raises(blocklib.BlocklibError):
        blocklib.amend("disk.qcow2", options)
    assert Path("disk.qcow2").read_bytes() == before


def test_bitmaps_keep_an_image_up(qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
    qemu_img("bitmap", "--add", "disk.qcow2", "b")
    before = Path("disk.qcow2").read_bytes()
    assert "bitmaps" in CommandLine().fails("amend", "-o", "compat=0.10", "disk.qcow2")
    assert Path("disk.qcow2").read_bytes() == before
