"""Compressed clusters: one guest cluster's bytes as a raw DEFLATE stream or a zstd frame.

Source: ``docs/interop/qcow2.rst``, "Compressed Clusters Descriptor" and the header's compression_type.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import deflate, layout
from blocklib.formats.qcow2.deflate import Packed
from blocklib.node import check_level

if TYPE_CHECKING:
    from zstandard import ZstdCompressor, ZstdDecompressor

_DEFAULT_ZSTD_LEVEL: Final = 3
_UNKNOWN_SIZE: Final = -1
"""What zstandard answers for a frame that does not announce its size."""


class Compressor:
    """Compresses clusters of one image; any number of threads may use it.

    `level` None is fast and nearly as small as zlib's level 6.  Raises UsageError for a level that the kind of compression
    does not have.
    """

    def __init__(self, compression_type: int, cluster_size: int, level: int | None = None) -> None:
        self.kind = layout.COMPRESSION_NAMES[compression_type]
        check_level(self.kind, level)
        self.unit = cluster_size
        """Bytes of a cluster: what is compressed begins at a multiple of it, and ends at one or with the disk."""
        self._level = level
        self._ledger = deflate.Ledger()

    def compress(self, data: memoryview) -> Packed:
        """Each cluster of `data` compressed, or None where it does not shrink.

        A cluster that ends early, the disk's last, is filled up with zeroes.
        """
        clusters = self._clusters(data)
        if self._is_balanced:
            piece = deflate.Balanced(clusters, self.unit)
            piece.balance(0, deflate.Tally())
            return piece.streams
        return self._streams(clusters)

    def compress_piece(self, number: int, parts: Sequence[memoryview]) -> list[Packed]:
        """The same for each of `parts`, as a part of more: pieces are numbered from 0 on, and each comes once.

        What one of them saves others may spend.  As long as no more than 64 are in work at a time the streams do not depend
        on which of them is done first.
        """
        clusters = [cluster for part in parts for cluster in self._clusters(part)]
        if self._is_balanced:
            piece = deflate.Balanced(clusters, self.unit)
            self._ledger.note(number, piece.balance(number, self._ledger.before(number)))
            streams = piece.streams
        else:
            streams = self._streams(clusters)
        rest = iter(streams)
        return [list(islice(rest, -(-len(part) // self.unit))) for part in parts]

    @property
    def _is_balanced(self) -> bool:
        return self.kind == "zlib" and self._level is None

    def _clusters(self, data: memoryview) -> list[memoryview]:
        unit = self.unit
        clusters = [data[start : start + unit] for start in range(0, len(data), unit)]
        if clusters and len(clusters[-1]) < unit:
            clusters[-1] = memoryview(bytes(clusters[-1]).ljust(unit, b"\0"))
        return clusters

    def _streams(self, clusters: list[memoryview]) -> Packed:
        level = self._level
        if self.kind == "zstd":
            made: Iterable[bytes] = map(_zstd_compressor(level or _DEFAULT_ZSTD_LEVEL).compress, clusters)
        else:
            assert level is not None
            made = (deflate.deflate(cluster, level) for cluster in clusters)
        return [stream if len(stream) < self.unit else None for stream in made]


def decompress(
    data: bytes | bytearray | memoryview,
    cluster_size: int,
    compression_type: int,
    *,
    host_offset: int,
    node: str | None,
) -> bytes:
    """The `cluster_size` bytes that `data` holds; what follows the stream in its last sector is ignored.

    Never produces more than a cluster.  Raises ImageCorruptError for a damaged or short stream.
    """
    if compression_type == layout.COMPRESSION_ZSTD:
        result = _unzstd(data, cluster_size, host_offset, node)
    else:
        result = _inflate(data, cluster_size, host_offset, node)
    if len(result) != cluster_size:
        raise _damaged(host_offset, f"{len(result)} bytes", node)
    return result


def decompress_all(
    data: memoryview,
    streams: Sequence[tuple[int, int, memoryview]],
    compression_type: int,
    *,
    host_offset: int,
    node: str | None,
) -> None:
    """Fill a cluster from each of `streams`: (where it begins in `data`, its length at most, the cluster).

    `data` lies at `host_offset`.  Raises ImageCorruptError for the first that is damaged.
    """
    for start, length, cluster in streams:
        cluster[:] = decompress(
            data[start : start + length], len(cluster), compression_type, host_offset=host_offset + start, node=node
        )


def _inflate(data: bytes | bytearray | memoryview, cluster_size: int, host_offset: int, node: str | None) -> bytes:
    from isal import igzip_lib

    # QEMU writes with a window of 12 bits; the largest window also reads what other writers made.
    stream = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, zlib.MAX_WBITS)
    try:
        return stream.decompress(data, cluster_size)
    except igzip_lib.error as exc:  # type: ignore[misc]  # the stub says it is an instance
        raise _damaged(host_offset, str(exc), node) from exc


def _unzstd(data: bytes | bytearray | memoryview, cluster_size: int, host_offset: int, node: str | None) -> bytes:
    import zstandard

    try:
        announced = zstandard.frame_content_size(data)
        if announced in (cluster_size, _UNKNOWN_SIZE):
            try:  # in one step, into no more memory than a cluster
                return _zstd_decompressor().decompress(data, max_output_size=cluster_size, allow_extra_data=True)
            except zstandard.ZstdError:
                if announced == cluster_size:
                    raise
        elif announced < cluster_size:
            raise _damaged(host_offset, f"{announced} bytes", node)
        # It may be that the frame holds more: decompressing stops when it has produced a cluster.
        with zstandard.ZstdDecompressor().stream_reader(data, read_size=len(data)) as reader:
            return reader.read(cluster_size)
    except zstandard.ZstdError as exc:
        raise _damaged(host_offset, str(exc), node) from exc


class _Zstd(threading.local):
    """What each thread has of its own: making one takes as long as the work on a cluster."""

    def __init__(self) -> None:
        self.compressors: dict[int, ZstdCompressor] = {}
        self.decompressor: ZstdDecompressor | None = None


_zstd = _Zstd()


def _zstd_compressor(level: int) -> ZstdCompressor:
    made = _zstd.compressors.get(level)
    if made is None:
        import zstandard

        made = _zstd.compressors[level] = zstandard.ZstdCompressor(level=level)
    return made


def _zstd_decompressor() -> ZstdDecompressor:
    made = _zstd.decompressor
    if made is None:
        import zstandard

        made = _zstd.decompressor = zstandard.ZstdDecompressor()
    return made


def _damaged(host_offset: int, found: str, node: str | None) -> ImageCorruptError:
    return ImageCorruptError(
        f"{node}: the compressed cluster at {host_offset:#x} cannot be decompressed: {found}",
        structure="compressed cluster",
        host_offset=host_offset,
        expected="a stream that expands to one cluster",
        found=found,
        node=node,
    )
