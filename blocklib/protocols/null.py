"""A disk that forgets what is written to it, for benchmarks; in the room of protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from blocklib.buffers import pieces_of, zero_fill
from blocklib.errors import ReadOnlyError
from blocklib.extents import FLAG_ALLOCATED, FLAG_OFFSET_VALID, FLAG_ZERO, KIND_DATA, KIND_ZERO, Run
from blocklib.node import Node

_DEFAULT_SIZE: Final = 1 << 30


class NullNode(Node):
    """Takes every request at once.  Reads leave their buffers as they are unless `read_zeroes`: what they give is not data."""

    driver = "null-co"
    is_leaf = True

    def __init__(
        self, name: str | None, size: int = _DEFAULT_SIZE, *, read_only: bool = False, read_zeroes: bool = False
    ) -> None:
        super().__init__(name, None, read_only=read_only)
        self.size = size
        self.read_zeroes = read_zeroes

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        size = options.get("size")
        return cls(
            options.get("node-name"),
            _DEFAULT_SIZE if size is None else size,
            read_only=read_only,
            read_zeroes=bool(options.get("read-zeroes")),
            **extra,
        )

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        if self.read_zeroes:
            for view in views:
                zero_fill(view)

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        self._reach(offset + pieces_of(views))

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self._reach(offset + length)

    def discard_range(self, offset: int, length: int) -> None:
        self._reach(0)

    def _reach(self, end: int) -> None:
        if self.read_only:
            raise ReadOnlyError(f"{self.name} is open for reading only", node=self.name)
        if end > self.size:
            self.size = end

    def flush(self) -> None:
        """Nothing to do."""

    def resolve(self, offset: int, length: int) -> Run:
        """Zero, or without `read_zeroes` neither zero nor data, as QEMU reports it."""
        if self.read_zeroes:
            return KIND_ZERO, None, offset, length, FLAG_ZERO | FLAG_ALLOCATED | FLAG_OFFSET_VALID
        return KIND_DATA, None, offset, length, FLAG_OFFSET_VALID

    def allocated_size(self) -> int | None:
        return 0
