"""``map``: where every range of an image lives, in which image of the chain and at which offset of its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

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
from blocklib.extents import Extent, join_extents

if TYPE_CHECKING:
    from blocklib.disk import Disk

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

_NOTHING = Extent(0, 0, 0, None, data=False, zero=False, present=False, compressed=False)


def run(session: Session, given: Given) -> int:
    check_objects(given)
    as_json = wants_json(given)
    name = name_of(given, one_operand(given))
    start = size_value(given.last("-s") or "0", "start offset")
    longest = given.last("-l")
    limit = None if longest is None else size_value(longest, "maximal length")
    with open_image(session, given, name) as disk:
        length = max(0, disk.size - start)
        found = _joined(session, disk, start, length if limit is None else min(length, limit))
        if as_json:
            print_json(found, start)
        else:
            print_human(found, [node.data_filename or node.filename or node.name for node in disk.chain()])
    return 0


def _joined(session: Session, disk: Disk, start: int, length: int) -> Iterator[Extent]:
    """The extents of the range with neighbours that say the same made one."""
    last: Extent | None = None
    for extent in disk.extents(start, length) if length else ():
        session.check()
        joined = None if last is None else join_extents(last, extent)
        if last is not None and joined is None:
            yield last
        last = joined or extent
    if last is not None:
        yield last


def print_json(extents: Iterable[Extent], start: int) -> None:
    """One entry a line, as qemu-img prints them; for an empty range one entry of no length at `start`."""
    separator = "["
    for extent in extents:
        print(separator, json_entry(extent), sep="", end="")
        separator = ",\n"
    if separator == "[":
        print(separator, json_entry(_NOTHING._replace(offset=start)), sep="", end="")
    print("]")


def json_entry(extent: Extent) -> str:
    """One extent in the words of QEMU's MapEntry."""
    offset = "" if extent.host_offset is None else f', "offset": {extent.host_offset}'
    return (
        f'{{ "start": {extent.offset}, "length": {extent.length}, "depth": {extent.depth}, "present": '
        f'{_word(extent.present)}, "zero": {_word(extent.zero)}, "data": {_word(extent.data)}{offset}}}'
    )


def _word(value: bool) -> str:
    return "true" if value else "false"


def print_human(extents: Iterable[Extent], filenames: list[str]) -> None:
    """Only what holds data.  Raises Failure at data that cannot be found in a file as it is."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for extent in extents:
        if not extent.data:
            continue
        if extent.host_offset is None:
            raise Failure(
                f"the range at {extent.offset:#x} is compressed or encrypted: there is no place to show for people"
                " (--output=json can tell of it)"
            )
        if not extent.zero:
            place = f"{_hex(extent.offset):<16}{_hex(extent.length):<16}{_hex(extent.host_offset):<16}"
            print(f"{place}{printable(filenames[extent.depth])}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
