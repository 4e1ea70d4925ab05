"""The images that the examples of the API are about, made as small as they can be: files are sparse, sizes are real."""

from __future__ import annotations

import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import blocklib
from blocklib import GiB, KiB, MiB

ROOT = Path(__file__).parent.parent.parent

PATTERN = bytes(range(1, 129)) * 32
"""4 KiB without a zero byte."""


def make_disk(name: str | os.PathLike[str] = "disk.qcow2", size: int = 10 * GiB) -> None:
    """A qcow2 image with PATTERN at 0 and at 1 MiB."""
    blocklib.create(name, size, format="qcow2")
    with blocklib.open(name, "r+", format="qcow2") as disk:
        disk.write(0, PATTERN)
        disk.write(1 * MiB, PATTERN)


def make_raw(name: str | os.PathLike[str], size: int, fill: bytes = b"") -> None:
    """A sparse file that begins with `fill`."""
    with Path(name).open("wb") as file:
        file.write(fill)
        file.truncate(size)


def make_chain(size: int = 10 * GiB) -> None:
    """top.qcow2 -> base.qcow2 -> golden.img in the current folder.

    golden.img holds b"g" in its first MiB, base.qcow2 b"b" in the 64 KiB at 64 KiB, top.qcow2 b"t" in those at 128 KiB.
    """
    make_raw("golden.img", size, b"g" * MiB)
    blocklib.create("base.qcow2", format="qcow2", backing="golden.img", backing_format="raw")
    blocklib.create("top.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2")
    for name, offset, fill in (("base.qcow2", 64 * KiB, b"b"), ("top.qcow2", 128 * KiB, b"t")):
        with blocklib.open(name, "r+", format="qcow2", references="allow") as disk:
            disk.write(offset, fill * (64 * KiB))


def patch(name: str | os.PathLike[str], host_offset: int, data: bytes) -> None:
    """Change bytes of a file behind everybody's back."""
    with Path(name).open("r+b") as file:
        file.seek(host_offset)
        file.write(data)


def set_incompatible(name: str | os.PathLike[str], bits: int) -> None:
    """Set the incompatible feature bits of a qcow2 header (bytes 72 to 79)."""
    patch(name, 72, struct.pack(">Q", bits))


def in_child(function: Callable[[], object]) -> str:
    """What `function` gives in the child of a fork: the repr of its result, or the name of what it raises."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)  # a deadlock fails the test, rather than the run
            try:
                text = repr(function())
            except Exception as exc:
                text = type(exc).__name__
            os.write(write_end, text.encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read().decode()
    _pid, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return answer
