"""Repairing the snapshot table: entries that are incomplete, too long or nothing but zeroes.

Source: section "Snapshots" of ``docs/interop/qcow2.rst``; which entries count as damaged is ``qemu-img check``'s judgement.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check_stored import read_bytes
from blocklib.reports import RepairStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklib.formats.qcow2.check_scan import Scan
    from blocklib.formats.qcow2.repair_draft import Draft

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
            _, _, id_length, name_length, *_, vm_state_size, extra_length = _ENTRY.unpack(head)
            names = read_bytes(self._draft, position + _ENTRY.size + extra_length, id_length + name_length).tobytes()
            kept = min(extra_length, layout.MAX_SNAPSHOT_EXTRA_BYTES)
            extra = read_bytes(self._draft, position + _ENTRY.size, kept).tobytes()
            length = _ENTRY.size + extra_length + id_length + name_length
            position += -(-length // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT
            if not any(head):
                self.n_fixed += 1
                continue
            if kept < extra_length:
                self.n_fixed += 1
                extra = extra[: layout.SNAPSHOT_EXTRA_LENGTH]
            if header.version >= layout.VERSION_3 and len(extra) < layout.SNAPSHOT_V3_EXTRA_LENGTH:
                self.n_fixed += 1
                known = extra[: len(extra) // 8 * 8]
                extra = known + _SIZES.pack(vm_state_size, header.size)[len(known) :]
            head[layout.SNAPSHOT_ENTRY_LENGTH - 4 :] = len(extra).to_bytes(4, "big")
            entry = bytes(head) + extra + names
            self._entries.append(entry.ljust(-(-len(entry) // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT, b"\0"))

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
