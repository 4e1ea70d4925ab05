"""Probing answers by magic: which bytes are which format was found out with qemu-img 7.2, see tests/interop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib import drivers
from blocklib.errors import OptionError, UnsupportedFeatureError
from blocklib.node import Node
from blocklib.probe import PROBE_LENGTH, probe, probe_readable

CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
VDI = bytes(64) + b"\x7f\x10\xda\xbe"


def _bochs(version: int, subtype: bytes = b"Growing") -> bytes:
    name = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0")
    return name + subtype.ljust(16, b"\0") + version.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"QFI\xfb\0\0\0\1", "qcow"),
        (b"QFI\xfb\0\0\0\2", "qcow2"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QFI\xfb\0\0\0\x63", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"COWD", "vmdk"),
        (b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
        (b"# Disk DescriptorFile\nCID=fffffffe\n", "vmdk"),
        (b"# x\r\n  \nversion=3\r\n", "vmdk"),
        (VDI, "vdi"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe\0\1", "luks"),
        (b"WithoutFreeSpace\2\0\0\0", "parallels"),
        (b"WithouFreSpacExt\2\0\0\0", "parallels"),
        (_bochs(0x10000), "bochs"),
        (_bochs(0x20000), "bochs"),
        (CLOOP, "cloop"),
    ],
)
def test_a_format_is_known_by_its_magic(start: bytes, name: str) -> None:
    assert probe(start) == name
    assert probe(memoryview(start + bytes(4096))) == name


@pytest.mark.parametrize(
    "start",
    [
        b"",
        bytes(PROBE_LENGTH),
        b"QFI\xfb",
        b"QFI\xfb\0\0\0",
        b"QFI\xfb\0\0\0\0",
        b"LUKS\xba\xbe\0\2",
        b"WithoutFreeSpace\1\0\0\0",
        _bochs(3),
        _bochs(0x20000, b"Undoable"),
        CLOOP[:-1],
        b"version=4\n",
        b"version=1",
        b" version=1\n",
        b"\nversion=1\n",
        b"# only a comment\n",
        b"#" + b"x" * 501 + b"\nversion=1\n",
    ],
)
def test_what_has_no_whole_magic_has_no_format(start: bytes) -> None:
    assert probe(start) is None


def test_no_byte_after_the_probe_length_matters() -> None:
    assert probe(b"#" + b"x" * (PROBE_LENGTH - 12) + b"\nversion=1\n") == "vmdk"
    assert probe(b"#" + b"x" * (PROBE_LENGTH - 11) + b"\nversion=1\n") is None


def test_an_image_of_two_formats_is_taken_for_the_one_that_is_refused() -> None:
    both = b"QFI\xfb\0\0\0\3" + VDI[8:]
    assert probe(both) == "vdi"
    with pytest.raises(UnsupportedFeatureError):
        probe_readable(both)


@given(st.binary(max_size=600))
def test_any_bytes_have_an_answer(start: bytes) -> None:
    assert probe(start) in {None, *drivers.FORMATS, "qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "luks"} | {
        "parallels",
        "bochs",
        "cloop",
    }


def test_a_format_without_a_driver_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"^disk\.vmdk: format vmdk is not supported$") as caught:
        probe_readable(b"KDMV" + bytes(508), "disk.vmdk")
    assert caught.value.features == ("vmdk",)
    assert (caught.value.structure, caught.value.host_offset) == ("magic", 0)
    assert caught.value.found == "vmdk"
    assert "qcow2" in str(caught.value.expected)
    with pytest.raises(UnsupportedFeatureError) as caught:
        probe_readable(VDI)
    assert caught.value.host_offset == 0x40


def test_raw_is_never_an_answer() -> None:
    assert probe_readable(bytes(512)) is None
    assert probe_readable(b"QFI\xfb\0\0\0\3") == "qcow2"


# -- the table of drivers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", drivers.names())
def test_every_driver_in_the_table_is_a_node(name: str) -> None:
    assert issubclass(drivers.load(name), Node)


def test_every_driver_is_a_format_a_protocol_or_a_filter() -> None:
    assert sorted((*drivers.FORMATS, *drivers.PROTOCOLS, *drivers.FILTERS)) == list(drivers.names())


@pytest.mark.parametrize("name", ["vmdk", "", "os:system", "QCOW2"])
def test_an_unknown_driver_is_an_option_error_with_the_known_ones(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        drivers.load(name)
    assert caught.value.option == "driver"
    assert caught.value.choices == drivers.names()
    assert "qcow2" in str(caught.value)
