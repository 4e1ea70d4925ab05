"""What starting costs: a small image must be opened without the heavy packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = frozenset({"asyncio", "dataclasses", "inspect", "llvmlite", "numba", "numpy"})
"""The large ones each take longer to import than `blocklib info` takes in all; see `blocklib.records` for the others."""


def _imported_by(*arguments: str) -> set[str]:
    """The top-level packages that `python ARGUMENTS` imports, by the interpreter's own account (-X importtime)."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:") and line.count("|") == 2]
    modules = {line.rsplit("|", 1)[1].strip() for line in lines}
    assert "blocklib" in modules
    return {module.split(".")[0] for module in modules}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "small.qcow2"
    _imported_by("-m", "blocklib", "create", "-q", "-f", "qcow2", str(path), "64M")
    return path


def test_importing_the_library_imports_no_heavy_package() -> None:
    assert not HEAVY & _imported_by("-c", "import blocklib")


def test_create_imports_no_heavy_package(tmp_path: Path) -> None:
    created = _imported_by("-m", "blocklib", "create", "-f", "qcow2", str(tmp_path / "new.qcow2"), "64M")
    assert not HEAVY & created


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["info"], id="info-human"),
        pytest.param(["info", "--output=json"], id="info-json"),
        pytest.param(["info", "--backing-chain"], id="info-chain"),
        pytest.param(["resize", "-f", "qcow2"], id="resize"),
    ],
)
def test_metadata_commands_on_a_small_image_import_no_heavy_package(image: Path, arguments: list[str]) -> None:
    size = ["+1M"] if arguments[0] == "resize" else []
    assert not HEAVY & _imported_by("-m", "blocklib", *arguments, str(image), *size)


def test_snapshots_of_a_small_image_import_no_heavy_package(image: Path) -> None:
    _imported_by("-m", "blocklib", "io", "-c", "write 0 1M", str(image))
    for arguments in (["-c", "x"], ["-l"], ["-a", "x"], ["-d", "x"]):
        assert not HEAVY & _imported_by("-m", "blocklib", "snapshot", *arguments, str(image))


def test_a_short_bench_imports_no_heavy_package(image: Path) -> None:
    for write in ([], ["-w"]):
        assert not HEAVY & _imported_by("-m", "blocklib", "bench", *write, "-c", "100", str(image))


def test_one_read_of_a_small_image_imports_no_heavy_package(image: Path) -> None:
    code = "import sys, blocklib\nwith blocklib.open(sys.argv[1]) as disk: assert disk.read(0, 512) == bytes(512)"
    assert not HEAVY & _imported_by("-c", code, str(image))


def test_inspecting_an_image_imports_no_heavy_package(image: Path) -> None:
    assert not HEAVY & _imported_by("-m", "blocklib", "inspect", "--output=json", str(image))
    assert not HEAVY & _imported_by("-c", "from blocklib import inspect")
