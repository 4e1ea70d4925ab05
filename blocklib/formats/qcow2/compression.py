"""Compressed clusters: one guest cluster's bytes as a raw DEFLATE stream or a zstd frame.

Source: ``docs/interop/qcow2.rst``, "Compressed Clusters Descriptor" and the header's compression_type.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout
from blocklib.node import check_level

if TYPE_CHECKING:
    from zstandard import ZstdDecompressor

DEFLATE_WINDOW_BITS: Final = 12
"""Readers may keep no more than 4 KiB of what they have decompressed: QEMU's inflate is given this window."""
_DEFAULT_ZSTD_LEVEL: Final = 3
_FAST_LEVELS: Final = range(1, 4)
"""DEFLATE levels that ISA-L does, six to ten times faster than zlib, in streams 5 to 11 % larger than those of level 6."""
_MOST_EXCESS: Final = 1.05
"""What the default level may take, by its own estimate, in terms of zlib's level 6, which is what QEMU uses."""
_SAMPLE: Final = 1 << 16
_UNKNOWN_SIZE: Final = -1
"""What zstandard answers for a frame that does not announce its size."""

_per_thread = threading.local()

_OneCluster: TypeAlias = Callable[[memoryview], bytes]


class Compressor:
    """Compresses clusters of one image; any number of threads may use it.

    `level` None is fast and nearly as small as zlib's level 6: ISA-L, and zlib for so many clusters as that takes.  Raises
    UsageError for a level that the kind of compression does not have.
    """

    def __init__(self, compression_type: int, cluster_size: int, level: int | None = None) -> None:
        self.kind = layout.COMPRESSION_NAMES[compression_type]
        check_level(self.kind, level)
        self.unit = cluster_size
        """Bytes of a cluster: what is compressed begins at a multiple of it, and ends at one or with the disk."""
        self._level = level

    def compress(self, data: memoryview) -> list[bytes | None]:
        """Each cluster of `data` compressed, or None where it does not shrink.

        A cluster that ends early, the disk's last, is filled up with zeroes.
        """
        one = self._one_cluster()
        unit = self.unit
        packed: list[bytes | None] = []
        for start in range(0, len(data), unit):
            cluster = data[start : start + unit]
            if len(cluster) < unit:
                cluster = memoryview(bytes(cluster).ljust(unit, b"\0"))
            stream = one(cluster)
            packed.append(stream if len(stream) < unit else None)
        return packed

    def _one_cluster(self) -> _OneCluster:
        """What compresses clusters one after the other, for one thread."""
        level = self._level
        if self.kind == "zstd":
            import zstandard

            return zstandard.ZstdCompressor(level=level or _DEFAULT_ZSTD_LEVEL).compress
        if level is None:
            return _Balanced(self.unit)
        if level in _FAST_LEVELS:
            return lambda cluster: _isal_deflate(cluster, level)
        return lambda cluster: _deflate(cluster, level)


def _deflate(data: memoryview, level: int) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, -DEFLATE_WINDOW_BITS)
    return stream.compress(data) + stream.flush()


def _isal_deflate(data: memoryview, level: int) -> bytes:
    from isal import igzip_lib

    return igzip_lib.compress(
        data, level, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_DEFAULT, hist_bits=DEFLATE_WINDOW_BITS
    )


class _Balanced:
    """Compresses fast, and well whenever the streams so far have become too large for what zlib would have made of them.

    How much smaller zlib is depends on the data.  It is seen where both have compressed the same: at least at the first
    cluster.  The outcome depends on the clusters alone, so that an image does not depend on which thread was faster.
    """

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._made = 0.0
        self._allowed = 0.0
        self._fast = self._good = 0  # bytes of what both have compressed

    def __call__(self, cluster: memoryview) -> bytes:
        stream = _isal_deflate(cluster, 3)
        length = min(len(stream), self._unit)
        if length == self._unit:  # nearly random: zlib could not do much, either
            self._made += length
            self._allowed += _MOST_EXCESS * length
            return stream
        if not self._good and self._unit > _SAMPLE:
            sample = cluster[:_SAMPLE]
            self._see(len(_isal_deflate(sample, 3)), len(_deflate(sample, 6)))
        if self._good:
            allowed = _MOST_EXCESS * length * self._good / self._fast
            if self._made + length <= self._allowed + allowed:
                self._made += length
                self._allowed += allowed
                return stream
        better = _deflate(cluster, 6)
        self._see(length, len(better))
        if len(better) < len(stream):
            stream = better
        self._made += len(stream)
        self._allowed += _MOST_EXCESS * min(len(better), self._unit)
        return stream

    def _see(self, fast: int, good: int) -> None:
        self._fast += fast
        self._good += good


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


def _zstd_decompressor() -> ZstdDecompressor:
    """This thread's own: making one takes as long as decompressing a cluster."""
    made: ZstdDecompressor | None = getattr(_per_thread, "decompressor", None)
    if made is None:
        import zstandard

        made = _per_thread.decompressor = zstandard.ZstdDecompressor()
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
