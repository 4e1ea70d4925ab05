"""One run of a command: who is called, in which thread it works, and how it is interrupted.

The command works in a worker thread.  The main thread only waits, so that a signal is seen at once and becomes a request
to stop: a torn metadata change would otherwise end in the middle of whatever Python happened to be doing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as a shell reports it."""


class Interrupted(Exception):
    """The user asked the command to stop; raised in the worker thread at a place where that is safe."""


class Failure(Exception):
    """The command ends with `code` and this one line; what is wrong is neither the library's nor the grammar's."""

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Session:
    """What a command knows of its run.  `program` is the name it was called by."""

    def __init__(self, program: str, *, debug: bool = False) -> None:
        self.program = program
        self.debug = debug
        self.interrupted = False
        self.serves = False
        """SIGTERM and SIGHUP ask the command to stop as well, as with qemu-nbd."""
        self.report_wanted = False
        """SIGUSR1 came: say once how far the work is, and reset this."""
        self._cancel: Callable[[], object] | None = None

    def interrupt(self) -> None:
        """Ask the worker to stop.  Called by the main thread, from its signal handler."""
        self.interrupted = True
        if self._cancel is not None:
            self._cancel()

    def check(self) -> None:
        """Raises Interrupted once the user asked to stop: to be called between two steps of long work."""
        if self.interrupted:
            raise Interrupted

    @contextmanager
    def cancelling(self, cancel: Callable[[], object]) -> Iterator[None]:
        """While the block runs, an interrupt also calls `cancel` (of a job), once."""
        self._cancel = cancel
        try:
            self.check()
            yield
        finally:
            self._cancel = None


def run_in_worker(session: Session, work: Callable[[], int]) -> int:
    """The exit code of `work`, done in another thread; what it raises is raised here."""
    outcome: list[int | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:  # carried to the thread that reports it, below
            outcome.append(exc)

    worker = threading.Thread(target=run, name="command")
    with _signals(session):
        worker.start()
        worker.join()
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


@contextmanager
def _signals(session: Session) -> Iterator[None]:
    """SIGINT asks the command to stop and SIGUSR1 asks how far it is, as with qemu-img.

    Only the main thread may say so; elsewhere (a test, an embedding) signals stay as they are.  One that our caller had
    ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def report(_number: int, _frame: object) -> None:
        session.report_wanted = True

    handlers: dict[int, Callable[[int, object], None]] = {signal.SIGINT: lambda _number, _frame: session.interrupt()}
    if session.serves:
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                handlers[getattr(signal, name)] = handlers[signal.SIGINT]
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = report
    before = {}
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
