"""Repairing bitmaps and autoclear bits: what cannot be used, or does not say the truth any more, is taken out of the header.

A bitmap only says what to copy again.  One that is broken is worth nothing, and keeps QEMU from opening the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.bitmap_directory import pack_directory, pack_extension
from blocklib.records import replace
from blocklib.reports import RepairStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.repair.draft import Draft


def remove_broken_bitmaps(draft: Draft, scan: Scan) -> Iterator[RepairStep]:
    """Keep the bitmaps that can be read: the others leave the directory, or all go where it has no sound entries."""
    bitmaps, header = scan.bitmaps, draft.header
    if not bitmaps.unreadable and not bitmaps.broken:
        return
    kept = bitmaps.sound if bitmaps.unreadable else bitmaps.unbroken
    if not kept or bitmaps.extension is None:
        yield _remove_extension(draft, "bitmaps that cannot be read")
        header.autoclear_features &= ~layout.AUTOCLEAR_BITMAPS
        return
    directory = pack_directory(kept)
    draft.moved += scan.clusters_of("bitmap directory")
    offset = draft.put(scan, directory)
    n_bitmaps = bitmaps.extension.n_bitmaps
    before = f"{n_bitmaps} bitmaps, {n_bitmaps - len(kept)} of them cannot be read"
    extension = replace(bitmaps.extension, n_bitmaps=len(kept), directory_length=len(directory), directory_offset=offset)
    header.set_extension(layout.EXTENSION_BITMAPS, pack_extension(extension))
    yield RepairStep("remove bitmaps", "bitmap directory", offset, before, f"{len(kept)} bitmaps")


def clear_autoclear(draft: Draft) -> Iterator[RepairStep]:
    """Clear the bits of features that the image does not have or we do not know, and drop bitmaps that are out of date."""
    header = draft.header
    if header.version < layout.VERSION_3:
        return
    kept = layout.AUTOCLEAR_BITMAPS
    if header.incompatible_features & layout.INCOMPATIBLE_DATA_FILE:
        kept |= layout.AUTOCLEAR_RAW_EXTERNAL
    cleared = header.autoclear_features & ~kept
    if cleared:
        before, after = f"{header.autoclear_features:#x}", f"{header.autoclear_features & kept:#x}"
        header.autoclear_features &= kept
        place = layout.FIELD_OFFSETS["autoclear_features"]
        yield RepairStep("clear autoclear bits", "header", place, before, after)
    stale = header.extension(layout.EXTENSION_BITMAPS) is not None
    if stale and not header.autoclear_features & layout.AUTOCLEAR_BITMAPS:
        yield _remove_extension(draft, "bitmaps that another program did not keep up to date")


def _remove_extension(draft: Draft, before: str) -> RepairStep:
    draft.header.set_extension(layout.EXTENSION_BITMAPS, None)
    return RepairStep("remove bitmaps", "bitmaps extension", None, before, "no bitmaps")
