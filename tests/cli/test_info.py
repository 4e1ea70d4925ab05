"""``info`` prints what qemu-img prints, for people line by line and as JSON field by field."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocklib.cli.info import human_lines, json_of, snapshot_table
from blocklib.reports import ImageInfo, SnapshotInfo
from tests.cli.images import chain, sparse_raw
from tests.cli.running import CommandLine
from tests.programs import Program


def test_info_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, any_image: str) -> None:
    assert blocklib.json("info", any_image) == qemu_img.json("info", any_image)
    assert blocklib("info", any_image) == qemu_img("info", any_image)


@pytest.mark.parametrize("folder", ["", "./", "{here}/", "../{name}/"])
def test_info_of_a_chain_is_that_of_qemu_img(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, folder: str
) -> None:
    chain(qemu_img, qemu_io)
    name = folder.format(here=here, name=here.name) + "top.qcow2"
    assert blocklib.json("info", "--backing-chain", name) == qemu_img.json("info", "--backing-chain", name)
    assert blocklib("info", "--backing-chain", name) == qemu_img("info", "--backing-chain", name)


def test_json_is_printed_in_the_layout_of_qemu_img(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path
) -> None:
    chain(qemu_img, qemu_io)
    arguments = ("info", "--output=json", "--backing-chain", "top.qcow2")
    assert blocklib(*arguments) == qemu_img(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--image-opts", "driver=qcow2,file.filename=top.qcow2"], id="image-opts"),
        pytest.param(["--image-opts", "driver=qcow2,file.driver=file,file.filename=top.qcow2"], id="file-driver"),
        pytest.param(["--image-opts", "file.filename=top.qcow2"], id="probed"),
        pytest.param(['json:{"driver": "qcow2", "file.filename": "top.qcow2"}'], id="json"),
        pytest.param(['json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}'], id="nested-json"),
        pytest.param(["file:top.qcow2"], id="file-protocol"),
        pytest.param(["-U", "top.qcow2"], id="force-share"),
        pytest.param(["-f", "raw", "top.qcow2"], id="as-raw"),
        pytest.param(["-f", "qcow2", "--object", "secret,id=s,data=x", "top.qcow2"], id="object"),
    ],
)
def test_an_image_may_be_named_in_many_ways(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, arguments: list[str]
) -> None:
    chain(qemu_img, qemu_io)
    assert blocklib("info", *arguments) == qemu_img("info", *arguments)
    assert blocklib.json("info", *arguments) == qemu_img.json("info", *arguments)


def test_a_dirty_image_is_said_to_be_one(blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "dirty.qcow2", "1M")
    qemu_io.run("-f", "qcow2", "-c", "write 0 64k", "-c", "abort", "dirty.qcow2")
    assert "cleanly shut down: no\n" in blocklib("info", "dirty.qcow2")
    assert blocklib("info", "dirty.qcow2") == qemu_img("info", "dirty.qcow2")
    assert blocklib.json("info", "dirty.qcow2") == qemu_img.json("info", "dirty.qcow2")


@pytest.mark.parametrize("options", ["data_file=disk.raw", "data_file=disk.raw,data_file_raw=on"])
def test_an_image_that_cannot_be_read_yet_is_described_as_by_qemu_img(
    blocklib: CommandLine, qemu_img: Program, here: Path, options: str
) -> None:
    qemu_img("create", "-f", "qcow2", "-o", options, "disk.qcow2", "1M")
    assert blocklib("info", "disk.qcow2") == qemu_img("info", "disk.qcow2")
    assert blocklib.json("info", "disk.qcow2") == qemu_img.json("info", "disk.qcow2")


def test_names_that_are_no_text_are_printed_as_their_bytes(blocklib: CommandLine, qemu_img: Program, here: Path) -> None:
    name = os.fsdecode(b"d\xffsk.raw")
    sparse_raw(name)
    assert blocklib("info", name) == qemu_img("info", name)
    assert blocklib.json("info", name) == qemu_img.json("info", name)


def test_a_chain_that_cannot_be_followed_is_an_error_before_any_line(
    blocklib: CommandLine, qemu_img: Program, here: Path
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "nowhere.qcow2", "-F", "qcow2", "top.qcow2", "1M")
    result = blocklib.run("info", "--backing-chain", "top.qcow2")
    assert (result.code, result.out) == (1, "")
    assert "nowhere.qcow2" in result.err
    assert "backing file: nowhere.qcow2\n" in blocklib("info", "top.qcow2")


def test_a_chain_in_a_circle_is_an_error(blocklib: CommandLine, qemu_img: Program, here: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "two.qcow2", "-F", "qcow2", "one.qcow2", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "one.qcow2", "-F", "qcow2", "two.qcow2", "1M")
    assert "one.qcow2" in blocklib.fails("info", "--backing-chain", "one.qcow2")


def test_untrusted_shows_one_image_and_opens_no_other(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path
) -> None:
    chain(qemu_img, qemu_io)
    assert blocklib("info", "--untrusted", "top.qcow2") == qemu_img("info", "top.qcow2")
    assert "middle.qcow2" in blocklib.fails("info", "--untrusted", "--backing-chain", "top.qcow2")
    blocklib.fails("info", "--untrusted", "base.raw")
    blocklib.fails("info", "--untrusted", 'json:{"driver": "raw", "file.filename": "base.raw"}')


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "one file name"),
        (["a", "b"], "one file name"),
        (["nowhere"], "nowhere"),
        (["."], "directory"),
        ([""], "empty"),
        (["a\0b"], "a"),
        (["--output=xml", "a"], "xml"),
        (["-f", "qcow2", "--image-opts", "driver=qcow2,file.filename=a"], "--image-opts"),
        (["-f", "nothing", "a"], "nothing"),
        (["-f", "qcow2", "a"], "qcow2"),
        (["--image-opts", "driver=qcow2"], "file"),
        (["--image-opts", "driver=raw,file.filename=a,bogus=1"], "bogus"),
        (['json:{"driver":'], "json"),
        (["json:[]"], "json"),
        (["json:" + '{"a":' * 100_000], "nested"),
        (["nothing:a"], "nothing"),
        (["--object", "secret,id=x", "a"], "secret"),
        (["--object", "iothread,id=x", "a"], "iothread"),
    ],
)
def test_what_cannot_be_shown_is_one_line(blocklib: CommandLine, here: Path, arguments: list[str], part: str) -> None:
    (here / "a").write_bytes(b"garbage" * 100)
    assert part in blocklib.fails("info", *arguments)


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_that_is_cut_off_is_one_line(blocklib: CommandLine, here: Path, version: int) -> None:
    (here / "cut").write_bytes(b"QFI\xfb" + version.to_bytes(4, "big") + bytes(20))
    blocklib.fails("info", "cut")


def test_snapshots_are_listed_as_qemu_img_lists_them() -> None:
    moment = datetime(2024, 2, 29, 12, 0, 1, 500_000, UTC)
    snapshot = SnapshotInfo("1", "before", moment, 3 << 20, 3_723_004_000_000, 1 << 30)
    info = ImageInfo("a", "qcow2", 1 << 30, 4096, snapshots=(snapshot,))
    (entry,) = json_of(info)["snapshots"]
    assert entry["id"] == "1"
    assert (entry["date-sec"], entry["date-nsec"]) == (1709208001, 500_000_000)
    assert (entry["vm-clock-sec"], entry["vm-clock-nsec"]) == (3723, 4_000_000)
    assert "Snapshot list:" in human_lines(info)
    line = snapshot_table(info.snapshots)[1]
    assert line.startswith("1         before              3 MiB ")
    assert "01:02:03.004" in line


def test_unknown_disk_usage_is_unavailable() -> None:
    info = ImageInfo("a", "raw", 512, None)
    assert "disk size: unavailable" in human_lines(info)
    assert "actual-size" not in json_of(info)
