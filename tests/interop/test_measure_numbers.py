"""`measure_size` gives the numbers that `qemu-img measure` prints, over sizes, cluster sizes and refcount widths."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blocklib.errors import UsageError
from blocklib.formats.qcow2.geometry import Geometry, MeasuredSize, measure_size
from tests.cli.running import CommandLine
from tests.programs import Program

CLUSTER_BITS = (9, 12, 16, 21)


def _options(geometry: Geometry, **more: str) -> str:
    options = {
        "cluster_size": str(geometry.cluster_size),
        "refcount_bits": str(geometry.refcount_bits),
        "extended_l2": "on" if geometry.extended_l2 else "off",
        **more,
    }
    return ",".join(f"{name}={value}" for name, value in options.items())


def _theirs(qemu_img: Program, geometry: Geometry, size: int, **more: str) -> MeasuredSize:
    options = _options(geometry, **more)
    answer = qemu_img.json("measure", "--size", str(size), "-O", "qcow2", "-o", options)
    return MeasuredSize(answer["required"], answer["fully-allocated"])


def _sizes(geometry: Geometry, seed: int) -> list[int]:
    """Small, uneven and large sizes, and such that the refcount metadata itself decides about one block more."""
    rng = random.Random(seed)
    block = geometry.refcount_block_entries * geometry.cluster_size
    largest = geometry.max_virtual_size
    near_blocks = [rng.randrange(1, 300) * block + rng.randrange(-6, 6) * geometry.cluster_size for _ in range(6)]
    uneven = [int(2 ** rng.uniform(9, largest.bit_length() - 1)) for _ in range(6)]
    fixed = [0, 1, 512, geometry.cluster_size + 1, 1 << geometry.l1_shift, (1 << geometry.l1_shift) + 1, largest]
    return [size for size in (*fixed, *near_blocks, *uneven) if 0 <= size <= largest]


@pytest.mark.parametrize("bits", CLUSTER_BITS)
@pytest.mark.parametrize("order", [0, 3, 4, 6])
def test_sizes_equal_qemu_img_measure(qemu_img: Program, bits: int, order: int) -> None:
    geometry = Geometry(bits, order)
    for size in _sizes(geometry, seed=bits * 10 + order):
        assert measure_size(geometry, size) == _theirs(qemu_img, geometry, size), size


@pytest.mark.parametrize("bits", [14, 16, 21])
def test_sizes_with_extended_l2_entries_equal_qemu_img_measure(qemu_img: Program, bits: int) -> None:
    geometry = Geometry(bits, extended_l2=True)
    for size in _sizes(geometry, seed=bits):
        assert measure_size(geometry, size) == _theirs(qemu_img, geometry, size), size


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_sizes_with_preallocation_and_compat_equal_qemu_img_measure(
    qemu_img: Program, preallocation: str, compat: str
) -> None:
    geometry = Geometry(16)
    for size in _sizes(geometry, seed=1):
        ours = measure_size(geometry, size, preallocation=preallocation)
        assert ours == _theirs(qemu_img, geometry, size, preallocation=preallocation, compat=compat), size


@pytest.mark.parametrize("bits", CLUSTER_BITS)
def test_qemu_img_refuses_the_same_sizes(qemu_img: Program, bits: int) -> None:
    geometry = Geometry(bits)
    size = geometry.max_virtual_size + 1
    done = qemu_img.run("measure", "--size", str(size), "-O", "qcow2", "-o", _options(geometry))
    assert done.returncode == 1, done.stdout
    with pytest.raises(UsageError):
        measure_size(geometry, size)


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_sizes_of_a_sparse_file_count_the_clusters_that_hold_data(qemu_img: Program, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse.raw"
    geometry = Geometry(bits)
    block = 64 << 10
    with path.open("wb") as file:
        file.truncate(10 << 20)
        for index in (1, 2, 40, 100):
            file.seek(index * block)
            file.write(os.urandom(block))
    answer = qemu_img.json("measure", "-f", "raw", "-O", "qcow2", "-o", _options(geometry), path)
    ours = measure_size(geometry, 10 << 20, 4 * block)
    assert ours == MeasuredSize(answer["required"], answer["fully-allocated"])


SOURCES = {
    "data and zeroes": "-o cluster_size=64k",
    "subclusters": "-o extended_l2=on",
    "data file": "-o data_file=data.img",
    "raw data file": "-o data_file=data.img,data_file_raw=on",
    "small clusters": "-o cluster_size=512",
    "over a backing file": "-b base.qcow2 -F qcow2",
}


@pytest.mark.parametrize("source", SOURCES)
def test_measuring_an_image_equals_qemu_img_whatever_the_options(
    source: str, qemu_img: Program, qemu_io: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "5M")
    qemu_io("-c", "write 3M 100k", "base.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", *SOURCES[source].split(), "disk.qcow2", "5M")
    for command in ("write 0 100k", "write 1M 1300k", "write -z 2M 100k", "write -z -u 1M 64k", "discard 4M 64k"):
        qemu_io("-c", command, "disk.qcow2")
    rng = random.Random(source)
    line = CommandLine()
    for _ in range(12):
        options = {name: rng.choice(values) for name, values in CREATION.items() if rng.random() < 0.4}
        if "backing_file" in options:
            options["backing_fmt"] = "qcow2"
        words = ["-O", "qcow2", "-o", ",".join(f"{name}={value}" for name, value in options.items())]
        if not options:
            words = words[:2]
        for what in (["-f", "qcow2", "disk.qcow2"], ["--size", str(rng.randrange(1 << 33))]):
            theirs = qemu_img.run("measure", *words, *what)
            ours = line.run("measure", *words, *what)
            assert (ours.code, ours.out) == (theirs.returncode, theirs.stdout), (words, what)


CREATION = {
    "cluster_size": ["512", "4k", "2M"],
    "preallocation": ["off", "metadata", "falloc", "full"],
    "refcount_bits": ["1", "8", "64"],
    "extended_l2": ["on", "off"],
    "compat": ["0.10", "1.1"],
    "data_file": ["new.img"],
    "data_file_raw": ["on"],
    "lazy_refcounts": ["on"],
    "compression_type": ["zstd"],
    "backing_file": ["base.qcow2"],
    "nocow": ["on"],
    "extent_size_hint": ["64k"],
}
