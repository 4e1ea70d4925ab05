"""Small files that ask for enormous work: they are refused by name, or the work is done within the limits.

``python -m tests.hostile.bombs "deflate bomb" [COMMAND]`` runs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.bombs import BOMBS, ENDLESS
from tests.hostile.commands import COMMANDS, IMAGE, ON_LINUX, Trial
from tests.hostile.runner import Runner

pytestmark = ON_LINUX

QUICK = ("info", "map", "check", "read", "check -r all", "amend down", "write", "snapshot -c")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


def _faults(runner: Runner, folder: Path, bomb: str, commands: tuple[str, ...]) -> str:
    folder = folder / "trial"
    folder.mkdir()
    BOMBS[bomb](folder / IMAGE)
    trial = Trial(runner, folder, bomb)
    trial.judge()
    left_out = ENDLESS.get(bomb, ())
    found = [str(verdict) for name in commands if name not in left_out and (verdict := trial.run(name)).wrong]
    trial.close()
    return "\n".join(found)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_does_not_go_off(runner: Runner, tmp_path: Path, bomb: str) -> None:
    assert _faults(runner, tmp_path, bomb, QUICK) == ""


@pytest.mark.torture
@pytest.mark.timeout(0)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_does_not_go_off_whatever_is_done_with_it(runner: Runner, tmp_path: Path, bomb: str) -> None:
    assert _faults(runner, tmp_path, bomb, tuple(COMMANDS)) == ""
