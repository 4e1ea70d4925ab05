"""``snapshot``: list, make, apply and delete the snapshots inside an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.cli.common import FORCE_SHARE, IMAGE_OPTS, OBJECT, QUIET, check_objects, name_of, one_operand, open_image
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.info import snapshot_table
from blocklib.cli.session import Failure, Session
from blocklib.errors import NameNotFoundError

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.snapshots import InternalSnapshot

SYNTAX = Syntax(
    "FILE",
    "Keep states of a disk inside its image, and go back to them.",
    (
        Option(("-l",), None, "list the snapshots"),
        Option(("-c",), "NAME", "make a snapshot of this name"),
        Option(("-a",), "SNAPSHOT", "bring back the snapshot with this ID, or else of this name"),
        Option(("-d",), "NAME", "delete the first snapshot of this name"),
        QUIET,
        IMAGE_OPTS,
        OBJECT,
        FORCE_SHARE,
    ),
)

_ACTIONS = ("-l", "-c", "-a", "-d")


def run(session: Session, given: Given) -> int:
    check_objects(given)
    filename = one_operand(given)
    if sum(len(given.all(action)) for action in _ACTIONS[1:]) + given.has("-l") > 1:
        raise Failure("-l, -c, -a and -d exclude each other, and each is given once")
    listing = given.has("-l") or not any(given.has(action) for action in _ACTIONS)
    if given.has("-U") and not listing:
        raise Failure("-U is for reading, and this would write the image")
    image = name_of(given, filename)
    # What is below the image is not looked at: references that cannot be opened are no obstacle.
    with open_image(session, given, image, write=not listing, alone=True, with_data_file=not listing) as disk:
        if given.has("-l"):
            _list(disk)
        for name in given.all("-c"):
            disk.snapshots.create(name)
        for text in given.all("-a"):
            find(disk, text).apply()
        for name in given.all("-d"):
            _named(disk, name).delete()
    return 0


def _list(disk: Disk) -> None:
    infos = disk.info().snapshots
    if infos:
        print("Snapshot list:")
        for line in snapshot_table(infos):
            print(line)


def find(disk: Disk, text: str) -> InternalSnapshot:
    """The snapshot with the ID `text`, or else of the name: the order in which qemu-img looks."""
    try:
        return disk.snapshots.by_id(text)
    except NameNotFoundError:
        return disk.snapshots[text]


def _named(disk: Disk, name: str) -> InternalSnapshot:
    """The first snapshot of this name: to delete, qemu-img takes no IDs."""
    try:
        return disk.snapshots[name]
    except NameNotFoundError as exc:
        if name in [snapshot.id for snapshot in disk.snapshots]:
            other = disk.snapshots.by_id(name).name
            exc.add_note(f"-d takes names, and the snapshot with this ID is called {other!r}")
        raise
