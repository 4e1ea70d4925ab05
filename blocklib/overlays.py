"""External snapshots: a new image put over those of a disk in use, which are not written any more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blocklib import graph
from blocklib.creating import create, opening_options
from blocklib.errors import ReadOnlyError, UsageError
from blocklib.opening import open_disk
from blocklib.policy import PlainPath

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.transactions import DiskTransaction


def add(
    disk: Disk,
    path: str | os.PathLike[str],
    format: str,
    options: Mapping[str, Any],
    overwrite: bool,
    transaction: DiskTransaction | None,
) -> None:
    """What `Disk.add_overlay` says."""
    if disk.mode == "r":
        name = disk.node.filename or disk.node.name
        raise ReadOnlyError(f"{name}: opened for reading; mode 'r+' writes", node=disk.node.name)
    overlay = _Overlay(disk, os.fspath(path), format, options, overwrite)
    if transaction is not None:
        transaction.add(overlay)
        return
    try:
        overlay.prepare()
        with graph.alone(overlay.node):
            overlay.begin()
    except BaseException:
        overlay.abort()
        raise
    overlay.finish()


class _Overlay:
    """One new image over one disk."""

    def __init__(self, disk: Disk, path: str, format: str, options: Mapping[str, Any], overwrite: bool) -> None:
        self.node = disk.node
        self._disk = disk
        self._path = path
        self._format = format
        self._options = options
        self._overwrite = overwrite
        self._claim: graph.Claim | None = None
        self._opened: Disk | None = None
        self._made = False
        self._edge: graph.Edge | None = None

    def prepare(self) -> None:
        """Make the image and open it; nothing is over the disk yet."""
        below = self.node
        self._claim = graph.Claim("snapshot", graph.chain(below))
        if below.filename is None:
            raise UsageError(f"{below.name}: an image without a file cannot be a backing file", node=below.name)
        name = os.path.abspath(below.filename)
        if os.path.dirname(name) == os.path.dirname(os.path.abspath(self._path)):
            name = os.path.basename(name)
        is_new = not os.path.lexists(self._path)
        create(
            PlainPath(self._path),
            below.size,
            format=self._format,
            backing=name,
            backing_format=below.driver,
            overwrite=self._overwrite,
            options=self._options,
        )
        self._made = is_new
        self._opened = open_disk(
            PlainPath(self._path),
            "r+",
            format=self._format,
            backing=None,
            discard="unmap" if below.discard_passes else "ignore",
            detect_zeroes=below.detect_zeroes,
            options=opening_options(self._options),
        )

    def begin(self) -> None:
        """From now on writes go to the overlay.  The disk is drained."""
        assert self._opened is not None
        below, new = self.node, self._opened.node
        below.flush()
        edge = self._disk.image_edge()
        with graph.Transaction() as change:
            self._opened.forget(change)
            change.attach(new, "backing", below)
            change.redirect(edge, new)
            change.reopen(below, read_only=True)
        self._edge = edge

    def undo(self) -> None:
        """As if it had not begun; the disk is still drained."""
        edge, self._edge = self._edge, None
        assert edge is not None
        with graph.Transaction() as change:
            change.redirect(edge, self.node)
            change.reopen(self.node, read_only=False)

    def finish(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def abort(self) -> None:
        """Remove what was made."""
        if self._opened is not None and not self._opened.closed:
            self._opened.close()
        if self._made:
            os.unlink(self._path)
        self.finish()
