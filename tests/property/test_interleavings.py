"""The interleavings that matter, forced: a few requests or jobs, in thousands of orders that a seed reproduces.

``python -m tests.property.test_interleavings SCENARIO SEED`` runs one again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pytest

from tests.property import interleaved_jobs, interleaved_requests

SCENARIOS: Final = {scenario.__name__: scenario for scenario in (*interleaved_requests.SCENARIOS, *interleaved_jobs.SCENARIOS)}


def run(name: str, folder: Path, seeds: Iterable[int]) -> None:
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        try:
            SCENARIOS[name](place, seed)
        except BaseException as error:
            error.add_note(f"again: python -m tests.property.test_interleavings {name} {seed}")
            raise
        for file in place.iterdir():
            file.unlink()
        place.rmdir()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order_of_requests_that_was_tried_is_right(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, range(30))


@pytest.mark.torture
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("name", SCENARIOS)
def test_thousands_of_orders_are_right(name: str, part: int, tmp_path: Path) -> None:
    run(name, tmp_path, range(1000 + part * 500, 1500 + part * 500))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.argv[1], Path(scratch), map(int, sys.argv[2:]))
