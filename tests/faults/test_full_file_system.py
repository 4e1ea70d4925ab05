"""A file system of 64 MiB filled to the last block, or the last few: who asks for space hears that there is none, and no more.

Needs the right to mount; where there is none, the tests are skipped.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import KiB, MiB, StorageError, nbd
from blocklib.disk import Disk
from tests.faults.campaign import assert_possible
from tests.faults.workloads import noise
from tests.programs import find_program

SIZE: Final = 16 * MiB
BLOCK: Final = 4096


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("small")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, room: int) -> None:
    """Leave so many bytes."""
    free = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bfree * free.f_frsize - room)
    assert os.statvfs(folder).f_bfree * BLOCK == room


@dataclass(frozen=True)
class Want:
    """Something that needs space; `effect` is what it makes of the content."""

    name: str
    ask: Callable[[Disk, Path], object]
    effect: Callable[[bytearray], object] = lambda _content: None
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Disk], object] = lambda _disk: None
    leaves_room: bool = False
    """Perhaps it finds enough to do without, or does nothing that needs space."""


def put(offset: int, data: bytes) -> Callable[[bytearray], object]:
    def effect(content: bytearray) -> None:
        content[offset : offset + len(data)] = data

    return effect


def gain(length: int) -> Callable[[bytearray], object]:
    return lambda content: content.extend(bytes(length))


def over_nbd(disk: Disk, folder: Path) -> None:
    with (
        nbd.Server(disk, listen=f"nbd+unix:///?socket={folder / 's'}") as server,
        blocklib.open(server.uri, "r+", format="raw") as remote,
    ):
        try:
            remote.write(8 * MiB, DATA)
        except StorageError:
            raise
        except blocklib.NbdError as exc:
            raise AssertionError("an error of the host is one of the client's disk") from exc


def convert_to_new(disk: Disk, folder: Path) -> None:
    try:
        blocklib.convert(disk, folder / "new.img", format="raw", options={"preallocation": "full"})
    except StorageError:
        assert not (folder / "new.img").exists()
        raise
    (folder / "new.img").unlink()


def create(_disk: Disk, folder: Path) -> None:
    try:
        blocklib.create(folder / "new.img", SIZE, format="qcow2", options={"preallocation": "full"})
    except StorageError:
        assert not (folder / "new.img").exists()
        raise
    (folder / "new.img").unlink()


def add_bitmap(disk: Disk, _folder: Path) -> None:
    if "b" not in disk.bitmaps:
        disk.bitmaps.add("b", granularity=512, persistent=True)
    disk.write(0, DATA[:100])
    disk.write(5 * MiB, DATA[:100])


DATA: Final = noise(1, 300 * KiB)
SMALL: Final[dict[str, Any]] = {"cluster_size": 4096}
TINY: Final[dict[str, Any]] = {"cluster_size": 512, "refcount_bits": 64}
WANTS: Final = (
    Want("a write", lambda disk, _: disk.write(9 * MiB, DATA), put(9 * MiB, DATA)),
    Want("a write, small clusters", lambda disk, _: disk.write(9 * MiB, DATA), put(9 * MiB, DATA), SMALL),
    Want("a write, tables that grow", lambda disk, _: disk.write(9 * MiB, DATA), put(9 * MiB, DATA), TINY),
    Want(
        "a write, tables that move",
        lambda disk, _: disk.write(9 * MiB, DATA),
        put(9 * MiB, DATA),
        TINY,
        lambda disk: disk.write(3 * MiB, DATA + DATA + DATA[: 240 * KiB]),
    ),
    Want(
        "a write amid a snapshot's data",
        lambda disk, _: disk.write(1000, DATA),
        put(1000, DATA),
        SMALL,
        lambda disk: disk.snapshots.create("s"),
    ),
    Want(
        "a batch",
        lambda disk, _: disk.write_batch(range(8 * MiB, 8 * MiB + 60 * 5000, 5000), DATA[: 60 * 5000]),
        put(8 * MiB, DATA[: 60 * 5000]),
        SMALL,
    ),
    Want("runs", lambda disk, _: disk.write_runs([(8 * MiB, memoryview(DATA))]), put(8 * MiB, DATA), SMALL),
    Want("a compressed write", lambda disk, _: disk.write_compressed(8 * MiB, DATA), put(8 * MiB, DATA), SMALL),
    Want("zeroes", lambda disk, _: disk.write_zeroes(2 * MiB, 12 * MiB), lambda _content: None, TINY, leaves_room=True),
    Want(
        "zeroes amid a snapshot's data",
        lambda disk, _: disk.write_zeroes(0, MiB),
        put(0, bytes(MiB)),
        TINY,
        lambda disk: disk.snapshots.create("s"),
    ),
    Want("a snapshot", lambda disk, _: disk.snapshots.create("s")),
    Want(
        "a bitmap",
        add_bitmap,
        lambda content: (put(0, DATA[:100])(content), put(5 * MiB, DATA[:100])(content)),
        SMALL,
        leaves_room=True,  # it is stored when the disk is closed
    ),
    Want("other counts", lambda disk, _: blocklib.amend(disk, {"refcount_bits": 64}), options=SMALL),
    Want(
        "version 2",
        lambda disk, _: blocklib.amend(disk, {"compat": "0.10"}),
        options=SMALL,
        prepare=lambda disk: disk.write_zeroes(0, 64 * KiB),
        leaves_room=True,
    ),
    Want("preallocation", lambda disk, _: disk.truncate(2 * SIZE, preallocation="full"), gain(SIZE)),
    Want("preallocated by the host", lambda disk, _: disk.truncate(2 * SIZE, preallocation="falloc"), gain(SIZE)),
    Want("an image", create),
    Want("a conversion", convert_to_new),
    Want("a client's write", over_nbd, put(8 * MiB, DATA)),
)


def assert_sound(path: Path) -> None:
    with blocklib.open(path, "r+", cache="unsafe"):
        pass  # a dirty image is repaired
    report = blocklib.check(path)
    assert (report.corruptions, report.check_errors) == (0, 0), list(report.findings)
    qemu_img = find_program("qemu-img")
    if qemu_img is not None:
        done = subprocess.run([qemu_img, "check", "-q", path], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 3), done.stdout + done.stderr


@pytest.mark.parametrize("room", [0, *(pytest.param(n * BLOCK, marks=pytest.mark.torture) for n in (1, 2, 3, 5, 10, 30))])
@pytest.mark.parametrize("want", WANTS, ids=lambda want: want.name)
def test_who_finds_no_room_hears_of_it_and_goes_on_when_there_is_some(small: Path, want: Want, room: int) -> None:
    folder = small / "work"
    folder.mkdir()
    path = folder / "image"
    disk = None
    try:
        blocklib.create(path, SIZE, format="qcow2", options=want.options)
        with blocklib.open(path, "r+") as made:
            made.write(0, noise(2, MiB))
            want.prepare(made)
            before = made.read(0, made.size)
        disk = blocklib.open(path, "r+")
        disk.write(15 * MiB, b"written before")
        written = bytearray(before)
        put(15 * MiB, b"written before")(written)
        after = bytearray(written)
        want.effect(after)
        fill(folder, room)
        _ask(want, disk, folder, must_fail=room == 0 and not want.leaves_room)
        assert_possible(disk.read(0, disk.size), [bytes(written), bytes(after)])
        disk.flush()  # what needs no room is not held up
        (folder / "filler").unlink()
        want.ask(disk, folder)
        assert disk.read(0, disk.size) == after
        disk.close()
        assert_sound(path)
        with blocklib.open(path) as again:
            assert again.read(0, again.size) == after
    finally:
        if disk is not None:
            disk.abandon()
        shutil.rmtree(folder)


def _ask(want: Want, disk: Disk, folder: Path, *, must_fail: bool) -> None:
    try:
        want.ask(disk, folder)
    except StorageError as exc:
        failure = exc
    else:
        assert not must_fail
        return
    assert failure.errno == errno.ENOSPC, failure
    assert "No space left" in str(failure)
    assert failure.node
