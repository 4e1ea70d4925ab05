"""``resize`` changes sizes as qemu-img does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.programs import Program

ONE_MIB = 1 << 20


def _size(qemu_img: Program, name: str, driver: str) -> int:
    size = qemu_img.json("info", "-f", driver, name)["virtual-size"]
    assert isinstance(size, int)
    return size


@pytest.fixture(params=["qcow2", "raw"])
def image(request: pytest.FixtureRequest, qemu_img: Program, qemu_io: Program, here: Path) -> str:
    """The format of `image`, which has 4 MiB of which the first and the last are data."""
    driver = str(request.param)
    qemu_img("create", "-q", "-f", driver, "image", "4M")
    qemu_io("-f", driver, "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 1M", "image")
    return driver


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["image", "6M"], 6),
        (["image", "+2M"], 6),
        (["image", "4M"], 4),
        (["--shrink", "image", "2M"], 2),
        (["--shrink", "image", "-1M"], 3),
        (["image", "--shrink", "-1M"], 3),
        (["image", "-1M", "--shrink"], 3),
        (["--preallocation=off", "image", "5M"], 5),
        (["--preallocation=falloc", "image", "5M"], 5),
        (["--preallocation=full", "image", "5M"], 5),
    ],
)
def test_the_new_size_is_there(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, image: str, arguments: list[str], expected: int
) -> None:
    assert blocklib("resize", "-f", image, *arguments) == "Image resized.\n"
    assert _size(qemu_img, "image", image) == expected * ONE_MIB
    if image == "qcow2":
        qemu_img("check", "image")
    qemu_io("-f", image, "-c", "read -P 1 0 1M", "image")
    if expected > 4:
        qemu_io("-f", image, "-c", f"read -P 0 4M {expected - 4}M", "image")


def test_metadata_of_the_new_part_is_allocated(blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "image", "4M")
    blocklib("resize", "-q", "--preallocation=metadata", "-f", "qcow2", "image", "+4M")
    assert all(entry["present"] for entry in qemu_img.json("map", "image") if entry["start"] >= 4 * ONE_MIB)
    qemu_img("check", "image")


def test_quiet_says_nothing(blocklib: CommandLine, image: str) -> None:
    assert blocklib("resize", "-q", "-f", image, "image", "+1M") == ""


def test_shrinking_must_be_allowed(blocklib: CommandLine, qemu_img: Program, image: str) -> None:
    assert "--shrink" in blocklib.fails("resize", "-f", image, "image", "1M")
    assert _size(qemu_img, "image", image) == 4 * ONE_MIB


def test_a_guessed_raw_image_is_resized_with_a_warning(blocklib: CommandLine, here: Path) -> None:
    (here / "plain").write_bytes(bytes(ONE_MIB))
    result = blocklib.run("resize", "plain", "2M")
    assert (result.code, result.out) == (0, "Image resized.\n")
    assert result.err.count("\n") == 1
    assert "-f raw" in result.err
    assert (here / "plain").stat().st_size == 2 * ONE_MIB


def test_an_image_named_by_options_is_resized(blocklib: CommandLine, qemu_img: Program, image: str) -> None:
    blocklib("resize", "-q", "--image-opts", f"driver={image},file.filename=image", "+1M")
    assert _size(qemu_img, "image", image) == 5 * ONE_MIB


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["image"], "size"),
        (["5M"], "size"),
        (["image", "1M", "2M"], "size"),
        (["image", "0"], "positive"),
        (["--shrink", "image", "-4M"], "positive"),
        (["--shrink", "image", "-1G"], "positive"),
        (["image", "+8E"], "size"),
        (["image", "+7.99999999999E"], "image"),
        (["image", "1Z"], "1Z"),
        (["image", "+"], "size"),
        (["image", "x"], "x"),
        (["--preallocation=some", "image", "5M"], "some"),
        (["--preallocation=falloc", "--shrink", "image", "1M"], "--preallocation"),
        (["--preallocation=falloc", "image", "4M"], "--preallocation"),
        (["-U", "image", "5M"], "-U"),
        (["nowhere", "5M"], "nowhere"),
    ],
)
def test_what_cannot_be_resized_is_one_line(
    blocklib: CommandLine, qemu_img: Program, image: str, arguments: list[str], part: str
) -> None:
    assert part in blocklib.fails("resize", "-f", image, *arguments)
    assert _size(qemu_img, "image", image) == 4 * ONE_MIB


def test_preallocating_metadata_of_a_raw_image_is_refused(blocklib: CommandLine, here: Path) -> None:
    (here / "plain").write_bytes(bytes(ONE_MIB))
    assert "metadata" in blocklib.fails("resize", "-f", "raw", "--preallocation=metadata", "plain", "2M")
