"""Inside of the job room: what a task is, and the control through which it paces itself, stops and reports."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final, Generic, TypeAlias, TypeVar

from blocklib.errors import BlocklibError, JobCancelled, UsageError
from blocklib.jobs.states import TRANSITIONS, JobEvent, JobStatus
from blocklib.reports import Progress

R = TypeVar("R")

ProgressCallback: TypeAlias = Callable[[Progress], object]
"""Called from a worker thread, with no lock held; raising stops the work."""

REPORT_INTERVAL: Final = 0.1
"""Seconds between two reports of progress, at least."""
_RATE_SAMPLES: Final = 50
"""The rate is that of the last five seconds: fast enough to follow a stall, slow enough to read."""


class Clock:
    """Time as jobs see it."""

    def now(self) -> float:
        """Seconds since some moment; never goes back."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, timeout: float | None) -> None:
        """Wait, holding `condition`, until it is notified or `timeout` seconds have passed."""
        condition.wait(timeout)


CLOCK: Final = Clock()


class RateLimit:
    """Spreads work so that on average it is no faster than `speed` bytes a second; 0 is no limit."""

    __slots__ = ("free_at", "speed")

    def __init__(self, speed: int) -> None:
        self.speed = 0
        self.free_at = 0.0
        """The moment when the next piece may begin."""
        self.set_speed(speed, 0.0)

    def set_speed(self, speed: int, now: float) -> None:
        """A new limit from `now` on; what the old one still demanded is forgotten.  Raises UsageError below 0."""
        if speed < 0:
            raise UsageError(f"a speed of {speed} bytes a second")
        self.speed = speed
        self.free_at = now

    def begin(self, length: int, now: float) -> None:
        """A piece of `length` bytes begins at `now`."""
        if self.speed:
            self.free_at = max(self.free_at, now) + length / self.speed


class Control:
    """The state that a job's thread shares with everybody who watches or steers the job; `changed` guards all of it."""

    def __init__(self, verb: str, *, speed: int = 0, progress: ProgressCallback | None = None, clock: Clock = CLOCK) -> None:
        self.verb = verb
        self.clock = clock
        self.changed = threading.Condition()
        self.status: JobStatus = "created"
        self.reached: set[JobStatus] = {"created"}
        """The states it has been in."""
        self.error: BaseException | None = None
        self.cancelled = False
        self.pausing = False
        self.completing = False
        self.io_error: BlocklibError | None = None
        """What stopped the job until it is resumed."""
        self.keeping = False
        """A job that is ready was cancelled: it keeps what it has made."""
        self.listeners: list[Callable[[JobEvent], bool]] = []
        """Each is told every event, with `changed` held, and says whether it wants more."""
        self._limit = RateLimit(speed)
        self._callback = progress
        self._next_report = 0.0
        self._done = 0
        self._total = 0
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)

    # -- for the task -------------------------------------------------------------------------------------------------

    @property
    def stop_requested(self) -> bool:
        """Whether the next `pause_point` will not return at once: let what is in flight end, then call it."""
        return self.cancelled or self.pausing

    @property
    def is_limited(self) -> bool:
        """Whether there is a speed limit now."""
        return self._limit.speed > 0

    def set_total(self, total: int) -> None:
        """The bytes that `advance` will have been told of at the end; may be set again when the estimate changes."""
        with self.changed:
            self._total = total

    def advance(self, length: int) -> None:
        """`length` bytes more are done; any thread."""
        with self.changed:
            self._done += length

    def begin(self, length: int) -> None:
        """`length` bytes of work begin, which the speed limit spreads; any thread, after `pause_point` or `wait_to_begin`."""
        if self._limit.speed:
            with self.changed:
                self._limit.begin(length, self.clock.now())

    def wait_to_begin(self) -> bool:
        """For a thread that helps the job's: wait for the speed limit.  False, at once, if `stop_requested`."""
        if self._limit.speed:
            with self.changed:
                while not self.stop_requested:
                    wait = self._limit.free_at - self.clock.now()
                    if wait <= 0:
                        return True
                    self.clock.wait(self.changed, wait)
        return not self.stop_requested

    def pause_point(self, length: int = 0) -> None:
        """A safe place before the next `length` bytes of work: reports, waits for the speed limit, parks while paused.

        Only the job's own thread calls it; if `stop_requested`, with no I/O in flight.  Raises JobCancelled, and
        whatever the progress callback raises.
        """
        self.report()
        with self.changed:
            while True:
                self.park_if_asked()
                now = self.clock.now()
                wait = self._limit.free_at - now
                if wait <= 0:
                    self._limit.begin(length, now)
                    return
                self.clock.wait(self.changed, wait)

    def park_if_asked(self) -> None:
        """Wait while the job is paused; called with `changed` held.  Raises JobCancelled."""
        self.check_cancelled()
        while self.pausing:
            was_ready = self.status == "ready"
            self.become("standby" if was_ready else "paused")
            while self.pausing and not self.cancelled:
                self.clock.wait(self.changed, None)
            self.become("ready" if was_ready else "running")
            self.check_cancelled()

    def stop(self, error: BlocklibError) -> None:
        """Pause until the job is resumed, because of `error`; called with `changed` held."""
        self.io_error = error
        self.pausing = True
        self.changed.notify_all()

    # -- for the job --------------------------------------------------------------------------------------------------

    def become(self, status: JobStatus) -> None:
        """Move to `status`, which must follow the present one, and tell it; called with `changed` held."""
        assert status in TRANSITIONS[self.status], f"{self.status} -> {status}"
        self.status = status
        self.reached.add(status)
        self.tell()

    def tell(self) -> None:
        """Give the present state to every listener; called with `changed` held."""
        event = JobEvent(self.status, self.snapshot(), self.error)
        self.listeners = [listener for listener in self.listeners if listener(event)]
        self.changed.notify_all()

    def check_cancelled(self) -> None:
        """Raises JobCancelled once the job was cancelled."""
        if self.cancelled:
            raise JobCancelled(f"the {self.verb} job was cancelled")

    def set_speed(self, speed: int) -> None:
        """Called with `changed` held."""
        self._limit.set_speed(speed, self.clock.now())
        self.changed.notify_all()

    def snapshot(self) -> Progress:
        """How far the job is; called with `changed` held."""
        rate, eta = 0.0, None
        if self._samples:
            since, done_then = self._samples[0]
            elapsed = self.clock.now() - since
            if elapsed > 0:
                rate = (self._done - done_then) / elapsed
            if rate > 0:
                eta = max(self._total - self._done, 0) / rate
        return Progress(self._done, self._total, rate, eta)

    def report(self, *, final: bool = False) -> None:
        """Tell listeners and the callback how far the job is, unless that was done just now; the job's thread only."""
        now = self.clock.now()
        if now < self._next_report and not final:
            return
        self._next_report = now + REPORT_INTERVAL
        with self.changed:
            self._samples.append((now, self._done))
            progress = self.snapshot()
            self.tell()
        if self._callback is not None:
            self._callback(progress)


class Task(ABC, Generic[R]):
    """The work of a job: runs once, in the job's thread."""

    verb: ClassVar[str]

    def claim(self) -> None:
        """Take what no other job may have meanwhile: the last that happens before the job can start.

        Raises GraphConflictError.  `run`, `finalize` or `abort` gives it back.
        """

    @abstractmethod
    def run(self, control: Control) -> R:
        """Do the work and return its result."""

    def finalize(self, control: Control, result: R) -> R:
        """Do what cannot be taken back - a change of the graph - and return the job's result.

        Not called for a job that was cancelled while it was pending.  What raises here has changed nothing.
        """
        return result

    def abort(self) -> None:
        """Remove what `run` created, or whatever of it was made: the job has failed, or was cancelled, begun or not."""
