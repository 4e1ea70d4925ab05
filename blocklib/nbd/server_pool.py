"""The threads that serve requests which may wait for storage."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Pool:
    """At most `most` threads, each made when work waits and no sooner.  A job must not raise, and not wait for another."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: SimpleQueue[tuple[Callable[[Any], object], Any] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards: _threads, _ended
        self._ended = False

    def submit(self, job: Callable[[Any], object], argument: Any) -> None:
        """Have `job(argument)` done by some thread, in its turn."""
        if len(self._threads) < self._most and (not self._threads or not self._jobs.empty()):
            with self._lock:
                if not self._ended and len(self._threads) < self._most:
                    thread = threading.Thread(target=self._work, name="nbd worker", daemon=True)
                    thread.start()
                    self._threads.append(thread)
        self._jobs.put((job, argument))

    def end(self) -> None:
        """Wait until all that was submitted is done, and for the threads to end."""
        with self._lock:
            self._ended = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        take = self._jobs.get
        while (item := take()) is not None:
            job, argument = item
            job(argument)
            del item, job, argument  # the buffers of a request are not kept until the next one comes
