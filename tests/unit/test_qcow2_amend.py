"""Amending a qcow2 image: what is refused is refused before anything has changed, in the file and in an open disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import MiB
from blocklib.errors import OptionError, UsageError


def _small_image(folder: Path, options: dict[str, Any], **named: Any) -> Path:
    path = folder / "disk.qcow2"
    blocklib.create(path, 1 * MiB, format="qcow2", options={"cluster_size": 512, **options}, **named)
    return path


def test_a_header_that_would_not_fit_its_cluster_is_refused_before_the_first_change(tmp_path: Path) -> None:
    path = _small_image(tmp_path, {"data_file": "data.img"})
    before = path.read_bytes()
    with pytest.raises(UsageError, match="does not fit"):
        blocklib.amend(path, {"data_file": "y" * 396, "lazy_refcounts": True, "refcount_bits": 32})
    assert path.read_bytes() == before


def test_an_open_disk_goes_on_after_an_upgrade_that_would_not_fit(tmp_path: Path) -> None:
    path = _small_image(tmp_path, {"compat": "0.10"}, backing="b" * 400, backing_format="raw")
    with blocklib.open(path, "r+", backing=None) as disk:
        with pytest.raises(UsageError, match="does not fit"):
            blocklib.amend(disk, {"compat": "1.1"})
        disk.truncate(2 * MiB)
        disk.write(1 * MiB, b"x")
    assert not blocklib.check(path).findings
    assert blocklib.info(path).format_specific["compat"] == "0.10"


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    path = _small_image(tmp_path, {"data_file": "data.img"})
    before = path.read_bytes()
    with pytest.raises(OptionError, match="no file name"):
        blocklib.amend(path, {"data_file": "\ud800"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("option", ["lazy-refcounts", "discard-no-unref"])
def test_a_disk_that_was_opened_with_what_version_2_has_not_stays_as_it_is(tmp_path: Path, option: str) -> None:
    path = _small_image(tmp_path, {})
    with blocklib.open(path, "r+", options={option: True}) as disk:
        with pytest.raises(OptionError, match=option):
            blocklib.amend(disk, {"compat": "0.10"})
        disk.write(0, b"x")
    assert not blocklib.check(path).findings
    assert blocklib.info(path).format_specific["compat"] == "1.1"
