"""Files of formats that blocklib only recognises, byte by byte, from their specifications: a recipe is [(offset, bytes)]."""

from __future__ import annotations

import struct
from typing import Final

MiB = 1 << 20
LENGTH: Final = 4 * MiB
PROTECTED: Final = b"\x00\x02\x00"
"""First sector of a partition that protects a GPT, as cylinder, head and sector."""


def partition(boot: int, kind: int, first: int, count: int, chs: bytes = bytes(3)) -> bytes:
    return bytes((boot,)) + chs + bytes((kind,)) + bytes(3) + struct.pack("<II", first, count)


def boot_sector(*partitions: bytes, table: bytes = b"") -> bytes:
    return bytes(446) + (table or b"".join(partitions)).ljust(64, b"\0") + b"\x55\xaa"


LINUX: Final = partition(0x80, 0x83, 2048, 4096)
PROTECTIVE: Final = partition(0, 0xEE, 1, 8191, PROTECTED)
GPT: Final = boot_sector(PROTECTIVE) + b"EFI PART"
ISO: Final = b"\x01CD001\x01\0" + b" " * 32 + b"VOLUME".ljust(32)
ISO_OFFSET: Final = 32768


def luks_header(version: int = 1) -> bytes:
    """A header with one key slot, as cryptsetup writes it, with made-up key material."""
    fields = struct.pack(
        ">6sH32s32s32sII20s32sI40s",
        b"LUKS\xba\xbe", version, b"aes", b"xts-plain64", b"sha256", 4096, 64, b"d" * 20, b"s" * 32, 1000, b"u" * 36,
    )  # fmt: skip
    slots = b""
    for number in range(8):
        state = 0x00AC71F3 if number == 0 else 0x0000DEAD
        slots += struct.pack(">II32sII", state, 1000, b"x" * 32, 8 + 504 * number, 4000)
    return fields + slots


def vhd_footer(kind: int = 2, size: int = LENGTH - 512) -> bytes:
    """The footer of a VHD: kind 2 is of fixed size, 3 grows, 4 holds differences."""
    data_offset = (1 << 64) - 1 if kind == 2 else 512
    fields = (b"conectix", 2, 0x10000, data_offset, 0, b"test", 0, b"Wi2k", size, size, bytes(4), kind)
    return struct.pack(">8sIIQI4sI4sQQ4sI", *fields).ljust(512, b"\0")


def vhd_dynamic_header(parent: str = "") -> bytes:
    return (b"cxsparse" + bytes(56) + parent.encode("utf-16-be")).ljust(1024, b"\0")


DESCRIPTOR: Final = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="{kind}"

# Extent description
{extents}

ddb.adapterType = "ide"
"""


def vmdk_descriptor(kind: str = "monolithicSparse", extents: str = 'RW 8192 SPARSE "disk.vmdk"', more: str = "") -> bytes:
    return (DESCRIPTOR.format(kind=kind, extents=extents) + more).encode()


def vmdk_header(*, grain_directory: int = 26, capacity: int = 8192, descriptor: tuple[int, int] = (1, 20)) -> bytes:
    fields = (b"KDMV", 3, 3, capacity, 128, *descriptor, 512, 21, grain_directory, 128)
    return struct.pack("<4sIIQQQQIQQQ", *fields).ljust(512, b"\0")


def vdi_header(kind: int = 1, size: int = LENGTH) -> bytes:
    text = b"<<< a VDI >>>".ljust(64, b"\0") + struct.pack("<II", 0xBEDA107F, 0x10001) + struct.pack("<II", 400, kind)
    return text.ljust(0x170, b"\0") + struct.pack("<Q", size).ljust(512 - 0x170, b"\0")


def qed_header(backing: bytes = b"") -> bytes:
    features = 1 if backing else 0
    fields = (b"QED\0", 65536, 4, 1, features, 0, 0, 65536, LENGTH, 64 if backing else 0, len(backing))
    return struct.pack("<4sIIIQQQQQII", *fields) + backing


def qcow1_header(backing: bytes = b"", encryption: int = 0) -> bytes:
    fields = (b"QFI\xfb", 1, 48 if backing else 0, len(backing), 0, LENGTH, 12, 9, 0, encryption, 4096)
    return struct.pack(">4sIQIIQBBHIQ", *fields) + backing


def vhdx(*, size: int = LENGTH, parent: bool = False, metadata_offset: int = 2 * MiB) -> list[tuple[int, bytes]]:
    region = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e") + struct.pack("<QII", metadata_offset, MiB, 1)
    parameters = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b") + struct.pack("<IIII", 65536, 8, 0, 0)
    virtual_size = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8") + struct.pack("<IIII", 65544, 8, 0, 0)
    table = struct.pack("<8sHH20s", b"metadata", 0, 2, b"") + parameters + virtual_size
    return [
        (0, b"vhdxfile"),
        (192 << 10, struct.pack("<4sIII", b"regi", 0, 1, 0) + region),
        (metadata_offset, table),
        (metadata_offset + 65536, struct.pack("<IIQ", 1 << 20, 2 if parent else 0, size)),
    ]


def lay(*pieces: tuple[int, bytes], length: int = LENGTH) -> bytes:
    """The file: `length` bytes, or as many as the pieces need."""
    data = bytearray(length)
    for offset, piece in pieces:
        data[offset : offset + len(piece)] = piece
    return bytes(data)
