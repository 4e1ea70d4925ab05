"""DEFLATE streams, nearly as small as zlib's level 6 makes them, in a fraction of its time.

ISA-L compresses six to ten times faster than zlib, into streams that are about 7 % larger.  So most is left to ISA-L, and zlib
compresses as much as it takes to keep the whole within `_MOST_EXCESS`.  What that is depends on the data, and is estimated
from what both have compressed.  See docs/decisions/0005-deflate-by-two-compressors.md.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Sequence
from operator import add
from typing import Final, NamedTuple, TypeAlias

Packed: TypeAlias = "list[bytes | None]"
"""The stream of each cluster, or None where it does not shrink."""

WINDOW_BITS: Final = 12
"""Readers may keep no more than 4 KiB of what they have decompressed: QEMU's inflate is given this window."""
FAST_LEVELS: Final = range(1, 4)
"""Levels that ISA-L does, in streams 5 to 12 % larger than those of level 6."""
_FAST: Final = 3
_GOOD: Final = 6
_MOST_EXCESS: Final = 1.057
"""What the default level may take, by its own estimate, in terms of zlib's level 6, which is what QEMU uses."""
_SAMPLE: Final = 64 << 10
"""Bytes that both compress to see how much smaller zlib is."""
_SAMPLED: Final = 512 << 10
"""Once so many bytes of streams have been compared, not every piece needs to be."""
_SAMPLE_EVERY: Final = 4
_DOUBT: Final = 0.03
"""How far off the estimate of what zlib would have made may be."""
_NOISE: Final = 0.97
"""What shrinks to no less than this is as good as random: zlib could not do much, either."""
_LAG: Final = 64
"""A piece may know of those that many before it, and earlier.  So many are in work at the same time, at most, so that an image
does not depend on which thread was faster."""


def deflate(data: memoryview, level: int) -> bytes:
    """All of `data` as one stream."""
    if level in FAST_LEVELS:
        from isal import igzip_lib

        # Larger blocks fit large clusters worse than what they save in tables of codes.
        memory = igzip_lib.MEM_LEVEL_DEFAULT if len(data) <= _SAMPLE else igzip_lib.MEM_LEVEL_SMALL
        return igzip_lib.compress(data, level, igzip_lib.COMP_DEFLATE, memory, hist_bits=WINDOW_BITS)
    stream = zlib.compressobj(level, zlib.DEFLATED, -WINDOW_BITS)
    return stream.compress(data) + stream.flush()


def _begun_well(data: memoryview, cut: int) -> bytes:
    """All of `data` as one stream, of which zlib has made what stands for the first `cut` bytes."""
    if cut >= len(data):
        return deflate(data, _GOOD)
    from isal import isal_zlib

    good = zlib.compressobj(_GOOD, zlib.DEFLATED, -WINDOW_BITS)
    before = data[max(0, cut - (1 << WINDOW_BITS)) : cut]
    fast = isal_zlib.compressobj(_FAST, isal_zlib.DEFLATED, -WINDOW_BITS, zdict=before)
    return b"".join((good.compress(data[:cut]), good.flush(zlib.Z_SYNC_FLUSH), fast.compress(data[cut:]), fast.flush()))


class Tally(NamedTuple):
    """What came of pieces, in bytes of streams."""

    plain: int = 0
    """What is as good as random."""
    before: int = 0
    """What ISA-L made of the rest."""
    after: int = 0
    """And what that is once zlib has made some of it smaller."""
    fast: int = 0
    """What ISA-L made of samples."""
    good: int = 0
    """And zlib of the same."""

    def plus(self, other: Tally) -> Tally:
        return Tally(*map(add, self, other))

    @property
    def ratio(self) -> float:
        """How small zlib makes what ISA-L has made."""
        return self.good / self.fast

    @property
    def spare(self) -> float:
        """How much larger it may all be."""
        return _MOST_EXCESS * (self.plain + self.before * self.ratio) - self.plain - self.after if self.fast else 0.0


class Ledger:
    """The tallies of pieces that are compressed side by side, so that what one saves another may spend."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._early: dict[int, Tally] = {}
        """Of pieces before which one is missing."""
        self._sums: deque[Tally] = deque([Tally()], maxlen=_LAG)
        """Of all pieces before one, for the last few."""
        self._done = 0
        """How many pieces the last of them covers."""

    def before(self, number: int) -> Tally:
        """Of all pieces that piece `number` may know of."""
        with self._lock:
            back = self._done - max(number - _LAG + 1, 0)
            return self._sums[max(len(self._sums) - 1 - max(back, 0), 0)]

    def note(self, number: int, tally: Tally) -> None:
        with self._lock:
            self._early[number] = tally
            while self._done in self._early:
                self._sums.append(self._sums[-1].plus(self._early.pop(self._done)))
                self._done += 1


class Balanced:
    """The clusters of one piece of work: compressed fast at first, and then as well as it takes."""

    def __init__(self, clusters: Sequence[memoryview], unit: int) -> None:
        self._clusters = clusters
        self._unit = unit
        self.streams: Packed = []
        self._shrunk: list[int] = []
        """The clusters that zlib could make smaller."""
        self._length = 0
        """Bytes of their streams."""
        self._plain = 0
        """Bytes of the others' streams."""
        noise = False
        for number, cluster in enumerate(clusters):
            stream = deflate(cluster, 1) if noise else b""  # noise comes in runs, and is found out fast by level 1
            if len(stream) < _NOISE * unit:
                stream = deflate(cluster, _FAST)
            noise = len(stream) >= _NOISE * unit
            self.streams.append(stream if len(stream) < unit else None)
            if noise:
                self._plain += min(len(stream), unit)
            else:
                self._length += len(stream)
                self._shrunk.append(number)

    def balance(self, number: int, known: Tally) -> Tally:
        """Have zlib make as many streams smaller as it takes, given what is known of earlier pieces; what came of this one.

        Which ones does not depend on what it would save, so that those are fair samples, too.
        """
        if not self._shrunk:
            return Tally(plain=self._plain)
        before = self._length
        certain = known.good >= _SAMPLED and number % _SAMPLE_EVERY > 0
        if certain and before <= self._most(before, known, known.ratio - _DOUBT):
            fast = good = 0
        elif self._unit > _SAMPLE:
            fast, good = self._compare_parts()
            ratio = (known.good + good) / (known.fast + fast)
            self._improve_heads(self._most(before, known, ratio), 1 - ratio)
        else:
            fast = good = 0
            for n, index in enumerate(self._shuffled(number)):
                enough = n * self._unit >= _SAMPLE
                if enough and self._length <= self._most(before, known, (known.good + good) / (known.fast + fast)):
                    break
                fast += self._of(index)
                good += self._make_good(index)
        return Tally(self._plain, before, self._length, fast, good)

    def _most(self, before: int, known: Tally, ratio: float) -> float:
        """What the streams may take which ISA-L has made `before` bytes of."""
        return (_MOST_EXCESS - 1) * self._plain + _MOST_EXCESS * before * ratio + known.spare / _LAG

    def _shuffled(self, number: int) -> list[int]:
        """The clusters that zlib could make smaller, in an order that has nothing to do with what is in them."""
        return sorted(self._shrunk, key=lambda index: (index + number * 4099) * 0x9E3779B1 & 0xFFFFFFFF)

    def _of(self, index: int) -> int:
        stream = self.streams[index]
        assert stream is not None
        return len(stream)

    def _make_good(self, index: int) -> int:
        """The length of zlib's stream for a cluster; it is taken if it is the shorter one."""
        stream = deflate(self._clusters[index], _GOOD)
        self._take(index, stream)
        return len(stream)

    def _take(self, index: int, stream: bytes) -> None:
        saved = self._of(index) - len(stream)
        if saved > 0:
            self.streams[index] = stream
            self._length -= saved

    def _compare_parts(self) -> tuple[int, int]:
        """What ISA-L and zlib make of a few parts of large clusters."""
        fast = good = 0
        for index in self._shrunk:
            cluster = self._clusters[index]
            for quarter in (1, 3):
                start = quarter * len(cluster) // 4 - _SAMPLE // 4
                part = cluster[start : start + _SAMPLE // 2]
                fast += len(deflate(part, _FAST))
                good += len(deflate(part, _GOOD))
        return fast, good

    def _improve_heads(self, most: float, gain: float) -> None:
        """Let zlib compress the first part of each large cluster; `gain` is what it is expected to save of a whole one."""
        excess = self._length - most
        if excess <= 0 or gain <= 0:
            return
        share = min(excess / (self._length * gain), 1.0)
        for index in self._shrunk:
            cut = -(-int(share * self._unit) // _SAMPLE) * _SAMPLE
            self._take(index, _begun_well(self._clusters[index], cut))
