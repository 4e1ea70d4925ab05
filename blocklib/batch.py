"""Many requests of one length at once: looked up together, and moved without the interpreter's lock.

Each request is what it would be by itself (`plan`); together they cost a few calls.  What a node cannot do together, and what
failed, is done again one by one, so that what a user gets to see does not depend on the way that was taken.  An error that
does not come again then has been an error all the same: nobody can say which of these requests it was, and all of them have
failed.  Requests of a batch are done in any order.
"""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from blocklib import plan
from blocklib._fast import lookups, placing
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import AT, COUNT, FOUND_BELOW, FOUND_ZEROES, MOVES, PIECE, PIECES, RESULTS, ROUND, TARGET, Work
from blocklib.buffers import zero_fill
from blocklib.errors import BatchError, BlocklibError, OutOfRangeError, PoisonedError, StorageError, UsageError
from blocklib.sizes import MAX_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from blocklib.node import Node

Offsets: TypeAlias = "Sequence[int] | NDArray[Any] | Buffer"
"""Guest offsets, in bytes; an array or buffer of 64-bit integers is used as it is."""

_ROUND_BYTES: Final = 8 << 20
"""Bytes that are looked up together, if the requests are shorter."""
_BOUNCE: Final = 4 << 20
"""Bytes of clusters that are put together in memory: at least one of the largest."""


class Requests:
    """`length` bytes each, at the guest offsets of a buffer, one behind the other in `view`."""

    __slots__ = ("count", "length", "offsets", "pointer", "view")

    def __init__(self, offsets: Pointer, length: int, view: memoryview, *, writing: bool) -> None:
        self.offsets = offsets
        self.count = offsets.length
        self.length = length
        self.view = view
        self.pointer = Pointer(view, "B", writable=not writing)

    def memory(self, number: int) -> memoryview:
        return self.view[number * self.length : (number + 1) * self.length]

    def rounds(self) -> Iterable[range]:
        step = max(1, min(ROUND, _ROUND_BYTES // self.length))
        return (range(first, min(first + step, self.count)) for first in range(0, self.count, step))

    def lay_out(self, work: Work, numbers: range) -> None:
        address = self.pointer.address + numbers.start * self.length
        lookups.lay_out(work, self.offsets, numbers.start, numbers.stop, self.length, address)

    def one_by_one(
        self, numbers: Iterable[int], request: Callable[[int, memoryview], None], failures: dict[int, BlocklibError]
    ) -> None:
        offsets = self.offsets.view
        for number in numbers:
            try:
                request(offsets[number], self.memory(number))
            except BlocklibError as error:
                failures[number] = error


class _Pool:
    """What is large, or costs to be made, is used again.  Without a lock: `pop` and `append` are atomic."""

    def __init__(self) -> None:
        self._works: list[Work] = []
        self._bounces: list[Pointer] = []

    def work(self) -> Work:
        try:
            return self._works.pop()
        except IndexError:
            return Work()

    def bounce(self) -> Pointer:
        try:
            return self._bounces.pop()
        except IndexError:
            return Pointer(mmap.mmap(-1, _BOUNCE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), "B", writable=True)

    def give(self, work: Work) -> None:
        if len(self._works) < 8:
            self._works.append(work)

    def give_bounce(self, bounce: Pointer) -> None:
        if len(self._bounces) < 4:
            self._bounces.append(bounce)


_pool: Final = _Pool()


def expect(requests: int, *, writing: bool) -> None:
    """So many requests will come in batches: what pays for all of them is loaded now, and not after some have gone by."""
    if writing:
        placing.are_ready(requests)
    else:
        lookups.are_ready(requests)


def read(node: Node, requests: Requests) -> dict[int, BlocklibError]:
    """Fill the memory of all requests, which lie inside the node; the failures by the number of the request."""

    def one(offset: int, view: memoryview) -> None:
        plan.read(node, offset, view)

    failures: dict[int, BlocklibError] = {}
    if not lookups.are_ready(requests.count):
        requests.one_by_one(range(requests.count), one, failures)
        return failures
    work = _pool.work()
    for numbers in requests.rounds():
        requests.lay_out(work, numbers)
        errors: list[int] = []
        _read_pieces(node, work, errors)
        rest = [numbers.start + number for number in lookups.rest(work)]
        requests.one_by_one(rest, one, failures)
        _blame(node, "preadv", errors, rest, failures)
    _pool.give(work)
    return failures


def write(node: Node, requests: Requests) -> dict[int, BlocklibError]:
    """Write all requests, which lie inside the node; the failures by the number of the request."""

    def one(offset: int, view: memoryview) -> None:
        plan.write(node, offset, view)

    failures: dict[int, BlocklibError] = {}
    if node.detect_zeroes != "off" or not placing.are_ready(requests.count):
        requests.one_by_one(range(requests.count), one, failures)
        return failures
    if node.bitmaps is None:
        _write_rounds(node, requests, one, failures)
    else:
        with node.bitmaps.all_recorded(requests.offsets.view, requests.length):
            _write_rounds(node, requests, one, failures)
    return failures


def _write_rounds(
    node: Node, requests: Requests, one: Callable[[int, memoryview], None], failures: dict[int, BlocklibError]
) -> None:
    work = _pool.work()
    for numbers in requests.rounds():
        requests.lay_out(work, numbers)
        errors: list[int] = []
        _write_pieces(node, work, errors)
        rest = [numbers.start + number for number in lookups.rest(work)]
        # Not inside a request of ours: who waits for space must not wait for the end of it.
        requests.one_by_one(rest, one, failures)
        _blame(node, "pwritev", errors, rest, failures)
    _pool.give(work)


def _blame(node: Node, operation: str, errors: list[int], numbers: list[int], failures: dict[int, BlocklibError]) -> None:
    """Have the requests failed that were done again after `errors`, error numbers, where none of them failed once more."""
    if errors and failures.keys().isdisjoint(numbers):
        name = node.filename or node.name
        text = f"{name}: {operation} failed: {os.strerror(errors[0])}; it did not fail when it was tried again"
        failure = StorageError(text, errno=errors[0], operation=operation, filename=node.filename, node=name)
        failures.update(dict.fromkeys(numbers, failure))


# -- reading ----------------------------------------------------------------------------------------------------------


def _leaf_below(node: Node) -> Node | None:
    """The leaf that plain data of the node is moved from and to, if that can be done by address."""
    if node.is_leaf:
        leaf = node
    else:
        edge = node.data_edge()
        if edge is None:
            return None
        leaf = edge.node
    return leaf if leaf.is_leaf else None


def _read_pieces(node: Node, work: Work, errors: list[int]) -> None:
    """Read what the pieces stand for, level by level down the chain; what cannot be read so is handed back."""
    words = work.words
    entered = []
    try:
        while True:
            tracker = node.tracker
            if tracker is not None:
                tracker.enter()
                entered.append(tracker)
            leaf = _leaf_below(node)
            if leaf is None or not _find(node, work):
                lookups.hand_back(work)
                return
            if words[MOVES]:
                _transfer(leaf, work, errors, writing=False)
            if words[FOUND_ZEROES]:
                lookups.fill_zeroes(work)
            if not words[FOUND_BELOW]:
                return
            work.begin(words[TARGET], words[FOUND_BELOW])
            backing = node.children.get("backing")
            if backing is None:
                lookups.fill_pieces(work)
                return
            node = backing.node
    finally:
        for tracker in entered:
            tracker.leave()


def _find(node: Node, work: Work) -> bool:
    if node.is_leaf:
        lookups.pass_through(work, 0, MAX_SIZE)  # what is behind its end reads as zero
        return True
    return node.find_batch(work)


def _transfer(leaf: Node, work: Work, errors: list[int], *, writing: bool) -> None:
    """Make the moves; the requests of those that failed are handed back."""
    if not _move(leaf, work, errors, writing=writing):
        lookups.settle(work)


def _move(leaf: Node, work: Work, errors: list[int], *, writing: bool) -> bool:
    """Make the moves; whether none failed.  Error numbers are added to `errors`, but for a full host, which is asked again."""
    if leaf.request_alignment != 1 and not lookups.are_aligned(work, leaf.request_alignment):
        lookups.refuse_moves(work)
        return False
    leaf.transfer(*work.moves(), writing=writing)
    if lookups.all_made(work):
        return True
    errors += (number for number in work.area(RESULTS, work.words[MOVES]) if number not in (0, errno.ENOSPC))
    return False


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_pieces(node: Node, work: Work, errors: list[int]) -> None:
    words = work.words
    tracker = node.tracker
    if tracker is not None:
        tracker.enter()
    try:
        leaf = _leaf_below(node)
        if leaf is None or not _place(node, work):
            lookups.hand_back(work)
            return
        if words[MOVES]:
            _transfer(leaf, work, errors, writing=True)
        if not words[FOUND_BELOW]:
            return
        work.begin(words[TARGET], words[FOUND_BELOW])
        while words[AT] < words[COUNT]:
            try:
                _write_rows(node, leaf, work, errors)
            except BlocklibError as exc:  # whoever does it again meets it again, or it is held against the requests
                if isinstance(exc, StorageError) and exc.errno and exc.errno != errno.ENOSPC:
                    errors.append(exc.errno)
                placing.hand_rows_back(work)
    finally:
        if tracker is not None:
            tracker.leave()


def _place(node: Node, work: Work) -> bool:
    if node.is_leaf:
        lookups.pass_through(work, 0, MAX_SIZE)
        return True
    return node.place_batch(work)


def _write_rows(node: Node, leaf: Node, work: Work, errors: list[int]) -> None:
    """Write some clusters that need more than writing in place."""
    ticket = node.reserve_batch(work, _BOUNCE, leaf.request_alignment)
    try:
        placing.add_own(work)
        if work.words[MOVES]:
            _transfer(leaf, work, errors, writing=True)
        if ticket is None:
            return
        if not _fill(node, leaf, work, errors):
            placing.hand_rows_back(work)
            ticket.abort()
            return
    except BaseException:
        if ticket is not None:
            ticket.abort()
        raise
    ticket.commit()


def _fill(node: Node, leaf: Node, work: Work, errors: list[int]) -> bool:
    """Write the fresh clusters: what requests say, and around it what is there now.  Whether all of them are written."""
    gaps = _pool.work()
    bounce = _pool.bounce()
    placing.find_gaps(work, gaps, bounce.address)
    if gaps.words[COUNT]:
        _read_pieces(node, gaps, errors)
        rest = lookups.rest(gaps)
        if rest:
            placing.find_gaps(work, gaps, bounce.address)  # once more: lookups use the pieces up
            for number in rest:
                offset, address, length, _number = gaps.area(PIECES + PIECE * number, PIECE)
                start = address - bounce.address
                _read_gap(node, offset, bounce.view[start : start + length])
    placing.fill_in(work, bounce.address)
    made = _move(leaf, work, errors, writing=True)
    _pool.give(gaps)
    _pool.give_bounce(bounce)
    return made


def _read_gap(node: Node, offset: int, view: memoryview) -> None:
    inside = max(0, min(len(view), node.size - offset))  # the last cluster may reach past the end of the disk
    plan.read(node, offset, view[:inside])
    zero_fill(view[inside:])


def offsets_of(offsets: Offsets) -> Pointer:
    """Guest offsets as 64-bit integers.  Raises UsageError for what are none."""
    try:
        try:
            return Pointer(offsets, "q")
        except (TypeError, ValueError):
            return Pointer(array("q", [index(offset) for offset in cast("Iterable[int]", offsets)]), "q")
    except TypeError as exc:
        raise UsageError(f"offsets are a sequence or an array of integers: {exc}") from exc
    except OverflowError as exc:
        raise OutOfRangeError("an offset of more than 64 bits") from exc


def error_of(failures: Mapping[int, BlocklibError], count: int, operation: str, node: Node) -> BlocklibError:
    """What to raise where these of `count` requests have failed: a BatchError, or what refuses all of them, a PoisonedError."""
    refused = next(iter(failures.values()))
    if len(failures) == count and all(isinstance(failure, PoisonedError) for failure in failures.values()):
        return refused
    errnos = [0] * count
    for number, failure in failures.items():
        errnos[number] = getattr(failure, "errno", None) or errno.EIO
    number, first = min(failures.items())
    error = BatchError(
        f"{len(failures)} of {count} requests failed, the first of them is number {number}: {first}",
        errnos=errnos,
        operation=operation,
        node=node.name,
    )
    error.__cause__ = first
    return error
