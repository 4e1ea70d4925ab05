"""qcow2 images with every feature of the format, and the cases in which each two of their properties meet.

A case is made and changed through the command line, which blocklib shares with QEMU: either program can be its maker, the
other then reads, checks and changes what the first has made.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from blocklib import KiB, MiB

SECTOR: Final = 512
SECRET: Final = "correct horse"

PROPERTIES: Final[dict[str, tuple[Any, ...]]] = {
    "cluster_size": (64 * KiB, 16 * KiB, 512, 4 * KiB, 2 * MiB),
    "version": (("1.1", 16), ("0.10", 16), ("1.1", 1), ("1.1", 2), ("1.1", 64)),
    "extended_l2": (False, True),
    "data_file": ("none", "plain", "raw"),
    "encryption": ("none", "luks", "aes"),
    "compression": ("none", "zlib", "zstd"),
    "lazy_refcounts": (False, True),
    "snapshots": (False, True),
    "bitmaps": ("none", "enabled", "disabled"),
    "backing": (False, True),
    "preallocation": ("off", "metadata", "falloc", "full"),
}


@dataclass(frozen=True)
class FeatureCase:
    """One value of each property."""

    cluster_size: int = 64 * KiB
    version: tuple[str, int] = ("1.1", 16)
    extended_l2: bool = False
    data_file: str = "none"
    encryption: str = "none"
    compression: str = "none"
    lazy_refcounts: bool = False
    snapshots: bool = False
    bitmaps: str = "none"
    backing: bool = False
    preallocation: str = "off"

    def __str__(self) -> str:
        compat, bits = self.version
        words = [str(self.cluster_size), f"compat{compat}", f"refcount{bits}"]
        words += [name for name in ("extended_l2", "lazy_refcounts", "snapshots", "backing") if getattr(self, name)]
        for name in ("data_file", "encryption", "compression", "bitmaps", "preallocation"):
            value = getattr(self, name)
            if value not in ("none", "off"):
                words.append(f"{name}-{value}")
        return "-".join(words)

    @property
    def is_legal(self) -> bool:
        """Whether QEMU makes such an image."""
        compat, bits = self.version
        data_file, encrypted, compressed = self.data_file != "none", self.encryption != "none", self.compression != "none"
        return not (
            (compat == "0.10" and (self.extended_l2 or data_file or self.lazy_refcounts or self.bitmaps != "none"))
            or (compat == "0.10" and self.compression == "zstd")
            or (self.extended_l2 and self.cluster_size < 16 * KiB)
            or (data_file and (compressed or self.snapshots))
            or (self.data_file == "raw" and (self.backing or encrypted))  # encrypted, QEMU's zeroes read as noise
            or (encrypted and (compressed or self.preallocation != "off"))
            or (self.snapshots and bits <= 2)  # two snapshots and what is shared anyway are more users than 3
            or (self.preallocation != "off" and (compressed or (self.backing and not self.extended_l2)))
        )

    @property
    def size(self) -> int:
        """Some clusters, or some L2 tables, and a part of one."""
        return min(max(6 * self.cluster_size, 300 * KiB), 9 * MiB) + 3 * SECTOR

    def creation_options(self, folder: Path) -> str:
        compat, bits = self.version
        options = [f"cluster_size={self.cluster_size}", f"compat={compat}", f"refcount_bits={bits}"]
        options.append(f"preallocation={self.preallocation}")
        if self.extended_l2:
            options.append("extended_l2=on")
        if self.lazy_refcounts:
            options.append("lazy_refcounts=on")
        if self.compression != "none":
            options.append(f"compression_type={self.compression}")
        if self.data_file != "none":
            options.append(f"data_file={folder / 'data.raw'}")
            if self.data_file == "raw":
                options.append("data_file_raw=on")
        if self.encryption != "none":
            options += [f"encrypt.format={self.encryption}", "encrypt.key-secret=s0"]
        if self.encryption == "luks":
            options.append("encrypt.iter-time=10")
        return ",".join(options)


def every_legal_pair(seed: int = 1) -> list[FeatureCase]:
    """Legal cases in which any two values of two properties that may meet do meet at least once."""
    choose = random.Random(seed)
    names = list(PROPERTIES)
    missing = {
        pair
        for one, other in itertools.combinations(names, 2)
        for pair in itertools.product(((one, a) for a in PROPERTIES[one]), ((other, b) for b in PROPERTIES[other]))
        if replace(FeatureCase(), **dict(pair)).is_legal
    }

    def pairs(case: FeatureCase) -> set[Any]:
        return set(itertools.combinations(((name, getattr(case, name)) for name in names), 2))

    chosen: list[FeatureCase] = []
    while missing:
        start = replace(FeatureCase(), **dict(min(missing, key=repr)))
        best = start
        for _ in range(60):
            case = start
            for name in choose.sample(names, len(names)):
                changed = replace(case, **{name: choose.choice(PROPERTIES[name])})
                if changed.is_legal and all(getattr(changed, key) == getattr(start, key) for key in _fixed(start)):
                    case = changed
            best = max(best, case, key=lambda each: len(pairs(each) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def random_legal_cases(seed: int, n: int) -> list[FeatureCase]:
    """`n` legal cases, any of them as likely as another."""
    choose = random.Random(seed)
    cases: list[FeatureCase] = []
    while len(cases) < n:
        case = FeatureCase(**{name: choose.choice(values) for name, values in PROPERTIES.items()})
        if case.is_legal:
            cases.append(case)
    return cases


def _fixed(start: FeatureCase) -> list[str]:
    return [name for name in PROPERTIES if getattr(start, name) != getattr(FeatureCase(), name)]


class Runner(Protocol):
    """A program: fails the test unless it exits as it should, and gives what it printed."""

    def __call__(self, *arguments: str | int | os.PathLike[str]) -> str: ...


@dataclass
class Tools:
    """qemu-img and qemu-io, QEMU's or ours."""

    name: str
    img: Runner
    io: Runner


@dataclass
class FeatureImage:
    """An image of a case, what it should read as now, and what each of its snapshots should."""

    case: FeatureCase
    folder: Path
    content: bytearray = field(default_factory=bytearray)
    snapshots: dict[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "image.qcow2"

    @property
    def _objects(self) -> list[str]:
        return ["--object", f"secret,id=s0,data={SECRET}"] if self.case.encryption != "none" else []

    @property
    def source(self) -> list[str]:
        """The arguments that name the image to any command that opens it."""
        return self._as_options if self.case.encryption != "none" else ["-f", "qcow2", str(self.path)]

    @property
    def _as_options(self) -> list[str]:
        key = ",encrypt.key-secret=s0" if self.case.encryption != "none" else ""
        return [*self._objects, "--image-opts", f"driver=qcow2,file.filename={self.path}{key}"]

    def create(self, maker: Tools, choose: random.Random) -> None:
        case = self.case
        self.content = bytearray(case.size)
        backing: list[str] = []
        if case.backing:
            base = self.folder / "base.qcow2"
            maker.img("create", "-q", "-f", "qcow2", base, case.size - 5 * SECTOR)
            pattern = choose.randrange(1, 256)
            maker.io("-f", "qcow2", "-c", f"write -P {pattern} 0 {case.size - 5 * SECTOR}", base)
            self.content[: case.size - 5 * SECTOR] = bytes((pattern,)) * (case.size - 5 * SECTOR)
            backing = ["-b", "base.qcow2", "-F", "qcow2"]
        options = case.creation_options(self.folder)
        maker.img("create", "-q", "-f", "qcow2", *self._objects, "-o", options, *backing, self.path, case.size)

    def remove_bitmap(self, maker: Tools, name: str) -> None:
        maker.img("bitmap", "--remove", *self.source, name)

    def write(self, writer: Tools, choose: random.Random, n: int = 6) -> None:
        """Write and zero at random."""
        commands = []
        for _ in range(n):
            offset = choose.randrange(self.case.size // SECTOR) * SECTOR
            length = choose.choice((SECTOR, 5 * SECTOR, 3 * self.case.cluster_size, 40 * KiB))
            length = min(length, self.case.size - offset)
            pattern = choose.randrange(1, 256)
            kind = choose.choice((f"write -P {pattern}", f"write -P {pattern}", "write -z", "write -z -u"))
            self._apply(offset, length, pattern if "-P" in kind else 0)
            commands += ["-c", f"{kind} {offset} {length}"]
        writer.io(*commands, *self.source)

    def compress(self, writer: Tools, choose: random.Random, n: int = 4) -> None:
        """Write whole clusters compressed; nothing may be in them yet."""
        size, cluster_size = self.case.size, self.case.cluster_size
        clusters = range(size // cluster_size)
        commands = []
        for cluster in choose.sample(clusters, min(n, len(clusters))):
            pattern = choose.randrange(1, 256)
            self._apply(cluster * cluster_size, cluster_size, pattern)
            commands += ["-c", f"write -c -P {pattern} {cluster * cluster_size} {cluster_size}"]
        writer.io(*commands, *self.source)

    def _apply(self, offset: int, length: int, pattern: int) -> None:
        self.content[offset : offset + length] = bytes((pattern,)) * length

    def discard(self, writer: Tools, choose: random.Random) -> None:
        """Discard a range; what it reads as afterwards is what the writer says it does."""
        offset = choose.randrange(self.case.size // SECTOR) * SECTOR
        length = min(3 * self.case.cluster_size, self.case.size - offset)
        writer.io("-c", f"discard {offset} {length}", *self.source)
        found = self.read(writer)
        self.content[offset : offset + length] = found[offset : offset + length]

    def read(self, reader: Tools, snapshot: str | None = None) -> bytes:
        """What the image, or a snapshot, reads as."""
        raw = self.folder / "converted.raw"
        chosen = ["-l", snapshot] if snapshot is not None else []
        reader.img("convert", *chosen, "-O", "raw", *self.source, raw)
        content = raw.read_bytes()
        raw.unlink()
        return content

    def take_snapshot(self, maker: Tools, name: str) -> None:
        maker.img("snapshot", "-c", name, *self._as_options)
        self.snapshots[name] = bytes(self.content)

    def apply_snapshot(self, maker: Tools, name: str) -> None:
        maker.img("snapshot", "-a", name, *self._as_options)
        self.content[:] = self.snapshots[name]

    def delete_snapshot(self, maker: Tools, name: str) -> None:
        maker.img("snapshot", "-d", name, *self._as_options)
        del self.snapshots[name]

    def add_bitmap(self, maker: Tools, name: str, *, disabled: bool) -> None:
        maker.img("bitmap", "--add", *(["--disable"] if disabled else []), "-g", 64 * KiB, *self.source, name)

    def what_it_says(self, reader: Tools) -> Iterator[tuple[str, Any]]:
        """(command, its JSON) of everything that describes the image."""
        for command in ("info", "map", "check"):
            answer = json.loads(reader.img(command, "--output=json", *self.source))
            if isinstance(answer, dict):
                answer.pop("filename", None)  # of --image-opts each program makes a name of its own
            yield command, answer
