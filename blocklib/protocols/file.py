"""Regular files and block devices: the drivers "file" and "host_device", in the room of protocols.

Short transfers are resumed; a signal in the middle of a call is Python's to resume (PEP 475).  Zeroes and discards go
through fallocate where the file system has it.  A file is never mapped: truncation under a map is a signal, not an error.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from operator import add
from typing import TYPE_CHECKING, Any, Final

from blocklib.buffers import PIECE, aligned_pool, pieces_of, zero_fill
from blocklib.errors import StorageError, UsageError
from blocklib.extents import FLAG_ALLOCATED, FLAG_DATA, FLAG_EOF, FLAG_OFFSET_VALID, FLAG_ZERO, KIND_DATA, KIND_ZERO, Run
from blocklib.node import Preallocation
from blocklib.protocols import host
from blocklib.protocols.opened import OpenedFile

if TYPE_CHECKING:
    from blocklib._fast.transfers import Moves

_IOV_MAX: Final = 1024
"""Buffers that one system call takes (Linux and macOS)."""
_SEEK_DATA: Final = getattr(os, "SEEK_DATA", None)
_SEEK_HOLE: Final = getattr(os, "SEEK_HOLE", None)


class FileNode(OpenedFile):
    """A regular file, or a block device."""

    # What the file system can do, until it says that it cannot.
    _can_punch = True
    _can_zero = True
    _can_seek_holes = _SEEK_DATA is not None

    # -- moving bytes -------------------------------------------------------------------------------------------------

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill `views`; bytes past the end of the file read as zero.  Raises StorageError."""
        if len(views) == 1:
            view = views[0]
            try:
                n = os.preadv(self._fd, views, offset)
            except OSError as exc:
                raise self._failure(exc, "preadv") from exc
            if n != len(view):
                self._read_rest(offset + n, [view[n:]])
        else:
            self._read_rest(offset, list(views))

    def _read_rest(self, offset: int, views: list[memoryview]) -> None:
        while views:
            n = 0
            if offset % self.request_alignment == 0:  # else the end of the file cut the last direct transfer short
                try:
                    n = os.preadv(self._fd, views[:_IOV_MAX], offset)
                except OSError as exc:
                    raise self._failure(exc, "preadv") from exc
            if n == 0 and any(len(view) for view in views[:_IOV_MAX]):
                for view in views:
                    zero_fill(view)
                return
            offset += n
            views = _after(views, n)

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        """Write all of `views`; past the end the file grows.  Raises StorageError, ReadOnlyError."""
        length = len(views[0]) if len(views) == 1 else pieces_of(views)
        end = offset + length
        if end <= self.size:
            self._write(offset, views, length)
        else:
            with self._size_lock:
                self._write(offset, views, length)
                if end > self.size:
                    self.size = end

    def _write(self, offset: int, views: Sequence[memoryview | bytes | bytearray], length: int) -> None:
        try:
            n = os.pwritev(self._fd, views if len(views) <= _IOV_MAX else views[:_IOV_MAX], offset)
            if n != length:
                self._write_rest(offset + n, _after([memoryview(view) for view in views], n))
        except OSError as exc:
            raise self._failure(exc, "pwritev") from exc
        finally:
            self._written = True  # afterwards: a flush that began before the write ended may not cover it

    def _write_rest(self, offset: int, views: list[memoryview]) -> None:
        while views:
            n = os.pwritev(self._fd, views[:_IOV_MAX], offset)
            if n == 0 and any(len(view) for view in views[:_IOV_MAX]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset += n
            views = _after(views, n)

    def transfer(self, offsets: Any, addresses: Any, lengths: Any, results: Any, *, writing: bool) -> None:
        if not host.IS_64_BIT_LINUX:
            super().transfer(offsets, addresses, lengths, results, writing=writing)
            return
        if self._fd < 0:
            raise self._closed_error()
        from blocklib._fast.transfers import Moves

        moves = Moves(offsets, addresses, lengths, results)
        if not moves.count:
            return
        if not writing:
            self._move(moves, writing=False)
            return
        self._check_writable()
        ends = list(map(add, moves.offsets.view.tolist(), moves.lengths.view.tolist()))
        end = max(ends)
        # Direct writes of parts of blocks read those blocks first; see plan.write_padded.
        held = self.write_ranges.acquire(min(moves.offsets.view), end, exclusive=False)
        try:
            if end <= self.size:
                self._move(moves, writing=True)
            else:
                with self._size_lock:
                    self._move(moves, writing=True)
                    self.size = max([self.size, *(end for end, result in zip(ends, moves.results.view) if not result)])
        finally:
            self._written = True
            self.write_ranges.release(held)

    def _move(self, moves: Moves, *, writing: bool) -> None:
        from blocklib.protocols.engines import move

        move(self.aio, self._fd, moves, writing=writing, alignment=self.request_alignment, waits=self.direct)

    # -- zeroes and holes ---------------------------------------------------------------------------------------------

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zero, without writing bytes where the file system can; past the end the file grows."""
        self._check_writable()
        held = self.write_ranges.acquire(offset, offset + length, exclusive=False)
        try:
            inside = min(offset + length, self._grow_to(offset + length)) - offset
            if inside > 0 and not self._zero_by_metadata(offset, inside, unmap=unmap):
                self._write_zero_bytes(offset, inside)
        except OSError as exc:
            raise self._failure(exc, "zeroing") from exc
        finally:
            self._written = True
            self.write_ranges.release(held)

    def discard_range(self, offset: int, length: int) -> None:
        """Give the space of the range back where that is possible; it reads as zero or as before."""
        self._check_writable()
        held = self.write_ranges.acquire(offset, offset + length, exclusive=False)
        try:
            inside = min(offset + length, self.size) - offset
            if inside > 0 and self._can_punch:
                try:
                    if self.is_device:
                        host.discard_blocks(self._fd, offset, inside)
                    else:
                        host.fallocate(self._fd, host.PUNCH_HOLE | host.KEEP_SIZE, offset, inside)
                except OSError as exc:
                    if exc.errno not in host.UNSUPPORTED:
                        raise
                    self._can_punch = False
        except OSError as exc:
            raise self._failure(exc, "discard") from exc
        finally:
            self._written = True
            self.write_ranges.release(held)

    def _grow_to(self, end: int) -> int:
        """Make the file at least `end` bytes long and return how long it was."""
        if end <= self.size:
            return self.size
        with self._size_lock:
            before = self.size if self.is_device else max(self.size, os.fstat(self._fd).st_size)
            if end > before:
                if self.is_device:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.ftruncate(self._fd, end)
            self.size = max(before, end)
            return before

    def _zero_by_metadata(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Zero a range inside the file by fallocate; False where nothing of the kind works."""
        if unmap and self._can_punch:
            try:
                host.fallocate(self._fd, host.PUNCH_HOLE | host.KEEP_SIZE, offset, length)
                return True
            except OSError as exc:
                if exc.errno not in host.UNSUPPORTED:
                    raise
                # A device may discard all the same: it only cannot promise that zeroes are read afterwards.
                self._can_punch = self.is_device
        if self._can_zero:
            try:
                host.fallocate(self._fd, host.ZERO_RANGE | host.KEEP_SIZE, offset, length)
                return True
            except OSError as exc:
                if exc.errno not in host.UNSUPPORTED:
                    raise
                self._can_zero = False
        return False

    def _write_zero_bytes(self, offset: int, length: int) -> None:
        """Write zeroes from an aligned `offset`; the end need be aligned only where it is not the end of the file."""
        end = offset + length
        padded = -(-end // self.request_alignment) * self.request_alignment
        buffer = aligned_pool.take()
        try:
            zero_fill(buffer)
            if padded <= self.size:
                self._fill(buffer, offset, padded)
            else:
                with self._size_lock:
                    self._fill(buffer, offset, padded)
                    os.ftruncate(self._fd, self.size)  # the padding is not part of the file
        finally:
            aligned_pool.give(buffer)

    def _fill(self, buffer: memoryview, start: int, end: int) -> None:
        while start < end:
            part = buffer[: min(PIECE, end - start)]
            self._write(start, (part,), len(part))
            start += len(part)

    def resolve(self, offset: int, length: int) -> Run:
        """Data or hole, as the file system says (SEEK_DATA, SEEK_HOLE); past the end all is zero."""
        size = self.size
        if offset >= size:
            return KIND_ZERO, None, offset, length, FLAG_ZERO | FLAG_ALLOCATED | FLAG_EOF
        is_data, end = self._find_run(offset, size)
        end = min(end, offset + length, size)
        flags = FLAG_ALLOCATED | FLAG_OFFSET_VALID | (FLAG_DATA if is_data else FLAG_ZERO)
        if end == size:
            flags |= FLAG_EOF
        return KIND_DATA if is_data else KIND_ZERO, None, offset, end - offset, flags

    def _find_run(self, offset: int, size: int) -> tuple[bool, int]:
        """(whether there is data at `offset`, where that ends)."""
        if not self._can_seek_holes:
            return True, size
        assert _SEEK_DATA is not None
        assert _SEEK_HOLE is not None
        try:
            start = os.lseek(self._fd, offset, _SEEK_DATA)
            if start > offset:
                return False, start
            return True, max(os.lseek(self._fd, offset, _SEEK_HOLE), offset + 1)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # no data from here on
                return False, size
            if exc.errno == errno.EINVAL or exc.errno in host.UNSUPPORTED:
                self._can_seek_holes = False
                return True, size
            raise self._failure(exc, "lseek") from exc

    def plain_descriptor(self) -> int | None:
        return self._fd if self.read_only and not self.direct and self._fd >= 0 else None

    def take_hints(self, *, in_place: bool, extent_size: int) -> None:
        if in_place:
            with suppress(OSError):
                host.write_in_place(self._fd)
        if extent_size:
            with suppress(OSError):
                host.set_extent_size(self._fd, extent_size)

    # -- size and durability ------------------------------------------------------------------------------------------

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        """Change the length of the file; when growing fails it is as before.

        `preallocation` "falloc" reserves the new space, "full" writes zeroes into it.  A device keeps its size: less is
        accepted, because what is stored in it may become smaller.  Raises StorageError, UsageError.
        """
        self._check_writable()
        if preallocation not in ("off", "falloc", "full"):
            choices = ("off", "falloc", "full")
            raise self._bad_option("preallocation", f"preallocation {preallocation!r} is not for files", choices)
        if self.is_device:
            if size > self.size:
                text = f"a device of {self.size} bytes cannot grow to {size}"
                raise self._error(text, errno.ENOSPC, "truncate")
            return
        try:
            with self._size_lock:
                self._change_length(os.fstat(self._fd).st_size, size, preallocation)
                self.size = size
        except OSError as exc:
            raise self._failure(exc, "truncate") from exc
        finally:
            self._written = True

    def _change_length(self, before: int, size: int, preallocation: Preallocation) -> None:
        if size < before and preallocation != "off":
            raise UsageError(f"{self.path}: preallocation is only for growing", node=self.name)
        try:
            if preallocation == "falloc" and size > before:
                if not hasattr(os, "posix_fallocate"):
                    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
                os.posix_fallocate(self._fd, before, size - before)
            else:
                os.ftruncate(self._fd, size)
            if preallocation == "full" and size > before:
                alignment = self.request_alignment
                buffer = aligned_pool.take()
                try:
                    zero_fill(buffer)
                    self._fill(buffer, -(-before // alignment) * alignment, -(-size // alignment) * alignment)
                finally:
                    aligned_pool.give(buffer)
                os.ftruncate(self._fd, size)
        except BaseException:
            if size > before:
                os.ftruncate(self._fd, before)
            raise

    def flush(self) -> None:
        """Make every completed write durable.

        Raises StorageError; once it has, every later flush does too, because the kernel tells of lost writes only once.
        """
        if self._fd < 0:
            raise self._closed_error()
        if self.no_flush or self.read_only:
            return
        with self._flush_lock:
            if self._flush_error is not None:
                text = "an earlier flush failed and writes may be lost; close and reopen the image"
                raise self._error(text, self._flush_error.errno, "fdatasync") from self._flush_error
            self._written = False
            try:
                getattr(os, "fdatasync", os.fsync)(self._fd)
            except BaseException as exc:
                self._written = True
                if not isinstance(exc, OSError):
                    raise
                failure = self._failure(exc, "fdatasync")
                if isinstance(failure, StorageError):
                    self._flush_error = failure
                raise failure from exc

    def allocated_size(self) -> int | None:
        """Bytes of storage that the file occupies; None on systems that do not tell."""
        try:
            blocks: int | None = getattr(os.fstat(self._fd), "st_blocks", None)
        except OSError as exc:
            raise self._failure(exc, "fstat") from exc
        return blocks * 512 if blocks is not None else None


class HostDeviceNode(FileNode):
    """A block device and nothing else."""

    driver = "host_device"
    _accepts = frozenset({stat.S_IFBLK})
    _accepted = "a block device"


def _after(views: list[memoryview], n: int) -> list[memoryview]:
    """What is left of `views` after their first `n` bytes."""
    for index, view in enumerate(views):
        if n < len(view):
            return [view[n:], *views[index + 1 :]]
        n -= len(view)
    return []
