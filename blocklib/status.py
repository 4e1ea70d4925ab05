"""Block status: what ``map``, ``measure``, ``compare`` and every copying job ask of a disk.

`block_status` and `status_above` are the definition; `row_windows` gives the same answer for a long range, by kernels where
there is much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from blocklib import extents as vocabulary
from blocklib._fast import extents as kernels
from blocklib._fast.extents import DEPTH_SHIFT, SAID, Rows
from blocklib._fast.totals import data_bytes
from blocklib.errors import ImageCorruptError
from blocklib.extents import (
    FLAG_ALLOCATED,
    FLAG_COMPRESSED,
    FLAG_DATA,
    FLAG_EOF,
    FLAG_OFFSET_VALID,
    FLAG_RAW,
    FLAG_RECURSE,
    FLAG_ZERO,
    KIND_BACKING,
    Extent,
    Status,
)

if TYPE_CHECKING:
    from blocklib.extents import ExtentTable
    from blocklib.node import Node

_FIRST_WINDOW: Final = 1 << 34
"""Guest bytes that are looked at together, at first."""
_MANY_ROWS: Final = 1 << 16
"""Room for the rows that are found together by kernels."""
_ENDLESS: Final = 1 << 62
"""Behind every place in a file."""
_FEW_ROWS: Final = 1 << 8
"""And one by one."""
_TIMES_TOLD: Final = 16
"""Data may be found in the same bytes of a file more than once: it may move while somebody looks."""


def block_status(node: Node, offset: int, length: int) -> Status:
    """What this node alone says of `offset`: (length, flags, 0, host offset or -1, protocol node).

    Not allocated (no FLAG_ALLOCATED) means that the backing node determines the content; where there is none, or it ends
    before `offset`, that is zero.
    """
    node = skip_filters(node)
    kind, child, child_offset, n, flags = node.resolve(offset, length)
    if node.is_leaf:
        return n, flags, 0, child_offset, node
    if flags & FLAG_RAW:
        assert child is not None
        return _leaf_status(child.node, child_offset, n)
    if kind == KIND_BACKING:
        below = backing_below(node)
        if below is None or offset >= below.size:
            if flags & FLAG_OFFSET_VALID and child is not None:  # a place that is not in use yet
                return n, FLAG_ZERO | FLAG_OFFSET_VALID, 0, child_offset, child.node
            return n, FLAG_ZERO, 0, -1, None
        return min(n, below.size - offset), 0, 0, -1, None
    if not flags & FLAG_OFFSET_VALID or child is None:
        return n, flags, 0, -1, None
    leaf: Node = child.node
    host_offset = child_offset
    if flags & FLAG_RECURSE and flags & FLAG_DATA:
        n, zero, host_offset, leaf = _holes(leaf, child_offset, n)
        flags |= zero
    return n, flags & ~FLAG_RECURSE, 0, host_offset, leaf


def _holes(leaf: Node, place: int, length: int) -> tuple[int, int, int, Node]:
    """(length, FLAG_ZERO if that is a hole or else 0, host offset, node that it is in) of data at `place` in the node below."""
    n, flags, _depth, host_offset, below = _leaf_status(leaf, place, length)
    if flags & FLAG_EOF and flags & FLAG_ZERO:
        n = length  # a file may end before the last cluster does
    return min(n, length), flags & FLAG_ZERO, place if host_offset < 0 else host_offset, below or leaf


def _leaf_status(node: Node, offset: int, length: int) -> Status:
    """Block status below a format: past the end of a protocol node everything is zero."""
    if offset >= node.size:
        return length, FLAG_ZERO | FLAG_ALLOCATED | FLAG_EOF | FLAG_OFFSET_VALID, 0, offset, node
    return block_status(node, offset, min(length, node.size - offset))


def skip_filters(node: Node) -> Node:
    """The first node from `node` down that is no filter."""
    while node.is_filter:
        node = node.children["file"].node
    return node


def are_reads_seen(node: Node) -> bool:
    """Whether a filter from `node` down to the first image wants to see what is read."""
    while node.is_filter:
        if node.sees_reads:
            return True
        node = node.children["file"].node
    return False


def free_run(node: Node, offset: int, length: int) -> tuple[int, bool]:
    """(bytes, whether the image, without what is below it, has no place for them) of the beginning of a range."""
    end = offset + length
    position, found = offset, False
    while position < end:
        n, flags, _depth, _place, _leaf = block_status(node, position, end - position)
        is_free = not flags & (FLAG_DATA | FLAG_OFFSET_VALID | FLAG_COMPRESSED)
        if position > offset and is_free != found:
            break
        found = is_free
        position += n
    return position - offset, found


def backing_below(node: Node) -> Node | None:
    """The next image of the chain, or None."""
    edge = skip_filters(node).children.get("backing")
    return skip_filters(edge.node) if edge is not None else None


def status_above(top: Node, offset: int, length: int, base: Node | None = None) -> Status:
    """Block status through a chain: which image above `base` (None: the whole chain) determines `offset`.

    (length, flags, depth, host offset or -1, protocol node); depth counts images from `top`, which is 0.
    """
    node = skip_filters(top)
    depth = 0
    n, flags, _depth, host_offset, leaf = block_status(node, offset, length)
    while not flags & (FLAG_ALLOCATED | FLAG_ZERO):
        below = backing_below(node)
        if below is None or below is base:
            break
        depth += 1
        node = below
        n, flags, _depth, host_offset, leaf = block_status(node, offset, min(n, node.size - offset))
    return n, flags, depth, host_offset, leaf


def worth_tables(top: Node, offset: int, length: int) -> bool:
    """Whether a range of the disk has so much metadata that kernels pay.  The one place that decides."""
    node: Node | None = skip_filters(top)
    entries = 0
    while node is not None and offset < node.size:
        entries += node.table_entries(offset, min(length, node.size - offset))
        node = backing_below(node)
    return kernels.worth_entries(entries)


def prepare_status(top: Node) -> None:
    """Let each image find out what it must know before it reports status (whether its data may be holes)."""
    node: Node | None = skip_filters(top)
    while node is not None:
        node.ask_for_holes()
        node = backing_below(node)


def extents(top: Node, offset: int, length: int, base: Node | None = None) -> Iterator[Extent]:
    """The extents of a range: lazy, ascending, contiguous, coalesced, clipped."""
    for rows in row_windows(top, offset, length, base):
        for start, n, place, word in rows:
            yield Extent(start, n, word >> DEPTH_SHIFT, place if place >= 0 else None, *_SAID[word & SAID])


_SAID: Final = [
    (bool(word & FLAG_DATA), bool(word & FLAG_ZERO), bool(word & FLAG_ALLOCATED), bool(word & FLAG_COMPRESSED))
    for word in range(SAID + 1)
]
"""The last four fields of an Extent, by the flags of a row."""


def extent_table(top: Node, offset: int, length: int, base: Node | None = None) -> ExtentTable:
    """The extents of a range as rows of EXTENT_DTYPE: what `extents` yields."""
    import numpy as np

    parts = []
    for rows in row_windows(top, offset, length, base):
        columns = np.frombuffer(rows.numbers, dtype=np.int64)[: len(rows) * 4].reshape(-1, 4)
        word = columns[:, 3]
        table = np.empty(len(rows), dtype=vocabulary.EXTENT_DTYPE)
        table["offset"] = columns[:, 0]
        table["length"] = columns[:, 1]
        table["depth"] = word >> DEPTH_SHIFT
        table["host_offset"] = columns[:, 2]
        table["data"] = word & FLAG_DATA
        table["zero"] = word & FLAG_ZERO
        table["present"] = word & FLAG_ALLOCATED
        table["compressed"] = word & FLAG_COMPRESSED
        parts.append(table)
    return np.concatenate(parts) if parts else np.empty(0, dtype=vocabulary.EXTENT_DTYPE)


def row_windows(top: Node, offset: int, length: int, base: Node | None = None) -> Iterator[Rows]:
    """The extents of a range as rows of `blocklib._fast.extents`, some at a time: what everything else here is made of.

    Where there is little to look at, or until there proves to be much, they are found one by one.
    """
    prepare_status(top)
    tables = length > 0 and worth_tables(top, offset, length)
    end = offset + length
    told = _Told(top, offset)
    window = _FIRST_WINDOW
    held = None  # the last row: the next window may go on with it
    while offset < end:
        asked = min(window, end - offset) if tables else end - offset
        if tables:
            rows = _table(top, offset, asked, base)
            told.check(rows)
            covered = rows.end - offset
            window = window * 4 if covered == asked else covered  # what one image has more of than others is not read again
        else:
            rows = _one_by_one(top, offset, asked, base)
            tables = kernels.worth_rows(len(rows))
        offset = rows.end
        if held is not None and not rows.prepend(*held):
            yield kernels.one_row(*held)
        held = rows.pop()
        if len(rows):
            yield rows
    if held is not None:
        yield kernels.one_row(*held)


class _Told:
    """How much data one walk over a disk has found in each image: not much more than the image's file has bytes.

    A cluster of a file is part of a disk once.  Where an image says otherwise, a few of them could fill exabytes.
    """

    def __init__(self, top: Node, start: int) -> None:
        self._start = start
        self._images: list[tuple[Node, Node]] = []  # with what holds the data of each
        node: Node | None = skip_filters(top)
        while node is not None:
            edge = node.data_edge()
            self._images.append((node, edge.node if edge is not None else node))
            node = backing_below(node)
        self._bytes = [0] * len(self._images)

    def check(self, rows: Rows) -> None:
        """Raises ImageCorruptError.  Nothing is counted before it could be too much, which for most images is never."""
        for depth, (node, file) in enumerate(self._images):
            if rows.end - self._start <= file.size * _TIMES_TOLD:
                continue
            self._bytes[depth] += data_bytes(rows, depth, file.size)
            if self._bytes[depth] > file.size * _TIMES_TOLD:
                name = node.filename or node.name
                raise ImageCorruptError(
                    f"{name}: more than {self._bytes[depth]} bytes of the disk are said to lie in {file.size} bytes of a file",
                    structure="L2 tables",
                    host_offset=None,
                    expected=f"a cluster of the file for each cluster of data, which are {file.size} bytes at the most",
                    found=f"{self._bytes[depth]} bytes",
                    node=name,
                )


def _one_by_one(top: Node, offset: int, length: int, base: Node | None) -> Rows:
    """The first rows of a range: the definition."""
    rows = Rows(_FEW_ROWS)
    end = offset + length
    while offset < end and not rows.full:
        n, flags, depth, host_offset, _leaf = status_above(top, offset, end - offset, base)
        rows.append(offset, n, host_offset if flags & FLAG_OFFSET_VALID else -1, flags & SAID | depth << DEPTH_SHIFT)
        offset += n
    return rows


# -- whole tables, by kernels ----------------------------------------------------------------------------------------------


def _table(top: Node, offset: int, length: int, base: Node | None) -> Rows:
    """The same rows, of as much of the range as there is room for."""
    node = skip_filters(top)
    below = backing_below(node)
    rows = kernels.labelled(_runs(node, offset, length), 0, _zero_from(node, below))
    depth = 0
    while below is not None and below is not base:
        start, end = kernels.undetermined(rows)
        if start == end:
            break
        node, below = below, backing_below(below)
        depth += 1
        lower = kernels.labelled(_runs(node, start, end - start), depth, _zero_from(node, below))
        if lower.end < end:
            rows.clip(offset, lower.end)
        rows = kernels.merged(rows, lower)
    return rows


def _zero_from(node: Node, below: Node | None) -> int:
    """The guest offset from which on what an image does not determine reads as zero: where what is below it ends."""
    if below is not None:
        return below.size
    return 0 if node.supports_backing else node.size  # what cannot have anything below it has said all there is to say


def _runs(node: Node, offset: int, length: int) -> Rows:
    """What one image says of a range, of as much of it as there is room for."""
    rows = Rows(min(_MANY_ROWS, 2 * node.table_entries(offset, length) + _FEW_ROWS))
    node.resolve_rows(offset, length, rows)
    if node.is_leaf:
        return rows
    edge = node.data_edge()
    words = rows.words
    if any(word & FLAG_RAW for word in words):
        assert edge is not None
        (_offset, n, place, _word), *others = rows
        assert not others
        below = Rows(_MANY_ROWS)
        _add_leaf_rows(below, edge.node, offset, place, n)
        return below
    if any(word & FLAG_RECURSE and word & FLAG_DATA for word in words):
        assert edge is not None
        return _asked_file(rows, edge.node) if edge.node.is_leaf else _asked(rows, edge.node)
    return rows


def _asked_file(runs: Rows, leaf: Node) -> Rows:
    """What `_asked` does, where the node below moves bytes itself: places that lie together are asked for once."""

    def ask(place: int) -> tuple[int, int]:
        whole = max(1, leaf.size - place)
        n, zero, _place, _leaf = _holes(leaf, place, whole)
        return (_ENDLESS if zero and place + n >= leaf.size else place + n), zero

    return kernels.asked(runs, kernels.Holes(), _MANY_ROWS, ask)


def _add_leaf_rows(rows: Rows, leaf: Node, offset: int, place: int, length: int) -> None:
    """Add what a node below a format says of its bytes from `place` on, which are those of the disk from `offset` on."""
    done = 0
    while done < length and not rows.full:
        n, flags, _depth, host_offset, _leaf = _leaf_status(leaf, place + done, length - done)
        rows.append(offset + done, n, host_offset if flags & FLAG_OFFSET_VALID else -1, flags & SAID)
        done += n


def _asked(runs: Rows, leaf: Node) -> Rows:
    """Split rows of data where the file below has holes: those bytes are zero although they are allocated."""
    rows = Rows(_MANY_ROWS)
    for offset, length, place, word in runs:
        done = 0
        while done < length and not rows.full:
            n, flags, below = length - done, word & SAID, place + done if place >= 0 else -1
            if word & FLAG_RECURSE and word & FLAG_DATA:
                n, zero, below, _node = _holes(leaf, below, n)
                flags |= zero
            rows.append(offset + done, n, below, flags)
            done += n
        if rows.full:
            break
    return rows
