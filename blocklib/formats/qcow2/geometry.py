"""qcow2 arithmetic: indices, table sizes, compressed descriptors, and how large an image becomes (pure, no I/O).

All of it follows from three numbers of the header: cluster_bits, refcount_order and the extended L2 bit.  Sources:
sections "Host cluster management", "Cluster mapping" and "Extended L2 Entries" of ``docs/interop/qcow2.rst``.
"""

from __future__ import annotations

from blocklib.errors import ImageCorruptError, ImageLimitError, UsageError
from blocklib.formats.qcow2 import layout
from blocklib.records import Record, field


class RefcountMetadata(Record):
    """How many clusters the refcounts themselves take: blocks of one cluster each, and the contiguous table."""

    blocks: int
    table_clusters: int

    @property
    def clusters(self) -> int:
        return self.blocks + self.table_clusters


class MeasuredSize(Record):
    """Bytes of the image file: as asked for, and once every guest cluster is allocated."""

    required: int
    fully_allocated: int


class Geometry(Record):
    """The derived numbers of one image; immutable, so it may be shared freely.

    Offsets and lengths are bytes.  A guest offset splits, from the top, into L1 index, L2 index and the offset in the
    cluster; a host offset into refcount table index, refcount block index and the offset in the cluster.
    """

    cluster_bits: int
    refcount_order: int = layout.V2_REFCOUNT_ORDER
    extended_l2: bool = False

    cluster_size: int = field(init=False)
    cluster_mask: int = field(init=False)
    """cluster_size - 1: the offset inside a cluster."""
    l2_entry_length: int = field(init=False)
    """8 bytes, or 16 with extended L2 entries."""
    l2_bits: int = field(init=False)
    l2_entries: int = field(init=False)
    """Guest clusters that one L2 table maps."""
    l1_shift: int = field(init=False)
    """guest_offset >> l1_shift is the L1 index; 1 << l1_shift the guest bytes that one L2 table maps."""
    subclusters: int = field(init=False)
    """32 with extended L2 entries, else 1: the cluster itself."""
    subcluster_size: int = field(init=False)
    subcluster_bits: int = field(init=False)
    refcount_bits: int = field(init=False)
    max_refcount: int = field(init=False)
    refcount_block_bits: int = field(init=False)
    refcount_block_entries: int = field(init=False)
    """Host clusters that one refcount block counts."""
    compressed_offset_bits: int = field(init=False)
    """Width of the host offset in a compressed descriptor: the specification's x."""
    max_compressed_offset: int = field(init=False)
    """Compressed data starts below this host offset."""

    def __post_init__(self) -> None:
        if not layout.MIN_CLUSTER_BITS <= self.cluster_bits <= layout.MAX_CLUSTER_BITS:
            raise UsageError(
                f"cluster_bits is {self.cluster_bits}, not {layout.MIN_CLUSTER_BITS} to {layout.MAX_CLUSTER_BITS}"
            )
        if not 0 <= self.refcount_order <= layout.MAX_REFCOUNT_ORDER:
            raise UsageError(f"refcount_order is {self.refcount_order}, not 0 to {layout.MAX_REFCOUNT_ORDER}")
        if self.extended_l2 and self.cluster_bits < layout.EXTENDED_L2_MIN_CLUSTER_BITS:
            raise UsageError(
                f"extended L2 entries need clusters of at least {1 << layout.EXTENDED_L2_MIN_CLUSTER_BITS} bytes"
            )
        cluster_size = 1 << self.cluster_bits
        l2_entry_length = layout.EXTENDED_L2_ENTRY_LENGTH if self.extended_l2 else layout.L2_ENTRY_LENGTH
        l2_entries = cluster_size // l2_entry_length
        l2_bits = l2_entries.bit_length() - 1
        subclusters = layout.SUBCLUSTERS_PER_CLUSTER if self.extended_l2 else 1
        refcount_bits = 1 << self.refcount_order
        refcount_block_bits = self.cluster_bits + 3 - self.refcount_order
        compressed_offset_bits = layout.compressed_offset_bits(self.cluster_bits)
        derived = {
            "cluster_size": cluster_size,
            "cluster_mask": cluster_size - 1,
            "l2_entry_length": l2_entry_length,
            "l2_bits": l2_bits,
            "l2_entries": l2_entries,
            "l1_shift": self.cluster_bits + l2_bits,
            "subclusters": subclusters,
            "subcluster_size": cluster_size // subclusters,
            "subcluster_bits": self.cluster_bits - (subclusters.bit_length() - 1),
            "refcount_bits": refcount_bits,
            "max_refcount": (1 << refcount_bits) - 1,
            "refcount_block_bits": refcount_block_bits,
            "refcount_block_entries": 1 << refcount_block_bits,
            "compressed_offset_bits": compressed_offset_bits,
            "max_compressed_offset": min(1 << compressed_offset_bits, layout.MAX_HOST_OFFSET),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    # Guest side -------------------------------------------------------------------------------------------------------

    def l1_index(self, guest_offset: int) -> int:
        return guest_offset >> self.l1_shift

    def l2_index(self, guest_offset: int) -> int:
        return (guest_offset >> self.cluster_bits) & (self.l2_entries - 1)

    def offset_in_cluster(self, offset: int) -> int:
        """Of a guest offset or a host offset: clusters are equal on both sides."""
        return offset & self.cluster_mask

    def guest_offset(self, l1_index: int, l2_index: int) -> int:
        """Where the cluster described by that L2 entry starts in the virtual disk."""
        return (l1_index << self.l1_shift) | (l2_index << self.cluster_bits)

    def clusters_for(self, length: int) -> int:
        """Clusters that `length` bytes take when they start on a cluster boundary."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def is_aligned(self, offset: int) -> bool:
        return not offset & self.cluster_mask

    def round_down(self, offset: int) -> int:
        return offset & ~self.cluster_mask

    def round_up(self, offset: int) -> int:
        return (offset + self.cluster_mask) & ~self.cluster_mask

    def l1_entries_for(self, size: int) -> int:
        """L1 entries (hence L2 tables, if all are allocated) for a virtual disk of `size` bytes."""
        return (size + (1 << self.l1_shift) - 1) >> self.l1_shift

    def l1_clusters_for(self, l1_entries: int) -> int:
        return self.clusters_for(l1_entries * layout.TABLE_ENTRY_LENGTH)

    @property
    def max_virtual_size(self) -> int:
        """The largest virtual disk whose L1 table keeps to layout.MAX_L1_BYTES."""
        return min((layout.MAX_L1_BYTES // layout.TABLE_ENTRY_LENGTH) << self.l1_shift, layout.MAX_VIRTUAL_SIZE)

    # Host side --------------------------------------------------------------------------------------------------------

    def refcount_table_index(self, host_offset: int) -> int:
        return host_offset >> (self.cluster_bits + self.refcount_block_bits)

    def refcount_block_index(self, host_offset: int) -> int:
        return (host_offset >> self.cluster_bits) & (self.refcount_block_entries - 1)

    def refcount_table_entries(self, table_clusters: int) -> int:
        return table_clusters << (self.cluster_bits - 3)

    def refcount_metadata(self, clusters: int, *, headroom: int = 0) -> RefcountMetadata:
        """The least refcount blocks and table clusters that count `clusters` other clusters and themselves.

        With `headroom` the table also has room for the blocks of that many clusters more, so that the image can grow
        without moving it; those blocks are not counted in.
        """
        blocks = table_clusters = 0
        while True:
            # Each round counts the clusters of the round before; the numbers only grow, and by ever smaller steps.
            total = clusters + blocks + table_clusters
            need_blocks = -(-total >> self.refcount_block_bits)
            indexed = -(-(total + headroom) >> self.refcount_block_bits)
            need_table = self.clusters_for(indexed * layout.TABLE_ENTRY_LENGTH)
            if (need_blocks, need_table) == (blocks, table_clusters):
                return RefcountMetadata(blocks, table_clusters)
            blocks, table_clusters = need_blocks, need_table

    # Compressed clusters ----------------------------------------------------------------------------------------------

    def decode_compressed(self, entry: int) -> tuple[int, int]:
        """(host offset, length) of the compressed data that an L2 entry with FLAG_COMPRESSED describes.

        The data ends somewhere in the last sector: `length` reaches to the end of that sector, so it is an upper
        bound and may reach past the end of the file.

        Raises:
            ImageCorruptError: the host offset has bits beyond 55.
        """
        host_offset = entry & ((1 << self.compressed_offset_bits) - 1)
        if host_offset >= layout.MAX_HOST_OFFSET:
            raise ImageCorruptError(
                f"compressed cluster descriptor {entry:#018x} points at host offset {host_offset:#x}, beyond 56 bits",
                structure="compressed cluster descriptor",
                expected="a host offset below 1 << 56",
                found=f"{host_offset:#x}",
            )
        extra_sectors = (entry & (layout.FLAG_COMPRESSED - 1)) >> self.compressed_offset_bits
        length = (extra_sectors + 1) * layout.COMPRESSED_SECTOR_LENGTH
        return host_offset, length - host_offset % layout.COMPRESSED_SECTOR_LENGTH

    def encode_compressed(self, host_offset: int, length: int) -> int:
        """The L2 entry for `length` bytes of compressed data at `host_offset`, any alignment.

        Raises:
            ImageLimitError: the descriptor has no room for such an offset (2 MiB clusters end at 512 TiB).
            UsageError: `length` is not 1 to a cluster's; data that does not shrink is stored as it is.
        """
        if not 0 < length <= self.cluster_size:
            raise UsageError(f"compressed data of {length} bytes for a cluster of {self.cluster_size}")
        if host_offset >= self.max_compressed_offset:
            raise ImageLimitError(
                f"host offset {host_offset:#x} does not fit a compressed cluster descriptor",
                structure="compressed cluster descriptor",
                expected=f"a host offset below {self.max_compressed_offset:#x}",
                found=f"{host_offset:#x}",
            )
        in_sector = host_offset % layout.COMPRESSED_SECTOR_LENGTH
        extra_sectors = (in_sector + length - 1) // layout.COMPRESSED_SECTOR_LENGTH
        return layout.FLAG_COMPRESSED | (extra_sectors << self.compressed_offset_bits) | host_offset


def measure_size(
    geometry: Geometry, virtual_size: int, allocated_data_bytes: int = 0, *, preallocation: str = "off"
) -> MeasuredSize:
    """The file size of an image of `virtual_size` bytes, as ``qemu-img measure`` counts it [seen].

    The file holds one header cluster, the L1 table, every L2 table, the refcounts of a fully allocated image, and the
    data: all of it when fully allocated or preallocated with ``falloc`` or ``full``, otherwise `allocated_data_bytes`
    (the guest clusters that hold any data, in whole clusters).

    Raises:
        UsageError: `virtual_size` is negative, or more than an L1 table of layout.MAX_L1_BYTES can map.
    """
    if virtual_size < 0:
        raise UsageError(f"a virtual size of {virtual_size} bytes")
    if virtual_size > geometry.max_virtual_size:
        raise UsageError(
            f"a virtual size of {virtual_size} bytes needs clusters larger than {geometry.cluster_size} bytes, "
            f"which reach {geometry.max_virtual_size}"
        )
    data_clusters = geometry.clusters_for(virtual_size)
    l2_tables = geometry.l1_entries_for(virtual_size)
    clusters = 1 + geometry.l1_clusters_for(l2_tables) + l2_tables + data_clusters
    fully_allocated = clusters + geometry.refcount_metadata(clusters).clusters
    if preallocation in ("falloc", "full"):
        absent = 0
    else:
        absent = max(0, data_clusters - geometry.clusters_for(allocated_data_bytes))
    return MeasuredSize(
        required=(fully_allocated - absent) << geometry.cluster_bits,
        fully_allocated=fully_allocated << geometry.cluster_bits,
    )
