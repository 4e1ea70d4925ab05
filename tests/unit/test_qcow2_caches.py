"""The metadata caches: what they hold at most, and for how long."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.formats.qcow2.node import Qcow2Node

TiB = 1 << 40


def _node(disk: blocklib.Disk) -> Qcow2Node:
    assert isinstance(disk.node, Qcow2Node)
    return disk.node


def test_a_small_cache_keeps_a_large_image_within_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    blocklib.create(path, 16 * TiB, format="qcow2")
    choose = random.Random(1)
    places = sorted(choose.randrange(16 * TiB // (64 * KiB)) * 64 * KiB for _ in range(600))
    options: dict[str, Any] = {"l2-cache-size": "1M", "l2-cache-entry-size": "4k", "refcount-cache-size": "1M"}
    most = [0, 0]

    def look() -> None:
        for number, cache in enumerate((node.mapping.cache, node.refcounts.cache)):
            most[number] = max(most[number], cache.used_bytes)

    with blocklib.open(path, "r+", options=options) as disk:
        node = _node(disk)
        for number, place in enumerate(places):
            disk.write(place, number.to_bytes(4, "big"))
            look()
    with blocklib.open(path, options=options) as disk:
        node = _node(disk)
        for number, place in enumerate(places):
            assert disk.read(place, 4) == number.to_bytes(4, "big")
            look()
    # A new L2 table comes in whole, 64 KiB of slices at once.
    assert most[0] <= 1 * MiB + 64 * KiB
    assert most[1] <= 1 * MiB + 64 * KiB


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    blocklib.create(path, 8 << 30, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        for number in range(8):
            disk.write(number << 30, b"x")
    return path


def _opened(image: Path, mode: Any = "r", **options: Any) -> tuple[blocklib.Disk, Any, Clock]:
    disk = blocklib.open(image, mode, options={name.replace("_", "-"): value for name, value in options.items()})
    clock = Clock()
    cache = _node(disk).mapping.cache
    cache.clock = clock
    cache.drop_unused()
    return disk, cache, clock


def test_tables_that_nobody_uses_leave_the_cache_after_the_interval(image: Path) -> None:
    disk, cache, clock = _opened(image, cache_clean_interval=60)
    with disk:
        for number in range(6):
            disk.read(number << 30, 1)
        assert cache.used_bytes == 6 * 64 * KiB
        clock.now += 59
        disk.read(6 << 30, 1)
        assert cache.used_bytes == 7 * 64 * KiB
        clock.now += 1  # the first look: all were used since they came
        disk.read(7 << 30, 1)
        assert cache.used_bytes == 8 * 64 * KiB
        disk.read(0, 1)
        clock.now += 60
        cache.drop_unused()
        assert cache.used_bytes == 2 * 64 * KiB  # the first, and the one that came last
        assert disk.read(5 << 30, 1) == b"x"


def test_changed_tables_stay(image: Path) -> None:
    disk, cache, clock = _opened(image, "r+", cache_clean_interval=60)
    with disk:
        disk.write(64 * KiB, b"y")
        for _ in range(3):
            clock.now += 100
            cache.drop_unused()
        assert cache.used_bytes == 64 * KiB
        assert disk.read(64 * KiB, 1) == b"y"
        disk.flush()
        for _ in range(3):
            clock.now += 100
            cache.drop_unused()
        assert cache.used_bytes == 0
        assert disk.read(64 * KiB, 1) == b"y"


@pytest.mark.parametrize(("interval", "kept"), [(0, True), (None, False)])
def test_the_interval_is_ten_minutes_unless_something_else_is_said(image: Path, interval: int | None, kept: bool) -> None:
    disk, cache, clock = _opened(image, **({} if interval is None else {"cache_clean_interval": interval}))
    with disk:
        disk.read(0, 1)
        clock.now += 599
        cache.drop_unused()
        for _ in range(2):
            clock.now += 600
            cache.drop_unused()
        assert (cache.used_bytes > 0) == kept
        assert cache.clean_interval == (600 if interval is None else interval)


@pytest.mark.parametrize("value", [-1, 1 << 32, "some"])
def test_an_interval_that_cannot_be_is_refused(image: Path, value: object) -> None:
    with pytest.raises(blocklib.OptionError) as caught:
        blocklib.open(image, options={"cache-clean-interval": value})  # type: ignore[dict-item]
    assert caught.value.option == "cache-clean-interval"


def test_dropping_a_table_changes_nothing_for_who_holds_it(image: Path) -> None:
    disk, cache, clock = _opened(image, cache_clean_interval=60)
    with disk:
        disk.read(0, 1)
        (place,) = cache._entries
        table = cache.peek(place)
        for _ in range(3):
            clock.now += 100
            cache.drop_unused()
        assert cache.peek(place) is None
        assert isinstance(table, array)
        assert table[0]
