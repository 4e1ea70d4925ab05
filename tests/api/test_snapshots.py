"""Task 8 of the API page: internal snapshots."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.policy import Limits
from blocklib.snapshots import InternalSnapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    blocklib.create(tmp_path / "disk.qcow2", 4 * MiB, format="qcow2")
    return tmp_path / "disk.qcow2"


def test_task_8_internal_snapshots(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"old")
        snapshot = disk.snapshots.create("before-upgrade")
        assert isinstance(snapshot, InternalSnapshot)
        assert (snapshot.name, snapshot.id, snapshot.vm_state_size, snapshot.size) == ("before-upgrade", "1", 0, 4 * MiB)
        assert snapshot.created.tzinfo is UTC
        assert abs(datetime.now(UTC) - snapshot.created) < timedelta(minutes=5)
        disk.write(0, b"new")
        assert [(one.id, one.name) for one in disk.snapshots] == [("1", "before-upgrade")]
        assert disk.snapshots.by_id("1").name == "before-upgrade"
        assert "before-upgrade" in disk.snapshots
        assert snapshot in disk.snapshots
        assert "1" not in disk.snapshots
        assert len(disk.snapshots) == 1
        disk.snapshots["before-upgrade"].apply()
        assert disk.read(0, 3) == b"old"
        disk.write(0, b"new")
    with blocklib.open(path, options={"snapshot.name": "before-upgrade"}) as past:
        assert past.read(0, 3) == b"old"
    (info,) = blocklib.info(path).snapshots
    assert info == snapshot.info
    with blocklib.open(path, "r+") as disk:
        snapshot = disk.snapshots["before-upgrade"]
        snapshot.delete()
        assert snapshot not in disk.snapshots
        assert not disk.snapshots
        assert disk.read(0, 3) == b"new"
        with pytest.raises(blocklib.NameNotFoundError):
            snapshot.apply()
        with pytest.raises(blocklib.NameNotFoundError):
            snapshot.delete()


def test_what_is_not_there_is_also_a_key_error(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        for look in (disk.snapshots.__getitem__, disk.snapshots.by_id):
            with pytest.raises(KeyError) as caught:
                look("x")
            assert isinstance(caught.value, blocklib.NameNotFoundError)
            assert "'x'" in str(caught.value)
        with pytest.raises(blocklib.UsageError):
            disk.snapshots[0]  # type: ignore[index]
    with pytest.raises(blocklib.NameNotFoundError, match="'x'"):
        blocklib.open(path, options={"snapshot.name": "x"})


def test_names_need_not_differ_but_ids_do(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        first = disk.snapshots.create("same")
        disk.write(0, b"x")
        second = disk.snapshots.create("same")
        assert (first.id, second.id) == ("1", "2")
        second.delete()
        assert disk.snapshots["same"].id == "1"
        assert disk.snapshots.create("same").id == "2"
        disk.snapshots.by_id("1").delete()
        assert disk.snapshots.create("other").id == "3"


def test_a_snapshot_has_the_size_that_its_disk_had(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"a" * KiB)
        disk.snapshots.create("small")
        disk.truncate(1 << 40)
        disk.write(1 << 39, b"far")
        disk.snapshots.create("large")
        with pytest.raises(blocklib.UnsupportedFeatureError, match="small"):
            disk.truncate(MiB, shrink=True)
        disk.snapshots["small"].apply()
        assert disk.size == 4 * MiB
        disk.snapshots["large"].apply()
        assert disk.size == 1 << 40
        assert disk.read(1 << 39, 3) == b"far"
    with blocklib.open(path, options={"snapshot.id": "1"}) as past:
        assert past.size == 4 * MiB
        assert past.info().virtual_size == 4 * MiB
    assert blocklib.info(path, options={"snapshot.id": "1"}).virtual_size == 4 * MiB
    with blocklib.open(path, options={"snapshot.id": "1"}) as past:
        assert past.read(0, 4 * MiB) == b"a" * KiB + bytes(4 * MiB - KiB)


def test_a_snapshot_is_only_read(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.snapshots.create("x")
    with pytest.raises(blocklib.UsageError, match="only be read"):
        blocklib.open(path, "r+", options={"snapshot.name": "x"})
    with blocklib.open(path) as disk:
        for change in (lambda: disk.snapshots.create("y"), disk.snapshots["x"].apply, disk.snapshots["x"].delete):
            with pytest.raises(blocklib.ReadOnlyError):
                change()
    with blocklib.open(path, "r+") as disk:
        assert len(disk.snapshots) == 1


def test_formats_without_snapshots_have_none(tmp_path: Path) -> None:
    raw = tmp_path / "disk.img"
    raw.write_bytes(bytes(KiB))
    with blocklib.open(raw, "r+", format="raw") as disk:
        assert list(disk.snapshots) == []
        with pytest.raises(blocklib.UnsupportedFeatureError, match="internal snapshots in the format raw"):
            disk.snapshots.create("x")
        with pytest.raises(blocklib.StorageError):
            disk.snapshots.write_vm_state(0, b"x")
    with pytest.raises(blocklib.OptionError):
        blocklib.open(raw, format="raw", options={"snapshot.name": "x"})


def test_snapshots_of_an_image_over_others(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "base.qcow2", MiB, format="qcow2")
    with blocklib.open(tmp_path / "base.qcow2", "r+") as disk:
        disk.write(0, b"base" * KiB)
    top = tmp_path / "top.qcow2"
    blocklib.create(top, MiB, format="qcow2", backing=tmp_path / "base.qcow2", backing_format="qcow2")
    with blocklib.open(top, "r+", format="qcow2", references="allow") as disk:
        disk.write(1, b"top")
        disk.snapshots.create("x")
        disk.write_zeroes(0, MiB)
        disk.snapshots["x"].apply()
        assert disk.read(0, 8) == b"btopbase"


def test_vm_state_lies_beside_the_disk(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.snapshots.write_vm_state(3, b"state")
        assert disk.snapshots.read_vm_state(0, 10) == bytes(3) + b"state" + bytes(2)
        disk.snapshots.create("vm")
        disk.snapshots.write_vm_state(0, b"other state")
        assert disk.read(0, disk.size) == bytes(disk.size)
        with pytest.raises(blocklib.ImageLimitError):
            disk.snapshots.write_vm_state(1 << 60, b"x")
        with pytest.raises(blocklib.OutOfRangeError):
            disk.snapshots.read_vm_state(-1, 1)
    with blocklib.open(path, options={"snapshot.name": "vm"}) as past:
        assert past.snapshots.read_vm_state(0, 10) == bytes(3) + b"state" + bytes(2)
        with pytest.raises(blocklib.ReadOnlyError):
            past.snapshots.write_vm_state(0, b"x")


def test_requests_wait_while_a_snapshot_is_made(path: Path) -> None:
    """Writers never see a half-made snapshot: each holds either the old or the new value of a pair written together."""
    with blocklib.open(path, "r+") as disk:
        stop = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            number = 0
            try:
                while not stop.is_set():
                    number += 1
                    disk.write(64 * KiB - 4, number.to_bytes(4, "big") * 2)  # one request, two clusters
            except BaseException as exc:
                failures.append(exc)

        writer = threading.Thread(target=write)
        writer.start()
        names = [f"{number}" for number in range(12)]
        for name in names:
            disk.snapshots.create(name)
            if name in ("4", "8"):
                disk.snapshots["1"].apply()
        stop.set()
        writer.join()
        assert not failures
    for name in names:
        with blocklib.open(path, options={"snapshot.name": name}) as past:
            pair = past.read(64 * KiB - 4, 8)
            assert pair[:4] == pair[4:]


def test_the_limit_is_the_callers(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        for name in "abc":
            disk.snapshots.create(name)
    with pytest.raises(blocklib.ImageLimitError):
        blocklib.open(path, limits=Limits(snapshots=2))


def test_space_of_a_deleted_snapshot_goes_back_to_the_host(path: Path) -> None:
    sizes = {}
    for passes in (True, False):
        blocklib.create(path, 4 * MiB, format="qcow2", overwrite=True)
        with blocklib.open(path, "r+", options={"pass-discard-snapshot": passes}) as disk:
            disk.write(0, b"x" * (2 * MiB))
            snapshot = disk.snapshots.create("x")
            disk.write(0, b"y" * (2 * MiB))
            disk.flush()
            before = disk.info().actual_size
            snapshot.delete()
            after = disk.info().actual_size
        assert before is not None
        assert after is not None
        sizes[passes] = before - after
    assert sizes[False] < MiB
    assert sizes[True] >= 2 * MiB or sizes[True] == sizes[False]  # a file system without holes


def test_a_snapshot_and_its_collection_say_what_they_are(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        assert repr(disk.snapshots) == "<Snapshots: none>"
        snapshot = disk.snapshots.create("x")
        assert repr(disk.snapshots) == "<Snapshots: 'x'>"
        assert repr(snapshot).startswith("<InternalSnapshot 1: 'x' of 20")
