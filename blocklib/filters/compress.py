"""compress: what is written becomes compressed clusters, where a cluster gets its place in the image."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import ClassVar

from blocklib.errors import StorageError
from blocklib.passing import PassingFilter

_AT_ONCE = 2 << 20
"""Bytes whose streams are in memory together."""


class CompressNode(PassingFilter):
    """The child "file", an image that can have compressed clusters.

    A cluster that has no place yet is completed with what it reads as and written compressed; one that has a place, compressed
    or not, is written as without this filter, since only a new one can be compressed.  (QEMU's filter fails there.)
    """

    driver = "compress"
    sees_writes: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = True

    def load(self) -> None:
        """Raises UnsupportedFeatureError above what has no compressed clusters."""
        self._compressor = self.compressor()
        self._unit = self._compressor.unit

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        data = views[0] if len(views) == 1 else memoryview(b"".join(views))
        unit = self._unit
        first, end = offset & -unit, min(self.size, -(-(offset + len(data)) // unit) * unit)
        partial = first != offset or end != offset + len(data)
        # Who completes a cluster with what it reads as must not miss what somebody else writes to the rest of it.
        held = self.write_ranges.acquire(first, end, exclusive=partial)
        try:
            self._write(offset, data)
        finally:
            self.write_ranges.release(held)

    def _write(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        for first, last, is_free in self._clusters(offset, end):
            start = max(first, offset)
            part = data[start - offset : min(last, end) - offset]
            if is_free:
                self._compress(first, last, start, part)
            else:
                self.file.write(start, (part,))

    def _clusters(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether they have no place yet) of the whole clusters that a range touches."""
        unit = self._unit
        start, last = offset & -unit, min(self.size, -(-end // unit) * unit)
        while start < last:
            n, is_free = self.file.free_run(start, last - start)
            if start + n < last:
                n = n & -unit if is_free else -(-n // unit) * unit
                n, is_free = (n, is_free) if n else (unit, False)  # part of it has a place
            stop = min(start + n, last)
            yield start, stop, is_free
            start = stop

    def _compress(self, first: int, last: int, offset: int, data: memoryview) -> None:
        """Write `data` to the clusters in [first, last), which have no place yet."""
        end = offset + len(data)
        for start in range(first, last, _AT_ONCE):
            stop = min(last, start + _AT_ONCE)
            begin = max(start, offset)
            own = data[begin - offset : min(stop, end) - offset]
            whole = own if len(own) == stop - start else self._completed(start, stop, begin, own)
            try:
                self.file.write_packed(start, whole, self._compressor.compress(whole), self._unit)
            except StorageError as error:
                if error.errno != errno.EIO:
                    raise
                # Somebody who writes past us, a job that fills the image, has given a cluster its place meanwhile.
                self.file.write(begin, (own,))

    def _completed(self, start: int, stop: int, offset: int, data: memoryview) -> memoryview:
        """[start, stop) as it reads with `data` at `offset`."""
        whole = memoryview(bytearray(stop - start))
        end = offset + len(data)
        if start < offset:
            self.file.read(start, whole[: offset - start])
        whole[offset - start : end - start] = data
        if end < stop:
            self.file.read(end, whole[end - start :])
        return whole

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        held = self.write_ranges.acquire(offset, offset + length, exclusive=False)
        try:
            super().zero_range(offset, length, unmap=unmap)
        finally:
            self.write_ranges.release(held)

    def discard_range(self, offset: int, length: int) -> None:
        held = self.write_ranges.acquire(offset, offset + length, exclusive=False)
        try:
            super().discard_range(offset, length)
        finally:
            self.write_ranges.release(held)

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        held = self.write_ranges.acquire(offset, offset + len(data), exclusive=False)
        try:
            super().pass_packed(offset, data, packed, unit)
        finally:
            self.write_ranges.release(held)
