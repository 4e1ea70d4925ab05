"""The house rules that can be read from the source: who may import whom, who prints, how long a file may be.

An import counts wherever it stands, inside a function too; only one for the type checker does not: it loads nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "blocklib"
MAX_LINES = 650

# A room may import itself and the rooms of the floors below its own.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"_fast", "errors", "records"}),
    frozenset({"buffers", "crypto", "drivers", "extents", "reports", "requests", "sizes", "throttling"}),
    frozenset({"dirty_bits", "nbd", "options"}),
    frozenset({"copy", "policy"}),
    frozenset({"node", "probe", "tracking"}),
    frozenset({"inspection", "passing"}),
    frozenset({"formats", "protocols", "filters"}),
    frozenset({"plan", "status", "diskfile"}),
    frozenset({"places"}),
    frozenset({"graph"}),
    frozenset({"transactions"}),
    frozenset({"batch", "bitmaps", "snapshots"}),
    frozenset({"disk"}),
    frozenset({"building"}),
    frozenset({"insertion", "opening"}),
    frozenset({"creating"}),
    frozenset({"jobs", "overlays"}),
    frozenset({"verbs"}),
    frozenset({"nbd server"}),
    frozenset({"public face"}),
    frozenset({"cli"}),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Drivers are reached by a table of names, so that a format nobody opens is never loaded.
DRIVER_ROOMS = frozenset({"formats", "protocols", "filters"})
# Bytes and arithmetic only: what lets them be tested and fuzzed without a file.
WITHOUT_IO = ("layout", "header", "header_checks", "header_write", "geometry", "bitmap_directory")
IO_MODULES = frozenset({"fcntl", "io", "mmap", "os", "pathlib", "select", "shutil", "socket", "subprocess", "tempfile"})
IO_ROOMS = frozenset({"node", "protocols", "plan", "graph", "disk"})


class Import(NamedTuple):
    """One module that one file imports, by its full name."""

    file: str
    line: int
    module: str


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
TREES = {name: ast.parse((PACKAGE / name).read_bytes(), name) for name in FILES}


def _is_for_type_checker(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _loaded(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node`, without the blocks that only the type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_for_type_checker(child):
            for other in child.orelse:
                yield other
                yield from _loaded(other)
            continue
        yield child
        yield from _loaded(child)


def _is_module(dotted: str) -> bool:
    path = PACKAGE.parent / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _imports(file: str) -> Iterator[Import]:
    for node in _loaded(TREES[file]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            base = node.module or ""
            for alias in node.names:
                dotted = f"{base}.{alias.name}"
                yield Import(file, node.lineno, dotted if base.startswith("blocklib") and _is_module(dotted) else base)


def _room(module: str) -> str:
    """The room of a module of ours: the first name below the package, or the public face for the package itself.

    NBD's protocol and client lie below the drivers, its server above the disk, and ``blocklib.nbd`` shows both.
    """
    parts = module.split(".")
    if len(parts) == 1 or parts[1:] == ["nbd"]:
        return "public face"
    if parts[1] == "nbd" and parts[2].startswith("server"):
        return "nbd server"
    return "cli" if parts[1] == "__main__" else parts[1]


def _room_of_file(file: str) -> str:
    return _room(("blocklib/" + file).removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def _ours(file: str) -> Iterator[Import]:
    return (found for found in _imports(file) if found.module.split(".")[0] == "blocklib")


def _told(found: list[Import], why: str) -> str:
    return "\n".join(f"blocklib/{one.file}:{one.line} imports {one.module}: {why}" for one in found)


def test_every_room_has_a_floor() -> None:
    rooms = {_room_of_file(file) for file in FILES}
    assert rooms <= FLOOR_OF.keys(), f"no floor for {sorted(rooms - FLOOR_OF.keys())}: give the room a place in FLOORS"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_downstairs(file: str) -> None:
    room = _room_of_file(file)
    wrong = [
        found
        for found in _ours(file)
        if _room(found.module) != room and FLOOR_OF[_room(found.module)] >= FLOOR_OF[room]
    ]
    assert not wrong, _told(wrong, f"not below {room}")


@pytest.mark.parametrize("file", FILES)
def test_drivers_are_reached_by_name_and_not_by_import(file: str) -> None:
    room = _room_of_file(file)
    wrong = [found for found in _ours(file) if _room(found.module) in DRIVER_ROOMS - {room}]
    assert not wrong, _told(wrong, "a driver")


def test_fast_imports_nothing_of_blocklib() -> None:
    wrong = [
        found
        for file in FILES
        if file.startswith("_fast/")
        for found in _ours(file)
        if not found.module.startswith("blocklib._fast")
    ]
    assert not wrong, _told(wrong, "_fast stands alone")


@pytest.mark.parametrize("module", WITHOUT_IO)
def test_qcow2_bytes_and_arithmetic_do_no_io(module: str) -> None:
    file = f"formats/qcow2/{module}.py"
    wrong = [
        found
        for found in _imports(file)
        if found.module.split(".")[0] in IO_MODULES
        or (found.module.startswith("blocklib.") and _room(found.module) in IO_ROOMS)
    ]
    assert not wrong, _told(wrong, "no I/O here")
    names = {node.id for node in ast.walk(TREES[file]) if isinstance(node, ast.Name)}
    assert "open" not in names


@pytest.mark.parametrize("file", [file for file in FILES if _room_of_file(file) != "cli"])
def test_only_the_command_line_prints_and_reads_the_environment(file: str) -> None:
    forbidden = {"os.environ", "os.environb", "os.getenv", "sys.argv", "sys.stdin", "sys.stdout", "sys.stderr"}
    if file == "_fast/kernel.py":
        forbidden.remove("os.environ")  # numba's switch is obeyed where numba is not loaded: see `kernel.is_off`
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in forbidden, f"blocklib/{file}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Name):
            assert node.id not in ("print", "input"), f"blocklib/{file}:{node.lineno}: {node.id}"


@pytest.mark.parametrize("file", FILES)
def test_a_file_stays_readable(file: str) -> None:
    lines = len((PACKAGE / file).read_text().splitlines())
    assert lines <= MAX_LINES, f"blocklib/{file} has {lines} lines, {MAX_LINES} are allowed: split it by noun"


def test_exports_are_sorted_and_exist() -> None:
    import blocklib

    assert list(blocklib.__all__) == sorted(set(blocklib.__all__))
    for name in blocklib.__all__:
        assert hasattr(blocklib, name), name
