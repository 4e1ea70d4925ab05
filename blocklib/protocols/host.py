"""Calls of the host that Python has no function for: fallocate with a mode, what direct I/O asks for, device ioctls.

In the room of protocols.  Everything is looked up when it is first called, so that importing works on any system; where
a call does not exist it raises OSError with ENOSYS, like a kernel that is too old.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from typing import Any, Final

from blocklib.buffers import aligned_pool

# Numbers of Linux: linux/falloc.h, linux/fs.h, linux/stat.h.
KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10
_GETFLAGS: Final = 0x80086601 if struct.calcsize("l") == 8 else 0x80046601
_SETFLAGS: Final = 0x40086602 if struct.calcsize("l") == 8 else 0x40046602
_NOCOW_FLAG: Final = 0x00800000
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_FSXATTR: Final = "IIIII8x"
"""struct fsxattr: flags, extent size in bytes, number of extents, project, copy-on-write extent size."""
_EXTSIZE_FLAG: Final = 0x00000800
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_STATX_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000
_STATX_LENGTH: Final = 256
_STATX_MASK: Final = 0
_STATX_DIO_MEMORY_ALIGN: Final = 152

UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY})
"""Error numbers that say the file system or device cannot do it, now or later."""

DEFAULT_DIRECT_ALIGNMENT: Final = 4096
"""What every device we know of accepts."""

IS_64_BIT_LINUX: Final = sys.platform.startswith("linux") and struct.calcsize("P") == 8

_libc: Any = None


def _call(name: str) -> Any:
    """A function of the C library that sets errno.  Raises OSError (ENOSYS) where there is none of that name."""
    global _libc
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _libc is None:
        import ctypes

        _libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(_libc, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return function


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)``; resumed after a signal, since every mode used here may be repeated.  Raises OSError."""
    import ctypes

    try:
        function = _call("fallocate64")  # fallocate takes 32-bit offsets on 32-bit systems
    except OSError:
        function = _call("fallocate")
    while function(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def system_call(number: int, *arguments: int) -> int:
    """A system call by its number, which is that of all 64-bit machines, for what the C library lacks.  Raises OSError."""
    if not IS_64_BIT_LINUX:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    function = _call("syscall")
    function.restype = ctypes.c_long
    result: int = function(*(ctypes.c_long(argument) for argument in (number, *arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """Tell a block device that a range, aligned to its sectors, is no longer needed.  Raises OSError."""
    import fcntl

    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def sector_size(fd: int) -> int | None:
    """The logical sector size of a block device in bytes, or None where it cannot be asked."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    try:
        answer = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
    except OSError:
        return None
    return int.from_bytes(answer, sys.byteorder)


def direct_alignment(fd: int, *, is_device: bool) -> int:
    """What offset, length and memory of direct I/O on this descriptor must be aligned to, in bytes.

    0 where the file takes no direct I/O at all.  Asks the kernel (``STATX_DIOALIGN``, Linux 6.1), else the device, else
    tries reads of growing alignment.
    """
    asked = _statx_alignment(fd)
    if asked is None and is_device:
        asked = sector_size(fd)
    return _tried_alignment(fd) if asked is None else asked


def _statx_alignment(fd: int) -> int | None:
    """The kernel's own answer; None from a kernel, C library or file system that has none."""
    import ctypes

    buffer = ctypes.create_string_buffer(_STATX_LENGTH)
    try:
        failed = _call("statx")(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer)
    except OSError:
        return None
    (mask,) = struct.unpack_from("I", buffer, _STATX_MASK)
    if failed or not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("II", buffer, _STATX_DIO_MEMORY_ALIGN)
    return max(memory, offset) if offset else 0


def _tried_alignment(fd: int) -> int:
    """The smallest length that can be read directly from the start of the file."""
    if os.fstat(fd).st_size == 0:
        return DEFAULT_DIRECT_ALIGNMENT  # where nothing can be read, a read proves nothing
    buffer = aligned_pool.take()
    try:
        for alignment in (512, 1024, 2048):
            try:
                os.preadv(fd, [buffer[:alignment]], 0)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
            else:
                return alignment
    finally:
        aligned_pool.give(buffer)
    return DEFAULT_DIRECT_ALIGNMENT


def write_in_place(fd: int) -> None:
    """Turn off copy-on-write for an empty file (btrfs).  Raises OSError where the file system has no such thing."""
    import fcntl

    (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GETFLAGS, bytes(struct.calcsize("l"))))
    fcntl.ioctl(fd, _SETFLAGS, struct.pack("l", flags | _NOCOW_FLAG))


def set_extent_size(fd: int, length: int) -> None:
    """Let an empty file grow in extents of `length` bytes (XFS).  Raises OSError where the file system has no such thing."""
    import fcntl

    flags, _length, extents, project, cow = struct.unpack(
        _FSXATTR, fcntl.ioctl(fd, _FSGETXATTR, bytes(struct.calcsize(_FSXATTR)))
    )
    fcntl.ioctl(fd, _FSSETXATTR, struct.pack(_FSXATTR, flags | _EXTSIZE_FLAG, length, extents, project, cow))
