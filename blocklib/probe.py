"""Which format do these bytes look like?  Answers by magic and never acts: no file is opened, no format chosen.

Raw has no magic, so None means "no format that has one", never "raw".  The rules are those of ``qemu-img info``
without ``-f``, found by experiment, with one more (`_is_vmdk_descriptor`): an image that it would not take for raw
must not become raw here only because there is no driver for its format.
"""

from __future__ import annotations

from blocklib.drivers import FORMATS
from blocklib.errors import UnsupportedFeatureError

PROBE_LENGTH = 512
"""The answer depends on no byte after these; a guessed raw node guards exactly them."""

_QCOW_MAGIC = b"QFI\xfb"
_VDI_MAGIC = b"\x7f\x10\xda\xbe"
_VDI_MAGIC_OFFSET = 0x40
_LUKS_MAGIC = b"LUKS\xba\xbe"
_LUKS_VERSION_1 = _LUKS_MAGIC + b"\x00\x01"
_PARALLELS_VERSION_2 = (b"WithoutFreeSpace\x02\x00\x00\x00", b"WithouFreSpacExt\x02\x00\x00\x00")
_BOCHS_GROWING = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
_BOCHS_VERSIONS = (b"\x00\x00\x01\x00", b"\x00\x00\x02\x00")
_CLOOP_SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
_VHD_COOKIE = b"conectix"
_VMDK_DESCRIPTOR = b"# Disk DescriptorFile"
_VMDK_VERSIONS = (b"version=1", b"version=2", b"version=3")

_AT_START: tuple[tuple[str, bytes], ...] = (
    ("vmdk", b"KDMV"),
    ("vmdk", b"COWD"),
    ("vhdx", b"vhdxfile"),
    ("vpc", _VHD_COOKIE),
    ("qed", b"QED\0"),
    ("luks", _LUKS_VERSION_1),
    ("parallels", _PARALLELS_VERSION_2[0]),
    ("parallels", _PARALLELS_VERSION_2[1]),
    ("bochs", _BOCHS_GROWING + _BOCHS_VERSIONS[0]),
    ("bochs", _BOCHS_GROWING + _BOCHS_VERSIONS[1]),
    ("cloop", _CLOOP_SCRIPT),
)

HEAD_LENGTH = 64 << 10
"""What `matches` wants of the beginning of a file, ..."""
TAIL_LENGTH = 1536
"""... and of its end."""
SIGNATURES = (
    "qcow2", "qcow", "vmdk", "vhdx", "vhd", "qed", "vdi", "luks", "parallels", "bochs", "cloop", "iso", "gpt",
)  # fmt: skip
"""Every name that `matches` gives, in its order: images first, then what a disk may hold.

They are those of OpenStack's format inspector: QEMU's "vpc" is "vhd", and "gpt" is any table of partitions in the first
sector, of the old kind, too.
"""
_CALLED_HERE = {"vpc": "vhd"}
_ISO_MAGIC = b"CD001"
_ISO_MAGIC_OFFSET = 0x8001
_BOOT_SIGNATURE = b"\x55\xaa"
_BOOT_SIGNATURE_OFFSET = 510
_VHD_FOOTER_LENGTH = 512


def probe(first_bytes: bytes | memoryview) -> str | None:
    """The format whose magic `first_bytes` has: the start of a file, PROBE_LENGTH of it where there is so much.

    None where there is none.  The name may be of a format that blocklib cannot read: see `probe_readable`.
    """
    start = bytes(first_bytes[:PROBE_LENGTH])
    # Before all others, as in QEMU: what has this magic and another is ambiguous, and becomes a format we refuse.
    if start[_VDI_MAGIC_OFFSET : _VDI_MAGIC_OFFSET + 4] == _VDI_MAGIC:
        return "vdi"
    if start.startswith(_QCOW_MAGIC):
        version = int.from_bytes(start[4:8], "big") if len(start) >= 8 else 0
        if version:
            return "qcow" if version == 1 else "qcow2"
    for name, magic in _AT_START:
        if start.startswith(magic):
            return name
    return "vmdk" if _is_vmdk_descriptor(start) else None


def matches(head: bytes, tail: bytes = b"") -> tuple[str, ...]:
    """Every format whose signature a file has, each where the format puts it, from SIGNATURES and in its order.

    `head` is its first HEAD_LENGTH bytes, `tail` its last TAIL_LENGTH, or all of a shorter file.  `probe` stops at the first
    that QEMU would; here two tell of a file that two programs would read as two different disks.
    """
    found = {_CALLED_HERE.get(name, name) for name, magic in _AT_START if head.startswith(magic)}
    if head.startswith(_QCOW_MAGIC):
        found.add("qcow" if head[4:8] == b"\0\0\0\1" else "qcow2")
    if head.startswith(_LUKS_MAGIC):
        found.add("luks")
    if head.startswith(_VDI_MAGIC, _VDI_MAGIC_OFFSET):
        found.add("vdi")
    if _is_vmdk_descriptor(head):
        found.add("vmdk")
    if has_vhd_footer(tail):
        found.add("vhd")
    if head.startswith(_ISO_MAGIC, _ISO_MAGIC_OFFSET):
        found.add("iso")
    if head.startswith(_BOOT_SIGNATURE, _BOOT_SIGNATURE_OFFSET) and not _begins_fat(head):
        found.add("gpt")
    return tuple(name for name in SIGNATURES if name in found)


def _begins_fat(head: bytes) -> bool:
    """Whether a FAT file system begins here: it has the boot signature of a table of partitions, and code in its place."""
    bytes_per_sector, sectors_per_cluster, copies, media = int.from_bytes(head[11:13], "little"), head[13], head[16], head[21]
    return (
        head[0] in (0xEB, 0xE9)  # a jump over these numbers
        and bytes_per_sector in (512, 1024, 2048, 4096)
        and sectors_per_cluster.bit_count() == 1
        and copies in (1, 2)
        and (media == 0xF0 or media >= 0xF8)
    )


def has_vhd_footer(tail: bytes) -> bool:
    """Whether a file that ends with `tail` ends as a VHD does; one of fixed size shows itself nowhere else."""
    return tail[-_VHD_FOOTER_LENGTH:].startswith(_VHD_COOKIE)


def probe_readable(first_bytes: bytes | memoryview, filename: str | None = None) -> str | None:
    """As `probe`, but raises UnsupportedFeatureError where the format is recognised and there is no driver for it."""
    name = probe(first_bytes)
    if name is None or name in FORMATS:
        return name
    where = f"{filename}: " if filename else ""
    raise UnsupportedFeatureError(
        f"{where}format {name} is not supported",
        features=(name,),
        structure="magic",
        host_offset=_VDI_MAGIC_OFFSET if name == "vdi" else 0,
        expected=f"one of {', '.join(FORMATS)}",
        found=name,
        node=filename,
    )


def _is_vmdk_descriptor(start: bytes) -> bool:
    """The text that names the extents of a VMDK: comments and blank lines, then its version; or its usual first line.

    QEMU takes a descriptor with another second line than `version=` for raw; it is text that names host files all the
    same.
    """
    if start.startswith(_VMDK_DESCRIPTOR):
        return True
    for line in start.split(b"\n")[:-1]:
        if line.startswith(b"#") or (line.startswith(b" ") and not line.removesuffix(b"\r").strip(b" ")):
            continue
        return line.removesuffix(b"\r") in _VMDK_VERSIONS
    return False
