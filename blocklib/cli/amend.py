"""``amend``: change the options that an image was made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.cli import progress
from blocklib.cli.common import (
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    TARGET_CACHE,
    Name,
    cache_mode,
    check_objects,
    name_of,
    one_operand,
    open_image,
    run_job,
    target_of,
    with_secrets,
)
from blocklib.cli.create import parse_option_lists
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.session import Session

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.options import CacheMode

SYNTAX = Syntax(
    "FILE",
    "Change options that an image was made with: its version, refcount width, size, and others.",
    (
        Option(("-o",), "OPTIONS", "what is to change, NAME=VALUE,...; '-o help' lists it"),
        Option(("-f",), "FMT", "format of FILE; without it, guessed from the first bytes"),
        *progress.OPTIONS,
        QUIET,
        TARGET_CACHE,
        Option(("--force",), None, "also do what would lock everybody out, such as erasing the last key slot"),
        IMAGE_OPTS,
        OBJECT,
    ),
)


def run(session: Session, given: Given) -> int:
    from blocklib.options import asks_for_help

    check_objects(given)
    if not given.has("-o"):
        raise UsageFailure("expects what is to change (-o)")
    if asks_for_help(given.all("-o")):
        _print_help(given)
        return 0
    options = parse_option_lists(given.all("-o"))
    name = name_of(given, one_operand(given))
    cache = cache_mode(given, "-t", "writeback")
    report = progress.reporter(session, given, "amend")
    with _opened(session, given, name, cache, with_data_file="size" in options) as disk, report:
        from blocklib import jobs

        run_job(session, lambda: jobs.amend(disk, with_secrets(given, options), force=given.has("--force")), report)
        report.finish()
    return 0


def _opened(session: Session, given: Given, name: Name, cache: CacheMode, *, with_data_file: bool) -> Disk:
    return open_image(session, given, name, write=True, cache=cache, share=False, alone=True, with_data_file=with_data_file)


def _print_help(given: Given) -> None:
    """The options that can be changed, of the format that is said or of the image's."""
    from blocklib.opening import open_metadata
    from blocklib.options import describe_options

    driver = given.last("-f")
    if driver is None:
        name = name_of(given, one_operand(given))
        untrusted = given.has("--untrusted")
        with open_metadata(target_of(name, untrusted=untrusted), force_share=True, guess_raw=not untrusted) as disk:
            driver = disk.node.driver
    print(describe_options(driver, "amend"))
