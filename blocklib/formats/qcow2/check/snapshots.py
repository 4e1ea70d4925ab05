"""The snapshot table, as far as a check needs it: where the L1 tables of the snapshots are.

Source: section "Snapshots" of ``docs/interop/qcow2.rst``.  A damaged table must not make the clusters of its snapshots look
leaked unnoticed, so whatever cannot be understood is a finding.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.stored import read_bytes
from blocklib.records import Record

if TYPE_CHECKING:
    from blocklib.formats.qcow2.check.findings import Findings
    from blocklib.formats.qcow2.check.stored import ImageFile
    from blocklib.formats.qcow2.header import Header

_ENTRY = struct.Struct(layout.SNAPSHOT_ENTRY_FORMAT)


class SnapshotTables(Record):
    """(host offset, number of entries) -> how many snapshots use that L1 table; and the bytes of the table itself."""

    l1_tables: dict[tuple[int, int], int]
    length: int


def load_snapshot_tables(file: ImageFile, header: Header, cluster_mask: int, findings: Findings) -> SnapshotTables:
    """Where the snapshots' L1 tables are; what is wrong with the snapshot table goes to `findings`."""
    l1_tables: dict[tuple[int, int], int] = {}
    position = header.snapshots_offset
    for index in range(header.nb_snapshots):
        head = read_bytes(file, position, _ENTRY.size)
        l1_offset, l1_size, id_length, name_length, *_, extra_length = _ENTRY.unpack(head.data)
        reason = _why_unreadable(position - header.snapshots_offset, extra_length)
        if reason:
            findings.add("check-error", f"snapshot table entry {index}", position, *reason, repairable=True)
            break
        if header.version >= layout.VERSION_3 and extra_length < layout.SNAPSHOT_V3_EXTRA_LENGTH:
            findings.add(
                "corruption",
                f"snapshot table entry {index}",
                position,
                f"at least {layout.SNAPSHOT_V3_EXTRA_LENGTH} bytes of extra data",
                f"{extra_length} bytes",
                repairable=True,
            )
        place = _why_no_l1_table(l1_offset, l1_size, cluster_mask)
        if place:
            findings.add("corruption", f"snapshot table entry {index}", position, *place)
        else:
            l1_tables[l1_offset, l1_size] = l1_tables.get((l1_offset, l1_size), 0) + 1
        length = _ENTRY.size + extra_length + id_length + name_length
        position += -(-length // layout.SNAPSHOT_ALIGNMENT) * layout.SNAPSHOT_ALIGNMENT
    return SnapshotTables(l1_tables, position - header.snapshots_offset)


def _why_unreadable(length_before: int, extra_length: int) -> tuple[str, str] | None:
    """(expected, found) if reading on would mean following garbage."""
    if extra_length > layout.MAX_SNAPSHOT_EXTRA_BYTES:
        return f"at most {layout.MAX_SNAPSHOT_EXTRA_BYTES} bytes of extra data", f"{extra_length} bytes"
    if length_before > layout.MAX_SNAPSHOT_TABLE_BYTES:
        return f"a table of at most {layout.MAX_SNAPSHOT_TABLE_BYTES} bytes", f"{length_before} bytes before this entry"
    return None


def _why_no_l1_table(l1_offset: int, l1_size: int, cluster_mask: int) -> tuple[str, str] | None:
    """(expected, found) if the L1 table of a snapshot cannot be one."""
    if l1_offset & cluster_mask:
        return "a cluster aligned L1 table", f"an L1 table at {l1_offset:#x}"
    if l1_size * layout.TABLE_ENTRY_LENGTH > layout.MAX_L1_BYTES:
        return f"an L1 table of at most {layout.MAX_L1_BYTES // layout.TABLE_ENTRY_LENGTH} entries", f"{l1_size} entries"
    return None
