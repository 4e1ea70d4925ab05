"""Filters in the graph: content passes unchanged, and they come and go under live requests."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, OptionError, ThrottleGroup, UsageError

SIZE = 4 * MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2")
    return path


def _qcow2(path: Path) -> Mapping[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


def _throttled(path: Path, **limits: int) -> dict[str, Any]:
    return {"driver": "throttle", "throttle-group": ThrottleGroup(limits), "file": _qcow2(path)}


def test_a_filter_named_in_the_target_passes_everything(path: Path) -> None:
    data = random.Random(1).randbytes(200 * KiB)
    with blocklib.open(_throttled(path), "r+", discard="unmap") as disk:
        disk.write(12345, data)
        disk.write_zeroes(1 * MiB, 64 * KiB)
        disk.discard(12 * KiB, 4 * KiB)
        disk.flush()
        assert disk.read(12345, len(data)) == data
        assert disk.size == SIZE
        assert disk.info().format == "qcow2"
        assert [node.driver for node in disk.chain()] == ["qcow2"]
        extents = list(disk.extents())
        disk.truncate(2 * SIZE)
    with blocklib.open(path, format="qcow2") as disk:
        assert disk.read(12345, len(data)) == data
        assert disk.size == 2 * SIZE
        assert list(disk.extents(0, SIZE)) == extents
    assert blocklib.check(path, format="qcow2").clean


def test_a_filter_below_a_format_passes_everything(path: Path) -> None:
    group = ThrottleGroup()
    file: dict[str, Any] = {"driver": "throttle", "throttle-group": group, "file": {"driver": "file", "filename": str(path)}}
    with blocklib.open({"driver": "qcow2", "file": file}, "r+") as disk:
        disk.write(65000, b"x" * 70000)
        assert disk.read(65000, 70000) == b"x" * 70000
    assert blocklib.check(path, format="qcow2").clean


def test_the_images_verbs_reach_through_a_filter(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.insert_filter("throttle", {"throttle-group": ThrottleGroup()})
        disk.write(0, b"before")
        disk.snapshots.create("one")
        bitmap = disk.bitmaps.add("dirty")
        disk.write(0, b"after!")
        assert bitmap.count > 0
        disk.snapshots["one"].apply()
        assert disk.read(0, 6) == b"before"


def test_filters_come_and_go_under_live_requests(path: Path) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(first: int) -> None:
        rng = random.Random(first)
        model = bytearray(MiB)
        try:
            while not stop.is_set():
                offset, length = rng.randrange(MiB - 9000), rng.randrange(1, 9000)
                data = rng.randbytes(length)
                disk.write(first + offset, data)
                model[offset : offset + length] = data
                if disk.read(first + offset, length) != data:
                    raise AssertionError(f"other bytes at {first + offset}")
            assert disk.read(first, MiB) == model
        except BaseException as exc:
            failures.append(exc)

    group = ThrottleGroup({"iops-total": 5000})
    with blocklib.open(path, "r+") as disk:
        threads = [threading.Thread(target=work, args=(number * MiB,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            outer = disk.insert_filter("throttle", {"throttle-group": group})
            inner = disk.insert_filter("throttle", {"throttle-group": group})
            outer.remove()
            inner.remove()
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert disk.node.parents[0].parent is None


def test_a_drain_does_not_wait_for_the_limits(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        group = ThrottleGroup({"bps-total": 1})  # one byte a second: the second request would wait for a day
        throttle = disk.insert_filter("throttle", {"throttle-group": group})
        disk.write(0, b"x" * 65536)
        entered = threading.Event()

        def write() -> None:
            entered.set()
            disk.write(65536, b"y" * 65536)

        thread = threading.Thread(target=write)
        thread.start()
        entered.wait(30)
        throttle.remove()
        thread.join(30)
        assert not thread.is_alive()
        assert disk.read(65536, 1) == b"y"
        with pytest.raises(UsageError, match="any more"):
            throttle.remove()


def test_closing_does_not_wait_for_the_limits(path: Path) -> None:
    disk = blocklib.open(_throttled(path, **{"bps-write": 1}), "r+")
    disk.write(0, b"x" * 65536)
    thread = threading.Thread(target=lambda: disk.write(0, b"z" * 65536))
    thread.start()
    disk.close()
    thread.join(30)
    assert not thread.is_alive()


def test_what_is_no_filter_or_no_group_is_refused(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        with pytest.raises(OptionError, match="no filter"):
            disk.insert_filter("qcow2", {})
        with pytest.raises(OptionError, match="'file' is the disk"):
            disk.insert_filter("copy-on-read", {"file.filename": "other"})
        with pytest.raises(OptionError, match="ThrottleGroup"):
            disk.insert_filter("throttle", {"throttle-group": "name"})
        with pytest.raises(OptionError, match="required"):
            disk.insert_filter("throttle", {})
        assert disk.node.parents[0].parent is None


def test_a_throttle_group_does_not_pickle() -> None:
    import pickle

    with pytest.raises(TypeError, match="worker"):
        pickle.dumps(ThrottleGroup())
