"""The thread that waits for all sockets of a server at once."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

_log = logging.getLogger("blocklib.nbd")

_LONGEST_WAIT: Final = 3600.0


class Watcher(Protocol):
    """What waits for a socket."""

    def ready(self, events: int) -> None:
        """The socket can be read or written without waiting.  Called by the loop's thread."""

    def fail(self, exc: Exception) -> None:
        """`ready` has raised this: an error of ours, which must not end the service of others."""


class Loop:
    """Calls watchers when their sockets are ready, and functions when other threads or the clock ask for it.

    All methods but `call` are for the loop's own thread, or for before it starts.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, tuple[int, Watcher]] = {}
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, Callable[[], object]]] = []
        self._wake_up, self._waker = socket.socketpair()
        self._wake_up.setblocking(False)
        self._waker.setblocking(False)
        self._woken = False
        self._ended = False
        self._thread: threading.Thread | None = None
        self.watch(self._wake_up.fileno(), READ, self)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="nbd server", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the loop has ended."""
        if self._thread is not None:
            self._thread.join()

    def is_current(self) -> bool:
        """Whether the caller runs in the loop's thread."""
        return threading.current_thread() is self._thread

    def end(self) -> None:
        """Let the thread end when it has done what it is at."""
        self._ended = True

    def call(self, function: Callable[[], object]) -> None:
        """Have `function`, which must not raise, called soon by the loop's thread.  For any thread."""
        self._calls.append(function)
        # The loop forgets that it was woken before it looks at the calls: one of the two sees this one.
        if not self._woken:
            self._woken = True
            try:
                self._waker.send(b"\0")
            except OSError:  # full, so it will wake up; or closed, and nobody is left to call
                pass

    def call_at(self, moment: float, function: Callable[[], object]) -> None:
        """Have `function` called at `moment` of time.monotonic, or soon after."""
        self._timers.append((moment, function))
        self._timers.sort(key=lambda timer: timer[0])

    def watch(self, fd: int, events: int, watcher: Watcher) -> None:
        """Wait for exactly `events` (READ, WRITE, both or 0) of a socket from now on."""
        before = self._watched.get(fd)
        if before is not None and before == (events, watcher):
            return
        if before is None or not before[0]:
            if events:
                self._selector.register(fd, events, watcher)
        elif not events:
            self._selector.unregister(fd)
        else:
            self._selector.modify(fd, events, watcher)
        self._watched[fd] = events, watcher

    def forget(self, fd: int) -> None:
        """Stop waiting for a socket, which is going to be closed."""
        events, _watcher = self._watched.pop(fd, (0, None))
        if events:
            self._selector.unregister(fd)

    def ready(self, events: int) -> None:
        """Another thread has woken us."""
        self._wake_up.recv(4096)

    def fail(self, exc: Exception) -> None:
        """Nothing but our own socket is concerned."""

    def _run(self) -> None:
        try:
            while not self._ended:
                self._step()
        finally:
            self._selector.close()
            self._wake_up.close()
            self._waker.close()

    def _step(self) -> None:
        wait = _LONGEST_WAIT
        if self._calls:
            wait = 0.0
        elif self._timers:
            wait = max(0.0, self._timers[0][0] - time.monotonic())
        for key, events in self._selector.select(wait):
            watcher: Any = key.data
            if key.fd not in self._watched:  # an earlier watcher of this round has closed it
                continue
            try:
                watcher.ready(events)
            except Exception as exc:
                _log.exception("internal error")
                watcher.fail(exc)
        self._woken = False
        for _ in range(len(self._calls)):
            self._do(self._calls.popleft())
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._do(self._timers.pop(0)[1])

    def _do(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception:  # the others still want to be served
            _log.exception("internal error")
