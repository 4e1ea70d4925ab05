"""Whatever a crash leaves of the last writes, both checks find at worst leaked clusters, and what was flushed is there.

Each workload runs on disks whose writes are logged; then the host "crashes" at many places of the log.
"""

from __future__ import annotations

import random
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blocklib import graph
from blocklib.disk import Disk
from blocklib.formats.qcow2.writeback import WriteBack
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE
from tests.crash import campaign, replay
from tests.crash.campaign import Run
from tests.crash.cases import CASES
from tests.crash.guests import Guest
from tests.crash.host import Host
from tests.crash.look import Look
from tests.crash.recording import SECTOR, Drive
from tests.crash.replay import Event, Recording, left_by, recording_of, states
from tests.crash.workload import disk_on, new_image
from tests.programs import Program

N_STATES = 300
N_TORTURES = 20
N_STATES_TORTURED = 1000


@pytest.fixture
def many_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("name", CASES)
def test_a_crash_costs_nothing_but_what_was_not_flushed(
    name: str, tmp_path: Path, qemu_img: Program, many_thread_switches: None
) -> None:
    assert Run.of(name, "0").look_at(N_STATES, tmp_path, qemu_img, every=40) == N_STATES


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(1, N_TORTURES + 1))
@pytest.mark.parametrize("name", CASES)
def test_torture(name: str, seed: int, tmp_path: Path, qemu_img: Program, many_thread_switches: None) -> None:
    Run.of(name, str(seed)).look_at(N_STATES_TORTURED, tmp_path, qemu_img, every=1)


# -- the replayer itself -----------------------------------------------------------------------------------------------


def _write(disk: str, sector: int, word: bytes) -> Event:
    return Event(disk, "write", sector * SECTOR, word.ljust(SECTOR, b"."))


def _words(image: bytes) -> list[bytes]:
    return [image[place : place + SECTOR].rstrip(b".\0") for place in range(0, len(image), SECTOR)]


EVENTS = [
    _write("a", 0, b"old"),
    _write("b", 0, b"other"),
    Event("a", "barrier", 1, b""),
    _write("a", 0, b"new"),
    Event("a", "write", SECTOR, b"1".ljust(SECTOR, b".") + b"2".ljust(SECTOR, b".")),
    Event("a", "size", 2 * SECTOR, b""),
    _write("a", 3, b"late"),
    Event("a", "barrier", 5, b""),
]


def test_after_a_barrier_what_came_before_it_began_is_there_and_of_the_rest_anything() -> None:
    recording = Recording({"a": bytes(SECTOR), "b": b""}, EVENTS)
    seen: dict[int, set[tuple[bytes, ...]]] = {}
    for state, left in left_by(recording, "x", states(recording, "x", 4000)):
        seen.setdefault(state.cut, set()).add(tuple(_words(left["a"])))
        if state.cut < 2:
            assert left["b"] == b""
    assert seen[1] == {(b"",), (b"old",)}
    assert seen[3] == {(b"old",)}, "a barrier was completed"
    assert seen[4] == {(b"old",), (b"new",)}
    assert seen[5] == {
        (b"old",),
        (b"new",),
        (b"old", b"1"),
        (b"old", b"", b"2"),
        (b"old", b"1", b"2"),
        (b"new", b"1"),
        (b"new", b"", b"2"),
        (b"new", b"1", b"2"),
    }, "a write of two sectors may be torn between them"
    assert {len(words) for words in seen[6]} == {1, 2, 3}
    last = seen[len(EVENTS)]
    assert all(words[:3] in ((b"new", b"1", b"2"), (b"new", b"1"), (b"new", b"1", b"")) for words in last)
    assert any(words[3:] == (b"late",) for words in last)
    assert any(words[3:] == () for words in last)


def test_every_prefix_at_a_barrier_is_looked_at() -> None:
    run = Run.of("allocating writes", "0")
    barriers = [number for number, event in enumerate(run.recording.events) if event.kind == "barrier"]
    chosen = states(run.recording, "0", 20 * len(barriers))
    assert {(number, "all") for number in barriers} <= {(state.cut, state.survives) for state in chosen}
    assert len(chosen) == 20 * len(barriers)


def test_the_marks_of_a_log_say_what_the_host_has_seen() -> None:
    """A file with its log alone gives the same recording, flushes that were overtaken included."""
    host = Host()
    file = host.add("disk", bytes(64 * SECTOR))
    node = file.opened()
    with Transaction() as change:
        edge = change.attach(None, "user", node, wanted=CONSISTENT_READ | WRITE | RESIZE)
    rnd = random.Random(1)

    def overtaken() -> None:
        if rnd.random() < 0.4:
            thread = threading.Thread(target=edge.write, args=(rnd.randrange(60) * SECTOR, (b"x" * 700,)))
            thread.start()
            thread.join()

    file.drive.before_barrier = overtaken
    for _ in range(80):
        match rnd.randrange(4):
            case 0:
                edge.flush()
            case 1:
                edge.discard(rnd.randrange(30) * SECTOR, 4 * SECTOR)
            case 2:
                edge.truncate(rnd.randrange(60, 80) * SECTOR)
            case _:
                edge.write(rnd.randrange(60) * SECTOR, (rnd.randbytes(1000),))
    edge.flush()
    seen = host.recording()
    read = recording_of("disk", file.start, bytes(file.sink.data))

    def durable(recording: Recording) -> list[dict[str, bytes]]:
        ends = [number for number, event in enumerate(recording.events) if event.kind == "barrier"]
        wanted = [replay.State(0, end + 1, "none") for end in ends]
        return [left for _state, left in left_by(recording, "", wanted)]

    assert durable(read) == durable(seen)
    assert [event for event in read.events if event.kind in ("write", "size")] == [
        event for event in seen.events if event.kind in ("write", "size")
    ]
    everything = [replay.State(0, len(seen.events), "all")]
    for _state, left in left_by(seen, "", everything):
        assert left["disk"][: file.drive.size] == bytes(file.drive.data)


def test_a_state_is_made_of_a_start_and_a_log_in_files(tmp_path: Path) -> None:
    host = Host()
    file = host.add("disk", new_image(300 * SECTOR, {"cluster_size": 512}))
    with disk_on(file.opened()) as disk:
        disk.write(0, b"x" * 5000)
        disk.flush()
    (tmp_path / "start").write_bytes(file.start)
    (tmp_path / "log").write_bytes(file.sink.data)
    replay.main([str(tmp_path / name) for name in ("start", "log", "left")])
    assert (tmp_path / "left").read_bytes()[: file.drive.size] == bytes(file.drive.data)


@pytest.mark.parametrize("name", ["resize", "a full host", "commit", "stream", "bitmaps", "repair that moves data"])
def test_a_seed_does_the_same_again(name: str) -> None:
    first, second = Run.of(name, "3").recording, Run.of(name, "3").recording
    assert first.events == second.events
    assert first.starts == second.starts


# -- the judges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Suspicious:
    """A judge who finds fault with one state."""

    place: int

    def __call__(self, left: Mapping[str, bytes], cut: int, look: Look) -> None:
        assert cut < self.place, "not like this"


@dataclass(frozen=True)
class _Case:
    repeats: bool
    place: int = 20

    def run(self, seed: str) -> tuple[Host, _Suspicious]:
        host, _judge = CASES["resize"].run(seed)
        return host, _Suspicious(self.place)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_failure_ends_with_the_command_that_shows_it_again(
    repeats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "doubtful", _Case(repeats))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(AssertionError, match="not like this") as caught:
        Run.of("doubtful", "5").look_at(50, tmp_path, None, every=1)
    words = shlex.split(str(caught.value).splitlines()[-1].removeprefix("again: "))
    assert words[:3] == ["python", "-m", "tests.crash.campaign"]
    with pytest.raises(AssertionError) as again:
        campaign.main(words[3:])
    assert str(again.value).splitlines()[0] == str(caught.value).splitlines()[0]


def _no_barrier_for_data(self: WriteBack, *, data: bool = False) -> None:
    if not data:
        _barrier(self)


def _no_barrier_for_pointers(self: WriteBack, *, data: bool = False) -> None:
    if data:
        _barrier(self, data=True)


def _no_flush_of_files(self: graph.Edge) -> None:
    if self.name != "file":
        _flush(self)


_barrier, _flush = WriteBack.barrier, graph.Edge.flush


@pytest.mark.parametrize(
    ("owner", "name", "mutant", "case"),
    [
        (WriteBack, "barrier", _no_barrier_for_data, "allocating writes"),
        (WriteBack, "barrier", _no_barrier_for_data, "snapshots"),
        (WriteBack, "barrier", _no_barrier_for_data, "compressed writes"),
        (WriteBack, "barrier", _no_barrier_for_pointers, "discards and zeroes"),
        (graph.Edge, "flush", _no_flush_of_files, "resize"),
        (graph.Edge, "flush", _no_flush_of_files, "commit"),
        (graph.Edge, "flush", _no_flush_of_files, "bitmaps"),
        (graph.Edge, "flush", _no_flush_of_files, "a data file"),
    ],
    ids=lambda value: getattr(value, "__name__", value),  # without addresses, which differ between processes
)
def test_a_barrier_that_is_missing_is_missed(
    owner: Any, name: str, mutant: Any, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, mutant)
        run = Run.of(case, "0")
    with pytest.raises(AssertionError, match="again: "):
        run.look_at(N_STATES, tmp_path, None, every=1)


def test_freed_clusters_that_do_not_wait_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is used again before the removal of its pointer is durable shows another sector's data."""
    monkeypatch.setitem(CASES, "reuse", Guest(400, {"cluster_size": 512}, kinds={"discard": 3, "write": 5, "flush": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "discard", _discard_at_once)
        run = Run.of("reuse", "0")
    with pytest.raises(AssertionError, match="again: "):
        run.look_at(N_STATES, tmp_path, None, every=1)


_discard = Disk.discard


def _discard_at_once(self: Disk, offset: int, length: int) -> None:
    """What a driver would do that gives clusters back in memory and lets the next write have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriteBack, "barrier", lambda *_args, **_keywords: None)
        _discard(self, offset, length)
        self.node.flush()


def test_data_is_durable_in_the_data_file_before_an_entry_says_that_it_is_there() -> None:
    host = Host()
    options = {"cluster_size": 4096, "data_file": "guest.raw"}
    image, data = host.add("image", new_image(256 * SECTOR, options)), host.add("data", bytes(256 * SECTOR))
    with disk_on(image.opened(), data_file=data.opened()) as disk:
        before = host.now()
        disk.write(8192, b"x" * 4096)
        disk.flush()
        after = host.now()
    seen = [(event.kind, event.disk) for event in host.recording().events[before:after]]
    assert seen.index(("write", "data")) < seen.index(("barrier", "data"))
    assert seen.index(("barrier", "data")) < len(seen) - 1 - seen[::-1].index(("write", "image"))


def test_a_crash_of_a_drive_without_room_is_that_of_a_drive(tmp_path: Path) -> None:
    """The host of "a full host" has really been full."""
    for name in ("a full host", "a full host, compressing", "a full host, resizing"):
        case = CASES[name]
        assert isinstance(case, Guest)
        host, _judge = case.run("0")
        drive: Drive = host.files["image"].drive
        assert drive.capacity is not None
        assert drive.size > drive.capacity - 4096, name
