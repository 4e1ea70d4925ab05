"""Requests in flight: counting, draining, epochs, and writes kept apart."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from blocklib.errors import ClosedError, UsageError
from blocklib.requests import CLOSED, RangeLock, RequestTracker


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_drain_waits_for_requests_inside_and_holds_new_ones_back() -> None:
    tracker = RequestTracker()
    inside, leave, drained, entered = (threading.Event() for _ in range(4))
    order: list[str] = []

    def request() -> None:
        tracker.enter()
        inside.set()
        leave.wait()
        order.append("left")
        tracker.leave()

    def drain() -> None:
        tracker.drain()
        order.append("drained")
        drained.set()

    def late_request() -> None:
        tracker.enter()
        order.append("entered")
        entered.set()
        tracker.leave()

    first = started(request)
    inside.wait()
    second = started(drain)
    leave.set()
    drained.wait()
    third = started(late_request)
    assert not entered.is_set()
    tracker.undrain()
    entered.wait()
    for thread in (first, second, third):
        thread.join()
    assert order == ["left", "drained", "entered"]


def test_a_nested_request_enters_while_its_disk_is_being_drained() -> None:
    tracker = RequestTracker()
    tracker.enter()
    drainer = started(tracker.drain)
    while not tracker.flags:
        pass
    tracker.enter()
    tracker.leave()
    tracker.leave()
    drainer.join()
    tracker.undrain()


def test_draining_from_inside_a_request_raises_instead_of_waiting_for_itself() -> None:
    tracker = RequestTracker()
    tracker.enter()
    with pytest.raises(UsageError):
        tracker.drain()
    tracker.leave()
    tracker.drain()
    tracker.undrain()


def test_drains_nest() -> None:
    tracker = RequestTracker()
    tracker.drain()
    tracker.drain()
    tracker.undrain()
    entered = threading.Event()

    def request() -> None:
        tracker.enter()
        entered.set()
        tracker.leave()

    thread = started(request)
    assert not entered.is_set()
    tracker.undrain()
    entered.wait()
    thread.join()


def test_a_refused_tracker_raises_for_waiting_and_new_requests() -> None:
    tracker = RequestTracker()
    tracker.drain()
    errors: list[BaseException] = []

    def request() -> None:
        try:
            tracker.enter()
        except ClosedError as exc:
            errors.append(exc)

    thread = started(request)
    tracker.refuse(CLOSED)
    thread.join()
    assert len(errors) == 1
    with pytest.raises(ClosedError):
        tracker.enter()
    assert not tracker.inside()


def test_an_epoch_is_left_once_all_older_requests_have_ended_and_younger_ones_do_not_matter() -> None:
    tracker = RequestTracker()
    old_inside, old_leave = threading.Event(), threading.Event()

    def old_request() -> None:
        tracker.enter()
        old_inside.set()
        old_leave.wait()
        tracker.leave()

    thread = started(old_request)
    old_inside.wait()
    epoch = tracker.next_epoch()
    tracker.enter()  # a younger one
    assert not tracker.left(epoch)
    old_leave.set()
    thread.join()
    assert tracker.left(epoch)
    assert not tracker.left(tracker.next_epoch())
    tracker.leave()


def test_threads_that_are_gone_leave_no_trace() -> None:
    tracker = RequestTracker()

    def request() -> None:
        tracker.enter()
        tracker.leave()

    for _ in range(50):
        started(request).join()
    tracker.enter()
    assert len(tracker._slots) <= 2
    tracker.leave()


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        pytest.param((0, 10, False), (5, 15, False), False, id="ordinary-overlap"),
        pytest.param((0, 10, True), (5, 15, False), True, id="exclusive-first"),
        pytest.param((0, 10, False), (5, 15, True), True, id="exclusive-second"),
        pytest.param((0, 10, True), (10, 15, True), False, id="exclusive-neighbours"),
    ],
)
def test_range_lock_keeps_an_exclusive_write_apart(
    first: tuple[int, int, bool], second: tuple[int, int, bool], waits: bool
) -> None:
    lock = RangeLock()
    held = lock.acquire(first[0], first[1], exclusive=first[2])
    got = threading.Event()

    def other() -> None:
        mine = lock.acquire(second[0], second[1], exclusive=second[2])
        got.set()
        lock.release(mine)

    thread = started(other)
    if waits:
        assert not got.is_set()
        lock.release(held)
        thread.join()
    else:
        thread.join()
        lock.release(held)
    assert got.is_set()
