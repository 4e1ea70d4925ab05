"""Node: the contract that every driver keeps, and Filter, the base that refuses what it does not know.

A node is a vertex of the block graph.  It answers where a range lives (`resolve`) and prepares places to be written
(`prepare_write`); who moves the bytes is `blocklib.plan`.  Requests reach a node aligned to what it declares and inside its
size; a node keeps no buffer after it returns, never touches the nodes above it and never changes the graph.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Protocol, Self, TypeAlias

from blocklib.errors import PoisonedError, ReadOnlyError, StorageError, UnsupportedFeatureError, UsageError
from blocklib.extents import FLAG_OFFSET_VALID
from blocklib.requests import RangeLock

if TYPE_CHECKING:
    from blocklib._fast.extents import Rows
    from blocklib._fast.work import Work
    from blocklib.extents import Run
    from blocklib.graph import Claim, Edge
    from blocklib.reports import CheckReport, RepairReport, SnapshotInfo
    from blocklib.requests import RequestTracker
    from blocklib.tracking import BitmapStore, ExportedBitmaps, Tracking

DetectZeroes: TypeAlias = Literal["off", "on", "unmap"]
Preallocation: TypeAlias = Literal["off", "metadata", "falloc", "full"]

_anonymous = itertools.count()

CONSISTENT_READ: Final = 0x1
"""Permission: what is read is a state that the users of the node meant."""
WRITE: Final = 0x2
WRITE_UNCHANGED: Final = 0x4
"""Permission for writes that change no guest-visible byte (copy-on-read, stream)."""
RESIZE: Final = 0x8


class NamedReference(NamedTuple):
    """A file that an image names: what kind of reference it is, the name as stored, and the format stored with it."""

    kind: str
    name: str
    format: str | None


class WriteTicket:
    """Fresh space for one run of a write, not yet part of the image.

    `head` and `tail` are the numbers of guest bytes before and after the run that share its clusters and must be copied.
    The caller writes head, data and tail as one vector and then calls `commit`, or `abort` when the write failed.
    """

    __slots__ = ("head", "tail")

    head: int
    tail: int

    def commit(self) -> None:
        """Link the new place: from now on readers and flushes see it."""
        raise UsageError("this ticket cannot be committed")

    def abort(self) -> None:
        """Give the space back; the image is as before."""
        raise UsageError("this ticket cannot be aborted")


WriteRun: TypeAlias = "tuple[Edge | None, int, int, WriteTicket | None]"
"""(child, child offset in bytes, length in bytes, ticket or None where the child may be written in place).

With child None the node itself must see the bytes: they go to its `write_special`, with the offset as it stands here.
"""


COMPRESSION_LEVELS: Final = {"zlib": range(1, 10), "zstd": range(1, 23)}
"""Kind of compression -> the levels that it has."""


def check_level(kind: str, level: int | None) -> None:
    """Raises UsageError for a level that the kind of compression does not have; None is its default."""
    levels = COMPRESSION_LEVELS[kind]
    if level is not None and level not in levels:
        raise UsageError(f"{kind} has the compression levels {levels[0]} to {levels[-1]}, not {level}")


class Compressor(Protocol):
    """Compresses what a node stores compressed; any number of threads may use it."""

    unit: int
    """Bytes that are compressed together, beginning at a multiple of it; only the end of the disk may cut them short."""
    kind: str
    """"zlib" or "zstd"."""

    def compress(self, data: memoryview, /) -> list[bytes | None]:
        """Each unit of `data` compressed, or None where it does not shrink."""

    def compress_piece(self, number: int, parts: Sequence[memoryview], /) -> Sequence[Sequence[bytes | None]]:
        """The same for each of `parts`, which belong to piece `number` of something larger: 0, 1 and so on, each once."""


class PendingChange:
    """The prepared half of a two-phase change of a node (a reopen, other permissions); exactly one method is called."""

    __slots__ = ("_abort", "_commit")

    def __init__(self, commit: Callable[[], None], abort: Callable[[], None]) -> None:
        self._commit = commit
        self._abort = abort

    def commit(self) -> None:
        self._commit()

    def abort(self) -> None:
        self._abort()


class Node:
    """The driver contract.  Offsets and lengths are bytes; `offset` is one of this node, `child_offset` one of a child."""

    driver: ClassVar[str]
    """The name of the driver, in QEMU's spelling."""
    is_leaf: ClassVar[bool] = False
    """A protocol node: it has no children and moves bytes itself (`preadv`, `pwritev`)."""
    is_device = False
    """A leaf over a block device: its size is not ours to change."""
    supports_backing: ClassVar[bool] = False
    """An image of this format may have a backing file."""
    compresses: ClassVar[bool] = False
    """An image of this format may have compressed clusters: `compressor` may give one."""
    is_filter: ClassVar[bool] = False
    """Passes its one child's content through unchanged."""
    sees_reads: ClassVar[bool] = False
    """Reads may not pass this node unseen: they are issued through `read_special`."""
    sees_writes: ClassVar[bool] = False
    main_option: ClassVar[str] = "file"
    """The option that gives a filter the child whose content it passes on, its "file", whatever QEMU calls it."""
    written_children: ClassVar[frozenset[str]] = frozenset()
    """Children that this node writes for a purpose of its own: they are writable while the disk is open for reading, too."""

    def __init__(self, name: str | None, filename: str | None, *, read_only: bool) -> None:
        self.name = name or f"#block{next(_anonymous):03d}"
        self.filename = filename
        self.read_only = read_only
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.size = 0
        self.request_alignment = 1
        self.zero_alignment = 1
        self.zero_part_alignment = 0
        """Bytes: aligned to this, part of a zeroing unit can be made zero whatever else is in the unit; 0 where none can."""
        self.detect_zeroes: DetectZeroes = "off"
        self.discard_passes = False
        self.tracker: RequestTracker | None = None
        self.write_ranges = RangeLock()
        self.changing = threading.Lock()
        """Held by who changes the whole image - its size, who owns its clusters, its header - or must find it at rest: drains
        nest, so that two threads may have drained the node.  Taken by `graph.alone`."""
        self.claim: Claim | None = None
        """Of the job that may change which images the chain with this node has."""
        self.poisoned: str | None = None
        self.bitmaps: Tracking | None = None
        """Dirty bitmaps: None while there are none that a write could concern."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.filename or self.driver}>"

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """A node made from checked options (dotted names, see `blocklib.options`); opens nothing yet."""
        raise UsageError(f"{cls.driver}: not made from options")

    # -- making an image ----------------------------------------------------------------------------------------------

    @classmethod
    def image_maker(cls, options: Mapping[str, Any]) -> Callable[[Edge], None]:
        """What writes a new image into an empty file, durable on return.  `options` are checked creation options.

        Raises OptionError, before any file is touched, for options that contradict each other or the format.
        """
        raise UsageError(f"{cls.driver}: images of this format cannot be created")

    def preallocate(self, preallocation: Preallocation) -> None:
        """Give the whole of a new, empty image its space."""

    # -- opening and closing ------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read what must be known before the first request; writes nothing.

        Raises ImageError for bytes that make no sense, StorageError when the host fails.
        """

    def activate(self) -> None:
        """Called once the whole chain is open and the node is writable: clear or set what an open image says of itself."""

    def close(self) -> None:
        """Make everything durable and let go of what the node holds; the children are released by the graph."""

    def abandon(self) -> None:
        """Let go without writing anything: the caches of a poisoned, collected or forked node are dropped."""

    def references(self) -> Sequence[NamedReference]:
        """The files that this image names."""
        return ()

    def prepare_reopen(self, *, read_only: bool) -> PendingChange:
        """Get ready to become writable or read-only; nothing changes for requests before the commit."""

        def commit() -> None:
            self.read_only = read_only

        return PendingChange(commit, lambda: None)

    @property
    def stores_bitmaps(self) -> bool:
        """Whether dirty bitmaps can be stored in this image."""
        return False

    def bitmap_store(self) -> BitmapStore | None:
        """Where dirty bitmaps outlive the node; None where the format stores none.  Raises ImageError."""
        return None

    @property
    def exported(self) -> ExportedBitmaps | None:
        """The dirty bitmaps that a server keeps of this node's bytes."""
        return None

    # -- permissions --------------------------------------------------------------------------------------------------

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        """(permissions needed on a child, permissions others may hold there) when users of this node want `wanted`."""
        return wanted, shared

    def prepare_permissions(self, wanted: int, shared: int) -> PendingChange | None:
        """Claim outside this process what `wanted` and `shared` imply (file locks); None where there is nothing to claim.

        Raises LockedError.
        """
        return None

    @property
    def zeroes_by_metadata(self) -> bool:
        """Whether `zero_range` works; otherwise zeroes are written as bytes."""
        return True

    @property
    def needs_data_file(self) -> bool:
        """Whether guest data lies in a file of its own, the child "data-file"."""
        return False

    @property
    def names_backing(self) -> bool:
        """Whether the image names a backing file, open or not."""
        return False

    @property
    def preallocation_hides_backing(self) -> bool:
        """Whether what a resize preallocates reads as zero although something lies below."""
        return True

    # -- where ranges live --------------------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> Run:
        """Where `offset` lives and for how many bytes (1 <= run length <= length) the answer holds.

        A leaf says which part is data and which is a hole, with child None.  Valid while the request that asked is tracked.
        """
        raise UsageError(f"{self.driver}: nothing to resolve")

    def resolve_rows(self, offset: int, length: int, rows: Rows) -> None:
        """The same answer for a range, as far as there is room for it in `rows`, which is empty; clipped to the range."""
        end = offset + length
        while offset < end and not rows.full:
            _kind, _child, child_offset, n, flags = self.resolve(offset, end - offset)
            rows.append(offset, n, child_offset if flags & FLAG_OFFSET_VALID else -1, flags)
            offset += n

    def table_entries(self, offset: int, length: int) -> int:
        """How many entries of tables say where a range lives: what it costs at most to resolve it all."""
        return 0

    def layout(self) -> object:
        """What is equal to an earlier answer only if all data still lives where it did then.

        Asked inside a request: what moves afterwards stays readable in its old place for as long as that lasts.
        """
        return object()

    def ask_for_holes(self) -> None:
        """Called before block status is reported: find out once whether data may be holes in the child."""

    def read_special(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from a run that resolved to KIND_SPECIAL (not longer than that run).

        False when a writer has changed the run meanwhile: it must be resolved again.
        """
        raise UsageError(f"{self.driver}: nothing here needs decoding")

    def plain_descriptor(self) -> int | None:
        """The descriptor that a leaf's bytes can be taken from by whoever likes, at the offsets of the node, while it is
        `read_only`; None where there is none."""
        return None

    def data_edge(self) -> Edge | None:
        """The child that KIND_DATA runs live in, or None where the node has no plain data."""
        return self.children.get("file")

    def hear(self, event: str) -> None:
        """A node above is about to do what `event` says, in this thread: one of `blocklib.options.faults.EVENTS`.

        For filters that inject faults; nobody else listens.  What is raised counts as the failure of what was to be done.
        """

    # -- changing them ------------------------------------------------------------------------------------------------

    def prepare_write(self, offset: int, length: int) -> WriteRun:
        """A place for the first part of [offset, offset + length): to be written in place, or fresh with a ticket.

        Raises StorageError (ENOSPC), ImageLimitError, PoisonedError.
        """
        raise ReadOnlyError(f"{self.driver}: not writable", node=self.name)

    def prepare_fill(self, offset: int, length: int) -> tuple[int, WriteRun | None]:
        """(bytes that the answer is for, a place for them as `prepare_write` gives), where this node holds nothing.

        None for the place of bytes that it does hold.  Until the end of the ticket no other write to them begins.
        """
        raise UsageError(f"{self.driver}: nothing lies below an image of this format", node=self.name)

    def fill_zeroes(self, offset: int, length: int) -> bool:
        """Make whole zeroing units read as zero where this node holds nothing; False, with nothing done, where it cannot."""
        return False

    def write_fresh(
        self, runs: Sequence[tuple[int, memoryview]], placed: Callable[[], None]
    ) -> Sequence[tuple[int, memoryview]]:
        """Write those of `runs` (offset and data each, ascending, apart from each other) that need nothing but fresh space; the
        others are left.  `placed` is called once it is settled where all go, if none is left.  Raises as `prepare_write`.
        """
        return runs

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        """Write `views`, one after the other, to `offset`, for which `prepare_write` gave `place` but no child.

        Not longer than that run, with the head and the tail of its ticket.
        """
        raise UsageError(f"{self.driver}: nothing here needs encoding")

    def make_room(self) -> bool:
        """A write found the host full: whether space was set free that it may find when it is tried again."""
        return False

    def compressor(self, level: int | None = None) -> Compressor:
        """What makes the streams that `write_packed` stores; the higher the level, the smaller and slower.

        Raises UnsupportedFeatureError where this node stores nothing compressed, UsageError for a level that there is not.
        """
        raise UnsupportedFeatureError(
            f"{self.filename or self.name}: the format {self.driver} cannot be written compressed",
            features=("compressed clusters",),
            node=self.name,
        )

    def write_packed(self, offset: int, packed: Sequence[bytes | None]) -> bool:
        """Store units from `offset` on, as the node's `compressor` made them; None is a unit that is left as it is.

        False, with nothing changed, where they have to be written as they were.  Raises StorageError (EIO), with nothing
        changed, where one of those units has a place in this node already.
        """
        raise UsageError(f"{self.driver}: nothing is stored compressed here")

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        """For filters whose `compressor` is their child's, which stores this: `packed` is each `unit` of `data` compressed."""
        raise UsageError(f"{self.driver}: nothing is passed on here")

    def grow_to(self, end: int) -> None:
        """A node above is about to write up to `end`, past the size of this node, which no leaf is.

        Raises StorageError (ENOSPC) where the size is fixed by more than the length of a file.
        """
        raise StorageError(
            f"{self.filename or self.name}: {end} bytes do not fit the disk of {self.size}",
            errno=errno.ENOSPC,
            operation="write",
            node=self.name,
        )

    def zero_part(self, offset: int, length: int) -> bool:
        """Make part of one zeroing unit read as zero without writing bytes; False where bytes must be written.

        Where there is a `zero_part_alignment`, the part is aligned to it (or ends with the node), or lies inside one.
        """
        return False

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range, aligned to `zero_alignment`, read as zero; with `unmap` give the space back where possible."""
        raise ReadOnlyError(f"{self.driver}: not writable", node=self.name)

    def discard_range(self, offset: int, length: int) -> None:
        """The caller no longer needs the range, aligned to `zero_alignment`; the driver chooses what it reads as now."""
        raise ReadOnlyError(f"{self.driver}: not writable", node=self.name)

    def reach(self, size: int) -> bool:
        """First half of growing: let requests reach up to `size`, in memory only; `truncate` makes that durable.

        Between the two what the disk gains is made to read as zero; if that fails, the old size takes the first half back.
        False where new bytes read as zero anyway: nothing was done.
        """
        return False

    def check_resize(self, size: int, preallocation: Preallocation) -> None:
        """Called before anything of a change of the size begins: raises what stands against it."""

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        """Change the size; new bytes read as zero (backing files do not show through).  The caller has drained the node."""
        raise ReadOnlyError(f"{self.driver}: cannot be resized", node=self.name)

    def flush(self) -> None:
        """Make every completed write durable."""
        for edge in tuple(self.children.values()):
            edge.flush()

    # -- many requests at once ----------------------------------------------------------------------------------------

    def find_batch(self, work: Work) -> bool:
        """Look up where the pieces of `work` live: moves from `data_edge`, zeroes, and what is in the backing node.

        False, with nothing done, where requests must come one by one.  What needs more than moving is handed back.
        """
        return False

    def place_batch(self, work: Work) -> bool:
        """Make moves of what may be written in place; the rest, in pieces of one unit, goes to the target area, in order.

        False, with nothing done, where requests must come one by one.  Raises PoisonedError, ImageCorruptError.
        """
        return False

    def reserve_batch(self, work: Work, most_bytes: int, alignment: int) -> WriteTicket | None:
        """Make rows of the next pieces that `place_batch` left, of about `most_bytes` in all, and fresh space for those
        that need it; None where none does.  Memory that moves are made from shall be a multiple of `alignment`.

        Raises StorageError, ImageError; the rows say then what was not done.
        """
        raise UsageError(f"{self.driver}: nothing is reserved here")

    # -- leaves only --------------------------------------------------------------------------------------------------

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill `views` from the leaf; bytes past its end read as zero."""
        raise UsageError(f"{self.driver}: not a protocol")

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        """Write all of `views`; past the end the leaf grows."""
        raise UsageError(f"{self.driver}: not a protocol")

    def transfer(self, offsets: Any, addresses: Any, lengths: Any, results: Any, *, writing: bool) -> None:
        """Make many transfers, at once where the leaf can: `lengths[i]` bytes at `offsets[i]`, to or from `addresses[i]`.

        All four are contiguous buffers of native 64-bit integers.  Each of `results` becomes 0 or an error number; bytes past
        the end read as zero, and writes there make the leaf grow.  The caller keeps the memory in its place until this
        returns, also by an exception, and has aligned it all to `request_alignment`.  Transfers must not overlap where one
        of them writes.  Raises ClosedError, ReadOnlyError.
        """
        from ctypes import c_char

        for index, (offset, address, length) in enumerate(zip(offsets, addresses, lengths)):
            view = memoryview((c_char * length).from_address(address)).cast("B")
            try:
                if writing:
                    self.pwritev(offset, (view,))
                else:
                    self.preadv(offset, (view,))
                results[index] = 0
            except StorageError as exc:
                results[index] = exc.errno or errno.EIO

    def take_hints(self, *, in_place: bool, extent_size: int) -> None:
        """While it is empty: write in place instead of copying, grow in extents of so many bytes (0: as it likes).

        Where the file system has no such thing, nothing happens.
        """

    # -- whole images -------------------------------------------------------------------------------------------------

    @classmethod
    def measure(cls, options: Mapping[str, Any], data_bytes: Callable[[int], int]) -> tuple[int, int]:
        """(bytes required, bytes when fully allocated) for a new image with checked creation `options`.

        `data_bytes(unit)` tells how much of it will hold data, in whole units.  Raises OptionError.
        """
        raise cls._incapable("measured")

    @classmethod
    def measure_bitmaps(cls, options: Mapping[str, Any], bitmaps: Iterable[tuple[str, int]]) -> int | None:
        """Bytes that bitmaps (name, granularity in bytes) take in a new image with checked creation `options`.

        None where such an image stores none.
        """
        return None

    def check(self, progress: Callable[[int, int], object] | None = None) -> CheckReport:
        """Compare what the image refers to with what it counts; `progress` hears of bytes looked at and in total.

        The caller has drained the node.  Raises UnsupportedFeatureError where that is not known how.
        """
        raise self._incapable("checked")

    def repair(
        self,
        what: Literal["leaks", "all"],
        *,
        dry_run: bool = False,
        expect: RepairReport | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> RepairReport:
        """Repair what `check` finds: see `blocklib.repair`.  The caller has drained the node."""
        raise self._incapable("repaired")

    def list_snapshots(self) -> Sequence[SnapshotInfo]:
        """The snapshots inside the image, in its order.  Raises ImageError where they make no sense."""
        return ()

    def create_snapshot(self, name: str) -> SnapshotInfo:
        """Keep the present state inside the image.  The caller is alone (`graph.alone`), here and below.

        Raises UsageError, ImageError with nothing changed.
        """
        raise self._no_snapshots()

    def apply_snapshot(self, id: str, name: str) -> None:
        """Bring back the state, and the size, that a snapshot holds.  Raises NameNotFoundError, ImageError."""
        raise self._no_snapshots()

    def delete_snapshot(self, id: str, name: str) -> None:
        """Forget a snapshot.  Raises NameNotFoundError, ImageError."""
        raise self._no_snapshots()

    def _no_snapshots(self) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"{self.filename or self.name}: there are no internal snapshots in the format {self.driver}",
            features=("internal snapshots",),
            node=self.name,
        )

    def read_vm_state(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the state of a virtual machine that is kept beside the disk.

        Raises StorageError (ENOTSUP) where there is no place for one.
        """
        raise self._no_vm_state("read")

    def write_vm_state(self, offset: int, data: memoryview) -> None:
        """Keep `data` there.  The caller is alone (`graph.alone`).  Raises StorageError (ENOTSUP)."""
        raise self._no_vm_state("write")

    def _no_vm_state(self, operation: str) -> StorageError:
        return StorageError(
            f"{self.filename or self.name}: there is no place for the state of a virtual machine in {self.driver}",
            errno=errno.ENOTSUP,
            operation=operation,
            node=self.name,
        )

    def make_empty(self) -> None:
        """Forget all data, so that the backing file shows through again; the caller has drained the node."""
        raise self._incapable("emptied")

    def change_backing(self, name: str | None, format: str | None) -> None:
        """Name another backing file, as it is to be stored; durable on return.  Raises UsageError for a name too long."""
        raise self._incapable("given a backing file")

    def check_amend(self, options: Mapping[str, Any], *, force: bool = False) -> None:
        """Raises an error, with nothing changed, where the image cannot become what checked amend `options` say.

        The caller has drained the node.
        """
        raise self._incapable("amended")

    def amend(
        self, options: Mapping[str, Any], *, force: bool = False, progress: Callable[[int, int], object] | None = None
    ) -> None:
        """Make the changes that `check_amend` has accepted, all but the size; durable on return.

        `force` allows what locks everybody out.  The caller has drained the node.
        """
        raise self._incapable("amended")

    @classmethod
    def _incapable(cls, participle: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(f"images of the format {cls.driver} cannot be {participle}", features=(participle,))

    # -- telling ------------------------------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        """Bytes that the node occupies on the host, or None where that is unknown."""
        edge = self.children.get("file")
        return edge.node.allocated_size() if edge is not None else None

    def cluster_size(self) -> int | None:
        """The allocation unit in bytes, or None where there is none."""
        return None

    def data_unit(self) -> int | None:
        """The bytes of which a write fills all or none: a cluster, or part of one where parts can be told apart."""
        return self.cluster_size()

    def info_facts(self) -> Mapping[str, Any]:
        """Fields of ImageInfo that only this driver knows: encrypted, dirty, snapshots."""
        return {}

    def format_specific(self) -> Mapping[str, Any]:
        """What ``qemu-img info`` prints under "format-specific", in QEMU's names; empty where there is nothing."""
        return {}

    # -- guards -------------------------------------------------------------------------------------------------------

    def poison(self, reason: str) -> None:
        """A metadata change was torn: refuse everything from now on but closing.  What is on disk stays valid."""
        if self.poisoned is None:
            self.poisoned = reason

    def check_usable(self) -> None:
        """Raises PoisonedError once `poison` was called."""
        if self.poisoned is not None:
            raise PoisonedError(f"{self.filename or self.name}: {self.poisoned}; close and reopen it", node=self.name)

    def check_writable(self) -> None:
        """Raises ReadOnlyError where the node is open for reading."""
        if self.read_only:
            raise ReadOnlyError(f"{self.filename or self.name}: open for reading only", node=self.name)


class Filter(Node):
    """Passes its one child ("file") through unchanged.  What a filter does not declare is refused, never forwarded."""

    is_filter = True
    watches: ClassVar[bool] = False
    """It must hear of every change: one that is no request, such as a snapshot that is applied, is refused below it."""
    holds_requests: ClassVar[bool] = False
    """Requests may wait in this node for longer than they take; `hurry` lets them go."""

    def hurry(self, hurried: bool) -> None:
        """A drain waits for the requests inside: hold none of them back until it has ended.  Nests."""

    def settle(self) -> None:
        """No request is inside any more: wait until nothing is done here for those that have ended."""
