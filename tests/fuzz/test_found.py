"""Every input that once found a bug, and what fuzzing begins with, runs through its target; no atheris is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import __main__ as driver
from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS, run


@pytest.mark.parametrize("target", TARGETS)
def test_what_fuzzing_begins_with_is_treated_as_it_should_be(target: str) -> None:
    for number, data in enumerate(seeds.made(target)):
        try:
            run(target, data)
        except BaseException as exc:
            exc.add_note(f"seed {number}: {data!r}")
            raise


@pytest.mark.parametrize(
    ("target", "name"), [pytest.param(target, name, id=f"{target}-{name}") for target in TARGETS for name in seeds.kept(target)]
)
def test_an_input_that_found_a_bug_finds_it_no_more(target: str, name: str) -> None:
    run(target, seeds.kept(target)[name])


@pytest.mark.parametrize(("in_ci", "has_wheel", "code"), [("", True, 0), ("true", True, 1), ("true", False, 0)])
def test_without_atheris_one_line_says_so_and_only_ci_minds_where_it_could_be_had(
    in_ci: str, has_wheel: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CI", in_ci)
    monkeypatch.setattr(driver, "_has_atheris", lambda: False)
    monkeypatch.setattr(driver, "_has_wheel", lambda: has_wheel)
    assert driver.main([]) == code
    assert capsys.readouterr().out.count("\n") == 1


def test_what_is_kept_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "FOUND", tmp_path)
    data = bytes(range(256))
    seeds.keep("tables", "a", data)
    assert seeds.kept("tables") == {"a": data}
