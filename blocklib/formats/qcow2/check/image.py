"""Checking a qcow2 image: every reference is counted and compared with the refcounts and flags that the image stores.

`check_image` reads the metadata itself through the edge to the image file, so it needs no running node; the caller makes sure
that nothing writes meanwhile (caches flushed, node drained).  Nothing is written and nothing is marked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklib.reports import CheckReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklib.formats.qcow2.check.scan import Scan
    from blocklib.formats.qcow2.check.stored import ImageFile
    from blocklib.formats.qcow2.geometry import Geometry
    from blocklib.formats.qcow2.header import Header

MAX_FINDINGS: Final = 1000


def check_image(
    file: ImageFile,
    header: Header,
    geometry: Geometry,
    *,
    filename: str,
    max_findings: int = MAX_FINDINGS,
    progress: Callable[[int, int], object] | None = None,
) -> CheckReport:
    """Check all metadata of the image in `file`.

    The numbers are those of ``qemu-img check``; `findings` holds the first `max_findings` in words.  Damage ends in findings,
    never in an error; memory is a few bytes for each cluster of the file.  `progress` is called with bytes of L2 tables
    done and in total.

    Raises:
        ImageLimitError: the file is too large to count its clusters.
        StorageError: the host failed to read.
    """
    return report_of(scan_image(file, header, geometry, max_findings=max_findings, progress=progress), filename)


def scan_image(
    file: ImageFile,
    header: Header,
    geometry: Geometry,
    *,
    max_findings: int,
    progress: Callable[[int, int], object] | None,
) -> Scan:
    """What `check_image` reports, with the counts behind it."""
    from blocklib.formats.qcow2.check.findings import Findings
    from blocklib.formats.qcow2.check.scan import Scan

    return Scan(file, header, geometry, Findings(max_findings), progress)


def report_of(scan: Scan, filename: str) -> CheckReport:
    totals = scan.findings.totals
    return CheckReport(
        filename=filename,
        format="qcow2",
        findings=tuple(scan.findings.kept),
        corruptions=totals["corruption"],
        leaks=totals["leak"],
        check_errors=totals["check-error"],
        image_end_offset=(scan.highest_cluster + 1) << scan.geometry.cluster_bits,
        total_clusters=scan.geometry.clusters_for(scan.header.size),
        allocated_clusters=scan.walk.allocated,
        fragmented_clusters=scan.walk.fragmented,
        compressed_clusters=scan.walk.compressed,
    )
