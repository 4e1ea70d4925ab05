"""``create`` makes what qemu-img makes and says what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.programs import Program

CREATIONS = [
    pytest.param(["-f", "qcow2", "new", "64M"], id="qcow2"),
    pytest.param(["-f", "raw", "new", "64M"], id="raw"),
    pytest.param(["new", "64M"], id="raw-by-default"),
    pytest.param(["-f", "qcow2", "new", "1.5k"], id="fraction"),
    pytest.param(["-f", "qcow2", "new", "1000"], id="odd-size"),
    pytest.param(["-f", "raw", "new", "1000"], id="odd-raw-size"),
    pytest.param(["-f", "qcow2", "new", "0x100000"], id="hexadecimal"),
    pytest.param(["-f", "qcow2", "new", "0"], id="no-bytes"),
    pytest.param(["-f", "qcow2", "-o", "size=5M", "new"], id="size-option"),
    pytest.param(["-f", "qcow2", "-o", "compat=v3,cluster_size=4k,refcount_bits=8", "new", "1M"], id="options"),
    pytest.param(["-f", "qcow2", "-o", "compat=0.10", "new", "1M"], id="version-2"),
    pytest.param(["-f", "qcow2", "-o", "cluster_size=64K,cluster_size=4k", "new", "1M"], id="last-option-counts"),
    pytest.param(["-f", "qcow2", "-o", "cluster_size=2M", "-o", "lazy_refcounts", "new", "1M"], id="two-lists"),
    pytest.param(["-f", "qcow2", "-o", "preallocation=metadata,compression_type=zstd", "new", "9M"], id="metadata"),
    pytest.param(["-f", "qcow2", "-o", "preallocation=full", "new", "3M"], id="full"),
    pytest.param(["-f", "raw", "-o", "preallocation=falloc", "new", "3M"], id="raw-falloc"),
    pytest.param(["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new"], id="overlay"),
    pytest.param(["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new", "100M"], id="longer-overlay"),
    pytest.param(["-f", "qcow2", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", "new"], id="backing-options"),
    pytest.param(["-f", "qcow2", "-o", "backing_file=x", "-b", "base.qcow2", "-F", "qcow2", "new"], id="backing-flag-counts"),
    pytest.param(["-f", "qcow2", "-u", "-b", "a,b", "-F", "raw", "new", "1M"], id="unchecked-backing"),
    pytest.param(["-f", "qcow2", "file:new", "1M"], id="file-protocol"),
    pytest.param(["-q", "-f", "qcow2", "new", "1M"], id="quiet"),
    pytest.param(["-f", "qcow2", "-o", "data_file=new.raw", "new", "3M"], id="data-file"),
    pytest.param(["-f", "qcow2", "-o", "data_file=a,,b.raw,data_file_raw=on", "new", "3M"], id="raw-data-file"),
    pytest.param(
        ["-f", "qcow2", "-o", "data_file=new.raw,preallocation=falloc,data_file_raw=off", "new", "3M"], id="full-data-file"
    ),
    pytest.param(["-f", "qcow2", "-o", "data_file=new.raw", "-b", "base.qcow2", "-F", "qcow2", "new"], id="data-over-base"),
    pytest.param(["-f", "qcow2", "-o", "nocow=on,extent_size_hint=64k", "new", "3M"], id="hints"),
    pytest.param(["-f", "qcow2", "-o", "extent_size_hint=0,nocow=off", "new", "3M"], id="no-hints"),
    pytest.param(["-f", "raw", "-o", "extent_size_hint=1M,preallocation=falloc,nocow=on", "new", "3M"], id="raw-hints"),
    pytest.param(
        [
            *("-f", "qcow2", "-o", "data_file=new.raw,data_file_raw=off,lazy_refcounts=on,refcount_bits=8,compat=1.1"),
            *("-o", "compression_type=zstd,extended_l2=on,preallocation=metadata,cluster_size=32k,nocow=on", "new", "1M"),
        ],
        id="everything",
    ),
    pytest.param(["--object", "secret,id=s,data=x", "-f", "qcow2", "new", "1M"], id="object"),
]


@pytest.fixture
def base(qemu_img: Program, here: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "6M")
    return here / "base.qcow2"


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("arguments", CREATIONS)
def test_create_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, here: Path, arguments: list[str]) -> None:
    said = qemu_img("create", *arguments)
    theirs = qemu_img.json("info", "new")
    (here / "new").unlink()
    assert blocklib("create", *arguments) == said
    ours = qemu_img.json("info", "new")
    # Both allocate as they like; what the image is must be the same.
    del theirs["actual-size"], ours["actual-size"]
    assert ours == theirs
    if theirs["format"] == "qcow2" and "-u" not in arguments:
        qemu_img("check", "new")


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_preallocation_takes_space(blocklib: CommandLine, here: Path, mode: str) -> None:
    blocklib("create", "-q", "-f", "raw", "-o", f"preallocation={mode}", "new", "4M")
    allocated = (here / "new").stat().st_blocks * 512
    assert (here / "new").stat().st_size == 4 << 20
    assert allocated == 0 if mode == "off" else allocated >= 4 << 20


def test_an_existing_file_is_replaced(blocklib: CommandLine, qemu_img: Program, here: Path) -> None:
    (here / "new").write_bytes(b"x" * (1 << 20))
    blocklib("create", "-q", "-f", "qcow2", "new", "1M")
    assert qemu_img("compare", "-f", "qcow2", "-F", "raw", "new", "/dev/null", codes=[0])


def test_the_backing_name_is_relative_to_the_new_image(blocklib: CommandLine, base: Path, here: Path) -> None:
    (here / "sub").mkdir()
    blocklib("create", "-q", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", "sub/new")
    assert "6 MiB" in blocklib("info", "sub/new")
    blocklib.fails("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "sub/new")


@pytest.mark.parametrize("spelled", ["base.qcow2", "./base.qcow2", "{here}/base.qcow2"])
def test_an_image_never_replaces_its_own_backing_file(blocklib: CommandLine, base: Path, here: Path, spelled: str) -> None:
    before = base.read_bytes()
    blocklib.fails("create", "-f", "qcow2", "-b", spelled.format(here=here), "-F", "qcow2", "base.qcow2")
    assert base.read_bytes() == before


def test_an_image_never_replaces_one_deeper_in_its_chain(blocklib: CommandLine, base: Path) -> None:
    blocklib("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "middle.qcow2")
    before = base.read_bytes()
    blocklib.fails("create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "base.qcow2")
    assert base.read_bytes() == before


@pytest.mark.parametrize("arguments", [["-o", "help"], ["-f", "raw", "-o", "help"], ["-f", "qcow2", "-o", "?"]])
def test_help_for_options_lists_them_as_qemu_img_does(blocklib: CommandLine, qemu_img: Program, arguments: list[str]) -> None:
    ours, theirs = blocklib("create", *arguments).splitlines(), qemu_img("create", *arguments).splitlines()
    assert (ours[0], ours[-3:]) == (theirs[0], theirs[-3:])
    names = {line.split("=")[0] for line in theirs}
    assert {line.split("=")[0] for line in ours if line.startswith("  ")} <= names | {"  preallocation"}


def test_help_for_options_of_a_file_creates_nothing(blocklib: CommandLine, here: Path) -> None:
    assert blocklib("create", "-f", "qcow2", "-o", "cluster_size=4k,help", "new").startswith("Supported options:\n")
    assert not (here / "new").exists()


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "file name"),
        (["new"], "needs a size"),
        (["new", "1M", "2M"], "file name"),
        (["new", "1Z"], "1Z"),
        (["new", "--", "-1"], "-1"),
        (["new", "9E"], "9E"),
        (["new", "-1"], "-1"),
        (["new", "99999999999999999999999999"], "999"),
        (["-f", "qcow2", "-o", "size=5M", "new", "6M"], "twice"),
        (["-f", "qcow2", "-o", "cluster_size=3", "new", "1M"], "cluster_size"),
        (["-f", "qcow2", "-o", "cluster_size=4M", "new", "1M"], "cluster_size"),
        (["-f", "qcow2", "-o", "cluster_sise=4k", "new", "1M"], "cluster_size"),
        (["-f", "qcow2", "-o", "refcount_bits=3", "new", "1M"], "refcount_bits"),
        (["-f", "qcow2", "-o", "refcount_bits=8,compat=0.10", "new", "1M"], "refcount"),
        (["-f", "qcow2", "-o", "lazy_refcounts=on,compat=0.10", "new", "1M"], "lazy"),
        (["-f", "qcow2", "-o", "preallocation=some", "new", "1M"], "preallocation"),
        (["-f", "qcow2", "-o", "compat=2", "new", "1M"], "compat"),
        (["-f", "qcow2", "-o", ",", "new", "1M"], "options"),
        (["-f", "qcow2", "-o", "encrypt.format=luks", "new", "1M"], "encrypt"),
        (["-f", "qcow2", "new", "7E"], "cluster"),
        (["-f", "nothing", "new", "1M"], "nothing"),
        (["-f", "raw", "-b", "base.qcow2", "-F", "qcow2", "new", "1M"], "backing"),
        (["-f", "qcow2", "-b", "base.qcow2", "new"], "format"),
        (["-f", "qcow2", "-u", "-b", "base.qcow2", "new", "1M"], "format"),
        (["-f", "qcow2", "-b", "", "-F", "raw", "new", "1M"], "empty"),
        (["-f", "qcow2", "-F", "raw", "new", "1M"], "backing"),
        (["-f", "qcow2", "-b", "nowhere", "-F", "qcow2", "new"], "nowhere"),
        (["-f", "qcow2", "-u", "-b", "nowhere", "-F", "qcow2", "new"], "needs a size"),
        (["-f", "qcow2", "-u", "-b", "nowhere", "-F", "nothing", "new", "1M"], "nothing"),
        (["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "preallocation=metadata", "new"], "preallocation"),
        (["-f", "qcow2", "nowhere/new", "1M"], "nowhere/new"),
        (["-f", "qcow2", ".", "1M"], "."),
        (["-f", "qcow2", "", "1M"], "empty"),
        (["-f", "qcow2", "a\0b", "1M"], "a"),
    ],
)
def test_what_cannot_be_created_is_one_line_and_leaves_no_file(
    blocklib: CommandLine, here: Path, arguments: list[str], part: str
) -> None:
    assert part in blocklib.fails("create", *arguments)
    assert not (here / "new").exists()
