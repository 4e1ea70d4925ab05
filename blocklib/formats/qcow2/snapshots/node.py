"""What a node answers about snapshots: the part of the qcow2 driver that lists, changes and opens them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from blocklib.errors import UsageError
from blocklib.formats.qcow2.snapshots.table import Snapshot, find_snapshot, read_snapshots
from blocklib.node import Node

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.graph import Edge
    from blocklib.reports import SnapshotInfo


class SnapshotNode(Node):
    """The base of Qcow2Node, which has all the rest."""

    header: Header
    options: Mapping[str, Any]
    metadata_only: bool
    snapshots: list[Snapshot]
    """The snapshot table, in its order; replaced, never changed."""

    @property
    def file(self) -> Edge:
        """The child that the image is in."""
        return self.children["file"]

    @property
    def _image(self) -> Qcow2Node:
        return cast("Qcow2Node", self)

    # -- opening one --------------------------------------------------------------------------------------------------

    @property
    def _is_snapshot(self) -> bool:
        return self.options.get("snapshot.id") is not None or self.options.get("snapshot.name") is not None

    def load_named_snapshot(self) -> int | None:
        """The index of the snapshot that the options name, whose size is this disk's then; None where they name none.

        Raises NameNotFoundError, ImageError.
        """
        if not self._is_snapshot:
            return None
        from blocklib.formats.qcow2.snapshots.changes import snapshot_size

        id, name = self.options.get("snapshot.id"), self.options.get("snapshot.name")
        snapshots = read_snapshots(self.file, self.header, node=self.filename)
        index = find_snapshot(snapshots, id=id, name=name, node=self.filename)
        self.size = snapshot_size(self._image, snapshots[index])
        return index

    def refuse_to_write_snapshot(self) -> None:
        """Raises UsageError where this disk is a snapshot."""
        if self._is_snapshot:
            raise UsageError(f"{self.filename}: a snapshot can only be read", node=self.filename)

    # -- the contract of nodes ----------------------------------------------------------------------------------------

    def list_snapshots(self) -> Sequence[SnapshotInfo]:
        if self.metadata_only:
            self.snapshots = read_snapshots(self.file, self.header, node=self.filename)
        return [entry.info(self.header.size) for entry in self.snapshots]

    def create_snapshot(self, name: str) -> SnapshotInfo:
        from blocklib.formats.qcow2.snapshots import changes as snapshot_changes

        return snapshot_changes.create(self._image, name).info(self.header.size)

    def apply_snapshot(self, id: str, name: str) -> None:
        from blocklib.formats.qcow2.snapshots import changes as snapshot_changes

        index = find_snapshot(self.snapshots, id=id, name=name, node=self.filename)
        if self.bitmaps is None:
            snapshot_changes.apply(self._image, index)
            return
        with self.bitmaps.replacing(self.snapshots[index].disk_size) as begin:
            snapshot_changes.apply(self._image, index, begin)

    def delete_snapshot(self, id: str, name: str) -> None:
        from blocklib.formats.qcow2.snapshots import changes as snapshot_changes

        snapshot_changes.delete(self._image, find_snapshot(self.snapshots, id=id, name=name, node=self.filename))

    def read_vm_state(self, offset: int, view: memoryview) -> None:
        from blocklib.formats.qcow2.snapshots import vm_state

        vm_state.read(self._image, offset, view)

    def write_vm_state(self, offset: int, data: memoryview) -> None:
        from blocklib.formats.qcow2.snapshots import vm_state

        vm_state.write(self._image, offset, data)
