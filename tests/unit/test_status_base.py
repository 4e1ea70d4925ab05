"""Block status of only the images above a base."""

from __future__ import annotations

from pathlib import Path

import blocklib
from blocklib import KiB


def test_the_end_of_a_shorter_base_is_reported_alike_run_by_run_and_as_a_table(tmp_path: Path) -> None:
    blocklib.create(tmp_path / "base.raw", 4 * KiB, format="raw")
    top = tmp_path / "top.qcow2"
    blocklib.create(top, 12 * KiB, format="qcow2", backing="base.raw", backing_format="raw", options={"cluster_size": 4 * KiB})
    with blocklib.open(top, "r+", format="qcow2", references="allow") as disk:
        disk.write(8 * KiB, b"x" * 4 * KiB)
        base = disk.chain()[1]
        extents = list(disk.extents(base=base))
        said = [(extent.offset, extent.length, extent.present, extent.zero, extent.data) for extent in extents]
        assert said == [
            (0, 4096, False, False, False),  # the base's business
            (4096, 4096, False, True, False),  # the base has ended
            (8192, 4096, True, False, True),
        ]
        table = disk.map(base=base)
        columns = ("offset", "length", "present", "zero", "data")
        assert list(zip(*(table[column].tolist() for column in columns), strict=True)) == said
        assert list(disk.extents(4 * KiB, 512, base=base)) == [extents[1]._replace(length=512)]
