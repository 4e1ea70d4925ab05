"""An external data file: made by create, opened under the same policy as a backing file, or where the caller says."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, Reference, policy
from blocklib.formats.qcow2 import data_file
from blocklib.formats.qcow2.node import Qcow2Node
from tests.api.images import PATTERN, make_disk, patch
from tests.encrypted import LUKS, open_encrypted
from tests.nodes import locked_bytes

OPEN: Any = {"format": "qcow2", "references": "allow"}


def make(name: str = "disk.qcow2", data_file: str = "data.img", **options: Any) -> None:
    """An image with PATTERN at 0, in `data_file`."""
    blocklib.create(name, 1 * MiB, format="qcow2", options={"data_file": data_file, **options})
    with blocklib.open(name, "r+", **OPEN) as disk:
        disk.write(0, PATTERN)


# -- the policy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_data_file_is_denied_by_default(mode: Any) -> None:
    make()
    before = Path("disk.qcow2").read_bytes()
    with pytest.raises(blocklib.PolicyError) as caught:
        blocklib.open("disk.qcow2", mode)
    assert caught.value.reference == Reference("data-file", "data.img", None, "disk.qcow2", 1)
    assert str(caught.value).endswith('pass references=blocklib.policy.SameDirectory() or references="allow"')
    assert Path("disk.qcow2").read_bytes() == before
    assert not locked_bytes("data.img")


@pytest.mark.parametrize(
    "references",
    [
        "allow",
        policy.SameDirectory(),
        policy.AllowList(["data.img"]),
        lambda reference: {"driver": "file", "filename": reference.name},
    ],
)
def test_what_the_policy_allows_is_opened(references: Any) -> None:
    make()
    with blocklib.open("disk.qcow2", format="qcow2", references=references) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN
        assert disk.chain()[0].data_filename == "data.img"


@pytest.mark.parametrize(
    "name", ["../data.img", "sub/data.img", "/etc/hostname", "nbd://h/x", "file:data.img", "link", "folder", "pipe", "socket"]
)
@pytest.mark.parametrize("restricted", [policy.SameDirectory(), policy.AllowList(["other.img"])])
def test_a_restricted_policy_opens_regular_files_beside_the_image_and_nothing_else(
    folder: Path, name: str, restricted: Any
) -> None:
    make(data_file="d" * len(name))
    _rename_in_header("disk.qcow2", "d" * len(name), name)
    Path("d" * len(name)).rename("data.img")
    (folder / "link").symlink_to("data.img")
    (folder / "sub").mkdir()
    (folder / "folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(blocklib.PolicyError) as caught:
            blocklib.open("disk.qcow2", "r+", format="qcow2", references=restricted)
    assert (caught.value.reference.kind, caught.value.reference.name) == ("data-file", name)


def _rename_in_header(image: str, old: str, new: str) -> None:
    patch(image, Path(image).read_bytes().index(old.encode()), new.encode())


def test_same_directory_is_that_of_the_image(folder: Path) -> None:
    (folder / "images").mkdir()
    os.chdir("images")
    make()
    os.chdir(folder)
    with blocklib.open("images/disk.qcow2", format="qcow2", references=policy.SameDirectory()) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN


def test_json_in_a_name_is_options_only_where_everything_is_allowed() -> None:
    text = 'json:{"driver":"file","filename":"x"}'
    make(data_file="d" * len(text))
    _rename_in_header("disk.qcow2", "d" * len(text), text)
    Path("d" * len(text)).rename("x")
    for references in ("deny", policy.SameDirectory(), policy.AllowList([text, "x"])):
        with pytest.raises(blocklib.PolicyError):
            blocklib.open("disk.qcow2", format="qcow2", references=references)
    with blocklib.open("disk.qcow2", **OPEN) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN


def test_the_data_file_of_a_backing_file_is_asked_for_too() -> None:
    make("base.qcow2")
    blocklib.create("top.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2")
    asked: list[Reference] = []

    def decide(reference: Reference) -> Path:
        asked.append(reference)
        return Path(reference.name)

    with blocklib.open("top.qcow2", format="qcow2", references=decide) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN
    assert asked == [
        Reference("backing", "base.qcow2", "qcow2", "top.qcow2", 1),
        Reference("data-file", "data.img", None, "base.qcow2", 2),
    ]
    with pytest.raises(blocklib.PolicyError):
        blocklib.open("top.qcow2", backing={"driver": "qcow2", "file": "base.qcow2"})


def test_metadata_work_needs_no_data_file() -> None:
    make()
    Path("data.img").unlink()
    assert blocklib.info("disk.qcow2").format_specific["data-file"] == "data.img"
    assert blocklib.check("disk.qcow2").clean


# -- the caller's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"data_file": {"driver": "file", "filename": "moved.img"}}, {"options": {"data-file.filename": "moved.img"}}],
    ids=["argument", "option"],
)
def test_the_caller_names_the_data_file_without_a_policy(given: Any) -> None:
    make()
    Path("data.img").rename("moved.img")
    with blocklib.open("disk.qcow2", "r+", **given) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN
        disk.write(64 * KiB, PATTERN)
    assert Path("moved.img").read_bytes()[64 * KiB : 68 * KiB] == PATTERN


def test_the_data_file_may_be_an_open_disk() -> None:
    make()
    Path("data.img").rename("moved.img")
    with blocklib.open("moved.img", format="raw") as moved, blocklib.open("disk.qcow2", data_file=moved) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN


def test_a_data_file_open_for_reading_is_no_place_to_write() -> None:
    make()
    with blocklib.open("data.img", format="raw") as data, pytest.raises(blocklib.ReadOnlyError):
        blocklib.open("disk.qcow2", "r+", data_file=data)


def test_a_data_file_for_an_image_that_has_none_is_refused() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with pytest.raises(blocklib.OptionError, match="data file") as caught:
        blocklib.open("disk.qcow2", data_file={"driver": "file", "filename": "disk.qcow2"})
    assert caught.value.option == "data-file"


def test_a_data_file_given_twice_is_refused() -> None:
    make()
    given: Any = {"driver": "file", "filename": "data.img"}
    with pytest.raises(blocklib.OptionError, match="twice"):
        blocklib.open("disk.qcow2", data_file=given, options={"data-file.filename": "data.img"})


def test_an_image_without_the_name_needs_the_callers() -> None:
    make()
    data = Path("disk.qcow2").read_bytes()
    patch("disk.qcow2", data.index(b"DATA"), b"\x12\x34\x56\x78")
    with pytest.raises(blocklib.ImageCorruptError, match="data_file="):
        blocklib.open("disk.qcow2", **OPEN)
    with blocklib.open("disk.qcow2", data_file={"driver": "file", "filename": "data.img"}) as disk:
        assert disk.read(0, 4 * KiB) == PATTERN


def test_an_image_that_names_itself_as_its_data_file_is_refused() -> None:
    make(data_file="data_file0")
    _rename_in_header("disk.qcow2", "data_file0", "disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    for mode in ("r", "r+"):
        with pytest.raises(blocklib.BlocklibError) as caught:
            blocklib.open("disk.qcow2", mode, **OPEN)
        assert isinstance(caught.value, (blocklib.ImageCorruptError, blocklib.LockedError))
    assert Path("disk.qcow2").read_bytes() == before


def test_a_missing_data_file_is_an_error_that_says_for_which_image() -> None:
    make()
    Path("data.img").unlink()
    with pytest.raises(blocklib.ImageNotFoundError) as caught:
        blocklib.open("disk.qcow2", **OPEN)
    assert caught.value.__notes__ == ["while opening the data file of disk.qcow2"]


def test_locks_are_those_of_qemu() -> None:
    make()
    with blocklib.open("disk.qcow2", "r+", **OPEN):
        assert {100, 101, 103, 203} <= locked_bytes("data.img")
        assert 201 not in locked_bytes("data.img") or 201 in locked_bytes("disk.qcow2")
    with blocklib.open("disk.qcow2", **OPEN):
        assert 101 not in locked_bytes("data.img")
        assert {100, 203} <= locked_bytes("data.img")


# -- making one ------------------------------------------------------------------------------------------------------------


def test_create_makes_the_data_file_beside_the_image(folder: Path) -> None:
    (folder / "images").mkdir()
    made = blocklib.create("images/disk.qcow2", 1 * MiB, format="qcow2", options={"data_file": "data.img"})
    assert made.format_specific["data-file"] == "data.img"
    assert Path("images/data.img").stat().st_size == 1 * MiB


@pytest.mark.parametrize("used", ["disk.qcow2", "data.img"])
def test_create_empties_neither_file_where_one_is_in_use(used: str) -> None:
    for name in ("disk.qcow2", "data.img"):
        blocklib.create(name, 1 * MiB, format="raw")
        patch(name, 0, PATTERN)
    before = [Path(name).read_bytes() for name in ("disk.qcow2", "data.img")]
    with blocklib.open(used, "r+", format="raw"), pytest.raises(blocklib.LockedError):
        blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"data_file": "data.img"}, overwrite=True)
    assert [Path(name).read_bytes() for name in ("disk.qcow2", "data.img")] == before


def test_create_replaces_a_data_file_only_if_told_to() -> None:
    Path("data.img").write_bytes(b"precious")
    with pytest.raises(blocklib.ImageExistsError):
        make()
    assert Path("data.img").read_bytes() == b"precious"
    assert not Path("disk.qcow2").exists()
    blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options={"data_file": "data.img"}, overwrite=True)
    assert Path("data.img").read_bytes() == bytes(1 * MiB)


@pytest.mark.parametrize(
    "options",
    [
        {"data_file_raw": True},
        {"data_file": "data.img", "compat": "0.10"},
        {"data_file": ""},
        {"data_file": "disk.qcow2"},
        {"data_file": "./disk.qcow2"},
        {"data_file": "nowhere/data.img"},
        {"data_file": 'json:{"driver":"file","filename":"data.img"}'},
        {"data_file": "data.img", "data_file_raw": True, "backing_file": "base.qcow2", "backing_fmt": "qcow2"},
        {"data_file": "./base.qcow2", "backing_file": "base.qcow2", "backing_fmt": "qcow2"},
    ],
)
def test_what_makes_no_sense_makes_no_file(options: dict[str, Any]) -> None:
    blocklib.create("base.qcow2", 1 * MiB, format="qcow2")
    before = Path("base.qcow2").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(blocklib.BlocklibError):
            blocklib.create("disk.qcow2", 1 * MiB, format="qcow2", options=options, overwrite=overwrite)
    assert Path("base.qcow2").read_bytes() == before
    assert [str(path) for path in Path().iterdir()] == ["base.qcow2"]


def test_a_convert_that_fails_leaves_no_data_file() -> None:
    make_disk("source.qcow2", 2 * MiB)

    def stop(_progress: object) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError):
        blocklib.convert(
            "source.qcow2", "disk.qcow2", format="qcow2", options={"data_file": "data.img"}, progress=stop
        )
    assert [str(path) for path in Path().iterdir()] == ["source.qcow2"]


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("raw", [False, True], ids=["plain", "raw"])
def test_an_encrypted_disk_that_grows_within_a_cluster_reads_zero_there(raw: bool, preallocation: Any) -> None:
    """Zeroes in the data file would be noise to the guest: what was made zero there has to stay."""
    options = {"cluster_size": 4096, "data_file": "d.img", "data_file_raw": raw, **LUKS}
    blocklib.create("i.qcow2", 28672, format="qcow2", options=options)
    with open_encrypted("i.qcow2", "r+", references="allow") as disk:
        disk.write(0, b"x" * 28672)
        disk.truncate(6144, shrink=True)
        disk.truncate(22528, preallocation=preallocation)
        assert disk.read(0, 22528) == b"x" * 6144 + bytes(16384)
    with open_encrypted("i.qcow2", references="allow") as disk:
        assert disk.read(0, 22528) == b"x" * 6144 + bytes(16384)


@pytest.mark.parametrize("raw", [False, True], ids=["plain", "raw"])
@pytest.mark.parametrize("extended", [False, True], ids=["clusters", "subclusters"])
def test_zeroing_a_part_of_an_encrypted_sector_leaves_the_rest_of_it(raw: bool, extended: bool) -> None:
    options = {"cluster_size": 16 * KiB, "extended_l2": extended, "data_file": "d.img", "data_file_raw": raw, **LUKS}
    blocklib.create("i.qcow2", 64 * KiB, format="qcow2", options=options)
    content = bytearray(b"x" * 64 * KiB)
    with open_encrypted("i.qcow2", "r+", references="allow") as disk:
        disk.write(0, content)
        for start, length in ((354, 158), (4000, 200), (20_001, 9_000), (65_000, 536)):
            disk.write_zeroes(start, length)
            content[start : start + length] = bytes(length)
        assert disk.read(0, disk.size) == content


def test_what_is_written_while_its_cluster_is_given_back_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1 << 20, format="qcow2", options={"data_file": "data"})
    give_back = data_file.after_unmapping
    with blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap") as disk:
        disk.write(0, b"old" * 65536)

        def late(node: Qcow2Node, offset: int, length: int) -> None:
            disk.write(65536 + 100, b"new")  # between the entry and the space
            give_back(node, offset, length)

        monkeypatch.setattr(data_file, "after_unmapping", late)
        for verb in ("discard", "zero"):
            if verb == "discard":
                disk.discard(0, 196608)
            else:
                disk.write_zeroes(0, 196608, unmap=True)
            assert disk.read(0, 196608) == bytes(65636) + b"new" + bytes(196608 - 65639)
            assert (tmp_path / "data").stat().st_blocks * 512 <= 65536
    assert blocklib.check(path, format="qcow2").clean
