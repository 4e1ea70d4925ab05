"""Chains that come back to where they began, by whatever name, and chains that never seem to end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import blocklib
from blocklib.errors import BlocklibError
from blocklib.formats.qcow2 import layout
from tests.damage import MiB
from tests.hostile.bombs import Forge
from tests.hostile.commands import IMAGE, ON_LINUX
from tests.hostile.runner import MOST_MEMORY, MOST_SECONDS, SLOWER, Runner

pytestmark = ON_LINUX

DEEP: Final = 10_000
COMMANDS: Final = (
    ("info", "-f", "qcow2", "--backing-chain", IMAGE),
    ("convert", "-f", "qcow2", "-O", "raw", IMAGE, "output"),
    ("map", "-f", "qcow2", IMAGE),
    ("compare", "-f", "qcow2", "-F", "qcow2", IMAGE, IMAGE),
    ("commit", "-f", "qcow2", IMAGE),
    ("io", "-f", "qcow2", "-c", "read 0 4k", IMAGE),
    ("rebase", "-f", "qcow2", "-b", "", IMAGE),
)
ALONE: Final = (
    ("info", "-f", "qcow2", IMAGE),
    ("check", "-f", "qcow2", IMAGE),
    ("rebase", "-u", "-f", "qcow2", "-b", "", IMAGE),
)
"""Commands that look at one image."""


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


def _overlay(path: Path, backing: str) -> None:
    name = backing.encode()
    forge = Forge(path, size=1 * MiB, cluster_bits=12)
    forge.l1([0])
    forge.extensions.append((layout.EXTENSION_BACKING_FORMAT, b"qcow2"))
    forge.fields |= {"backing_file_offset": 1024, "backing_file_size": len(name)}
    forge.put(name, 1024)
    forge.finish()


def _two(folder: Path) -> None:
    _overlay(folder / IMAGE, "other.qcow2")
    _overlay(folder / "other.qcow2", IMAGE)


def _symlink(folder: Path) -> None:
    _overlay(folder / IMAGE, "link.qcow2")
    (folder / "link.qcow2").symlink_to(IMAGE)


def _hard_link(folder: Path) -> None:
    _overlay(folder / IMAGE, "link.qcow2")
    os.link(folder / IMAGE, folder / "link.qcow2")


def _growing(folder: Path) -> None:
    """Each name is one component longer than the last: down/image, down/down/image, ..."""
    _overlay(folder / IMAGE, f"down/{IMAGE}")
    (folder / "down").symlink_to(".")


def _deep(folder: Path) -> None:
    """10,000 images, one below the other."""
    first, second = "00000.qcow2", "00001.qcow2"
    _overlay(folder / first, second)
    content = (folder / first).read_bytes()
    for number in range(DEEP - 1):
        (folder / f"{number:05}.qcow2").write_bytes(content.replace(second.encode(), f"{number + 1:05}.qcow2".encode()))
    blocklib.create(folder / f"{DEEP - 1:05}.qcow2", 1 * MiB, format="qcow2")
    _overlay(folder / IMAGE, first)


CHAINS: Final[dict[str, Callable[[Path], None]]] = {
    "itself": lambda folder: _overlay(folder / IMAGE, IMAGE),
    "itself by its path": lambda folder: _overlay(folder / IMAGE, str(folder / IMAGE)),
    "itself by file:": lambda folder: _overlay(folder / IMAGE, f"file:{folder / IMAGE}"),
    "itself by json:": lambda folder: _overlay(
        folder / IMAGE, f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{folder / IMAGE}"}}}}'
    ),
    "two images": _two,
    "a symbolic link": _symlink,
    "a hard link": _hard_link,
    "a folder that is a link": _growing,
    "10,000 images": _deep,
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_has_no_end_is_an_error_soon_even_where_references_are_allowed(
    runner: Runner, tmp_path: Path, name: str
) -> None:
    CHAINS[name](tmp_path)
    before = (tmp_path / IMAGE).read_bytes()
    for arguments in COMMANDS:
        outcome = runner.run(arguments, tmp_path)
        assert outcome.code not in (0, 99), arguments
        assert outcome.err.startswith("blocklib: "), arguments
        assert len(outcome.err.splitlines()) == 1, arguments
        assert "internal error" not in outcome.err
        assert (outcome.seconds < MOST_SECONDS * SLOWER, outcome.memory < MOST_MEMORY) == (True, True), arguments
        assert (tmp_path / IMAGE).read_bytes() == before
    with pytest.raises(BlocklibError):
        blocklib.open(tmp_path / IMAGE, "r+", format="qcow2", references="allow")


@pytest.mark.parametrize("name", CHAINS)
def test_what_looks_at_one_image_does_not_follow_its_chain(runner: Runner, tmp_path: Path, name: str) -> None:
    CHAINS[name](tmp_path)
    for arguments in ALONE:
        outcome = runner.run(arguments, tmp_path)
        assert (outcome.code, outcome.err) == (0, ""), arguments
        assert {Path(path).name for path in outcome.opened} == {IMAGE}
        assert set(outcome.seen) == {IMAGE}
