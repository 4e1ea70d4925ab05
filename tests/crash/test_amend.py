"""An amend that a crash cuts off leaves the image as it was or as it was to become, and at worst leaked clusters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from blocklib import jobs
from blocklib.disk import Disk
from tests.crash.recording import SECTOR, RecordingNode, crash_sites
from tests.crash.workload import base_disk, disk_on, new_image
from tests.programs import Program

SECTORS = 3000
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wider counts": ({"cluster_size": 512, "refcount_bits": 8}, {"refcount_bits": 64}),
    "narrower counts": ({"cluster_size": 512, "refcount_bits": 64}, {"refcount_bits": 4}),
    "counts that are postponed": ({"cluster_size": 512, "lazy_refcounts": True}, {"refcount_bits": 8}),
    "up": ({"cluster_size": 2048, "compat": "0.10"}, {"compat": "1.1", "lazy_refcounts": True}),
    "up, and wider": ({"cluster_size": 1024, "compat": "0.10"}, {"compat": "1.1", "refcount_bits": 32}),
    "down": ({"cluster_size": 2048}, {"compat": "0.10"}),
    "down, over a backing file": ({"cluster_size": 2048}, {"compat": "0.10"}),
    "down, from other counts": ({"cluster_size": 512, "refcount_bits": 4}, {"compat": "0.10", "refcount_bits": 16}),
}


@pytest.mark.parametrize("snapshots", [0, 2])
@pytest.mark.parametrize("name", CHANGES)
def test_a_crash_leaves_the_image_before_or_after(name: str, snapshots: int, tmp_path: Path, qemu_img: Program) -> None:
    made, changes = CHANGES[name]
    base = base_disk(SECTORS) if "backing" in name else None
    rnd = random.Random(name)
    file = RecordingNode(data=new_image(SECTORS * SECTOR, made))
    contents = []
    with disk_on(file, backing=base) as disk:
        _fill(disk, rnd)
        for number in range(snapshots):
            disk.snapshots.create(f"s{number}")
            contents.append(disk.read(0, disk.size))
            _fill(disk, rnd)
        contents.append(disk.read(0, disk.size))
    start = bytes(file.data)
    file = RecordingNode(data=start)
    with disk_on(file, backing=base) as disk:
        with jobs.amend(disk, changes) as job:
            job.wait()
        assert disk.read(0, disk.size) == contents[-1]
    _check(tmp_path, bytes(file.data), qemu_img, "at the end", codes=(0,))
    for cut in sorted(rnd.sample(range(len(file.log) + 1), min(6, len(file.log)))):
        site = crash_sites(start, file.log, [cut])[0]
        for number, image in enumerate(site.outcomes(rnd, 2)):
            where = f"after {cut} of {len(file.log)} events, outcome {number}"
            _check(tmp_path, image, qemu_img, where, codes=(0, 3))
            with disk_on(RecordingNode(data=image), backing=base) as crashed:
                for snapshot in reversed(range(snapshots)):
                    assert crashed.read(0, crashed.size) == contents[snapshot + 1], where
                    crashed.snapshots[f"s{snapshot}"].apply()
                assert crashed.read(0, crashed.size) == contents[0], where
    if base is not None:
        base.close()


def _fill(disk: Disk, rnd: random.Random) -> None:
    for _ in range(25):
        offset = rnd.randrange(disk.size // SECTOR) * SECTOR
        length = min(disk.size - offset, rnd.choice((1, 5, 40, 200)) * SECTOR)
        if rnd.random() < 0.5:
            disk.write(offset, bytes((rnd.randrange(1, 256),)) * length)
        else:
            disk.write_zeroes(offset, length, unmap=rnd.random() < 0.5)


def _check(folder: Path, image: bytes, qemu_img: Program, where: str, *, codes: tuple[int, ...]) -> None:
    path = folder / "crashed.qcow2"
    path.write_bytes(image)
    done = qemu_img.run("check", "-f", "qcow2", path)
    assert done.returncode in codes, f"{where}: {done.stdout}{done.stderr}"
