"""Our NBD server against the programs that people use: libnbd's, QEMU's, fio."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, nbd
from blocklib.disk import Disk
from tests.programs import Program, find_program

SIZE = 8 * MiB


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@contextmanager
def serving(disk: Disk, path: Path, **arguments: Any) -> Iterator[str]:
    with nbd.Server(disk, listen=f"nbd+unix:///?socket={path}", **arguments) as server:
        yield server.uri


@pytest.fixture
def content() -> bytes:
    """Data, zeroes and holes in pieces of many sizes."""
    rng = random.Random(5)
    data = bytearray(SIZE)
    for _ in range(12):
        start = rng.randrange(SIZE // 512) * 512
        n = min(rng.choice((512, 4096, 70_000, 512 * KiB)), SIZE - start)
        data[start : start + n] = rng.randbytes(n)
    return bytes(data)


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path, content: bytes) -> tuple[Path, str]:
    path = tmp_path / "disk"
    blocklib.create(path, SIZE, format=request.param)
    with blocklib.open(path, "r+", format=request.param) as disk:
        for start in range(0, SIZE, 64 * KiB):
            part = content[start : start + 64 * KiB]
            if any(part):
                disk.write(start, part)
    return path, request.param


def test_nbdinfo_tells_of_our_export_what_it_tells_of_qemus(
    image: tuple[Path, str], socket_path: Path, nbdinfo: Program, qemu_nbd: Program
) -> None:
    path, image_format = image
    for options, arguments in (([], {}), (["-r"], {"read_only": True}), (["-A"], {"allocation_depth": True})):
        told = json.loads(nbdinfo("--json", "--", "[", qemu_nbd.path, "-f", image_format, "-e", 4, *options, path, "]"))
        with blocklib.open(path, "r+", format=image_format) as disk, serving(disk, socket_path, **arguments) as uri:
            ours = json.loads(nbdinfo("--json", uri))
        for both in (told, ours):
            both["exports"][0].pop("uri", None)
        assert ours == told


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth"])
def test_our_extents_are_qemus(
    image: tuple[Path, str], socket_path: Path, nbdinfo: Program, qemu_nbd: Program, context: str
) -> None:
    path, image_format = image
    map_option = f"--map={context}"
    theirs = nbdinfo("--json", map_option, "--", "[", qemu_nbd.path, "-f", image_format, "-r", "-A", path, "]")
    with blocklib.open(path, format=image_format) as disk, serving(disk, socket_path, allocation_depth=True) as uri:
        assert json.loads(nbdinfo("--json", map_option, uri)) == json.loads(theirs)


@pytest.mark.parametrize("options", [[], ["--no-extents"], ["--connections=1"], ["--request-size=32768", "--requests=5"]])
def test_nbdcopy_reads_the_disk(
    image: tuple[Path, str], socket_path: Path, tmp_path: Path, nbdcopy: Program, content: bytes, options: list[str]
) -> None:
    path, image_format = image
    with blocklib.open(path, format=image_format) as disk, serving(disk, socket_path) as uri:
        nbdcopy(*options, uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize("options", [[], ["--connections=1"], ["--destination-is-zero", "--flush"], ["--request-size=4096"]])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_nbdcopy_writes_the_disk(
    socket_path: Path, tmp_path: Path, nbdcopy: Program, content: bytes, options: list[str], image_format: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    blocklib.create(tmp_path / "new", SIZE, format=image_format)
    with blocklib.open(tmp_path / "new", "r+", format=image_format) as disk:
        with serving(disk, socket_path) as uri:
            nbdcopy(*options, source, uri)
        assert disk.read(0, SIZE) == content


def test_qemu_img_reads_writes_and_compares_over_our_server(
    image: tuple[Path, str], socket_path: Path, tmp_path: Path, qemu_img: Program, content: bytes
) -> None:
    path, image_format = image
    with blocklib.open(path, "r+", format=image_format) as disk, serving(disk, socket_path) as uri:
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
        qemu_img("compare", "-f", "raw", "-F", "raw", uri, tmp_path / "copy")
        (tmp_path / "copy").write_bytes(content[::-1])
        qemu_img("convert", "-n", "-W", "-m", 8, "-f", "raw", "-O", "raw", tmp_path / "copy", uri)
        assert disk.read(0, SIZE) == content[::-1]


def test_qemu_io_finds_every_command_working(socket_path: Path, tmp_path: Path, qemu_io: Program) -> None:
    blocklib.create(tmp_path / "disk", SIZE, format="qcow2")
    with blocklib.open(tmp_path / "disk", "r+", format="qcow2", discard="unmap") as disk, serving(disk, socket_path) as uri:
        commands = (
            "write -P 1 0 1M",
            "write -P 2 -f 1000 77",
            "write -z 512k 64k",
            "write -z -u 576k 64k",
            "discard 768k 64k",
            "flush",
            "read -P 1 0 1000",
            "read -P 2 1000 77",
            "read -P 0 512k 128k",
            "read -P 0 768k 64k",
            "aio_write -P 3 2M 1M",
            "aio_flush",
            "aio_read -P 3 2M 1M",
            "aio_flush",
        )
        printed = qemu_io("-f", "raw", uri, *(word for command in commands for word in ("-c", command)))
        assert "fail" not in printed.lower()
        assert disk.read(1000, 77) == b"\2" * 77


@pytest.mark.requires("fio")
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_fio_finds_what_it_wrote_over_four_connections(socket_path: Path, tmp_path: Path, image_format: str) -> None:
    blocklib.create(tmp_path / "disk", 32 * MiB, format=image_format)
    path = find_program("fio")
    assert path is not None
    with blocklib.open(tmp_path / "disk", "r+", format=image_format) as disk, serving(disk, socket_path) as uri:
        Program(path)(
            *("--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16"),
            *("--numjobs=4", "--thread", "--size=8M", "--offset_increment=8M", "--verify=crc32c", "--verify_fatal=1"),
            cwd=tmp_path,
        )
