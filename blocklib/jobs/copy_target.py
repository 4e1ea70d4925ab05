"""The ends of mirror and backup: what they copy to, and what of the disk they begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from blocklib import graph, status
from blocklib.copy import CopyState
from blocklib.disk import Disk
from blocklib.errors import BlocklibError, GraphConflictError, NameNotFoundError, ReadOnlyError, UsageError
from blocklib.jobs.convert import NewImage
from blocklib.jobs.ends import same_file
from blocklib.opening import open_disk

if TYPE_CHECKING:
    from blocklib.bitmaps import Bitmap
    from blocklib.dirty_bits import DirtyBits
    from blocklib.node import Node
    from blocklib.options import OptionValue
    from blocklib.policy import Target

Sync: TypeAlias = Literal["full", "top", "none", "incremental", "bitmap"]
BitmapMode: TypeAlias = Literal["on-success", "never", "always"]

_URL = "://"


class CopyTarget:
    """What a disk is copied to: an image that is made and opened here, one that is there, or the caller's Disk."""

    def __init__(
        self,
        disk: Disk,
        target: Disk | Target,
        sync: Sync,
        format: str | None,
        options: Mapping[str, OptionValue],
        *,
        existing: bool,
        overwrite: bool,
        backing: str | os.PathLike[str] | None = None,
        backing_format: str | None = None,
        compress: Literal["zlib", "zstd"] | None = None,
        replaces: str | None = None,
    ) -> None:
        self._source = disk
        self._replaces = replaces
        self._replaced()  # raises where there is no such node
        self._target = target
        self._sync = sync
        self._format = format
        self._new: NewImage | None = None
        self._opened: Disk | None = None
        if isinstance(target, Disk):
            if target.mode == "r":
                raise ReadOnlyError("the target was opened for reading; mode 'r+' writes", node=target.node.name)
            if target.node is disk.node:
                raise GraphConflictError("a disk is not copied onto itself", other=disk.node.name)
        if existing or not isinstance(target, (str, os.PathLike)) or (isinstance(target, str) and _URL in target):
            if options or overwrite or backing is not None or compress is not None:
                raise UsageError("options, overwrite, backing and compress are for a target that is created")
            return
        if same_file(os.fspath(target), disk.node.filename):
            raise GraphConflictError("a disk is not copied onto itself", other=disk.node.name)
        if backing is None and sync in ("top", "none"):
            backing, backing_format = self._backing()
        self._new = NewImage(
            target,
            format,
            options,
            backing=backing,
            backing_format=backing_format,
            overwrite=overwrite,
            references="deny",
            cache="writeback",
            compress=compress,
        )

    def _backing(self) -> tuple[str | None, str | None]:
        """What lies below the copy: for "top" what lies below the top image, for "none" that itself."""
        chain = self._source.chain()
        if self._sync == "top" and len(chain) == 1:
            return None, None
        below = chain[1 if self._sync == "top" else 0]
        if below.filename is None:
            raise UsageError(f"{below.name}: an image without a file cannot be a backing file", node=below.name)
        return os.path.abspath(below.filename), below.driver

    @property
    def is_zero(self) -> bool:
        """Whether the target is new and reads as zero everywhere."""
        return self._new is not None and self._new.is_zero

    @property
    def has_backing(self) -> bool:
        """Whether something that is not open shows through the copy, now or when a disk has become it."""
        if self._opened is not None and self._opened.node.names_backing:
            return True
        return self._sync in ("top", "none") and (self._new is None or self._new.backing is not None)

    def open(self, size: int) -> Disk:
        """The target, made if need be, for `size` bytes."""
        if isinstance(self._target, Disk):
            return self._target
        if self._new is None:
            self._opened = open_disk(self._target, "r+", format=self._format, backing=None, discard="unmap")
        else:
            self._opened = self._new.make(size, with_backing=False)
        return self._opened

    def close(self) -> None:
        """Close what was opened here, unless a disk has become it."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()

    def keeps_what_it_has(self) -> bool:
        """Whether what was copied so far stays although the job has failed: nobody removes it, and it is durable."""
        target = self._opened if self._opened is not None else self._target
        if not isinstance(target, Disk) or (self._new is not None and self._new.is_removed_after_failure):
            return False
        try:
            target.flush()
        except BlocklibError:  # the job has failed already, and says why
            return False
        return True

    def remove(self) -> None:
        """Remove what was made here."""
        if self._new is not None:
            self._new.remove()

    def _replaced(self) -> Node:
        """The node whose place the copy takes.  Raises NameNotFoundError, UsageError."""
        top = self._source.node
        if self._replaces is None:
            return top
        for node in _showing(top):
            if node.name == self._replaces:
                return node
        name = top.filename or top.name
        if any(node.name == self._replaces for node in graph.chain(top)):
            raise UsageError(f"{self._replaces!r} lies below {name} and does not show what that shows", node=self._replaces)
        raise NameNotFoundError(f"{name} is not shown by a node with the name {self._replaces!r}", node=name)

    def become(self, filter: Node) -> None:
        """Let all users of the copied disk, who reach it through `filter`, use the copy.  The graph is drained."""
        replaced = self._replaced()
        target = self._opened if self._opened is not None else self._target
        assert isinstance(target, Disk)
        node = target.node
        old = status.skip_filters(filter)
        with graph.Transaction() as change:
            if target is self._opened:
                target.forget(change)
            else:
                graph.Loan(target.root, change)  # for good
            below = old.children["backing"].node if self._sync == "top" and "backing" in old.children else None
            if self._sync == "none":
                below = old
                change.reopen(old, read_only=True)
            if below is not None and "backing" not in node.children:
                change.attach(node, "backing", below)
            for edge in tuple((filter if replaced is old else replaced).parents):
                change.redirect(edge, node)
            # What is closed now may fail, but the disk is the copy all the same.
            change.when_done(self._keep)

    def _keep(self) -> None:
        self._opened = self._new = None


def _showing(image: Node) -> Iterator[Node]:
    """The nodes that show what an image shows: that, and the filters above it."""
    yield image
    for edge in image.parents:
        if edge.parent is not None and edge.parent.is_filter:
            yield from _showing(edge.parent)


class Marks:
    """What a job begins with: everything, what the top image holds, nothing, or what a bitmap marks."""

    def __init__(self, disk: Disk, sync: Sync, bitmap: str | None, mode: BitmapMode | None) -> None:
        self._disk = disk
        self._sync = sync
        self._bitmap: Bitmap | None = None
        self._mode: BitmapMode = "on-success"
        self._bits: DirtyBits | None = None
        self._target: CopyTarget | None = None
        if sync not in ("incremental", "bitmap"):
            if bitmap is not None or mode is not None:
                raise UsageError(f"sync={sync} uses no bitmap")
            return
        if bitmap is None:
            raise UsageError(f"sync={sync} needs a bitmap")
        if sync == "incremental":
            if mode not in (None, "on-success"):
                raise UsageError("sync=incremental has bitmap_mode 'on-success'")
        elif mode is None:
            raise UsageError("sync=bitmap needs bitmap_mode")
        if mode not in (None, "on-success", "never", "always"):
            raise UsageError(f"bitmap_mode is 'on-success', 'never' or 'always', not {mode!r}")
        self._mode = mode or "on-success"
        self._bitmap = disk.bitmaps[bitmap]
        if self._bitmap.busy:
            raise GraphConflictError(f"the bitmap {bitmap!r} is in use by another job", other=bitmap)

    def copied_to(self, target: CopyTarget) -> None:
        """Where what is marked will be copied to."""
        self._target = target

    def begin(self, state: CopyState) -> None:
        """Take what the bitmap marks, which from now on marks anew.  The disk is drained."""
        if self._bitmap is not None:
            self._bits = self._bitmap.begin_copy()
            state.merge(self._bits)

    def mark(self, state: CopyState) -> None:
        """Mark what else is to be copied; requests may be on their way."""
        node = self._disk.node
        if self._sync == "full":
            state.mark(0, node.size)
        elif self._sync == "top":
            below = status.backing_below(node)
            for extent in status.extents(node, 0, node.size, below):
                if extent.present:
                    state.mark(extent.offset, extent.length)

    def end(self, state: CopyState, *, succeeded: bool) -> None:
        """Give the bitmap back what it is to mark: see `mirror`."""
        bits, self._bits = self._bits, None
        if self._bitmap is None or bits is None:
            return
        if not succeeded and self._mode == "always" and self._target is not None and self._target.keeps_what_it_has():
            bits = state.remaining(bits)
        self._bitmap.end_copy(None if succeeded and self._mode != "never" else bits)
