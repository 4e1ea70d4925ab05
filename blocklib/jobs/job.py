"""Job: a long verb in its own thread that can be watched, paused, slowed down and cancelled, and ends in a result."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, ParamSpec, Self, TypeVar, overload

from blocklib.errors import BlocklibError, ClosedError, JobCancelled, JobStateError, UsageError
from blocklib.jobs.control import CLOCK, Clock, Control, ProgressCallback, Task
from blocklib.jobs.states import ENDED, VERBS, JobEvent, JobStatus, JobVerb
from blocklib.reports import Progress

__all__ = ["Job", "JobEvent", "JobEvents", "JobStatus", "ProgressCallback", "started"]

P = ParamSpec("P")
R = TypeVar("R")

_at_work: set[Job[Any]] = set()


@atexit.register
def _cancel_all() -> None:
    # A thread that the interpreter waits for would keep it alive while the job is paused; one that it does not wait
    # for would leave a half-written file behind.
    for job in tuple(_at_work):
        if job._pid == os.getpid():
            import warnings

            warnings.warn(f"{job!r} is still at work at exit and is cancelled: wait for it", ResourceWarning, stacklevel=1)
            job._end()


class Job(Generic[R]):
    """A long verb at work; every method may be called from any thread.  `R` is what `wait` returns.

    As a context manager it never outlives the block: leaving it cancels a job that is still at work and raises the
    error of one that has failed.
    """

    def __init__(
        self,
        task: Task[R],
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = False,
        progress: ProgressCallback | None = None,
        clock: Clock = CLOCK,
        held: bool = False,
    ) -> None:
        """With `auto_finalize` False the job waits, pending, for `finalize`; with `auto_dismiss` it dismisses itself.

        One that is `held` belongs to a transaction, which ends with `release` or `drop`.
        """
        self._task = task
        self._auto_finalize = auto_finalize
        self._auto_dismiss = auto_dismiss
        self._held = held
        self._finalized = False
        self._begun = False  # its thread may be there, even if nobody can see it yet
        self._control = Control(task.verb, speed=speed, progress=progress, clock=clock)
        self._changed = self._control.changed
        self._results: list[R] = []
        self._thread = threading.Thread(target=self._main, name=f"blocklib {task.verb}", daemon=True)
        self._pid = os.getpid()
        task.claim()

    def __repr__(self) -> str:
        return f"<Job {self._task.verb}: {self._control.status}>"

    def __reduce__(self) -> Any:
        raise TypeError("a job cannot be pickled: start it in the worker")

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> JobStatus:
        """The present state, in QEMU's words."""
        self._check_process()
        return self._control.status

    @property
    def progress(self) -> Progress:
        """How far the job is."""
        self._check_process()
        with self._changed:
            return self._control.snapshot()

    @property
    def io_error(self) -> BlocklibError | None:
        """The error that has stopped the job until it is resumed (`on_source_error`, `on_target_error`)."""
        self._check_process()
        return self._control.io_error

    def events(self) -> JobEvents:
        """What happens from now on, beginning with the present state; ends after the event "concluded".

        Who is slow to take events misses progress, never a change of status.
        """
        self._check_process()
        return JobEvents(self._control)

    # -- waiting ------------------------------------------------------------------------------------------------------

    @overload
    def wait(self, timeout: float | None = None, *, until: Literal["concluded"] = "concluded") -> R: ...
    @overload
    def wait(self, timeout: float | None = None, *, until: Literal["ready", "pending"]) -> None: ...
    def wait(self, timeout: float | None = None, *, until: Literal["ready", "pending", "concluded"] = "concluded") -> R | None:
        """Wait until the job has ended, and return its result; with `until`, until it was in that state or has ended.

        Raises the error of a job that failed, JobCancelled if it was cancelled, TimeoutError after `timeout` seconds
        (the job goes on).
        """
        self._check_process()
        if threading.current_thread() is self._thread:
            raise UsageError("a job cannot wait for itself")
        clock = self._control.clock
        deadline = None if timeout is None else clock.now() + timeout
        with self._changed:
            while self._control.status not in ENDED and until not in self._control.reached:
                if self._control.status == "created" and not self._begun:
                    self._refuse("wait")
                left = None if deadline is None else deadline - clock.now()
                if left is not None and left <= 0:
                    raise TimeoutError(f"the {self._task.verb} job is {self._control.status} after {timeout} seconds")
                clock.wait(self._changed, left)
            error = self._control.error
        if self._control.status in ENDED:
            self._join()
        if error is not None:
            raise error
        return self._results[0] if until == "concluded" else None

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        error = self._control.error
        if error is None or error is exc or isinstance(error, JobCancelled):
            return
        if exc is None:
            raise error
        exc.add_note(f"the {self._task.verb} job also failed: {error}")

    def _end(self) -> None:
        """Cancel the job if it is at work, and wait for its end."""
        if self._control.status not in ENDED:
            self.cancel(force=True)
        self._join()

    # -- steering -----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin; the functions of `blocklib.jobs` return jobs that have begun."""
        self._check_process()
        try:
            with self._changed:
                if self._control.status != "created" or self._begun:
                    self._refuse("start")
                if self._held:
                    self._refuse("start", "part of a transaction that has not ended")
                _at_work.add(self)
                self._begun = True
                self._thread.start()
        except RuntimeError as exc:  # there is no thread to be had
            _at_work.discard(self)
            self._abort(exc)
            raise
        except KeyboardInterrupt:
            # While the thread was starting.  If it is there but not yet to be seen, it ends by itself: it is cancelled
            # before it has touched anything.
            self._control.cancelled = True
            _at_work.discard(self)
            self._end()
            raise
        return self

    def release(self) -> None:
        """Its transaction has been made: begin.  If it was cancelled meanwhile, it ends at once."""
        with self._changed:
            self._held = False
            self.start()

    def drop(self) -> None:
        """Its transaction has failed: it never begins."""
        with self._changed:
            self._held = False
        self.cancel(force=True)

    def cancel(self, force: bool = False) -> None:
        """Ask the job to stop at the next safe place; returns at once, and `wait` then raises JobCancelled.

        A job that has ended stays as it is.  A mirror that is ready ends well and keeps its target, a copy of that moment,
        unless `force` is given.
        """
        with self._verb("cancel"):
            if self._control.status in ("aborting", *ENDED):
                return
            if self._control.status in ("ready", "standby") and not force:
                self._control.keeping = True
                self._control.pausing = False
            else:
                self._control.cancelled = True
            self._changed.notify_all()
            if self._begun or self._held:
                return
            self._begun = True
        self._abort(JobCancelled(f"the {self._task.verb} job was cancelled before it began"))

    def pause(self) -> None:
        """Ask the job to park at the next safe place, with no request in flight; returns at once.

        Raises JobStateError for one that is paused already, or has ended.
        """
        with self._verb("pause"):
            if self._control.pausing:
                self._refuse("pause", "already paused")
            self._control.pausing = True
            self._changed.notify_all()

    def resume(self) -> None:
        """Let a paused job go on.  Raises JobStateError for one that is not paused."""
        with self._verb("resume"):
            if not self._control.pausing:
                self._refuse("resume", "not paused")
            self._control.pausing = False
            self._control.io_error = None
            self._changed.notify_all()

    def set_speed(self, bytes_per_second: int) -> None:
        """Limit the speed from now on; 0 lifts the limit.  Raises UsageError below 0."""
        with self._verb("set-speed"):
            self._control.set_speed(bytes_per_second)

    def complete(self) -> None:
        """Let a job that is ready finish what it is for (a mirror: the disk becomes the copy); returns at once."""
        with self._verb("complete"):
            self._control.completing = True
            self._changed.notify_all()

    def finalize(self) -> None:
        """Let a job that was started with ``auto_finalize=False`` and is pending do what cannot be taken back, and conclude."""
        with self._verb("finalize"):
            self._finalized = True
            self._changed.notify_all()

    def dismiss(self) -> None:
        """Forget a job that has concluded; its result and error stay."""
        with self._verb("dismiss"):
            self._control.become("null")

    @contextmanager
    def _verb(self, verb: JobVerb) -> Iterator[None]:
        """Act under the lock.  Raises JobStateError where the present state does not take `verb`."""
        self._check_process()
        with self._changed:
            if self._control.status not in VERBS[verb]:
                self._refuse(verb)
            yield

    def _refuse(self, verb: str, why: str | None = None) -> NoReturn:
        status = self._control.status
        raise JobStateError(f"cannot {verb} a {self._task.verb} job that is {why or status}", status=status, verb=verb)

    def _check_process(self) -> None:
        # First in every method: after a fork the lock may be held by a thread that does not exist here.
        if self._pid != os.getpid():
            raise ClosedError("the job belongs to the process that forked this one")

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        control = self._control
        try:
            with self._changed:
                control.check_cancelled()
                control.become("running")
            result = self._task.run(control)
            control.report(final=True)
            self._conclude(result)
        except BaseException as exc:
            self._abort(exc)
        finally:
            _at_work.discard(self)

    def _conclude(self, result: R) -> None:
        control = self._control
        with self._changed:
            control.park_if_asked()
            control.become("waiting")
            control.become("pending")
            while not (self._auto_finalize or self._finalized or control.cancelled):
                control.clock.wait(self._changed, None)
            control.check_cancelled()
        result = self._task.finalize(control, result)  # who cancels from now on may come too late
        with self._changed:
            self._results.append(result)
            self._end_as_concluded()

    def _abort(self, error: BaseException) -> None:
        with self._changed:
            self._control.become("aborting")
        try:
            self._task.abort()
        except BaseException as exc:
            error.add_note(f"cleaning up failed too: {exc}")
        with self._changed:
            self._control.error = error
            self._end_as_concluded()

    def _end_as_concluded(self) -> None:
        self._control.become("concluded")
        if self._auto_dismiss:
            self._control.become("null")


def started(make: Callable[P, Job[R]]) -> Callable[P, Job[R]]:
    """`make`, which returns a job that has not begun, as a function that starts it; `make` itself is its `__wrapped__`."""

    @wraps(make)
    def start(*args: P.args, **kwargs: P.kwargs) -> Job[R]:
        return make(*args, **kwargs).start()

    return start


class JobEvents(Iterator[JobEvent]):
    """The events of one job, for one thread."""

    def __init__(self, control: Control) -> None:
        self._control = control
        with control.changed:
            # One of two unread events with the same status is enough: so a reader who is slow costs no memory.
            self._unread = deque([JobEvent(control.status, control.snapshot(), control.error)])
            control.listeners.append(_listener(weakref.ref(self)))

    def __next__(self) -> JobEvent:
        """The next event; waits for it."""
        with self._control.changed:
            while not self._unread:
                if self._control.status in ENDED:
                    raise StopIteration
                self._control.clock.wait(self._control.changed, None)
            return self._unread.popleft()

    def _receive(self, event: JobEvent) -> None:
        if self._unread and self._unread[-1].status == event.status:
            self._unread.pop()
        if event.status != "null":
            self._unread.append(event)


def _listener(reference: weakref.ref[JobEvents]) -> Callable[[JobEvent], bool]:
    """Hands events to an iterator for as long as somebody holds it."""

    def receive(event: JobEvent) -> bool:
        events = reference()
        if events is None:
            return False
        events._receive(event)
        return True

    return receive
