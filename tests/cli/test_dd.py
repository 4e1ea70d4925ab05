"""``dd`` copies ranges of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.programs import Program

SIZE = 40_960 + 512


@pytest.fixture
def source(here: Path) -> bytes:
    """What is in `source.raw`: a different byte in each block, and zeroes in the middle."""
    data = b"".join(bytes([index % 251]) * 512 for index in range(SIZE // 512))
    data = data[:8192] + bytes(16_384) + data[8192 + 16_384 :]
    (here / "source.raw").write_bytes(data)
    return data


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="all"),
        pytest.param(["bs=4k"], id="block-size"),
        pytest.param(["bs=1M"], id="one-block"),
        pytest.param(["bs=777"], id="odd-block-size"),
        pytest.param(["bs=4k", "count=3"], id="count"),
        pytest.param(["count=0"], id="nothing"),
        pytest.param(["bs=1k", "count=1000"], id="more-than-there-is"),
        pytest.param(["bs=4k", "skip=3"], id="skip"),
        pytest.param(["skip=80"], id="skip-to-the-last"),
    ],
)
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_dd_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, source: bytes, driver: str, words: list[str]) -> None:
    arguments = ["dd", "-f", "raw", "-O", driver, *words, "if=source.raw"]
    assert qemu_img(*arguments, "of=theirs") == blocklib(*arguments, "of=ours")
    theirs, ours = (qemu_img.json("info", "-f", driver, name) for name in ("theirs", "ours"))
    assert ours["virtual-size"] == theirs["virtual-size"]
    assert ours["format"] == theirs["format"]
    qemu_img("compare", "-f", driver, "-F", driver, "theirs", "ours")


def test_count_is_of_blocks_after_the_skipped_ones(blocklib: CommandLine, source: bytes, here: Path) -> None:
    # As the manual page says; qemu-img 7.2 counts the skipped ones too, and copies nothing here.
    blocklib("dd", "-f", "raw", "-O", "raw", "bs=512", "count=4", "skip=4", "if=source.raw", "of=part")
    assert (here / "part").read_bytes() == source[2048:4096]


def test_skipping_everything_warns_and_makes_an_empty_image(blocklib: CommandLine, source: bytes, here: Path) -> None:
    result = blocklib.run("dd", "-f", "raw", "-O", "raw", "bs=1M", "skip=1", "if=source.raw", "of=part")
    assert result.code == 0
    assert result.err.startswith("blocklib: source.raw: ")
    assert (here / "part").read_bytes() == b""


def test_a_chain_is_read_as_one_disk(blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base", "1M")
    qemu_io("-f", "qcow2", "-c", "write -P 1 0 512k", "base")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    qemu_io("-f", "qcow2", "-c", "write -P 2 64k 64k", "top")
    blocklib("dd", "-U", "-f", "qcow2", "-O", "raw", "if=top", "of=flat")
    qemu_img("compare", "-F", "raw", "top", "flat")


def test_input_may_be_named_by_options(blocklib: CommandLine, source: bytes, here: Path) -> None:
    blocklib("dd", "--image-opts", "-O", "raw", "if=driver=raw,file.filename=source.raw,size=4k", "of=part")
    assert (here / "part").read_bytes() == source[:4096]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "if="),
        (["if=source.raw"], "of="),
        (["of=x"], "if="),
        (["source.raw", "x"], "source.raw"),
        (["if=source.raw", "of=x", "seek=1"], "seek=1"),
        (["if=source.raw", "of=x", "conv=notrunc"], "conv"),
        (["if=source.raw", "of=x", "bs=0"], "bs=0"),
        (["if=source.raw", "of=x", "bs=2G"], "bs=2G"),
        (["if=source.raw", "of=x", "bs=x"], "bs"),
        (["if=source.raw", "of=x", "count=-1"], "count"),
        (["if=source.raw", "of=x", "skip=x"], "skip"),
        (["if=source.raw", "of=nowhere/x"], "nowhere"),
        (["if=nowhere", "of=x"], "nowhere"),
        (["-O", "nothing", "if=source.raw", "of=x"], "nothing"),
        (["-n", "if=source.raw", "of=x"], "-n"),
        (["if=", "of=x"], "empty"),
    ],
)
def test_what_cannot_be_copied_is_one_line(
    blocklib: CommandLine, source: bytes, here: Path, arguments: list[str], part: str
) -> None:
    assert part in blocklib.fails("dd", *arguments)
    assert not (here / "x").exists()


def test_the_input_is_not_overwritten(blocklib: CommandLine, source: bytes, here: Path) -> None:
    blocklib.fails("dd", "-f", "raw", "-O", "raw", "if=source.raw", "of=source.raw")
    assert (here / "source.raw").read_bytes() == source
