"""The image file as a repair would leave it: changes are laid over it in memory, and reach the disk later, in a safe order.

A repair is planned on a draft to its end, checks included, before the first byte of the file is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from blocklib.formats.qcow2.header_write import HeaderWrite, plan_rewrite
from blocklib.records import replace

if TYPE_CHECKING:
    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.check.stored import ImageFile
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header

NEW, COUNTS_UP, ENTRIES, COUNTS_DOWN = range(4)
"""The phases of a repair: clusters that nothing refers to yet, higher counts, [the header,] table entries, lower counts."""

_PAGE_BITS: Final = 12
_PAGE: Final = 1 << _PAGE_BITS


class Draft:
    """An image file to read from, as it will be; `header` is the new header, which becomes bytes at the end.

    `writes[phase]` are the (host offset, bytes) to be written in that phase.
    """

    def __init__(self, file: ImageFile, header: Header, geometry: Geometry) -> None:
        self._file = file
        self._old_header = header
        self.header = replace(header, extensions=list(header.extensions))
        self.geometry = geometry
        self.size = file.size
        self.writes: list[list[tuple[int, bytes]]] = [[], [], [], []]
        self.moved: list[int] = []
        """Host clusters of structures that were moved, the old and the new ones."""
        self._pages: dict[int, bytearray] = {}

    @property
    def changes_header(self) -> bool:
        return self.header != self._old_header

    @property
    def is_unchanged(self) -> bool:
        return not (any(self.writes) or self.changes_header)

    def read(self, offset: int, view: memoryview, /) -> None:
        self._file.read(offset, view)
        if not self._pages:
            return
        end = offset + len(view)
        for number in range(offset >> _PAGE_BITS, ((end - 1) >> _PAGE_BITS) + 1):
            page = self._pages.get(number)
            if page is not None:
                start = number << _PAGE_BITS
                low, high = max(offset, start), min(end, start + _PAGE)
                view[low - offset : high - offset] = page[low - start : high - start]

    def write(self, phase: int, offset: int, data: bytes) -> None:
        self.writes[phase].append((offset, data))
        self.size = max(self.size, offset + len(data))
        self._lay(offset, data)

    def header_change(self) -> HeaderWrite:
        """What brings the new header to the disk; reads of the draft see it from now on."""
        on_disk = bytearray(min(self.geometry.cluster_size, self._file.size))
        self._file.read(0, memoryview(on_disk))
        change = plan_rewrite(self.header, bytes(on_disk))
        for offset, data in ((0, change.first), *change.rest):
            self._lay(offset, data)
        return change

    def _lay(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        for number in range(offset >> _PAGE_BITS, ((end - 1) >> _PAGE_BITS) + 1):
            page, start = self._page(number), number << _PAGE_BITS
            low, high = max(offset, start), min(end, start + _PAGE)
            page[low - start : high - start] = data[low - offset : high - offset]

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(_PAGE)
            self._file.read(number << _PAGE_BITS, memoryview(page))
        return page

    # -- room ----------------------------------------------------------------------------------------------------------

    def room_for(self, scan: Scan, n_clusters: int) -> int:
        """The first of `n_clusters` adjacent host clusters behind everything, where no damaged entry points.

        Nothing inside the file is taken: what looks free there may be what a damaged entry meant.
        """
        start = max(scan.end, self.geometry.clusters_for(self.size))
        avoided = scan.clusters_beyond
        avoided = avoided[np.searchsorted(avoided, np.uint64(start)) :]
        for cluster in map(int, avoided):  # seldom far
            if cluster >= start + n_clusters:
                break
            start = cluster + 1
        return start

    def put(self, scan: Scan, data: bytes) -> int:
        """Place a new structure; the host offset where it goes, in whole clusters of its own."""
        n_clusters = self.geometry.clusters_for(len(data))
        first = self.room_for(scan, n_clusters)
        self.moved += range(first, first + n_clusters)
        offset = first << self.geometry.cluster_bits
        self.write(NEW, offset, data.ljust(n_clusters << self.geometry.cluster_bits, b"\0"))
        return offset
