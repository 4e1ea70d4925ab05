"""Threads that take turns as a seed says: an interleaving that shows a fault shows it every time.

While a `Schedule` is entered, blocklib's locks, conditions and threads are stand-ins: one thread runs at a time, and at every
line of blocklib and at every lock another may have to go on.  Where all wait for each other is a `Deadlock`, which says where
each of them stands; what waits for a time is woken when nobody else can go on, so that no test waits for a clock.
"""

from __future__ import annotations

import gc
import pkgutil
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import FrameType, SimpleNamespace, TracebackType
from typing import Any, Final, Self

import blocklib
from blocklib._fast.kernel import Kernel

_ROOM: Final = str(Path(blocklib.__file__).parent)
_RESTLESSNESS: Final = (0.3, 0.1, 0.03, 0.01, 0.003)
"""How probable a change of places is at each line: schedules with few changes find other faults than those with many."""
_PAUSE_BEFORE: Final = (1.0, 3.3)
"""In the other half of the schedules each thread falls behind all others once, after ten to two thousand lines (powers of ten):
that finds what needs one long pause at the wrong place."""
_AT_LOCKS: Final = 0.3
_ENDLESS: Final = 200_000
"""Turns after which a schedule counts as one without end."""
for _module in pkgutil.walk_packages(blocklib.__path__, "blocklib."):
    if not _module.name.endswith("__main__"):
        import_module(_module.name)  # now: an import has a lock of the interpreter's own, which may not be held by who waits
_REAL_LOCKS: Final = (type(threading.Lock()), type(threading.RLock()))


class Deadlock(AssertionError):
    """Every thread waits for another one, or they go on for ever."""


class _Abandoned(BaseException):
    """Ends a thread of a schedule that has failed."""


class _Task:
    """A thread of the schedule, and what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.baton = threading.Lock()
        self.baton.acquire()
        self.ident: int | None = None
        self.thread: _Thread | None = None
        self.ready: Callable[[], bool] | None = None
        self.timed = False
        self.expired = False
        self.ended = False
        self.rank = 0.0
        self.lines_left = 0


class Schedule:
    """A context manager: what the block does, and the threads that it starts, take turns as `seed` says."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._restlessness = self._random.choice(_RESTLESSNESS)
        self._by_rank = self._random.random() < 0.5
        self._here = self._main = _Task("main")
        self._tasks = [self._main]
        self._failure: BaseException | None = None
        self._turns = 0
        self._undo: list[tuple[Any, str, Any]] = []

    # -- the block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._main.ident = threading.get_ident()
        names = SimpleNamespace(
            **{name: getattr(threading, name) for name in ("local", "get_ident")},
            Lock=lambda: _Lock(self),
            RLock=lambda: _RLock(self),
            Condition=lambda lock=None: _Condition(self, lock),
            Event=lambda: _Event(self),
            Thread=lambda **arguments: _Thread(self, **arguments),
            current_thread=lambda: self._here.thread or threading.main_thread(),
        )
        for name, module in list(sys.modules.items()):
            if not name.startswith("blocklib"):
                continue
            for attribute, value in list(vars(module).items()):
                if value is threading:
                    self._put(module, attribute, names)
                elif isinstance(value, _REAL_LOCKS) and module is not sys.modules[Kernel.__module__]:
                    self._put(module, attribute, _Lock(self) if isinstance(value, _REAL_LOCKS[0]) else _RLock(self))
        # When a kernel is loaded depends on what this process did before, and inside one nothing can change places.
        self._put(Kernel, "worth", lambda kernel, saving: None)
        gc.disable()  # what it runs would run at another line each time
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.settrace(None)
        try:
            if self._failure is None and error is None:
                self.block(lambda: all(task.ended for task in self._tasks if task is not self._main))
            else:
                self._fail(error or self._failure)
        finally:
            gc.enable()
            for owner, attribute, value in reversed(self._undo):
                setattr(owner, attribute, value)
        if self._failure is not None and self._failure is not error:
            raise self._failure

    def _put(self, owner: Any, attribute: str, value: Any) -> None:
        self._undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    def run(self, *works: Callable[[], object]) -> None:
        """Run each in a thread of its own until all have ended; raises what one of them raised."""
        tasks = [_Task(f"work {number}") for number in range(len(works))]
        for task, work in zip(tasks, works, strict=True):
            self.begin(task, work)
        self.block(lambda: all(task.ended for task in tasks))

    # -- taking turns -------------------------------------------------------------------------------------------------

    def at_lock(self) -> None:
        """A place where another thread may well go on."""
        if self._failure is None and self._random.random() < _AT_LOCKS:
            self.switch()

    def block(self, ready: Callable[[], bool], *, timed: bool = False) -> bool:
        """Let others go on until `ready`; False where that has not come true and, if `timed`, nobody else could go on."""
        task = self._here
        task.ready, task.timed = ready, timed
        self.switch()
        task.ready = None
        expired, task.expired = task.expired, False
        task.timed = False
        return not expired

    def switch(self) -> None:
        """Let the thread go on that the schedule says."""
        if self._failure is not None:
            raise _Abandoned
        task = self._here
        chosen = self._choose()
        if chosen is not task:
            self._here = chosen
            chosen.baton.release()
            task.baton.acquire()
        if self._failure is not None:
            raise _Abandoned

    def _choose(self) -> _Task:
        can = [task for task in self._tasks if not task.ended and (task.ready is None or task.ready())]
        if not can:
            can = [task for task in self._tasks if not task.ended and task.timed]
            if not can:
                self._fail(Deadlock("every thread waits:\n" + "\n".join(self._positions())))
                return self._main
            can = [self._random.choice(can)]
            can[0].expired = True
        return max(can, key=lambda task: task.rank) if self._by_rank else self._random.choice(can)

    def _positions(self) -> Iterable[str]:
        frames = sys._current_frames()
        for task in self._tasks:
            if not task.ended and task.ident in frames:
                stack = traceback.extract_stack(frames[task.ident])
                lines = [f"    {f.filename.removeprefix(_ROOM)}:{f.lineno} {f.name}" for f in stack if _ROOM in f.filename]
                yield "\n".join((f"  {task.name}", *lines))

    def _trace(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(_ROOM) else None

    def _line(self, _frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        task = self._here
        if event == "line":
            task.lines_left -= 1
            if not task.lines_left:
                self._end_of_turn(task)
        return self._line

    def _end_of_turn(self, task: _Task) -> None:
        self._turns += 1
        if self._turns > _ENDLESS:
            self._fail(Deadlock("the threads go on for ever:\n" + "\n".join(self._positions())))
        task.rank -= 1
        if not self._by_rank:
            task.lines_left = 1 + int(self._random.expovariate(self._restlessness))
        self.switch()

    # -- threads ------------------------------------------------------------------------------------------------------

    def begin(self, task: _Task, work: Callable[[], object]) -> None:
        """Make a thread that waits for its turn to do `work`."""
        task.rank = self._random.random()
        task.lines_left = int(10 ** self._random.uniform(*_PAUSE_BEFORE))
        self._tasks.append(task)
        threading.Thread(target=self._work, args=(task, work), name=task.name, daemon=True).start()

    def _work(self, task: _Task, work: Callable[[], object]) -> None:
        task.baton.acquire()
        task.ident = threading.get_ident()
        try:
            if self._failure is None:
                sys.settrace(self._trace)
                work()
        except _Abandoned:
            pass
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            sys.settrace(None)
            task.ended = True
            self._here = self._main if self._failure is not None else self._choose()
            self._here.baton.release()

    def _fail(self, failure: BaseException | None) -> None:
        """Remember what went wrong first, and end all threads one after the other."""
        self._failure = self._failure or failure
        if threading.get_ident() == self._main.ident:
            for task in self._tasks:
                if task is not self._main and not task.ended:
                    task.baton.release()
                    self._main.baton.acquire()


class _Thread:
    """threading.Thread, as far as blocklib uses it."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        target: Callable[..., object],
        args: tuple[object, ...] = (),
        name: str = "thread",
        daemon: bool = True,
    ) -> None:
        self._schedule = schedule
        self._work = lambda: target(*args)
        self._task = _Task(name)
        self._task.thread = self
        self.name = name
        self.ident: int | None = None

    def start(self) -> None:
        self.ident = id(self)
        self._schedule.begin(self._task, self._work)
        self._schedule.at_lock()

    def join(self, timeout: float | None = None) -> None:
        self._schedule.block(lambda: self._task.ended, timed=timeout is not None)

    def is_alive(self) -> bool:
        return self.ident is not None and not self._task.ended


class _Lock:
    """threading.Lock."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self.schedule.at_lock()
        if self.held:
            if not blocking or not self.schedule.block(lambda: not self.held, timed=timeout >= 0):
                return False
        self.held = True
        return True

    def release(self) -> None:
        assert self.held, "a lock is released that nobody holds"
        self.held = False
        self.schedule.at_lock()

    def locked(self) -> bool:
        return self.held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_exc: object) -> None:
        self.release()


class _RLock:
    """threading.RLock."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.owner: int | None = None
        self.depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.get_ident()
        if self.owner != me:
            self.schedule.at_lock()
            if self.owner is not None:
                if not blocking or not self.schedule.block(lambda: self.owner is None, timed=timeout >= 0):
                    return False
            self.owner = me
        self.depth += 1
        return True

    def release(self) -> None:
        assert self.owner == threading.get_ident(), "a lock is released by a thread that does not hold it"
        self.depth -= 1
        if not self.depth:
            self.owner = None
            self.schedule.at_lock()

    def _is_owned(self) -> bool:
        return self.owner == threading.get_ident()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_exc: object) -> None:
        self.release()


class _Condition:
    """threading.Condition."""

    def __init__(self, schedule: Schedule, lock: _Lock | _RLock | None = None) -> None:
        self._schedule = schedule
        self._lock = lock if lock is not None else _RLock(schedule)
        self._waiters: list[list[bool]] = []
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_exc: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        depth = getattr(self._lock, "depth", 1)
        assert depth == 1, "a condition is waited for inside two rounds of its lock"
        woken = [False]
        self._waiters.append(woken)
        self._lock.release()
        try:
            come = self._schedule.block(lambda: woken[0], timed=timeout is not None)
        finally:
            if woken in self._waiters:
                self._waiters.remove(woken)
            self._lock.acquire()
        return come

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        while not (result := predicate()):
            if not self.wait(timeout):
                return predicate()
        return result

    def notify(self, n: int = 1) -> None:
        for woken in self._waiters[:n]:
            woken[0] = True
        del self._waiters[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class _Event:
    """threading.Event."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._schedule.at_lock()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._set or self._schedule.block(lambda: self._set, timed=timeout is not None)
