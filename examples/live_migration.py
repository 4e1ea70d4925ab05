"""Storage moved between two processes that share nothing, while the disk is being written.

The destination is a process of its own that serves an empty image over NBD (here on a Unix socket; a TCP address works the
same).  The source mirrors its live disk there, becomes a user of the copy, and stops; then the destination has the disk.
Exit code 0: it is, byte for byte, what was written.

    python examples/live_migration.py
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import blocklib
from blocklib import MiB, jobs

SIZE = 64 * MiB
BLOCK = 4096


def serve(image: str, socket: str) -> int:
    """The destination: serve `image` until the input ends."""
    from blocklib import nbd

    with blocklib.open(image, "r+", format="qcow2") as disk, nbd.Server(disk, listen=f"nbd+unix:///?socket={socket}") as server:
        print(server.uri, flush=True)
        sys.stdin.read()
    return 0


class Guest:
    """Writes random blocks to a disk until it is told to stop, and remembers them."""

    def __init__(self, disk: blocklib.Disk) -> None:
        self.model = bytearray(disk.size)
        self._disk = disk
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(0)
        try:
            while not self._stop.is_set():
                offset = rng.randrange(self._disk.size // BLOCK) * BLOCK
                data = rng.randbytes(BLOCK)
                self._disk.write(offset, data)
                self.model[offset : offset + BLOCK] = data
        except BaseException as exc:
            self._failure = exc

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def migrate(folder: Path) -> bool:
    """The source: whether the destination's image is the disk after all."""
    source, destination, socket = folder / "source.qcow2", folder / "destination.qcow2", folder / "nbd.sock"
    for image in (source, destination):
        blocklib.create(image, SIZE, format="qcow2")
    command = [sys.executable, __file__, "serve", str(destination), str(socket)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        uri = server.stdout.readline().strip()
        print(f"the destination serves {uri}")
        with blocklib.open(source, "r+", format="qcow2") as disk:
            guest = Guest(disk)
            try:
                with jobs.mirror(disk, uri, format="raw", copy_mode="write-blocking") as job:
                    job.wait(until="ready")
                    print("the mirror is ready; the disk becomes the copy")
                    job.complete()
                    job.wait()
            finally:
                guest.stop()
            disk.flush()
            print("the source now uses", disk.chain()[0].filename or disk.chain()[0].name)
        server.communicate()  # the end of its input stops the destination
        if server.returncode:
            return False
    with blocklib.open(destination, format="qcow2") as disk:
        return disk.read(0, SIZE) == guest.model


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        return serve(*sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        moved = migrate(Path(folder))
    print("the destination has the disk, byte for byte" if moved else "the destination has another disk")
    return 0 if moved else 1


if __name__ == "__main__":
    sys.exit(main())
