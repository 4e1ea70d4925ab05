"""Repairing a qcow2 image: the changes of a plan, written so that a crash at any point leaves at worst leaks.

Counts go up first, then flags change, then counts go down, each durable before the next begins.  A version 3 image carries
the dirty bit meanwhile, so that whoever opens it after a crash repairs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from blocklib.errors import StalePlanError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.check import MAX_FINDINGS, report_of, scan_image
from blocklib.reports import RepairReport, RepairStep

if TYPE_CHECKING:
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.repair_plan import RepairPlan, What


class WritableImageFile(Protocol):
    """What a repair needs of the edge to the image file.  A write past its end makes it grow."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, view: memoryview, /) -> None: ...

    def write(self, offset: int, views: Sequence[memoryview | bytes | bytearray], /) -> None: ...

    def flush(self) -> None: ...


def repair_image(
    file: WritableImageFile,
    header: Header,
    geometry: Geometry,
    what: What,
    *,
    filename: str,
    dry_run: bool = False,
    expect: RepairReport | None = None,
    max_findings: int = MAX_FINDINGS,
    progress: Callable[[int, int], object] | None = None,
) -> RepairReport:
    """Repair the image in `file`: "leaks" lowers refcounts that are too high, "all" also raises those that are too low.

    Both correct copied flags, and clear the corrupt bit and the dirty bit of an image that is clean afterwards; "all"
    clears the dirty bit as soon as no refcount is too low.  Damaged table entries and refcount blocks are left alone and
    are found again by the check `after`; as long as there are any, no refcount is lowered, since what looks leaked may be
    what the damaged entry meant.

    With `dry_run` nothing is written, and `after` is None.  With `expect`, the report of a dry run, the repair is made only
    if it would do exactly that.  The caller makes sure that nobody else writes, and loads the image anew afterwards: table
    blocks and `header.incompatible_features` have changed, the latter in `header` too.

    Raises:
        StalePlanError: the image needs other steps than `expect` has; nothing was written.
        UnsupportedFeatureError, ImageLimitError, StorageError: as `check_image`.
    """
    scan = scan_image(file, header, geometry, max_findings=max_findings, progress=progress)
    from blocklib.formats.qcow2.repair_plan import RepairPlan

    plan = RepairPlan(scan, what)
    before = report_of(scan, filename)
    cleared = _bits_to_clear(header, what, plan.will_be_clean, plan.counts_will_suffice)
    steps = (*plan.steps(), *_bit_steps(header, cleared))
    if expect is not None and (steps != expect.steps or before != expect.before):
        raise StalePlanError(f"{filename}: the image has changed since the repair was planned", node=filename)
    if dry_run:
        return RepairReport(steps, before)
    after_scan = scan
    if plan.changes_tables:
        was_dirty = header.incompatible_features & layout.INCOMPATIBLE_DIRTY
        _write_changes(file, header, plan)
        # Without progress, whose callback may end the work: the dirty bit comes off only after this.
        after_scan = scan_image(file, header, geometry, max_findings=max_findings, progress=None)
        cleared = _bits_to_clear(header, what, after_scan.is_clean, after_scan.counts_suffice)
        if not was_dirty:  # the bit on disk is ours
            cleared |= header.incompatible_features & layout.INCOMPATIBLE_DIRTY
    if cleared:
        _set_features(file, header, header.incompatible_features & ~cleared)
    after = replace(
        report_of(after_scan, filename),
        corruptions_fixed=plan.n_raised + plan.n_flags,
        leaks_fixed=plan.n_lowered,
    )
    return RepairReport(steps, before, after)


def _write_changes(file: WritableImageFile, header: Header, plan: RepairPlan) -> None:
    unordered = plan.raised.clusters.size or plan.flag_tables
    if unordered and header.version >= layout.VERSION_3:
        _set_features(file, header, header.incompatible_features | layout.INCOMPATIBLE_DIRTY)
    _write_all(file, plan.count_writes(plan.raised))
    _write_all(file, plan.link_writes())
    _write_all(file, plan.flag_writes())
    _write_all(file, plan.count_writes(plan.lowered))


def _write_all(file: WritableImageFile, writes: Iterable[tuple[int, bytes]]) -> None:
    """Write each (host offset, bytes); durable when this returns."""
    written = False
    for offset, data in writes:
        file.write(offset, (data,))
        written = True
    if written:
        file.flush()


def _set_features(file: WritableImageFile, header: Header, features: int) -> None:
    """Replace the incompatible feature bits on disk and in `header`; eight bytes of the first sector, so atomic."""
    if features != header.incompatible_features:
        data = features.to_bytes(8, "big")
        _write_all(file, ((layout.FIELD_OFFSETS["incompatible_features"], data),))
        header.incompatible_features = features


def _bits_to_clear(header: Header, what: What, clean: bool, counts_right: bool) -> int:
    """The incompatible feature bits that no longer say the truth."""
    bits = 0
    if clean or (what == "all" and counts_right):
        bits |= layout.INCOMPATIBLE_DIRTY
    if clean:
        bits |= layout.INCOMPATIBLE_CORRUPT
    return bits & header.incompatible_features


def _bit_steps(header: Header, cleared: int) -> list[RepairStep]:
    place = layout.FIELD_OFFSETS["incompatible_features"]
    names = {layout.INCOMPATIBLE_DIRTY: "dirty bit", layout.INCOMPATIBLE_CORRUPT: "corrupt bit"}
    return [RepairStep(f"clear {name}", "header", place, "set", "clear") for bit, name in names.items() if cleared & bit]
