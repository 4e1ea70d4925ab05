"""Whole processes, blocklib and qemu-img in turn; the table at the end of the run has the ratios."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.measure import Comparison, Result, Runner


@pytest.mark.benchmark(group="whole processes of blocklib")
def test_programs(benchmark: BenchmarkFixture, case: Case, runner: Runner, budget: float, results: list[Result]) -> None:
    comparison = Comparison(runner, case)
    benchmark.pedantic(
        comparison.run_ours, setup=comparison.run_theirs, rounds=comparison.rounds(budget), iterations=1
    )
    result = comparison.result()
    benchmark.extra_info["comparison"] = result.as_json()
    results.append(result)
