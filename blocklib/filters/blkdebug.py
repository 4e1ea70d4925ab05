"""blkdebug: faults where and when rules say so, for tests of whatever stands above."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Self

from blocklib.buffers import pieces_of
from blocklib.errors import NameNotFoundError, OptionError, StorageError, UsageError
from blocklib.filters.fault_rules import Rule, Rules
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED, Preallocation
from blocklib.passing import PassingFilter
from blocklib.sizes import MAX_SIZE

_WRITES: Final = {"write": "pwritev", "write-zeroes": "pwritev_zero"}
_PERMISSIONS: Final = {
    "consistent-read": CONSISTENT_READ,
    "write": WRITE,
    "write-unchanged": WRITE_UNCHANGED,
    "resize": RESIZE,
}


class BlkdebugNode(PassingFilter):
    """The child "file", whose requests fail, wait, are cut short or kill the process as the rules of "inject-error" say.

    `align`, `max-transfer` and the like are what this node asks of requests: it makes them fit, as a device would have it.
    """

    driver = "blkdebug"
    main_option = "image"
    sees_reads: ClassVar[bool] = True
    sees_writes: ClassVar[bool] = True
    holds_requests: ClassVar[bool] = True

    def __init__(
        self, name: str | None, filename: str | None, *, read_only: bool, rules: Mapping[str, Any]
    ) -> None:
        """`rules` are checked options.  Raises OptionError for those that contradict each other."""
        options = rules
        super().__init__(name, filename, read_only=read_only)
        for rule in options["inject-error"]:
            if rule["short"] is not None and not (rule["errno"] or rule["exit"]):
                raise self._bad_option("inject-error", "a request that is cut short fails: errno cannot be 0")
        self._rules = Rules(options["inject-error"], options["set-state"])
        self._align = options["align"] or 1
        self._limits = {
            "write-zeroes": (options["opt-write-zero"] or 1, options["max-write-zero"] or MAX_SIZE),
            "discard": (options["opt-discard"] or 1, options["max-discard"] or MAX_SIZE),
        }
        self._max_transfer = options["max-transfer"] or MAX_SIZE
        for option in ("max-transfer", "max-write-zero", "max-discard"):
            if (options[option] or 0) % self._align:
                raise self._bad_option(option, f"{option} is not a multiple of align")
        self._taken = _permissions(options["take-child-perms"])
        self._unshared = _permissions(options["unshare-child-perms"])
        self._changed = threading.Condition()  # guards: _hurried, _breaks and _stopped
        self._hurried = 0
        self._breaks: dict[str, str] = {}  # tag -> event
        self._stopped: set[str] = set()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """A node from options in QEMU's names, checked."""
        return super().from_options(options, read_only=read_only, rules=options, **extra)

    def _bad_option(self, option: str, text: str) -> OptionError:
        return OptionError(f"{self.driver}: {text}", option=option, driver=self.driver, node=self.filename)

    def load(self) -> None:
        child = self.file.node
        self.is_device = child.is_device
        self._align = max(self._align, child.request_alignment)
        self.zero_alignment = max(self._align, child.zero_alignment)

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        return wanted | self._taken, shared & ~self._unshared

    @property
    def state(self) -> int:
        """The number of the state that rules and events have brought about; 1 at the beginning."""
        return self._rules.state

    @property
    def matched(self) -> tuple[int, ...]:
        """How many requests, so far, each rule was right for, whether it acted on them or not."""
        return self._rules.matched

    # -- waiting ------------------------------------------------------------------------------------------------------

    def break_at(self, event: str, tag: str) -> None:
        """Stop the next thread at this event until `resume(tag)`, or until somebody drains the disk.

        Raises UsageError where the tag is in use.
        """
        with self._changed:
            if tag in self._breaks or tag in self._stopped:
                raise UsageError(f"{self.name}: there is a breakpoint {tag!r} already", node=self.name)
            self._breaks[tag] = event

    def wait_break(self, tag: str, timeout: float | None = None) -> None:
        """Wait until a thread has stopped at the breakpoint.  Raises the builtin TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: tag in self._stopped, timeout):
                raise TimeoutError(f"{self.name}: nobody came to the breakpoint {tag!r}")

    def resume(self, tag: str) -> None:
        """Let who stopped at the breakpoint go on, or take away one that nobody came to.  Raises NameNotFoundError."""
        with self._changed:
            if tag not in self._stopped and tag not in self._breaks:
                raise NameNotFoundError(f"{self.name}: there is no breakpoint {tag!r}", node=self.name)
            self._breaks.pop(tag, None)
            self._stopped.discard(tag)
            self._changed.notify_all()

    def hurry(self, hurried: bool) -> None:
        with self._changed:
            self._hurried += 1 if hurried else -1
            if hurried:
                self._stopped.clear()
            self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._hurried > 0, seconds)

    def _stop_at(self, event: str) -> None:
        with self._changed:
            for tag, at in list(self._breaks.items()):
                if at == event and not self._hurried:
                    del self._breaks[tag]
                    self._stopped.add(tag)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda tag=tag: tag not in self._stopped)  # type: ignore[misc]

    # -- faults -------------------------------------------------------------------------------------------------------

    def hear(self, event: str) -> None:
        self._happen(event)
        super().hear(event)

    def _happen(self, event: str) -> None:
        due = self._rules.happen(event)
        if self._breaks:
            self._stop_at(event)
        if due:
            self._act(due, event, 0, lambda _length: None)

    def _request(self, iotype: str, offset: int, length: int, work: Callable[[int], object]) -> None:
        """Do `work(length)`, or what the rules make of it."""
        if iotype in _WRITES:
            self._happen(_WRITES[iotype])
        due = self._rules.due(iotype, offset, length)
        if due:
            self._act(due, iotype, length, work)
        else:
            work(length)
        if iotype in _WRITES:
            self._happen("pwritev_done")

    def _act(self, due: Sequence[Rule], what: str, length: int, work: Callable[[int], object]) -> None:
        latency = sum(rule.latency_ms for rule in due) / 1000
        if latency:
            self._wait(latency)
        failing = next((rule for rule in due if rule.errno or rule.exit), None)
        if failing is None:
            work(length)
            return
        if failing.short:
            work(min(failing.short, length))
        if failing.exit:
            _die()
        name = self.filename or self.name
        reason = os.strerror(failing.errno)
        text = f"{name}: {what} failed: {reason} (injected)"
        raise StorageError(text, errno=failing.errno, operation=what, filename=self.filename, node=name)

    # -- requests -----------------------------------------------------------------------------------------------------

    def read_special(self, offset: int, view: memoryview) -> bool:
        first, last = self._rounded(offset, offset + len(view))
        if (first, last) == (offset, offset + len(view)):
            self._read(offset, view)
        else:
            around = memoryview(bytearray(last - first))
            self._read(first, around)
            view[:] = around[offset - first : offset - first + len(view)]
        return True

    def _read(self, offset: int, view: memoryview) -> None:
        for start, n in _pieces(offset, len(view), 1, self._max_transfer):
            part = view[start - offset : start - offset + n]
            self._request(
                "read",
                start,
                n,
                lambda done, start=start, part=part: self.file.read(start, part[:done], None),  # type: ignore[misc]
            )

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        if self._align == 1:
            self._write(place, views)
            return
        end = place + pieces_of(views)
        first, last = self._rounded(place, end)
        partial = (first, last) != (place, end)
        held = self.write_ranges.acquire(first, last, exclusive=partial)
        try:
            if partial:
                around = self._read_around(place, end, first, last)
                around[place - first : end - first] = _joined(views)
                views = (around[: max(end, min(last, self.size)) - first],)  # what is past the end is no part of the child
            self._write(first, views)
        finally:
            self.write_ranges.release(held)

    def _read_around(self, place: int, end: int, first: int, last: int) -> memoryview:
        """What is in the blocks that a write to [place, end) begins and ends in, at its place in [first, last)."""
        around = memoryview(bytearray(last - first))
        if first < place:
            self._happen("pwritev_rmw_head")
            self._read(first, around[: self._align])
            self._happen("pwritev_rmw_after_head")
        if end < last and not (first < place and last - first == self._align):
            self._happen("pwritev_rmw_tail")
            self._read(last - self._align, around[last - first - self._align :])
            self._happen("pwritev_rmw_after_tail")
        return around

    def _write(self, offset: int, views: Sequence[memoryview]) -> None:
        length = pieces_of(views)
        for start, n in _pieces(offset, length, 1, self._max_transfer):

            def write(done: int, start: int = start) -> None:
                if done == length:
                    self.file.write(offset, views, None)
                else:
                    self.file.write(start, (_joined(views)[start - offset : start - offset + done],), None)

            self._request("write", start, n, write)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        for start, n in _pieces(offset, length, *self._limits["write-zeroes"]):
            self._request(
                "write-zeroes",
                start,
                n,
                lambda done, start=start: self.file.write_zeroes(start, done, unmap=unmap),  # type: ignore[misc]
            )

    def discard_range(self, offset: int, length: int) -> None:
        for start, n in _pieces(offset, length, *self._limits["discard"]):
            self._request("discard", start, n, lambda done, start=start: self.file.discard(start, done))  # type: ignore[misc]

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self._request("truncate", size, 0, lambda _done: self.file.truncate(size, preallocation))

    def flush(self) -> None:
        self._happen("flush_to_disk")
        self._request("flush", 0, 0, lambda _done: self.file.flush())

    def _rounded(self, start: int, end: int) -> tuple[int, int]:
        align = self._align
        return start // align * align, -(-end // align) * align


def _permissions(names: Sequence[str]) -> int:
    return sum(_PERMISSIONS[name] for name in set(names))


def _pieces(offset: int, length: int, unit: int, most: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the requests that one becomes: at most `most` bytes each, cut at multiples of `unit`."""
    end = offset + length
    while offset < end:
        n = min(end - offset, most)
        if offset % unit:
            n = min(n, unit - offset % unit)
        elif n > unit:
            n -= n % unit
        yield offset, n
        offset += n


def _joined(views: Sequence[memoryview]) -> memoryview:
    return memoryview(b"".join(views))


def _die() -> None:
    """End the process as a kill does: nothing is written, nobody is told."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    threading.Event().wait()  # until it has arrived
