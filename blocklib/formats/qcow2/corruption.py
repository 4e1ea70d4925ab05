"""What happens when an image turns out to be corrupt while it is written: the corrupt bit, and no write after that.

Sources: section "Header" (incompatible feature bit 1) of ``docs/interop/qcow2.rst``; what counts as such was seen with QEMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklib.errors import BlocklibError, ImageCorruptError
from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_HARMLESS: Final = ("compressed cluster descriptor", "compressed cluster")
"""Nothing is ever written to where these point: they spoil the requests that need them, and no others [seen]."""


def change_features(node: Qcow2Node, *, add: int = 0, remove: int = 0) -> None:
    """Set and clear incompatible feature bits, durably: eight bytes of the first sector.  A version 2 image has none.

    Raises StorageError.
    """
    header = node.header
    with node.writeback.structure:
        features = header.incompatible_features & ~remove | add
        if header.version == layout.VERSION_2 or features == header.incompatible_features:
            return
        node.file.write(layout.FIELD_OFFSETS["incompatible_features"], (features.to_bytes(8, "big"),), "metadata")
        header.incompatible_features = node.stored_header.incompatible_features = features
        node.writeback.barrier()


def mark_corrupt(node: Qcow2Node, error: ImageCorruptError) -> None:
    """`error` was met on the way to a write: say so in the header, and refuse every write from now on.

    Reading goes on.  What had not been flushed stays unwritten, since what it relies on cannot be relied on.
    """
    if node.read_only or node.corruption is not None or error.structure in _HARMLESS:
        return
    node.corruption = str(error)
    node.guard.distrust()  # the way past all checks is closed
    try:
        change_features(node, add=layout.INCOMPATIBLE_CORRUPT)
    except BlocklibError as failure:
        error.add_note(f"the image could not be marked corrupt: {failure}")


def refuse_corrupt(node: Qcow2Node) -> None:
    """Raises ImageCorruptError once corruption was met."""
    if node.corruption is not None:
        raise ImageCorruptError(
            f"{node.filename or node.name}: nothing more is written to a corrupt image: {node.corruption}",
            structure="image",
            expected="an image without corruption",
            found=node.corruption,
            node=node.filename,
        )
