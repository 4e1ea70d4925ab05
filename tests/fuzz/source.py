"""From the bytes of an input to what a target does: every input means something, and a byte more or less changes little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

_T = TypeVar("_T")

EXTREMES: Final = (
    0,
    1,
    511,
    512,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    (1 << 56) - 512,
    1 << 56,
    1 << 61,
    1 << 62,
    (1 << 63) - 512,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 512,
    (1 << 64) - 1,
)


class Source:
    """Reads an input from its start; behind its end there are zeroes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        return self._at >= len(self._data)

    def take(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        self._at += length
        return part.ljust(length, b"\0")

    def rest(self) -> bytes:
        part = self._data[self._at :]
        self._at = len(self._data)
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def short(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def chosen(self, items: Sequence[_T]) -> _T:
        return items[(self.byte() if len(items) <= 256 else self.short()) % len(items)]

    def number(self) -> int:
        """Any number of 64 bits, small and extreme ones mostly."""
        kind = self.byte()
        if kind < 128:
            return kind
        if kind < 192:
            return EXTREMES[(kind - 128) % len(EXTREMES)]
        if kind < 224:
            return self.short()
        return int.from_bytes(self.take(8), "big")
