"""Random requests to an image on a recording disk, and what each guest sector may read as after a crash.

Each sector belongs to one thread, so what was done to it has an order even when eight threads write at once.
"""

from __future__ import annotations

import itertools
import random
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from blocklib import batch
from blocklib.disk import Disk
from blocklib.errors import BatchError, BlocklibError, PoisonedError, StorageError
from blocklib.formats.qcow2.create import header_for, write_empty_image
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Node
from blocklib.options import check_options
from tests.crash.recording import SECTOR, RecordingNode

ZERO = 0
BASE = 1 << 60
"""Sector n of a backing file is stamped BASE + n."""
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
    """The length of the log."""
    ended: int
    """The time: a request that ends may have changed tables in memory alone, and log nothing."""
    stamp: int | None
    """None: what lies below shows through, or zeroes."""
    sure: bool
    """Whether the sector has this content afterwards, or may have kept the one before (a discard, a failed write)."""


class History:
    """What was done to each sector, when, and what was in the log of the recording disk by then."""

    def __init__(self, disk: RecordingNode, *, base_sectors: int = 0) -> None:
        self._disk = disk
        self._base_sectors = base_sectors
        self._changes: dict[int, list[_Change]] = {}
        self._flushes: list[tuple[int, int]] = []  # (time when it began, length of the log when it ended)
        self._clock = itertools.count()

    def change(
        self, request: Callable[[], object], first: int, n: int, stamp: int | None, *, sure: bool = True, step: int = 1
    ) -> None:
        """Run a request that gives sectors [first, first + n) a content, or every `step`-th of them."""
        begun = len(self._disk.log)
        try:
            request()
        except BlocklibError:
            sure = False
            raise
        finally:
            change = _Change(begun, next(self._clock), stamp, sure)
            for sector in range(first, first + n, step):
                self._changes.setdefault(sector, []).append(change)

    def flush(self, request: Callable[[], object]) -> None:
        begun = next(self._clock)
        request()
        self._flushes.append((begun, len(self._disk.log)))

    def allowed(self, cut: int) -> Callable[[int], set[int]]:
        """What each sector may read as after a crash at `cut`."""
        durable = max((begun for begun, ended in self._flushes if ended <= cut), default=-1)
        known: dict[int, set[int]] = {}

        def of_sector(sector: int) -> set[int]:
            if sector not in known:
                known[sector] = self._contents(sector, cut, durable)
            return known[sector]

        return of_sector

    def now(self, sector: int) -> set[int]:
        """What a sector may read as with nothing lost."""
        return self._contents(sector, len(self._disk.log), next(self._clock))

    def _contents(self, sector: int, cut: int, durable: int) -> set[int]:
        below = BASE + sector if sector < self._base_sectors else ZERO
        allowed = {below}
        for change in self._changes.get(sector, ()):
            if change.begun > cut:
                break
            if change.sure and change.ended < durable:
                allowed = set()
            allowed.add(below if change.stamp is None else change.stamp)
        return allowed


def new_image(size: int, options: Mapping[str, int | str]) -> bytes:
    """The bytes of an empty image."""
    node = RecordingNode()
    with Transaction() as change:
        edge = change.attach(None, "create", node, wanted=CONSISTENT_READ | WRITE | RESIZE)
    write_empty_image(edge, header_for(size, check_options("qcow2", dict(options), table="create")))
    return bytes(node.data)


def disk_on(
    file: Node, *, writable: bool = True, options: Mapping[str, int] | None = None, backing: Disk | None = None
) -> Disk:
    """The qcow2 image that is stored in `file`, opened with ``discard=unmap``."""
    typed = check_options("qcow2", {**(options or {}), "file": {}})
    node = Qcow2Node.from_options(typed, read_only=not writable)
    node.discard_passes = True
    with Transaction() as change:
        change.attach(node, "file", file)
        if backing is not None:
            change.attach(node, "backing", backing.node)
    node.load()
    disk = Disk(node, "r+" if writable else "r")
    if writable:
        node.activate()
    return disk


def base_disk(sectors: int) -> Disk:
    """A backing file with a stamp in each sector."""
    file = RecordingNode(data=new_image(sectors * SECTOR, {}))
    with disk_on(file) as disk:
        disk.write(0, b"".join(stamped(BASE + sector) for sector in range(sectors)))
    return disk_on(RecordingNode(data=bytes(file.data)), writable=False)


@dataclass
class Worker:
    """One thread's requests: to its own stripes of the disk, decided by its own seed."""

    disk: Disk
    history: History
    number: int
    n_workers: int
    stripe: int
    """Sectors; neighbouring stripes belong to different workers."""
    seed: int
    resizes: bool = False
    compresses: bool = False
    _rnd: random.Random = field(init=False)
    _next_stamp: int = field(init=False)

    def __post_init__(self) -> None:
        self._rnd = random.Random(f"{self.seed}/{self.number}")
        self._next_stamp = (self.number + 1) << 32

    def run(self, n_requests: int) -> None:
        """Make requests, until the image is poisoned; one that the recording disk makes fail is passed over."""
        batch.expect(1_000_000, writing=True)
        for _ in range(n_requests):
            try:
                self._one_request()
            except StorageError as exc:
                cause = exc.__cause__ if isinstance(exc, BatchError) else exc
                if isinstance(cause, PoisonedError):
                    return
                if not isinstance(cause, StorageError) or cause.operation != "injected":
                    raise
            except PoisonedError:
                return

    def write_somewhere(self, n_times: int) -> None:
        """Write stamps without keeping a history, then flush."""
        for _ in range(n_times):
            first, n = self._place()
            self.disk.write(first * SECTOR, stamped(BASE - 1) * n)
        self.disk.flush()

    def _place(self) -> tuple[int, int]:
        """(first sector, number of sectors) inside one of our stripes."""
        sectors = self.disk.size // SECTOR
        stripes = -(-sectors // self.stripe)
        stripe = self._rnd.randrange(self.number, max(stripes, self.number + 1), self.n_workers)
        start = stripe * self.stripe
        end = min(sectors, start + self.stripe)
        if start >= end:
            return 0, 0
        if self._rnd.random() < 0.2:
            return start, end - start
        first = self._rnd.randrange(start, end)
        return first, min(end - first, self._rnd.choice((1, 2, 9, 70, 300)))

    def _one_request(self) -> None:
        rnd, disk, history = self._rnd, self.disk, self.history
        first, n = self._place()
        offset, length = first * SECTOR, n * SECTOR
        kind = rnd.random()
        if kind < 0.08:
            history.flush(disk.flush)
        elif self.resizes and kind < 0.12:
            self._resize()
        elif not n:
            return
        elif self.compresses and kind < 0.4:
            self._write_compressed(first)
        elif kind < 0.7:
            self._next_stamp += 1
            stamp = self._next_stamp
            data = memoryview(stamped(stamp) * n)
            if kind < 0.47:
                history.change(lambda: disk.write(offset, data), first, n, stamp)
            elif kind < 0.55:
                step = rnd.choice((1, 2, 5, 9))
                offsets = list(range(offset, offset + length, step * SECTOR))
                rnd.shuffle(offsets)
                part = data[: len(offsets) * SECTOR]
                history.change(lambda: disk.write_batch(offsets, part), first, n, stamp, step=step)
            else:
                unit = disk.node.cluster_size() or SECTOR
                cut = min(length, (offset // unit + rnd.randint(1, 3)) * unit - offset)
                runs = [(start, part) for start, part in ((offset, data[:cut]), (offset + cut, data[cut:])) if len(part)]
                history.change(lambda: disk.write_runs(runs), first, n, stamp)
        elif kind < 0.8:
            unmap = rnd.random() < 0.5
            history.change(lambda: disk.write_zeroes(offset, length, unmap=unmap), first, n, ZERO)
        elif kind < 0.92:
            history.change(lambda: disk.discard(offset, length), first, n, ZERO, sure=False)
        else:
            difference = difference_in(disk.read(offset, length), history.now, first)
            assert difference is None, difference

    def _write_compressed(self, near: int) -> None:
        """Write a few whole clusters that begin near a sector, inside one stripe; allocated ones are refused."""
        disk = self.disk
        unit = (disk.node.cluster_size() or 0) // SECTOR
        first = near // unit * unit
        stop = min((near // self.stripe + 1) * self.stripe, disk.size // SECTOR, first + unit * self._rnd.choice((1, 1, 5)))
        if stop != disk.size // SECTOR:
            stop = stop // unit * unit
        if stop <= first:
            return
        self._next_stamp += 1
        stamp = self._next_stamp
        data = stamped(stamp) * (stop - first)
        try:
            self.history.change(lambda: disk.write_compressed(first * SECTOR, data), first, stop - first, stamp)
        except StorageError as exc:
            if exc.operation != "write compressed":
                raise

    def _resize(self) -> None:
        disk, history = self.disk, self.history
        before = disk.size // SECTOR
        after = max(1, before + self._rnd.choice((-300, -7, 5, 90, 700)))
        if after < before:  # what is cut off may be there again if the host crashes, emptied or not
            history.change(lambda: disk.truncate(after * SECTOR, shrink=True), after, before - after, None, sure=False)
        else:
            history.change(lambda: disk.truncate(after * SECTOR), before, after - before, ZERO)


def run_workers(workers: list[Worker], n_requests: int) -> None:
    """Let all of them work at once; raises what the first of them raised."""
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            worker.run(n_requests)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers[1:]]
    for thread in threads:
        thread.start()
    work(workers[0])
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def difference_in(data: bytes, expected: Callable[[int], set[int]], first: int = 0) -> str | None:
    """The first sector of `data`, which begins at sector `first`, that is not as expected, in words; None where all are."""
    for index in range(len(data) // SECTOR):
        found = stamp_of(data[index * SECTOR : (index + 1) * SECTOR])
        if found not in expected(first + index):
            return f"sector {first + index} reads {found}, expected one of {sorted(expected(first + index))}"
    return None
