"""What ``info`` says of a qcow2 image beyond what every format has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node


def info_facts(node: Qcow2Node) -> Mapping[str, Any]:
    """Fields of ImageInfo."""
    return {
        "encrypted": node.header.crypt_method != layout.CRYPT_NONE,
        "dirty": bool(node.header.incompatible_features & layout.INCOMPATIBLE_DIRTY),
        "snapshots": tuple(node.list_snapshots()),
    }


def format_specific(node: Qcow2Node) -> Mapping[str, Any]:
    """``ImageInfoSpecificQCow2`` of QEMU's QAPI schema, in its order."""
    header = node.header
    data: dict[str, Any] = {"compat": "0.10" if header.version == layout.VERSION_2 else "1.1"}
    data["compression-type"] = layout.COMPRESSION_NAMES[header.compression_type]
    if header.version == layout.VERSION_2:
        data["refcount-bits"] = 16
        _add_encryption(node, data)
        return data
    data["lazy-refcounts"] = bool(header.compatible_features & layout.COMPATIBLE_LAZY_REFCOUNTS)
    if header.has_bitmaps or node.bitmaps is not None:
        from blocklib.formats.qcow2.bitmaps import described

        bitmaps = described(node)
        if bitmaps:
            data["bitmaps"] = bitmaps
    data["refcount-bits"] = 1 << header.refcount_order
    if header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE:
        if header.data_file_name is not None:
            data["data-file"] = header.data_file_name
        data["data-file-raw"] = bool(header.autoclear_features & layout.AUTOCLEAR_RAW_EXTERNAL)
    _add_encryption(node, data)
    data["corrupt"] = bool(header.incompatible_features & layout.INCOMPATIBLE_CORRUPT)
    data["extended-l2"] = bool(header.incompatible_features & layout.INCOMPATIBLE_EXTENDED_L2)
    return data


def _add_encryption(node: Qcow2Node, data: dict[str, Any]) -> None:
    if node.header.crypt_method != layout.CRYPT_NONE:
        from blocklib.formats.qcow2.encryption import facts

        data["encrypt"] = facts(node)
