"""Compressed clusters: one guest cluster's bytes as a raw DEFLATE stream or a zstd frame.

Source: ``docs/interop/qcow2.rst``, "Compressed Clusters Descriptor" and the header's compression_type.
"""

from __future__ import annotations

import zlib

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout


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
    try:
        if compression_type == layout.COMPRESSION_ZSTD:
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(data, read_size=len(data)) as reader:
                result = _read_all(reader, cluster_size, zstandard.ZstdError)
        else:
            # QEMU writes with a window of 12 bits; the largest window also reads what other writers made.
            result = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)
    except zlib.error as exc:
        raise _damaged(host_offset, str(exc), node) from exc
    except _StreamError as exc:
        raise _damaged(host_offset, str(exc), node) from exc.__cause__
    if len(result) != cluster_size:
        raise _damaged(host_offset, f"{len(result)} bytes", node)
    return result


class _StreamError(Exception):
    pass


def _read_all(reader: object, length: int, error: type[Exception]) -> bytes:
    """Read up to `length` bytes from a zstd stream; a frame that ends early gives fewer."""
    parts = []
    try:
        while length:
            part: bytes = reader.read(length)  # type: ignore[attr-defined]
            if not part:
                break
            parts.append(part)
            length -= len(part)
    except error as exc:
        raise _StreamError(str(exc)) from exc
    return b"".join(parts)


def _damaged(host_offset: int, found: str, node: str | None) -> ImageCorruptError:
    return ImageCorruptError(
        f"{node}: the compressed cluster at {host_offset:#x} cannot be decompressed: {found}",
        structure="compressed cluster",
        host_offset=host_offset,
        expected="a stream that expands to one cluster",
        found=found,
        node=node,
    )
