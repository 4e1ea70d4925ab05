"""The images that the tests of `info`, `map`, `measure` and others look at with both programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.programs import Program

SIZE = "8M"

QCOW2_OPTIONS = (
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "compression_type=zstd",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "compat=0.10,cluster_size=1k,preallocation=metadata",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k,preallocation=metadata",
)
"""What the new images are created with."""


def write_data(qemu_io: Program, name: str, *, zero_clusters: bool = True, compressed: bool = True) -> None:
    """Data at odd places, a discarded range, zeroed ones and compressed clusters."""
    commands = ["write -P 1 0 64k", "write -P 2 1000000 5000", "write -P 3 3M 512k", "discard 3200k 64k"]
    if zero_clusters:
        commands += ["write -z 5M 256k", "write -z -u 6M 64k"]
    qemu_io("-f", "qcow2", *(word for command in commands for word in ("-c", command)), name)
    if compressed:
        qemu_io("-f", "qcow2", "-c", "write -c -P 4 4M 2M", name)


def chain(qemu_img: Program, qemu_io: Program) -> None:
    """In the current folder `top.qcow2` -> `middle.qcow2` (longer) -> `base.raw` (shorter, sparse)."""
    qemu_img("create", "-q", "-f", "raw", "base.raw", "5M")
    qemu_io("-f", "raw", "-c", "write -P 9 0 100k", "-c", "write -P 8 4M 4k", "base.raw")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2", "10M")
    qemu_io("-f", "qcow2", "-c", "write -P 7 64k 64k", "-c", "write -z 1M 1M", "-c", "write -P 6 9M 64k", "middle.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "8M")
    qemu_io("-f", "qcow2", "-c", "write -P 5 128k 64k", "-c", "write -z 4M 64k", "-c", "write -P 4 7M 1000", "top.qcow2")


def sparse_raw(name: str = "sparse.raw") -> None:
    """A raw file with data, holes and a length that is no multiple of a block."""
    with Path(name).open("wb") as file:
        for offset, text in ((0, b"a" * 4096), (1 << 20, b"b" * 70_000), (3 << 20, b"c")):
            file.seek(offset)
            file.write(text)
        file.truncate((4 << 20) + 512 * 3)


Maker = Callable[[Program, Program], str]
"""Makes images in the current folder and returns the name of the one to look at."""


def _created(options: str, *, written: bool) -> Maker:
    def make(qemu_img: Program, qemu_io: Program) -> str:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "image.qcow2", SIZE)
        if written:
            # What is allocated already cannot be written compressed.
            write_data(qemu_io, "image.qcow2", zero_clusters="0.10" not in options, compressed="preallocation" not in options)
        return "image.qcow2"

    return make


def _top(qemu_img: Program, qemu_io: Program) -> str:
    chain(qemu_img, qemu_io)
    return "top.qcow2"


def _raw(qemu_img: Program, qemu_io: Program) -> str:
    sparse_raw()
    return "sparse.raw"


def _empty_raw(qemu_img: Program, qemu_io: Program) -> str:
    Path("empty.raw").touch()
    return "empty.raw"


def _no_bytes(qemu_img: Program, qemu_io: Program) -> str:
    qemu_img("create", "-q", "-f", "qcow2", "nothing.qcow2", "0")
    return "nothing.qcow2"


MAKERS = [
    *(pytest.param(_created(options, written=False), id=f"new-{options}") for options in QCOW2_OPTIONS),
    *(pytest.param(_created(options, written=True), id=f"written-{options}") for options in QCOW2_OPTIONS),
    pytest.param(_top, id="chain"),
    pytest.param(_raw, id="sparse-raw"),
    pytest.param(_empty_raw, id="empty-raw"),
    pytest.param(_no_bytes, id="no-bytes"),
]
