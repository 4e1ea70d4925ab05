"""Kernels: what may be handed to one, where its object code is kept, and when it is worth loading."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocklib._fast import FAMILIES, compiler, kernel, warm
from blocklib._fast.kernel import Family
from blocklib._fast.pointer import Pointer
from blocklib._fast.store import Store


@pytest.mark.parametrize(
    ("buffer", "typecode"),
    [
        pytest.param(np.zeros(4, dtype=">u8"), "Q", id="big-endian"),
        pytest.param(np.zeros(4, dtype="f8"), "Q", id="floating-point"),
        pytest.param(np.zeros(4, dtype="i8"), "Q", id="signed-for-unsigned"),
        pytest.param(np.zeros(4, dtype="u4"), "Q", id="other-size"),
        pytest.param(np.zeros((4, 4), dtype="u8")[:, 1], "Q", id="not-contiguous"),
        pytest.param(bytes(12), "Q", id="no-whole-number"),
        pytest.param(memoryview(bytes(24))[1:17], "Q", id="not-aligned"),
    ],
)
def test_a_pointer_refuses_memory_of_another_shape(buffer: Any, typecode: str) -> None:
    with pytest.raises(ValueError):
        Pointer(buffer, typecode)


def test_a_pointer_refuses_to_write_into_read_only_memory() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Pointer(bytes(8), "Q", writable=True)


@pytest.mark.parametrize("buffer", [array("Q", [1, 2]), np.array([1, 2], dtype=np.uint64), bytes(16), bytearray(16)])
def test_a_pointer_keeps_its_memory_in_place(buffer: Any) -> None:
    pointer = Pointer(buffer, "Q")
    assert pointer.length == 2
    assert pointer.address % 8 == 0
    if isinstance(buffer, bytearray):
        with pytest.raises(BufferError):
            buffer.extend(bytes(1 << 20))


def test_an_empty_pointer_has_no_memory() -> None:
    assert Pointer(b"", "Q").length == 0


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "package"), "")
    assert store.can_keep()
    assert store.put("one", {"a": b"code", "b": b""})
    assert store.get("one") == {"a": b"code", "b": b""}
    assert store.get("two") is None
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["one"]


@pytest.mark.parametrize("damage", [slice(0, 1), slice(-1, None), slice(30, 31)], ids=["magic", "end", "middle"])
def test_damaged_object_code_is_not_used(tmp_path: Path, damage: slice) -> None:
    store = Store(str(tmp_path), "")
    store.put("one", {"a": b"code" * 20})
    data = bytearray((tmp_path / "one").read_bytes())
    data[damage] = b"\xff"
    (tmp_path / "one").write_bytes(data)
    assert store.get("one") is None
    (tmp_path / "one").write_bytes(data[:40])
    assert store.get("one") is None


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "")
    store.put("one", {"a": b"code"})
    tmp_path.chmod(0o777)
    assert store.get("one") is None
    assert not store.can_keep()
    assert not store.put("two", {})
    tmp_path.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert Store(str(link), "").get("one") is None


def test_the_users_folder_serves_where_the_package_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store(str(tmp_path / "file" / "package"), str(tmp_path / "user"))
    assert store.put("one", {"a": b"code"})
    assert store.get("one") == {"a": b"code"}
    assert (tmp_path / "user").stat().st_mode & 0o777 == 0o700


def _family() -> Family:
    """A family of its own, with the source of the buffers' kernels."""
    from blocklib._fast import buffers

    family = Family(buffers.__name__)
    family.kernel("i64(u64*, i64, i64, i64*)")(buffers._data_switches.function)
    return family


def test_small_work_does_not_load_a_kernel_until_it_has_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    family = _family()
    monkeypatch.setattr(kernel, "tell", lambda text: None)
    monkeypatch.setattr(Store, "get", lambda self, name: None)
    monkeypatch.setattr(Store, "put", lambda self, name, parts: True)
    monkeypatch.setattr("blocklib._fast.FAMILIES", ())
    one = family.kernels["_data_switches"]
    assert one.worth(1000) is None
    assert one.worth(kernel._INVEST_NS // 2) is None
    assert one.worth(kernel._INVEST_NS) is not None
    assert one.worth(0) is not None


def test_a_user_is_told_once_that_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(kernel, "tell", told.append)
    monkeypatch.setattr(Store, "get", lambda self, name: None)
    monkeypatch.setattr(Store, "put", lambda self, name, parts: True)
    monkeypatch.setattr("blocklib._fast.FAMILIES", ())
    family = _family()
    assert family.load() is family.load()
    assert len(told) == 1
    assert "compiling" in told[0]


def test_who_waits_for_the_compiler_gets_the_kernels_of_all_families(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_and_keep(family: Family) -> dict[str, bytes]:
        compiled.append(family.name)
        return {}

    monkeypatch.setattr(kernel, "tell", lambda text: compiled.append("told"))
    monkeypatch.setattr(Store, "get", lambda self, name: None)
    monkeypatch.setattr(Family, "_compile_and_keep", compile_and_keep)
    monkeypatch.setattr(compiler, "link", lambda codes, sources: {})
    _family().load()
    assert compiled[:2] == ["told", "buffers"]
    assert sorted(compiled[1:]) == sorted(FAMILIES)


def test_while_another_thread_compiles_the_definitions_do_the_work() -> None:
    one = _family().kernels["_data_switches"]
    with kernel._loading:
        assert one.worth(1 << 60) is None


def test_where_nothing_can_be_compiled_the_definitions_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(kernel, "tell", told.append)
    monkeypatch.setattr(Store, "get", lambda self, name: None)
    monkeypatch.setattr(compiler, "compile_sources", _no_compiler)
    one = _family().kernels["_data_switches"]
    assert one.worth(1 << 60) is None
    assert one.worth(1 << 60) is None
    assert "no compiler" in told[-1]
    with pytest.raises(RuntimeError):
        one.loaded()


def _no_compiler(*_arguments: object) -> dict[str, bytes]:
    raise RuntimeError("no compiler")


def test_a_kernel_that_could_raise_is_refused() -> None:
    def risky(values: Any, n: int) -> int:
        if n > 3:
            raise ValueError("too many")
        return n

    source = compiler.Source(risky, "i64", ("u64*", "i64"), holds_lock=False)
    with pytest.raises(RuntimeError, match="needs"):
        compiler.compile_sources({"risky": source}, {})


def test_every_family_is_compiled_ahead_and_then_loads_without_numba() -> None:
    warm()
    code = (
        "import sys; from importlib import import_module\n"
        f"for name in {FAMILIES!r}: assert import_module('blocklib._fast.' + name).family.load()\n"
        "assert 'numba' not in sys.modules and 'numpy' not in sys.modules\n"
        "from blocklib._fast import elf\n"
        "assert elf.processor() is None or 'llvmlite.binding' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("value", "runs"), [("1", False), ("01", False), ("0", True), ("", True), ("no", True)])
def test_numbas_switch_turns_off_kernels_that_were_compiled_before(
    value: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm()
    monkeypatch.setenv("NUMBA_DISABLE_JIT", value)
    family = Family("blocklib._fast.buffers")
    one = family.kernel("i64(u64*, i64, i64, i64*)")(lambda words, blocks, words_per_block, out: 0)
    monkeypatch.setattr(family, "_stored", lambda: {"_": b""})
    monkeypatch.setattr(compiler, "link", lambda codes, sources: {one.name: lambda *_arguments: 0})
    assert bool(family.load()) is runs
    assert (one.worth(1 << 60) is not None) is runs
