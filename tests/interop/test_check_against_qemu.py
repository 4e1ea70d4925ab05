"""check and repair of qcow2 images beside qemu-img: the same numbers for sound and damaged images, repairs that it accepts.

Two differences are meant.  Guest data on metadata, or metadata of two kinds in one cluster, is a corruption for us even where
the stored count agrees; qemu-img only compares counts.  And where a refcount block cannot be read, qemu-img stops looking at
flags, so numbers of corruptions differ when there are check errors.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from blocklib.reports import CheckReport
from tests.damage import COMPRESSED, COPIED, IMAGES, ZERO, ImagePath, KiB, MiB
from tests.programs import Program

NUMBERS = {
    "check-errors": "check_errors",
    "corruptions": "corruptions",
    "leaks": "leaks",
    "image-end-offset": "image_end_offset",
    "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters",
    "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
}


class Maker:
    """Makes images with qemu-img and qemu-io."""

    def __init__(self, qemu_img: Program, qemu_io: Program, folder: Path) -> None:
        self.qemu_img = qemu_img
        self.qemu_io = qemu_io
        self.folder = folder

    def __call__(self, *commands: str, size: str = "64M", options: str = "", snapshots: int = 0) -> ImagePath:
        path = self.folder / "image.qcow2"
        arguments = ["-o", options] if options else []
        self.qemu_img("create", "-q", "-f", "qcow2", *arguments, path, size)
        self.io(path, *commands)
        for number in range(snapshots):
            self.qemu_img("snapshot", "-c", f"snapshot {number}", path)
            self.io(path, f"write -P {number} {number}k 5k")
        return ImagePath(path)

    def recipe(self, name: str) -> ImagePath:
        return IMAGES[name].make(self.qemu_img, self.qemu_io, self.folder / "image.qcow2")

    def io(self, path: Path, *commands: str) -> None:
        if commands:
            self.qemu_io("-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)

    def check(self, image: ImagePath) -> dict[str, int] | None:
        """What qemu-img finds, or None where it gives up without an answer."""
        done = self.qemu_img.run("check", "--output=json", image.path)
        if not done.stdout:
            return None
        found = json.loads(done.stdout)
        return {name: found.get(name, 0) for name in NUMBERS}

    def assert_same(self, image: ImagePath) -> CheckReport:
        """Both sides find the same; the differences that are meant are left out."""
        report = image.check()
        ours = {name: getattr(report, attribute) for name, attribute in NUMBERS.items()}
        theirs = self.check(image)
        if theirs is None:
            assert not report.clean
            return report
        ours["corruptions"] -= sum(found.expected == "metadata that nothing else uses" for found in report.findings)
        if ours["check-errors"]:
            assert theirs["corruptions"] > 0
            del ours["corruptions"], theirs["corruptions"]
        assert ours == theirs, "\n".join(map(str, report.findings[:20]))
        return report


@pytest.fixture
def make(qemu_img: Program, qemu_io: Program, tmp_path: Path) -> Maker:
    return Maker(qemu_img, qemu_io, tmp_path)


# Sound images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2 * MiB])
def test_numbers_agree_for_every_width_and_cluster_size(make: Maker, cluster_size: int, refcount_bits: int) -> None:
    unit = cluster_size
    image = make(
        f"write 0 {unit * 9}",
        f"write {unit * 90} {unit}",
        f"write {unit * 20} {unit * 5}",
        f"write -z {unit * 2} {unit}",
        f"write -zu {unit * 3} {unit}",
        f"discard {unit * 5} {unit}",
        size=str(unit * 120 + 512),
        options=f"cluster_size={cluster_size},refcount_bits={refcount_bits}",
    )
    report = make.assert_same(image)
    assert report.clean
    assert report.allocated_clusters


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_numbers_agree_for_preallocated_images(make: Maker, compat: str, preallocation: str) -> None:
    options = f"cluster_size=4k,compat={compat},preallocation={preallocation}"
    assert make.assert_same(make(size="6M", options=options)).allocated_clusters == 1536


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2 * MiB])
def test_numbers_agree_for_compressed_clusters(make: Maker, cluster_size: int, compression: str) -> None:
    unit = cluster_size
    image = make(
        f"write -c -P 1 0 {unit * 8}",
        f"write {unit * 8} {unit * 2}",
        f"write -c -P 2 {unit * 10} {unit * 3}",
        size=str(unit * 100),
        options=f"cluster_size={cluster_size},compression_type={compression}",
    )
    assert make.assert_same(image).compressed_clusters == 11


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=4k,refcount_bits=8", "cluster_size=512"])
def test_numbers_agree_with_snapshots(make: Maker, options: str) -> None:
    image = make("write 0 500k", "write -c 640k 64k", options=options, size="4M", snapshots=3)
    report = make.assert_same(image)
    assert report.clean
    assert image.header().nb_snapshots == 3


@pytest.mark.parametrize("size", ["0", "512", "1T"])
def test_numbers_agree_for_empty_images(make: Maker, size: str) -> None:
    assert make.assert_same(make(size=size)).clean


def test_numbers_agree_for_an_overlay(make: Maker, qemu_img: Program, tmp_path: Path) -> None:
    base = make("write 0 2M")
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.path, overlay)
    make.io(overlay, "write 4k 4k")
    assert make.assert_same(ImagePath(overlay)).allocated_clusters == 1


# Damaged images -----------------------------------------------------------------------------------------------------


def random_damage(image: ImagePath, rng: random.Random) -> None:
    """Change a few entries of any table: flipped bits, other clusters, other entries, noise."""
    size = image.cluster_size
    places = [image.l1, image.refcount_table, image.refcount_block(), image.l2(), image.l2()]
    if image.field("nb_snapshots"):
        places += [image.snapshots, image.number(image.snapshots)]
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        place = rng.choice(places)
        offset = place + 8 * rng.randrange(rng.choice((2, 24, 80, size // 8)))
        if not 0 < place < image.size:
            continue
        cluster = rng.randrange(image.size // size + 3) * size
        value = rng.choice(
            (
                image.number(offset) ^ 1 << rng.randrange(64),
                cluster,
                cluster | COPIED,
                cluster | rng.choice((512, 1, 2, 513, COPIED | 513, 1 << 56, COMPRESSED)),
                image.number(place + 8 * rng.randrange(16)),
                rng.getrandbits(64),
                1 << rng.randrange(32) | 1 << rng.randrange(32, 64),
                rng.choice((0, COPIED, COPIED | ZERO)),
            )
        )
        image.set(offset, value)


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512,refcount_bits=64",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "cluster_size=64k",
        "cluster_size=64k,compat=0.10",
    ],
)
def test_numbers_agree_for_random_damage(make: Maker, options: str) -> None:
    unit = 512 if "512" in options else 4 * KiB if "4k" in options and "64k" not in options else 64 * KiB
    narrow = "refcount_bits=1" in options or "refcount_bits=2" in options
    sound = make(
        f"write 0 {20 * unit}",
        f"write -z {2 * unit} {unit}",
        f"write {40 * unit} {4 * unit}" if narrow else f"write -c {40 * unit} {4 * unit}",
        size=str(60 * unit),
        options=options,
        snapshots=0 if narrow else 2,
    )
    for seed in range(25):
        image = sound.copy()
        random_damage(image, random.Random(f"{options} {seed}"))
        make.assert_same(image)


@pytest.mark.parametrize("name", ["extended L2", "data file", "raw data file", "bitmaps", "snapshots"])
def test_numbers_agree_for_random_damage_to_every_feature(make: Maker, name: str) -> None:
    sound = make.recipe(name)
    assert make.assert_same(sound).clean
    for seed in range(40):
        image = sound.copy()
        random_damage(image, random.Random(f"{name} {seed}"))
        make.assert_same(image)


# Repairs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=512,refcount_bits=64", "cluster_size=4k,refcount_bits=1"]
)
def test_an_image_left_dirty_by_a_killed_qemu_is_clean_after_a_repair(
    make: Maker, qemu_img: Program, qemu_io: Program, options: str
) -> None:
    image = make(options=f"{options},lazy_refcounts=on")
    done = qemu_io.run("-f", "qcow2", "-c", "write -P 9 0 700k", "-c", "flush", "-c", "abort", image.path)
    assert done.returncode != 0
    assert image.header().incompatible_features == 1
    assert make.assert_same(image).corruptions > 0
    assert image.repair("all").after is not None
    assert image.header().incompatible_features == 0
    assert make.assert_same(image).clean
    assert "Pattern verification failed" not in qemu_io("-f", "qcow2", "-c", "read -P 9 0 700k", image.path)


def test_repairs_of_random_damage_agree_with_qemu_img_about_what_remains(make: Maker, qemu_img: Program) -> None:
    sound = make("write 0 80k", "write -c 160k 16k", size="1M", options="cluster_size=4k", snapshots=1)
    for seed in range(40):
        image = sound.copy()
        random_damage(image, random.Random(seed))
        after = image.repair("all").after
        found = make.assert_same(image)
        assert after is not None
        assert (found.corruptions, found.leaks, found.check_errors) == (after.corruptions, after.leaks, 0)
