"""Extended L2 entries: every state of a subcluster, what writes make of it, and entries that cannot be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from blocklib.disk import Disk
from blocklib.errors import ImageCorruptError, OptionError, StorageError
from blocklib.extents import Extent
from blocklib.formats.qcow2 import layout, subclusters, zeroing
from blocklib.formats.qcow2.cow import AllocationTicket
from blocklib.formats.qcow2.create import header_for
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.formats.qcow2.tables import Table, table_from_bytes
from blocklib.formats.qcow2.zeroing import Erasure
from blocklib.options import check_options
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image
from tests.nodes import join_extents, tabled

CLUSTER = 16384
SUB = 512
N = 32
ALL = (1 << N) - 1
COPIED = layout.FLAG_COPIED
COMPRESSED = layout.FLAG_COMPRESSED
BELOW = b"\xbb"


def zero(bits: int) -> int:
    return bits << N


class Image:
    """An image with extended L2 entries; every guest cluster is allocated and full, until its entry is replaced.

    The bytes of subcluster x of a cluster are x + 1.
    """

    def __init__(self, clusters: int = 6, **options: int | str) -> None:
        self.clusters = clusters
        host = RecordingNode(data=new_image(clusters * CLUSTER, {"extended_l2": "on", "cluster_size": CLUSTER, **options}))
        self.fill = b"".join(bytes((x + 1,)) * SUB for x in range(N))
        with disk_on(host) as disk:
            for cluster in range(clusters):
                disk.write(cluster * CLUSTER, self.fill)
            node = node_of(disk)
            self.l2 = node.mapping.l1[0] & ~COPIED
        self.bytes = bytearray(host.data)

    def place(self, cluster: int) -> int:
        return self.l2 + cluster * 16

    def host(self, cluster: int) -> int:
        return int.from_bytes(self.bytes[self.place(cluster) :][:8], "big") & layout.OFFSET_MASK

    def put(self, cluster: int, entry: int, bitmap: int) -> None:
        self.bytes[self.place(cluster) : self.place(cluster) + 16] = entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big")

    def keep(self, cluster: int, bitmap: int, *, copied: bool = True) -> None:
        """Another bitmap for a cluster that stays where it is."""
        self.put(cluster, self.host(cluster) | (COPIED if copied else 0), bitmap)

    def opened(self, *, over: Disk | None = None) -> Disk:
        return disk_on(RecordingNode(data=bytes(self.bytes)), backing=over)


def node_of(disk: Disk) -> Qcow2Node:
    assert isinstance(disk.node, Qcow2Node)
    return disk.node


def pair(disk: Disk, cluster: int) -> tuple[int, int]:
    """Both words of an L2 entry."""
    mapping = node_of(disk).mapping
    place = mapping.slice_at(cluster * CLUSTER)
    if place is None:
        return 0, 0
    table = mapping.cache.peek(place) or mapping.cache.load(place, node_of(disk).lock)
    return mapping.entry_at(table, mapping.index_in_slice(cluster * CLUSTER))


@pytest.fixture
def below() -> Iterator[Disk]:
    """A backing file that ends inside the last cluster but one."""
    size = 4 * CLUSTER + 5 * SUB
    host = RecordingNode(data=new_image(size, {}))
    with disk_on(host) as disk:
        disk.write(0, BELOW * size)
    disk = disk_on(RecordingNode(data=bytes(host.data)), writable=False)
    yield disk
    disk.close()


# -- states ----------------------------------------------------------------------------------------------------------------

STATES: list[tuple[bool, int]] = [
    (True, ALL),
    (True, 0),
    (True, zero(ALL)),
    (False, 0),
    (False, zero(ALL)),
    (True, 1),
    (True, 1 << 31),
    (True, zero(1)),
    (True, zero(1 << 31)),
    (False, zero(0x5555_5555)),
    (True, 0x5555_5555 | zero(0xAAAA_AAAA)),
    (True, 0x0F0F_0000 | zero(0x00F0_FFFF)),
]


def expected_extents(image: Image, states: list[tuple[bool, int]], backing_size: int | None) -> list[Extent]:
    """What the specification says, subcluster by subcluster."""
    extents: list[Extent] = []
    for cluster, (placed, bitmap) in enumerate(states):
        for x in range(N):
            offset = cluster * CLUSTER + x * SUB
            host = image.host(cluster) + x * SUB if placed else None
            if bitmap >> x & 1:
                extent = Extent(offset, SUB, 0, host, True, False, True, False)
            elif bitmap >> (N + x) & 1:
                extent = Extent(offset, SUB, 0, host, False, True, True, False)
            elif backing_size is not None and offset < backing_size:
                extent = Extent(offset, SUB, 1, None, True, False, True, False)
            else:
                extent = Extent(offset, SUB, 0, host, False, True, False, False)
            joined = join_extents(extents[-1], extent) if extents else None
            if joined is None:
                extents.append(extent)
            else:
                extents[-1] = joined
    return extents


def expected_content(image: Image, states: list[tuple[bool, int]], backing_size: int) -> bytes:
    parts = []
    for cluster, (_placed, bitmap) in enumerate(states):
        for x in range(N):
            if bitmap >> x & 1:
                parts.append(image.fill[x * SUB : (x + 1) * SUB])
            elif not bitmap >> (N + x) & 1 and cluster * CLUSTER + x * SUB < backing_size:
                parts.append(BELOW * SUB)
            else:
                parts.append(bytes(SUB))
    return b"".join(parts)


def random_states(seed: int, n: int) -> list[tuple[bool, int]]:
    choose = random.Random(seed)
    states = []
    for _ in range(n):
        if choose.random() < 0.5:
            states.append(choose.choice(STATES))
            continue
        placed = choose.random() < 0.7
        zeroes = choose.getrandbits(N) & choose.getrandbits(N)
        states.append((placed, (choose.getrandbits(N) & ~zeroes if placed else 0) | zero(zeroes)))
    return states


def image_in(states: list[tuple[bool, int]]) -> Image:
    image = Image(len(states))
    for cluster, (placed, bitmap) in enumerate(states):
        image.put(cluster, image.host(cluster) | COPIED if placed else 0, bitmap)
    return image


@pytest.mark.parametrize("seed", range(12))
def test_every_state_reads_and_maps_as_the_specification_says(seed: int, below: Disk) -> None:
    states = STATES if not seed else random_states(seed, 6)
    image = image_in(states)
    for over in (None, below):
        backing_size = over.size if over is not None else None
        disk = image.opened(over=over)
        content = expected_content(image, states, backing_size or 0)
        assert disk.read(0, disk.size) == content
        for offset in (0, 100, SUB, 5 * SUB + 1, CLUSTER - 1, 2 * CLUSTER + SUB):
            assert disk.read(offset, CLUSTER + 700) == content[offset : offset + CLUSTER + 700]
        extents = [extent for extent in disk.extents() if extent.depth == 0]
        assert extents == [e for e in expected_extents(image, states, backing_size) if e.depth == 0]
        assert tabled(disk.node, 0, disk.size) == list(disk.extents())
        for offset in (0, 3 * SUB, CLUSTER + 100, 2 * CLUSTER - SUB):
            part = [tuple(row) for row in disk.map(offset, CLUSTER + SUB).tolist()]
            assert part == [(*e[:3], -1 if e[3] is None else e[3], *e[4:]) for e in disk.extents(offset, CLUSTER + SUB)]
        for chain in disk.chain()[1:]:
            assert tabled(disk.node, 0, disk.size, below.node) == list(disk.extents(base=chain))
        disk.abandon()


def test_a_compressed_entry_has_no_subclusters() -> None:
    image = Image(2)
    image.put(0, COMPRESSED | image.host(0), 0x3)  # not deflated, but that is found out by reading it only
    disk = image.opened()
    first = next(disk.extents())
    assert (first.length, first.compressed, first.data) == (CLUSTER, True, True)
    assert disk.map().tolist()[0][1] == CLUSTER
    disk.abandon()


# -- what cannot be --------------------------------------------------------------------------------------------------------

ILLEGAL: dict[str, Callable[[int], tuple[int, int]]] = {
    "allocated and zero": lambda host: (host | COPIED, ALL | zero(1)),
    "another subcluster is allocated and zero": lambda host: (host | COPIED, 1 << 31 | zero(1 << 31)),
    "allocated without a host cluster": lambda host: (0, 1),
    "allocated without a host cluster, copied": lambda host: (COPIED, 1 << 31),
    "the zero flag": lambda host: (host | COPIED | 1, ALL),
    "the zero flag alone": lambda host: (1, 0),
    "reserved bits alone": lambda host: (1 << 57, 0),
    "reserved bits of a zero cluster": lambda host: (1 << 57, zero(ALL)),
    "an unaligned host cluster": lambda host: (host | COPIED | 512, ALL),
    "an unaligned host cluster without content": lambda host: (host | COPIED | 512, 0),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_entry_that_cannot_be_is_refused_by_name_and_place(name: str) -> None:
    image = Image()
    image.put(1, *ILLEGAL[name](image.host(1)))
    disk = image.opened()
    at = CLUSTER + 4 * SUB
    requests: list[Callable[[], object]] = [
        lambda: disk.read(at, SUB),
        lambda: disk.read(0, 2 * CLUSTER),
        lambda: list(disk.extents(at, SUB)),
        lambda: disk.map(at, SUB),
        lambda: disk.map(),
    ]
    for request in requests:
        with pytest.raises(ImageCorruptError) as caught:
            request()
        assert caught.value.structure == "L2 entry"
        assert caught.value.host_offset == image.place(1)
        assert "\n" not in str(caught.value)
    disk.write(2 * CLUSTER, b"z" * CLUSTER)
    assert disk.read(2 * CLUSTER, CLUSTER) == b"z" * CLUSTER
    disk.close()


@pytest.mark.parametrize("name", ILLEGAL)
@pytest.mark.parametrize("request_name", ["write", "write more", "zero"])
def test_a_write_that_meets_such_an_entry_changes_nothing_but_the_corrupt_bit(name: str, request_name: str) -> None:
    image = Image()
    image.put(1, *ILLEGAL[name](image.host(1)))
    host = RecordingNode(data=bytes(image.bytes))
    disk = disk_on(host)
    at = CLUSTER + 4 * SUB
    requests: dict[str, Callable[[], object]] = {
        "write": lambda: disk.write(at, b"y"),
        "write more": lambda: disk.write(at, b"y" * CLUSTER),
        "zero": lambda: disk.write_zeroes(at, SUB),
    }
    with pytest.raises(ImageCorruptError) as caught:
        requests[request_name]()
    assert caught.value.host_offset == image.place(1)
    disk.abandon()
    image.bytes[layout.FIELD_OFFSETS["incompatible_features"] + 7] |= layout.INCOMPATIBLE_CORRUPT
    assert bytes(host.data) == bytes(image.bytes)


@pytest.mark.parametrize("name", [name for name in ILLEGAL if "unaligned" not in name])
@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_over_the_whole_cluster_make_such_an_entry_legal(name: str, unmap: bool) -> None:
    image = Image()
    image.put(1, *ILLEGAL[name](image.host(1)))
    with image.opened() as disk:
        disk.write_zeroes(CLUSTER, CLUSTER, unmap=unmap)
        assert pair(disk, 1)[1] == zero(ALL)
        assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("name", [name for name in ILLEGAL if "unaligned" in name])
def test_a_misplaced_cluster_is_not_given_back(name: str) -> None:
    image = Image()
    image.put(1, *ILLEGAL[name](image.host(1)))
    requests: list[Callable[[Disk], object]] = [
        lambda disk: disk.write_zeroes(CLUSTER, CLUSTER, unmap=True),
        lambda disk: disk.discard(CLUSTER, CLUSTER),
        lambda disk: disk.discard(0, 6 * CLUSTER),
    ]
    for request in requests:
        disk = image.opened()
        with pytest.raises(ImageCorruptError) as caught:
            request(disk)
        assert caught.value.structure == "L2 entry"
        assert not node_of(disk).writeback.freed
        disk.abandon()


# -- writing ---------------------------------------------------------------------------------------------------------------


def test_a_write_allocates_the_subclusters_that_it_touches(below: Disk) -> None:
    image = Image()
    image.put(0, 0, zero(0b1100))
    disk = image.opened(over=below)
    disk.write(SUB + 100, b"x" * SUB)
    entry, bitmap = pair(disk, 0)
    assert entry & COPIED
    assert bitmap == 0b0110 | zero(0b1000)
    content = BELOW * (SUB + 100) + b"x" * SUB + bytes(3 * SUB - (100 + 2 * SUB - SUB)) + BELOW * (28 * SUB)
    assert disk.read(0, CLUSTER) == content
    # In place from now on: the same cluster, and no byte of the others.
    disk.write(20 * SUB, b"y")
    assert pair(disk, 0) == (entry, bitmap | 1 << 20)
    assert disk.read(20 * SUB, SUB) == b"y" + BELOW * (SUB - 1)
    disk.write(0, b"w" * CLUSTER)
    assert pair(disk, 0) == (entry, ALL)
    disk.close()


def test_a_write_into_zero_subclusters_clears_their_zero_bits() -> None:
    image = Image()
    image.keep(0, zero(ALL))
    with image.opened() as disk:
        host = image.host(0)
        disk.write(3 * SUB - 1, b"xx")
        assert pair(disk, 0) == (host | COPIED, 0b1100 | zero(ALL & ~0b1100))
        assert disk.read(0, CLUSTER) == bytes(3 * SUB - 1) + b"xx" + bytes(CLUSTER - 3 * SUB - 1)


def test_a_write_across_clusters_copies_only_at_its_ends(below: Disk) -> None:
    image = Image(4)
    for cluster in range(4):
        image.put(cluster, 0, 0)
    disk = image.opened(over=below)
    disk.write(CLUSTER - SUB - 10, b"x" * (2 * CLUSTER + SUB + 20))
    assert [pair(disk, cluster)[1] for cluster in range(4)] == [0b11 << 30, ALL, ALL, 1]
    assert disk.read(CLUSTER - 2 * SUB, SUB) == BELOW * (SUB - 10) + b"x" * 10
    assert disk.read(3 * CLUSTER, SUB) == b"x" * 10 + BELOW * (SUB - 10)
    disk.close()


def test_a_shared_cluster_is_copied_with_what_is_allocated(below: Disk) -> None:
    image = Image()
    image.keep(0, 0b1111 << 4 | zero(1 | 1 << 20), copied=False)
    host = image.host(0)
    block = image.l2  # somebody else refers to it, too
    with image.opened(over=below) as disk:
        node = node_of(disk)
        node.retry(lambda: node.refcounts.add(host >> 14, 1))
        before = disk.read(0, CLUSTER)
        disk.write(10 * SUB, b"x" * SUB)
        entry, bitmap = pair(disk, 0)
        assert entry & layout.OFFSET_MASK != host
        assert block == node.mapping.l1[0] & layout.OFFSET_MASK
        # From the first allocated one to what was written: one write, as QEMU's.
        assert bitmap == subclusters.span(4, 11) | zero(1 | 1 << 20)
        assert disk.read(0, CLUSTER) == before[: 10 * SUB] + b"x" * SUB + before[11 * SUB :]
        disk.flush()
        disk.flush()
        assert node.retry(lambda: node.refcounts.get(host >> 14)) == 1


def test_a_ticket_shows_nothing_before_its_commit_and_an_abort_restores(below: Disk) -> None:
    image = Image()
    image.put(1, 0, 0)
    image.keep(2, 0b1)
    disk = image.opened(over=below)
    node = node_of(disk)
    for cluster in (1, 2):
        before = pair(disk, cluster)
        content = disk.read(cluster * CLUSTER, CLUSTER)
        _child, _offset, length, ticket = node.prepare_write(cluster * CLUSTER + 5 * SUB + 7, 10)
        assert isinstance(ticket, AllocationTicket)
        assert (length, ticket.head, ticket.tail) == (10, 7, SUB - 17)
        assert pair(disk, cluster) == before
        assert disk.read(cluster * CLUSTER, CLUSTER) == content
        free = node.refcounts.get(ticket.host_cluster)
        ticket.abort()
        assert pair(disk, cluster) == before
        assert free == 1
        assert node.refcounts.get(ticket.host_cluster) == (1 if ticket.preallocated else 0)
    disk.close()


def test_a_write_that_fails_leaves_the_subclusters_as_they_were(below: Disk) -> None:
    image = Image()
    image.keep(0, 0b1)
    host = RecordingNode(data=bytes(image.bytes))
    disk = disk_on(host, backing=below)
    before, content = pair(disk, 0), disk.read(0, CLUSTER)

    def fail(_offset: int, _length: int) -> None:
        raise StorageError("no", errno=28, operation="injected")

    host.before_write = fail
    with pytest.raises(StorageError):
        disk.write(4 * SUB, b"x" * 100)
    host.before_write = None
    assert (pair(disk, 0), disk.read(0, CLUSTER)) == (before, content)
    disk.write(4 * SUB, b"x" * 100)
    assert pair(disk, 0)[1] == 0b10001
    disk.close()


# -- zeroes and discards ---------------------------------------------------------------------------------------------------


def test_zeroes_are_written_to_whole_subclusters_by_metadata_alone() -> None:
    image = Image()
    with image.opened() as disk:
        disk.write_zeroes(2 * SUB, 3 * SUB, fallback=False)
        entry, bitmap = pair(disk, 0)
        assert (entry, bitmap) == (image.host(0) | COPIED, ALL & ~0b11100 | zero(0b11100))
        with pytest.raises(StorageError):
            disk.write_zeroes(7 * SUB, SUB + 1, fallback=False)
        disk.write_zeroes(7 * SUB, SUB + 1)
        assert pair(disk, 0)[1] & zero(ALL) == zero(0b10011100)
        assert disk.read(8 * SUB, 2) == b"\0\x09"
        disk.write_zeroes(CLUSTER - SUB, 2 * CLUSTER + 2 * SUB)
        assert pair(disk, 0)[1] >> 63 == 1
        assert [pair(disk, cluster)[1] for cluster in (1, 2)] == [zero(ALL), zero(ALL)]
        assert pair(disk, 3)[1] == ALL & ~1 | zero(1)
        assert disk.read(CLUSTER - SUB, 2 * CLUSTER + 2 * SUB) == bytes(2 * CLUSTER + 2 * SUB)


def test_zeroes_in_part_of_a_subcluster_need_no_bytes_where_nothing_lies_there(below: Disk) -> None:
    image = Image()
    image.put(0, 0, 0)
    with image.opened() as disk:
        disk.write_zeroes(SUB + 1, 5, fallback=False)
        assert pair(disk, 0) == (0, zero(0b10))
        disk.write_zeroes(SUB + 1, 5, fallback=False)
    disk = image.opened(over=below)
    with pytest.raises(StorageError):
        disk.write_zeroes(SUB + 1, 5, fallback=False)
    disk.write_zeroes(SUB + 1, 5)
    assert disk.read(SUB, SUB) == BELOW + bytes(5) + BELOW * (SUB - 6)
    disk.close()


def test_the_last_subcluster_ends_with_the_disk() -> None:
    size = CLUSTER + 3 * SUB
    host = RecordingNode(data=new_image(size, {"extended_l2": "on", "cluster_size": "32k"}))
    with disk_on(host) as disk:
        disk.write(0, b"x" * size)
        disk.write_zeroes(size - 3 * SUB, 3 * SUB, fallback=False)
        assert disk.read(0, size) == b"x" * (size - 3 * SUB) + bytes(3 * SUB)


def test_a_discard_gives_back_whole_clusters_only() -> None:
    image = Image()
    with image.opened() as disk:
        disk.discard(SUB, CLUSTER)
        assert disk.read(0, 2 * CLUSTER) == image.fill * 2
        disk.discard(SUB, 2 * CLUSTER)
        assert pair(disk, 1) == (0, zero(ALL))
        assert disk.read(0, 2 * CLUSTER) == image.fill + bytes(CLUSTER)


@dataclass(frozen=True)
class Words:
    """Entries of an L2 slice as the driver holds them."""

    table: Table
    words: int


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("extended", [False, True])
def test_erasing_by_tables_is_erasing_one_by_one(extended: bool, seed: int) -> None:
    from blocklib.formats.qcow2 import zeroing_table

    options: dict[str, int | str] = {"extended_l2": "on"} if extended else {}
    disk = disk_on(RecordingNode(data=new_image(1 << 20, options)))
    mapping = node_of(disk).mapping
    choose = random.Random(seed)
    words = bytearray()
    last = 0
    for _ in range(choose.choice((1, 5, 60))):
        last = choose.choice((last + 1, last + 1, choose.randrange(1, 1 << 30)))
        entry = choose.choice(
            (0, 0, 1, last << 16, last << 16 | COPIED, last << 16 | COPIED | 1, COPIED, COMPRESSED | last << 9 | 3 << 54)
        )
        words += (entry & (~1 if extended else -1)).to_bytes(8, "big")
        if extended:
            words += choose.choice((0, ALL, zero(ALL), choose.getrandbits(64))).to_bytes(8, "big")
    table = table_from_bytes("Q", words)
    kinds: tuple[Erasure, ...] = tuple(
        Erasure(keeps, zero=z, spares_absent=s)  # type: ignore[arg-type]
        for keeps, z, s in itertools.product(("all", "own", "none"), (False, True), (False, True))
    )
    for erasure in kinds:
        one_by_one = zeroing._erased(mapping, table, erasure, tell_kept=True)
        assert zeroing_table.erased(mapping, table, erasure, tell_kept=True) == one_by_one
    empty = table_from_bytes("Q", bytes(len(words)))
    for erasure in kinds:
        assert zeroing._erased_absent(mapping, len(table), erasure) == zeroing._erased(
            mapping, empty, erasure, tell_kept=False
        )[0]
    disk.close()


# -- arithmetic ------------------------------------------------------------------------------------------------------------


def test_sets_of_subclusters() -> None:
    choose = random.Random(1)
    for _ in range(300):
        zeroes = choose.getrandbits(N)
        bitmap = choose.getrandbits(N) & ~zeroes | zero(zeroes)
        first, stop = sorted((choose.randrange(N), choose.randrange(N + 1)))
        span = subclusters.span(first, stop)
        assert [span >> x & 1 for x in range(N)] == [first <= x < stop for x in range(N)]

        def state(x: int, word: int = bitmap) -> tuple[int, int]:
            return word >> x & 1, word >> (N + x) & 1

        alike = subclusters.like(bitmap, first)
        assert [alike >> x & 1 for x in range(N)] == [state(x) == state(first) for x in range(N)]
        run = subclusters.run_length(alike, first)
        assert all(alike >> x & 1 for x in range(first, first + run))
        assert first + run == N or not alike >> (first + run) & 1
        for x in range(N):
            inside = first <= x < stop
            assert state(x, subclusters.written(bitmap, span)) == ((1, 0) if inside else state(x))
            assert state(x, subclusters.zeroed(bitmap, span)) == ((0, 1) if inside else state(x))


@pytest.mark.parametrize("options", [{"cluster_size": "8k"}, {"compat": "0.10"}])
def test_extended_entries_need_version_3_and_clusters_of_16_kib(options: dict[str, int | str]) -> None:
    with pytest.raises(OptionError) as caught:
        header_for(1 << 20, check_options("qcow2", {"extended_l2": "on", **options}, table="create"))
    assert caught.value.option == "extended_l2"
