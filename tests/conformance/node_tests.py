"""NodeTests: what every writable node must do, whatever it stores its bytes in.  Subclass it with a way to make one.

The tests use a node as a Disk does; what they know of content they know from a bytearray beside it.
"""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocklib import batch
from blocklib._fast import extents as table_kernels
from blocklib._fast.extents import Rows
from blocklib.disk import Disk
from blocklib.errors import BlocklibError
from blocklib.extents import FLAG_DATA, FLAG_OFFSET_VALID, FLAG_RAW, FLAG_ZERO, KIND_DATA, KIND_ZERO
from blocklib.graph import Transaction
from blocklib.node import Node

# Ends of the disk, sectors, pages, clusters of the usual 64 KiB, and things that lie across them.
RANGES = [(0, 1), (1, 510), (511, 2), (4095, 4098), (65_535, 2), (65_536, 65_536), (1000, 200_000), (131_072, 1)]


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that repeat at no power of two, none of them zero."""
    return (bytes(1 + (seed + i) % 251 for i in range(251)) * (length // 251 + 1))[:length]


class NodeTests(ABC):
    """Contract of a writable node.  `make` gives a new one; the flags say what it cannot do."""

    size = 1 << 20
    """Bytes of the node that `make` makes."""
    can_resize = True
    is_exact = True
    """Any number of bytes is a possible size."""

    @abstractmethod
    def make(self, folder: Path) -> Node:
        """A new node of `size` bytes that reads as zero: writable, loaded with its children, used by nobody."""

    def open_again(self, folder: Path, *, read_only: bool) -> Node | None:
        """The node that `make` made in `folder`, after it was closed; None where nothing is left of it."""
        return None

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Disk]:
        node = self.make(tmp_path)
        node.discard_passes = True
        with Disk(node, "r+") as disk:
            yield disk

    # -- content ------------------------------------------------------------------------------------------------------

    def test_a_new_node_reads_as_zero(self, disk: Disk) -> None:
        assert disk.size == self.size
        assert disk.read(0, self.size) == bytes(self.size)

    @pytest.mark.parametrize(("offset", "length"), RANGES)
    def test_what_was_written_is_read_and_its_neighbours_are_untouched(self, disk: Disk, offset: int, length: int) -> None:
        expected = bytearray(pattern(self.size, 7))
        disk.write(0, expected)
        expected[offset : offset + length] = pattern(length, 100)
        disk.write(offset, pattern(length, 100))
        assert disk.read(offset, length) == expected[offset : offset + length]
        assert disk.read(0, self.size) == expected

    @pytest.mark.parametrize("length", [1, 700, 4096, 70_000])
    def test_a_batch_is_what_its_requests_would_be(self, disk: Disk, length: int) -> None:
        batch.expect(1_000_000, writing=True)
        expected = bytearray(pattern(self.size, 7))
        disk.write(self.size // 2, expected[self.size // 2 :])
        expected[: self.size // 2] = bytes(self.size // 2)
        choose = random.Random(length)
        offsets = [number * length for number in choose.sample(range(self.size // length), min(64, self.size // length))]
        data = pattern(length * len(offsets), 100)
        disk.write_batch(offsets, data)
        for number, offset in enumerate(offsets):
            expected[offset : offset + length] = data[number * length : (number + 1) * length]
        assert disk.read(0, self.size) == expected
        assert disk.read_batch(offsets, length, bytearray(len(data))) == data

    def test_the_last_byte_can_be_written(self, disk: Disk) -> None:
        disk.write(self.size - 1, b"z")
        assert disk.read(self.size - 2, 2) == b"\0z"

    def test_runs_are_written_where_they_belong_and_nothing_between_them_is_touched(self, disk: Disk) -> None:
        expected = bytearray(pattern(self.size, 7))
        for written in (0, self.size):  # into nothing, and over what is there
            disk.write(0, expected[:written])
            expected = bytearray(disk.read(0, self.size))
            ranges = [(65_536, 131_072), (196_608, 1000), (262_144, 65_536), (self.size - 70_000, 70_000)]
            runs = [(offset, memoryview(pattern(length, offset))) for offset, length in ranges]
            for offset, data in runs:
                expected[offset : offset + len(data)] = data
            disk.write_runs(runs)
            assert disk.read(0, self.size) == expected

    def test_a_write_of_several_buffers_is_one_write(self, disk: Disk) -> None:
        (edge,) = disk.node.parents
        edge.write(513, [b"head", bytearray(b"-" * 1000), memoryview(b"tail"), b""])
        assert disk.read(512, 1010) == b"\0head" + b"-" * 1000 + b"tail\0"

    def test_a_write_of_more_buffers_than_a_system_call_takes_is_whole(self, disk: Disk) -> None:
        (edge,) = disk.node.parents
        edge.write(100, [bytes([1 + i % 255]) * 3 for i in range(3000)])
        assert disk.read(100, 9000) == b"".join(bytes([1 + i % 255]) * 3 for i in range(3000))

    @pytest.mark.parametrize("unmap", [False, True])
    @pytest.mark.parametrize(("offset", "length"), [*RANGES, (0, 1 << 20)])
    def test_zeroed_ranges_read_as_zero_and_their_neighbours_are_untouched(
        self, disk: Disk, offset: int, length: int, unmap: bool
    ) -> None:
        expected = bytearray(pattern(self.size))
        disk.write(0, expected)
        disk.write_zeroes(offset, length, unmap=unmap)
        expected[offset : offset + length] = bytes(length)
        assert disk.read(0, self.size) == expected

    @pytest.mark.parametrize(("offset", "length"), RANGES)
    def test_a_discard_leaves_everything_outside_as_it_was(self, disk: Disk, offset: int, length: int) -> None:
        content = pattern(self.size)
        disk.write(0, content)
        disk.discard(offset, length)
        assert disk.read(0, offset) == content[:offset]
        assert disk.read(offset + length, self.size - offset - length) == content[offset + length :]
        disk.write(offset, b"new")
        assert disk.read(offset, 3) == b"new"

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_random_operations_do_what_they_do_to_a_bytearray(self, disk: Disk, seed: int) -> None:
        rng = random.Random(seed)
        expected = bytearray(self.size)
        for step in range(120):
            offset = rng.randrange(self.size)
            length = min(self.size - offset, rng.choice((1, 512, 4096, 65_536, rng.randrange(1, 150_000))))
            match rng.choice(("write", "write", "zero", "unmap", "read", "flush")):
                case "write":
                    data = pattern(length, step)
                    disk.write(offset, data)
                    expected[offset : offset + length] = data
                case "zero":
                    disk.write_zeroes(offset, length)
                    expected[offset : offset + length] = bytes(length)
                case "unmap":
                    disk.write_zeroes(offset, length, unmap=True)
                    expected[offset : offset + length] = bytes(length)
                case "read":
                    assert disk.read(offset, length) == expected[offset : offset + length]
                case _:
                    disk.flush()
        assert disk.read(0, self.size) == expected

    def test_threads_that_write_side_by_side_do_not_disturb_each_other(self, disk: Disk) -> None:
        share = 1000  # not a multiple of anything: neighbours share sectors and clusters

        def work(number: int) -> bytes:
            rng = random.Random(number)
            mine = bytearray(share)
            for step in range(60):
                start = rng.randrange(share)
                n = rng.randrange(1, share - start + 1)
                if rng.random() < 0.3:
                    disk.write_zeroes(number * share + start, n, unmap=rng.random() < 0.5)
                    mine[start : start + n] = bytes(n)
                else:
                    mine[start : start + n] = pattern(n, number + step)
                    disk.write(number * share + start, mine[start : start + n])
                assert disk.read(number * share, share) == mine
            return bytes(mine)

        results = _in_threads(work, 8)
        assert disk.read(0, 8 * share) == b"".join(results)

    # -- where it lives -----------------------------------------------------------------------------------------------

    def test_runs_cover_the_node_and_make_progress(self, disk: Disk) -> None:
        disk.write(200_000, pattern(100_000))
        node = disk.node
        for offset, length in [(0, self.size), (199_999, 2), (299_999, 100_000), (self.size - 1, 1)]:
            position = offset
            while position < offset + length:
                kind, _child, _child_offset, n, _flags = node.resolve(position, offset + length - position)
                assert kind in range(4)
                assert 1 <= n <= offset + length - position
                position += n

    def test_what_is_reported_as_zero_reads_as_zero(self, disk: Disk) -> None:
        disk.write(70_000, pattern(5000))
        disk.write(self.size - 3, b"end")
        disk.write_zeroes(72_000, 1000, unmap=True)
        for extent in disk.extents():
            assert extent.data or extent.zero
            if extent.zero:
                assert disk.read(extent.offset, extent.length) == bytes(extent.length)

    def test_rows_say_what_the_runs_say(self, disk: Disk) -> None:
        if not table_kernels.family.load():
            pytest.skip("kernels are off, and there are rows only with them")
        disk.write(0, b"x")
        disk.write(500_000, pattern(1000))
        node = disk.node
        rows = Rows(1 << 12)
        node.resolve_rows(1000, self.size - 2000, rows)
        position = 1000
        for offset, length, place, word in rows:
            assert offset == position
            position += length
            done = 0
            while done < length:  # a single run may end where a table of the driver's does
                _kind, _child, child_offset, n, flags = node.resolve(offset + done, length - done)
                assert flags == word
                assert 1 <= n <= length - done
                assert place == -1 if not flags & FLAG_OFFSET_VALID else place + done == child_offset
                done += n
        assert position == self.size - 1000

    def test_kinds_and_flags_of_runs_agree(self, disk: Disk) -> None:
        disk.write(0, pattern(1000))
        disk.flush()
        position = 0
        while position < self.size:
            kind, child, _child_offset, n, flags = disk.node.resolve(position, self.size - position)
            if not flags & FLAG_RAW:
                assert not (kind == KIND_ZERO and flags & FLAG_DATA)
                assert not (kind == KIND_DATA and flags & FLAG_ZERO)
            has_place = kind == KIND_DATA or flags & FLAG_OFFSET_VALID
            assert (child is None) == (disk.node.is_leaf or not has_place)
            position += n

    # -- size ---------------------------------------------------------------------------------------------------------

    def test_what_a_node_gains_reads_as_zero(self, disk: Disk) -> None:
        self._needs_resize()
        disk.write(0, pattern(self.size))
        disk.truncate(self.size + 300_032)
        assert disk.size == self.size + 300_032
        assert disk.read(self.size - 1, 300_033) == pattern(self.size)[-1:] + bytes(300_032)

    def test_what_was_cut_off_does_not_come_back(self, disk: Disk) -> None:
        self._needs_resize()
        disk.write(0, pattern(self.size))
        disk.truncate(5120, shrink=True)
        assert disk.size == 5120
        disk.truncate(self.size)
        assert disk.read(0, self.size) == pattern(5120) + bytes(self.size - 5120)

    def test_an_odd_size_is_kept(self, disk: Disk) -> None:
        self._needs_resize()
        if not self.is_exact:
            pytest.skip("sizes are rounded up to sectors")
        disk.write(0, pattern(self.size))
        disk.truncate(12_345, shrink=True)
        disk.truncate(54_321)
        assert disk.size == 54_321
        assert disk.read(0, 54_321) == pattern(12_345) + bytes(54_321 - 12_345)

    def test_a_node_can_become_empty(self, disk: Disk) -> None:
        self._needs_resize()
        disk.write(0, pattern(1000))
        disk.truncate(0, shrink=True)
        assert (disk.size, disk.read(0, 0), list(disk.extents())) == (0, b"", [])

    def _needs_resize(self) -> None:
        if not self.can_resize:
            pytest.skip("the size of this node is fixed")

    # -- opening and closing ------------------------------------------------------------------------------------------

    def test_content_survives_closing(self, tmp_path: Path) -> None:
        node = self.make(tmp_path)
        with Disk(node, "r+") as disk:
            disk.write(100, pattern(70_000))
            disk.write_zeroes(1000, 60_000, unmap=True)
        again = self.open_again(tmp_path, read_only=True)
        if again is None:
            pytest.skip("nothing is left of it")
        with Disk(again, "r") as disk:
            assert disk.size == self.size
            expected = bytearray(pattern(70_000))
            expected[900:60_900] = bytes(60_000)
            assert disk.read(100, 70_000) == expected
            assert disk.read(0, 100) == bytes(100)

    def test_a_node_opened_for_reading_refuses_to_change(self, tmp_path: Path) -> None:
        with Disk(self.make(tmp_path), "r+") as disk:
            disk.write(0, b"kept")
        node = self.open_again(tmp_path, read_only=True)
        if node is None:
            pytest.skip("nothing is left of it")
        with Disk(node, "r") as disk:
            (edge,) = node.parents
            with pytest.raises(BlocklibError):
                edge.write(0, [b"lost"])
            with pytest.raises(BlocklibError):
                edge.write_zeroes(0, 65_536, unmap=False)
            with pytest.raises(BlocklibError):
                edge.truncate(512)
            assert disk.read(0, 4) == b"kept"

    def test_a_reopen_changes_the_mode_and_keeps_the_content(self, tmp_path: Path) -> None:
        with Disk(self.make(tmp_path), "r+") as disk:
            disk.write(0, b"before")
        node = self.open_again(tmp_path, read_only=True)
        if node is None:
            pytest.skip("nothing is left of it")
        with Disk(node, "r") as disk:
            (edge,) = node.parents
            with Transaction() as change:
                change.reopen(node, read_only=False)
            assert not node.read_only
            edge.write(0, [b"after!"])
            with Transaction() as change:
                change.reopen(node, read_only=True)
            assert node.read_only
            assert disk.read(0, 6) == b"after!"

    def test_a_reopen_that_is_undone_leaves_the_node_as_it_was(self, tmp_path: Path) -> None:
        with Disk(self.make(tmp_path), "r+") as disk:
            disk.write(0, b"before")
            disk.flush()
            node = disk.node
            node.prepare_reopen(read_only=True).abort()
            assert not node.read_only
            disk.write(0, b"after!")
            assert disk.read(0, 6) == b"after!"

    def test_closing_releases_the_children(self, tmp_path: Path) -> None:
        node = self.make(tmp_path)
        children = [edge.node for edge in node.children.values()]
        Disk(node, "r+").close()
        assert not node.children
        assert not any(child.parents for child in children)


def _in_threads(work: Callable[[int], bytes], count: int) -> list[bytes]:
    """The results of `work(0)` to `work(count - 1)`, each run in its own thread; the first error is raised."""
    results: dict[int, bytes] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]
