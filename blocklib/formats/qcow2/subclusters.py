"""The second word of an extended L2 entry: which of a cluster's 32 subclusters are allocated, and which read as zero.

Pure arithmetic.  A *set* of subclusters is a number with bit x set for subcluster x.  Source: section "Extended L2 Entries"
of ``docs/interop/qcow2.rst``: bits 0-31 of the word are the allocated ones, bits 32-63 those that read as zeroes.
"""

from __future__ import annotations

from typing import Final

from blocklib.formats.qcow2 import layout

N: Final = layout.SUBCLUSTERS_PER_CLUSTER
ALL: Final = layout.SUBCLUSTER_ALLOCATED_MASK
ALL_ALLOCATED: Final = layout.SUBCLUSTER_ALLOCATED_MASK
ALL_ZERO: Final = layout.SUBCLUSTER_ZERO_MASK


def span(first: int, stop: int) -> int:
    """The set of subclusters [first, stop)."""
    return (1 << stop) - (1 << first)


def like(bitmap: int, subcluster: int) -> int:
    """The set of subclusters that are in the same state as `subcluster`, which is one of them."""
    bit = 1 << subcluster
    if bitmap & bit:
        return bitmap & ALL
    zero = bitmap >> N
    if zero & bit:
        return zero
    return ~(bitmap | zero) & ALL


def run_length(subclusters: int, first: int) -> int:
    """How many subclusters from `first` on, without a gap, are in the set."""
    rest = ~(subclusters >> first)
    return (rest & -rest).bit_length() - 1


def written(bitmap: int, subclusters: int) -> int:
    """The word once the set has been written: allocated, and no longer zero."""
    return bitmap & ~(subclusters << N) | subclusters


def zeroed(bitmap: int, subclusters: int) -> int:
    """The word once the set reads as zeroes."""
    return bitmap & ~subclusters | subclusters << N


def lowest(subclusters: int) -> int:
    """The first of a set that is not empty."""
    return (subclusters & -subclusters).bit_length() - 1
