"""The repair of a qcow2 image: what it mends, what it leaves alone, and in which order it writes."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib.errors import ImageLimitError, StalePlanError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check.image import check_image
from blocklib.formats.qcow2.repair.image import repair_image
from blocklib.reports import CheckReport, RepairReport
from tests.qcow2_bytes import COPIED, CORRUPT, DIRTY, Qcow2Bytes

WIDTHS = pytest.mark.parametrize("refcount_order", range(7), ids=lambda order: f"{1 << order}-bit")
WHAT = pytest.mark.parametrize("what", ["leaks", "all"])


def check(image: Qcow2Bytes) -> CheckReport:
    header = image.header()
    return check_image(image, header, header.geometry(), filename="test.qcow2")


def repair(image: Qcow2Bytes, what: Any = "all", **arguments: Any) -> RepairReport:
    header = image.header()
    report = repair_image(image, header, header.geometry(), what, filename="test.qcow2", **arguments)
    if header.version >= 3:
        assert header.incompatible_features == image.features
    return report


def repaired(image: Qcow2Bytes, what: Any = "all") -> CheckReport:
    """The check after a repair, which is also what a new check finds."""
    report = repair(image, what)
    assert report.after is not None
    found = check(image)
    assert (found.corruptions, found.leaks, found.check_errors) == (
        report.after.corruptions,
        report.after.leaks,
        report.after.check_errors,
    )
    return report.after


# What is mended -----------------------------------------------------------------------------------------------------


@WHAT
@WIDTHS
def test_leaks_are_given_back(refcount_order: int, what: str) -> None:
    image = Qcow2Bytes(refcount_order=refcount_order)
    image.set_entry(image.l2_entry(5), 0)
    image.set_entry(image.l2_entry(3), 0)
    after = repaired(image, what)
    assert after.clean
    assert (after.leaks_fixed, after.corruptions_fixed) == (2, 0)
    for data, count in zip(image.data, [1, 1, 1, 0, 1, 0]):
        assert image.refcount(data // image.cluster_size) == count


@WIDTHS
def test_counts_that_are_too_low_are_raised(refcount_order: int) -> None:
    image = Qcow2Bytes(refcount_order=refcount_order, features=DIRTY)
    for data in image.data[2:]:
        image.set_refcount(data // image.cluster_size, 0)
    after = repaired(image)
    assert after.clean
    assert after.corruptions_fixed == 4
    assert image.features == 0


def test_repairing_leaks_leaves_low_counts_and_the_dirty_bit() -> None:
    image = Qcow2Bytes(features=DIRTY)
    image.set_refcount(image.l1 // image.cluster_size, 0)
    image.set_entry(image.l2_entry(0), 0)
    after = repaired(image, "leaks")
    assert (after.corruptions, after.leaks, after.leaks_fixed) == (1, 0, 1)
    assert image.features == DIRTY


@WHAT
@pytest.mark.parametrize("features", [0, DIRTY, CORRUPT, DIRTY | CORRUPT])
def test_a_sound_image_loses_its_bits_and_nothing_else_is_written(features: int, what: str) -> None:
    image = Qcow2Bytes(features=features)
    report = repair(image, what)
    assert image.features == 0
    assert len(report.steps) == features.bit_count()
    assert all(offset == 72 for offset, _ in filter(None, image.log))


@WHAT
def test_copied_flags_are_corrected(what: str) -> None:
    image = Qcow2Bytes(n_l2=3)
    for offset in (image.l1 + 8, image.l2_entry(0), image.l2_entry(4)):
        image.set_entry(offset, image.entry(offset) ^ COPIED)
    before = bytes(image.bytes)
    after = repaired(image, what)
    assert after.clean
    assert after.corruptions_fixed == 3
    assert image.entry(image.l2_entry(4)) == image.data[4] | COPIED
    assert len(image.bytes) == len(before)


def test_a_cluster_used_twice_is_counted_twice_and_loses_its_flag() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(1), image.data[0] | COPIED)
    after = repaired(image)
    assert after.clean
    assert (after.corruptions_fixed, after.leaks_fixed) == (3, 1)  # a count and two flags; the cluster that nobody uses
    assert image.entry(image.l2_entry(0)) == image.entry(image.l2_entry(1)) == image.data[0]


def test_lowering_a_count_to_one_sets_the_flag() -> None:
    image = Qcow2Bytes()
    image.set_refcount(image.data[0] // image.cluster_size, 2)
    image.set_entry(image.l2_entry(0), image.data[0])
    assert repaired(image, "leaks").clean
    assert image.entry(image.l2_entry(0)) == image.data[0] | COPIED


def test_the_corrupt_bit_stays_as_long_as_anything_is_wrong() -> None:
    image = Qcow2Bytes(features=CORRUPT | DIRTY)
    image.set_entry(image.l2_entry(0), image.entry(image.l2_entry(0)) | 2)
    assert not repaired(image).clean
    assert image.features == CORRUPT


# Refcounts that cannot be mended in place ---------------------------------------------------------------------------


@WIDTHS
def test_refcounts_with_a_missing_block_are_rebuilt_behind_the_end_of_the_file(refcount_order: int) -> None:
    image = Qcow2Bytes(cluster_bits=9, refcount_order=refcount_order, n_l2=3, n_data=150, features=DIRTY)
    end, data = image.size, bytes(image.bytes[image.data[0] :])
    image.set_entry(image.table, 0)
    after = repaired(image)
    assert after.clean
    assert image.entry(48) == end
    assert image.entry(end) > end
    assert image.features == 0
    assert image.bytes[image.data[0] : end] == data


def test_rebuilt_refcounts_count_themselves() -> None:
    image = Qcow2Bytes(cluster_bits=9, refcount_order=6, n_data=1)  # 64 counts in a block
    image.grow(64 - image.n_clusters)
    image.set_entry(image.table, 0)
    assert repaired(image).clean
    assert image.entry(48) == 64 * 512
    assert (image.entry(64 * 512), image.entry(64 * 512 + 8)) == (65 * 512, 66 * 512)


def test_without_room_in_the_refcount_table_a_longer_one_is_made() -> None:
    image = Qcow2Bytes(cluster_bits=9, refcount_order=6, n_data=1)
    room = 64 * 64  # entries in the table times counts in a block
    data = image.grow(room + 1 - image.n_clusters) + (room - image.n_clusters) * 512
    image.set_entry(image.l2_entry(7), data | COPIED)
    image.set_refcount(image.l1 // 512, 0)
    assert repaired(image).clean
    assert int.from_bytes(image.bytes[56:60], "big") == 2


def test_where_a_damaged_entry_points_nothing_is_put() -> None:
    image = Qcow2Bytes()
    end = image.size
    image.set_entry(image.l1 + 8, end | COPIED)
    image.bytes[36:40] = (2).to_bytes(4, "big")
    image.set_entry(image.table, 0)
    after = repaired(image)
    assert after.corruptions_fixed > 0
    assert image.entry(48) == end + image.cluster_size
    assert not any(image.bytes[end : end + image.cluster_size])


@pytest.mark.parametrize("entry", [512, 1, 1 << 62, 1 << 63], ids=["unaligned", "reserved", "far away", "no offset of a file"])
def test_counts_that_cannot_be_read_are_made_anew(entry: int) -> None:
    image = Qcow2Bytes(features=DIRTY)
    image.set_entry(image.table, image.entry(image.table) | entry)
    assert check(image).check_errors or check(image).corruptions
    assert repaired(image).clean
    assert image.features == 0


def test_a_refcount_block_that_guest_data_lies_on_goes_elsewhere() -> None:
    image = Qcow2Bytes()
    block = bytes(image.bytes[image.blocks[0] : image.blocks[0] + image.cluster_size])
    image.set_entry(image.l2_entry(0), image.blocks[0] | COPIED)
    assert repaired(image).clean
    assert image.bytes[image.blocks[0] : image.blocks[0] + image.cluster_size] == block
    assert image.entry(image.l2_entry(0)) == image.blocks[0] | COPIED


def test_repairing_leaks_rebuilds_nothing() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.table, 0)
    assert not repaired(image, "leaks").clean
    assert image.log == []


# Tables ---------------------------------------------------------------------------------------------------------------


def test_a_zero_cluster_forgets_a_host_cluster_that_cannot_be() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(0), image.entry(image.l2_entry(0)) | 512 | 1)
    after = repaired(image)
    assert after.clean
    assert (after.corruptions_fixed, after.leaks_fixed) == (1, 1)
    assert image.entry(image.l2_entry(0)) == 1


@pytest.mark.parametrize("place", ["l1", "l2", "table"])
def test_guest_data_on_metadata_gets_a_cluster_of_its_own(place: str) -> None:
    image = Qcow2Bytes()
    where = {"l1": image.l1, "l2": image.l2[0], "table": image.table}[place]
    image.set_entry(image.l2_entry(0), where | COPIED)
    read = bytes(image.bytes[where : where + image.cluster_size])
    assert repaired(image).clean
    data = image.entry(image.l2_entry(0)) & ~COPIED
    assert image.bytes[data : data + image.cluster_size] == read
    assert image.entry(48) != data


@WHAT
@pytest.mark.parametrize(
    "damage",
    [
        lambda image: image.set_entry(image.l1, COPIED | 1 << 40),
        lambda image: image.set_entry(image.l1, image.entry(image.l1) | 512),
        lambda image: image.set_entry(image.l2_entry(0), COPIED | 1 << 40),
        lambda image: image.set_entry(image.l2_entry(0), image.entry(image.l2_entry(0)) | 2),
    ],
    ids=["L1 outside", "L1 unaligned", "L2 outside", "L2 reserved"],
)
def test_an_entry_that_leads_nowhere_stays_and_leaks_are_given_back(damage: Any, what: str) -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(5), 0)
    damage(image)
    leaks = check(image).leaks
    after = repaired(image, what)
    assert after.corruptions > 0
    assert (after.leaks, after.leaks_fixed) == (0, leaks)


def test_unknown_autoclear_bits_are_cleared() -> None:
    image = Qcow2Bytes()
    image.set_entry(88, 1 << 40 | 2)
    assert repaired(image, "leaks").clean
    assert image.entry(88) == 0


# Plans --------------------------------------------------------------------------------------------------------------


def damaged() -> Qcow2Bytes:
    """Counts too low and too high, wrong flags, and the dirty bit."""
    image = Qcow2Bytes(cluster_bits=9, refcount_order=6, n_l2=2, n_data=100, features=DIRTY | CORRUPT)
    for index in (3, 4, 90):
        image.set_entry(image.l2_entry(index % 64, index // 64), 0)
    for index in range(64, 80):
        image.set_entry(image.l2_entry(index - 64, 1), image.data[index] | COPIED)
    image.set_entry(image.l2_entry(5), image.data[6] | COPIED)
    image.set_entry(image.l2_entry(7), image.data[7])
    image.set_refcount(image.l1 // 512, 0)
    return image


def damaged_twice() -> Qcow2Bytes:
    """The same with a missing refcount block."""
    image = damaged()
    image.set_entry(image.table + 8, 0)
    return image


def test_a_dry_run_writes_nothing_and_says_what_the_repair_then_does() -> None:
    image = damaged()
    before = bytes(image.bytes)
    plan = repair(image, dry_run=True)
    assert image.log == []
    assert image.bytes == before
    assert plan.after is None
    report = repair(image, expect=plan)
    assert report.steps == plan.steps
    assert report.before == plan.before
    assert {step.action for step in report.steps} == {
        "raise refcounts",
        "correct copied flags",
        "lower refcounts",
        "clear dirty bit",
        "clear corrupt bit",
    }
    assert all(str(step) for step in report.steps)


def test_a_repair_that_would_differ_from_its_plan_is_not_made() -> None:
    image = damaged()
    plan = repair(image, dry_run=True)
    image.set_refcount(image.data[10] // 512, 3)
    with pytest.raises(StalePlanError):
        repair(image, expect=plan)
    assert image.log == []


def test_a_second_repair_has_nothing_to_do() -> None:
    image = damaged()
    assert repaired(image).clean
    image.log.clear()
    assert repair(image).steps == ()
    assert image.log == []


def test_a_step_names_a_few_runs_and_counts_the_rest() -> None:
    image = Qcow2Bytes(n_data=60)
    for index in range(0, 60, 2):
        image.set_entry(image.l2_entry(index), 0)
    (step,) = repair(image, dry_run=True).steps
    assert step.before.count("cluster ") == 4
    assert step.before.endswith("and 26 more")


# Crashes ------------------------------------------------------------------------------------------------------------


def too_low(report: CheckReport) -> set[int | None]:
    structure = "refcount of a host cluster"
    return {found.host_offset for found in report.findings if found.structure == structure and found.kind == "corruption"}


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_a_crash_at_any_write_makes_no_count_too_low(version: int, rebuild: bool) -> None:
    image = damaged_twice() if rebuild else damaged()
    if version == 2:
        image = Qcow2Bytes(version=2, n_data=40)
        for index in (3, 4):
            image.set_entry(image.l2_entry(index), 0)
        image.set_entry(image.l2_entry(5), image.data[6] | COPIED)
        image.set_refcount(image.l1 // image.cluster_size, 0)
        if rebuild:
            image.set_entry(image.table, image.entry(image.table) | 1)
    start = bytes(image.bytes)
    low_before = too_low(check(image))
    assert repaired(image).clean
    log, end = image.log, bytes(image.bytes)
    image.bytes = bytearray(start)
    for event in log:
        if event is not None:
            image.apply(*event)
            # A new block behind the old end is in use, and counted, as soon as the table points at it.
            assert too_low(check(image)) <= low_before
    assert image.bytes == end


def test_every_phase_is_durable_before_the_next() -> None:
    image = damaged()
    tables = {"header": 0, "table": image.table, "l1": image.l1, **{f"l2 {i}": l2 for i, l2 in enumerate(image.l2)}}
    size = image.size
    repair(image)
    phases: list[set[str]] = [set()]
    for event in image.log:
        if event is None:
            phases.append(set())
            continue
        offset = event[0] // 512 * 512
        names = [name for name, place in tables.items() if place == offset]
        phases[-1].add(names[0] if names else "new block" if event[0] >= size else "refcounts")
    assert phases[-1] == set()  # a flush comes last
    assert phases[:-1] == [{"refcounts"}, {"l2 0"}, {"refcounts"}, {"header"}]


def test_rebuilt_refcounts_are_durable_before_the_header_switches_to_them() -> None:
    image = damaged_twice()
    size = image.size
    repair(image)
    phases: list[set[str]] = [set()]
    for event in image.log:
        if event is None:
            phases.append(set())
        else:
            phases[-1].add("new" if event[0] >= size else "header" if event[0] < 512 else "entries")
    assert phases == [{"new"}, {"header"}, {"entries"}, {"header"}, set()]
    switch = [event for event in image.log if event is not None and event[0] == 0]
    assert [len(event[1]) for event in switch] == [512]


def test_a_crash_between_wrong_flags_and_counts_leaves_the_dirty_bit() -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(1), image.data[0] | COPIED)
    repair(image)
    features = [int.from_bytes(event[1], "big") for event in image.log if event is not None and event[0] == 72]
    assert features == [DIRTY, 0]
    assert image.log[0] is not None
    assert image.log[0][0] == 72
    assert image.log[1] is None


# What a repair may cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [damaged, damaged_twice], ids=["in place", "rebuilt"])
def test_clusters_are_compared_some_at_a_time_with_the_same_result(
    damage: Callable[[], Qcow2Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sliced = damage(), damage()
    report = repair(whole)
    monkeypatch.setattr("blocklib.formats.qcow2.check.scan._SLICE", 3)
    in_slices = repair(sliced)
    assert in_slices.steps == report.steps
    assert sliced.bytes == whole.bytes


def test_a_sparse_file_costs_a_repair_no_memory_for_its_holes(tmp_path: Path) -> None:
    script = """
import os, resource, sys, blocklib
blocklib.create(sys.argv[1], 1 << 20, format="qcow2", options={"cluster_size": 512})
blocklib.repair(sys.argv[1], "all")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
os.truncate(sys.argv[1], 32 << 30)
blocklib.repair(sys.argv[1], "all")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "disk.qcow2")]
    grown = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout)
    assert grown < 64  # MiB for 2**26 clusters


def test_guest_data_on_more_metadata_than_memory_should_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Qcow2Bytes()
    image.set_entry(image.l2_entry(0), image.l1 | COPIED)
    monkeypatch.setattr("blocklib.formats.qcow2.repair.entries._MAX_MOVED_BYTES", image.cluster_size - 1)
    with pytest.raises(ImageLimitError, match="too much guest data"):
        repair(image)
    assert image.log == []


# Bitmaps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda entry: entry.flags(1, 1 << 20), ["first", "third"]),
        (lambda entry: entry.table(1, 0x200), ["first", "third"]),
        (lambda entry: (entry.flags(0, 1 << 20), entry.table(2, 1 << 40)), ["second"]),  # the third is found only then
        (lambda entry: [entry.flags(index, 1 << 20) for index in range(3)], []),
        (lambda entry: entry.name_length(1, 15), []),  # where one ends and the next begins, nobody knows
    ],
    ids=["flags", "unaligned table", "and a table past the end", "all of them", "length"],
)
def test_bitmaps_beside_a_malformed_one_are_kept_as_far_as_they_can_be_read(
    damage: Callable[[BitmapEntries], object], kept: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1 << 20, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        for name in ("first", "second", "third"):
            disk.bitmaps.add(name, persistent=True)
        disk.write(1 << 16, b"x")
    damage(BitmapEntries(path))
    plan = blocklib.repair(path, "all", dry_run=True)
    report = blocklib.repair(path, "all", expect=plan)
    assert report.after is not None
    assert report.after.clean
    with blocklib.open(path) as disk:
        assert [bitmap.name for bitmap in disk.bitmaps] == kept
        assert all(bitmap.dirty_ranges().tolist() == [(1 << 16, 1 << 16)] for bitmap in disk.bitmaps)


class BitmapEntries:
    """The entries of a bitmap directory in a file, to be damaged one by one, 32 bytes each: their names have up to 8."""

    def __init__(self, path: Path) -> None:
        self._path = path
        data = path.read_bytes()
        extension = data.index(struct.pack(">II", layout.EXTENSION_BITMAPS, 24))
        self._directory = int.from_bytes(data[extension + 24 : extension + 32], "big")

    def _put(self, index: int, offset: int, data: bytes) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._directory + 32 * index + offset)
            file.write(data)

    def table(self, index: int, host_offset: int) -> None:
        self._put(index, 0, host_offset.to_bytes(8, "big"))

    def flags(self, index: int, flags: int) -> None:
        self._put(index, 12, flags.to_bytes(4, "big"))

    def name_length(self, index: int, length: int) -> None:
        self._put(index, 18, length.to_bytes(2, "big"))


# Snapshots --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_an_absurd_length_of_extra_data_costs_no_snapshot(damaged: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1 << 20, format="qcow2")
    names = ["first", "second", "third"]
    with blocklib.open(path, "r+") as disk:
        for name in names:
            disk.write(0, name.encode())
            disk.snapshots.create(name)
    position = int.from_bytes(path.read_bytes()[64:72], "big") + 72 * damaged  # 40, 24 of extra data, id and name
    with path.open("r+b") as file:
        file.seek(position + 36)
        assert file.read(4) == (24).to_bytes(4, "big")
        file.seek(position + 36)
        file.write((1 << 24).to_bytes(4, "big"))
    report = blocklib.repair(path, "all")
    assert report.after is not None
    assert report.after.clean
    assert [snapshot.name for snapshot in blocklib.info(path).snapshots] == names
    for name in names:
        with blocklib.open(path, options={"snapshot.name": name}) as disk:
            assert disk.read(0, len(name)) == name.encode()
