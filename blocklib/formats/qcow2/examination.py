"""What a qcow2 image says of itself, for `blocklib.inspect`: as much as can be told of one that may be malformed.

`parse_header` accepts a header as a whole or refuses it at the first fault.  Here its steps are taken one by one, each fault
becomes a failed check, and the checks of OpenStack's inspector are answered from the bare fields even where the rest makes no
sense.  Of what the header points at, the snapshot table, the bitmap directory and the LUKS header are looked into; L1, L2 and
refcounts are not: that is `check`'s work.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from blocklib.errors import ImageCorruptError, ImageError, ImageLimitError, UnsupportedFeatureError
from blocklib.formats.qcow2 import header_checks as checks
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import (
    Header,
    feature_names_of,
    header_span,
    read_backing_name,
    read_extensions,
    unpack_fields,
    unpack_version_checked,
    unsupported_features,
)
from blocklib.inspection.account import Account, Examination, Want
from blocklib.inspection.disks import examine_luks

_POINTER: Final = struct.Struct(layout.ENCRYPTION_EXTENSION_FORMAT)
_MOST_TABLE_BYTES: Final = 1 << 20
"""What is kept of a snapshot table or bitmap directory: of one that is longer the check fails, since it was not read."""


def examine(head: bytes, account: Account) -> Examination:
    """`head` is the beginning of the file.  Tables lie behind the first cluster, hence behind what was read before them."""
    span = header_span(head)
    data = head if span <= len(head) else (yield Want(0, span))
    view = memoryview(data)
    fields = _bare_fields(view)
    try:
        header = unpack_version_checked(view, None)
        refuse = checks.Refusal(header, None)
        checks.check_sizes(header, refuse)
    except ImageError as exc:
        _tell(exc, account)
    else:
        sound = _judge(view, header, refuse, account)
        fields = header
        if sound:
            _follow(header, account)
    _answer(fields, account)


def _bare_fields(view: memoryview) -> Header | None:
    """The fields as they stand, of any version; None where the file ends within them."""
    needed = layout.HEADER_V2_LENGTH
    if len(view) >= needed and int.from_bytes(view[4:8], "big") != layout.VERSION_2:
        needed = layout.HEADER_V3_MIN_LENGTH
    return unpack_fields(view) if len(view) >= needed else None


def _tell(exc: ImageError, account: Account) -> None:
    """An error of the header's own checks, as the check that it belongs to."""
    if isinstance(exc, UnsupportedFeatureError):
        account.failed("unknown_features", str(exc))
    elif isinstance(exc, ImageLimitError):
        # The only limits there: one of ours, and one that is the format's own.
        account.exceeds("header_extensions" if exc.structure == "header extensions" else "cluster_size", str(exc))
    else:
        account.failed("header", str(exc))


def _judge(view: memoryview, header: Header, refuse: checks.Refusal, account: Account) -> bool:
    """Whether what the header points at can be looked into.  Fills in what the header does not hold in its fields."""
    sound = True
    for limit, error in checks.limit_faults(header, account.limits, refuse):
        account.exceeds(limit, str(error))
        sound = False
    unknown = header.incompatible_features & ~layout.INCOMPATIBLE_KNOWN
    if unknown:
        _tell(unsupported_features(unknown, feature_names_of(view, header), None), account)
        sound = False

    def read_backing() -> None:
        header.backing_name_bytes = read_backing_name(view, header, refuse)

    def read_rest() -> None:
        header.extensions = read_extensions(view, header, None, account.limits.header_extensions)

    steps: tuple[Callable[[], None], ...] = (
        lambda: checks.check_compression_type(header, refuse),
        read_backing,
        read_rest,
        lambda: checks.check_encryption(header, refuse),
        lambda: checks.check_tables(header, None, False, refuse),
    )
    for step in steps:
        try:
            step()
        except ImageError as exc:
            _tell(exc, account)
            sound = False
    return sound


def _answer(fields: Header | None, account: Account) -> None:
    """The checks of OpenStack's inspector; what cannot be told has failed."""
    if fields is None:
        for name in ("backing_file", "data_file", "unknown_features", "header"):
            account.failed(name, "the file ends inside the header")
        return
    account.virtual_size = fields.size // layout.SIZE_UNIT * layout.SIZE_UNIT
    account.encrypted = fields.crypt_method != layout.CRYPT_NONE
    account.features += _feature_names(fields)
    backing, data_file = fields.backing_name, fields.data_file_name
    if backing is not None:
        account.names("backing", backing, fields.backing_format)
        account.failed("backing_file", f"the image has a backing file, {backing!r}")
    elif fields.backing_file_offset:
        account.failed("backing_file", "the image has a backing file, whose name cannot be told")
    account.passed("backing_file", "the image has no backing file")
    if fields.incompatible_features & layout.INCOMPATIBLE_DATA_FILE:
        if data_file is not None:
            account.names("data-file", data_file, "raw")
        named = f", {data_file!r}" if data_file else ", which it does not name"
        account.failed("data_file", f"the image keeps its data in another file{named}")
    account.passed("data_file", "the image keeps its data itself")
    account.passed("unknown_features", "every feature that must be understood is known")
    account.passed("header", "the header is well-formed")


def _feature_names(header: Header) -> list[str]:
    found = []
    for kind, word, bits in (
        (layout.FEATURE_INCOMPATIBLE, "incompatible", header.incompatible_features),
        (layout.FEATURE_COMPATIBLE, "compatible", header.compatible_features),
        (layout.FEATURE_AUTOCLEAR, "autoclear", header.autoclear_features),
    ):
        set_bits = (bit for bit in range(64) if bits >> bit & 1)
        found += [layout.FEATURE_NAMES.get((kind, bit)) or f"unknown {word} feature bit {bit}" for bit in set_bits]
    return found


# What the header points at ---------------------------------------------------------------------------------------------


def _follow(header: Header, account: Account) -> None:
    """Have looked into what a sound header points at."""

    def end(length: int, _tail: bytes) -> None:
        try:
            checks.check_tables(header, length, False, checks.Refusal(header, None))
        except ImageError as exc:
            account.failed("header", str(exc))

    account.endings.append(end)
    if header.nb_snapshots:
        account.further.append(_snapshots(header, account))
    if header.has_bitmaps:
        account.further.append(_bitmaps(header, account))
    if header.crypt_method == layout.CRYPT_LUKS:
        account.further.append(_encryption(header, account))


class _Captured:
    """The part of a file that was kept, for a reader of tables."""

    def __init__(self, offset: int, data: bytes, size: int) -> None:
        self._offset = offset
        self._data = data
        self.size = size
        """Of the file, in bytes."""

    def read(self, offset: int, view: memoryview, _event: str | None = None) -> None:
        start = offset - self._offset
        found = self._data[start : start + len(view)]
        if len(found) < len(view):
            raise ImageLimitError(
                f"the snapshot table has more than the {_MOST_TABLE_BYTES} bytes that are read of it",
                structure="snapshot table",
                host_offset=self._offset,
            )
        view[:] = found


def _snapshots(header: Header, account: Account) -> Examination:
    data = yield Want(header.snapshots_offset, _MOST_TABLE_BYTES)

    def end(length: int, _tail: bytes) -> None:
        from blocklib.formats.qcow2.snapshots.table import TableReader

        reader = TableReader(_Captured(header.snapshots_offset, data, length), header, None)
        try:
            for index in range(header.nb_snapshots):
                snapshot = reader.next(index)
                table_bytes = snapshot.l1_size * layout.TABLE_ENTRY_LENGTH
                if table_bytes > account.limits.l1_bytes:
                    account.exceeds("l1_bytes", f"snapshot table entry {index}: an L1 table of {table_bytes} bytes")
                if (snapshot.disk_size or 0) > account.limits.virtual_size:
                    account.exceeds("virtual_size", f"snapshot table entry {index}: a disk of {snapshot.disk_size} bytes")
                if snapshot.l1_offset % (1 << header.cluster_bits) or snapshot.l1_offset + table_bytes > length:
                    place = f"{table_bytes} bytes at {snapshot.l1_offset:#x}"
                    account.failed("snapshots", f"snapshot table entry {index}: no L1 table inside the file: {place}")
        except (ImageCorruptError, ImageLimitError) as exc:
            account.failed("snapshots", str(exc))
        account.passed("snapshots", f"{header.nb_snapshots} internal snapshots")

    account.endings.append(end)


def _bitmaps(header: Header, account: Account) -> Examination:
    from blocklib.formats.qcow2.bitmap_directory import data_length, parse_directory, parse_extension

    try:
        extension = parse_extension(header.extension(layout.EXTENSION_BITMAPS) or b"", header.geometry(), account.limits)
    except ImageLimitError as exc:
        account.exceeds("bitmaps", str(exc))
        return
    except ImageError as exc:
        account.failed("bitmaps", str(exc))
        return
    if extension.directory_length > _MOST_TABLE_BYTES:
        text = f"the bitmap directory has {extension.directory_length} bytes, more than the {_MOST_TABLE_BYTES} that are read"
        account.failed("bitmaps", text)
        return
    data = yield Want(extension.directory_offset, extension.directory_length)
    try:
        entries = parse_directory(data, extension, header.geometry(), size=header.size)
    except ImageError as exc:
        account.failed("bitmaps", str(exc))
        return
    total = sum(data_length(header.size, entry.granularity_bits) for entry in entries)
    if total > account.limits.bitmap_bytes:
        account.exceeds("bitmap_bytes", f"bitmaps of {total} bytes in all")
    account.passed("bitmaps", f"{len(entries)} bitmaps")


def _encryption(header: Header, account: Account) -> Examination:
    from blocklib.crypto.luks import HEADER_LENGTH

    offset, length = _POINTER.unpack(header.extension(layout.EXTENSION_ENCRYPTION) or b"")
    data = yield Want(offset, HEADER_LENGTH)
    examine_luks(data, length, account, "encryption", place=offset)

    def end(file_length: int, _tail: bytes) -> None:
        if offset + length > file_length:
            account.failed("encryption", f"the encryption header ends behind the end of the file, at {offset + length:#x}")

    account.endings.append(end)
