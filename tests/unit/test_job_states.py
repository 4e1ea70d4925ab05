"""Which verb a job takes in which state, and what is undone when it ends before it was final.

The table is QEMU's ``qapi/job.json`` (``JobStatus``, and what it says of each ``job-*`` command), read by hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from blocklib.errors import JobCancelled, JobStateError
from blocklib.jobs.control import Control, Task
from blocklib.jobs.job import Job
from blocklib.jobs.states import JobStatus

STATES: Final = ("created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting", "concluded", "null")
TAKEN_IN: Final[dict[str, set[str]]] = {
    "start": {"created"},
    # "Pausing an already paused job is an error", "Resuming an already running job is an error".
    "pause": {"created", "running", "ready"},
    "resume": {"paused", "standby"},
    "set_speed": {"created", "running", "paused", "ready", "standby"},
    # "manually trigger completion of an active job in the READY state"
    "complete": {"ready"},
    # "all involved jobs are in the PENDING state"
    "finalize": {"pending"},
    # "will refuse to operate on any job that has not yet reached its terminal state, JOB_STATUS_CONCLUDED"
    "dismiss": {"concluded"},
    # Wider than QEMU's: what has ended, or is about to, stays as it is.
    "cancel": {*STATES} - {"null"},
}
VERBS: Final[dict[str, Callable[[Job[Any]], object]]] = {
    "start": lambda job: job.start(),
    "pause": lambda job: job.pause(),
    "resume": lambda job: job.resume(),
    "set_speed": lambda job: job.set_speed(1000),
    "complete": lambda job: job.complete(),
    "finalize": lambda job: job.finalize(),
    "dismiss": lambda job: job.dismiss(),
    "cancel": lambda job: job.cancel(),
}


class Steered(Task[str]):
    """Works until it is told to end, with a stage of being ready if it is to have one."""

    verb = "steered"

    def __init__(self, *, gets_ready: bool) -> None:
        self.gets_ready = gets_ready
        self.ending = threading.Event()
        self.aborting = threading.Event()
        self.finalized = 0
        self.aborted = 0

    def run(self, control: Control) -> str:
        if self.gets_ready:
            with control.changed:
                control.become("ready")
        while not self.ending.is_set():
            control.pause_point()
            with control.changed:
                if control.completing or control.keeping:
                    break
                control.changed.wait(0.01)
        return "done"

    def finalize(self, control: Control, result: str) -> str:
        self.finalized += 1
        return f"{result} and final"

    def abort(self) -> None:
        self.aborted += 1
        assert self.aborting.wait(60)


def _wait_for(job: Job[Any], state: str) -> None:
    for event in job.events():
        if event.status == state:
            return
    raise AssertionError(f"never {state}")


@contextmanager
def _in_state(state: str) -> Iterator[Callable[[Callable[[Job[Any]], object]], BaseException | None]]:
    """Gives a function that calls a verb of a job in `state`, and returns what it raised."""
    task = Steered(gets_ready=state in ("ready", "standby"))
    job = Job(task, auto_finalize=False)
    outcome: list[BaseException | None] = []

    def attempt(verb: Callable[[Job[Any]], object]) -> BaseException | None:
        try:
            verb(job)
        except JobStateError as error:
            return error
        return None

    if state != "created":
        job.start()
        _wait_for(job, "ready" if task.gets_ready else "running")
    if state in ("paused", "standby"):
        job.pause()
        _wait_for(job, state)
    if state in ("pending", "concluded", "null"):
        task.ending.set()
        job.wait(60, until="pending")
    if state in ("concluded", "null"):
        job.finalize()
        job.wait(60)
    if state == "null":
        job.dismiss()
    if state == "aborting":
        job.cancel(force=True)
        _wait_for(job, state)

    def attempt_at_once(verb: Callable[[Job[Any]], object]) -> BaseException | None:
        # That state lasts for no time: who hears of it is asked.
        def hear(event: Any) -> bool:
            if event.status == state:
                outcome.append(attempt(verb))
            return True

        job._control.listeners.append(hear)
        task.ending.set()
        _wait_for(job, "pending")
        return outcome[0]

    if state != "waiting":
        assert job.status == state
    task.aborting.set() if state != "aborting" else None
    try:
        yield attempt_at_once if state == "waiting" else attempt
    finally:
        task.aborting.set()
        job._end()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", STATES)
def test_a_verb_is_taken_in_the_states_of_the_table_and_refused_by_name_in_all_others(state: JobStatus, verb: str) -> None:
    with _in_state(state) as attempt:
        error = attempt(VERBS[verb])
    if state in TAKEN_IN[verb]:
        assert error is None
    else:
        assert isinstance(error, JobStateError)
        assert (error.status, error.verb) == (state, verb.replace("_", "-"))


# -- the end ----------------------------------------------------------------------------------------------------------


def _ended(**named: Any) -> tuple[Steered, Job[str]]:
    task = Steered(gets_ready=False)
    task.ending.set()
    task.aborting.set()
    return task, Job(task, **named)


def test_what_cannot_be_taken_back_happens_after_finalize() -> None:
    task, job = _ended(auto_finalize=False)
    job.start()
    job.wait(60, until="pending")
    assert not task.finalized
    job.finalize()
    assert job.wait(60) == "done and final"
    assert (task.finalized, task.aborted) == (1, 0)


def test_a_pending_job_that_is_cancelled_is_undone_and_never_final() -> None:
    task, job = _ended(auto_finalize=False)
    job.start()
    job.wait(60, until="pending")
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait(60)
    assert (task.finalized, task.aborted) == (0, 1)


def test_a_cancel_that_comes_too_late_changes_nothing() -> None:
    class Late(Steered):
        def finalize(self, control: Control, result: str) -> str:
            job.cancel(force=True)
            return super().finalize(control, result)

    task = Late(gets_ready=False)
    task.ending.set()
    job = Job(task)
    job.start()
    assert job.wait(60) == "done and final"
    assert task.aborted == 0


def test_a_job_that_is_paused_while_it_ends_is_final_only_when_it_is_resumed() -> None:
    task = Steered(gets_ready=True)
    job = Job(task).start()
    job.wait(60, until="ready")
    with job._changed:
        job.complete()
        job.pause()
    _wait_for(job, "standby")
    assert not task.finalized
    job.resume()
    assert job.wait(60) == "done and final"


def test_a_job_dismisses_itself_where_that_is_asked() -> None:
    _task, job = _ended(auto_dismiss=True)
    events = job.events()
    job.start()
    assert job.wait(60) == "done and final"
    assert job.status == "null"
    assert list(events)[-1].status == "concluded"


def test_who_waits_for_a_state_that_has_passed_waits_no_more() -> None:
    task = Steered(gets_ready=True)
    job = Job(task, auto_finalize=False).start()
    job.wait(60, until="ready")
    job.complete()
    job.wait(60, until="pending")
    job.wait(60, until="ready")
    job.finalize()
    job.wait(60)


def test_a_job_that_never_begins_gives_back_what_it_has_claimed() -> None:
    task, job = _ended()
    job.cancel()
    assert task.aborted == 1


def test_a_job_that_gets_no_thread_gives_back_what_it_has_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no more threads")

    task, job = _ended()
    monkeypatch.setattr(job._thread, "start", refuse)
    with pytest.raises(RuntimeError, match="no more threads"):
        job.start()
    assert task.aborted == 1
    assert job.status == "concluded"


def test_only_its_transaction_starts_a_job_and_one_cancelled_before_ends_then() -> None:
    task, job = _ended(held=True)
    with pytest.raises(JobStateError, match="transaction"):
        job.start()
    job.cancel()
    assert (job.status, task.aborted) == ("created", 0)
    job.release()
    with pytest.raises(JobCancelled):
        job.wait(60)
    assert (task.finalized, task.aborted) == (0, 1)
