"""``create``: make a new image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blocklib.cli.common import (
    OBJECT,
    QUIET,
    Name,
    check_objects,
    open_image,
    size_value,
    target_of,
    with_secrets,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.output import printable
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from blocklib.disk import Disk

CREATION_OPTIONS = Option(("-o",), "OPTIONS", "options of the format, NAME=VALUE,...; '-o help' lists them")

SYNTAX = Syntax(
    "FILE [SIZE]",
    "Make an image of SIZE bytes, or as large as its backing file.  Sizes take the suffixes k, M, G, T, P and E.",
    (
        Option(("-f",), "FMT", "format of the new image (default: raw)"),
        Option(("-b",), "BACKING", "image that shows through where the new one holds nothing"),
        Option(("-F",), "FMT", "format of BACKING"),
        Option(("-u",), None, "do not look at BACKING, which may not be there yet"),
        CREATION_OPTIONS,
        QUIET,
        OBJECT,
    ),
)

# What qemu-img prints of each format, in its order, with the values that it prints although nobody gave them.
_SHOWN: Mapping[str, Sequence[tuple[str, str | None]]] = {
    "qcow2": (
        ("encryption", None),
        ("encrypt.format", None),
        ("encrypt.key-secret", None),
        ("encrypt.cipher-alg", None),
        ("encrypt.cipher-mode", None),
        ("encrypt.ivgen-alg", None),
        ("encrypt.ivgen-hash-alg", None),
        ("encrypt.hash-alg", None),
        ("encrypt.iter-time", None),
        ("cluster_size", "65536"),
        ("extended_l2", "off"),
        ("preallocation", None),
        ("compression_type", "zlib"),
        ("size", None),
        ("compat", None),
        ("backing_file", None),
        ("backing_fmt", None),
        ("data_file", None),
        ("data_file_raw", None),
        ("lazy_refcounts", "off"),
        ("refcount_bits", "16"),
        ("nocow", None),
        ("extent_size_hint", None),
    ),
    "raw": (("size", None), ("nocow", None), ("preallocation", None), ("extent_size_hint", None)),
}


def run(session: Session, given: Given) -> int:
    check_objects(given)
    driver = given.last("-f") or "raw"
    if print_option_help(given.all("-o"), driver, for_file=bool(given.operands)):
        return 0
    if not 1 <= len(given.operands) <= 2:
        raise UsageFailure("expects a file name and perhaps a size")
    filename = given.operands[0]
    options = _options(given, filename, driver)
    backing = options.get("backing_file")
    if backing is not None and not given.has("-u"):
        backing_size = _look_at_backing(session, given, filename, options)
        options.setdefault("size", str(backing_size))
    if "size" not in options:
        raise Failure(f"{filename}: a new image needs a size")
    if not given.has("-q"):
        print(formatting_line(filename, driver, options))
    make_image(given, filename, driver, options)
    return 0


def _options(given: Given, filename: str, driver: str) -> dict[str, str]:
    """All creation options, whether given by -o, by an option of their own or as the size operand."""
    options = parse_option_lists(given.all("-o"))
    for option, name in (("-b", "backing_file"), ("-F", "backing_fmt")):
        value = given.last(option)
        if value is not None:
            options[name] = value
    check_backing(filename, driver, options)
    if len(given.operands) == 2:
        if "size" in options:
            raise Failure(f"{filename}: the size is given twice, as an operand and with -o")
        options["size"] = str(size_value(given.operands[1], "size"))
    elif "size" in options:
        options["size"] = str(size_value(options["size"], "size"))
    return options


def check_backing(filename: str, driver: str, options: Mapping[str, str]) -> None:
    """Raises Failure where what is said of the backing file makes no sense."""
    if "backing_file" not in options:
        if "backing_fmt" in options:
            raise Failure(f"{filename}: a backing format is given, but no backing file")
        return
    if driver == "raw":
        raise Failure(f"{filename}: a raw image has no backing file")
    if not options["backing_file"]:
        raise Failure(f"{filename}: the name of the backing file is empty")
    if "backing_fmt" not in options:
        raise Failure(f"{filename}: a backing file needs its format (-F): guessed, it could be a guest's choice")


def _look_at_backing(session: Session, given: Given, filename: str, options: Mapping[str, str]) -> int:
    """The size of the new image's backing file, which must open and must not be the new image itself, nor its data file."""
    from blocklib.policy import resolve_backing_name

    full_name = resolve_backing_name(filename, options["backing_file"])
    with open_image(session, given, Name(full_name, options["backing_fmt"], is_options=False), locked=True) as disk:
        check_distinct(filename, disk)
        if options.get("data_file"):
            check_distinct(resolve_backing_name(filename, options["data_file"]), disk)
        return disk.size


# -- what convert, measure and dd need as well ------------------------------------------------------------------------


def check_distinct(filename: str, disk: Disk) -> None:
    """Raises Failure where writing to `filename` would destroy what `disk` reads.

    Locks do not help: a raw image may be read while it is written.
    """
    for image in disk.chain():
        names = (name for name in (image.filename, image.data_filename) if name is not None)
        if any(_is_same_file(name, filename.removeprefix("file:")) for name in names):
            raise Failure(f"{filename}: this file is read, so it cannot be written anew")


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there, or is no file name
        return False


def print_option_help(texts: Sequence[str], driver: str, *, for_file: bool) -> bool:
    """Print the creation options of `driver` if one of the -o lists asks for them; with those of a file if there is one."""
    from blocklib.options import asks_for_help, describe_options

    if not asks_for_help(texts):
        return False
    print(describe_options(driver, "create", protocol="file" if for_file else None))
    return True


def parse_option_lists(texts: Sequence[str]) -> dict[str, str]:
    """The options of all -o lists.  Raises OptionError."""
    from blocklib.options import parse_create_options

    return parse_create_options(texts)


def formatting_line(filename: str, driver: str, options: Mapping[str, str]) -> str:
    """What qemu-img says before it creates: the format and every option of note.  Raises OptionError."""
    from blocklib.options import check_options

    typed = check_options(driver, options, table="create")
    words = [f"fmt={driver}"]
    for name, default in _SHOWN[driver]:
        value = _shown(options[name], typed.get(name)) if name in options else default
        if value is not None:
            words.append(f"{name}={printable(value)}")
    return f"Formatting '{printable(filename)}', {' '.join(words)}"


def _shown(text: str, typed: Any) -> str:
    """A value as qemu-img repeats it: numbers as such, text as it was given, with its commas doubled."""
    if isinstance(typed, bool):
        return "on" if typed else "off"
    return str(typed) if isinstance(typed, int) else text.replace(",", ",,")


def make_image(given: Given, filename: str, driver: str, options: Mapping[str, str]) -> None:
    """Create the file, in place of one that may be there.  Raises what `blocklib.create` does."""
    import blocklib

    target = target_of(Name(filename, driver, is_options=False), untrusted=given.has("--untrusted"))
    blocklib.create(target, format=driver, overwrite=True, options=with_secrets(given, options))
