"""What a raw disk may begin with: a table of partitions, or the header of LUKS.

Sources: the UEFI specification, section "Legacy Master Boot Record"; "LUKS1 On-Disk Format Specification".
"""

from __future__ import annotations

import struct
from typing import Final

from blocklib.errors import ImageError, ImageLimitError
from blocklib.inspection.account import Account

SECTOR: Final = 512
_ENTRIES_OFFSET: Final = 446
_ENTRY: Final = struct.Struct("<B3sB3sII")
"""Boot flag, first and last sector as cylinder, head and sector, type, first sector, number of sectors."""
_ENTRIES: Final = 4
_BOOT_FLAGS: Final = (0x00, 0x80)
_PROTECTIVE: Final = 0xEE
_LUKS_VERSION: Final = struct.Struct(">6sH")


def size_of_raw(length: int) -> int:
    """The virtual size of a raw image of `length` bytes: whole sectors."""
    return -(-length // SECTOR) * SECTOR


def examine_boot_sector(head: bytes, account: Account) -> None:
    """The four entries of the table in the first sector, for a disk with the signature of one."""
    entries = list(_ENTRY.iter_unpack(head[_ENTRIES_OFFSET : _ENTRIES_OFFSET + _ENTRIES * _ENTRY.size]))
    for index, entry in enumerate(entries):
        if entry[0] not in _BOOT_FLAGS:
            account.failed("mbr", f"entry {index} of the partition table has the boot flag {entry[0]:#04x}: it is no table")
    used = [(index, entry) for index, entry in enumerate(entries) if entry[2]]
    if not used:
        account.failed("mbr", "the partition table has no partition")
    if any(entry[2] == _PROTECTIVE for _index, entry in used):
        index, entry = used[0]
        if len(used) > 1 or index:
            account.failed("mbr", "the partition table that protects a GPT has other partitions, too")
        elif entry[4] != 1:
            account.failed("mbr", f"the partition that protects a GPT begins at sector {entry[4]}, not 1")
        account.passed("mbr", "the partition table protects a GPT")
    account.passed("mbr", f"the partition table has {len(used)} partitions")


def examine_luks(data: bytes, length: int, account: Account, check: str, *, place: int = 0) -> int | None:
    """The header of LUKS in `data`, at host offset `place`, of an area of `length` bytes: where in it the payload begins.

    `check` is the check that it passes or fails.  None where that cannot be told.
    """
    from blocklib.crypto.luks import parse_luks

    account.encrypted = True
    payload: int | None = None
    try:
        header = parse_luks(data, length=length, most_iterations=account.limits.key_iterations, place=place)
        payload = header.payload_offset
    except ImageLimitError as exc:
        account.exceeds("key_iterations", str(exc))
    except ImageError as exc:
        account.failed(check, str(exc))
    account.passed(check, "the LUKS header is well-formed, version 1")
    return payload


def examine_luks_disk(head: bytes, account: Account) -> None:
    """A disk that is encrypted with LUKS as a whole; `version` is about its version, `header` about the rest."""
    from blocklib.crypto.luks import HEADER_LENGTH, VERSION

    account.encrypted = True
    version = int.from_bytes(head[6:8], "big")
    if version != VERSION:
        account.failed("version", f"LUKS version {version} is not known: expected {VERSION}")
        return
    account.passed("version", f"LUKS version {version}")

    def end(length: int, _tail: bytes) -> None:
        payload = examine_luks(head[:HEADER_LENGTH], length, account, "header")
        if payload is not None:
            account.virtual_size = length - payload

    account.endings.append(end)
