"""``resize``: make an image larger or smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.cli.common import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    check_objects,
    name_of,
    open_image,
    size_value,
    warn_of_guess,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.session import Failure, Session
from blocklib.sizes import MAX_SIZE

if TYPE_CHECKING:
    from blocklib.node import Preallocation

SYNTAX = Syntax(
    "FILE [+|-]SIZE",
    "Change the size of an image to SIZE bytes, or by them with a sign.  New bytes read as zero.",
    (
        Option(FORMAT.names[:1], FORMAT.metavar, FORMAT.help),
        Option(("--preallocation",), "MODE", "allocate what is new: off (default), metadata, falloc or full"),
        Option(("--shrink",), None, "allow a smaller size, which loses the data beyond it"),
        QUIET,
        IMAGE_OPTS,
        OBJECT,
    ),
    signed_operands=True,
)

_MODES: tuple[Preallocation, ...] = ("off", "metadata", "falloc", "full")


def run(session: Session, given: Given) -> int:
    check_objects(given)
    if len(given.operands) != 2:
        raise UsageFailure("expects a file name and a size")
    filename, text = given.operands
    mode = _preallocation(given)
    name = name_of(given, filename)
    with open_image(session, given, name, write=True) as disk:
        guessed = name.format is None and not name.is_options and disk.chain()[0].driver == "raw"
        size = _new_size(text, disk.size)
        if size < disk.size and not given.has("--shrink"):
            raise Failure(f"{size} bytes is less than the {disk.size} there are: --shrink allows the data beyond to be lost")
        if size <= disk.size and mode != "off":
            raise Failure("--preallocation is for images that grow")
        disk.truncate(size, shrink=given.has("--shrink"), preallocation=mode)
    if guessed:
        warn_of_guess(session, filename)
    if not given.has("-q"):
        print("Image resized.")
    return 0


def _preallocation(given: Given) -> Preallocation:
    text = given.last("--preallocation") or "off"
    for mode in _MODES:
        if text == mode:
            return mode
    raise Failure(f"--preallocation {text}: no such mode; there are {', '.join(_MODES)}")


def _new_size(text: str, size: int) -> int:
    sign = text[:1] if text[:1] in ("+", "-") else ""
    amount = size_value(text.removeprefix(sign), "size")
    new_size = {"": amount, "+": size + amount, "-": size - amount}[sign]
    if not 0 < new_size <= MAX_SIZE:
        raise Failure(f"{text} would make a size of {new_size} bytes: it must be positive, and at most {MAX_SIZE}")
    return new_size
