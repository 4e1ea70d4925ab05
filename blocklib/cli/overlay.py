"""A temporary overlay: what is written to a disk is kept until the end, and then lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocklib.disk import Disk


def temporary_overlay(base: Disk, *, write: bool = True) -> Disk:
    """A new disk over `base`, which stays the caller's to close, afterwards.  Its file has no name any more, so nothing has to
    be cleaned up."""
    import tempfile

    from blocklib.creating import create
    from blocklib.opening import open_disk

    with tempfile.TemporaryDirectory(prefix="blocklib-") as folder:
        path = f"{folder}/overlay.qcow2"
        create(path, base.size, format="qcow2")
        return open_disk(
            path, "r+" if write else "r", format="qcow2", backing=base, cache="unsafe", discard="unmap"
        )
