"""`disk.as_file()`: a disk, or a window of it, as the file that archives and parsers want."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB
from tests.api.images import PATTERN, make_raw
from tests.programs import find_program

SIZE = 4 * MiB


@pytest.fixture
def disk() -> blocklib.Disk:
    """A raw disk of SIZE bytes of noise, open for writing; closed by the test's `with`."""
    Path("disk.img").write_bytes(random.Random(1).randbytes(SIZE))
    return blocklib.open("disk.img", "r+", format="raw")


def test_it_is_a_raw_binary_file(disk: blocklib.Disk) -> None:
    with disk:
        file = disk.as_file()
        assert isinstance(file, io.RawIOBase)
        assert isinstance(file, blocklib.DiskFile)
        assert (file.readable(), file.writable(), file.seekable(), file.closed) == (True, True, True, False)
        assert file.read() == Path("disk.img").read_bytes()
        assert file.read(1) == b""
        assert file.tell() == SIZE
        with pytest.raises(OSError):  # there is no descriptor to go behind our back with
            file.fileno()


def test_positions_are_those_of_the_window(disk: blocklib.Disk) -> None:
    with disk:
        file = disk.as_file(offset=1 * MiB, length=64 * KiB)
        assert file.tell() == 0
        assert file.read(16) == disk.read(1 * MiB, 16)
        assert file.seek(-16, io.SEEK_END) == 64 * KiB - 16
        assert file.read(100) == disk.read(1 * MiB + 64 * KiB - 16, 16)
        assert file.seek(-32, io.SEEK_CUR) == 64 * KiB - 32
        assert file.seek(1 << 40) == 1 << 40
        assert file.read(1) == b""
        for offset, whence in ((-1, io.SEEK_SET), (-(64 * KiB) - 1, io.SEEK_END), (0, 7)):
            with pytest.raises(ValueError):
                file.seek(offset, whence)


def test_two_files_of_one_disk_have_a_position_each(disk: blocklib.Disk) -> None:
    with disk:
        one, two = disk.as_file(), disk.as_file()
        one.seek(100)
        assert (one.read(4), two.read(4)) == (disk.read(100, 4), disk.read(0, 4))


@pytest.mark.parametrize(("offset", "length"), [(-1, None), (SIZE + 1, None), (0, SIZE + 1), (SIZE - 1, 2), (0, -1)])
def test_a_window_outside_the_disk_is_refused(disk: blocklib.Disk, offset: int, length: int | None) -> None:
    with disk:
        with pytest.raises(blocklib.OutOfRangeError):
            disk.as_file(offset, length)


def test_writing_past_the_end_raises_and_writes_nothing(disk: blocklib.Disk) -> None:
    with disk:
        file = disk.as_file(offset=1 * MiB, length=1024)
        assert file.write(PATTERN[:1000]) == 1000
        with pytest.raises(blocklib.OutOfRangeError, match="cannot grow"):
            file.write(bytes(25))
        assert file.tell() == 1000
        assert file.write(bytes(24)) == 24
        assert disk.read(1 * MiB, 1024) == PATTERN[:1000] + bytes(24)
        assert disk.read(1 * MiB + 1024, 512) == Path("disk.img").read_bytes()[1 * MiB + 1024 :][:512]
        with pytest.raises(io.UnsupportedOperation):
            file.truncate(10)


def test_an_archive_that_does_not_fit_fails_instead_of_losing_its_end() -> None:
    make_raw("small.img", 16 * KiB)
    Path("member").write_bytes(bytes(20 * KiB))
    with blocklib.open("small.img", "r+", format="raw") as disk:
        with pytest.raises(blocklib.OutOfRangeError):
            with tarfile.open(fileobj=disk.as_file(), mode="w") as archive:
                archive.add("member")


def test_a_disk_that_is_read_gives_a_file_that_is_read() -> None:
    make_raw("disk.img", 4096)
    with blocklib.open("disk.img", format="raw") as disk:
        file = disk.as_file()
        assert not file.writable()
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
        with pytest.raises(OSError):
            io.BufferedWriter(file)


def test_closing_the_file_leaves_the_disk_open(disk: blocklib.Disk) -> None:
    with disk:
        with disk.as_file() as file:
            file.read(1)
        assert file.closed
        with pytest.raises(ValueError):
            file.seek(0)
        with pytest.raises(ValueError):
            file.tell()
        with pytest.raises(ValueError):
            file.write(b"")
        disk.read(0, 1)


def test_io_buffers_it_in_both_directions(disk: blocklib.Disk) -> None:
    model = bytearray(Path("disk.img").read_bytes()[64 * KiB : 192 * KiB])
    rng = random.Random(2)
    with disk:
        file = io.BufferedRandom(disk.as_file(64 * KiB, 128 * KiB), buffer_size=3000)
        for _ in range(200):
            position = rng.randrange(len(model))
            data = rng.randbytes(rng.randrange(min(5000, len(model) - position) + 1))
            file.seek(position)
            if rng.random() < 0.5:
                assert file.read(len(data)) == model[position : position + len(data)]
            else:
                file.write(data)
                model[position : position + len(data)] = data
        file.flush()
        assert disk.read(64 * KiB, 128 * KiB) == model
        reader = io.BufferedReader(disk.as_file(64 * KiB, 128 * KiB), buffer_size=1 * MiB)
        assert reader.peek(1)
        assert reader.read() == model
        text = io.TextIOWrapper(io.BufferedReader(disk.as_file(64 * KiB, 16)), encoding="latin-1", newline="")
        assert text.read() == model[:16].decode("latin-1")


def test_shutil_copies_it(disk: blocklib.Disk) -> None:
    with disk, Path("copy.img").open("wb") as target:
        shutil.copyfileobj(disk.as_file(), target)
    assert Path("copy.img").read_bytes() == Path("disk.img").read_bytes()


def _make_tree(root: Path) -> dict[str, bytes]:
    files = {"a.txt": b"hello", "sub/b.bin": random.Random(3).randbytes(200_000), "sub/empty": b""}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return files


@pytest.mark.parametrize("mode", ["w", "w:gz", "w|"])
def test_a_tar_archive_goes_in_and_comes_out(folder: Path, mode: str) -> None:
    files = _make_tree(folder / "tree")
    blocklib.create("disk.qcow2", 8 * MiB, format="qcow2")
    with blocklib.open("disk.qcow2", "r+") as disk:
        with tarfile.open(fileobj=disk.as_file(), mode=mode) as archive:  # type: ignore[call-overload]
            archive.add("tree")
    with blocklib.open("disk.qcow2") as disk:
        with tarfile.open(fileobj=disk.as_file()) as archive:
            archive.extractall("out", filter="data")
            member = archive.getmember("tree/sub/b.bin")
        if mode == "w":
            assert disk.read(member.offset_data, member.size) == files["sub/b.bin"]
    assert {name: (folder / "out" / "tree" / name).read_bytes() for name in files} == files


def test_a_zip_archive_goes_in_and_comes_out_of_a_window(folder: Path) -> None:
    files = _make_tree(folder / "tree")
    blocklib.create("disk.qcow2", 8 * MiB, format="qcow2")
    with blocklib.open("disk.qcow2", "r+") as disk:
        file = disk.as_file(offset=1 * MiB)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in files:
                archive.write(f"tree/{name}", name)
        length = file.tell()
    with blocklib.open("disk.qcow2") as disk:
        with zipfile.ZipFile(disk.as_file(offset=1 * MiB, length=length)) as archive:
            assert archive.testzip() is None
            assert {name: archive.read(name) for name in archive.namelist()} == files


def test_a_zip_archive_as_a_disk_is_read_in_place() -> None:
    with zipfile.ZipFile("disk.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with blocklib.open("disk.zip", format="raw") as disk:
        assert disk.size % 512 == 0  # the last sector is filled up with zeroes
        with zipfile.ZipFile(disk.as_file()) as archive:
            assert archive.read("a.txt") == b"hello"
        exact = Path("disk.zip").stat().st_size
        with zipfile.ZipFile(disk.as_file(0, exact)) as archive:
            assert archive.read("a.txt") == b"hello"


@pytest.mark.requires("mkfs.ext4")
def test_a_file_system_in_a_partition_is_found_by_its_magic() -> None:
    make_raw("part.img", 8 * MiB)
    mkfs = find_program("mkfs.ext4")
    assert mkfs is not None
    subprocess.run([mkfs, "-q", "-F", "part.img"], check=True, stdin=subprocess.DEVNULL)
    blocklib.create("vm.qcow2", 16 * MiB, format="qcow2")
    with blocklib.open("vm.qcow2", "r+") as disk, Path("part.img").open("rb") as source:
        shutil.copyfileobj(source, disk.as_file(offset=1 * MiB, length=8 * MiB))
    with blocklib.open("vm.qcow2") as disk:
        part = io.BufferedReader(disk.as_file(offset=1 * MiB, length=8 * MiB), buffer_size=1 * MiB)
        part.seek(0x438)
        assert part.read(2) == b"\x53\xef"
        part.seek(0)
        assert part.read() == Path("part.img").read_bytes()
