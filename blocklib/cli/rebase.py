"""``rebase``: give an image another backing file, or none."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from blocklib.cli import progress
from blocklib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    SOURCE_CACHE,
    TARGET_CACHE,
    cache_mode,
    check_objects,
    name_of,
    one_operand,
    open_image,
    run_job,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.session import Failure, Session
from blocklib.drivers import check_name

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.jobs import Job
    from blocklib.reports import RebaseResult

SYNTAX = Syntax(
    "FILE",
    "Make another image the backing file of FILE, which keeps reading the same: what differs is copied into it.",
    (
        Option(("-b",), "BACKING", "the new backing file, relative to FILE's folder; '' for none"),
        Option(("-F",), "FMT", "format of BACKING"),
        Option(("-u",), None, "only change the name: right where the same image was moved, wrong anywhere else"),
        Option(("-f",), "FMT", "format of FILE; without it, guessed from the first bytes"),
        *progress.OPTIONS,
        QUIET,
        TARGET_CACHE,
        SOURCE_CACHE,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)


def run(session: Session, given: Given) -> int:
    check_objects(given)
    name = name_of(given, one_operand(given))
    unsafe = given.has("-u")
    if not unsafe and not given.has("-b"):
        raise UsageFailure("expects the new backing file (-b), or -u to leave none")
    backing = given.last("-b") or None
    backing_format = given.last("-F")
    if backing_format is not None:
        check_name(backing_format)
    elif backing is not None:
        raise Failure(f"{backing}: a backing file needs its format (-F): guessed, it could be a guest's choice")
    cache_mode(given, "-T", "writeback")
    cache = cache_mode(given, "-t", "writeback")
    report = progress.reporter(session, given, "rebase")
    # The old chain may be gone; that is what -u is for.
    with open_image(session, given, name, write=True, cache=cache, share=False, alone=unsafe) as disk, report:
        run_job(session, partial(_start, given, disk, backing), report)
        report.finish()
    return 0


def _start(given: Given, disk: Disk, backing: str | None) -> Job[RebaseResult]:
    from blocklib import jobs

    return jobs.rebase(
        disk,
        backing,
        backing_format=None if backing is None else given.last("-F"),
        unsafe=given.has("-u"),
        references="deny" if given.has("--untrusted") else "allow",
        secrets=given.secrets,
    )
