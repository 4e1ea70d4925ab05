"""What published vulnerabilities of image parsers were made with, one test for each kind: refused by name, or harmless.

`TABLE` says which tests answer which identifier; those of the NBD protocol have their tests where the protocol is tested.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import blocklib
from blocklib import Limits
from blocklib.errors import ImageError, ImageLimitError, PolicyError, UnsupportedFeatureError
from blocklib.formats.qcow2 import layout
from tests.damage import COPIED, ImagePath, KiB, MiB
from tests.hostile.bombs import Forge, _snapshot
from tests.hostile.commands import IMAGE, ON_LINUX, state_of
from tests.hostile.runner import Outcome, Runner

CLUSTER: Final = 64 * KiB
DECOY: Final = b"a secret of the host"

pytestmark = ON_LINUX


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(DECOY * 4096)
    return tmp_path


class Run(NamedTuple):
    """How a command ended, and whether the image is what it was."""

    outcome: Outcome
    changed: bool

    def refuses(self, kind: str) -> bool:
        """It was refused with an error of this class, by one line, and nothing happened to the image."""
        error, text = self.outcome.error, self.outcome.err
        one_line = len(text.splitlines()) == 1 and text.startswith("blocklib: ")
        return self.outcome.code != 0 and error is not None and kind in error["kinds"] and one_line and not self.changed


def run(runner: Runner, folder: Path, *arguments: str) -> Run:
    before = state_of(folder / IMAGE)
    outcome = runner.run(arguments, folder)
    opened = {Path(path).name for path in outcome.opened} | set(outcome.seen)
    assert opened <= {IMAGE, "output"}, f"opened {opened}"
    assert "Traceback" not in outcome.err
    return Run(outcome, state_of(folder / IMAGE) != before)


COMMANDS: Final[tuple[tuple[str, ...], ...]] = (
    ("info", "-f", "qcow2", IMAGE),
    ("check", "-f", "qcow2", IMAGE),
    ("convert", "-f", "qcow2", "-O", "raw", IMAGE, "output"),
    ("check", "-f", "qcow2", "-r", "all", IMAGE),
    ("io", "-f", "qcow2", "-c", "write 0 64k", IMAGE),
    ("resize", "-f", "qcow2", IMAGE, "+1M"),
    ("snapshot", "-c", "s", IMAGE),
    ("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", IMAGE),
)


def forged(folder: Path, change: Callable[[Forge], object] | None = None) -> ImagePath:
    """A whole image with one cluster of data and one snapshot, changed before it is finished."""
    forge = Forge(folder / IMAGE, size=8 * MiB)
    data = forge.put(b"x" * CLUSTER)
    l2 = forge.table([data | COPIED])
    forge.l1([l2 | COPIED])
    inactive = forge.table([0])
    forge.fields |= {"snapshots_offset": forge.put(_snapshot(inactive, 1, 1, size=8 * MiB)), "nb_snapshots": 1}
    if change is not None:
        change(forge)
    forge.finish()
    return ImagePath(folder / IMAGE)


# -- names of other files --------------------------------------------------------------------------------------------------


def _with_backing(folder: Path, name: bytes, format: bytes = b"raw") -> ImagePath:
    def change(forge: Forge) -> None:
        forge.extensions.append((layout.EXTENSION_BACKING_FORMAT, format))
        forge.fields |= {"backing_file_offset": 4096, "backing_file_size": len(name)}
        forge.put(name, 4096)

    return forged(folder, change)


def _with_data_file(folder: Path, name: bytes) -> ImagePath:
    def change(forge: Forge) -> None:
        forge.fields["incompatible_features"] = layout.INCOMPATIBLE_DATA_FILE
        forge.extensions.append((layout.EXTENSION_DATA_FILE, name))

    return forged(folder, change)


NAMES: Final = {
    "a file beside it": b"secret",
    "a path": b"/etc/passwd",
    "a path that climbs": b"../../../../../../etc/passwd",
    "json": b'json:{"driver":"raw","file":{"driver":"file","filename":"secret"}}',
    "a URL": b"nbd://127.0.0.1:1/x",
    "a protocol nobody knows": b"fat:rw:/etc",
    "a device": b"/dev/zero",
    "a process's own memory": b"/proc/self/mem",
}
READING: Final[tuple[tuple[str, ...], ...]] = (
    ("convert", "--untrusted", "-f", "qcow2", "-O", "raw", IMAGE, "output"),
    ("io", "--untrusted", "-f", "qcow2", "-c", "read 0 4k", IMAGE),
    ("compare", "--untrusted", "-f", "qcow2", "-F", "qcow2", IMAGE, IMAGE),
    ("map", "--untrusted", "-f", "qcow2", IMAGE),
    ("dd", "--untrusted", "-f", "qcow2", "-O", "raw", f"if={IMAGE}", "of=output"),
)
SHOWING: Final[tuple[tuple[str, ...], ...]] = (
    ("info", "-f", "qcow2", IMAGE),
    ("check", "-f", "qcow2", IMAGE),
    ("snapshot", "-l", IMAGE),
    ("inspect", IMAGE),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["backing file", "data file"])
def test_a_file_that_an_image_names_is_not_opened(runner: Runner, folder: Path, kind: str, name: str) -> None:
    (_with_backing if kind == "backing file" else _with_data_file)(folder, NAMES[name])
    for arguments in READING:
        assert run(runner, folder, *arguments).refuses("PolicyError"), arguments
    for arguments in SHOWING:  # without --untrusted, too: metadata needs no other file
        found = run(runner, folder, *arguments)
        assert found.outcome.error is None
        assert not found.changed
    with pytest.raises(PolicyError) as caught:
        blocklib.open(folder / IMAGE)
    assert caught.value.reference.name == os.fsdecode(NAMES[name])
    assert DECOY.decode() not in caught.value.message


def test_a_raw_disk_stays_raw_whatever_a_guest_writes_into_it(runner: Runner, folder: Path) -> None:
    """CVE-2008-2004 and CVE-2026-24708: the guest's disk begins with a qcow2 header that names a file of the host."""
    image = _with_backing(folder, b"secret").path
    content = image.read_bytes()
    done = run(runner, folder, "convert", "-f", "raw", "-O", "raw", IMAGE, "output")
    assert done.outcome.code == 0
    assert (folder / "output").read_bytes() == content
    done = run(runner, folder, "resize", "-f", "raw", IMAGE, "+64k")
    assert done.outcome.code == 0
    assert image.read_bytes() == content + bytes(64 * KiB)
    with pytest.raises(PolicyError):  # without a format: what it says it is, and no step further
        blocklib.open(image)
    with pytest.raises(blocklib.UsageError, match="format"):
        blocklib.open(image, references="allow")


def test_a_disk_whose_format_was_guessed_does_not_become_another(folder: Path, runner: Runner) -> None:
    (folder / IMAGE).write_bytes(bytes(1 * MiB))
    (folder / "payload").write_bytes(_with_backing(folder, b"secret").path.read_bytes()[:512])
    (folder / IMAGE).write_bytes(bytes(1 * MiB))
    outcome = runner.run(["io", "-c", "write -s payload 0 512", IMAGE], folder)
    assert outcome.code == 1
    assert (folder / IMAGE).read_bytes() == bytes(1 * MiB)


@pytest.mark.parametrize("name", ["secret", "/etc/passwd"])
def test_a_vmdk_descriptor_leads_nowhere(runner: Runner, folder: Path, name: str) -> None:
    """CVE-2022-47951: a text that calls itself a disk and names the file that has its data."""
    lines = ["# Disk DescriptorFile", "version=1", "CID=1", "createType=monolithicFlat", f'RW 4192256 FLAT "{name}" 0']
    (folder / IMAGE).write_text("\n".join(lines) + "\n" * 4096)
    for arguments in (("info", IMAGE), ("convert", "-O", "raw", IMAGE, "output"), ("info", "--untrusted", IMAGE)):
        assert run(runner, folder, *arguments).refuses("UnsupportedFeatureError")
    with pytest.raises(UnsupportedFeatureError):
        blocklib.open(folder / IMAGE)


@pytest.mark.parametrize("magic", [b"vhdxfile", b"conectix", b"KDMV", b"QED\0", b"QFI\xfb\0\0\0\1"])
def test_a_format_without_a_driver_here_is_refused_by_name(runner: Runner, folder: Path, magic: bytes) -> None:
    """CVE-2014-0148 (VHDX), CVE-2014-0144 and others: parsers that do not exist cannot be attacked."""
    (folder / IMAGE).write_bytes(magic + b"\xff" * MiB)
    for arguments in (("info", IMAGE), ("convert", "-O", "raw", IMAGE, "output"), ("check", IMAGE)):
        found = run(runner, folder, *arguments)
        assert found.refuses("UnsupportedFeatureError"), arguments


def test_no_format_is_an_answer(folder: Path) -> None:
    """What has no magic is not taken for raw by the library; an image that was not validated is not opened by guess."""
    (folder / IMAGE).write_bytes(b"\xff" * MiB)
    with pytest.raises(ImageError):
        blocklib.open(folder / IMAGE)
    assert blocklib.inspect(folder / IMAGE).formats == ()


# -- numbers ---------------------------------------------------------------------------------------------------------------


def _put(field: str, value: int) -> Callable[[ImagePath], object]:
    return lambda image: image.set_field(field, value)


def _backing_name(offset: int, length: int) -> Callable[[ImagePath], object]:
    return lambda image: image.write(8, (struct.pack(">QI", offset, length),))


HEADERS: Final[dict[str, Callable[[ImagePath], object]]] = {
    # CVE-2014-0142..0147: what every parser of that year did not check
    "no cluster bits": _put("cluster_bits", 0),
    "cluster bits of a byte": _put("cluster_bits", 8),
    "clusters of 4 MiB": _put("cluster_bits", 22),
    "clusters that overflow a shift": _put("cluster_bits", 64),
    "all bits set in cluster_bits": _put("cluster_bits", 0xFFFFFFFF),
    "an L1 table of 4 GiB entries": _put("l1_size", 0xFFFFFFFF),
    "an L1 table whose bytes overflow 32 bits": _put("l1_size", 0x20000001),
    "an L1 table one entry above the limit": _put("l1_size", (32 * MiB // 8) + 1),
    "an L1 table that is too short for the disk": _put("l1_size", 0),
    "a negative L1 size": _put("l1_size", 0x80000000),
    "an L1 table at an offset that overflows": _put("l1_table_offset", (1 << 64) - CLUSTER),
    "an L1 table at a misaligned offset": _put("l1_table_offset", 0x30200),
    "an L1 table in the header": _put("l1_table_offset", 0),
    "a refcount table of 4 GiB clusters": _put("refcount_table_clusters", 0xFFFFFFFF),
    "a refcount table one cluster above the limit": _put("refcount_table_clusters", (8 * MiB // CLUSTER) + 1),
    "a refcount table at an offset that overflows": _put("refcount_table_offset", (1 << 64) - CLUSTER),
    "a misaligned refcount table": _put("refcount_table_offset", 0x1234),
    "4 milliard snapshots": _put("nb_snapshots", 0xFFFFFFFF),
    "65,537 snapshots": _put("nb_snapshots", 65537),
    "a snapshot table at a misaligned offset": _put("snapshots_offset", 0x1234),
    "a snapshot table at an offset that overflows": _put("snapshots_offset", (1 << 64) - CLUSTER),
    "a disk of 16 EiB": _put("size", (1 << 64) - 1),
    "a disk of a negative size": _put("size", 1 << 63),
    "a backing name of 2 GiB": _backing_name(4096, 1 << 31),
    "a backing name of 1024 bytes": _backing_name(4096, 1024),
    "a backing name behind the header cluster": _backing_name(CLUSTER, 100),
    "a header of 4 GiB": _put("header_length", 0xFFFFFFFF),
    "a header longer than its cluster": _put("header_length", CLUSTER + 8),
    "a header shorter than version 3 has": _put("header_length", 72),
    "refcounts of 128 bits": _put("refcount_order", 7),
    "refcounts whose width overflows": _put("refcount_order", 0xFFFFFFFF),
    "an extension of 4 GiB": lambda i: i.write(104, (struct.pack(">II", 0x12345678, 0xFFFFFFFF),)),
    "an extension that ends behind its cluster": lambda i: i.write(104, (struct.pack(">II", 0x12345678, CLUSTER),)),
    "an encryption nobody knows": _put("crypt_method", 3),
    "version 0": _put("version", 0),
    "version 4": _put("version", 4),
    "a feature nobody knows": _put("incompatible_features", 1 << 63),
}
BY_CHECK: Final = frozenset({"a misaligned refcount table", "a refcount table at an offset that overflows"})
"""A check opens these, to make another table; so says its plan."""


@pytest.mark.parametrize("name", HEADERS)
def test_a_number_of_the_header_that_cannot_be_is_refused_by_every_command(
    runner: Runner, folder: Path, name: str
) -> None:
    HEADERS[name](forged(folder))
    for arguments in COMMANDS:
        if name in BY_CHECK and arguments[0] in ("check", "info"):
            continue
        assert run(runner, folder, *arguments).refuses("ImageError"), arguments


def test_a_refcount_table_of_no_clusters_is_refused_and_mended(runner: Runner, folder: Path) -> None:
    forged(folder).set_field("refcount_table_clusters", 0)
    assert run(runner, folder, *COMMANDS[4]).refuses("ImageCorruptError")
    assert run(runner, folder, *COMMANDS[3]).outcome.code == 0
    assert run(runner, folder, *COMMANDS[1]).outcome.code == 0


SNAPSHOTS: Final[dict[str, Callable[[ImagePath], object]]] = {
    "L1 table of 4 GiB entries": lambda i: i.set(i.snapshots + 8, 0xFFFFFFFF, 4),
    "L1 table one entry above the limit": lambda i: i.set(i.snapshots + 8, (4 << 20) + 1, 4),
    "L1 table misaligned": lambda i: i.set(i.snapshots, 0x1234),
    "L1 table behind the end": lambda i: i.set(i.snapshots, 1 << 50),
    "L1 table at an offset that overflows": lambda i: i.set(i.snapshots, (1 << 64) - CLUSTER),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_whose_tables_cannot_be_is_neither_applied_nor_deleted(runner: Runner, folder: Path, name: str) -> None:
    """CVE-2014-0143, CVE-2014-0145: the L1 table of a snapshot was copied before anybody looked how long it is."""
    SNAPSHOTS[name](forged(folder))
    for arguments in (("-a", "1"), ("-d", "1")):
        assert run(runner, folder, "snapshot", *arguments, IMAGE).refuses("ImageError")
    assert run(runner, folder, "convert", "-l", "1", "-O", "raw", IMAGE, "output").refuses("ImageError")
    assert run(runner, folder, "check", "-f", "qcow2", IMAGE).outcome.code in (2, 3)


ENTRIES: Final[dict[str, Callable[[ImagePath], object]]] = {
    "an entry behind the end of the file": lambda i: i.set_field("snapshots_offset", i.size),
    "extra data of 4 GiB": lambda i: i.set(i.snapshots + 36, 0xFFFFFFFF, 4),
    "extra data of 1025 bytes": lambda i: i.set(i.snapshots + 36, 1025, 4),
    "snapshots without a table": lambda i: i.set_field("snapshots_offset", 0),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_snapshot_table_that_cannot_be_read_is_refused(runner: Runner, folder: Path, name: str) -> None:
    """CVE-2014-0146: entries were freed that had never been read."""
    ENTRIES[name](forged(folder))
    for arguments in (("snapshot", "-l", IMAGE), ("io", "-f", "qcow2", "-c", "write 0 4k", IMAGE)):
        assert run(runner, folder, *arguments).refuses("ImageError")


def test_sizes_are_held_to_a_budget(folder: Path) -> None:
    """CVE-2013-2096: a disk of exabytes in a file of kilobytes, to be made a raw disk."""
    image = forged(folder)
    with pytest.raises(ImageLimitError, match="virtual_size"):
        blocklib.open(image.path, limits=Limits(virtual_size=1 * MiB))
    assert "virtual_size" in blocklib.inspect(image.path, limits=Limits(virtual_size=1 * MiB)).limits_exceeded


WRITES: Final[dict[str, Callable[[ImagePath], object]]] = {
    # iotest 060 and launchpad 1728615, by what they do and not by how
    "data on the L1 table": lambda i: i.set(i.l2_entry(0), i.l1 | COPIED),
    "data on its own L2 table": lambda i: i.set(i.l2_entry(0), i.l2() | COPIED),
    "data on a refcount block": lambda i: i.set(i.l2_entry(0), i.refcount_block() | COPIED),
    "data on the refcount table": lambda i: i.set(i.l2_entry(0), i.refcount_table | COPIED),
    "data on the snapshot table": lambda i: i.set(i.l2_entry(0), i.snapshots | COPIED),
    "data on the L1 table of a snapshot": lambda i: i.set(i.l2_entry(0), i.number(i.snapshots) | COPIED),
    "data misaligned": lambda i: i.set(i.l2_entry(0), 0x12200 | COPIED),
    "an L2 table that is misaligned": lambda i: i.set(i.l1, i.l2() + 512 | COPIED),
    "an L2 table on the L1 table": lambda i: i.set(i.l1, i.l1 | COPIED),
    "an L2 table far away": lambda i: i.set(i.l1, (1 << 55) | COPIED),
    "data in the header": lambda i: i.set(i.l2_entry(0), 512 | COPIED),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_into_a_structure_of_the_image_is_refused_before_it_happens(runner: Runner, folder: Path, name: str) -> None:
    image = forged(folder)
    WRITES[name](image)
    before = (folder / IMAGE).read_bytes()
    outcome = run(runner, folder, "io", "-f", "qcow2", "-c", "write -P 9 0 64k", IMAGE).outcome
    assert outcome.code == 1
    after = (folder / IMAGE).read_bytes()
    # That the image is corrupt may be written down; nothing else is.
    assert (after[:72], after[80 : len(before)]) == (before[:72], before[80:])
    assert set(after[len(before) :]) <= {0}


ALLOCATIONS: Final[dict[str, Callable[[ImagePath], object]]] = {
    "a refcount block in the header": lambda i: i.set(i.refcount_table, 512),
    "a misaligned refcount block": lambda i: i.set(i.refcount_table, i.refcount_block() + 512),
    "a refcount block behind the end": lambda i: i.set(i.refcount_table, 1 << 50),
    "a refcount block that counts the header as free": lambda i: i.set_count(0, 0),
    "a refcount block that counts the L1 table as free": lambda i: i.set_count(i.l1, 0),
    "a refcount block that counts itself as free": lambda i: i.set_count(i.refcount_block(), 0),
    "no refcount block at all": lambda i: i.set(i.refcount_table, 0),
    "an empty refcount block": lambda i: i.write(i.refcount_block(), (bytes(CLUSTER),)),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_no_cluster_in_use_is_given_to_anybody_else(runner: Runner, folder: Path, name: str) -> None:
    """Whatever the counts say: a write is refused, or goes where nothing is; what was there before reads as before."""
    image = forged(folder)
    ALLOCATIONS[name](image)
    before = (folder / IMAGE).read_bytes()
    outcome = run(runner, folder, "io", "-f", "qcow2", "-c", "write -P 9 4M 64k", "-c", "read -P 0x78 0 64k", IMAGE).outcome
    assert "Pattern verification failed" not in outcome.out
    after = (folder / IMAGE).read_bytes()
    assert after[: image.field("l1_table_offset")][96:104] == before[96:104]
    with blocklib.open(folder / IMAGE, format="qcow2") as disk:
        assert disk.read(0, CLUSTER) == b"x" * CLUSTER


def test_limits_are_those_of_the_specification_and_a_byte_more_is_refused(folder: Path) -> None:
    """QEMU's limits, which the specification quotes: at them an image opens, above them it does not."""
    at = {"l1_bytes": ("l1_size", 32 * MiB // 8), "refcount_table_bytes": ("refcount_table_clusters", 128)}
    for limit, (field, most) in at.items():
        for value, opens in ((most, True), (most + 1, False)):
            forge = Forge(folder / IMAGE, size=8 * MiB)
            forge.fields |= {"l1_table_offset": forge.place(32 * MiB), "l1_size": 1}
            forge.fields |= {"refcount_table_offset": forge.place(8 * MiB), "refcount_table_clusters": 128}
            forge.finish()
            ImagePath(folder / IMAGE).set_field(field, value)
            if opens:
                blocklib.open(folder / IMAGE).close()
            else:
                with pytest.raises(ImageLimitError, match=limit):
                    blocklib.open(folder / IMAGE)


_CLIENTS: Final = "tests/interop/test_nbd_hostile_clients.py"
TABLE: Final = {
    "CVE-2008-2004": "test_a_raw_disk_stays_raw_whatever_a_guest_writes_into_it",
    "CVE-2011-3147": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2013-2096": "test_sizes_are_held_to_a_budget",
    "CVE-2014-0134": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2014-0142": "test_a_number_of_the_header_that_cannot_be_is_refused_by_every_command",
    "CVE-2014-0143": "test_a_snapshot_whose_tables_cannot_be_is_neither_applied_nor_deleted",
    "CVE-2014-0144": "test_a_format_without_a_driver_here_is_refused_by_name",
    "CVE-2014-0145": "test_a_snapshot_whose_tables_cannot_be_is_neither_applied_nor_deleted",
    "CVE-2014-0146": "test_a_snapshot_table_that_cannot_be_read_is_refused",
    "CVE-2014-0147": "test_a_number_of_the_header_that_cannot_be_is_refused_by_every_command",
    "CVE-2014-0148": "test_a_format_without_a_driver_here_is_refused_by_name",
    "CVE-2015-1850": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2015-1851": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2015-5163": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2022-47951": "test_a_vmdk_descriptor_leads_nowhere",
    "CVE-2024-32498": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2024-4467": "test_a_file_that_an_image_names_is_not_opened",
    "CVE-2024-44082": "test_no_format_is_an_answer",
    "CVE-2026-24708": "test_a_raw_disk_stays_raw_whatever_a_guest_writes_into_it",
    "launchpad 1728615": "test_no_cluster_in_use_is_given_to_anybody_else",
    "QEMU's limits": "test_limits_are_those_of_the_specification_and_a_byte_more_is_refused",
    "iotest 060": "test_a_write_into_a_structure_of_the_image_is_refused_before_it_happens",
    "iotest 080": "test_a_number_of_the_header_that_cannot_be_is_refused_by_every_command",
    "a polyglot of formats": "tests/unit/test_inspection.py::test_two_formats_are_an_error_that_names_both",
    "oslo's inspector": "tests/unit/test_inspection_openstack.py::test_the_verdict_is_that_of_openstack_or_a_stricter_one",
    "CVE-2019-14842": "tests/unit/test_nbd_client_engine.py::test_a_server_without_tls_is_left_where_tls_is_demanded",
    "CVE-2019-14850": f"{_CLIENTS}::test_ten_thousand_half_open_handshakes_cost_little_and_stop_nobody",
    "CVE-2019-14851": "tests/unit/test_nbd_server_engine.py::test_what_breaks_the_negotiation_ends_the_session",
    "CVE-2021-20286": "tests/hostile/test_nbd_lying_server.py::test_a_hostile_handshake_ends_in_an_error",
    "CVE-2021-3716": "tests/unit/test_nbd_server_engine.py::test_what_was_negotiated_in_clear_text_is_void_under_tls",
    "CVE-2022-0485": "tests/unit/test_block_copy.py::test_a_read_error_goes_up",
    "CVE-2024-7409": f"{_CLIENTS}::test_requests_in_flight_are_answered_before_the_server_has_stopped",
}
"""Identifier -> the test that answers it, of this module or of another."""


def test_every_row_names_a_test_that_exists() -> None:
    root = Path(__file__).parents[2]
    for row, name in TABLE.items():
        path, _, test = name.rpartition("::")
        text = (root / path if path else Path(__file__)).read_text()
        assert f"def {test}(" in text, row
