"""A crew: worker threads that take pieces of work in order, read in any order, and write in order where that is asked."""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from blocklib.jobs.runs import PIECE, Piece

BUFFER: Final = 2 * PIECE
"""Bytes of a worker's buffer: a piece, and what it is compared with."""
_MOST_THREADS: Final = 4
"""More bring nothing where bytes only pass through memory."""
_MOST_THINKING: Final = 64
"""Where they are compressed as well, each processor counts; this many buffers are enough."""


def default_threads(*, thinking: bool = False) -> int:
    """One more than there are processors that we may use, since one of them writes, within reason."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available + 1, _MOST_THINKING if thinking else _MOST_THREADS)


class Crew:
    """At most `size` threads, started as they are needed, and as many pieces waiting for them.

    `work` gets a piece and the worker's own buffer.  The first failure stops everything and is raised to who submits.
    """

    def __init__(self, work: Callable[[Piece, memoryview], None], size: int) -> None:
        self._work = work
        self._size = size
        self._changed = threading.Condition(threading.Lock())  # guards everything below
        self._threads: list[threading.Thread] = []
        self._waiting: deque[Piece] = deque()
        self._busy = 0
        self._turn = 0
        self._failure: BaseException | None = None
        self._closed = False

    def submit(self, piece: Piece) -> None:
        """Hand out a piece; waits while enough others are waiting.  Raises the failure of an earlier one."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._size or self._stopped)
            self._raise_failure()
            self._waiting.append(piece)
            if self._busy + len(self._waiting) > len(self._threads) < self._size:
                thread = threading.Thread(target=self._main, name="blocklib copy", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all that was submitted is done.  Raises the first failure."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy) or self._stopped)
            self._raise_failure()

    def close(self) -> None:
        """Let requests in flight end, drop what waits, end the threads."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def take_turn(self, piece: Piece) -> bool:
        """Wait until all pieces before this one have written; False if the work is to stop instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == piece.index or self._stopped)
            return not self._stopped

    def end_turn(self) -> None:
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    @property
    def _stopped(self) -> bool:
        return self._closed or self._failure is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _main(self) -> None:
        buffer = memoryview(mmap.mmap(-1, BUFFER))
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                piece = self._waiting.popleft()
                self._busy += 1
                self._changed.notify_all()
            failure: BaseException | None = None
            try:
                self._work(piece, buffer)
            except BaseException as exc:  # it is raised again in `submit` or `settle`
                failure = exc
            with self._changed:
                self._busy -= 1
                self._failure = self._failure or failure
                self._changed.notify_all()
