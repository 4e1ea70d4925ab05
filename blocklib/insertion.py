"""Filters put above a disk's images, and taken away again, while requests go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blocklib import drivers, graph
from blocklib.building import Builder
from blocklib.disk import Disk
from blocklib.errors import OptionError, UsageError
from blocklib.options import nest
from blocklib.policy import Limits

if TYPE_CHECKING:
    from blocklib.node import Node


class InsertedFilter:
    """A filter above the images of a disk, until `remove`."""

    def __init__(self, node: Node, loans: Sequence[graph.Loan] = ()) -> None:
        self.node = node
        """The filter."""
        self._loans = loans

    def __repr__(self) -> str:
        return f"<InsertedFilter {self.node.driver} {self.node.name}>"

    def remove(self) -> None:
        """Take the filter away; what is inside it ends first.  Raises UsageError where it is gone already."""
        node = self.node
        with graph.alone(node):
            if not node.parents:
                raise UsageError(f"the filter {node.name} stands above nothing any more", node=node.name)
            self._take_away()

    def _take_away(self) -> None:
        below = self.node.children["file"].node
        with graph.lent(self._loans), graph.Transaction() as change:
            for edge in tuple(self.node.parents):
                change.redirect(edge, below)


def insert(root: graph.Edge, driver: str, options: Mapping[str, Any]) -> InsertedFilter:
    """Put a new filter between a user and what its edge `root` points at.  Raises OptionError, and as opening does."""
    if driver not in drivers.FILTERS:
        known = ", ".join(drivers.FILTERS)
        raise OptionError(f"{driver!r} is no filter; there are {known}", option="driver", choices=drivers.FILTERS)
    main = drivers.load(driver).main_option
    if main in nest(options):
        raise OptionError(f"{driver}: the option {main!r} is the disk that the filter is put above", option=main, driver=driver)
    builder = Builder("deny", Limits())
    typed = builder.filter_options(driver, {**options, main: {}})
    try:
        others = builder.other_children(driver, typed, read_only=root.node.read_only, inherited={})
        with graph.alone(root.node):
            inserted = _insert(root, driver, typed, others)
            try:
                for opened in (*builder.nodes, inserted.node):
                    if not opened.read_only:
                        opened.activate()
            except BaseException:
                inserted._take_away()
                raise
    except BaseException:
        builder.release()
        raise
    return inserted


def _insert(root: graph.Edge, driver: str, typed: Mapping[str, Any], others: Mapping[str, Node]) -> InsertedFilter:
    """The new filter, between `root` and what it pointed at, with its `others` children below it.

    Open disks among those are lent to it.
    """
    lenders = [typed[name] for name in others if isinstance(typed[name], Disk) and typed[name].mode == "r+"]
    below = root.node
    node = drivers.load(driver).from_options(typed, read_only=below.read_only, filename=below.filename)
    with graph.Transaction() as change:
        change.attach(node, "file", below)
        loans = [graph.Loan(disk.root, change) for disk in lenders]
        for name, other in others.items():
            change.attach(node, name, other)
        node.load()
        change.redirect(root, node)
    return InsertedFilter(node, loans)
