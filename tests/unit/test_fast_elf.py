"""Object code brought into the process without LLVM: it does the same, and what is not simple is left to LLVM."""

from __future__ import annotations

import ctypes
import platform
from array import array
from typing import Any

import pytest

from blocklib._fast import compiler, elf
from blocklib._fast.pointer import Pointer

pytestmark = pytest.mark.skipif(elf.processor() is None, reason="object code is linked by LLVM on this system")


def _fill(values: Any, n: int, value: int) -> int:
    """Kernels become calls of memset, and of C functions that they name."""
    for index in range(n):
        values[index] = value
    pid: int = getpid()
    return pid


getpid = compiler.External("getpid", "i32", (), lambda: 0)
SOURCE = compiler.Source(_fill, "i64", ("u8*", "i64", "i64"), holds_lock=False)


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return compiler.compile_sources({"fill": SOURCE}, {})


@pytest.fixture
def llvm_is_used(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Not empty once it is."""
    used: list[object] = []
    linker = compiler.linker

    def watched() -> Any:
        used.append(linker())
        return used[-1]

    monkeypatch.setattr(compiler, "linker", watched)
    return used


def test_linked_code_runs(codes: dict[str, bytes], llvm_is_used: list[object]) -> None:
    kernel = compiler.link(codes, {"fill": SOURCE})["fill"]
    values = array("B", bytes(1000))
    process = ctypes.CDLL(None).getpid()
    assert kernel(Pointer(values, "B", writable=True), 999, 7) == process
    assert values.tolist() == [7] * 999 + [0]
    assert not llvm_is_used


def test_code_with_other_relocations_is_left_to_llvm(
    codes: dict[str, bytes], llvm_is_used: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elf, "_ABSOLUTE_64", 99)
    kernel = compiler.link(codes, {"fill": SOURCE})["fill"]
    values = array("B", bytes(8))
    assert kernel(Pointer(values, "B", writable=True), 8, 1)
    assert values.tolist() == [1] * 8
    assert llvm_is_used


@pytest.mark.parametrize(
    ("place", "damage"),
    [(4, b"\1"), (5, b"\2"), (16, b"\2"), (18, b"\xb7"), (40, b"\xff\xff\xff\xff")],
    ids=["32-bit", "big-endian", "a program", "another processor", "no sections"],
)
def test_other_files_are_refused(codes: dict[str, bytes], place: int, damage: bytes) -> None:
    (code,) = codes.values()
    damaged = bytearray(code)
    damaged[place : place + len(damage)] = damage
    with pytest.raises(elf.UnsupportedError):
        elf.load([bytes(damaged)])


def test_a_function_that_is_nowhere_is_refused(codes: dict[str, bytes]) -> None:
    (code,) = codes.values()
    assert b"getpid\0" in code
    with pytest.raises(elf.UnsupportedError, match="getpix"):
        elf.load([code.replace(b"getpid\0", b"getpix\0")])


def test_other_systems_use_llvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elf, "_processor", "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert elf.processor() is None
    assert compiler.needs_llvm() == (compiler._linker is None)
