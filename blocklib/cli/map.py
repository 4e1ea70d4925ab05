"""``map``: where every range of an image lives, in which image of the chain and at which offset of its file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from blocklib._fast.extents import DATA, DEPTH_SHIFT, ZERO, json_text, one_row
from blocklib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    check_objects,
    name_of,
    one_operand,
    open_image,
    size_value,
    wants_json,
)
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.output import printable
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from blocklib._fast.extents import Rows

SYNTAX = Syntax(
    "FILE",
    "Show which ranges of an image hold data, read as zero or are absent, and where their bytes are.",
    (
        FORMAT,
        Option(("-s", "--start-offset"), "OFFSET", "begin at this guest offset"),
        Option(("-l", "--max-length"), "LENGTH", "look at no more than these bytes"),
        OUTPUT,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

_BUFFER = 1 << 20
"""Bytes of text that are made at a time."""


def run(session: Session, given: Given) -> int:
    check_objects(given)
    as_json = wants_json(given)
    name = name_of(given, one_operand(given))
    start = size_value(given.last("-s") or "0", "start offset")
    longest = given.last("-l")
    limit = None if longest is None else size_value(longest, "maximal length")
    with open_image(session, given, name) as disk:
        length = max(0, disk.size - start)
        length = length if limit is None else min(length, limit)
        found = _watched(session, disk.row_windows(start, length) if length else ())
        if as_json:
            print_json(found, start)
        else:
            print_human(found, [node.data_filename or node.filename or node.name for node in disk.chain()])
    return 0


def _watched(session: Session, windows: Iterable[Rows]) -> Iterator[Rows]:
    for rows in windows:
        session.check()
        yield rows


def print_json(windows: Iterable[Rows], start: int) -> None:
    """One entry a line, as qemu-img prints them; for an empty range one entry of no length at `start`."""
    buffer = bytearray(_BUFFER)
    print("[", end="")
    begun = False
    for rows in windows:
        for part in json_text(rows, buffer):
            text = bytes(part).decode("ascii")
            sys.stdout.write(text if begun else text.removeprefix(",\n"))
            begun = True
    if not begun:
        text = b"".join(json_text(one_row(start, 0, -1, 0), buffer)).decode("ascii")
        sys.stdout.write(text.removeprefix(",\n"))
    print("]")


def print_human(windows: Iterable[Rows], filenames: list[str]) -> None:
    """Only what holds data.  Raises Failure at data that cannot be found in a file as it is."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for rows in windows:
        for offset, length, place, word in rows:
            if not word & DATA:
                continue
            if place < 0:
                raise Failure(
                    f"the range at {offset:#x} is compressed or encrypted: there is no place to show for people"
                    " (--output=json can tell of it)"
                )
            if not word & ZERO:
                columns = f"{_hex(offset):<16}{_hex(length):<16}{_hex(place):<16}"
                print(f"{columns}{printable(filenames[word >> DEPTH_SHIFT])}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
