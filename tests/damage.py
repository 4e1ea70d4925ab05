"""Images and the ways to damage them: every damage has a name, changes fields by name, and says on which image it makes sense.

The images are made by qemu-img and qemu-io; `IMAGES` says with which options and commands.  `DAMAGES` are applied to a copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.image import check_image
from blocklib.formats.qcow2.header import Header, header_span, parse_header
from blocklib.formats.qcow2.repair.image import repair_image
from blocklib.policy import Limits
from blocklib.reports import CheckReport, RepairReport
from tests.programs import Argument, Program

KiB, MiB = 1 << 10, 1 << 20
COPIED, COMPRESSED, ZERO = layout.FLAG_COPIED, layout.FLAG_COMPRESSED, layout.FLAG_ZERO
OFFSET: Final = layout.OFFSET_MASK
CLUSTER: Final = 64 * KiB

_WIDE: Final = frozenset(
    name for name in layout.FIELD_OFFSETS if name.endswith(("_offset", "_features")) or name == "size"
)
"""Header fields of 64 bits; the others that are changed here have 32."""


class ImagePath:
    """An image file that can be damaged, and checked by either side.  Offsets are host offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, offset: int, view: memoryview) -> None:
        with self.path.open("rb") as file:
            file.seek(offset)
            part = file.read(len(view))
        view[: len(part)] = part
        view[len(part) :] = bytes(len(view) - len(part))

    def write(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(b"".join(bytes(view) for view in views))

    def flush(self) -> None:
        pass

    def header(self) -> Header:
        with self.path.open("rb") as file:
            data = file.read(4096)
            data += file.read(max(0, header_span(data) - len(data)))
        return parse_header(data, limits=Limits(), for_check=True)

    def check(self) -> CheckReport:
        header = self.header()
        return check_image(self, header, header.geometry(), filename=str(self.path), max_findings=1_000_000)

    def repair(self, what: Any) -> RepairReport:
        header = self.header()
        return repair_image(self, header, header.geometry(), what, filename=str(self.path))

    def copy(self, suffix: str = ".copy") -> ImagePath:
        return ImagePath(Path(shutil.copy(self.path, self.path.with_suffix(suffix))))

    # Fields -----------------------------------------------------------------------------------------------------------

    def number(self, offset: int, length: int = 8) -> int:
        buffer = bytearray(length)
        self.read(offset, memoryview(buffer))
        return int.from_bytes(buffer, "big")

    def set(self, offset: int, value: int, length: int = 8) -> None:
        self.write(offset, (value.to_bytes(length, "big"),))

    def flip(self, offset: int, bits: int) -> None:
        self.set(offset, self.number(offset) ^ bits)

    def field(self, name: str) -> int:
        return self.number(layout.FIELD_OFFSETS[name], 8 if name in _WIDE else 4)

    def set_field(self, name: str, value: int) -> None:
        """A header field, by its name in the specification."""
        self.set(layout.FIELD_OFFSETS[name], value, 8 if name in _WIDE else 4)

    def resize(self, change: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(self.size + change)

    # Places -----------------------------------------------------------------------------------------------------------

    @property
    def cluster_size(self) -> int:
        return 1 << self.field("cluster_bits")

    @property
    def l1(self) -> int:
        return self.field("l1_table_offset")

    @property
    def refcount_table(self) -> int:
        return self.field("refcount_table_offset")

    def refcount_block(self, index: int = 0) -> int:
        return self.number(self.refcount_table + 8 * index) & ~511

    def l2(self, index: int = 0) -> int:
        return self.number(self.l1 + 8 * index) & OFFSET

    def l2_entry(self, index: int) -> int:
        extended = self.field("version") > 2 and self.field("incompatible_features") & layout.INCOMPATIBLE_EXTENDED_L2
        return self.l2() + (16 if extended else 8) * index

    def data(self, index: int) -> int:
        return self.number(self.l2_entry(index)) & OFFSET

    def set_count(self, host_offset: int, count: int) -> None:
        """The refcount of the cluster at a host offset, of 16 bits, in the first refcount block."""
        self.set(self.refcount_block() + 2 * (host_offset // self.cluster_size), count, 2)

    @property
    def snapshots(self) -> int:
        return self.field("snapshots_offset")

    def extension(self, kind: int) -> int:
        """Where the data of a header extension lies."""
        offset = self.field("header_length")
        while found := self.number(offset, 4):
            if found == kind:
                return offset + 8
            offset += layout.extension_span(self.number(offset + 4, 4))
        raise LookupError(f"no extension {kind:#x}")

    @property
    def bitmap_directory(self) -> int:
        return self.number(self.extension(layout.EXTENSION_BITMAPS) + 16)

    @property
    def bitmap_table(self) -> int:
        return self.number(self.bitmap_directory)


@dataclass(frozen=True)
class Recipe:
    """How qemu-img and qemu-io make an image."""

    options: str = ""
    commands: tuple[str, ...] = ("write -P 1 0 1M", "write -P 2 4M 128k", "write -c -P 7 1280k 128k")
    size: str = "6M"
    snapshots: int = 0
    bitmaps: tuple[str, ...] = ()
    secret: str | None = None

    def make(self, qemu_img: Program, qemu_io: Program, path: Path) -> ImagePath:
        options = self.options.replace("FOLDER", str(path.parent))
        arguments = ["-o", options] if options else []
        secret = ["--object", f"secret,id=s,data={self.secret}"] if self.secret else []
        create: list[Argument] = ["create", "-q", "-f", "qcow2", *secret, *arguments, path, self.size]
        for _ in range(10):  # LUKS measures the processor, and gives up where that is too busy
            if not qemu_img.run(*create).returncode:
                break
        else:
            qemu_img(*create)

        def io(*commands: str) -> None:
            words = [word for command in commands for word in ("-c", command)]
            if secret:
                qemu_io(*secret, *words, "--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s")
            else:
                qemu_io("-f", "qcow2", *words, path)

        for number, name in enumerate(self.bitmaps):
            qemu_img("bitmap", "--add", *(["--disable"] if number else []), "-f", "qcow2", path, name)
        io(*self.commands)
        for number in range(self.snapshots):
            qemu_img("snapshot", "-c", f"snapshot {number}", path)
            io(f"write -P {16 + number} {number}k 5k")
        return ImagePath(path)


IMAGES: Final[dict[str, Recipe]] = {
    "plain": Recipe(),
    "version 2": Recipe(options="compat=0.10"),
    "zeroes": Recipe(commands=("write -P 1 0 512k", "write -z 128k 64k", "write -zu 256k 64k", "write -P 3 1M 64k")),
    "snapshots": Recipe(snapshots=2, commands=("write -P 1 0 512k", "write -c -P 7 1M 64k")),
    "extended L2": Recipe(
        options="extended_l2=on",
        commands=(
            "write -P 1 0 512k",
            "write -P 2 1M 6k",
            "write -z 130k 4k",
            "write -z 256k 64k",
            "write -c -P 7 2M 64k",
            "write -P 5 3M 2k",
        ),
    ),
    "data file": Recipe(options="data_file=FOLDER/image.data", commands=("write -P 1 0 512k", "write -z 128k 64k")),
    "raw data file": Recipe(
        options="data_file=FOLDER/image.data,data_file_raw=on", commands=("write -P 1 0 512k", "write -z 128k 64k")
    ),
    "LUKS": Recipe(
        options="encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        secret="hunter2",
        commands=("write -P 1 0 512k",),
    ),
    "bitmaps": Recipe(bitmaps=("first", "second"), commands=("write -P 1 0 512k", "write -P 2 5M 64k")),
    "many blocks": Recipe(
        options="cluster_size=512,refcount_bits=64", commands=("write -P 1 0 64k", "write -P 2 128k 8k"), size="1M"
    ),
}


@dataclass(frozen=True)
class Damage:
    image: str
    apply: Callable[[ImagePath], object]


def _all_on(image: str, damages: dict[str, Callable[[ImagePath], object]]) -> dict[str, Damage]:
    return {name: Damage(image, apply) for name, apply in damages.items()}


def _repeat(image: ImagePath, offset: int, length: int, byte: int) -> None:
    image.write(offset, (bytes([byte]) * length,))


def _leak_clusters(image: ImagePath) -> None:
    end = -(-image.size // CLUSTER)
    image.resize((end + 2) * CLUSTER - image.size)
    image.set_count(end * CLUSTER, 1)
    image.set_count((end + 1) * CLUSTER, 1)


def _swap_blocks(image: ImagePath) -> None:
    first, second = image.refcount_block(0), image.refcount_block(1)
    image.set(image.refcount_table, second)
    image.set(image.refcount_table + 8, first)


_PLAIN: Final[dict[str, Callable[[ImagePath], object]]] = {
    # Header
    "dirty bit": lambda i: i.set_field("incompatible_features", layout.INCOMPATIBLE_DIRTY),
    "corrupt bit": lambda i: i.set_field("incompatible_features", layout.INCOMPATIBLE_CORRUPT),
    "unknown autoclear bit": lambda i: i.set_field("autoclear_features", 1 << 40),
    "bitmaps autoclear bit without bitmaps": lambda i: i.set_field("autoclear_features", 1),
    "raw data autoclear bit without a data file": lambda i: i.set_field("autoclear_features", 2),
    "refcount table at 0": lambda i: i.set_field("refcount_table_offset", 0),
    "refcount table without clusters": lambda i: i.set_field("refcount_table_clusters", 0),
    "refcount table past the end": lambda i: i.set_field("refcount_table_offset", 1 << 40),
    "refcount table on data": lambda i: i.set_field("refcount_table_offset", i.data(3)),
    "refcount table on the L1 table": lambda i: i.set_field("refcount_table_offset", i.l1),
    "refcount table longer than it is": lambda i: i.set_field("refcount_table_clusters", 3),
    "L1 table longer than it is": lambda i: i.set_field("l1_size", i.field("l1_size") + 3),
    # L1 entries
    "reserved bit of an L1 entry": lambda i: i.flip(i.l1, 1 << 57),
    "low reserved bit of an L1 entry": lambda i: i.flip(i.l1, 1),
    "copied flag of a table cleared": lambda i: i.flip(i.l1, COPIED),
    "L1 entry without offset": lambda i: i.set(i.l1, COPIED),
    "L1 entry lost": lambda i: i.set(i.l1, 0),
    "L2 table unaligned": lambda i: i.flip(i.l1, 512),
    "L2 table past the end": lambda i: i.set(i.l1, COPIED | 1 << 40),
    "L2 table is a refcount block": lambda i: i.set(i.l1, COPIED | i.refcount_block()),
    "L2 table is the L1 table": lambda i: i.set(i.l1, COPIED | i.l1),
    "L2 table is the header": lambda i: i.set(i.l1, 512),
    # L2 entries
    "copied flag of data cleared": lambda i: i.flip(i.l2_entry(3), COPIED),
    "copied flag without offset": lambda i: i.set(i.l2_entry(3), COPIED),
    "reserved bit of an L2 entry": lambda i: i.flip(i.l2_entry(3), 2),
    "high reserved bit of an L2 entry": lambda i: i.flip(i.l2_entry(3), 1 << 60),
    "reserved bit of an unallocated L2 entry": lambda i: i.set(i.l2_entry(300), 4),
    "data unaligned": lambda i: i.flip(i.l2_entry(3), 512),
    "data past the end": lambda i: i.set(i.l2_entry(3), COPIED | 100 * CLUSTER),
    "data at the end": lambda i: i.set(i.l2_entry(3), COPIED | -(-i.size // CLUSTER) * CLUSTER),
    "data far away": lambda i: i.set(i.l2_entry(3), COPIED | OFFSET & ~0xFFFF),
    "data twice": lambda i: i.set(i.l2_entry(3), i.number(i.l2_entry(4))),
    "data on the L1 table": lambda i: i.set(i.l2_entry(3), i.l1 | COPIED),
    "data on the header": lambda i: i.set(i.l2_entry(3), 512 | COPIED),
    "data on a refcount block": lambda i: i.set(i.l2_entry(3), i.refcount_block() | COPIED),
    "data on the refcount table": lambda i: i.set(i.l2_entry(3), i.refcount_table | COPIED),
    "data on its L2 table": lambda i: i.set(i.l2_entry(3), i.l2() | COPIED),
    "L2 table of noise": lambda i: i.write(i.l2() + 2048, (bytes(range(256)),)),
    "compressed with copied flag": lambda i: i.flip(i.l2_entry(20), COPIED),
    "compressed into the next clusters": lambda i: i.flip(i.l2_entry(20), 0xFF << 54),
    "compressed past the end": lambda i: i.set(i.l2_entry(20), COMPRESSED | i.size + 64 * KiB),
    "compressed across the end": lambda i: i.set(i.l2_entry(20), COMPRESSED | 255 << 54 | i.size - 512),
    "compressed far away": lambda i: i.set(i.l2_entry(20), COMPRESSED | 1 << 53),
    # Refcounts
    "count of data too high": lambda i: i.set_count(i.data(3), 2),
    "count of data too low": lambda i: i.set_count(i.data(3), 0),
    "count of data far too high": lambda i: i.set_count(i.data(3), 65535),
    "count of the header zero": lambda i: i.set_count(0, 0),
    "count of the header too high": lambda i: i.set_count(0, 2),
    "count of the L1 table zero": lambda i: i.set_count(i.l1, 0),
    "count of the L1 table too high": lambda i: i.set_count(i.l1, 2),
    "count of an L2 table zero": lambda i: i.set_count(i.l2(), 0),
    "count of an L2 table too high": lambda i: i.set_count(i.l2(), 3),
    "count of the refcount table zero": lambda i: i.set_count(i.refcount_table, 0),
    "count of the refcount table too high": lambda i: i.set_count(i.refcount_table, 2),
    "count of a refcount block zero": lambda i: i.set_count(i.refcount_block(), 0),
    "count of a refcount block too high": lambda i: i.set_count(i.refcount_block(), 5),
    "count of compressed data too low": lambda i: i.set_count(i.number(i.l2_entry(20)) & ((1 << 54) - 1), 1),
    "count past the end": lambda i: i.set_count(500 * CLUSTER, 1),
    "refcount block zeroed": lambda i: _repeat(i, i.refcount_block(), CLUSTER, 0),
    "refcount block of noise": lambda i: _repeat(i, i.refcount_block(), CLUSTER, 0x5A),
    "refcount block lost": lambda i: i.set(i.refcount_table, 0),
    "refcount block unaligned": lambda i: i.flip(i.refcount_table, 512),
    "refcount block past the end": lambda i: i.set(i.refcount_table, 1 << 40),
    "refcount block far away": lambda i: i.set(i.refcount_table, 1 << 63),
    "refcount block at the end": lambda i: i.set(i.refcount_table + 8, -(-i.size // CLUSTER) * CLUSTER),
    "reserved bit of a refcount table entry": lambda i: i.flip(i.refcount_table, 1),
    "refcount block twice": lambda i: i.set(i.refcount_table + 8, i.refcount_block()),
    "refcount block on data": lambda i: i.set(i.refcount_table + 8, i.data(0)),
    "refcount block is data": lambda i: i.set(i.refcount_table, i.data(0)),
    "refcount block is the L1 table": lambda i: i.set(i.refcount_table, i.l1),
    "refcount block is the refcount table": lambda i: i.set(i.refcount_table, i.refcount_table),
    "refcount block is the header": lambda i: i.set(i.refcount_table, 512),
    "refcount table of noise": lambda i: _repeat(i, i.refcount_table, 4096, 0x5A),
    # The file
    "leaked data cluster": lambda i: i.set(i.l2_entry(3), 0),
    "leaked clusters at the end": _leak_clusters,
    "file shortened": lambda i: i.resize(-3 * CLUSTER),
    "file shortened a little": lambda i: i.resize(-1000),
    "file lengthened": lambda i: i.resize(5 * CLUSTER + 100),
}

_VERSION_2: Final[dict[str, Callable[[ImagePath], object]]] = {
    "zero flag in version 2": lambda i: i.set(i.l2_entry(300), 1),
    "zero flag of data in version 2": lambda i: i.flip(i.l2_entry(3), 1),
    "copied flag in version 2": lambda i: i.flip(i.l2_entry(3), COPIED),
    "data unaligned in version 2": lambda i: i.flip(i.l2_entry(3), 512),
    "refcount block lost in version 2": lambda i: i.set(i.refcount_table, 0),
}

_ZEROES: Final[dict[str, Callable[[ImagePath], object]]] = {
    "zero cluster unaligned": lambda i: i.flip(i.l2_entry(2), 512),
    "zero cluster past the end": lambda i: i.set(i.l2_entry(2), 1 | COPIED | 1 << 40),
    "zero cluster without copied flag": lambda i: i.flip(i.l2_entry(2), COPIED),
    "count of a zero cluster zero": lambda i: i.set_count(i.data(2), 0),
    "zero flag on a compressed cluster": lambda i: i.set(i.l2_entry(16), COMPRESSED | 1),
}

_SNAPSHOTS: Final[dict[str, Callable[[ImagePath], object]]] = {
    "snapshot L1 table unaligned": lambda i: i.flip(i.snapshots, 512),
    "snapshot L1 table past the end": lambda i: i.set(i.snapshots, 1 << 40),
    "snapshot L1 table at 0": lambda i: i.set(i.snapshots, 0),
    "snapshot L1 table empty": lambda i: i.set(i.snapshots + 8, 0, 4),
    "snapshot L1 table longer": lambda i: i.set(i.snapshots + 8, 2, 4),
    "snapshot L1 table too large": lambda i: i.set(i.snapshots + 8, (4 << 20) + 1, 4),
    "snapshot L1 table is the active one": lambda i: i.set(i.snapshots, i.l1),
    "one snapshot more": lambda i: i.set_field("nb_snapshots", 3),
    "one snapshot less": lambda i: i.set_field("nb_snapshots", 1),
    "no snapshots": lambda i: i.set_field("nb_snapshots", 0),
    "snapshot id too long": lambda i: i.set(i.snapshots + 12, 60000, 2),
    "snapshot extra data too short": lambda i: i.set(i.snapshots + 36, 8, 4),
    "snapshot extra data missing": lambda i: i.set(i.snapshots + 36, 0, 4),
    "snapshot extra data too long": lambda i: i.set(i.snapshots + 36, 2048, 4),
    "snapshot extra data longer than the file": lambda i: i.set(i.snapshots + 36, 1 << 31, 4),
    "snapshot table past the end": lambda i: i.set_field("snapshots_offset", 1 << 40),
    "snapshot table on data": lambda i: i.set_field("snapshots_offset", i.data(3)),
    "count of the snapshot table zero": lambda i: i.set_count(i.snapshots, 0),
    "count of a snapshot L1 table zero": lambda i: i.set_count(i.number(i.snapshots), 0),
    "count of shared data too low": lambda i: i.set_count(i.data(5), 1),
    "count of shared data too high": lambda i: i.set_count(i.data(5), 7),
    "shared L2 table with a reserved bit": lambda i: i.flip(i.number(i.snapshots), 2),
    "shared data with a reserved bit": lambda i: i.flip(i.number(i.number(i.snapshots)) & OFFSET, 2),
    "snapshot data unaligned": lambda i: i.flip((i.number(i.number(i.snapshots)) & OFFSET) + 8 * 5, 512),
    "snapshot L2 table unaligned": lambda i: i.flip(i.number(i.snapshots), 512),
    "snapshot L2 table past the end": lambda i: i.set(i.number(i.snapshots), 1 << 40),
    "copied flag of a snapshot's entry": lambda i: i.flip((i.number(i.number(i.snapshots)) & OFFSET) + 8 * 5, COPIED),
    "copied flag of shared data": lambda i: i.flip(i.l2_entry(5), COPIED),
    "refcount block lost with snapshots": lambda i: i.set(i.refcount_table, 0),
}

_EXTENDED: Final[dict[str, Callable[[ImagePath], object]]] = {
    "subcluster allocated and zero": lambda i: i.flip(i.l2_entry(3) + 8, 1 << 32),
    "subclusters allocated and zero": lambda i: i.set(i.l2_entry(3) + 8, (1 << 64) - 1),
    "subcluster allocated without a cluster": lambda i: i.set(i.l2_entry(300) + 8, 5),
    "subcluster bitmap of a compressed cluster": lambda i: i.set(i.l2_entry(32) + 8, 5),
    "no subcluster of a cluster": lambda i: i.set(i.l2_entry(3) + 8, 0),
    "zero flag with extended L2 entries": lambda i: i.flip(i.l2_entry(3), 1),
    "zero flag without a cluster, extended": lambda i: i.set(i.l2_entry(300), 1),
    "data unaligned, extended": lambda i: i.flip(i.l2_entry(3), 512),
    "partial data unaligned, extended": lambda i: i.flip(i.l2_entry(16), 512),
    "zero cluster unaligned, extended": lambda i: i.flip(i.l2_entry(4), 512),
    "zero data unaligned, extended": lambda i: i.flip(i.l2_entry(2), 512),
    "data past the end, extended": lambda i: i.set(i.l2_entry(3), COPIED | 1 << 40),
    "copied flag, extended": lambda i: i.flip(i.l2_entry(3), COPIED),
    "count too low, extended": lambda i: i.set_count(i.data(16), 0),
    "leaked data cluster, extended": lambda i: i.set(i.l2_entry(16), 0),
    "refcount block lost, extended": lambda i: i.set(i.refcount_table, 0),
}

_DATA_FILE: Final[dict[str, Callable[[ImagePath], object]]] = {
    "data elsewhere": lambda i: i.set(i.l2_entry(3), i.number(i.l2_entry(5))),
    "data file cluster without copied flag": lambda i: i.flip(i.l2_entry(3), COPIED),
    "data file cluster unaligned": lambda i: i.flip(i.l2_entry(3), 512),
    "data file cluster past the end": lambda i: i.set(i.l2_entry(3), COPIED | 1 << 40),
    "compressed cluster with a data file": lambda i: i.set(i.l2_entry(3), COMPRESSED | 4 * CLUSTER),
    "data file count too low": lambda i: i.set_count(i.l2(), 0),
    "data file count too high": lambda i: i.set_count(7 * CLUSTER, 1),
    "reserved bit with a data file": lambda i: i.flip(i.l2_entry(3), 2),
    "refcount block lost with a data file": lambda i: i.set(i.refcount_table, 0),
}

_RAW_DATA_FILE: Final[dict[str, Callable[[ImagePath], object]]] = {
    "raw data elsewhere": lambda i: i.set(i.l2_entry(3), i.number(i.l2_entry(5))),
    "raw data autoclear bit lost": lambda i: i.set_field("autoclear_features", 0),
    "raw data cluster without copied flag": lambda i: i.flip(i.l2_entry(3), COPIED),
}

_LUKS: Final[dict[str, Callable[[ImagePath], object]]] = {
    "count of the encryption header zero": lambda i: i.set_count(i.number(i.extension(layout.EXTENSION_ENCRYPTION)), 0),
    "count of the encryption header too high": lambda i: i.set_count(
        i.number(i.extension(layout.EXTENSION_ENCRYPTION)) + CLUSTER, 3
    ),
    "encrypted data leaked": lambda i: i.set(i.l2_entry(3), 0),
    "encrypted data unaligned": lambda i: i.flip(i.l2_entry(3), 512),
    "refcount block lost with LUKS": lambda i: i.set(i.refcount_table, 0),
}

_BITMAPS: Final[dict[str, Callable[[ImagePath], object]]] = {
    "bitmap in use": lambda i: i.set(i.bitmap_directory + 12, 3, 4),
    "bitmap with unknown flags": lambda i: i.set(i.bitmap_directory + 12, 1 << 20, 4),
    "bitmap of an unknown type": lambda i: i.set(i.bitmap_directory + 16, 7, 1),
    "bitmap granularity too small": lambda i: i.set(i.bitmap_directory + 17, 3, 1),
    "bitmap name too long": lambda i: i.set(i.bitmap_directory + 18, 2000, 2),
    "bitmap extra data": lambda i: i.set(i.bitmap_directory + 20, 8, 4),
    "bitmap table past the end": lambda i: i.set(i.bitmap_directory, 1 << 40),
    "bitmap table unaligned": lambda i: i.flip(i.bitmap_directory, 512),
    "bitmap table at 0": lambda i: i.set(i.bitmap_directory, 0),
    "bitmap table longer": lambda i: i.set(i.bitmap_directory + 8, 9, 4),
    "bitmap table empty": lambda i: i.set(i.bitmap_directory + 8, 0, 4),
    "bitmap table too large": lambda i: i.set(i.bitmap_directory + 8, 1 << 30, 4),
    "bitmap table entry with reserved bits": lambda i: i.flip(i.bitmap_table, 1 << 60),
    "bitmap table entry low reserved bit": lambda i: i.flip(i.bitmap_table, 2),
    "bitmap table entry of all ones and an offset": lambda i: i.flip(i.bitmap_table, 1),
    "bitmap data unaligned": lambda i: i.flip(i.bitmap_table, 512),
    "bitmap data past the end": lambda i: i.set(i.bitmap_table, 1 << 40),
    "bitmap data on data": lambda i: i.set(i.bitmap_table, i.data(0)),
    "bitmaps without autoclear bit": lambda i: i.set_field("autoclear_features", 0),
    "bitmap directory past the end": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS) + 16, 1 << 40),
    "bitmap directory unaligned": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS) + 16, i.bitmap_directory + 8),
    "bitmap directory on data": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS) + 16, i.data(0)),
    "bitmap directory longer": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS) + 8, 4096),
    "one bitmap more": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS), 3, 4),
    "one bitmap less": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS), 1, 4),
    "no bitmaps in the extension": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS), 0, 4),
    "reserved field of the bitmaps extension": lambda i: i.set(i.extension(layout.EXTENSION_BITMAPS) + 4, 1, 4),
    "count of the bitmap directory zero": lambda i: i.set_count(i.bitmap_directory, 0),
    "count of a bitmap table zero": lambda i: i.set_count(i.bitmap_table, 0),
    "count of bitmap data zero": lambda i: i.set_count(i.number(i.bitmap_table), 0),
    "count of bitmap data too high": lambda i: i.set_count(i.number(i.bitmap_table), 2),
    "refcount block lost with bitmaps": lambda i: i.set(i.refcount_table, 0),
}

_MANY_BLOCKS: Final[dict[str, Callable[[ImagePath], object]]] = {
    "one refcount block lost": lambda i: i.set(i.refcount_table + 8, 0),
    "last refcount block lost": lambda i: i.set(i.refcount_table + 16, 0),
    "two refcount blocks swapped": _swap_blocks,
    "one refcount block unaligned": lambda i: i.flip(i.refcount_table + 8, 256),
    "one refcount block past the end": lambda i: i.set(i.refcount_table + 8, 1 << 40),
    "one refcount block on another": lambda i: i.set(i.refcount_table + 8, i.refcount_block()),
    "one refcount block on an L2 table": lambda i: i.set(i.refcount_table + 8, i.l2(1)),
    "one refcount block zeroed": lambda i: _repeat(i, i.refcount_block(1), 512, 0),
    "count above 32 bits": lambda i: i.set(i.refcount_block() + 8 * 20, 1 << 40),
    "L1 table on data": lambda i: i.set_field("l1_table_offset", i.data(40)),
}

DAMAGES: Final[dict[str, Damage]] = {
    **_all_on("plain", _PLAIN),
    **_all_on("version 2", _VERSION_2),
    **_all_on("zeroes", _ZEROES),
    **_all_on("snapshots", _SNAPSHOTS),
    **_all_on("extended L2", _EXTENDED),
    **_all_on("data file", _DATA_FILE),
    **_all_on("raw data file", _RAW_DATA_FILE),
    **_all_on("LUKS", _LUKS),
    **_all_on("bitmaps", _BITMAPS),
    **_all_on("many blocks", _MANY_BLOCKS),
}
"""The name of each damage -> on which image, and how."""

REMAINS: Final = frozenset(
    {
        # What an entry meant cannot be known; QEMU leaves these too.
        "reserved bit of an L1 entry",
        "low reserved bit of an L1 entry",
        "L1 entry without offset",
        "L2 table unaligned",
        "L2 table past the end",
        "L2 table is a refcount block",
        "L2 table is the L1 table",
        "L2 table is the header",
        "reserved bit of an L2 entry",
        "high reserved bit of an L2 entry",
        "reserved bit of an unallocated L2 entry",
        "data unaligned",
        "data past the end",
        "data at the end",
        "data far away",
        "data on the header",
        "L2 table of noise",
        "compressed with copied flag",
        "compressed into the next clusters",
        "compressed past the end",
        "compressed across the end",
        "compressed far away",
        "file shortened",
        "data unaligned in version 2",
        "zero cluster past the end",
        "snapshot L1 table unaligned",
        "snapshot L1 table past the end",
        "snapshot L1 table at 0",
        "snapshot L1 table too large",
        "snapshot L1 table is the active one",
        "snapshot extra data too short",
        "snapshot extra data missing",
        "snapshot table on data",
        "shared L2 table with a reserved bit",
        "shared data with a reserved bit",
        "snapshot data unaligned",
        "snapshot L2 table unaligned",
        "snapshot L2 table past the end",
        "subcluster allocated and zero",
        "subclusters allocated and zero",
        "subcluster allocated without a cluster",
        "subcluster bitmap of a compressed cluster",
        "data unaligned, extended",
        "partial data unaligned, extended",
        "zero data unaligned, extended",
        "data past the end, extended",
        "leaked data cluster, extended",
        "data file cluster unaligned",
        "compressed cluster with a data file",
        "reserved bit with a data file",
        "encrypted data unaligned",
        "L1 table on data",
        # Guest data that is compressed is not moved off metadata; qemu-img counts it and is content.
        "zero flag on a compressed cluster",
    }
)
"""Damages that a repair leaves, in part or as they are: afterwards the check finds something still."""

NO_DAMAGE: Final = frozenset({"bitmap of an unknown type", "bitmap granularity too small"})
"""What the format allows and a check has nothing to say about, but QEMU does not open."""
