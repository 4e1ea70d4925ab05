"""``commit``: write what an image holds into one below it."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

from blocklib.cli import progress
from blocklib.cli.common import (
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    TARGET_CACHE,
    cache_mode,
    check_objects,
    name_of,
    one_operand,
    open_image,
    run_job,
    size_value,
)
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.reports import NodeInfo

SYNTAX = Syntax(
    "FILE",
    "Write what FILE holds into its backing file, and empty FILE.",
    (
        Option(("-b",), "BASE", "write into this image of the chain instead, and leave FILE as it is"),
        Option(("-d",), None, "leave FILE as it is"),
        Option(("-f",), "FMT", "format of FILE; without it, guessed from the first bytes"),
        Option(("-r",), "RATE", "write no more bytes a second"),
        *progress.OPTIONS,
        QUIET,
        TARGET_CACHE,
        IMAGE_OPTS,
        OBJECT,
    ),
)


def run(session: Session, given: Given) -> int:
    from blocklib import jobs

    check_objects(given)
    name = name_of(given, one_operand(given))
    cache = cache_mode(given, "-t", "writeback")
    speed = size_value(given.last("-r") or "0", "rate")
    wanted = given.last("-b")
    empty = wanted is None and not given.has("-d")
    report = progress.reporter(session, given, "commit")
    with open_image(session, given, name, write=empty, cache=cache) as disk:
        base = None if wanted is None else _base(disk, wanted)
        with report:
            run_job(session, lambda: jobs.commit(disk, base=base, empty=empty, speed=speed), report)
            report.finish()
    if not given.has("-q"):
        print("Image committed.")
    return 0


def _base(disk: Disk, wanted: str) -> NodeInfo:
    """The image of the chain that `wanted` means: its file name, or that name as the image above it spells it."""
    from blocklib.policy import resolve_backing_name

    chain = disk.chain()
    for above, image in pairwise(chain):
        if image.filename is None:
            continue
        if image.filename in (wanted, resolve_backing_name(above.filename or "", wanted)):
            return image
        if os.path.exists(wanted) and os.path.samefile(wanted, image.filename):
            return image
    raise Failure(f"{wanted!r} is not in the backing chain of {chain[0].filename}")
