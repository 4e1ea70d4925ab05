"""Random requests to an image on a recording disk, and what each guest sector may read as after a crash.

Each sector belongs to one thread, so what was done to it has an order even when eight threads write at once.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import blocklib
from blocklib.disk import Disk
from blocklib.graph import ALL, Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Node
from tests.crash.recording import SECTOR, RecordingNode

ZERO = 0
_STAMP = struct.Struct(">Q")


def stamped(stamp: int) -> bytes:
    """One sector that says which request wrote it."""
    return _STAMP.pack(stamp) * (SECTOR // _STAMP.size)


def stamp_of(sector: bytes) -> int | None:
    """Which request wrote a sector: ZERO for zeroes, None for a sector that nobody wrote like that."""
    (stamp,) = _STAMP.unpack_from(sector)
    return stamp if sector == stamped(stamp) else None


@dataclass(frozen=True, slots=True)
class _Change:
    begun: int
    ended: int
    stamp: int
    sure: bool
    """Whether the sector has this content afterwards, or may have kept the one before (a discard)."""


class History:
    """What was done to each sector, in terms of positions in the log of the recording disk."""

    def __init__(self, disk: RecordingNode) -> None:
        self._disk = disk
        self._changes: dict[int, list[_Change]] = {}
        self._flushes: list[tuple[int, int]] = []  # (begun, ended)

    def change(self, request: Callable[[], object], first: int, n: int, stamp: int, *, sure: bool = True) -> None:
        """Run a request that gives sectors [first, first + n) a content."""
        begun = len(self._disk.log)
        request()
        change = _Change(begun, len(self._disk.log), stamp, sure)
        for sector in range(first, first + n):
            self._changes.setdefault(sector, []).append(change)

    def flush(self, request: Callable[[], object]) -> None:
        begun = len(self._disk.log)
        request()
        self._flushes.append((begun, len(self._disk.log)))

    def allowed(self, sector: int, cut: int) -> set[int]:
        """What a sector may read as after a crash at `cut`."""
        durable = max((begun for begun, ended in self._flushes if ended <= cut), default=-1)
        allowed = {ZERO}
        for change in self._changes.get(sector, ()):
            if change.begun > cut:
                break
            if change.sure and change.ended <= durable:
                allowed = set()
            allowed.add(change.stamp)
        return allowed

    def now(self, sector: int) -> set[int]:
        """What a sector may read as with nothing lost."""
        allowed = {ZERO}
        for change in self._changes.get(sector, ()):
            if change.sure:
                allowed = set()
            allowed.add(change.stamp)
        return allowed


def disk_on(node: Node, *, writable: bool, options: Mapping[str, int] | None = None) -> Disk:
    """The qcow2 image that is stored in `node`, opened; the node lives as long as the test."""
    with Transaction() as change:
        change.attach(None, "test", node, wanted=CONSISTENT_READ, shared=ALL)
    below = Disk(node, "r")
    return blocklib.open(
        {"driver": "qcow2", "file": below, "discard": "unmap", **(options or {})}, "r+" if writable else "r"
    )


def new_image(size: int, options: Mapping[str, int | str]) -> bytes:
    """The bytes of an empty image."""
    from blocklib.formats.qcow2.create import header_for, write_empty_image
    from blocklib.options import check_options

    node = RecordingNode()
    with Transaction() as change:
        edge = change.attach(None, "create", node, wanted=CONSISTENT_READ | WRITE | RESIZE)
    write_empty_image(edge, header_for(size, check_options("qcow2", dict(options), table="create")))
    return bytes(node.data)


class Worker:
    """One thread's requests: to its own stripes of the disk, decided by its own seed."""

    def __init__(self, disk: Disk, history: History, number: int, n_workers: int, *, stripe: int, seed: int) -> None:
        self._disk = disk
        self._history = history
        self._number = number
        self._n_workers = n_workers
        self._stripe = stripe
        self._rnd = random.Random(f"{seed}/{number}")
        self._stamps = iter(range((number + 1) << 32, (number + 2) << 32))

    def run(self, n_requests: int) -> None:
        for _ in range(n_requests):
            self._one_request()

    def _place(self) -> tuple[int, int]:
        """(first sector, number of sectors) inside one of our stripes."""
        sectors = self._disk.size // SECTOR
        stripes = -(-sectors // self._stripe)
        stripe = self._rnd.randrange(self._number, max(stripes, self._number + 1), self._n_workers)
        start = stripe * self._stripe
        end = min(sectors, start + self._stripe)
        if start >= end:
            return 0, 0
        first = self._rnd.randrange(start, end)
        if self._rnd.random() < 0.3:
            return start, end - start
        return first, self._rnd.randrange(1, end - first + 1)

    def _one_request(self) -> None:
        rnd, disk, history = self._rnd, self._disk, self._history
        first, n = self._place()
        offset, length = first * SECTOR, n * SECTOR
        kind = rnd.random()
        if kind < 0.08:
            history.flush(disk.flush)
        elif not n:
            return
        elif kind < 0.7:
            stamp = next(self._stamps)
            history.change(lambda: disk.write(offset, stamped(stamp) * n), first, n, stamp)
        elif kind < 0.8:
            unmap = rnd.random() < 0.5
            history.change(lambda: disk.write_zeroes(offset, length, unmap=unmap), first, n, ZERO)
        elif kind < 0.92:
            history.change(lambda: disk.discard(offset, length), first, n, ZERO, sure=False)
        else:
            self._read(first, n)

    def _read(self, first: int, n: int) -> None:
        data = self._disk.read(first * SECTOR, n * SECTOR)
        for index in range(n):
            found = stamp_of(data[index * SECTOR : (index + 1) * SECTOR])
            assert found in self._history.now(first + index), f"sector {first + index} reads {found}"


def run_workers(workers: list[Worker], n_requests: int) -> None:
    """Let all of them work at once; raises what the first of them raised."""
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            worker.run(n_requests)
        except BaseException as exc:
            failures.append(exc)

    if len(workers) == 1:
        workers[0].run(n_requests)
        return
    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def difference(data: bytes, expected: Callable[[int], set[int]]) -> str | None:
    """The first sector of the disk's content `data` that is not as expected, in words; None where all are."""
    for sector in range(len(data) // SECTOR):
        found = stamp_of(data[sector * SECTOR : (sector + 1) * SECTOR])
        if found not in expected(sector):
            return f"sector {sector} reads {found}, expected one of {sorted(expected(sector))}"
    return None
