"""What the tests of the command line share."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import pytest

from tests.cli.images import MAKERS
from tests.cli.running import CommandLine
from tests.programs import Program


@pytest.fixture
def blocklib() -> CommandLine:
    """The command line: `blocklib("info", path)`, `blocklib.json(...)`, `blocklib.fails(...)`."""
    return CommandLine()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one, so that both programs print the same relative names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session", params=MAKERS)
def _gallery(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, qemu_img: Program, qemu_io: Program
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("image")
    with chdir(folder):
        return folder, request.param(qemu_img, qemu_io)


@pytest.fixture
def any_image(_gallery: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an image in the current folder, of every kind that QEMU makes in turn; shared, so only to be read."""
    folder, name = _gallery
    monkeypatch.chdir(folder)
    return name
