"""The kinds of qcow2 image that interop tests go through: every pair of properties, or every combination."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from blocklib import KiB, MiB
from blocklib.extents import Extent
from tests.property.chains import SECTOR, Change, ImageSpec, Place

Version: TypeAlias = tuple[Literal["0.10", "1.1"], int]
"""(compat, refcount bits)"""
Preallocation: TypeAlias = Literal["off", "metadata", "falloc", "full"]

CLUSTER_SIZES: Final = (64 * KiB, 512, 4 * KiB, 2 * MiB)
ALL_CLUSTER_SIZES: Final = tuple(1 << bits for bits in range(9, 22))
VERSIONS: Final[tuple[Version, ...]] = (
    ("1.1", 16),
    ("0.10", 16),
    *(("1.1", bits) for bits in (1, 2, 4, 8, 32, 64)),
)
DEPTHS: Final = (0, 1, 2, 4)
PREALLOCATIONS: Final[tuple[Preallocation, ...]] = ("off", "metadata", "falloc", "full")
EXTENDED: Final = (False, True)
"""Whether the clusters have subclusters."""


@dataclass(frozen=True)
class Case:
    """A chain of images with the same layout; the preallocation is that of the lowest, since overlays have none."""

    cluster_size: int
    version: Version
    depth: int
    preallocation: Preallocation
    extended_l2: bool = False

    def __str__(self) -> str:
        compat, bits = self.version
        kind = "-extended" if self.extended_l2 else ""
        return f"{self.cluster_size}-{compat}-refcount{bits}-depth{self.depth}-{self.preallocation}{kind}"

    @property
    def size(self) -> int:
        """Some clusters, or some L2 tables, and a part of one."""
        return min(max(5 * self.cluster_size, 200 * KiB), 7 * MiB) + 3 * SECTOR

    def specs(self) -> list[ImageSpec]:
        """The images, lowest first; those in between are shorter and longer in turns."""
        compat, bits = self.version
        images = []
        for level in range(self.depth + 1):
            size = self.size
            if level < self.depth:
                size = size + 5 * SECTOR if level % 2 else size // 3 // SECTOR * SECTOR
            preallocation = self.preallocation if level == 0 else "off"
            images.append(ImageSpec(size, "qcow2", self.cluster_size, bits, compat, preallocation, self.extended_l2))
        return images

    def random(self) -> random.Random:
        """A source of choices that are the same in every run."""
        return random.Random(str(self))


def every_combination(cluster_size: int, version: Version) -> list[Case]:
    rows = itertools.product((cluster_size,), (version,), DEPTHS, PREALLOCATIONS, EXTENDED)
    return [Case(*row) for row in rows if is_possible(*row)]


def is_possible(cluster_size: int, version: Version, _depth: int, _preallocation: Preallocation, extended: bool) -> bool:
    """Only large clusters of version 3 have subclusters."""
    return not extended or (cluster_size >= 16 * KiB and version[0] == "1.1")


def every_pair() -> list[Case]:
    """Cases in which any two values of two properties meet at least once."""
    product = itertools.product(CLUSTER_SIZES, VERSIONS, DEPTHS, PREALLOCATIONS, EXTENDED)
    rows: list[Any] = [row for row in product if is_possible(*row)]

    def pairs(row: Sequence[object]) -> set[object]:
        return {(i, j, row[i], row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(Case(*best))
        missing -= pairs(best)
    return chosen


def random_changes(choose: random.Random, n: int) -> list[Change]:
    kinds: tuple[Any, ...] = ("write", "write", "write zero bytes", "zero", "zero and unmap", "discard")
    return [
        Change(
            choose.choice(kinds),
            Place(choose.randrange(400), choose.choice((0, 0, 512, -100)), choose.choice((0, 1, 2)), choose.choice((0, 700))),
            choose.randrange(1000),
        )
        for _ in range(n)
    ]


def qemu_io_script(choose: random.Random, n: int, size: int, cluster_size: int, *, compressed: bool) -> list[str]:
    """Arguments that make qemu-io write, zero and discard at random; whole sectors, as files of QEMU need.

    What is `compressed` comes first: qemu-io refuses to compress clusters that are allocated.
    """
    commands = []
    if compressed:
        clusters = range(size // cluster_size)
        for cluster in choose.sample(clusters, min(3, len(clusters))):
            commands.append(f"write -c -P {choose.randrange(1, 256)} {cluster * cluster_size} {cluster_size}")
    for _ in range(n):
        kind = choose.choice(("write -P", "write -P", "write -P", "write -z", "write -z -u", "discard"))
        offset = choose.randrange(size // SECTOR) * SECTOR
        length = min(choose.choice((SECTOR, 3 * cluster_size, 9 * SECTOR, 40 * KiB)), size - offset)
        pattern = f" {choose.randrange(1, 256)}" if "-P" in kind else ""
        commands.append(f"{kind}{pattern} {offset} {length}")
    return [argument for command in commands for argument in ("-c", command)]


def as_qemu_map(extents: Sequence[Extent]) -> list[dict[str, Any]]:
    """What `qemu-img map --output=json` says of the same extents."""
    return [
        {
            "start": extent.offset,
            "length": extent.length,
            "depth": extent.depth,
            "present": extent.present,
            "zero": extent.zero,
            "data": extent.data,
            **({"offset": extent.host_offset} if extent.host_offset is not None else {}),
        }
        for extent in extents
    ]


def without_compression(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Newer versions of qemu-img also say what is compressed."""
    return [{name: value for name, value in extent.items() if name != "compressed"} for extent in answer]


def image_paths(folder: Path, depth: int) -> list[Path]:
    return [folder / f"{level}.qcow2" for level in range(depth + 1)]
