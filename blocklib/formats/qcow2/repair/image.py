"""Repairing a qcow2 image: the changes of a plan, written so that a crash at any point leaves at worst leaks.

All of a repair is worked out on a `Draft` first, with the check of what comes out of it.  Then new clusters are written, which
nothing refers to yet; counts go up; the header switches to new tables, in one sector; table entries change; counts go down;
each durable before the next begins.  A version 3 image carries the dirty bit meanwhile, so that whoever opens it after a crash
repairs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from blocklib.errors import ImageCorruptError, StalePlanError
from blocklib.formats.qcow2 import header_change, layout
from blocklib.formats.qcow2.check.image import MAX_FINDINGS, report_of, scan_image
from blocklib.records import replace
from blocklib.reports import RepairReport, RepairStep

if TYPE_CHECKING:
    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.formats.qcow2.repair.draft import Draft

What: TypeAlias = Literal["leaks", "all"]


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
    """Repair the image in `file`: "leaks" lowers refcounts that are too high, "all" mends what ``qemu-img check -r all`` does.

    Both correct copied flags ("leaks" only where nothing worse is left), clear autoclear bits of what the image has not, and
    clear the corrupt bit and the dirty bit of an image without corruptions afterwards.  "all" also raises refcounts, or
    rebuilds all of them behind the end of the file where they cannot be mended in place; rewrites a damaged snapshot table;
    removes bitmaps that cannot be read; and takes impossible host offsets out of zero clusters.  Entries that lead nowhere
    stay as they are, and are found again by the check `after`.

    With `dry_run` nothing is written, and `after` is None.  With `expect`, the report of a dry run, the repair is made only
    if it would do exactly that.  The caller makes sure that nobody else writes, and loads the image anew afterwards: `header`
    is what the file has then, and tables have changed.

    Raises:
        StalePlanError: the image needs other steps than `expect` has; nothing was written.
        ImageLimitError, StorageError: as `check_image`.
    """
    plan = _Plan(file, header, geometry, what, max_findings, progress)
    before = report_of(plan.before, filename)
    if expect is not None and (plan.steps != expect.steps or before != expect.before):
        raise StalePlanError(f"{filename}: the image has changed since the repair was planned", node=filename)
    if dry_run:
        return RepairReport(plan.steps, before)
    _write(file, header, plan)
    after = replace(report_of(plan.after, filename), corruptions_fixed=plan.corruptions_fixed, leaks_fixed=plan.leaks_fixed)
    return RepairReport(plan.steps, before, after)


def repair_after_crash(node: Qcow2Node) -> None:
    """Repair an image that was not closed properly, and load it anew.  Raises ImageCorruptError where that does not do."""
    repair_image(node.file, node.header, node.geometry, "all", filename=node.filename or node.name)
    header_change.reload(node)
    if node.header.incompatible_features & layout.INCOMPATIBLE_DIRTY:
        raise ImageCorruptError(
            f"{node.filename}: the image was not closed properly and could not be repaired",
            structure="header field incompatible_features",
            host_offset=layout.FIELD_OFFSETS["incompatible_features"],
            expected="no dirty bit",
            found="the dirty bit after a repair",
            node=node.filename,
        )


class _Plan:
    """A repair on a draft: its steps, the checks before and after it, and what has to be written."""

    def __init__(
        self,
        file: WritableImageFile,
        header: Header,
        geometry: Geometry,
        what: What,
        max_findings: int,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._max_findings = max_findings
        self._geometry = geometry
        self._header = header
        self.before = scan_image(file, header, geometry, max_findings=max_findings, progress=progress)
        from blocklib.formats.qcow2.repair.draft import Draft

        self.draft = Draft(file, header, geometry)
        self.corruptions_fixed = self.leaks_fixed = 0
        steps = self._mend_references(what == "all")
        scan = self.before if self.draft.is_unchanged else self._scan()
        steps += self._mend_counts(scan, what)
        if self.draft.changes_header:
            self.draft.header_change()  # a damaged L1 entry may take the header for an L2 table
        self.after = self.before if self.draft.is_unchanged else self._scan()
        self.cleared = self._bits_to_clear(what)
        place = layout.FIELD_OFFSETS["incompatible_features"]
        names = {layout.INCOMPATIBLE_DIRTY: "dirty bit", layout.INCOMPATIBLE_CORRUPT: "corrupt bit"}
        steps += [
            RepairStep(f"clear {name}", "header", place, "set", "clear") for bit, name in names.items() if self.cleared & bit
        ]
        self.steps = tuple(steps)

    def _scan(self) -> Scan:
        # Without progress: it has told of a whole check already.
        return scan_image(self.draft, self.draft.header, self._geometry, max_findings=self._max_findings, progress=None)

    def _mend_references(self, everything: bool) -> list[RepairStep]:
        """What changes which clusters are referred to; the counts follow."""
        from blocklib.formats.qcow2.repair.bitmaps import clear_autoclear, remove_broken_bitmaps
        from blocklib.formats.qcow2.repair.entries import TableFixer
        from blocklib.formats.qcow2.repair.snapshots import SnapshotRepair

        draft, scan = self.draft, self.before
        steps: list[RepairStep] = []
        if everything:
            snapshots = SnapshotRepair(draft, scan)
            steps += snapshots.apply()
            removed = list(remove_broken_bitmaps(draft, scan))
            if removed and scan.bitmaps.sound:  # whose tables nobody has looked at yet
                removed += remove_broken_bitmaps(draft, self._scan())
            fixer = TableFixer(draft, scan)
            steps += removed
            if scan.walk.zeroes_unaligned:
                steps += fixer.forget_zeroes()
            if scan.shared.size and not scan.has_data_file:
                steps += fixer.move_data_off_metadata()
            self.corruptions_fixed += snapshots.n_fixed + fixer.n_fixed
            if removed:
                self.corruptions_fixed += scan.bitmaps.n_findings
        steps += clear_autoclear(draft)
        return steps

    def _mend_counts(self, scan: Scan, what: What) -> list[RepairStep]:
        import numpy as np

        from blocklib.formats.qcow2.repair.counts import CountRepair
        from blocklib.formats.qcow2.repair.entries import TableFixer

        moved = np.array(self.draft.moved, dtype=np.intp)
        counts = CountRepair(self.draft, scan, self._scan, raises=what == "all", moved=moved)
        steps = list(counts.apply())
        self.corruptions_fixed += counts.n_raised + counts.n_table_fixes
        self.leaks_fixed = counts.n_lowered
        totals = scan.findings.totals
        only_flags = totals["corruption"] == scan.n_wrong_flags and not totals["check-error"]
        if what == "all" or (only_flags and counts.n_lowered == totals["leak"]):
            fixer = TableFixer(self.draft, scan)
            if steps or scan.n_wrong_flags:
                steps += fixer.correct_flags()
            self.corruptions_fixed += fixer.n_fixed
        return steps

    def _bits_to_clear(self, what: What) -> int:
        """The incompatible feature bits that no longer say the truth."""
        bits = 0
        totals = self.after.findings.totals
        sound = not (totals["corruption"] or totals["check-error"])
        if sound or (what == "all" and self.after.counts_suffice):
            bits |= layout.INCOMPATIBLE_DIRTY
        if sound:
            bits |= layout.INCOMPATIBLE_CORRUPT
        return bits & self._header.incompatible_features


def _write(file: WritableImageFile, header: Header, plan: _Plan) -> None:
    """Bring a plan to the disk, and what it makes of the header into `header`."""
    from blocklib.formats.qcow2.repair.draft import COUNTS_DOWN, COUNTS_UP, ENTRIES, NEW

    draft = plan.draft
    features = header.incompatible_features & ~plan.cleared
    in_parts = draft.writes[COUNTS_UP] or draft.writes[ENTRIES] or draft.changes_header
    if in_parts and header.version >= layout.VERSION_3:
        _set_features(file, header, header.incompatible_features | layout.INCOMPATIBLE_DIRTY)
    _write_all(file, draft.writes[NEW])
    _write_all(file, draft.writes[COUNTS_UP])
    if draft.changes_header:
        _rewrite_header(file, header, draft)
    _write_all(file, draft.writes[ENTRIES])
    _write_all(file, draft.writes[COUNTS_DOWN])
    _set_features(file, header, features)


def _write_all(file: WritableImageFile, writes: Sequence[tuple[int, bytes]]) -> None:
    """Write each (host offset, bytes); durable when this returns."""
    for offset, data in writes:
        file.write(offset, (data,))
    if writes:
        file.flush()


def _rewrite_header(file: WritableImageFile, header: Header, draft: Draft) -> None:
    """Switch to the draft's header: one sector, so that all its tables change at once."""
    draft.header.incompatible_features = header.incompatible_features
    change = draft.header_change()
    _write_all(file, change.rest)
    _write_all(file, ((0, change.first),))
    for name in header.record_fields:
        setattr(header, name, getattr(change.header, name))


def _set_features(file: WritableImageFile, header: Header, features: int) -> None:
    """Replace the incompatible feature bits on disk and in `header`; eight bytes of the first sector, so atomic."""
    if features != header.incompatible_features:
        data = features.to_bytes(8, "big")
        _write_all(file, ((layout.FIELD_OFFSETS["incompatible_features"], data),))
        header.incompatible_features = features
