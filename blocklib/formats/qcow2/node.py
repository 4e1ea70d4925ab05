"""The qcow2 driver: one image, read and written through its file.

Source of everything on disk: QEMU's ``docs/interop/qcow2.rst``.  Nothing is written before the whole header has been
accepted, and nothing at all to an image that is open read-only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from blocklib.errors import BlocklibError, ImageCorruptError
from blocklib.extents import KIND_BACKING, Run
from blocklib.formats.qcow2 import autoclear, data_file, filling, header_change, layout, telling, writing
from blocklib.formats.qcow2.batch_node import BatchNode
from blocklib.formats.qcow2.cache import MissingTableError
from blocklib.formats.qcow2.cluster_writes import ClusterWritingNode
from blocklib.formats.qcow2.corruption import mark_corrupt, refuse_corrupt
from blocklib.formats.qcow2.cow import Allocations, AllocationTicket
from blocklib.formats.qcow2.header import Header, check_supported, header_span, parse_header
from blocklib.formats.qcow2.mapping import Mapping as ClusterMapping
from blocklib.formats.qcow2.sharing import refuse_shared_l2_tables
from blocklib.formats.qcow2.snapshots.table import read_snapshots
from blocklib.formats.qcow2.tables import Table, read_table
from blocklib.formats.qcow2.writeback import WriteBack
from blocklib.node import (
    CONSISTENT_READ,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    NamedReference,
    PendingChange,
    Preallocation,
    WriteRun,
)
from blocklib.policy import Limits
from blocklib.requests import RequestTracker

if TYPE_CHECKING:
    from blocklib._fast.extents import Rows
    from blocklib.formats.qcow2.encryption import Encryption, Locked
    from blocklib.graph import Edge
    from blocklib.reports import CheckReport, RepairReport
    from blocklib.tracking import BitmapStore

_T = TypeVar("_T")


class Qcow2Node(BatchNode, ClusterWritingNode):
    """A qcow2 image.  `header` and `geometry` are valid after `load`; the tables only if `metadata_only` is False.

    `stored_header` is the header that the file has; `header` differs from it only while it is being changed.
    """

    driver = "qcow2"
    supports_backing = True
    compresses = True

    def __init__(
        self,
        name: str | None,
        filename: str | None,
        *,
        read_only: bool,
        limits: Limits | None = None,
        metadata_only: bool = False,
        locked: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, filename, read_only=read_only)
        self.limits = limits if limits is not None else Limits()
        self.metadata_only = metadata_only
        self.locked = locked
        """Encrypted data will not be read or written, so that no secret is needed."""
        self.options = options if options is not None else {}
        self.lock = threading.Lock()
        """Guards tables, counts, allocations and the list of freed clusters; memory only, never held across I/O."""
        self.allocations = Allocations(self.lock)
        self.writeback = WriteBack(self)
        self.corruption: str | None = None
        """What was found corrupt on the way to a write, after which nothing more is written."""
        self.crypt: Encryption | Locked | None = None
        """What encrypts and decrypts the data; None where nothing does."""
        self._holes_asked = False
        self.snapshots = []
        self._data_child = "file"

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Qcow2Node:
        return cls(options["node-name"], extra.pop("filename", None), read_only=read_only, options=options, **extra)

    @classmethod
    def image_maker(cls, options: Mapping[str, Any]) -> Callable[[Edge], None]:
        from blocklib.formats.qcow2.create import encryption_area, header_for, write_empty_image

        header = header_for(options["size"], options)
        encryption = encryption_area(header, options)
        return lambda file: write_empty_image(file, header, encryption)

    def preallocate(self, preallocation: Preallocation) -> None:
        from blocklib.formats.qcow2.resize import preallocate

        if data_file.is_external(self.header):
            data_file.grow(self, 0, self.size, preallocation)
        preallocate(self, 0, self.size, preallocation)

    # -- opening and closing ------------------------------------------------------------------------------------------

    @property
    def file(self) -> Edge:
        return self.children["file"]

    @property
    def data(self) -> Edge:
        """The child that guest clusters lie in: an external data file, or the image's own file."""
        return self.children[self._data_child]

    def data_edge(self) -> Edge | None:
        return self.children.get(self._data_child)

    def load(self) -> None:
        """Read and accept the header, the L1 table and the refcount table.

        Raises FormatMismatchError, ImageCorruptError, ImageLimitError, UnsupportedFeatureError, StorageError.
        """
        file = self.file
        self.header = self._read_header()
        self.stored_header = header_change.copy(self.header)
        self.geometry = self.header.geometry()
        self.size = self.header.size // layout.SIZE_UNIT * layout.SIZE_UNIT  # QEMU shows whole sectors
        self.zero_alignment = self.geometry.cluster_size
        self.zero_part_alignment = self.geometry.subcluster_size
        if self.metadata_only:
            self.load_named_snapshot()
            return
        from blocklib.formats.qcow2.overlap import OverlapGuard, kinds_for
        from blocklib.formats.qcow2.refcounts import Refcounts
        from blocklib.formats.qcow2.settings import settings_for

        check_supported(self.header, layout.INCOMPATIBLE_KNOWN, node=self.filename)
        self._data_child = data_file.CHILD if data_file.is_external(self.header) else "file"
        if self.crypt is None and (self.header.crypt_method or self.options.get("encrypt.format")):
            from blocklib.formats.qcow2.encryption import open_encryption

            self.crypt = open_encryption(self)
        header, geometry = self.header, self.geometry
        self.snapshots = read_snapshots(file, header, node=self.filename)
        settings = settings_for(self.options, header, node=self.filename)
        self.writeback.lazy = settings.lazy_refcounts
        self.mapping = self._mapping_class()(
            file,
            geometry,
            self._read_l1(),
            header.l1_table_offset,
            version=header.version,
            external=data_file.is_external(header),
            slice_length=settings.slice_length,
            cache_bytes=settings.l2_cache,
            node=self.filename,
        )
        self.refcounts = Refcounts(
            file,
            geometry,
            read_table(file, "Q", header.refcount_table_offset, header.refcount_table_clusters << geometry.cluster_bits),
            header.refcount_table_offset,
            cache_bytes=max(settings.refcount_cache, 1 << 20, 8 << geometry.cluster_bits),
            node=self.filename,
        )
        self.mapping.cache.clean_interval = self.refcounts.cache.clean_interval = settings.clean_interval
        self.refcounts.l1_clusters = self.active_l1_clusters()
        self.guard = self.refcounts.guard = OverlapGuard(self, kinds_for(self.options))
        self.corruption = None
        if not self.read_only:
            self._refuse_what_cannot_be_written()
            self.guard.refresh()
            self.tracker = RequestTracker()

    def _read_l1(self) -> Table:
        """The active L1 table; that of a snapshot, with the size of its disk, where the options name one."""
        index = self.load_named_snapshot()
        if index is None:
            offset = self.header.l1_table_offset
            l1 = read_table(self.file, "Q", offset, self.header.l1_size * 8)
            refuse_shared_l2_tables(
                l1, self.geometry, self.file.size, structure="L1 table", host_offset=offset, node=self.filename
            )
            return l1
        from blocklib.formats.qcow2.snapshots.changes import load_l1

        return load_l1(self, index)

    @property
    def preallocation_hides_backing(self) -> bool:
        return not self.geometry.extended_l2

    def _mapping_class(self) -> type[ClusterMapping]:
        if not self.geometry.extended_l2:
            return ClusterMapping
        from blocklib.formats.qcow2.subcluster_mapping import SubclusterMapping

        return SubclusterMapping

    def active_l1_clusters(self) -> tuple[int, int]:
        """(first cluster, number) of the active L1 table."""
        geometry = self.geometry
        return self.mapping.l1_offset >> geometry.cluster_bits, geometry.l1_clusters_for(len(self.mapping.l1))

    def _read_header(self) -> Header:
        file = self.file
        start = bytearray(min(4096, max(file.size, 1)))
        file.read(0, memoryview(start), "metadata")
        span = min(header_span(memoryview(start)), file.size)
        if span > len(start):
            start = bytearray(span)
            file.read(0, memoryview(start), "metadata")
        return parse_header(
            bytes(start), limits=self.limits, file_length=file.size, for_check=self.metadata_only, node=self.filename
        )

    def _refuse_what_cannot_be_written(self) -> None:
        header = self.header
        self.refuse_to_write_snapshot()
        if header.incompatible_features & layout.INCOMPATIBLE_CORRUPT:
            raise ImageCorruptError(
                f"{self.filename}: the image is marked corrupt and must be repaired before it is written",
                structure="header field incompatible_features",
                host_offset=layout.FIELD_OFFSETS["incompatible_features"],
                expected="no corrupt bit",
                found=f"{header.incompatible_features:#x}",
                node=self.filename,
            )
        if self.bitmaps is None and header.has_bitmaps:
            from blocklib.formats.qcow2.bitmaps import tracked

            self.bitmaps = tracked(self)

    @property
    def stores_bitmaps(self) -> bool:
        return self.header.version > layout.VERSION_2

    def bitmap_store(self) -> BitmapStore:
        from blocklib.formats.qcow2.bitmaps import StoredBitmaps

        return StoredBitmaps(self)

    def activate(self) -> None:
        """Repair a dirty image and clear autoclear bits that we do not keep up.  The image is writable and accepted."""
        if self.read_only:
            return
        if self.header.incompatible_features & layout.INCOMPATIBLE_DIRTY:
            from blocklib.formats.qcow2.repair.image import repair_after_crash

            repair_after_crash(self)
        autoclear.clear_what_is_not_kept_up(self)

    def close(self) -> None:
        try:
            if not self.read_only and not self.metadata_only:
                self._finish()
        finally:
            self.abandon()

    def _finish(self) -> None:
        """Write everything, or raise ImageCorruptError where something is left that may not be written any more.

        Bitmaps come last: until then they say that they are in use.
        """
        if self.corruption is None or self.writeback.has_changes:
            self.writeback.finish()
        if self.bitmaps is not None:
            try:
                self.bitmaps.save()
            finally:
                if self.poisoned is None and self.corruption is None:
                    self.writeback.finish()

    def abandon(self) -> None:
        if not self.metadata_only and hasattr(self, "refcounts"):  # else loading failed before there was anything to forget
            self.mapping.cache.clear()
            self.refcounts.cache.clear()

    def references(self) -> Sequence[NamedReference]:
        references = []
        name = self.header.backing_name
        if name is not None:
            references.append(NamedReference("backing", name, self.header.backing_format))
        name = self.header.data_file_name
        if name is not None and data_file.is_external(self.header):
            references.append(NamedReference(data_file.CHILD, name, None))
        return references

    def prepare_reopen(self, *, read_only: bool) -> PendingChange:
        if read_only:
            self._finish()
        else:
            self._refuse_what_cannot_be_written()
            self.guard.refresh()

        def commit() -> None:
            self.read_only = read_only
            self.tracker = None if read_only else RequestTracker()
            self.activate()

        return PendingChange(commit, lambda: None)

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        if child_name == "backing":
            # What is below must keep its content as long as we read through it.
            below = CONSISTENT_READ | WRITE_UNCHANGED
            return CONSISTENT_READ, below | (WRITE | RESIZE if shared & WRITE else 0)
        if child_name == data_file.CHILD:
            return wanted | (RESIZE if wanted & WRITE else 0), shared & ~RESIZE
        needed = CONSISTENT_READ if read_only else CONSISTENT_READ | WRITE | RESIZE
        return needed, CONSISTENT_READ | WRITE_UNCHANGED

    # -- where ranges live --------------------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> Run:
        mapping = self.mapping
        slice_offset = mapping.slice_at(offset)
        if slice_offset is None:
            return KIND_BACKING, None, 0, mapping.unmapped_length(offset, length), 0
        table = mapping.cache.peek(slice_offset)
        if table is None:
            table = mapping.cache.load(slice_offset, self.lock)
        run = mapping.resolve(table, mapping.index_in_slice(offset), offset, length, self.data)
        return run if self.crypt is None else self.crypt.hidden(run)

    def resolve_rows(self, offset: int, length: int, rows: Rows) -> None:
        from blocklib.formats.qcow2.mapping_table import resolve_rows

        told = -1 if self.crypt is None else self.crypt.told
        resolve_rows(self.mapping, self.file, self.resolve, told, offset, length, rows)

    def table_entries(self, offset: int, length: int) -> int:
        return self.mapping.entries(offset, length)

    def read_special(self, offset: int, view: memoryview) -> bool:
        if self.crypt is not None and self.crypt.read(self, offset, view):
            return True
        from blocklib.formats.qcow2 import special

        return special.read(self, offset, view)

    def ask_for_holes(self) -> None:
        """Find out, before block status is reported, whether data clusters may be holes in the file."""
        if self._holes_asked or self.metadata_only:
            return
        self._holes_asked = True
        from blocklib.formats.qcow2.resize import looks_preallocated

        if looks_preallocated(self):
            self.mapping.report_holes()

    # -- writing ------------------------------------------------------------------------------------------------------

    def prepare_write(self, offset: int, length: int) -> WriteRun:
        if self.poisoned is not None:
            self.check_usable()
        mapping = self.mapping
        try:
            slice_offset = mapping.slice_at(offset)
            trusted = self.guard.trusted.get(slice_offset) if slice_offset is not None else None
            if slice_offset is not None and trusted is not None:
                table = mapping.cache.peek(slice_offset)
                if table is not None:
                    host_offset, n = mapping.in_place(table, offset, length)
                    if n:
                        index = mapping.index_in_slice(offset)
                        in_one = not (offset ^ (offset + n - 1)) >> self.geometry.cluster_bits
                        if trusted[index] and (in_one or mapping.are_set(trusted, index, offset, n)):
                            return self.data if self.crypt is None else None, host_offset, n, None
        except ImageCorruptError:
            pass  # the slow way meets it again, and does what is to be done then
        run = self.retry(lambda: writing.prepare(self, offset, length))
        if self.refcounts.unbacked:
            from blocklib.formats.qcow2.reserve import back_tables

            back_tables(self, offset, run[3])
        return run

    def prepare_fill(self, offset: int, length: int) -> tuple[int, WriteRun | None]:
        return filling.prepare(self, offset, length)

    def make_room(self) -> bool:
        if self.read_only or self.poisoned is not None or not self.writeback.gives_back:
            return False
        self.writeback.flush()
        return True

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        assert self.crypt is not None
        self.crypt.write(self, offset, place, views)

    def link(self, ticket: AllocationTicket) -> None:
        """Point the L2 entries of a ticket at its host clusters: the write is part of the image from now on."""
        writing.link(self, ticket)

    def unreserve(self, ticket: AllocationTicket) -> None:
        """Give back the host clusters of a ticket whose write failed; nobody has seen them."""
        writing.unreserve(self, ticket)

    def zero_part(self, offset: int, length: int) -> bool:
        # Whole subclusters become zero though there are bytes.  Zeroes in an encrypted file would be noise, and for the rest
        # of a block of the cipher, too.
        if self.geometry.extended_l2 and self.crypt is None:
            data_file.before_zeroing(self, offset, length, unmap=False)
        while (done := self.retry(lambda: writing.zero_part(self, offset, length))) is None:
            from blocklib.formats.qcow2.reserve import make_table

            make_table(self, offset)
        self.writeback.relieve()
        return done

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        from blocklib.formats.qcow2.zeroing import zero_range

        zero_range(self, offset, length, unmap=unmap)

    def discard_range(self, offset: int, length: int) -> None:
        from blocklib.formats.qcow2.zeroing import discard_range

        discard_range(self, offset, length)

    def reach(self, size: int) -> bool:
        from blocklib.formats.qcow2.resize import reach

        reach(self, size)
        return True

    def check_resize(self, size: int, preallocation: Preallocation) -> None:
        from blocklib.formats.qcow2.resize import check_resize

        check_resize(self, size, preallocation)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        from blocklib.formats.qcow2.resize import resize

        resize(self, size, preallocation)

    def flush(self) -> None:
        if self.read_only or self.metadata_only:
            return
        if self.corruption is not None and not self.writeback.has_changes:
            self.writeback.barrier()  # guest data that was written in place
            return
        if self.bitmaps is not None:
            self.bitmaps.before_flush()
        self.writeback.flush()

    # -- whole images -------------------------------------------------------------------------------------------------

    @classmethod
    def measure(cls, options: Mapping[str, Any], data_bytes: Callable[[int], int]) -> tuple[int, int]:
        from blocklib.formats.qcow2.create import encryption_length, geometry_for
        from blocklib.formats.qcow2.geometry import measure_size

        geometry = geometry_for(options)  # of options that exclude each other, qemu-img asks no more
        size = -(-options["size"] // layout.SIZE_UNIT) * layout.SIZE_UNIT
        data = data_bytes(geometry.cluster_size)
        measured = measure_size(geometry, size, data, preallocation=options["preallocation"])
        extra = geometry.round_up(encryption_length(options))
        return measured.required + extra, measured.fully_allocated + extra

    @classmethod
    def measure_bitmaps(cls, options: Mapping[str, Any], bitmaps: Iterable[tuple[str, int]]) -> int | None:
        from blocklib.formats.qcow2.bitmaps import measured_for

        return measured_for(options, bitmaps)

    def check(self, progress: Callable[[int, int], object] | None = None) -> CheckReport:
        from blocklib.formats.qcow2.check.image import check_image

        self._bring_all_to_the_file()
        filename = self.filename or self.name
        return check_image(self.file, self.header, self.geometry, filename=filename, progress=progress)

    def repair(
        self,
        what: Literal["leaks", "all"],
        *,
        dry_run: bool = False,
        expect: RepairReport | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> RepairReport:
        from blocklib.formats.qcow2.repair.image import repair_image

        self._bring_all_to_the_file()
        filename = self.filename or self.name
        try:
            return repair_image(
                self.file,
                self.header,
                self.geometry,
                what,
                filename=filename,
                dry_run=dry_run,
                expect=expect,
                progress=progress,
            )
        finally:
            if not dry_run:
                header_change.reload(self)  # tables that were read before may have changed
                if self.bitmaps is not None:
                    self.bitmaps.read_again()

    def check_amend(self, options: Mapping[str, Any], *, force: bool = False) -> None:
        from blocklib.formats.qcow2 import amend

        amend.check(self, options, force=force)

    def amend(
        self, options: Mapping[str, Any], *, force: bool = False, progress: Callable[[int, int], object] | None = None
    ) -> None:
        from blocklib.formats.qcow2 import amend

        amend.amend(self, options, progress or (lambda _done, _total: None), force=force)

    def _bring_all_to_the_file(self) -> None:
        """Postponed reference counts, too: the image is about to be looked at through its file."""
        if not self.read_only and not self.metadata_only and (self.corruption is None or self.writeback.has_changes):
            self.writeback.finish()

    def make_empty(self) -> None:
        """Forget every cluster, so that the backing file shows through again; the caller has drained the node."""
        from blocklib.formats.qcow2.zeroing import forget_range

        self.file.node.hear("empty_image_prepare")
        size = self.geometry.round_up(self.size)
        forget_range(self, 0, size)
        self.writeback.finish()
        data_file.after_unmapping(self, 0, size)

    def change_backing(self, name: str | None, format: str | None) -> None:
        """Name another backing file (as it is to be stored) in the header; durable on return.

        Raises UsageError for a name that does not fit.
        """
        from blocklib.formats.qcow2 import amend

        amend.change_backing(self, name, format)

    @property
    def needs_data_file(self) -> bool:
        return data_file.is_external(self.header)

    @property
    def names_backing(self) -> bool:
        return self.header.backing_name is not None

    @property
    def has_backing(self) -> bool:
        """Whether something below shows through where this image holds nothing, open or not."""
        return self.header.backing_name is not None or "backing" in self.children

    @property
    def zeroes_by_metadata(self) -> bool:
        # Version 2 has no zero clusters: only an absent one reads as zero, and only where nothing shows through.
        return self.header.version > layout.VERSION_2 or not self.has_backing

    # -- what the parts of the driver share ---------------------------------------------------------------------------

    def retry(self, change: Callable[[], _T], *, marks: bool = True) -> _T:
        """Run `change` under the lock; when it needs a table that is not cached, load it and start again.

        What raises an error of ours has changed nothing that matters; anything else may have torn the tables in memory.
        An image that proves to be corrupt is marked so, with `marks`, and refuses changes from then on.
        """
        if not marks:
            return self._retry(change)
        refuse_corrupt(self)
        try:
            return self._retry(change)
        except ImageCorruptError as error:
            mark_corrupt(self, error)
            raise

    def _retry(self, change: Callable[[], _T]) -> _T:
        while True:
            try:
                with self.lock:
                    return change()
            except MissingTableError as missing:
                missing.cache.load(missing.host_offset, self.lock)
            except BlocklibError:
                raise
            except BaseException:
                self.poison("a change of the metadata was interrupted")
                raise

    def check_usable(self) -> None:
        super().check_usable()
        refuse_corrupt(self)

    @property
    def punches_holes(self) -> bool:
        """Whether the host gets the space of clusters that become free."""
        return self.discard_passes and bool(self.options.get("pass-discard-request", True))

    @property
    def punches_others(self) -> bool:
        """The same of clusters that become free by anything but the guest's wish: replaced tables, rewritten clusters."""
        return self.discard_passes and bool(self.options.get("pass-discard-other"))

    def punch(self, first: int, n_clusters: int) -> None:
        """Give the host the space of clusters that nobody uses and nobody can allocate yet."""
        bits = self.geometry.cluster_bits
        self.file.discard(first << bits, n_clusters << bits)

    # -- telling ------------------------------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        return data_file.occupied(self, super().allocated_size())

    def cluster_size(self) -> int:
        return self.geometry.cluster_size

    def data_unit(self) -> int:
        return self.geometry.subcluster_size

    def info_facts(self) -> Mapping[str, Any]:
        return telling.info_facts(self)

    def format_specific(self) -> Mapping[str, Any]:
        return telling.format_specific(self)
