"""Throttling by the clock on the wall: over ten seconds a rate is within 3 % of what it was set to.

Minutes of waiting, and a machine that has nothing else to do: for `make torture`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

import pytest

import blocklib
from blocklib import KiB, MiB, ThrottleGroup
from tests.programs import Program

pytestmark = pytest.mark.torture

SECONDS = 10.0
SIZE = 64 * MiB
_TOLERANCE = 0.03


class _Load:
    """Threads that send requests of one length for ten seconds, and what came through."""

    def __init__(self, disk: blocklib.Disk, length: int, *, writing: bool, threads: int = 2) -> None:
        self._disk = disk
        self._length = length
        self._data = b"\x5a" * length
        self._writing = writing
        self._lock = threading.Lock()
        self.requests = 0
        self._stop = False
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    def _work(self, number: int) -> None:
        offset = number * SIZE // 4
        while not self._stop:
            if self._writing:
                self._disk.write(offset, self._data)
            else:
                self._disk.read(offset, self._length)
            with self._lock:
                self.requests += not self._stop

    @property
    def bytes(self) -> int:
        return self.requests * self._length

    @staticmethod
    def run(*loads: _Load, halfway: Callable[[], object] = lambda: None) -> float:
        """Run all of them at once; seconds."""
        began = time.monotonic()
        for load in loads:
            for thread in load._threads:
                thread.start()
        time.sleep(SECONDS / 2)
        halfway()
        time.sleep(max(0.0, began + SECONDS - time.monotonic()))
        for load in loads:
            load._stop = True
        ended = time.monotonic()
        return ended - began


def _disk(group: ThrottleGroup) -> blocklib.Disk:
    below: dict[str, str | int | bool] = {"driver": "null-co", "size": SIZE, "read-zeroes": True}
    return blocklib.open({"driver": "throttle", "throttle-group": group, "file": below}, "r+")


def _is_near(measured: float, wanted: float) -> bool:
    print(f"wanted {wanted:.0f}, measured {measured:.1f}: {measured / wanted - 1:+.2%}")
    return abs(measured / wanted - 1) <= _TOLERANCE


@pytest.mark.parametrize("length", [4 * KiB, 64 * KiB, 1 * MiB])
def test_bytes_in_all(length: int) -> None:
    with _disk(ThrottleGroup({"bps-total": 20 * MiB})) as disk:
        loads = [_Load(disk, length, writing=writing) for writing in (False, True)]
        seconds = _Load.run(*loads)
        assert _is_near(sum(load.bytes for load in loads) / seconds, 20 * MiB)


def test_requests_in_all() -> None:
    with _disk(ThrottleGroup({"iops-total": 500})) as disk:
        loads = [_Load(disk, 4096, writing=writing) for writing in (False, True)]
        seconds = _Load.run(*loads)
        assert _is_near(sum(load.requests for load in loads) / seconds, 500)


@pytest.mark.parametrize("measure", ["bps", "iops"])
def test_reads_and_writes_apart(measure: str) -> None:
    limits = {"bps-read": 10 * MiB, "bps-write": 30 * MiB} if measure == "bps" else {"iops-read": 200, "iops-write": 600}
    with _disk(ThrottleGroup(limits)) as disk:
        loads = [_Load(disk, 64 * KiB, writing=writing) for writing in (False, True)]
        seconds = _Load.run(*loads)
        for load, wanted in zip(loads, limits.values(), strict=True):
            assert _is_near((load.bytes if measure == "bps" else load.requests) / seconds, wanted)


@pytest.mark.parametrize("limits", [{"bps-total": 20 * MiB}, {"iops-total": 400}])
def test_two_members_have_half_each(limits: Mapping[str, int]) -> None:
    group = ThrottleGroup(limits)
    ((name, wanted),) = limits.items()
    with _disk(group) as one, _disk(group) as other:
        loads = [_Load(one, 64 * KiB, writing=True, threads=1), _Load(other, 64 * KiB, writing=True, threads=4)]
        seconds = _Load.run(*loads)
        for load in loads:
            assert _is_near((load.bytes if name == "bps-total" else load.requests) / seconds, wanted / 2)


def test_a_burst_and_then_the_average() -> None:
    limits = {"bps-total": 10 * MiB, "bps-total-max": 40 * MiB, "bps-total-max-length": 2}
    with _disk(ThrottleGroup(limits)) as disk:
        load = _Load(disk, 64 * KiB, writing=True)
        seconds = _Load.run(load)
        # A bucket of 80 MiB that fills at 40 MiB a second while 10 run out, and then no more than runs out.
        assert _is_near(load.bytes, 80 * MiB + 10 * MiB * seconds)


def test_long_requests_count_more_than_once() -> None:
    with _disk(ThrottleGroup({"iops-total": 800, "iops-size": 16 * KiB})) as disk:
        load = _Load(disk, 64 * KiB, writing=True)
        seconds = _Load.run(load)
        assert _is_near(load.requests / seconds, 200)


def test_a_limit_that_changes_at_run_time() -> None:
    group = ThrottleGroup({"iops-total": 200})
    with _disk(group) as disk:
        load = _Load(disk, 4096, writing=True)
        _Load.run(load, halfway=lambda: group.update({"iops-total": 600}))
        assert _is_near(load.requests, 200 * SECONDS / 2 + 600 * SECONDS / 2)


@pytest.mark.parametrize("limit", ["x-bps-total=20971520", "x-iops-write=20"])
def test_the_rate_is_that_of_qemu(qemu_io: Program, limit: str) -> None:
    arguments = ["--object", f"throttle-group,id=slow,{limit}", "--image-opts"]
    arguments.append(f"driver=throttle,throttle-group=slow,file.driver=null-co,file.size={SIZE}")
    script = "write 0 1M\n" * 200
    seconds = []
    for command in ([qemu_io.path], [sys.executable, "-m", "blocklib", "io"]):
        began = time.monotonic()
        subprocess.run([*command, *arguments], input=script, text=True, capture_output=True, check=True)
        seconds.append(time.monotonic() - began)
    print(f"{limit}, 200 writes of 1 MiB: QEMU {seconds[0]:.2f} s, ours {seconds[1]:.2f} s")
    assert _is_near(seconds[1], SECONDS)
    assert _is_near(seconds[1], seconds[0])
