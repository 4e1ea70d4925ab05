"""What opening opens: nothing but what the caller names, unless a policy allows what an image names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, Reference, policy
from tests.api.images import PATTERN, ROOT, make_chain, make_disk, make_raw, patch

ALLOW_ONE = "references=policy.SameDirectory(max_depth=1)"
OPENED_BY = {
    "blocklib.info('top.qcow2')": {"top.qcow2"},
    "blocklib.info('top.qcow2', format='qcow2')": {"top.qcow2"},
    "blocklib.check('top.qcow2')": {"top.qcow2"},
    "blocklib.open('top.qcow2').close()": {"top.qcow2"},
    "blocklib.open('top.qcow2', 'r+').close()": {"top.qcow2"},
    "blocklib.open('top.qcow2', backing=None).close()": {"top.qcow2"},
    "blocklib.open('top.qcow2', 'r+', backing=None).close()": {"top.qcow2"},
    "blocklib.open('top.qcow2', backing={'driver': 'raw', 'file': 'golden.img'}).close()": {"top.qcow2", "golden.img"},
    f"blocklib.open('top.qcow2', format='qcow2', {ALLOW_ONE}).close()": {"top.qcow2", "base.qcow2"},
    "blocklib.open('top.qcow2', format='qcow2', references='allow').close()": {"top.qcow2", "base.qcow2", "golden.img"},
    "blocklib.create('new.qcow2', 1 << 20, format='qcow2')": {"new.qcow2"},
}
"""What a call opens of the files here; a refusal is one of the calls' ends."""


def test_no_file_is_opened_but_those_that_the_caller_allows() -> None:
    make_chain()
    # By the interpreter's own account, in a process of its own because an audit hook stays for ever.
    script = (
        "import json, os, sys\n"
        "import blocklib\n"
        "from blocklib import policy\n"
        "opened = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and isinstance(arguments[0], str):\n"
        "        opened.append(os.path.abspath(arguments[0]))\n"
        "sys.addaudithook(hook)\n"
        "found = {}\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    opened.clear()\n"
        "    try:\n"
        "        eval(call)\n"
        "    except blocklib.PolicyError:\n"
        "        pass\n"
        "    here = os.getcwd() + '/'\n"
        "    found[call] = [name.removeprefix(here) for name in opened if name.startswith(here)]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(OPENED_BY))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {call: set(names) for call, names in json.loads(done.stdout).items()} == OPENED_BY


# -- deny ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_references_are_denied_by_default(mode: Any) -> None:
    make_chain()
    with pytest.raises(PermissionError) as caught:
        blocklib.open("top.qcow2", mode)
    error = caught.value
    assert isinstance(error, blocklib.PolicyError)
    assert error.reference == Reference("backing", "base.qcow2", "qcow2", "top.qcow2", 1)
    assert error.node == "top.qcow2"
    assert "'base.qcow2'" in str(error)
    blocklib.open("top.qcow2", "r+", backing=None).close()  # nothing stayed open or locked


def test_a_refusal_ends_with_the_argument_that_allows_it() -> None:
    make_chain()
    with pytest.raises(blocklib.PolicyError) as caught:
        blocklib.open("top.qcow2")
    text = str(caught.value)
    assert text.endswith('pass references=blocklib.policy.SameDirectory() or references="allow"')
    argument = text.rpartition("pass references=")[2].partition(" or ")[0]
    blocklib.open("top.qcow2", format="qcow2", references=eval(argument, {"blocklib": blocklib})).close()


def test_a_refusal_of_a_file_elsewhere_suggests_a_list(folder: Path) -> None:
    (folder / "other").mkdir()
    make_raw("other/base.img", 1 * MiB)
    blocklib.create("top.qcow2", format="qcow2", backing="other/base.img", backing_format="raw")
    with pytest.raises(blocklib.PolicyError, match="AllowList") as caught:
        blocklib.open("top.qcow2", format="qcow2", references=policy.SameDirectory())
    argument = str(caught.value).rpartition("pass references=")[2].partition(" or ")[0]
    blocklib.open("top.qcow2", format="qcow2", references=eval(argument, {"blocklib": blocklib})).close()


# -- allow -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("references", ["allow", policy.SameDirectory(), lambda ref: Path(ref.name)])
def test_where_references_are_allowed_the_format_must_be_said(references: Any) -> None:
    make_chain()
    with pytest.raises(blocklib.UsageError, match="format="):
        blocklib.open("top.qcow2", references=references)
    blocklib.open("top.qcow2", format="qcow2", references=references).close()
    blocklib.open({"driver": "qcow2", "file": "top.qcow2"}, references=references).close()


def test_backing_files_are_opened_for_reading_only() -> None:
    make_chain()
    with blocklib.open("top.qcow2", "r+", format="qcow2", references="allow") as disk:
        assert [node.read_only for node in disk.chain()] == [False, True, True]
        with blocklib.open("golden.img", format="raw") as other:  # readers share
            assert other.read(0, 1) == b"g"
        disk.write(0, PATTERN)
    with blocklib.open("golden.img", format="raw") as golden:
        assert golden.read(0, 4096) == b"g" * 4096


def test_a_guessed_backing_file_may_name_no_other() -> None:
    make_chain()
    _drop_backing_format("top.qcow2")
    assert blocklib.info("top.qcow2").backing_format is None
    with pytest.raises(blocklib.PolicyError) as caught:
        blocklib.open("top.qcow2", format="qcow2", references="allow")
    assert (caught.value.reference.name, caught.value.reference.depth) == ("golden.img", 2)
    for restricted in (policy.SameDirectory(), policy.AllowList(["base.qcow2"])):
        with pytest.raises(blocklib.PolicyError, match="format"):
            blocklib.open("top.qcow2", format="qcow2", references=restricted)


def _drop_backing_format(name: str) -> None:
    """Turn the header extension with the backing file's format into one that nobody knows: old images lack it."""
    data = Path(name).read_bytes()[:4096]
    place = data.find(b"\xe2\x79\x2a\xca")
    assert place > 0
    patch(name, place, b"\x12\x34\x56\x78")


def test_a_backing_file_without_format_and_magic_is_not_guessed_to_be_raw() -> None:
    make_raw("golden.img", 1 * MiB, PATTERN)
    blocklib.create("top.qcow2", format="qcow2", backing="golden.img", backing_format="raw")
    _drop_backing_format("top.qcow2")
    with pytest.raises(blocklib.FormatMismatchError) as caught:
        blocklib.open("top.qcow2", format="qcow2", references="allow")
    assert caught.value.node == "golden.img"
    assert any("top.qcow2" in note for note in caught.value.__notes__)


# -- restricted policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../base.qcow2",
        "sub/base.qcow2",
        "/etc/hostname",
        'json:{"driver":"file","filename":"base.qcow2"}',
        "file:base.qcow2",
        "nbd://localhost/x",
        "link.qcow2",
        "folder",
        "pipe",
        "socket",
    ],
)
@pytest.mark.parametrize("restricted", [policy.SameDirectory(), policy.AllowList(["other.qcow2"])])
def test_a_restricted_policy_opens_regular_files_beside_the_image_and_nothing_else(
    folder: Path, name: str, restricted: Any
) -> None:
    make_disk("base.qcow2", 1 * MiB + 64 * KiB)
    (folder / "sub").mkdir()
    os.link("base.qcow2", "sub/base.qcow2")
    (folder / "link.qcow2").symlink_to("base.qcow2")
    (folder / "folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        blocklib.create("top.qcow2", 1 * MiB, format="qcow2", backing=name, backing_format="qcow2")
        with pytest.raises(blocklib.PolicyError) as caught:
            blocklib.open("top.qcow2", format="qcow2", references=restricted)
        assert caught.value.reference.name == name


def test_same_directory_is_that_of_the_image_and_not_the_current_one(folder: Path) -> None:
    (folder / "images").mkdir()
    os.chdir("images")
    make_chain()
    os.chdir(folder)
    for name in ("images/top.qcow2", str(folder / "images" / "top.qcow2"), "./images/../images/top.qcow2"):
        with blocklib.open(name, format="qcow2", references=policy.SameDirectory()) as disk:
            assert len(disk.chain()) == 3
            assert disk.read(64 * KiB, 1) == b"b"


def test_same_directory_goes_only_so_deep() -> None:
    make_chain()
    with pytest.raises(blocklib.PolicyError, match="max_depth is 1") as caught:
        blocklib.open("top.qcow2", format="qcow2", references=policy.SameDirectory(max_depth=1))
    assert (caught.value.reference.name, caught.value.reference.depth) == ("golden.img", 2)


def test_an_allow_list_allows_what_is_listed() -> None:
    make_chain()
    with pytest.raises(blocklib.PolicyError, match="not in the list") as caught:
        blocklib.open("top.qcow2", format="qcow2", references=policy.AllowList(["base.qcow2"]))
    assert caught.value.reference.name == "golden.img"
    here = str(Path("golden.img").absolute())
    blocklib.open("top.qcow2", format="qcow2", references=policy.AllowList(["base.qcow2", here])).close()


# -- a function as policy --------------------------------------------------------------------------------------------------


def test_a_function_is_asked_once_for_each_reference_top_first() -> None:
    make_chain()
    asked: list[Reference] = []

    def decide(reference: Reference) -> Path:
        asked.append(reference)
        return Path(reference.name)

    with blocklib.open("top.qcow2", format="qcow2", references=decide) as disk:
        assert disk.read(0, 1) == b"g"
    assert asked == [
        Reference("backing", "base.qcow2", "qcow2", "top.qcow2", 1),
        Reference("backing", "golden.img", "raw", "base.qcow2", 2),
    ]


def test_a_function_refuses_by_none_and_its_errors_go_up() -> None:
    make_chain()
    with pytest.raises(blocklib.PolicyError, match="the policy refuses it"):
        blocklib.open("top.qcow2", format="qcow2", references=lambda _reference: None)

    class OwnError(Exception):
        pass

    def fail(_reference: Reference) -> None:
        raise OwnError

    with pytest.raises(OwnError):
        blocklib.open("top.qcow2", format="qcow2", references=fail)
    blocklib.open("top.qcow2", "r+", backing=None).close()


def test_a_function_may_answer_with_driver_options() -> None:
    make_chain()

    def window(reference: Reference) -> Any:
        return {"driver": "raw", "offset": 4096, "file": {"driver": "file", "filename": "golden.img"}}

    with blocklib.open("top.qcow2", format="qcow2", references=window) as disk:
        assert [node.driver for node in disk.chain()] == ["qcow2", "raw"]
        assert disk.read(1 * MiB - 4096, 1) == b"\0"


@pytest.mark.parametrize("references", ["Deny", "yes", None, True, ["base.qcow2"]])
def test_what_is_no_policy_is_refused(references: Any) -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with pytest.raises(blocklib.UsageError, match="policy"):  # although the image names no file
        blocklib.open("disk.qcow2", format="qcow2", references=references)


# -- names of the caller ---------------------------------------------------------------------------------------------------


def test_a_backing_file_that_the_caller_names_needs_no_permission() -> None:
    make_chain()
    ways: list[Callable[[], blocklib.Disk]] = [
        lambda: blocklib.open("top.qcow2", backing={"driver": "raw", "file.filename": "golden.img"}),
        lambda: blocklib.open("top.qcow2", backing={"driver": "raw", "file": {"driver": "file", "filename": "golden.img"}}),
        lambda: blocklib.open("top.qcow2", options={"backing.driver": "raw", "backing.file.filename": "golden.img"}),
        lambda: blocklib.open({"driver": "qcow2", "file": "top.qcow2", "backing": {"driver": "raw", "file": "golden.img"}}),
    ]
    for way in ways:
        with way() as disk:
            assert [node.filename for node in disk.chain()] == ["top.qcow2", "golden.img"]


def test_what_a_named_backing_file_names_itself_is_a_reference_again() -> None:
    make_chain()
    below = {"driver": "qcow2", "file.filename": "base.qcow2"}
    with pytest.raises(blocklib.PolicyError) as caught:
        blocklib.open("top.qcow2", backing=below)
    assert caught.value.reference == Reference("backing", "golden.img", "raw", "base.qcow2", 2)
    blocklib.open("top.qcow2", backing={**below, "backing": None}).close()
    blocklib.open("top.qcow2", format="qcow2", backing=below, references=policy.SameDirectory()).close()


def test_an_open_disk_can_be_the_backing_file() -> None:
    make_chain()
    with blocklib.open("base.qcow2", backing={"driver": "raw", "file": "golden.img"}) as base:
        with blocklib.open("top.qcow2", "r+", backing=base) as disk:
            assert repr(disk).endswith("top.qcow2 (qcow2) -> base.qcow2 (qcow2) -> golden.img (raw)>")
            assert disk.read(64 * KiB, 1) == b"b"
            disk.write(0, b"t")
        assert base.read(0, 1) == b"g"  # it stays open
    with blocklib.open("golden.img", format="raw") as golden:
        disk = blocklib.open("top.qcow2", backing=golden)
        golden.close()
        with disk:  # and lives as long as somebody uses it
            assert disk.read(1, 2) == b"gg"


def test_without_a_backing_file_holes_read_as_zero() -> None:
    make_chain()
    with blocklib.open("top.qcow2", backing=None) as disk:
        assert disk.read(0, 64 * KiB) == bytes(64 * KiB)
        assert disk.read(128 * KiB, 1) == b"t"
        assert len(disk.chain()) == 1
    make_raw("plain.img", 1 * MiB, PATTERN)
    for target, format in (("plain.img", "raw"), ("base.qcow2", None), ("plain.img", "file")):
        blocklib.open(target, format=format, backing=None).close()


def test_a_backing_file_given_twice_is_refused() -> None:
    make_chain()
    with pytest.raises(blocklib.OptionError, match="twice") as caught:
        blocklib.open({"driver": "qcow2", "file": "top.qcow2", "backing": None}, backing=None)
    assert caught.value.option == "backing"


# -- bad chains ------------------------------------------------------------------------------------------------------------


def test_a_chain_that_comes_back_to_a_file_is_refused() -> None:
    make_disk("a.qcow2", 1 * MiB + 64 * KiB)
    blocklib.create("b.qcow2", format="qcow2", backing="a.qcow2", backing_format="qcow2")
    blocklib.create("a.qcow2", 1 * MiB, format="qcow2", backing="./b.qcow2", backing_format="qcow2", overwrite=True)
    for name in ("a.qcow2", "b.qcow2"):
        with pytest.raises(blocklib.ImageCorruptError, match="comes back"):
            blocklib.open(name, format="qcow2", references="allow")
    blocklib.create("self.qcow2", 1 * MiB, format="qcow2", backing="self.qcow2", backing_format="qcow2")
    with pytest.raises(blocklib.ImageCorruptError, match="comes back"):
        blocklib.open("self.qcow2", format="qcow2", references=policy.SameDirectory())


def test_a_chain_may_be_only_so_long() -> None:
    make_chain()
    with pytest.raises(blocklib.ImageLimitError, match="chain_depth"):
        blocklib.open("top.qcow2", format="qcow2", references="allow", limits=blocklib.Limits(chain_depth=1))


def test_windows_of_one_file_are_no_loop() -> None:
    make_disk("one.qcow2", 1 * MiB + 64 * KiB)
    blocklib.create("two.qcow2", 1 * MiB, format="qcow2")
    first = Path("one.qcow2").read_bytes()
    Path("both.bin").write_bytes(first + Path("two.qcow2").read_bytes())

    def window(offset: int, size: int) -> dict[str, Any]:
        return {"driver": "raw", "offset": offset, "size": size, "file": {"driver": "file", "filename": "both.bin"}}

    rest = Path("both.bin").stat().st_size - len(first)
    below: dict[str, Any] = {"driver": "qcow2", "file": window(0, len(first))}
    with blocklib.open({"driver": "qcow2", "file": window(len(first), rest), "backing": below}) as disk:
        assert disk.read(0, 4096) == PATTERN


def test_a_missing_backing_file_names_itself_and_its_overlay() -> None:
    make_chain()
    Path("golden.img").unlink()
    with pytest.raises(blocklib.ImageNotFoundError) as caught:
        blocklib.open("top.qcow2", format="qcow2", references="allow")
    assert caught.value.filename == "golden.img"
    assert [note for note in caught.value.__notes__ if "base.qcow2" in note]


@pytest.mark.parametrize("format", ["vmdk", "nbd", "memory", "null-co", "nonsense"])
def test_a_backing_format_that_we_lack_is_the_images_fault(format: str) -> None:
    make_disk("base.qcow2", 1 * MiB + 64 * KiB)
    blocklib.create("top.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2")
    data = Path("top.qcow2").read_bytes()
    place = data.find(b"\xe2\x79\x2a\xca")
    patch("top.qcow2", place + 4, len(format).to_bytes(4, "big") + format.encode().ljust(8, b"\0"))
    assert blocklib.info("top.qcow2").backing_format == format
    with pytest.raises(blocklib.UnsupportedFeatureError) as caught:
        blocklib.open("top.qcow2", format="qcow2", references="allow")
    assert caught.value.features == (format,)
