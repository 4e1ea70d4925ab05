"""What the benchmarks share: the runner, the choice of cases, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import CASES, QUICK, TABLE
from benchmarks.environments import Images
from benchmarks.machine import facts
from benchmarks.measure import BUDGET, ROOT, Result, Runner
from benchmarks.report import HEADING, line

_QUICK_BUDGET = 5.0
_results = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("blocklib")
    group.addoption("--full", action="store_true", help="every environment, and as many rounds as each case asks for")
    group.addoption("--images", type=Path, default=ROOT / ".benchmarks" / "images", help="where images are kept")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = [case for case in CASES if metafunc.config.getoption("--full") or case in TABLE or case.name in QUICK]
        metafunc.parametrize("case", chosen, ids=[case.name for case in chosen])


@pytest.fixture(scope="session")
def images(pytestconfig: pytest.Config) -> Images:
    """The images, made when first asked for."""
    return Images(pytestconfig.getoption("--images"))


@pytest.fixture(scope="session")
def runner(images: Images) -> Iterator[Runner]:
    """Runs whole processes."""
    with Runner(images) as runner:
        yield runner


@pytest.fixture
def budget(pytestconfig: pytest.Config) -> float:
    """Seconds that the rounds of one case may take."""
    return BUDGET if pytestconfig.getoption("--full") else _QUICK_BUDGET


@pytest.fixture
def results(pytestconfig: pytest.Config) -> list[Result]:
    """Where a benchmark leaves its result for the table."""
    return pytestconfig.stash[_results]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["blocklib"] = facts()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cases = {case.name: case for case in CASES}
    if not config.stash[_results]:
        return
    terminalreporter.section("blocklib / qemu-img, medians of whole processes")
    for key, value in facts().items():
        terminalreporter.write_line(f"{key}: {value}")
    terminalreporter.write_line(HEADING)
    for result in config.stash[_results]:
        terminalreporter.write_line(line(cases[result.name], result))
