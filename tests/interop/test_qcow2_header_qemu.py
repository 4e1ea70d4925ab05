"""qcow2 headers between blocklib and qemu-img: each reads what the other writes, and refuses the same damage."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from blocklib.errors import ImageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import Extension, Header, feature_name_table, header_span, parse_header
from blocklib.formats.qcow2.header_write import plan_rewrite
from blocklib.policy import Limits
from tests.programs import Program


def load(path: Path) -> Header:
    data = path.read_bytes()
    return parse_header(data[: header_span(data[:4096])], limits=Limits(), file_length=len(data))


def rewrite(path: Path, header: Header) -> None:
    on_disk = path.read_bytes()[: 1 << header.cluster_bits]
    write = plan_rewrite(header, on_disk)
    assert write.atomic
    with path.open("r+b") as file:
        for offset, part in (*write.rest, (0, write.first)):
            file.seek(offset)
            file.write(part)
    assert load(path) == write.header


def shown(header: Header) -> str | None:
    """The backing file name as qemu-img prints it: JSON has no bytes that are not UTF-8."""
    raw = header.backing_name_bytes
    return None if raw is None else raw.decode("utf-8", "replace")


@pytest.fixture
def overlay(qemu_img: Program, tmp_path: Path) -> Path:
    """A version 3 overlay as qemu-img makes it: the feature names push the backing name behind the first sector."""
    qemu_img("create", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "disk.qcow2", cwd=tmp_path)
    return tmp_path / "disk.qcow2"


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_overlay_made_by_qemu_img_names_its_backing_file(
    qemu_img: Program, tmp_path: Path, compat: str, cluster_size: int
) -> None:
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", base, "3M")
    options = f"compat={compat},cluster_size={cluster_size}"
    qemu_img("create", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", disk, cwd=tmp_path)
    header = load(disk)
    assert (header.backing_name, header.backing_format) == ("base.qcow2", "qcow2")
    assert header.version == (2 if compat == "0.10" else 3)
    assert header.size == 3 << 20
    assert 1 << header.cluster_bits == cluster_size


def test_features_of_an_image_made_by_qemu_img_are_read(qemu_img: Program, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    options = "compression_type=zstd,extended_l2=on,lazy_refcounts=on,refcount_bits=1,data_file=d.raw,data_file_raw=on"
    qemu_img("create", "-f", "qcow2", "-o", options, disk, "1M", cwd=tmp_path)
    header = load(disk)
    assert header.compression_type == layout.COMPRESSION_ZSTD
    assert header.incompatible_features == (
        layout.INCOMPATIBLE_COMPRESSION_TYPE | layout.INCOMPATIBLE_EXTENDED_L2 | layout.INCOMPATIBLE_DATA_FILE
    )
    assert header.compatible_features == layout.COMPATIBLE_LAZY_REFCOUNTS
    assert header.autoclear_features == layout.AUTOCLEAR_RAW_EXTERNAL
    assert header.data_file_name == "d.raw"
    assert (header.geometry().refcount_bits, header.geometry().subclusters) == (1, 32)


def test_feature_name_table_is_the_one_of_qemu_img(qemu_img: Program, tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / "disk.qcow2", "1M")
    theirs = load(tmp_path / "disk.qcow2")
    ours = feature_name_table()
    # A later QEMU may know features that the specification we follow does not have yet.
    names = Header(extensions=[Extension(layout.EXTENSION_FEATURE_NAMES, ours)]).feature_names
    assert names.items() <= theirs.feature_names.items()
    if len(theirs.extensions[0].data) == len(ours):
        assert theirs.extensions == [Extension(layout.EXTENSION_FEATURE_NAMES, ours)]


@pytest.mark.parametrize(
    "name", ["b", "other.qcow2", "./" * 120 + "base.qcow2", "./" * 506 + "base.qcow2", "b\xe4\udcff"]
)
def test_qemu_img_reads_a_backing_name_that_was_rewritten(qemu_img: Program, overlay: Path, name: str) -> None:
    header = load(overlay)
    header.backing_name = name
    rewrite(overlay, header)
    info = qemu_img.json("info", overlay)
    assert info["backing-filename"] == shown(header)
    assert info["backing-filename-format"] == "qcow2"


def test_qemu_img_keeps_what_was_put_into_the_header(qemu_img: Program, overlay: Path) -> None:
    unknown = Extension(0xAABBCCDD, b"of the future")
    header = load(overlay)
    header.extensions.insert(0, unknown)
    rewrite(overlay, header)
    qemu_img("check", overlay)
    qemu_img("rebase", "-u", "-b", "", overlay)
    assert unknown in load(overlay).extensions
    assert load(overlay).backing_name is None


def test_version_2_image_becomes_version_3(qemu_img: Program, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "compat=0.10", disk, "1M")
    header = replace(load(disk), version=3, header_length=layout.HEADER_V3_LENGTH)
    header.extensions.append(Extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table()))
    rewrite(disk, header)
    assert qemu_img.json("info", disk)["format-specific"]["data"]["compat"] == "1.1"
    qemu_img("check", disk)


def _put(fmt: str, offset: int, value: int) -> tuple[int, bytes]:
    return offset, struct.pack(">" + fmt, value)


# The overlay of the fixture: format name at 0x70, feature names at 0x80, end marker at 0x208, backing name at 0x210.
BOTH_ACCEPT: dict[str, list[tuple[int, bytes]]] = {
    "no name: size 0": [_put("I", 16, 0)],
    "no name: offset at the end of the cluster, size 0": [_put("Q", 8, 65536), _put("I", 16, 0)],
    "name at the very end of the cluster": [_put("Q", 8, 65526), (65526, b"base.qcow2")],
    "name of 1023 bytes": [_put("Q", 8, 1024), _put("I", 16, 1023), (1024, b"x" * 1023)],
    "name straight behind the header": [_put("Q", 8, 112), (112, b"base.qcow2")],
    "name that is not UTF-8": [(0x214, b"\xff")],
    "feature names with an odd byte less": [_put("I", 0x84, 383)],
    "unknown extension": [_put("I", 0x80, 0xDEADBEEF)],
    "unknown extension up to the name, no end marker": [_put("I", 0x80, 0xDEADBEEF), _put("I", 0x84, 0x210 - 0x88)],
    "unknown extension twice": [_put("I", 0x70, 0xDEADBEEF), _put("I", 0x80, 0xDEADBEEF)],
    "data file name without its bit": [
        _put("I", 0x80, layout.EXTENSION_DATA_FILE),
        _put("I", 0x84, 3),
        (0x88, b"raw".ljust(16, b"\0")),
    ],
    "end marker with a length": [_put("I", 0x70, 0), _put("I", 0x74, 77)],
    "bitmaps bit without the extension": [_put("Q", 88, 1)],
    "raw external data without a data file": [_put("Q", 88, 2)],
    "unknown compatible and autoclear bits": [_put("Q", 80, 1 << 63), _put("Q", 88, 1 << 63)],
    "padding byte set": [_put("B", 105, 1)],
    "longer header": [_put("I", 100, 512)],
    "header of one cluster": [_put("Q", 8, 0), _put("I", 100, 65536)],
    "larger L1 table in the header's limits": [_put("I", 36, 1), _put("Q", 24, 1 << 29)],
    "dirty": [_put("Q", 72, 1)],
    "corrupt": [_put("Q", 72, 2)],
    "zstd": [_put("Q", 72, 8), _put("B", 104, 1)],
    "extended L2": [_put("Q", 72, 16)],
    "refcount order 0": [_put("I", 96, 0)],
    "refcount table of the largest size": [_put("I", 56, 128)],
}
BOTH_REFUSE: dict[str, list[tuple[int, bytes]]] = {
    "magic": [(3, b"\xfa")],
    "version 4": [_put("I", 4, 4)],
    "cluster bits 8": [_put("I", 20, 8)],
    "cluster bits 22": [_put("I", 20, 22)],
    "header length 100": [_put("I", 100, 100)],
    "header longer than its cluster": [_put("I", 100, 65544)],
    "name starts behind the cluster": [_put("Q", 8, 65537)],
    "name ends behind the cluster": [_put("Q", 8, 65527)],
    "name of 1024 bytes": [_put("Q", 8, 1024), _put("I", 16, 1024)],
    "extension runs into the name": [_put("I", 0x84, 0x210 - 0x88 + 1)],
    "extension runs out of the cluster": [_put("I", 0x80, 0xDEADBEEF), _put("I", 0x84, 65536)],
    "format name of 16 bytes": [_put("I", 0x74, 16)],
    "encryption pointer without LUKS": [_put("I", 0x80, layout.EXTENSION_ENCRYPTION), _put("I", 0x84, 16)],
    "encryption method 3": [_put("I", 32, 3)],
    "unknown incompatible bit": [_put("Q", 72, 1 << 5)],
    "compression bit without type": [_put("Q", 72, 8)],
    "compression type without bit": [_put("B", 104, 1)],
    "compression type 2": [_put("Q", 72, 8), _put("B", 104, 2)],
    "compression bit in a header of 104 bytes": [_put("Q", 72, 8), _put("I", 100, 104), _put("Q", 8, 0)],
    "refcount order 7": [_put("I", 96, 7)],
    "L1 table too small": [_put("I", 36, 0)],
    "L1 table too large": [_put("I", 36, (4 << 20) + 1)],
    "L1 table not aligned": [_put("Q", 40, 0x30200)],
    "refcount table not aligned": [_put("Q", 48, 0x10200)],
    "refcount table too large": [_put("I", 56, 129)],
    "too many snapshots": [_put("I", 60, 65537)],
    "snapshot table not aligned": [_put("Q", 64, 5)],
    "virtual size of 8 EiB": [_put("Q", 24, 1 << 63)],
    "extended L2 with clusters of 8 KiB": [_put("Q", 72, 16), _put("I", 20, 13)],
}
WE_REFUSE: dict[str, list[tuple[int, bytes]]] = {
    "header length no multiple of 8, as the specification says": [_put("I", 100, 105)],
    "name inside the header": [_put("Q", 8, 80), _put("I", 16, 4)],
    "name with a NUL inside, which names another file to a C program": [(0x214, b"\0")],
    "format name twice, which may appear once": [_put("I", 0x80, layout.EXTENSION_BACKING_FORMAT), _put("I", 0x84, 3)],
    "L1 table at offset 0, which is the header": [_put("Q", 40, 0)],
    "L1 table behind the end of the file, which would read as an empty disk": [_put("Q", 40, 1 << 40)],
    "L1 table beyond 56 bits": [_put("Q", 40, 1 << 56)],
    "refcount table at offset 0": [_put("Q", 48, 0)],
    "no refcount table, for anything but a check": [_put("I", 56, 0)],
}


def _apply(path: Path, changes: list[tuple[int, bytes]]) -> None:
    with path.open("r+b") as file:
        for offset, data in changes:
            file.seek(offset)
            file.write(data)


@pytest.mark.parametrize("case", BOTH_ACCEPT)
def test_odd_header_is_accepted_by_both(qemu_img: Program, overlay: Path, case: str) -> None:
    _apply(overlay, BOTH_ACCEPT[case])
    info = qemu_img.json("info", "-f", "qcow2", overlay)
    header = load(overlay)
    assert info.get("backing-filename") == shown(header)
    if header.backing_name is not None:
        assert info.get("backing-filename-format") == header.backing_format
    assert info["virtual-size"] == header.size
    assert info["format-specific"]["data"]["refcount-bits"] == header.geometry().refcount_bits


@pytest.mark.parametrize("case", BOTH_REFUSE)
def test_bad_header_is_refused_by_both(qemu_img: Program, overlay: Path, case: str) -> None:
    _apply(overlay, BOTH_REFUSE[case])
    assert qemu_img.run("info", "-f", "qcow2", overlay).returncode == 1
    with pytest.raises(ImageError):
        load(overlay)


@pytest.mark.parametrize("case", WE_REFUSE)
def test_header_that_qemu_img_may_let_pass_is_refused_for_a_reason(overlay: Path, case: str) -> None:
    _apply(overlay, WE_REFUSE[case])
    with pytest.raises(ImageError):
        load(overlay)
