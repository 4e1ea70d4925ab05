"""The extent vocabulary: one run of a node, one extent of a disk, and tables of both.

A *run* is what a driver answers when asked where a range lives: a plain tuple
``(kind, child, child_offset, length, flags)``, because a request makes one and a tuple is ten times cheaper than a class.

- ``kind`` says how to read it: KIND_DATA (in `child` at `child_offset`), KIND_ZERO, KIND_BACKING (ask the backing node),
  KIND_SPECIAL (only the node itself can decode it).
- ``flags`` say what to report, in QEMU's words (``BDRV_BLOCK_*``): see the constants below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from blocklib.graph import Edge
    from blocklib.node import Node

KIND_DATA: Final = 0
KIND_ZERO: Final = 1
KIND_BACKING: Final = 2
KIND_SPECIAL: Final = 3

FLAG_DATA: Final = 0x01
"""The bytes come from storage."""
FLAG_ZERO: Final = 0x02
"""The bytes read as zero."""
FLAG_ALLOCATED: Final = 0x04
"""This layer determines the content, not its backing node."""
FLAG_OFFSET_VALID: Final = 0x08
"""`child_offset` is where a plain read of the child finds the bytes."""
FLAG_COMPRESSED: Final = 0x10
"""The bytes are stored compressed."""
FLAG_EOF: Final = 0x20
"""The run ends where the node (a short backing file, a short protocol file) ends."""
FLAG_RECURSE: Final = 0x40
"""Allocated here, but perhaps a hole in the child: ask it whether the range is zero."""
FLAG_RAW: Final = 0x80
"""The node only passes the range on: its status is the child's."""

Run: TypeAlias = "tuple[int, Edge | None, int, int, int]"
"""(kind, child, child offset in bytes, length in bytes, flags)."""

Status: TypeAlias = "tuple[int, int, int, int, Node | None]"
"""(length in bytes, flags, depth, host offset in bytes or -1, protocol node that `host offset` is in)."""


class Extent(NamedTuple):
    """One range of a disk and where it lives; the words are those of ``qemu-img map``.

    `offset` is a guest offset, `host_offset` one in the file of the image at `depth` of ``disk.chain()`` or None where
    there is no plain place; all numbers are bytes.
    """

    offset: int
    length: int
    depth: int
    host_offset: int | None
    data: bool
    zero: bool
    present: bool
    compressed: bool


_TABLES: dict[str, list[tuple[str, str]]] = {
    # One row an extent; host_offset is -1 where there is none.
    "EXTENT_DTYPE": [
        ("offset", "i8"),
        ("length", "i8"),
        ("depth", "i4"),
        ("host_offset", "i8"),
        ("data", "?"),
        ("zero", "?"),
        ("present", "?"),
        ("compressed", "?"),
    ],
    # One row a dirty or otherwise marked range.
    "RANGE_DTYPE": [("offset", "i8"), ("length", "i8")],
}

if TYPE_CHECKING:
    EXTENT_DTYPE: np.dtype[np.void]
    RANGE_DTYPE: np.dtype[np.void]

    ExtentTable: TypeAlias = NDArray[np.void]
    RangeTable: TypeAlias = NDArray[np.void]


def __getattr__(name: str) -> Any:
    # The dtypes are made on first use, so that importing the vocabulary does not import numpy.
    if name not in _TABLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import numpy as np

    globals()[name] = dtype = np.dtype(_TABLES[name])
    return dtype
