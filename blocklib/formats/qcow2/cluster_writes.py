"""What a node does with whole clusters at once: the part of the qcow2 driver that writes many, or compressed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blocklib.formats.qcow2.snapshots.node import SnapshotNode

if TYPE_CHECKING:
    from blocklib.node import Compressor


class ClusterWritingNode(SnapshotNode):
    """A base of Qcow2Node; what it needs comes in with the first such write."""

    def layout(self) -> object:
        cache = self._image.mapping.cache
        return cache, cache.changes

    def fill_zeroes(self, offset: int, length: int) -> bool:
        from blocklib.formats.qcow2.filling import fill_zeroes

        return fill_zeroes(self._image, offset, length)

    def write_fresh(
        self, runs: Sequence[tuple[int, memoryview]], placed: Callable[[], None]
    ) -> Sequence[tuple[int, memoryview]]:
        from blocklib.formats.qcow2.fresh_runs import write_fresh

        return write_fresh(self._image, runs, placed)

    def compressor(self, level: int | None = None) -> Compressor:
        from blocklib.formats.qcow2 import packed_writing

        return packed_writing.compressor(self._image, level)

    def write_packed(self, offset: int, packed: Sequence[bytes | None]) -> bool:
        from blocklib.formats.qcow2 import packed_writing

        return packed_writing.write_packed(self._image, offset, packed)
