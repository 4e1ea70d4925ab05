"""``rebase`` leaves what qemu-img leaves: the same content over another backing file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.images import chain
from tests.cli.running import CommandLine
from tests.programs import Program


@pytest.fixture
def images(qemu_img: Program, qemu_io: Program, here: Path) -> None:
    """The chain `top.qcow2` -> `middle.qcow2` -> `base.raw`; `copy.raw` reads as top, `other.raw` like nothing else."""
    chain(qemu_img, qemu_io)
    qemu_img("convert", "-O", "raw", "top.qcow2", "copy.raw")
    qemu_img("create", "-q", "-f", "raw", "other.raw", "6M")
    qemu_io("-f", "raw", "-c", "write -P 77 0 3M", "other.raw")


def _backing(qemu_img: Program, name: str) -> tuple[str | None, str | None]:
    info = qemu_img.json("info", name)
    return info.get("backing-filename"), info.get("backing-filename-format")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "backing"),
    [
        pytest.param(["-b", "base.raw", "-F", "raw"], ("base.raw", "raw"), id="one-image-further-down"),
        pytest.param(["-b", "other.raw", "-F", "raw"], ("other.raw", "raw"), id="unrelated"),
        pytest.param(["-b", "./copy.raw", "-F", "raw"], ("./copy.raw", "raw"), id="identical"),
        pytest.param(["-b", "middle.qcow2", "-F", "qcow2"], ("middle.qcow2", "qcow2"), id="the-same"),
        pytest.param(["-b", ""], (None, None), id="none"),
        pytest.param(
            ["-f", "qcow2", "-t", "writethrough", "-T", "none", "-b", "base.raw", "-F", "raw"],
            ("base.raw", "raw"),
            id="cache-modes",
        ),
        pytest.param(["-U", "-q", "-b", "base.raw", "-F", "raw"], ("base.raw", "raw"), id="quiet"),
    ],
)
def test_the_image_reads_as_before(
    blocklib: CommandLine, qemu_img: Program, arguments: list[str], backing: tuple[str | None, str | None]
) -> None:
    assert blocklib("rebase", *arguments, "top.qcow2") == ""
    assert _backing(qemu_img, "top.qcow2") == backing
    qemu_img("compare", "-F", "raw", "top.qcow2", "copy.raw")
    qemu_img("check", "top.qcow2")


@pytest.mark.usefixtures("images")
def test_only_what_differs_is_copied(blocklib: CommandLine, qemu_img: Program) -> None:
    blocklib("rebase", "-b", "base.raw", "-F", "raw", "top.qcow2")
    own = [entry for entry in qemu_img.json("map", "top.qcow2") if entry["depth"] == 0 and entry["present"]]
    # Its own clusters, and those of the image that is gone from the chain.
    assert sum(entry["length"] for entry in own) < 2 << 20


@pytest.mark.usefixtures("images")
def test_an_image_is_rebased_by_its_options(blocklib: CommandLine, qemu_img: Program) -> None:
    blocklib("rebase", "--image-opts", "-b", "other.raw", "-F", "raw", "driver=qcow2,file.filename=top.qcow2")
    assert _backing(qemu_img, "top.qcow2") == ("other.raw", "raw")
    qemu_img("compare", "-F", "raw", "top.qcow2", "copy.raw")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "backing"),
    [
        (["-b", "nowhere", "-F", "qcow2"], ("nowhere", "qcow2")),
        (["-b", ""], (None, None)),
        (["-F", "qcow2"], (None, None)),
        (["-b", "", "-F", "raw"], (None, None)),
    ],
)
def test_unsafe_changes_only_the_name(
    blocklib: CommandLine, qemu_img: Program, here: Path, arguments: list[str], backing: tuple[str | None, str | None]
) -> None:
    (here / "middle.qcow2").unlink()
    blocklib("rebase", "-u", *arguments, "top.qcow2")
    assert _backing(qemu_img, "top.qcow2") == backing


@pytest.mark.usefixtures("images")
def test_percentages_are_printed(blocklib: CommandLine) -> None:
    printed = blocklib("rebase", "-p", "-b", "other.raw", "-F", "raw", "top.qcow2")
    assert printed.startswith("    (0.00/100%)\r")
    assert printed.endswith("    (100.00/100%)\r\n")


@pytest.mark.usefixtures("images")
def test_an_encrypted_backing_file_is_named_with_its_secret(blocklib: CommandLine, qemu_img: Program) -> None:
    secret = ("--object", "secret,id=key,data=opensesame")
    encryption = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    blocklib("create", "-q", *secret, "-f", "qcow2", "-o", encryption, "new.qcow2", "6M")
    name = 'json:{"driver":"qcow2","encrypt.key-secret":"key","file.filename":"new.qcow2"}'
    before = Path("top.qcow2").read_bytes()
    assert "encrypt.key-secret" in blocklib.fails("rebase", "-b", name, "-F", "qcow2", "top.qcow2")
    assert "encrypt.key-secret" in blocklib.fails("rebase", *secret, "-b", "new.qcow2", "-F", "qcow2", "top.qcow2")
    assert Path("top.qcow2").read_bytes() == before
    blocklib("rebase", *secret, "-b", name, "-F", "qcow2", "top.qcow2")
    assert _backing(qemu_img, "top.qcow2") == (name, "qcow2")
    qemu_img("convert", *secret, "-O", "raw", "top.qcow2", "after.raw")
    assert Path("after.raw").read_bytes() == Path("copy.raw").read_bytes()


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["top.qcow2"], "-b"),
        (["-b", "base.raw"], "file name"),
        (["-b", "base.raw", "a", "b"], "file name"),
        (["-b", "base.raw", "top.qcow2"], "format"),
        (["-u", "-b", "base.raw", "top.qcow2"], "format"),
        (["-b", "base.raw", "-F", "nothing", "top.qcow2"], "nothing"),
        (["-u", "-b", "base.raw", "-F", "nothing", "top.qcow2"], "nothing"),
        (["-b", "nowhere", "-F", "qcow2", "top.qcow2"], "nowhere"),
        (["-b", "top.qcow2", "-F", "qcow2", "top.qcow2"], "top.qcow2"),
        (["-t", "some", "-b", "base.raw", "-F", "raw", "top.qcow2"], "-t some"),
        (["-T", "some", "-b", "base.raw", "-F", "raw", "top.qcow2"], "-T some"),
        (["-f", "raw", "-b", "base.raw", "-F", "raw", "copy.raw"], "raw"),
        (["-b", "base.raw", "-F", "raw", "nowhere"], "nowhere"),
        (["--untrusted", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"], "middle.qcow2"),
    ],
)
def test_what_cannot_be_rebased_is_one_line_and_stays(
    blocklib: CommandLine, qemu_img: Program, arguments: list[str], part: str
) -> None:
    assert part in blocklib.fails("rebase", *arguments)
    assert _backing(qemu_img, "top.qcow2") == ("middle.qcow2", "qcow2")
    qemu_img("compare", "-F", "raw", "top.qcow2", "copy.raw")
