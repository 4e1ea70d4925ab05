"""A disk that remembers every write and barrier, and what may be left of it after a crash.

The model is a host with a page cache: what was written before a completed barrier *began* is durable; of what came later,
each 512-byte sector holds any one of the contents it has had since.  Sectors do not tear; longer writes do.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from blocklib.extents import FLAG_ALLOCATED, FLAG_DATA, FLAG_OFFSET_VALID, KIND_DATA, Run
from blocklib.node import Node, Preallocation

SECTOR: Final = 512
PUNCHED: Final = 0xDD
"""What a discarded byte reads as: nobody may count on zeroes."""

Event: TypeAlias = tuple[Literal["write"], int, bytes] | tuple[Literal["barrier"], int, bytes]
"""("write", offset, bytes), or ("barrier", position in the log where it began, b"")."""


class RecordingNode(Node):
    """A small disk in memory with a log of what reached it.  Safe from any thread."""

    driver = "recording"
    is_leaf = True

    def __init__(self, *, data: bytes = b"") -> None:
        super().__init__(None, None, read_only=False)
        self.discard_passes = True
        self.data = bytearray(data)
        self.size = len(data)
        self.log: list[Event] = []
        self.before_write: Callable[[int, int], object] | None = None
        """Called with (offset, length) before a write takes place; may raise, or run something in between."""
        self.before_barrier: Callable[[], object] | None = None
        self.before_discard: Callable[[int, int], object] | None = None
        self._lock = threading.Lock()

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        with self._lock:
            for view in views:
                part = self.data[offset : offset + len(view)]
                view[: len(part)] = part
                view[len(part) :] = bytes(len(view) - len(part))
                offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        data = b"".join(bytes(view) for view in views)
        if self.before_write is not None:
            self.before_write(offset, len(data))
        with self._lock:
            self._change(offset, data)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self.pwritev(offset, (bytes(length),))

    def discard_range(self, offset: int, length: int) -> None:
        if self.before_discard is not None:
            self.before_discard(offset, length)
        with self._lock:
            length = min(length, self.size - offset)
            if length > 0:
                self._change(offset, bytes((PUNCHED,)) * length)

    def _change(self, offset: int, data: bytes) -> None:
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.size = len(self.data)
        self.log.append(("write", offset, data))

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        with self._lock:
            assert size >= self.size, "shrinking is not modelled"
            self.data.extend(bytes(size - self.size))
            self.size = size

    def flush(self) -> None:
        begun = len(self.log)
        if self.before_barrier is not None:
            self.before_barrier()
        with self._lock:
            self.log.append(("barrier", begun, b""))

    def resolve(self, offset: int, length: int) -> Run:
        return KIND_DATA, None, offset, length, FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID


@dataclass
class CrashSite:
    """What a crash at one place of the log may leave: the durable bytes, and the writes that may or may not be there."""

    cut: int
    durable: bytes
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def left(self, survives: Callable[[int], bool]) -> bytes:
        """One image: `survives(n)` says whether pending write `n` reached the disk, were it not for an earlier loss.

        It is asked once per write and sector; in each sector the first loss takes everything after it along.
        """
        image = bytearray(self.durable)
        lost: set[int] = set()
        for number, (offset, data) in enumerate(self.pending):
            position, end = offset, offset + len(data)
            while position < end:
                sector = position // SECTOR
                stop = min(end, (sector + 1) * SECTOR)
                if sector not in lost and survives(number):
                    if len(image) < stop:
                        image.extend(bytes(stop - len(image)))
                    image[position:stop] = data[position - offset : stop - offset]
                else:
                    lost.add(sector)
                position = stop
        return bytes(image)

    def outcomes(self, rnd: random.Random, n: int) -> list[bytes]:
        """`n` different things that may be left: nothing, everything, one write more or less, and random mixtures."""
        whole = len(self.pending)
        choices: list[Callable[[int], bool]] = [lambda _number: False, lambda _number: True]
        if whole:
            last = whole - 1
            one = rnd.randrange(whole)
            choices += [
                lambda number: number == last,
                lambda number: number != one,
                lambda number: number == one,
            ]
        while len(choices) < n:
            choices.append(_some_writes(rnd, whole))
            choices.append(_some_sectors(rnd))
        found: list[bytes] = []
        for survives in choices[:n]:
            image = self.left(survives)
            if image not in found:
                found.append(image)
        return found


def _some_writes(rnd: random.Random, n: int) -> Callable[[int], bool]:
    share = rnd.choice((0.1, 0.5, 0.9))
    kept = {number for number in range(n) if rnd.random() < share}
    return kept.__contains__


def _some_sectors(rnd: random.Random) -> Callable[[int], bool]:
    share = rnd.choice((0.3, 0.7))
    return lambda _number: rnd.random() < share


def crash_sites(start: bytes, log: Sequence[Event], cuts: Sequence[int]) -> list[CrashSite]:
    """The sites at `cuts`, ascending positions in `log`: a crash after that many events."""
    sites = []
    durable = bytearray(start)
    pending: list[tuple[int, int, bytes]] = []  # (position in the log, offset, bytes)
    wanted = set(cuts)
    for position in range(len(log) + 1):
        if position in wanted:
            sites.append(CrashSite(position, bytes(durable), [(offset, data) for _at, offset, data in pending]))
        if position == len(log):
            break
        kind, number, data = log[position]
        if kind == "write":
            pending.append((position, number, data))
            continue
        for _at, offset, written in (item for item in pending if item[0] < number):
            if len(durable) < offset:
                durable.extend(bytes(offset - len(durable)))
            durable[offset : offset + len(written)] = written
        pending = [item for item in pending if item[0] >= number]
    return sites
