"""How a range is read or written through a node: resolve, then move the bytes.

Everything here works for any node; a driver only says where ranges live.  A request that enters a node whose mapping may
change holds an in-flight token on it, so that a place it resolved is not reused before it has ended.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from blocklib.buffers import PIECE, aligned_pool, is_zero, pieces_of, zero_fill, zeroes
from blocklib.errors import StorageError
from blocklib.extents import KIND_BACKING, KIND_DATA, KIND_ZERO
from blocklib.sizes import MAX_SIZE

if TYPE_CHECKING:
    from blocklib.node import Node, Preallocation, WriteRun, WriteTicket

_T = TypeVar("_T")


def read(node: Node, offset: int, view: memoryview) -> None:
    """Fill `view` (bytes, contiguous) from `offset`, which lies with the whole range inside the node."""
    if node.is_leaf:
        if node.request_alignment == 1:
            node.preadv(offset, (view,))
        else:
            read_padded(node, offset, view)
        return
    tracker = node.tracker
    if tracker is None:
        _read(node, offset, view)
        return
    tracker.enter()
    try:
        _read(node, offset, view)
    finally:
        tracker.leave()


def _read(node: Node, offset: int, view: memoryview) -> None:
    length = len(view)
    done = 0
    while done < length:
        kind, child, child_offset, n, _flags = node.resolve(offset + done, length - done)
        part = view if n == length else view[done : done + n]
        if kind == KIND_DATA:
            assert child is not None
            child.read(child_offset, part)
        elif kind == KIND_ZERO:
            zero_fill(part)
        elif kind == KIND_BACKING:
            _read_backing(node, offset + done, part)
        elif not node.read_special(offset + done, part):
            continue
        done += n


def _read_backing(node: Node, offset: int, view: memoryview) -> None:
    edge = node.children.get("backing")
    below = edge.node if edge is not None else None
    available = min(len(view), below.size - offset) if below is not None else 0
    if below is None or available <= 0:
        zero_fill(view)
        return
    read(below, offset, view[:available])
    if available < len(view):  # a backing file that ends here reads as zero from here on
        zero_fill(view[available:])


def write(node: Node, offset: int, data: memoryview) -> None:
    """Write `data` at `offset`; the whole range lies inside the node (a leaf grows)."""
    if node.detect_zeroes != "off" and is_zero(data):
        _write_detected(node, offset, len(data))
        return
    if node.bitmaps is None:
        _write_bytes(node, offset, data)
        return
    with node.bitmaps.recorded(offset, len(data)):
        _write_bytes(node, offset, data)


def _write_detected(node: Node, offset: int, length: int) -> None:
    unmap = node.detect_zeroes == "unmap" and node.discard_passes
    write_zeroes(node, offset, length, unmap=unmap)


def _write_bytes(node: Node, offset: int, data: memoryview) -> None:
    if node.is_leaf:
        if node.request_alignment == 1:
            node.pwritev(offset, (data,))
        else:
            write_padded(node, offset, (data,))
        return
    _making_room(node, lambda: _write(node, offset, data))


def _making_room(node: Node, request: Callable[[], _T]) -> _T:
    """Do `request`, once more where the host was full and something could be given back."""
    tracker = node.tracker
    if tracker is None:
        return request()
    tracker.enter()
    try:
        return request()
    except StorageError as error:
        if error.errno != errno.ENOSPC:
            raise
        full = error
    finally:
        tracker.leave()
    # Not inside a request: what is to be free must not be waiting for the end of this one.
    if not node.make_room():
        raise full
    tracker.enter()
    try:
        return request()
    finally:
        tracker.leave()


def _write(node: Node, offset: int, data: memoryview) -> None:
    length = len(data)
    done = 0
    while done < length:
        run = node.prepare_write(offset + done, length - done)
        n = run[2]
        _write_run(node, offset + done, data if n == length else data[done : done + n], run)
        done += n


def _write_run(node: Node, offset: int, part: memoryview, run: WriteRun) -> None:
    """Write `part` at `offset`, to the place that the node gave for it."""
    child, child_offset, _n, ticket = run
    if ticket is None:
        if child is None:
            node.write_special(offset, child_offset, (part,))
        else:
            child.write(child_offset, (part,))
        return
    try:
        views = _copy_on_write(node, offset, part, ticket)
        if child is None:
            node.write_special(offset - ticket.head, child_offset - ticket.head, views)
        else:
            child.write(child_offset - ticket.head, views)
    except BaseException:
        ticket.abort()
        raise
    ticket.commit()


def write_unallocated(node: Node, offset: int, data: memoryview) -> int:
    """Write those parts of `data`, which is what lies below, where the node holds nothing; the bytes written.

    The content of the disk does not change, so that no bitmap is marked.
    """
    return _making_room(node, lambda: _write_unallocated(node, offset, data))


def _write_unallocated(node: Node, offset: int, data: memoryview) -> int:
    length = len(data)
    done = written = 0
    while done < length:
        n, run = node.prepare_fill(offset + done, length - done)
        if run is not None:
            _write_run(node, offset + done, data[done : done + n], run)
            written += n
        done += n
    return written


def fill_runs(node: Node, runs: Sequence[tuple[int, memoryview]]) -> None:
    """As `write_unallocated`, of many `runs`, ascending and apart from each other."""
    _making_room(node, lambda: _fill_runs(node, runs))


def _fill_runs(node: Node, runs: Sequence[tuple[int, memoryview]]) -> None:
    for offset, data in node.write_fresh(runs, lambda: None):  # which is for what the node has nothing for
        _write_unallocated(node, offset, data)


def fill_zeroes(node: Node, offset: int, length: int) -> None:
    """Make a range, which reads as zero by what lies below, read as zero by itself where the node holds nothing."""
    unit = node.zero_alignment
    end = offset + length
    first = min(-(-offset // unit) * unit, end)
    last = max(first, end if end == node.size else end // unit * unit)
    if first == last or not _making_room(node, lambda: node.fill_zeroes(first, last - first)):
        first = last = end
    for start, stop in ((offset, first), (last, end)):
        while start < stop:
            data = zeroes(stop - start)
            write_unallocated(node, start, data)
            start += len(data)


def write_runs(node: Node, runs: Sequence[tuple[int, memoryview]], placed: Callable[[], None]) -> None:
    """Write `runs` (offset and data each, ascending, apart from each other) as one request: many cost little more than one.

    Where the node gives them fresh space, `placed` is called when that is chosen and their bytes are on their way: whoever
    writes next comes to lie behind them.
    """
    if node.is_leaf or node.detect_zeroes != "off":
        for offset, data in runs:
            write(node, offset, data)
        return
    with ExitStack() as stack:
        if node.bitmaps is not None:
            for offset, data in runs:
                stack.enter_context(node.bitmaps.recorded(offset, len(data)))
        _making_room(node, lambda: _write_runs(node, runs, placed))


def _write_runs(node: Node, runs: Sequence[tuple[int, memoryview]], placed: Callable[[], None]) -> None:
    for offset, data in node.write_fresh(runs, placed):
        _write(node, offset, data)


def write_packed(node: Node, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
    """Write `data` at `offset`, compressed: `packed` is what the node's compressor made of each `unit` of bytes.

    What does not shrink is written as it is.
    """
    if node.is_filter:
        node.pass_packed(offset, data, packed, unit)
        return
    if node.detect_zeroes != "off" and is_zero(data):
        _write_detected(node, offset, len(data))
        return
    if node.bitmaps is None:
        _write_packed(node, offset, data, packed, unit)
        return
    with node.bitmaps.recorded(offset, len(data)):
        _write_packed(node, offset, data, packed, unit)


def _write_packed(node: Node, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
    if not _making_room(node, lambda: node.write_packed(offset, packed)):
        packed = (None,) * len(packed)
    start = 0
    while start < len(packed):
        stop = start + 1
        if packed[start] is None:
            while stop < len(packed) and packed[stop] is None:
                stop += 1
            _write_bytes(node, offset + start * unit, data[start * unit : stop * unit])
        start = stop


def _copy_on_write(node: Node, offset: int, part: memoryview, ticket: WriteTicket) -> list[memoryview]:
    """`part` between the head and tail that share its clusters, as they read now."""
    views = [part]
    if ticket.head or ticket.tail:
        edge = node.data_edge()
        if edge is not None:
            edge.node.hear("cow_read")
    if ticket.head:
        head = memoryview(bytearray(ticket.head))
        _read(node, offset - ticket.head, head)
        views.insert(0, head)
    if ticket.tail:
        tail = memoryview(bytearray(ticket.tail))
        start = offset + len(part)
        inside = min(ticket.tail, node.size - start)  # the last cluster may reach past the end of the disk
        if inside > 0:
            _read(node, start, tail[:inside])
        views.append(tail)
    return views


def write_zeroes(node: Node, offset: int, length: int, *, unmap: bool, fallback: bool = True) -> None:
    """Make the range read as zero, by metadata where the node can; with `unmap` the space is given back where possible.

    Without `fallback`, raises StorageError (ENOTSUP) where zeroes would have to be sent to this node as bytes.
    """
    if length <= 0:
        return
    if node.bitmaps is None:
        _make_zero(node, offset, length, unmap, fallback)
        return
    with node.bitmaps.recorded(offset, length):
        _make_zero(node, offset, length, unmap, fallback)


def _make_zero(node: Node, offset: int, length: int, unmap: bool, fallback: bool) -> None:
    tracker = node.tracker
    if tracker is not None:
        tracker.enter()
    try:
        unit = node.zero_alignment
        end = offset + length
        first = -(-offset // unit) * unit
        last = end if end == node.size else end // unit * unit
        if node.is_filter and not fallback:
            _refuse_bytes_below(node, offset, length)
        if first >= last or not node.zeroes_by_metadata:
            _zero_bytes(node, offset, length, fallback)
            return
        # The ends first: if they cannot be done, nothing is.
        _zero_bytes(node, offset, first - offset, fallback)
        _zero_bytes(node, last, end - last, fallback)
        node.zero_range(first, last - first, unmap=unmap)
    finally:
        if tracker is not None:
            tracker.leave()


def _refuse_bytes_below(node: Node, offset: int, length: int) -> None:
    """Raises StorageError (ENOTSUP) where the image below a filter would be sent zeroes as bytes."""
    while node.is_filter:
        node = node.children["file"].node
    end = offset + length
    if not node.zeroes_by_metadata or offset % node.zero_alignment or (end % node.zero_alignment and end != node.size):
        raise _not_by_metadata(node, offset, length)


def _not_by_metadata(node: Node, offset: int, length: int) -> StorageError:
    return StorageError(
        f"{node.filename or node.name}: {length} bytes at {offset} cannot be made zero by metadata alone",
        errno=errno.ENOTSUP,
        operation="write zeroes",
        node=node.name,
    )


def _zero_bytes(node: Node, offset: int, length: int, fallback: bool) -> None:
    """Zero a range inside one or two units of the node."""
    while length > 0:
        n = min(length, node.zero_alignment - offset % node.zero_alignment)
        part = node.zero_part_alignment
        if part and offset % part:
            n = min(n, part - offset % part)
        elif part and n > part and offset + n != node.size:
            n -= n % part
        if not node.zero_part(offset, n):
            if not fallback:
                raise _not_by_metadata(node, offset, n)
            _write_zero_bytes(node, offset, n)
        offset += n
        length -= n


def _write_zero_bytes(node: Node, offset: int, length: int) -> None:
    while length > 0:
        data = zeroes(min(length, PIECE))
        if not node.is_leaf:
            _write(node, offset, data)
        elif node.request_alignment == 1:
            node.pwritev(offset, (data,))
        else:
            write_padded(node, offset, (data,))
        offset += len(data)
        length -= len(data)


def discard(node: Node, offset: int, length: int) -> None:
    """Tell the node that the range is no longer needed; ignored unless the node was opened with ``discard=unmap``."""
    if not node.discard_passes:
        return
    unit = node.zero_alignment
    end = offset + length
    first = -(-offset // unit) * unit
    last = end if end == node.size else end // unit * unit
    if first >= last:
        return
    if node.bitmaps is None:
        _discard_units(node, first, last - first)
        return
    with node.bitmaps.recorded(first, last - first):
        _discard_units(node, first, last - first)


def _discard_units(node: Node, offset: int, length: int) -> None:
    tracker = node.tracker
    if tracker is not None:
        tracker.enter()
    try:
        node.discard_range(offset, length)
    finally:
        if tracker is not None:
            tracker.leave()


def truncate(node: Node, size: int, preallocation: Preallocation = "off") -> None:
    """Change the size of a node; bytes that it gains read as zero, whatever lay there or lies below."""
    node.check_resize(size, preallocation)
    if node.bitmaps is None:
        _change_size(node, size, preallocation)
        return
    with node.bitmaps.resizing(size):
        _change_size(node, size, preallocation)


def _change_size(node: Node, size: int, preallocation: Preallocation) -> None:
    old_size = node.size
    if size <= old_size or not node.reach(size):
        node.truncate(size, preallocation)
        return
    try:
        _zero_gained(node, old_size, preallocation)
        node.truncate(size, preallocation)
    except BaseException:
        node.reach(old_size)
        raise


def _zero_gained(node: Node, old_size: int, preallocation: Preallocation) -> None:
    unit = node.zero_alignment
    backing = node.children.get("backing")
    end = -(-old_size // unit) * unit  # an earlier, larger disk may have left bytes in the last unit
    shown = preallocation == "off" or not node.preallocation_hides_backing
    if shown and (backing.node.size > old_size if backing is not None else node.names_backing):
        end = node.size  # the backing file shows through: all of the new part is made zero, for it may grow later, too
    length = min(end, node.size) - old_size
    if length > 0:  # nothing to be noted in bitmaps: the new part is as whoever reads a disk of this size expects it
        _make_zero(node, old_size, length, unmap=False, fallback=True)


def read_padded(leaf: Node, offset: int, view: memoryview) -> None:
    """Read any range of a leaf that takes only aligned requests and aligned memory (direct I/O)."""
    alignment = leaf.request_alignment
    buffer = aligned_pool.take()
    try:
        done = 0
        while done < len(view):
            start = (offset + done) // alignment * alignment
            skip = offset + done - start
            n = min(len(view) - done, PIECE - skip)
            span = -(-(skip + n) // alignment) * alignment
            leaf.preadv(start, (buffer[:span],))
            view[done : done + n] = buffer[skip : skip + n]
            done += n
    finally:
        aligned_pool.give(buffer)


def write_padded(leaf: Node, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
    """Write any range of a leaf that takes only aligned requests and aligned memory.

    A block that is written in part is read, changed and written back, apart from all other writes to it.
    """
    alignment = leaf.request_alignment
    length = pieces_of(views)
    end = offset + length
    first = offset // alignment * alignment
    last = -(-end // alignment) * alignment
    partial = first != offset or last != end
    # What grows the file by padding cuts the padding off again: until then nobody may write behind it.
    reach = last if end == last or last <= leaf.size else MAX_SIZE
    held = leaf.write_ranges.acquire(first, reach, exclusive=partial)
    buffer = aligned_pool.take()
    try:
        source = _Gather(views)
        size_before = leaf.size
        start = first
        while start < last:
            span = min(PIECE, last - start)
            skip = max(offset - start, 0)
            n = min(end, start + span) - (start + skip)
            if skip:
                leaf.preadv(start, (buffer[:alignment],))
            if skip + n < span and not (skip and span == alignment):
                leaf.preadv(start + span - alignment, (buffer[span - alignment : span],))
            source.take_into(buffer[skip : skip + n])
            leaf.pwritev(start, (buffer[:span],))
            start += span
        if last > size_before and end < last:
            leaf.truncate(max(end, size_before))  # the padding is not part of the file
    finally:
        aligned_pool.give(buffer)
        leaf.write_ranges.release(held)


class _Gather:
    """Takes the bytes of several views one after the other."""

    __slots__ = ("_index", "_position", "_views")

    def __init__(self, views: Sequence[memoryview | bytes | bytearray]) -> None:
        self._views = [memoryview(view) for view in views]
        self._index = 0
        self._position = 0

    def take_into(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            view = self._views[self._index]
            n = min(len(view) - self._position, len(target) - done)
            target[done : done + n] = view[self._position : self._position + n]
            done += n
            self._position += n
            if self._position == len(view):
                self._index += 1
                self._position = 0
