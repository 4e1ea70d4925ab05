"""Byte locks that tell other programs how an image file is used: the same bytes as QEMU's, so that we see a VM and it us.

In the room of protocols.  A user of a file read-locks byte 100 + n for each permission n that it uses and byte 200 + n for
each that it lets nobody else use; whoever finds the opposite byte locked by somebody else has a conflict.  The locks are
those of an open file description (OFD): two nodes of one process exclude each other like two processes, and closing
another descriptor of the same file does not drop them as it would drop POSIX locks, which are therefore never used.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterable
from typing import Final

from blocklib.errors import LockedError, StorageError
from blocklib.node import PendingChange

USED_BASE: Final = 100
NOT_SHARED_BASE: Final = 200
PERMISSIONS: Final = ("consistent read", "write", "write unchanged", "resize")
"""What each permission bit is called, bit 0 first."""

_FLOCK: Final = "hhqqi4x"
"""struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks)."""


def lock_bytes(wanted: int, shared: int) -> set[int]:
    """The bytes that a user of the permissions `wanted`, who lets others use `shared`, holds read locks on."""
    bits = range(len(PERMISSIONS))
    used = {USED_BASE + bit for bit in bits if wanted >> bit & 1}
    return used | {NOT_SHARED_BASE + bit for bit in bits if not shared >> bit & 1}


def can_lock(fd: int) -> bool:
    """Whether the system has OFD locks and the file system takes them; asking changes nothing."""
    if sys.platform != "linux":
        return False
    try:
        _is_locked_elsewhere(fd, USED_BASE)
    except OSError:  # an old kernel (EINVAL) or a network file system without locks (ENOLCK, EOPNOTSUPP, ...)
        return False
    return True


class FileLocks:
    """The locks of one node on one file.  `fd` is its descriptor; `held` are the bytes that are locked on it.

    Used by one graph change at a time.
    """

    __slots__ = ("_next_fd", "_owner", "fd", "filename", "held")

    def __init__(self, fd: int, filename: str) -> None:
        self.fd = fd
        self.filename = filename
        self.held: set[int] = set()
        self._next_fd: int | None = None
        self._owner = os.getpid()

    def prepare(self, wanted: int, shared: int) -> PendingChange:
        """Claim what `wanted` and `shared` need beyond what is held; the commit gives back what they no longer need.

        Raises LockedError for a conflict and StorageError where locking fails; then the locks are as before.
        """
        target = lock_bytes(wanted, shared)
        new = sorted(target - self.held)
        taken: list[int] = []
        try:
            for byte in new:  # first lock, then look: of two who want to exclude each other at least one sees the other
                self._lock(self.fd, byte)
                taken.append(byte)
            for byte in new:
                if _is_locked_elsewhere(self.fd, _opposite(byte)):
                    raise self._conflict(byte)
            if self._next_fd is not None:
                for byte in sorted(target | self.held):
                    self._lock(self._next_fd, byte)
        except OSError as exc:
            _unlock(self.fd, taken)
            if isinstance(exc, StorageError):
                raise
            raise StorageError.wrap(exc, "lock", filename=self.filename) from exc
        self.held |= target
        return PendingChange(lambda: self._keep(target), lambda: self._give_back(taken))

    def begin_move(self, fd: int) -> None:
        """A descriptor is to replace ours: from now on `prepare` locks on both."""
        self._next_fd = fd

    def end_move(self) -> None:
        """The other descriptor has replaced ours, which the caller closes.  Raises StorageError, changing nothing."""
        assert self._next_fd is not None
        for byte in sorted(self.held):
            try:
                self._lock(self._next_fd, byte)
            except OSError as exc:
                raise StorageError.wrap(exc, "lock", filename=self.filename) from exc
        _unlock(self.fd, self.held)
        self.fd, self._next_fd = self._next_fd, None

    def cancel_move(self) -> None:
        self._next_fd = None

    def release(self) -> None:
        """Unlock everything, also for copies of the descriptor in forked children; from such a child, nothing.

        A child shares our open file description, so what it unlocked would be unlocked for us.
        """
        if os.getpid() == self._owner:
            _unlock(self.fd, self.held)
        self.held = set()

    def _keep(self, target: set[int]) -> None:
        self._give_back(self.held - target)

    def _give_back(self, unwanted: Iterable[int]) -> None:
        self.held -= _unlock(self.fd, unwanted)

    def _lock(self, fd: int, byte: int) -> None:
        try:
            _set_lock(fd, byte, locked=True)
        except OSError as exc:
            if exc.errno in (errno.EAGAIN, errno.EACCES):  # a write lock: not QEMU's way, but a clear enough word
                raise self._conflict(byte) from exc
            raise

    def _conflict(self, byte: int) -> LockedError:
        permission = PERMISSIONS[byte % 100]
        pid = find_holder(self.fd, _opposite(byte))
        if pid is None:
            holder = "another process"
        elif pid == os.getpid():
            holder = "another node of this process"
        else:
            holder = f"another process (pid {pid})"
        if byte < NOT_SHARED_BASE:
            text = f"{permission} access is wanted and {holder} does not share it"
        else:
            text = f"{holder} has {permission} access, which must not be shared here"
        return LockedError(
            f"{self.filename} is locked: {text}",
            filename=self.filename,
            permission=permission,
            pid=pid,
            node=self.filename,
        )


def _opposite(byte: int) -> int:
    """The byte that somebody in conflict with `byte` has locked."""
    return byte + 100 if byte < NOT_SHARED_BASE else byte - 100


def _unlock(fd: int, bytes_: Iterable[int]) -> set[int]:
    """Unlock, and return what was unlocked: the kernel may lack memory to split a range, and that is no reason to fail."""
    unlocked = set()
    for byte in bytes_:
        try:
            _set_lock(fd, byte, locked=False)
        except OSError:
            continue
        unlocked.add(byte)
    return unlocked


def _set_lock(fd: int, byte: int, *, locked: bool) -> None:
    """Read-lock or unlock one byte, without waiting."""
    if sys.platform == "linux":
        import fcntl

        kind = fcntl.F_RDLCK if locked else fcntl.F_UNLCK
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))


def _is_locked_elsewhere(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock, of any kind, on the byte."""
    if sys.platform != "linux":
        return False
    import fcntl

    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK


# -- who holds it ----------------------------------------------------------------------------------------------------------


def find_holder(fd: int, byte: int) -> int | None:
    """The pid of a process that has a byte of our file locked through another descriptor than `fd`; a best effort.

    Locks of open file descriptions have no owner to ask for, so this looks through the processes that we may look into.
    None where there is no ``/proc``, nothing is found, or the holder is another user's.
    """
    try:
        ours = os.fstat(fd)
        processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return None
    own_pid = os.getpid()
    # Our own process first: what another node of it holds, its forked children seem to hold as well.
    for name in sorted(processes, key=lambda name: int(name) != own_pid):
        pid = int(name)
        for other in _descriptors_of(pid, ours.st_dev, ours.st_ino):
            if (pid != own_pid or other != fd) and _has_locked(pid, other, byte):
                return pid
    return None


def _descriptors_of(pid: int, device: int, inode: int) -> list[int]:
    """The descriptors that a process has of one file."""
    found: list[int] = []
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # it has ended, or belongs to somebody else
        return found
    for number in numbers:
        try:
            status = os.stat(f"/proc/{pid}/fd/{number}")
        except OSError:  # closed since
            continue
        if (status.st_dev, status.st_ino) == (device, inode):
            found.append(int(number))
    return found


def _has_locked(pid: int, fd: int, byte: int) -> bool:
    """Whether a lock on the byte is listed: ``lock: 1: OFDLCK ADVISORY READ -1 fe:00:2156369 100 101``."""
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    for line in lines:
        words = line.split()
        if words[:1] == ["lock:"] and len(words) >= 8 and words[2] == "OFDLCK":
            first, last = words[-2:]
            if int(first) <= byte and (last == "EOF" or byte <= int(last)):
                return True
    return False
