"""``map`` prints what qemu-img prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.images import chain, sparse_raw
from tests.cli.running import CommandLine
from tests.programs import Program


def test_map_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, any_image: str) -> None:
    assert blocklib("map", "--output=json", any_image) == qemu_img("map", "--output=json", any_image)
    theirs = qemu_img.run("map", any_image)
    ours = blocklib.run("map", any_image)
    # Compressed clusters end the human table, in both.
    assert (ours.code, ours.out) == (theirs.returncode, theirs.stdout)


@pytest.mark.parametrize(
    "window",
    [
        pytest.param(["-s", "100k", "-l", "1M"], id="short-options"),
        pytest.param(["--start-offset=64k", "--max-length=4M"], id="long-options"),
        pytest.param(["-s", "100000", "-l", "1"], id="one-byte"),
        pytest.param(["-s", "1", "-l", "1000"], id="odd"),
        pytest.param(["-s", "0x10000"], id="hexadecimal"),
        pytest.param(["-l", "100M"], id="longer-than-the-disk"),
        pytest.param(["-s", "8M"], id="at-the-end"),
        pytest.param(["-s", "100M"], id="past-the-end"),
        pytest.param(["-l", "0"], id="nothing"),
    ],
)
def test_a_window_is_that_of_qemu_img(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, window: list[str]
) -> None:
    chain(qemu_img, qemu_io)
    for arguments in (["map", *window, "top.qcow2"], ["map", "--output=json", *window, "top.qcow2"]):
        assert blocklib(*arguments) == qemu_img(*arguments)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("driver=qcow2,file.filename=top.qcow2", id="chain"),
        pytest.param("driver=raw,file.filename=sparse.raw,offset=64k,size=2M", id="raw-window"),
        pytest.param(
            "driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=sparse.raw", id="other-backing"
        ),
    ],
)
def test_images_named_by_options_are_mapped(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, name: str
) -> None:
    chain(qemu_img, qemu_io)
    sparse_raw()
    arguments = ["map", "--output=json", "--image-opts", name]
    assert blocklib(*arguments) == qemu_img(*arguments)


def test_untrusted_maps_no_chain(blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path) -> None:
    chain(qemu_img, qemu_io)
    assert "middle.qcow2" in blocklib.fails("map", "--untrusted", "-f", "qcow2", "top.qcow2")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "one file name"),
        (["-s", "x", "a"], "start offset"),
        (["-s", "-1", "a"], "start offset"),
        (["-l", "9E", "a"], "maximal length"),
        (["--output=xml", "a"], "xml"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_mapped_is_one_line(blocklib: CommandLine, here: Path, arguments: list[str], part: str) -> None:
    (here / "a").write_bytes(bytes(1024))
    assert part in blocklib.fails("map", *arguments)
