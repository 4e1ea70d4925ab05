"""What images of other formats say of themselves: enough to know their size and which files they name.

blocklib has no drivers for them.  Sources: VMware's "Virtual Disk Format 5.0", Microsoft's "Virtual Hard Disk Image Format
Specification" and "[MS-VHDX]", QEMU's ``docs/interop/qed_spec.rst``; the headers of VDI and of qcow version 1 are known from
images that VirtualBox and qemu-img write.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, Final

from blocklib.inspection.account import Account, Examination, Want
from blocklib.inspection.disks import SECTOR
from blocklib.probe import HEAD_LENGTH, has_vhd_footer

_SHORT: Final = "the file ends inside the header"


def examine(name: str, head: bytes, account: Account) -> Examination | None:
    """Begin the examination of an image of another format than ours; None where there is no more to be read for it."""
    if name == "vmdk":
        return examine_vmdk(head, account)
    if name == "vhdx":
        return examine_vhdx(account)
    {"vhd": examine_vhd, "vdi": examine_vdi}.get(name, examine_banned)(head, account)
    return None


def _at(layout: str, data: bytes, offset: int) -> int | None:
    """One number of a header, or None behind the end of the data."""
    field = struct.Struct(layout)
    if offset + field.size > len(data):
        return None
    (number,) = field.unpack_from(data, offset)
    return int(number)


def _name(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "surrogateescape")


def examine_banned(head: bytes, account: Account) -> None:
    """Formats that nobody should take from a stranger: old, and with no reader left that is looked after."""
    account.failed("banned", "images of this format are not accepted")
    layout = _OLD_HEADERS.get(head[:4])
    if layout is None:
        return
    numbers, size_offset, name_offset, name_length, encryption = layout
    account.virtual_size = _at(f"{numbers}Q", head, size_offset)
    account.encrypted = bool(encryption and _at(f"{numbers}I", head, encryption))
    where = _at(f"{numbers}Q" if head.startswith(b"QFI") else f"{numbers}I", head, name_offset)
    length = _at(f"{numbers}I", head, name_length)
    if head.startswith(b"QED") and not (_at("<Q", head, 16) or 0) & 1:
        where = 0  # the feature bit says whether there is one
    if where and length and where + length <= len(head):
        account.names("backing", _name(head[where : where + length]), None)
    if where:
        account.failed("backing_file", "the image has a backing file")
    account.passed("backing_file", "the image has no backing file")


_OLD_HEADERS: Final = {b"QFI\xfb": (">", 24, 8, 16, 36), b"QED\0": ("<", 48, 56, 60, 0)}
"""Magic -> byte order; where the header has the virtual size, the place and length of the backing file's name, and the method
of encryption."""


# VDI -------------------------------------------------------------------------------------------------------------------


def examine_vdi(head: bytes, account: Account) -> None:
    """The parent of a VDI that holds differences is known by a UUID only: no file name is in it."""
    kind, size = _at("<I", head, 0x4C), _at("<Q", head, 0x170)
    if kind is None or size is None:
        account.failed("header", _SHORT)
        return
    account.virtual_size = size
    if kind not in (1, 2):
        account.failed("backing_file", f"the image is of type {kind}: it depends on another one")
    account.passed("backing_file", "the image has no parent")


# VHD -------------------------------------------------------------------------------------------------------------------

_VHD_FIXED, _VHD_DYNAMIC, _VHD_DIFFERENCING = 2, 3, 4
_VHD_HEADER_COOKIE: Final = b"cxsparse"
_VHD_PARENT_NAME: Final = slice(64, 64 + 512)


def examine_vhd(head: bytes, account: Account) -> None:
    """The footer says all there is to say; its copy at the beginning is what a stream shows first, and must be the same."""

    def end(_length: int, tail: bytes) -> None:
        footer = tail[-SECTOR:]
        if not has_vhd_footer(tail):
            account.failed("footer", "the file does not end with the footer that a copy at its beginning announces")
            footer = head[:SECTOR]
        kind, size = _at(">I", footer, 60), _at(">Q", footer, 48)
        if kind is None or size is None:
            account.failed("footer", "the file ends inside the footer")
            return
        account.virtual_size = size
        if has_vhd_footer(head[:SECTOR]) and footer != head[:SECTOR]:
            account.failed("footer", "the footer and its copy at the beginning of the file differ")
        if kind == _VHD_DIFFERENCING:
            account.failed("backing_file", "the image has a parent")
            _tell_vhd_parent(head, _at(">Q", footer, 16) or 0, account)
        elif kind not in (_VHD_FIXED, _VHD_DYNAMIC):
            account.failed("footer", f"disk type {kind} is not known")
        account.passed("footer", "the footer is well-formed")
        account.passed("backing_file", "the image has no parent")

    account.endings.append(end)


def _tell_vhd_parent(head: bytes, header_offset: int, account: Account) -> None:
    header = head[header_offset : header_offset + 1024]
    if header.startswith(_VHD_HEADER_COOKIE):
        name = header[_VHD_PARENT_NAME].decode("utf-16-be", "replace").partition("\0")[0]
        if name:
            account.names("backing", name, "vhd")


# VHDX ------------------------------------------------------------------------------------------------------------------

_REGION_TABLE: Final = Want(192 << 10, 64 << 10)
_METADATA_TABLE_LENGTH: Final = 64 << 10
_METADATA_MOST: Final = 1 << 20
_LEAST_REGION_OFFSET: Final = 1 << 20
_REGION: Final = struct.Struct("<16sQII")
_ITEM: Final = struct.Struct("<16sIIII")
_METADATA_REGION: Final = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_FILE_PARAMETERS: Final = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
_VIRTUAL_DISK_SIZE: Final = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")
_MOST_ENTRIES: Final = 2047
_HAS_PARENT: Final = 2


def examine_vhdx(account: Account) -> Examination:
    table = yield _REGION_TABLE
    place = _vhdx_region(table)
    if place is None:
        account.failed("header", "the region table names no region of metadata behind the first MiB")
        return
    data = yield Want(place[0], min(place[1], _METADATA_MOST))
    items = _vhdx_items(data)
    size, parameters = items.get(_VIRTUAL_DISK_SIZE), items.get(_FILE_PARAMETERS)
    if size is None or len(size) < 8 or parameters is None or len(parameters) < 8:
        account.failed("header", "the metadata has no virtual disk size or no file parameters")
        return
    account.virtual_size = int.from_bytes(size[:8], "little")
    if parameters[4] & _HAS_PARENT:
        account.failed("backing_file", "the image has a parent")
    account.passed("backing_file", "the image has no parent")


def _vhdx_region(table: bytes) -> tuple[int, int] | None:
    if not table.startswith(b"regi"):
        return None
    for guid, offset, length, _required in _entries(_REGION, table, 16, _at("<I", table, 8) or 0):
        if guid == _METADATA_REGION and offset >= _LEAST_REGION_OFFSET:
            return offset, length
    return None


def _vhdx_items(data: bytes) -> dict[bytes, bytes]:
    if not data.startswith(b"metadata"):
        return {}
    return {
        guid: data[offset : offset + length]
        for guid, offset, length, _flags, _reserved in _entries(_ITEM, data, 32, _at("<H", data, 10) or 0)
        if offset >= _METADATA_TABLE_LENGTH
    }


def _entries(layout: struct.Struct, data: bytes, start: int, count: int) -> Iterator[tuple[Any, ...]]:
    """The entries of a table, as many as there are and as the file holds."""
    there = max(0, len(data) - start) // layout.size
    return layout.iter_unpack(data[start : start + min(count, there, _MOST_ENTRIES) * layout.size])


# VMDK ------------------------------------------------------------------------------------------------------------------

_SPARSE_HEADER: Final = struct.Struct("<4sIIQQQQIQQQ")
"""Magic, version, flags, capacity, grain size, descriptor offset and size, entries of a grain table, redundant grain
directory, grain directory, overhead; in sectors."""
_AT_END: Final = (1 << 64) - 1
_FOOTER: Final = slice(-1024, -512)
_MOST_DESCRIPTOR: Final = HEAD_LENGTH
_SELF_CONTAINED: Final = ("monolithicsparse", "streamoptimized")
_NO_PARENT: Final = "ffffffff"
_EXTENT: Final = re.compile(r'(?:RW|RDONLY|NOACCESS)\s+(\d+)\s+(\w+)(?:\s+"([^"]*)")?', re.IGNORECASE)
_PLAIN_NAME: Final = re.compile(r"[\w. ()+-]+")


def examine_vmdk(head: bytes, account: Account) -> Examination:
    """A binary header with the descriptor inside, or the descriptor alone."""
    if head.startswith(b"COWD"):
        account.failed("descriptor", "a sparse extent of an older kind, which has no descriptor")
        return
    if not head.startswith(b"KDMV"):
        text = head.partition(b"\0")[0]
        if len(head) == _MOST_DESCRIPTOR and len(text) == len(head):
            account.failed("descriptor", f"the descriptor has more than {_MOST_DESCRIPTOR} bytes")
            return
        _judge_descriptor(text, account, embedded=False)
        return
    if len(head) < _SPARSE_HEADER.size:
        account.failed("header", _SHORT)
        account.failed("descriptor", _SHORT)
        return
    fields = _SPARSE_HEADER.unpack_from(head)
    account.virtual_size = fields[3] * SECTOR
    offset, length = fields[5] * SECTOR, fields[6] * SECTOR
    if fields[9] == _AT_END:
        account.endings.append(lambda _length, tail: _judge_footer(fields, tail, account))
    if not offset or not length:
        account.failed("descriptor", "the image has no descriptor")
    elif length > _MOST_DESCRIPTOR:
        account.failed("descriptor", f"the descriptor has {length} bytes, more than {_MOST_DESCRIPTOR}")
    else:
        data = yield Want(offset, length)
        if len(data) < length:
            account.failed("descriptor", f"the file ends inside the descriptor, at {offset + len(data)}")
        _judge_descriptor(data.partition(b"\0")[0], account, embedded=True)


def _judge_footer(fields: tuple[int, ...], tail: bytes, account: Account) -> None:
    """The footer is the header again, with the place of the grain directory: it may say nothing else."""
    footer = tail[_FOOTER] if len(tail) >= 1024 else b""
    again = _SPARSE_HEADER.unpack_from(footer) if len(footer) >= _SPARSE_HEADER.size else ()
    if again[:1] != (b"KDMV",):
        account.failed("footer", "the header announces a footer, and there is none")
    elif (again[:9], again[10:]) != (fields[:9], fields[10:]):
        account.failed("footer", "the footer says something else than the header")
    account.passed("footer", "the footer says the same as the header")


def _judge_descriptor(raw: bytes, account: Account, *, embedded: bool) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    settings: dict[str, str] = {}
    extents = []
    for line in text.splitlines():
        extent = _EXTENT.match(line.strip())
        if extent is not None:
            extents.append(extent)
            continue
        key, equals, value = line.partition("=")
        if equals:
            settings.setdefault(key.strip().lower(), value.strip().strip('"'))
    kind = settings.get("createtype", "")
    if not embedded:
        account.virtual_size = sum(int(extent[1]) for extent in extents if len(extent[1]) < 20) * SECTOR
    for extent in extents:
        name = extent[3]
        if embedded and extent[2].upper() == "SPARSE" and name is not None and _PLAIN_NAME.fullmatch(name):
            continue  # the image itself, by the name that it once had
        if name is not None:
            account.names("data-file", name, "raw" if "FLAT" in extent[2].upper() else "vmdk")
        account.failed("descriptor", f"an extent is in another file, {name!r}")
    if settings.get("parentcid", _NO_PARENT).lower() != _NO_PARENT:
        parent = settings.get("parentfilenamehint")
        if parent:
            account.names("backing", parent, "vmdk")
        account.failed("descriptor", f"the image has a parent, {parent!r}" if parent else "the image has a parent")
    if kind.lower() not in _SELF_CONTAINED:
        account.failed("descriptor", f"the kind {kind!r} keeps its data in other files")
    if not extents:
        account.failed("descriptor", "the descriptor names no extent")
    account.passed("descriptor", f"{kind}, all of it in this file")
