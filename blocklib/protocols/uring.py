"""io_uring: rings through which many transfers are on their way at once, by plain system calls.

In the room of protocols.  Source: io_uring(7), io_uring_setup(2), linux/io_uring.h.  What goes through a ring is a matter of
`blocklib._fast.transfers`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

from blocklib._fast.transfers import Moves, RingMemory, move_through_ring
from blocklib.protocols import host

DEPTH: Final = 64
"""Transfers that one ring has on their way."""

_SETUP: Final = 425
_PARAMETERS: Final = struct.Struct("7I12x7I4xQ7I4xQ")
"""struct io_uring_params: what is asked for, what the kernel can do, and the places of the parts of the two queues."""
_FEATURES: Final = 1 << 0 | 1 << 1 | 1 << 3
"""One map for both queues, a full one loses nothing, and (by RW_CUR_POS, which came with them) plain reads and writes."""
_SUBMISSIONS_AT: Final = 0x10000000
_SUBMISSION: Final = 64
_COMPLETION: Final = 16


class Ring:
    """One ring, for one thread at a time.  Raises OSError where the kernel has none for us."""

    __slots__ = ("_fd", "memory")

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(_PARAMETERS.size)  # all zero: no flags, which measured no better
        self._fd = host.system_call(_SETUP, DEPTH, ctypes.addressof(parameters))
        try:
            self.memory = self._map(parameters)
        except BaseException:
            self.close()
            raise

    def _map(self, parameters: ctypes.Array[ctypes.c_char]) -> RingMemory:
        entries, completions, _flags, _cpu, _idle, features, _workers, *places = _PARAMETERS.unpack(parameters)
        if features & _FEATURES != _FEATURES:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        _head, sq_tail, sq_mask, _entries, _flags, _dropped, numbers = places[:7]
        cq_head, cq_tail, cq_mask, _entries, _overflow, cqes, _flags = places[8:15]
        length = max(numbers + 4 * entries, cqes + _COMPLETION * completions)
        queues = mmap.mmap(self._fd, length, mmap.MAP_SHARED)
        words = memoryview(queues).cast("I")
        submissions = mmap.mmap(self._fd, _SUBMISSION * entries, mmap.MAP_SHARED, offset=_SUBMISSIONS_AT)
        for index in range(entries):  # each place of the queue keeps its submission
            words[numbers // 4 + index] = index
        layout = (
            *(self._fd, sq_tail // 4, words[sq_mask // 4], cq_head // 4, cq_tail // 4, words[cq_mask // 4], cqes // 4),
            min(entries, DEPTH),
        )
        return RingMemory(layout, queues, submissions)

    def move(self, fd: int, moves: Moves, *, writing: bool, alignment: int) -> bool:
        """Make all transfers; False where some may be left over: see `move_through_ring`."""
        return move_through_ring(self.memory, fd, moves, writing=writing, alignment=alignment)

    def close(self) -> None:
        """Give the ring back to the kernel; nothing is on its way."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
