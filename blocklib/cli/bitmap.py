"""``bitmap``: the dirty bitmaps that an image stores."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from blocklib.cli.common import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    Name,
    check_objects,
    name_of,
    open_image,
    size_value,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from blocklib.disk import Disk

_ACTIONS = ("--add", "--remove", "--clear", "--enable", "--disable", "--merge")

SYNTAX = Syntax(
    "FILE BITMAP",
    "Do what the actions say, in their order, to one bitmap of an image: all of them or, where one fails, none.",
    (
        Option(("--add",), None, "add the bitmap, enabled and without marks"),
        Option(("--remove",), None, "remove it"),
        Option(("--clear",), None, "unmark everything in it"),
        Option(("--enable",), None, "let it note writes"),
        Option(("--disable",), None, "let it note nothing more"),
        Option(("--merge",), "SOURCE", "mark what the bitmap SOURCE has marked as well"),
        Option(("-g", "--granularity"), "SIZE", "with --add: bytes that one bit stands for (default: a cluster, 4k to 64k)"),
        Option(("-b", "--source-file"), "FILE", "with --merge: the image that SOURCE is in (default: the same)"),
        Option(("-F", "--source-format"), "FMT", "format of the image of -b"),
        Option(FORMAT.names[:1], FORMAT.metavar, FORMAT.help),
        IMAGE_OPTS,
        OBJECT,
    ),
)


def run(session: Session, given: Given) -> int:
    check_objects(given)
    if len(given.operands) != 2:
        raise UsageFailure("expects a file name and the name of a bitmap")
    _check_combination(given)
    filename, name = given.operands
    granularity = size_value(given.last("-g") or "0", "granularity") or None  # 0 leaves the choice to us, as with QEMU
    with ExitStack() as stack:
        disk = stack.enter_context(open_image(session, given, name_of(given, filename), write=True))
        try:
            source = _source(session, given, stack) or disk
            for action, value in given.sequence:
                if action in _ACTIONS:
                    _act(disk, name, action, value, granularity, source)
        except BaseException:
            disk.abandon()
            raise
    return 0


def _check_combination(given: Given) -> None:
    if not any(given.has(action) for action in _ACTIONS):
        raise UsageFailure(f"nothing to do: expects one of {', '.join(_ACTIONS)}")
    for option, needed in (("-g", "--add"), ("-b", "--merge"), ("-F", "-b")):
        if given.has(option) and not given.has(needed):
            raise Failure(f"{option} is for {needed}")


def _source(session: Session, given: Given, stack: ExitStack) -> Disk | None:
    """The image of -b, open for reading."""
    filename = given.last("-b")
    if filename is None:
        return None
    return stack.enter_context(open_image(session, given, Name(filename, given.last("-F"), is_options=False), share=False))


def _act(disk: Disk, name: str, action: str, value: str, granularity: int | None, source: Disk) -> None:
    if action == "--add":
        disk.bitmaps.add(name, granularity=granularity, persistent=True)
        return
    bitmap = disk.bitmaps[name]
    if action == "--remove":
        bitmap.remove()
    elif action == "--clear":
        bitmap.clear()
    elif action == "--enable":
        bitmap.enable()
    elif action == "--disable":
        bitmap.disable()
    else:
        bitmap.merge(source.bitmaps[value])
