"""What a qcow2 header must satisfy before anything is done with it (pure, no I/O); `parse_header` calls these in order.

Sources: section "Header" of ``docs/interop/qcow2.rst``; what QEMU 7.2 refuses beyond it is marked [seen].
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blocklib.errors import ImageCorruptError, ImageError, ImageLimitError, UnsupportedFeatureError
from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header
    from blocklib.policy import Limits

_ENCRYPTION_POINTER = struct.Struct(layout.ENCRYPTION_EXTENSION_FORMAT)


def prefix(node: str | None) -> str:
    """How an error's text begins: with the image it is about."""
    return f"{node}: " if node else ""


class Refusal:
    """Builds the error for a header field: it names the field, its place, what was expected and what was found."""

    __slots__ = ("header", "node")

    def __init__(self, header: Header, node: str | None) -> None:
        self.header = header
        self.node = node

    def __call__(
        self, name: str, expected: str, kind: type[ImageError] = ImageCorruptError, found: str | None = None
    ) -> ImageError:
        shown = str(getattr(self.header, name)) if found is None else found
        return kind(
            f"{prefix(self.node)}header field {name} is {shown}: expected {expected}",
            structure=f"header field {name}",
            host_offset=layout.FIELD_OFFSETS[name],
            expected=expected,
            found=shown,
            node=self.node,
        )

    def feature(self, name: str, feature: str, expected: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"{prefix(self.node)}{feature} is not known: expected {expected}",
            features=(feature,),
            structure=f"header field {name}",
            host_offset=layout.FIELD_OFFSETS[name],
            expected=expected,
            found=str(getattr(self.header, name)),
            node=self.node,
        )


def check_sizes(header: Header, refuse: Refusal) -> None:
    bits = header.cluster_bits
    if bits < layout.MIN_CLUSTER_BITS:
        raise refuse("cluster_bits", f"at least {layout.MIN_CLUSTER_BITS}")
    if bits > layout.MAX_CLUSTER_BITS:
        raise refuse("cluster_bits", f"at most {layout.MAX_CLUSTER_BITS}", ImageLimitError)
    if header.version != layout.VERSION_2:
        if header.header_length < layout.HEADER_V3_MIN_LENGTH:
            raise refuse("header_length", f"at least {layout.HEADER_V3_MIN_LENGTH} bytes in version 3")
        if header.header_length % layout.HEADER_ALIGNMENT:
            raise refuse("header_length", f"a multiple of {layout.HEADER_ALIGNMENT}")
        if header.header_length > 1 << bits:
            raise refuse("header_length", f"no more than the first cluster, {1 << bits} bytes")
    if header.refcount_order > layout.MAX_REFCOUNT_ORDER:
        raise refuse("refcount_order", f"at most {layout.MAX_REFCOUNT_ORDER}")
    if header.incompatible_features & layout.INCOMPATIBLE_EXTENDED_L2 and bits < layout.EXTENDED_L2_MIN_CLUSTER_BITS:
        raise refuse("cluster_bits", f"at least {layout.EXTENDED_L2_MIN_CLUSTER_BITS} with extended L2 entries")
    if header.crypt_method not in layout.CRYPT_NAMES:
        raise refuse.feature("crypt_method", f"encryption method {header.crypt_method}", "0 (none), 1 (AES), 2 (LUKS)")


def check_limits(header: Header, limits: Limits, refuse: Refusal) -> None:
    for _limit, error in limit_faults(header, limits, refuse):
        raise error


def limit_faults(header: Header, limits: Limits, refuse: Refusal) -> Iterator[tuple[str, ImageError]]:
    """For each limit that the header is above: its name, and the error for it."""
    cluster_size = 1 << header.cluster_bits
    largest = min(limits.virtual_size, layout.MAX_VIRTUAL_SIZE)
    table_bytes = header.refcount_table_clusters * cluster_size
    for limit, name, exceeds, expected in (
        (
            "cluster_size",
            "cluster_bits",
            cluster_size > limits.cluster_size,
            f"clusters of at most {limits.cluster_size} bytes",
        ),
        ("virtual_size", "size", header.size > largest, f"at most {largest} bytes"),
        (
            "l1_bytes",
            "l1_size",
            header.l1_size * layout.TABLE_ENTRY_LENGTH > limits.l1_bytes,
            f"entries of at most {limits.l1_bytes} bytes in all",
        ),
        (
            "refcount_table_bytes",
            "refcount_table_clusters",
            table_bytes > limits.refcount_table_bytes,
            f"at most {limits.refcount_table_bytes} bytes in all",
        ),
        ("snapshots", "nb_snapshots", header.nb_snapshots > limits.snapshots, f"at most {limits.snapshots}"),
    ):
        if exceeds:
            yield limit, refuse(name, f"{expected} (the limit {limit})", ImageLimitError)


def check_compression_type(header: Header, refuse: Refusal) -> None:
    kind = header.compression_type
    announced = bool(header.incompatible_features & layout.INCOMPATIBLE_COMPRESSION_TYPE)
    if announced != bool(kind):
        due = "present and not 0 with" if announced else "absent or 0 without"
        raise refuse("compression_type", f"{due} its incompatible feature bit")
    if kind not in layout.COMPRESSION_NAMES:
        raise refuse.feature("compression_type", f"compression type {kind}", "0 (deflate) or 1 (zstd)")


def check_encryption(header: Header, refuse: Refusal) -> None:
    pointer = header.extension(layout.EXTENSION_ENCRYPTION)
    structure = layout.EXTENSION_NAMES[layout.EXTENSION_ENCRYPTION]
    if (pointer is not None) != (header.crypt_method == layout.CRYPT_LUKS):
        raise refuse("crypt_method", f"2 (LUKS) exactly if there is a {structure}")
    if pointer is None:
        return
    found = f"{len(pointer)} bytes"
    if len(pointer) == _ENCRYPTION_POINTER.size:
        offset, length = _ENCRYPTION_POINTER.unpack(pointer)
        found = f"{length} bytes at {offset:#x}"
        if offset and not offset % (1 << header.cluster_bits) and offset + length <= layout.MAX_HOST_OFFSET:
            return
    place = [item.type for item in header.extensions].index(layout.EXTENSION_ENCRYPTION)
    before = sum(layout.extension_span(len(item.data)) for item in header.extensions[:place])
    raise ImageCorruptError(
        f"{prefix(refuse.node)}the {structure} is malformed: {found}",
        structure=structure,
        host_offset=header.header_length + before,
        expected="16 bytes: a cluster-aligned offset behind the header and a length, below 64 PiB",
        found=found,
        node=refuse.node,
    )


def check_tables(header: Header, file_length: int | None, for_check: bool, refuse: Refusal) -> None:
    """With `for_check` a refcount table may be missing, and it and a snapshot table may lie anywhere: a repair makes them
    anew, as QEMU's does [seen]."""
    if not header.refcount_table_clusters and not for_check:
        raise refuse("refcount_table_clusters", "at least 1")
    needed = header.geometry().l1_entries_for(header.size)
    if header.l1_size < needed:
        raise refuse("l1_size", f"at least {needed} entries for a virtual size of {header.size} bytes")
    l1_bytes = header.l1_size * layout.TABLE_ENTRY_LENGTH
    # A table of clusters may end in a file's last, short cluster; L1 entries are all there, or guest data is lost.
    for name, length in (
        ("refcount_table_offset", 0 if for_check else 1),
        ("l1_table_offset", l1_bytes),
        ("snapshots_offset", 1 if header.nb_snapshots else 0),
    ):
        offset = getattr(header, name)
        if offset % (1 << header.cluster_bits):
            raise refuse(name, f"a multiple of the cluster size, {1 << header.cluster_bits}", found=f"{offset:#x}")
        if not length:
            continue
        if not offset:
            raise refuse(name, "a table behind the header cluster", found="0")
        if offset + length > layout.MAX_HOST_OFFSET:
            raise refuse(name, "a table that ends below 64 PiB", found=f"{offset:#x}")
        if for_check and name == "snapshots_offset":
            continue
        if file_length is not None and offset + length > file_length:
            expected = f"a table inside the file, which has {file_length} bytes"
            raise refuse(name, expected, found=f"{length} bytes at {offset:#x}" if length > 1 else f"{offset:#x}")


def refuse_nul(raw: bytes, structure: str, host_offset: int, node: str | None) -> None:
    # C programs open what stands before the NUL: two readers would disagree about which file the image names.
    if b"\0" in raw.rstrip(b"\0"):
        found = repr(raw[:64])
        raise ImageCorruptError(
            f"{prefix(node)}the {structure} contains a NUL character: {found}",
            structure=structure,
            host_offset=host_offset,
            expected="a name without NUL characters",
            found=found,
            node=node,
        )
