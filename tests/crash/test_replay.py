"""Whatever a crash leaves of the last writes, qemu-img finds at worst leaked clusters, and what was flushed is there.

Random requests run on a disk that records what reaches it; then the host "crashes" at many places of that record.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blocklib.disk import Disk
from blocklib.errors import StorageError
from tests.crash.recording import SECTOR, Event, RecordingNode, crash_sites
from tests.crash.workload import History, Worker, base_disk, difference_in, disk_on, new_image, run_workers
from tests.programs import Program

CLEAN_OR_LEAKS = (0, 3)
"""Exit codes of qemu-img check."""


@dataclass(frozen=True)
class Workload:
    sectors: int
    options: dict[str, int | str]
    opened: dict[str, int] = field(default_factory=dict)
    n_workers: int = 1
    stripe: int = 1 << 40
    n_requests: int = 250
    base_sectors: int = 0
    resizes: bool = False
    compresses: bool = False
    failing_writes: float = 0.0
    good_barriers: int | None = None
    """How many barriers succeed before one fails."""
    lazy: bool = False
    """Counts are postponed: an image is right only after it was opened and closed."""
    n_sites: int = 9
    n_outcomes: int = 5


WORKLOADS = {
    "refcount table grows": Workload(5000, {"cluster_size": 512, "refcount_bits": 64}, n_sites=12),
    "smallest caches": Workload(900, {"cluster_size": 512, "refcount_bits": 1}, {"l2-cache-size": 512}),
    "sectors share clusters": Workload(3001, {"cluster_size": 4096, "refcount_bits": 8}),
    "subclusters": Workload(3001, {"cluster_size": "16k", "extended_l2": "on", "refcount_bits": 8}),
    "subclusters over a backing file": Workload(
        2000, {"cluster_size": "16k", "extended_l2": "on"}, base_sectors=1501, resizes=True
    ),
    "threads share subclusters": Workload(
        2001, {"cluster_size": "16k", "extended_l2": "on"}, n_workers=8, stripe=3, n_requests=50, base_sectors=2001
    ),
    "version 2": Workload(3000, {"cluster_size": 1024, "compat": "0.10"}),
    "over a backing file": Workload(2000, {"cluster_size": 2048}, base_sectors=1501, resizes=True),
    "version 2 over a backing file": Workload(700, {"cluster_size": 1024, "compat": "0.10"}, base_sectors=501),
    "the disk changes its size": Workload(300, {"cluster_size": 512}, resizes=True, n_sites=14),
    "writes fail": Workload(2000, {"cluster_size": 512, "refcount_bits": 32}, failing_writes=0.02),
    "writes and resizes fail": Workload(600, {"cluster_size": 512}, resizes=True, failing_writes=0.01),
    "a barrier fails": Workload(2000, {"cluster_size": 512, "refcount_bits": 64}, good_barriers=30),
    "lazy refcounts": Workload(3000, {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": "on"}, lazy=True, n_sites=12),
    "lazy refcounts, smallest caches": Workload(
        900, {"cluster_size": 512, "lazy_refcounts": "on"}, {"l2-cache-size": 512}, resizes=True, lazy=True
    ),
    "lazy refcounts, threads, writes fail": Workload(
        3001,
        {"cluster_size": 4096},
        {"lazy-refcounts": True},
        n_workers=8,
        stripe=3,
        n_requests=60,
        failing_writes=0.01,
        lazy=True,
    ),
    "compressed clusters": Workload(3001, {"cluster_size": 4096}, compresses=True, n_sites=14),
    "compressed clusters and failing writes": Workload(
        2000, {"cluster_size": 1024, "refcount_bits": 4}, compresses=True, failing_writes=0.02
    ),
    "compressed clusters over a backing file": Workload(
        1200, {"cluster_size": 2048, "compression_type": "zstd"}, base_sectors=900, resizes=True, compresses=True
    ),
    "compressed clusters, smallest caches": Workload(
        1200, {"cluster_size": 512, "refcount_bits": 2}, {"l2-cache-size": 512}, compresses=True
    ),
    "compressed clusters beside subclusters": Workload(
        3001, {"cluster_size": "16k", "extended_l2": "on"}, compresses=True, resizes=True
    ),
    "compressed clusters, lazy refcounts": Workload(
        2000, {"cluster_size": 1024, "lazy_refcounts": "on"}, compresses=True, lazy=True, failing_writes=0.01
    ),
    "threads compress": Workload(4001, {"cluster_size": 2048}, n_workers=8, stripe=32, n_requests=60, compresses=True),
    "threads share clusters": Workload(3001, {"cluster_size": 4096}, n_workers=8, stripe=3, n_requests=60),
    "threads own clusters": Workload(
        4001, {"cluster_size": 512, "refcount_bits": 64}, {"l2-cache-size": 2048}, n_workers=8, stripe=32, n_requests=60
    ),
    "threads over a backing file": Workload(
        2001, {"cluster_size": 1024}, n_workers=8, stripe=5, n_requests=50, base_sectors=2001, failing_writes=0.01
    ),
}


@pytest.fixture
def many_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_was_flushed_survives_a_crash_at_any_point_and_at_worst_clusters_leak(
    name: str, tmp_path: Path, qemu_img: Program, many_thread_switches: None
) -> None:
    replay(WORKLOADS[name], sum(name.encode()), tmp_path, qemu_img)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(1000, 1040))
@pytest.mark.parametrize("name", WORKLOADS)
def test_torture(name: str, seed: int, tmp_path: Path, qemu_img: Program, many_thread_switches: None) -> None:
    replay(WORKLOADS[name], seed, tmp_path, qemu_img)


def replay(load: Workload, seed: int, tmp_path: Path, qemu_img: Program) -> None:
    """Run a workload and look at what crashes leave of it."""
    start = new_image(load.sectors * SECTOR, load.options)
    host = RecordingNode(data=start)
    base = base_disk(load.base_sectors) if load.base_sectors else None
    history = History(host, base_sectors=load.base_sectors)
    _work(load, host, base, history, seed)
    rnd = random.Random(seed)
    for site in crash_sites(start, host.log, _cuts(host.log, rnd, load.n_sites)):
        allowed = history.allowed(site.cut)
        for number, image in enumerate(site.outcomes(rnd, load.n_outcomes)):
            where = f"after {site.cut} of {len(host.log)} events, outcome {number}"
            crashed = RecordingNode(data=image)
            if load.lazy:
                disk_on(crashed, backing=base).close()
            _check(tmp_path / "crashed.qcow2", bytes(crashed.data), qemu_img, where)
            with disk_on(crashed, backing=base) as disk:
                difference = difference_in(disk.read(0, disk.size), allowed)
                assert difference is None, f"{where}: {difference}"
                if number != 1:
                    continue
                Worker(disk, History(crashed), 100, 1, stripe=1 << 40, seed=seed).write_somewhere(20)
            _check(tmp_path / "continued.qcow2", bytes(crashed.data), qemu_img, f"{where}, and going on")
    if base is not None:
        base.close()


def _work(load: Workload, host: RecordingNode, base: Disk | None, history: History, seed: int) -> None:
    disk = disk_on(host, options=load.opened, backing=base)
    rnd = random.Random(seed)

    barriers = itertools.count()

    def fail_if(fails: bool) -> None:
        if fails:
            raise StorageError("the host does not want to", errno=28, operation="injected")

    host.before_write = lambda _offset, _length: fail_if(rnd.random() < load.failing_writes)
    host.before_barrier = lambda: fail_if(next(barriers) == load.good_barriers)
    workers = [
        Worker(
            disk,
            history,
            number,
            load.n_workers,
            stripe=load.stripe,
            seed=seed,
            resizes=load.resizes,
            compresses=load.compresses,
        )
        for number in range(load.n_workers)
    ]
    run_workers(workers, load.n_requests)
    host.before_write = host.before_barrier = None
    if disk.node.poisoned is not None:
        assert load.failing_writes or load.good_barriers
        disk.abandon()
        return
    difference = difference_in(disk.read(0, disk.size), history.now)
    assert difference is None, difference
    history.flush(disk.flush)
    disk.close()


def _cuts(log: list[Event], rnd: random.Random, n: int) -> list[int]:
    """Places in the log: the end, some anywhere, and more around barriers, where tables are written."""
    barriers = [position for position, event in enumerate(log) if event[0] == "barrier"] or [0]
    cuts = {len(log)}
    for _ in range(2 * n):
        if len(cuts) == n:
            break
        near = rnd.choice(barriers) + rnd.randrange(-6, 7) if rnd.random() < 0.7 else rnd.randrange(len(log))
        cuts.add(min(max(0, near), len(log)))
    return sorted(cuts)


def _check(path: Path, image: bytes, qemu_img: Program, where: str) -> None:
    path.write_bytes(image)
    done = qemu_img.run("check", "-f", "qcow2", path)
    assert done.returncode in CLEAN_OR_LEAKS, f"{where}: exit code {done.returncode}\n{done.stdout}{done.stderr[:2000]}"
