"""Block status: what ``map``, ``measure``, ``compare`` and every copying job ask of a disk.

The scalar functions are the definition; `extent_table` gives the same answer for a whole range at once, as a numpy table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from blocklib import extents as vocabulary
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
    extent_from_status,
    join_extents,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blocklib.extents import ExtentTable
    from blocklib.node import Node

_SCALAR_CLUSTERS = 1 << 15
"""Up to this many clusters, asking run by run costs less than importing numpy."""
_WINDOW = 1 << 38
"""Guest bytes that `extents` looks at in one table."""


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
        found, below_flags, _depth, host_offset, below_leaf = _leaf_status(leaf, child_offset, n)
        if below_flags & FLAG_EOF and below_flags & FLAG_ZERO:
            flags |= FLAG_ZERO  # a file may end before the last cluster does
        else:
            n = min(n, found)
            flags |= below_flags & FLAG_ZERO
        leaf = below_leaf or leaf
        host_offset = child_offset if host_offset < 0 else host_offset
    return n, flags & ~FLAG_RECURSE, 0, host_offset, leaf


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


def worth_tables(top: Node, length: int) -> bool:
    """Whether a range of the disk has so much metadata that numpy is worth importing.  The one place that decides."""
    node: Node | None = skip_filters(top)
    clusters = 0
    while node is not None:
        cluster_size = node.cluster_size()
        if cluster_size is not None:
            clusters += length // cluster_size
        node = backing_below(node)
    return clusters > _SCALAR_CLUSTERS


def prepare_status(top: Node) -> None:
    """Let each image find out what it must know before it reports status (whether its data may be holes)."""
    node: Node | None = skip_filters(top)
    while node is not None:
        node.ask_for_holes()
        node = backing_below(node)


def extents(top: Node, offset: int, length: int, base: Node | None = None) -> Iterator[Extent]:
    """The extents of a range: lazy, ascending, contiguous, coalesced, clipped."""
    prepare_status(top)
    pending: Extent | None = None
    for extent in _tabled(top, offset, length, base) if worth_tables(top, length) else _scalar(top, offset, length, base):
        if pending is None:
            pending = extent
            continue
        joined = join_extents(pending, extent)
        if joined is None:
            yield pending
            pending = extent
        else:
            pending = joined
    if pending is not None:
        yield pending


def _scalar(top: Node, offset: int, length: int, base: Node | None) -> Iterator[Extent]:
    end = offset + length
    while offset < end:
        status = status_above(top, offset, end - offset, base)
        yield extent_from_status(offset, status)
        offset += status[0]


def _tabled(top: Node, offset: int, length: int, base: Node | None) -> Iterator[Extent]:
    end = offset + length
    while offset < end:
        window = min(_WINDOW, end - offset)
        for row in extent_table(top, offset, window, base).tolist():
            start, n, depth, host_offset, data, zero, present, compressed = row
            yield Extent(start, n, depth, host_offset if host_offset >= 0 else None, data, zero, present, compressed)
        offset += window


# -- tables ----------------------------------------------------------------------------------------------------------------


def extent_table(top: Node, offset: int, length: int, base: Node | None = None) -> ExtentTable:
    """The extents of a range as rows of EXTENT_DTYPE: what `extents` yields, computed a whole chain at a time."""
    import numpy as np

    prepare_status(top)
    if length == 0:
        return np.empty(0, dtype=vocabulary.EXTENT_DTYPE)
    node = skip_filters(top)
    table = _layer(node, offset, length, 0)
    depth = 0
    while True:
        wanted = np.flatnonzero(~(table["present"] | table["zero"]))
        below = backing_below(node)
        if not len(wanted) or below is None:
            break
        start = int(table["offset"][wanted[0]])
        end = int(table["offset"][wanted[-1]] + table["length"][wanted[-1]])
        if end > below.size:
            # The image above defers to one that ends here: these zeroes are reported as the upper one's.
            table = _zero_behind(table, below.size)
        if below is base:
            break
        if start < below.size:
            table = _merge(table, _layer(below, start, min(end, below.size) - start, depth + 1))
        depth += 1
        node = below
    table["host_offset"][~(table["present"] | table["zero"])] = -1  # a place that is not in use yet tells nothing
    return _coalesce(table)


def _zero_behind(table: ExtentTable, size: int) -> ExtentTable:
    """The same, where what nothing determines reads as zero from guest offset `size` on."""
    import numpy as np

    at = int(np.searchsorted(table["offset"], size))
    if at and table["offset"][at - 1] + table["length"][at - 1] > size:  # one row becomes two
        table = np.insert(table, at, table[at - 1])
        before = size - table["offset"][at - 1]
        table["length"][at - 1] = before
        table["length"][at] -= before
        table["offset"][at] = size
        if table["host_offset"][at] >= 0:
            table["host_offset"][at] += before
    table["zero"][at:] |= ~table["present"][at:]
    return table


def _zeroes(start: int, end: int, depth: int, host_offset: int) -> ExtentTable:
    """The zeroes behind the end of a protocol node."""
    import numpy as np

    return np.array([(start, end - start, depth, host_offset, False, True, True, False)], dtype=vocabulary.EXTENT_DTYPE)


def _layer(node: Node, offset: int, length: int, depth: int) -> ExtentTable:
    """What one image says of a range."""
    import numpy as np

    runs = node.resolve_table(offset, length)
    flags = runs["flags"]
    if not node.is_leaf and (flags & FLAG_RAW).all():
        edge = node.data_edge()
        assert edge is not None
        shift = int(runs["child_offset"][0]) - offset
        table = _protocol_layer(edge.node, offset + shift, length, depth)
        table["offset"] -= shift
        return table
    table = np.empty(len(runs), dtype=vocabulary.EXTENT_DTYPE)
    table["offset"] = runs["offset"]
    table["length"] = runs["length"]
    table["depth"] = depth
    table["host_offset"] = np.where(flags & FLAG_OFFSET_VALID, runs["child_offset"], -1)
    table["data"] = (flags & FLAG_DATA) != 0
    table["zero"] = (flags & FLAG_ZERO) != 0
    table["present"] = (flags & FLAG_ALLOCATED) != 0
    table["compressed"] = (flags & FLAG_COMPRESSED) != 0
    if "backing" not in node.children and not node.is_leaf:
        table["zero"] |= ~table["present"]
    recurse = (flags & FLAG_RECURSE != 0) & table["data"]
    return _ask_protocol(node, table, recurse, depth) if recurse.any() else table


def _protocol_layer(node: Node, offset: int, length: int, depth: int) -> ExtentTable:
    import numpy as np

    inside = max(0, min(length, node.size - offset))
    parts = [_layer(node, offset, inside, depth)] if inside else []
    if inside < length:
        parts.append(_zeroes(offset + inside, offset + length, depth, offset + inside))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _ask_protocol(node: Node, table: ExtentTable, recurse: NDArray[Any], depth: int) -> ExtentTable:
    """Split data rows where the file below has holes: those bytes are zero although they are allocated."""
    import numpy as np

    edge = node.data_edge()
    assert edge is not None
    parts = []
    for row, ask in zip(table, recurse.tolist(), strict=True):
        if not ask:
            parts.append(row.reshape(1))
            continue
        host_offset = int(row["host_offset"])
        below = _protocol_layer(edge.node, host_offset, int(row["length"]), depth)
        split = np.repeat(row, len(below))
        split["offset"] += below["offset"] - host_offset
        split["length"] = below["length"]
        split["host_offset"] = below["offset"]
        split["zero"] = below["zero"]
        parts.append(split)
    return np.concatenate(parts)


def _merge(upper: ExtentTable, lower: ExtentTable) -> ExtentTable:
    """`upper` where it says what is there, and `lower` where it does not; `lower` covers all of the latter."""
    import numpy as np

    low = int(lower["offset"][0])
    high = int(lower["offset"][-1] + lower["length"][-1])
    end = int(upper["offset"][-1] + upper["length"][-1])
    inner = lower["offset"][(lower["offset"] > upper["offset"][0])]
    starts = np.union1d(upper["offset"], np.append(inner, [value for value in (high,) if value < end]))
    above = upper[np.searchsorted(upper["offset"], starts, side="right") - 1]
    index = np.clip(np.searchsorted(lower["offset"], starts, side="right") - 1, 0, None)
    below = lower[index]
    take = ~(above["present"] | above["zero"]) & (starts >= low) & (starts < high)
    merged = np.where(take, below, above)
    placed = merged["host_offset"] >= 0
    merged["host_offset"] = np.where(placed, merged["host_offset"] + (starts - merged["offset"]), -1)
    merged["offset"] = starts
    merged["length"] = np.diff(starts, append=end)
    return _coalesce(merged)


def _coalesce(table: ExtentTable) -> ExtentTable:
    """Join neighbours that say the same and, where they have a place, follow each other there."""
    import numpy as np

    if len(table) < 2:
        return table
    left, right = table[:-1], table[1:]
    placed = left["host_offset"] >= 0
    joins = right["host_offset"] == np.where(placed, left["host_offset"] + left["length"], -1)
    for column in ("depth", "data", "zero", "present", "compressed"):
        joins &= left[column] == right[column]
    index = np.flatnonzero(np.concatenate(([True], ~joins)))
    joined = table[index].copy()
    end = table["offset"][-1] + table["length"][-1]
    joined["length"] = np.diff(joined["offset"], append=end)
    return joined
