"""Buffers: zeroes to write, tests for zero, and page-aligned memory for direct I/O."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from blocklib.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

AnyBuffer: TypeAlias = "Buffer | NDArray[Any]"
"""What has bytes to give or to fill; before Python 3.12 type checkers do not know that an array is one."""

PIECE: Final = 1 << 20
"""Bytes of one aligned buffer, and so the largest single direct transfer that needs copying."""

_ZEROES: Final = bytes(PIECE)


def zeroes(length: int) -> memoryview:
    """At most `length` zero bytes, at least one, without allocating: callers loop over what is left."""
    return memoryview(_ZEROES)[:length]


def zero_fill(view: memoryview) -> None:
    """Set every byte of a writable view to zero."""
    length = len(view)
    if length <= PIECE:
        view[:] = _ZEROES if length == PIECE else bytes(length)
        return
    for start in range(0, length, PIECE):
        part = view[start : start + PIECE]
        part[:] = memoryview(_ZEROES)[: len(part)]


def is_zero(view: memoryview) -> bool:
    """Whether every byte is zero.  Looks at three bytes first, since most data is settled by them."""
    length = len(view)
    if length == 0:
        return True
    if view[0] or view[length - 1] or view[length >> 1]:
        return False
    # Comparing memoryviews goes byte by byte; comparing bytes is memcmp, and worth the copy.
    for start in range(0, length, 65536):
        part = bytes(view[start : start + 65536])
        if part != _ZEROES[: len(part)]:
            return False
    return True


def first_difference(view: memoryview, other: memoryview) -> int | None:
    """The first place at which two buffers of the same length differ, or None."""
    if view.tobytes() == other.tobytes():  # the comparison of views goes byte by byte
        return None
    start, stop = 0, len(view)
    while stop - start > 1:
        middle = (start + stop) // 2
        if view[start:middle].tobytes() != other[start:middle].tobytes():
            stop = middle
        else:
            start = middle
    return start


def pieces_of(views: Sequence[memoryview | bytes | bytearray]) -> int:
    """The number of bytes in all of `views`."""
    return sum(len(view) for view in views)


class AlignedPool:
    """Page-aligned buffers of PIECE bytes, reused because making one costs a system call and page faults.

    Without a lock, which a thread could hold for ever in the child of a fork: `pop` and `append` are atomic.
    """

    __slots__ = ("_free",)

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(_anonymous_map())

    def give(self, buffer: memoryview) -> None:
        if len(self._free) < 16:
            self._free.append(buffer)


def _anonymous_map() -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, PIECE)
    # Python's default is shared with the child of a fork, which has the same buffers in its pool.
    return mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


aligned_pool: Final = AlignedPool()


def bytes_view(buffer: AnyBuffer) -> memoryview:
    """The bytes of a contiguous buffer, whatever its items are.  Raises UsageError."""
    view = memoryview(cast("Buffer", buffer))
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.c_contiguous:
        raise UsageError("a buffer must be contiguous")
    if not view.nbytes:
        return memoryview(bytearray())
    try:
        return view.cast("B")
    except ValueError:  # its items have a format that memoryview does not know: numpy's other byte order, records
        if view.readonly:
            return memoryview(view.tobytes())
        import ctypes

        return memoryview((ctypes.c_char * view.nbytes).from_buffer(view)).cast("B")
