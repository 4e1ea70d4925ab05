"""Ranges that lose their content: made zero, discarded, or forgotten so that the backing file shows through.

All of them replace L2 entries and leave the host clusters to the write-back, which frees them once that is safe.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Literal, NamedTuple

from blocklib.formats.qcow2 import data_file, layout
from blocklib.formats.qcow2.reserve import make_table
from blocklib.formats.qcow2.tables import Table, zeroes_end

if TYPE_CHECKING:
    from blocklib.formats.qcow2.mapping import Mapping
    from blocklib.formats.qcow2.node import Qcow2Node

_TABLE_CLUSTERS = 1 << 15
"""From this many clusters on, numpy is worth importing: the same as for block status."""


class Erasure(NamedTuple):
    """What becomes of L2 entries whose clusters lose their content."""

    keeps: Literal["all", "own", "none"]
    """Which plain host clusters stay with their entries, to be written again later, while the guest reads zeroes: all, or
    those that nothing else refers to."""
    zero: bool
    """What does not stay reads as zero; otherwise it is absent."""
    spares_absent: bool
    """Entries without a host cluster stay as they are."""


_FORGET = Erasure("none", zero=False, spares_absent=False)


def zero_range(node: Qcow2Node, offset: int, length: int, *, unmap: bool) -> None:
    """Make whole clusters read as zero.  With `unmap` their host clusters are given back, otherwise kept.

    ``discard-no-unref`` keeps them too, but not their space on the host.
    """
    if node.header.version == layout.VERSION_2:
        # An absent cluster is the only zero there is; the node offers this only where nothing lies below.
        _each_slice(node, offset, length, _FORGET, skip_unmapped=True)
        return
    keep = _keeps_clusters(node)
    erasure = Erasure(("own" if keep else "none") if unmap else "all", zero=True, spares_absent=False)
    data_file.before_zeroing(node, offset, length, unmap=unmap)
    # Not even an image without a backing file leaves them out: it may be given one.
    _each_slice(node, offset, length, erasure, skip_unmapped=False, punch=unmap and keep and node.punches_holes)
    if unmap:
        data_file.after_unmapping(node, offset, length)


def discard_range(node: Qcow2Node, offset: int, length: int) -> None:
    """Give whole clusters back.  They read as zero afterwards; where that cannot be said, nothing is done.

    With ``discard-no-unref`` only their space on the host is given back, and a later write finds them where they were.
    """
    shows_backing = node.has_backing
    if node.header.version == layout.VERSION_2:
        if not shows_backing:
            _each_slice(node, offset, length, _FORGET, skip_unmapped=True)
        return
    keep = _keeps_clusters(node)
    erasure = Erasure("own" if keep else "none", zero=True, spares_absent=not shows_backing)
    data_file.before_zeroing(node, offset, length, unmap=True)
    _each_slice(node, offset, length, erasure, skip_unmapped=not shows_backing, punch=keep and node.punches_holes)
    data_file.after_unmapping(node, offset, length)


def forget_range(node: Qcow2Node, offset: int, length: int) -> None:
    """Unmap whole clusters, and the L2 tables that map nothing else; the caller has drained the node."""
    _each_slice(node, offset, length, _FORGET, skip_unmapped=True)
    mapping = node.mapping
    shift = node.geometry.l1_shift
    first = -(-offset >> shift)
    stop = min((offset + length) >> shift, len(mapping.l1))
    if offset + length >= node.geometry.round_up(node.size):
        stop = node.geometry.l1_entries_for(offset + length)  # the last table goes, however little of the disk it maps
    l1_index = zeroes_end(mapping.l1, first, stop)
    while l1_index < stop:
        node.retry(lambda l1_index=l1_index: _forget_table(node, l1_index))  # type: ignore[misc]
        l1_index = zeroes_end(mapping.l1, l1_index + 1, stop)


def _forget_table(node: Qcow2Node, l1_index: int) -> None:
    mapping = node.mapping
    host_offset = mapping.l1[l1_index] & layout.OFFSET_MASK
    if not host_offset:
        return
    for start in range(0, node.geometry.cluster_size, mapping.slice_length):
        mapping.cache.drop(host_offset + start)
    mapping.new_tables.discard(host_offset)
    mapping.doubtful_tables.discard(host_offset)
    mapping.l1[l1_index] = 0
    mapping.dirty_l1.add(l1_index)
    node.writeback.discarded.append((host_offset >> node.geometry.cluster_bits, 1))


def _keeps_clusters(node: Qcow2Node) -> bool:
    return bool(node.options.get("discard-no-unref"))


def is_own(entry: int, placed: int) -> bool:
    """Whether an entry has a whole host cluster (any of the bits `placed`) that nothing else refers to."""
    return bool(entry & layout.FLAG_COPIED and entry & placed and not entry & layout.FLAG_COMPRESSED)


def _each_slice(
    node: Qcow2Node, offset: int, length: int, erasure: Erasure, *, skip_unmapped: bool, punch: bool = False
) -> None:
    """Erase the L2 entries of a range, one L2 slice at a time.

    With `punch`, the host gets the space of the clusters that are the range's own afterwards.
    """
    node.check_usable()
    node.check_writable()
    mapping = node.mapping
    slice_bytes = mapping.slice_entries << node.geometry.cluster_bits
    end = node.geometry.round_up(offset + length)
    as_tables = length >> node.geometry.cluster_bits >= _TABLE_CLUSTERS
    while offset < end:
        if skip_unmapped and node.retry(lambda offset=offset: mapping.slice_at(offset)) is None:  # type: ignore[misc]
            known = len(mapping.l1) << node.geometry.l1_shift  # what lies behind the disk may be a VM state
            offset += mapping.unmapped_length(offset, min(end, known) - offset)
            continue
        stop = min(end, (offset // slice_bytes + 1) * slice_bytes)
        make_table(node, offset)
        kept = node.retry(
            lambda offset=offset, stop=stop: _change(node, offset, stop, erasure, punch=punch, as_tables=as_tables)  # type: ignore[misc]
        )
        # At once: whether the old entries or the new ones survive a crash, the range reads as zero.
        for first, n in kept:
            node.punch(first, n)
        node.writeback.relieve()
        offset = stop


def _change(
    node: Qcow2Node, offset: int, end: int, erasure: Erasure, *, punch: bool, as_tables: bool
) -> list[tuple[int, int]]:
    """Returns the runs of host clusters to be punched."""
    mapping, bits = node.mapping, node.geometry.cluster_bits
    node.allocations.wait_for_all(offset >> bits, end >> bits)
    slice_offset, table = mapping.slice_for_change(offset, node.refcounts, node.writeback.freed)
    index = mapping.index_in_slice(offset)
    before = table[index : index + ((end - offset) >> bits) * mapping.words]
    freed: list[tuple[int, int]] = []
    kept: list[tuple[int, int]] = []
    if before.tobytes() == bytes(len(before) * before.itemsize):
        after = _erased_absent(mapping, len(before), erasure)
    elif as_tables:
        from blocklib.formats.qcow2.zeroing_table import erased

        after, freed, kept = erased(mapping, before, erasure, tell_kept=punch)
    else:
        after, freed, kept = _erased(mapping, before, erasure, tell_kept=punch)
    # Anything that raises has done so by now, and nothing has changed yet.
    mapping.replace(slice_offset, table, index, after)
    node.writeback.discarded.extend(freed)
    return kept


def _erased_absent(mapping: Mapping, n_words: int, erasure: Erasure) -> Table:
    """What `n_words` that are all zero become."""
    if not erasure.zero or erasure.spares_absent:
        return array("Q", (0,)) * n_words
    return array("Q", (mapping.zero_flag, mapping.zero_bitmap)[: mapping.words]) * (n_words // mapping.words)


def _erased(
    mapping: Mapping, words: Table, erasure: Erasure, *, tell_kept: bool
) -> tuple[Table, list[tuple[int, int]], list[tuple[int, int]]]:
    """(the entries afterwards, runs of host clusters that lose a reference, and of those of the range's own that stay).

    `zeroing_table.erased` is the same for many.
    """
    step, placed = mapping.words, mapping.allocated_mask
    reference = placed | layout.FLAG_COMPRESSED
    after = words[:]
    lost, own = [], []
    for index in range(0, len(words), step):
        entry = words[index]
        is_plain = entry & placed and not entry & layout.FLAG_COMPRESSED
        if is_plain and (erasure.keeps == "all" or (erasure.keeps == "own" and is_own(entry, placed))):
            after[index] = entry & ~layout.FLAG_ZERO | mapping.zero_flag
            if is_own(entry, placed):
                own.append(entry)
        elif erasure.spares_absent and not entry & reference:
            continue
        else:
            after[index] = mapping.zero_flag if erasure.zero else 0
            if entry & reference:
                lost.append(entry)
        if step > 1:
            after[index + 1] = mapping.zero_bitmap if erasure.zero else 0
    return after, mapping.host_clusters_of(lost), mapping.host_clusters_of(own) if tell_kept else []
