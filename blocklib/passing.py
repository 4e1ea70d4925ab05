"""PassingFilter, what filters are made of: each request goes on to the child, at the same place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from blocklib.extents import FLAG_OFFSET_VALID, FLAG_RAW, KIND_DATA, KIND_SPECIAL, Run
from blocklib.node import Compressor, Filter, Preallocation, WriteRun

if TYPE_CHECKING:
    from blocklib.graph import Edge


class PassingFilter(Filter):
    """Passes everything on.  A subclass says which requests it `sees_reads`, `sees_writes`, and overrides what it does.

    What it sees reaches it through `read_special` and `write_special`; zeroes, discards and flushes always do.  Compressed
    clusters come to `pass_packed`, if the subclass says that it `takes_packed`, and are refused otherwise.
    """

    takes_packed: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        return cls(options.get("node-name"), extra.pop("filename", None), read_only=read_only, **extra)

    @property
    def discard_passes(self) -> bool:
        """As the child does."""
        edge = self.children.get("file")
        return edge is None or edge.node.discard_passes

    @discard_passes.setter
    def discard_passes(self, passes: bool) -> None:
        if self.children:
            self.file.node.discard_passes = passes

    @property
    def file(self) -> Edge:
        """The child."""
        return self.children["file"]

    @property
    def size(self) -> int:
        edge = self.children.get("file")
        return edge.node.size if edge is not None else 0

    @size.setter
    def size(self, size: int) -> None:
        """The child knows it; said because every node begins with a size of 0."""

    def resolve(self, offset: int, length: int) -> Run:
        if self.sees_reads:
            return KIND_SPECIAL, None, 0, length, FLAG_RAW
        return KIND_DATA, self.file, offset, length, FLAG_RAW | FLAG_OFFSET_VALID

    def read_special(self, offset: int, view: memoryview) -> bool:
        self.file.read(offset, view, None)
        return True

    def prepare_write(self, offset: int, length: int) -> WriteRun:
        return None if self.sees_writes else self.file, offset, length, None

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self.file.write(place, views, None)

    def compressor(self, level: int | None = None) -> Compressor:
        return self.file.node.compressor(level) if self.takes_packed else super().compressor(level)

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        self.file.write_packed(offset, data, packed, unit)

    def grow_to(self, end: int) -> None:
        if not self.file.node.is_leaf:
            self.file.node.grow_to(end)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self.file.write_zeroes(offset, length, unmap=unmap)

    def discard_range(self, offset: int, length: int) -> None:
        self.file.discard(offset, length)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self.file.truncate(size, preallocation)

    def hear(self, event: str) -> None:
        self.file.node.hear(event)

    def cluster_size(self) -> int | None:
        return self.file.node.cluster_size()

    def data_unit(self) -> int | None:
        return self.file.node.data_unit()
