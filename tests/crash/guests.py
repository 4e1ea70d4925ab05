"""Workloads of a guest: random requests to an image, of which every sector must be a version since the last flush."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from blocklib import Secret
from blocklib.disk import Disk
from blocklib.errors import StorageError
from tests.crash.host import Host
from tests.crash.look import Look, is_dirty
from tests.crash.recording import SECTOR, Drive
from tests.crash.workload import (
    BASE,
    EVERYTHING,
    History,
    Worker,
    difference_in,
    disk_on,
    new_image,
    run_workers,
    stamped,
    versions_of,
)
from tests.encrypted import CODE

SECRET: Mapping[str, Any] = {"encrypt.key-secret": Secret(CODE)}
LUKS: Mapping[str, Any] = {"encrypt.format": "luks", "encrypt.iter-time": 1, **SECRET}
DATA_FILE = "guest.raw"


@dataclass(frozen=True)
class Chain:
    """Images that stay as they are, top first, and how all of them are opened: what a crash leaves is put above them."""

    below: tuple[bytes, ...] = ()
    opened: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def under(
        self, file: Drive, *, writable: bool, data_file: Drive | None = None, options: Mapping[str, Any] | None = None
    ) -> Iterator[Disk]:
        """The image in `file` as a disk, with the chain below it."""
        with ExitStack() as stack:
            backing = None
            for image in reversed(self.below):
                backing = stack.enter_context(disk_on(Drive(data=image), writable=False, backing=backing))
            opened = {**self.opened, **(options or {})}
            disk = disk_on(file, writable=writable, options=opened, backing=backing, data_file=data_file)
            yield stack.enter_context(disk)


@dataclass(frozen=True)
class GuestJudge:
    """What a crash may leave of an image that a guest was writing to."""

    history: History
    chain: Chain
    seed: str
    guest_file: bool = False
    """Whether the data is in a file of its own."""

    def __call__(self, left: Mapping[str, bytes], cut: int, look: Look) -> None:
        file = Drive(data=left["image"])
        data = Drive(data=left["data"]) if self.guest_file else None
        others = {DATA_FILE: data} if data is not None else None
        if is_dirty(file):
            with self.chain.under(file, writable=True, data_file=data):
                pass
        secret = CODE if self.chain.opened else None
        look.check(file, others=others, secret=secret)
        allowed = self.history.allowed(cut)
        with self.chain.under(file, writable=False, data_file=data) as disk:
            difference = difference_in(disk.read(0, disk.size), allowed)
            assert difference is None, f"{look.where}: {difference}"
        if not look.thorough:
            return
        with self.chain.under(file, writable=True, data_file=data) as disk:
            difference = difference_in(disk.read(0, disk.size), allowed)
            assert difference is None, f"{look.where}, opened for writing: {difference}"
            Worker(disk, History(lambda: 0), 0, 1, 1 << 40, self.seed).write_somewhere(12)
        look.check(file, others=others, secret=secret, why=", used further")


@dataclass(frozen=True)
class Guest:
    """One workload; sizes are sectors."""

    sectors: int
    options: Mapping[str, Any] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=lambda: EVERYTHING)
    n_requests: int = 90
    n_workers: int = 1
    stripe: int = 1 << 40
    chain: Sequence[int] = ()
    """The sizes of the backing files, the lowest first."""
    filled: int = 0
    """How much is written before the host begins to look."""
    sizes: Sequence[int] = ()
    failing_writes: float = 0.0
    good_barriers: int | None = None
    """How many barriers succeed before one fails."""
    room: int | None = None
    """Bytes that the host has for the image beyond what it begins with."""
    dirty: bool = False
    """It begins with an image that nobody has closed, whose counts are to be made anew."""

    @property
    def repeats(self) -> bool:
        """Whether the same seed does the same."""
        return self.n_workers == 1

    def run(self, seed: str) -> tuple[Host, GuestJudge]:
        """Let the guest work; what happened to the host, and what is to be thought of what it leaves."""
        rnd = random.Random(f"{seed}/guest")
        below = self._chain_below()
        guest_file = "data_file" in self.options
        chain = Chain(tuple(below), SECRET if "encrypt.format" in self.options else {})
        start, start_data = self._start(chain, guest_file, seed)
        host = Host()
        image = host.add("image", start)
        data = host.add("data", start_data) if guest_file else None
        with chain.under(Drive(data=start), writable=False, data_file=Drive(data=start_data) if guest_file else None) as disk:
            begins = versions_of(disk.read(0, disk.size))
        under = self._versions_below(chain)
        history = History(host.now, begins, under)
        if self.room is not None:
            image.drive.capacity = len(start) + self.room
        barriers = itertools.count()

        def fail_if(fails: bool) -> None:
            if fails:
                raise StorageError("the host does not want to", errno=5, operation="injected")

        node = image.opened()
        with ExitStack() as stack:
            backing = None
            for content in reversed(chain.below):
                backing = stack.enter_context(disk_on(Drive(data=content), writable=False, backing=backing))
            options = {**chain.opened, **self.opened}
            disk = disk_on(node, options=options, backing=backing, data_file=data.opened() if data is not None else None)
            if self.failing_writes:
                image.drive.before_write = lambda _offset, _length: fail_if(rnd.random() < self.failing_writes)
            image.drive.before_barrier = lambda: fail_if(next(barriers) == self.good_barriers)
            workers = [
                Worker(disk, history, number, self.n_workers, self.stripe, seed, self.kinds, self.sizes)
                for number in range(self.n_workers)
            ]
            run_workers(workers, self.n_requests)
            image.drive.before_write = image.drive.before_barrier = None
            if disk.node.poisoned is not None:
                assert self.failing_writes or self.good_barriers
                disk.abandon()
            else:
                difference = difference_in(disk.read(0, disk.size), history.now)
                assert difference is None, difference
                if self.room is None:
                    history.flush(disk.flush)
                    disk.close()
                else:
                    _close_where_there_is_no_room(disk, history)
        return host, GuestJudge(history, chain, seed, guest_file)

    def _chain_below(self) -> list[bytes]:
        """The backing files, top first."""
        images: list[bytes] = []
        for level, sectors in enumerate(self.chain):
            file = Drive(data=new_image(sectors * SECTOR, {"cluster_size": 1024}))
            with Chain(tuple(images)).under(file, writable=True) as disk:
                for first in range(0, sectors, 40) if level else (0,):
                    n = min(sectors - first, 17 if level else sectors)
                    disk.write(first * SECTOR, stamped(BASE + level, first, n))
            images.insert(0, bytes(file.data))
        return images

    def _versions_below(self, chain: Chain) -> list[int]:
        if not chain.below:
            return []
        with Chain(chain.below[1:]).under(Drive(data=chain.below[0]), writable=False) as disk:
            return versions_of(disk.read(0, disk.size))

    def _start(self, chain: Chain, guest_file: bool, seed: str) -> tuple[bytes, bytes]:
        """(the image, its data file) that the host begins with."""
        file = Drive(data=new_image(self.sectors * SECTOR, self.options))
        data = Drive() if guest_file else None
        if guest_file and self.options.get("data_file_raw"):
            assert data is not None
            data.truncate(self.sectors * SECTOR)
            with chain.under(file, writable=True, data_file=data) as disk:
                disk.node.preallocate("metadata")
        if self.filled:
            with chain.under(file, writable=True, data_file=data) as disk:
                disk.write(0, stamped(BASE + 9, 0, self.filled))
        if self.dirty:
            left = disk_on(file, options={**chain.opened, "lazy-refcounts": True})
            worker = Worker(left, History(lambda: 0), 0, 1, 1 << 40, f"{seed}/before", {"write": 3, "discard": 1})
            worker.run(25)
            left.flush()
            worker.run(5)
            left.abandon()
            assert is_dirty(file)
        return bytes(file.data), bytes(data.data) if data is not None else b""


def _close_where_there_is_no_room(disk: Disk, history: History) -> None:
    """The host is full: what cannot be made durable is not."""
    try:
        history.flush(disk.flush)
        disk.close()
    except StorageError as exc:
        if exc.operation != "injected":
            raise
        disk.abandon()
