"""``convert``: copy one image, or several one after the other, into a new one."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Literal

from blocklib.cli import progress
from blocklib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    SOURCE_CACHE,
    TARGET_CACHE,
    Name,
    cache_mode,
    check_objects,
    name_of,
    open_image,
    open_snapshot,
    run_job,
    size_value,
    target_of,
    with_secrets,
)
from blocklib.cli.create import CREATION_OPTIONS, check_backing, check_distinct, parse_option_lists, print_option_help
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.output import print_error
from blocklib.cli.session import Failure, Session
from blocklib.sizes import MiB

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.jobs import Job
    from blocklib.options import CacheMode
    from blocklib.reports import ConvertResult

SYNTAX = Syntax(
    "FILE [FILE...] TARGET",
    "Copy an image into a new one; several images become one disk, one after the other.",
    (
        Option(("-f",), "FMT", "format of the images that are read; without it, guessed from their first bytes"),
        Option(("-O",), "FMT", "format of TARGET (default: raw)"),
        CREATION_OPTIONS,
        Option(("-B",), "BACKING", "keep in TARGET only what differs from this image, its backing file"),
        Option(("-F",), "FMT", "format of BACKING"),
        Option(("-n",), None, "write into TARGET, which is there, instead of creating it"),
        Option(("--target-is-zero",), None, "with -n: TARGET reads as zero already"),
        Option(("-c",), None, "write compressed clusters"),
        Option(("-S",), "SIZE", "zeroes of so many bytes become holes (default: 4k; 0: none, all is allocated)"),
        Option(("-m",), "NUMBER", "how many threads work, 1 to 16"),
        Option(("-W",), None, "write in any order"),
        Option(("-C",), None, "let the host copy where it can"),
        Option(("-r",), "RATE", "copy no more bytes a second"),
        Option(("--salvage",), None, "go on where an image cannot be read, with zeroes"),
        Option(("-l",), "SNAPSHOT", "copy this snapshot instead of the image's present state"),
        Option(("--bitmaps",), None, "copy persistent bitmaps as well"),
        Option(("--skip-broken-bitmaps",), None, "with --bitmaps: leave out the inconsistent ones"),
        *progress.OPTIONS,
        QUIET,
        TARGET_CACHE,
        SOURCE_CACHE,
        IMAGE_OPTS,
        Option(("--target-image-opts",), None, "with -n: TARGET is options (driver=...,file.filename=...), not a name"),
        OBJECT,
        FORCE_SHARE,
    ),
)

_MAX_THREADS = 16
_MAX_SPARSE_SIZE = 16 * MiB
_SPARSE_UNIT = 512


def run(session: Session, given: Given) -> int:
    check_objects(given)
    driver = given.last("-O") or "raw"
    if print_option_help(given.all("-o"), driver, for_file=len(given.operands) > 1):
        return 0
    if len(given.operands) < 2:
        raise UsageFailure("expects one file name or more, and that of the target")
    _check_combination(given)
    *names, target_name = given.operands
    source_cache = cache_mode(given, "-T", "writeback")
    target_cache = cache_mode(given, "-t", "unsafe")
    report = progress.reporter(session, given, "convert")
    with ExitStack() as stack:
        sources = [
            stack.enter_context(open_snapshot(session, given, name_of(given, name), cache=source_cache)) for name in names
        ]
        if given.has("-n"):
            target = stack.enter_context(_open_target(session, given, target_name, target_cache))
            target_name = target.chain()[0].filename or target_name
            start = partial(_into_target, given, sources, target)
        else:
            start = partial(_into_new, given, sources, target_name, driver, target_cache)
        for source in sources:
            check_distinct(target_name, source)
        with report:
            result = run_job(session, start, report)
            report.finish()
    for name in result.skipped_bitmaps:
        print_error(session.program, f"warning: the bitmap '{name}' is inconsistent; it was not copied")
    for offset, length in result.unreadable:
        print_error(session.program, f"warning: {length} bytes at {offset} could not be read; they are zeroes in the copy")
    return 0


def _check_combination(given: Given) -> None:
    """Raises Failure for options that exclude each other, or that need one that is missing."""
    if given.has("-l") and len(given.operands) > 2:
        raise Failure("-l is for one image: snapshots are not joined to one disk")
    if given.has("--skip-broken-bitmaps") and not given.has("--bitmaps"):
        raise Failure("--skip-broken-bitmaps needs --bitmaps")
    if given.has("--bitmaps") and len(given.operands) > 2:
        raise Failure("--bitmaps is for one image: those of several do not make one")
    if given.has("-n"):
        if given.has("-o"):
            raise Failure("-o says how a target is created, and with -n none is")
        if given.has("--target-image-opts") and given.has("-O"):
            raise Failure("--target-image-opts and -O exclude each other: the options say the driver")
    else:
        for option in ("--target-is-zero", "--target-image-opts"):
            if given.has(option):
                raise Failure(f"{option} needs -n: it is about a target that is there")
    if given.has("-C"):
        for option in ("-S", "-c", "--salvage"):
            if given.has(option):
                raise Failure(f"-C and {option} exclude each other: what the host copies is not looked at")


# -- values -----------------------------------------------------------------------------------------------------------


def _sparse_size(given: Given) -> int:
    text = given.last("-S")
    size = 4096 if text is None else size_value(text, "-S")
    if size % _SPARSE_UNIT or size > _MAX_SPARSE_SIZE:
        raise Failure(f"-S {text}: a multiple of {_SPARSE_UNIT} up to {_MAX_SPARSE_SIZE}, or 0 to write zeroes out")
    return size


def _threads(given: Given) -> int | None:
    text = given.last("-m")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 2 or not 1 <= int(text) <= _MAX_THREADS:
        raise Failure(f"-m {text}: from 1 to {_MAX_THREADS}")
    return int(text)


def _speed(given: Given) -> int:
    return size_value(given.last("-r") or "0", "rate")


def _compression(given: Given, kind: str | None) -> Literal["zlib", "zstd"] | None:
    """What ``-c`` asks for, where images of this kind are compressed."""
    if not given.has("-c"):
        return None
    return "zstd" if kind == "zstd" else "zlib"


# -- targets ----------------------------------------------------------------------------------------------------------


def _open_target(session: Session, given: Given, text: str, cache: CacheMode) -> Disk:
    """The target of ``-n``; like an image of our own, never shared with another writer."""
    is_options = given.has("--target-image-opts")
    name = Name(text, None if is_options else given.last("-O") or "raw", is_options)
    return open_image(session, given, name, write=True, cache=cache, discard="unmap", share=False)


def _into_target(given: Given, sources: list[Disk], target: Disk) -> Job[ConvertResult]:
    from blocklib import jobs

    return jobs.convert(
        sources,
        target,
        compress=_compression(given, target.node.compressor().kind) if given.has("-c") else None,
        target_is_zero=given.has("--target-is-zero"),
        threads=_threads(given),
        unordered=given.has("-W"),
        sparse_size=_sparse_size(given),
        salvage=given.has("--salvage"),
        bitmaps=given.has("--bitmaps"),
        skip_broken_bitmaps=given.has("--skip-broken-bitmaps"),
        speed=_speed(given),
    )


def _into_new(given: Given, sources: list[Disk], text: str, driver: str, cache: CacheMode) -> Job[ConvertResult]:
    from blocklib import jobs

    options = parse_option_lists(given.all("-o"))
    for option, name in (("-B", "backing_file"), ("-F", "backing_fmt")):
        value = given.last(option)
        if value is not None:
            options[name] = value
    check_backing(text, driver, options)
    untrusted = given.has("--untrusted")
    return jobs.convert(
        sources,
        target_of(Name(text, driver, is_options=False), untrusted=untrusted),
        format=driver,
        overwrite=True,
        compress=_compression(given, options.get("compression_type")),
        threads=_threads(given),
        unordered=given.has("-W"),
        options=with_secrets(given, options),
        references="deny" if untrusted else "allow",
        cache=cache,
        sparse_size=_sparse_size(given),
        salvage=given.has("--salvage"),
        bitmaps=given.has("--bitmaps"),
        skip_broken_bitmaps=given.has("--skip-broken-bitmaps"),
        speed=_speed(given),
    )
