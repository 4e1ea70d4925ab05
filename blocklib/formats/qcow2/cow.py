"""Cluster allocations in flight: fresh clusters that are being written and that no reader or flush sees before `commit`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from blocklib.node import WriteTicket

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node


class RangeTicket(WriteTicket):
    """The ticket of who claims the guest clusters [first, stop)."""

    __slots__ = ("first", "stop")

    first: int
    stop: int

    def next_claimed(self, cluster: int) -> int | None:
        return max(cluster, self.first) if cluster < self.stop else None


class AllocationTicket(RangeTicket):
    """Host clusters reserved for guest clusters [first, stop)."""

    __slots__ = ("_node", "end", "host_cluster", "preallocated", "start")

    start: int
    end: int
    """Bytes [start, end) from the first cluster on are what is written: head, data and tail."""

    def __init__(self, node: Qcow2Node, first: int, stop: int, host_cluster: int, *, preallocated: bool) -> None:
        self._node = node
        self.first = first
        self.stop = stop
        self.host_cluster = host_cluster
        self.preallocated = preallocated
        """The host clusters are the guest clusters' own already; only what the entries say of their content changes."""

    def commit(self) -> None:
        self._node.link(self)

    def abort(self) -> None:
        self._node.unreserve(self)


class Claim(Protocol):
    """Guest clusters that somebody is giving host clusters."""

    def next_claimed(self, cluster: int, /) -> int | None:
        """The first of them from `cluster` on."""


class Allocations:
    """The list of claims, most of them tickets, that are out.

    All methods run under `lock`, which `wait` releases while it sleeps.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._claims: list[Claim] = []
        self._changed = threading.Condition(lock)

    def __bool__(self) -> bool:
        return bool(self._claims)

    def add(self, claim: Claim) -> None:
        self._claims.append(claim)

    def remove(self, claim: Claim) -> None:
        self._claims.remove(claim)
        self._changed.notify_all()

    def holds(self, claim: Claim) -> bool:
        return claim in self._claims

    def wait_for(self, first: int, stop: int) -> int:
        """Wait until nobody allocates guest cluster `first`; returns where, in (first, stop], the next allocation begins."""
        while True:
            limit = stop
            for claim in self._claims:
                claimed = claim.next_claimed(first)
                if claimed == first:
                    self._changed.wait()
                    break
                if claimed is not None and claimed < limit:
                    limit = claimed
            else:
                return limit

    def overlaps(self, first: int, stop: int) -> bool:
        """Whether anybody allocates one of the guest clusters [first, stop)."""
        for claim in self._claims:
            claimed = claim.next_claimed(first)
            if claimed is not None and claimed < stop:
                return True
        return False

    def wait_for_all(self, first: int, stop: int) -> None:
        """Wait until nobody allocates any of the guest clusters [first, stop)."""
        self._changed.wait_for(lambda: not self.overlaps(first, stop))
