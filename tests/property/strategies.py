"""Hypothesis strategies for random backing chains and for what is done to them."""

from __future__ import annotations

from typing import Final, Literal

from hypothesis import strategies as st

from blocklib import KiB, MiB
from tests.property.chains import MAX_SIZE, SECTOR, Change, ImageSpec, Place

CLUSTER_SIZES: Final = (512, 4 * KiB, 64 * KiB, 1 * KiB, 2 * MiB)
EXTENDED_MIN: Final = 16 * KiB
"""The smallest clusters that can be divided into subclusters."""
WIDTHS: Final = (16, 1, 64, 2, 8, 4, 32)


def sizes(cluster_size: int) -> st.SearchStrategy[int]:
    """Virtual sizes that matter for a cluster size: few clusters or many, whole ones or not; multiples of 512."""
    most = MAX_SIZE // SECTOR
    few = st.integers(1, max(1, min(most, 5 * cluster_size // SECTOR)))
    l2_table = cluster_size // 8 * cluster_size // SECTOR
    around_tables = st.builds(
        lambda tables, delta: max(1, min(most, tables * l2_table + delta)), st.integers(1, 3), st.integers(-2, 2)
    )
    return st.one_of(few, around_tables, st.integers(1, most)).map(lambda sectors: sectors * SECTOR)


@st.composite
def image_specs(draw: st.DrawFn, *, raw: bool = False) -> ImageSpec:
    if raw and draw(st.booleans()):
        return ImageSpec(draw(sizes(4 * KiB)), "raw")
    cluster_size = draw(st.sampled_from(CLUSTER_SIZES))
    size = draw(sizes(cluster_size))
    compat: Literal["0.10", "1.1"] = draw(st.sampled_from(("1.1", "0.10")))
    width = draw(st.sampled_from(WIDTHS)) if compat == "1.1" else 16
    if compat == "1.1" and draw(st.booleans()):
        # Overlays may be preallocated: their subclusters are not.
        preallocation: Literal["off", "metadata"] = draw(st.sampled_from(("off", "metadata")))
        cluster_size = max(cluster_size, EXTENDED_MIN)
        return ImageSpec(size, "qcow2", cluster_size, width, compat, preallocation, extended_l2=True)
    return ImageSpec(size, "qcow2", cluster_size, width, compat)


def chain_specs(max_images: int) -> st.SearchStrategy[list[ImageSpec]]:
    """The images of a chain, the base (which may be raw) first, the top a qcow2 image."""
    return st.builds(
        lambda base, others, top: [*base, *others, top],
        st.lists(image_specs(raw=True), max_size=1),
        st.lists(image_specs(), max_size=max_images - 2),
        image_specs(),
    )


_DELTAS: Final = st.one_of(st.just(0), st.sampled_from((1, -1, 512, -512, 4096)), st.integers(-70_000, 70_000))


def places() -> st.SearchStrategy[Place]:
    """Ranges at and around cluster boundaries, small and large, aligned or not."""
    cluster = st.one_of(st.integers(0, 4), st.integers(0, MAX_SIZE // SECTOR))
    clusters = st.sampled_from((1, 0, 2, 3, 8, 70, 700))
    return st.builds(Place, cluster, _DELTAS, clusters, _DELTAS)


def changes() -> st.SearchStrategy[Change]:
    kinds = st.sampled_from(
        (
            "write",
            "write",
            "write clusters",
            "write clusters",
            "write in a batch",
            "write in a batch",
            "write zero bytes",
            "zero",
            "zero and unmap",
            "discard",
        )
    )
    return st.builds(Change, kinds, places(), st.integers(0, 1000))
