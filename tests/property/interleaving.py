"""What the scenarios of forced interleavings share: one small image, and what each of its sectors may read as in the end."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

import blocklib
from blocklib import KiB
from blocklib.disk import Disk

SECTOR: Final = 512
CLUSTER: Final = 4 * KiB
SIZE: Final = 128 * KiB
SMALL_CACHES: Final = {"l2-cache-size": 1, "refcount-cache-size": 1}


def sectors(number: int, n: int) -> bytes:
    """`n` sectors of which each says `number`, which is never zero."""
    return bytes((number,)) * (n * SECTOR)


@cache
def template(name: str) -> bytes:
    """An image by name, made once: each schedule begins with a copy."""
    cluster_size, filled, with_backing = {
        "empty": (CLUSTER, False, False),
        "filled": (CLUSTER, True, False),
        "overlay": (CLUSTER, False, True),
        "filled, small clusters": (512, True, False),
        "overlay, small clusters": (512, False, True),
    }[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        backing: dict[str, Any] = {}
        if with_backing:
            Path(folder, "base.raw").write_bytes(base())
            backing = {"backing": "base.raw", "backing_format": "raw"}
        blocklib.create(path, SIZE, format="qcow2", options={"cluster_size": cluster_size}, **backing)
        if filled:
            with blocklib.open(path, "r+") as disk:
                disk.write(0, base())
        return path.read_bytes()


@cache
def base() -> bytes:
    """What a filled image, or a backing file, holds: sector n says 100 + n % 100."""
    return b"".join(sectors(100 + n % 100, 1) for n in range(SIZE // SECTOR))


class Bench:
    """One image, and what each of its sectors may read as in the end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / "disk.qcow2"
        self.path.write_bytes(template(name))
        (folder / "base.raw").write_bytes(base())
        holds = base() if name != "empty" else bytes(SIZE)
        self.allowed: list[set[int]] = [{byte} for byte in holds[::SECTOR]]

    def open(self, **options: Any) -> Disk:
        return blocklib.open(
            self.path, "r+", format="qcow2", references="allow", discard="unmap", options=options.pop("options", {}), **options
        )

    def becomes(self, offset: int, length: int, *numbers: int) -> None:
        """In the end each sector of the range reads as one of `numbers`."""
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            self.allowed[sector] = set(numbers)

    def check(self, path: Path | None = None) -> None:
        """The image (or another at `path`) is clean, and each sector reads as it may."""
        path = path or self.path
        assert not [str(finding) for finding in blocklib.check(path, format="qcow2").findings]
        with blocklib.open(path, format="qcow2", references="allow") as disk:
            check_content(disk.read(0, SIZE), self.allowed)


def check_content(content: bytes, allowed: list[set[int]]) -> None:
    for sector, numbers in enumerate(allowed):
        found = set(content[sector * SECTOR : (sector + 1) * SECTOR])
        assert len(found) == 1, f"sector {sector} is mixed of {found}"
        assert found <= numbers, f"sector {sector} has {found}, not one of {numbers}"
