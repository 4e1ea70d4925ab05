"""Object code for x86-64 Linux brought into the process without LLVM, whose loading costs a dozen times as much.

Kernels are compiled for the large code model: all that is left to do is to give every section a place and to write absolute
addresses.  Whatever is not as simple as that is refused, and left to LLVM.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterable
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QQq")
_IDENTITY: Final = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
_RELOCATABLE: Final = 1
_X86_64: Final = 62
_SYMBOLS, _RELOCATIONS, _EMPTY, _OTHER_RELOCATIONS = 2, 4, 8, 9
_WRITABLE, _ALLOCATED, _EXECUTABLE = 1, 2, 4
_UNDEFINED, _ABSOLUTE, _COMMON, _LARGE_COMMON = 0, 0xFFF1, 0xFFF2, 0xFF02
_ABSOLUTE_64: Final = 1
_UNUSED: Final = (b".eh_frame",)
"""For exceptions, which kernels do not raise."""
_WORD: Final = 8


class UnsupportedError(Exception):
    """The object code needs more than is done here."""


class _Section(NamedTuple):
    name: bytes
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


_held: list[tuple[mmap.mmap, object]] = []
"""Memory that kernels are in: for as long as the process lives."""


_processor: str | None = ""


def processor() -> str | None:
    """What the processor can do, in words of its own; None where object code is not brought in here."""
    global _processor
    if _processor == "":
        _processor = _find_processor()
    return _processor


def _find_processor() -> str | None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize >> 32 == 0:
        return None
    try:
        with open("/proc/cpuinfo", "rb") as file:
            text = file.read(1 << 13)
    except OSError:
        return None
    lines = [line for line in text.split(b"\n\n", 1)[0].splitlines() if line.split(b"\t")[0] in (b"flags", b"model name")]
    return b"\n".join(lines).decode(errors="replace") if len(lines) > 1 else None


def load(codes: Iterable[bytes]) -> dict[str, int]:
    """Bring relocatable files into the process; the addresses of the functions in them.

    Raises UnsupportedError, and OSError where memory cannot be made executable.
    """
    found: dict[str, int] = {}
    for code in codes:
        found.update(_Object(code).load())
    return found


class _Object:
    def __init__(self, code: bytes) -> None:
        self._code = code
        self._addresses: dict[int, int] = {}
        try:
            identity, kind, machine, _v, _e, _p, table, _f, _s, _ps, _pn, _size, n, names = _HEADER.unpack_from(code)
            if not identity.startswith(_IDENTITY) or (kind, machine) != (_RELOCATABLE, _X86_64):
                raise UnsupportedError("no relocatable file for x86-64")
            raw = [_SECTION.unpack_from(code, table + index * _SECTION.size) for index in range(n)]
            texts = raw[names][4]
            self._sections = [
                _Section(self._text(texts + name), type, flags, offset, size, link, info, alignment)
                for name, type, flags, _address, offset, size, link, info, alignment, _entry in raw
            ]
            self._symbols = next(section for section in self._sections if section.type == _SYMBOLS)
        except (struct.error, IndexError, ValueError, StopIteration) as error:
            raise UnsupportedError(f"a damaged file: {error}") from error

    def _text(self, offset: int) -> bytes:
        return self._code[offset : self._code.index(b"\0", offset)]

    def load(self) -> dict[str, int]:
        chosen = [
            (index, section)
            for index, section in enumerate(self._sections)
            if section.flags & _ALLOCATED and section.size and section.name not in _UNUSED
        ]
        commons = self._commons()
        length = sum(section.size + section.alignment for _index, section in chosen) + len(commons) * 2 * _WORD
        for executable in (True, False):
            part = [pair for pair in chosen if bool(pair[1].flags & _EXECUTABLE) == executable]
            if executable:
                code_memory, code_address = self._place(part, length)
            else:
                _memory, address = self._place(part, length)
        for number, symbol in enumerate(commons):  # what numba keeps for the interpreter, which kernels do not use
            self._addresses[-symbol - 1] = address + length - (number + 1) * _WORD
        self._relocate()
        _protect(code_address, len(code_memory))
        return self._functions()

    def _commons(self) -> list[int]:
        commons = []
        for number in range(self._symbols.size // _SYMBOL.size):
            _name, _info, _other, section, _value, size = self._symbol(number)
            if section in (_COMMON, _LARGE_COMMON):
                if size > _WORD:
                    raise UnsupportedError("a large common symbol")
                commons.append(number)
        return commons

    def _place(self, sections: list[tuple[int, _Section]], length: int) -> tuple[mmap.mmap, int]:
        """Copy sections into memory of their own."""
        memory = mmap.mmap(-1, max(length, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = ctypes.c_char.from_buffer(memory)
        _held.append((memory, buffer))
        address = ctypes.addressof(buffer)
        position = 0
        for index, section in sections:
            alignment = max(section.alignment, 1)
            if alignment > mmap.PAGESIZE:
                raise UnsupportedError("a large alignment")
            position = -(-position // alignment) * alignment
            if section.type != _EMPTY:
                memory[position : position + section.size] = self._code[section.offset : section.offset + section.size]
            self._addresses[index] = address + position
            position += section.size
        return memory, address

    def _symbol(self, number: int) -> tuple[int, int, int, int, int, int]:
        if not 0 <= number < self._symbols.size // _SYMBOL.size:
            raise UnsupportedError("no such symbol")
        name, info, other, section, value, size = _SYMBOL.unpack_from(self._code, self._symbols.offset + number * _SYMBOL.size)
        return name, info, other, section, value, size

    def _name(self, offset: int) -> str:
        return self._text(self._sections[self._symbols.link].offset + offset).decode()

    def _address(self, number: int) -> int:
        name, _info, _other, section, value, _size = self._symbol(number)
        if section == _ABSOLUTE:
            return value
        if section in (_COMMON, _LARGE_COMMON):
            return self._addresses[-number - 1]
        if section == _UNDEFINED:
            return _c_function(self._name(name))
        if section not in self._addresses:
            raise UnsupportedError("a symbol in a section that is not loaded")
        return self._addresses[section] + value

    def _relocate(self) -> None:
        for section in self._sections:
            if section.type == _OTHER_RELOCATIONS:
                raise UnsupportedError("relocations of another kind")
            if section.type != _RELOCATIONS or section.info not in self._addresses:
                continue
            base, size = self._addresses[section.info], self._sections[section.info].size
            for at in range(section.offset, section.offset + section.size, _RELOCATION.size):
                offset, info, addend = _RELOCATION.unpack_from(self._code, at)
                if info & 0xFFFFFFFF != _ABSOLUTE_64 or offset + _WORD > size:
                    raise UnsupportedError(f"a relocation of type {info & 0xFFFFFFFF}")
                value = self._address(info >> 32) + addend & 0xFFFF_FFFF_FFFF_FFFF
                ctypes.c_uint64.from_address(base + offset).value = value

    def _functions(self) -> dict[str, int]:
        found = {}
        for number in range(self._symbols.size // _SYMBOL.size):
            name, _info, _other, section, value, _size = self._symbol(number)
            if name and section in self._addresses and self._sections[section].flags & _EXECUTABLE:
                found[self._name(name)] = self._addresses[section] + value
        return found


def _c_function(name: str) -> int:
    """The address of a function of the C library."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        raise UnsupportedError(f"{name} is not there") from None
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address
    return address


def _protect(address: int, length: int) -> None:
    """Make memory executable, and no longer writable."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, length, mmap.PROT_READ | mmap.PROT_EXEC):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
