"""A disk in memory, for tests and benchmarks; in the room of protocols."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from blocklib.buffers import zero_fill
from blocklib.errors import OptionError, ReadOnlyError, UsageError
from blocklib.extents import FLAG_ALLOCATED, FLAG_DATA, FLAG_EOF, FLAG_OFFSET_VALID, FLAG_ZERO, KIND_DATA, KIND_ZERO, Run
from blocklib.node import Node, Preallocation

_CHUNK: Final = 1 << 16


class MemoryNode(Node):
    """Bytes that live as long as the node.  Only chunks of 64 KiB that were written take memory, so size costs nothing.

    With `alignment` it insists on aligned requests, like a device under direct I/O: a tool for testing who sends them.
    """

    driver = "memory"
    is_leaf = True

    def __init__(self, name: str | None, size: int = 0, *, read_only: bool = False, alignment: int = 1) -> None:
        super().__init__(name, None, read_only=read_only)
        self.size = size
        self.request_alignment = alignment
        self.zero_alignment = alignment
        self._chunks: dict[int, bytearray] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        return cls(options.get("node-name"), options.get("size") or 0, read_only=read_only, **extra)

    def abandon(self) -> None:
        self._chunks = {}

    def close(self) -> None:
        self.abandon()

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        with self._lock:
            for view in views:
                self._check_aligned(offset, len(view))
                for index, start, done, n in _pieces(offset, len(view)):
                    chunk = self._chunks.get(index)
                    if chunk is None:
                        zero_fill(view[done : done + n])
                    else:
                        view[done : done + n] = memoryview(chunk)[start : start + n]
                offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        self._check_writable()
        with self._lock:
            for view in views:
                self._check_aligned(offset, len(view))
                for index, start, done, n in _pieces(offset, len(view)):
                    chunk = self._chunks.get(index)
                    if chunk is None:
                        chunk = self._chunks[index] = bytearray(_CHUNK)
                    chunk[start : start + n] = view[done : done + n]
                offset += len(view)
            self.size = max(self.size, offset)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zero; whole chunks give their memory back, `unmap` or not."""
        self._check_writable()
        with self._lock:
            self._zero(offset, length)
            self.size = max(self.size, offset + length)

    def discard_range(self, offset: int, length: int) -> None:
        self._check_writable()
        with self._lock:
            self._zero(offset, length)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self._check_writable()
        if preallocation != "off":
            raise OptionError(
                f"{self.driver}: preallocation {preallocation!r} means nothing in memory",
                option="preallocation",
                driver=self.driver,
                choices=("off",),
            )
        with self._lock:
            last = -(-size // _CHUNK)
            for index in [index for index in self._chunks if index >= last]:
                del self._chunks[index]
            if size < self.size:
                self._zero(size, last * _CHUNK - size)
            self.size = size

    def flush(self) -> None:
        """Nothing to do: what is in memory is as durable as it gets."""

    def resolve(self, offset: int, length: int) -> Run:
        with self._lock:
            if offset >= self.size:
                return KIND_ZERO, None, offset, length, FLAG_ZERO | FLAG_ALLOCATED | FLAG_EOF
            last = min(offset + length, self.size)
            index = offset // _CHUNK
            is_data = index in self._chunks
            if is_data:
                while index in self._chunks:
                    index += 1
                end = index * _CHUNK
            else:
                after = [other for other in self._chunks if other > index]
                end = min(after) * _CHUNK if after else last
            end = min(end, last)
            flags = FLAG_ALLOCATED | FLAG_OFFSET_VALID | (FLAG_DATA if is_data else FLAG_ZERO)
            if end == self.size:
                flags |= FLAG_EOF
            return KIND_DATA if is_data else KIND_ZERO, None, offset, end - offset, flags

    def allocated_size(self) -> int | None:
        with self._lock:
            return len(self._chunks) * _CHUNK

    def _zero(self, offset: int, length: int) -> None:
        """Zero a range, which may be far longer than what is stored."""
        end = offset + length
        first, last = -(-offset // _CHUNK), end // _CHUNK
        if last - first > len(self._chunks):
            covered = [index for index in self._chunks if first <= index < last]
        else:
            covered = [index for index in range(first, last) if index in self._chunks]
        for index in covered:
            del self._chunks[index]
        if first > last:  # inside one chunk
            self._zero_part(offset, end)
        else:
            self._zero_part(offset, first * _CHUNK)
            self._zero_part(last * _CHUNK, end)

    def _zero_part(self, start: int, end: int) -> None:
        """Zero a range inside one chunk."""
        chunk = self._chunks.get(start // _CHUNK)
        if chunk is not None and start < end:
            base = start // _CHUNK * _CHUNK
            chunk[start - base : end - base] = bytes(end - start)

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnlyError(f"{self.name} is open for reading only", node=self.name)

    def _check_aligned(self, offset: int, length: int) -> None:
        if (offset | length) % self.request_alignment:
            raise UsageError(
                f"{self.name}: {length} bytes at {offset} are not aligned to {self.request_alignment}", node=self.name
            )


def _pieces(offset: int, length: int) -> list[tuple[int, int, int, int]]:
    """A range cut at chunks: (chunk, offset in it, offset in the range, length)."""
    pieces = []
    done = 0
    while done < length:
        index, start = divmod(offset + done, _CHUNK)
        n = min(_CHUNK - start, length - done)
        pieces.append((index, start, done, n))
        done += n
    return pieces
