"""Workload: bitmaps are kept in an image.  Whatever a crash leaves, a bitmap is in use, or it is one that was stored beside
exactly the content that is there."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocklib.disk import Disk
from blocklib.errors import BlocklibError, StorageError
from tests.crash.host import Host
from tests.crash.look import Look
from tests.crash.recording import SECTOR, Drive
from tests.crash.workload import disk_on, new_image

N_SECTORS = 3000
NAMES = ["on", "off", "x" * 700, "y" * 900]
"""Long ones, so that the directory is longer than a sector."""
N_SESSIONS = 6

State = tuple[bool, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Stored:
    """What was true when the image had been closed."""

    states: Mapping[str, State]
    content: bytes


@dataclass(frozen=True)
class BitmapJudge:
    """What a crash may leave of an image with bitmaps."""

    stored: Sequence[Stored]

    def __call__(self, left: Mapping[str, bytes], cut: int, look: Look) -> None:
        file = Drive(data=left["image"])
        look.check(file)
        self._read(file, look.where)
        if look.thorough:
            with disk_on(file) as disk:
                disk.write(0, b"more" * 1000)
            look.check(file, why=", used further")
            with disk_on(file) as disk:
                for bitmap in list(disk.bitmaps):
                    bitmap.remove()
            look.check(file, why=", bitmaps removed")

    def _read(self, file: Drive, where: str) -> None:
        with disk_on(file, writable=False) as disk:
            content = disk.read(0, disk.size)
            states = states_of(disk)
        for name, state in states.items():
            known = [item for item in self.stored if item.states.get(name) == state]
            assert known, f"{where}: the bitmap {name[:20]} is as it never was when it was stored"
            if state[0]:
                assert any(item.content == content for item in known), f"{where}: the bitmap {name[:20]} has missed a write"


@dataclass(frozen=True)
class Bitmaps:
    """Bitmaps are made, changed, removed and stored, beside writes; the image is closed and opened again."""

    failing_writes: float = 0.0
    repeats = True

    def run(self, seed: str) -> tuple[Host, BitmapJudge]:
        rnd = random.Random(f"{seed}/bitmaps")
        host = Host()
        file = host.add("image", new_image(N_SECTORS * SECTOR, {"cluster_size": 512, "refcount_bits": 16}))
        stored = [Stored({}, bytes(N_SECTORS * SECTOR))]

        def fail_now_and_then(_offset: int, _length: int) -> None:
            if rnd.random() < self.failing_writes:
                raise StorageError("no", errno=5, operation="injected")

        for number in range(N_SESSIONS):
            disk = disk_on(file.opened())
            file.drive.before_write = fail_now_and_then
            try:
                session(disk, rnd, first=number == 0)
            except BlocklibError:
                if not self.failing_writes:
                    raise
            try:
                disk.close()
            except BlocklibError:
                if not self.failing_writes:
                    raise
            file.drive.before_write = None
            with disk_on(Drive(data=bytes(file.drive.data)), writable=False) as again:
                stored.append(Stored(states_of(again), again.read(0, again.size)))
        return host, BitmapJudge(stored)


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
            disk.bitmaps.add(f"new {rnd.random()}", persistent=True)
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
