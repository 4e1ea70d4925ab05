"""The snapshot table: what is read, kept and written back, what is refused, and how references are counted."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blocklib
from blocklib.disk import Disk
from blocklib.errors import BlocklibError, ImageCorruptError, ImageLimitError, NameNotFoundError, UsageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import Header, parse_header
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.formats.qcow2.snapshots import table as snapshots
from blocklib.formats.qcow2.snapshots.table import Snapshot, extra_data, find_snapshot, new_id, read_snapshots, table_bytes
from blocklib.formats.qcow2.snapshots.tally import Tally
from blocklib.formats.qcow2.snapshots.tally_table import TableTally
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ
from blocklib.policy import Limits
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image

START = 1024


def entry(**changes: object) -> Snapshot:
    extra = extra_data(vm_state_size=9, disk_size=1 << 30)
    plain = Snapshot(0x10000, 3, b"1", b"monday", 1_700_000_000, 123_456_789, 5_000_000_001, 7, extra)
    return plain._replace(**changes)  # type: ignore[arg-type]


def header(count: int, version: int = 3) -> Header:
    image = new_image(1 << 20, {"compat": "0.10" if version == 2 else "1.1"})
    parsed = parse_header(image[:4096], limits=Limits(), file_length=len(image), for_check=False, node="image")
    return replace(parsed, nb_snapshots=count, snapshots_offset=START)


def parse(table: bytes, count: int, version: int = 3) -> list[Snapshot]:
    file = RecordingNode(data=bytes(START) + table)
    with Transaction() as change:
        edge = change.attach(None, "file", file, wanted=CONSISTENT_READ)
    return read_snapshots(edge, header(count, version), node="image")


# -- bytes -----------------------------------------------------------------------------------------------------------

U16, U32, U64 = st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
ENTRIES = st.builds(
    Snapshot,
    U64,
    U32,
    st.binary(max_size=20),
    st.binary(max_size=300),
    U32,
    U32,
    U64,
    U32,
    st.binary(min_size=16, max_size=80),
)


@given(st.lists(ENTRIES, max_size=6))
def test_what_was_written_is_read_with_all_it_had(entries: list[Snapshot]) -> None:
    table = table_bytes(entries, version=3, disk_size=1 << 20)
    assert len(table) == sum(entry.length for entry in entries)
    assert parse(table, len(entries)) == entries


def test_the_fields_are_where_the_specification_puts_them() -> None:
    table = table_bytes([entry(extra=entry().extra + b"later")], version=3, disk_size=0)
    assert table[:40] == struct.pack(">QIHHIIQII", 0x10000, 3, 1, 6, 1_700_000_000, 123_456_789, 5_000_000_001, 7, 29)
    assert table[40:] == struct.pack(">QQQ", 9, 1 << 30, 0) + b"later" + b"1monday" + bytes(4)


def test_known_extra_data_is_optional() -> None:
    assert (entry().vm_state_size, entry().disk_size, entry().icount) == (9, 1 << 30, 0)
    bare = entry(extra=b"")
    assert (bare.vm_state_size, bare.disk_size, bare.icount) == (7, None, None)
    assert entry(extra=bytes(8)).vm_state_size == 0
    assert entry(extra=bytes(16) + b"\xff" * 8).icount is None
    assert parse(table_bytes([bare], version=2, disk_size=512), 1, version=2) == [bare]


def test_version_3_gets_the_extra_data_that_it_demands() -> None:
    (read,) = parse(table_bytes([entry(extra=b"")], version=3, disk_size=4096), 1)
    assert (read.vm_state_size, read.disk_size) == (7, 4096)


def test_what_people_see_of_an_entry() -> None:
    info = entry(name=b"caf\xc3\xa9 \xff").info(0)
    assert info.created == datetime(2023, 11, 14, 22, 13, 20, 123_456, UTC)
    assert info.name == "café \udcff"
    assert (info.id, info.vm_state_size, info.vm_clock_ns, info.size, info.created_nsec) == (
        "1",
        9,
        5_000_000_001,
        1 << 30,
        123_456_789,
    )
    assert entry(nanoseconds=(1 << 32) - 1, extra=b"").info(512).size == 512


@pytest.mark.parametrize(
    ("table", "error", "place", "part"),
    [
        (b"", ImageCorruptError, START, "entry 0"),
        (table_bytes([entry()], version=3, disk_size=0)[:70], ImageCorruptError, START, "inside the file"),
        (table_bytes([entry()], version=3, disk_size=0), ImageCorruptError, START + 72, "entry 1"),
        (table_bytes([entry(), entry(extra=bytes(1025))], version=3, disk_size=0), ImageLimitError, START + 72, "1024 bytes"),
    ],
)
def test_a_malformed_table_is_named_with_its_place(
    table: bytes, error: type[ImageCorruptError | ImageLimitError], place: int, part: str
) -> None:
    with pytest.raises(error, match=part) as caught:
        parse(table, 2)
    assert caught.value.host_offset == place


def test_a_table_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_bytes([entry(), entry()], version=3, disk_size=0)
    monkeypatch.setattr(layout, "MAX_SNAPSHOT_TABLE_BYTES", 100)
    with pytest.raises(ImageLimitError, match="100 bytes") as caught:
        parse(table, 2)
    assert caught.value.host_offset == START + 72
    with pytest.raises(ImageLimitError, match="144 bytes"):
        table_bytes([entry(), entry()], version=3, disk_size=0)


def test_damage_is_met_when_the_image_is_opened() -> None:
    host = RecordingNode(data=new_image(1 << 20, {}))
    with disk_on(host) as disk:
        disk.snapshots.create("a")
    offset = int.from_bytes(host.data[64:72], "big")
    host.data[offset + 36 : offset + 40] = b"\x00\x00\x10\x00"
    with pytest.raises(ImageLimitError, match="extra data"):
        disk_on(host)


# -- names and IDs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [((), b"1"), ((b"1", b"2"), b"3"), ((b"7", b"2"), b"8"), ((b"x", b""), b"1"), ((b"3x",), b"4"), ((b"9" * 30,), b"1")],
)
def test_new_ids_are_one_more_than_the_highest(ids: tuple[bytes, ...], expected: bytes) -> None:
    assert new_id(entry(id=id) for id in ids) == expected


def test_snapshots_are_found_by_id_by_name_or_by_both() -> None:
    entries = [entry(id=b"1", name=b"a"), entry(id=b"2", name=b"a"), entry(id=b"3", name=b"2")]
    assert find_snapshot(entries, id="2") == 1
    assert find_snapshot(entries, name="a") == 0
    assert find_snapshot(entries, name="2") == 2
    assert find_snapshot(entries, id="2", name="a") == 1
    with pytest.raises(NameNotFoundError, match="the ID '1' and the name '2'"):
        find_snapshot(entries, id="1", name="2")


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "a\0b"])
def test_names_that_cannot_be_told_apart_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        snapshots.checked_name(name)
    assert snapshots.checked_name("é" * 127) == ("é" * 127).encode()


# -- counting ---------------------------------------------------------------------------------------------------------


def busy_image(options: dict[str, int | str]) -> RecordingNode:
    host = RecordingNode(data=new_image(300_000, options))
    rnd = random.Random(5)
    with disk_on(host) as disk:
        for number in range(40):
            offset = rnd.randrange(290_000)
            disk.write(offset, rnd.randbytes(rnd.choice((1, 3000, 9000))))
            if number % 7 == 6:
                disk.write_zeroes(offset, 9000)
            if number in (15, 25):
                disk.snapshots.create(str(number))
    return host


def node_of(disk: Disk) -> Qcow2Node:
    node = disk.node
    assert isinstance(node, Qcow2Node)
    return node


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512, "refcount_bits": 2},
        {"cluster_size": 512, "refcount_bits": 4},
        {"cluster_size": 1024, "refcount_bits": 8},
        {"cluster_size": 4096},
        {"cluster_size": 512, "refcount_bits": 32},
        {"cluster_size": 512, "refcount_bits": 64},
    ],
    ids=str,
)
def test_numpy_counts_what_the_scalar_definition_counts(options: dict[str, int | str], sign: int) -> None:
    with disk_on(busy_image(options), writable=False) as disk:
        node = node_of(disk)
        add_compressed_entries(node)
        answers = []
        for kind in (Tally, TableTally):
            tally = kind(node, sign)
            tally.add_l1(node.mapping.l1)
            tally.add_run(0, 1)
            try:
                tally.check()
                writes = list(tally.block_writes())
            except BlocklibError as exc:
                answers.append((type(exc), str(exc)))
                continue
            flags = sorted(tally.flag_writes(node.mapping.l1))
            l1 = tally.flagged_l1(node.mapping.l1)
            answers.append((writes, tally.block_offsets(), list(tally.freed), flags, l1))  # type: ignore[arg-type]
        assert answers[0] == answers[1]
        if options.get("refcount_bits") != 2:  # where there is no room for one more, or none to take
            assert len(answers[0]) == 5, answers[0]


def add_compressed_entries(node: Qcow2Node) -> None:
    """Turn a plain entry whose neighbour is in use, too, into a descriptor that reaches over both clusters."""
    geometry = node.geometry
    table_offset = next(entry for entry in node.mapping.l1 if entry) & layout.OFFSET_MASK
    table = bytearray(geometry.cluster_size)
    node.file.read(table_offset, memoryview(table))
    for place in range(0, len(table), 8):
        host = int.from_bytes(table[place : place + 8], "big") & layout.OFFSET_MASK
        clusters = (host >> geometry.cluster_bits, (host >> geometry.cluster_bits) + 1)
        if host and all(node.retry(lambda cluster=cluster: node.refcounts.get(cluster)) for cluster in clusters):  # type: ignore[misc]
            descriptor = geometry.encode_compressed(host + geometry.cluster_size - 300, 400)
            host_file = node.file.node
            assert isinstance(host_file, RecordingNode)
            host_file.data[table_offset + place : table_offset + place + 8] = descriptor.to_bytes(8, "big")
            return
    raise AssertionError("no such entry")


def broken(what: str) -> RecordingNode:
    """An image with one thing that no snapshot change may build on."""
    host = busy_image({"cluster_size": 4096})
    with disk_on(host, writable=False) as disk:
        node = node_of(disk)
        l1_place = node.header.l1_table_offset
        table_offset = node.mapping.l1[0] & layout.OFFSET_MASK
        disk.read(0, 1)
        table = node.mapping.cache.need(table_offset)
        index = next(i for i, item in enumerate(table) if item & layout.OFFSET_MASK)
        place = table_offset + 8 * index
        cluster = (table[index] & layout.OFFSET_MASK) // 4096
        block = node.refcounts.table[0]

    def put(offset: int, value: int, length: int = 8) -> None:
        host.data[offset : offset + length] = value.to_bytes(length, "big")

    if what == "entry outside the file":
        put(place, 1 << 40)
    elif what == "entry not aligned":
        put(place, cluster * 4096 + 512)
    elif what == "L2 table outside the file":
        put(l1_place, 1 << 40)
    elif what == "L2 table not aligned":
        put(l1_place, table_offset + 512)
    elif what == "no count":
        put(block + 2 * cluster, 0, 2)
    elif what == "no refcount block":
        put(node.header.refcount_table_offset, 0)
    elif what == "L1 table of the snapshot outside the file":
        put(node.header.snapshots_offset, 1 << 40)
    elif what == "L1 table of the snapshot not aligned":
        put(node.header.snapshots_offset, node.snapshots[0].l1_offset + 512)
    elif what == "L1 table of the snapshot too long":
        put(node.header.snapshots_offset + 8, (1 << 22) + 1, 4)
    else:
        raise AssertionError(what)
    return host


BROKEN_ALL = ("no count", "entry outside the file", "entry not aligned", "L2 table outside the file", "L2 table not aligned")
BROKEN_SNAPSHOT = (
    "L1 table of the snapshot outside the file",
    "L1 table of the snapshot not aligned",
    "L1 table of the snapshot too long",
)


@pytest.mark.parametrize("small", [0, 1 << 40], ids=["numpy", "scalar"])
@pytest.mark.parametrize(
    ("what", "verb"),
    [
        *((what, "create") for what in (*BROKEN_ALL, "no refcount block")),
        *((what, "apply") for what in (*BROKEN_ALL, *BROKEN_SNAPSHOT)),
        *((what, "delete") for what in BROKEN_SNAPSHOT),
    ],
)
def test_a_damaged_image_is_refused_and_stays_as_it_is(
    what: str, verb: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blocklib.formats.qcow2.snapshots.tally._SMALL", small)
    host = broken(what)
    before = bytes(host.data)
    # Without checks that would meet the damage earlier and mark the image.
    disk = disk_on(host, options={"overlap-check": "none"})
    with pytest.raises((ImageCorruptError, ImageLimitError)) as caught:
        if verb == "create":
            disk.snapshots.create("more")
        else:
            getattr(disk.snapshots["15"], verb)()
    assert caught.value.structure
    disk.close()
    assert host.data == before


@pytest.mark.parametrize("what", BROKEN_SNAPSHOT)
def test_bitmaps_are_not_marked_for_a_snapshot_that_cannot_be_applied(what: str) -> None:
    host = broken(what)
    with disk_on(host) as disk:
        disk.bitmaps.add("stored", persistent=True)
    before = bytes(host.data)
    with disk_on(host) as disk:
        with pytest.raises((ImageCorruptError, ImageLimitError)):
            disk.snapshots["15"].apply()
        assert disk.bitmaps["stored"].count == 0
    assert host.data == before


def test_refcounts_of_one_bit_allow_no_snapshot_of_data() -> None:
    host = RecordingNode(data=new_image(1 << 20, {"refcount_bits": 1, "cluster_size": 4096}))
    with disk_on(host) as disk:
        snapshot = disk.snapshots.create("empty")
        snapshot.delete()
        disk.write(0, b"x")
        disk.flush()
        disk.flush()
        before = bytes(host.data)
        with pytest.raises(ImageLimitError, match="1 bits"):
            disk.snapshots.create("full")
        assert host.data == before
        disk.write(5000, b"y")
        assert disk.read(0, 1) + disk.read(5000, 1) == b"xy"


def test_one_snapshot_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1 << 20, format="qcow2")
    with blocklib.open(path, "r+", limits=Limits(snapshots=2)) as disk:
        disk.snapshots.create("1")
        disk.snapshots.create("2")
        disk.flush()
        disk.flush()  # what the first has set free is counted so by the second
        before = path.read_bytes()
        with pytest.raises(ImageLimitError, match="2 snapshots already"):
            disk.snapshots.create("3")
        assert path.read_bytes() == before
    assert len(blocklib.info(path).snapshots) == 2


def test_unknown_extra_data_survives_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1 << 20, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        disk.snapshots.create("old")
        node = node_of(disk)
        strange = node.snapshots[0]._replace(extra=node.snapshots[0].extra + b"from the future", vm_clock_ns=77)
        node.snapshots = [strange]
        disk.snapshots.create("new").apply()
    with blocklib.open(path, "r+") as disk:
        assert node_of(disk).snapshots[0] == strange
        disk.snapshots["new"].delete()
        assert node_of(disk).snapshots == [strange]
