"""The qcow2 header: from bytes to `Header` (pure, no I/O); `header_write` is the way back.

What a reader does not know is kept: header fields past the known ones, and header extensions of unknown types, are
carried through and written back.  Sources: sections "Header", "Additional fields" and "Header extensions" of
``docs/interop/qcow2.rst``; behaviour marked [seen] was tried with crafted images on qemu-img 7.2.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blocklib.errors import FormatMismatchError, ImageCorruptError, ImageLimitError, UnsupportedFeatureError, UsageError
from blocklib.formats.qcow2 import header_checks as checks
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.geometry import Geometry
from blocklib.records import Record, field

if TYPE_CHECKING:
    from blocklib.policy import Limits

_V2_FIELDS = struct.Struct(layout.HEADER_V2_FORMAT)
_V3_FIELDS = struct.Struct(layout.HEADER_V3_FORMAT)
_EXTENSION_HEADER = struct.Struct(layout.EXTENSION_HEADER_FORMAT)


class Extension(Record):
    """One header extension: its type and its data, without the padding."""

    type: int
    data: bytes


class Header(Record, frozen=False):
    """All fields of a version 2 or 3 header as native numbers, in bytes where they are lengths or offsets.

    `backing_file_offset` and `backing_file_size` say where the name lay when the header was parsed; the serialiser
    places `backing_name_bytes` anew, so the two are no part of equality.  The names and the feature names are views
    of `backing_name_bytes` and `extensions`: there is one truth.
    """

    version: int = layout.VERSION_3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = layout.CRYPT_NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = layout.V2_REFCOUNT_ORDER
    header_length: int = layout.HEADER_V3_LENGTH
    compression_type: int = layout.COMPRESSION_DEFLATE
    unknown_fields: bytes = b""
    """Header bytes from 105 on, without trailing zeros: a zero byte is 'equal to field absence'."""
    extensions: list[Extension] = field(default_factory=list)
    """In the order of the image, without the end marker."""
    backing_name_bytes: bytes | None = None
    backing_file_offset: int = field(default=0, compare=False)
    backing_file_size: int = field(default=0, compare=False)

    def geometry(self) -> Geometry:
        extended_l2 = bool(self.incompatible_features & layout.INCOMPATIBLE_EXTENDED_L2)
        return Geometry(self.cluster_bits, self.refcount_order, extended_l2)

    def extension(self, type: int) -> bytes | None:
        """The data of the first extension of that type, or None."""
        return next((item.data for item in self.extensions if item.type == type), None)

    def set_extension(self, type: int, data: bytes | None) -> None:
        """Give the extension of that type new data in its place, add it at the end, or with None remove it."""
        places = [index for index, item in enumerate(self.extensions) if item.type == type]
        if data is None:
            self.extensions = [item for item in self.extensions if item.type != type]
        elif places:
            self.extensions[places[0]] = Extension(type, data)
        else:
            self.extensions.append(Extension(type, data))

    @property
    def backing_name(self) -> str | None:
        """The backing file's name as the image spells it, decoded as file names are (see os.fsdecode)."""
        return _decode_name(self.backing_name_bytes)

    @backing_name.setter
    def backing_name(self, name: str | None) -> None:
        self.backing_name_bytes = _encode_name(name, "backing file name", layout.MAX_BACKING_NAME_LENGTH)

    @property
    def backing_format(self) -> str | None:
        return _decode_name(self.extension(layout.EXTENSION_BACKING_FORMAT))

    @backing_format.setter
    def backing_format(self, name: str | None) -> None:
        data = _encode_name(name, "backing file format name", layout.MAX_BACKING_FORMAT_LENGTH)
        self.set_extension(layout.EXTENSION_BACKING_FORMAT, data)

    @property
    def data_file_name(self) -> str | None:
        """The external data file's name; it means something only with INCOMPATIBLE_DATA_FILE set."""
        return _decode_name(self.extension(layout.EXTENSION_DATA_FILE))

    @data_file_name.setter
    def data_file_name(self, name: str | None) -> None:
        longest = (1 << self.cluster_bits) - self.header_length
        self.set_extension(layout.EXTENSION_DATA_FILE, _encode_name(name, "external data file name", longest))

    @property
    def has_bitmaps(self) -> bool:
        """Whether there are bitmaps that 'should be considered consistent': the extension and its autoclear bit."""
        consistent = bool(self.autoclear_features & layout.AUTOCLEAR_BITMAPS)
        return consistent and self.extension(layout.EXTENSION_BITMAPS) is not None

    @property
    def feature_names(self) -> dict[tuple[int, int], str]:
        """(feature type, bit number) -> the name that the image's own table gives it, printable characters only."""
        return _decode_feature_names(self.extension(layout.EXTENSION_FEATURE_NAMES) or b"")


# Names --------------------------------------------------------------------------------------------------------------


def _decode_name(raw: bytes | None) -> str | None:
    if raw is None:
        return None
    # os.fsdecode without os; trailing NULs are padding, which QEMU's C strings do not see either [seen].
    return raw.rstrip(b"\0").decode(sys.getfilesystemencoding(), "surrogateescape") or None


def _encode_name(name: str | None, what: str, longest: int) -> bytes | None:
    if not name:
        return None
    try:
        raw = name.encode(sys.getfilesystemencoding(), "surrogateescape")
    except UnicodeEncodeError as exc:
        raise UsageError(f"the {what} {name!r} is no file name here: {exc.reason}") from exc
    if b"\0" in raw:
        raise UsageError(f"the {what} {name!r} contains a NUL character")
    if len(raw) > longest:
        raise UsageError(f"the {what} has {len(raw)} bytes, more than the {longest} that fit")
    return raw


def _decode_feature_names(table: bytes) -> dict[tuple[int, int], str]:
    names = {}
    entry_length = layout.FEATURE_NAME_ENTRY_LENGTH
    for start in range(0, len(table) - entry_length + 1, entry_length):
        entry = table[start : start + entry_length]
        text = entry[2:].split(b"\0", 1)[0].decode("utf-8", "replace")
        # The image chose this text and an error will show it on a terminal.
        names[entry[0], entry[1]] = "".join(char if char.isprintable() else "?" for char in text)
    return names


def feature_name_table() -> bytes:
    """The data of a feature name table extension with every name of layout.FEATURE_NAMES, as QEMU 7.2 writes it."""
    return b"".join(
        bytes((kind, bit)) + name.encode("ascii").ljust(layout.FEATURE_NAME_LENGTH, b"\0")
        for (kind, bit), name in layout.FEATURE_NAMES.items()
    )


# Parsing ------------------------------------------------------------------------------------------------------------


def header_span(first_bytes: bytes | memoryview) -> int:
    """How many bytes from the start of the file `parse_header` needs: at most the header cluster, hence 2 MiB.

    `first_bytes` is what a first read brought, at least 512 bytes or the whole file; with 4 KiB the answer is nearly
    always less than that.  For what is no qcow2 header the answer is the length of one, so that `parse_header` can
    refuse it.
    """
    view = memoryview(first_bytes)
    if len(view) < layout.HEADER_V3_MIN_LENGTH or bytes(view[:4]) != layout.MAGIC:
        return layout.HEADER_V3_LENGTH
    header = unpack_fields(view)
    if not layout.MIN_CLUSTER_BITS <= header.cluster_bits <= layout.MAX_CLUSTER_BITS:
        return layout.HEADER_V3_LENGTH
    cluster_size = 1 << header.cluster_bits
    if header.backing_file_offset:
        name_end = header.backing_file_offset + header.backing_file_size
        return min(max(name_end, header.header_length, layout.HEADER_V3_LENGTH), cluster_size)
    for offset, kind, _ in _walk_extensions(view, header.header_length, cluster_size):
        if kind == layout.EXTENSION_END:
            return offset + layout.EXTENSION_HEADER_LENGTH
    return cluster_size


def parse_header(
    data: bytes | memoryview,
    *,
    limits: Limits,
    file_length: int | None = None,
    for_check: bool = False,
    node: str | None = None,
) -> Header:
    """The header of the image whose first bytes are `data`, accepted as a whole or not at all.

    `data` holds at least `header_span(data)` bytes from the start of the file, or all of a shorter file.  With
    `file_length` (bytes) the tables must also start inside the file and the L1 table end there: leave it out to look
    at a torn image.  `for_check` accepts any place of the refcount table, for a check that is going to judge it.  Which
    of the known incompatible features can be served is not decided here: see `check_supported`.

    Raises:
        FormatMismatchError: no qcow2 magic.
        UnsupportedFeatureError: a version, incompatible feature bit, encryption method or compression type that the
            specification does not define.
        ImageLimitError: the image asks for more than `limits`, or for clusters above 2 MiB.
        ImageCorruptError: anything else that contradicts the specification.
    """
    view = memoryview(data)
    header = unpack_version_checked(view, node)
    refuse = checks.Refusal(header, node)
    checks.check_sizes(header, refuse)
    checks.check_limits(header, limits, refuse)
    unknown = header.incompatible_features & ~layout.INCOMPATIBLE_KNOWN
    if unknown:
        raise unsupported_features(unknown, feature_names_of(view, header), node)
    checks.check_compression_type(header, refuse)
    header.backing_name_bytes = read_backing_name(view, header, refuse)
    header.extensions = read_extensions(view, header, node, limits.header_extensions)
    checks.check_encryption(header, refuse)
    checks.check_tables(header, file_length, for_check, refuse)
    return header


def parse_accepted_header(data: bytes | memoryview) -> tuple[Header, int]:
    """A header that `parse_header` has accepted before, and the host offset where its extension area ends."""
    view = memoryview(data)
    header = unpack_version_checked(view, None)
    header.backing_name_bytes = read_backing_name(view, header, checks.Refusal(header, None))
    header.extensions = read_extensions(view, header, None)
    end = header.header_length
    for offset, _, length in _walk_extensions(view, end, _extensions_stop(header)):
        end = offset + layout.extension_span(length)
    return header, end


def check_supported(header: Header, supported_mask: int, *, node: str | None = None) -> None:
    """Refuse an image that sets an incompatible feature bit outside `supported_mask`.

    Raises:
        UnsupportedFeatureError: with the features' names; for a bit that we do not know, the name in the image's own
        table.
    """
    refused = header.incompatible_features & ~supported_mask
    if refused:
        raise unsupported_features(refused, header.feature_names, node)


def unsupported_features(bits: int, names: dict[tuple[int, int], str], node: str | None) -> UnsupportedFeatureError:
    """The error for these incompatible feature bits; `names` are those of the image's own table."""
    known = {**names, **layout.FEATURE_NAMES}  # an image does not get to rename what we know
    features = [
        known.get((layout.FEATURE_INCOMPATIBLE, bit)) or f"incompatible feature bit {bit}"
        for bit in range(64)
        if bits >> bit & 1
    ]
    return UnsupportedFeatureError(
        f"{checks.prefix(node)}the image uses features that cannot be handled here: {', '.join(features)}",
        features=features,
        structure="header field incompatible_features",
        host_offset=layout.FIELD_OFFSETS["incompatible_features"],
        expected="only features that can be handled",
        found=f"{bits:#x}",
        node=node,
    )


def unpack_version_checked(view: memoryview, node: str | None) -> Header:
    """The fields of a version that we know.  Raises FormatMismatchError, UnsupportedFeatureError, ImageCorruptError."""
    found = bytes(view[:4])
    if found != layout.MAGIC:
        raise FormatMismatchError(
            f"{checks.prefix(node)}not a qcow2 image: it starts with {found!r}",
            structure="header field magic",
            host_offset=0,
            expected=repr(layout.MAGIC),
            found=repr(found),
            node=node,
        )
    needed = layout.HEADER_V2_LENGTH
    if len(view) >= needed:
        version = int.from_bytes(view[4:8], "big")
        if version not in (layout.VERSION_2, layout.VERSION_3):
            refuse = checks.Refusal(Header(version=version), node)
            raise refuse.feature("version", f"qcow2 version {version}", "version 2 or 3")
        if version == layout.VERSION_3:
            needed = layout.HEADER_V3_MIN_LENGTH
    if len(view) < needed:
        raise ImageCorruptError(
            f"{checks.prefix(node)}the file ends inside the header, after {len(view)} bytes",
            structure="header",
            host_offset=0,
            expected=f"at least {needed} bytes",
            found=f"{len(view)} bytes",
            node=node,
        )
    return unpack_fields(view)


def unpack_fields(view: memoryview) -> Header:
    """The fields as they stand.  Version 2 gets what version 3 would say by its version: its bytes end at 72."""
    (
        _, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method, l1_size, l1_table_offset,
        refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset,
    ) = _V2_FIELDS.unpack_from(view)  # fmt: skip
    header = Header(
        version=version,
        backing_file_offset=backing_file_offset,
        backing_file_size=backing_file_size,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=crypt_method,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        header_length=layout.HEADER_V2_LENGTH,
    )
    if version == layout.VERSION_2:
        return header
    (
        header.incompatible_features, header.compatible_features, header.autoclear_features,
        header.refcount_order, header.header_length,
    ) = _V3_FIELDS.unpack_from(view, layout.HEADER_V2_LENGTH)  # fmt: skip
    additional = bytes(view[layout.COMPRESSION_TYPE_OFFSET : header.header_length])
    if additional:
        header.compression_type = additional[0]
        header.unknown_fields = additional[1:].rstrip(b"\0")
    return header


def read_backing_name(view: memoryview, header: Header, refuse: checks.Refusal) -> bytes | None:
    """The name's exact bytes, or None; QEMU too wants it inside the first cluster [seen]."""
    offset, size = header.backing_file_offset, header.backing_file_size
    if not offset:
        return None
    cluster_size = 1 << header.cluster_bits
    if not header.header_length <= offset <= cluster_size:
        raise refuse("backing_file_offset", f"a place behind the header and inside its cluster of {cluster_size} bytes")
    if size > layout.MAX_BACKING_NAME_LENGTH:
        raise refuse("backing_file_size", f"at most {layout.MAX_BACKING_NAME_LENGTH} bytes")
    if offset + size > cluster_size:
        raise refuse("backing_file_size", f"a name that ends inside the first cluster, at {cluster_size}")
    if offset + size > len(view):
        raise refuse("backing_file_size", f"a name that ends inside the file, at {len(view)}")
    raw = bytes(view[offset : offset + size])
    if not raw.rstrip(b"\0"):
        return None
    checks.refuse_nul(raw, "backing file name", offset, refuse.node)
    return raw


def _walk_extensions(view: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(host offset, type, data length) of each extension header from `start`, the end marker the last.

    Where the bytes end before `stop` the file ends, and what lies behind its end reads as zero: an end marker.
    """
    offset = start
    stop = min(stop, len(view))
    while offset + layout.EXTENSION_HEADER_LENGTH <= stop:
        kind, length = _EXTENSION_HEADER.unpack_from(view, offset)
        yield offset, kind, length
        if kind == layout.EXTENSION_END:
            return
        offset += layout.extension_span(length)


def _extensions_stop(header: Header) -> int:
    """QEMU reads extensions up to the backing file name, or to the end of the cluster [seen]."""
    return header.backing_file_offset or 1 << header.cluster_bits


def read_extensions(view: memoryview, header: Header, node: str | None, most: int | None = None) -> list[Extension]:
    """All header extensions.  Raises ImageCorruptError, ImageLimitError where there are more than `most`."""
    extensions: list[Extension] = []
    stop = min(_extensions_stop(header), len(view))
    for offset, kind, length in _walk_extensions(view, header.header_length, stop):
        if kind == layout.EXTENSION_END:
            break
        if len(extensions) == most:
            raise ImageLimitError(
                f"{checks.prefix(node)}more than {most} header extensions (the limit header_extensions)",
                structure="header extensions",
                host_offset=offset,
                expected=f"at most {most}",
                found=f"more than {most}",
                node=node,
            )
        name = layout.EXTENSION_NAMES.get(kind, f"header extension {kind:#010x}")
        start = offset + layout.EXTENSION_HEADER_LENGTH
        raw = bytes(view[start : start + length]) if start + length <= stop else b""
        fault = None
        if start + length > stop:
            fault = f"{length} bytes", f"at most {stop - start} bytes of data"
        elif kind in layout.EXTENSION_NAMES and any(item.type == kind for item in extensions):
            fault = "a second one", "one extension of a type"
        elif kind == layout.EXTENSION_BACKING_FORMAT and length > layout.MAX_BACKING_FORMAT_LENGTH:
            fault = f"{length} bytes", f"at most {layout.MAX_BACKING_FORMAT_LENGTH} bytes"
        if fault:
            found, expected = fault
            raise ImageCorruptError(
                f"{checks.prefix(node)}{name} at {offset:#x}: expected {expected}, found {found}",
                structure=name,
                host_offset=offset,
                expected=expected,
                found=found,
                node=node,
            )
        if kind in (layout.EXTENSION_BACKING_FORMAT, layout.EXTENSION_DATA_FILE):
            checks.refuse_nul(raw, name, start, node)
        extensions.append(Extension(kind, raw))
    return extensions


def feature_names_of(view: memoryview, header: Header) -> dict[tuple[int, int], str]:
    """The feature name table of an image about to be refused, as far as it can be found."""
    for offset, kind, length in _walk_extensions(view, header.header_length, _extensions_stop(header)):
        if kind == layout.EXTENSION_FEATURE_NAMES:
            start = offset + layout.EXTENSION_HEADER_LENGTH
            return _decode_feature_names(bytes(view[start : start + length]))
    return {}
