"""Writers with lazy refcounts that are killed: each program repairs what the other has left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB
from tests.programs import TIMEOUT, Program

ROOT = Path(__file__).parents[2]

WRITER = """
import os, signal, sys
import blocklib
disk = blocklib.open(sys.argv[1], "r+", format="qcow2")
for number in range(8):
    disk.write(number * 3 << 20, bytes((number + 1,)) * (1 << 20))
disk.flush()
disk.write(30 << 20, b"x")  # a refcount table that had to grow was not postponed
disk.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _make(path: Path, cluster_size: str, qemu_img: Program) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"lazy_refcounts=on,cluster_size={cluster_size}", path, "64M")
    return path


def _is_dirty(path: Path, qemu_img: Program) -> bool:
    by_qemu = qemu_img.json("info", path)["dirty-flag"]
    assert blocklib.info(path).dirty == by_qemu
    return bool(by_qemu)


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k"])
def test_what_a_killed_qemu_leaves_is_repaired_when_it_is_opened(
    cluster_size: str, tmp_path: Path, qemu_img: Program, qemu_io: Program
) -> None:
    path = _make(tmp_path / "image.qcow2", cluster_size, qemu_img)
    writes = [part for n in range(8) for part in ("-c", f"write -P {n + 1} {n * 3}M 1M")]
    assert qemu_io.run(*writes, "-c", "flush", "-c", "sigraise 9", path).returncode == -signal.SIGKILL
    assert _is_dirty(path, qemu_img)
    left = path.read_bytes()
    with blocklib.open(path) as disk:
        assert disk.read(21 * MiB, MiB) == b"\x08" * MiB
    assert path.read_bytes() == left
    with blocklib.open(path, "r+") as disk:
        for number in range(8):
            assert disk.read(number * 3 * MiB, MiB) == bytes((number + 1,)) * MiB
        disk.write(40 * MiB, b"\x20" * (200 * KiB))
    assert not _is_dirty(path, qemu_img)
    qemu_img("check", "-q", path)
    qemu_io("-c", "read -P 8 21M 1M", "-c", "read -P 32 40M 200k", path)


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k"])
@pytest.mark.parametrize("repairs", ["check", "open"])
def test_what_we_leave_when_we_are_killed_qemu_repairs(
    repairs: str, cluster_size: str, tmp_path: Path, qemu_img: Program, qemu_io: Program
) -> None:
    path = _make(tmp_path / "image.qcow2", cluster_size, qemu_img)
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert _is_dirty(path, qemu_img)
    if repairs == "check":
        qemu_img("check", "-q", "-r", "all", path)
    else:
        qemu_io("-c", "read 0 512", path)
    assert not _is_dirty(path, qemu_img)
    qemu_img("check", "-q", path)
    reads = [part for n in range(8) for part in ("-c", f"read -P {n + 1} {n * 3}M 1M")]
    assert "failed" not in qemu_io(*reads, path)
    with blocklib.open(path) as disk:
        assert disk.read(21 * MiB, MiB) == b"\x08" * MiB


def test_a_clean_close_leaves_a_clean_image(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    path = _make(tmp_path / "image.qcow2", "4k", qemu_img)
    with blocklib.open(path, "r+", discard="unmap") as disk:
        disk.write(0, b"\x01" * MiB)
        disk.flush()
        assert blocklib.info(path, force_share=True).dirty
        disk.discard(0, 300 * KiB)
        disk.truncate(128 * MiB)
        disk.write(100 * MiB, b"\x02" * MiB)
    assert not _is_dirty(path, qemu_img)
    qemu_img("check", "-q", path)
    qemu_io("-c", "read -P 2 100M 1M", "-c", "read -P 0 0 300k", path)
