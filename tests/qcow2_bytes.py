"""A small qcow2 image in memory, built and damaged byte by byte: what tests of the check and the repair work on.

The image is laid out by hand, with nothing of what is tested: header, refcount table, refcount blocks, L1 table, L2 tables,
data; every cluster up to the end of the file is in use and has refcount 1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from blocklib.formats.qcow2.header import Header, parse_header
from blocklib.policy import Limits

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
DIRTY: Final = 1
CORRUPT: Final = 2


class Qcow2Bytes:
    """The file and the places in it.  It is what a check and a repair take: `read`, `write`, `flush`, `size`.

    `log` holds every write as (offset, bytes) and every flush as None.
    """

    def __init__(
        self,
        *,
        cluster_bits: int = 12,
        refcount_order: int = 4,
        version: int = 3,
        n_l2: int = 1,
        n_data: int = 6,
        features: int = 0,
    ) -> None:
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.width = 1 << refcount_order
        self.per_block = self.cluster_size * 8 // self.width
        n_others = 3 + n_l2 + n_data
        n_blocks = 1
        while n_blocks * self.per_block < n_others + n_blocks:
            n_blocks += 1
        self.table = self.cluster_size
        self.blocks = [(2 + i) * self.cluster_size for i in range(n_blocks)]
        self.l1 = (2 + n_blocks) * self.cluster_size
        self.l2 = [self.l1 + (1 + i) * self.cluster_size for i in range(n_l2)]
        first_data = self.l2[-1] + self.cluster_size
        self.data = [first_data + i * self.cluster_size for i in range(n_data)]
        self.n_clusters = n_others + n_blocks
        self.bytes = bytearray(self.n_clusters * self.cluster_size)
        self.log: list[tuple[int, bytes] | None] = []
        self._write_header(version, n_l2, refcount_order, features)
        for i, block in enumerate(self.blocks):
            self.set_entry(self.table + 8 * i, block)
        for cluster in range(self.n_clusters):
            self.set_refcount(cluster, 1)
        for i, l2 in enumerate(self.l2):
            self.set_entry(self.l1 + 8 * i, l2 | COPIED)
        for i, data in enumerate(self.data):
            self.set_entry(self.l2_entry(i), data | COPIED)

    def _write_header(self, version: int, n_l2: int, refcount_order: int, features: int) -> None:
        size = n_l2 * self.cluster_size * self.cluster_size // 8
        fields = (b"QFI\xfb", version, 0, 0, self.cluster_bits, size, 0, n_l2, self.l1, self.table, 1, 0, 0)
        header = struct.pack(">4sIQIIQIIQQIIQ", *fields)
        if version >= 3:
            header += struct.pack(">QQQII", features, 0, 0, refcount_order, 104)
        self.bytes[: len(header)] = header

    # What the code under test sees ------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return len(self.bytes)

    def read(self, offset: int, view: memoryview) -> None:
        part = self.bytes[offset : offset + len(view)]
        view[: len(part)] = part
        view[len(part) :] = bytes(len(view) - len(part))

    def write(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        data = b"".join(bytes(view) for view in views)
        self.log.append((offset, data))
        self.apply(offset, data)

    def flush(self) -> None:
        self.log.append(None)

    # Looking and damaging ---------------------------------------------------------------------------------------------

    def header(self) -> Header:
        return parse_header(bytes(self.bytes[: self.cluster_size]), limits=Limits(), for_check=True)

    def apply(self, offset: int, data: bytes) -> None:
        self.bytes.extend(bytes(max(0, offset + len(data) - len(self.bytes))))
        self.bytes[offset : offset + len(data)] = data

    def grow(self, n_clusters: int) -> int:
        """Make the file longer; the host offset of the first new cluster."""
        end = len(self.bytes)
        self.bytes.extend(bytes(n_clusters * self.cluster_size))
        return end

    def entry(self, host_offset: int) -> int:
        return int.from_bytes(self.bytes[host_offset : host_offset + 8], "big")

    def set_entry(self, host_offset: int, value: int) -> None:
        self.bytes[host_offset : host_offset + 8] = value.to_bytes(8, "big")

    def l2_entry(self, index: int, table: int = 0) -> int:
        """Where an L2 entry is."""
        return self.l2[table] + 8 * index

    def refcount(self, cluster: int) -> int:
        bits, place = self._refcount_place(cluster)
        return bits >> place & ((1 << self.width) - 1)

    def set_refcount(self, cluster: int, count: int) -> None:
        bits, place = self._refcount_place(cluster)
        bits = bits & ~(((1 << self.width) - 1) << place) | count << place
        start, length = self._refcount_bytes(cluster)
        self.bytes[start : start + length] = bits.to_bytes(length, "big")

    def _refcount_bytes(self, cluster: int) -> tuple[int, int]:
        block = self.entry(self.table + 8 * (cluster // self.per_block))
        return block + cluster % self.per_block * self.width // 8, max(1, self.width // 8)

    def _refcount_place(self, cluster: int) -> tuple[int, int]:
        start, length = self._refcount_bytes(cluster)
        return int.from_bytes(self.bytes[start : start + length], "big"), cluster * self.width % 8 if self.width < 8 else 0

    @property
    def features(self) -> int:
        return self.entry(72)

    def set_features(self, features: int) -> None:
        self.set_entry(72, features)
