"""The filter copy-before-write: its target is the disk as it was when the filter came to stand there."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import GraphConflictError, KiB, MiB, OptionError, OutOfRangeError, StorageError
from blocklib.filters.copy_before_write import CopyBeforeWriteNode
from blocklib.protocols.memory import MemoryNode
from tests.writers import writing

SIZE = 4 * MiB
CONTENT = random.Random(5).randbytes(3 * MiB) + bytes(1 * MiB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        disk.write(0, CONTENT[: 3 * MiB])
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "target.qcow2"
    blocklib.create(target, SIZE, format="qcow2")
    return target


def _qcow2(path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options}


def _present(path: Path) -> list[tuple[int, int]]:
    with blocklib.open(path, format="qcow2") as disk:
        return [(extent.offset, extent.length) for extent in disk.extents() if extent.present]


def _point_in_time(disk: blocklib.Disk, target: blocklib.Disk) -> bytes:
    """What the target holds, and elsewhere what the disk still is."""
    whole = bytearray(disk.read(0, SIZE))
    for extent in target.extents():
        if extent.present:
            whole[extent.offset : extent.offset + extent.length] = target.read(extent.offset, extent.length)
    return bytes(whole)


def test_what_is_about_to_be_overwritten_is_in_the_target_and_nothing_else(path: Path, target: Path) -> None:
    options: dict[str, Any] = {"driver": "copy-before-write", "file": _qcow2(path), "target": _qcow2(target)}
    with blocklib.open(options, "r+", discard="unmap") as disk:
        disk.write(70_000, b"new")
        disk.write_zeroes(256 * KiB, 64 * KiB)
        disk.discard(512 * KiB, 64 * KiB)
        disk.write(70_000, b"newer")
        assert disk.read(70_000, 5) == b"newer"
        assert [node.driver for node in disk.chain()] == ["qcow2"]
    assert _present(target) == [(64 * KiB, 64 * KiB), (256 * KiB, 64 * KiB), (512 * KiB, 64 * KiB)]
    with blocklib.open(target) as copy:
        for offset in (64 * KiB, 256 * KiB, 512 * KiB):
            assert copy.read(offset, 64 * KiB) == CONTENT[offset : offset + 64 * KiB]
    assert blocklib.check(target, format="qcow2").clean


def test_an_open_disk_is_lent_as_target_and_read_meanwhile(path: Path, target: Path) -> None:
    with blocklib.open(path, "r+") as disk, blocklib.open(target, "r+") as copy:
        cbw = disk.insert_filter("copy-before-write", {"target": copy})
        disk.write(0, b"new" * 100)
        assert copy.read(0, 64 * KiB) == CONTENT[: 64 * KiB]
        cbw.remove()
        disk.write(MiB, b"later")
        copy.write(MiB, b"mine again")
        assert not copy.read(2 * MiB, KiB).strip(b"\0")
    with blocklib.open(target) as copy:
        assert copy.read(MiB, 10) == b"mine again"


def test_a_lent_disk_may_be_closed_before_the_filter_is_gone(path: Path, target: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        copy = blocklib.open(target, "r+")
        cbw = disk.insert_filter("copy-before-write", {"target": copy})
        copy.close()
        disk.write(0, b"new")
        cbw.remove()
        with blocklib.open(target, "r+") as copy:
            assert copy.read(0, 64 * KiB) == CONTENT[: 64 * KiB]


def test_the_instant_is_kept_under_writers(path: Path, target: Path) -> None:
    model = bytearray(CONTENT)
    with blocklib.open(path, "r+", format="qcow2", discard="unmap") as disk, blocklib.open(target, "r+") as copy:
        cbw = disk.insert_filter("copy-before-write", {"target": copy})
        with writing(disk, model, 3) as writers:
            writers.wait_for(200)
        assert disk.read(0, SIZE) == model
        assert _point_in_time(disk, copy) == CONTENT
        cbw.remove()


def test_only_what_a_bitmap_marks_is_kept(path: Path, target: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        bitmap = disk.bitmaps.add("since", granularity=64 * KiB)
        disk.write(MiB, b"marked")
        cbw = disk.insert_filter("copy-before-write", {"target": _qcow2(target), "bitmap.name": "since"})
        bitmap.remove()  # the filter has its own copy of it
        disk.write(0, b"not kept")
        disk.write(MiB, b"kept")
        cbw.remove()
        with pytest.raises(blocklib.NameNotFoundError, match="gone"):
            disk.insert_filter("copy-before-write", {"target": _qcow2(target), "bitmap.name": "gone"})
        with pytest.raises(OptionError, match=r"bitmap\.name"):
            disk.insert_filter("copy-before-write", {"target": _qcow2(target), "bitmap.node": "gone"})
    assert _present(target) == [(MiB, 64 * KiB)]
    with blocklib.open(target) as copy:
        assert copy.read(MiB, 6) == b"marked"


def test_a_disk_that_shrinks_and_grows_is_kept_as_it_was(path: Path, target: Path) -> None:
    with blocklib.open(path, "r+") as disk, blocklib.open(target, "r+") as copy:
        cbw = disk.insert_filter("copy-before-write", {"target": copy})
        disk.truncate(2 * MiB, shrink=True)
        disk.truncate(2 * SIZE)
        disk.write(SIZE + MiB, b"behind the end of the copy")
        disk.write(SIZE - 5, b"across the end of it")
        disk.write(0, b"first")
        assert copy.read(0, 64 * KiB) == CONTENT[: 64 * KiB]
        assert copy.read(2 * MiB, 2 * MiB) == CONTENT[2 * MiB :]
        cbw.remove()


def test_what_cannot_be_a_target_is_refused_and_changes_nothing(path: Path, target: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.qcow2"
    blocklib.create(small, SIZE - MiB, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        with pytest.raises(OutOfRangeError, match="target"):
            disk.insert_filter("copy-before-write", {"target": _qcow2(small)})
        with pytest.raises(OptionError, match="target"):
            disk.insert_filter("copy-before-write", {})
        with pytest.raises(OptionError, match="on-cbw-error"):
            disk.insert_filter("copy-before-write", {"target": _qcow2(target), "on-cbw-error": "ignore"})
        with pytest.raises(OptionError, match="cbw-timeout"):
            disk.insert_filter("copy-before-write", {"target": _qcow2(target), "cbw-timeout": "soon"})
        with blocklib.open(target) as copy, pytest.raises(blocklib.ReadOnlyError, match="target"):
            disk.insert_filter("copy-before-write", {"target": copy})
        with pytest.raises(GraphConflictError):
            disk.insert_filter("copy-before-write", {"target": disk})
        assert disk.node.parents[0].parent is None
        disk.write(0, b"still works")
    blocklib.open(small, "r+").close()


def test_a_disk_opened_for_reading_needs_no_writable_target(path: Path, target: Path) -> None:
    options: dict[str, Any] = {"driver": "copy-before-write", "file": _qcow2(path), "target": _qcow2(target)}
    with blocklib.open(options) as disk, blocklib.open(target) as copy:
        assert disk.read(0, SIZE) == CONTENT
        assert copy.size == SIZE


# -- a target that fails ------------------------------------------------------------------------------------------------


class _Failing(MemoryNode):
    """Writes fail while `broken`, and wait for `gate`."""

    broken = True
    gate: threading.Event | None = None

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.broken:
            raise StorageError("no", errno=errno.ENOSPC, operation="write", node=self.name)
        super().pwritev(offset, views)


def _filtered(disk: blocklib.Disk, node: MemoryNode, **options: Any) -> tuple[blocklib.Disk, Any, CopyBeforeWriteNode]:
    copy = blocklib.Disk(node, "r+")
    cbw = disk.insert_filter("copy-before-write", {"target": copy, **options})
    assert isinstance(cbw.node, CopyBeforeWriteNode)
    return copy, cbw, cbw.node


def test_a_write_whose_copy_fails_fails_and_may_be_tried_again(path: Path) -> None:
    failing = _Failing(None, SIZE)
    with blocklib.open(path, "r+") as disk:
        copy, cbw, node = _filtered(disk, failing)
        with copy:
            with pytest.raises(StorageError):
                disk.write(0, b"new")
            assert disk.read(0, 3) == CONTENT[:3]
            assert node.failure is None
            failing.broken = False
            disk.write(0, b"new")
            assert copy.read(0, 64 * KiB) == CONTENT[: 64 * KiB]
            cbw.remove()


def test_a_snapshot_may_break_so_that_no_write_fails(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        copy, cbw, node = _filtered(disk, _Failing(None, SIZE), **{"on-cbw-error": "break-snapshot"})
        with copy:
            disk.write(0, b"new")
            disk.write_zeroes(MiB, MiB)
            assert disk.read(0, 3) == b"new"
            assert isinstance(node.failure, StorageError)
            cbw.remove()


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_a_copy_that_takes_too_long_counts_as_failed_and_is_waited_for_before_the_graph_changes(
    path: Path, policy: str
) -> None:
    slow = _Failing(None, SIZE)
    slow.broken = False
    slow.gate = threading.Event()
    with blocklib.open(path, "r+") as disk:
        copy, cbw, node = _filtered(disk, slow, **{"on-cbw-error": policy, "cbw-timeout": 1})
        with copy:
            if policy == "break-snapshot":
                disk.write(0, b"new")
                assert isinstance(node.failure, StorageError)
                assert node.failure.errno == errno.ETIMEDOUT
            else:
                with pytest.raises(StorageError) as caught:
                    disk.write(0, b"new")
                assert caught.value.errno == errno.ETIMEDOUT
                assert disk.read(0, 3) == CONTENT[:3]
            remover = threading.Thread(target=cbw.remove)
            remover.start()
            slow.gate.set()
            remover.join(60)
            assert not remover.is_alive()
            if policy == "break-guest-write":
                assert copy.read(0, 64 * KiB) == CONTENT[: 64 * KiB]
            disk.write(0, b"free")


def test_copies_in_time_are_copies(path: Path, target: Path) -> None:
    model = bytearray(CONTENT)
    with blocklib.open(path, "r+", format="qcow2") as disk, blocklib.open(target, "r+") as copy:
        disk.insert_filter("copy-before-write", {"target": copy, "cbw-timeout": 60})
        with writing(disk, model, 2) as writers:
            writers.wait_for(60)
        assert disk.read(0, SIZE) == model
        assert _point_in_time(disk, copy) == CONTENT


def test_a_filter_that_ends_with_a_write_to_what_it_borrowed_can_make_it(path: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(MiB)
    with blocklib.open(path, "r+") as disk, blocklib.open(tmp_path / "log", "r+", format="raw") as log:
        logged = disk.insert_filter("blklogwrites", {"log": log})
        disk.write(0, b"logged")
        logged.remove()
        assert int.from_bytes(log.read(16, 8), "little") == 1  # entries, by the superblock
        log.write(0, b"mine again")
