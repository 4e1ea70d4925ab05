"""Inspection beside OpenStack's format inspector, whose names the checks have: the same verdicts, but for known differences.

VERDICTS are what oslo.utils 10.2.0 said of the files of `corpus()`; where it is installed it is asked again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import struct
from typing import Any, TypeAlias

import pytest

import blocklib
from tests import foreign
from tests.unit.test_inspection import FORMATS, POLYGLOTS, QCOW2, RAW, TABLES

CHECKS = {"backing_file", "data_file", "unknown_features", "descriptor", "footer", "mbr", "version", "banned"}
"""Checks that both have."""


def _header(offset: int, layout: str, value: int) -> bytes:
    data = bytearray(QCOW2)
    struct.pack_into(layout, data, offset, value)
    return bytes(data)


@functools.cache
def corpus() -> dict[str, bytes]:
    files = dict(RAW)
    files |= {f"table: {name}": foreign.lay((0, sector)) for name, (sector, _failed) in TABLES.items()}
    files |= {name: data for name, (_format, data, _size, _failed) in FORMATS.items()}
    files |= {name: data for name, (_formats, data) in POLYGLOTS.items()}
    files["qcow2"] = QCOW2
    files |= {f"qcow2, incompatible bit {bit}": _header(72, ">Q", 1 << bit) for bit in (0, 1, 2, 3, 4, 5, 17, 63)}
    files |= {f"qcow2, compatible bit {bit}": _header(80, ">Q", 1 << bit) for bit in (0, 40)}
    files |= {f"qcow2, autoclear bit {bit}": _header(88, ">Q", 1 << bit) for bit in (1, 40)}
    files |= {f"qcow2, version {version}": _header(4, ">I", version) for version in (0, 4)}
    files["qcow2, backing file"] = _header(8, ">Q", 1000)
    files["qcow2, length of a backing file's name"] = _header(16, ">I", 10)
    return files


Verdict: TypeAlias = tuple[set[str], set[str]]
"""The formats that match, and the checks that fail; "incomplete": the file ends before there is a verdict."""

VERDICTS: dict[str, Verdict] = {
    "FAT without partitions": (set(), set()),
    "empty": (set(), set()),
    "one byte": (set(), set()),
    "zeroes": (set(), set()),
    "text": (set(), set()),
    "short magic": (set(), set()),
    "GPT header without partition table": (set(), set()),
    "UDF alone": (set(), set()),
    "GPT backup alone": (set(), set()),
    "signature elsewhere": (set(), set()),
    "table: one partition": ({"gpt"}, set()),
    "table: second entry only": ({"gpt"}, set()),
    "table: two boot flags": ({"gpt"}, set()),
    "table: beyond the end": ({"gpt"}, set()),
    "table: no sectors": ({"gpt"}, set()),
    "table: GPT": ({"gpt"}, set()),
    "table: protection without a GPT": ({"gpt"}, set()),
    "table: protection with empty old fields": ({"gpt"}, {"mbr"}),
    "table: no partition": ({"gpt"}, {"mbr"}),
    "table: boot flag of the first": ({"gpt"}, {"mbr"}),
    "table: boot flag of the last": ({"gpt"}, {"mbr"}),
    "table: FAT without copies": ({"gpt"}, {"mbr"}),
    "table: FAT of odd sectors": (set(), set()),
    "table: FAT without a jump": (set(), set()),
    "table: boot code instead of a table": ({"gpt"}, {"mbr"}),
    "table: protection from sector 2": ({"gpt"}, {"mbr"}),
    "table: protection from sector 0": ({"gpt"}, {"mbr"}),
    "table: protection and a partition": ({"gpt"}, {"mbr"}),
    "table: a partition and protection": ({"gpt"}, {"mbr"}),
    "table: protection in the second entry": ({"gpt"}, {"mbr"}),
    "ISO": ({"iso"}, set()),
    "LUKS": ({"luks"}, set()),
    "LUKS 2": ({"luks"}, {"version"}),
    "LUKS of zeroes": ({"luks"}, set()),
    "LUKS cut off": ({"luks"}, {"incomplete"}),
    "VHD, fixed": (set(), set()),
    "VHD, dynamic": ({"vhd"}, set()),
    "VHD without footer": ({"vhd"}, set()),
    "VHD with two footers": ({"vhd"}, set()),
    "VHD of unknown type": (set(), set()),
    "VHD cut off": ({"vhd"}, {"incomplete"}),
    "VHDX": ({"vhdx"}, set()),
    "VHDX with a parent": ({"vhdx"}, set()),
    "VHDX with metadata in the head": ({"vhdx"}, {"incomplete"}),
    "VHDX with metadata beyond": ({"vhdx"}, {"incomplete"}),
    "VHDX cut off": ({"vhdx"}, {"incomplete"}),
    "VDI": ({"vdi"}, set()),
    "VDI of differences": ({"vdi"}, set()),
    "VDI cut off": (set(), set()),
    "QED": ({"qed"}, {"banned"}),
    "qcow": ({"qcow2"}, {"unknown_features"}),
    "parallels": (set(), set()),
    "VMDK": ({"vmdk"}, set()),
    "VMDK without descriptor": ({"vmdk"}, {"descriptor"}),
    "VMDK with a long descriptor": ({"vmdk"}, {"descriptor"}),
    "VMDK cut off": ({"vmdk"}, {"incomplete"}),
    "VMDK of an older kind": (set(), set()),
    "ISO in qcow2": ({"iso", "qcow2"}, set()),
    "partitions in qcow2": ({"gpt", "qcow2"}, set()),
    "VDI in qcow2": ({"qcow2", "vdi"}, set()),
    "qcow2 with the end of a VHD": ({"qcow2"}, set()),
    "VMDK with the end of a VHD": ({"vmdk"}, set()),
    "LUKS with the end of a VHD": ({"luks"}, set()),
    "ISO in VMDK": ({"iso", "vmdk"}, set()),
    "partitions in an ISO": ({"gpt", "iso"}, set()),
    "partitions in a VHD": ({"gpt"}, set()),
    "qcow2": ({"qcow2"}, set()),
    "qcow2, incompatible bit 0": ({"qcow2"}, set()),
    "qcow2, incompatible bit 1": ({"qcow2"}, set()),
    "qcow2, incompatible bit 2": ({"qcow2"}, {"data_file"}),
    "qcow2, incompatible bit 3": ({"qcow2"}, set()),
    "qcow2, incompatible bit 4": ({"qcow2"}, {"unknown_features"}),
    "qcow2, incompatible bit 5": ({"qcow2"}, {"unknown_features"}),
    "qcow2, incompatible bit 17": ({"qcow2"}, {"unknown_features"}),
    "qcow2, incompatible bit 63": ({"qcow2"}, {"unknown_features"}),
    "qcow2, compatible bit 0": ({"qcow2"}, set()),
    "qcow2, compatible bit 40": ({"qcow2"}, set()),
    "qcow2, autoclear bit 1": ({"qcow2"}, set()),
    "qcow2, autoclear bit 40": ({"qcow2"}, set()),
    "qcow2, version 0": ({"qcow2"}, {"unknown_features"}),
    "qcow2, version 4": ({"qcow2"}, {"unknown_features"}),
    "qcow2, backing file": ({"qcow2"}, {"backing_file"}),
    "qcow2, length of a backing file's name": ({"qcow2"}, set()),
}

OURS: dict[str, Verdict] = {
    "table: FAT of odd sectors": ({"gpt"}, {"mbr"}),
    "table: FAT without a jump": ({"gpt"}, {"mbr"}),
    "LUKS cut off": ({"luks"}, set()),
    "VHD, fixed": ({"vhd"}, set()),
    "VHD without footer": ({"vhd"}, {"footer"}),
    "VHD with two footers": ({"vhd"}, {"footer"}),
    "VHD of unknown type": ({"vhd"}, {"footer"}),
    "VHD cut off": ({"vhd"}, {"footer"}),
    "VHDX with a parent": ({"vhdx"}, {"backing_file"}),
    "VHDX with metadata in the head": ({"vhdx"}, set()),
    "VHDX with metadata beyond": ({"vhdx"}, set()),
    "VHDX cut off": ({"vhdx"}, set()),
    "VDI of differences": ({"vdi"}, {"backing_file"}),
    "VDI cut off": ({"vdi"}, set()),
    "qcow": ({"qcow"}, {"banned"}),
    "parallels": ({"parallels"}, {"banned"}),
    "VMDK cut off": ({"vmdk"}, {"descriptor"}),
    "VMDK of an older kind": ({"vmdk"}, {"descriptor"}),
    "VDI in qcow2": ({"qcow2", "vdi"}, {"backing_file"}),
    "qcow2 with the end of a VHD": ({"qcow2", "vhd"}, set()),
    "VMDK with the end of a VHD": ({"vhd", "vmdk"}, set()),
    "LUKS with the end of a VHD": ({"luks", "vhd"}, set()),
    "partitions in a VHD": ({"gpt", "vhd"}, set()),
    "qcow2, incompatible bit 4": ({"qcow2"}, set()),
}
"""Where ours is another one: we recognise more, look at parents and footers, too, and name what is cut off by its check."""

MILDER = {
    "table: protection with empty old fields": "some tools leave the cylinder, head and sector empty",
}
"""What is safe here and not there, and why."""


def _safe(verdict: Verdict) -> bool:
    formats, failed = verdict
    return len(formats) < 2 and not failed


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_is_that_of_openstack_or_a_stricter_one(name: str) -> None:
    found = blocklib.inspect(io.BytesIO(corpus()[name]))
    if name in MILDER:
        assert found.safe
        return
    assert (set(found.formats), {check.name for check in found.failures} & CHECKS) == OURS.get(name, VERDICTS[name])
    assert _safe(VERDICTS[name]) or not found.safe


def test_every_file_was_asked_about_and_every_difference_is_one() -> None:
    assert corpus().keys() == VERDICTS.keys()
    assert OURS.keys() | MILDER.keys() <= VERDICTS.keys()
    assert not [name for name in OURS if OURS[name] == VERDICTS[name]]


@pytest.mark.skipif(importlib.util.find_spec("oslo_utils") is None, reason="no oslo.utils here: its stored verdicts count")
def test_the_stored_verdicts_are_what_openstack_says() -> None:
    inspector: Any = importlib.import_module("oslo_utils.imageutils.format_inspector")

    def ask(data: bytes) -> Verdict:
        wrapper = inspector.InspectWrapper(io.BytesIO(data))
        while wrapper.read(65536):
            pass
        wrapper.close()
        formats, failed = set(), set()
        for one in wrapper.formats:
            formats.add(str(one))
            try:
                one.safety_check()
            except inspector.SafetyCheckFailed as exc:
                failed |= exc.failures.keys()
            except inspector.ImageFormatError:
                failed.add("incomplete")
        return formats - {"raw"}, failed

    assert {name: ask(data) for name, data in corpus().items()} == VERDICTS
