"""A write that fails anywhere in a snapshot's creation, return or deletion leaves the state before or after it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from blocklib.disk import Disk
from blocklib.errors import StorageError
from tests.crash.recording import SECTOR, RecordingNode
from tests.crash.workload import disk_on, new_image

SECTORS = 400
N_OUTCOMES = 4

State = tuple[bytes, Mapping[str, bytes]]
"""What the disk holds, and each snapshot."""


def scribble(disk: Disk, seed: int) -> None:
    rnd = random.Random(seed)
    for number in range(12):
        first = rnd.randrange(SECTORS)
        n = min(rnd.choice((1, 5, 40)), SECTORS - first)
        if number % 4 == 3:
            disk.discard(first * SECTOR, n * SECTOR)
        else:
            disk.write(first * SECTOR, rnd.randbytes(n * SECTOR))


def prepared(options: dict[str, int | str]) -> bytes:
    """An image with two snapshots whose clusters are shared in all ways, closed."""
    host = RecordingNode(data=new_image(SECTORS * SECTOR, options))
    with disk_on(host) as disk:
        scribble(disk, 1)
        disk.snapshots.create("one")
        scribble(disk, 2)
        disk.snapshots.create("two")
        if options.get("compat") != "0.10":
            disk.truncate((SECTORS + 30) * SECTOR)
        scribble(disk, 3)
    return bytes(host.data)


def state_of(image: bytes) -> State:
    """Read by a second look at the file, not by the disk that changed it."""
    with disk_on(RecordingNode(data=image), writable=False) as disk:
        names = [snapshot.name for snapshot in disk.snapshots]
        content = disk.read(0, disk.size)
    return content, {name: snapshot_of(image, name) for name in names}


def snapshot_of(image: bytes, name: str) -> bytes:
    with disk_on(RecordingNode(data=image), writable=False, options={"snapshot.name": name}) as disk:
        return disk.read(0, disk.size)


CHANGES: dict[str, Callable[[Disk], object]] = {
    "create": lambda disk: disk.snapshots.create("three"),
    "apply the first": lambda disk: disk.snapshots["one"].apply(),
    "apply the last": lambda disk: disk.snapshots["two"].apply(),
    "delete the first": lambda disk: disk.snapshots["one"].delete(),
    "delete the last": lambda disk: disk.snapshots["two"].delete(),
}
IMAGES: dict[str, dict[str, int | str]] = {
    "version 3": {"cluster_size": 1024},
    "version 3, small clusters": {"cluster_size": 512, "refcount_bits": 64},
    "version 2": {"cluster_size": 512, "compat": "0.10"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES.keys())
def test_a_write_that_fails_leaves_the_state_before_or_after(
    options: dict[str, int | str], change: Callable[[Disk], object]
) -> None:
    start = prepared(options)
    before = state_of(start)
    whole = RecordingNode(data=start)
    with disk_on(whole) as disk:
        change(disk)
    after = state_of(bytes(whole.data))
    good = 0
    while True:
        host = RecordingNode(data=start)
        disk = disk_on(host)
        calls = iter(range(good))

        def fail(_offset: int, _length: int, calls: object = calls) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise StorageError("the host does not want to", errno=28, operation="injected")

        host.before_write = fail
        try:
            change(disk)
        except StorageError:
            host.before_write = None
            if disk.node.poisoned is None:  # nothing was changed: it goes on
                assert disk.read(0, disk.size) == before[0]
                scribble(disk, 5)
                disk.close()
                assert state_of(bytes(host.data))[1] == before[1]
            else:
                disk.abandon()
                disk_on(host).close()
                assert state_of(bytes(host.data)) in (before, after)
            good += 1
            continue
        host.before_write = None
        disk.close()
        break
    assert good > 3
