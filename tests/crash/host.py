"""A host with disks in memory, below each of which the filter `blklogwrites` keeps its log; one clock for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from blocklib.filters import dm_log_writes as log_format
from blocklib.filters.blklogwrites import BlkLogWritesNode
from blocklib.graph import Transaction
from tests.crash.recording import Drive
from tests.crash.replay import Event, Recording, entries_of, event_of

Journal = list[tuple[str, Literal["entered", "rewritten"], int]]
"""What was done to the log of which file, at which place of it."""


class LogSink(Drive):
    """What a log is written to; it tells the journal of the host when an entry comes, or changes."""

    driver = "log"

    def __init__(self, name: str, journal: Journal) -> None:
        super().__init__()
        self._name = name
        self._journal = journal

    def pwritev(self, offset: int, views: Sequence[memoryview | bytes | bytearray]) -> None:
        is_new = offset >= self.size
        super().pwritev(offset, views)
        if offset:  # the superblock is rewritten whenever it suits the filter
            self._journal.append((self._name, "entered" if is_new else "rewritten", offset))

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        """The zeroes of an entry, which is there already."""
        super().pwritev(offset, (bytes(length),))


@dataclass
class HostFile:
    """One disk of the host, and everything that happened to it."""

    drive: Drive
    sink: LogSink
    start: bytes

    def opened(self, *, read_only: bool = False) -> BlkLogWritesNode:
        """A node over the disk that goes on with its log."""
        node = BlkLogWritesNode(None, self.drive.filename, read_only=read_only, append=self.sink.size > 0)
        with Transaction() as change:
            change.attach(node, "file", self.drive)
            change.attach(node, "log", self.sink)
        node.load()
        return node


@dataclass
class Host:
    """Disks by name."""

    files: dict[str, HostFile] = field(default_factory=dict)
    journal: Journal = field(default_factory=list)

    def add(self, name: str, data: bytes, filename: str | None = None) -> HostFile:
        file = HostFile(Drive(filename, data=data), LogSink(name, self.journal), data)
        self.files[name] = file
        return file

    def now(self) -> int:
        """How much has happened: the same unit as the cuts of a replay."""
        return len(self.journal)

    def recording(self) -> Recording:
        """Everything that happened, in order."""
        events: list[Event] = []
        logs: dict[str, tuple[bytes, dict[int, log_format.LogEntry]]] = {}
        for name, file in self.files.items():
            # A disk that was abandoned has not counted its last entries.
            n_entries = sum(which == name and what == "entered" for which, what, _position in self.journal)
            head = log_format.pack_superblock(n_entries, log_format.MIN_SECTOR)
            data = head + bytes(file.sink.data[len(head) :])
            logs[name] = data, {entry.position: entry for entry in entries_of(data)}
        begun: dict[tuple[str, int], int] = {}
        for number, (name, what, position) in enumerate(self.journal):
            data, entries = logs[name]
            if what == "rewritten":
                events.append(Event(name, "barrier", begun[name, position], b""))
                continue
            begun[name, position] = number
            events.append(event_of(name, entries[position], data))
        return Recording({name: file.start for name, file in self.files.items()}, events)


