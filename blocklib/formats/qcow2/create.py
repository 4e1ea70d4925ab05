"""Making a new qcow2 image: header, refcount table and blocks, an empty L1 table, in that order in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blocklib.errors import OptionError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.geometry import Geometry
from blocklib.formats.qcow2.header import Header, feature_name_table
from blocklib.formats.qcow2.header_write import serialize_header
from blocklib.formats.qcow2.tables import table_to_bytes, zero_table

if TYPE_CHECKING:
    from blocklib.formats.qcow2.encryption import NewArea
    from blocklib.graph import Edge

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def header_for(size: int, options: Mapping[str, Any]) -> Header:
    """The header that creation options (typed, in QEMU's names) ask for; the table offsets are not set yet.

    Raises OptionError for options that contradict each other or the format.
    """
    version = VERSIONS[options["compat"]]
    geometry = geometry_for(options)
    cluster_size = geometry.cluster_size
    if version == layout.VERSION_2:
        if options["lazy_refcounts"]:
            raise _bad("lazy_refcounts", "lazy refcounts need compat=1.1")
        if options["compression_type"] != "zlib":
            raise _bad("compression_type", f"compression_type={options['compression_type']} needs compat=1.1")
        if options["extended_l2"]:
            raise _bad("extended_l2", "extended L2 entries need compat=1.1")
    header = Header(
        version=version,
        cluster_bits=geometry.cluster_bits,
        size=-(-size // layout.SIZE_UNIT) * layout.SIZE_UNIT,
        refcount_order=geometry.refcount_order,
        header_length=layout.HEADER_V2_LENGTH if version == layout.VERSION_2 else layout.HEADER_V3_LENGTH,
    )
    if options["lazy_refcounts"]:
        header.compatible_features |= layout.COMPATIBLE_LAZY_REFCOUNTS
    if options["compression_type"] == "zstd":
        header.compression_type = layout.COMPRESSION_ZSTD
        header.incompatible_features |= layout.INCOMPATIBLE_COMPRESSION_TYPE
    if options["extended_l2"]:
        header.incompatible_features |= layout.INCOMPATIBLE_EXTENDED_L2
    _set_data_file(header, options)
    if options["encryption"] or any(value is not None for name, value in options.items() if name.startswith("encrypt.")):
        from blocklib.formats.qcow2.encryption import method_for

        header.crypt_method = method_for(options)
        if version == layout.VERSION_2 and header.crypt_method and options["preallocation"] != "off":
            # What was never written decrypts to noise, and version 2 cannot say that it is zero.
            raise _bad("preallocation", "preallocation of an encrypted image needs compat=1.1")
    header.backing_name = options.get("backing_file")
    if header.backing_name is not None:
        header.backing_format = options.get("backing_fmt")
    if version == layout.VERSION_3:
        header.set_extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table())
    if header.size > header.geometry().max_virtual_size:
        raise _bad(
            "size",
            f"a size of {header.size} bytes is more than clusters of {cluster_size} bytes can map "
            f"({header.geometry().max_virtual_size} bytes)",
        )
    if header.backing_name is not None and options["preallocation"] != "off" and not options["extended_l2"]:
        raise _bad("preallocation", "preallocation and a backing file exclude each other without extended_l2=on")
    return header


def geometry_for(options: Mapping[str, Any]) -> Geometry:
    """The layout that creation options ask for, whatever else they say.  Raises OptionError."""
    cluster_size = options["cluster_size"]
    if cluster_size & (cluster_size - 1) or not 1 << 9 <= cluster_size <= 1 << 21:
        raise _bad("cluster_size", f"the cluster size must be a power of two between 512 and 2 MiB, not {cluster_size}")
    width = options["refcount_bits"]
    if width & (width - 1) or not 1 <= width <= 64:
        raise _bad("refcount_bits", f"refcount_bits must be a power of two from 1 to 64, not {width}")
    if width != 16 and VERSIONS[options["compat"]] == layout.VERSION_2:
        raise _bad("refcount_bits", "refcount widths other than 16 bits need compat=1.1")
    if options["extended_l2"] and cluster_size < 1 << layout.EXTENDED_L2_MIN_CLUSTER_BITS:
        least = 1 << layout.EXTENDED_L2_MIN_CLUSTER_BITS
        raise _bad("extended_l2", f"extended L2 entries need clusters of at least {least} bytes, not {cluster_size}")
    return Geometry(cluster_size.bit_length() - 1, width.bit_length() - 1, bool(options["extended_l2"]))


def _set_data_file(header: Header, options: Mapping[str, Any]) -> None:
    name = options.get("data_file")
    if name is None:
        if options.get("data_file_raw"):
            raise _bad("data_file_raw", "data_file_raw needs a data_file")
        return
    if not name:
        raise _bad("data_file", "the name of the data file is empty")
    if header.version == layout.VERSION_2:
        raise _bad("data_file", "an external data file needs compat=1.1")
    header.incompatible_features |= layout.INCOMPATIBLE_DATA_FILE
    header.data_file_name = name
    if options.get("data_file_raw"):
        if options.get("backing_file") is not None:
            raise _bad("data_file_raw", "data_file_raw and a backing file exclude each other")
        header.autoclear_features |= layout.AUTOCLEAR_RAW_EXTERNAL


def encryption_area(header: Header, options: Mapping[str, Any]) -> NewArea | None:
    """The encryption header of a new image, with its keys; None where it has none.  See `encryption.make_area`."""
    if header.crypt_method == layout.CRYPT_NONE:
        return None
    from blocklib.formats.qcow2.encryption import make_area

    return make_area(options)


def encryption_length(options: Mapping[str, Any]) -> int:
    """Bytes that it will take; no secret is needed for that."""
    if options["encrypt.format"] != "luks":
        return 0
    from blocklib.formats.qcow2.encryption import area_length

    return area_length(options)


def _bad(option: str, text: str) -> OptionError:
    return OptionError(f"qcow2: {text}", option=option, driver="qcow2")


def write_empty_image(file: Edge, header: Header, encryption: NewArea | None = None) -> None:
    """Write the metadata of an image without data into an empty file or a device, durable on return; completes `header`."""
    geometry = header.geometry()
    header.l1_size = geometry.l1_entries_for(header.size)
    l1_clusters = geometry.l1_clusters_for(header.l1_size)
    encryption_clusters = geometry.clusters_for(encryption.length) if encryption is not None else 0
    counts = geometry.refcount_metadata(1 + l1_clusters + encryption_clusters)
    cluster_size = geometry.cluster_size
    header.refcount_table_offset = cluster_size
    header.refcount_table_clusters = counts.table_clusters
    first_block = 1 + counts.table_clusters
    header.l1_table_offset = (first_block + counts.blocks) * cluster_size
    encryption_offset = header.l1_table_offset + l1_clusters * cluster_size
    total = first_block + counts.blocks + l1_clusters + encryption_clusters
    table = zero_table("Q", counts.table_clusters * cluster_size)
    for index in range(counts.blocks):
        table[index] = (first_block + index) * cluster_size
    file.truncate(total * cluster_size)
    # A device keeps what it held; and a flush that links the first table must not be the first to need space for it.
    file.write_zeroes(header.l1_table_offset, (l1_clusters + encryption_clusters) * cluster_size, unmap=False)
    file.write(header.refcount_table_offset, (table_to_bytes(table),))
    for index in range(counts.blocks):
        used = min(total - (index << geometry.refcount_block_bits), geometry.refcount_block_entries)
        file.write((first_block + index) * cluster_size, (_counts_of_one(geometry, used),))
    if encryption is not None:
        from blocklib.formats.qcow2.encryption import pointer

        for offset, part in encryption.parts:
            file.write(encryption_offset + offset, (part,))
        header.set_extension(layout.EXTENSION_ENCRYPTION, pointer(encryption_offset, encryption.length))
    file.flush()
    file.write(0, (serialize_header(header),))
    file.flush()


def _counts_of_one(geometry: Geometry, n: int) -> bytes:
    """A refcount block on disk whose first `n` entries are 1."""
    width = geometry.refcount_bits
    if width >= 8:
        block: bytes = (1).to_bytes(width // 8, "big") * n
    else:
        per_byte = 8 // width
        pattern = sum(1 << shift for shift in range(0, 8, width))
        block = bytes((pattern,)) * (n // per_byte)
        if n % per_byte:
            block += bytes((pattern & ((1 << (n % per_byte * width)) - 1),))
    return block.ljust(geometry.cluster_size, b"\0")


