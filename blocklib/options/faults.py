"""The words of fault injection: QEMU's names (BlkdebugEvent, BlkdebugIOType, BlockPermission in its QAPI schema), and ours."""

from __future__ import annotations

from typing import Final

EVENTS: Final = (
    "none",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_alloc_space",
    "cluster_free",
    "cor_write",
    "cow_read",
    "cow_write",
    "empty_image_prepare",
    "flush_to_disk",
    "flush_to_os",
    "l1_grow_activate_table",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_shrink_free_l2_clusters",
    "l1_shrink_write_table",
    "l1_update",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "metadata",
    "pwritev",
    "pwritev_done",
    "pwritev_rmw_after_head",
    "pwritev_rmw_after_tail",
    "pwritev_rmw_head",
    "pwritev_rmw_tail",
    "pwritev_zero",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_switch_table",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "reftable_grow",
    "reftable_load",
    "reftable_update",
    "vmstate_load",
    "vmstate_save",
    "write_aio",
    "write_compressed",
)
"""What may happen; "metadata", a request for a structure of the format that has no event of its own, is ours."""
IO_TYPES: Final = ("read", "write", "write-zeroes", "discard", "flush", "truncate")
"""Kinds of requests; truncate is ours."""
PERMISSIONS: Final = ("consistent-read", "write", "write-unchanged", "resize")
