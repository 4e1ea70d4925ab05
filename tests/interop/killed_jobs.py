"""A program that changes its chain under two guests until somebody kills it: ``python -m tests.interop.killed_jobs KIND SEED``.

It runs in the folder of its images.  The file ``journal`` outlives it: for each guest the requests it began, those that were
acknowledged and those that a flush has made durable; and how far the job is.
"""

from __future__ import annotations

import mmap
import random
import sys
import threading
from pathlib import Path
from typing import Any, Final

import blocklib
from blocklib import MiB, jobs
from tests.jobs_model import Guests

SIZE: Final = 6 * MiB
GUESTS: Final = 2
JOURNAL_LENGTH: Final = (3 * GUESTS + 1) * 8
WORKING, ENDING, ENDED = 1, 2, 3
"""The job is at work; it may have taken effect; it has."""
KINDS: Final = (
    "stream",
    "overlay",
    "mirror",
    "mirror-blocking",
    "mirror-top",
    "mirror-kept",
    "backup",
    "backup-compressed",
    "backup-incremental",
    "commit",
    "commit-below",
)


class Journal:
    """The numbers in the file, in shared memory."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), JOURNAL_LENGTH)
        self._words = memoryview(self._map).cast("Q")
        self.begun, self.done, self.flushed = (self._words[first :: 3][:GUESTS] for first in range(3))

    @property
    def phase(self) -> int:
        return self._words[3 * GUESTS]

    @phase.setter
    def phase(self, phase: int) -> None:
        self._words[3 * GUESTS] = phase


def _start(kind: str, disk: blocklib.Disk, speed: int) -> Any:
    target, named = Path("copy.qcow2"), {"format": "qcow2", "speed": speed}
    verb, _, how = kind.partition("-")
    if verb in ("stream", "overlay"):
        return jobs.stream(disk, speed=speed)
    if verb == "commit":
        return jobs.commit(disk, speed=speed, top=disk.chain()[1] if how == "below" else None)
    if verb == "mirror":
        mode: Any = "write-blocking" if how == "blocking" else "background"
        return jobs.mirror(disk, target, sync="top" if how == "top" else "full", copy_mode=mode, **named)  # type: ignore[arg-type]
    if how == "incremental":
        named |= {"existing": True, "sync": "incremental", "bitmap": "changes"}
    elif how:
        named["compress"] = "zstd"
    return jobs.backup(disk, target, **named)  # type: ignore[arg-type]


def _flush(disk: blocklib.Disk, journal: Journal) -> None:
    while True:
        done = list(journal.done)
        disk.flush()
        for guest, number in enumerate(done):
            journal.flushed[guest] = number


def main(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    journal = Journal(Path("journal"))
    disk = blocklib.open("2.qcow2", "r+", format="qcow2", references="allow", discard="unmap")
    if kind == "overlay":
        disk.add_overlay("over.qcow2", format="qcow2")
    guests = Guests(disk, disk.read(0, SIZE), GUESTS, seed=seed, journal=(journal.begun, journal.done))
    threading.Thread(target=_flush, args=(disk, journal), daemon=True).start()
    guests.wait_for(rng.randrange(10, 50))
    job = _start(kind, disk, rng.choice([5, 10, 20, 40]) * MiB)
    for event in job.events():
        if event.progress.done and journal.phase < WORKING:
            journal.phase = WORKING
        if event.status == "ready" and journal.phase < ENDING:
            journal.phase = ENDING
            job.cancel() if kind == "mirror-kept" else job.complete()
        elif event.status in ("waiting", "pending"):
            journal.phase = ENDING
    job.wait()
    journal.phase = ENDED
    while True:
        guests.wait_for(1000)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
