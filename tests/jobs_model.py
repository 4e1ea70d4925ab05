"""What the proof of the jobs stands on: guests that write beside a job, a model that knows their every moment, and faults.

A guest is one thread that has its own stripes of the disk and does one request after the other.  All it ever did is kept, so
the content of the disk at any moment is known: that after the first `n` requests of each guest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import blocklib
from blocklib import StorageError, graph
from blocklib.node import Preallocation
from blocklib.passing import PassingFilter

STRIPE = 20000
"""Bytes, next to nothing that images know, so that guests meet in clusters."""
PATIENCE = 60.0
"""Seconds after which somebody who waits fails its test."""


class Request(NamedTuple):
    """What a guest asked for; `data` is what the range reads as afterwards."""

    offset: int
    data: bytes


class Guest:
    """One thread's requests, and how far it is."""

    def __init__(self, number: int, count: int, size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.stripes = range(number * STRIPE, size - STRIPE, count * STRIPE)
        self.log: list[Request] = []
        """Every request that was begun."""
        self.done = 0
        """Requests that were acknowledged."""

    def invent(self) -> tuple[Request, str]:
        """The next request, and by which method."""
        rng = self.rng
        inside = rng.randrange(STRIPE) if rng.random() < 0.8 else 0
        length = rng.randrange(1, STRIPE - inside + 1)
        offset = rng.choice(self.stripes) + inside
        if rng.random() < 0.15:
            return Request(offset, bytes(length)), rng.choice(["zero", "unmap"])
        return Request(offset, rng.randbytes(length)), "write"


class Moment(NamedTuple):
    """For each guest, the requests that were acknowledged and those that were begun, at some moment."""

    done: tuple[int, ...]
    begun: tuple[int, ...]


class Guests:
    """Guests of one disk that reads as `content` before; what fails is tried again until `stop`."""

    def __init__(
        self,
        disk: blocklib.Disk,
        content: bytes | bytearray,
        count: int = 2,
        *,
        seed: int = 0,
        journal: tuple[memoryview, memoryview] | None = None,
    ) -> None:
        """With a `journal` it has, for each guest, the requests that were begun and those that were acknowledged."""
        self._disk = disk
        self._journal = journal
        self._content = bytes(content)
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._done = 0
        self.refused = 0
        """Requests that failed, and were tried again."""
        self.guests = [Guest(number, count, len(content), seed * 100 + number) for number in range(count)]
        self._threads = [threading.Thread(target=self._work, args=(guest,), daemon=True) for guest in self.guests]
        for thread in self._threads:
            thread.start()

    def _work(self, guest: Guest) -> None:
        try:
            while not self._stop.is_set():
                request, method = guest.invent()
                guest.log.append(request)
                self._note(0, guest, len(guest.log))
                if not self._do(request, method):
                    guest.log.pop()  # whether it has happened is unknown: the test looks
                    guest.log.append(Request(request.offset, self._disk.read(request.offset, len(request.data))))
                guest.done += 1
                self._note(1, guest, guest.done)
                with self._changed:
                    self._done += 1
                    self._changed.notify_all()
        except BaseException as exc:
            with self._changed:
                self._failures.append(exc)
                self._changed.notify_all()

    def _note(self, which: int, guest: Guest, number: int) -> None:
        if self._journal is not None:
            self._journal[which][self.guests.index(guest)] = number

    def _do(self, request: Request, method: str) -> bool:
        """Whether it was done; False if it kept failing until the end."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if method == "write":
                    self._disk.write(request.offset, request.data)
                else:
                    self._disk.write_zeroes(request.offset, len(request.data), unmap=method == "unmap")
                assert self._disk.read(request.offset, len(request.data)) == request.data
                return True
            except StorageError:
                self.refused += 1
                if self._stop.wait(0.002):
                    return False
                assert time.monotonic() < deadline

    def wait_for(self, requests: int) -> None:
        """Return once so many requests more have been done, or they are told to stop."""
        with self._changed:
            goal = self._done + requests
            over = lambda: self._done >= goal or bool(self._failures) or self._stop.is_set()  # noqa: E731
            reached = self._changed.wait_for(over, PATIENCE)
        if self._failures:
            raise self._failures[0]
        assert reached, "the guests do not get on"

    def stop(self) -> None:
        """Let them end.  Raises what went wrong in one of them."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a guest hangs"
        if self._failures:
            raise self._failures[0]

    def now(self) -> Moment:
        """How far they are."""
        done = tuple(guest.done for guest in self.guests)  # first: what is done later was begun later, or is begun
        return Moment(done, tuple(len(guest.log) for guest in self.guests))

    def content(self) -> bytes:
        """What the disk reads as once they have stopped."""
        content = bytearray(self._content)
        for guest in self.guests:
            for offset, data in guest.log:
                content[offset : offset + len(data)] = data
        return bytes(content)

    def was_at(self, content: bytes, before: Moment, after: Moment) -> bool:
        """Whether the disk read as `content` at one moment between these two."""
        return all(
            self._was_at(guest, content, first, last)
            for guest, first, last in zip(self.guests, before.done, after.begun, strict=True)
        )

    def _was_at(self, guest: Guest, content: bytes, first: int, last: int) -> bool:
        expected = bytearray(self._content)
        mine = [slice(start, start + STRIPE) for start in guest.stripes]
        for number, (offset, data) in enumerate(guest.log[:last]):
            if number >= first and all(expected[part] == content[part] for part in mine):
                return True
            expected[offset : offset + len(data)] = data
        return all(expected[part] == content[part] for part in mine)

    def changed_since(self, moment: Moment) -> list[tuple[int, int]]:
        """(offset, length) of what they may have asked for since."""
        return [
            (offset, len(data))
            for guest, first in zip(self.guests, moment.done, strict=True)
            for offset, data in guest.log[first:]
        ]


@contextmanager
def busy(disk: blocklib.Disk, content: bytes | bytearray, count: int = 2, *, seed: int = 0) -> Iterator[Guests]:
    """Guests while the block runs."""
    guests = Guests(disk, content, count, seed=seed)
    try:
        yield guests
    finally:
        guests.stop()


class Fault(PassingFilter):
    """Stands below an image: the `number`-th request of some kinds fails, and `times` in all, or until it is mended."""

    driver = "fault"
    sees_reads: ClassVar[bool] = True
    sees_writes: ClassVar[bool] = True

    def __init__(self, kinds: Sequence[str], number: int, errno: int, times: int | None) -> None:
        super().__init__(None, None, read_only=False)
        self._kinds = kinds
        self._good = number
        self._errno = errno
        self._bad = times
        self._lock = threading.Lock()
        self.hits = 0
        """Requests that failed."""
        self.mended = False

    def _count(self, kind: str) -> None:
        with self._lock:
            if self.mended or kind not in self._kinds:
                return
            self._good -= 1
            if self._good >= 0 or self._bad == self.hits:
                return
            self.hits += 1
        raise StorageError("the test says no", errno=self._errno, operation=kind)

    def read_special(self, offset: int, view: memoryview) -> bool:
        self._count("read")
        return super().read_special(offset, view)

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self._count("write")
        super().write_special(offset, place, views)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self._count("write")
        super().zero_range(offset, length, unmap=unmap)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self._count("write")
        super().truncate(size, preallocation)

    def flush(self) -> None:
        self._count("flush")
        super().flush()


def put_fault(image: Any, fault: Fault) -> Fault:
    """Between an image, a node in use, and its file."""
    edge = image.children["file"]
    with graph.alone(image), graph.Transaction() as change:
        change.attach(fault, "file", edge.node)
        change.redirect(edge, fault)
        fault.read_only = image.read_only
    return fault


def until(job: Any, reached: Callable[[], bool]) -> bool:
    """Wait until `reached()`, which a change of the job's state may bring about; False if the job has ended before."""
    for _event in job.events():
        if reached():
            return True
    return reached()
