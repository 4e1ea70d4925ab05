"""A host that is full: the write that finds no room fails, and nothing else is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.disk import Disk
from blocklib.errors import StorageError
from blocklib.formats.qcow2.node import Qcow2Node
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image


class SmallHost(RecordingNode):
    """Has room for `room` bytes of file; what was punched counts as free again."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data=data)
        self.room = 1 << 40
        self.before_write = self._refuse
        self.before_discard = self._punched
        self.freed = 0

    def _refuse(self, offset: int, length: int) -> None:
        grown = max(0, offset + length - self.size)
        if grown and offset + length - self.freed > self.room:
            raise StorageError("the host is full", errno=errno.ENOSPC, operation="write")

    def _punched(self, _offset: int, length: int) -> None:
        self.freed += length


def made(**options: Any) -> tuple[SmallHost, Disk, Qcow2Node]:
    host = SmallHost(new_image(64 * MiB, options))
    disk = disk_on(host)
    assert isinstance(disk.node, Qcow2Node)
    return host, disk, disk.node


def assert_sound(host: RecordingNode, places: dict[int, bytes]) -> None:
    with disk_on(RecordingNode(data=bytes(host.data)), writable=False) as disk:
        for place, data in places.items():
            assert disk.read(place, len(data)) == data
        report = disk.node.check()
        assert (report.leaks, report.corruptions, report.check_errors) == (0, 0, 0)


@pytest.mark.parametrize("extra", [0, 4096, 8192])
def test_a_table_that_has_no_room_costs_its_write_and_no_other(extra: int) -> None:
    host, disk, node = made(cluster_size=4096)
    disk.write(0, b"a" * 4096)  # not flushed
    host.room = host.size + extra
    with pytest.raises(StorageError, match="full"):
        disk.write(40 * MiB, b"b" * 12288)
    assert bool(node.mapping.l1[20]) == (extra > 0)  # a table that got its room stays
    disk.close()
    assert_sound(host, {0: b"a" * 4096, 40 * MiB: bytes(12288)})


def test_a_table_has_its_room_before_the_write_returns() -> None:
    host, disk, _node = made(cluster_size=4096)
    for number in range(20):
        disk.write(number * 2 * MiB, b"a" * 4096)
    host.room = host.size
    disk.close()
    assert_sound(host, {number * 2 * MiB: b"a" * 4096 for number in range(20)})


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_every_place_to_run_full_leaves_what_was_written_before(refcount_bits: int) -> None:
    """Small clusters need a table or a block every few writes."""
    for extra in range(0, 12 * 512, 512):
        host, disk, _node = made(cluster_size=512, refcount_bits=refcount_bits)
        disk.write(0, b"a" * (15 * KiB))
        host.room = host.size + extra + 14 * KiB
        written = {0: b"a" * (15 * KiB)}
        place = 32 * KiB
        while True:
            try:
                disk.write(place, b"b" * 2048)
            except StorageError:
                break
            written[place] = b"b" * 2048
            place += 5 * 2048
        disk.close()
        assert_sound(host, written)


@pytest.mark.parametrize("room", [0, 4096, 8192, 16384, 100_000])
def test_runs_that_find_no_room_leave_nothing_behind(room: int) -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"a" * 4096)
    disk.flush()
    host.room = host.size + room
    with pytest.raises(StorageError, match="full"):
        disk.write_runs([(place * MiB, memoryview(b"b" * 65536)) for place in (1, 3, 40)])
    host.room = 1 << 40
    disk.write_runs([(place * MiB, memoryview(b"c" * 65536)) for place in (1, 3, 40)])
    disk.close()
    assert_sound(host, {0: b"a" * 4096, MiB: b"c" * 65536, 40 * MiB: b"c" * 65536})


def test_a_compressed_write_takes_the_place_of_what_was_discarded() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"a" * MiB)
    disk.flush()
    disk.discard(0, MiB)
    host.room = host.size
    noise = os.urandom(2048)
    data = (noise + bytes(2048)) * 32 + os.urandom(65536)
    disk.write_compressed(1 * MiB, data)
    assert host.size <= host.room + host.freed
    disk.close()
    assert_sound(host, {0: bytes(MiB), 1 * MiB: data})


def test_a_full_host_lets_the_image_give_back_what_waits_for_a_flush() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"a" * MiB)
    disk.flush()
    disk.discard(0, MiB)
    host.room = host.size
    disk.write(1 * MiB, b"b" * (256 * KiB))  # finds no room, flushes, and takes the place of what was discarded
    assert host.size <= host.room + host.freed
    assert disk.read(1 * MiB, 256 * KiB) == b"b" * (256 * KiB)
    disk.close()
    assert_sound(host, {0: bytes(MiB), 1 * MiB: b"b" * (256 * KiB)})


def test_room_again_lets_writes_go_on() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"a" * 4096)
    host.room = host.size
    for _ in range(3):
        with pytest.raises(StorageError):
            disk.write(40 * MiB, b"b" * 4096)
    host.room = 1 << 40
    disk.write(40 * MiB, b"b" * 4096)
    disk.close()
    assert_sound(host, {0: b"a" * 4096, 40 * MiB: b"b" * 4096})


def test_a_file_system_that_runs_full(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        path = folder / "image.qcow2"
        blocklib.create(path, 1 << 40, format="qcow2")
        written = []
        with blocklib.open(path, "r+") as disk:
            for number in range(1000):
                try:
                    disk.write(number << 29, os.fsencode(f"{number:4096}"))  # each needs an L2 table of its own
                except StorageError:
                    break
                written.append(number)
        assert len(written) > 30
        assert blocklib.check(path).clean
        with blocklib.open(path) as disk:
            for number in written:
                assert disk.read(number << 29, 4096) == os.fsencode(f"{number:4096}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
