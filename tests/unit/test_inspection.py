"""Inspection: which formats match, what the checks say of formats that are not qcow2, and what is opened for it.

Where OpenStack's format inspector (oslo.utils 10.2.0) was asked about the same bytes, its verdict is the same unless a comment
says otherwise.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklib
from blocklib import Inspector, inspection
from blocklib.policy import Limits
from blocklib.probe import SIGNATURES, matches
from tests import foreign
from tests.foreign import GPT, ISO, ISO_OFFSET, LENGTH, LINUX, PROTECTIVE, MiB, boot_sector, lay, partition
from tests.qcow2_bytes import Qcow2Bytes

END = LENGTH - 512
QCOW2 = bytes(Qcow2Bytes(cluster_bits=16).bytes)


def inspect_bytes(data: bytes, **options: object) -> blocklib.Inspection:
    inspector = Inspector(**options)  # type: ignore[arg-type]
    inspector.feed(data)
    return inspector.finish()


def failed(found: blocklib.Inspection) -> set[str]:
    return {check.name for check in found.failures}


FAT = bytes.fromhex("eb3c906d6b66732e666174000204040002000200 40f80c00").ljust(510, b"\xf6") + b"\x55\xaa"
RAW = {
    "FAT without partitions": lay((0, FAT)),
    "empty": b"",
    "one byte": b"x",
    "zeroes": bytes(MiB),
    "text": b"just some text\n" * 100,
    "short magic": b"QF",
    "GPT header without partition table": lay((512, b"EFI PART")),
    "UDF alone": lay((32768, b"\0BEA01\1"), (34816, b"\0NSR02\1")),
    "GPT backup alone": lay((END, b"EFI PART")),
    "signature elsewhere": lay((1024, b"QFI\xfb\0\0\0\3")),
}


@pytest.mark.parametrize("name", RAW)
def test_no_format_is_an_answer_and_safe(name: str) -> None:
    found = inspect_bytes(RAW[name])
    assert found.formats == ()
    assert found.virtual_size == -(-len(RAW[name]) // 512) * 512
    assert found.safe
    assert found.checks["null"].passed
    assert (found.references, found.features, found.encrypted, found.limits_exceeded) == ((), (), False, ())


TABLES = {
    "one partition": (boot_sector(LINUX), set()),
    "second entry only": (boot_sector(bytes(16), LINUX), set()),
    "two boot flags": (boot_sector(LINUX, LINUX), set()),
    "beyond the end": (boot_sector(partition(0x80, 0x83, 2048, 1 << 31)), set()),
    "no sectors": (boot_sector(partition(0x80, 0x83, 2048, 0)), set()),
    "GPT": (GPT, set()),
    "protection without a GPT": (boot_sector(PROTECTIVE), set()),
    "protection with empty old fields": (boot_sector(partition(0, 0xEE, 1, 8191)), set()),
    "no partition": (boot_sector(), {"mbr"}),
    "boot flag of the first": (boot_sector(partition(0x12, 0x83, 2048, 4096)), {"mbr"}),
    "boot flag of the last": (boot_sector(LINUX, bytes(16), bytes(16), partition(1, 0, 0, 0)), {"mbr"}),
    "FAT without copies": (FAT[:16] + b"\0" + FAT[17:], {"mbr"}),
    "FAT of odd sectors": (FAT[:11] + b"\1" + FAT[12:], {"mbr"}),
    "FAT without a jump": (b"\0" + FAT[1:], {"mbr"}),
    "boot code instead of a table": (boot_sector(table=b"no system disk, press a key ".ljust(64, b"x")), {"mbr"}),
    "protection from sector 2": (boot_sector(partition(0, 0xEE, 2, 8191, foreign.PROTECTED)), {"mbr"}),
    "protection from sector 0": (boot_sector(partition(0, 0xEE, 0, 8191, foreign.PROTECTED)), {"mbr"}),
    "protection and a partition": (boot_sector(PROTECTIVE, LINUX), {"mbr"}),
    "a partition and protection": (boot_sector(LINUX, PROTECTIVE), {"mbr"}),
    "protection in the second entry": (boot_sector(bytes(16), PROTECTIVE), {"mbr"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_partition_table_is_judged_as_mbr(name: str) -> None:
    sector, failures = TABLES[name]
    found = inspect_bytes(lay((0, sector)))
    assert found.formats == ("gpt",)
    assert found.virtual_size == LENGTH
    assert failed(found) == failures
    assert "mbr" in found.checks
    assert inspect_bytes(lay((0, sector)), expect="raw").safe is not bool(failures)


FORMATS: dict[str, tuple[str, bytes, int | None, set[str]]] = {
    "ISO": ("iso", lay((ISO_OFFSET, ISO)), LENGTH, set()),
    "LUKS": ("luks", lay((0, foreign.luks_header())), LENGTH - 2 * MiB, set()),
    "LUKS 2": ("luks", lay((0, foreign.luks_header(2))), None, {"version"}),
    # OpenStack's inspector looks no further than the version.
    "LUKS of zeroes": ("luks", lay((0, b"LUKS\xba\xbe\0\1")), None, {"header"}),
    "LUKS cut off": ("luks", foreign.luks_header()[:300], None, {"header"}),
    "VHD, fixed": ("vhd", lay((END, foreign.vhd_footer())), LENGTH - 512, set()),  # raw to OpenStack's
    "VHD, dynamic": ("vhd", lay((0, foreign.vhd_footer(3)), (END, foreign.vhd_footer(3))), LENGTH - 512, set()),
    "VHD without footer": ("vhd", lay((0, foreign.vhd_footer(3))), LENGTH - 512, {"footer"}),
    "VHD with two footers": ("vhd", lay((0, foreign.vhd_footer(3)), (END, foreign.vhd_footer(3, MiB))), MiB, {"footer"}),
    "VHD of unknown type": ("vhd", lay((END, foreign.vhd_footer(9))), LENGTH - 512, {"footer"}),
    "VHD cut off": ("vhd", b"conectix", None, {"footer"}),
    "VHDX": ("vhdx", lay(*foreign.vhdx()), LENGTH, set()),
    "VHDX with a parent": ("vhdx", lay(*foreign.vhdx(parent=True)), LENGTH, {"backing_file"}),
    "VHDX with metadata in the head": ("vhdx", lay(*foreign.vhdx(metadata_offset=4096)), None, {"header"}),
    "VHDX with metadata beyond": ("vhdx", lay(*foreign.vhdx(metadata_offset=2 * MiB), length=0)[: 2 * MiB], None, {"header"}),
    "VHDX cut off": ("vhdx", b"vhdxfile", None, {"header"}),
    "VDI": ("vdi", lay((0, foreign.vdi_header())), LENGTH, set()),
    "VDI of differences": ("vdi", lay((0, foreign.vdi_header(4))), LENGTH, {"backing_file"}),
    "VDI cut off": ("vdi", foreign.vdi_header()[:100], None, {"header"}),
    "QED": ("qed", lay((0, foreign.qed_header())), LENGTH, {"banned"}),
    "qcow": ("qcow", lay((0, foreign.qcow1_header())), LENGTH, {"banned"}),  # qcow2 with unknown features to OpenStack's
    "parallels": ("parallels", lay((0, b"WithoutFreeSpace\2\0\0\0")), None, {"banned"}),  # raw to OpenStack's
    "VMDK": ("vmdk", lay((0, foreign.vmdk_header()), (512, foreign.vmdk_descriptor())), LENGTH, set()),
    "VMDK without descriptor": ("vmdk", lay((0, foreign.vmdk_header(descriptor=(0, 0)))), LENGTH, {"descriptor"}),
    "VMDK with a long descriptor": ("vmdk", lay((0, foreign.vmdk_header(descriptor=(1, 1 << 40)))), LENGTH, {"descriptor"}),
    "VMDK cut off": ("vmdk", b"KDMV\3\0\0\0", None, {"descriptor", "header"}),
    "VMDK of an older kind": ("vmdk", lay((0, b"COWD\1\0\0\0")), None, {"descriptor"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_and_judged(name: str) -> None:
    format, data, size, failures = FORMATS[name]
    found = inspect_bytes(data)
    assert found.formats == (format,)
    assert found.virtual_size == size
    assert failed(found) == failures
    assert found.encrypted is (format == "luks")
    assert set(SIGNATURES) >= {format}


POLYGLOTS = {
    "ISO in qcow2": ({"iso", "qcow2"}, lay((0, QCOW2), (ISO_OFFSET, ISO))),
    "partitions in qcow2": ({"gpt", "qcow2"}, lay((0, QCOW2), (446, boot_sector(LINUX)[446:]))),
    "VDI in qcow2": ({"qcow2", "vdi"}, lay((0, QCOW2), (64, b"\x7f\x10\xda\xbe"))),
    "qcow2 with the end of a VHD": ({"qcow2", "vhd"}, lay((0, QCOW2), (END, foreign.vhd_footer()))),
    "VMDK with the end of a VHD": (
        {"vmdk", "vhd"},
        lay((0, foreign.vmdk_header()), (512, foreign.vmdk_descriptor()), (END, foreign.vhd_footer())),
    ),
    "LUKS with the end of a VHD": ({"luks", "vhd"}, lay((0, foreign.luks_header()), (END, foreign.vhd_footer()))),
    "ISO in VMDK": (
        {"iso", "vmdk"},
        lay((0, foreign.vmdk_header()), (512, foreign.vmdk_descriptor()), (ISO_OFFSET, ISO)),
    ),
    "partitions in an ISO": ({"gpt", "iso"}, lay((0, boot_sector(LINUX)), (ISO_OFFSET, ISO))),
    "partitions in a VHD": ({"gpt", "vhd"}, lay((0, boot_sector(LINUX)), (END, foreign.vhd_footer()))),
}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_two_formats_are_an_error_that_names_both(name: str) -> None:
    formats, data = POLYGLOTS[name]
    found = inspect_bytes(data)
    assert set(found.formats) == formats
    assert "formats" in failed(found)
    assert all(format in found.checks["formats"].message for format in formats)
    for expect in ("raw", *formats - {"iso", "vhd"}):
        assert "expected_format" in failed(inspect_bytes(data, expect=expect))


def test_what_a_declared_disk_holds_is_no_second_format() -> None:
    hybrid = lay((0, boot_sector(partition(0x33, 0x17, 0, 8192))), (ISO_OFFSET, ISO))
    found = inspect_bytes(hybrid, expect="iso")
    assert found.safe
    assert found.formats == ("iso", "gpt")
    assert "mbr" not in found.checks
    assert not inspect_bytes(hybrid, expect="gpt").safe
    assert not inspect_bytes(hybrid, expect="raw").safe
    disk = lay((0, GPT), (END, foreign.vhd_footer()))
    for expect in ("vhd", "vpc"):
        found = inspect_bytes(disk, expect=expect)
        assert found.safe
        assert found.virtual_size == LENGTH - 512
    # One that grows begins with its own header, where a table of partitions has no business.
    grows = foreign.vhd_footer(3)[:446] + boot_sector(LINUX)[446:]
    assert not inspect_bytes(lay((0, grows), (END, grows)), expect="vhd").safe


@pytest.mark.parametrize("expect", inspection.EXPECTABLE)
def test_a_file_is_what_it_was_declared_to_be_or_is_not(expect: str) -> None:
    iso = FORMATS["ISO"][1]
    for data, formats in ((bytes(MiB), {"raw"}), (lay((0, GPT)), {"raw", "gpt"}), (QCOW2, {"qcow2"}), (iso, {"iso"})):
        found = inspect_bytes(data, expect=expect)
        assert found.checks["expected_format"].passed is (expect in formats)
        assert found.safe is (expect in formats)


def test_an_unknown_declaration_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(blocklib.OptionError, match="no such format: 'qcow3'") as caught:
        Inspector(expect="qcow3")
    assert "qcow2" in caught.value.choices


# -- references --------------------------------------------------------------------------------------------------------


def test_a_backing_file_of_an_old_format_is_named() -> None:
    for header in (foreign.qcow1_header(b"/etc/passwd"), foreign.qed_header(b"/etc/passwd")):
        found = inspect_bytes(lay((0, header)))
        assert found.references == (blocklib.Reference("backing", "/etc/passwd", None, None, 1),)
        assert failed(found) == {"banned", "backing_file"}
    assert inspect_bytes(lay((0, foreign.qcow1_header(encryption=1)))).encrypted


def test_the_parent_of_a_vhd_is_named() -> None:
    footer = foreign.vhd_footer(4)
    found = inspect_bytes(lay((0, footer), (512, foreign.vhd_dynamic_header("C:\\base.vhd")), (END, footer)))
    assert found.references == (blocklib.Reference("backing", "C:\\base.vhd", "vhd", None, 1),)
    assert failed(found) == {"backing_file"}


VMDK_DESCRIPTORS = {
    "flat": (foreign.vmdk_descriptor("monolithicFlat", 'RW 8192 FLAT "/etc/passwd" 0'), "/etc/passwd", "raw"),
    "split": (foreign.vmdk_descriptor("twoGbMaxExtentSparse", 'RW 8192 SPARSE "d-s001.vmdk"'), "d-s001.vmdk", "vmdk"),
    "device": (foreign.vmdk_descriptor("fullDevice", 'RW 8192 FLAT "/dev/sda" 0'), "/dev/sda", "raw"),
}


@pytest.mark.parametrize("name", VMDK_DESCRIPTORS)
def test_a_vmdk_that_names_other_files_is_unsafe_alone_and_inside(name: str) -> None:
    descriptor, target, format = VMDK_DESCRIPTORS[name]
    alone = inspect_bytes(descriptor)
    assert alone.formats == ("vmdk",)
    assert alone.virtual_size == LENGTH
    assert alone.references == (blocklib.Reference("data-file", target, format, None, 1),)
    assert failed(alone) == {"descriptor"}
    inside = inspect_bytes(lay((0, foreign.vmdk_header()), (512, descriptor)))
    assert failed(inside) == {"descriptor"}


def test_the_descriptor_of_a_vmdk_may_lie_anywhere_and_must_not_name_a_path_or_a_parent() -> None:
    def vmdk(descriptor: bytes, sector: int = 1) -> blocklib.Inspection:
        return inspect_bytes(lay((0, foreign.vmdk_header(descriptor=(sector, 20))), (512 * sector, descriptor)))

    assert vmdk(foreign.vmdk_descriptor(), 4000).safe
    assert vmdk(foreign.vmdk_descriptor("streamOptimized")).safe
    assert failed(vmdk(b"")) == {"descriptor"}
    assert failed(vmdk(foreign.vmdk_descriptor(), 1 << 40)) == {"descriptor"}
    assert failed(vmdk(foreign.vmdk_descriptor(extents=""))) == {"descriptor"}
    found = vmdk(foreign.vmdk_descriptor(extents='RW 8192 SPARSE "../secret"'))
    assert [reference.name for reference in found.references] == ["../secret"]
    with_parent = foreign.vmdk_descriptor(more='parentFileNameHint="base.vmdk"\n').replace(b"ffffffff", b"00000001")
    found = vmdk(with_parent)
    assert failed(found) == {"descriptor"}
    assert found.references == (blocklib.Reference("backing", "base.vmdk", "vmdk", None, 1),)
    assert failed(inspect_bytes(b"# Disk DescriptorFile\n" + b"#" * 100_000)) == {"descriptor"}


def test_the_footer_of_a_vmdk_says_what_its_header_says() -> None:
    at_end = (1 << 64) - 1
    header = foreign.vmdk_header(grain_directory=at_end)
    body = ((0, header), (512, foreign.vmdk_descriptor("streamOptimized")))
    good = inspect_bytes(lay(*body, (LENGTH - 1024, foreign.vmdk_header(grain_directory=77))))
    assert good.safe
    assert good.checks["footer"].passed
    for footer in (b"", foreign.vmdk_header(capacity=1), foreign.vmdk_header(descriptor=(100, 20)), b"QFI\xfb\0\0\0\3"):
        assert failed(inspect_bytes(lay(*body, (LENGTH - 1024, footer)))) == {"footer"}


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [bytes(LENGTH), lay((0, GPT)), *(FORMATS[name][1] for name in ("VMDK", "VHDX", "VDI", "VHD, fixed", "LUKS"))]
)
def test_a_budget_for_the_virtual_size_holds_for_every_format(data: bytes) -> None:
    size = inspect_bytes(data).virtual_size
    assert size is not None
    assert inspect_bytes(data, limits=Limits(virtual_size=size)).safe
    found = inspect_bytes(data, limits=Limits(virtual_size=size - 1))
    assert found.limits_exceeded == ("virtual_size",)
    assert failed(found) == {"limits"}
    assert "virtual_size" in found.checks["limits"].message


def test_a_size_that_no_file_has_is_beyond_the_limits() -> None:
    found = inspect_bytes(lay((0, foreign.vdi_header(size=(1 << 64) - 512))))
    assert found.limits_exceeded == ("virtual_size",)


def test_passphrases_that_take_years_to_try_are_beyond_the_limits() -> None:
    data = lay((0, foreign.luks_header()))
    found = inspect_bytes(data, limits=Limits(key_iterations=1999))
    assert found.limits_exceeded == ("key_iterations",)
    assert inspect_bytes(data, limits=Limits(key_iterations=2000)).safe


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_inspection_is_a_value() -> None:
    found = inspect_bytes(QCOW2)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert hash(again) == hash(found)
    assert again.checks == dict(found.checks)
    assert list(again.checks) == list(found.checks)
    assert "backing_file" in repr(found)
    with pytest.raises(TypeError):
        found.checks["backing_file"] = found.checks["limits"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        found.formats = ()  # type: ignore[misc]
    with pytest.raises(KeyError):
        found.checks["no such check"]


def test_an_inspector_is_fed_until_it_is_finished() -> None:
    inspector = Inspector()
    inspector.feed(bytearray(QCOW2))
    first = inspector.finish()
    assert inspector.finish() is first
    with pytest.raises(blocklib.UsageError, match="finished"):
        inspector.feed(b"x")
    with pytest.raises(TypeError):
        Inspector().feed("text")  # type: ignore[arg-type]


# -- paths and streams -------------------------------------------------------------------------------------------------


def test_nothing_but_the_path_is_opened(tmp_path: Path) -> None:
    backing = tmp_path / "base.qcow2"
    backing.write_bytes(QCOW2)
    image = Qcow2Bytes(cluster_bits=16)
    name = os.fsencode(backing)
    image.bytes[8:20] = (200).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    image.bytes[200 : 200 + len(name)] = name
    path = tmp_path / "top.qcow2"
    path.write_bytes(image.bytes)
    blocklib.inspect(path)  # whatever is imported for it is imported now
    opened: list[object] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "socket.connect", "subprocess.Popen", "os.posix_spawn"):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    found = blocklib.inspect(path)
    watching = False
    assert opened == [str(path)]
    assert [reference.name for reference in found.references] == [str(backing)]


@pytest.mark.parametrize("name", ["json:{}", "nbd://localhost/x", "file:x", "key=value", "-"])
def test_a_path_is_a_path_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(blocklib.ImageNotFoundError):
        blocklib.inspect(name)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(QCOW2)
    assert blocklib.inspect(name).formats == ("qcow2",)
    assert blocklib.inspect(path) == blocklib.inspect(name)


def _make_directory(path: Path) -> None:
    path.mkdir()


def _make_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, _make_directory, _make_link_to_a_device])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "odd"
    make(path)
    with pytest.raises(blocklib.StorageError, match="neither a regular file nor a block device"):
        blocklib.inspect(path)


def test_errors_of_the_host_and_of_the_caller_are_errors(tmp_path: Path) -> None:
    with pytest.raises(blocklib.ImageNotFoundError):
        blocklib.inspect(tmp_path / "missing")
    with pytest.raises(blocklib.UsageError, match="cannot be the name"):
        blocklib.inspect("a\0b")
    with pytest.raises(blocklib.UsageError, match="a path or a stream"):
        blocklib.inspect(5)  # type: ignore[arg-type]
    with pytest.raises(blocklib.UsageError, match="gave str"):
        blocklib.inspect(io.StringIO("text"))  # type: ignore[arg-type]

    class Broken:
        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    class Impatient:
        def read(self, size: int) -> None:
            return None

    with pytest.raises(blocklib.StorageError) as caught:
        blocklib.inspect(Broken())
    assert (caught.value.errno, caught.value.operation) == (5, "read")
    with pytest.raises(blocklib.UsageError, match="gave NoneType"):
        blocklib.inspect(Impatient())


def test_a_stream_is_read_from_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(b"header of a protocol" + QCOW2)
    with path.open("rb") as stream:
        stream.read(20)
        assert blocklib.inspect(stream).formats == ("qcow2",)
        assert stream.read() == b""

    class Views:
        def __init__(self) -> None:
            self.parts: list[bytes | bytearray | memoryview] = [memoryview(QCOW2)[:99], bytearray(QCOW2[99:]), b""]

        def read(self, size: int) -> bytes | bytearray | memoryview:
            return self.parts.pop(0)

    assert blocklib.inspect(Views()).formats == ("qcow2",)


def test_a_file_is_not_changed_and_may_be_read_only(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(QCOW2)
    path.chmod(stat.S_IRUSR)
    before = path.stat()
    assert blocklib.inspect(path).safe
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.read_bytes() == QCOW2


def test_what_qemu_would_guess_is_among_the_formats() -> None:
    from blocklib.probe import probe

    for _format, data, _size, _failures in FORMATS.values():
        guess = probe(data[:512])
        assert guess is None or {"vpc": "vhd"}.get(guess, guess) in matches(data[: 64 << 10], data[-1536:])
