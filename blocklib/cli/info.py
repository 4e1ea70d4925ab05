"""``info``: what an image says of itself, or every image of its chain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from blocklib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    Name,
    check_objects,
    name_of,
    one_operand,
    target_of,
    wants_json,
)
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.output import fact_lines, json_parts, printable
from blocklib.cli.session import Failure, Session
from blocklib.sizes import format_size

if TYPE_CHECKING:
    from blocklib.reports import ImageInfo, SnapshotInfo

SYNTAX = Syntax(
    "FILE",
    "Show an image's format, sizes, backing file and what is specific to its format.",
    (
        FORMAT,
        OUTPUT,
        Option(("--backing-chain",), None, "show every image of the chain, beginning with FILE"),
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

_SECOND = 10**9


def run(session: Session, given: Given) -> int:
    check_objects(given)
    as_json = wants_json(given)
    name = name_of(given, one_operand(given))
    whole_chain = given.has("--backing-chain")
    # All of it before the first line: a chain that breaks off is an error, not a shorter chain.
    infos = list(_chain(session, given, name)) if whole_chain else [_info(given, name)]
    if as_json:
        described = [json_of(info) for info in infos]
        for part in json_parts(described if whole_chain else described[0]):
            print(part, end="")
        print()
    else:
        for number, info in enumerate(infos):
            if number:
                print()
            for line in human_lines(info):  # one by one: the names of snapshots may be 64 MiB of text
                print(line)
    return 0


def _chain(session: Session, given: Given, name: Name) -> Iterator[ImageInfo]:
    """The image and all below it.

    Raises Failure where the chain comes back to an image it has passed, ImageLimitError where it is too deep: by links, one
    file can have any number of names.
    """
    from blocklib.policy import Limits

    seen: set[str] = set()
    while True:
        session.check()
        info = _info(given, name)
        if info.filename in seen:
            raise Failure(f"the backing chain comes back to {info.filename}")
        Limits().check("chain_depth", len(seen), structure="backing chain", node=info.filename)
        seen.add(info.filename)
        yield info
        if info.backing_filename is None:
            return
        if given.has("--untrusted"):
            raise Failure(f"{info.filename}: --untrusted opens no backing file, here {info.backing_filename!r}")
        name = Name(info.full_backing_filename or info.backing_filename, info.backing_format, is_options=False)


def _info(given: Given, name: Name) -> ImageInfo:
    from blocklib.opening import image_info

    untrusted = given.has("--untrusted")
    return image_info(
        target_of(name, untrusted=untrusted),
        format=name.format,
        force_share=given.has("-U"),
        guess_raw=not untrusted,
    )


# -- as JSON ----------------------------------------------------------------------------------------------------------


def json_of(info: ImageInfo) -> dict[str, Any]:
    """`info` in the names of QEMU's ImageInfo, in the order in which qemu-img prints them."""
    found: dict[str, Any] = {}
    if info.backing_format is not None:
        found["backing-filename-format"] = info.backing_format
    if info.snapshots:
        found["snapshots"] = [_snapshot_json(snapshot) for snapshot in info.snapshots]
    found["virtual-size"] = info.virtual_size
    found["filename"] = info.filename
    if info.cluster_size is not None:
        found["cluster-size"] = info.cluster_size
    found["format"] = info.format
    if info.actual_size is not None:
        found["actual-size"] = info.actual_size
    if info.format_specific:
        found["format-specific"] = {"type": info.format, "data": info.format_specific}
    if info.full_backing_filename is not None:
        found["full-backing-filename"] = info.full_backing_filename
    if info.backing_filename is not None:
        found["backing-filename"] = info.backing_filename
    if info.encrypted:
        found["encrypted"] = True
    if info.dirty is not None:
        found["dirty-flag"] = info.dirty
    return found


def _snapshot_json(snapshot: SnapshotInfo) -> dict[str, Any]:
    found: dict[str, Any]
    clock_seconds, clock_rest = divmod(snapshot.vm_clock_ns, _SECOND)
    nanoseconds = snapshot.created_nsec
    found = {} if snapshot.icount is None else {"icount": snapshot.icount}
    return found | {
        "vm-clock-nsec": clock_rest,
        "name": snapshot.name,
        "date-sec": int(snapshot.created.timestamp()),
        "date-nsec": snapshot.created.microsecond * 1000 if nanoseconds is None else nanoseconds,
        "vm-clock-sec": clock_seconds,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    }


# -- for people -------------------------------------------------------------------------------------------------------


def human_lines(info: ImageInfo) -> list[str]:
    """`info` as qemu-img prints it."""
    lines = [
        f"image: {printable(info.filename)}",
        f"file format: {info.format}",
        f"virtual size: {format_size(info.virtual_size)} ({info.virtual_size} bytes)",
        f"disk size: {format_size(info.actual_size) if info.actual_size is not None else 'unavailable'}",
    ]
    if info.encrypted:
        lines.append("encrypted: yes")
    if info.cluster_size is not None:
        lines.append(f"cluster_size: {info.cluster_size}")
    if info.dirty:
        lines.append("cleanly shut down: no")
    if info.backing_filename is not None:
        lines.append(f"backing file: {printable(info.backing_filename)}{_actual_path(info)}")
    if info.backing_format is not None:
        lines.append(f"backing file format: {printable(info.backing_format)}")
    if info.snapshots:
        lines += ["Snapshot list:", *snapshot_table(info.snapshots)]
    if info.format_specific:
        lines += ["Format specific information:", *fact_lines(info.format_specific, 1)]
    return lines


def _actual_path(info: ImageInfo) -> str:
    full = info.full_backing_filename
    return "" if full is None or full == info.backing_filename else f" (actual path: {printable(full)})"


def snapshot_table(snapshots: tuple[SnapshotInfo, ...]) -> list[str]:
    """Internal snapshots as ``qemu-img snapshot -l`` lists them; dates are local time."""
    lines = ["ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"]
    for snapshot in snapshots:
        minutes, seconds = divmod(snapshot.vm_clock_ns // _SECOND, 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours:02}:{minutes:02}:{seconds:02}.{snapshot.vm_clock_ns % _SECOND // 10**6:03}"
        date = snapshot.created.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        name = f"{_padded(printable(snapshot.id), 9)} {_padded(printable(snapshot.name), 16)}"
        icount = "" if snapshot.icount is None else str(snapshot.icount)
        lines.append(f"{name} {format_size(snapshot.vm_state_size):>8} {date:>19} {clock:>12} {icount:>10}")
    return lines


def _padded(text: str, width: int) -> str:
    """`text` with spaces up to `width` bytes: that is how C counts."""
    return text + " " * (width - len(os.fsencode(text)))
