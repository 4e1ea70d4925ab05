"""A disk, or a window of it, as a raw binary file for ``io.BufferedReader``, ``tarfile``, ``zipfile`` and parsers."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from blocklib.errors import ClosedError, OutOfRangeError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from blocklib.disk import Disk


class DiskFile(io.RawIOBase):
    """Position 0 is `offset` of the disk; the file ends `length` bytes later and cannot grow."""

    def __init__(self, disk: Disk, offset: int, length: int, *, writable: bool) -> None:
        self._disk = disk
        self._offset = offset
        self._length = length
        self._writable = writable
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._writable

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check_open()
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}.get(whence)
        if start is None:
            raise UsageError(f"whence is 0, 1 or 2, not {whence}")
        if start + offset < 0:
            raise UsageError(f"position {start + offset} lies before the start of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill `buffer` as far as the file reaches; the number of bytes, 0 at the end."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self._length - self._position))
        if n:
            self._disk.readinto(self._offset + self._position, view[:n])
            self._position += n
        return n

    def write(self, data: Buffer) -> int:
        """Write all of `data`; the number of bytes.  Raises OutOfRangeError, with nothing written, for more than fits."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("the disk was opened for reading")
        view = memoryview(data).cast("B")
        n = len(view)
        # Never in part, as a raw file may: who writes an archive does not look at the number of bytes.
        if n > max(0, self._length - self._position):
            raise OutOfRangeError(
                f"{n} bytes at position {self._position} reach past the end of the file, {self._length}, and it cannot grow"
            )
        if n:
            self._disk.write(self._offset + self._position, view)
            self._position += n
        return n

    def truncate(self, size: int | None = None) -> int:
        raise io.UnsupportedOperation("a disk is resized by Disk.truncate")

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the file is closed")
