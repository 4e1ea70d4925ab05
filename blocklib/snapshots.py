"""The snapshots inside an image: `Disk.snapshots`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from operator import index
from typing import TYPE_CHECKING

from blocklib import graph
from blocklib.errors import GraphConflictError, NameNotFoundError, OutOfRangeError, ReadOnlyError, UsageError
from blocklib.node import Filter

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.node import Node
    from blocklib.reports import SnapshotInfo


class InternalSnapshot:
    """One snapshot inside an image: what it says of itself, and what can be done with it."""

    __slots__ = ("_disk", "info")

    def __init__(self, disk: Disk, info: SnapshotInfo) -> None:
        self._disk = disk
        self.info = info
        """The numbers as a value, which can be kept after the snapshot is gone."""

    @property
    def id(self) -> str:
        """Unique in the image; new snapshots get the number after the highest."""
        return self.info.id

    @property
    def name(self) -> str:
        """Need not be unique: QEMU allows two snapshots of one name."""
        return self.info.name

    @property
    def created(self) -> datetime:
        """When, in UTC."""
        return self.info.created

    @property
    def size(self) -> int:
        """The virtual size that the disk had, in bytes."""
        return self.info.size

    @property
    def vm_state_size(self) -> int:
        """Bytes of a virtual machine's state that are kept with it; 0 for a snapshot of the disk alone."""
        return self.info.vm_state_size

    @property
    def vm_clock_ns(self) -> int:
        """How long the guest had run, in nanoseconds."""
        return self.info.vm_clock_ns

    @property
    def icount(self) -> int | None:
        """Instructions that the guest had executed, where they were counted."""
        return self.info.icount

    def apply(self) -> None:
        """Bring the disk back to this state, size included; durable on return.  What it holds now is lost.

        Raises ReadOnlyError, NameNotFoundError where it was deleted, ImageError with the image unchanged; GraphConflictError
        while a job, or a filter such as copy-before-write, follows what is written to the disk.
        """
        with _changeable(self._disk) as node:
            _refuse_what_nobody_would_hear_of(node)
            node.apply_snapshot(self.id, self.name)

    def delete(self) -> None:
        """Forget this state and give back what only it used; durable on return.

        Raises ReadOnlyError, NameNotFoundError where it was deleted, ImageError with the image unchanged.
        """
        with _changeable(self._disk) as node:
            node.delete_snapshot(self.id, self.name)

    def __repr__(self) -> str:
        return f"<InternalSnapshot {self.id}: {self.name!r} of {self.created:%Y-%m-%d %H:%M:%S} UTC>"


class Snapshots:
    """The snapshots inside the top image of a disk, oldest entry first; each look sees what there is then."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def create(self, name: str) -> InternalSnapshot:
        """Keep the disk as it is now under `name`; durable on return.

        Raises ReadOnlyError; UsageError for a name longer than 255 bytes; ImageLimitError for one snapshot more than the
        limit, or where the refcounts are too narrow for another reference; UnsupportedFeatureError where the format, or
        an external data file, allows no snapshots.
        """
        with _changeable(self._disk) as node:
            return InternalSnapshot(self._disk, node.create_snapshot(name))

    def by_id(self, id: str) -> InternalSnapshot:
        """The snapshot with this ID.  Raises NameNotFoundError."""
        for snapshot in self:
            if snapshot.id == id:
                return snapshot
        raise self._not_found(f"the ID {id!r}")

    def __getitem__(self, name: str) -> InternalSnapshot:
        """The first snapshot of this name.  Raises NameNotFoundError."""
        if not isinstance(name, str):
            raise UsageError(f"snapshots are found by name, not by {type(name).__name__}")
        for snapshot in self:
            if snapshot.name == name:
                return snapshot
        raise self._not_found(f"the name {name!r}")

    def __contains__(self, wanted: object) -> bool:
        """Whether there is a snapshot of this name, or still this one."""
        if isinstance(wanted, InternalSnapshot):
            return any(wanted.id == snapshot.id and wanted.name == snapshot.name for snapshot in self)
        return any(wanted == snapshot.name for snapshot in self)

    def __iter__(self) -> Iterator[InternalSnapshot]:
        return iter([InternalSnapshot(self._disk, info) for info in self._disk.node.list_snapshots()])

    def __len__(self) -> int:
        return len(self._disk.node.list_snapshots())

    def __repr__(self) -> str:
        return f"<Snapshots: {', '.join(repr(snapshot.name) for snapshot in self) or 'none'}>"

    def read_vm_state(self, offset: int, length: int) -> bytes:
        """The state of a virtual machine that the present state of the image has behind the end of the disk.

        It has no length of its own: what was never written reads as zero.  Of a disk that was opened as a snapshot, that
        snapshot's.  Raises StorageError (ENOTSUP) where the format has no place for it.
        """
        offset, length = index(offset), index(length)
        _check_range(offset, length)
        buffer = bytearray(length)
        with graph.drained(self._disk.node):
            self._disk.node.read_vm_state(offset, memoryview(buffer))
        return bytes(buffer)

    def write_vm_state(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put the state of a virtual machine behind the end of the disk, for the next snapshot to keep.

        Raises ReadOnlyError, ImageLimitError, StorageError (ENOTSUP) where the format has no place for it.
        """
        offset = index(offset)
        _check_range(offset, 0)
        with _changeable(self._disk) as node:
            node.write_vm_state(offset, memoryview(data).cast("B"))

    def _not_found(self, what: str) -> NameNotFoundError:
        node = self._disk.node
        return NameNotFoundError(f"{node.filename or node.name}: there is no snapshot with {what}", node=node.name)


def _check_range(offset: int, length: int) -> None:
    if offset < 0 or length < 0:
        raise OutOfRangeError(f"{length} bytes at {offset} of a VM state")


def _refuse_what_nobody_would_hear_of(node: Node) -> None:
    """Raises GraphConflictError where a job or a filter has to know of every change of the image, which this is not told."""
    other = node.claim.job if node.claim is not None else None
    todo = [node]
    while todo and other is None:
        for edge in todo.pop().parents:
            above = edge.parent
            if isinstance(above, Filter):
                other = above.driver if above.watches else other
                todo.append(above)
    if other is not None:
        raise GraphConflictError(
            f"{node.filename or node.name}: {other} follows what is written to the image; to apply a snapshot would go past it",
            other=other,
            node=node.name,
        )


@contextmanager
def _changeable(disk: Disk) -> Iterator[Node]:
    """The top node of a disk, ours alone to change."""
    node = disk.node
    if disk.mode != "r+":
        raise ReadOnlyError(f"{node.filename or node.name}: opened for reading; mode 'r+' writes", node=node.name)
    with graph.alone(node):
        if disk.node is not node:  # an overlay came on top while we waited
            raise UsageError(f"{node.filename or node.name}: no longer the top image of the disk", node=node.name)
        yield node
