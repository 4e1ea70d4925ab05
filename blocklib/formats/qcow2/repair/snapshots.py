"""Repairing the snapshot table: entries that are incomplete, too long or nothing but zeroes.

A length of extra data that cannot be would cost an entry its names, and hide all entries behind it: it is guessed anew.

Source: section "Snapshots" of ``docs/interop/qcow2.rst``; which entries count as damaged is ``qemu-img check``'s judgement.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.stored import read_bytes
from blocklib.reports import RepairStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.repair.draft import Draft

_ENTRY: Final = struct.Struct(layout.SNAPSHOT_ENTRY_FORMAT)
_SIZES: Final = struct.Struct(">QQ")
"""The extra data that a version 3 image must have: VM state size, virtual disk size."""


class SnapshotRepair:
    """A snapshot table as it should be."""

    def __init__(self, draft: Draft, scan: Scan) -> None:
        self._draft = draft
        self._scan = scan
        self.n_fixed = 0
        self._entries: list[bytes] = []
        self._load()

    def _load(self) -> None:
        header = self._draft.header
        position = header.snapshots_offset
        for index in range(header.nb_snapshots):
            if position - header.snapshots_offset > layout.MAX_SNAPSHOT_TABLE_BYTES:
                self.n_fixed += header.nb_snapshots - index
                break
            head = bytearray(read_bytes(self._draft, position, _ENTRY.size))
            _, _, id_length, name_length, *_, vm_state_size, stated = _ENTRY.unpack(head)
            is_last = index + 1 == header.nb_snapshots
            extra_length = self._likely_extra_length(position, id_length + name_length, stated, is_last=is_last)
            names = read_bytes(self._draft, position + _ENTRY.size + extra_length, id_length + name_length).tobytes()
            kept = min(extra_length, layout.MAX_SNAPSHOT_EXTRA_BYTES)
            extra = read_bytes(self._draft, position + _ENTRY.size, kept).tobytes()
            length = _ENTRY.size + extra_length + id_length + name_length
            position += -(-length // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT
            if not any(head):
                self.n_fixed += 1
                continue
            if kept < stated:
                self.n_fixed += 1
                extra = extra[: layout.SNAPSHOT_EXTRA_LENGTH]
            if header.version >= layout.VERSION_3 and len(extra) < layout.SNAPSHOT_V3_EXTRA_LENGTH:
                self.n_fixed += 1
                known = extra[: len(extra) // 8 * 8]
                extra = known + _SIZES.pack(vm_state_size, header.size)[len(known) :]
            head[layout.SNAPSHOT_ENTRY_LENGTH - 4 :] = len(extra).to_bytes(4, "big")
            entry = bytes(head) + extra + names
            self._entries.append(entry.ljust(-(-len(entry) // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT, b"\0"))

    def _likely_extra_length(self, position: int, names_length: int, stated: int, *, is_last: bool) -> int:
        """The length of the extra data of the entry at `position`, if what it states cannot be: one with which the entry ends
        in its names and the next one begins; or else what it states."""
        if stated <= layout.MAX_SNAPSHOT_EXTRA_BYTES:
            return stated
        for length in (layout.SNAPSHOT_EXTRA_LENGTH, layout.SNAPSHOT_V3_EXTRA_LENGTH, 0):
            end = _ENTRY.size + length + names_length
            padded = -(-end // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT
            entry = read_bytes(self._draft, position, padded).tobytes()
            if 0 in entry[end - names_length : end] or any(entry[end:]):
                continue
            if is_last or self._may_begin_at(position + padded):
                return length
        return stated

    def _may_begin_at(self, position: int) -> bool:
        head = read_bytes(self._draft, position, _ENTRY.size)
        l1_offset, l1_size, id_length, *_, extra_length = _ENTRY.unpack(head.data)
        is_inside = 0 < l1_offset <= self._draft.size - l1_size * layout.TABLE_ENTRY_LENGTH
        is_aligned = not l1_offset & self._draft.geometry.cluster_mask
        return bool(is_inside and is_aligned and id_length and extra_length <= layout.MAX_SNAPSHOT_EXTRA_BYTES)

    def apply(self) -> Iterator[RepairStep]:
        """Put the table into the draft if it differs from the one there is."""
        if not self.n_fixed:
            return
        header = self._draft.header
        old = f"{header.nb_snapshots} snapshots at {header.snapshots_offset:#x}, {self.n_fixed} entries damaged"
        self._draft.moved += self._scan.clusters_of("snapshot table")
        header.nb_snapshots = len(self._entries)
        header.snapshots_offset = self._draft.put(self._scan, b"".join(self._entries)) if self._entries else 0
        new = f"{header.nb_snapshots} snapshots at {header.snapshots_offset:#x}"
        place = layout.FIELD_OFFSETS["snapshots_offset"]
        yield RepairStep("rewrite snapshot table", "snapshot table", place, old, new)
