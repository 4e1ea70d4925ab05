"""What a crash may leave of disks whose writes were logged (`blklogwrites`, dm-log-writes).

The model is a host with a page cache: what was written before a completed barrier *began* is durable; of what came later,
each 512-byte sector holds any one of the contents it has had since.  Sectors do not tear; longer writes do.

``python -m tests.crash.replay START LOG LEFT --events 100 --survives some --seed 7`` makes one such state of files.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

from blocklib.filters import dm_log_writes as log_format
from blocklib.filters.dm_log_writes import DISCARD, FLUSH, MARK, LogEntry
from tests.crash.recording import PUNCHED, SECTOR


class Event(NamedTuple):
    """What happened to one of the disks, by name.

    `place` is the offset of a write (of what a discard left, too), the new size, or for a barrier the number of the event
    before which everything was durable when it ended.  "nothing" stands for entries that change nothing.
    """

    disk: str
    kind: Literal["write", "size", "barrier", "nothing"]
    place: int
    data: bytes


@dataclass(frozen=True)
class Recording:
    """Disks, and what happened to them in order."""

    starts: Mapping[str, bytes]
    events: Sequence[Event]


def event_of(name: str, entry: LogEntry, log: bytes) -> Event:
    """One entry of the log of a disk; of flushes only that they began."""
    if entry.flags & MARK:
        word, _, number = entry.text.partition(" ")
        if word == "size":
            return Event(name, "size", int(number), b"")
    elif entry.flags & DISCARD:
        return Event(name, "write", entry.offset, bytes((PUNCHED,)) * entry.length)
    elif entry.length:
        return Event(name, "write", entry.offset, log[entry.data_position : entry.data_position + entry.length])
    return Event(name, "nothing", 0, b"")


def entries_of(log: bytes) -> list[LogEntry]:
    """The entries of a log in memory."""
    return list(log_format.entries(lambda offset, length: log[offset : offset + length], len(log)))


def recording_of(name: str, start: bytes, log: bytes) -> Recording:
    """One disk and its log, as they are found in files; where flushes ended is what the log's marks say."""
    entries = entries_of(log)
    ended = {int(entry.text.split()[1]) for entry in entries if entry.text.startswith("flushed ")}
    events = []
    for entry in entries:
        if entry.flags & FLUSH and entry.number not in ended:
            events.append(Event(name, "barrier", entry.number, b""))
        elif entry.text.startswith("flushed "):
            events.append(Event(name, "barrier", int(entry.text.split()[1]), b""))
        else:
            events.append(event_of(name, entry, log))
    return Recording({name: start}, events)


class State(NamedTuple):
    """One thing that a crash may leave: after `cut` events, and what becomes of the writes no barrier vouched for."""

    number: int
    cut: int
    survives: Literal["none", "all", "some"]


_SYSTEMATIC: Final = 0.4
"""The share of states at barriers, where there are more barriers than that."""
_PER_CUT: Final = 5


def states(recording: Recording, seed: str, n: int) -> list[State]:
    """`n` states in the order of their cuts: each prefix that ends at a barrier, and random ones."""
    rnd = random.Random(f"{seed}/states")
    events = recording.events
    barriers = [number for number, event in enumerate(events) if event.kind == "barrier"]
    at_barriers: list[tuple[int, Literal["none", "all", "some"]]] = [(len(events), "none"), (len(events), "all")]
    for number in barriers:
        at_barriers += [(number, "all"), (number, "none"), (number + 1, "none")]
    if len(at_barriers) > n * _SYSTEMATIC:
        at_barriers = at_barriers[:2] + rnd.sample(at_barriers[2:], max(0, int(n * _SYSTEMATIC) - 2))
    chosen = at_barriers[:n]
    # Where nothing is pending there is one state only; most cuts are where many writes are.
    waiting, weight = 0, []
    for event in events:
        waiting = 0 if event.kind == "barrier" else waiting + 1
        weight.append(min(waiting, 30) + 0.2)
    while len(chosen) < n:
        cut = 1 + rnd.choices(range(len(events)), weight)[0] if events else 0
        chosen += [(cut, "some")] * min(_PER_CUT, n - len(chosen))
    chosen.sort(key=lambda item: item[0])
    return [State(number, cut, survives) for number, (cut, survives) in enumerate(chosen)]


@dataclass
class _Disk:
    """A disk at the present cut."""

    durable: bytearray
    pending: list[tuple[int, Event]] = field(default_factory=list)
    """(number of the event, event)"""

    def settle(self, begun: int) -> None:
        """A barrier has ended: what came before event `begun` is durable."""
        for number, event in self.pending:
            if number < begun:
                _apply(self.durable, event)
        self.pending = [item for item in self.pending if item[0] >= begun]

    def left(self, survives: str, rnd: random.Random) -> bytes:
        image = bytearray(self.durable)
        if survives == "none":
            return bytes(image)
        if survives == "all":
            for _number, event in self.pending:
                _apply(image, event)
            return bytes(image)
        events = [event for _number, event in self.pending]
        match rnd.randrange(7) if len(events) > 1 else rnd.randrange(5, 7):
            case 0:
                kept = events[-1:]
            case 1:
                lost = rnd.randrange(len(events))
                kept = events[:lost] + events[lost + 1 :]
            case 2:
                kept = [rnd.choice(events)]
            case 3 | 4:  # whole writes, in some order
                share = rnd.choice((0.1, 0.5, 0.9))
                kept = [event for event in events if rnd.random() < share]
                if rnd.random() < 0.5:
                    rnd.shuffle(kept)
            case _:
                _tear(image, events, rnd)
                return bytes(image)
        for event in kept:
            _apply(image, event)
        return bytes(image)


def _apply(image: bytearray, event: Event) -> None:
    if event.kind == "size":
        _resize(image, event.place)
        return
    if len(image) < event.place:
        image.extend(bytes(event.place - len(image)))
    image[event.place : event.place + len(event.data)] = event.data


def _resize(image: bytearray, size: int) -> None:
    if size < len(image):
        del image[size:]
    else:
        image.extend(bytes(size - len(image)))


def _tear(image: bytearray, events: Sequence[Event], rnd: random.Random) -> None:
    """Each sector gets as far as it happens to get: its first loss takes everything after it along."""
    share = rnd.choice((0.3, 0.7, 0.95))
    lost: set[int] = set()
    for event in events:
        if event.kind == "size":
            if rnd.random() < share:
                _resize(image, event.place)
                lost = {place for place in lost if place < event.place}
            continue
        for position in range(0, len(event.data), SECTOR):
            place = event.place + position
            if place in lost or rnd.random() >= share:
                lost.add(place)
                continue
            if len(image) < place:
                image.extend(bytes(place - len(image)))
            image[place : place + SECTOR] = event.data[position : position + SECTOR]


def left_by(recording: Recording, seed: str, wanted: Sequence[State]) -> Iterator[tuple[State, dict[str, bytes]]]:
    """What each of the states, in the order of their cuts, consists of: the bytes of the disks by name."""
    disks = {name: _Disk(bytearray(start)) for name, start in recording.starts.items()}
    position = 0
    for state in wanted:
        while position < state.cut:
            event = recording.events[position]
            if event.kind == "barrier":
                disks[event.disk].settle(event.place)
            elif event.kind != "nothing":
                disks[event.disk].pending.append((position, event))
            position += 1
        rnd = random.Random(f"{seed}/{state.number}")
        yield state, {name: disk.left(state.survives, rnd) for name, disk in disks.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the disk as it was when the log began")
    parser.add_argument("log", type=Path)
    parser.add_argument("left", type=Path, help="what to write: the disk after the crash")
    parser.add_argument("--events", type=int, help="after how many entries of the log; default: all of them")
    parser.add_argument("--survives", choices=("none", "all", "some"), default="all", help="of what was not flushed")
    parser.add_argument("--seed", default="0")
    given = parser.parse_args(arguments)
    recording = recording_of("disk", given.start.read_bytes(), given.log.read_bytes())
    n = len(recording.events)
    state = State(0, min(n, given.events if given.events is not None else n), given.survives)
    for _state, left in left_by(recording, given.seed, [state]):
        given.left.write_bytes(left["disk"])


if __name__ == "__main__":
    main()
