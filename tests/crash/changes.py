"""Workloads that change what an image is made of: snapshots, bitmaps, amend, commit, rebase, stream, convert, repair.

A guest writes between the changes.  After a crash every sector is a version that it may be, each snapshot is there or not as
at some moment of the change that was cut off, and holds exactly what it was made of.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import blocklib
from blocklib import jobs
from blocklib.disk import Disk
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.snapshots import tally
from blocklib.jobs import block_copy
from tests.crash.host import Host, HostFile
from tests.crash.look import Look, is_dirty
from tests.crash.recording import SECTOR, Drive
from tests.crash.workload import (
    BASE,
    EVERYTHING,
    History,
    Worker,
    base_image,
    difference_in,
    disk_on,
    new_image,
    stamped,
    versions_of,
)

IMAGE = "image.qcow2"
SECTORS = 600
WRITING: Mapping[str, float] = {**EVERYTHING, "flush": 3, "read": 1}


@dataclass
class Session:
    """A disk on the host that is written and changed; what is known of it."""

    disk: Disk
    host: Host
    history: History
    seed: str
    rnd: random.Random
    worker: Worker
    snapshots: dict[str, list[int]] = field(default_factory=dict)
    """The versions that each snapshot holds, by its name, whether it is there or not."""
    lists: list[tuple[int, int, frozenset[str]]] = field(default_factory=list)
    """(how much had happened when a change began, when it ended, the names from then on)"""
    atomic: list[tuple[int, int, list[int], list[int]]] = field(default_factory=list)
    """The same of changes that leave the whole disk as it was before or after."""

    def write(self, n_requests: int) -> None:
        self.worker.run(n_requests)

    def versions(self) -> list[int]:
        return versions_of(self.disk.read(0, self.disk.size))

    def change_names(self, request: Callable[[], object]) -> None:
        begun = self.host.now()
        request()
        self.lists.append((begun, self.host.now(), frozenset(item.name for item in self.disk.snapshots)))

    def keep(self, name: str) -> None:
        """Make a snapshot."""
        self.snapshots[name] = self.versions()
        self.change_names(lambda: self.disk.snapshots.create(name))

    def apply(self, name: str) -> None:
        self.history.flush(self.disk.flush)
        before, after = self.versions(), self.snapshots[name]
        begun = self.host.now()
        self.history.change_all(self.disk.snapshots[name].apply, dict(enumerate(after)))
        self.atomic.append((begun, self.host.now(), before, after))

    def forget(self, name: str) -> None:
        self.change_names(self.disk.snapshots[name].delete)


@dataclass(frozen=True)
class ChangeJudge:
    """What a crash may leave of an image, and of what is below it, that was changed."""

    history: History
    seed: str
    files: Sequence[str] = (IMAGE,)
    """The images of the host, top first: the others are below it in this order."""
    below: Mapping[str | None, Sequence[bytes]] = field(default_factory=dict)
    """By the name that the lowest of these images has for its backing file: what stays as it is, top first."""
    snapshots: Mapping[str, Sequence[int]] = field(default_factory=dict)
    lists: Sequence[tuple[int, int, frozenset[str]]] = ()
    atomic: Sequence[tuple[int, int, Sequence[int], Sequence[int]]] = ()
    base_snapshots: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of the image below the top."""
    repaired: bool = False
    """Whether it was damaged, and may have to be repaired again."""

    def __call__(self, left: Mapping[str, bytes], cut: int, look: Look) -> None:
        drives = [Drive(name, data=left[name]) for name in self.files]
        for drive in drives:
            if is_dirty(drive):
                disk_on(drive).close()
            if self.repaired:
                _repair_again(drive)
            look.check(drive)
        allowed = self.history.allowed(cut)
        self._read(drives, cut, allowed, look.where)
        if not look.thorough:
            return
        for drive in drives:
            disk_on(drive).close()
        self._read(drives, cut, allowed, f"{look.where}, opened for writing")
        with self._chain(drives, writable=True) as disk:
            Worker(disk, History(lambda: 0), 0, 1, 1 << 40, self.seed).write_somewhere(12)
            if len(disk.snapshots):
                list(disk.snapshots)[-1].delete()
        for drive in drives:
            look.check(drive, why=", used further")
        self._look_at_snapshots(drives[0], self.snapshots, f"{look.where}, used further")

    @contextmanager
    def _chain(self, drives: Sequence[Drive], *, writable: bool) -> Iterator[Disk]:
        with ExitStack() as stack:
            with disk_on(drives[-1], writable=False) as lowest:
                named = next((item.name for item in lowest.node.references() if item.kind == "backing"), None)
            if named is None or not self.below:
                images: Sequence[bytes] = ()
            else:
                images = self.below[named]
            backing = None
            for image in reversed(images):
                backing = stack.enter_context(disk_on(Drive(data=image), writable=False, backing=backing))
            for drive in reversed(drives[1:]):
                backing = stack.enter_context(disk_on(drive, writable=False, backing=backing))
            yield stack.enter_context(disk_on(drives[0], writable=writable, backing=backing))

    def _read(
        self, drives: Sequence[Drive], cut: int, allowed: Callable[[int], set[int]], where: str
    ) -> None:
        with self._chain(drives, writable=False) as disk:
            content = disk.read(0, disk.size)
            names = frozenset(item.name for item in disk.snapshots)
        difference = difference_in(content, allowed)
        assert difference is None, f"{where}: {difference}"
        for begun, ended, before, after in self.atomic:
            if begun <= cut <= ended:
                assert versions_of(content) in (before, after), f"{where}: neither the state before nor the one after"
        if self.lists:
            last = max((entry for entry in self.lists if entry[1] <= cut), default=self.lists[0], key=lambda entry: entry[1])
            possible = [last[2], *(entry[2] for entry in self.lists if entry[0] <= cut < entry[1])]
            assert names in possible, f"{where}: the snapshots {sorted(names)}, expected one of {possible}"
        self._look_at_snapshots(drives[0], self.snapshots, where)
        if self.base_snapshots:
            self._look_at_snapshots(drives[1], self.base_snapshots, where)

    def _look_at_snapshots(self, drive: Drive, expected: Mapping[str, Sequence[int]], where: str) -> None:
        with disk_on(drive, writable=False) as disk:
            names = [item.name for item in disk.snapshots]
        for name in names:
            with disk_on(drive, writable=False, options={"snapshot.name": name}) as disk:
                found = versions_of(disk.read(0, disk.size))
            assert found == expected[name], f"{where}: the snapshot {name} has changed"


def _repair_again(drive: Drive) -> None:
    with disk_on(drive, metadata_only=True) as disk:
        disk.node.repair("all")


@contextmanager
def session(
    seed: str,
    start: bytes,
    *,
    backing: Disk | None = None,
    begins: Sequence[int] | None = None,
    below: Sequence[int] = (),
    filename: str | None = None,
    host: Host | None = None,
    kinds: Mapping[str, float] = WRITING,
) -> Iterator[Session]:
    """A disk on a host, closed at the end."""
    host = host or Host()
    file = host.add(IMAGE, start, filename)
    with ExitStack() as stack:
        stack.enter_context(few_threads())
        disk = stack.enter_context(disk_on(file.opened(), backing=backing))
        versions = begins if begins is not None else versions_of(disk.read(0, disk.size))
        history = History(host.now, versions, below)
        rnd = random.Random(f"{seed}/changes")
        worker = Worker(disk, history, 0, 1, 1 << 40, seed, kinds)
        yield Session(disk, host, history, seed, rnd, worker)


@contextmanager
def few_threads() -> Iterator[None]:
    """One, so that the same seed does the same; and pieces that are small beside the disks here."""
    with (
        patch.object(block_copy, "default_threads", lambda **_: 1),
        patch.object(block_copy, "piece_size", lambda _threads: 1 << 16),
    ):
        yield


def written(
    seed: str,
    options: Mapping[str, Any],
    *,
    epoch: int = 1,
    sectors: int = SECTORS,
    snapshots: int = 0,
    grows: int = 0,
) -> bytes:
    """An image with something in it, closed; its snapshots share clusters in all ways.  No other `epoch` has its versions.

    With `grows` the disk is larger by so many sectors than its snapshots.
    """
    drive = Drive(data=new_image(sectors * SECTOR, options))
    with disk_on(drive) as disk:
        worker = Worker(disk, History(lambda: 0), 0, 1, 1 << 40, seed, {"write": 3, "discard": 1}, epoch=epoch)
        for number in range(snapshots + 1):
            if number == snapshots and grows:
                disk.truncate((sectors + grows) * SECTOR)
            worker.run(8)
            if number < snapshots:
                disk.snapshots.create(f"old {number}")
    return bytes(drive.data)


def snapshots_in(image: bytes) -> dict[str, list[int]]:
    """What the snapshots of an image hold, by name."""
    with disk_on(Drive(data=image), writable=False) as disk:
        names = [item.name for item in disk.snapshots]
    found = {}
    for name in names:
        with disk_on(Drive(data=image), writable=False, options={"snapshot.name": name}) as disk:
            found[name] = versions_of(disk.read(0, disk.size))
    return found


@dataclass(frozen=True)
class Snapshots:
    """Snapshots are made, brought back and deleted."""

    options: Mapping[str, Any]
    tables: bool = False
    """Whether counts are made for whole tables, as on a large image."""
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        # In version 2 a snapshot does not say how large the disk was.
        start = written(seed, self.options, snapshots=2, grows=0 if "compat" in self.options else 30)
        with patch.object(tally, "_SMALL", -1 if self.tables else 1 << 40), session(seed, start) as do:
            do.snapshots.update(snapshots_in(start))
            do.lists.append((0, 0, frozenset(do.snapshots)))
            for number in range(5):
                do.write(3)
                there = [item.name for item in do.disk.snapshots]
                match do.rnd.choice(("keep", "apply", "forget")) if there else "keep":
                    case "keep":
                        do.keep(f"new {number}")
                    case "apply":
                        do.apply(do.rnd.choice(there))
                    case _:
                        do.forget(do.rnd.choice(there))
            do.write(3)
        return do.host, ChangeJudge(do.history, seed, snapshots=do.snapshots, lists=do.lists, atomic=do.atomic)


AMENDS: Sequence[Mapping[str, Any]] = (
    {"refcount_bits": 64},
    {"refcount_bits": 8},
    {"lazy_refcounts": True},
    {"lazy_refcounts": False},
    {"refcount_bits": 16},
    {"compat": "0.10", "refcount_bits": 16, "lazy_refcounts": False},
    {"compat": "1.1"},
    {"compat": "1.1", "refcount_bits": 32, "lazy_refcounts": True},
)


@dataclass(frozen=True)
class Amend:
    """An image with snapshots becomes another version, and its counts wider and narrower."""

    options: Mapping[str, Any]
    chain: int = 0
    n_snapshots: int = 0
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        image = base_image(self.chain, {"cluster_size": 1024}) if self.chain else b""
        with ExitStack() as stack:
            backing = stack.enter_context(disk_on(Drive(data=image), writable=False)) if image else None
            options = {**self.options, **({"backing_file": "base.qcow2", "backing_fmt": "qcow2"} if image else {})}
            start = written(seed, options, snapshots=self.n_snapshots)
            under = [BASE] * self.chain
            do = stack.enter_context(session(seed, start, backing=backing, below=under))
            do.snapshots.update(snapshots_in(start))
            for _ in range(5):
                do.write(4)
                wanted = dict(do.rnd.choice(AMENDS))
                if "compat" not in wanted and do.disk.node.format_specific()["compat"] == "0.10":
                    wanted["compat"] = "1.1"
                do.history.flush(do.disk.flush)
                with jobs.amend(do.disk, wanted) as job:
                    job.wait()
            do.write(3)
        below: dict[str | None, Sequence[bytes]] = {"base.qcow2": [image]} if image else {}
        return do.host, ChangeJudge(do.history, seed, below=below, snapshots=do.snapshots)


@dataclass(frozen=True)
class Commit:
    """An overlay is committed into the image below it, which then shows through, and again."""

    options: Mapping[str, Any]
    base_options: Mapping[str, Any]
    n_snapshots: int = 0
    """Of the base."""
    sizes: tuple[int, int] = (SECTORS, SECTORS)
    """Of the overlay and of the base, which grows where it is the smaller one."""
    top_snapshot: bool = False
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        host = Host()
        base = written(f"{seed}/base", self.base_options, epoch=2, sectors=self.sizes[1], snapshots=self.n_snapshots)
        start = written(seed, {**self.options, "backing_file": "base.qcow2", "backing_fmt": "qcow2"}, sectors=self.sizes[0])
        with disk_on(Drive(data=base), writable=False) as disk:
            under = versions_of(disk.read(0, disk.size))
        lower = host.add("base.qcow2", base, "base.qcow2")
        with ExitStack() as stack:
            backing = stack.enter_context(disk_on(lower.opened(read_only=True), writable=False))
            do = stack.enter_context(session(seed, start, backing=backing, below=under, host=host))
            for number in range(2):
                do.write(6)
                if self.top_snapshot and not number:
                    do.disk.snapshots.create("kept")
                    # What it shows of the base changes with the base; what it holds itself does not.
                    do.snapshots.update(snapshots_in(bytes(host.files[IMAGE].drive.data)))
                do.history.flush(do.disk.flush)
                with jobs.commit(do.disk, empty=True) as job:
                    job.wait()
            do.write(3)
        files = (IMAGE, "base.qcow2")
        kept = snapshots_in(base)
        return host, ChangeJudge(do.history, seed, files, snapshots=do.snapshots, base_snapshots=kept)


@dataclass(frozen=True)
class Rebase:
    """An overlay changes its backing file, and then has none."""

    options: Mapping[str, Any]
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        folder = Path(tempfile.mkdtemp(prefix="crash-"))
        try:
            old, new = base_image(SECTORS), _other_base(SECTORS - 70)
            (folder / "new.qcow2").write_bytes(new)
            start = written(seed, {**self.options, "backing_file": "old.qcow2", "backing_fmt": "qcow2"})
            with disk_on(Drive(data=old), writable=False) as backing:
                with session(seed, start, backing=backing, below=[BASE] * SECTORS, filename=str(folder / IMAGE)) as do:
                    do.write(4)
                    for name, format in (("new.qcow2", "qcow2"), (None, None)):
                        do.write(3)
                        do.history.flush(do.disk.flush)
                        with jobs.rebase(do.disk, name, backing_format=format) as job:
                            job.wait()
                    do.write(3)
            return do.host, ChangeJudge(do.history, seed, below={"old.qcow2": [old], "new.qcow2": [new]})
        finally:
            shutil.rmtree(folder)


def _other_base(sectors: int) -> bytes:
    drive = Drive(data=new_image(sectors * SECTOR, {}))
    with disk_on(drive) as disk:
        for first in range(0, sectors - 30, 60):
            disk.write(first * SECTOR, stamped(BASE + first % 120 // 60, first, 30))
    return bytes(drive.data)


@dataclass(frozen=True)
class Stream:
    """What lies below is copied up: first down to the lowest image, then all of it."""

    options: Mapping[str, Any]
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        lowest = base_image(SECTORS - 50)
        middle = _overlay(lowest, SECTORS)
        start = written(seed, {**self.options, "backing_file": "mid.qcow2", "backing_fmt": "qcow2"})
        with ExitStack() as stack:
            backing = None
            for name, image in (("base.qcow2", lowest), ("mid.qcow2", middle)):
                drive = Drive(name, data=image)
                backing = stack.enter_context(disk_on(drive, writable=False, backing=backing))
            assert backing is not None
            under = versions_of(backing.read(0, backing.size))
            do = stack.enter_context(session(seed, start, backing=backing, below=under, filename=IMAGE))
            for base in (do.disk.chain()[-1], None):
                do.write(4)
                do.history.flush(do.disk.flush)
                with jobs.stream(do.disk, base=base) as job:
                    job.wait()
            do.write(3)
        below: dict[str | None, Sequence[bytes]] = {"mid.qcow2": [middle, lowest], "base.qcow2": [lowest]}
        return do.host, ChangeJudge(do.history, seed, below=below)


def _overlay(below: bytes, sectors: int) -> bytes:
    options = {"cluster_size": 1024, "backing_file": "base.qcow2", "backing_fmt": "qcow2"}
    drive = Drive(data=new_image(sectors * SECTOR, options))
    with disk_on(Drive(data=below), writable=False) as backing, disk_on(drive, backing=backing) as disk:
        for first in range(0, sectors - 10, 45):
            disk.write(first * SECTOR, stamped(BASE + 1, first, 10))
    return bytes(drive.data)


@dataclass(frozen=True)
class Convert:
    """A disk is copied into an image that is there."""

    options: Mapping[str, Any]
    compress: bool = False
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        source = written(f"{seed}/source", {"cluster_size": 2048}, epoch=2)
        start = new_image(SECTORS * SECTOR, self.options) if self.compress else written(seed, self.options)
        with (
            disk_on(Drive(data=source), writable=False) as read,
            session(seed, start, kinds={**WRITING, "write": 4} if not self.compress else {"flush": 1}) as do,
        ):
            do.write(6)
            after = dict(enumerate(versions_of(read.read(0, read.size))))
            compress: Any = "zlib" if self.compress else None
            for _ in range(1 if self.compress else 2):
                do.history.change_all(lambda: blocklib.convert(read, do.disk, compress=compress), after)
                do.history.flush(do.disk.flush)
                do.write(6)
        return do.host, ChangeJudge(do.history, seed)


@dataclass(frozen=True)
class Repair:
    """A damaged image is repaired; what it reads as stays."""

    options: Mapping[str, Any]
    what: str
    n_snapshots: int = 0
    repeats = True

    def run(self, seed: str) -> tuple[Host, ChangeJudge]:
        rnd = random.Random(f"{seed}/damage")
        start = written(seed, self.options, snapshots=self.n_snapshots)
        damaged = Drive(data=start)
        DAMAGES[self.what](damaged, rnd)
        host = Host()
        file: HostFile = host.add(IMAGE, bytes(damaged.data))
        with disk_on(Drive(data=bytes(damaged.data)), writable=False) as disk:
            content = versions_of(disk.read(0, disk.size))
        with disk_on(file.opened(), metadata_only=True) as disk:
            before = disk.node.repair("leaks" if self.what == "leaks" else "all").before
        assert not before.clean
        history = History(host.now, content)
        return host, ChangeJudge(history, seed, snapshots=snapshots_in(bytes(damaged.data)), repaired=True)


def _u64(drive: Drive, place: int) -> int:
    return int.from_bytes(drive.data[place : place + 8], "big")


def _set_u64(drive: Drive, place: int, value: int) -> None:
    drive.data[place : place + 8] = value.to_bytes(8, "big")


def _counts(drive: Drive) -> list[int]:
    """Where the 16-bit counts of clusters that are in use lie, without those of the header and of tables."""
    cluster = 1 << int.from_bytes(drive.data[20:24], "big")
    table = _u64(drive, layout.FIELD_OFFSETS["refcount_table_offset"])
    blocks = [block for block in (_u64(drive, table + 8 * index) for index in range(cluster // 8)) if block]
    places = [block + 2 * index for block in blocks for index in range(cluster // 2)]
    return [place for place in places if int.from_bytes(drive.data[place : place + 2], "big")]


def _entries(drive: Drive) -> list[int]:
    """Where the L2 entries of data clusters lie."""
    cluster = 1 << int.from_bytes(drive.data[20:24], "big")
    l1 = _u64(drive, layout.FIELD_OFFSETS["l1_table_offset"])
    n = int.from_bytes(drive.data[36:40], "big")
    tables = [_u64(drive, l1 + 8 * index) & layout.OFFSET_MASK for index in range(n)]
    places = [table + 8 * index for table in tables if table for index in range(cluster // 8)]
    return [place for place in places if _u64(drive, place) & layout.OFFSET_MASK]


def _leak(drive: Drive, rnd: random.Random) -> None:
    for place in rnd.sample(_counts(drive), 12):
        count = int.from_bytes(drive.data[place : place + 2], "big")
        drive.data[place : place + 2] = (count + rnd.randint(1, 3)).to_bytes(2, "big")


def _undercount(drive: Drive, rnd: random.Random) -> None:
    for place in rnd.sample(_counts(drive), 12):
        drive.data[place : place + 2] = bytes(2)
    _leak(drive, rnd)


def _share(drive: Drive, rnd: random.Random) -> None:
    places = _entries(drive)
    for place in rnd.sample(places, 8):
        _set_u64(drive, place, _u64(drive, rnd.choice(places)) | layout.FLAG_COPIED)


def _flip_flags(drive: Drive, rnd: random.Random) -> None:
    for place in rnd.sample(_entries(drive), 12):
        _set_u64(drive, place, _u64(drive, place) ^ layout.FLAG_COPIED)


DAMAGES: Mapping[str, Callable[[Drive, random.Random], None]] = {
    "leaks": _leak,
    "counts too low": _undercount,
    "shared clusters": _share,
    "copied flags": _flip_flags,
}
