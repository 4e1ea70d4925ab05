"""An open file or block device: what it is, how it is locked, how it is opened anew in the other mode.

In the room of protocols; `file` moves its bytes.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias

from blocklib.errors import (
    BlocklibError,
    ClosedError,
    ImageNotFoundError,
    OptionError,
    ReadOnlyError,
    StorageError,
    UsageError,
)
from blocklib.node import Node, PendingChange
from blocklib.protocols import host
from blocklib.protocols.locks import FileLocks, can_lock

Locking: TypeAlias = Literal["auto", "on", "off"]
Aio: TypeAlias = Literal["threads", "native", "io_uring"]
Opener: TypeAlias = Callable[[int], int]

_NOT_WRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""How opening fails where only writing is not permitted: by the file's mode, its attributes, its file system."""
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


class OpenedFile(Node):
    """A regular file, or a block device.

    `direct` bypasses the page cache: requests must then be aligned to `request_alignment`, in memory too.  `no_flush`
    ignores flushes.  `locking` "auto" locks where the host can, "on" insists.  `force_share` takes no locks and needs
    `read_only`.  With `auto_read_only` it becomes `read_only` where writing is not permitted.  `aio` says how many requests
    that are made together are kept on their way: by threads or through an io_uring; "native" is whatever is best here.
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
        self.aio = aio
        self.is_device = False
        self._opener: Opener | None = None
        self._fd = -1
        self._next_fd = -1
        self._locks: FileLocks | None = None
        self._size_lock = threading.Lock()  # held while a call can change the length of the file
        self._flush_lock = threading.Lock()
        self._written = False  # something may not be durable yet
        self._flush_error: StorageError | None = None

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
        if self.aio == "io_uring":
            from blocklib.protocols.engines import check_ring

            check_ring(self.path)

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

    # -- what is raised -----------------------------------------------------------------------------------------------

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
