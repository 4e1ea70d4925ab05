"""The raw driver: windows of a file, sizes, and the guard of an image whose format was guessed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocklib.disk import Disk
from blocklib.errors import OptionError, ReadOnlyError, UsageError
from blocklib.extents import FLAG_OFFSET_VALID, FLAG_RAW, KIND_DATA
from blocklib.formats.raw import RawNode
from blocklib.graph import ALL
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE
from blocklib.probe import probe
from blocklib.protocols.file import FileNode
from blocklib.protocols.memory import MemoryNode
from blocklib.protocols.null import NullNode
from tests.nodes import attached, used

QCOW2 = b"QFI\xfb\0\0\0\3"


def memory(content: bytes) -> MemoryNode:
    node = MemoryNode(None, len(content))
    node.pwritev(0, (content,))
    return node


def raw(file: MemoryNode, *, offset: int = 0, size: int | None = None, guessed: bool = False) -> RawNode:
    node = RawNode(None, None, read_only=False, offset=offset, size=size, guessed=guessed)
    attached(node, file)
    node.discard_passes = file.discard_passes = True
    return node


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_window_shows_its_part_of_the_file() -> None:
    file = memory(bytes(i % 251 for i in range(8192)))
    with used(raw(file, offset=1001, size=1024), CONSISTENT_READ | WRITE) as edge:
        assert edge.size == 1024
        seen = bytearray(1024)
        edge.read(0, memoryview(seen))
        assert seen == bytes(i % 251 for i in range(1001, 2025))
        edge.write(1023, [b"!"])
        edge.write_zeroes(0, 2, unmap=False)
        whole = bytearray(8192)
        file.preadv(0, (memoryview(whole),))
    expected = bytearray(i % 251 for i in range(8192))
    expected[1001:1003] = bytes(2)
    expected[2024:2025] = b"!"
    assert whole == expected


def test_a_run_is_the_same_range_of_the_file() -> None:
    node = raw(memory(bytes(4096)), offset=100)
    edge = node.children["file"]
    assert node.resolve(7, 50) == (KIND_DATA, edge, 107, 50, FLAG_RAW | FLAG_OFFSET_VALID)
    assert node.prepare_write(7, 50) == (edge, 107, 50, None)
    assert node.data_edge() is edge


@pytest.mark.parametrize(
    ("offset", "size", "option"),
    [(4097, None, "offset"), (0, 4608, "size"), (512, 4096, "size"), (0, 100, "size"), (5000, 512, "offset")],
)
def test_a_window_that_does_not_fit_is_refused(offset: int, size: int | None, option: str) -> None:
    with pytest.raises(OptionError) as caught:
        raw(memory(bytes(4096)), offset=offset, size=size)
    assert (caught.value.option, caught.value.driver) == (option, "raw")


@pytest.mark.parametrize(("offset", "size", "expected"), [(4096, None, 0), (0, 0, 0), (3584, 512, 512)])
def test_a_window_may_reach_to_the_end_and_be_empty(offset: int, size: int | None, expected: int) -> None:
    with Disk(raw(memory(bytes(4096)), offset=offset, size=size), "r") as disk:
        assert disk.size == expected


@pytest.mark.parametrize(("offset", "size"), [(512, None), (0, 1024)])
def test_nobody_else_may_resize_a_file_under_a_window(offset: int, size: int | None) -> None:
    node = raw(memory(bytes(4096)), offset=offset, size=size)
    with used(node, CONSISTENT_READ):
        assert node.children["file"].shared == ALL & ~RESIZE
    whole = raw(memory(bytes(4096)))
    with used(whole, CONSISTENT_READ):
        assert (whole.children["file"].wanted, whole.children["file"].shared) == (CONSISTENT_READ, ALL)


def test_options_have_qemus_names() -> None:
    node = RawNode.from_options({"node-name": "r", "offset": 5, "size": 512}, read_only=True, filename="shown", guessed=True)
    assert (node.name, node.filename, node.offset, node.guessed, node.read_only) == ("r", "shown", 5, True, True)
    attached(node, memory(bytes(4096)))
    assert node.size == 512
    assert RawNode.from_options({"node-name": None, "offset": 0, "size": None}, read_only=True).offset == 0


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd_file(tmp_path: Path) -> Path:
    path = tmp_path / "odd.raw"
    path.write_bytes(b"x" * 1000)
    return path


@pytest.fixture
def odd(odd_file: Path) -> Iterator[Disk]:
    file = FileNode(None, str(odd_file), read_only=False)
    file.load()
    with Disk(attached(RawNode(None, str(odd_file), read_only=False), file), "r+") as disk:
        yield disk


def test_a_file_that_ends_inside_a_sector_is_a_disk_of_whole_sectors(odd: Disk, odd_file: Path) -> None:
    assert odd.size == 1024
    assert odd.read(990, 34) == b"x" * 10 + bytes(24)
    assert [(extent.offset, extent.length, extent.zero) for extent in odd.extents()] == [
        (0, 1000, False),
        (1000, 24, True),
    ]
    assert odd_file.stat().st_size == 1000
    odd.write(1010, b"y")
    assert odd_file.read_bytes() == b"x" * 1000 + bytes(10) + b"y"


def test_a_resize_gives_the_file_the_very_size(odd: Disk, odd_file: Path) -> None:
    odd.truncate(1500)
    assert (odd.size, odd_file.stat().st_size) == (1536, 1500)
    odd.truncate(10, shrink=True)
    assert (odd.size, odd_file.read_bytes()) == (512, b"x" * 10)


def test_a_resize_counts_from_the_offset() -> None:
    file = memory(bytes(4096))
    with Disk(raw(file, offset=1000), "r+") as disk:
        assert disk.size == 3584
        disk.truncate(5120)
        assert (disk.size, file.size) == (5120, 6120)


def test_a_fixed_size_is_fixed() -> None:
    file = memory(bytes(4096))
    with Disk(raw(file, size=1024), "r+") as disk:
        for size in (512, 2048):
            with pytest.raises(UsageError, match="fixed"):
                disk.truncate(size, shrink=True)
        assert (disk.size, file.size) == (1024, 4096)


def test_a_file_that_keeps_its_size_is_reported() -> None:
    class Device(MemoryNode):
        def truncate(self, size: int, preallocation: str = "off") -> None:
            """A device accepts a smaller size and keeps its own."""

    node = RawNode(None, None, read_only=False)
    with Disk(attached(node, Device(None, 4096)), "r+") as disk:
        with pytest.raises(UsageError, match="device"):
            disk.truncate(512, shrink=True)
        assert disk.size == 4096


# -- guessed images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def guessed() -> Iterator[Disk]:
    with Disk(raw(memory(bytes(4096)), guessed=True), "r+") as disk:
        yield disk


@pytest.mark.parametrize("rest", [b"", bytes(504), bytes(2000)])
def test_a_guessed_image_cannot_be_made_to_look_like_another_format(guessed: Disk, rest: bytes) -> None:
    with pytest.raises(ReadOnlyError, match="qcow2"):
        guessed.write(0, QCOW2 + rest)
    assert guessed.read(0, 4096) == bytes(4096)


def test_a_magic_that_comes_in_pieces_is_refused_as_well(guessed: Disk) -> None:
    guessed.write(4, QCOW2[4:])
    guessed.write(1, QCOW2[1:3])
    guessed.write(3, QCOW2[3:4])
    with pytest.raises(ReadOnlyError):
        guessed.write(0, QCOW2[:1])
    assert probe(guessed.read(0, 512)) is None


def test_zeroes_that_complete_a_magic_are_refused(guessed: Disk) -> None:
    guessed.write(0, QCOW2[:4] + b"\0\0\0\0")
    guessed.write(0, QCOW2[:4])
    with pytest.raises(ReadOnlyError):
        guessed.write(7, b"\2")
    guessed.write(0, b"QEDx")
    for unmap in (False, True):
        with pytest.raises(ReadOnlyError, match="qed"):
            guessed.write_zeroes(3, 1, unmap=unmap)
    guessed.discard(3, 1000)
    assert guessed.read(0, 4) == b"QEDx"


def test_all_other_writes_of_a_guessed_image_go_through(guessed: Disk) -> None:
    guessed.write(0, b"\xeb\x63\x90 boot sector")
    guessed.write(500, b"z" * 100)
    guessed.write(512, QCOW2)
    guessed.write_zeroes(505, 20)
    guessed.write_zeroes(2, 1)
    expected = bytearray(b"\xeb\x63\x90 boot sector".ljust(4096, b"\0"))
    expected[500:600] = b"z" * 100
    expected[512:520] = QCOW2
    expected[505:525] = bytes(20)
    expected[2:3] = b"\0"
    assert guessed.read(0, 4096) == expected
    guessed.write_zeroes(0, 4096)
    assert guessed.read(0, 4096) == bytes(4096)


def test_threads_cannot_put_a_magic_together(guessed: Disk) -> None:
    refused = []

    def work(position: int) -> None:
        try:
            guessed.write(position, QCOW2[position : position + 1])
        except ReadOnlyError:
            refused.append(position)

    threads = [threading.Thread(target=work, args=(position,)) for position in (0, 1, 2, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert probe(guessed.read(0, 512)) is None


def test_an_image_that_was_said_to_be_raw_takes_any_bytes() -> None:
    with Disk(raw(memory(bytes(4096))), "r+") as disk:
        disk.write(0, QCOW2)
        assert disk.read(0, 8) == QCOW2


# -- what it stands on in tests ----------------------------------------------------------------------------------------


def test_a_huge_disk_in_memory_costs_what_was_written() -> None:
    with Disk(MemoryNode(None, 1 << 60), "r+") as disk:
        disk.write((1 << 59) + 5, b"x")
        disk.write_zeroes(0, 1 << 58)
        disk.truncate(1 << 61)
        assert disk.node.allocated_size() == 65_536
        assert [(extent.offset, extent.length) for extent in disk.extents() if extent.data] == [(1 << 59, 65_536)]
        disk.truncate((1 << 59) + 2, shrink=True)
        disk.truncate(1 << 60)
        assert disk.read(1 << 59, 10) == bytes(10)


def test_memory_that_insists_on_alignment_tells_who_does_not_align() -> None:
    node = MemoryNode(None, 4096, alignment=512)
    with pytest.raises(UsageError, match="not aligned to 512"):
        node.preadv(1, (memoryview(bytearray(512)),))
    with pytest.raises(UsageError, match="not aligned to 512"):
        node.pwritev(0, (b"x",))


def test_memory_opened_for_reading_is_not_written() -> None:
    node = MemoryNode.from_options({"node-name": "m", "size": 512}, read_only=True)
    for change in (
        lambda: node.pwritev(0, (b"x",)),
        lambda: node.zero_range(0, 1, unmap=False),
        lambda: node.discard_range(0, 1),
        lambda: node.truncate(0),
    ):
        with pytest.raises(ReadOnlyError):
            change()  # type: ignore[no-untyped-call]
    with pytest.raises(OptionError):
        MemoryNode(None, 512).truncate(1024, "full")


def test_a_null_disk_takes_everything_and_keeps_nothing() -> None:
    node = NullNode.from_options({"node-name": "n", "size": 4096, "read-zeroes": True}, read_only=False)
    with Disk(node, "r+") as disk:
        disk.write(0, b"x" * 4096)
        disk.write_zeroes(0, 10)
        disk.discard(0, 10)
        disk.flush()
        assert disk.read(0, 4096) == bytes(4096)
        assert [extent.zero for extent in disk.extents()] == [True]
        assert disk.node.allocated_size() == 0
    left_alone = bytearray(b"?" * 10)
    NullNode(None).preadv(0, (memoryview(left_alone),))
    assert left_alone == b"?" * 10
    assert NullNode.from_options({"size": None}, read_only=True).size == 1 << 30
    with pytest.raises(ReadOnlyError):
        NullNode(None, read_only=True).pwritev(0, (b"x",))
