"""check and repair of qcow2 images beside qemu-img: the same numbers for sound and damaged images, repairs that it accepts.

Two differences are meant.  Guest data on metadata, or metadata of two kinds in one cluster, is a corruption for us even where
the stored count agrees; qemu-img only compares counts.  And where a refcount block cannot be read, qemu-img stops looking at
flags, so numbers of corruptions differ when there are check errors.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from blocklib.formats.qcow2.check import check_image
from blocklib.formats.qcow2.header import Header, header_span, parse_header
from blocklib.formats.qcow2.repair import repair_image
from blocklib.policy import Limits
from blocklib.reports import CheckReport, RepairReport
from tests.programs import Program

KiB, MiB = 1 << 10, 1 << 20
COPIED, COMPRESSED = 1 << 63, 1 << 62
OFFSET = (1 << 56) - 512

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


class ImagePath:
    """An image file that can be damaged, and checked by either side."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, offset: int, view: memoryview) -> None:
        with self.path.open("rb") as file:
            file.seek(offset)
            part = file.read(len(view))
        view[: len(part)] = part
        view[len(part) :] = bytes(len(view) - len(part))

    def write(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(b"".join(bytes(view) for view in views))

    def flush(self) -> None:
        pass

    def header(self) -> Header:
        with self.path.open("rb") as file:
            data = file.read(4096)
            data += file.read(max(0, header_span(data) - len(data)))
        return parse_header(data, limits=Limits(), for_check=True)

    def check(self) -> CheckReport:
        header = self.header()
        return check_image(self, header, header.geometry(), filename=str(self.path), max_findings=1_000_000)

    def repair(self, what: Any) -> RepairReport:
        header = self.header()
        return repair_image(self, header, header.geometry(), what, filename=str(self.path))

    def copy(self) -> ImagePath:
        return ImagePath(Path(shutil.copy(self.path, self.path.with_suffix(".copy"))))

    # Places and damage ------------------------------------------------------------------------------------------------

    def number(self, offset: int, length: int = 8) -> int:
        buffer = bytearray(length)
        self.read(offset, memoryview(buffer))
        return int.from_bytes(buffer, "big")

    def set(self, offset: int, value: int, length: int = 8) -> None:
        self.write(offset, (value.to_bytes(length, "big"),))

    def flip(self, offset: int, bits: int) -> None:
        self.set(offset, self.number(offset) ^ bits)

    def resize(self, change: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(self.size + change)

    @property
    def cluster_size(self) -> int:
        return 1 << self.number(20, 4)

    @property
    def l1(self) -> int:
        return self.number(40)

    @property
    def refcount_table(self) -> int:
        return self.number(48)

    def refcount_block(self, index: int = 0) -> int:
        return self.number(self.refcount_table + 8 * index) & ~511

    def l2(self, index: int = 0) -> int:
        return self.number(self.l1 + 8 * index) & OFFSET

    def l2_entry(self, index: int) -> int:
        return self.l2() + 8 * index

    def data(self, index: int) -> int:
        return self.number(self.l2_entry(index)) & OFFSET


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

DAMAGE: dict[str, Callable[[ImagePath], object]] = {
    "count too high": lambda image: image.set(image.refcount_block() + 2 * 6, 2, 2),
    "count too low": lambda image: image.set(image.refcount_block() + 2 * 6, 0, 2),
    "count past the end": lambda image: image.set(image.refcount_block() + 2 * 500, 1, 2),
    "leaked cluster": lambda image: image.set(image.l2_entry(3), 0),
    "copied flag of data cleared": lambda image: image.flip(image.l2_entry(3), COPIED),
    "copied flag of a table cleared": lambda image: image.flip(image.l1, COPIED),
    "copied flag without offset": lambda image: image.set(image.l2_entry(3), COPIED),
    "reserved bit of an L2 entry": lambda image: image.flip(image.l2_entry(3), 2),
    "high reserved bit of an L2 entry": lambda image: image.flip(image.l2_entry(3), 1 << 60),
    "reserved bit of an unallocated L2 entry": lambda image: image.set(image.l2_entry(300), 4),
    "reserved bit of an L1 entry": lambda image: image.flip(image.l1, 1 << 57),
    "data unaligned": lambda image: image.flip(image.l2_entry(3), 512),
    "data past the end": lambda image: image.set(image.l2_entry(3), COPIED | 100 * 64 * KiB),
    "data at the end": lambda image: image.set(image.l2_entry(3), COPIED | image.size),
    "data far away": lambda image: image.set(image.l2_entry(3), COPIED | OFFSET & ~0xFFFF),
    "data twice": lambda image: image.set(image.l2_entry(3), image.number(image.l2_entry(4))),
    "data on the L1 table": lambda image: image.set(image.l2_entry(3), image.l1 | COPIED),
    "compressed with copied flag": lambda image: image.flip(image.l2_entry(20), COPIED),
    "compressed into the next clusters": lambda image: image.flip(image.l2_entry(20), 0xFF << 54),
    "compressed past the end": lambda image: image.set(image.l2_entry(20), COMPRESSED | image.size + 64 * KiB),
    "compressed across the end": lambda image: image.set(image.l2_entry(20), COMPRESSED | 1 << 54 | image.size - 512),
    "compressed, truly across": lambda image: image.set(image.l2_entry(20), COMPRESSED | 255 << 54 | image.size - 512),
    "L2 table unaligned": lambda image: image.flip(image.l1, 512),
    "L2 table past the end": lambda image: image.set(image.l1, COPIED | 1 << 40),
    "L2 table is a refcount block": lambda image: image.set(image.l1, COPIED | image.refcount_block()),
    "L2 table without offset": lambda image: image.set(image.l1, COPIED),
    "refcount block missing": lambda image: image.set(image.refcount_table, 0),
    "refcount block unaligned": lambda image: image.flip(image.refcount_table, 512),
    "refcount block past the end": lambda image: image.set(image.refcount_table, 1 << 40),
    "refcount block beyond files": lambda image: image.set(image.refcount_table, 1 << 63),
    "reserved bit of a refcount table entry": lambda image: image.flip(image.refcount_table, 1),
    "refcount block twice": lambda image: image.set(image.refcount_table + 8, image.refcount_block()),
    "refcount block on data": lambda image: image.set(image.refcount_table + 8, image.data(0)),
    "refcount table past the end": lambda image: image.set(48, 1 << 40),
    "file shortened": lambda image: image.resize(-3 * 64 * KiB),
    "file shortened a little": lambda image: image.resize(-1000),
    "file lengthened": lambda image: image.resize(5 * 64 * KiB + 100),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_numbers_agree_for_a_damaged_image(make: Maker, damage: Callable[[ImagePath], object]) -> None:
    image = make("write 0 1M", "write 4M 128k", "write -c -P 7 1280k 128k")
    damage(image)
    make.assert_same(image)


SNAPSHOT_DAMAGE: dict[str, Callable[[ImagePath, int], object]] = {
    "L1 table unaligned": lambda image, table: image.flip(table, 512),
    "L1 table past the end": lambda image, table: image.set(table, 1 << 40),
    "L1 table at 0": lambda image, table: image.set(table, 0),
    "L1 table empty": lambda image, table: image.set(table + 8, 0, 4),
    "L1 table longer": lambda image, table: image.set(table + 8, 2, 4),
    "L1 table too large": lambda image, table: image.set(table + 8, (4 << 20) + 1, 4),
    "one snapshot more": lambda image, table: image.set(60, 3, 4),
    "one snapshot less": lambda image, table: image.set(60, 1, 4),
    "none": lambda image, table: image.set(60, 0, 4),
    "id too long": lambda image, table: image.set(table + 12, 60000, 2),
    "L2 table shared with the active disk": lambda image, table: image.flip(image.number(table), 2),
    "data in a shared table": lambda image, table: image.flip(image.number(image.number(table)) & OFFSET, 2),
}


@pytest.mark.parametrize("damage", SNAPSHOT_DAMAGE.values(), ids=SNAPSHOT_DAMAGE.keys())
def test_numbers_agree_for_damaged_snapshots(make: Maker, damage: Callable[[ImagePath, int], object]) -> None:
    image = make("write 0 1M", "write -c 2M 64k", snapshots=2)
    damage(image, image.number(64))
    make.assert_same(image)


def random_damage(image: ImagePath, rng: random.Random) -> None:
    """Change a few entries of any table: flipped bits, other clusters, other entries, noise."""
    size = image.cluster_size
    places = [image.l1, image.refcount_table, image.refcount_block(), image.l2(), image.l2()]
    if image.number(60, 4):
        places += [image.number(64), image.number(image.number(64))]
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.choice(places)
        offset = place + 8 * rng.randrange(rng.choice((2, 24, size // 8)))
        if not 0 < place < image.size:
            continue
        cluster = rng.randrange(image.size // size + 3) * size
        value = rng.choice(
            (
                image.number(offset) ^ 1 << rng.randrange(64),
                cluster,
                cluster | COPIED,
                cluster | rng.choice((512, 1, 2, 1 << 56, COMPRESSED)),
                image.number(place + 8 * rng.randrange(16)),
                rng.getrandbits(64),
                0,
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


# Repairs ------------------------------------------------------------------------------------------------------------

MENDED = [
    "count too high",
    "count too low",
    "leaked cluster",
    "copied flag of data cleared",
    "copied flag of a table cleared",
    "data twice",
    "refcount block missing",
    "file lengthened",
]


@pytest.mark.parametrize("name", MENDED)
def test_qemu_img_finds_a_repaired_image_clean_and_reads_the_same(make: Maker, qemu_img: Program, name: str) -> None:
    image = make("write -P 1 0 1M", "write -P 2 4M 128k", "write -c -P 7 1280k 128k")
    DAMAGE[name](image)
    damaged = image.copy()
    report = image.repair("all")
    assert report.after is not None
    assert report.after.clean
    assert make.assert_same(image).clean
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", damaged.path, image.path)


@pytest.mark.parametrize("name", ["count too high", "leaked cluster", "copied flag of data cleared", "data twice"])
@pytest.mark.parametrize("what", ["leaks", "all"])
def test_a_repair_fixes_as_much_as_qemu_img_does(make: Maker, qemu_img: Program, what: str, name: str) -> None:
    image = make("write 0 1M", "write 4M 128k")
    DAMAGE[name](image)
    theirs = image.copy()
    found = qemu_img.json("check", "-r", what, theirs.path, codes=(0, 2, 3))
    after = image.repair(what).after
    assert after is not None
    assert after.corruptions_fixed == found.get("corruptions-fixed", 0)
    assert after.leaks_fixed == found.get("leaks-fixed", 0)
    assert after.corruptions == found.get("corruptions", 0)
    assert after.leaks == found.get("leaks", 0)
    make.assert_same(image)


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
        before = image.check()
        after = image.repair("all").after
        found = make.assert_same(image)
        assert after is not None
        assert (found.corruptions, found.leaks) == (after.corruptions, after.leaks)
        assert after.corruptions <= before.corruptions
