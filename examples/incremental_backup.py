"""A backup scheme end to end: a full backup, then five incremental ones from a bitmap, while the disk is being written.

Each of the six backups is a qcow2 image over the one before it, so that opening one gives the disk of its moment.  Exit code
0: all six are what the disk was then, byte for byte.

    python examples/incremental_backup.py
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from pathlib import Path

import blocklib
from blocklib import KiB, MiB, jobs

SIZE = 64 * MiB
BLOCK = 4096


class Guest:
    """Writes random blocks until it is told to rest; resting, its model is what the disk reads as."""

    def __init__(self, disk: blocklib.Disk) -> None:
        self.model = bytearray(disk.size)
        self._disk = disk
        self._running = threading.Event()
        self._stop = threading.Event()
        self._between = threading.Lock()  # held during one write
        self._written = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)
        self._running.set()
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(0)
        while not self._stop.is_set():
            self._running.wait()
            with self._between:
                offset = rng.randrange(self._disk.size // BLOCK) * BLOCK
                data = rng.randbytes(BLOCK)
                self._disk.write(offset, data)
                self.model[offset : offset + BLOCK] = data
            self._written.release()

    def wait_for(self, writes: int) -> None:
        """Return once so many blocks more have been written."""
        for _ in range(writes):
            self._written.acquire()

    def rest(self) -> bytes:
        """Stop writing for now; what the disk reads as."""
        self._running.clear()
        with self._between:
            return bytes(self.model)

    def go_on(self) -> None:
        self._running.set()

    def stop(self) -> None:
        self._stop.set()
        self._running.set()
        self._thread.join()


def back_up(folder: Path) -> bool:
    blocklib.create(folder / "vm.qcow2", SIZE, format="qcow2")
    moments: list[tuple[Path, bytes]] = []
    with blocklib.open(folder / "vm.qcow2", "r+", format="qcow2") as disk:
        guest = Guest(disk)
        try:
            for number in range(6):
                target = folder / f"backup{number}.qcow2"
                guest.wait_for(200)
                moment = guest.rest()
                if number == 0:
                    with blocklib.transaction() as tx:  # the bitmap begins at the instant of the full backup
                        disk.bitmaps.add("nightly", granularity=64 * KiB, persistent=True, transaction=tx)
                        job = jobs.backup(disk, target, format="qcow2", sync="full", transaction=tx)
                else:
                    job = jobs.backup(
                        disk,
                        target,
                        format="qcow2",
                        sync="incremental",
                        bitmap="nightly",
                        backing=moments[-1][0].name,
                        backing_format="qcow2",
                    )
                guest.go_on()  # the backup has its instant: the guest need not wait for its end
                copied = job.wait().bytes_copied
                print(f"{target.name}: {copied / MiB:.0f} MiB copied")
                moments.append((target, moment))
        finally:
            guest.stop()
    right = True
    for target, moment in moments:
        with blocklib.open(target, format="qcow2", references="allow") as disk:
            same = disk.read(0, SIZE) == moment
        print(f"{target.name}: {'as the disk was then' if same else 'ANOTHER CONTENT'}")
        right = right and same
    return right


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        return 0 if back_up(Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
