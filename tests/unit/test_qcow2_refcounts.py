"""Refcounts in memory: every width, first fit, runs across blocks, growth of blocks and table."""

from __future__ import annotations

import random
import threading

import pytest

from blocklib.errors import ImageCorruptError, ImageLimitError
from blocklib.formats.qcow2.cache import MissingTableError, TableCache
from blocklib.formats.qcow2.geometry import Geometry
from blocklib.formats.qcow2.refcounts import Refcounts
from blocklib.formats.qcow2.tables import table_from_bytes, table_to_bytes, zero_table
from blocklib.graph import ALL, Edge
from blocklib.protocols.memory import MemoryNode

WIDTHS = range(7)


def made(refcount_order: int, cluster_bits: int = 9, table_clusters: int = 1) -> Refcounts:
    """Counts of an empty image whose header and refcount table take the first clusters."""
    geometry = Geometry(cluster_bits, refcount_order)
    file = Edge(None, "file", MemoryNode(None, 0), ALL, ALL)
    table = zero_table("Q", table_clusters << cluster_bits)
    refcounts = Refcounts(file, geometry, table, 1 << cluster_bits, cache_bytes=1 << 20, node="image")
    block_cluster = 1 + table_clusters
    table[0] = block_cluster << cluster_bits
    refcounts.cache.insert(table[0], zero_table(refcounts.cache.typecode, geometry.cluster_size), dirty=True)
    refcounts._take(0, block_cluster + 1)
    return refcounts


@pytest.mark.parametrize("order", WIDTHS)
def test_allocations_never_overlap_and_released_clusters_come_back_first(order: int) -> None:
    refcounts = made(order)
    rnd = random.Random(order)
    taken: dict[int, int] = {}
    for _ in range(400):
        if taken and rnd.random() < 0.45:
            first = rnd.choice(list(taken))
            n = taken.pop(first)
            assert refcounts.release(first, n) == [(first, n)]
            assert all(refcounts.get(cluster) == 0 for cluster in range(first, first + n))
        else:
            first, n = refcounts.allocate(rnd.randrange(1, 40))
            used = {cluster for start, count in taken.items() for cluster in range(start, start + count)}
            assert used.isdisjoint(range(first, first + n))
            taken[first] = n
            assert all(refcounts.get(cluster) == 1 for cluster in range(first, first + n))
    lowest = min(taken)
    n = taken.pop(lowest)
    refcounts.release(lowest, n)
    assert refcounts.allocate(1)[0] <= lowest


@pytest.mark.parametrize("order", WIDTHS)
def test_an_exact_run_is_contiguous_across_blocks(order: int) -> None:
    refcounts = made(order)
    wanted = refcounts.geometry.refcount_block_entries * 2 + 7
    first, got = refcounts.allocate(wanted, exactly=True)
    assert got == wanted
    assert all(refcounts.get(cluster) == 1 for cluster in range(first, first + wanted))
    # What counts the run lies outside it.
    assert all(not first <= offset >> 9 < first + wanted for offset in refcounts.table if offset)


def test_the_table_grows_and_the_old_one_waits_to_be_freed() -> None:
    refcounts = made(6)
    old_offset, old_entries = refcounts.table_offset, len(refcounts.table)
    total = 0
    while not refcounts.table_moved:
        total += refcounts.allocate(64)[1]
    assert len(refcounts.table) > old_entries
    assert refcounts.table_offset != old_offset
    assert refcounts.outgrown_tables == [(old_offset >> 9, 1)]
    first = refcounts.table_offset >> 9
    assert all(refcounts.get(cluster) == 1 for cluster in range(first, first + (len(refcounts.table) * 8 >> 9)))
    assert all(refcounts.get(offset >> 9) == 1 for offset in refcounts.table if offset)


@pytest.mark.parametrize("order", WIDTHS)
def test_counts_share_bytes_without_touching_each_other(order: int) -> None:
    refcounts = made(order)
    first, _n = refcounts.allocate(16, exactly=True)
    top = min(refcounts.geometry.max_refcount, 5)
    for _ in range(top - 1):
        refcounts.add(first + 3, 1)
    assert [refcounts.get(first + i) for i in range(8)] == [1, 1, 1, top, 1, 1, 1, 1]
    assert refcounts.release(first, 8) == (
        [(first, 8)] if top == 1 else [(first, 3), (first + 4, 4)]
    )


def test_a_count_below_zero_is_corruption_and_one_above_the_width_a_limit() -> None:
    refcounts = made(0)
    first, _n = refcounts.allocate(1)
    with pytest.raises(ImageLimitError):
        refcounts.add(first, 1)
    refcounts.release(first, 1)
    with pytest.raises(ImageCorruptError):
        refcounts.release(first, 1)
    with pytest.raises(ImageCorruptError):
        refcounts.release(1 << 40, 1)


def test_a_block_that_is_not_cached_is_asked_for_before_anything_changes() -> None:
    refcounts = made(4)
    first, n = refcounts.allocate(3)
    lock = threading.Lock()
    saved = refcounts.cache.take_dirty()
    for dirty in saved:
        refcounts._file.write(dirty.host_offset, (dirty.data,))
    refcounts.cache.clear()
    with pytest.raises(MissingTableError) as missing:
        refcounts.release(first, n)
    missing.value.cache.load(missing.value.host_offset, lock)
    assert refcounts.release(first, n) == [(first, n)]


@pytest.mark.parametrize("typecode", ["B", "H", "I", "Q"])
def test_tables_are_big_endian_in_the_file(typecode: str) -> None:
    table = table_from_bytes(typecode, bytes(range(16)))
    assert table[0] == int.from_bytes(bytes(range(table.itemsize)), "big")
    assert table_to_bytes(table) == bytes(range(16))


def test_the_cache_never_drops_what_is_dirty_or_on_its_way_to_the_file() -> None:
    file = Edge(None, "file", MemoryNode(None, 1 << 20), ALL, ALL)
    cache = TableCache(file, "Q", 512, 4 * 512)
    for number in range(20):
        cache.insert(number * 512, zero_table("Q", 512), dirty=number % 2 == 0)
    assert all(cache.peek(number * 512) is not None for number in range(0, 20, 2))
    ranges = cache.take_dirty()
    assert not cache.dirty
    for number in range(100, 120):
        cache.insert(number * 512, zero_table("Q", 512))
    assert all(cache.peek(number * 512) is not None for number in range(0, 20, 2))
    cache.put_back(ranges)
    assert [dirty.table_offset for dirty in cache.take_dirty()] == [number * 512 for number in range(0, 20, 2)]


def test_of_several_threads_that_miss_one_table_one_reads_it() -> None:
    class Counting(MemoryNode):
        reads = 0

        def preadv(self, offset, views):  # type: ignore[no-untyped-def]
            Counting.reads += 1
            barrier.wait(timeout=10)
            super().preadv(offset, views)

    barrier = threading.Barrier(2)
    lock = threading.Lock()
    cache = TableCache(Edge(None, "file", Counting(None, 4096), ALL, ALL), "Q", 512, 4096)
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(cache.load(512, lock))) for _ in range(6)]
    for thread in threads:
        thread.start()
    barrier.wait(timeout=10)
    for thread in threads:
        thread.join()
    assert Counting.reads == 1
    assert all(result is results[0] for result in results)
