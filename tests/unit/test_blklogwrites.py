"""The write log: what reaches the child is in it, in an order that says what is durable, in the format of dm-log-writes."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB, OptionError, PoisonedError, StorageError
from blocklib.errors import ImageError
from blocklib.filters import dm_log_writes as log_format
from blocklib.filters.blklogwrites import BlkLogWritesNode
from blocklib.filters.dm_log_writes import DISCARD, FLUSH, MARK, LogEntry
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE
from blocklib.protocols.memory import MemoryNode
from tests.programs import Program

SIZE = 1 * MiB


def logged(folder: Path, *, file: Any = None, **options: Any) -> dict[str, Any]:
    """Options of the filter over a raw file, "disk", with its log in "log"."""
    disk, log = folder / "disk", folder / "log"
    if not disk.exists():
        disk.write_bytes(b"")
        with disk.open("r+b") as opened:
            opened.truncate(SIZE)
    log.touch()
    file = file or {"driver": "file", "filename": str(disk), "discard": "unmap"}
    return {"driver": "blklogwrites", "file": file, "log": {"driver": "file", "filename": str(log)}, **options}


def entries_of(path: Path) -> list[tuple[LogEntry, bytes]]:
    """What is in a log, each with its data."""
    data = path.read_bytes()
    found = log_format.entries(lambda offset, length: data[offset : offset + length], len(data), str(path))
    return [(entry, data[entry.data_position :][: entry.length] if entry.is_write else b"") for entry in found]


def replayed(start: bytes, path: Path) -> bytes:
    """A disk after everything in a log."""
    image = bytearray(start)
    for entry, data in entries_of(path):
        if entry.flags & DISCARD:
            data = bytes(entry.length)
        image[entry.offset : entry.offset + len(data)] = data
    return bytes(image)


def test_every_kind_of_request_is_logged_with_its_payload(tmp_path: Path) -> None:
    with blocklib.open(logged(tmp_path), "r+") as disk:
        disk.write(4096, b"a" * 1024)
        disk.write(4100, b"b" * 10)
        disk.flush()
        disk.write_zeroes(8192, 700)
        disk.discard(16384, 4096)
        disk.write_batch([0, 512], b"c" * 1024)
        disk.truncate(SIZE + 777)
        disk.flush()
    found = entries_of(tmp_path / "log")
    assert [(entry.offset, entry.length, entry.flags, entry.text) for entry, _data in found] == [
        (4096, 1024, 0, ""),
        (4096, 512, 0, ""),
        (0, 0, FLUSH, ""),
        (8704, 512, 0, ""),
        (8192, 512, 0, ""),
        (16384, 4096, DISCARD, ""),
        (0, 512, 0, ""),
        (512, 512, 0, ""),
        (0, 0, MARK, f"size {SIZE + 777}"),
        (0, 0, FLUSH, ""),
    ]
    assert [data for _entry, data in found][:2] == [b"a" * 1024, b"aaaa" + b"b" * 10 + b"a" * 498]
    assert replayed(bytes(SIZE), tmp_path / "log") == (tmp_path / "disk").read_bytes()[:SIZE]


def test_a_sector_that_is_written_in_part_is_logged_as_it_is_then(tmp_path: Path) -> None:
    rnd = random.Random(3)
    with blocklib.open(logged(tmp_path, **{"log-sector-size": 4096}), "r+") as disk:
        for _ in range(200):
            offset = rnd.randrange(SIZE - 20000)
            match rnd.randrange(3):
                case 0:
                    disk.write(offset, rnd.randbytes(rnd.randrange(1, 9000)))
                case 1:
                    disk.write_zeroes(offset, rnd.randrange(1, 20000), unmap=rnd.random() < 0.5)
                case _:
                    disk.discard(offset, rnd.randrange(1, 20000))
    assert all(entry.offset % 4096 == 0 and entry.length % 4096 == 0 for entry, _data in entries_of(tmp_path / "log"))
    assert replayed(bytes(SIZE), tmp_path / "log") == (tmp_path / "disk").read_bytes()


def test_writers_of_one_sector_are_logged_in_the_order_in_which_they_wrote(tmp_path: Path) -> None:
    def work(number: int) -> None:
        rnd = random.Random(number)
        for _ in range(150):
            disk.write(rnd.randrange(8000), bytes((number,)) * rnd.randrange(1, 1500))
            if rnd.random() < 0.05:
                disk.flush()

    with blocklib.open(logged(tmp_path), "r+") as disk:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert replayed(bytes(SIZE), tmp_path / "log") == (tmp_path / "disk").read_bytes()


class _Gate(MemoryNode):
    """A disk whose next flush waits until it is let through, or fails."""

    def __init__(self) -> None:
        super().__init__(None, SIZE)
        self.entered = threading.Event()
        self.may_end = threading.Event()
        self.fails = False

    def flush(self) -> None:
        self.entered.set()
        assert self.may_end.wait(30)
        if self.fails:
            raise StorageError("no", errno=5, operation="flush")


def _on(file: MemoryNode, log: MemoryNode) -> tuple[BlkLogWritesNode, Any]:
    node = BlkLogWritesNode(None, None, read_only=False)
    with Transaction() as change:
        change.attach(node, "file", file)
        change.attach(node, "log", log)
        edge = change.attach(None, "user", node, wanted=CONSISTENT_READ | WRITE | RESIZE)
    node.load()
    node.activate()
    return node, edge


def _entries(log: MemoryNode) -> list[LogEntry]:
    def read(offset: int, length: int) -> bytes:
        data = bytearray(min(length, log.size - offset))
        log.preadv(offset, (memoryview(data),))
        return bytes(data)

    return list(log_format.entries(read, log.size))


def test_a_flush_vouches_for_nothing_that_was_written_after_it_began() -> None:
    file, log = _Gate(), MemoryNode(None, 0)
    _node, edge = _on(file, log)
    edge.write(0, (b"before" * 100,))
    flushing = threading.Thread(target=edge.flush)
    flushing.start()
    assert file.entered.wait(30)
    edge.write(4096, (b"during" * 100,))
    file.may_end.set()
    flushing.join(30)
    edge.write(8192, (b"after" * 100,))
    edge.flush()
    assert [(entry.offset // 4096, entry.flags, entry.text) for entry in _entries(log)] == [
        (0, 0, ""),
        (0, FLUSH, ""),
        (1, 0, ""),
        (0, MARK, "flushed 1"),
        (2, 0, ""),
        (0, FLUSH, ""),
    ]


def test_a_flush_that_fails_is_no_barrier() -> None:
    file, log = _Gate(), MemoryNode(None, 0)
    file.fails = True
    file.may_end.set()
    node, edge = _on(file, log)
    edge.write(0, (b"before",))
    with pytest.raises(StorageError):
        edge.flush()
    file.fails = False
    edge.flush()
    assert [(entry.flags, entry.text) for entry in _entries(log)] == [(0, ""), (MARK, "flushing"), (FLUSH, "")]
    assert node.poisoned is None


def test_where_the_log_cannot_be_written_nothing_else_is() -> None:
    class Full(MemoryNode):
        def pwritev(self, offset: int, views: Any) -> None:
            if offset >= 4096:
                raise StorageError("full", errno=28, operation="pwrite")
            super().pwritev(offset, views)

    file, log = MemoryNode(None, SIZE), Full(None, 0)
    node, edge = _on(file, log)
    edge.write(0, (b"a" * 4096,))
    with pytest.raises(StorageError, match="full"):
        edge.write(4096, (b"b" * 512,))
    for request in (lambda: edge.write(8192, (b"c",)), edge.flush, lambda: edge.truncate(SIZE * 2)):
        with pytest.raises(PoisonedError, match="log"):
            request()
    left = bytearray(1)
    file.preadv(8192, (memoryview(left),))
    assert left == b"\0"
    assert node.poisoned


def test_it_works_above_and_below_an_image(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    blocklib.create(path, SIZE, format="qcow2")
    start = path.read_bytes()
    qcow2 = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    with blocklib.open(logged(tmp_path, file=qcow2), "r+", discard="unmap") as disk:
        disk.write(65000, b"x" * 70000)
        disk.discard(65536, 65536)
        assert disk.read(65000, 1) == b"x"
        assert disk.info().format == "qcow2"
        content = disk.read(0, SIZE)
    assert replayed(bytes(SIZE), tmp_path / "log") == content
    path.write_bytes(start)
    with blocklib.open({"driver": "qcow2", "file": logged(tmp_path)}, "r+", discard="unmap") as disk:
        disk.write(65000, b"x" * 70000)
        disk.discard(65536, 65536)
        disk.snapshots.create("one")
        disk.write(0, b"y" * 65536)
    image = path.read_bytes()
    assert replayed(start.ljust(len(image), b"\0"), tmp_path / "log")[: len(image)] == image
    assert blocklib.check(path, format="qcow2").clean


def test_it_comes_and_goes_under_live_requests(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, SIZE, format="qcow2")
    stop = threading.Event()
    failures: list[BaseException] = []
    models = [bytearray(SIZE // 4) for _ in range(4)]

    def work(number: int) -> None:
        rnd = random.Random(number)
        try:
            while not stop.is_set():
                offset, data = rnd.randrange(SIZE // 4 - 9000), rnd.randbytes(rnd.randrange(1, 9000))
                disk.write(number * SIZE // 4 + offset, data)
                models[number][offset : offset + len(data)] = data
        except BaseException as exc:
            failures.append(exc)

    with blocklib.open(path, "r+") as disk:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for number in range(12):
            log = tmp_path / f"log{number}"
            log.touch()
            inserted = disk.insert_filter("blklogwrites", {"log": {"driver": "file", "filename": str(log)}})
            disk.flush()
            inserted.remove()
            entries_of(log)  # raises where it is not whole
        last = tmp_path / "last"
        last.touch()
        inserted = disk.insert_filter("blklogwrites", {"log": str(last)})
        begun = disk.read(0, SIZE)
        stop.set()
        for thread in threads:
            thread.join(60)
        inserted.remove()
        assert not failures
        content = disk.read(0, SIZE)
    assert content == b"".join(models)
    assert replayed(begun, last) == content


def test_a_log_is_continued(tmp_path: Path) -> None:
    with blocklib.open(logged(tmp_path, **{"log-sector-size": 1024}), "r+") as disk:
        disk.write(0, b"1" * 1024)
    with blocklib.open(logged(tmp_path, **{"log-append": True}), "r+") as disk:
        disk.write(1024, b"2" * 1024)
    writes = [(entry.offset, data[:1]) for entry, data in entries_of(tmp_path / "log") if entry.is_write]
    assert writes == [(0, b"1"), (1024, b"2")]
    with blocklib.open(logged(tmp_path), "r+"):
        pass
    assert [entry for entry, _data in entries_of(tmp_path / "log") if entry.is_write] == []


def test_the_superblock_counts_after_the_interval_and_each_flush(tmp_path: Path) -> None:
    def counted() -> int:
        return len(entries_of(tmp_path / "log"))

    with blocklib.open(logged(tmp_path, **{"log-super-update-interval": 3}), "r+") as disk:
        for number in range(5):
            disk.write(0, b"x" * 512)
            assert counted() == (number + 1) // 3 * 3
        disk.flush()
        assert counted() == 6


def test_a_log_in_use_or_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    both = {"log-append": True, "log-sector-size": 512}
    with pytest.raises(OptionError, match="log-sector-size"):
        blocklib.open(logged(tmp_path, **both), "r+")
    with pytest.raises(OptionError, match="log"):
        blocklib.open({"driver": "blklogwrites", "file": str(tmp_path / "disk")}, "r+")
    with blocklib.open(logged(tmp_path), "r+"):
        pass
    with (
        blocklib.open(tmp_path / "log", "r+", format="raw"),
        pytest.raises(blocklib.LockedError),
    ):
        blocklib.open(logged(tmp_path), "r+")
    with blocklib.open(logged(tmp_path), "r") as disk:
        assert disk.read(0, 1) == b"\0"


HEAD = log_format.pack_superblock(2, 512)
ENTRY = log_format.pack_entry(0, 512, 0, 512)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"rhswfsj",
        bytes(512),
        random.Random(1).randbytes(4096),
        HEAD[:8] + b"\2" + HEAD[9:],
        HEAD[:24] + (1000).to_bytes(4, "little") + HEAD[28:],
        HEAD[:24] + (1 << 30).to_bytes(4, "little") + HEAD[28:],
        HEAD + ENTRY,
        HEAD + ENTRY + bytes(512) + log_format.pack_entry(0, 512 << 50, 0, 512),
        HEAD + log_format.pack_entry(0, 0, MARK, 512)[:24] + (1 << 60).to_bytes(8, "little") + bytes(480),
        log_format.pack_superblock(1 << 60, 512) + bytes(4096),
    ],
    ids=range(11),
)
def test_what_is_no_log_is_not_continued(content: bytes, tmp_path: Path) -> None:
    target = logged(tmp_path, **{"log-append": True})
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(ImageError):
        blocklib.open(target, "r+")
    assert (tmp_path / "log").read_bytes() == content


COMMANDS = (
    "write -q -P 1 0 4096",
    "flush",
    "write -q -P 2 100 10",
    "write -q -P 3 8192 512",
    "write -q -z 16384 4096",
    "write -q -z -u 20480 4096",
    "discard -q 32768 4096",
    "write -q -P 4 0 1000",
    "writev -q -P 5 65536 512 512 1024",
    "flush",
)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_qemu_logs_the_same_and_each_continues_the_log_of_the_other(
    sector_size: int, tmp_path: Path, qemu_io: Program
) -> None:
    def run(name: str, *commands: str, ours: bool, extra: str) -> list[tuple[int, int, int, bytes]]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        logged(folder)
        options = (
            f"driver=blklogwrites,{extra},file.driver=file,file.filename={folder}/disk,file.discard=unmap,"
            f"log.driver=file,log.filename={folder}/log"
        )
        arguments = [word for command in commands for word in ("-c", command)]
        if ours:
            with blocklib.open(blocklib.parse_options(options), "r+") as disk:
                _perform(disk, commands)
        else:
            qemu_io("--image-opts", options, *arguments)
        return [
            (entry.offset, entry.length, entry.flags, data)
            for entry, data in entries_of(folder / "log")
            if entry.flags not in (FLUSH, MARK)
        ]

    # A discard of less than a sector is none; QEMU stops at it.
    commands = [command for command in COMMANDS if sector_size == 512 or "4096" in command]
    extra = f"log-sector-size={sector_size}"
    theirs = run("theirs", *commands, ours=False, extra=extra)
    ours = run("ours", *commands, ours=True, extra=extra)
    assert ours == theirs
    assert (tmp_path / "ours/disk").read_bytes() == (tmp_path / "theirs/disk").read_bytes()
    more = f"write -q -P 9 12288 {sector_size}"
    crossed = run("theirs", more, ours=True, extra="log-append=on")
    assert run("ours", more, ours=False, extra="log-append=on") == crossed
    assert crossed == [*ours, (12288, sector_size, 0, b"\x09" * sector_size)]


def _perform(disk: blocklib.Disk, commands: tuple[str, ...] | list[str]) -> None:
    for command in commands:
        words = command.split()
        numbers = [int(word) for word in words if word.isdigit()]
        match words[0]:
            case "flush":
                disk.flush()
            case "discard":
                disk.discard(*numbers)
            case _ if "-z" in words:
                disk.write_zeroes(*numbers, unmap="-u" in words)
            case _:
                pattern, offset, *lengths = numbers
                disk.write(offset, bytes((pattern,)) * sum(lengths))


def test_bulk_writers_do_not_pass_it_unseen(tmp_path: Path) -> None:
    rnd = random.Random(5)
    source = tmp_path / "source.raw"
    source.write_bytes(rnd.randbytes(300 * KiB) + bytes(400 * KiB) + rnd.randbytes(SIZE - 700 * KiB))
    with (
        blocklib.open(source, format="raw") as read,
        blocklib.open(logged(tmp_path), "r+") as disk,
    ):
        blocklib.convert(read, disk)
    assert (tmp_path / "disk").read_bytes() == source.read_bytes()
    assert replayed(bytes(SIZE), tmp_path / "log") == source.read_bytes()
