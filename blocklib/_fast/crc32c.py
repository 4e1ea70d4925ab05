"""CRC-32C, which formats put over their metadata: the definition and the table are crcmod's, the bulk is a kernel's work."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from blocklib._fast.kernel import U64, Family, i64
from blocklib._fast.pointer import Pointer

if TYPE_CHECKING:
    from typing_extensions import Buffer

family = Family(__name__)

_ALL = U64(0xFFFF_FFFF)
_BYTE = U64(0xFF)
_SAVED_PER_KIB: Final = 2000


def crc32c(data: Buffer, value: int = 0) -> int:
    """The CRC-32C of bytes, or with the `value` of what comes before them, that of both together."""
    view = memoryview(data).cast("B")
    assert 0 <= value <= _ALL
    kernel = _crc32c.worth((len(view) >> 10) * _SAVED_PER_KIB)
    if kernel is None:
        return crc32c_definition(view, value)
    return kernel(Pointer(view, "B"), len(view), Pointer(_tables(), "Q"), value)


def crc32c_definition(data: Buffer, value: int = 0) -> int:
    """What `crc32c` answers."""
    return _crcmod()[0](data, value)


@cache
def _crcmod() -> tuple[Callable[[Any, int], int], list[int]]:
    """crcmod's function, and its table: for each byte, the remainder of that byte alone."""
    predefined: Any = import_module("crcmod.predefined")
    return predefined.mkPredefinedCrcFun("crc-32c"), list(predefined.PredefinedCrc("crc-32c").table)


@cache
def _tables() -> array[int]:
    """Eight tables of 256: the remainder of a byte with none to seven zeroes behind it."""
    first = _crcmod()[1]
    tables = array("Q", first)
    for index in range(256, 8 * 256):
        before = tables[index - 256]
        tables.append(before >> 8 ^ first[before & 0xFF])
    return tables


@family.helper
def _look_up(tables: Any, number: int, byte: Any) -> Any:
    return tables[number * 256 + i64(byte & _BYTE)]


@family.kernel("u64(u8*, i64, u64*, u64)")
def _crc32c(data: Any, n: int, tables: Any, value: Any) -> Any:
    crc: Any = U64(value) ^ _ALL
    index = 0
    while index + 8 <= n:
        crc ^= U64(data[index]) | (U64(data[index + 1]) << U64(8))
        crc ^= (U64(data[index + 2]) << U64(16)) | (U64(data[index + 3]) << U64(24))
        low = _look_up(tables, 7, crc) ^ _look_up(tables, 6, crc >> U64(8))
        low ^= _look_up(tables, 5, crc >> U64(16)) ^ _look_up(tables, 4, crc >> U64(24))
        high = _look_up(tables, 3, U64(data[index + 4])) ^ _look_up(tables, 2, U64(data[index + 5]))
        high ^= _look_up(tables, 1, U64(data[index + 6])) ^ _look_up(tables, 0, U64(data[index + 7]))
        crc = low ^ high
        index += 8
    while index < n:
        crc = _look_up(tables, 0, crc ^ U64(data[index])) ^ (crc >> U64(8))
        index += 1
    return crc ^ _ALL
