"""``snapshot``, ``convert -l``, ``measure -l`` and lists of snapshots, beside qemu-img's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import blocklib as library
from blocklib.formats.qcow2.snapshots.table import Snapshot, extra_data, table_bytes
from tests.cli.running import CommandLine
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on
from tests.programs import Program


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def image(here: Path, qemu_img: Program, qemu_io: Program) -> str:
    """`a`: 1 MiB, snapshots 1 "one", 2 "two", 3 "1" with bytes 1, 2, 3 at the beginning; now there are fours."""
    qemu_img("create", "-q", "-f", "qcow2", "a", "1M")
    for byte, name in enumerate(("one", "two", "1"), 1):
        qemu_io("-f", "qcow2", "-c", f"write -P {byte} 0 64k", "a")
        qemu_img("snapshot", "-c", name, "a")
    qemu_io("-f", "qcow2", "-c", "write -P 4 0 64k", "a")
    return "a"


def first_byte(name: str = "a", format: str = "qcow2") -> int:
    with library.open(name, format=format) as disk:
        return disk.read(0, 1)[0]


def test_the_four_actions(blocklib: CommandLine, image: str, qemu_img: Program) -> None:
    assert blocklib("snapshot", "-c", "four", image) == ""
    assert blocklib("snapshot", "-q", "-a", "one", image) == ""
    assert first_byte() == 1
    assert blocklib("snapshot", "-d", "two", image) == ""
    names = [entry["name"] for entry in qemu_img.json("info", image)["snapshots"]]
    assert names == ["one", "1", "four"]
    qemu_img("check", "-q", image)
    blocklib("snapshot", "-a", "four", "--image-opts", f"driver=qcow2,file.filename={image}")
    assert first_byte() == 4


def test_to_apply_is_by_id_first_and_to_delete_by_name(blocklib: CommandLine, image: str, qemu_img: Program) -> None:
    blocklib("snapshot", "-a", "1", image)
    assert first_byte() == 1
    blocklib("snapshot", "-d", "1", image)
    assert [entry["id"] for entry in qemu_img.json("info", image)["snapshots"]] == ["1", "2"]


def test_lists_are_those_of_qemu_img(blocklib: CommandLine, image: str, qemu_img: Program) -> None:
    blocklib("snapshot", "-c", "a name that is longer than its column", image)
    blocklib("snapshot", "-c", "", image)
    blocklib("snapshot", "-c", "é", image)
    assert blocklib("snapshot", "-l", image) == qemu_img("snapshot", "-l", image)
    assert blocklib("snapshot", "-l", "-U", image) == qemu_img("snapshot", "-l", "-U", image)
    assert blocklib("info", image) == qemu_img("info", image)
    assert list(blocklib.json("info", image).items()) == list(qemu_img.json("info", image).items())
    assert blocklib("snapshot", image) == qemu_img("snapshot", image) == ""


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize(
    "damage",
    [
        {"vm_clock_ns": 17_596_481_011_711},
        {"nanoseconds": 4_294_967_280},
        {"seconds": 0},
        {"vm_state_size_32": 5 << 30 & 0xFFFFFFFF},
        {"extra": (5 << 30).to_bytes(8, "big") + (1 << 20).to_bytes(8, "big") + b"\xff" * 8},
        {"extra": (700).to_bytes(8, "big") + (1 << 20).to_bytes(8, "big") + (99).to_bytes(8, "big") + b"unknown"},
        {"extra": b""},
        {"name": b"\xff\xfe"},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_every_field_is_shown_as_qemu_img_shows_it(
    blocklib: CommandLine, here: Path, qemu_img: Program, version: str, damage: dict[str, object]
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={version}", "b", "1M")
    host = RecordingNode(data=Path("b").read_bytes())
    with disk_on(host) as disk:
        disk.snapshots.create("x")
    offset = int.from_bytes(host.data[64:72], "big")
    with disk_on(host, writable=False) as disk:
        entry = disk.node.snapshots[0]._replace(**damage)  # type: ignore[attr-defined]
    # As version 2, so that nothing is added to what is missing.
    table = table_bytes([entry], version=2, disk_size=1 << 20)
    host.data[offset : offset + len(table)] = table
    Path("b").write_bytes(host.data)
    assert blocklib.json("info", "b") == qemu_img.json("info", "b")
    assert blocklib("snapshot", "-l", "b") == qemu_img("snapshot", "-l", "b")
    blocklib("snapshot", "-c", "more", "b")
    blocklib("snapshot", "-a", "1", "b")
    qemu_img("check", "-q", "b")
    assert blocklib("snapshot", "-l", "b") == qemu_img("snapshot", "-l", "b")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["-a", "nothing", "a"], "a: there is no snapshot with the name 'nothing'"),
        (["-d", "nothing", "a"], "a: there is no snapshot with the name 'nothing'"),
        (["-d", "2", "a"], "the snapshot with this ID is called 'two'"),
        (["-c", "x" * 256, "a"], "255 bytes"),
        (["-c", "x", "-l", "a"], "exclude"),
        (["-c", "x", "-c", "y", "a"], "once"),
        (["-a", "one", "-d", "one", "a"], "exclude"),
        (["-U", "-c", "x", "a"], "-U"),
        (["-c", "a"], "expects one file name"),
        (["-c", "x", "a", "b"], "expects one file name"),
        (["-f", "qcow2", "-l", "a"], "-f"),
        (["-c", "x", "--object", "bogus,id=x", "a"], "bogus"),
        (["-l", "nowhere"], "nowhere"),
        (["-c", "x", "nowhere"], "nowhere"),
        (["-c", "x", "raw"], "raw"),
        (["-a", "x", "raw"], "no snapshot"),
        (["-d", "x", "raw"], "no snapshot"),
        (["-c", "x", "--image-opts", "driver=qcow2,file.filename=a,snapshot.name=one"], "only be read"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(
    blocklib: CommandLine, image: str, arguments: list[str], part: str
) -> None:
    Path("raw").write_bytes(bytes(1024))
    before = digest("a")
    assert part in blocklib.fails("snapshot", *arguments)
    assert digest("a") == before


def test_refcounts_too_narrow_for_a_snapshot_are_found_before_anything_changes(
    blocklib: CommandLine, here: Path, qemu_img: Program, qemu_io: Program
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", "narrow", "1M")
    qemu_io("-f", "qcow2", "-c", "write 0 64k", "narrow")
    before = digest("narrow")
    assert "1 bits" in blocklib.fails("snapshot", "-c", "x", "narrow")
    assert digest("narrow") == before


def test_external_data_files_have_no_snapshots(blocklib: CommandLine, here: Path, qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "a", "1M")
    before = digest("a")
    assert "data file" in blocklib.fails("snapshot", "-c", "x", "a")
    assert digest("a") == before


def test_more_snapshots_than_the_limit_are_refused(blocklib: CommandLine, here: Path, qemu_img: Program) -> None:
    """As many as there may be, all sharing one L1 table: only the count matters here."""
    qemu_img("create", "-q", "-f", "qcow2", "a", "1M")
    extra = extra_data(vm_state_size=0, disk_size=1 << 20)
    entries = (Snapshot(0x30000, 1, b"%d" % i, b"s", 0, 0, 0, 0, extra) for i in range(1, 65537))
    table = table_bytes(entries, version=3, disk_size=1 << 20)
    data = bytearray(Path("a").read_bytes().ljust(0x40000, b"\0"))
    data[60:64] = (65536).to_bytes(4, "big")
    data[64:72] = len(data).to_bytes(8, "big")
    Path("a").write_bytes(data + table)
    before = digest("a")
    assert "65536" in blocklib.fails("snapshot", "-c", "x", "a")
    assert digest("a") == before
    assert blocklib("snapshot", "-l", "a").count("\n") == 65538


# -- what a snapshot holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "byte"),
    [
        ("one", 1),
        ("two", 2),
        ("2", 2),
        ("1", 1),
        ("snapshot.name=1", 3),
        ("snapshot.id=1", 1),
        ("snapshot.id=2,snapshot.name=two", 2),
        ("snapshot.name=two,snapshot.id=2", 2),
    ],
)
def test_convert_copies_the_snapshot_that_qemu_img_copies(
    blocklib: CommandLine, image: str, qemu_img: Program, text: str, byte: int
) -> None:
    blocklib("convert", "-l", text, "-O", "raw", image, "ours")
    qemu_img("convert", "-l", text, "-O", "raw", image, "theirs")
    assert Path("ours").read_bytes() == Path("theirs").read_bytes()
    assert first_byte("ours", "raw") == byte
    assert blocklib("measure", "-l", text, "-O", "qcow2", image) == qemu_img("measure", "-l", text, "-O", "qcow2", image)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nothing", "'nothing'"),
        ("snapshot.id=9", "the ID '9'"),
        ("snapshot.id=1,snapshot.name=two", "the ID '1' and the name 'two'"),
        ("snapshot.other=1", "snapshot.other"),
        ("snapshot.id=1,other=2", "other=2"),
    ],
)
def test_a_snapshot_that_is_not_there_is_one_line(
    blocklib: CommandLine, image: str, qemu_img: Program, text: str, part: str
) -> None:
    before = digest(image)
    assert part in blocklib.fails("convert", "-l", text, image, "ours")
    assert not Path("ours").exists()
    assert part in blocklib.fails("measure", "-l", text, image)
    assert qemu_img.run("convert", "-l", text, image, "theirs").returncode == 1
    assert digest(image) == before


def test_a_snapshot_over_a_backing_file_and_of_another_size(
    blocklib: CommandLine, here: Path, qemu_img: Program, qemu_io: Program
) -> None:
    Path("base").write_bytes(b"B" * (1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "1M")
    qemu_io("-f", "qcow2", "-c", "write -P 1 64k 64k", "top")
    blocklib("snapshot", "-c", "before", "top")
    qemu_img("convert", "-l", "before", "-O", "raw", "top", "theirs")
    qemu_io("-f", "qcow2", "-c", "write -P 2 0 256k", "top")
    blocklib("resize", "-q", "top", "3M")
    blocklib("convert", "-l", "before", "-O", "raw", "top", "ours")
    assert Path("ours").read_bytes() == Path("theirs").read_bytes()
    options = "driver=qcow2,snapshot.name=before,file.filename=top"
    blocklib("compare", "-q", "--image-opts", options, "driver=raw,file.filename=ours")
    blocklib("snapshot", "-a", "before", "top")
    qemu_img("compare", "-q", "-F", "raw", "-f", "qcow2", "top", "theirs")
    qemu_img("check", "-q", "top")


# -- other commands on images with snapshots ----------------------------------------------------------------------------


def test_resize_keeps_every_snapshot_inside_the_disk(
    blocklib: CommandLine, image: str, qemu_img: Program, qemu_io: Program
) -> None:
    blocklib("resize", "-q", image, "2M")
    qemu_io("-f", "qcow2", "-c", "write -P 7 1536k 64k", image)
    blocklib("resize", "-q", "--shrink", image, "1M")
    qemu_img("bitmap", "--add", image, "stored")  # not even marked as in use
    before = digest(image)
    assert "snapshot 'one'" in blocklib.fails("resize", "--shrink", image, "512k")
    assert digest(image) == before
    qemu_img("check", "-q", image)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old", "1M")
    qemu_img("snapshot", "-c", "x", "old")
    before = digest("old")
    for size in ("2M", "512k"):
        assert "version 2" in blocklib.fails("resize", "--shrink", "old", size)
        assert qemu_img.run("resize", "--shrink", "old", size).returncode == 1
    assert digest("old") == before


def test_commit_and_rebase_leave_snapshots_as_they_are(
    blocklib: CommandLine, here: Path, qemu_img: Program, qemu_io: Program
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base", "2M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "2M")
    qemu_io("-f", "qcow2", "-c", "write -P 1 0 256k", "base")
    qemu_io("-f", "qcow2", "-c", "write -P 2 64k 256k", "top")
    for name in ("base", "top"):
        blocklib("snapshot", "-c", "before", name)
    qemu_io("-f", "qcow2", "-c", "write -P 3 128k 1M", "top")
    blocklib("convert", "-O", "raw", "top", "expected")
    blocklib("commit", "-q", "top")
    for name in ("base", "top"):
        qemu_img("check", "-q", name)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", name, "expected")
    with library.open("top", format="qcow2", backing=None, options={"snapshot.name": "before"}) as past:
        assert past.read(64 << 10, 256 << 10) == b"\2" * (256 << 10)
    with library.open("base", format="qcow2", options={"snapshot.name": "before"}) as past:
        assert past.read(0, 257 << 10) == b"\1" * (256 << 10) + bytes(1024)
    blocklib("rebase", "-q", "-b", "", "top")
    qemu_img("check", "-q", "top")
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", "top", "expected")


# -- VM state -----------------------------------------------------------------------------------------------------------

VM_STATE_COMMANDS = (
    "write -b -P 5 0 64k",
    "read -b -P 5 0 64k",
    "write -b -P 6 512 1024",
    "write -b -P 7 3G 512",
    "read -b -P 6 512 1024",
    "read -b -P 5 2k 62k",
    "read -b -P 0 64k 512",
    "read -b -P 7 3G 512",
    "read -b -P 9 3G 512",
    "read -b 10T 512",
)


def test_vm_state_is_where_qemu_io_has_it(blocklib: CommandLine, image: str, qemu_img: Program, qemu_io: Program) -> None:
    Path("b").write_bytes(Path(image).read_bytes())
    words = [word for command in VM_STATE_COMMANDS for word in ("-c", command.replace("-b", "-b -C"))]
    ours = blocklib("io", "-f", "qcow2", *words, image, code=1)
    theirs = qemu_io("-f", "qcow2", *words, "b", codes=(1,))
    untimed = re.compile(r"^(\d+,\d+),.*$", re.MULTILINE)
    assert untimed.sub(r"\1", ours) == untimed.sub(r"\1", theirs)
    reads = [word for command in VM_STATE_COMMANDS[4:8] for word in ("-c", command)]
    assert "failed" not in blocklib("io", "-f", "qcow2", *reads, "b")
    assert "failed" not in qemu_io("-f", "qcow2", *reads, image)
    for name in (image, "b"):
        qemu_img("check", "-q", name)


def test_snapshots_keep_the_vm_state_and_growth_does_not_show_it(
    blocklib: CommandLine, here: Path, qemu_img: Program, qemu_io: Program
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a", "3M")
    blocklib("io", "-f", "qcow2", "-c", "write -b -P 5 0 20k", "-c", "write -b -P 6 2M 4k", "a")
    blocklib("snapshot", "-c", "vm", "a")
    blocklib("io", "-f", "qcow2", "-c", "write -b -P 7 1k 512", "-c", "read -b -P 5 0 1k", "-c", "read -b -P 5 1536 18k", "a")
    blocklib("resize", "-q", "a", "16M")
    qemu_io("-f", "qcow2", "-c", "read -P 0 0 16M", "a")
    qemu_img("check", "-q", "a")
    blocklib("snapshot", "-a", "vm", "a")
    commands = ("-c", "read -b -P 5 0 20k", "-c", "read -b -P 6 2M 4k", "-c", "read -P 0 0 3M")
    assert "failed" not in qemu_io("-f", "qcow2", *commands, "a")
    blocklib("resize", "-q", "--shrink", "a", "3M")
    qemu_img("check", "-q", "a")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("read -b 100 512", "offset"),
        ("read -b 0 100", "length"),
        ("write -b 0 100", "length"),
        ("write -b -z 0 512", "-z"),
        ("write -b -f 0 512", "-f"),
    ],
)
def test_vm_state_takes_whole_sectors_and_no_flags(blocklib: CommandLine, image: str, command: str, part: str) -> None:
    before = digest(image)
    assert part in blocklib.fails("io", "-f", "qcow2", "-c", command, image)
    assert digest(image) == before


def test_raw_images_have_no_place_for_a_vm_state(blocklib: CommandLine, here: Path, qemu_io: Program) -> None:
    Path("raw").write_bytes(bytes(1024))
    words = ("-f", "raw", "-c", "read -b 0 512", "-c", "write -b 0 512", "raw")
    assert blocklib("io", *words, code=1) == qemu_io(*words, codes=(1,))
