"""Changes of several disks at one instant: all of them or none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from blocklib import graph
from blocklib.errors import UsageError

if TYPE_CHECKING:
    from blocklib.node import Node


class Action(Protocol):
    """One of the changes.  `begin` is called while nobody is inside any of the disks; the others without a drain."""

    @property
    def node(self) -> Node:
        """The image that is drained for it."""
        ...

    def prepare(self) -> None:
        """Do what can fail and takes time: open and make files."""

    def begin(self) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Take back what `begin` has done; the disks are still drained."""

    def finish(self) -> None:
        """All changes have been made."""

    def abort(self) -> None:
        """Take back what `prepare`, or the making of this object, has done: the transaction has failed."""


class DiskTransaction:
    """Collects changes and makes them when its block ends, at one instant for all disks; if one fails, none is made.

    Made by `blocklib.transaction`, and given to what takes ``transaction=``.
    """

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._state = "new"

    def __enter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a transaction is used once")
        self._state = "open"
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = "done"
        actions, self._actions = self._actions, []
        if exc is not None:
            _abort(actions, exc)
            return
        try:
            for action in actions:
                action.prepare()
            _change(actions)
        except BaseException as error:
            _abort(actions, error)
            raise
        with ExitStack() as stack:  # all of them, whatever fails: the changes have been made
            for action in reversed(actions):
                stack.callback(action.finish)

    def add(self, action: Action) -> None:
        """Make this change with the others.  Raises UsageError outside the block."""
        if self._state != "open":
            raise UsageError("a transaction takes changes while its block runs")
        self._actions.append(action)


def _change(actions: list[Action]) -> None:
    begun: list[Action] = []
    nodes = {id(action.node): action.node for action in actions}
    with ExitStack() as stack:
        for _id, node in sorted(nodes.items()):  # in one order everywhere, so that two transactions do not wait in a circle
            stack.enter_context(graph.alone(node))
        try:
            for action in actions:
                action.begin()
                begun.append(action)
        except BaseException as error:
            _take_back([action.undo for action in reversed(begun)], error)
            raise


def _abort(actions: list[Action], error: BaseException) -> None:
    _take_back([action.abort for action in reversed(actions)], error)


def _take_back(steps: list[Callable[[], None]], error: BaseException) -> None:
    """Do all of `steps` because of `error`, which is told what went wrong with them."""
    for step in steps:
        try:
            step()
        except Exception as failure:
            error.add_note(f"taking a change back failed as well: {failure}")


def transaction() -> DiskTransaction:
    """Changes to be made together: ``with blocklib.transaction() as tx: ...``, with ``transaction=tx`` for each of them."""
    return DiskTransaction()
