"""Lazy refcounts: what a flush leaves for later, the dirty bit meanwhile, and what is left in the end."""

from __future__ import annotations

from typing import Any

import pytest

from blocklib.disk import Disk
from blocklib.errors import StorageError
from blocklib.formats.qcow2.node import Qcow2Node
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image

KiB = 1024
MiB = 1 << 20
DIRTY = 1
DIRTY_PLACE = 72


def made(size: int = 8 * MiB, *, lazy: bool = True, **options: Any) -> tuple[RecordingNode, Disk, Qcow2Node]:
    host = RecordingNode(data=new_image(size, {"lazy_refcounts": "on" if lazy else "off", **options}))
    disk = disk_on(host)
    assert isinstance(disk.node, Qcow2Node)
    return host, disk, disk.node


def features(host: RecordingNode) -> int:
    return int.from_bytes(host.data[DIRTY_PLACE : DIRTY_PLACE + 8], "big")


def barriers(host: RecordingNode, start: int) -> int:
    return sum(event[0] == "barrier" for event in host.log[start:])


def written(host: RecordingNode, start: int) -> list[int]:
    return [event[1] for event in host.log[start:] if event[0] == "write"]


def test_the_dirty_bit_is_durable_before_anything_that_relies_on_a_postponed_count() -> None:
    host, disk, _node = made()
    start = len(host.log)
    disk.write(0, b"x" * 512)
    assert features(host) == 0  # a cluster that nothing points at relies on nothing
    data = len(host.log)
    disk.flush()
    assert [event[0] for event in host.log[data : data + 2]] == ["write", "barrier"]
    assert host.log[data][1:] == (DIRTY_PLACE, DIRTY.to_bytes(8, "big"))
    assert features(host) == DIRTY
    assert written(host, start).count(DIRTY_PLACE) == 1
    disk.close()
    assert features(host) == 0


def test_closing_writes_the_counts_before_it_clears_the_bit() -> None:
    host, disk, node = made()
    disk.write(0, b"x" * 512)
    disk.flush()
    block = node.refcounts.table[0]
    assert block // 512 not in [place // 512 for place in written(host, 0)]
    start = len(host.log)
    disk.close()
    events = [event[1] // 512 if event[0] == "write" else event[0] for event in host.log[start:]]
    assert events.index(block // 512) < events.index("barrier") < events.index(0)
    assert events[-2:] == [0, "barrier"]


def test_flushes_after_allocating_writes_cost_fewer_barriers() -> None:
    """With small clusters each of these writes needs a new refcount block, which must be durable before it is linked."""
    costs = []
    for lazy in (True, False):
        host, disk, _node = made(64 * MiB, cluster_size=512, refcount_bits=16, lazy=lazy)
        disk.write(0, b"x" * 512)
        disk.flush()
        start = len(host.log)
        for number in range(5):
            disk.write((1 + number) * 2400 * KiB, b"x" * (2200 * KiB))
            disk.flush()
        costs.append(barriers(host, start))
        disk.close()
    assert costs[0] < costs[1]


def test_a_flush_writes_no_counts_and_the_close_writes_all() -> None:
    host, disk, node = made(cluster_size=512, refcount_bits=64)
    disk.write(0, b"x" * MiB)
    disk.flush()
    disk.discard(0, 512 * KiB)
    disk.flush()
    new_blocks = [entry for entry in node.refcounts.table[1:] if entry]
    assert new_blocks
    assert not any(any(host.data[block : block + 512]) for block in new_blocks)  # they have their space, and no more
    disk.close()
    with disk_on(RecordingNode(data=bytes(host.data)), writable=False) as again:
        assert again.read(512 * KiB, 512 * KiB) == b"x" * (512 * KiB)
        report = again.node.check()
        assert (report.leaks, report.corruptions, report.check_errors) == (0, 0, 0)


def test_a_crowded_cache_of_counts_is_written_back() -> None:
    host = RecordingNode(data=new_image(64 * MiB, {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": "on"}))
    disk = disk_on(host, options={"refcount-cache-size": 512})
    node = disk.node
    assert isinstance(node, Qcow2Node)
    limit = node.refcounts.cache.max_entries
    most = 0
    for number in range(100):
        disk.write(number * 600 * KiB, b"x" * (500 * KiB))
        most = max(most, len(node.refcounts.cache._entries))
    assert most <= limit + 600 * KiB // (512 * 63) + 1
    assert node.refcounts.table[1] in written(host, 0)
    disk.close()
    assert features(host) == 0


def test_an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"x" * MiB)
    disk.flush()
    left = RecordingNode(data=bytes(host.data))
    disk.abandon()
    before = bytes(left.data)
    with disk_on(left, writable=False) as reader:
        assert reader.read(0, MiB) == b"x" * MiB
        assert reader.info().dirty
    assert bytes(left.data) == before
    with disk_on(left) as writer:
        assert features(left) == 0
        assert writer.read(0, MiB) == b"x" * MiB
        report = writer.node.check()
        assert (report.leaks, report.corruptions) == (0, 0)


def test_a_check_of_an_open_disk_sees_the_counts() -> None:
    _host, disk, node = made(cluster_size=4096)
    disk.write(0, b"x" * MiB)
    disk.flush()
    report = node.check()
    assert (report.leaks, report.corruptions) == (0, 0)
    disk.write(2 * MiB, b"x" * MiB)
    disk.flush()
    assert node.repair("all").before.corruptions == 0
    disk.close()


def test_a_snapshot_finds_the_counts_on_disk() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"x" * MiB)
    disk.flush()
    disk.snapshots.create("one")
    disk.write(0, b"y" * MiB)
    disk.flush()
    assert features(host) == DIRTY
    disk.snapshots["one"].apply()
    assert disk.read(0, MiB) == b"x" * MiB
    disk.close()
    assert features(host) == 0
    with disk_on(RecordingNode(data=bytes(host.data)), writable=False) as again:
        report = again.node.check()
        assert (report.leaks, report.corruptions) == (0, 0)


def test_a_bit_that_could_not_be_set_leaves_the_flush_undone() -> None:
    host, disk, _node = made(cluster_size=4096)
    disk.write(0, b"x" * 4096)

    def fail(offset: int, _length: int) -> None:
        if offset == DIRTY_PLACE:
            raise StorageError("no", errno=28, operation="injected")

    host.before_write = fail
    start = len(host.log)
    with pytest.raises(StorageError):
        disk.flush()
    assert written(host, start) == []
    host.before_write = None
    disk.flush()
    assert features(host) == DIRTY
    disk.close()


@pytest.mark.parametrize(("image", "option", "lazy"), [(True, None, True), (False, True, True), (True, False, False)])
def test_the_option_goes_before_what_the_image_says(image: bool, option: bool | None, lazy: bool) -> None:
    host = RecordingNode(data=new_image(MiB, {"lazy_refcounts": "on" if image else "off"}))
    with disk_on(host, options={} if option is None else {"lazy-refcounts": option}) as disk:
        disk.write(0, b"x")
        disk.flush()
        assert features(host) == (DIRTY if lazy else 0)
        assert disk.info().format_specific["lazy-refcounts"] == image
    assert host.data[87] == image
