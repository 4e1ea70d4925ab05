"""Disk: the front door that users, jobs and exports hold.

It checks bounds and permissions, counts requests so that the graph can be drained, and is safe from any thread.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args, overload

from blocklib import graph, plan, status
from blocklib.buffers import AnyBuffer, bytes_view
from blocklib.errors import BlocklibError, ClosedError, OutOfRangeError, ReadOnlyError, UsageError
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Preallocation
from blocklib.policy import References, resolve_backing_name
from blocklib.reports import ImageInfo, NodeInfo
from blocklib.requests import CLOSED, FORKED, FORKED_TEXT, RequestTracker
from blocklib.sizes import format_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blocklib._fast.extents import Rows
    from blocklib._fast.pointer import Pointer
    from blocklib.batch import Offsets
    from blocklib.bitmaps import Bitmaps
    from blocklib.diskfile import DiskFile
    from blocklib.extents import Extent, ExtentTable, Status
    from blocklib.insertion import InsertedFilter
    from blocklib.node import Node
    from blocklib.places import Places
    from blocklib.snapshots import Snapshots
    from blocklib.transactions import DiskTransaction

_T = TypeVar("_T")
_B = TypeVar("_B", bound=AnyBuffer)

_COMPRESS_AT_ONCE = 2 << 20
"""Bytes whose streams are in memory together."""

_disks: weakref.WeakSet[Disk] = weakref.WeakSet()


class Disk:
    """An open virtual disk: one chain of images, at any offset and length in bytes, from any thread.

    Made by `blocklib.open`.  Every method raises ClosedError after `close` or in a forked child, StorageError when the host
    fails, ImageError when the image makes no sense, PoisonedError after a torn metadata change.
    """

    def __init__(
        self, node: Node, mode: Literal["r", "r+"], *, writethrough: bool = False, references: References = "deny"
    ) -> None:
        self._tracker = RequestTracker()
        self._mode: Literal["r", "r+"] = mode
        self._writable = mode == "r+"
        self._writethrough = writethrough
        self._references = references
        self._opened_at = _caller()
        self._root: graph.Edge | None = None
        wanted = CONSISTENT_READ | (WRITE | RESIZE if self._writable else 0)
        # A writer tolerates no other: not even a raw image, which has no metadata to protect, survives two.
        shared = graph.ALL & ~(WRITE | RESIZE) if self._writable else graph.ALL
        with graph.Transaction() as change:
            root = change.attach(None, "root", node, wanted=wanted, shared=shared, tracker=self._tracker)
        self._root = root  # only now: a disk that failed to open has nothing to close
        _disks.add(self)

    # -- the graph ----------------------------------------------------------------------------------------------------

    @property
    def node(self) -> Node:
        """The top image; filters may stand above it."""
        return status.skip_filters(self.root.node)

    @property
    def root(self) -> graph.Edge:
        """The edge that the requests of this disk begin with.  Raises ClosedError."""
        root = self._root
        if root is None:
            raise ClosedError("the disk is closed")
        if self._tracker.flags & FORKED:
            raise ClosedError(FORKED_TEXT)
        return root

    def image_edge(self) -> graph.Edge:
        """The edge to the top image: of this disk, or of the last filter above it."""
        edge = self.root
        while edge.node.is_filter:
            edge = edge.node.children["file"]
        return edge

    def insert_filter(self, driver: str, options: Mapping[str, Any]) -> InsertedFilter:
        """Put a filter above the images, under live requests; `options` are the driver's, without the disk itself.

        ``remove`` of the result takes it away again.  Raises OptionError, and what opening another child of it raises.
        """
        # By name, as drivers are: opening the other children of a filter stands above disks.
        inserted: InsertedFilter = import_module("blocklib.insertion").insert(self.root, driver, options)
        return inserted

    def add_overlay(
        self,
        path: str | os.PathLike[str],
        *,
        format: str,
        options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        transaction: DiskTransaction | None = None,
    ) -> None:
        """Make a new image at `path` over the images of this disk, under live requests: further writes go there.

        The disk is one image longer, and what was its top image is not written any more.  `options` are creation options of
        the format.  With `transaction` at the instant of that.  Raises as `blocklib.create`; GraphConflictError under a job.
        """
        # By name, as drivers are: making and opening images stands above disks.
        import_module("blocklib.overlays").add(self, path, format, options or {}, overwrite, transaction)

    @property
    def mode(self) -> Literal["r", "r+"]:
        return self._mode

    @property
    def closed(self) -> bool:
        """Whether the disk answers nothing any more: it was closed, or belongs to the process that forked this one."""
        return self._root is None or bool(self._tracker.flags & FORKED)

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self.node.size

    def chain(self) -> tuple[NodeInfo, ...]:
        """The images from the top down to the last backing file."""
        return tuple(
            NodeInfo(node.name, node.driver, node.filename, node.size, node.read_only, graph.data_filename(node))
            for node in graph.chain(self.node)
        )

    def info(self) -> ImageInfo:
        """The top image's metadata."""
        node = self.node
        named = next((item for item in node.references() if item.kind == "backing"), None)
        filename = node.filename or node.name
        return ImageInfo(
            filename=filename,
            format=node.driver,
            virtual_size=node.size,
            actual_size=node.allocated_size(),
            cluster_size=node.cluster_size(),
            backing_filename=named.name if named is not None else None,
            full_backing_filename=resolve_backing_name(filename, named.name) if named is not None else None,
            backing_format=named.format if named is not None else None,
            format_specific=node.format_specific(),
            **node.info_facts(),
        )

    @property
    def snapshots(self) -> Snapshots:
        """The snapshots inside the top image."""
        from blocklib.snapshots import Snapshots

        return Snapshots(self)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from guest `offset`.  Raises OutOfRangeError for a range outside the disk."""
        offset, length = index(offset), index(length)
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked(offset, length)
            buffer = bytearray(length)
            plan.read(node, offset, memoryview(buffer))
        finally:
            tracker.leave()
        return bytes(buffer)

    def readinto(self, offset: int, buffer: AnyBuffer) -> None:
        """Fill the whole writable `buffer` from guest `offset`."""
        offset = index(offset)
        view = bytes_view(buffer)
        if view.readonly:
            raise UsageError("readinto needs a writable buffer")
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked(offset, len(view))
            plan.read(node, offset, view)
        finally:
            tracker.leave()

    @overload
    def read_batch(self, offsets: Offsets, length: int) -> NDArray[Any]: ...
    @overload
    def read_batch(self, offsets: Offsets, length: int, out: _B) -> _B: ...
    def read_batch(self, offsets: Offsets, length: int, out: AnyBuffer | None = None) -> AnyBuffer:
        """`length` bytes from each of the guest `offsets`: one row of a uint8 array each, or `out` filled in their order.

        Raises OutOfRangeError, with nothing read, for a request that reaches outside the disk; BatchError, with the others
        done, where requests failed.
        """
        from blocklib import batch

        length = index(length)
        pointer = batch.offsets_of(offsets)
        if out is None:
            import numpy as np

            out = np.empty((pointer.length, max(length, 0)), np.uint8)
        view = bytes_view(out)
        if view.readonly:
            raise UsageError("read_batch needs a writable buffer")
        if length < 0 or len(view) != pointer.length * length:
            raise UsageError(f"a buffer of {len(view)} bytes for {pointer.length} requests of {length} bytes")
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_batch(pointer, length)
            failures = batch.read(node, batch.Requests(pointer, length, view, writing=False)) if len(view) else {}
        finally:
            tracker.leave()
        if failures:
            raise batch.error_of(failures, pointer.length, "read_batch", node)
        return out

    def read_placed(self, runs: Sequence[tuple[int, memoryview]], places: Places) -> None:
        """Fill several views, each from its guest offset, ascending, without looking up again what `places` remembers."""
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked(runs[0][0], runs[-1][0] + len(runs[-1][1]) - runs[0][0])
            for offset, view in places.read(node, runs):
                plan.read(node, offset, view)
        finally:
            tracker.leave()

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_batch(self, offsets: Offsets, data: AnyBuffer, *, fua: bool = False) -> None:
        """Write equal parts of `data`, one for each of the guest `offsets`, in any order; with `fua` durable on return.

        Where requests of a batch overlap, one of them wins, byte by byte.  Raises ReadOnlyError; OutOfRangeError, with
        nothing written, for a request that reaches outside the disk; BatchError, with the others done, where requests failed.
        """
        from blocklib import batch

        pointer = batch.offsets_of(offsets)
        view = bytes_view(data)
        if len(view) % max(pointer.length, 1):
            raise UsageError(f"{len(view)} bytes cannot be divided among {pointer.length} requests")
        length = len(view) // max(pointer.length, 1)
        if len(view) and not pointer.length:
            raise UsageError(f"{len(view)} bytes, and no request to write them")
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_batch(pointer, length)
            self._checked_for_write(0, 0)
            failures = batch.write(node, batch.Requests(pointer, length, view, writing=True)) if len(view) else {}
            if (fua or self._writethrough) and len(failures) < pointer.length:
                node.flush()
        finally:
            tracker.leave()
        if failures:
            raise batch.error_of(failures, pointer.length, "write_batch", node)

    def write(self, offset: int, data: AnyBuffer, *, fua: bool = False) -> None:
        """Write all of `data` at guest `offset`; with `fua` it is durable on return.

        Raises ReadOnlyError, OutOfRangeError.
        """
        offset = index(offset)
        view = bytes_view(data)
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_for_write(offset, len(view))
            if len(view):
                plan.write(node, offset, view)
            if fua or self._writethrough:
                node.flush()
        finally:
            tracker.leave()

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], *, placed: Callable[[], None] = lambda: None) -> None:
        """Write several buffers of bytes, (guest offset, data) each, ascending and apart from each other, in one request.

        `placed` is called, from here, when it is settled where new ones come to lie in the image; what is written after that
        lies behind them.  Raises what `write` raises; then some may have been written.
        """
        if not runs:
            return
        first, (last, data) = runs[0][0], runs[-1]
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_for_write(first, last + len(data) - first)
            plan.write_runs(node, runs, placed)
            if self._writethrough:
                node.flush()
        finally:
            tracker.leave()

    def write_compressed(self, offset: int, data: AnyBuffer, *, level: int | None = None) -> None:
        """Write whole clusters compressed, as the image's compression type says; the disk's last may be short.

        A cluster that does not shrink is written as it is.  `level` goes from 1 to 9 for zlib and to 22 for zstd; None is
        nearly as small as zlib's 6, or zstd's 3.  Raises UsageError for parts of clusters, UnsupportedFeatureError where the
        image cannot have compressed clusters, StorageError (EIO) for a cluster that the top image has a place for already:
        of many MiB, what lies well before it is written then.
        """
        offset = index(offset)
        view = bytes_view(data)
        node = self._checked_for_write(offset, len(view))
        compressor = node.compressor(level)
        if offset % compressor.unit or (len(view) % compressor.unit and offset + len(view) != node.size):
            raise UsageError(
                f"{node.filename or node.name}: {len(view)} bytes at {offset} are not whole clusters of {compressor.unit} "
                "bytes, and only those are compressed"
            )
        step = max(compressor.unit, _COMPRESS_AT_ONCE)
        for start in range(0, len(view), step):
            part = view[start : start + step]
            self.write_packed(offset + start, part, compressor.compress(part), compressor.unit)
        if self._writethrough:
            self.flush()

    def write_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        """The second half of `write_compressed`, for who compresses elsewhere with the top node's compressor: `packed` has
        one stream, or None, for each `unit` bytes of `data`, which are whole clusters."""
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_for_write(offset, len(data))
            plan.write_packed(node, offset, data, packed, unit)
        finally:
            tracker.leave()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True) -> None:
        """Make `length` bytes from guest `offset` read as zero; with `unmap` their space may be given back.

        Without `fallback`, raises StorageError (ENOTSUP) where the top image cannot do it by metadata alone.
        """
        offset, length = index(offset), index(length)
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_for_write(offset, length)
            plan.write_zeroes(node, offset, length, unmap=unmap and node.discard_passes, fallback=fallback)
            if self._writethrough:
                node.flush()
        finally:
            tracker.leave()

    def discard(self, offset: int, length: int) -> None:
        """Say that the range is no longer needed.  A hint: it does nothing unless the disk was opened with
        ``discard="unmap"``, and then only to whole clusters, which read as zero afterwards where the format can say so."""
        offset, length = index(offset), index(length)
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked_for_write(offset, length)
            plan.discard(node, offset, length)
            if self._writethrough:
                node.flush()
        finally:
            tracker.leave()

    def flush(self) -> None:
        """Make every write that has returned durable."""
        tracker = self._tracker
        tracker.enter()
        try:
            self.root.node.flush()
        finally:
            tracker.leave()

    def truncate(self, size: int, *, shrink: bool = False, preallocation: Preallocation = "off") -> None:
        """Change the virtual size to `size` bytes; new bytes read as zero.  Shrinking loses data and needs ``shrink=True``."""
        size = index(size)
        if size < 0:
            raise OutOfRangeError(f"a size of {size} bytes")
        if preallocation not in get_args(Preallocation):
            raise UsageError(f"preallocation is one of {', '.join(get_args(Preallocation))}, not {preallocation!r}")
        with graph.alone(self.node):
            node = self._checked_for_write(0, 0)
            if size < node.size and not shrink:
                raise UsageError(f"{size} bytes is less than the {node.size} there are: shrinking needs shrink=True")
            plan.truncate(node, size, preallocation)
            if self._writethrough:
                node.flush()

    # -- where the data is --------------------------------------------------------------------------------------------

    def extents(self, offset: int = 0, length: int | None = None, *, base: NodeInfo | None = None) -> Iterator[Extent]:
        """The extents of a range (by default the whole disk): lazy, ascending, contiguous, coalesced, clipped.

        With `base`, of `chain()`, only what the images above it hold.
        """
        node, offset, length, below = self._range(offset, length, base)
        return self._tracked(status.extents(node, offset, length, below))

    def map(self, offset: int = 0, length: int | None = None, *, base: NodeInfo | None = None) -> ExtentTable:
        """The same as a numpy array, one row of `blocklib.EXTENT_DTYPE` an extent; host_offset is -1 where there is none."""
        tracker = self._tracker
        tracker.enter()
        try:
            node, offset, length, below = self._range(offset, length, base)
            return status.extent_table(node, offset, length, below)
        finally:
            tracker.leave()

    def statuses(self, offset: int, length: int, *, most: int) -> list[Status] | None:
        """Where the bytes of a range live, run by run, for who sends them from there: see `blocklib.status.status_above`.

        None where that are more than `most` runs, or a filter above the images wants to see what is read.
        """
        tracker = self._tracker
        tracker.enter()
        try:
            node = self._checked(offset, length)
            if status.are_reads_seen(node):
                return None
            end = offset + length
            found: list[Status] = []
            while offset < end:
                if len(found) == most:
                    return None
                found.append(status.status_above(node, offset, end - offset))
                offset += found[-1][0]
            return found
        finally:
            tracker.leave()

    def row_windows(self, offset: int = 0, length: int | None = None, *, base: NodeInfo | None = None) -> Iterator[Rows]:
        """The same as rows of numbers, some at a time: what jobs and the command line look at."""
        node, offset, length, below = self._range(offset, length, base)
        return self._tracked(status.row_windows(node, offset, length, below))

    def _tracked(self, iterator: Iterator[_T]) -> Iterator[_T]:
        """Each step of `iterator` as a request of its own."""
        tracker = self._tracker
        while True:
            tracker.enter()
            try:
                found = next(iterator, None)
            finally:
                tracker.leave()
            if found is None:
                return
            yield found

    def as_file(self, offset: int = 0, length: int | None = None) -> DiskFile:
        """A raw binary file over the disk, or over a window of it; positions are the window's.

        Closing it leaves the disk open.  Each one has its own position; it is not shared between threads.
        """
        from blocklib.diskfile import DiskFile

        _node, offset, length, _below = self._range(offset, length, None)
        return DiskFile(self, offset, length, writable=self._writable)

    # -- bitmaps ------------------------------------------------------------------------------------------------------

    @property
    def bitmaps(self) -> Bitmaps:
        """The dirty bitmaps of the top image, by name."""
        from blocklib.bitmaps import Bitmaps

        self.node  # noqa: B018 - raises where there is none
        return Bitmaps(self)

    # -- becoming another disk ----------------------------------------------------------------------------------------

    def forget(self, change: graph.Transaction) -> None:
        """Let go of the images as part of `change`: others use them now.  Nobody else uses this disk."""
        change.detach(self.root)
        change.when_done(self._forget)

    def _forget(self) -> None:
        self._tracker.refuse(CLOSED)
        self._root = None

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for requests in flight, make everything durable, close every file.  Later calls do nothing.

        Raises what went wrong; the files are closed all the same.
        """
        root = self._root
        if root is None:
            return
        if self._tracker.flags & FORKED:  # nothing here is ours to touch
            self._root = None
            return
        with graph.alone(root.node), graph.lock:
            if self._root is not root:  # another thread has closed it meanwhile
                return
            self._tracker.refuse(CLOSED)
            self._root = None
        with graph.Transaction() as change:
            change.detach(root)

    def abandon(self) -> None:
        """Wait for requests in flight and close without writing: what was not flushed is lost, what is on disk is valid."""
        root = self._root
        if root is None:
            return
        if self._tracker.flags & FORKED:
            self._root = None
            return
        self._tracker.drain()  # a descriptor must not be closed, and its number used again, under a request
        try:
            with graph.lock:
                if self._root is not root:  # another thread has closed it meanwhile
                    return
                self._tracker.refuse(CLOSED)
                self._root = None
        finally:
            self._tracker.undrain()
        root.node.parents.remove(root)
        if not root.node.parents:
            graph.close_tree(root.node, abandon=True)

    def __enter__(self) -> Self:
        self.node  # noqa: B018 - raises where there is none
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BlocklibError as failure:
            if exc is None:
                raise
            exc.add_note(f"closing the disk failed as well: {failure}")

    def __del__(self) -> None:
        if getattr(self, "_root", None) is None or self._tracker.flags & FORKED:
            return
        try:
            warnings.warn(
                f"a disk opened at {self._opened_at} was not closed; what it had not flushed is lost",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
        finally:  # where warnings are errors, too
            self.abandon()

    def __reduce__(self) -> Any:
        raise TypeError("a Disk cannot be pickled: open it again in the worker")

    def __repr__(self) -> str:
        if self._root is None or self.closed:
            return "<Disk closed>"
        images = [
            f"{_shown(os.path.basename(node.filename) if node.filename else node.name)} ({node.driver})"
            for node in graph.chain(self._root.node)
        ]
        return f"<Disk {self._mode} {format_size(self._root.node.size)}: {' -> '.join(images)}>"

    # -- checks -------------------------------------------------------------------------------------------------------

    def _checked(self, offset: int, length: int) -> Node:
        root = self._root
        if root is None:
            raise ClosedError("the disk is closed")
        node = root.node
        if offset < 0 or length < 0 or offset + length > node.size:
            raise OutOfRangeError(
                f"{node.filename or node.name}: {length} bytes at {offset} reach outside the disk of {node.size} bytes",
                node=node.name,
            )
        return node

    def _checked_batch(self, offsets: Pointer, length: int) -> Node:
        """As `_checked`, of many requests of one length."""
        from blocklib._fast import lookups

        node = self._checked(0, 0)
        number = lookups.first_outside(offsets, length, node.size)
        if number >= 0:
            self._checked(offsets.view[number], length)  # raises
        return node

    def _checked_for_write(self, offset: int, length: int) -> Node:
        node = self._checked(offset, length)
        if not self._writable:
            raise ReadOnlyError(f"{node.filename or node.name}: opened for reading; mode 'r+' writes", node=node.name)
        return node

    def _range(self, offset: int, length: int | None, base: NodeInfo | None) -> tuple[Node, int, int, Node | None]:
        """(top node, offset, length, node that `base` is) of a range that may be given by halves."""
        offset = index(offset)
        size = self.node.size  # raises in the child of a fork
        length = max(0, size - offset) if length is None else index(length)
        node = self._checked(offset, length)
        if base is None:
            return node, offset, length, None
        for below in graph.chain(node):
            if below.name == base.name:
                return node, offset, length, below
        raise UsageError(f"{base.filename or base.name} is not in the chain of this disk")


def _shown(name: str) -> str:
    """`name` on one line: it may be an image's choice, line ends and all."""
    return name if name.isprintable() else repr(name)[1:-1]


def _caller() -> str:
    """Where the code outside blocklib is that opens a disk, for a warning."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "blocklib":
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _refuse_all_after_fork() -> None:
    for disk in list(_disks):
        disk._tracker.refuse_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_all_after_fork)
