"""``dd``: copy a range of blocks from one image to a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    Name,
    check_objects,
    name_of,
    open_image,
    size_value,
)
from blocklib.cli.create import check_distinct, make_image
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.output import print_error
from blocklib.cli.session import Failure, Session
from blocklib.sizes import MiB

if TYPE_CHECKING:
    from blocklib.disk import Disk

SYNTAX = Syntax(
    "[bs=BYTES] [count=BLOCKS] [skip=BLOCKS] if=FILE of=FILE",
    "Copy BLOCKS blocks of BYTES bytes (default: 512), or all there are, after the skipped ones, into a new image.",
    (
        Option(FORMAT.names[:1], FORMAT.metavar, "format of the input; without it, guessed from the first bytes"),
        Option(("-O",), "FMT", "format of the output (default: raw)"),
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

_BLOCK_SIZE = 512
_MAX_BLOCK_SIZE = (1 << 31) - 1
_BUFFER = 1 * MiB


def run(session: Session, given: Given) -> int:
    check_objects(given)
    words = _words(given.operands)
    if "if" not in words or "of" not in words:
        raise UsageFailure("expects if=FILE and of=FILE")
    block_size = size_value(words["bs"], "bs") if "bs" in words else _BLOCK_SIZE
    if not 0 < block_size <= _MAX_BLOCK_SIZE:
        raise Failure(f"bs={words['bs']}: a block has from 1 to {_MAX_BLOCK_SIZE} bytes")
    skipped = size_value(words["skip"], "skip") * block_size if "skip" in words else 0
    count = size_value(words["count"], "count") * block_size if "count" in words else None
    driver = given.last("-O") or "raw"
    with open_image(session, given, name_of(given, words["if"])) as source:
        if skipped > source.size:
            print_error(session.program, f"{words['if']}: ends before the blocks that are to be copied")
        length = max(0, source.size - skipped)
        length = length if count is None else min(length, count)
        check_distinct(words["of"], source)
        make_image(given, words["of"], driver, {"size": str(length)})
        with open_image(session, given, Name(words["of"], driver, is_options=False), write=True, share=False) as target:
            _copy(session, source, skipped, target, length)
    return 0


def _words(operands: list[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for operand in operands:
        name, equals, value = operand.partition("=")
        if name not in ("if", "of", "bs", "count", "skip") or not equals:
            raise UsageFailure(f"unknown operand '{operand}'")
        words[name] = value
    return words


def _copy(session: Session, source: Disk, start: int, target: Disk, length: int) -> None:
    """Copy `length` bytes from `start` of `source` to the start of `target`, zeroes as such."""
    buffer = memoryview(bytearray(min(_BUFFER, length)))
    for extent in source.extents(start, length) if length else ():
        place = extent.offset - start
        if extent.zero:
            session.check()
            target.write_zeroes(place, extent.length, unmap=True)
            continue
        for done in range(0, extent.length, _BUFFER):
            session.check()
            part = buffer[: min(_BUFFER, extent.length - done)]
            source.readinto(extent.offset + done, part)
            target.write(place + done, part)
