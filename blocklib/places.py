"""Reading from where data was found to live: a range is looked up once, for what is to be done and for the doing of it.

Block status says in which file, and where in it, data lies.  That holds until somebody changes the graph or where an image
keeps its clusters; from then on every read looks up anew.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

from blocklib import status
from blocklib._fast.extents import COMPRESSED, DATA, DEPTH_SHIFT, PLACED, SAID, ZERO, Rows
from blocklib.buffers import zero_fill

if TYPE_CHECKING:
    from blocklib.graph import Edge
    from blocklib.node import Node

_Moves: TypeAlias = "list[tuple[int, memoryview]]"
"""(host offset, what to fill from there) each."""

_MANY: Final = 32
"""So many reads of a file are made by one call, without the interpreter's lock."""
_REMEMBERED: Final = 1 << 18
"""Rows that are kept: more than all threads of a job can be at."""


class Places:
    """The places of a chain of images, of those above `base`, as `status.row_windows` finds them."""

    def __init__(self, top: Node, base: Node | None = None) -> None:
        self._windows: tuple[_Window, ...] = ()  # ascending; replaced, never changed
        links = _links(top, base)
        self._are_known = links is not None
        self._links = links or []
        self._writable = [link.node for link in self._links if link.node.tracker is not None]
        self._layouts = [node.layout() for node in self._writable]
        self._are_pinned = False

    def remember(self, windows: Iterator[Rows]) -> Iterator[Rows]:
        """The same, of the chain that this is for, in which every row is remembered for some time."""
        for rows in windows:
            if self._are_known:
                kept = [*self._windows, _Window(rows)]
                while len(kept) > 2 and sum(len(window.offsets) for window in kept) > _REMEMBERED:
                    del kept[0]
                self._windows = tuple(kept)
            yield rows

    def read(self, top: Node, runs: Sequence[tuple[int, memoryview]]) -> Sequence[tuple[int, memoryview]]:
        """Fill the view of each run from its guest offset; those that are left, with nothing certain in them.

        The caller is inside a request to the chain, which begins with `top` now.
        """
        if not self._windows or not self._are_known:
            return runs
        with self._inside():
            if not self._are_pinned and not self._hold(top):
                self._are_known = False
                return runs
            moves: list[_Moves] = [[] for _ in self._links]
            left = [run for run in runs if not self._find(*run, moves)]
            done = [_read_all(link.data, found) for link, found in zip(self._links, moves, strict=True)]
            return left if all(done) else runs

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """What is looked up inside the block is read where it was then, whoever writes to the images meanwhile.

        That is no longer what the disk reads as where it was written since.  One thread, inside a request to the chain.
        """
        with self._inside():
            self._are_pinned = True
            try:
                yield
            finally:
                self._are_pinned = False
                self._windows = ()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """What the images free from now on is not given to anybody else before the end of the block."""
        entered = 0
        try:
            for node in self._writable:
                assert node.tracker is not None
                node.tracker.enter()
                entered += 1
            yield
        finally:
            for node in self._writable[:entered]:
                assert node.tracker is not None
                node.tracker.leave()

    def _hold(self, top: Node) -> bool:
        """Whether everything is where it was when it was looked up."""
        return (
            self._links[0].node is top
            and all(link.holds() for link in self._links)
            and self._layouts == [node.layout() for node in self._writable]
        )

    def _find(self, offset: int, view: memoryview, moves: list[_Moves]) -> bool:
        """Add to the moves of each image what is to be read from where; False where that is not all known."""
        windows = self._windows
        index = bisect_right(windows, offset, key=_start) - 1
        done, length = 0, len(view)
        for window in windows[index:] if index >= 0 else ():
            i = bisect_right(window.offsets, offset + done) - 1
            while done < length and i < len(window.offsets):
                inside = offset + done - window.offsets[i]
                n = min(length - done, window.lengths[i] - inside)
                if n <= 0:
                    return False
                word = window.words[i]
                part = view if n == length else view[done : done + n]
                if word & _KIND == DATA | PLACED:
                    moves[word >> DEPTH_SHIFT].append((window.places[i] + inside, part))
                elif word & ZERO:
                    zero_fill(part)
                else:
                    return False
                done += n
                i += 1
            if done == length:
                return True
        return False


def _read_all(edge: Edge, moves: _Moves) -> bool:
    """Make all moves; False where one failed, and reading it again will say how."""
    leaf = edge.node
    if len(moves) < _MANY or not leaf.is_leaf or leaf.request_alignment != 1:
        for place, view in moves:
            edge.read(place, view)
        return True
    from ctypes import addressof, c_char

    offsets = array("q", [place for place, _view in moves])
    lengths = array("q", [len(view) for _place, view in moves])
    addresses = array("q", [addressof(c_char.from_buffer(view)) for _place, view in moves])
    results = array("q", bytes(8 * len(moves)))
    leaf.transfer(offsets, addresses, lengths, results, writing=False)
    return not any(results)


_KIND: Final = SAID & (DATA | PLACED | COMPRESSED | ZERO)


class _Window:
    """Rows, by columns."""

    __slots__ = ("lengths", "offsets", "places", "words")

    def __init__(self, rows: Rows) -> None:
        columns = zip(*rows, strict=True)
        self.offsets, self.lengths, self.places, self.words = columns


def _start(window: _Window) -> int:
    return int(window.offsets[0])


class _Link:
    """An image of the chain, and the way down from it."""

    __slots__ = ("_backing", "_below", "_place", "_tracker", "data", "node")

    def __init__(self, node: Node, data: Edge) -> None:
        self.node = node
        self.data = data
        """Where its data lives."""
        self._place = data.node
        self._tracker = node.tracker
        self._backing = node.children.get("backing")
        self._below = self._backing.node if self._backing is not None else None

    def holds(self) -> bool:
        """Whether all of that is as it was."""
        node, backing = self.node, self._backing
        return (
            node.children.get("backing") is backing
            and (backing is None or backing.node is self._below)
            and node.data_edge() is self.data
            and self.data.node is self._place
            and node.tracker is self._tracker
        )


def _links(top: Node, base: Node | None) -> list[_Link] | None:
    """The chain, or None where data cannot be read past its images: a filter sees it, or it is not in a file."""
    links: list[_Link] = []
    node: Node | None = top
    while node is not None and node is not base:
        edge = node.data_edge()
        if node.is_filter or node.is_leaf or edge is None or not status.skip_filters(edge.node).is_leaf:
            return None
        links.append(_Link(node, edge))
        below = node.children.get("backing")
        node = below.node if below is not None else None
    return links or None
