"""Reading from where data was found to live, for as long as it is certain that it still lives there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, graph
from blocklib.disk import Disk
from blocklib.errors import StorageError
from blocklib.filters.throttle import ThrottleNode
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.places import Places
from blocklib.protocols.file import FileNode
from blocklib.throttling import ThrottleGroup


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, bytes]:
    """Three images, the lowest of them raw and shorter, with parts of each showing."""
    content = bytearray(4 * MiB)
    base = os.urandom(2 * MiB + 512)
    (tmp_path / "base.raw").write_bytes(base)
    content[: len(base)] = base
    below, kind = "base.raw", "raw"
    for name in ("mid.qcow2", "top.qcow2"):
        blocklib.create(tmp_path / name, 4 * MiB, format="qcow2", backing=below, backing_format=kind)
        below, kind = name, "qcow2"
        with blocklib.open(tmp_path / name, "r+", format="qcow2", references="allow") as disk:
            for offset, length in ((len(name) * 100 * KiB, 64 * KiB), (3 * MiB - len(name) * 1000, 70_000)):
                data = os.urandom(length)
                disk.write(offset, data)
                content[offset : offset + length] = data
            disk.write_zeroes(len(name) * 10 * KiB, 100 * KiB)
            content[len(name) * 10 * KiB :][: 100 * KiB] = content[len(name) * 10 * KiB : len(name) * 10 * KiB + 100 * KiB]
            content[len(name) * 10 * KiB : len(name) * 10 * KiB + 100 * KiB] = bytes(100 * KiB)
    return tmp_path / "top.qcow2", bytes(content)


def known(disk: Disk) -> Places:
    places = Places(disk.node)
    for _rows in places.remember(disk.row_windows()):
        pass
    return places


def read_at(disk: Disk, places: Places, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_placed([(offset, memoryview(buffer))], places)
    return bytes(buffer)


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a qcow2 image was asked where something is."""
    count = 0
    resolve = Qcow2Node.resolve

    def counted(self: Qcow2Node, offset: int, length: int) -> object:
        nonlocal count
        count += 1
        return resolve(self, offset, length)

    monkeypatch.setattr(Qcow2Node, "resolve", counted)
    return lambda: count


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_what_is_remembered_is_read_without_looking_it_up(
    chain: tuple[Path, bytes], mode: str, lookups: Callable[[], int]
) -> None:
    path, content = chain
    with blocklib.open(path, mode, format="qcow2", references="allow") as disk:  # type: ignore[arg-type]
        places = known(disk)
        before = lookups()
        assert read_at(disk, places, 0, disk.size) == content
        for offset in range(0, disk.size - 5000, 99_999):
            assert read_at(disk, places, offset, 5000) == content[offset : offset + 5000]
        assert lookups() == before


def test_many_runs_are_read_at_once(chain: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = chain
    monkeypatch.setattr("blocklib.places._MANY", 2)
    with blocklib.open(path, format="qcow2", references="allow") as disk:
        places = known(disk)
        buffer = bytearray(disk.size)
        runs = [(start, memoryview(buffer)[start : start + 10_000]) for start in range(0, disk.size - 10_000, 30_000)]
        disk.read_placed(runs, places)
        for start, view in runs:
            assert view == content[start : start + 10_000]


def test_a_read_that_fails_in_a_batch_is_raised_as_it_would_be_alone(
    chain: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _content = chain
    monkeypatch.setattr("blocklib.places._MANY", 1)

    def transfer(_self: object, _offsets: object, _addresses: object, _lengths: object, results: Any, **_: object) -> None:
        results[0] = errno.EIO

    def preadv(_self: object, _offset: int, _views: object) -> None:
        raise StorageError("a bad sector", errno=errno.EIO, operation="preadv")

    with blocklib.open(path, format="qcow2", references="allow") as disk:
        places = known(disk)
        monkeypatch.setattr(FileNode, "transfer", transfer)
        monkeypatch.setattr(FileNode, "preadv", preadv)
        with pytest.raises(StorageError, match="a bad sector"):
            read_at(disk, places, 0, disk.size)


def changes() -> Iterator[Callable[[Disk], object]]:
    yield lambda disk: disk.write(1 * MiB, b"n" * 128 * KiB)
    yield lambda disk: disk.write_runs([(3 * MiB + 512 * KiB, memoryview(b"n" * 128 * KiB))])
    yield lambda disk: disk.write_zeroes(600 * KiB, 2 * MiB, unmap=True)
    yield lambda disk: disk.snapshots.create("s")
    yield lambda disk: disk.truncate(5 * MiB)
    yield lambda disk: disk.write_compressed(3 * MiB + 512 * KiB, bytes(1000) * 64 + bytes(1536))
    yield lambda disk: blocklib.commit(disk, empty=True)
    yield lambda disk: blocklib.rebase(disk, "base.raw", backing_format="raw")


@pytest.mark.parametrize("change", list(changes()))
def test_after_a_change_all_is_looked_up_again(chain: tuple[Path, bytes], change: Callable[[Disk], object]) -> None:
    path, _content = chain
    with blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap") as disk:
        places = known(disk)
        change(disk)
        disk.flush()
        disk.write(0, os.urandom(4 * MiB))  # takes what has become free
        assert read_at(disk, places, 0, 4 * MiB) == disk.read(0, 4 * MiB)


def test_what_was_never_found_is_looked_up(chain: tuple[Path, bytes]) -> None:
    path, content = chain
    with blocklib.open(path, format="qcow2", references="allow") as disk:
        places = Places(disk.node)
        assert read_at(disk, places, 0, MiB) == content[:MiB]
        for _rows in places.remember(disk.row_windows(MiB, MiB)):
            pass
        assert read_at(disk, places, MiB // 2, 3 * MiB) == content[MiB // 2 : MiB // 2 + 3 * MiB]


def test_compressed_and_encrypted_data_is_read_by_its_image(tmp_path: Path) -> None:
    data = (b"some text " * 7000)[: 64 * KiB]
    blocklib.create(tmp_path / "c.qcow2", MiB, format="qcow2")
    with blocklib.open(tmp_path / "c.qcow2", "r+", format="qcow2") as disk:
        disk.write_compressed(64 * KiB, data)
        assert read_at(disk, known(disk), 64 * KiB, 64 * KiB) == data


def test_a_filter_is_not_read_past(chain: tuple[Path, bytes], lookups: Callable[[], int]) -> None:
    path, content = chain
    with blocklib.open(path, format="qcow2", references="allow") as disk:
        places = known(disk)
        node = ThrottleNode(None, None, read_only=True, group=ThrottleGroup())
        with graph.drained(disk.node), graph.Transaction() as change:
            root = disk.node.parents[-1]
            change.attach(node, "file", disk.node)
            change.redirect(root, node)
        for remembered in (places, known(disk)):
            before = lookups()
            assert read_at(disk, remembered, 0, disk.size) == content
            assert lookups() > before


def test_only_images_above_the_base_are_remembered(chain: tuple[Path, bytes]) -> None:
    path, content = chain
    with blocklib.open(path, format="qcow2", references="allow") as disk:
        base = disk.chain()[1]
        places = Places(disk.node, graph.chain(disk.node)[1])
        for _rows in places.remember(disk.row_windows(base=base)):
            pass
        for extent in disk.extents(base=base):
            left = places.read(disk.node, [(extent.offset, memoryview(bytearray(extent.length)))])
            assert bool(left) != (extent.present or extent.zero)
        assert read_at(disk, places, 0, disk.size) == content


def test_what_is_pinned_is_read_where_it_was_whatever_is_written_meanwhile(chain: tuple[Path, bytes]) -> None:
    path, content = chain
    with blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap") as disk:
        places = Places(disk.node)
        with places.pinned():
            for _rows in places.remember(disk.row_windows()):
                pass
            disk.discard(0, disk.size)
            disk.flush()
            disk.write(0, os.urandom(4 * MiB))  # would take what has become free
            assert read_at(disk, places, 0, 4 * MiB) == content
        assert read_at(disk, places, 0, 4 * MiB) == disk.read(0, 4 * MiB)
