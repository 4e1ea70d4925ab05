"""Damaged images with every feature: whatever is asked of them, what comes out is a BlocklibError, and it comes soon."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import BlocklibError, KiB
from tests.encrypted import LUKS, OPEN

SIZE: Final = 256 * KiB
IMAGES: Final[dict[str, dict[str, Any]]] = {
    "subclusters": {"cluster_size": 16 * KiB, "extended_l2": True},
    "small clusters": {"cluster_size": 512, "refcount_bits": 64},
    "lazy refcounts": {"cluster_size": 4096, "lazy_refcounts": True, "compression_type": "zstd"},
    "encrypted": {"cluster_size": 4096, **LUKS},
    "version 2": {"cluster_size": 1024, "compat": "0.10"},
    "data file": {"cluster_size": 4096, "data_file": "guest.raw"},
}
PATIENCE: Final = 20.0


def make(path: Path, options: dict[str, Any]) -> None:
    blocklib.create(path, SIZE, format="qcow2", options=options)
    with opened(path, "r+") as disk:
        if "data_file" not in options and "encrypt.format" not in options:
            disk.write_compressed(0, bytes(range(256)) * 64)
        disk.write(40_000, b"x" * 60_000)
        if "compat" not in options:
            disk.bitmaps.add("b", granularity=512, persistent=True)
        if "data_file" not in options:
            disk.snapshots.create("one")
        disk.write(50_000, b"y" * 30_000)
        disk.discard(80_000, 8_000)


def opened(path: Path, mode: Any = "r", **options: Any) -> blocklib.Disk:
    return blocklib.open(
        path, mode, format="qcow2", references="allow", discard="unmap", cache="unsafe", options={**OPEN, **options}
    ) if path.with_suffix(".key").exists() else blocklib.open(
        path, mode, format="qcow2", references="allow", discard="unmap", cache="unsafe", options=options
    )  # fmt: skip


def damage(path: Path, rnd: random.Random) -> None:
    """Change bytes where there is metadata: of the header, and of whatever looks like a table."""
    data = bytearray(path.read_bytes())
    for _ in range(rnd.choice((1, 1, 2, 5))):
        kind = rnd.random()
        if kind < 0.3:
            place = rnd.randrange(min(600, len(data)))
        else:  # bytes that are neither zero nor guest data, and their surroundings
            while True:
                place = rnd.randrange(len(data))
                near = bytes(data[max(0, place - 8) : place + 8])
                if any(near) and near[:1] not in (b"x", b"y"):
                    break
        what = rnd.random()
        if what < 0.4:
            data[place] ^= 1 << rnd.randrange(8)
        elif what < 0.7:
            data[place] = rnd.choice((0, 1, 0x7F, 0x80, 0xFF))
        else:
            place &= ~7
            value = rnd.choice((0, (1 << 64) - 1, 1 << 63, rnd.randrange(1 << 64), rnd.randrange(len(data)), len(data)))
            data[place : place + 8] = value.to_bytes(8, "big")
    path.write_bytes(data)


def requests(path: Path, rnd: random.Random) -> list[Callable[[], object]]:
    def on_disk(request: Callable[[blocklib.Disk], object], mode: str = "r+", **options: Any) -> Callable[[], object]:
        def run() -> None:
            with opened(path, mode, **options) as disk:
                if disk.size <= 1 << 24:
                    request(disk)

        return run

    place = rnd.randrange(SIZE - 5000)
    readers: list[Callable[[], object]] = [
        lambda: blocklib.info(path, format="qcow2"),
        lambda: blocklib.check(path, format="qcow2"),
        lambda: blocklib.repair(path, "all", format="qcow2", dry_run=True),
        on_disk(lambda disk: disk.read(0, disk.size), "r"),
        on_disk(lambda disk: disk.map(), "r"),
        on_disk(lambda disk: [bitmap.count for bitmap in disk.bitmaps], "r"),
        on_disk(lambda disk: disk.read(0, disk.size), "r", **{"snapshot.name": "one"}),
    ]
    writers: list[Callable[[], object]] = [
        on_disk(lambda disk: disk.write(place, b"z" * 5000)),
        on_disk(lambda disk: disk.write_zeroes(place, 5000, unmap=True)),
        on_disk(lambda disk: disk.snapshots.create("two")),
        on_disk(lambda disk: disk.snapshots["one"].apply()),
        on_disk(lambda disk: disk.snapshots["one"].delete()),
        on_disk(lambda disk: disk.bitmaps.add("c", persistent=True)),
        on_disk(lambda disk: disk.bitmaps["b"].remove()),
        on_disk(lambda disk: disk.truncate(disk.size // 1024 * 512, shrink=True)),
        on_disk(lambda disk: disk.truncate(disk.size // 512 * 512 + 64 * KiB)),
        on_disk(lambda disk: blocklib.amend(disk, {"refcount_bits": 32})),
        lambda: blocklib.repair(path, "leaks", format="qcow2"),
        lambda: blocklib.repair(path, "all", format="qcow2"),
    ]
    rnd.shuffle(writers)
    return [*readers, *writers]


def run(name: str, folder: Path, seeds: range) -> None:
    sound, path = folder / "sound.qcow2", folder / "disk.qcow2"
    if "encrypt.format" in IMAGES[name]:
        for image in (sound, path):
            image.with_suffix(".key").touch()
    make(sound, IMAGES[name])
    n_readers = 7
    for seed in seeds:
        rnd = random.Random(f"{name}/{seed}")
        shutil.copyfile(sound, path)
        damage(path, rnd)
        before = path.read_bytes()
        for number, request in enumerate(requests(path, rnd)):
            started = time.monotonic()
            try:
                with suppress(BlocklibError):
                    request()
            except BaseException as exc:
                exc.add_note(f"seed {seed}, request {number}")
                raise
            assert time.monotonic() - started < PATIENCE, (seed, number)
            if number < n_readers:
                assert path.read_bytes() == before, (seed, number)


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_but_our_own_errors_comes_of_a_damaged_image(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, range(12))


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", IMAGES)
def test_torture(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, range(1000, 3000))
