"""Many transfers between a file and memory, without the interpreter's lock: one after the other, or through an io_uring.

A transfer is (offset in the file, address, length); its result is 0 or an error number.  Short transfers are resumed, a signal
is no error, and what lies past the end of the file reads as zero.  Memory must stay where it is until the call returns; when
it has returned, no transfer is on its way any more.

The ring is used as io_uring(7) describes it; the kernel looks at submissions during `io_uring_enter` and at no other time.
"""

from __future__ import annotations

import ctypes
import errno
from array import array
from typing import TYPE_CHECKING, Any, Final

from blocklib._fast.compiler import External
from blocklib._fast.kernel import Family
from blocklib._fast.pointer import Pointer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

family = Family(__name__)

LAYOUT: Final = ("ring fd", "sq tail", "sq mask", "cq head", "cq tail", "cq mask", "cqes", "depth")
"""What the layout of a ring says, in this order; places in its queues are counted in integers of 32 bits."""

_GO_ON: Final = -1
"""The result of a transfer of which a part was made."""
_EINTR: Final = errno.EINTR
_EAGAIN: Final = errno.EAGAIN
_EINVAL: Final = errno.EINVAL
_ENOSPC: Final = errno.ENOSPC
# Of linux/io_uring.h.
_IO_URING_ENTER: Final = 426
_GETEVENTS: Final = 1
_OP_READ: Final = 22
_OP_WRITE: Final = 23
_SQE_WORDS: Final = 8
"""Integers of 64 bits in a submission."""
_CQE_WORDS: Final = 4
"""Integers of 32 bits in a completion."""
_LOW: Final = 0xFFFFFFFF
_HALF: Final = 1 << 31
_LONGEST: Final = 1 << 30
"""Bytes of one submission, which says its length in 32 bits."""
_WAIT_FOR: Final = 8
"""Completions that are waited for while there is more to do: a system call for each would cost more than the transfer."""
_SLOT_LISTS: Final = 4
_MUTEX_WORDS: Final = 8
"""Integers of 64 bits that are enough for a mutex of the C library; all zero is one that is free."""
_BUDGET: Final = 1 << 26
_MOST: Final = 4096
"""Bytes and transfers that one call of a kernel begins: signals wait until it returns."""
# What a kernel saves a transfer against itself as plain Python, in nanoseconds.
_SAVED_BY_LOOP: Final = 3000
_SAVED_BY_RING: Final = 4000


class Moves:
    """Transfers as four buffers of 64-bit integers, as long as each other: offsets, addresses, lengths, and their results."""

    __slots__ = ("addresses", "count", "lengths", "offsets", "results")

    def __init__(self, offsets: Buffer | Any, addresses: Buffer | Any, lengths: Buffer | Any, results: Buffer | Any) -> None:
        self.offsets = Pointer(offsets, "q")
        self.addresses = Pointer(addresses, "q")
        self.lengths = Pointer(lengths, "q")
        self.results = Pointer(results, "q", writable=True)
        self.count = self.offsets.length
        if {self.addresses.length, self.lengths.length, self.results.length} != {self.count}:
            raise ValueError("a different number of offsets, addresses, lengths and results")

    def pointers(self) -> tuple[Pointer, ...]:
        return self.offsets, self.addresses, self.lengths, self.results

    def views(self) -> tuple[memoryview, ...]:
        return self.offsets.view, self.addresses.view, self.lengths.view, self.results.view


class RingMemory:
    """What a kernel needs of a ring: the numbers of LAYOUT, and the memory of its two queues and of the submissions."""

    __slots__ = ("_mutex", "layout", "queues", "slots", "submissions")

    def __init__(self, layout: Sequence[int], queues: Buffer | Any, submissions: Buffer | Any) -> None:
        depth = layout[LAYOUT.index("depth")]
        self._mutex = Pointer(array("q", bytes(8 * _MUTEX_WORDS)), "q")
        self.layout = Pointer(array("q", (*layout, self._mutex.address)), "q")
        self.queues = Pointer(queues, "i", writable=True)
        self.submissions = Pointer(submissions, "q", writable=True)
        self.slots = Pointer(array("q", bytes(8 * _SLOT_LISTS * depth)), "q", writable=True)

    def pointers(self) -> tuple[Pointer, ...]:
        return self.layout, self.queues, self.submissions, self.slots

    def views(self) -> tuple[memoryview, ...]:
        return self.layout.view, self.queues.view, self.submissions.view, self.slots.view


def move_one_by_one(fd: int, moves: Moves, *, writing: bool, alignment: int, first: int = 0, step: int = 1) -> None:
    """Make every `step`-th transfer from `first` on, one after the other."""
    kernel = _one_by_one.worth(len(range(first, moves.count, step)) * _SAVED_BY_LOOP)
    while first < moves.count:
        if kernel is not None:
            first = kernel(fd, writing, alignment, first, step, moves.count, *moves.pointers())
        else:
            first = _one_by_one.function(fd, writing, alignment, first, step, moves.count, *moves.views())


def move_through_ring(memory: RingMemory, fd: int, moves: Moves, *, writing: bool, alignment: int) -> bool:
    """Make all transfers, many at a time; the ring is used by no other thread meanwhile.

    False where the kernel refused to go on, or where so few do not pay for compiled code: make them in another way.  Only
    compiled code may do this, since no exception may leave it while transfers are on their way.
    """
    kernel = _through_ring.worth(moves.count * _SAVED_BY_RING)
    if kernel is None:
        return False
    first = 0
    while 0 <= first < moves.count:
        first = kernel(fd, writing, alignment, first, moves.count, *memory.pointers(), *moves.pointers())
    return first >= 0


# -- the C library ----------------------------------------------------------------------------------------------------

_libc: Any = None


def _call(name: str) -> Any:
    """A function of the C library in plain Python: integers and addresses in, an integer out."""

    def stand_in(*arguments: int) -> int:
        global _libc
        if _libc is None:
            _libc = ctypes.CDLL(None, use_errno=True)
        function = _libc[name]
        function.restype = ctypes.c_int64
        result: int = function(*map(ctypes.c_int64, arguments))
        return result

    return stand_in


_pread = External("pread", "i64", ("i64", "i64", "i64", "i64"), _call("pread"))
_pwrite = External("pwrite", "i64", ("i64", "i64", "i64", "i64"), _call("pwrite"))
_syscall = External("syscall", "i64", ("i64", "i64", "i64", "i64", "i64", "i64", "i64"), _call("syscall"))
_memset = External("memset", "i64", ("i64", "i64", "i64"), _call("memset"))
_errno = External("__errno_location", "i32*", (), lambda: (ctypes.get_errno(),))
_lock = External("pthread_mutex_lock", "i32", ("i64",), lambda _mutex: 0)
_unlock = External("pthread_mutex_unlock", "i32", ("i64",), lambda _mutex: 0)


# -- kernels ----------------------------------------------------------------------------------------------------------


@family.helper
def _move(fd: int, writing: int, alignment: int, offset: int, address: int, length: int) -> int:
    if offset < 0 or length < 0:
        return _EINVAL
    done = 0
    while done < length:
        if writing:
            n = _pwrite(fd, address + done, length - done, offset + done)
        elif (offset + done) % alignment:
            n = 0  # the end of the file cut the last direct transfer short
        else:
            n = _pread(fd, address + done, length - done, offset + done)
        if n < 0:
            number: int = _errno()[0]
            if number != _EINTR:
                return number
        elif n == 0:
            if writing:
                return _ENOSPC
            _memset(address + done, 0, length - done)
            return 0
        else:
            done += n
    return 0


@family.kernel("i64(i64, i64, i64, i64, i64, i64, i64*, i64*, i64*, i64*)")
def _one_by_one(
    fd: int,
    writing: int,
    alignment: int,
    first: int,
    step: int,
    stop: int,
    offsets: Any,
    addresses: Any,
    lengths: Any,
    results: Any,
) -> int:
    """Make transfers until they are enough for one call; where to go on."""
    bytes_left = _BUDGET
    left = _MOST
    index = first
    while index < stop and left > 0 and bytes_left > 0:
        results[index] = _move(fd, writing, alignment, offsets[index], addresses[index], lengths[index])
        bytes_left -= lengths[index]
        left -= 1
        index += step
    return index


@family.helper
def _wrapped(number: int) -> int:
    """`number` as a signed integer of 32 bits: heads and tails go round."""
    return ((number + _HALF) & _LOW) - _HALF


@family.helper
def _barrier(mutex: int) -> None:
    """What was read before is read before what is read afterwards, on any processor."""
    for _ in range(2):
        _lock(mutex)
        _unlock(mutex)


@family.helper
def _result(writing: int, alignment: int, offset: int, address: int, left: int, moved: int) -> int:
    """What a completion means for the `left` bytes it was for: an error number, 0 for done, _GO_ON for the rest."""
    if moved == -_EINTR or moved == -_EAGAIN:
        return _GO_ON
    if moved < 0:
        return -moved
    if moved == left:
        return 0
    if moved == 0 and writing:
        return _ENOSPC
    if moved == 0 or (not writing and (offset + moved) % alignment):  # the end of the file
        _memset(address + moved, 0, left - moved)
        return 0
    return _GO_ON


@family.kernel("i64(i64, i64, i64, i64, i64, i64*, i32*, i64*, i64*, i64*, i64*, i64*, i64*)")
def _through_ring(
    fd: int,
    writing: int,
    alignment: int,
    first: int,
    stop: int,
    layout: Any,
    queues: Any,
    submissions: Any,
    slots: Any,
    offsets: Any,
    addresses: Any,
    lengths: Any,
    results: Any,
) -> int:
    """Make transfers until they are enough for one call; where to go on, or a negative error number.

    For each slot, `slots` has the transfer it is used by and how much of that is done; then two lists, of the slots that are
    free and of those whose transfer must go on.
    """
    sq_tail, sq_mask, cq_head, cq_tail, cq_mask, cqes = layout[1], layout[2], layout[3], layout[4], layout[5], layout[6]
    depth = layout[7]
    done_at = depth
    free_at = 2 * depth
    again_at = 3 * depth
    for slot in range(depth):
        slots[free_at + slot] = slot
    free = depth
    again = 0
    queued = 0
    inside = 0
    bytes_left = _BUDGET
    left = _MOST
    operation = _OP_WRITE if writing else _OP_READ
    while True:
        tail = queues[sq_tail]
        while again > 0 or (free > 0 and first < stop and left > 0 and bytes_left > 0):
            if again > 0:
                again -= 1
                slot = slots[again_at + again]
            else:
                if offsets[first] < 0 or lengths[first] < 0:
                    results[first] = _EINVAL
                    first += 1
                    continue
                free -= 1
                slot = slots[free_at + free]
                slots[slot] = first
                slots[done_at + slot] = 0
                bytes_left -= lengths[first]
                left -= 1
                first += 1
            index = slots[slot]
            done = slots[done_at + slot]
            at = (tail & sq_mask) * _SQE_WORDS
            submissions[at] = operation | fd << 32
            submissions[at + 1] = offsets[index] + done
            submissions[at + 2] = addresses[index] + done
            submissions[at + 3] = lengths[index] - done if lengths[index] - done < _LONGEST else _LONGEST
            submissions[at + 4] = slot
            for word in range(5, _SQE_WORDS):
                submissions[at + word] = 0
            tail += 1
            queued += 1
        queues[sq_tail] = _wrapped(tail)
        if queued + inside == 0:
            return first
        wait_for = queued + inside if queued + inside < _WAIT_FOR else _WAIT_FOR
        entered = _syscall(_IO_URING_ENTER, layout[0], queued, wait_for, _GETEVENTS, 0, 0)
        if entered >= 0:
            queued -= entered
            inside += entered
        else:
            number: int = _errno()[0]
            if number != _EINTR:
                if inside == 0:
                    queues[sq_tail] = _wrapped(tail - queued)
                    return -number
                _syscall(_IO_URING_ENTER, layout[0], 0, 1, _GETEVENTS, 0, 0)  # no room: until something has ended
        head = queues[cq_head]
        ready = (queues[cq_tail] - head) & _LOW
        _barrier(layout[8])
        for completion in range(ready):
            at = cqes + ((head + completion) & cq_mask) * _CQE_WORDS
            slot = queues[at]
            moved = queues[at + 2]
            index = slots[slot]
            done = slots[done_at + slot]
            result = _result(
                writing,
                alignment,
                offsets[index] + done,
                addresses[index] + done,
                lengths[index] - done,
                moved,
            )
            if result == _GO_ON:
                slots[done_at + slot] = done + moved if moved > 0 else done
                slots[again_at + again] = slot
                again += 1
            else:
                results[index] = result
                slots[free_at + free] = slot
                free += 1
        inside -= ready
        queues[cq_head] = _wrapped(head + ready)
