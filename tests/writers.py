"""Writers beside a job: threads that keep writing random blocks to a disk, with a model of what it must read as."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import blocklib
from blocklib import KiB


def make_chain(
    folder: Path, depth: int, size: int, options: Mapping[str, int | str] | None = None
) -> tuple[list[Path], bytearray]:
    """A chain of qcow2 images, base first, each with random blocks and zeroes; and what the top one reads as."""
    rng = random.Random(depth)
    model = bytearray(size)
    paths: list[Path] = []
    for level in range(depth):
        path = folder / f"{level}.qcow2"
        below = paths[-1].name if paths else None
        blocklib.create(path, size, format="qcow2", backing=below, backing_format="qcow2" if below else None, options=options)
        paths.append(path)
        with blocklib.open(path, "r+", format="qcow2", references="allow") as disk:
            for _ in range(25):
                offset, length = rng.randrange(size - 100 * KiB), rng.randrange(1, 100 * KiB)
                data = rng.randbytes(length)
                disk.write(offset, data)
                model[offset : offset + length] = data
            for _ in range(5):
                offset, length = rng.randrange(size // 65536 - 4) * 65536, 65536 * rng.randrange(1, 4)
                disk.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
    return paths, model


class Writers:
    """Threads that write, zero and discard, each in its own part of the disk, until `stop`."""

    def __init__(self, disk: blocklib.Disk, model: bytearray, count: int = 3, *, seed: int = 0) -> None:
        self._disk = disk
        self._model = model
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self.written = threading.Semaphore(0)
        """Released once for each request that was done."""
        part = len(model) // count
        self._threads = [
            # Daemons: where a disk hangs, its test fails and does not hang as well.
            threading.Thread(target=self._work, args=(seed + number, number * part, part), daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, seed: int, start: int, part: int) -> None:
        rng = random.Random(seed)
        disk, model = self._disk, self._model
        try:
            while not self._stop.is_set():
                offset, length = start + rng.randrange(part - 20000), rng.randrange(1, 20000)
                if rng.random() < 0.1:
                    data = bytes(length)
                    disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                else:
                    data = rng.randbytes(length)
                    disk.write(offset, data)
                model[offset : offset + length] = data
                assert disk.read(offset, length) == data
                self.written.release()
        except BaseException as exc:
            self._failures.append(exc)
            self.written.release(1000)

    def wait_for(self, requests: int) -> None:
        """Return once so many requests more have been done."""
        for _ in range(requests):
            assert self.written.acquire(timeout=60)

    def stop(self) -> None:
        """Let the threads end.  Raises what went wrong in one of them."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        if self._failures:
            raise self._failures[0]


@contextmanager
def writing(disk: blocklib.Disk, model: bytearray, count: int = 3, *, seed: int = 0) -> Iterator[Writers]:
    """Writers while the block runs."""
    writers = Writers(disk, model, count, seed=seed)
    try:
        yield writers
    finally:
        writers.stop()


def qemu_chain(path: Path) -> list[str]:
    """The file names of the chain, as QEMU sees it."""
    done = subprocess.run(
        ["qemu-img", "info", "--backing-chain", "--output=json", path], capture_output=True, text=True, check=True
    )
    return [Path(image["filename"]).name for image in json.loads(done.stdout)]


def qemu_content(path: Path, folder: Path) -> bytes:
    """What the disk reads as, for QEMU."""
    out = folder / "content.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, out], check=True)
    return out.read_bytes()


def is_clean(path: Path) -> bool:
    """Whether ``qemu-img check`` finds nothing at all."""
    return subprocess.run(["qemu-img", "check", path], capture_output=True, check=False).returncode == 0
