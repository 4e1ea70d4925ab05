"""``commit`` leaves what qemu-img leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.images import chain
from tests.cli.running import CommandLine
from tests.programs import Program

NAMES = ("top.qcow2", "middle.qcow2", "base.raw")


@pytest.fixture
def twins(qemu_img: Program, qemu_io: Program, here: Path) -> tuple[Path, Path]:
    """The same chain twice, in two folders, and `copy.raw` with what its top reads as."""
    chain(qemu_img, qemu_io)
    qemu_img("convert", "-O", "raw", "top.qcow2", "copy.raw")
    for folder in ("theirs", "ours"):
        (here / folder).mkdir()
        for name in NAMES:
            shutil.copy(name, here / folder / name)
    return here / "theirs", here / "ours"


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="plain"),
        pytest.param(["-q"], id="quiet"),
        pytest.param(["-d"], id="not-emptied"),
        pytest.param(["-b", "{folder}/base.raw"], id="base-by-path"),
        pytest.param(["-b", "base.raw"], id="base-as-stored"),
        pytest.param(["-b", "{folder}/middle.qcow2"], id="immediate-base"),
        pytest.param(["-f", "qcow2", "-t", "writethrough"], id="cache-mode"),
        pytest.param(["-r", "1G"], id="rate"),
    ],
)
def test_commit_is_that_of_qemu_img(
    blocklib: CommandLine, qemu_img: Program, twins: tuple[Path, Path], flags: list[str]
) -> None:
    theirs, ours = twins
    said = qemu_img("commit", *(flag.format(folder=theirs) for flag in flags), theirs / "top.qcow2")
    assert blocklib("commit", *(flag.format(folder=ours) for flag in flags), ours / "top.qcow2") == said
    qemu_img("compare", "-F", "raw", ours / "top.qcow2", "copy.raw")
    for name in NAMES[1:]:
        if "base.raw" in " ".join(flags) and name == "middle.qcow2":
            continue  # no longer valid, in both
        qemu_img("compare", theirs / name, ours / name)
    for name in NAMES[:2]:
        qemu_img("check", ours / name)
    their_own, our_own = (
        [entry for entry in qemu_img.json("map", folder / "top.qcow2") if entry["depth"] == 0 and entry["present"]]
        for folder in twins
    )
    assert [entry["start"] for entry in our_own] == [entry["start"] for entry in their_own]


def test_percentages_are_printed(blocklib: CommandLine, twins: tuple[Path, Path]) -> None:
    printed = blocklib("commit", "-p", twins[1] / "top.qcow2")
    assert printed.startswith("    (0.00/100%)\r")
    assert printed.endswith("    (100.00/100%)\r\nImage committed.\n")


def test_an_image_is_committed_by_its_options(blocklib: CommandLine, qemu_img: Program, twins: tuple[Path, Path]) -> None:
    folder = twins[1]
    assert blocklib("commit", "--image-opts", f"driver=qcow2,file.filename={folder}/top.qcow2") == "Image committed.\n"
    qemu_img("compare", "-F", "raw", folder / "middle.qcow2", "copy.raw", codes=[0, 1])
    qemu_img("compare", "-F", "raw", folder / "top.qcow2", "copy.raw")


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "file name"),
        (["a", "b"], "file name"),
        (["nowhere"], "nowhere"),
        (["copy.raw"], "backing"),
        (["-f", "raw", "top.qcow2"], "backing"),
        (["-b", "nowhere", "top.qcow2"], "nowhere"),
        (["-b", "top.qcow2", "top.qcow2"], "top.qcow2"),
        (["-b", "", "top.qcow2"], "chain"),
        (["-r", "x", "top.qcow2"], "rate"),
        (["-t", "some", "top.qcow2"], "-t some"),
        (["--untrusted", "-f", "qcow2", "top.qcow2"], "middle.qcow2"),
    ],
)
def test_what_cannot_be_committed_is_one_line_and_stays(
    blocklib: CommandLine, here: Path, arguments: list[str], part: str
) -> None:
    before = {name: (here / name).read_bytes() for name in NAMES}
    result = blocklib.run("commit", *arguments)
    assert result.code == 1
    assert part in result.err.splitlines()[-1]
    assert {name: (here / name).read_bytes() for name in NAMES} == before
