"""The workloads by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tests.crash.bitmaps import Bitmaps
from tests.crash.changes import Amend, Commit, Convert, Rebase, Repair, Snapshots, Stream
from tests.crash.guests import DATA_FILE, LUKS, Guest
from tests.crash.host import Host
from tests.crash.look import Look
from tests.crash.workload import EVERYTHING


class Judge(Protocol):
    """Looks at what a crash at a cut has left of the disks, by name; raises AssertionError where it must not be so."""

    def __call__(self, left: Mapping[str, bytes], cut: int, look: Look) -> None: ...


class Case(Protocol):
    """One workload."""

    @property
    def repeats(self) -> bool:
        """Whether the same seed does the same."""

    def run(self, seed: str) -> tuple[Host, Judge]:
        """Do the work; what happened to the host, and the judge of what it leaves."""


SMALL: Mapping[str, Any] = {"cluster_size": 1024}
TINY: Mapping[str, Any] = {"cluster_size": 512}
COMPRESSING: Mapping[str, float] = {**EVERYTHING, "compressed": 30}
RESIZING: Mapping[str, float] = {**EVERYTHING, "resize": 7}
WRITING: Mapping[str, float] = {"write": 5, "flush": 1, "read": 0.3}
LAZY: Mapping[str, Any] = {**TINY, "lazy_refcounts": True}
SUBCLUSTERS: Mapping[str, Any] = {"cluster_size": "16k", "extended_l2": True}

CASES: dict[str, Case] = {
    "allocating writes": Guest(900, SMALL, kinds=WRITING),
    "batched writes": Guest(900, SMALL, kinds={"batch": 5, "runs": 3, "flush": 1, "discard": 1}),
    "copy on write over a chain": Guest(700, {"cluster_size": 2048}, chain=(650, 700)),
    "discards and zeroes": Guest(700, SMALL, filled=500, kinds={"zeroes": 4, "discard": 4, "write": 3, "flush": 1.2}),
    "resize": Guest(300, TINY, kinds=RESIZING),
    "resize over a chain": Guest(500, SMALL, chain=(600, 400), kinds=RESIZING),
    "the refcount table grows": Guest(4500, {**TINY, "refcount_bits": 64}, filled=3600, kinds=WRITING, n_requests=40),
    "the L1 table grows": Guest(
        3900, TINY, kinds={**WRITING, "resize": 1.5}, sizes=(3900, 4090, 4200, 4300, 8300), n_requests=50
    ),
    "compressed writes": Guest(900, {"cluster_size": 2048}, kinds=COMPRESSING),
    "compressed writes, failing": Guest(700, {**SMALL, "refcount_bits": 4}, kinds=COMPRESSING, failing_writes=0.02),
    "compressed writes over a chain": Guest(
        700, {"cluster_size": 2048, "compression_type": "zstd"}, chain=(500, 700), kinds={**COMPRESSING, "resize": 3}
    ),
    "compressed writes, smallest caches": Guest(
        700, {**TINY, "refcount_bits": 2}, {"l2-cache-size": 512}, kinds=COMPRESSING
    ),
    "compressed writes beside subclusters": Guest(900, SUBCLUSTERS, kinds={**COMPRESSING, "resize": 3}),
    "compressed writes, lazy refcounts": Guest(700, {**SMALL, "lazy_refcounts": True}, kinds=COMPRESSING),
    "subclusters": Guest(900, {**SUBCLUSTERS, "refcount_bits": 8}),
    "subclusters over a chain": Guest(900, SUBCLUSTERS, chain=(700, 900), kinds=RESIZING),
    "lazy refcounts": Guest(800, {**LAZY, "refcount_bits": 64}),
    "lazy refcounts, smallest caches": Guest(600, LAZY, {"l2-cache-size": 512}, kinds=RESIZING),
    "a dirty image is opened": Guest(700, LAZY, dirty=True, n_requests=15),
    "encrypted": Guest(700, {"cluster_size": 2048, **LUKS}, n_requests=60),
    "encrypted, over a chain, resizing": Guest(
        500, {"cluster_size": 2048, **LUKS}, chain=(400,), kinds=RESIZING, n_requests=60
    ),
    "a data file": Guest(700, {"cluster_size": 2048, "data_file": DATA_FILE}, kinds=RESIZING),
    "a raw data file": Guest(700, {"cluster_size": 2048, "data_file": DATA_FILE, "data_file_raw": True}, kinds=RESIZING),
    "a full host": Guest(900, SMALL, room=120_000, n_requests=120),
    "a full host, compressing": Guest(900, {"cluster_size": 2048}, room=90_000, kinds=COMPRESSING, n_requests=120),
    "a full host, resizing": Guest(500, TINY, room=60_000, kinds=RESIZING, n_requests=120),
    "version 2": Guest(700, {**SMALL, "compat": "0.10"}),
    "version 2 over a chain": Guest(500, {**SMALL, "compat": "0.10"}, chain=(400,)),
    "smallest caches": Guest(600, {**TINY, "refcount_bits": 1}, {"l2-cache-size": 512}),
    "sectors share clusters": Guest(900, {"cluster_size": 4096, "refcount_bits": 8}),
    "writes fail": Guest(700, {**TINY, "refcount_bits": 32}, failing_writes=0.02),
    "writes and resizes fail": Guest(500, TINY, kinds=RESIZING, failing_writes=0.01),
    "a barrier fails": Guest(700, {**TINY, "refcount_bits": 64}, good_barriers=14),
    "threads share clusters": Guest(900, {"cluster_size": 4096}, n_workers=8, stripe=3, n_requests=20),
    "threads own clusters": Guest(
        1200, {**TINY, "refcount_bits": 64}, {"l2-cache-size": 2048}, n_workers=8, stripe=32, n_requests=20
    ),
    "threads over a chain": Guest(
        900, SMALL, n_workers=8, stripe=5, n_requests=20, chain=(900,), failing_writes=0.01
    ),
    "threads share subclusters": Guest(900, SUBCLUSTERS, n_workers=8, stripe=3, n_requests=20, chain=(900,)),
    "threads compress": Guest(1200, {"cluster_size": 2048}, n_workers=8, stripe=32, n_requests=20, kinds=COMPRESSING),
    "threads, lazy refcounts, writes fail": Guest(
        900, {"cluster_size": 4096}, {"lazy-refcounts": True}, n_workers=8, stripe=3, n_requests=25, failing_writes=0.01
    ),
    "snapshots": Snapshots(SMALL),
    "snapshots, counted by tables": Snapshots({**TINY, "refcount_bits": 64}, tables=True),
    "snapshots in version 2": Snapshots({**TINY, "compat": "0.10"}),
    "snapshots and subclusters": Snapshots(SUBCLUSTERS),
    "bitmaps": Bitmaps(),
    "bitmaps, writes fail": Bitmaps(failing_writes=0.01),
    "amend": Amend({**TINY, "refcount_bits": 8}),
    "amend an image with snapshots": Amend(SMALL, n_snapshots=2),
    "amend over a chain": Amend({"cluster_size": 2048}, chain=400),
    "commit": Commit(SMALL, {"cluster_size": 2048}),
    "commit with snapshots": Commit({"cluster_size": 2048}, SMALL, n_snapshots=2, top_snapshot=True),
    "commit into a smaller image": Commit(SMALL, TINY, sizes=(600, 411)),
    "commit, subclusters": Commit(SUBCLUSTERS, SUBCLUSTERS),
    "rebase": Rebase({"cluster_size": 2048}),
    "rebase, subclusters": Rebase(SUBCLUSTERS),
    "stream": Stream({"cluster_size": 2048}),
    "stream, subclusters": Stream(SUBCLUSTERS),
    "convert into an existing image": Convert(SMALL),
    "convert into an existing image, compressing": Convert({"cluster_size": 2048}, compress=True),
    "repair of leaks": Repair(SMALL, "leaks"),
    "repair of counts": Repair(SMALL, "counts too low"),
    "repair of counts and snapshots": Repair(SMALL, "counts too low", n_snapshots=2),
    "repair of copied flags": Repair(TINY, "copied flags"),
    "repair that moves data": Repair(SMALL, "shared clusters"),
    "repair in version 2": Repair({**SMALL, "compat": "0.10"}, "counts too low"),
}
