"""Writes qcow2 images of any mapping within seconds, so that neither program under test has made what it is measured with.

Version 3, 16-bit refcounts.  The data clusters are holes of the file unless they are filled: an image of a hundred thousand
clusters takes as much of the disk as its metadata.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_COPIED = np.uint64(1 << 63)
_ENTRY_BYTES = 8
_REFCOUNT_BYTES = 2
_HEADER_BYTES = 104
_BACKING_FORMAT = 0xE2792ACA


def write_image(
    path: Path,
    size: int,
    guest_clusters: NDArray[np.uint64],
    *,
    cluster_bits: int = 16,
    backing: str | None = None,
    fill: Iterable[bytes] = (),
) -> None:
    """Make an image of `size` bytes in which the clusters with the numbers `guest_clusters` are mapped, each to the next
    place in the file, in the order given.

    `backing` is the name of a qcow2 image below.  `fill` is what is written into the data clusters, from the first on.
    """
    cluster = 1 << cluster_bits
    shift = np.uint64(cluster_bits)
    per_table = cluster // _ENTRY_BYTES
    l1_entries = _ceil(size, cluster * per_table)
    l1_clusters = max(1, _ceil(l1_entries * _ENTRY_BYTES, cluster))
    table_of = guest_clusters // np.uint64(per_table)
    tables = np.unique(table_of)
    fixed = 1 + l1_clusters + len(tables) + len(guest_clusters)
    blocks, reftable_clusters = _refcount_clusters(fixed, cluster)

    reftable_at = 1 + l1_clusters
    blocks_at = reftable_at + reftable_clusters
    tables_at = blocks_at + blocks
    data_at = tables_at + len(tables)
    end = data_at + len(guest_clusters)

    l1 = np.zeros(l1_entries, ">u8")
    l1[tables] = (np.arange(tables_at, data_at, dtype=np.uint64) << shift) | _COPIED
    l2 = np.zeros((len(tables), per_table), ">u8")
    row = np.searchsorted(tables, table_of)
    l2[row, guest_clusters % np.uint64(per_table)] = (np.arange(data_at, end, dtype=np.uint64) << shift) | _COPIED
    reftable = (np.arange(blocks_at, tables_at, dtype=np.uint64) << shift).astype(">u8")
    with path.open("wb") as file:
        file.truncate(end * cluster)
        file.write(_header(size, cluster_bits, l1_entries, reftable_at, reftable_clusters, backing))
        for place, table in ((1, l1), (reftable_at, reftable), (blocks_at, np.ones(end, ">u2")), (tables_at, l2)):
            file.seek(place * cluster)
            file.write(table.data if table.size else b"")
        file.seek(data_at * cluster)
        for data in fill:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _refcount_clusters(counted: int, cluster: int) -> tuple[int, int]:
    """(blocks, clusters of the table) that count `counted` clusters and themselves."""
    blocks = table = 0
    while True:
        needed = _ceil(counted + blocks + table, cluster // _REFCOUNT_BYTES)
        if needed == blocks:
            return blocks, table
        blocks, table = needed, _ceil(needed * _ENTRY_BYTES, cluster)


def _header(
    size: int, cluster_bits: int, l1_entries: int, reftable_at: int, reftable_clusters: int, backing: str | None
) -> bytes:
    name = (backing or "").encode()
    extension = struct.pack(">II8s", _BACKING_FORMAT, 5, b"qcow2") if name else b""
    after = extension + bytes(8)
    cluster = 1 << cluster_bits
    fields = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,  # version
        _HEADER_BYTES + len(after) if name else 0,
        len(name),
        cluster_bits,
        size,
        0,  # not encrypted
        l1_entries,
        cluster,  # the L1 table stands behind the header
        reftable_at * cluster,
        reftable_clusters,
        0,  # snapshots
        0,
        0,  # features: incompatible, compatible, autoclear
        0,
        0,
        4,  # refcounts of 2**4 bits
        _HEADER_BYTES,
    )
    return fields + after + name
