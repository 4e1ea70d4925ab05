"""Each request of each workload fails once: its caller hears of it, and no image is worse than leaking.

`make test` lets some of the requests fail, in one way each; `make torture` all of them in every way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import FAULTS, Outcome, Workload, count_requests, run_one
from tests.faults.workloads import WORKLOADS
from tests.programs import find_program

_OF_TRUNCATIONS = ("EIO", "ENOSPC")
_STEP = 5


def campaign(workload: Workload, folder: Path, *, thorough: bool) -> list[Outcome]:
    """All sessions of a workload."""
    made, copy = folder / "made", folder / "copy"
    made.mkdir()
    workload.make(made)
    outcomes = []
    qemu_img = find_program("qemu-img")
    for part in workload.parts:
        for truncations in (False, True):
            faults = [fault for fault in FAULTS if not truncations or fault.name in _OF_TRUNCATIONS]
            total = count_requests(workload, made, copy, part, truncations=truncations)
            for number in range(total) if thorough else range(len(workload.name) % _STEP, total, _STEP):
                for fault in faults if thorough else [faults[number % len(faults)]]:
                    try:
                        asked = qemu_img if thorough or number % 3 == 0 else None
                        outcomes.append(
                            run_one(workload, made, copy, part, fault, number, truncations=truncations, qemu_img=asked)
                        )
                    except BaseException as exc:
                        kind = "truncation" if truncations else "request"
                        exc.add_note(f"{workload.name}: {fault.name} at {kind} {number} of {total} to {part}")
                        raise
    return outcomes


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_whichever_request_fails_somebody_hears_of_it(workload: Workload, tmp_path: Path) -> None:
    _judge(campaign(workload, tmp_path, thorough=False))


@pytest.mark.torture
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_torture(workload: Workload, tmp_path: Path) -> None:
    _judge(campaign(workload, tmp_path, thorough=True))


def _judge(outcomes: list[Outcome]) -> None:
    ended = [outcome for outcome in outcomes if outcome.poisoned]
    print(f"{len(outcomes)} faults, {len(ended)} of them ended the work")
    # Nothing but a flush that fails is final.
    assert {outcome.operation for outcome in ended} <= {"flush"}, ended
    # A full host is asked once more when something could be given back.
    unheard = [outcome for outcome in outcomes if outcome.operation is None and "ENOSPC" not in outcome.fault]
    assert not unheard, unheard
