"""Both directions over all kinds of image: QEMU reads what blocklib writes, blocklib reads what QEMU writes.

Each test goes on where the other program stopped, so that both also write into images that the other has made.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB
from tests.interop.matrix import (
    ALL_CLUSTER_SIZES,
    VERSIONS,
    Case,
    Version,
    as_qemu_map,
    every_combination,
    every_pair,
    image_paths,
    qemu_io_script,
    random_changes,
    without_compression,
)
from tests.programs import Program
from tests.property.chains import (
    SECTOR,
    ChainImage,
    ImageSpec,
    build_chain,
    first_difference,
    noise,
    open_image,
)


def assert_same_map(image: ChainImage, qemu_img: Program) -> None:
    with open_image(image) as disk:
        found = as_qemu_map(list(disk.extents()))
    assert found == without_compression(qemu_img.json("map", "-f", "qcow2", image.path))


def qemu_reads(image: ChainImage, qemu_img: Program) -> bytes:
    copy = image.path.with_suffix(".converted")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, copy)
    content = copy.read_bytes()
    copy.unlink()
    return content


def assert_read_by_qemu(image: ChainImage, qemu_img: Program) -> None:
    qemu_img("check", "-q", "-f", "qcow2", image.path)
    assert not first_difference(qemu_reads(image, qemu_img), image.content)


def assert_read_by_us(image: ChainImage) -> None:
    assert blocklib.check(image.path, format="qcow2").clean
    with open_image(image) as disk:
        assert not first_difference(disk.read(0, disk.size), image.content)


def change_it(image: ChainImage, choose: random.Random) -> None:
    """Write into an image by blocklib."""
    with open_image(image, "r+", discard="unmap") as disk:
        for change in random_changes(choose, 10):
            change.apply(disk, image, discard_passes=True)


PAIRS = pytest.mark.parametrize("case", every_pair(), ids=str)


@PAIRS
def test_qemu_reads_what_we_write(case: Case, tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    choose = case.random()
    specs = case.specs()
    images = build_chain(tmp_path, specs, [random_changes(choose, 8) for _ in specs])
    for image in images:
        assert_read_by_qemu(image, qemu_img)
    top = images[-1]
    assert_same_map(top, qemu_img)
    qemu_io("-f", "qcow2", *qemu_io_script(choose, 6, top.size, case.cluster_size, compressed=False), top.path)
    top.content[:] = qemu_reads(top, qemu_img)
    qemu_img("check", "-q", "-f", "qcow2", top.path)
    assert_read_by_us(top)


@PAIRS
def test_we_read_what_qemu_writes(case: Case, tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    choose = case.random()
    images: list[ChainImage] = []
    for path, spec in zip(image_paths(tmp_path, case.depth), case.specs(), strict=True):
        below = images[-1] if images else None
        create_by_qemu(path, spec, below, qemu_img, "zstd" if spec.compat == "1.1" and choose.random() < 0.5 else "zlib")
        compressed = spec.preallocation == "off"
        qemu_io("-f", "qcow2", *qemu_io_script(choose, 6, spec.size, spec.cluster_size, compressed=compressed), path)
        image = ChainImage(path, spec, bytearray(), has_backing=below is not None)
        image.content[:] = qemu_reads(image, qemu_img)
        images.append(image)
    for image in images:
        assert_read_by_us(image)
    top = images[-1]
    assert_same_map(top, qemu_img)
    change_it(top, choose)
    assert_read_by_qemu(top, qemu_img)
    assert_read_by_us(top)


@pytest.mark.torture
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: f"compat{version[0]}-refcount{version[1]}")
@pytest.mark.parametrize("cluster_size", ALL_CLUSTER_SIZES)
def test_both_directions_in_every_combination(
    cluster_size: int, version: Version, tmp_path: Path, qemu_img: Program, qemu_io: Program
) -> None:
    for case in every_combination(cluster_size, version):
        for direction in (test_qemu_reads_what_we_write, test_we_read_what_qemu_writes):
            folder = tmp_path / "images"
            folder.mkdir()
            direction(case, folder, qemu_img, qemu_io)
            shutil.rmtree(folder)


def create_by_qemu(path: Path, spec: ImageSpec, below: ChainImage | None, qemu_img: Program, compression: str) -> None:
    options = [
        f"cluster_size={spec.cluster_size}",
        f"compat={spec.compat}",
        f"refcount_bits={spec.refcount_bits}",
        f"preallocation={spec.preallocation}",
        f"compression_type={compression}",
        f"extended_l2={'on' if spec.extended_l2 else 'off'}",
    ]
    backing = ["-b", below.path.name, "-F", "qcow2"] if below is not None else []
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), *backing, path, spec.size)


def mixed_content(size: int) -> bytes:
    """Text that compresses well, noise that does not, and zeroes, in stretches that fit no cluster size."""
    content = bytearray(size)
    for number, start in enumerate(range(0, size, 37 * KiB)):
        kind = number % 4
        part = min(31 * KiB, size - start)
        if kind == 0:
            content[start : start + part] = noise(number, part)
        elif kind < 3:
            content[start : start + part] = (b"compressible %d " % number * (part // 8))[:part]
    return bytes(content)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2048 * KiB])
def test_we_read_and_change_what_qemu_compresses(
    compression: str, cluster_size: int, tmp_path: Path, qemu_img: Program
) -> None:
    content = bytearray(mixed_content(5_000_000 // SECTOR * SECTOR))
    (tmp_path / "source.raw").write_bytes(content)
    path = tmp_path / "compressed.qcow2"
    options = f"cluster_size={cluster_size},compression_type={compression}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, tmp_path / "source.raw", path)
    image = ChainImage(path, ImageSpec(len(content), "qcow2", cluster_size), content, has_backing=False)
    assert_read_by_us(image)
    with open_image(image) as disk:
        assert any(extent.compressed for extent in disk.extents())
    assert_same_map(image, qemu_img)
    change_it(image, random.Random(cluster_size))
    assert_read_by_us(image)
    assert_read_by_qemu(image, qemu_img)
    assert_same_map(image, qemu_img)
