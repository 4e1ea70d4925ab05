"""Small qcow2 images with every feature, where their metadata lies by name, and an input's way to damage them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import ENOSPC
from functools import cache
from typing import Any, Final

from blocklib.disk import Disk
from blocklib.errors import StorageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.graph import Transaction, close_tree
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Preallocation
from blocklib.options import check_options
from blocklib.policy import Limits
from blocklib.protocols.memory import MemoryNode
from tests.encrypted import AES, LUKS, OPEN
from tests.fuzz.source import EXTREMES, Source

SIZE: Final = 192 << 10
_UNUSUAL: Final = {"l2-cache-size": 1024, "l2-cache-entry-size": 512, "refcount-cache-size": 1024, "overlap-check": "all"}
_MOST_STORED: Final = 16 << 20
_LIMITS: Final = Limits(key_iterations=20_000)
_COPIED, _COMPRESSED = layout.FLAG_COPIED, layout.FLAG_COMPRESSED


class Host(MemoryNode):
    """A file in memory on a host that is soon full, however sparse the file is."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(None, 0)
        self.discard_passes = True
        if data:
            self.pwritev(0, (data,))
        self.size = len(data)

    @property
    def content(self) -> bytes:
        data = bytearray(min(self.size, 2 * _MOST_STORED))
        self.preadv(0, (memoryview(data),))
        return bytes(data)

    @property
    def state(self) -> tuple[int, dict[int, bytes]]:
        """All there is of it, to be compared."""
        return self.size, {index: bytes(chunk) for index, chunk in self._chunks.items()}

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        length = sum(map(len, views))
        if (len(self._chunks) << 16) + length > _MOST_STORED:
            raise StorageError("the host is full", errno=ENOSPC, operation="pwrite")
        super().pwritev(offset, views)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        super().truncate(size, "off")

    def abandon(self) -> None:
        """What it holds outlives its users."""


@dataclass(frozen=True)
class Image:
    """A sound image.  `places` are ranges of its file with metadata, by name."""

    name: str
    data: bytes
    places: Mapping[str, tuple[int, int]]
    cluster_bits: int
    has_backing: bool
    guest: bytes | None
    """What its external data file holds."""
    secret: bool

    def of_kind(self, *kinds: str) -> list[tuple[int, int]]:
        return [place for name, place in self.places.items() if name.startswith(kinds)]


class Case:
    """An image, sound or damaged, in files of its own; `unusual`: opened with caches for next to nothing, and all checks."""

    def __init__(self, image: Image, data: bytes, *, unusual: bool = False) -> None:
        self.image = image
        self.unusual = unusual
        self.host = Host(data)
        self.guest = Host(image.guest) if image.guest is not None else None

    @property
    def state(self) -> object:
        return self.host.state, self.guest.state if self.guest is not None else None

    @contextmanager
    def opened(
        self, *, writable: bool, metadata_only: bool = False, options: Mapping[str, Any] | None = None
    ) -> Iterator[Disk]:
        """The disk, which is closed at the end, or abandoned where the block raises."""
        image = self.image
        settings = _UNUSUAL if self.unusual else {}
        typed = check_options("qcow2", {**settings, **(options or {}), **(OPEN if image.secret else {}), "file": {}})
        node = Qcow2Node.from_options(typed, read_only=not writable, limits=_LIMITS, metadata_only=metadata_only)
        node.discard_passes = True
        node.detect_zeroes = "unmap" if self.unusual else "off"
        with Transaction() as change:
            change.attach(node, "file", self.host)
        disk: Disk | None = None
        try:
            node.load()
            if not metadata_only:
                if node.needs_data_file:
                    with Transaction() as change:
                        change.attach(node, "data-file", self.guest if self.guest is not None else Host())
                if image.has_backing:
                    with Transaction() as change:
                        change.attach(node, "backing", _backing())
            disk = Disk(node, "r+" if writable else "r")
            if writable and not metadata_only:
                node.activate()
            yield disk
        except BaseException:
            if disk is not None:
                disk.abandon()
            else:
                close_tree(node, abandon=True)
            raise
        disk.close()


_BACKING: Final = bytes(range(1, 256)) * (100_000 // 255)


def _backing() -> Host:
    return Host(_BACKING)


# -- sound images ----------------------------------------------------------------------------------------------------------

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "plain": {"cluster_size": 4096},
    "bare": {"cluster_size": 4096, "compression_type": "zlib"},
    "wide counts": {"cluster_size": 512, "refcount_bits": 64},
    "narrow counts": {"cluster_size": 1024, "refcount_bits": 1},
    "version 2": {"cluster_size": 1024, "compat": "0.10"},
    "subclusters": {"cluster_size": 16 << 10, "extended_l2": True},
    "lazy and zstd": {"cluster_size": 4096, "lazy_refcounts": True, "compression_type": "zstd"},
    "larger clusters": {"cluster_size": 8192, "refcount_bits": 32},
    "data file": {"cluster_size": 4096, "data_file": "guest.raw"},
    "raw data file": {"cluster_size": 4096, "data_file": "guest.raw", "data_file_raw": True},
    "backing": {"cluster_size": 2048, "backing_file": "base.raw", "backing_fmt": "raw"},
    "AES": {"cluster_size": 4096, **AES},
    "LUKS": {"cluster_size": 4096, **LUKS},
    "LUKS subclusters": {"cluster_size": 16 << 10, "extended_l2": True, **LUKS},
}
NAMES: Final = tuple(_OPTIONS)


@cache
def image(name: str) -> Image:
    options = _OPTIONS[name]
    host = Host()
    with Transaction() as change:
        edge = change.attach(None, "create", host, wanted=CONSISTENT_READ | WRITE | RESIZE)
    typed = check_options("qcow2", {"size": SIZE, **options}, table="create")
    Qcow2Node.image_maker(typed)(edge)
    is_external = "data_file" in options
    empty = Image(
        name,
        host.content,
        {},
        (options["cluster_size"]).bit_length() - 1,
        "backing_file" in options,
        bytes(SIZE) if is_external else None,
        "encrypt.format" in options,
    )
    case = Case(empty, empty.data)
    with case.opened(writable=True) as disk:
        if not is_external and "encrypt.format" not in options:
            disk.write_compressed(0, bytes(range(256)) * 256)
        disk.write(70_000, b"x" * 40_000)
        if "compat" not in options and name != "bare":
            disk.bitmaps.add("b", granularity=512, persistent=True)
            disk.bitmaps.add("other", granularity=4096, persistent=True).disable()
            disk.write(120_000, b"y" * 3000)
        if not is_external and options.get("refcount_bits") != 1 and name != "bare":
            disk.snapshots.create("one")
            disk.write(80_000, b"z" * 5000)
            disk.snapshots.create("two")
        disk.write(90_000, b"w" * 20_000)
        if options.get("compat") != "0.10":
            disk.write_zeroes(100_000, 4096)
        disk.discard(72 << 10, 8 << 10)
    data = case.host.content
    guest = case.guest.content if case.guest is not None else None
    return replace(empty, data=data, places=dict(_places(data, case.host)), guest=guest)


def _word(data: bytes, offset: int) -> int:
    (value,) = struct.unpack_from(">Q", data, offset)
    return int(value)


def _places(data: bytes, host: Host) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where the metadata of a sound image lies."""
    node = Qcow2Node.from_options(check_options("qcow2", {"file": {}}), read_only=True, metadata_only=True)
    with Transaction() as change:
        change.attach(node, "file", host)
    node.load()
    header, cluster = node.header, node.geometry.cluster_size
    span = header.header_length
    yield "header", (0, 72)
    if span > 72:
        for number, name in enumerate(("incompatible", "compatible", "autoclear")):
            yield f"header {name} features", (72 + 8 * number, 8)
        yield "header rest", (96, span - 96)
    while kind := int.from_bytes(data[span : span + 4], "big"):
        length = int.from_bytes(data[span + 4 : span + 8], "big")
        yield f"extension {kind:#x}", (span, layout.extension_span(length))
        if kind == layout.EXTENSION_ENCRYPTION:
            yield "LUKS header", (_word(data, span + 8), 592)
        if kind == layout.EXTENSION_BITMAPS:
            directory, length = _word(data, span + 24), _word(data, span + 16)
            yield "bitmap directory", (directory, length)
            position = directory
            while position < directory + length:
                table, entries = struct.unpack_from(">QI", data, position)
                yield f"bitmap table {position}", (table, 8 * entries)
                extra, name = struct.unpack_from(">HI", data, position + 18)[::-1]
                position += -(-(24 + extra + name) // 8) * 8
        span += layout.extension_span(length)
    yield "extension end", (span, 16)
    yield "refcount table", (header.refcount_table_offset, 64)
    for index in range(8):
        if block := _word(data, header.refcount_table_offset + 8 * index):
            yield f"refcount block {index}", (block, min(cluster, 256))
    yield from _tables("", data, header.l1_table_offset, header.l1_size)
    if header.nb_snapshots:
        position = header.snapshots_offset
        for number in range(header.nb_snapshots):
            l1, size, id_length, name_length = struct.unpack_from(">QIHH", data, position)
            extra = int.from_bytes(data[position + 36 : position + 40], "big")
            length = -(-(40 + extra + id_length + name_length) // 8) * 8
            yield f"snapshot entry {number}", (position, length)
            yield from _tables(f"snapshot {number} ", data, l1, size)
            position += length


def _tables(whose: str, data: bytes, l1: int, size: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{whose}L1", (l1, 8 * size)
    for index in range(min(size, 4)):
        if l2 := _word(data, l1 + 8 * index) & layout.OFFSET_MASK:
            yield f"{whose}L2 {index}", (l2, 512)


# -- damage ----------------------------------------------------------------------------------------------------------------

_WIDTHS: Final = (8, 8, 8, 4, 4, 2, 1, 1)


def damaged(image: Image, source: Source, places: Sequence[tuple[int, int]]) -> bytes:
    """The image with up to seven numbers in `places` changed, and its end cut off or made longer."""
    data = bytearray(image.data)
    changes = source.byte()
    for _ in range(changes & 7):
        start, length = source.chosen(places)
        width = source.chosen(_WIDTHS)
        offset = start + source.byte() * width % max(length, 1)
        if offset + width > len(data):
            continue
        old = int.from_bytes(data[offset : offset + width], "big")
        value = _value(image, source, places, data, old)
        data[offset : offset + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
    if changes & 0x80:
        del data[len(data) * source.byte() // 255 :]
    if changes & 0x40:
        data += bytes(source.byte() << 8)
    return bytes(data)


def _value(image: Image, source: Source, places: Sequence[tuple[int, int]], data: bytearray, old: int) -> int:
    kind = source.byte()
    flags = (kind >> 4 & 1) << 63 | (kind >> 5 & 1) << 62 | kind >> 6 & 1
    match kind % 10:
        case 0:
            return old ^ 1 << source.byte() % 64
        case 1:
            return source.byte() | flags
        case 2:
            return source.chosen(places)[0] | flags
        case 3:
            return source.byte() << image.cluster_bits | flags
        case 4:
            return source.chosen(EXTREMES)
        case 5:
            return int.from_bytes(source.take(8), "big")
        case 6:
            return old + source.byte() - 128
        case 7:
            start, length = source.chosen(places)
            other = start + source.byte() * 8 % max(length, 1)
            return int.from_bytes(data[other : other + 8], "big")
        case 8:
            return (len(data) - 1 >> image.cluster_bits) + source.byte() - 8 << image.cluster_bits | flags
        case _:
            return old + ((source.byte() - 128) << image.cluster_bits)
