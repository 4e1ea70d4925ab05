"""Engines: how many transfers of one file are made at once, by a few threads or through an io_uring.

In the room of protocols.  What they share belongs to the process; the child of a fork begins anew.
"""

from __future__ import annotations

import errno
import os
import threading
from queue import SimpleQueue
from time import sleep
from typing import TYPE_CHECKING, Final

from blocklib._fast.transfers import Moves, move_one_by_one

if TYPE_CHECKING:
    from blocklib.protocols.opened import Aio
    from blocklib.protocols.uring import Ring

THREADS: Final = 16
"""Transfers that threads have on their way, at most."""
_IDLE_RINGS: Final = 4
"""Rings that are kept for later."""


def move(aio: Aio, fd: int, moves: Moves, *, writing: bool, alignment: int, waits: bool) -> None:
    """Make all transfers, and set their results.

    `waits` says that they go to the device, so that many should be on their way; what only copies between the page cache and
    memory is done here and now.
    """
    if aio != "threads" and _move_through_ring(fd, moves, writing=writing, alignment=alignment):
        return
    if waits and moves.count > 1:
        _workers.move(fd, moves, writing=writing, alignment=alignment)
    else:
        move_one_by_one(fd, moves, writing=writing, alignment=alignment)


# -- threads ----------------------------------------------------------------------------------------------------------


class _Work:
    """Transfers that threads share out among themselves."""

    def __init__(self, fd: int, moves: Moves, writing: bool, alignment: int) -> None:
        self.fd = fd
        self.moves = moves
        self.writing = writing
        self.alignment = alignment
        self.shares = min(moves.count, THREADS)
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self.stopped = False
        self.running = [False] * self.shares

    def run(self, share: int) -> None:
        self.running[share] = True  # published before `stopped` is read: who stops the work looks at this afterwards
        error = None
        try:
            if not self.stopped:
                move_one_by_one(
                    self.fd, self.moves, writing=self.writing, alignment=self.alignment, first=share, step=self.shares
                )
        except BaseException as exc:  # raised by who waits for it
            error = exc
        self.running[share] = False
        self.ended.put(error)


class _Workers:
    """Threads that live as long as the process; as many as were needed at once."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[_Work, int]] = SimpleQueue()
        self._lock = threading.Lock()  # guards: _count
        self._count = 0

    def move(self, fd: int, moves: Moves, *, writing: bool, alignment: int) -> None:
        work = _Work(fd, moves, writing, alignment)
        self._start(work.shares)
        try:
            for share in range(work.shares):
                self._waiting.put((work, share))
            errors = [work.ended.get() for _ in range(work.shares)]
        except BaseException:
            work.stopped = True
            _wait_for(work)
            raise
        for error in errors:
            if error is not None:
                raise error

    def _start(self, wanted: int) -> None:
        with self._lock:
            while self._count < wanted:
                threading.Thread(target=self._main, name="blocklib aio", daemon=True).start()
                self._count += 1

    def _main(self) -> None:
        while True:
            work, share = self._waiting.get()
            work.run(share)


def _wait_for(work: _Work) -> None:
    """Wait, whoever presses Ctrl-C again: the memory must not be given back while a transfer is on its way."""
    while any(work.running):
        try:
            sleep(0.001)
        except BaseException:  # noqa: S112 - the first one is raised, once nothing is on its way
            continue


# -- io_uring ---------------------------------------------------------------------------------------------------------


def _move_through_ring(fd: int, moves: Moves, *, writing: bool, alignment: int) -> bool:
    """Make all transfers through a ring; False where that cannot be or does not pay, and all are to be made in another way."""
    try:
        ring = _take_ring()
    except OSError:
        return False
    try:
        moved = ring.move(fd, moves, writing=writing, alignment=alignment)
    except BaseException:
        ring.close()
        raise
    _give_back(ring)
    return moved


def check_ring(filename: str) -> None:
    """Say, once in this process, that there is no io_uring for us and what is done instead."""
    global _told
    try:
        _give_back(_take_ring())
    except OSError as exc:
        if not _told:
            _told = True
            import logging

            why = "this kernel has none" if exc.errno == errno.ENOSYS else f"the kernel says: {exc.strerror}"
            logging.getLogger("blocklib").warning(
                "%s: io_uring is not available (%s), so aio=io_uring works as aio=threads", filename, why
            )


def _take_ring() -> Ring:
    try:
        return _rings.pop()
    except IndexError:
        from blocklib.protocols.uring import Ring

        return Ring()


def _give_back(ring: Ring) -> None:
    if len(_rings) < _IDLE_RINGS:
        _rings.append(ring)
    else:
        ring.close()


_workers = _Workers()
_rings: list[Ring] = []
_told = False


def _forget() -> None:
    """In the child of a fork: the threads are not there, and the rings are the parent's."""
    global _workers
    _workers = _Workers()
    while _rings:
        _rings.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
