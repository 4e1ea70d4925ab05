"""The persistent bitmaps of an image, as far as a check needs them: directory, tables and data are counted and judged.

A bitmap that cannot be followed is a finding; which ones those are, a repair wants to know.  Source: sections "Bitmaps
extension", "Bitmap directory" and "Bitmap table" of ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blocklib.errors import ImageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.bitmap_directory import (
    BitmapsExtension,
    DirectoryEntry,
    parse_directory,
    parse_extension,
    sound_entries,
)
from blocklib.formats.qcow2.check.stored import read_bytes, read_entries
from blocklib.policy import Limits
from blocklib.reports import Finding

if TYPE_CHECKING:
    from blocklib.formats.qcow2.check.scan import Scan


class BitmapScan:
    """Counts the clusters of the bitmaps of an image while it is made; afterwards knows which are broken."""

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self.extension: BitmapsExtension | None = None
        self.entries: list[DirectoryEntry] = []
        self.broken: set[int] = set()
        """Indices of `entries` whose table or data cannot be."""
        self.unreadable = False
        """There are bitmaps, but no directory of them that can be used."""
        self.sound: list[DirectoryEntry] = []
        """The entries of one that cannot, as far as each of them could."""
        self.n_findings = 0
        self._budget = scan.file_size
        """Bytes of tables that are read: those of honest bitmaps lie side by side in the file."""
        before = scan.findings.totals["corruption"]
        header = scan.header
        data = header.extension(layout.EXTENSION_BITMAPS)
        if data is None or not header.autoclear_features & layout.AUTOCLEAR_BITMAPS:
            return  # 'the bitmaps extension data is considered inconsistent': what it refers to is unused
        try:
            self._load(data)
        except ImageError as error:
            self.unreadable = True
            self.entries = []
            structure, found = error.structure or "bitmap directory", str(error.found)
            scan.findings.add("corruption", structure, error.host_offset, str(error.expected), found, repairable=True)
        for index, entry in enumerate(self.entries):
            if not self._count(index, entry):
                self.broken.add(index)
        self.n_findings = scan.findings.totals["corruption"] - before

    @property
    def unbroken(self) -> list[DirectoryEntry]:
        return [entry for index, entry in enumerate(self.entries) if index not in self.broken]

    def _load(self, data: bytes) -> None:
        scan = self._scan
        extension = parse_extension(data, scan.geometry, Limits(bitmaps=layout.MAX_BITMAPS))
        self.extension = extension
        directory = read_bytes(scan.file, extension.directory_offset, extension.directory_length)
        try:
            self.entries = parse_directory(directory.data, extension, scan.geometry, size=scan.header.size)
        except ImageError:
            self.sound = sound_entries(directory.data, extension, scan.geometry, size=scan.header.size)
            raise
        structure = "bitmap directory"
        scan.count_region(structure, extension.directory_offset, extension.directory_length, role=structure)

    def _count(self, index: int, entry: DirectoryEntry) -> bool:
        """Count the table and the data of one bitmap; False if it is broken."""
        scan, cluster_size = self._scan, self._scan.geometry.cluster_size
        structure = f"table of bitmap {index}"
        self._budget -= max(0, min(entry.table_length, scan.file_size - entry.table_offset))
        if self._budget < 0:
            found = "more bytes of them than the file has"
            scan.findings.add("corruption", "bitmap tables", None, "tables that do not overlap", found, repairable=True)
            return False
        if not scan.count_region(structure, entry.table_offset, entry.table_length, role="bitmap table", repairable=True):
            return False
        table = read_entries(scan.file, entry.table_offset, entry.table_entries)
        if not table.any():
            return True
        offsets = table & np.uint64(layout.OFFSET_MASK)
        wrong = (table & np.uint64(layout.BITMAP_TABLE_RESERVED_MASK)) != 0
        wrong |= (offsets & np.uint64(cluster_size - 1)) != 0
        wrong |= (offsets != 0) & ((table & np.uint64(layout.BITMAP_TABLE_ALL_ONES)) != 0)
        beyond = scan.beyond(offsets) & ~wrong
        used = np.flatnonzero((offsets != 0) & ~wrong & ~beyond)
        clusters = offsets[used] >> np.uint64(scan.geometry.cluster_bits)
        scan.add(clusters.astype(np.intp))
        scan.set_role("bitmap data", clusters, np.ones(used.size, dtype=np.uint64))
        damaged = np.flatnonzero(wrong | beyond)

        def describe(place: int) -> Finding:
            host_offset, found = entry.table_offset + place * layout.TABLE_ENTRY_LENGTH, f"{int(table[place]):#x}"
            expected = "the cluster aligned offset of bitmap data in the file, 0 or 1"
            return Finding("corruption", f"entry of the {structure}", host_offset, expected, found)

        scan.findings.add_each("corruption", damaged, describe, times=damaged.size, repairable=True)
        return not damaged.size
