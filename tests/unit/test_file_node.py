"""The file driver: what it opens, moves, zeroes and makes durable, and how it fails."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import drivers
from blocklib.buffers import PIECE
from blocklib.disk import Disk
from blocklib.errors import (
    ClosedError,
    ImageNotFoundError,
    OptionError,
    PolicyError,
    ReadOnlyError,
    StorageError,
    UsageError,
)
from blocklib.extents import FLAG_ALLOCATED, FLAG_DATA, FLAG_EOF, FLAG_OFFSET_VALID, FLAG_ZERO, KIND_DATA, KIND_ZERO
from blocklib.graph import Edge
from blocklib.policy import Reference
from blocklib.protocols import host
from blocklib.protocols.file import FileNode, HostDeviceNode
from tests.nodes import descriptors_of, loop_device

MiB = 1 << 20

Open = Callable[..., FileNode]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"a" * 1000)
    return path


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """`opened(read_only=True, ...)`: a loaded node over `path`, closed at the end of the test."""
    nodes = []

    def open_node(**options: Any) -> FileNode:
        node = FileNode(None, str(path), **{"read_only": False, **options})
        node.load()
        nodes.append(node)
        return node

    yield open_node
    for node in nodes:
        node.abandon()


def read(node: FileNode, offset: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    node.preadv(offset, (memoryview(buffer),))
    return bytes(buffer)


def failing(number: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def open_descriptors() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir()}


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFoundError) as caught:
        FileNode(None, str(tmp_path / "nothing"), read_only=True).load()
    assert isinstance(caught.value, FileNotFoundError)
    assert (caught.value.errno, caught.value.operation) == (errno.ENOENT, "open")
    assert caught.value.filename == str(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["with\0nul", "\udfff\ud800"])
def test_a_name_that_no_file_can_have_is_the_callers_fault(name: str) -> None:
    with pytest.raises(UsageError):
        FileNode(None, name, read_only=True).load()


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("kind", ["directory", "named pipe", "socket", "character device"])
def test_what_is_neither_file_nor_block_device_is_refused_without_waiting(tmp_path: Path, kind: str, read_only: bool) -> None:
    path = tmp_path / "it"
    match kind:
        case "directory":
            path.mkdir()
        case "named pipe":
            os.mkfifo(path)
        case "socket":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(os.path.relpath(path))
            listener.close()
        case _:
            path = Path(os.devnull)
    before = open_descriptors()
    with pytest.raises(StorageError, match=f"a {kind}, where the driver 'file' needs a regular file or a block device"):
        FileNode(None, str(path), read_only=read_only).load()
    assert open_descriptors() == before


def test_what_was_opened_is_checked_and_not_only_what_was_looked_at(tmp_path: Path) -> None:
    node = FileNode(None, str(tmp_path), read_only=True)
    node.use_opener(lambda flags: os.open(tmp_path, flags))
    before = open_descriptors()
    with pytest.raises(StorageError, match="a directory"):
        node.load()
    assert open_descriptors() == before


def test_host_device_refuses_a_regular_file(path: Path) -> None:
    with pytest.raises(StorageError, match="a regular file, where the driver 'host_device' needs a block device"):
        HostDeviceNode(None, str(path), read_only=True).load()


def test_an_opener_opens_in_place_of_the_name(path: Path, opened: Open) -> None:
    seen: list[int] = []

    def opener(flags: int) -> int:
        seen.append(flags)
        return os.open(path, flags)

    node = FileNode(None, "shown/in/messages", read_only=True)
    node.use_opener(opener)
    node.load()
    assert read(node, 0, 2) == b"aa"
    node.close()
    assert len(seen) == 1
    assert seen[0] & os.O_ACCMODE == os.O_RDONLY


def test_what_an_opener_raises_goes_up_as_it_is() -> None:
    refusal = PolicyError("no", reference=Reference("backing", "x", "raw", "y", 1))

    def opener(flags: int) -> int:
        raise refusal

    node = FileNode(None, "x", read_only=True)
    node.use_opener(opener)
    with pytest.raises(PolicyError) as caught:
        node.load()
    assert caught.value is refusal


def test_descriptors_are_not_inherited_by_programs(opened: Open, path: Path) -> None:
    opened()
    (fd,) = descriptors_of(path)
    assert not os.get_inheritable(fd)


def test_options_have_qemus_names(path: Path) -> None:
    options = {
        "driver": "file",
        "node-name": "disk0",
        "filename": str(path),
        "cache.direct": False,
        "cache.no-flush": True,
        "discard": "unmap",
        "force-share": True,
        "locking": "off",
        "aio": "io_uring",
    }
    node = FileNode.from_options(options, read_only=True)
    assert (node.name, node.filename, node.read_only) == ("disk0", str(path), True)
    assert (node.direct, node.no_flush, node.discard_passes) == (False, True, True)
    assert (node.force_share, node.locking) == (True, "off")


def test_both_drivers_are_found_by_name() -> None:
    assert (drivers.load("file"), drivers.load("host_device")) == (FileNode, HostDeviceNode)


def test_options_that_contradict_each_other_are_refused(path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        FileNode(None, str(path), read_only=False, force_share=True)
    assert caught.value.option == "force-share"
    with pytest.raises(OptionError) as caught:
        FileNode(None, str(path), read_only=True, aio="native")
    assert caught.value.option == "aio"


# -- moving bytes ------------------------------------------------------------------------------------------------------


def test_reads_past_the_end_are_zero(opened: Open) -> None:
    node = opened()
    assert read(node, 998, 10) == b"aa" + bytes(8)
    assert read(node, 5000, 10) == bytes(10)
    first, second, third = bytearray(b"?" * 999), bytearray(b"?" * 5), bytearray(b"?" * 5)
    node.preadv(0, (memoryview(first), memoryview(second), memoryview(third)))
    assert first + second + third == b"a" * 1000 + bytes(9)


def test_a_write_past_the_end_grows_the_file(opened: Open, path: Path) -> None:
    node = opened()
    node.pwritev(2000, (b"b",))
    assert node.size == 2001
    assert path.read_bytes() == b"a" * 1000 + bytes(1000) + b"b"


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_transfers_are_resumed(opened: Open, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    whole_read, whole_write = os.preadv, os.pwritev

    def short_read(fd: int, views: Sequence[Any], offset: int) -> int:
        view = next((view for view in views if len(view)), views[0])
        return whole_read(fd, [memoryview(view)[:most]], offset)

    def short_write(fd: int, views: Sequence[Any], offset: int) -> int:
        view = next((view for view in views if len(view)), views[0])
        return whole_write(fd, [memoryview(view)[:most]], offset)

    node = opened()
    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwritev", short_write)
    node.pwritev(10, (b"one",))
    node.pwritev(20, (b"two", b"", bytearray(b"three"), memoryview(b"four" * 500)))
    assert node.size == 20 + 8 + 2000
    assert read(node, 8, 8) == b"aaoneaaa"
    first, second = bytearray(12), bytearray(2010)
    node.preadv(18, (memoryview(first), memoryview(second)))
    assert first + second == b"aatwothree" + b"four" * 500 + bytes(12)


def test_a_device_that_takes_nothing_more_is_full(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened()
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(StorageError) as caught:
        node.pwritev(0, (b"x",))
    assert caught.value.errno == errno.ENOSPC


def test_errors_of_the_host_name_the_call_the_file_and_the_number(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened()
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    monkeypatch.setattr(os, "pwritev", failing(errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        read(node, 0, 1)
    assert (caught.value.errno, caught.value.operation, caught.value.filename) == (errno.EIO, "preadv", str(path))
    with pytest.raises(StorageError) as caught:
        node.pwritev(0, (b"x",))
    assert (caught.value.errno, caught.value.operation, caught.value.filename) == (errno.ENOSPC, "pwritev", str(path))


def test_a_file_open_for_reading_refuses_every_change(opened: Open, path: Path) -> None:
    node = opened(read_only=True)
    for change in (
        lambda: node.pwritev(0, (b"x",)),
        lambda: node.zero_range(0, 1, unmap=False),
        lambda: node.discard_range(0, 1),
        lambda: node.truncate(0),
    ):
        with pytest.raises(ReadOnlyError):
            change()  # type: ignore[no-untyped-call]
    node.flush()
    node.close()
    assert path.read_bytes() == b"a" * 1000


def test_a_closed_node_says_so(opened: Open) -> None:
    node = opened()
    node.close()
    node.close()
    with pytest.raises(ClosedError):
        read(node, 0, 1)
    with pytest.raises(ClosedError):
        node.pwritev(0, (b"x",))
    with pytest.raises(ClosedError):
        node.flush()
    with pytest.raises(ClosedError):
        node.zero_range(0, 2000, unmap=False)
    with pytest.raises(ClosedError):
        node.truncate(5)
    with pytest.raises(ClosedError):
        node.resolve(0, 5)
    with pytest.raises(ClosedError):
        node.allocated_size()
    node.close()


def test_threads_that_grow_the_file_lose_nothing(opened: Open) -> None:
    """Growing by zeroes must not cut off what another thread has just written behind it."""
    node = opened()
    block, rounds, workers = 512, 200, 4

    def work(number: int) -> None:
        for i in range(rounds):
            start = (i * workers + number) * block
            if (number + i) % 2:
                node.zero_range(start, block, unmap=False)
            else:
                node.pwritev(start, (bytes([1 + number]) * block,))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.size == rounds * workers * block
    for number in range(workers):
        for i in range(rounds):
            expected = bytes(block) if (number + i) % 2 else bytes([1 + number]) * block
            assert read(node, (i * workers + number) * block, block) == expected


# -- direct I/O --------------------------------------------------------------------------------------------------------


@pytest.fixture
def direct(opened: Open) -> FileNode:
    try:
        return opened(direct=True)
    except StorageError as exc:
        if exc.errno != errno.EINVAL:
            raise
        pytest.skip("the file system of the tests has no direct I/O")


def test_direct_io_bypasses_the_page_cache_and_asks_for_alignment(direct: FileNode) -> None:
    (fd,) = descriptors_of(Path(direct.path))
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    assert direct.request_alignment in (512, 1024, 2048, 4096)


def test_direct_io_at_any_offset_and_length_goes_through_the_edge(direct: FileNode) -> None:
    edge = Edge(None, "user", direct, 0, 15)
    buffer = bytearray(1200)
    edge.read(3, memoryview(buffer))
    assert buffer == b"a" * 997 + bytes(203)
    edge.write(990, [b"b" * 1000])
    assert direct.size == 1990
    edge.read(985, memoryview(buffer))
    assert buffer == b"a" * 5 + b"b" * 1000 + bytes(195)
    edge.write_zeroes(1985, 3000, unmap=False)
    assert direct.size == 4985
    assert Path(direct.path).read_bytes() == b"a" * 990 + b"b" * 995 + bytes(3000)


def test_writers_that_pad_the_end_of_the_file_do_not_cut_each_other_off(direct: FileNode) -> None:
    edge = Edge(None, "user", direct, 0, 15)
    length, rounds, workers = 700, 40, 4

    def work(number: int) -> None:
        for i in range(rounds):
            edge.write((i * workers + number) * length, [bytes([1 + number]) * length])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = b"".join(bytes([1 + number]) * length for _ in range(rounds) for number in range(workers))
    assert Path(direct.path).read_bytes() == expected


def test_alignment_is_found_by_trying_where_the_kernel_does_not_tell(direct: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_statx_alignment", lambda fd: None)
    Path(direct.path).write_bytes(bytes(8192))
    fd = os.open(direct.path, os.O_RDONLY | os.O_DIRECT)
    try:
        assert host.direct_alignment(fd, is_device=False) == direct.request_alignment
        os.truncate(direct.path, 0)
        assert host.direct_alignment(fd, is_device=False) == 4096
    finally:
        os.close(fd)


def test_a_file_system_without_direct_io_is_named_as_the_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EINVAL))
    with pytest.raises(StorageError, match=r"cache\.direct=on"):
        FileNode(None, str(path), read_only=True, direct=True).load()


# -- zeroes and holes --------------------------------------------------------------------------------------------------


def can_punch(path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            host.fallocate(file.fileno(), host.PUNCH_HOLE | host.KEEP_SIZE, 0, 1)
        except OSError:
            return False
    return True


@pytest.fixture
def full(path: Path) -> Path:
    """`path` with 1 MiB of data."""
    path.write_bytes(b"x" * MiB)
    os.sync()
    return path


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(990, 20), (1000, 70_001), (5000, 3 * PIECE), (0, 1000), (7, 13)])
def test_zeroing_past_the_end_grows_the_file(opened: Open, path: Path, unmap: bool, offset: int, length: int) -> None:
    node = opened()
    node.zero_range(offset, length, unmap=unmap)
    expected = bytearray(b"a" * 1000).ljust(max(1000, offset + length), b"\0")
    expected[offset : offset + length] = bytes(length)
    assert node.size == len(expected)
    assert path.read_bytes() == expected


def test_zeroing_with_unmap_gives_space_back_and_without_it_keeps_it(opened: Open, full: Path) -> None:
    if not can_punch(full):
        pytest.skip("the file system of the tests has no holes")
    full.write_bytes(b"x" * MiB)
    node = opened()
    node.zero_range(0, MiB // 2, unmap=False)
    assert node.allocated_size() == MiB
    node.zero_range(0, MiB // 2, unmap=True)
    assert node.allocated_size() == MiB // 2
    assert full.read_bytes() == bytes(MiB // 2) + b"x" * (MiB // 2)


def test_a_discard_gives_space_back(opened: Open, full: Path) -> None:
    if not can_punch(full):
        pytest.skip("the file system of the tests has no holes")
    node = opened()
    node.discard_range(MiB // 2, 2 * MiB)
    assert node.allocated_size() == MiB // 2
    assert node.size == full.stat().st_size == MiB


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_what_the_file_system_cannot_do_is_asked_once(
    opened: Open, full: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    modes: list[int] = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        modes.append(mode)
        raise OSError(number, os.strerror(number))

    node = opened()
    monkeypatch.setattr(host, "fallocate", fallocate)
    for start in (0, 5000):
        node.zero_range(start, 100, unmap=True)
        node.discard_range(start + 500, 100)
    assert sorted(modes) == sorted([host.PUNCH_HOLE | host.KEEP_SIZE, host.ZERO_RANGE | host.KEEP_SIZE])
    expected = bytearray(b"x" * MiB)
    expected[0:100] = expected[5000:5100] = bytes(100)
    assert full.read_bytes() == expected


def test_a_hole_that_cannot_be_made_for_another_reason_is_an_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened()
    monkeypatch.setattr(host, "fallocate", failing(errno.EIO))
    for change in (lambda: node.zero_range(0, 100, unmap=True), lambda: node.discard_range(0, 100)):
        with pytest.raises(StorageError) as caught:
            change()  # type: ignore[no-untyped-call]
        assert caught.value.errno == errno.EIO


def test_zeroing_the_end_of_a_file_with_direct_io_keeps_its_odd_length(
    direct: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "fallocate", failing(errno.EOPNOTSUPP))
    direct.zero_range(0, 1000, unmap=False)
    assert Path(direct.path).read_bytes() == bytes(1000)


def test_runs_are_data_and_holes_as_the_file_system_has_them(opened: Open, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MiB)
        file.seek(MiB // 2)
        file.write(b"d" * 65_536)
    with path.open("rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0:
            pytest.skip("the file system of the tests has no holes")
    node = opened(read_only=True)
    data = FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID
    hole = FLAG_ZERO | FLAG_ALLOCATED | FLAG_OFFSET_VALID
    middle = MiB // 2
    assert node.resolve(0, MiB) == (KIND_ZERO, None, 0, middle, hole)
    assert node.resolve(100, 200) == (KIND_ZERO, None, 100, 200, hole)
    assert node.resolve(middle, MiB - middle) == (KIND_DATA, None, middle, 65_536, data)
    after = middle + 65_536
    assert node.resolve(after, MiB) == (KIND_ZERO, None, after, MiB - after, hole | FLAG_EOF)
    assert node.resolve(MiB, 512)[3:] == (512, FLAG_ZERO | FLAG_ALLOCATED | FLAG_EOF)


def test_the_run_that_reaches_the_end_says_so(opened: Open) -> None:
    node = opened(read_only=True)
    flags = FLAG_DATA | FLAG_ALLOCATED | FLAG_OFFSET_VALID
    assert node.resolve(0, 999) == (KIND_DATA, None, 0, 999, flags)
    assert node.resolve(0, 1000) == (KIND_DATA, None, 0, 1000, flags | FLAG_EOF)
    assert node.resolve(0, 5000) == (KIND_DATA, None, 0, 1000, flags | FLAG_EOF)


def test_without_hole_detection_all_is_data(opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(path, MiB)
    node = opened(read_only=True)
    monkeypatch.setattr(os, "lseek", failing(errno.EINVAL))
    for offset in (0, MiB // 2):
        kind, _child, _offset, n, _flags = node.resolve(offset, MiB)
        assert (kind, n) == (KIND_DATA, MiB - offset)


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_file_grows_as_it_was_asked_to(opened: Open, path: Path, preallocation: Any, direct_io: bool) -> None:
    try:
        node = opened(direct=direct_io)
    except StorageError:
        pytest.skip("the file system of the tests has no direct I/O")
    node.truncate(2 * MiB + 77, preallocation)
    assert node.size == path.stat().st_size == 2 * MiB + 77
    assert path.read_bytes() == b"a" * 1000 + bytes(2 * MiB + 77 - 1000)
    allocated = node.allocated_size()
    assert allocated is not None
    assert (allocated >= 2 * MiB) == (preallocation != "off")


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_a_file_that_could_not_grow_has_its_old_size(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch, preallocation: Any
) -> None:
    def half(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    node = opened()
    monkeypatch.setattr(os, "posix_fallocate", half)
    monkeypatch.setattr(os, "pwritev", failing(errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        node.truncate(MiB, preallocation)
    assert caught.value.errno == errno.ENOSPC
    assert node.size == path.stat().st_size == 1000


def test_preallocation_that_makes_no_sense_is_refused(opened: Open, path: Path) -> None:
    node = opened()
    with pytest.raises(OptionError):
        node.truncate(MiB, "metadata")
    with pytest.raises(UsageError):
        node.truncate(10, "full")
    assert node.size == path.stat().st_size == 1000


def test_a_file_shrinks(opened: Open, path: Path) -> None:
    node = opened()
    node.truncate(10)
    assert (node.size, path.read_bytes()) == (10, b"a" * 10)


# -- durability --------------------------------------------------------------------------------------------------------


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    return calls


def test_a_flush_reaches_the_host(opened: Open, syncs: list[int]) -> None:
    node = opened()
    node.flush()
    assert len(syncs) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.pwritev(0, (b"x",)),
        lambda node: node.pwritev(5000, (b"x",)),
        lambda node: node.zero_range(0, 10, unmap=True),
        lambda node: node.discard_range(0, 10),
        lambda node: node.truncate(5),
    ],
)
def test_closing_flushes_what_was_not_flushed(opened: Open, syncs: list[int], change: Callable[[FileNode], None]) -> None:
    node = opened()
    change(node)
    node.close()
    assert len(syncs) == 1
    node = opened()
    change(node)
    node.flush()
    node.close()
    assert len(syncs) == 2
    opened().close()
    assert len(syncs) == 2


def test_unsafe_mode_never_flushes(opened: Open, syncs: list[int]) -> None:
    node = opened(no_flush=True)
    node.pwritev(0, (b"x",))
    node.flush()
    node.close()
    assert syncs == []


def test_a_failed_flush_fails_every_later_flush(opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened()
    node.pwritev(0, (b"x",))
    with monkeypatch.context() as host_fails:
        host_fails.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(StorageError) as first:
            node.flush()
    assert (first.value.errno, first.value.operation, first.value.filename) == (errno.EIO, "fdatasync", str(path))
    before = open_descriptors()
    with pytest.raises(StorageError) as later:
        node.flush()
    assert later.value.__cause__ is first.value
    with pytest.raises(StorageError):
        node.prepare_reopen(read_only=True)
    with pytest.raises(StorageError):
        node.close()
    assert len(open_descriptors()) == len(before) - 1
    opened().flush()


def test_a_write_during_a_flush_is_flushed_again_at_close(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened()
    calls = []

    def sync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            node.pwritev(0, (b"y",))

    monkeypatch.setattr(os, "fdatasync", sync)
    node.pwritev(0, (b"x",))
    node.flush()
    node.close()
    assert len(calls) == 2


# -- reopening ---------------------------------------------------------------------------------------------------------


def test_a_reopened_file_is_the_same_file_whatever_its_name_means_now(opened: Open, path: Path) -> None:
    node = opened(read_only=True)
    path.rename(path.with_suffix(".old"))
    path.write_bytes(b"impostor")
    node.prepare_reopen(read_only=False).commit()
    node.pwritev(0, (b"b",))
    node.close()
    assert path.read_bytes() == b"impostor"
    assert path.with_suffix(".old").read_bytes()[:2] == b"ba"


def test_without_proc_a_name_that_means_another_file_now_is_refused(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened(read_only=True)
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    node.prepare_reopen(read_only=False).abort()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(b"impostor")
    before = open_descriptors()
    with pytest.raises(StorageError, match="another file"):
        node.prepare_reopen(read_only=False)
    assert open_descriptors() == before
    assert read(node, 0, 1) == b"a"


def test_a_reopen_leaves_one_descriptor_whichever_way_it_ends(opened: Open) -> None:
    node = opened(read_only=True)
    before = len(open_descriptors())
    node.prepare_reopen(read_only=False).abort()
    assert (node.read_only, len(open_descriptors())) == (True, before)
    node.prepare_reopen(read_only=False).commit()
    assert (node.read_only, len(open_descriptors())) == (False, before)
    node.prepare_reopen(read_only=False).commit()
    assert len(open_descriptors()) == before


def test_a_reopen_for_reading_flushes_first(opened: Open, syncs: list[int]) -> None:
    node = opened()
    node.pwritev(0, (b"b",))
    node.prepare_reopen(read_only=True).commit()
    assert len(syncs) == 1
    with pytest.raises(ReadOnlyError):
        node.pwritev(0, (b"c",))


def test_a_reopen_that_the_host_refuses_changes_nothing(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened(read_only=True)
    with monkeypatch.context() as host_refuses:
        host_refuses.setattr(os, "open", failing(errno.EROFS))
        with pytest.raises(StorageError) as caught:
            node.prepare_reopen(read_only=False)
    assert caught.value.errno == errno.EROFS
    assert node.read_only
    assert read(node, 0, 1) == b"a"


# -- block devices -----------------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[FileNode]:
    with loop_device(tmp_path / "backing", MiB) as name:
        node = HostDeviceNode(None, name, read_only=False)
        node.load()
        yield node
        node.close()


def test_a_device_has_its_own_size(device: FileNode) -> None:
    assert device.size == MiB
    device.truncate(1000)
    assert device.size == MiB
    with pytest.raises(StorageError, match="cannot grow"):
        device.truncate(MiB + 1)


def test_a_device_is_full_at_its_end(device: FileNode) -> None:
    for change in (lambda: device.pwritev(MiB - 4, (b"x" * 8,)), lambda: device.zero_range(MiB, 512, unmap=False)):
        with pytest.raises(StorageError) as caught:
            change()  # type: ignore[no-untyped-call]
        assert caught.value.errno == errno.ENOSPC
    assert device.size == MiB


def test_a_device_is_zeroed_and_discarded_in_sectors(device: FileNode, tmp_path: Path) -> None:
    assert device.zero_alignment == 512
    device.pwritev(0, (b"x" * MiB,))
    device.zero_range(512, 1024, unmap=False)
    device.zero_range(MiB // 4, MiB // 4, unmap=True)
    device.discard_range(MiB // 2, MiB // 2)
    device.flush()
    content = read(device, 0, MiB // 2)
    assert content == b"x" * 512 + bytes(1024) + b"x" * (MiB // 4 - 1536) + bytes(MiB // 4)
    backing = tmp_path / "backing"
    if can_punch(backing):
        assert backing.stat().st_blocks * 512 <= MiB // 2


def test_the_file_driver_takes_a_device_too(device: FileNode) -> None:
    node = FileNode(None, device.path, read_only=True)
    node.load()
    assert (node.is_device, node.size) == (True, MiB)
    node.close()


# -- all together ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [11, 12])
def test_any_sequence_of_changes_gives_the_bytes_that_python_would_have(opened: Open, path: Path, seed: int) -> None:
    """Growing by every means, with and without holes, at any offset."""
    rng = random.Random(seed)
    node = opened()
    expected = bytearray(b"a" * 1000)
    for step in range(150):
        offset, length = rng.randrange(300_000), rng.randrange(1, 70_000)
        end = offset + length
        match rng.randrange(4):
            case 0:
                data = bytes([1 + step % 255]) * length
                node.pwritev(offset, (data,))
                expected = expected.ljust(end, b"\0")
                expected[offset:end] = data
            case 1:
                node.zero_range(offset, length, unmap=rng.random() < 0.5)
                expected = expected.ljust(end, b"\0")
                expected[offset:end] = bytes(length)
            case 2:
                node.truncate(offset)
                expected = expected[:offset].ljust(offset, b"\0")
            case _:
                inside = expected[offset:end].ljust(length, b"\0")
                assert read(node, offset, length) == inside
        assert node.size == len(expected)
    assert path.read_bytes() == expected


def test_a_disk_over_a_bare_file_works(path: Path, opened: Open) -> None:
    with Disk(opened(), "r+") as disk:
        disk.write(0, b"b")
        assert [(extent.offset, extent.length, extent.data) for extent in disk.extents()] == [(0, 1000, True)]
    assert path.read_bytes() == b"b" + b"a" * 999


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_the_host_is_asked_for_extents_and_to_write_in_place(
    driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(host, "write_in_place", lambda fd: asked.append(("nocow", os.fstat(fd).st_size)))
    monkeypatch.setattr(host, "set_extent_size", lambda fd, length: asked.append(("extent_size_hint", length)))
    blocklib.create(tmp_path / "a", MiB, format=driver, options={"nocow": True, "extent_size_hint": 64 << 10})
    assert asked == [("nocow", 0), ("extent_size_hint", 64 << 10)]  # while the file is empty: later it has no effect
    blocklib.create(tmp_path / "b", MiB, format=driver, options={"extent_size_hint": 0})
    assert len(asked) == 2


def test_a_host_that_cannot_follow_a_hint_makes_the_image_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, *_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(host, "write_in_place", refuse)
    monkeypatch.setattr(host, "set_extent_size", refuse)
    path = tmp_path / "a"
    assert blocklib.create(path, MiB, format="raw", options={"nocow": True, "extent_size_hint": 4096}).virtual_size == MiB
