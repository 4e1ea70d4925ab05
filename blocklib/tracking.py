"""What a node knows of its dirty bitmaps, and how a request marks them.

A node without bitmaps has none of this: `plan` tests one attribute.  Otherwise a request that changes guest-visible bytes
calls `prepare` before it changes anything, so that the file says of every stored bitmap that it may be out of date, and
`record` before it is acknowledged, whether it succeeded or not.

A stored bitmap is read when it is first needed and written when the node is closed; what lies between is memory only.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from blocklib.dirty_bits import DirtyBits, bytes_for
from blocklib.errors import GraphConflictError, NameNotFoundError, UsageError
from blocklib.sizes import GiB, KiB, MiB

if TYPE_CHECKING:
    from blocklib.node import Node

MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 2 * GiB
MAX_NAME_LENGTH: Final = 1023
"""Bytes of UTF-8: what qcow2 and QEMU allow."""
MAX_BITMAP_BYTES: Final = 512 * MiB
"""Bytes of bits that one bitmap may take: QEMU's limit for stored ones."""
_DEFAULT_GRANULARITIES: Final = (4 * KiB, 64 * KiB)

_creation = threading.Lock()


class DirtyBitmap:
    """One bitmap of one node.  Guarded by its Tracking; `bits` is None until they are read."""

    __slots__ = (
        "bits",
        "changed",
        "enabled",
        "granularity",
        "holders",
        "in_file",
        "inconsistent",
        "marked",
        "name",
        "persistent",
    )

    def __init__(
        self,
        name: str,
        granularity: int,
        *,
        persistent: bool,
        enabled: bool,
        bits: DirtyBits | None = None,
        in_file: bool = False,
        inconsistent: bool = False,
    ) -> None:
        self.name = name
        self.granularity = granularity
        self.persistent = persistent
        self.enabled = enabled
        self.bits = bits
        self.in_file = in_file
        """The file has an entry for it, of this or an older state."""
        self.inconsistent = inconsistent
        """It missed writes, or cannot be understood: it can only be removed."""
        self.marked = False
        """The file says durably that its entry may be out of date."""
        self.changed = False
        """It may differ from what the file has."""
        self.holders = 0
        """Jobs and exports that rely on it."""


class BitmapStore(ABC):
    """Where a driver keeps the bitmaps that outlive the node.  Calls are serialised by the Tracking."""

    @abstractmethod
    def bitmaps(self) -> Sequence[DirtyBitmap]:
        """What the image holds, with `bits` not read yet."""

    @abstractmethod
    def read_again(self) -> Sequence[DirtyBitmap]:
        """As `bitmaps`, of the file as it is now."""

    @abstractmethod
    def check_new(self, name: bytes, granularity: int, persistent: Sequence[DirtyBitmap]) -> None:
        """Raises UnsupportedFeatureError, UsageError where one more bitmap beside `persistent` could not be stored."""

    @abstractmethod
    def load(self, bitmap: DirtyBitmap) -> DirtyBits:
        """The bits of a bitmap that is in the file."""

    @abstractmethod
    def mark_in_use(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Make the file say, durably, that its entries for these may be out of date."""

    @abstractmethod
    def save(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Make the file hold exactly these bitmaps, durably.  Those that are neither changed nor new keep their place."""


class ExportedBitmaps(Protocol):
    """The dirty bitmaps that a server keeps of an export, which can be read there and not be changed."""

    granularity: int
    """Bytes that the server tells apart."""

    def names(self) -> Sequence[str]: ...

    def ranges(self, name: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the dirty ranges inside a range, in bytes: ascending, apart from each other.

        Raises StorageError, NbdError.
        """


class Tracking:
    """The bitmaps of one node, by name.  Every method may be called from any thread."""

    def __init__(self, node: Node, store: BitmapStore | None) -> None:
        self._node = node
        self._store = store
        self._io = threading.RLock()
        """Serialises what reads and writes the file; taken before `_lock`."""
        self._lock = threading.Lock()
        """Guards names, states and bits; memory only."""
        self._bitmaps: dict[str, DirtyBitmap] = {}
        self._removed: list[DirtyBitmap] = []
        """Gone, but still in the file."""
        self._recording: tuple[DirtyBitmap, ...] = ()
        self._ready = False
        """Writes may begin: what records is in memory, and the file says what it must."""
        for bitmap in store.bitmaps() if store is not None else ():
            self._bitmaps[bitmap.name] = bitmap

    # -- requests -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Called before guest-visible bytes change.  Raises what reading and marking stored bitmaps raises."""
        if not self._ready:
            with self._io:
                self._get_ready()

    def record(self, offset: int, length: int) -> None:
        """Mark a range, in bytes, in every bitmap that is enabled.  Called before its request is acknowledged."""
        with self._lock:
            for bitmap in self._recording:
                assert bitmap.bits is not None
                bitmap.bits.set_range(offset, length)

    @contextmanager
    def recorded(self, offset: int, length: int) -> Iterator[None]:
        """Around a request that changes a range: one that failed may have changed it as well."""
        self.prepare()
        try:
            yield
        finally:
            self.record(offset, length)

    @contextmanager
    def all_recorded(self, offsets: Iterable[int], length: int) -> Iterator[None]:
        """The same of requests of one length, at `offsets`."""
        self.prepare()
        try:
            yield
        finally:
            with self._lock:
                for bitmap in self._recording:
                    assert bitmap.bits is not None
                    for offset in offsets:
                        bitmap.bits.set_range(offset, length)

    def _get_ready(self) -> None:
        recording = [bitmap for bitmap in self._bitmaps.values() if bitmap.enabled and not bitmap.inconsistent]
        for bitmap in recording:
            self._load(bitmap)
        self._mark([*recording, *self._changed_ones(), *self._removed])
        with self._lock:
            for bitmap in recording:
                bitmap.changed = True
            self._recording = tuple(recording)
            self._ready = True

    def _changed_ones(self) -> list[DirtyBitmap]:
        return [bitmap for bitmap in self._bitmaps.values() if bitmap.changed]

    def _mark(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        fresh = [bitmap for bitmap in bitmaps if bitmap.in_file and not bitmap.marked and not bitmap.inconsistent]
        if fresh and self._store is not None:
            self._store.mark_in_use(fresh)
            for bitmap in fresh:
                bitmap.marked = True

    def _load(self, bitmap: DirtyBitmap) -> DirtyBits:
        if bitmap.bits is None:
            assert self._store is not None
            bitmap.bits = self._store.load(bitmap)
        return bitmap.bits

    @contextmanager
    def resizing(self, size: int) -> Iterator[None]:
        """Around a change of the node's size to `size` bytes; bitmaps follow it, new parts are not marked.

        Raises UsageError, before anything is changed, where a bitmap is inconsistent or would take too much memory.
        """
        with self._io:
            for bitmap in self._bitmaps.values():
                refuse_inconsistent(bitmap, self._node)
                _check_bytes(size, bitmap.granularity, self._node)
            for bitmap in self._bitmaps.values():
                self._load(bitmap)
            # The tables of all of them stop fitting the disk, enabled or not.
            self._mark([*self._bitmaps.values(), *self._removed])
            try:
                yield
            finally:
                with self._lock:
                    for bitmap in self._bitmaps.values():
                        assert bitmap.bits is not None
                        bitmap.bits.truncate(self._node.size)
                        bitmap.changed = True

    @contextmanager
    def replacing(self, size: int | None) -> Iterator[Callable[[], None]]:
        """Around a change of the whole content, and of the node's size if that is not `size` yet or None: all is marked.

        Yields what the change calls before its first write, unless it is refused; that raises what `prepare` and `resizing`
        raise.
        """
        # Taken before the change takes locks that come after it.
        with self._io, ExitStack() as stack:

            def begin() -> None:
                self.prepare()
                stack.callback(lambda: self.record(0, self._node.size))
                if size is not None and size != self._node.size:
                    stack.enter_context(self.resizing(size))

            yield begin

    # -- the collection -----------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        with self._lock:
            return list(self._bitmaps)

    def all(self) -> list[DirtyBitmap]:
        with self._lock:
            return list(self._bitmaps.values())

    def get(self, name: str) -> DirtyBitmap:
        """Raises NameNotFoundError."""
        with self._lock:
            bitmap = self._bitmaps.get(name)
        if bitmap is None:
            raise NameNotFoundError(f"{_named(self._node)} has no bitmap named {name!r}", node=self._node.name)
        return bitmap

    def has(self, bitmap: DirtyBitmap) -> bool:
        return self._bitmaps.get(bitmap.name) is bitmap

    def add(self, name: str, granularity: int | None, *, persistent: bool, enabled: bool) -> DirtyBitmap:
        """A new bitmap without marks.  The caller has drained the node.

        Raises UsageError for a name or granularity that cannot be, or is taken; UnsupportedFeatureError where the image
        cannot store bitmaps.
        """
        node = self._node
        raw = check_name(name)
        if granularity is None:
            low, high = _DEFAULT_GRANULARITIES
            granularity = min(max(node.cluster_size() or high, low), high)
        if granularity & (granularity - 1) or not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
            raise UsageError(
                f"a granularity is a power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY} bytes, not {granularity}"
            )
        with self._io:
            if name in self._bitmaps:
                raise UsageError(f"{_named(node)} has a bitmap named {name!r} already", node=node.name)
            _check_bytes(node.size, granularity, node)
            if persistent:
                if self._store is None:
                    raise UsageError(f"{_named(node)}: the format {node.driver} stores no bitmaps", node=node.name)
                node.check_writable()
                stored = [bitmap for bitmap in self._bitmaps.values() if bitmap.persistent]
                self._store.check_new(raw, granularity, stored)
            bits = DirtyBits(node.size, granularity)
            bitmap = DirtyBitmap(name, granularity, persistent=persistent, enabled=enabled, bits=bits)
            with self._lock:
                self._bitmaps[name] = bitmap
                self._ready = False
        return bitmap

    def remove(self, bitmap: DirtyBitmap) -> None:
        """Forget a bitmap; the file forgets it when the node is closed.  The caller has drained the node."""
        with self._io:
            self._check_change(bitmap)
            with self._lock:
                del self._bitmaps[bitmap.name]
                if bitmap.in_file:
                    self._removed.append(bitmap)
                self._recording = tuple(other for other in self._recording if other is not bitmap)
                self._ready = False

    def enable(self, bitmap: DirtyBitmap, on: bool) -> None:
        """Let it record, or stop it.  The caller has drained the node."""
        with self._io:
            self._check_change(bitmap)
            refuse_inconsistent(bitmap, self._node)
            with self._lock:
                if bitmap.enabled == on:
                    return
                bitmap.enabled = on
                bitmap.changed = True
                self._recording = tuple(other for other in self._recording if other is not bitmap)
                self._ready = False

    def change(self, bitmap: DirtyBitmap, change: Callable[[DirtyBits], object]) -> None:
        """Let `change` alter the bits."""
        with self._io:
            self._check_change(bitmap)
            refuse_inconsistent(bitmap, self._node)
            bits = self._load(bitmap)
            with self._lock:
                change(bits)
                bitmap.changed = True
                self._ready = False

    def copy(self, bitmap: DirtyBitmap) -> DirtyBits:
        """The bits as they are now."""
        with self._io:
            self._check_present(bitmap)
            refuse_inconsistent(bitmap, self._node)
            bits = self._load(bitmap)
            with self._lock:
                return bits.copy()

    def count(self, bitmap: DirtyBitmap) -> int:
        """Dirty bytes."""
        with self._io:
            self._check_present(bitmap)
            if bitmap.inconsistent:
                return 0
            bits = self._load(bitmap)
            with self._lock:
                return bits.count()

    @contextmanager
    def held(self, bitmap: DirtyBitmap) -> Iterator[None]:
        """While the block runs the bitmap is busy: nobody else may change or remove it."""
        with self._lock:
            self._check_present(bitmap)
            bitmap.holders += 1
        try:
            yield
        finally:
            with self._lock:
                bitmap.holders -= 1

    def begin_copy(self, bitmap: DirtyBitmap) -> DirtyBits:
        """The bits, for a job that copies what they mark; they begin anew, and nobody else may change them.

        The caller has drained the node.
        """
        with self._io:
            bits = self.copy(bitmap)
            self.change(bitmap, lambda mine: mine.clear())
            with self._lock:
                bitmap.holders += 1
        return bits

    def end_copy(self, bitmap: DirtyBitmap, bits: DirtyBits | None) -> None:
        """The job has ended; mark `bits`, which it did not copy, again."""
        with self._io:
            with self._lock:
                bitmap.holders -= 1
            if bits is not None and self.has(bitmap):
                self.change(bitmap, lambda mine: mine.merge(bits))

    def _check_present(self, bitmap: DirtyBitmap) -> None:
        if not self.has(bitmap):
            raise NameNotFoundError(f"the bitmap {bitmap.name!r} was removed", node=self._node.name)

    def _check_change(self, bitmap: DirtyBitmap) -> None:
        self._check_present(bitmap)
        if bitmap.persistent:
            self._node.check_writable()
        if bitmap.holders:
            raise GraphConflictError(
                f"{_named(self._node)}: the bitmap {bitmap.name!r} is in use by a job", node=self._node.name
            )

    # -- the file -----------------------------------------------------------------------------------------------------

    def before_flush(self) -> None:
        """What a flush makes durable must not stand beside entries that changes by hand have made out of date."""
        if self._ready:
            return
        with self._io:
            self._mark([*self._changed_ones(), *self._removed])

    def save(self) -> None:
        """Store what is persistent and not in the file as it is.  No request is in flight.

        What cannot be stored keeps the entry that the file has, which says that it may be out of date.
        """
        with self._io:
            persistent = [bitmap for bitmap in self._bitmaps.values() if bitmap.persistent]
            pending = any(bitmap.changed or not bitmap.in_file for bitmap in persistent)
            if self._store is None or not (pending or self._removed):
                return
            for bitmap in persistent:
                if bitmap.changed:
                    self._load(bitmap)
            self._store.save(persistent)
            with self._lock:
                self._removed.clear()
                self._ready = False
                for bitmap in persistent:
                    bitmap.in_file, bitmap.changed, bitmap.marked = True, False, False


    def read_again(self) -> None:
        """The file was changed by a repair, which may have dropped entries.  The caller has drained the node.

        What is in memory stays, and is stored anew at the end; what was never read is gone with its entry.
        """
        with self._io:
            in_file = {bitmap.name: bitmap for bitmap in self._store.read_again()} if self._store is not None else {}
            with self._lock:
                for bitmap in list(self._bitmaps.values()):
                    bitmap.marked = False
                    if bitmap.in_file and bitmap.name not in in_file:
                        bitmap.in_file = False
                        if bitmap.bits is None:
                            del self._bitmaps[bitmap.name]
                    elif bitmap.in_file and bitmap.bits is not None:
                        bitmap.changed = True
                self._removed = [bitmap for bitmap in self._removed if bitmap.name in in_file]
                self._recording = tuple(bitmap for bitmap in self._recording if self.has(bitmap))
                self._ready = False


def tracking_of(node: Node) -> Tracking:
    """The bitmaps of a node, for a user that asks for them; from then on its requests look at them."""
    with _creation:
        if node.bitmaps is None:
            node.bitmaps = Tracking(node, node.bitmap_store())
        return node.bitmaps


def check_name(name: str) -> bytes:
    """The name as it is stored.  Raises UsageError for one that cannot be."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise UsageError(f"{name!r} is no name for a bitmap: {exc.reason}") from exc
    if not raw or len(raw) > MAX_NAME_LENGTH:
        raise UsageError(f"the name of a bitmap has 1 to {MAX_NAME_LENGTH} bytes, not {len(raw)}")
    if b"\0" in raw:
        raise UsageError(f"the name of a bitmap contains no NUL character: {name!r}")
    return raw


def refuse_inconsistent(bitmap: DirtyBitmap, node: Node) -> None:
    if bitmap.inconsistent:
        raise UsageError(
            f"{_named(node)}: the bitmap {bitmap.name!r} is inconsistent: it was not saved, and can only be removed",
            node=node.name,
        )


def _check_bytes(size: int, granularity: int, node: Node) -> None:
    length = bytes_for(size, granularity.bit_length() - 1)
    if length > MAX_BITMAP_BYTES:
        raise UsageError(
            f"{_named(node)}: a bitmap with a granularity of {granularity} takes {length} bytes for a disk of {size}; "
            f"a coarser one keeps below the limit of {MAX_BITMAP_BYTES}",
            node=node.name,
        )


def _named(node: Node) -> str:
    return node.filename or node.name
