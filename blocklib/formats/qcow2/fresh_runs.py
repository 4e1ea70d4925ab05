"""Whole clusters written where the image holds nothing: one place on the host, one system call and one change of the tables
for many runs of the guest.

What a new image is filled with is of this kind.  Everything else goes run by run, through `writing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from blocklib.buffers import zeroes
from blocklib.formats.qcow2.cow import RangeTicket
from blocklib.formats.qcow2.reserve import back_tables

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

Runs: TypeAlias = "Sequence[tuple[int, memoryview]]"
"""(guest offset, data) each, ascending and apart from each other."""

_Span: TypeAlias = "tuple[int, int]"
"""(first guest cluster, number)."""


class _Fresh(RangeTicket):
    """Guest clusters that a write has claimed, all of them absent, and their host clusters."""

    def __init__(self, node: Qcow2Node, spans: list[_Span]) -> None:
        self._node = node
        self.spans = spans
        self.first = spans[0][0]
        self.stop = sum(spans[-1])
        self.unplaced = _by_table(node, spans)
        """Clusters without a place so far: (first guest cluster, number) of those in each L2 table, the first ones last."""
        self.places: list[tuple[int, int]] = []
        """(first host cluster, number) of those that have one, in order."""

    def abort(self) -> None:
        _give_back(self._node, self)


def write_fresh(node: Qcow2Node, runs: Runs, placed: Callable[[], None]) -> Runs:
    """Write those of `runs` that are whole clusters which the image has nothing for; the others are left.

    `placed` is called once it is settled where all of `runs` go, if none is left.  Raises what `prepare_write` raises.
    """
    node.check_usable()
    if node.crypt is not None or node.mapping.external:
        return runs
    whole = [run for run in runs if _is_whole(node, *run)]
    claimed = node.retry(lambda: _claim(node, whole)) if whole else None
    if claimed is None:
        return runs
    fresh, written = claimed
    left = runs[:0] if len(written) == len(runs) else _without(runs, written)
    try:
        while fresh.unplaced:
            node.retry(lambda: _place(node, fresh))
        if node.refcounts.unbacked:
            bits = node.geometry.cluster_bits
            back_tables(node, fresh.first << bits, fresh, length=(fresh.stop - fresh.first) << bits)
        if not left:
            placed()
        for host_offset, views in _vectors(node, fresh, written):
            node.file.write(host_offset, views)
        segments = list(_segments(fresh))
        node.retry(lambda: _link(node, fresh, segments))
    except BaseException:
        fresh.abort()
        raise
    node.writeback.relieve()
    return left


def _without(runs: Runs, written: Runs) -> Runs:
    offsets = {offset for offset, _data in written}
    return [run for run in runs if run[0] not in offsets]


def _is_whole(node: Qcow2Node, offset: int, data: memoryview) -> bool:
    """Whether a run consists of whole clusters, or ends with the disk."""
    mask = node.geometry.cluster_mask
    end = offset + len(data)
    return not offset & mask and (not end & mask or end == node.size)


def _claim(node: Qcow2Node, runs: Runs) -> tuple[_Fresh, Runs] | None:
    """Claim those of the runs, of whole clusters, that are absent, and which they are; None where there are none.

    Nor where somebody else writes there.
    """
    node.check_writable()
    bits, mask = node.geometry.cluster_bits, node.geometry.cluster_mask
    spans = [(offset >> bits, (len(data) + mask) >> bits) for offset, data in runs]
    if node.allocations.overlaps(spans[0][0], sum(spans[-1])):
        return None
    absent = [(span, run) for span, run in zip(spans, runs, strict=True) if _is_absent(node, span)]
    if not absent:
        return None
    fresh = _Fresh(node, [span for span, _run in absent])
    node.allocations.add(fresh)
    return fresh, [run for _span, run in absent]


def _by_table(node: Qcow2Node, spans: list[_Span]) -> list[_Span]:
    """(first guest cluster, number of clusters) in each of the L2 tables that map the spans, backwards."""
    per_table = 1 << (node.geometry.l1_shift - node.geometry.cluster_bits)
    tables: list[_Span] = []
    for first, n in spans:
        while n:
            some = min(n, per_table - first % per_table)
            if tables and tables[-1][0] // per_table == first // per_table:
                tables[-1] = tables[-1][0], tables[-1][1] + some
            else:
                tables.append((first, some))
            first, n = first + some, n - some
    return tables[::-1]


def _is_absent(node: Qcow2Node, span: _Span) -> bool:
    mapping = node.mapping
    for guest, _host, n in _slices(node, ((span[0], 0, span[1]),)):
        slice_offset = mapping.slice_at(guest << node.geometry.cluster_bits)
        if slice_offset is not None:
            index = guest % mapping.slice_entries * mapping.words
            if mapping.absent_run(mapping.cache.need(slice_offset), index, index + n * mapping.words) < n:
                return False
    return True


def _place(node: Qcow2Node, fresh: _Fresh) -> None:
    """Take a run of host clusters for what has none, as long as there is one, behind the L2 table that will map it.

    The table is made now, while nothing is lost if the host has no room for it.
    """
    guest, wanted = fresh.unplaced[-1]
    node.mapping.slice_for_change(guest << node.geometry.cluster_bits, node.refcounts, node.writeback.freed)
    first, n = node.refcounts.allocate(wanted, for_data=True)
    if n < wanted:
        fresh.unplaced[-1] = guest, wanted - n
    else:
        fresh.unplaced.pop()
    if fresh.places and sum(fresh.places[-1]) == first:
        fresh.places[-1] = fresh.places[-1][0], fresh.places[-1][1] + n
    else:
        fresh.places.append((first, n))


def _vectors(node: Qcow2Node, fresh: _Fresh, runs: Runs) -> Iterator[tuple[int, list[memoryview]]]:
    """(host offset, views) of what is written where; the last cluster is filled up with zeroes."""
    bits, mask = node.geometry.cluster_bits, node.geometry.cluster_mask
    views = [data for _offset, data in runs]
    missing = -len(views[-1]) & mask
    while missing:
        views.append(zeroes(missing))
        missing -= len(views[-1])
    at = 0
    for first, n in fresh.places:
        taken: list[memoryview] = []
        left = n << bits
        while left and at < len(views):
            view = views[at]
            if len(view) <= left:
                taken.append(view)
                at += 1
            else:
                taken.append(view[:left])
                views[at] = view[left:]
            left -= len(taken[-1])
        yield first << bits, taken


def _segments(fresh: _Fresh) -> Iterator[tuple[int, int, int]]:
    """(guest cluster, host cluster, number) of what is contiguous on both sides."""
    places = iter(fresh.places)
    host = free = 0
    for guest, n in fresh.spans:
        while n:
            if not free:
                host, free = next(places)
            some = min(n, free)
            yield guest, host, some
            guest, host, n, free = guest + some, host + some, n - some, free - some


def _slices(node: Qcow2Node, segments: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The same segments, cut where an L2 slice ends."""
    per_slice = node.mapping.slice_entries
    for guest, host, n in segments:
        while n:
            some = min(n, per_slice - guest % per_slice)
            yield guest, host, some
            guest, host, n = guest + some, host + some, n - some


def _link(node: Qcow2Node, fresh: _Fresh, segments: Sequence[tuple[int, int, int]]) -> None:
    """Point the L2 entries at the host clusters: the write is part of the image from now on."""
    mapping, bits = node.mapping, node.geometry.cluster_bits
    words = mapping.words
    number, slice_offset, table = -1, 0, None
    for guest, host, n in _slices(node, segments):
        if table is None or guest // mapping.slice_entries != number:
            number = guest // mapping.slice_entries
            slice_offset, table = mapping.slice_for_change(guest << bits, node.refcounts, node.writeback.freed)
        index = guest % mapping.slice_entries * words
        mapping.link(slice_offset, table, index, host << bits, n, 0, n << bits)
    node.allocations.remove(fresh)


def _give_back(node: Qcow2Node, fresh: _Fresh) -> None:
    """Let go of what was not linked: nobody has seen it."""

    def change() -> None:
        while fresh.places:
            node.refcounts.release(*fresh.places[-1])
            fresh.places.pop()

    try:
        if node.poisoned is None and node.corruption is None:
            node.retry(change)
    finally:
        with node.lock:
            if node.allocations.holds(fresh):
                node.allocations.remove(fresh)
