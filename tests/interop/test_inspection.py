"""Inspection of what qemu-img makes: every format and subformat that it has, and every way in which they name other files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import blocklib
from tests.programs import Argument, Program

SIZE = 16 << 20
SECRET: tuple[Argument, ...] = ("--object", "secret,id=s,data=hunter2")


@dataclass(frozen=True)
class Made:
    """What `qemu-img create` is told, and what inspection finds.  `size` 0: as `qemu-img info` says."""

    format: str
    options: str = ""
    found: str = ""
    failed: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    encrypted: bool = False
    features: tuple[str, ...] = ()

    def make(self, qemu_img: Program, path: Path) -> None:
        options = ["-o", self.options] if self.options else []
        create: list[Argument] = ["create", "-q", "-f", self.format, *self.arguments, *options, path, SIZE]
        for _ in range(10):  # LUKS measures the processor, and gives up where that is too busy
            if not qemu_img.run(*create, cwd=path.parent).returncode:
                return
        done = qemu_img.run(*create, cwd=path.parent)
        assert not done.returncode, done.stderr


LUKS = "key-secret=s,iter-time=10"
BACKING, DATA_FILE = frozenset({"backing_file"}), frozenset({"data_file"})
DESCRIPTOR, BANNED = frozenset({"descriptor"}), frozenset({"banned"})
IMAGES = {
    "raw": Made("raw"),
    "qcow2": Made("qcow2"),
    "qcow2 version 2": Made("qcow2", "compat=0.10"),
    "qcow2 of small clusters": Made("qcow2", "cluster_size=512,refcount_bits=64"),
    "qcow2 of large clusters": Made("qcow2", "cluster_size=2M"),
    "qcow2 with subclusters": Made("qcow2", "extended_l2=on", features=("extended L2 entries",)),
    "qcow2 with zstd": Made("qcow2", "compression_type=zstd", features=("compression type",)),
    "qcow2 with lazy refcounts": Made("qcow2", "lazy_refcounts=on", features=("lazy refcounts",)),
    "qcow2, preallocated": Made("qcow2", "preallocation=metadata"),
    "qcow2 over a backing file": Made("qcow2", "", "qcow2", BACKING, ("base.raw",), ("-b", "base.raw", "-F", "raw")),
    "qcow2 with a data file": Made("qcow2", "data_file=d.raw", "", DATA_FILE, ("d.raw",), features=("external data file",)),
    "qcow2 with a raw data file": Made(
        "qcow2",
        "data_file=d.raw,data_file_raw=on",
        "",
        DATA_FILE,
        ("d.raw",),
        features=("external data file", "raw external data"),
    ),
    "qcow2 with LUKS": Made(
        "qcow2",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        arguments=SECRET,
        encrypted=True,
    ),
    "LUKS": Made("luks", LUKS, arguments=SECRET, encrypted=True),
    "VMDK": Made("vmdk"),
    "VMDK, streamOptimized": Made("vmdk", "subformat=streamOptimized"),
    "VMDK, monolithicFlat": Made("vmdk", "subformat=monolithicFlat", "", DESCRIPTOR, ("image-flat.img",)),
    "VMDK, twoGbMaxExtentFlat": Made("vmdk", "subformat=twoGbMaxExtentFlat", "", DESCRIPTOR, ("image-f001.img",)),
    "VMDK, twoGbMaxExtentSparse": Made("vmdk", "subformat=twoGbMaxExtentSparse", "", DESCRIPTOR, ("image-s001.img",)),
    "VMDK over a backing file": Made("vmdk", "", "", DESCRIPTOR, ("base.vmdk",), ("-b", "base.vmdk", "-F", "vmdk")),
    "VDI": Made("vdi"),
    "VDI, static": Made("vdi", "static=on"),
    "VHDX": Made("vhdx"),
    "VHDX, fixed": Made("vhdx", "subformat=fixed"),
    "VHD": Made("vpc", "", "vhd"),
    "VHD, fixed": Made("vpc", "subformat=fixed", "vhd"),
    "QED": Made("qed", "", "", BANNED),
    "QED over a backing file": Made("qed", "", "", BANNED | BACKING, ("base.raw",), ("-b", "base.raw", "-F", "raw")),
    "qcow": Made("qcow", "", "", BANNED),
    "qcow over a backing file": Made("qcow", "", "", BANNED | BACKING, ("base.raw",), ("-b", "base.raw", "-F", "raw")),
    "parallels": Made("parallels", "", "", BANNED),
}


@pytest.mark.parametrize("name", IMAGES)
def test_what_qemu_makes_is_told_from_a_path_and_from_a_stream(name: str, tmp_path: Path, qemu_img: Program) -> None:
    made = IMAGES[name]
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    if "base.vmdk" in made.names:
        Made("vmdk").make(qemu_img, tmp_path / "base.vmdk")
    path = tmp_path / "image.img"
    made.make(qemu_img, path)
    found = blocklib.inspect(path)
    assert found.formats == (() if name == "raw" else (made.found or made.format,))
    assert {check.name for check in found.failures} == made.failed
    assert tuple(reference.name for reference in found.references) == made.names
    assert found.encrypted is made.encrypted
    assert found.features == made.features
    if made.format != "parallels":
        assert found.virtual_size == qemu_img.json("info", "-f", made.format, path)["virtual-size"]
    with path.open("rb") as stream:
        assert blocklib.inspect(stream) == found
    assert blocklib.inspect(path, expect=made.found or made.format).safe is not bool(made.failed)


def test_snapshots_and_bitmaps_that_qemu_made_are_sound(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    path = tmp_path / "image.qcow2"
    Made("qcow2").make(qemu_img, path)
    for index in range(3):
        qemu_io("-f", "qcow2", "-c", f"write -P {index} {index}M 64k", path)
        qemu_img("snapshot", "-c", f"snapshot {index}", path)
        qemu_img("bitmap", "--add", "-f", "qcow2", path, f"bitmap {index}")
    found = blocklib.inspect(path)
    assert found.safe, found.failures
    assert found.checks["snapshots"].message == "3 internal snapshots"
    assert found.checks["bitmaps"].message == "3 bitmaps"


def test_a_converted_disk_with_partitions_is_one_format(tmp_path: Path, qemu_img: Program) -> None:
    from tests.foreign import GPT, ISO, ISO_OFFSET, lay

    disk = tmp_path / "disk.raw"
    disk.write_bytes(lay((0, GPT), (ISO_OFFSET, ISO)))
    assert blocklib.inspect(disk).formats == ("iso", "gpt")
    for format, options in (("qcow2", []), ("vmdk", ["-o", "subformat=streamOptimized"]), ("vhdx", []), ("vdi", [])):
        path = tmp_path / f"disk.{format}"
        qemu_img("convert", "-f", "raw", "-O", format, *options, disk, path)
        found = blocklib.inspect(path, expect=format)
        assert found.formats == (format,)
        assert found.safe, found.failures
