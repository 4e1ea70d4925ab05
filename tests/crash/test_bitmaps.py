"""Whatever a crash leaves, a stored bitmap is in use, or it is one that was stored beside exactly the content that is there."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocklib.disk import Disk
from blocklib.errors import BlocklibError, StorageError
from tests.crash.recording import SECTOR, RecordingNode, crash_sites
from tests.crash.workload import disk_on, new_image
from tests.programs import Program

CLEAN_OR_LEAKS = (0, 3)
N_SECTORS = 20_000
NAMES = ["on", "off", "x" * 700, "y" * 900]
"""Long ones, so that the directory is longer than a sector."""

State = tuple[bool, tuple[tuple[int, int], ...]]


@dataclass
class Stored:
    """What was true when the image had been closed."""

    states: dict[str, State]
    content: bytes


def states_of(disk: Disk) -> dict[str, State]:
    return {
        bitmap.name: (bitmap.enabled, tuple(bitmap.dirty_ranges().tolist()))
        for bitmap in disk.bitmaps
        if not bitmap.inconsistent
    }


def session(disk: Disk, rnd: random.Random, *, first: bool) -> None:
    """Requests and changes of bitmaps, some of which may fail."""
    if first:
        for name in NAMES:
            disk.bitmaps.add(name, granularity=rnd.choice((512, 4096)), persistent=True, enabled=name != "off")
    for _ in range(rnd.randrange(2, 12)):
        offset = rnd.randrange(N_SECTORS - 64) * SECTOR
        length = rnd.randrange(1, 64) * SECTOR
        kind = rnd.random()
        bitmap = rnd.choice(list(disk.bitmaps)) if len(disk.bitmaps) else None
        if kind < 0.5:
            disk.write(offset, rnd.randbytes(length))
        elif kind < 0.6:
            disk.write_zeroes(offset, length, unmap=True)
        elif kind < 0.65:
            disk.flush()
        elif bitmap is None or bitmap.inconsistent or kind < 0.7:
            name = f"new {rnd.random()}"
            disk.bitmaps.add(name, persistent=True)
        elif kind < 0.76:
            bitmap.clear()
        elif kind < 0.85:
            bitmap.merge(*[other for other in disk.bitmaps if not other.inconsistent])
        elif kind < 0.9:
            (bitmap.disable if bitmap.enabled else bitmap.enable)()
        elif kind < 0.93:
            bitmap.remove()
        elif not any(other.inconsistent for other in disk.bitmaps):
            disk.truncate((N_SECTORS + rnd.randrange(64)) * SECTOR, shrink=True)


@pytest.mark.parametrize("failing", [0.0, 0.01], ids=["nothing fails", "writes fail"])
@pytest.mark.parametrize("seed", range(2))
def test_a_bitmap_is_in_use_or_as_it_was_stored(seed: int, failing: float, tmp_path: Path, qemu_img: Program) -> None:
    rnd = random.Random(seed * 3 + (failing > 0))
    start = new_image(N_SECTORS * SECTOR, {"cluster_size": 512, "refcount_bits": 16})
    file = RecordingNode(data=start)
    stored = [Stored({}, bytes(N_SECTORS * SECTOR))]
    ends: list[int] = []

    def fail_now_and_then(offset: int, length: int) -> None:
        if rnd.random() < failing:
            raise StorageError("no", errno=5, operation="pwrite")

    for number in range(6):
        disk = disk_on(file)
        file.before_write = fail_now_and_then
        try:
            session(disk, rnd, first=number == 0)
        except BlocklibError:
            assert failing
        try:
            disk.close()
        except BlocklibError:
            assert failing
        file.before_write = None
        ends.append(len(file.log))
        again = disk_on(file, writable=False)
        stored.append(Stored(states_of(again), again.read(0, again.size)))
        again.close()

    # Where a disk is closed most is at stake.
    cuts = {rnd.randrange(len(file.log) + 1) for _ in range(20)}
    for end in ends:
        cuts |= {max(0, end - rnd.randrange(14)) for _ in range(6)}
    image = tmp_path / "left.qcow2"
    n_consistent = n_in_use = 0
    for site in crash_sites(start, file.log, sorted(cuts)):
        for left in site.outcomes(rnd, 4):
            image.write_bytes(left)
            done = qemu_img.run("check", image)
            assert done.returncode in CLEAN_OR_LEAKS, (site.cut, done.stdout, done.stderr)
            disk = disk_on(RecordingNode(data=left), writable=False)
            content = disk.read(0, disk.size)
            states = states_of(disk)
            n_in_use += len(disk.bitmaps) - len(states)
            disk.close()
            for name, state in states.items():
                n_consistent += 1
                known = [item for item in stored if item.states.get(name) == state]
                assert known, (site.cut, name, "a state that was never stored")
                if state[0]:
                    assert any(item.content == content for item in known), (site.cut, name, "it has missed a write")
    assert n_consistent
    assert n_in_use
