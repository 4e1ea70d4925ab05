"""``convert`` copies what qemu-img copies, with the same options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.images import chain, sparse_raw, write_data
from tests.cli.running import CommandLine
from tests.programs import Program

ONE_MIB = 1 << 20


@pytest.fixture
def images(qemu_img: Program, qemu_io: Program, here: Path) -> None:
    """`top.qcow2` -> `middle.qcow2` -> `base.raw`, `data.qcow2`, `sparse.raw`."""
    chain(qemu_img, qemu_io)
    qemu_img("create", "-q", "-f", "qcow2", "data.qcow2", "8M")
    write_data(qemu_io, "data.qcow2")
    sparse_raw()


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        pytest.param(["-O", "raw"], "top.qcow2", id="to-raw"),
        pytest.param([], "top.qcow2", id="raw-by-default"),
        pytest.param(["-O", "qcow2"], "top.qcow2", id="to-qcow2"),
        pytest.param(["-f", "raw", "-O", "qcow2"], "sparse.raw", id="raw-to-qcow2"),
        pytest.param(["-O", "raw"], "data.qcow2", id="compressed-source"),
        pytest.param(["-O", "qcow2", "-o", "cluster_size=4k,compat=0.10"], "data.qcow2", id="options"),
        pytest.param(["-O", "qcow2", "-o", "cluster_size=2M,refcount_bits=1"], "data.qcow2", id="large-clusters"),
        pytest.param(["-O", "qcow2", "-o", "preallocation=metadata"], "data.qcow2", id="preallocated"),
        pytest.param(["-O", "qcow2", "-S", "0"], "data.qcow2", id="nothing-sparse"),
        pytest.param(["-O", "qcow2", "-S", "1M"], "data.qcow2", id="large-holes-only"),
        pytest.param(["-O", "raw", "-m", "1"], "data.qcow2", id="one-thread"),
        pytest.param(["-O", "raw", "-m", "16", "-W"], "data.qcow2", id="out-of-order"),
        pytest.param(["-O", "raw", "-C"], "sparse.raw", id="copy-offloading"),
        pytest.param(["-O", "raw", "-t", "writethrough", "-T", "unsafe"], "data.qcow2", id="cache-modes"),
        pytest.param(["-O", "raw", "-t", "none", "-T", "none"], "data.qcow2", id="direct"),
        pytest.param(["-O", "raw", "-r", "1G"], "data.qcow2", id="rate"),
        pytest.param(["-O", "raw", "--salvage"], "data.qcow2", id="salvage"),
        pytest.param(["-U", "-q", "-O", "raw"], "data.qcow2", id="shared"),
        pytest.param(["-O", "qcow2", "-o", "size=99M"], "data.qcow2", id="size-option-is-ignored"),
        pytest.param(["--image-opts", "-O", "raw"], "driver=qcow2,file.filename=data.qcow2", id="image-opts"),
        pytest.param(["-O", "raw"], 'json:{"driver": "qcow2", "file.filename": "data.qcow2"}', id="json"),
    ],
)
def test_the_copy_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, arguments: list[str], source: str) -> None:
    assert qemu_img("convert", *arguments, source, "theirs") == blocklib("convert", *arguments, source, "ours") == ""
    driver = "qcow2" if "qcow2" in arguments else "raw"
    # Strict: the same ranges are data, zero or absent.  With -S, QEMU leaves out smaller ranges that it need not read.
    strict = [] if "1M" in arguments else ["-s"]
    qemu_img("compare", *strict, "-f", driver, "-F", driver, "theirs", "ours")
    theirs, ours = (qemu_img.json("info", "-f", driver, name) for name in ("theirs", "ours"))
    assert ours.get("format-specific") == theirs.get("format-specific")
    assert ours.get("cluster-size") == theirs.get("cluster-size")
    if driver == "qcow2":
        qemu_img("check", "ours")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("backing", ["middle.qcow2", "other.raw"])
def test_a_target_with_a_backing_file_holds_only_what_differs(
    blocklib: CommandLine, qemu_img: Program, here: Path, backing: str
) -> None:
    qemu_img("convert", "-O", "raw", "middle.qcow2", "other.raw")
    backing_format = backing.partition(".")[2]
    for arguments in (["-B", backing, "-F", backing_format], ["-o", f"backing_file={backing},backing_fmt={backing_format}"]):
        blocklib("convert", "-O", "qcow2", *arguments, "top.qcow2", "ours")
        qemu_img("compare", "top.qcow2", "ours")
        info = qemu_img.json("info", "ours")
        assert (info["backing-filename"], info["backing-filename-format"]) == (backing, backing_format)
        own = sum(entry["length"] for entry in qemu_img.json("map", "ours") if entry["depth"] == 0 and entry["present"])
        assert own < 2 * ONE_MIB
        qemu_img("check", "ours")


@pytest.mark.usefixtures("images")
def test_several_images_become_one(blocklib: CommandLine, qemu_img: Program, here: Path) -> None:
    arguments = ["convert", "-O", "raw", "top.qcow2", "sparse.raw", "data.qcow2"]
    qemu_img(*arguments, "theirs")
    blocklib(*arguments, "ours")
    assert (here / "ours").read_bytes() == (here / "theirs").read_bytes()


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@pytest.mark.parametrize("is_zero", [False, True])
def test_an_existing_target_is_written_into(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, driver: str, is_zero: bool
) -> None:
    qemu_img("create", "-q", "-f", driver, "ours", "9M")
    if not is_zero:
        qemu_io("-f", driver, "-c", "write -P 99 0 9M", "ours")
    flags = ["--target-is-zero"] if is_zero else []
    blocklib("convert", "-n", *flags, "-O", driver, "data.qcow2", "ours")
    commands = [f"read -P {0 if is_zero else 99} 8M 1M", "read -P 1 0 64k", "read -P 0 64k 64k", "read -P 0 6M 2M"]
    qemu_io("-f", driver, *(word for command in commands for word in ("-c", command)), "ours")
    blocklib("resize", "-q", "--shrink", "-f", driver, "ours", "8M")
    qemu_img("compare", "-F", driver, "data.qcow2", "ours")


@pytest.mark.usefixtures("images")
def test_an_existing_target_may_be_named_by_options(blocklib: CommandLine, qemu_img: Program) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "ours", "8M")
    blocklib("convert", "-n", "--target-image-opts", "data.qcow2", "driver=qcow2,file.filename=ours")
    qemu_img("compare", "data.qcow2", "ours")


@pytest.mark.usefixtures("images")
def test_percentages_are_printed(blocklib: CommandLine) -> None:
    printed = blocklib("convert", "-p", "-O", "raw", "data.qcow2", "ours")
    assert printed.startswith("    (0.00/100%)\r")
    assert printed.endswith("    (100.00/100%)\r\n")


@pytest.mark.usefixtures("images")
def test_progress_as_json_goes_to_standard_error(blocklib: CommandLine) -> None:
    result = blocklib.run("convert", "--progress=json", "-r", "20M", "-O", "raw", "data.qcow2", "ours")
    assert (result.code, result.out) == (0, "")
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert all(line["total"] == 8 * ONE_MIB and 0 <= line["done"] <= line["total"] for line in lines)
    assert lines[-1]["done"] == 8 * ONE_MIB


@pytest.mark.parametrize("operands", [[], ["data.qcow2", "ours"]])
def test_help_for_options_copies_nothing(blocklib: CommandLine, here: Path, operands: list[str]) -> None:
    assert "cluster_size=<size>" in blocklib("convert", "-O", "qcow2", "-o", "help", *operands)
    assert not (here / "ours").exists()


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["data.qcow2"], "target"),
        ([], "target"),
        (["-O", "nothing", "data.qcow2", "ours"], "nothing"),
        (["-f", "nothing", "data.qcow2", "ours"], "nothing"),
        (["-f", "qcow2", "sparse.raw", "ours"], "qcow2"),
        (["nowhere", "ours"], "nowhere"),
        (["data.qcow2", "nowhere/ours"], "nowhere"),
        (["-O", "qcow2", "-o", "cluster_size=3", "data.qcow2", "ours"], "cluster_size"),
        (["-O", "qcow2", "-o", "bogus=3", "data.qcow2", "ours"], "bogus"),
        (["-m", "0", "data.qcow2", "ours"], "-m 0"),
        (["-m", "17", "data.qcow2", "ours"], "-m 17"),
        (["-m", "x", "data.qcow2", "ours"], "-m x"),
        (["-S", "1", "data.qcow2", "ours"], "-S 1"),
        (["-S", "513", "data.qcow2", "ours"], "-S 513"),
        (["-S", "65M", "data.qcow2", "ours"], "-S 65M"),
        (["-S", "x", "data.qcow2", "ours"], "-S"),
        (["-r", "x", "data.qcow2", "ours"], "rate"),
        (["-t", "some", "data.qcow2", "ours"], "-t some"),
        (["-T", "some", "data.qcow2", "ours"], "-T some"),
        (["-C", "-S", "64k", "data.qcow2", "ours"], "-C and -S"),
        (["-C", "-c", "data.qcow2", "ours"], "-C and -c"),
        (["-C", "--salvage", "data.qcow2", "ours"], "--salvage"),
        (["-c", "-O", "raw", "data.qcow2", "ours"], "compressed"),
        (["-c", "-O", "qcow2", "-o", "preallocation=metadata", "data.qcow2", "ours"], "preallocation"),
        (["-l", "before", "data.qcow2", "ours"], "no snapshot with the name 'before'"),
        (["-l", "x", "data.qcow2", "data.qcow2", "ours"], "-l is for one image"),
        (["-l", "snapshot.foo=x", "data.qcow2", "ours"], "snapshot.foo"),
        (["-l", "snapshot.id=1,foo=2", "data.qcow2", "ours"], "snapshot.name"),
        (["-l", "snapshot.id.x=1", "data.qcow2", "ours"], "snapshot.id.x"),
        (["--skip-broken-bitmaps", "data.qcow2", "ours"], "--bitmaps"),
        (["-n", "-o", "compat=1.1", "-O", "qcow2", "data.qcow2", "ours"], "-o"),
        (["-n", "data.qcow2", "ours"], "ours"),
        (["-n", "-O", "raw", "data.qcow2", "sparse.raw"], "bytes"),
        (["--target-is-zero", "data.qcow2", "ours"], "-n"),
        (["--target-image-opts", "data.qcow2", "driver=raw,file.filename=ours"], "-n"),
        (["-n", "--target-image-opts", "-O", "raw", "data.qcow2", "driver=raw,file.filename=ours"], "-O"),
        (["--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=data.qcow2", "ours"], "--image-opts"),
        (["-B", "middle.qcow2", "-O", "qcow2", "top.qcow2", "ours"], "format"),
        (["-F", "qcow2", "-O", "qcow2", "top.qcow2", "ours"], "backing"),
        (["-B", "middle.qcow2", "-F", "qcow2", "-O", "raw", "top.qcow2", "ours"], "raw"),
        (["-B", "nowhere", "-F", "qcow2", "-O", "qcow2", "top.qcow2", "ours"], "nowhere"),
        (["-B", "middle.qcow2", "-F", "qcow2", "-O", "qcow2", "top.qcow2", "sparse.raw", "ours"], "backing"),
        (["--progress=xml", "data.qcow2", "ours"], "--progress"),
        (["--untrusted", "-f", "qcow2", "top.qcow2", "ours"], "middle.qcow2"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_no_file(
    blocklib: CommandLine, here: Path, arguments: list[str], part: str
) -> None:
    sparse = (here / "sparse.raw").read_bytes()
    assert part in blocklib.fails("convert", *arguments)
    assert not (here / "ours").exists()
    assert (here / "sparse.raw").read_bytes() == sparse


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("name", ["top.qcow2", "./middle.qcow2", "base.raw", "file:base.raw"])
@pytest.mark.parametrize("flags", [[], ["-n"]])
def test_no_image_that_is_read_is_written(blocklib: CommandLine, here: Path, name: str, flags: list[str]) -> None:
    file = here / name.removeprefix("file:")
    before = file.read_bytes()
    blocklib.fails("convert", *flags, "-O", "raw", "top.qcow2", name)
    assert file.read_bytes() == before
