"""Requests in flight: counted always, listed never, waited for when somebody must.

A thread publishes in its own slot that it is inside, *then* reads the flag word; whoever sets a flag looks at the slots
afterwards.  One of the two therefore sees the other, with no lock on the path of a request.  Drain (wait until nobody is
inside), deferred frees (wait until everybody who was inside has left) and closing all stand on this.
"""

from __future__ import annotations

import threading
import weakref
from typing import Final

from blocklib.errors import ClosedError, UsageError

DRAINING: Final = 1
"""New outermost requests wait."""
CLOSED: Final = 2
"""New requests are refused."""
FORKED: Final = 4
"""The object belongs to the parent process: everything is refused."""
FORKED_TEXT: Final = "the disk was opened by the process that forked this one; open it again here"


class _Slot:
    """One thread's presence: how many requests deep, and the epoch in which the outermost began."""

    __slots__ = ("__weakref__", "depth", "epoch")

    def __init__(self) -> None:
        self.depth = 0
        self.epoch = 0


class _Local(threading.local):
    slot: _Slot | None = None


class RequestTracker:
    """Counts requests per thread.

    `flags` is the one word that a request reads on its way in; a non-zero word sends it to `_wait_to_enter`.  Requests
    nest: only the outermost of a thread can be made to wait, so that a request inside may use any path to finish.
    """

    __slots__ = ("_changed", "_drains", "_local", "_slots", "epoch", "flags")

    def __init__(self) -> None:
        self.flags = 0
        self.epoch = 0
        self._drains = 0
        self._local = _Local()
        self._changed = threading.Condition(threading.Lock())  # guards: _slots, _drains and the writing of flags
        self._slots: list[weakref.ref[_Slot]] = []

    def enter(self) -> None:
        """Begin a request; pair it with `leave` in a ``finally``."""
        slot = self._local.slot
        if slot is None:
            slot = self._new_slot()
        if slot.depth == 0:
            slot.epoch = self.epoch
        slot.depth += 1
        if self.flags and slot.depth == 1:
            self._wait_to_enter(slot)

    def leave(self) -> None:
        """End a request."""
        slot = self._local.slot
        assert slot is not None
        slot.depth -= 1
        if self.flags and slot.depth == 0:
            with self._changed:
                self._changed.notify_all()

    def inside(self) -> bool:
        """Whether the calling thread is inside a request."""
        slot = self._local.slot
        return slot is not None and slot.depth > 0

    def drain(self) -> None:
        """Hold new outermost requests back and wait until nobody is inside; nests, pair it with `undrain`.

        Raises UsageError when called from inside a request: it would wait for itself.
        """
        if self.inside():
            raise UsageError("a disk cannot be drained from inside one of its own requests")
        with self._changed:
            self._drains += 1
            self.flags |= DRAINING
            try:
                self._changed.wait_for(lambda: not self._busy())
            except BaseException:
                self._end_drain()
                raise

    def undrain(self) -> None:
        """Let requests in again once every `drain` has its `undrain`."""
        with self._changed:
            self._end_drain()

    def refuse(self, flag: int) -> None:
        """Refuse every later request (flag is CLOSED or FORKED); those inside go on."""
        with self._changed:
            self.flags |= flag
            self._changed.notify_all()

    def refuse_after_fork(self) -> None:
        """As `refuse(FORKED)`, in the child of a fork, where a lock may be held for ever by a thread that is gone."""
        self.flags |= FORKED
        self._changed = threading.Condition(threading.Lock())

    def next_epoch(self) -> int:
        """Open a new epoch and return it: `left(epoch)` is true once all requests that began before it have ended.

        Calls must be serialised by the caller.
        """
        self.epoch += 1
        return self.epoch

    def left(self, epoch: int) -> bool:
        """Whether every request that began before `epoch` has ended (the caller's own included)."""
        for reference in tuple(self._slots):
            slot = reference()
            if slot is not None and slot.depth > 0 and slot.epoch < epoch:
                return False
        return True

    def _busy(self) -> bool:
        for reference in self._slots:
            slot = reference()
            if slot is not None and slot.depth > 0:
                return True
        return False

    def _end_drain(self) -> None:
        self._drains -= 1
        if self._drains == 0:
            self.flags &= ~DRAINING
            self._changed.notify_all()

    def _new_slot(self) -> _Slot:
        slot = self._local.slot = _Slot()
        with self._changed:
            self._slots = [reference for reference in self._slots if reference() is not None]
            self._slots.append(weakref.ref(slot))
        return slot

    def _wait_to_enter(self, slot: _Slot) -> None:
        # Step back first: whoever drains must not count a request that waits for the drain to end.
        slot.depth = 0
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.flags & (CLOSED | FORKED) or not self.flags & DRAINING)
            if self.flags & (CLOSED | FORKED):
                raise ClosedError(FORKED_TEXT if self.flags & FORKED else "the disk is closed")
            slot.epoch = self.epoch
            slot.depth = 1


class RangeLock:
    """Keeps a read-modify-write apart from every other write that touches the same bytes.

    Ordinary writes exclude only exclusive ones; reads take no part.
    """

    __slots__ = ("_changed", "_held")

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: list[tuple[int, int, bool]] = []  # (start, end, exclusive)

    def acquire(self, start: int, end: int, *, exclusive: bool) -> tuple[int, int, bool]:
        """Wait until [start, end) is free for us and hold it; give the result to `release`."""
        mine = (start, end, exclusive)

        def is_free() -> bool:
            return not any((exclusive or other) and s < end and start < e for s, e, other in self._held)

        with self._changed:
            self._changed.wait_for(is_free)
            self._held.append(mine)
        return mine

    def release(self, mine: tuple[int, int, bool]) -> None:
        with self._changed:
            self._held.remove(mine)
            self._changed.notify_all()
