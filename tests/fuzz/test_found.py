"""Every input that once found a bug, and what fuzzing begins with, runs through its target; no atheris is needed for that."""

from __future__ import annotations

import pytest

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
