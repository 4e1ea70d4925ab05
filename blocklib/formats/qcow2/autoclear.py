"""Autoclear features: what whoever writes the image without knowing them must clear.

Source: field "autoclear_features" of section "Header" in ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.formats.qcow2 import data_file, header_change, layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node


def clear_what_is_not_kept_up(node: Qcow2Node) -> None:
    """Clear the bits of what this driver does not keep up, and drop bitmaps that somebody else has not kept up, durably."""
    header = node.header
    kept = layout.AUTOCLEAR_RAW_EXTERNAL if data_file.is_external(header) else 0
    if header.has_bitmaps:
        kept |= layout.AUTOCLEAR_BITMAPS
    lost = not header.has_bitmaps and header.extension(layout.EXTENSION_BITMAPS) is not None
    if not (header.autoclear_features & ~kept or lost):
        return
    header.autoclear_features &= kept
    if lost:
        # As QEMU does.  Their clusters are leaked: nobody knows whether they are still theirs.
        header.set_extension(layout.EXTENSION_BITMAPS, None)
    header_change.switch(node)
