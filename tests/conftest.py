"""What every test may use: external programs, the rule about missing ones, and the Hypothesis profiles.

A test that runs an external program says so, with the mark `requires("mkfs.ext4")` or by taking the fixture `qemu_img`,
`qemu_io`, `qemu_nbd` or `nbdkit`.  Where the program is missing it is skipped, and one line at the end says what was not run;
in CI it fails.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.kernels import RUNS, running
from tests.programs import PACKAGES, Program, find_program

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
NOT_RUN = "interop, missing "
"""How the reason of a skip for a missing program begins."""

# Examples do I/O, so their time says nothing (deadline) and generating them may look slow beside them (too_slow).
_COMMON = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _COMMON, max_examples=50)
# CI repeats the same examples: a change is judged by what it changed, and the search for new ones is `make torture`.
settings.register_profile("ci", _COMMON, max_examples=50, derandomize=True, database=None)
settings.register_profile("torture", _COMMON, max_examples=3000, stateful_step_count=200)
settings.load_profile("ci" if IN_CI else "default")


def _require(*names: str) -> None:
    missing = [name for name in names if find_program(name) is None]
    if not missing:
        return
    reason = NOT_RUN + ", ".join(missing)
    if IN_CI:
        pytest.fail(f"{reason}: in CI every interop test runs", pytrace=False)
    pytest.skip(reason)


def _program(name: str) -> Program:
    _require(name)
    path = find_program(name)
    assert path is not None
    return Program(path)


@pytest.fixture(scope="session")
def qemu_img() -> Program:
    """The real qemu-img: `qemu_img("check", path)`, `qemu_img.json("info", path)`, `qemu_img.run(...)`."""
    return _program("qemu-img")


@pytest.fixture(scope="session")
def qemu_io() -> Program:
    """The real qemu-io: `qemu_io("-f", "qcow2", "-c", "read -P 1 0 64k", path)`."""
    return _program("qemu-io")


@pytest.fixture(scope="session")
def qemu_nbd() -> Program:
    """The real qemu-nbd."""
    return _program("qemu-nbd")


@pytest.fixture(scope="session")
def nbdinfo() -> Program:
    """libnbd's nbdinfo."""
    return _program("nbdinfo")


@pytest.fixture(scope="session")
def nbdcopy() -> Program:
    """libnbd's nbdcopy."""
    return _program("nbdcopy")


@pytest.fixture(scope="session")
def nbdkit() -> Program:
    """The real nbdkit."""
    return _program("nbdkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels", choices=RUNS, default="compiled", help="how kernels run in the process of the tests: see tests/kernels.py"
    )


@pytest.fixture(scope="session", autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with running(request.config.getoption("--kernels")):
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        _require(*mark.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        if isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            if reason.startswith(NOT_RUN):
                missing[reason.removeprefix(NOT_RUN)] += 1
    if not missing:
        return
    names = sorted({name for key in missing for name in key.split(", ")})
    packages = sorted({PACKAGES.get(name, name) for name in names})
    terminalreporter.write_line(
        f"{missing.total()} interop tests were not run: no {', '.join(names)} here"
        f" (on Debian: apt-get install {' '.join(packages)})",
        yellow=True,
    )
