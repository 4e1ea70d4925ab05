"""The state of a virtual machine, kept in guest clusters behind the end of the disk; a snapshot keeps it with the disk.

It begins where the last L2 table of the disk ends and has no length of its own: what was never written reads as zero, and
no backing file shows through.  Offsets are bytes from its beginning.  Source: section "Snapshots", field "Size of the VM
state", of ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.buffers import zero_fill
from blocklib.errors import ImageLimitError, UnsupportedFeatureError
from blocklib.extents import KIND_DATA, KIND_SPECIAL
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.resize import lengthen_l1

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import WriteTicket


def first_l1_entry(node: Qcow2Node) -> int:
    """The index of the L1 entry that the VM state begins at."""
    return node.geometry.l1_entries_for(node.size)


def read(node: Qcow2Node, offset: int, view: memoryview) -> None:
    """Fill `view` from `offset` of the VM state."""
    _read(node, (first_l1_entry(node) << node.geometry.l1_shift) + offset, view)


def _read(node: Qcow2Node, position: int, view: memoryview) -> None:
    mapped = max(0, min(len(view), (len(node.mapping.l1) << node.geometry.l1_shift) - position))
    zero_fill(view[mapped:])
    done = 0
    while done < mapped:
        kind, child, child_offset, n, _flags = node.resolve(position + done, mapped - done)
        part = view[done : done + n]
        if kind == KIND_DATA:
            assert child is not None
            child.read(child_offset, part)
        elif kind != KIND_SPECIAL:
            zero_fill(part)
        elif not node.read_special(position + done, part):
            continue
        done += n


def write(node: Qcow2Node, offset: int, data: memoryview) -> None:
    """Write `data` at `offset` of the VM state; the caller is alone (`graph.alone`).

    Raises ImageLimitError where the L1 table would grow too large, UnsupportedFeatureError with a data file.
    """
    node.check_usable()
    node.check_writable()
    if node.header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE:
        raise UnsupportedFeatureError(
            f"{node.filename}: an image with an external data file holds no VM state",
            features=("VM state", "external data file"),
            node=node.filename,
        )
    if not data:
        return
    start = (first_l1_entry(node) << node.geometry.l1_shift) + offset
    _reach(node, start + len(data))
    done = 0
    while done < len(data):
        position = start + done
        child, child_offset, n, ticket = node.prepare_write(position, len(data) - done)
        part = data[done : done + n]
        if ticket is None:
            if child is None:
                node.write_special(position, child_offset, (part,))
            else:
                child.write(child_offset, (part,))
        else:
            try:
                views = _with_surroundings(node, position, part, ticket)
                if child is None:
                    node.write_special(position - ticket.head, child_offset - ticket.head, views)
                else:
                    child.write(child_offset - ticket.head, views)
            except BaseException:
                ticket.abort()
                raise
            ticket.commit()
        done += n


def _with_surroundings(node: Qcow2Node, position: int, part: memoryview, ticket: WriteTicket) -> list[memoryview]:
    head, tail = memoryview(bytearray(ticket.head)), memoryview(bytearray(ticket.tail))
    _read(node, position - ticket.head, head)
    _read(node, position + len(part), tail)
    return [head, part, tail]


def _reach(node: Qcow2Node, end: int) -> None:
    """Have L1 entries up to guest offset `end`, which the header knows of."""
    entries = node.geometry.l1_entries_for(end)
    if entries * layout.TABLE_ENTRY_LENGTH > node.limits.l1_bytes:
        raise ImageLimitError(
            f"{node.filename}: VM state up to there needs an L1 table of {entries} entries",
            structure="L1 table",
            expected=f"at most {node.limits.l1_bytes} bytes",
            found=str(entries * layout.TABLE_ENTRY_LENGTH),
            node=node.filename,
        )
    if entries > node.header.l1_size:
        lengthen_l1(node, entries, used=True)
