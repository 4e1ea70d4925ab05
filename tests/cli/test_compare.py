"""``compare`` says what qemu-img says, and exits as it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocklib.errors import ImageCorruptError, StorageError
from tests.cli.images import chain
from tests.cli.running import CommandLine
from tests.programs import Program


@pytest.fixture
def images(qemu_img: Program, qemu_io: Program, here: Path) -> None:
    """A chain with `top.qcow2`; `same.raw` reads the same; `long.raw` goes on with zeroes, `longer.raw` with data."""
    chain(qemu_img, qemu_io)
    qemu_img("convert", "-O", "raw", "top.qcow2", "same.raw")
    data = (here / "same.raw").read_bytes()
    (here / "long.raw").write_bytes(data + bytes(1 << 20))
    (here / "longer.raw").write_bytes(data + bytes(1 << 19) + b"\1" * 512)
    qemu_img("convert", "-O", "raw", "top.qcow2", "different.raw")
    with (here / "different.raw").open("r+b") as file:
        file.seek(70_000)
        file.write(b"\xff")


COMPARISONS = [
    pytest.param(["top.qcow2", "same.raw"], id="same"),
    pytest.param(["top.qcow2", "top.qcow2"], id="itself"),
    pytest.param(["top.qcow2", "middle.qcow2"], id="different-images"),
    pytest.param(["same.raw", "different.raw"], id="one-byte"),
    pytest.param(["top.qcow2", "long.raw"], id="longer-by-zeroes"),
    pytest.param(["long.raw", "top.qcow2"], id="shorter-by-zeroes"),
    pytest.param(["top.qcow2", "longer.raw"], id="longer-by-data"),
    pytest.param(["longer.raw", "top.qcow2"], id="shorter-by-data"),
    pytest.param(["-f", "raw", "-F", "raw", "same.raw", "long.raw"], id="formats-said"),
    pytest.param(["-f", "raw", "-F", "raw", "top.qcow2", "middle.qcow2"], id="as-raw"),
    pytest.param(["-U", "-T", "none", "top.qcow2", "same.raw"], id="shared-direct"),
    pytest.param(
        ["--image-opts", "driver=qcow2,file.filename=top.qcow2", "driver=raw,file.filename=same.raw"], id="image-opts"
    ),
]


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("flags", [[], ["-s"], ["-q"]])
@pytest.mark.parametrize("arguments", COMPARISONS)
def test_compare_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, flags: list[str], arguments: list[str]) -> None:
    theirs = qemu_img.run("compare", *flags, *arguments)
    ours = blocklib.run("compare", *flags, *arguments)
    assert (ours.code, ours.out, ours.err) == (theirs.returncode, theirs.stdout, "")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("names", [["top.qcow2", "same.raw"], ["same.raw", "different.raw"]])
def test_percentages_stand_where_qemu_img_prints_them(blocklib: CommandLine, qemu_img: Program, names: list[str]) -> None:
    theirs = qemu_img.run("compare", "-p", *names)  # whose carriage returns come as line feeds
    ours = blocklib("compare", "-p", *names, code=theirs.returncode).replace("\r", "\n")
    first, *_between, verdict, nothing, end = theirs.stdout.split("\n")
    assert ours.startswith(f"{first}\n")
    assert ours.endswith(f"\n{verdict}\n{nothing}\n{end}")
    assert ours.count("(100.00/100%)") == min(1, theirs.stdout.count("(100.00/100%)"))


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["same.raw"], 1, "two file names"),
        (["a", "b", "c"], 1, "two file names"),
        (["--bogus", "a", "b"], 1, "--bogus"),
        (["nowhere", "same.raw"], 2, "nowhere"),
        (["same.raw", "nowhere"], 2, "nowhere"),
        (["same.raw", ""], 2, "empty"),
        (["-f", "qcow2", "same.raw", "same.raw"], 2, "qcow2"),
        (["-F", "nothing", "same.raw", "same.raw"], 2, "nothing"),
        (["-T", "some", "same.raw", "same.raw"], 2, "-T some"),
        (["--image-opts", "-F", "raw", "driver=raw,file.filename=same.raw", "x"], 2, "--image-opts"),
        (["--untrusted", "-F", "raw", "top.qcow2", "same.raw"], 2, "middle.qcow2"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_its_own_exit_code(
    blocklib: CommandLine, arguments: list[str], code: int, part: str
) -> None:
    assert part in blocklib.fails("compare", *arguments, code=code)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (StorageError("pread failed", errno=5, operation="pread", node="top.qcow2"), 4),
        (ImageCorruptError("an L2 entry makes no sense", node="top.qcow2"), 3),
    ],
)
def test_an_error_while_comparing_has_the_exit_code_of_qemu_img(
    blocklib: CommandLine, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: int
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise failure

    monkeypatch.setattr("blocklib.jobs.compare", fail)
    assert "top.qcow2" in blocklib.fails("compare", "top.qcow2", "same.raw", code=code)
