"""Regular files and block devices: the drivers "file" and "host_device", in the room of protocols.

Short transfers are resumed; a signal in the middle of a call is Python's to resume (PEP 475).  Zeroes and discards go
through fallocate where the file system has it.  A file is never mapped: truncation under a map is a signal, not an error.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias

from blocklib.buffers import PIECE, aligned_pool, pieces_of, zero_fill
from blocklib.errors import (
    BlocklibError,
    ClosedError,
    ImageNotFoundError,
    OptionError,
    ReadOnlyError,
    StorageError,
    UsageError,
)
from blocklib.extents import FLAG_ALLOCATED, FLAG_DATA, FLAG_EOF, FLAG_OFFSET_VALID, FLAG_ZERO, KIND_DATA, KIND_ZERO, Run
from blocklib.node import Node, PendingChange, Preallocation
from blocklib.protocols import host
from blocklib.protocols.locks import FileLocks, can_lock

Locking: TypeAlias = Literal["auto", "on", "off"]
Aio: TypeAlias = Literal["threads", "native", "io_uring"]
Opener: TypeAlias = Callable[[int], int]

_IOV_MAX: Final = 1024
"""Buffers that one system call takes (Linux and macOS)."""
_SEEK_DATA: Final = getattr(os, "SEEK_DATA", None)
_SEEK_HOLE: Final = getattr(os, "SEEK_HOLE", None)
_NOT_WRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""How opening fails where only writing is not permitted: by the file's mode, its attributes, its file system."""
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


class FileNode(Node):
    """A regular file, or a block device.

    `direct` bypasses the page cache: requests must then be aligned to `request_alignment`, in memory too.  `no_flush`
    ignores flushes.  `locking` "auto" locks where the host can, "on" insists.  `force_share` takes no locks and needs
    `read_only`.  With `auto_read_only` it becomes `read_only` where writing is not permitted.  `aio` is accepted and
    changes nothing: a request runs in the thread that makes it.
    """

    driver = "file"
    is_leaf = True
    _accepts: ClassVar[frozenset[int]] = frozenset({stat.S_IFREG, stat.S_IFBLK})
    _accepted: ClassVar[str] = "a regular file or a block device"

    def __init__(
        self,
        name: str | None,
        filename: str,
        *,
        read_only: bool,
        direct: bool = False,
        no_flush: bool = False,
        discard_passes: bool = False,
        force_share: bool = False,
        auto_read_only: bool = False,
        locking: Locking = "auto",
        aio: Aio = "threads",
    ) -> None:
        super().__init__(name, filename, read_only=read_only)
        self.path = filename
        if force_share and not read_only:
            raise self._bad_option("force-share", "force-share is only for read-only images")
        if aio == "native" and not direct:
            raise self._bad_option("aio", "aio=native needs cache.direct=on")
        self.direct = direct
        self.no_flush = no_flush
        self.discard_passes = discard_passes
        self.force_share = force_share
        self.auto_read_only = auto_read_only
        self.locking = locking
        self.is_device = False
        self._opener: Opener | None = None
        self._fd = -1
        self._next_fd = -1
        self._locks: FileLocks | None = None
        self._size_lock = threading.Lock()  # held while a call can change the length of the file
        self._flush_lock = threading.Lock()
        self._written = False  # something may not be durable yet
        self._flush_error: StorageError | None = None
        self._can_punch = True
        self._can_zero = True
        self._can_seek_holes = _SEEK_DATA is not None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """A node from options in QEMU's names; those that are missing have their defaults."""
        return cls(
            options.get("node-name"),
            options["filename"],
            read_only=read_only,
            direct=bool(options.get("cache.direct")),
            no_flush=bool(options.get("cache.no-flush")),
            discard_passes=options.get("discard") == "unmap",
            force_share=bool(options.get("force-share")),
            auto_read_only=bool(options.get("auto-read-only")),
            locking=options.get("locking") or "auto",
            aio=options.get("aio") or "threads",
            **extra,
        )

    def use_opener(self, opener: Opener) -> None:
        """Open the file by `opener(flags)`, which gives a descriptor, and not by its name: a policy checks what it opens."""
        self._opener = opener

    # -- opening and closing ------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Open the file and find out its size, its alignment and whether it can be locked.

        Raises ImageNotFoundError, StorageError (also for what is no file or device), UsageError for an impossible name.
        """
        try:
            fd = self._open()
        except StorageError as exc:
            if self.read_only or not self.auto_read_only or exc.errno not in _NOT_WRITABLE:
                raise
            self.read_only = True
            fd = self._open()
        try:
            self._examine(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _open(self) -> int:
        flags = self._flags(self.read_only)
        try:
            if self._opener is not None:
                return self._opener(flags)
            # Looked at first, because opening a pipe waits and opening a device may do something.
            self._check_kind(os.stat(self.path))
            return os.open(self.path, flags)
        except FileNotFoundError as exc:
            if isinstance(exc, BlocklibError):
                raise
            raise ImageNotFoundError.wrap(exc, "open", filename=self.path) from exc
        except OSError as exc:
            if isinstance(exc, BlocklibError):
                raise
            if exc.errno == errno.EINVAL and self.direct:
                raise self._no_direct() from exc
            raise StorageError.wrap(exc, "open", filename=self.path) from exc
        except ValueError as exc:  # a NUL byte, or text that has no bytes
            raise UsageError(f"{self.path!r} cannot be the name of a file: {exc}", node=self.name) from exc

    def _flags(self, read_only: bool) -> int:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        if self.direct:
            o_direct = getattr(os, "O_DIRECT", None)
            if o_direct is None:
                raise self._no_direct()
            flags |= o_direct
        return flags

    def _no_direct(self) -> StorageError:
        text = "cache.direct=on is not possible here: the file system has no direct I/O (O_DIRECT)"
        return self._error(text, errno.EINVAL, "open")

    def _check_kind(self, status: os.stat_result) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind not in self._accepts:
            found = _KINDS.get(kind, "a block device" if kind == stat.S_IFBLK else "a regular file")
            number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
            raise self._error(f"{found}, where the driver {self.driver!r} needs {self._accepted}", number, "open")

    def _examine(self, fd: int) -> None:
        try:
            status = os.fstat(fd)
            self._check_kind(status)
            self.is_device = stat.S_ISBLK(status.st_mode)
            self.size = os.lseek(fd, 0, os.SEEK_END) if self.is_device else status.st_size
            sector = host.sector_size(fd) if self.is_device else None
            if self.direct:
                self.request_alignment = host.direct_alignment(fd, is_device=self.is_device)
                if self.request_alignment == 0:
                    raise self._no_direct()
        except OSError as exc:
            if isinstance(exc, StorageError):
                raise
            raise StorageError.wrap(exc, "open", filename=self.path) from exc
        self.zero_alignment = max(self.request_alignment, sector or 1)
        self._locks = FileLocks(fd, self.path) if self._wants_locks(fd) else None

    def _wants_locks(self, fd: int) -> bool:
        if self.locking == "off" or self.force_share:
            return False
        if can_lock(fd):
            return True
        if self.locking == "on":
            text = "locking=on is not possible here: the system or file system has no open-file locks"
            raise self._error(text, errno.ENOLCK, "lock")
        return False

    def close(self) -> None:
        """Make what was written durable and let go of the file.  Raises StorageError; the file is closed all the same."""
        try:
            if self._written and self._fd >= 0:
                self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._locks is not None:
            self._locks.release()
            self._locks = None
        os.close(fd)

    # -- changes in two steps -----------------------------------------------------------------------------------------

    def prepare_permissions(self, wanted: int, shared: int) -> PendingChange | None:
        """Lock what `wanted` and `shared` say.  Raises LockedError, and StorageError where locking fails."""
        return self._locks.prepare(wanted, shared) if self._locks is not None else None

    def prepare_reopen(self, *, read_only: bool) -> PendingChange:
        """Open the same file a second time, in the other mode; the commit swaps the descriptors."""
        if read_only == self.read_only:
            return PendingChange(lambda: None, lambda: None)
        if self.force_share:
            raise self._bad_option("force-share", "force-share is only for read-only images")
        if read_only and self._written:
            self.flush()
        self._next_fd = self._open_again(read_only)
        if self._locks is not None:
            self._locks.begin_move(self._next_fd)
        return PendingChange(lambda: self._commit_reopen(read_only), self._abort_reopen)

    def _open_again(self, read_only: bool) -> int:
        """Another descriptor of the very file that is open, whatever its name means by now."""
        flags = self._flags(read_only)
        fd = -1
        try:
            ours = os.fstat(self._fd)
            link = f"/proc/self/fd/{self._fd}"
            if os.path.exists(link):
                fd = os.open(link, flags)
            else:
                fd = self._opener(flags) if self._opener is not None else os.open(self.path, flags)
            if not os.path.samestat(ours, os.fstat(fd)):
                text = "another file has taken its name and it cannot be reopened"
                raise self._error(text, errno.ESTALE, "reopen")
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            if isinstance(exc, StorageError):
                raise
            raise StorageError.wrap(exc, "reopen", filename=self.path) from exc
        return fd

    def _commit_reopen(self, read_only: bool) -> None:
        if self._locks is not None:
            self._locks.end_move()
        old, self._fd, self._next_fd = self._fd, self._next_fd, -1
        self.read_only = read_only
        os.close(old)

    def _abort_reopen(self) -> None:
        if self._locks is not None:
            self._locks.cancel_move()
        fd, self._next_fd = self._next_fd, -1
        os.close(fd)

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

    def _failure(self, exc: OSError, operation: str) -> BlocklibError:
        """What to raise for a call on our descriptor that failed."""
        if isinstance(exc, BlocklibError):
            return exc
        if self._fd < 0:
            return self._closed_error()
        if exc.errno == errno.EBADF and self.read_only:
            return self._read_only_error()
        return StorageError.wrap(exc, operation, filename=self.path)

    def _error(self, text: str, number: int | None, operation: str) -> StorageError:
        return StorageError(f"{self.path}: {text}", errno=number, operation=operation, filename=self.path, node=self.filename)

    def _bad_option(self, option: str, text: str, choices: Sequence[str] = ()) -> OptionError:
        return OptionError(f"{self.path}: {text}", option=option, driver=self.driver, choices=choices, node=self.filename)

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self.path} is closed", node=self.name)

    def _read_only_error(self) -> ReadOnlyError:
        return ReadOnlyError(f"{self.path} is open for reading only", node=self.name)

    def _check_writable(self) -> None:
        if self.read_only:
            raise self._read_only_error()

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
