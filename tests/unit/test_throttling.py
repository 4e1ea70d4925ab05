"""Throttling, with a clock that is ours: rates, bursts, turns, and limits that change."""

from __future__ import annotations

import threading

import pytest

from blocklib import OptionError, ThrottleGroup
from blocklib.throttling import LIMITS, Member


class FakeClock:
    """Time passes only when somebody waits for it; who waits for others lets them go on."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        assert seconds is not None, "one thread alone waits for nobody"
        self.time += seconds


def _group(**limits: int) -> tuple[ThrottleGroup, FakeClock]:
    clock = FakeClock()
    return ThrottleGroup({name.replace("_", "-"): value for name, value in limits.items()}, clock=clock), clock


def _seconds(group: ThrottleGroup, clock: FakeClock, requests: int, length: int = 4096, *, is_write: bool = False) -> float:
    began = clock.time
    member = Member()
    for _ in range(requests):
        group.wait(member, length, is_write=is_write)
    return clock.time - began


@pytest.mark.parametrize("rate", [10, 100, 12345])
def test_requests_keep_the_rate(rate: int) -> None:
    group, clock = _group(iops_total=rate)
    assert _seconds(group, clock, rate * 10) == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize("length", [512, 65536, 1 << 20])
def test_bytes_keep_the_rate(length: int) -> None:
    group, clock = _group(bps_total=50 << 20)
    assert _seconds(group, clock, (500 << 20) // length, length) == pytest.approx(10, rel=0.03)


def test_the_tighter_of_two_limits_counts() -> None:
    group, clock = _group(bps_total=1 << 20, iops_total=1000)
    assert _seconds(group, clock, 10000, 512) == pytest.approx(10, rel=0.03)
    group, clock = _group(bps_total=1 << 20, iops_total=1000)
    assert _seconds(group, clock, 160, 65536) == pytest.approx(10, rel=0.03)


def test_limits_of_reads_leave_writes_alone() -> None:
    group, clock = _group(iops_read=10)
    assert _seconds(group, clock, 1000, is_write=True) == 0
    assert _seconds(group, clock, 100) == pytest.approx(10, rel=0.03)


def test_a_burst_lasts_as_long_as_its_length_and_then_the_average_holds() -> None:
    group, clock = _group(iops_total=100, iops_total_max=1000, iops_total_max_length=5)
    # Of what is poured in during the burst, the average runs out again.
    assert _seconds(group, clock, 5500) == pytest.approx(5.5, rel=0.05)
    assert _seconds(group, clock, 1000) == pytest.approx(10, rel=0.1)


def test_a_burst_of_one_second_comes_at_once() -> None:
    group, clock = _group(bps_total=1 << 20, bps_total_max=10 << 20)
    assert _seconds(group, clock, 160, 65536) < 0.1
    assert _seconds(group, clock, 160, 65536) == pytest.approx(10, rel=0.1)


def test_rest_earns_no_more_than_the_capacity() -> None:
    group, clock = _group(iops_total=100)
    _seconds(group, clock, 50)
    clock.time += 3600
    assert _seconds(group, clock, 1000) == pytest.approx(10, rel=0.03)


def test_large_requests_count_as_several() -> None:
    group, clock = _group(iops_total=100, iops_size=4096)
    assert _seconds(group, clock, 100, 40960) == pytest.approx(10, rel=0.03)
    assert _seconds(group, clock, 100, 512) == pytest.approx(1, rel=0.1)


def test_a_limit_changes_at_run_time_and_can_be_taken_away() -> None:
    group, clock = _group(iops_total=10)
    _seconds(group, clock, 10)
    group.update({"iops-total": 1000})
    assert _seconds(group, clock, 10000) == pytest.approx(10, rel=0.03)
    group.update({"iops-total": 0})
    assert group.limits == {}
    assert _seconds(group, clock, 10000) == 0


def test_a_hurried_member_is_not_held_back() -> None:
    group, clock = _group(iops_total=1)
    member = Member()
    group.hurry(member, True)
    began = clock.time
    for _ in range(100):
        group.wait(member, 512, is_write=False)
    assert clock.time == began
    group.hurry(member, False)
    group.wait(member, 512, is_write=False)
    assert clock.time > began


class _SharedClock:
    """Time passes by what the head of the line waits for; everybody else really waits for their turn."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        if seconds is None:
            changed.wait(30)
        else:
            self.time += seconds


def test_members_take_turns_however_many_requests_each_has() -> None:
    clock = _SharedClock()
    group = ThrottleGroup({"iops-total": 100}, clock=clock)
    members = [Member() for _ in range(3)]
    order: list[int] = []
    started = threading.Barrier(9)

    def work(which: int, requests: int) -> None:
        started.wait(30)
        for _ in range(requests):
            group.wait(members[which], 512, is_write=True)
            with lock:
                order.append(which)

    lock = threading.Lock()
    # The first member has five threads, the others two each; all have the same number of requests to do.
    shares = [(0, 60)] * 5 + [(1, 150)] * 2 + [(2, 150)] * 2
    threads = [threading.Thread(target=work, args=share) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(order) == 900
    assert clock.time == pytest.approx(9, rel=0.05)


def test_turns_go_round_the_members() -> None:
    from blocklib.throttling import _Line

    line = _Line()
    first, second = Member(), Member()
    tickets = {name: object() for name in "abcd"}
    line.join(first, tickets["a"])
    line.join(first, tickets["b"])
    line.join(second, tickets["c"])
    line.join(first, tickets["d"])
    served = []
    members = {"a": first, "b": first, "c": second, "d": first}
    while (ticket := line.first()) is not None:
        name = next(name for name, other in tickets.items() if other is ticket)
        served.append(name)
        line.leave(members[name], ticket)
    assert served == ["a", "c", "b", "d"]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"iops": 1}, id="unknown"),
        pytest.param({"iops-total": -1}, id="negative"),
        pytest.param({"iops-total": True}, id="boolean"),
        pytest.param({"iops-total": 10**15 + 1}, id="too-large"),
        pytest.param({"iops-total": 1, "iops-read": 1}, id="total-and-read"),
        pytest.param({"bps-total-max": 1}, id="burst-without-average"),
        pytest.param({"bps-write": 10, "bps-write-max": 9}, id="burst-below-average"),
        pytest.param({"bps-write": 10, "bps-write-max-length": 2}, id="length-without-burst"),
        pytest.param({"bps-write": 10, "bps-write-max": 20, "bps-write-max-length": 0}, id="length-of-zero"),
        pytest.param({"bps-write": 10, "iops-size": 512}, id="size-without-requests"),
    ],
)
def test_limits_that_make_no_sense_are_refused_and_change_nothing(limits: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        ThrottleGroup(limits)
    group = ThrottleGroup({"bps-read": 7})
    with pytest.raises(OptionError):
        group.update(limits)
    assert group.limits == {"bps-read": 7}


def test_all_of_qemus_limits_are_known() -> None:
    assert len(LIMITS) == 19
    ThrottleGroup({"iops-read": 1, "iops-write": 2, "bps-read": 3, "bps-write": 4})
