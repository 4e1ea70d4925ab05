"""A program that writes to an image and kills itself in the middle: `python -m tests.interop.crashing IMAGE SEED WRITES`.

It dies before write number WRITES reaches the image file (0: it does not die).  Whenever it has flushed it prints how many
steps are durable, and the numbers of the first write of the flush and of the one after it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import blocklib
from blocklib.protocols.file import FileNode
from tests.property.chains import SECTOR, Change, Place

STEPS: Final = 60


def steps(seed: int) -> Iterator[Change | None]:
    """What is done: changes, and None for a flush."""
    choose = random.Random(seed)
    kinds: tuple[Any, ...] = ("write", "write", "write", "zero", "zero and unmap", "discard")
    for _ in range(STEPS):
        if choose.random() < 0.15:
            yield None
        else:
            place = Place(choose.randrange(60), choose.choice((0, 700)), choose.choice((0, 1, 3)), choose.choice((0, 900)))
            yield Change(choose.choice(kinds), place, choose.randrange(1000))


def die_before(write: int) -> list[int]:
    """Count the writes to files, and be killed before this one; returns the count, in a list."""
    count = [0]
    pwritev = FileNode.pwritev

    def counting(self: FileNode, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        count[0] += 1
        if count[0] == write:
            os.kill(os.getpid(), signal.SIGKILL)
        pwritev(self, offset, views)

    FileNode.pwritev = counting  # type: ignore[method-assign]
    return count


def main(path: str, seed: int, write: int) -> None:
    count = die_before(write)
    before = 0
    with blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap") as disk:
        cluster_size = disk.info().cluster_size or SECTOR
        for number, step in enumerate(steps(seed)):
            before = count[0]
            if step is None:
                disk.flush()
                print(number, before + 1, count[0] + 1, flush=True)
            else:
                step.send(disk, cluster_size)
    print(STEPS, before + 1, count[0] + 1, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
