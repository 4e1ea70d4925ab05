"""What each cache mode promises: after the end of the program, and after a power cut that loses what no flush has covered."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.disk import Disk
from blocklib.filters import dm_log_writes

BASE: Final = b"\x77" * (256 * KiB)
WRITES: Final = [(0, b"a" * 512), (100 * KiB, b"b" * 70_000), (3 * MiB, b"c" * 4096), (100 * KiB + 5, b"d" * 10)]
NOT_UNSAFE: Final = ("writeback", "none", "writethrough", "directsync")
EACH_WRITE: Final = ("writethrough", "directsync")


class Machine:
    """An overlay in a folder, the log of what reached its file, and what would be left of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "disk.qcow2"
        (folder / "base.raw").write_bytes(BASE)
        blocklib.create(self.image, 4 * MiB, format="qcow2", backing="base.raw", backing_format="raw")
        self.before = self.image.read_bytes()
        self.log = folder / "log"
        self.log.touch()

    def open(self, cache: Any) -> Disk:
        file = {"driver": "file", "filename": str(self.image)}
        log: dict[str, Any] = {"driver": "file", "filename": str(self.log), "cache": {"direct": False}}
        below: dict[str, Any] = {"driver": "blklogwrites", "file": file, "log": log}
        return blocklib.open({"driver": "qcow2", "file": below}, "r+", cache=cache, references="allow")

    def after_the_end_of_the_program(self) -> bytes:
        """The disk, as who opens it next reads it while nothing in our memory has been written."""
        return self._content(self.image.read_bytes())

    def after_a_power_cut(self) -> bytes:
        """The disk, where of all that came after the last flush nothing is left."""
        log = self.log.read_bytes()
        image = bytearray(self.before)
        pending: list[tuple[int, bytes]] = []
        for entry in dm_log_writes.entries(lambda offset, length: log[offset : offset + length], len(log)):
            if entry.is_write:
                pending.append((entry.offset, log[entry.data_position :][: entry.length]))
            elif entry.flags & dm_log_writes.FLUSH:
                for offset, data in pending:
                    image.extend(bytes(max(0, offset + len(data) - len(image))))
                    image[offset : offset + len(data)] = data
                pending.clear()
        return self._content(bytes(image))

    def _content(self, image: bytes) -> bytes:
        path = self.folder / "left.qcow2"
        path.write_bytes(image)
        assert not blocklib.check(path, format="qcow2").corruptions
        with blocklib.open(path, format="qcow2", references="allow") as disk:
            return disk.read(0, disk.size)


def content_after(writes: int) -> bytes:
    content = bytearray(BASE.ljust(4 * MiB, b"\0"))
    for offset, data in WRITES[:writes]:
        content[offset : offset + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("cache", NOT_UNSAFE)
def test_a_flush_makes_everything_before_it_survive_a_power_cut(cache: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.open(cache) as disk:
        for number, (offset, data) in enumerate(WRITES, 1):
            disk.write(offset, data)
            if number % 2 == 0:
                disk.flush()
                assert machine.after_a_power_cut() == content_after(number)


@pytest.mark.parametrize("cache", EACH_WRITE)
def test_each_write_survives_a_power_cut_when_it_has_returned(cache: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.open(cache) as disk:
        for number, (offset, data) in enumerate(WRITES, 1):
            disk.write(offset, data)
            assert machine.after_a_power_cut() == content_after(number)
        disk.write_zeroes(0, 512)
        assert machine.after_a_power_cut()[:512] == bytes(512)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_write_with_fua_survives_a_power_cut_and_what_was_not_flushed_does_not(cache: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.open(cache) as disk:
        disk.write(*WRITES[0], fua=True)
        assert machine.after_a_power_cut() == content_after(1)
        disk.write(*WRITES[1])
        assert machine.after_a_power_cut() == content_after(1)


@pytest.mark.parametrize("cache", [*NOT_UNSAFE, "unsafe"])
def test_what_was_flushed_survives_the_end_of_the_program_in_every_mode(cache: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.open(cache) as disk:
        for number, (offset, data) in enumerate(WRITES, 1):
            disk.write(offset, data)
            if cache not in EACH_WRITE:
                disk.flush()
            assert machine.after_the_end_of_the_program() == content_after(number)


@pytest.mark.parametrize("cache", [*NOT_UNSAFE, "unsafe"])
def test_a_raw_image_keeps_each_write_through_the_end_of_the_program(cache: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    blocklib.create(path, 4 * MiB, format="raw")
    with blocklib.open(path, "r+", format="raw", cache=cache) as disk:
        for offset, data in WRITES:
            disk.write(offset, data)
            assert path.read_bytes()[offset : offset + len(data)] == data


@pytest.mark.parametrize("cache", NOT_UNSAFE)
def test_a_closed_disk_survives_a_power_cut(cache: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.open(cache) as disk:
        for write in WRITES:
            disk.write(*write)
    assert machine.after_a_power_cut() == content_after(len(WRITES))
