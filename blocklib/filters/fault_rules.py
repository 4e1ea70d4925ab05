"""The rules of blkdebug: which request fails, waits, is cut short, or is the last one of the process.

In the room of filters; `blkdebug` carries out what is decided here.  Rules, their words and the state that joins them are
those of QEMU's ``docs/devel/testing/blkdebug.rst``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SECTOR: Final = 512


@dataclass(slots=True)
class Rule:
    """One entry of "inject-error"; `matched` counts the requests that it was right for."""

    event: str
    state: int
    iotype: str | None
    errno: int
    sector: int | None
    once: bool
    immediately: bool
    skip: int
    every: int
    latency_ms: int
    short: int | None
    exit: bool
    matched: int = 0
    spent: bool = False

    def concerns(self, iotype: str, offset: int, length: int) -> bool:
        """Whether the rule is right for a request; truncations, which QEMU's blkdebug lets pass, must be asked for."""
        if self.iotype is None:
            if iotype == "truncate":
                return False
        elif self.iotype != iotype:
            return False
        return self.sector is None or (offset < (self.sector + 1) * SECTOR and self.sector * SECTOR < offset + length)

    def is_due(self) -> bool:
        """Whether it acts on a request that it is right for; to be asked once for each."""
        if self.spent:
            return False
        self.matched += 1
        due = self.matched > self.skip and (self.matched - self.skip - 1) % self.every == 0
        self.spent = due and self.once
        return due


class Rules:
    """The rules of one node and the number of the state that they are in.  Safe from any thread."""

    def __init__(self, faults: Sequence[Mapping[str, Any]], changes: Sequence[Mapping[str, Any]]) -> None:
        self._faults = [Rule(**{name.replace("-", "_"): value for name, value in fault.items()}) for fault in faults]
        self._changes = [(change["event"], change["state"], change["new_state"]) for change in changes]
        self._lock = threading.Lock()  # guards: state and the counts of the rules
        self._local = threading.local()
        self.state = 1

    @property
    def matched(self) -> tuple[int, ...]:
        return tuple(rule.matched for rule in self._faults)

    def happen(self, event: str) -> list[Rule]:
        """What `event` changes; the rules that act at once.  The others wait for the next request of this thread."""
        with self._lock:
            found = [rule for rule in self._faults if rule.event == event and rule.state in (0, self.state)]
            for name, state, new_state in self._changes:
                if name == event and state in (0, self.state):
                    self.state = new_state
                    break
            due = [rule for rule in found if rule.immediately and rule.is_due()]
        waiting = self._waiting()
        waiting += (rule for rule in found if not rule.immediately)
        return due

    def due(self, iotype: str, offset: int, length: int) -> list[Rule]:
        """The rules that act on a request of this thread, whose events have all been told."""
        waiting = self._waiting()
        self._local.waiting = []
        with self._lock:
            waiting += (rule for rule in self._faults if rule.event == "none" and rule.state in (0, self.state))
            return [rule for rule in waiting if rule.concerns(iotype, offset, length) and rule.is_due()]

    def _waiting(self) -> list[Rule]:
        waiting: list[Rule] | None = getattr(self._local, "waiting", None)
        if waiting is None:
            waiting = self._local.waiting = []
        return waiting
