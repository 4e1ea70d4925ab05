"""A crew: a job's own thread and its helpers, which take pieces of work in order and, where that is asked, write in order.

Each takes the next piece when it has done one, so nothing is handed from thread to thread: that costs more than a piece does.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from blocklib.jobs.control import Control
from blocklib.jobs.runs import PIECE, SMALL_PIECE, Piece

_ALL_PIECES: Final = 64 << 20
"""Bytes of the pieces that many threads have in memory together."""
_MOST_THREADS: Final = 4
"""More bring nothing where bytes only pass through memory."""
_MOST_THINKING: Final = 40
"""Where they are compressed as well, each processor counts, up to what fits into 256 MiB together."""


def default_threads(*, thinking: bool = False) -> int:
    """One more than there are processors that we may use, since one of them writes, within reason."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available + 1, _MOST_THINKING if thinking else _MOST_THREADS)


def piece_size(threads: int) -> int:
    """The bytes of a piece, a power of two, where so many threads work."""
    return max(SMALL_PIECE, min(PIECE, _ALL_PIECES // (1 << (threads - 1).bit_length())))


class Crew:
    """At most `size` threads, one of which is that of who calls `run`; the others are started as they are needed.

    `work` gets a piece and the thread's own buffer of `buffer` bytes; each byte counts `reads` times against the speed limit.
    The first failure stops everything and is raised by `run`.
    """

    def __init__(
        self, control: Control, work: Callable[[Piece, memoryview], None], size: int, *, buffer: int, reads: int = 1
    ) -> None:
        self._buffer = buffer
        self._reads = reads
        self._control = control
        self._work = work
        self._size = size
        self._taking = threading.Lock()  # guards: _pieces, _ahead, _last; held while the next piece is cut
        self._pieces: Iterator[Piece] = iter(())
        self._ahead: Piece | None = None
        """The next piece: only if there is one, another thread is of use."""
        self._last: threading.Lock | None = None
        self._changed = threading.Condition(threading.Lock())  # guards what follows
        self._threads: list[threading.Thread] = []
        self._helping = 0  # helpers that are neither parked nor at their end
        self._parked = 0
        self._failure: BaseException | None = None
        self._stopped = False

    def run(self, pieces: Iterable[Piece]) -> None:
        """Do all of `pieces`, which are numbered from 0 on, once.  Nothing is in flight any more when it returns or raises."""
        self._pieces = iter(pieces)
        try:
            self._ahead = next(self._pieces, None)
            buffer = None
            while True:
                self._pause_point()
                piece = self._take()
                if piece is None:
                    break
                if buffer is None:
                    buffer = self._new_buffer()
                self._do(piece, buffer)
            self._settle()
        finally:
            self._close()
        if self._failure is not None:
            raise self._failure

    def take_turn(self, piece: Piece) -> bool:
        """Wait until all pieces before this one have written; False if the work is to stop instead."""
        if piece.before is not None:
            piece.before.acquire()
        return not self._stopped

    def end_turn(self, piece: Piece) -> None:
        """Let the piece after this one write; again does nothing.  At its end, a piece's turn has ended anyway."""
        if not piece.is_written:
            piece.is_written = True
            piece.after.release()

    def _pause_point(self) -> None:
        if self._control.stop_requested:
            self._settle()
        self._control.pause_point()
        if self._parked:
            with self._changed:
                self._helping += self._parked
                self._parked = 0
                self._changed.notify_all()

    def _settle(self) -> None:
        """Wait until no helper does anything: all is done, or the job is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: not self._helping)

    def _close(self) -> None:
        """Let requests in flight end, and the threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start_helper(self) -> None:
        with self._changed:
            if len(self._threads) + 1 >= self._size or self._stopped:
                return
            self._helping += 1
            thread = threading.Thread(target=self._help, name="blocklib copy", daemon=True)
            self._threads.append(thread)
        thread.start()

    def _take(self) -> Piece | None:
        """The next piece, or None if there is none, or the work has stopped."""
        try:
            with self._taking:
                piece = None if self._stopped else self._ahead
                if piece is None:
                    return None
                self._ahead = next(self._pieces, None)
                piece.before, self._last = self._last, piece.after
        except BaseException as exc:
            self._fail(exc)
            return None
        if self._ahead is not None and len(self._threads) + 1 < self._size:
            self._start_helper()
        self._control.begin(piece.copied * self._reads)
        return piece

    def _do(self, piece: Piece, buffer: memoryview) -> None:
        try:
            self._work(piece, buffer)
        except BaseException as exc:  # it is raised again by `run`
            self._fail(exc)
        finally:
            self.end_turn(piece)

    def _fail(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._stopped = True
            self._changed.notify_all()

    # -- in a helper --------------------------------------------------------------------------------------------------

    def _help(self) -> None:
        try:
            buffer = self._new_buffer()
            while self._may_take():
                piece = self._take()
                if piece is None:
                    break
                self._do(piece, buffer)
        except BaseException as exc:
            self._fail(exc)
        finally:
            with self._changed:
                self._helping -= 1
                self._changed.notify_all()

    def _may_take(self) -> bool:
        """Wait for the speed limit, and while the job is paused; False if the work has stopped."""
        while not self._control.wait_to_begin():
            with self._changed:
                self._helping -= 1
                self._parked += 1
                self._changed.notify_all()
                # Who lets us go on counts us as helping again.
                self._changed.wait_for(lambda: self._stopped or not self._parked)
                if self._stopped:
                    self._helping += 1
                    return False
        return True

    def _new_buffer(self) -> memoryview:
        if sys.platform == "win32":
            return memoryview(mmap.mmap(-1, self._buffer))
        return memoryview(mmap.mmap(-1, self._buffer, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
