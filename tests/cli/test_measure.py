"""``measure`` tells what qemu-img tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.images import chain
from tests.cli.running import CommandLine
from tests.programs import Program


@pytest.mark.parametrize("target", [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-o", "cluster_size=2M"]])
def test_measuring_an_image_is_that_of_qemu_img(
    blocklib: CommandLine, qemu_img: Program, any_image: str, target: list[str]
) -> None:
    assert blocklib("measure", *target, any_image) == qemu_img("measure", *target, any_image)
    assert blocklib.json("measure", *target, any_image) == qemu_img.json("measure", *target, any_image)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "1G"],
        ["--size=1G", "-O", "raw"],
        ["--size", "1G", "-O", "qcow2"],
        ["--size", "0", "-O", "qcow2"],
        ["--size", "1000", "-O", "qcow2"],
        ["--size", "10G", "-O", "qcow2", "-o", "cluster_size=2M,preallocation=full"],
        ["--size", "100G", "-O", "qcow2", "-o", "refcount_bits=64,cluster_size=512"],
        ["--size", "1T", "-O", "qcow2", "-o", "compat=0.10"],
        ["--size", "1G", "-O", "qcow2", "-o", "preallocation=metadata"],
    ],
)
def test_measuring_a_size_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, arguments: list[str]) -> None:
    assert blocklib("measure", *arguments) == qemu_img("measure", *arguments)
    assert blocklib("measure", "--output=json", *arguments) == qemu_img("measure", "--output=json", *arguments)


def test_a_chain_is_measured_as_one_disk(blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path) -> None:
    chain(qemu_img, qemu_io)
    for name in ("top.qcow2", 'json:{"driver": "qcow2", "file.filename": "top.qcow2"}'):
        assert blocklib("measure", "-U", "-O", "qcow2", name) == qemu_img("measure", "-U", "-O", "qcow2", name)


def test_help_for_options_lists_them(blocklib: CommandLine) -> None:
    assert "refcount_bits=<num>" in blocklib("measure", "-O", "qcow2", "-o", "help")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--size"),
        (["--size", "1G", "a"], "--size"),
        (["a", "b"], "at most one"),
        (["--size", "1Z"], "1Z"),
        (["--size", "8E", "-O", "qcow2"], "8E"),
        (["--size", "7E", "-O", "qcow2"], "cluster"),
        (["--size", "1G", "-f", "raw"], "-f"),
        (["--size", "1G", "--image-opts"], "--image-opts"),
        (["--size", "1G", "-l", "x"], "-l"),
        (["-l", "before", "a"], "snapshot"),
        (["-O", "nothing", "a"], "nothing"),
        (["-O", "qcow2", "-o", "cluster_size=3", "--size", "1G"], "cluster_size"),
        (["-O", "qcow2", "-o", "bogus=3", "--size", "1G"], "bogus"),
        (["--output=xml", "a"], "xml"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(blocklib: CommandLine, here: Path, arguments: list[str], part: str) -> None:
    (here / "a").write_bytes(bytes(1024))
    assert part in blocklib.fails("measure", *arguments)
