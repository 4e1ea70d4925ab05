"""Throttling: at most so many requests and bytes a second, for any number of disks together.

Every limit is a leaky bucket: a request pours into it what it moves, it runs out at the average rate, and while it is fuller
than its capacity the next request waits.  A limit with a burst has a capacity of ``max`` times ``max-length``, and a second
bucket that keeps the rate below ``max`` meanwhile; one without has a tenth of a second's worth.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Final, Protocol

from blocklib.errors import OptionError

_KINDS: Final = ("total", "read", "write")
_MEASURES: Final = ("iops", "bps")
_NAMES: Final = tuple(
    f"{measure}-{kind}{suffix}" for measure in _MEASURES for kind in _KINDS for suffix in ("", "-max", "-max-length")
)
LIMITS: Final = (*_NAMES, "iops-size")
"""The limits there are, in QEMU's names: rates a second, bursts (-max), their seconds (-max-length), and how many bytes of one
request count as a request of their own (iops-size).  0 is no limit."""
_MOST: Final = 10**15
_SLACK: Final = 0.1
"""Seconds of the average that may come at once where there is no burst."""

_INSTANT: Final = 1e-6
"""Seconds that are not worth waiting for: rounding could make the last bit of a wait last for ever."""


class Clock(Protocol):
    """What time it is, and how to wait."""

    def now(self) -> float: ...
    def wait(self, changed: threading.Condition, seconds: float | None, /) -> None: ...


class SystemClock:
    """The monotonic clock of the system."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        changed.wait(seconds)


class Bucket:
    """One limit: `average` units a second, `burst` units a second for at most `length` seconds."""

    __slots__ = ("_capacity", "_level", "_peak", "_peak_level", "_rate")

    def __init__(self, average: float, burst: float = 0, length: float = 1) -> None:
        self._rate = average
        self._capacity = burst * length if burst else average * _SLACK
        self._peak = burst if length > 1 else 0.0
        self._level = self._peak_level = 0.0

    def leak(self, seconds: float) -> None:
        self._level = max(0.0, self._level - self._rate * seconds)
        self._peak_level = max(0.0, self._peak_level - self._peak * seconds)

    def pour(self, amount: float) -> None:
        self._level += amount
        self._peak_level += amount

    def delay(self) -> float:
        """Seconds until the next request may begin."""
        delay = max(0.0, (self._level - self._capacity) / self._rate)
        if self._peak:
            delay = max(delay, (self._peak_level - self._peak * _SLACK) / self._peak)
        return delay

    def take_over(self, old: Bucket) -> None:
        """Begin with what is in the bucket of the limit that this one replaces."""
        self._level, self._peak_level = old._level, old._peak_level


class Member:
    """One user of a group, as its turn goes round: a node.  While `hurried` is not 0 nothing holds it back."""

    __slots__ = ("hurried",)

    def __init__(self) -> None:
        self.hurried = 0


class ThrottleGroup:
    """Limits that several disks share; their requests take turns.  Every method is safe from any thread."""

    def __init__(self, limits: Mapping[str, int] | None = None, *, clock: Clock | None = None) -> None:
        """`limits` are by QEMU's names: see `LIMITS`.  Raises OptionError."""
        self._clock = clock if clock is not None else SystemClock()
        self._changed = threading.Condition(threading.Lock())  # guards all that follows
        self._limits: dict[str, int] = {}
        self._buckets: dict[str, Bucket] = {}
        self._leaked_at = self._clock.now()
        self._lines = {False: _Line(), True: _Line()}  # of reads, of writes
        self.update(limits or {})

    def __repr__(self) -> str:
        return f"ThrottleGroup({self.limits})"

    def __reduce__(self) -> str:
        raise TypeError("a throttle group belongs to its process; make one in the worker")

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are set, by name."""
        with self._changed:
            return {name: value for name, value in self._limits.items() if value}

    def update(self, limits: Mapping[str, int]) -> None:
        """Change some limits, for requests that wait already, too; 0 takes one away.  Raises OptionError."""
        with self._changed:
            changed = self._limits | _checked(limits)
            buckets = _buckets_of(changed)
            for name, bucket in buckets.items():
                if name in self._buckets:
                    bucket.take_over(self._buckets[name])
            self._limits, self._buckets = changed, buckets
            self._changed.notify_all()

    def hurry(self, member: Member, hurried: bool) -> None:
        """Let what `member` has waiting, and what it asks for from now on, go at once; or no longer.  Nests."""
        with self._changed:
            member.hurried += 1 if hurried else -1
            self._changed.notify_all()

    def wait(self, member: Member, length: int, *, is_write: bool) -> None:
        """Wait until a request of `length` bytes may begin, and count it."""
        if not self._buckets:
            return
        with self._changed:
            line = self._lines[is_write]
            ticket = object()
            line.join(member, ticket)
            try:
                self._wait_in(line, member, ticket, is_write)
                self._pour(length, is_write)
            finally:
                line.leave(member, ticket)
                self._changed.notify_all()

    def _wait_in(self, line: _Line, member: Member, ticket: object, is_write: bool) -> None:
        while not member.hurried:
            delay: float | None = None  # until somebody who is before us has left
            if line.first() is ticket:
                delay = self._delay(is_write)
                if delay < _INSTANT:
                    return
            self._clock.wait(self._changed, delay)

    def _delay(self, is_write: bool) -> float:
        now = self._clock.now()
        for bucket in self._buckets.values():
            bucket.leak(now - self._leaked_at)
        self._leaked_at = now
        kinds = ("total", "write" if is_write else "read")
        return max((self._buckets[name].delay() for name in self._concerned(kinds)), default=0.0)

    def _pour(self, length: int, is_write: bool) -> None:
        size = self._limits.get("iops-size", 0)
        requests = max(1.0, length / size) if size else 1.0
        for name in self._concerned(("total", "write" if is_write else "read")):
            self._buckets[name].pour(requests if name.startswith("iops") else length)

    def _concerned(self, kinds: tuple[str, ...]) -> list[str]:
        names = (f"{measure}-{kind}" for measure in _MEASURES for kind in kinds)
        return [name for name in names if name in self._buckets]


class _Line:
    """Requests that wait, each member's in order; the members take turns."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Member, deque[object]] = OrderedDict()

    def join(self, member: Member, ticket: object) -> None:
        self._waiting.setdefault(member, deque()).append(ticket)

    def first(self) -> object | None:
        return next((tickets[0] for tickets in self._waiting.values()), None)

    def leave(self, member: Member, ticket: object) -> None:
        """A request begins, or was given up: the turn is the next member's."""
        tickets = self._waiting.pop(member)
        tickets.remove(ticket)
        if tickets:
            self._waiting[member] = tickets


def find_throttle_group(objects: Mapping[str, object], name: str) -> ThrottleGroup:
    """The group with the id `name`.  Raises OptionError."""
    found = objects.get(name)
    if not isinstance(found, ThrottleGroup):
        text = f"throttle-group: there is no throttle group with the id {name!r}; in Python it is a blocklib.ThrottleGroup"
        raise OptionError(text, option="throttle-group")
    return found


def _checked(limits: Mapping[str, int]) -> dict[str, int]:
    for name, value in limits.items():
        if name not in LIMITS:
            raise OptionError(f"there is no limit {name!r}; there are {', '.join(LIMITS)}", option=name, choices=LIMITS)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
            raise OptionError(f"the limit {name!r} is a number from 0 to {_MOST}, not {value!r}", option=name)
        if name.endswith("-length") and value < 1:
            raise OptionError(f"{name!r} is at least 1 second, not {value}", option=name)
    return dict(limits)


def _buckets_of(limits: Mapping[str, int]) -> dict[str, Bucket]:
    """A bucket for each limit that is set.  Raises OptionError where limits contradict each other."""
    buckets = {}
    for measure in _MEASURES:
        if limits.get(f"{measure}-total") and (limits.get(f"{measure}-read") or limits.get(f"{measure}-write")):
            raise _contradiction(f"{measure}-total", "cannot be set together with the same limit for reads or for writes")
        for kind in _KINDS:
            name = f"{measure}-{kind}"
            average, burst, length = (limits.get(name + suffix, 0) for suffix in ("", "-max", "-max-length"))
            if burst and not average:
                raise _contradiction(f"{name}-max", f"needs {name}")
            if burst and burst < average:
                raise _contradiction(f"{name}-max", f"is {burst}, below {name}, {average}")
            if length > 1 and not burst:
                raise _contradiction(f"{name}-max-length", f"needs {name}-max")
            if average:
                buckets[name] = Bucket(average, burst, max(1, length))
    if limits.get("iops-size") and not any(name.startswith("iops") for name in buckets):
        raise _contradiction("iops-size", "needs a limit of requests")
    return buckets


def _contradiction(name: str, text: str) -> OptionError:
    return OptionError(f"the limit {name} {text}", option=name)
