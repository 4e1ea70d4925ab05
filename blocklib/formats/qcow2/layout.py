"""qcow2 on disk: every constant of the format, once, in the specification's words (pure numbers, no I/O).

Source: QEMU's ``docs/interop/qcow2.rst``; section names are quoted at each group.  All numbers on disk are big endian.
A *limit* is not part of the format: it bounds what an image may make a reader spend, and says why it is what it is.
"""

from __future__ import annotations

from typing import Final

# Section "Header" ---------------------------------------------------------------------------------------------------

MAGIC: Final = b"QFI\xfb"
VERSION_2: Final = 2
VERSION_3: Final = 3

HEADER_V2_LENGTH: Final = 72
"""'For version 2, the header is exactly 72 bytes in length.'"""
HEADER_V3_MIN_LENGTH: Final = 104
"""'For version 3 or higher, the header length is at least 104 bytes' and a multiple of 8."""
HEADER_V3_LENGTH: Final = 112
"""What we write: 104 bytes, the compression type at byte 104, and zero padding to the next multiple of 8."""
HEADER_ALIGNMENT: Final = 8

HEADER_V2_FORMAT: Final = ">4sIQIIQIIQQIIQ"
"""magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method, l1_size, l1_table_offset,
refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset."""
HEADER_V3_FORMAT: Final = ">QQQII"
"""From byte 72: incompatible_features, compatible_features, autoclear_features, refcount_order, header_length."""
COMPRESSION_TYPE_OFFSET: Final = 104
"""One byte; 'not present' (hence 0) when header_length is not greater than this offset."""

FIELD_OFFSETS: Final = {
    "magic": 0,
    "version": 4,
    "backing_file_offset": 8,
    "backing_file_size": 16,
    "cluster_bits": 20,
    "size": 24,
    "crypt_method": 32,
    "l1_size": 36,
    "l1_table_offset": 40,
    "refcount_table_offset": 48,
    "refcount_table_clusters": 56,
    "nb_snapshots": 60,
    "snapshots_offset": 64,
    "incompatible_features": 72,
    "compatible_features": 80,
    "autoclear_features": 88,
    "refcount_order": 96,
    "header_length": 100,
    "compression_type": COMPRESSION_TYPE_OFFSET,
}
"""Where each header field lies, for errors that name a place."""

MIN_CLUSTER_BITS: Final = 9
"""'Must not be less than 9 (i.e. 512 byte clusters).'"""
MAX_CLUSTER_BITS: Final = 21
"""QEMU opens nothing above 2 MiB; the format has no bound."""
EXTENDED_L2_MIN_CLUSTER_BITS: Final = 14
"""'If the image has Extended L2 Entries then cluster_bits must be at least 14': 32 subclusters of 512 bytes."""

V2_REFCOUNT_ORDER: Final = 4
"""'For version 2 images, the order is always assumed to be 4 (i.e. refcount_bits = 16).'"""
MAX_REFCOUNT_ORDER: Final = 6
"""'This value may not exceed 6 (i.e. refcount_bits = 64).'"""

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2
CRYPT_NAMES: Final = {CRYPT_NONE: "none", CRYPT_AES: "aes", CRYPT_LUKS: "luks"}

COMPRESSION_DEFLATE: Final = 0
"""Raw RFC 1951 without zlib headers; QEMU calls it 'zlib'."""
COMPRESSION_ZSTD: Final = 1
COMPRESSION_NAMES: Final = {COMPRESSION_DEFLATE: "zlib", COMPRESSION_ZSTD: "zstd"}

# Feature bits: incompatible_features, compatible_features, autoclear_features ----------------------------------------

FEATURE_INCOMPATIBLE: Final = 0
FEATURE_COMPATIBLE: Final = 1
FEATURE_AUTOCLEAR: Final = 2
"""The three are also the values of a feature name table entry's first byte."""

INCOMPATIBLE_DIRTY: Final = 1 << 0
"""'refcounts may be inconsistent, make sure to scan L1/L2 tables to repair refcounts before accessing the image'"""
INCOMPATIBLE_CORRUPT: Final = 1 << 1
"""'any data structure may be corrupt and the image must not be written to (unless for regaining consistency)'"""
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
"""'an external data file is used. Guest clusters are then stored in the external data file'"""
INCOMPATIBLE_COMPRESSION_TYPE: Final = 1 << 3
"""'a non-default compression is used for compressed clusters'; the field must be present and not zero"""
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
"""'L2 table entries use an extended format that allows subcluster-based allocation'"""
INCOMPATIBLE_KNOWN: Final = (
    INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION_TYPE
    | INCOMPATIBLE_EXTENDED_L2
)
"""Bits that the specification defines; 'an implementation must fail to open an image if an unknown bit is set'."""

COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
"""'lazy refcount updates can be used': the image is marked dirty and refcount updates are postponed"""

AUTOCLEAR_BITMAPS: Final = 1 << 0
"""'consistency for the bitmaps extension data'"""
AUTOCLEAR_RAW_EXTERNAL: Final = 1 << 1
"""'the external data file can be read as a consistent standalone raw image'"""

FEATURE_NAMES: Final = {
    (FEATURE_INCOMPATIBLE, 0): "dirty bit",
    (FEATURE_INCOMPATIBLE, 1): "corrupt bit",
    (FEATURE_INCOMPATIBLE, 2): "external data file",
    (FEATURE_INCOMPATIBLE, 3): "compression type",
    (FEATURE_INCOMPATIBLE, 4): "extended L2 entries",
    (FEATURE_COMPATIBLE, 0): "lazy refcounts",
    (FEATURE_AUTOCLEAR, 0): "bitmaps",
    (FEATURE_AUTOCLEAR, 1): "raw external data",
}
"""(type, bit number) -> name: what QEMU 7.2 writes into the feature name table, in its order."""

# Section "Header extensions" -----------------------------------------------------------------------------------------

EXTENSION_END: Final = 0x00000000
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_ENCRYPTION: Final = 0x0537BE77
EXTENSION_DATA_FILE: Final = 0x44415441
EXTENSION_NAMES: Final = {
    EXTENSION_BACKING_FORMAT: "backing file format name",
    EXTENSION_FEATURE_NAMES: "feature name table",
    EXTENSION_BITMAPS: "bitmaps extension",
    EXTENSION_ENCRYPTION: "full disk encryption header pointer",
    EXTENSION_DATA_FILE: "external data file name",
}

EXTENSION_HEADER_FORMAT: Final = ">II"
"""type, length of the data; the data is padded to the next multiple of 8."""
EXTENSION_HEADER_LENGTH: Final = 8
EXTENSION_ALIGNMENT: Final = 8


def extension_span(data_length: int) -> int:
    """Bytes that a header extension takes: its header, its data and the 'padding to round up to the next multiple of
    8'."""
    return EXTENSION_HEADER_LENGTH + -(-data_length // EXTENSION_ALIGNMENT) * EXTENSION_ALIGNMENT


FEATURE_NAME_ENTRY_LENGTH: Final = 48
"""type (1 byte), bit number (1 byte), name 'padded with zeros, but not necessarily null terminated'."""
FEATURE_NAME_LENGTH: Final = 46

BITMAPS_EXTENSION_FORMAT: Final = ">IIQQ"
"""nb_bitmaps, reserved, bitmap_directory_size, bitmap_directory_offset."""
ENCRYPTION_EXTENSION_FORMAT: Final = ">QQ"
"""Offset of the encryption header (cluster aligned), its length in bytes."""

ATOMIC_WRITE_LENGTH: Final = 512
"""A disk writes one sector or does not: what switches the header in one step must lie inside the first one."""

# Section "Host cluster management" -----------------------------------------------------------------------------------

TABLE_ENTRY_LENGTH: Final = 8
"""Bytes of one L1, refcount table or bitmap table entry."""
REFCOUNT_TABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
"""Bits 9-63: where the refcount block starts; 0 if it is not allocated and all its counts are 0."""
REFCOUNT_TABLE_RESERVED_MASK: Final = 0x1FF

# Section "Cluster mapping" -------------------------------------------------------------------------------------------

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9-55 of an L1, L2 or bitmap table entry: the host offset."""
FLAG_COPIED: Final = 1 << 63
"""L1 and L2: the refcount of what the entry points at is exactly one, so it may be written in place."""
FLAG_COMPRESSED: Final = 1 << 62
"""L2: the entry is a Compressed Clusters Descriptor."""
FLAG_ZERO: Final = 1 << 0
"""L2, standard descriptor: the cluster reads as all zeros; always 0 in version 2 and with extended L2 entries."""
L1_RESERVED_MASK: Final = 0x7F00_0000_0000_01FF
"""L1 entry bits 0-8 and 56-62, 'set to 0'."""
L2_RESERVED_MASK: Final = 0x3F00_0000_0000_01FE
"""Standard cluster descriptor bits 1-8 and 56-61, 'set to 0'."""

L2_ENTRY_LENGTH: Final = 8
EXTENDED_L2_ENTRY_LENGTH: Final = 16
"""Section 'Extended L2 Entries': a standard entry and a 64-bit subcluster allocation bitmap."""
SUBCLUSTERS_PER_CLUSTER: Final = 32
SUBCLUSTER_ALLOCATED_MASK: Final = 0x0000_0000_FFFF_FFFF
"""Bits 0-31: subcluster x is allocated."""
SUBCLUSTER_ZERO_MASK: Final = 0xFFFF_FFFF_0000_0000
"""Bits 32-63: subcluster x - 32 reads as zeros, and its allocation bit must be unset."""

COMPRESSED_SECTOR_LENGTH: Final = 512
COMPRESSED_FIELDS_BITS: Final = 62
"""Bits 0-61 of a compressed descriptor hold the host offset and, above it, the number of additional sectors."""


def compressed_offset_bits(cluster_bits: int) -> int:
    """The x of 'Compressed Clusters Descriptor (x = 62 - (cluster_bits - 8))': bits of the host offset field.

    The 62 - x bits above it count the *additional* 512-byte sectors, beyond the one that holds the first byte.
    """
    return COMPRESSED_FIELDS_BITS - (cluster_bits - 8)


# Section "Snapshots" -------------------------------------------------------------------------------------------------

SNAPSHOT_ENTRY_FORMAT: Final = ">QIHHIIQII"
"""l1_table_offset, l1_size, id length, name length, seconds, nanoseconds, guest run time in ns, VM state size, length
of the extra data.  Extra data, id and name follow; the whole entry is padded to a multiple of 8."""
SNAPSHOT_ENTRY_LENGTH: Final = 40
SNAPSHOT_EXTRA_FORMAT: Final = ">QQQ"
"""64-bit VM state size, virtual disk size, icount (-1: none); each is present as far as the extra data reaches."""
SNAPSHOT_V3_EXTRA_LENGTH: Final = 16
"""'Version 3 images must include extra data at least up to byte 55.'"""
SNAPSHOT_EXTRA_LENGTH: Final = 24
"""All the extra data that the specification knows."""
SNAPSHOT_ALIGNMENT: Final = 8

# Section "Bitmap directory" ------------------------------------------------------------------------------------------

BITMAP_ENTRY_FORMAT: Final = ">QIIBBHI"
"""bitmap_table_offset, bitmap_table_size, flags, type, granularity_bits, name_size, extra_data_size.  Extra data and
name follow; the whole entry is padded to a multiple of 8."""
BITMAP_ENTRY_LENGTH: Final = 24
BITMAP_FLAG_IN_USE: Final = 1 << 0
BITMAP_FLAG_AUTO: Final = 1 << 1
BITMAP_FLAG_EXTRA_DATA_COMPATIBLE: Final = 1 << 2
BITMAP_RESERVED_FLAGS: Final = 0xFFFF_FFF8
"""'Bits 3 - 31 are reserved and must be 0.'"""
BITMAP_ALIGNMENT: Final = 8
BITMAP_MAX_GRANULARITY_BITS: Final = 63
"""'Valid values: 0 - 63.'"""
BITMAP_TYPE_DIRTY_TRACKING: Final = 1
BITMAP_TABLE_ALL_ONES: Final = 1 << 0
"""Bitmap table entry without an offset: the cluster reads as all ones."""
BITMAP_TABLE_RESERVED_MASK: Final = 0xFF00_0000_0000_01FE
"""Bitmap table entry bits 1-8 and 56-63, 'reserved and must be zero'."""

# Limits --------------------------------------------------------------------------------------------------------------

MAX_L1_BYTES: Final = 32 << 20
"""QEMU's limit, quoted by the specification; the whole active L1 table is held in memory."""
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
"""QEMU's limit, quoted by the specification; the whole refcount table is held in memory."""
MAX_SNAPSHOTS: Final = 65536
"""QEMU's limit: each snapshot is an object in memory, and its entry is read before the image is usable."""
MAX_SNAPSHOT_EXTRA_BYTES: Final = 1024
"""QEMU's limit: unknown extra data is held in memory to be written back."""
MAX_SNAPSHOT_TABLE_BYTES: Final = 1024 * MAX_SNAPSHOTS
"""QEMU's limit: 64 MiB, whatever the lengths of names and ids add up to."""
MAX_BITMAPS: Final = 65535
"""'QEMU currently only supports up to 65535 bitmaps per image.'"""
MAX_BITMAP_NAME_LENGTH: Final = 1023
"""'QEMU currently doesn't support values greater than 1023.'"""
MAX_BITMAP_DIRECTORY_BYTES: Final = 1024 * MAX_BITMAPS
"""QEMU's limit: 64 MiB, whatever the lengths of names and extra data add up to."""
MAX_BITMAP_TABLE_ENTRIES: Final = 1 << 27
"""QEMU's limit for one bitmap table."""
MAX_BITMAP_BYTES: Final = 512 << 20
"""QEMU's limit for the data of one bitmap, in whole clusters: it is held in memory."""
MIN_BITMAP_GRANULARITY_BITS: Final = 9
MAX_BITMAP_GRANULARITY_BITS: Final = 31
"""'QEMU currently supports only values 9 - 31', of the 0 - 63 that the format allows."""
MAX_BACKING_NAME_LENGTH: Final = 1023
"""'Must not be longer than 1023 bytes.'  This one is the format's."""
MAX_BACKING_FORMAT_LENGTH: Final = 15
"""QEMU refuses to open an image whose format name is longer [seen]."""
MAX_HOST_OFFSET: Final = 1 << 56
"""'Table layouts limit an image to no more than 64 PB (56 bits)': every host offset is below this."""
MAX_VIRTUAL_SIZE: Final = (1 << 63) - 1
"""Offsets are signed 64-bit numbers in every system call that we make."""
SIZE_UNIT: Final = 512
"""The size of an image is a multiple of this: QEMU shows whole sectors only [seen]."""
