"""The dirty bitmaps of a disk, as its users see them: `disk.bitmaps`, and one `Bitmap`.

A bitmap notes which parts of the disk were written while it was enabled, in pieces of its granularity.  It belongs to the
image on top of the chain; a persistent one is stored in that image when the disk is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING, Any

from blocklib import graph
from blocklib.errors import ReadOnlyError, UsageError
from blocklib.status import skip_filters
from blocklib.tracking import MAX_GRANULARITY, MIN_GRANULARITY, DirtyBitmap, ExportedBitmaps, Tracking, tracking_of

if TYPE_CHECKING:
    from blocklib.dirty_bits import DirtyBits
    from blocklib.disk import Disk
    from blocklib.extents import RangeTable
    from blocklib.node import Node
    from blocklib.transactions import DiskTransaction


class Bitmap:
    """One dirty bitmap.  Safe from any thread; every method raises ClosedError once its disk is closed.

    Changes to a persistent bitmap reach the image when the disk is closed.  What changes it raises NameNotFoundError after
    it was removed, UsageError where it is inconsistent, GraphConflictError while a job holds it, and ReadOnlyError for a
    persistent bitmap of a disk that is open for reading.
    """

    __slots__ = ("_bitmap", "_disk", "_tracking")

    def __init__(self, disk: Disk, tracking: Tracking, bitmap: DirtyBitmap) -> None:
        self._disk = disk
        self._tracking = tracking
        self._bitmap = bitmap

    @property
    def name(self) -> str:
        return self._bitmap.name

    @property
    def granularity(self) -> int:
        """Bytes of the disk that one bit stands for."""
        return self._bitmap.granularity

    @property
    def persistent(self) -> bool:
        """Whether it is stored in the image when the disk is closed."""
        return self._bitmap.persistent

    @property
    def enabled(self) -> bool:
        """Whether writes are to be noted; stored with a persistent bitmap."""
        return self._bitmap.enabled

    @property
    def recording(self) -> bool:
        """Whether writes are noted now: it is enabled, and not inconsistent."""
        return self._bitmap.enabled and not self._bitmap.inconsistent

    @property
    def inconsistent(self) -> bool:
        """Whether it was in use when the image was last left without closing it: it has missed writes.

        Nothing can be done with it but to remove it.
        """
        return self._bitmap.inconsistent

    @property
    def busy(self) -> bool:
        """Whether a job relies on it, so that it cannot be changed or removed."""
        return bool(self._bitmap.holders)

    @property
    def count(self) -> int:
        """Dirty bytes: the lengths of `dirty_ranges` together; 0 for one that is inconsistent.

        The first use reads a stored bitmap from the image.
        """
        self._node()
        return self._tracking.count(self._bitmap)

    def dirty_ranges(self, offset: int = 0, length: int | None = None) -> RangeTable:
        """The dirty ranges of the disk, or of a part of it, as rows of `blocklib.RANGE_DTYPE`.

        They are ascending, apart from each other, and end with the disk.  Raises UsageError where it is inconsistent.
        """
        offset = index(offset)
        node = self._node()
        length = max(0, node.size - offset) if length is None else index(length)
        if offset < 0 or length < 0:
            raise UsageError(f"{length} bytes at {offset}")
        return self._table(offset, length)

    def _table(self, offset: int, length: int) -> RangeTable:
        return self._copy().table(offset, length)

    def _copy(self) -> DirtyBits:
        """What is marked now."""
        return self._tracking.copy(self._bitmap)

    def clear(self, *, transaction: DiskTransaction | None = None) -> None:
        """Unmark everything; with `transaction` at the instant of that."""
        if transaction is None:
            with graph.drained(self._node()):
                self._clear()
            return
        before: list[DirtyBits] = []

        def clear() -> None:
            before.append(self._copy())
            self._clear()

        def bring_back() -> None:
            self._tracking.change(self._bitmap, lambda bits: bits.merge(before[0]))

        transaction.add(_Change(self, clear, bring_back))

    def _clear(self) -> None:
        self._tracking.change(self._bitmap, lambda bits: bits.clear())

    def enable(self, *, transaction: DiskTransaction | None = None) -> None:
        """Note writes from now on, or from the instant of `transaction` on."""
        self._switch(True, transaction)

    def disable(self, *, transaction: DiskTransaction | None = None) -> None:
        """Note no more writes, from the instant of `transaction` on if there is one; what is marked stays."""
        self._switch(False, transaction)

    def _switch(self, on: bool, transaction: DiskTransaction | None) -> None:
        if transaction is None:
            with graph.drained(self._node()):
                self.switch(on)
            return
        before = self.enabled
        transaction.add(_Change(self, lambda: self.switch(on), lambda: self.switch(before)))

    def switch(self, on: bool) -> None:
        """Note writes or not; the disk is drained."""
        self._tracking.enable(self._bitmap, on)

    def merge(self, *others: Bitmap) -> None:
        """Mark what is marked in `others` as well, all of them or none.

        They may have another granularity and belong to another disk, which must have the same size.
        """
        node = self._node()
        copies = []
        for other in others:
            if not isinstance(other, Bitmap):
                raise UsageError(f"bitmaps are merged with bitmaps, not with {type(other).__name__}")
            other_node = other._node()
            if other_node.size != node.size:
                raise UsageError(
                    f"the bitmap {other.name!r} is for a disk of {other_node.size} bytes, {self.name!r} for one of {node.size}",
                    node=node.name,
                )
            copies.append(other._copy())
        with graph.drained(node):
            for bits in copies:
                self._tracking.change(self._bitmap, lambda mine, bits=bits: mine.merge(bits))  # type: ignore[misc]

    def remove(self) -> None:
        """Forget it."""
        with graph.drained(self._node()):
            self._tracking.remove(self._bitmap)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs the bitmap is busy, so that nobody changes or removes it; writes are noted as before."""
        self._node()
        with self._tracking.held(self._bitmap):
            yield

    def begin_copy(self) -> DirtyBits:
        """What is marked, for a job that copies it; the bitmap begins anew and is busy until `end_copy`.

        The disk is drained.
        """
        self._node()
        return self._tracking.begin_copy(self._bitmap)

    def end_copy(self, bits: DirtyBits | None) -> None:
        """The job has ended; `bits` are still to be copied."""
        self._tracking.end_copy(self._bitmap, bits)

    def _node(self) -> Node:
        """The disk's top node.  Raises ClosedError."""
        return self._disk.node

    def __reduce__(self) -> Any:
        raise TypeError("a Bitmap cannot be pickled: open the disk again in the worker")

    def __repr__(self) -> str:
        states = [
            word
            for word, is_so in (
                ("persistent", self.persistent),
                ("recording", self.recording),
                ("inconsistent", self.inconsistent),
                ("busy", self.busy),
            )
            if is_so
        ]
        return f"<Bitmap {self.name!r}: {', '.join([*states, f'granularity {self.granularity}'])}>"


class ExportedBitmap(Bitmap):
    """A dirty bitmap that the NBD server of a disk keeps: it can be read, and merged into one of ours.

    It is asked for anew at each use, because the server may change it; so `count` and `dirty_ranges` raise StorageError and
    NbdError, too.  Everything that would change it raises ReadOnlyError.
    """

    __slots__ = ("_exported", "_name")

    def __init__(self, disk: Disk, exported: ExportedBitmaps, name: str) -> None:
        self._disk = disk
        self._exported = exported
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def granularity(self) -> int:
        """Bytes that the server tells apart: what one bit stands for, it does not say."""
        return self._exported.granularity

    @property
    def persistent(self) -> bool:
        return False

    @property
    def enabled(self) -> bool:
        """False: whether writes are noted is the server's affair."""
        return False

    @property
    def recording(self) -> bool:
        return False

    @property
    def inconsistent(self) -> bool:
        return False

    @property
    def busy(self) -> bool:
        return False

    @property
    def count(self) -> int:
        """Dirty bytes, as the server tells now."""
        return sum(length for _offset, length in self._exported.ranges(self._name, 0, self._node().size))

    def _table(self, offset: int, length: int) -> RangeTable:
        import numpy as np

        from blocklib.extents import RANGE_DTYPE

        return np.array(list(self._exported.ranges(self._name, offset, length)), dtype=RANGE_DTYPE)

    def _copy(self) -> DirtyBits:
        """In the largest pieces that all ranges begin and end with."""
        from blocklib.dirty_bits import DirtyBits

        size = self._node().size
        ranges = list(self._exported.ranges(self._name, 0, size))
        edges = MAX_GRANULARITY
        for start, length in ranges:
            edges |= start | (start + length if start + length < size else 0)
        bits = DirtyBits(size, max(edges & -edges, MIN_GRANULARITY))
        for start, length in ranges:
            bits.set_range(start, length)
        return bits

    def clear(self, *, transaction: DiskTransaction | None = None) -> None:
        raise self._refusal()

    def _switch(self, on: bool, transaction: DiskTransaction | None) -> None:
        raise self._refusal()

    def merge(self, *others: Bitmap) -> None:
        raise self._refusal()

    def remove(self) -> None:
        raise self._refusal()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody here can change or remove it anyway."""
        self._node()
        yield

    def begin_copy(self) -> DirtyBits:
        raise self._refusal()

    def _refusal(self) -> ReadOnlyError:
        node = self._node()
        text = f"{node.filename or node.name}: the bitmap {self._name!r} is the server's: merge it into one of your own"
        return ReadOnlyError(text, node=node.name)

    def __repr__(self) -> str:
        return f"<Bitmap {self._name!r}: of the server>"


class _Change:
    """What becomes of a bitmap at the instant of a transaction."""

    def __init__(
        self,
        bitmap: Bitmap,
        begin: Callable[[], None],
        undo: Callable[[], None],
        abort: Callable[[], None] = lambda: None,
    ) -> None:
        self.node = bitmap._node()
        self.begin = begin
        self.undo = undo
        self.abort = abort

    def prepare(self) -> None:
        """Nothing of it takes time."""

    def finish(self) -> None:
        """And nothing is left to do."""


class Bitmaps:
    """The bitmaps of a disk's top image, by name: ``[name]``, iteration over `Bitmap`, ``in``, ``len``.

    Where the disk is the export of an NBD server, those that the server gives out are among them (`ExportedBitmap`).
    """

    __slots__ = ("_disk",)

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def add(
        self,
        name: str,
        *,
        granularity: int | None = None,
        persistent: bool = False,
        enabled: bool = True,
        transaction: DiskTransaction | None = None,
    ) -> Bitmap:
        """A new bitmap without marks, which notes every write from now on unless `enabled` is False.

        `granularity` is in bytes: a power of two from 512 to 2 GiB, by default the image's cluster size between 4 and
        64 KiB.  The name has 1 to 1023 bytes.  A `persistent` one is stored in the image when the disk is closed.  With
        `transaction` it notes writes from the instant of that on, and is gone again if that fails.

        Raises UsageError for a name that is taken or what cannot be stored, ReadOnlyError, UnsupportedFeatureError.
        """
        tracking = self._tracking()
        exported = self._exported()
        if exported is not None and name in exported.names():
            raise UsageError(f"{self._disk.node.filename or self._disk.node.name}: the server has a bitmap {name!r}")
        with graph.drained(self._disk.node):  # a request that has begun would not be noted
            if persistent and self._disk.mode == "r":
                name_of_node = self._disk.node.filename or self._disk.node.name
                raise ReadOnlyError(f"{name_of_node}: opened for reading; mode 'r+' stores bitmaps", node=self._disk.node.name)
            given = index(granularity) if granularity is not None else None
            at_once = enabled and transaction is None
            bitmap = Bitmap(self._disk, tracking, tracking.add(name, given, persistent=persistent, enabled=at_once))
        if transaction is not None:
            try:
                transaction.add(_Change(bitmap, lambda: bitmap.switch(enabled), lambda: bitmap.switch(False), bitmap.remove))
            except BaseException:
                bitmap.remove()
                raise
        return bitmap

    def __getitem__(self, name: str) -> Bitmap:
        """Raises NameNotFoundError."""
        exported = self._exported()
        if exported is not None and name in exported.names():
            return ExportedBitmap(self._disk, exported, name)
        tracking = self._tracking()
        return Bitmap(self._disk, tracking, tracking.get(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._names()

    def __iter__(self) -> Iterator[Bitmap]:
        tracking, exported = self._tracking(), self._exported()
        own = [Bitmap(self._disk, tracking, bitmap) for bitmap in tracking.all()]
        theirs = exported.names() if exported is not None else ()
        return iter([*own, *[ExportedBitmap(self._disk, exported, name) for name in theirs if exported is not None]])

    def __len__(self) -> int:
        return len(self._names())

    def __reduce__(self) -> Any:
        raise TypeError("the bitmaps of a disk cannot be pickled: open the disk again in the worker")

    def __repr__(self) -> str:
        return f"<Bitmaps {self._names()}>"

    def _names(self) -> list[str]:
        exported = self._exported()
        return [*self._tracking().names(), *(exported.names() if exported is not None else ())]

    def _exported(self) -> ExportedBitmaps | None:
        """Those that the server of the disk keeps, if it is an export."""
        return skip_filters(self._disk.node).exported

    def _tracking(self) -> Tracking:
        node = self._disk.node
        return node.bitmaps if node.bitmaps is not None else tracking_of(node)
