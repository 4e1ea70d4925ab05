"""The qcow2 engine when things go wrong or happen at once: failing hosts, interrupted changes, threads amid a flush."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import blocklib
from blocklib.disk import Disk
from blocklib.errors import ImageCorruptError, PoisonedError, StorageError, UsageError
from blocklib.formats.qcow2.node import Qcow2Node
from tests.crash.recording import RecordingNode
from tests.crash.workload import base_disk, disk_on, new_image

KiB = 1024
MiB = 1 << 20


def made(size: int = MiB, **options: Any) -> tuple[RecordingNode, Disk, Qcow2Node]:
    """An empty image on a recording host, open for writing."""
    host = RecordingNode(data=new_image(size, options))
    disk = disk_on(host)
    assert isinstance(disk.node, Qcow2Node)
    return host, disk, disk.node


def reopened(host: RecordingNode) -> Disk:
    return disk_on(RecordingNode(data=bytes(host.data)), writable=False)


def in_thread(work: Callable[[], object]) -> None:
    """Do it in another thread and wait for the end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


def fail(*_: object) -> None:
    raise StorageError("no", errno=28, operation="injected")


def once(work: Callable[[], object]) -> Callable[..., None]:
    """A hook that does something the first time it is called."""
    pending = [work]

    def hook(*_: object) -> None:
        if pending:
            pending.pop()()

    return hook


# At once --------------------------------------------------------------------------------------------------------------


def test_the_host_has_got_the_space_of_a_cluster_before_another_thread_can_get_the_cluster() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"a" * 4096)
    disk.flush()
    disk.discard(0, 4096)
    host.before_discard = once(lambda: in_thread(lambda: disk.write(64 * KiB, b"b" * 4096)))
    disk.flush()
    assert disk.read(64 * KiB, 4096) == b"b" * 4096
    disk.close()


def test_a_refcount_table_that_moves_during_a_flush_is_left_to_the_next() -> None:
    host, disk, node = made(8 * MiB, cluster_size=512, refcount_bits=64)
    disk.write(0, b"a" * (1900 * KiB))
    host.before_write = once(lambda: in_thread(lambda: disk.write(3 * MiB, b"b" * (300 * KiB))))
    before = node.refcounts.table_offset
    disk.flush()
    assert node.refcounts.table_offset != before
    with reopened(host) as crashed:
        other = crashed.node
        assert isinstance(other, Qcow2Node)
        assert other.header.refcount_table_offset == before
        assert all(other.refcounts.table)  # every block that the flushed data needs
        assert crashed.read(0, 1900 * KiB) == b"a" * (1900 * KiB)
    disk.close()


def test_a_table_at_the_end_of_the_file_can_be_read_while_a_flush_is_writing_it() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write_zeroes(0, 4096)
    found: list[bytes] = []
    host.before_write = once(lambda: in_thread(lambda: found.append(disk.read(0, 4096))))
    disk.flush()
    assert found == [bytes(4096)]
    disk.close()


def test_a_flush_that_waited_for_one_that_failed_does_not_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    host, disk, node = made()
    disk.write(0, b"x" * 512)
    arrived = threading.Semaphore(0)
    real = node.writeback.structure

    class Announcing:
        def __enter__(self) -> None:
            arrived.release()
            real.acquire()

        def __exit__(self, *_: object) -> None:
            real.release()

    monkeypatch.setattr(node.writeback, "_structure", Announcing())
    outcomes: list[str] = []

    def flush() -> None:
        try:
            disk.flush()
            outcomes.append("success")
        except (StorageError, PoisonedError):
            outcomes.append("failure")

    host.before_barrier = fail
    with real:
        threads = [threading.Thread(target=flush) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in threads:
            arrived.acquire()
    for thread in threads:
        thread.join()
    assert outcomes == ["failure"] * 3
    disk.abandon()


def test_of_two_threads_that_resize_a_disk_the_second_sees_what_the_first_did() -> None:
    host, disk, _node = made()
    outcomes: list[object] = []

    def second() -> None:
        try:
            disk.truncate(2 * MiB)
            outcomes.append(disk.size)
        except UsageError as exc:
            outcomes.append(type(exc))

    thread = threading.Thread(target=second)
    host.before_barrier = once(thread.start)
    disk.truncate(4 * MiB)
    thread.join()
    assert outcomes == [UsageError]
    assert disk.size == 4 * MiB
    disk.close()


@pytest.mark.parametrize("verb", ["amend", "repair", "rebase"])
def test_a_snapshot_waits_for_who_changes_the_whole_image(verb: str) -> None:
    host, disk, node = made(cluster_size=4096)
    disk.write(0, b"x" * 4096)
    disk.flush()
    if verb == "repair":
        first, _n = node.retry(lambda: node.refcounts.allocate(1))  # a leak, inside the file
        node.file.write(first * 4096, (bytes(4096),))
    held = []
    thread = threading.Thread(target=lambda: disk.snapshots.create("s"))

    def begin() -> None:
        held.append(node.changing.locked())
        thread.start()

    host.before_barrier = once(begin)
    if verb == "amend":
        blocklib.amend(disk, {"refcount_bits": 32})
    elif verb == "repair":
        blocklib.repair(disk, "leaks")
    else:
        blocklib.rebase(disk, None, unsafe=True)
    thread.join()
    assert held == [True]
    assert [snapshot.name for snapshot in disk.snapshots] == ["s"]
    disk.close()
    with reopened(host) as again:
        assert again.node.check().clean


def test_several_threads_may_close_a_disk() -> None:
    _host, disk, _node = made()
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def close() -> None:
        barrier.wait()
        try:
            disk.close()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert disk.closed


# A host that fails ----------------------------------------------------------------------------------------------------


def test_a_write_that_failed_and_cannot_even_be_undone_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    host, disk, node = made(cluster_size=4096)
    host.before_write = fail
    with monkeypatch.context() as patch:
        patch.setattr(node.refcounts, "release", fail)
        with pytest.raises(StorageError):
            disk.write(0, b"x")
    host.before_write = None
    in_thread(lambda: disk.write(0, b"y"))
    assert disk.read(0, 1) == b"y"
    disk.close()


def test_a_new_table_of_a_failed_flush_is_linked_only_after_it_is_counted() -> None:
    """The file may point at it already: so it is no longer written before the counts it relies on."""
    host, disk, _node = made(cluster_size=512)
    disk.write(0, b"a" * 512)
    writes: list[int] = []

    def fail_at_the_l2_pointers(offset: int, _length: int) -> None:
        writes.append(offset)
        if len(writes) == 3:  # block, new L2 table, L1 entry
            fail()

    host.before_write = fail_at_the_l2_pointers
    with pytest.raises(StorageError):
        disk.flush()
    host.before_write = None
    block, table, _l1 = writes
    disk.write(1024, b"b" * 512)
    start = len(host.log)
    disk.flush()
    kinds = [event[0] if event[0] == "barrier" else event[1] // 512 for event in host.log[start:]]
    assert kinds.index(block // 512) < kinds.index("barrier") < kinds.index(table // 512)
    assert kinds.count("barrier") == 3
    disk.close()


def test_a_size_that_could_not_be_written_poisons_the_image() -> None:
    host, disk, _node = made(cluster_size=512)
    disk.write(0, b"x" * 512)
    disk.flush()
    host.before_write = lambda offset, _length: fail() if offset == 0 else None
    with pytest.raises(StorageError):
        disk.truncate(4 * MiB)
    host.before_write = None
    with pytest.raises(PoisonedError):
        disk.write(600 * 512, b"y" * 512)
    with pytest.raises(PoisonedError):
        disk.close()
    with reopened(host) as again:
        assert again.size == MiB
        assert again.read(0, 512) == b"x" * 512


def test_closing_a_poisoned_image_says_that_something_is_lost() -> None:
    host, disk, _node = made()
    disk.write(0, b"x" * 100)
    host.before_barrier = fail
    with pytest.raises(StorageError):
        disk.flush()
    host.before_barrier = None
    with pytest.raises(PoisonedError):
        disk.close()
    assert disk.closed


def test_a_freed_cluster_that_was_not_counted_costs_nothing_that_was_written() -> None:
    host, disk, _node = made(cluster_size=512)
    disk.write(0, b"a" * 2048)
    disk.close()
    image = bytearray(host.data)
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & ~(1 << 63)
    cluster = (int.from_bytes(image[l2 + 8 : l2 + 16], "big") & ~(1 << 63)) // 512
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block + 2 * cluster : block + 2 * cluster + 2] = bytes(2)
    host = RecordingNode(data=bytes(image))
    disk = disk_on(host)
    disk.discard(0, 1536)
    disk.write_zeroes(1536, 512)
    with pytest.raises(ImageCorruptError):
        disk.flush()
    with reopened(host) as again:
        assert again.read(0, 2048) == bytes(2048)
    disk.flush()
    disk.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_change_that_was_interrupted_poisons_the_image(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, disk, node = made()
    disk.write(0, b"x" * 512)
    disk.flush()

    def interrupted(*_: object, **__: object) -> tuple[int, int]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(node.refcounts, "_take", interrupted)
        with pytest.raises(error):
            disk.write(512 * KiB, b"y")
    with pytest.raises(PoisonedError):
        disk.flush()
    with pytest.raises(PoisonedError):
        disk.close()
    with reopened(host) as again:
        assert again.read(0, 512) == b"x" * 512


class InterruptedOnTheWayOut:
    """A lock whose holder is interrupted when it has just let go of it, once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


def test_a_flush_that_is_interrupted_with_what_it_took_in_its_hands_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    host, disk, node = made()
    disk.write(0, b"x" * 512)
    disk.flush()
    disk.write(512 * KiB, b"y")
    monkeypatch.setattr(node.writeback, "reserving", InterruptedOnTheWayOut())
    with pytest.raises(KeyboardInterrupt):
        disk.flush()
    disk.close()  # writes it
    with reopened(host) as again:
        assert again.read(512 * KiB, 1) == b"y"
        assert again.node.check().clean


def test_a_table_whose_loading_was_interrupted_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    host, disk, _node = made()
    disk.write(0, b"x" * 512)
    disk.close()
    with reopened(host) as again:
        assert isinstance(again.node, Qcow2Node)
        monkeypatch.setattr(again.node.mapping.cache, "_loading_lock", InterruptedOnTheWayOut())
        with pytest.raises(KeyboardInterrupt):
            again.read(0, 1)
        in_thread(lambda: again.read(0, 1))
        assert again.read(0, 1) == b"x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_write_that_was_interrupted_while_its_tables_got_their_space_makes_nobody_wait(error: type[BaseException]) -> None:
    host, disk, _node = made(cluster_size=4096)

    def interrupt() -> None:
        raise error

    host.before_write = once(interrupt)
    with pytest.raises(error):
        disk.write(0, b"x")
    in_thread(lambda: disk.write(0, b"y"))
    disk.close()
    with reopened(host) as again:
        assert again.read(0, 1) == b"y"
        assert again.node.check().clean


# Growing over a backing file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_a_grown_disk_reads_zero_where_the_backing_file_has_data_before_its_header_says_it_has_grown(compat: str) -> None:
    base = base_disk(600)
    host = RecordingNode(data=new_image(100 * 512, {"cluster_size": 4096, "compat": compat}))
    disk = disk_on(host, backing=base)
    images: list[bytes] = []
    host.before_write = lambda _offset, _length: images.append(bytes(host.data))
    disk.truncate(500 * 512)
    for image in [*images, bytes(host.data)]:
        with disk_on(RecordingNode(data=image), writable=False, backing=base) as crashed:
            gained = crashed.size - 100 * 512
            assert gained in (0, 400 * 512)
            assert crashed.read(100 * 512, gained) == bytes(gained)
    disk.close()
    base.close()


def test_version_2_writes_zeroes_as_bytes_where_the_caller_has_put_a_disk_below() -> None:
    base = base_disk(600)
    host = RecordingNode(data=new_image(300 * 512, {"cluster_size": 4096, "compat": "0.10"}))
    with disk_on(host, backing=base) as disk:
        disk.write_zeroes(0, 8192)
        assert disk.read(0, 8192) == bytes(8192)
    base.close()


@pytest.mark.parametrize("good_writes", range(8))
def test_a_disk_that_could_not_grow_shows_nothing_old_when_it_grows_later(good_writes: int) -> None:
    host, disk, node = made(96 * KiB, cluster_size=512)
    disk.write(0, b"a" * (96 * KiB))
    disk.flush()
    disk.discard(0, 64 * KiB)
    disk.flush()  # now its clusters, which still hold what was written, are free to be taken
    writes = iter(range(100))
    host.before_write = lambda *_: fail() if next(writes) == good_writes else None
    try:
        disk.truncate(128 * KiB, preallocation="metadata")
    except StorageError:
        assert disk.size == node.header.size == 96 * KiB
    host.before_write = None
    if node.poisoned is not None:
        disk.abandon()
        return
    disk.truncate(160 * KiB)
    assert disk.read(96 * KiB, 64 * KiB) == bytes(64 * KiB)
    disk.close()
    with reopened(host) as again:
        assert again.read(96 * KiB, 64 * KiB) == bytes(64 * KiB)
