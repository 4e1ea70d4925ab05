"""``check``: look for damage and leaks, and repair them.  The exit code says what was found."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from blocklib.cli import progress
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
    run_job,
    target_of,
    wants_json,
)
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.output import json_text, printable
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blocklib.disk import Disk
    from blocklib.reports import CheckReport, RepairStep

SYNTAX = Syntax(
    "FILE",
    "Check an image.  Exit codes: 0 clean, 1 not checked, 2 corrupt, 3 only leaks, 63 a format without checks.",
    (
        FORMAT,
        Option(("-r", "--repair"), "leaks|all", "repair what is found: leaks only, or everything"),
        Option(("--plan",), None, "with -r: print what the repair would do, and change nothing"),
        progress.AS_JSON,
        QUIET,
        OUTPUT,
        SOURCE_CACHE,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

_EXIT_NOT_CHECKED = 1
_EXIT_CORRUPT = 2
_EXIT_LEAKS = 3
_EXIT_NO_CHECKS = 63
_CHECKED_FORMATS = ("qcow2",)


def run(session: Session, given: Given) -> int:
    check_objects(given)
    as_json = wants_json(given)
    if given.last("-r") not in (None, "leaks", "all"):
        raise Failure(f"-r {given.last('-r')}: repairs 'leaks' or 'all'")
    if given.has("--plan") and not given.has("-r"):
        raise Failure("--plan shows what a repair would do: say which with -r leaks or -r all")
    with _open(given) as disk, progress.reporter(session, given, "check") as reporter:
        if disk.chain()[0].driver not in _CHECKED_FORMATS:
            raise Failure("images of this format have nothing that could be checked", code=_EXIT_NO_CHECKS)
        report, plan = _checked(session, given, disk, reporter)
    if given.has("-q"):
        return exit_code(report)
    if as_json:
        found = json_of(report) if plan is None else {**json_of(report), "plan": [step_of(step) for step in plan]}
        print(json_text(found))
    else:
        print("\n".join([*planned_lines(plan), *repaired_lines(report), *human_lines(report)]))
    return exit_code(report)


def _open(given: Given) -> Disk:
    """The image alone: what is checked is its own metadata, and that may keep its chain from opening."""
    from blocklib.opening import open_metadata
    from blocklib.options import cache_flags

    untrusted = given.has("--untrusted")
    name = name_of(given, one_operand(given))
    direct, no_flush, _writethrough = cache_flags(cache_mode(given, "-T", "writeback"))
    return open_metadata(
        target_of(name, untrusted=untrusted),
        "r+" if given.has("-r") and not given.has("--plan") else "r",
        format=name.format,
        force_share=given.has("-U"),
        guess_raw=not untrusted,
        options={name: True for name, value in (("cache.direct", direct), ("cache.no-flush", no_flush)) if value},
    )


def _checked(
    session: Session, given: Given, disk: Disk, reporter: progress.Reporter
) -> tuple[CheckReport, tuple[RepairStep, ...] | None]:
    """The state of the image in the end, and the steps of a plan; what was found on the way goes to standard error."""
    from blocklib import jobs

    what = given.last("-r")
    if what is None:
        report = run_job(session, lambda: jobs.check(disk), reporter)
        _print_findings(report)
        return report, None
    dry_run = given.has("--plan")
    repair = run_job(session, lambda: jobs.repair(disk, "all" if what == "all" else "leaks", dry_run=dry_run), reporter)
    _print_findings(repair.before)
    if dry_run:
        return repair.before, repair.steps
    for step in repair.steps:
        print(printable(str(step)), file=sys.stderr)
    return repair.after or repair.before, None


def _print_findings(report: CheckReport) -> None:
    for finding in report.findings:
        print(printable(str(finding)), file=sys.stderr)
    more = report.corruptions + report.leaks + report.check_errors - len(report.findings)
    if more > 0:
        print(f"and {more} more", file=sys.stderr)


def exit_code(report: CheckReport) -> int:
    """The exit code for the state that `report` describes."""
    if report.corruptions:
        return _EXIT_CORRUPT
    if report.check_errors:
        return _EXIT_NOT_CHECKED
    return _EXIT_LEAKS if report.leaks else 0


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


def step_of(step: RepairStep) -> dict[str, Any]:
    """One step of a plan as JSON; there is no host offset where a step is about no one place."""
    place = {} if step.host_offset is None else {"host-offset": step.host_offset}
    return {"action": step.action, "structure": step.structure, **place, "before": step.before, "after": step.after}


def planned_lines(plan: Sequence[RepairStep] | None) -> list[str]:
    """What a repair would do, before the lines that tell the state of the image."""
    if plan is None:
        return []
    if not plan:
        return ["There is nothing to repair.", ""]
    steps = [f"    {printable(str(step))}" for step in plan]
    return ["The repair would take these steps:", "", *steps, "", "Nothing was changed.", ""]


def repaired_lines(report: CheckReport) -> list[str]:
    """What a repair has done, before the lines that tell the state after it."""
    if not report.corruptions_fixed and not report.leaks_fixed:
        return []
    return [
        "The following inconsistencies were found and repaired:",
        "",
        f"    {report.leaks_fixed} leaked clusters",
        f"    {report.corruptions_fixed} corruptions",
        "",
        "Double checking the fixed image now...",
    ]


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
