"""Tables that are used more often than an image has room for: what would make a small file an endless one.

Each L2 table of a disk takes a cluster of the file, and so does each refcount block.  A table that leads to more of them names
some again and again; whoever walks it would work for its entries, of which there may be millions, and not for the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.errors import ImageCorruptError
from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.tables import Table


def refuse_shared_l2_tables(
    l1: Table, geometry: Geometry, file_size: int, *, structure: str, host_offset: int, node: str | None
) -> None:
    """Raises ImageCorruptError for an L1 table that leads to more L2 tables in the file than the file has clusters."""
    _refuse(l1, layout.OFFSET_MASK, "L2 tables", geometry, file_size, structure, host_offset, node)


def refuse_shared_refcount_blocks(
    table: Table, geometry: Geometry, file_size: int, *, host_offset: int, node: str | None
) -> None:
    """Raises ImageCorruptError for a refcount table that leads to more blocks in the file than the file has clusters."""
    mask = layout.REFCOUNT_TABLE_OFFSET_MASK
    _refuse(table, mask, "refcount blocks", geometry, file_size, "refcount table", host_offset, node)


def _refuse(
    table: Table,
    mask: int,
    what: str,
    geometry: Geometry,
    file_size: int,
    structure: str,
    host_offset: int,
    node: str | None,
) -> None:
    """What leads past the end of the file is not counted: a file that was cut off can be read as far as it goes."""
    room = geometry.clusters_for(file_size)
    if len(table) <= room or len(table) - table.count(0) <= room:
        return
    from blocklib.formats.qcow2.tables import numpy_view

    offsets = numpy_view(table) & mask
    found = int(((offsets != 0) & (offsets < file_size)).sum())
    if found > room:
        raise ImageCorruptError(
            f"{node}: the {structure} leads to {found} {what}, and the file has only {room} clusters",
            structure=structure,
            host_offset=host_offset,
            expected=f"at most {room} {what}, a cluster for each",
            found=str(found),
            node=node,
        )
