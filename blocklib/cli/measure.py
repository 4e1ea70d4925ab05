"""``measure``: tell how many bytes a new image needs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from blocklib.cli import progress
from blocklib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    check_objects,
    name_of,
    open_snapshot,
    run_job,
    size_value,
    wants_json,
)
from blocklib.cli.create import CREATION_OPTIONS, parse_option_lists, print_option_help
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.output import json_text
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from blocklib.reports import MeasureResult

SYNTAX = Syntax(
    "(--size SIZE | FILE)",
    "Tell how large an image becomes that is new with SIZE bytes, or converted from FILE.",
    (
        Option(("--size",), "SIZE", "measure an empty image of this size"),
        Option(("-O",), "FMT", "format of the new image (default: raw)"),
        CREATION_OPTIONS,
        Option(FORMAT.names[:1], FORMAT.metavar, FORMAT.help),
        Option(("-l",), "SNAPSHOT", "measure this snapshot instead of the image's present state"),
        progress.AS_JSON,
        OUTPUT,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)


def run(session: Session, given: Given) -> int:
    check_objects(given)
    as_json = wants_json(given)
    driver = given.last("-O") or "raw"
    if print_option_help(given.all("-o"), driver, for_file=False):
        return 0
    _check_combination(given)
    result = _measured(session, given, driver)
    if as_json:
        print(json_text(json_of(result)))
    else:
        print("\n".join(human_lines(result)))
    return 0


def _check_combination(given: Given) -> None:
    """Raises Failure unless there is either a size or one file."""
    if len(given.operands) > 1:
        raise Failure("at most one file can be measured")
    if not given.operands:
        for option in ("--image-opts", "-f", "-l"):
            if given.has(option):
                raise Failure(f"{option} says something of a file, and none is named")
    if given.has("--size") == bool(given.operands):
        raise Failure("either --size or a file says what is measured")


def _measured(session: Session, given: Given, driver: str) -> MeasureResult:
    from blocklib import jobs

    options = parse_option_lists(given.all("-o"))
    size = given.last("--size")
    with ExitStack() as stack, progress.reporter(session, given, "measure") as report:
        if size is not None:
            length = size_value(size, "size")
            return run_job(session, lambda: jobs.measure(size=length, format=driver, options=options), report)
        source = stack.enter_context(open_snapshot(session, given, name_of(given, given.operands[0])))
        return run_job(session, lambda: jobs.measure(source, format=driver, options=options), report)


def json_of(result: MeasureResult) -> dict[str, Any]:
    """`result` in the names of QEMU's BlockMeasureInfo, in qemu-img's order."""
    found: dict[str, Any] = {} if result.bitmaps is None else {"bitmaps": result.bitmaps}
    return found | {"required": result.required, "fully-allocated": result.fully_allocated}


def human_lines(result: MeasureResult) -> list[str]:
    """`result` as qemu-img prints it."""
    lines = [f"required size: {result.required}", f"fully allocated size: {result.fully_allocated}"]
    return lines if result.bitmaps is None else [*lines, f"bitmaps size: {result.bitmaps}"]
