"""Block status on random chains: one answer whether it is asked run by run or as a table, and a true one.

The definition is brute force: what is reported as zero reads as zero, and what is reported to lie somewhere is there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklib.disk import Disk
from blocklib.extents import Extent
from tests.nodes import join_extents, tabled
from tests.property.chains import Change, ImageSpec, Place, build_chain, open_image
from tests.property.strategies import chain_specs, changes, places


@st.composite
def filled_chains(draw: st.DrawFn) -> tuple[list[ImageSpec], list[list[Change]]]:
    specs = draw(chain_specs(4))
    return specs, [draw(st.lists(changes(), max_size=6)) for _ in specs]


def as_extents(table: Any) -> list[Extent]:
    return [
        Extent(offset, length, depth, host if host >= 0 else None, data, zero, present, compressed)
        for offset, length, depth, host, data, zero, present, compressed in table.tolist()
    ]


def clipped(extents: list[Extent], offset: int, length: int) -> list[Extent]:
    """The part of contiguous extents that lies in a range."""
    found = []
    for extent in extents:
        start = max(extent.offset, offset)
        end = min(extent.offset + extent.length, offset + length)
        if start < end:
            host = None if extent.host_offset is None else extent.host_offset + start - extent.offset
            found.append(extent._replace(offset=start, length=end - start, host_offset=host))
    return found


def assert_true(disk: Disk, extents: list[Extent], content: bytes | bytearray) -> None:
    chain = disk.chain()
    position = 0
    for before, extent in zip([None, *extents], extents, strict=False):
        assert extent.offset == position
        assert extent.length > 0
        position += extent.length
        assert before is None or join_extents(before, extent) is None, "coalesced as far as they go"
        expected = content[extent.offset : position]
        if extent.zero:
            assert not any(expected), extent
        assert extent.data or extent.zero, "something determines every byte of a whole chain"
        if extent.data and extent.host_offset is not None:
            filename = chain[extent.depth].filename
            assert filename is not None
            with Path(filename).open("rb") as file:
                file.seek(extent.host_offset)
                assert file.read(extent.length).ljust(extent.length, b"\0") == expected, extent
    assert position == len(content)


def assert_only_above(whole: list[Extent], above: list[Extent], base_depth: int) -> None:
    """With a base: what the images above it hold is reported as ever, the rest as not present."""
    for extent in above:
        for part in clipped(whole, extent.offset, extent.length):
            mine = clipped([extent], part.offset, part.length)[0]
            if extent.present or (part.depth < base_depth and part.present):
                assert mine == part
            else:
                assert not extent.data
                assert extent.depth < base_depth


@pytest.mark.timeout(900)  # reducing a failure to its smallest form takes Hypothesis up to five minutes
@given(chain=filled_chains(), windows=st.lists(places(), min_size=1, max_size=3))
@settings(max_examples=settings().max_examples * 2)
def test_extents_and_map_agree_and_tell_the_truth(
    chain: tuple[list[ImageSpec], list[list[Change]]], windows: list[Place]
) -> None:
    with tempfile.TemporaryDirectory(prefix="blocklib-status-") as folder:
        images = build_chain(Path(folder), *chain)
        top = images[-1]
        with open_image(top) as disk:
            # All questions first: reading a preallocated part of a raw file makes its holes data for the kernel.
            whole = list(disk.extents())
            assert as_extents(disk.map()) == whole
            assert tabled(disk.node, 0, disk.size) == whole
            for place in windows:
                offset, length = place.on(top.size, top.spec.cluster_size)
                part = clipped(whole, offset, length)
                assert list(disk.extents(offset, length)) == part
                assert as_extents(disk.map(offset, length)) == part
            for depth, base in enumerate(disk.chain()):
                if depth:
                    above = list(disk.extents(base=base))
                    assert as_extents(disk.map(base=base)) == above
                    assert_only_above(whole, above, depth)
            assert_true(disk, whole, top.content)
