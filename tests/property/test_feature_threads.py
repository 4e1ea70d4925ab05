"""Seven threads on images with every feature, while an eighth makes snapshots and bitmaps."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import KiB
from tests.encrypted import LUKS, OBJECT, OPEN
from tests.programs import Program
from tests.property.chains import first_difference
from tests.property.test_threads import SECTOR, run_together

WRITERS: Final = 7
SIZE: Final = 384 * KiB
IMAGES: Final[dict[str, dict[str, Any]]] = {
    "subclusters": {"cluster_size": 16 * KiB, "extended_l2": True},
    "subclusters, lazy refcounts": {"cluster_size": 16 * KiB, "extended_l2": True, "lazy_refcounts": True},
    "encrypted": {"cluster_size": 4096, **LUKS},
    "encrypted subclusters": {"cluster_size": 16 * KiB, "extended_l2": True, "refcount_bits": 64, **LUKS},
    "lazy refcounts": {"cluster_size": 512, "lazy_refcounts": True, "refcount_bits": 64},
    "data file": {"cluster_size": 4096, "data_file": "guest.raw"},
    "raw data file": {"cluster_size": 4096, "data_file": "guest.raw", "data_file_raw": True},
    "encrypted data file": {"cluster_size": 4096, "data_file": "guest.raw", **LUKS},
    "version 2": {"cluster_size": 1024, "compat": "0.10"},
}


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def pattern(number: int, turn: int, length: int) -> bytes:
    """Bytes that say which thread wrote them in which turn, and never zero."""
    return (bytes((number + 1, turn % 250 + 1)) * (length // 2 + 1))[:length]


@pytest.mark.parametrize("cache", [{}, {"l2-cache-size": 1, "refcount-cache-size": 1}], ids=["", "small caches"])
@pytest.mark.parametrize("name", IMAGES)
def test_pieces_of_shared_sectors_under_eight_threads(
    name: str, cache: dict[str, Any], tmp_path: Path, qemu_img: Program
) -> None:
    run(IMAGES[name], cache, 0, 40, tmp_path, qemu_img)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("name", IMAGES)
def test_torture(name: str, seed: int, tmp_path: Path, qemu_img: Program) -> None:
    run(IMAGES[name], {"l2-cache-size": 1} if seed % 2 else {}, seed, 800, tmp_path, qemu_img)


def run(
    options: dict[str, Any], cache: dict[str, Any], seed: int, turns: int, folder: Path, qemu_img: Program
) -> None:
    """Writer `n` owns the bytes whose position, in pieces of 73, is `n` modulo the writers: most sectors belong to several."""
    blocklib.create(folder / "base.raw", SIZE, format="raw")
    base = b"\xff" * SIZE
    (folder / "base.raw").write_bytes(base)
    raw = bool(options.get("data_file_raw"))
    backing: Any = {} if raw else {"backing": "base.raw", "backing_format": "raw"}
    path = folder / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2", options=options, **backing)
    encrypted = "encrypt.format" in options
    disk = blocklib.open(
        path,
        "r+",
        format="qcow2",
        references="allow",
        discard="unmap",
        cache="unsafe",
        options={**cache, **(OPEN if encrypted else {})},
    )
    content = bytearray(SIZE if raw else base)
    shared = SIZE - 64 * KiB
    """From here on all threads overwrite, zero and discard each other's sectors."""
    snapshots: list[str] = []
    done = threading.Event()
    n_left = [WRITERS]
    lock = threading.Lock()

    def write(number: int) -> None:
        rnd = random.Random(f"{seed}/{number}")
        try:
            for turn in range(turns):
                kind = rnd.random()
                if kind < 0.75:
                    piece = rnd.randrange(number, shared // 73, WRITERS)
                    start = piece * 73
                    if kind < 0.6:
                        data = pattern(number, turn, 73)
                        disk.write(start, data)
                    else:
                        data = bytes(73)
                        disk.write_zeroes(start, 73, unmap=kind < 0.7)
                    content[start : start + 73] = data
                else:
                    start = shared + rnd.randrange(64 * KiB // SECTOR) * SECTOR
                    length = min(SIZE - start, rnd.choice((512, 2048, 16384)))
                    if kind < 0.85:
                        disk.write(start, bytes((number + 1,)) * length)
                    elif kind < 0.93:
                        disk.write_zeroes(start, length, unmap=kind < 0.9)
                    else:
                        disk.discard(start, length)
        finally:
            with lock:
                n_left[0] -= 1
                if not n_left[0]:
                    done.set()

    def change_the_image() -> None:
        rnd = random.Random(seed)
        number = 0
        while not done.is_set() or number < 4:
            number += 1
            kind = rnd.randrange(6)
            if kind == 0 or number == 1:
                disk.bitmaps.add(f"b{number}", granularity=rnd.choice((512, 65536)), persistent="compat" not in options)
            elif kind == 1 and len(disk.bitmaps) > 1:
                rnd.choice(list(disk.bitmaps)[1:]).remove()
            elif kind == 2:
                disk.flush()
            elif "data_file" in options:
                list(disk.extents())
            elif kind == 3 and snapshots:
                gone = snapshots.pop(rnd.randrange(len(snapshots)))
                disk.snapshots[gone].delete()
            elif len(snapshots) < 5:
                snapshots.append(f"s{number}")
                disk.snapshots.create(f"s{number}")

    run_together(change_the_image, *(partial(write, number) for number in range(WRITERS)))
    found = disk.read(0, SIZE)
    assert not first_difference(found[:shared], content[:shared])
    allowed = {0, 0xFF, *range(1, WRITERS + 1)}
    for start in range(shared, SIZE, SECTOR):
        sector = found[start : start + SECTOR]
        assert sector[0] in allowed, start
        assert sector == sector[:1] * SECTOR, start
    disk.close()

    named = [*OBJECT, "--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s"] if encrypted else [path]
    qemu_img("check", "-q", *named, cwd=folder)
    qemu_img("convert", *named, "-O", "raw", "copy.raw", cwd=folder)
    assert not first_difference((folder / "copy.raw").read_bytes(), found)
    for name in snapshots:
        with blocklib.open(
            path,
            format="qcow2",
            references="allow",
            options={"snapshot.name": name, **(OPEN if encrypted else {})},
        ) as past:
            old = past.read(0, SIZE)
        for start in range(0, shared, 73):
            owner = start // 73 % WRITERS + 1
            piece = old[start : min(start + 73, shared)]
            assert piece == piece[:2] * (len(piece) // 2) + piece[: len(piece) % 2]
            assert piece[0] in (0, 0xFF, owner), start
