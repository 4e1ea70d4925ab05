"""``check``: look for damage and leaks, and repair them.  The exit code says what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from blocklib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    SOURCE_CACHE,
    cache_mode,
    check_objects,
    name_of,
    one_operand,
    open_image,
    wants_json,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.output import json_text, print_error
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from blocklib.reports import CheckReport

SYNTAX = Syntax(
    "FILE",
    "Check an image.  Exit codes: 0 clean, 1 not checked, 2 corrupt, 3 only leaks, 63 a format without checks.",
    (
        FORMAT,
        Option(("-r", "--repair"), "leaks|all", "repair what is found: leaks only, or everything"),
        QUIET,
        OUTPUT,
        SOURCE_CACHE,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_NO_CHECKS = 63


def exit_code(report: CheckReport) -> int:
    """The exit code for the state that `report` describes."""
    if report.corruptions:
        return EXIT_CORRUPT
    if report.check_errors:
        return 1
    return EXIT_LEAKS if report.leaks else 0


def json_of(report: CheckReport) -> dict[str, Any]:
    """`report` in the names of QEMU's ImageCheck, in qemu-img's order; most counts of zero are left out."""
    counts = {
        "image-end-offset": report.image_end_offset,
        "compressed-clusters": report.compressed_clusters,
        "total-clusters": report.total_clusters,
        "corruptions": report.corruptions,
        "corruptions-fixed": report.corruptions_fixed,
    }
    found: dict[str, Any] = {name: count for name, count in counts.items() if count}
    found["check-errors"] = report.check_errors
    counts = {
        "leaks": report.leaks,
        "leaks-fixed": report.leaks_fixed,
        "allocated-clusters": report.allocated_clusters,
    }
    found.update({name: count for name, count in counts.items() if count})
    found["filename"] = report.filename
    found["format"] = report.format
    if report.fragmented_clusters:
        found["fragmented-clusters"] = report.fragmented_clusters
    return found


def human_lines(report: CheckReport) -> list[str]:
    """What qemu-img tells people of an image's state."""
    lines: list[str] = []
    if report.clean:
        lines.append("No errors were found on the image.")
    if report.corruptions:
        lines += [
            "",
            f"{report.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if report.leaks:
        lines += [
            "",
            f"{report.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if report.check_errors:
        lines += ["", f"{report.check_errors} internal errors have occurred during the check."]
    total, allocated = report.total_clusters, report.allocated_clusters
    if total and allocated:
        fragmented = 100 * (report.fragmented_clusters or 0) / allocated
        compressed = 100 * (report.compressed_clusters or 0) / allocated
        lines.append(
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, {fragmented:.2f}% fragmented,"
            f" {compressed:.2f}% compressed clusters"
        )
    if report.image_end_offset:
        lines.append(f"Image end offset: {report.image_end_offset}")
    return lines
