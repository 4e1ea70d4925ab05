"""Random requests to an image on a disk of the host, and what each guest sector may read as after a crash.

Each sector belongs to one thread, so what was done to it has an order even when eight threads write at once.  A sector says
which version of which sector it is: neither an older one nor that of a neighbour passes for it.
"""

from __future__ import annotations

import itertools
import random
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blocklib import batch
from blocklib.disk import Disk
from blocklib.errors import BatchError, BlocklibError, PoisonedError, StorageError
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Node
from blocklib.options import check_options
from tests.crash.recording import SECTOR, Drive

ZERO = 0
BASE = 1 << 60
"""The versions of what was there before: BASE of a backing file, BASE + 1 of the image above it, and so on."""
_STAMP = struct.Struct(">QQ")


def stamped(version: int, first: int, n: int = 1) -> bytes:
    """`n` sectors from `first` on that say so, and which version they are."""
    words = np.empty((n, SECTOR // 16, 2), dtype=">u8")
    words[:, :, 0] = version
    words[:, :, 1] = np.arange(first, first + n, dtype=np.uint64)[:, None]
    return words.tobytes()


def versions_of(data: bytes, first: int = 0) -> list[int]:
    """The version of each sector of `data`, which begins at sector `first`: ZERO for zeroes, -1 for what nobody wrote there."""
    words = np.frombuffer(data[: len(data) // SECTOR * SECTOR], dtype=">u8").reshape(-1, SECTOR // 16, 2).astype(np.uint64)
    versions, sectors = words[:, 0, 0], words[:, 0, 1]
    right = ((words[:, :, 0] == versions[:, None]) & (words[:, :, 1] == sectors[:, None])).all(axis=1)
    places = np.arange(first, first + len(words), dtype=np.uint64)
    right &= np.where(versions == ZERO, sectors == 0, sectors == places)
    found: list[int] = versions.astype(np.int64).tolist()
    return [version if good else -1 for version, good in zip(found, right.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class _Change:
    begun: int
    """How much had happened on the host."""
    ended: int
    """The time: a request that ends may have changed tables in memory alone, and log nothing."""
    version: int | None
    """None: what lies below shows through."""
    sure: bool
    """Whether the sector has this content afterwards, or may have kept the one before (a discard, a failed write)."""


class History:
    """What was done to each sector, when, and how much had happened on the host by then."""

    def __init__(self, now: Callable[[], int], start: Sequence[int] = (), below: Sequence[int] = ()) -> None:
        """`start` are the versions that the disk begins with, `below` those of its backing file; zero lies behind them."""
        self._now = now
        self._start = start
        self._below = below
        self._changes: dict[int, list[_Change]] = {}
        self._flushes: list[tuple[int, int]] = []  # (time when it began, how much had happened when it ended)
        self._clock = itertools.count()

    def __getstate__(self) -> dict[str, object]:
        """What is needed to look back: time stands still."""
        return {**self.__dict__, "_now": None, "_clock": None}

    def change(
        self,
        request: Callable[[], object],
        first: int,
        n: int,
        version: int | None,
        *,
        sure: bool = True,
        step: int = 1,
    ) -> None:
        """Run a request that gives sectors [first, first + n) a content, or every `step`-th of them."""
        self.change_all(request, dict.fromkeys(range(first, first + n, step), version), sure=sure)

    def change_all(
        self, request: Callable[[], object], versions: Mapping[int, int | None], *, sure: bool = True
    ) -> None:
        """Run a request that gives each of some sectors a content of its own."""
        begun = self._now()
        try:
            request()
        except BlocklibError:
            sure = False
            raise
        finally:
            ended = next(self._clock)
            for sector, version in versions.items():
                self._changes.setdefault(sector, []).append(_Change(begun, ended, version, sure))

    def flush(self, request: Callable[[], object]) -> None:
        begun = next(self._clock)
        request()
        self._flushes.append((begun, self._now()))

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
        return self._contents(sector, self._now(), next(self._clock))

    def _contents(self, sector: int, cut: int, durable: int) -> set[int]:
        allowed = {_at(self._start, sector)}
        for change in self._changes.get(sector, ()):
            if change.begun > cut:
                break
            if change.sure and change.ended < durable:
                allowed = set()
            allowed.add(change.version if change.version is not None else _at(self._below, sector))
        return allowed


def _at(versions: Sequence[int], sector: int) -> int:
    return versions[sector] if sector < len(versions) else ZERO


def difference_in(data: bytes, allowed: Callable[[int], set[int]], first: int = 0) -> str | None:
    """The first sector of `data`, which begins at sector `first`, that is not as allowed, in words; None where all are."""
    for sector, version in enumerate(versions_of(data, first), first):
        if version not in allowed(sector):
            head = data[(sector - first) * SECTOR :][: _STAMP.size]
            known = sorted(allowed(sector))
            return f"sector {sector} begins with {_STAMP.unpack(head)} and reads as version {version}, expected one of {known}"
    return None


# -- images on disks in memory -----------------------------------------------------------------------------------------


def new_image(size: int, options: Mapping[str, Any]) -> bytes:
    """The bytes of an empty image."""
    drive = Drive()
    with Transaction() as change:
        edge = change.attach(None, "create", drive, wanted=CONSISTENT_READ | WRITE | RESIZE)
    typed = check_options("qcow2", dict(options), table="create")
    Qcow2Node.image_maker({**typed, "size": size})(edge)
    return bytes(drive.data)


def disk_on(
    file: Node,
    *,
    writable: bool = True,
    options: Mapping[str, Any] | None = None,
    backing: Disk | None = None,
    data_file: Node | None = None,
    metadata_only: bool = False,
) -> Disk:
    """The qcow2 image that is stored in `file`, opened with ``discard=unmap``."""
    typed = check_options("qcow2", {**(options or {}), "file": {}})
    node = Qcow2Node.from_options(typed, read_only=not writable, filename=file.filename, metadata_only=metadata_only)
    node.discard_passes = True
    with Transaction() as change:
        change.attach(node, "file", file)
        if backing is not None:
            change.attach(node, "backing", backing.node)
    node.load()
    if data_file is not None:
        with Transaction() as change:
            change.attach(node, "data-file", data_file)
    disk = Disk(node, "r+" if writable else "r")
    if writable and not metadata_only:
        node.activate()
    return disk


def base_image(sectors: int, options: Mapping[str, Any] | None = None) -> bytes:
    """An image with a stamp in each sector."""
    drive = Drive(data=new_image(sectors * SECTOR, options or {}))
    with disk_on(drive) as disk:
        disk.write(0, stamped(BASE, 0, sectors))
    return bytes(drive.data)


def base_disk(sectors: int) -> Disk:
    """A backing file with a stamp in each sector."""
    return disk_on(Drive(data=base_image(sectors)), writable=False)


# -- requests ----------------------------------------------------------------------------------------------------------

EVERYTHING: Mapping[str, float] = {
    "flush": 8,
    "write": 35,
    "batch": 8,
    "runs": 15,
    "zeroes": 10,
    "discard": 12,
    "read": 8,
}
"""Kinds of requests, and how often each is made."""


@dataclass
class Worker:
    """One thread's requests: to its own stripes of the disk, decided by its own seed."""

    disk: Disk
    history: History
    number: int
    n_workers: int
    stripe: int
    """Sectors; neighbouring stripes belong to different workers."""
    seed: str
    kinds: Mapping[str, float] = field(default_factory=lambda: EVERYTHING)
    sizes: Sequence[int] = ()
    """What "resize" chooses from, in sectors; empty: something near the present size."""
    epoch: int = 0
    """Workers of different epochs write different versions."""
    _rnd: random.Random = field(init=False)
    _next_version: int = field(init=False)

    def __post_init__(self) -> None:
        self._rnd = random.Random(f"{self.seed}/{self.number}")
        self._next_version = (self.epoch * 256 + self.number + 1) << 32

    def run(self, n_requests: int) -> None:
        """Make requests, until the image is poisoned; one that the host makes fail is passed over."""
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
        """Write without keeping a history, then flush."""
        for _ in range(n_times):
            first, n = self._place()
            self.disk.write(first * SECTOR, stamped(BASE - 1, first, n))
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
        if self._rnd.random() < 0.03 or (end - start <= 64 and self._rnd.random() < 0.2):
            return start, end - start
        first = self._rnd.randrange(start, end)
        return first, min(end - first, self._rnd.choice((1, 2, 9, 70, 300)))

    def _one_request(self) -> None:
        rnd, disk, history = self._rnd, self.disk, self.history
        (kind,) = rnd.choices(list(self.kinds), list(self.kinds.values()))
        if kind == "flush":
            history.flush(disk.flush)
            return
        if kind == "resize":
            self._resize()
            return
        first, n = self._place()
        if not n:
            return
        offset, length = first * SECTOR, n * SECTOR
        if kind in ("write", "batch", "runs", "compressed"):
            self._next_version += 1
            self._write(kind, first, n, self._next_version)
        elif kind == "zeroes":
            unmap = rnd.random() < 0.5
            history.change(lambda: disk.write_zeroes(offset, length, unmap=unmap), first, n, ZERO)
        elif kind == "discard":
            history.change(lambda: disk.discard(offset, length), first, n, ZERO, sure=False)
        else:
            difference = difference_in(disk.read(offset, length), history.now, first)
            assert difference is None, difference

    def _write(self, kind: str, first: int, n: int, version: int) -> None:
        rnd, disk, history = self._rnd, self.disk, self.history
        offset, length = first * SECTOR, n * SECTOR
        if kind == "compressed":
            self._write_compressed(first, version)
            return
        data = memoryview(stamped(version, first, n))
        if kind == "write":
            history.change(lambda: disk.write(offset, data), first, n, version)
        elif kind == "batch":
            step = rnd.choice((1, 2, 5, 9))
            sectors = list(range(first, first + n, step))
            rnd.shuffle(sectors)
            part = b"".join(stamped(version, sector) for sector in sectors)
            offsets = [sector * SECTOR for sector in sectors]
            history.change(lambda: disk.write_batch(offsets, part), first, n, version, step=step)
        else:
            unit = disk.node.cluster_size() or SECTOR
            cut = min(length, (offset // unit + rnd.randint(1, 3)) * unit - offset)
            runs = [(start, part) for start, part in ((offset, data[:cut]), (offset + cut, data[cut:])) if len(part)]
            history.change(lambda: disk.write_runs(runs), first, n, version)

    def _write_compressed(self, near: int, version: int) -> None:
        """Write a few whole clusters that begin near a sector, inside one stripe; allocated ones are refused."""
        disk = self.disk
        unit = (disk.node.cluster_size() or 0) // SECTOR
        first = near // unit * unit
        stop = min((near // self.stripe + 1) * self.stripe, disk.size // SECTOR, first + unit * self._rnd.choice((1, 1, 5)))
        if stop != disk.size // SECTOR:
            stop = stop // unit * unit
        if stop <= first:
            return
        data = stamped(version, first, stop - first)
        try:
            self.history.change(lambda: disk.write_compressed(first * SECTOR, data), first, stop - first, version)
        except StorageError as exc:
            if exc.operation != "write compressed":
                raise

    def _resize(self) -> None:
        disk, history = self.disk, self.history
        before = disk.size // SECTOR
        if self.sizes:
            after = self._rnd.choice(self.sizes)
        else:
            after = max(1, before + self._rnd.choice((-300, -7, 5, 90, 700)))
        if after < before:  # what is cut off may be there again if the host crashes, emptied or not
            history.change(lambda: disk.truncate(after * SECTOR, shrink=True), after, before - after, None, sure=False)
        elif after > before:
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
