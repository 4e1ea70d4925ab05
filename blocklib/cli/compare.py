"""``compare``: tell whether two images read the same.  The exit code is the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.cli import progress
from blocklib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    SOURCE_CACHE,
    cache_mode,
    check_objects,
    explain,
    name_of,
    open_image,
    run_job,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.session import Failure, Session
from blocklib.errors import BlocklibError, ImageError, JobCancelled, StorageError

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.options import CacheMode
    from blocklib.reports import CompareResult

SYNTAX = Syntax(
    "FILE FILE",
    "Compare what two images read as.  Exit codes: 0 the same, 1 different, 2 not opened, 3 no block status, 4 not read.",
    (
        Option(("-f",), "FMT", "format of the first image; without it, guessed from the first bytes"),
        Option(("-F",), "FMT", "format of the second image"),
        Option(("-s",), None, "they must also have one size, and store the same ranges"),
        *progress.OPTIONS,
        QUIET,
        SOURCE_CACHE,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

_SECTOR = 512
"""qemu-img names the sector of the first difference, not its byte."""
_EXIT_DIFFERENT = 1
_EXIT_NOT_OPENED = 2
_EXIT_NO_STATUS = 3
_EXIT_NOT_READ = 4


def run(session: Session, given: Given) -> int:
    check_objects(given)
    if len(given.operands) != 2:
        raise UsageFailure("expects two file names")
    cache = cache_mode(given, "-T", "writeback", code=_EXIT_NOT_OPENED)
    first, second = given.operands
    report = progress.reporter(session, given, "compare")
    with _open(session, given, first, "-f", cache) as one, _open(session, given, second, "-F", cache) as other:
        try:
            result = _compare(session, given, one, other, report)
        except JobCancelled:
            raise
        except (StorageError, ImageError) as exc:
            # What a damaged table leaves unknown is where data is; everything else is data that cannot be had.
            code = _EXIT_NOT_READ if isinstance(exc, StorageError) else _EXIT_NO_STATUS
            raise Failure(explain(exc), code=code) from exc
    return 0 if result.identical else _EXIT_DIFFERENT


def _open(session: Session, given: Given, text: str, format_option: str, cache: CacheMode) -> Disk:
    name = name_of(given, text, format_option, code=_EXIT_NOT_OPENED)
    try:
        return open_image(session, given, name, cache=cache)
    except (BlocklibError, Failure) as exc:
        text = explain(exc) if isinstance(exc, BlocklibError) else str(exc)
        raise Failure(text, code=_EXIT_NOT_OPENED) from exc


def _compare(session: Session, given: Given, one: Disk, other: Disk, report: progress.Reporter) -> CompareResult:
    from blocklib import jobs

    with report:
        result = run_job(session, lambda: jobs.compare(one, other, strict=given.has("-s")), report)
        if result.identical:
            report.finish()
        if not given.has("-q"):
            print("\n".join(verdict(result)))
    return result


def verdict(result: CompareResult) -> list[str]:
    """What qemu-img says of the images."""
    if result.reason == "size":
        return ["Strict mode: Image size mismatch!"]
    if result.reason == "status":
        return [f"Strict mode: Offset {result.offset} block status mismatch!"]
    lines = ["Warning: Image size mismatch!"] if result.size_mismatch and (result.identical or result.beyond_end) else []
    if result.identical:
        return [*lines, "Images are identical."]
    sector = (result.offset or 0) // _SECTOR * _SECTOR
    return [*lines, f"Content mismatch at offset {sector}!"]
