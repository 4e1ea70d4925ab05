"""Backing chains and the plain bytes they should read as: what property and interop tests share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import blocklib
from blocklib import KiB, MiB

SECTOR: Final = 512
MAX_SIZE: Final = 5 * MiB
CacheMode: TypeAlias = Literal["writeback", "writethrough", "none", "directsync", "unsafe"]

_NOISE: Final = random.Random(20).randbytes(2 * MAX_SIZE)


def noise(seed: int, length: int) -> bytes:
    """Bytes that say where they belong: no two places in them look the same."""
    start = seed * 4099 % MAX_SIZE
    return _NOISE[start : start + length]


@dataclass(frozen=True)
class ImageSpec:
    """One image of a chain, before it is created."""

    size: int
    format: Literal["qcow2", "raw"] = "qcow2"
    cluster_size: int = 64 * KiB
    refcount_bits: int = 16
    compat: Literal["0.10", "1.1"] = "1.1"
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"
    extended_l2: bool = False

    def create(self, path: Path, below: ChainImage | None) -> ChainImage:
        options: dict[str, int | str | bool] = {}
        if self.format == "qcow2":
            options = {
                "cluster_size": self.cluster_size,
                "compat": self.compat,
                "refcount_bits": self.refcount_bits,
                "preallocation": self.preallocation,
                "extended_l2": self.extended_l2,
            }
        blocklib.create(
            path,
            self.size,
            format=self.format,
            backing=below.path.name if below is not None else None,
            backing_format=below.spec.format if below is not None else None,
            options=options,
        )
        content = bytearray(self.size)
        if below is not None:
            shown = below.content[: self.size]
            content[: len(shown)] = shown
        return ChainImage(path, self, content, has_backing=below is not None)


@dataclass
class ChainImage:
    """An image of a chain and what it should read as, together with all that is below it."""

    path: Path
    spec: ImageSpec
    content: bytearray
    has_backing: bool
    is_valid: bool = True
    """What lies below was not changed behind its back."""

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.content[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        """A discard that is passed on: whole clusters read as zero, where the format can say so."""
        if self.spec.compat == "0.10" and self.has_backing:
            return
        unit = self.spec.cluster_size
        first = -(-offset // unit) * unit
        end = offset + length
        if end != self.size:
            end = end // unit * unit
        if first < end:
            self.zero(first, end - first)

    def resize(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - self.size))


@dataclass(frozen=True)
class Place:
    """A range in units that shrink well: made absolute by the disk it is used on."""

    cluster: int
    delta: int
    clusters: int
    more: int

    def on(self, size: int, cluster_size: int) -> tuple[int, int]:
        """(offset, length) inside a disk of `size` bytes."""
        offset = max(0, self.cluster * cluster_size + self.delta) % (size + 1)
        length = max(0, self.clusters * cluster_size + self.more)
        return offset, min(length, size - offset)


@dataclass(frozen=True)
class Change:
    """One request that changes a disk."""

    kind: Literal["write", "write clusters", "write in a batch", "write zero bytes", "zero", "zero and unmap", "discard"]
    place: Place
    seed: int

    def apply(self, disk: blocklib.Disk, image: ChainImage, *, discard_passes: bool) -> None:
        """Send it to the disk, and do the same to what the disk should read as."""
        self.send(disk, image.spec.cluster_size)
        self.note(image, discard_passes=discard_passes)

    def send(self, disk: blocklib.Disk, cluster_size: int) -> None:
        offset, length = self.place.on(disk.size, cluster_size)
        if self.kind == "write":
            disk.write(offset, noise(self.seed, length))
        elif self.kind == "write clusters":
            data = memoryview(noise(self.seed, length))
            parts = self._parts(offset, length, cluster_size)
            disk.write_runs([(start, data[start - offset : end - offset]) for start, end in parts])
        elif self.kind == "write in a batch":
            n, starts = self._batch(offset, length)
            disk.write_batch(starts, b"".join(noise(self.seed + number, n) for number in range(len(starts))))
            out = bytearray(n * len(starts))
            disk.read_batch(starts, n, out)
            assert out == b"".join(noise(self.seed + number, n) for number in range(len(starts)))
        elif self.kind == "write zero bytes":
            disk.write(offset, bytes(length))
        elif self.kind == "discard":
            disk.discard(offset, length)
        else:
            disk.write_zeroes(offset, length, unmap=self.kind == "zero and unmap")

    def note(self, image: ChainImage, *, discard_passes: bool) -> None:
        offset, length = self.place.on(image.size, image.spec.cluster_size)
        if self.kind == "write":
            image.write(offset, noise(self.seed, length))
        elif self.kind == "write clusters":
            data = noise(self.seed, length)
            for start, end in self._parts(offset, length, image.spec.cluster_size):
                image.write(start, data[start - offset : end - offset])
        elif self.kind == "write in a batch":
            n, starts = self._batch(offset, length)
            for number, start in enumerate(starts):
                image.write(start, noise(self.seed + number, n))
        elif self.kind != "discard":
            image.zero(offset, length)
        elif discard_passes:
            image.discard(offset, length)

    def _batch(self, offset: int, length: int) -> tuple[int, list[int]]:
        """(length, offsets) of requests inside a range that do not overlap, in no order."""
        rnd = random.Random(self.seed)
        n = max(1, min(length, rnd.choice((512, 1000, 4096, 65536))))
        starts = [start for start in range(offset, offset + length - n + 1, n)[:50] if rnd.random() < 0.7]
        rnd.shuffle(starts)
        return n, starts

    def _parts(self, offset: int, length: int, cluster_size: int) -> list[tuple[int, int]]:
        """Ranges (start, end) that are cut between clusters, some of which are left out."""
        rnd = random.Random(self.seed)
        end = offset + length
        parts = []
        while offset < end:
            stop = min(end, (offset // cluster_size + rnd.randint(1, 3)) * cluster_size)
            if rnd.random() < 0.7:
                parts.append((offset, stop))
            offset = stop
        return parts


def build_chain(folder: Path, specs: Sequence[ImageSpec], fills: Sequence[Sequence[Change]]) -> list[ChainImage]:
    """Create a chain, base first, each image filled by its changes before the next is laid over it."""
    images: list[ChainImage] = []
    for number, spec in enumerate(specs):
        image = spec.create(folder / f"{number}.{spec.format}", images[-1] if images else None)
        images.append(image)
        fill = [change for change in fills[number] if spec.format == "qcow2" or change.kind != "discard"]
        if fill:
            with open_image(image, "r+", discard="unmap") as disk:
                for change in fill:
                    change.apply(disk, image, discard_passes=True)
    return images


def open_image(
    image: ChainImage,
    mode: Literal["r", "r+"] = "r",
    *,
    discard: Literal["ignore", "unmap"] = "ignore",
    detect_zeroes: Literal["off", "on", "unmap"] = "off",
    cache: CacheMode = "writeback",
    l2_cache: int | None = None,
) -> blocklib.Disk:
    options = {} if l2_cache is None or image.spec.format == "raw" else {"l2-cache-size": l2_cache}
    return blocklib.open(
        image.path,
        mode,
        format=image.spec.format,
        references="allow",
        discard=discard,
        detect_zeroes=detect_zeroes,
        cache=cache,
        options=options,
    )


def first_difference(found: bytes | bytearray, expected: bytes | bytearray) -> str:
    """Where two contents part, for the message of a failed comparison; empty if they are the same."""
    if found == expected:
        return ""
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"at {at:#x}: {bytes(found[at : at + 16]).hex()} instead of {bytes(expected[at : at + 16]).hex()}"
