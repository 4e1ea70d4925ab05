"""Compressed packing: compressed clusters lie byte after byte, so that many share one host cluster.

A host cluster counts one reference for each compressed cluster that has bytes in it.  The cluster being packed is pinned:
as long as packing may go on in it nobody else gets it, because somebody's bytes in it keep its count up; when its last user
is about to go, packing leaves it first.  Everything here is memory only and runs under the image's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocklib.formats.qcow2.refcounts import Refcounts


class Packing:
    """Where the next compressed cluster goes: host bytes [position, stop), in clusters that are counted already."""

    def __init__(self, refcounts: Refcounts) -> None:
        self._refcounts = refcounts
        self._bits = refcounts.geometry.cluster_bits
        self._position = 0
        self._stop = 0
        self._untouched = 0
        """The first host cluster below `stop` without a compressed byte: its count of one waits for its first user."""

    def place(self, lengths: Sequence[int], host_offsets: list[int]) -> None:
        """Append to `host_offsets` where each of the streams goes that have `lengths` bytes, none above a cluster's.

        Raises MissingTableError: called again with the same lists, it goes on.  ImageLimitError: `take_back` what there is.
        """
        while len(host_offsets) < len(lengths):
            length = lengths[len(host_offsets)]
            if self._position + length > self._stop:
                self._extend(sum(lengths[len(host_offsets) :]))
            elif self._count(self._position, length):
                host_offsets.append(self._position)
                self._position += length

    def _extend(self, length: int) -> None:
        """Get room for `length` bytes, or for some of them: behind the room there is, if that is free."""
        wanted = self._refcounts.geometry.clusters_for(length - (self._stop - self._position))
        first, n = self._refcounts.allocate(wanted, for_data=True)
        if first << self._bits != self._stop:
            # What is left of the old cluster is too small for the next stream, so that no whole cluster is lost.
            self._position = first << self._bits
            self._untouched = first
        self._stop = (first + n) << self._bits

    def _count(self, position: int, length: int) -> bool:
        """Add one reference to each host cluster of a stream; False where the first cannot have another: it was left."""
        refcounts = self._refcounts
        first, last = position >> self._bits, (position + length - 1) >> self._bits
        if first < self._untouched:
            if refcounts.get(first) >= refcounts.geometry.max_refcount:  # may miss a block: nothing is changed yet
                self._leave_cluster()
                return False
            refcounts.add(first, 1)
        self._untouched = max(self._untouched, last + 1)
        return True

    def _leave_cluster(self) -> None:
        """Go on in the first cluster that has nothing in it yet."""
        self._position = min(self._untouched << self._bits, self._stop)

    def before_freeing(self, first: int, n: int) -> None:
        """Host clusters [first, first + n) are about to be nobody's: never pack into them again."""
        cluster = self._position >> self._bits
        if self._position & self._refcounts.geometry.cluster_mask and first <= cluster < first + n:
            self._leave_cluster()

    def leave(self) -> None:
        """Begin in a fresh cluster next time."""
        n = (self._stop >> self._bits) - self._untouched
        if n > 0:
            self._refcounts.release(self._untouched, n)
        self._position = self._stop = self._untouched = 0
