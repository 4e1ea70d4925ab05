"""The job state machine: states, verbs, pausing, speed, cancelling, progress, events, and the end of a `with` block."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import get_args

import pytest

from blocklib.errors import ClosedError, JobCancelled, JobStateError, UsageError
from blocklib.jobs.control import REPORT_INTERVAL, Clock, Control, RateLimit, Task
from blocklib.jobs.job import Job
from blocklib.jobs.states import TRANSITIONS, VERBS, JobEvent, JobStatus, JobVerb
from blocklib.reports import Progress


class FakeClock(Clock):
    """Time that passes only when somebody waits for it."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition, timeout: float | None) -> None:
        if timeout is None:
            condition.wait()
        else:
            self.time += timeout


class Steps(Task[str]):
    """Does `count` steps of `length` bytes; a test may hold it at a gate before each of them."""

    verb = "step"

    def __init__(self, count: int = 3, length: int = 10, gate: Callable[[int], object] | None = None) -> None:
        self.count = count
        self.length = length
        self.gate = gate
        self.steps: list[int] = []
        self.aborted = 0

    def run(self, control: Control) -> str:
        control.set_total(self.count * self.length)
        for step in range(self.count):
            if self.gate is not None:
                self.gate(step)
            control.pause_point(self.length)
            self.steps.append(step)
            control.advance(self.length)
        return "done"

    def abort(self) -> None:
        self.aborted += 1


class Gate:
    """Holds a task at its first step until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, step: int) -> None:
        if step == 0:
            self.reached.set()
            self.opened.wait()


class Failing(Task[str]):
    verb = "fail"

    def run(self, control: Control) -> str:
        raise OSError("the disk is on fire")


def statuses(events: list[JobEvent]) -> list[str]:
    seen: list[str] = []
    for event in events:
        if not seen or seen[-1] != event.status:
            seen.append(event.status)
    return seen


# -- the tables -------------------------------------------------------------------------------------------------------


def test_the_tables_know_every_status_and_every_verb() -> None:
    assert set(TRANSITIONS) == set(get_args(JobStatus))
    assert set(VERBS) == set(get_args(JobVerb))


def test_every_status_can_be_reached_and_left_for_the_end() -> None:
    reached: set[JobStatus] = {"undefined"}
    while (more := reached | {after for status in reached for after in TRANSITIONS[status]}) != reached:
        reached = more
    assert reached == set(get_args(JobStatus))
    assert [status for status, after in TRANSITIONS.items() if not after] == ["null"]


# -- results and errors -----------------------------------------------------------------------------------------------


def test_wait_returns_the_result_and_the_job_has_concluded() -> None:
    job = Job(Steps()).start()
    assert job.wait() == "done"
    assert job.status == "concluded"
    assert (job.progress.done, job.progress.total, job.progress.fraction) == (30, 30, 1.0)


def test_wait_raises_what_the_task_raised_each_time() -> None:
    job = Job(Failing()).start()
    for _ in range(2):
        with pytest.raises(OSError, match="on fire"):
            job.wait()
    assert job.status == "concluded"


def test_a_task_that_fails_is_asked_to_clean_up_once() -> None:
    class Task1(Steps):
        def run(self, control: Control) -> str:
            raise ValueError("no")

    task = Task1()
    with pytest.raises(ValueError, match="no"):
        Job(task).start().wait()
    assert task.aborted == 1


def test_a_clean_up_that_fails_becomes_a_note_on_the_first_error() -> None:
    class Task1(Failing):
        def abort(self) -> None:
            raise OSError("cannot unlink")

    with pytest.raises(OSError, match="on fire") as caught:
        Job(Task1()).start().wait()
    assert "cannot unlink" in caught.value.__notes__[0]


def test_a_task_that_succeeds_is_not_asked_to_clean_up() -> None:
    task = Steps()
    Job(task).start().wait()
    assert task.aborted == 0


def test_a_timeout_is_the_builtin_one_and_leaves_the_job_alone() -> None:
    gate = Gate()
    with Job(Steps(gate=gate), clock=FakeClock()).start() as job:
        with pytest.raises(TimeoutError):
            job.wait(timeout=60.0)
        gate.opened.set()
        assert job.wait() == "done"


def test_waiting_for_ready_ends_when_the_job_does() -> None:
    job = Job(Steps()).start()
    job.wait(until="ready")
    assert job.status == "concluded"


def test_a_job_that_has_not_begun_cannot_be_waited_for() -> None:
    with pytest.raises(JobStateError) as caught:
        Job(Steps()).wait()
    assert (caught.value.status, caught.value.verb) == ("created", "wait")


def test_a_job_starts_once() -> None:
    job = Job(Steps()).start()
    with pytest.raises(JobStateError):
        job.start()
    job.wait()


def test_a_job_cannot_wait_for_itself() -> None:
    jobs: list[Job[str]] = []
    job = Job(Steps(gate=lambda _step: jobs[0].wait()))
    jobs.append(job)
    with pytest.raises(UsageError, match="itself"):
        job.start().wait()


# -- verbs ------------------------------------------------------------------------------------------------------------


def test_cancelling_ends_at_the_next_pause_point_and_cleans_up() -> None:
    gate = Gate()
    task = Steps(gate=gate)
    job = Job(task).start()
    gate.reached.wait()
    job.cancel()
    gate.opened.set()
    with pytest.raises(JobCancelled):
        job.wait()
    assert task.steps == []
    assert task.aborted == 1


def test_cancelling_before_the_beginning_runs_nothing() -> None:
    task = Steps()
    job = Job(task)
    job.cancel()
    assert job.status == "concluded"
    with pytest.raises(JobCancelled):
        job.wait()
    with pytest.raises(JobStateError):
        job.start()
    assert task.steps == []


def test_cancelling_what_has_ended_changes_nothing() -> None:
    job = Job(Steps()).start()
    job.wait()
    job.cancel()
    assert job.wait() == "done"


@pytest.mark.parametrize("verb", ["pause", "resume", "finalize"])
def test_a_verb_the_state_does_not_take_is_refused_by_name(verb: str) -> None:
    job = Job(Steps()).start()
    job.wait()
    with pytest.raises(JobStateError) as caught:
        getattr(job, verb)()
    assert (caught.value.status, caught.value.verb) == ("concluded", verb)


def test_set_speed_is_refused_after_the_end_and_below_zero() -> None:
    gate = Gate()
    with Job(Steps(gate=gate)).start() as job:
        with pytest.raises(UsageError):
            job.set_speed(-1)
        gate.opened.set()
        job.wait()
        with pytest.raises(JobStateError):
            job.set_speed(0)


def test_a_paused_job_works_on_when_resumed() -> None:
    gate = Gate()
    task = Steps(gate=gate)
    job = Job(task).start()
    events = job.events()
    gate.reached.wait()
    job.pause()
    gate.opened.set()
    for event in events:
        if event.status == "paused":
            break
    assert task.steps == []
    with pytest.raises(JobStateError, match="already paused") as caught:
        job.pause()
    assert (caught.value.status, caught.value.verb) == ("paused", "pause")
    job.resume()
    assert job.wait() == "done"
    assert statuses(list(events)) == ["running", "waiting", "pending", "concluded"]


def test_a_job_that_is_not_paused_cannot_be_resumed() -> None:
    gate = Gate()
    with Job(Steps(gate=gate)).start() as job:
        with pytest.raises(JobStateError, match="not paused"):
            job.resume()
        gate.opened.set()


def test_pausing_before_the_beginning_parks_at_the_first_pause_point() -> None:
    task = Steps()
    job = Job(task)
    job.pause()
    events = job.start().events()
    next(event for event in events if event.status == "paused")
    assert task.steps == []
    job.resume()
    assert job.wait() == "done"


def test_cancelling_a_paused_job_ends_it() -> None:
    job = Job(Steps())
    job.pause()
    events = job.start().events()
    next(event for event in events if event.status == "paused")
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait()
    assert statuses(list(events)) == ["running", "aborting", "concluded"]


def test_without_auto_finalize_a_job_stays_pending_until_it_is_finalized() -> None:
    job = Job(Steps(), auto_finalize=False).start()
    job.wait(until="pending")
    assert job.status == "pending"
    job.finalize()
    assert job.wait() == "done"


def test_cancelling_a_pending_job_undoes_it() -> None:
    task = Steps()
    job = Job(task, auto_finalize=False).start()
    job.wait(until="pending")
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait()
    assert task.aborted == 1


def test_a_dismissed_job_keeps_its_result() -> None:
    job = Job(Steps()).start()
    job.wait()
    job.dismiss()
    assert job.status == "null"
    assert job.wait() == "done"
    with pytest.raises(JobStateError):
        job.dismiss()


# -- speed ------------------------------------------------------------------------------------------------------------


def test_the_speed_limit_spreads_the_pieces_evenly() -> None:
    clock = FakeClock()
    begun: list[float] = []

    class Timed(Steps):
        def run(self, control: Control) -> str:
            for _ in range(5):
                control.pause_point(100)
                begun.append(clock.now() - 1000.0)
            return "done"

    Job(Timed(), speed=50, clock=clock).start().wait()
    assert begun == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_without_a_limit_nothing_waits() -> None:
    clock = FakeClock()
    Job(Steps(count=100), clock=clock).start().wait()
    assert clock.time == 1000.0


def test_a_new_speed_forgets_what_the_old_one_demanded() -> None:
    limit = RateLimit(1)
    limit.begin(3600, 0.0)
    assert limit.free_at == 3600.0
    limit.set_speed(100, 10.0)
    assert limit.free_at == 10.0
    limit.begin(50, 10.0)
    assert limit.free_at == 10.5


def test_time_that_was_not_used_is_not_saved_up() -> None:
    limit = RateLimit(10)
    limit.begin(10, 0.0)
    limit.begin(10, 100.0)
    assert limit.free_at == 101.0


# -- progress and events ----------------------------------------------------------------------------------------------


def test_progress_is_told_at_most_ten_times_a_second_and_once_at_the_end() -> None:
    clock = FakeClock()
    told: list[tuple[float, Progress]] = []
    # 100 steps of 10 bytes at 500 bytes a second take two seconds.
    job = Job(Steps(count=100), speed=500, clock=clock, progress=lambda p: told.append((clock.now(), p)))
    job.start().wait()
    times = [time for time, _ in told]
    assert all(later - earlier >= REPORT_INTERVAL - 1e-9 for earlier, later in itertools.pairwise(times[:-1]))
    assert 15 <= len(told) <= 22
    assert told[-1][1].done == told[-1][1].total == 1000
    assert [p.done for _, p in told] == sorted(p.done for _, p in told)


def test_rate_and_eta_follow_the_work() -> None:
    clock = FakeClock()
    told: list[Progress] = []
    Job(Steps(count=100), speed=500, clock=clock, progress=told.append).start().wait()
    middle = told[len(told) // 2]
    assert middle.rate == pytest.approx(500, rel=0.1)
    assert middle.eta == pytest.approx((1000 - middle.done) / middle.rate)


def test_a_callback_that_raises_stops_the_work_and_its_error_goes_up() -> None:
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Enough

    task = Steps()
    with pytest.raises(Enough):
        Job(task, progress=stop).start().wait()
    assert task.aborted == 1
    assert task.steps == []


def test_a_callback_may_steer_the_job() -> None:
    jobs: list[Job[str]] = []
    job = Job(Steps(), progress=lambda _progress: jobs[0].cancel())
    jobs.append(job)
    with pytest.raises(JobCancelled):
        job.start().wait()


def test_events_tell_every_status_and_end_with_the_job() -> None:
    job = Job(Steps())
    events = job.events()
    job.start()
    seen = list(events)
    assert statuses(seen) == ["created", "running", "waiting", "pending", "concluded"]
    assert seen[-1].progress.done == 30
    assert seen[-1].error is None


def test_the_last_event_of_a_failed_job_has_the_error() -> None:
    job = Job(Failing())
    events = job.events()
    job.start()
    seen = list(events)
    assert statuses(seen) == ["created", "running", "aborting", "concluded"]
    assert isinstance(seen[-1].error, OSError)


def test_events_of_a_job_that_has_ended_tell_its_end() -> None:
    job = Job(Steps()).start()
    job.wait()
    assert [event.status for event in job.events()] == ["concluded"]


def test_a_reader_who_is_slow_keeps_few_events() -> None:
    job = Job(Steps(count=1000), speed=10, clock=FakeClock())
    events = job.events()
    job.start().wait()
    assert len(list(events)) <= len(set(get_args(JobStatus)))


# -- the end of a block, processes ------------------------------------------------------------------------------------


def test_leaving_the_block_cancels_a_job_still_at_work() -> None:
    task = Steps()
    with Job(task) as job:
        job.pause()
        job.start()
    assert job.status == "concluded"
    assert task.aborted == 1
    with pytest.raises(JobCancelled):
        job.wait()


def test_leaving_the_block_raises_the_error_of_a_failed_job() -> None:
    job = Job(Failing())
    with pytest.raises(OSError, match="on fire"):
        with job:
            assert statuses(list(job.start().events()))[-1] == "concluded"


def test_the_error_of_a_failed_job_is_a_note_on_the_one_of_the_block() -> None:
    def fail_beside(job: Job[str]) -> None:
        with job:
            list(job.start().events())
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        fail_beside(Job(Failing()))
    assert "on fire" in caught.value.__notes__[0]


def test_leaving_the_block_of_a_job_that_never_began_is_no_error() -> None:
    with Job(Steps()) as job:
        pass
    assert job.status == "concluded"


def test_a_job_does_not_pickle() -> None:
    with pytest.raises(TypeError, match="worker"):
        pickle.dumps(Job(Steps()))


def test_an_event_pickles() -> None:
    event = JobEvent("running", Progress(1, 2), None)
    assert pickle.loads(pickle.dumps(event)) == event


def test_in_the_child_of_a_fork_every_method_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(Steps()).start()
    job.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        for use in (job.wait, job.cancel, job.pause, job.events, lambda: job.status, lambda: job.progress):
            with pytest.raises(ClosedError):
                use()
    assert job.wait() == "done"


def test_a_job_at_work_when_the_interpreter_ends_is_cancelled_and_cleans_up() -> None:
    program = """
from blocklib.jobs.control import Task
from blocklib.jobs.job import Job
class Forever(Task):
    verb = "wait"
    def run(self, control):
        while True:
            control.pause_point(1)
    def abort(self):
        print("cleaned up")
job = Job(Forever())
job.pause()
next(event for event in job.start().events() if event.status == "paused")
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "cleaned up\n"
    assert "ResourceWarning: <Job wait: paused>" in done.stderr
    assert done.returncode == 0
