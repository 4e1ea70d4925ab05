"""Small files that promise enormous work: tables of millions of entries, all of them the same; what a few bytes decompress to;
and images whose structures multiply each other.

Every bomb is laid out by hand, so that one number can be a lie and all others true.  Files are sparse; none stores more than a
few tens of MiB.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from blocklib.formats.qcow2 import layout
from tests.damage import COMPRESSED, COPIED, KiB, MiB

GiB, TiB = 1 << 30, 1 << 40
_HEADER: Final = struct.Struct(layout.HEADER_V2_FORMAT + layout.HEADER_V3_FORMAT[1:])


class Forge:
    """A qcow2 file that is written structure by structure.  Clusters are counted once, in one refcount block, unless told."""

    def __init__(self, path: Path, *, size: int, cluster_bits: int = 16, version: int = 3, features: int = 0) -> None:
        self.path = path
        self.cluster_size = 1 << cluster_bits
        self.fields: dict[str, int] = {
            "version": version,
            "cluster_bits": cluster_bits,
            "size": size,
            "incompatible_features": features,
            "refcount_order": 4,
            "header_length": 104,
        }
        self.compression = 0
        self.extensions: list[tuple[int, bytes]] = []
        self._file = path.open("wb")
        self.end = self.cluster_size
        self.counts: dict[int, int] = {}
        """Refcounts that are not 1, by host offset."""

    def place(self, length: int) -> int:
        """The host offset of so many bytes, in clusters of their own at the end of the file."""
        at = self.end
        self.end += -(-length // self.cluster_size) * self.cluster_size
        return at

    def put(self, data: bytes, at: int | None = None) -> int:
        if at is None:
            at = self.place(len(data))
        self._file.seek(at)
        self._file.write(data)
        return at

    def table(self, entries: list[int], *, times: int = 1) -> int:
        """A table of 64-bit entries, repeated so many times."""
        return self.put(struct.pack(f">{len(entries)}Q", *entries) * times)

    def l1(self, entries: list[int], *, times: int = 1) -> None:
        self.fields["l1_table_offset"] = self.table(entries, times=times)
        self.fields["l1_size"] = len(entries) * times

    def finish(self, *, length: int = 0) -> None:
        """Count every cluster, write the header, and make the file `length` bytes long, or as long as it is."""
        per_block = self.cluster_size // 2
        n_clusters = self.end // self.cluster_size
        n_blocks = 1
        while n_blocks * per_block < n_clusters + n_blocks + 1:
            n_blocks += 1
        table, blocks = self.place(n_blocks * 8), self.place(n_blocks * self.cluster_size)
        self.put(struct.pack(f">{n_blocks}Q", *(blocks + n * self.cluster_size for n in range(n_blocks))), table)
        counts = bytearray(b"\0\1" * (self.end // self.cluster_size))
        for offset, count in self.counts.items():
            struct.pack_into(">H", counts, offset // self.cluster_size * 2, count)
        self.put(bytes(counts), blocks)
        self.fields.setdefault("refcount_table_offset", table)
        self.fields.setdefault("refcount_table_clusters", -(-n_blocks * 8 // self.cluster_size))
        self.write_header()
        self._file.truncate(max(self.end, length))
        self._file.close()

    def write_header(self) -> None:
        names = [name for name in layout.FIELD_OFFSETS if name not in ("magic", "compression_type")]
        header = bytearray(_HEADER.pack(layout.MAGIC, *(self.fields.get(name, 0) for name in names)))
        if self.fields["version"] < 3:
            del header[layout.HEADER_V2_LENGTH :]
        elif self.fields["header_length"] > len(header):
            header += bytes([self.compression]) + bytes(7)
        for kind, data in self.extensions:
            header += struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
        self.put(bytes(header), 0)


Bomb = Callable[[Path], None]


def one_l2_table_everywhere(path: Path, *, version: int = 3, entries: int = 4 << 20, count: int = 65535) -> None:
    """Every entry of the largest L1 table leads to one L2 table, all of whose entries lead to one cluster of data."""
    forge = Forge(path, size=entries * 512 * MiB, version=version)
    data = forge.put(b"x" * forge.cluster_size)
    l2 = forge.table([data], times=forge.cluster_size // 8)
    forge.l1([l2], times=entries)
    forge.counts = {data: 65535, l2: count}
    forge.finish()


def l2_table_counted_65535_times(path: Path) -> None:
    """As many entries as a refcount can say lead to one L2 table of zero clusters: amending it down expands them all."""
    forge = Forge(path, size=65535 * 512 * MiB)
    zero = forge.put(bytes(forge.cluster_size))
    l2 = forge.table([zero | layout.FLAG_ZERO], times=forge.cluster_size // 8)
    forge.l1([l2], times=65535)
    forge.counts = {zero: 65535, l2: 65535}
    forge.finish()


def empty_l1_table(path: Path) -> None:
    """A disk of 2 PiB without data."""
    forge = Forge(path, size=(4 << 20) * 512 * MiB)
    forge.fields |= {"l1_table_offset": forge.place(32 * MiB), "l1_size": 4 << 20}
    forge.finish()


def largest_disk(path: Path) -> None:
    """A disk of almost 8 EiB without data, in the largest clusters that there are."""
    forge = Forge(path, size=(1 << 61), cluster_bits=21)
    forge.fields |= {"l1_table_offset": forge.place(32 * MiB), "l1_size": 4 << 20}
    forge.finish()


def tables_in_a_hole(path: Path) -> None:
    """Entries of the L1 table lead to 4,096 L2 tables that lie in a hole of the file."""
    forge = Forge(path, size=4096 * 512 * MiB)
    first = forge.place(4096 * forge.cluster_size)
    forge.l1([first + n * forge.cluster_size | COPIED for n in range(4096)])
    forge.finish()


def zero_clusters_everywhere(path: Path) -> None:
    """One L2 table of zero clusters without data, 65,535 times."""
    forge = Forge(path, size=65535 * 512 * MiB)
    l2 = forge.table([layout.FLAG_ZERO], times=forge.cluster_size // 8)
    forge.l1([l2], times=65535)
    forge.counts = {l2: 65535}
    forge.finish()


def alternating_extents(path: Path) -> None:
    """Every second cluster of 512 bytes is data: a map of 32 million extents."""
    forge = Forge(path, size=(1 << 19) * 32 * KiB, cluster_bits=9)
    data = forge.put(b"x" * 512)
    l2 = forge.table([data, 0], times=32)
    forge.l1([l2], times=1 << 19)
    forge.counts = {data: 65535, l2: 65535}
    forge.finish()


def one_refcount_block_everywhere(path: Path) -> None:
    """All the entries of the largest refcount table lead to one block."""
    forge = Forge(path, size=512 * MiB)
    forge.l1([0])
    block = forge.put(b"\0\1" * (forge.cluster_size // 2))
    forge.fields |= {"refcount_table_offset": forge.table([block], times=1 << 20), "refcount_table_clusters": 128}
    forge.finish()


def _snapshot(l1: int, l1_size: int, number: int, *, size: int, id_length: int = 0, name_length: int = 0) -> bytes:
    name = b"%d" % number
    ident = name.ljust(id_length, b"i")
    name = name.ljust(name_length, b"n")
    head = struct.pack(layout.SNAPSHOT_ENTRY_FORMAT, l1, l1_size, len(ident), len(name), number, 0, 0, 0, 16)
    entry = head + struct.pack(">QQ", 0, size) + ident + name
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def snapshots_that_share_an_l1_table(path: Path) -> None:
    """65,536 snapshots of one L1 table of 32 MiB, whose entries lead to one L2 table."""
    forge = Forge(path, size=(4 << 20) * 512 * MiB)
    data = forge.put(b"x" * forge.cluster_size)
    l2 = forge.table([data], times=forge.cluster_size // 8)
    forge.l1([l2], times=4 << 20)
    one = [_snapshot(forge.fields["l1_table_offset"], 4 << 20, n, size=forge.fields["size"]) for n in range(65536)]
    forge.fields |= {"snapshots_offset": forge.put(b"".join(one)), "nb_snapshots": 65536}
    forge.counts = {data: 65535, l2: 65535}
    forge.finish()


def many_snapshots(path: Path) -> None:
    """65,536 snapshots, each of them in order, of L1 tables of one cluster."""
    forge = Forge(path, size=1 * MiB, cluster_bits=9)
    forge.l1([0] * 32)
    first = forge.place(65536 * 512)
    one = [_snapshot(first + 512 * n, 32, n, size=1 * MiB) for n in range(65536)]
    forge.fields |= {"snapshots_offset": forge.put(b"".join(one)), "nb_snapshots": 65536}
    forge.finish()


def snapshots_with_long_names(path: Path) -> None:
    """Names and ids of 65,535 bytes: 400 of them are a table of 52 MiB, which is just allowed."""
    forge = Forge(path, size=1 * MiB)
    forge.l1([0])
    one = [_snapshot(forge.fields["l1_table_offset"], 1, n, size=MiB, id_length=65535, name_length=65535) for n in range(400)]
    forge.fields |= {"snapshots_offset": forge.put(b"".join(one)), "nb_snapshots": 400}
    forge.finish()


def _bitmap(table: int, entries: int, name: bytes, *, granularity_bits: int, flags: int = 0) -> bytes:
    entry = struct.pack(layout.BITMAP_ENTRY_FORMAT, table, entries, flags, 1, granularity_bits, len(name), 0) + name
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def _with_bitmaps(forge: Forge, directory: bytes, count: int) -> None:
    at = forge.put(directory)
    forge.fields["autoclear_features"] = layout.AUTOCLEAR_BITMAPS
    data = struct.pack(layout.BITMAPS_EXTENSION_FORMAT, count, 0, len(directory), at)
    forge.extensions.append((layout.EXTENSION_BITMAPS, data))


def many_bitmaps(path: Path) -> None:
    """65,535 bitmaps, each with a table of its own."""
    forge = Forge(path, size=1 * MiB, cluster_bits=9)
    forge.l1([0] * 32)
    first = forge.place(65535 * 512)
    one = [_bitmap(first + 512 * n, 1, b"%d" % n, granularity_bits=16) for n in range(65535)]
    _with_bitmaps(forge, b"".join(one), 65535)
    forge.finish()


def bitmaps_that_share_a_table(path: Path) -> None:
    """65,535 bitmaps with one table of 2**13 entries, all of one cluster: half a GiB each."""
    forge = Forge(path, size=(1 << 32) * 512)
    forge.fields |= {"l1_table_offset": forge.place(4096 * 8), "l1_size": 4096}
    data = forge.put(b"\xff" * forge.cluster_size)
    table = forge.table([data], times=1 << 13)
    one = [_bitmap(table, 1 << 13, b"%d" % n, granularity_bits=9) for n in range(65535)]
    _with_bitmaps(forge, b"".join(one), 65535)
    forge.counts = {data: 65535, table: 65535}
    forge.finish()


def bitmap_of_half_a_gigabyte(path: Path) -> None:
    """Two bitmaps of 512 MiB, all of whose bits are set, which takes two entries of a table for each."""
    forge = Forge(path, size=(1 << 32) * 512, cluster_bits=21)
    forge.l1([0] * 4)
    table = forge.table([layout.BITMAP_TABLE_ALL_ONES], times=256)
    other = forge.table([layout.BITMAP_TABLE_ALL_ONES], times=256)
    one = [_bitmap(at, 256, name, granularity_bits=9, flags=2) for at, name in ((table, b"first"), (other, b"second"))]
    _with_bitmaps(forge, b"".join(one), 2)
    forge.finish()


def many_extensions(path: Path) -> None:
    """A header cluster of 2 MiB full of empty extensions that nobody knows."""
    forge = Forge(path, size=1 * MiB, cluster_bits=21)
    forge.l1([0])
    forge.extensions = [(0x12345678, b"")] * ((2 * MiB - 104) // 8 - 1)
    forge.finish()


def long_feature_table(path: Path) -> None:
    """Names of 43,000 features, and a bit that is one of them."""
    forge = Forge(path, size=1 * MiB, cluster_bits=21)
    forge.l1([0])
    forge.extensions = [(layout.EXTENSION_FEATURE_NAMES, (b"\0\x2a" + b"n" * 46) * 43000)]
    forge.fields["incompatible_features"] = 1 << 42
    forge.finish()


def _compressed(path: Path, stored: bytes, *, cluster_bits: int = 21, zstd: bool = False, tables: int = 1) -> None:
    """Every cluster of the disk is compressed, and leads to the same stored bytes."""
    cluster = 1 << cluster_bits
    per_table = cluster // 8
    features = layout.INCOMPATIBLE_COMPRESSION_TYPE if zstd else 0
    forge = Forge(path, size=per_table * cluster * tables, cluster_bits=cluster_bits, features=features)
    if zstd:
        forge.fields["header_length"] = 112
        forge.compression = layout.COMPRESSION_ZSTD
    at = forge.put(stored)
    sectors = (at % 512 + len(stored) - 1) // 512
    entry = COMPRESSED | sectors << layout.compressed_offset_bits(cluster_bits) | at
    l2 = forge.table([entry], times=per_table)
    forge.l1([l2], times=tables)
    forge.counts = {at: 65535, l2: tables}
    forge.finish()


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def deflate_bomb(path: Path) -> None:
    """Two KiB become a cluster of 2 MiB, in each of 262,144 clusters."""
    _compressed(path, _deflated(b"x" * (2 * MiB)))


def deflate_beyond_the_cluster(path: Path) -> None:
    """What is stored for a cluster of 64 KiB goes on for 64 MiB."""
    _compressed(path, _deflated(bytes(64 * MiB)), cluster_bits=16)


def deflate_without_end(path: Path) -> None:
    """Stored blocks of no bytes, one after the other: 2 MiB of them give nothing."""
    _compressed(path, b"\0\0\0\xff\xff" * (2 * MiB // 5))


def zstd_bomb(path: Path) -> None:
    """A hundred bytes become a cluster of 2 MiB, in each of 262,144 clusters."""
    import zstandard

    _compressed(path, zstandard.ZstdCompressor(19).compress(b"x" * (2 * MiB)), zstd=True)


def zstd_window(path: Path) -> None:
    """A frame that wants a window of 2 GiB to be decompressed."""
    _compressed(path, b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x02\x00\x10x", zstd=True, cluster_bits=16)


def zstd_content_size(path: Path) -> None:
    """A frame that says it holds 2**63 bytes."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 63).to_bytes(8, "little") + b"\x03\x00\x10x"
    _compressed(path, frame, zstd=True, cluster_bits=16)


def zstd_frames_without_end(path: Path) -> None:
    """Skippable frames one after the other."""
    _compressed(path, b"\x50\x2a\x4d\x18\x00\x00\x00\x00" * (2 * MiB // 8), zstd=True)


def zstd_beyond_the_cluster(path: Path) -> None:
    """What is stored for a cluster of 64 KiB goes on for 64 MiB."""
    import zstandard

    _compressed(path, zstandard.ZstdCompressor(19).compress(bytes(64 * MiB)), zstd=True, cluster_bits=16)


def sparse_terabyte(path: Path) -> None:
    """A file of 1 TiB, all of it a hole, in which nothing is counted: a repair makes the counts anew."""
    forge = Forge(path, size=512 * MiB)
    forge.l1([0])
    forge.finish(length=1 * TiB)
    with path.open("r+b") as file:  # the refcount block is lost
        file.seek(forge.fields["refcount_table_offset"])
        file.write(bytes(8))


def sparse_file_of_small_clusters(path: Path) -> None:
    """A file of 1 TiB, all of it a hole, in clusters of 512 bytes: two thousand million of them."""
    forge = Forge(path, size=1 * MiB, cluster_bits=9)
    forge.l1([0] * 32)
    forge.finish(length=1 * TiB)


def sparse_file_with_data_at_its_end(path: Path) -> None:
    """A file of 1 TiB of which the first and the last cluster hold data that nobody counts."""
    forge = Forge(path, size=512 * MiB)
    l2 = forge.table([COPIED | 1 * TiB - 64 * KiB, COPIED | 512 * GiB])
    forge.l1([l2 | COPIED])
    forge.finish(length=1 * TiB)


BOMBS: Final[dict[str, Bomb]] = {
    bomb.__name__.replace("_", " "): bomb
    for bomb in (
        one_l2_table_everywhere,
        l2_table_counted_65535_times,
        empty_l1_table,
        largest_disk,
        tables_in_a_hole,
        zero_clusters_everywhere,
        alternating_extents,
        one_refcount_block_everywhere,
        snapshots_that_share_an_l1_table,
        many_snapshots,
        snapshots_with_long_names,
        many_bitmaps,
        bitmaps_that_share_a_table,
        bitmap_of_half_a_gigabyte,
        many_extensions,
        long_feature_table,
        deflate_bomb,
        deflate_beyond_the_cluster,
        deflate_without_end,
        zstd_bomb,
        zstd_window,
        zstd_content_size,
        zstd_frames_without_end,
        zstd_beyond_the_cluster,
        sparse_terabyte,
        sparse_file_of_small_clusters,
        sparse_file_with_data_at_its_end,
    )
}

_WHOLE_DISK: Final = ("convert to raw", "convert to qcow2", "compare")
ENDLESS: Final[dict[str, tuple[str, ...]]] = {
    "deflate bomb": _WHOLE_DISK,
    "zstd bomb": _WHOLE_DISK,
}
"""What is not asked of a bomb: to decompress all of a disk whose data is as large as it says is what those commands are for."""


def main() -> None:
    import sys
    import tempfile

    from tests.hostile.commands import COMMANDS, IMAGE, Trial
    from tests.hostile.runner import Runner

    name, *commands = sys.argv[1:]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "trial")
        folder.mkdir()
        BOMBS[name](folder / IMAGE)
        runner = Runner()
        trial = Trial(runner, folder, name)
        trial.judge()
        for command in commands or COMMANDS:
            print(trial.run(command))
        runner.close()


if __name__ == "__main__":
    main()
