"""Dirty bitmaps in a qcow2 image: read when they are needed, marked in use before they go out of date, stored at the end.

Sources: sections "Bitmaps extension" and "Bitmaps" of ``docs/interop/qcow2.rst``.

Storing writes everything to clusters that nothing refers to yet - data and tables of what has changed, and a new directory -
makes it durable together with its counts, and then switches the header, extension and autoclear bit, by one write of its
first sector.  Until then the image has the old directory, whose entries say that they are in use.  The clusters of what was
replaced are given back after that write is durable.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from blocklib.dirty_bits import DirtyBits, zero_bits
from blocklib.errors import BlocklibError, ImageCorruptError, ImageLimitError, UnsupportedFeatureError, UsageError
from blocklib.formats.qcow2 import header_change, layout
from blocklib.formats.qcow2.bitmap_directory import (
    BitmapsExtension,
    DirectoryEntry,
    data_length,
    entry_length,
    measured_length,
    pack_directory,
    pack_extension,
    parse_directory,
    parse_extension,
    parse_table,
)
from blocklib.formats.qcow2.create import VERSIONS, geometry_for
from blocklib.formats.qcow2.header_write import plan_rewrite
from blocklib.formats.qcow2.tables import Table, table_to_bytes
from blocklib.records import replace
from blocklib.tracking import BitmapStore, DirtyBitmap, Tracking, check_name

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.graph import Edge
    from blocklib.policy import Limits

_WRITE_BYTES: Final = 1 << 20
"""How much of a bitmap is written in one go."""


def read_directory(
    file: Edge, header: Header, geometry: Geometry, limits: Limits, *, node: str | None
) -> tuple[BitmapsExtension, list[DirectoryEntry]] | None:
    """The bitmap directory of an image, None where it has none.  Raises ImageCorruptError, ImageLimitError, StorageError."""
    if not header.has_bitmaps:
        return None
    packed = header.extension(layout.EXTENSION_BITMAPS)
    assert packed is not None
    extension = parse_extension(packed, geometry, limits, node=node)
    end = extension.directory_offset + extension.directory_length
    if end > file.size:
        raise ImageCorruptError(
            f"{node}: the bitmap directory ends at {end:#x}, behind the end of the file at {file.size:#x}",
            structure="bitmap directory",
            host_offset=extension.directory_offset,
            expected=f"an end before {file.size:#x}",
            found=f"{end:#x}",
            node=node,
        )
    data = bytearray(extension.directory_length)
    file.read(extension.directory_offset, memoryview(data), "metadata")
    return extension, parse_directory(data, extension, geometry, size=header.size, node=node)


def described(node: Qcow2Node) -> list[dict[str, object]]:
    """``Qcow2BitmapInfo`` of QEMU's QAPI schema for each stored bitmap; of an image that is being written, as it would be
    stored now."""
    bitmaps = node.bitmaps.all() if node.bitmaps is not None else StoredBitmaps(node).bitmaps()
    found: list[dict[str, object]] = []
    for bitmap in bitmaps:
        if bitmap.persistent:
            flags = [name for name, is_set in (("in-use", bitmap.inconsistent), ("auto", bitmap.enabled)) if is_set]
            found.append({"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity})
    return found


def measured_for(options: Mapping[str, Any], bitmaps: Iterable[tuple[str, int]]) -> int | None:
    """Bytes that bitmaps (name, granularity in bytes) take in a new image; None for one of version 2, which stores none."""
    if VERSIONS[options["compat"]] == layout.VERSION_2:
        return None
    size = -(-options["size"] // layout.SIZE_UNIT) * layout.SIZE_UNIT
    packed = ((check_name(name), granularity.bit_length() - 1) for name, granularity in bitmaps)
    return measured_length(geometry_for(options), size, packed)


def tracked(node: Qcow2Node) -> Tracking:
    """The bitmaps of an image that is about to be written.

    Raises ImageError where they make no sense or cannot be kept up: nothing may be written then.
    """
    store = StoredBitmaps(node)
    store.refuse_what_cannot_be_kept_up()
    return Tracking(node, store)


class StoredBitmaps(BitmapStore):
    """The bitmaps of one open image.  Its Tracking serialises the calls."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._extension: BitmapsExtension | None = None
        self._entries: dict[str, DirectoryEntry] = {}
        """What the file has, in its order."""
        self._loaded_bytes = 0
        self._marked_bytes = 0
        """Of them, what is not all zeroes and so takes memory."""
        self._read_directory()

    def _read_directory(self) -> None:
        node = self._node
        self._extension, self._entries = None, {}
        found = read_directory(node.file, node.header, node.geometry, node.limits, node=node.filename)
        if found is not None:
            self._extension, entries = found
            self._entries = {_decode(entry.name): entry for entry in entries}

    def bitmaps(self) -> list[DirtyBitmap]:
        return [
            DirtyBitmap(
                name,
                1 << entry.granularity_bits,
                persistent=True,
                enabled=entry.auto,
                in_file=True,
                inconsistent=entry.in_use or entry.obstacle is not None,
            )
            for name, entry in self._entries.items()
        ]

    def read_again(self) -> list[DirtyBitmap]:
        self._read_directory()
        return self.bitmaps()

    def refuse_what_cannot_be_kept_up(self) -> None:
        """Raises UnsupportedFeatureError for an image whose bitmaps must note every write, but not in a way that we know."""
        for name, entry in self._entries.items():
            if entry.auto and not entry.in_use and entry.obstacle is not None:
                raise UnsupportedFeatureError(
                    f"{self._node.filename}: the bitmap {name!r} has to note writes, but {entry.obstacle} cannot be used",
                    features=(entry.obstacle,),
                    structure="bitmap directory",
                    node=self._node.filename,
                )

    def check_new(self, name: bytes, granularity: int, persistent: Sequence[DirtyBitmap]) -> None:
        node = self._node
        self._refuse_version_2()
        if len(persistent) >= node.limits.bitmaps:
            raise self._limit("bitmaps", f"at most {node.limits.bitmaps} bitmaps", str(len(persistent) + 1))
        clusters = node.geometry.clusters_for(data_length(node.size, granularity.bit_length() - 1))
        if clusters << node.geometry.cluster_bits > layout.MAX_BITMAP_BYTES:
            raise UsageError(
                f"{node.filename}: a bitmap with a granularity of {granularity} bytes takes too much space", node=node.filename
            )
        length = entry_length(len(name)) + sum(entry_length(len(check_name(other.name))) for other in persistent)
        if length > layout.MAX_BITMAP_DIRECTORY_BYTES:
            most = f"at most {layout.MAX_BITMAP_DIRECTORY_BYTES} bytes"
            raise self._limit("bitmap directory", most, f"{length} bytes")
        trial = replace(node.header, extensions=list(node.header.extensions))
        trial.set_extension(layout.EXTENSION_BITMAPS, pack_extension(BitmapsExtension(1, 0, 0)))
        plan_rewrite(trial, b"")  # raises where the header has no room for the extension

    def _refuse_version_2(self) -> None:
        node = self._node
        if not node.stores_bitmaps:
            raise UnsupportedFeatureError(
                f"{node.filename}: an image with compat=0.10 cannot store bitmaps",
                features=("persistent bitmaps",),
                structure="header",
                node=node.filename,
            )

    def _limit(self, structure: str, expected: str, found: str) -> ImageLimitError:
        return ImageLimitError(
            f"{self._node.filename}: {structure}: {found}, {expected} can be stored",
            structure=structure,
            expected=expected,
            found=found,
            node=self._node.filename,
        )

    # -- reading ------------------------------------------------------------------------------------------------------

    def load(self, bitmap: DirtyBitmap) -> DirtyBits:
        node, entry = self._node, self._entries[bitmap.name]
        size = node.size
        length = data_length(size, entry.granularity_bits)
        node.limits.check("bitmap_bytes", self._loaded_bytes + length, structure="bitmaps", node=node.filename)
        table = self._read_table(entry)
        data = zero_bits(length)
        view = memoryview(data)
        bits = node.geometry.cluster_bits
        index = 0
        while index < len(table):
            start = index << bits
            value = table[index]
            stop = index + 1
            if value > layout.BITMAP_TABLE_ALL_ONES:
                while stop < len(table) and table[stop] == value + ((stop - index) << bits):
                    stop += 1
                part = view[start : stop << bits]
                self._refuse_outside(entry, index, value, len(part))
                self._charge(len(part))
                node.file.read(value, part, "metadata")
            elif value:
                part = view[start : stop << bits]
                self._charge(len(part))
                part[:] = b"\xff" * len(part)
            index = stop
        self._loaded_bytes += length
        view.release()
        return DirtyBits.from_bytes(size, bitmap.granularity, data)

    def _charge(self, length: int) -> None:
        """Memory for bits that are set.  Raises ImageLimitError: a few entries of a table can ask for any amount."""
        node = self._node
        self._marked_bytes += length
        if self._marked_bytes > node.file.size:
            node.limits.check("marked_bytes", self._marked_bytes, structure="bitmaps", node=node.filename)

    def _read_table(self, entry: DirectoryEntry) -> Table:
        node = self._node
        self._refuse_outside(entry, None, entry.table_offset, entry.table_length)
        data = bytearray(entry.table_length)
        node.file.read(entry.table_offset, memoryview(data), "metadata")
        return parse_table(data, entry, node.geometry, node=node.filename)

    def _refuse_outside(self, entry: DirectoryEntry, index: int | None, host_offset: int, length: int) -> None:
        end = self._node.file.size
        if host_offset + length <= end:
            return
        structure = "bitmap table" if index is None else f"bitmap table entry {index}"
        raise ImageCorruptError(
            f"{self._node.filename}: the {structure} of the bitmap {_decode(entry.name)!r} points behind the end of the file",
            structure=structure,
            host_offset=entry.table_offset + (index or 0) * layout.TABLE_ENTRY_LENGTH,
            expected=f"{length} bytes before {end:#x}",
            found=f"{host_offset:#x}",
            node=self._node.filename,
        )

    # -- marking ------------------------------------------------------------------------------------------------------

    def mark_in_use(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Set the flag of these entries where they lie: the directory that the file has differs by nothing else.

        A cut leaves some of them set and some not, and no guest byte that is newer than either.
        """
        node = self._node
        extension = self._extension
        assert extension is not None
        names = {bitmap.name for bitmap in bitmaps}
        marked = {
            name: entry.with_flag(layout.BITMAP_FLAG_IN_USE, True) if name in names else entry
            for name, entry in self._entries.items()
        }
        with node.writeback.structure:
            node.check_usable()
            node.file.write(extension.directory_offset, (pack_directory(list(marked.values())),), "metadata")
            node.writeback.barrier()
        self._entries = marked

    # -- storing ------------------------------------------------------------------------------------------------------

    def save(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        node = self._node
        if bitmaps:
            self._refuse_version_2()
        taken: list[tuple[int, int]] = []
        with node.writeback.structure:
            node.writeback.flush()
            replaced = self._clusters_replaced(bitmaps)
            try:
                entries = {bitmap.name: self._stored_entry(bitmap, taken) for bitmap in bitmaps}
                extension = self._write_directory(list(entries.values()), taken)
                node.writeback.flush()
                self._switch(extension)
            except BlocklibError:
                if node.poisoned is None:
                    self._give_back(taken)
                raise
            self._extension, self._entries = extension, entries
            with node.lock:
                node.writeback.freed.extend(replaced)

    def _stored_entry(self, bitmap: DirtyBitmap, taken: list[tuple[int, int]]) -> DirectoryEntry:
        """The directory entry of a bitmap, which is written first if it is new or has changed."""
        old = self._entries[bitmap.name] if bitmap.in_file else None
        if old is not None and not bitmap.changed:
            return old
        assert bitmap.bits is not None
        table = self._write_data(bitmap.bits, taken)
        offset = self._write_new(table_to_bytes(table), taken)
        flags = (old.flags if old is not None else 0) & layout.BITMAP_FLAG_EXTRA_DATA_COMPATIBLE
        return DirectoryEntry(
            offset,
            len(table),
            flags | (layout.BITMAP_FLAG_AUTO if bitmap.enabled else 0),
            bitmap.granularity.bit_length() - 1,
            check_name(bitmap.name),
            extra_data=old.extra_data if old is not None else b"",
        )

    def _write_data(self, bits: DirtyBits, taken: list[tuple[int, int]]) -> Table:
        """Write the clusters that are neither all zeroes nor all ones; the table of all of them."""
        geometry = self._node.geometry
        size = geometry.cluster_size
        table = array("Q", bytes(max(1, geometry.clusters_for(bits.length)) * layout.TABLE_ENTRY_LENGTH))
        most = max(1, _WRITE_BYTES >> geometry.cluster_bits)
        pending: list[int] = []
        for index in range(len(table)):
            value = bits.part_is(index * size, (index + 1) * size)
            if value is None:
                pending.append(index)
            elif value:
                table[index] = layout.BITMAP_TABLE_ALL_ONES
            if len(pending) == most or (index == len(table) - 1 and pending):
                self._write_clusters(bits, table, pending, taken)
                pending.clear()
        return table

    def _write_clusters(self, bits: DirtyBits, table: Table, indices: list[int], taken: list[tuple[int, int]]) -> None:
        node = self._node
        size = node.geometry.cluster_size
        done = 0
        while done < len(indices):
            first, n = self._allocate(len(indices) - done, taken)
            offset = first << node.geometry.cluster_bits
            part = bytearray()
            for position, index in enumerate(indices[done : done + n]):
                table[index] = offset + position * size
                part += bits.to_bytes(index * size, (index + 1) * size).ljust(size, b"\0")
            node.file.write(offset, (part,), "metadata")
            done += n

    def _allocate(self, n_clusters: int, taken: list[tuple[int, int]], *, exactly: bool = False) -> tuple[int, int]:
        node = self._node
        run = node.retry(lambda: node.refcounts.allocate(n_clusters, exactly=exactly))
        taken.append(run)
        return run

    def _write_new(self, data: bytes, taken: list[tuple[int, int]]) -> int:
        """Write `data` to fresh clusters in one piece, padded with zeroes; returns its host offset."""
        node = self._node
        clusters = node.geometry.clusters_for(len(data))
        first, _n = self._allocate(clusters, taken, exactly=True)
        offset = first << node.geometry.cluster_bits
        node.file.write(offset, (data.ljust(clusters << node.geometry.cluster_bits, b"\0"),), "metadata")
        return offset

    def _write_directory(self, entries: list[DirectoryEntry], taken: list[tuple[int, int]]) -> BitmapsExtension | None:
        if not entries:
            return None
        packed = pack_directory(entries)
        return BitmapsExtension(len(entries), len(packed), self._write_new(packed, taken))

    def _switch(self, extension: BitmapsExtension | None) -> None:
        """Make the header point at the new directory, or at none, by one write."""
        node = self._node
        header = node.header
        header.set_extension(layout.EXTENSION_BITMAPS, pack_extension(extension) if extension is not None else None)
        if extension is not None:
            header.autoclear_features |= layout.AUTOCLEAR_BITMAPS
        else:
            header.autoclear_features &= ~layout.AUTOCLEAR_BITMAPS
        header_change.switch(node)

    def _give_back(self, taken: list[tuple[int, int]]) -> None:
        """Nothing refers to these clusters."""
        node = self._node
        for first, n in taken:
            node.retry(lambda first=first, n=n: node.refcounts.release(first, n))  # type: ignore[misc]

    def _clusters_replaced(self, bitmaps: Sequence[DirtyBitmap]) -> list[tuple[int, int]]:
        """(first cluster, number) of what the file will not need any more: the directory, and tables and data of old states.

        Where a table cannot be read, what it points at stays allocated: it may be anything.
        """
        geometry = self._node.geometry
        bits = geometry.cluster_bits
        kept = {bitmap.name for bitmap in bitmaps if bitmap.in_file and not bitmap.changed}
        runs: list[tuple[int, int]] = []
        if self._extension is not None:
            directory = self._extension
            runs.append((directory.directory_offset >> bits, geometry.clusters_for(directory.directory_length)))
        for name, entry in self._entries.items():
            if name in kept:
                continue
            try:
                table = self._read_table(entry)
                last = max(table)
                if last > layout.BITMAP_TABLE_ALL_ONES:
                    self._refuse_outside(entry, table.index(last), last, geometry.cluster_size)
            except ImageCorruptError:
                continue
            runs.append((entry.table_offset >> bits, geometry.clusters_for(entry.table_length)))
            runs += _joined(value >> bits for value in table if value > layout.BITMAP_TABLE_ALL_ONES)
        return runs


def _joined(clusters: Iterable[int]) -> list[tuple[int, int]]:
    """The runs (first, number) that single clusters, in any order, make."""
    runs: list[tuple[int, int]] = []
    for cluster in clusters:
        if runs and sum(runs[-1]) == cluster:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((cluster, 1))
    return runs


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
