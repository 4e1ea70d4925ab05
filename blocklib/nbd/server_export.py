"""One export: a disk, or a window of it, under a name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from blocklib.errors import OutOfRangeError, UsageError
from blocklib.nbd import wire
from blocklib.nbd.engine import Export

if TYPE_CHECKING:
    from blocklib.bitmaps import Bitmap
    from blocklib.disk import Disk
    from blocklib.node import Node

Context: TypeAlias = Callable[[int, int], Iterable[tuple[int, int]]]
"""(length, status flags) of the extents of a range of the export."""

_MOST_EXTENTS: Final = 1 << 16
"""Extents of a disk that one reply looks at: the client asks again for what follows."""
_PREFERRED_BLOCK: Final = 4096


class Exported:
    """What clients see of a disk.  Raises UsageError, OutOfRangeError, NameNotFoundError (a bitmap)."""

    def __init__(
        self,
        disk: Disk,
        name: str,
        *,
        description: str = "",
        read_only: bool | None = None,
        offset: int = 0,
        length: int | None = None,
        bitmaps: Iterable[str] = (),
        allocation_depth: bool = False,
    ) -> None:
        if isinstance(bitmaps, str):
            raise UsageError("bitmaps is a collection of names, not one name")
        if read_only is False and disk.mode == "r":
            raise UsageError("the disk is opened for reading, so its export is read-only")
        for what, text in (("name", name), ("description", description)):
            try:
                wire.encode_string(text)
            except (UnicodeEncodeError, ValueError) as exc:
                raise UsageError(f"the {what} of an export: {exc}") from exc
        size = disk.size
        if offset < 0 or offset > size or (length is not None and (length < 0 or offset + length > size)):
            window = f"{length} bytes" if length is not None else "an export that begins"
            raise OutOfRangeError(f"{window} at {offset} of a disk of {size} bytes")
        self.disk = disk
        self.name = name
        self.description = description
        self.read_only = read_only or disk.mode == "r"
        self.offset = offset
        self._length = length
        self._descriptors: dict[Node, int] = {}
        self._held = ExitStack()
        self.may_pass = True
        """No filter below the top image wants to see what is read."""
        self._contexts: dict[str, Context] = {wire.BASE_ALLOCATION: self._allocation}
        if allocation_depth:
            self._contexts[wire.QEMU_ALLOCATION_DEPTH] = self._allocation_depth
        try:
            for bitmap_name in bitmaps:
                self._add_bitmap(disk.bitmaps[bitmap_name])
            self._look_at_chain()
        except BaseException:
            self.close()
            raise

    def _add_bitmap(self, bitmap: Bitmap) -> None:
        if bitmap.inconsistent:
            raise UsageError(f"the bitmap {bitmap.name!r} is inconsistent: it has missed writes")
        self._held.enter_context(bitmap.held())
        self._contexts[wire.QEMU_DIRTY_BITMAP + bitmap.name] = lambda offset, length: self._dirty(bitmap, offset, length)

    def close(self) -> None:
        """Let go of the disk's bitmaps and files."""
        self._held.close()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    # -- what a handshake tells ---------------------------------------------------------------------------------------

    def told(self, *, shared: bool, max_payload: int) -> Export:
        """The export as it is now."""
        size = self.disk.size - self.offset if self._length is None else self._length
        flags = wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA
        flags |= wire.NBD_FLAG_SEND_DF | wire.NBD_FLAG_SEND_CACHE | wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD
        if shared:  # one disk for all clients: a flush covers what any of them has written
            flags |= wire.NBD_FLAG_CAN_MULTI_CONN
        if self.read_only:
            flags |= wire.NBD_FLAG_READ_ONLY
        else:
            flags |= wire.NBD_FLAG_SEND_TRIM | wire.NBD_FLAG_SEND_WRITE_ZEROES | wire.NBD_FLAG_SEND_FAST_ZERO
        return Export(self.name, max(0, size), flags, self.description, 1, _PREFERRED_BLOCK, max_payload)

    def select_contexts(self, queries: Iterable[str]) -> list[str]:
        """The contexts that NBD_OPT_SET_META_CONTEXT selects: those it names."""
        wanted = set(queries)
        return [name for name in self._contexts if name in wanted]

    def list_contexts(self, queries: tuple[str, ...]) -> list[str]:
        """The contexts that NBD_OPT_LIST_META_CONTEXT finds: also by namespace, or all."""
        if not queries:
            return list(self._contexts)
        wanted = set(queries)
        namespaces = tuple(query for query in queries if query in ("base:", "qemu:", wire.QEMU_DIRTY_BITMAP))
        return [name for name in self._contexts if name in wanted or (namespaces and name.startswith(namespaces))]

    # -- where the data is --------------------------------------------------------------------------------------------

    def context(self, name: str) -> Context:
        """How the extents of a metadata context are found."""
        return self._contexts[name]

    def _allocation(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        hole, zero = wire.NBD_STATE_HOLE, wire.NBD_STATE_ZERO
        for extent in islice(self.disk.extents(self.offset + offset, length), _MOST_EXTENTS):
            yield extent.length, (0 if extent.data else hole) | (zero if extent.zero else 0)

    def _allocation_depth(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for extent in islice(self.disk.extents(self.offset + offset, length), _MOST_EXTENTS):
            yield extent.length, extent.depth + 1 if extent.present else 0

    def _dirty(self, bitmap: Bitmap, offset: int, length: int) -> Iterator[tuple[int, int]]:
        position = self.offset + offset
        end = position + length
        for start, n in bitmap.dirty_ranges(position, length).tolist():
            if start > position:
                yield start - position, 0
            yield n, wire.NBD_STATE_DIRTY
            position = start + n
        if position < end:
            yield end - position, 0

    # -- plain files --------------------------------------------------------------------------------------------------

    def _look_at_chain(self) -> None:
        """Take a descriptor of every file of the chain that can be sent from, of our own: the disk may close its own while a
        reply is on its way."""
        top = self.disk.node
        todo = [top]
        while todo:
            node = todo.pop()
            todo += [edge.node for edge in node.children.values()]
            self.may_pass = self.may_pass and (node is top or not node.sees_reads)
            fd = node.plain_descriptor() if node.is_leaf and self.read_only else None
            if fd is not None:
                self._descriptors[node] = os.dup(fd)

    def descriptor_of(self, node: Node) -> int:
        """A descriptor to send from what lies plain in a protocol node, or -2 where that is not possible."""
        return self._descriptors.get(node, -2) if node.read_only else -2


