"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine


@pytest.fixture
def blocklib() -> CommandLine:
    """The command line: `blocklib("info", path)`, `blocklib.json(...)`, `blocklib.fails(...)`."""
    return CommandLine()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one, so that both programs print the same relative names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
