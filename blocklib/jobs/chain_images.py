"""Images below a disk in use, as jobs that change its chain have them: found, written, taken out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TypeAlias

from blocklib import graph, plan
from blocklib.errors import BlocklibError, ReadOnlyError, UsageError
from blocklib.jobs.ends import image_below
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED
from blocklib.reports import NodeInfo
from blocklib.requests import RequestTracker

if TYPE_CHECKING:
    from types import TracebackType

    from blocklib.disk import Disk
    from blocklib.node import Node

Image: TypeAlias = "NodeInfo | str | os.PathLike[str]"
"""An image of ``disk.chain()``, or the name of its file."""


def check_changeable(disk: Disk) -> None:
    """Raises ReadOnlyError for a disk that was opened for reading."""
    if disk.mode == "r":
        name = disk.node.filename or disk.node.name
        raise ReadOnlyError(f"{name}: opened for reading; mode 'r+' writes", node=disk.node.name)


def node_below(disk: Disk, wanted: Image) -> Node:
    """The node of an image below the top one of `disk`.  Raises UsageError, NameNotFoundError as `image_below`."""
    name = image_below(disk, wanted).name
    return next(node for node in graph.chain(disk.node) if node.name == name)


def overlay_of(top: Node, image: Node) -> Node:
    """The image of the chain of `top` that is over `image`."""
    return next(node for node in graph.chain(top) if graph.backing_of(node) is image)


def shorten(overlay: Node, base: Node | None, backing_file: str | None) -> str | None:
    """Take the images between `overlay` and `base` out of the chain, or all below `overlay`; the name stored for the base.

    That is `backing_file`, or as the chain names the base.  The caller is alone with `overlay`, which may be open for
    reading only.  Durable on return.  Raises UsageError for a name that does not fit, and then nothing has changed.
    """
    name, format = _stored_name(overlay, base, backing_file)
    was_read_only = overlay.read_only
    with graph.Transaction() as change:
        change.reopen(overlay, read_only=False)
    try:
        with graph.Transaction() as change:
            change.detach(overlay.children["backing"])
            if base is not None:
                change.attach(overlay, "backing", base)
            overlay.change_backing(name, format)
    finally:
        with graph.Transaction() as change:
            change.reopen(overlay, read_only=was_read_only)
    return name


def _stored_name(overlay: Node, base: Node | None, backing_file: str | None) -> tuple[str | None, str | None]:
    """(name, format) of the base as `overlay` is to store them."""
    if base is None:
        return None, None
    if backing_file is not None:
        return backing_file, base.driver
    above = overlay_of(overlay, base)
    named = next((item for item in above.references() if item.kind == "backing"), None)
    if named is not None and (os.path.isabs(named.name) or _folder(above) == _folder(overlay)):
        return named.name, named.format or base.driver
    if base.filename is None:
        raise UsageError(f"{base.name}: a base without a file has no name to store", node=base.name)
    return os.path.abspath(base.filename), base.driver


def _folder(node: Node) -> str:
    return os.path.realpath(os.path.dirname(os.path.abspath(node.filename or "")))


@contextmanager
def ending(error: BaseException | None) -> Iterator[None]:
    """Cleaning up after `error`, if there was one: it is what is raised, and what goes wrong now is noted in it."""
    try:
        yield
    except BlocklibError as failure:
        if error is None:
            raise
        error.add_note(f"and then: {failure}")


class WrittenImage:
    """An image below `top` that a job writes and may resize, until `give_back` or `hand_over`: what copies are written to.

    Its writes change nothing that the images above it read as; that is up to the job.
    """

    def __init__(self, job: str, top: Node, image: Node) -> None:
        """Raises GraphConflictError where somebody else uses the image, LockedError, StorageError."""
        self.node = image
        self._top = top
        self._was_read_only = image.read_only
        # An image that is written wants what is below it to stand still, which these writes let it.
        self._users = {edge: edge.shared for edge in graph.roots_above(top)}
        self._tracker = RequestTracker()
        with graph.drained(top, image), graph.Transaction() as change:
            for user, shared in self._users.items():
                change.set_permissions(user, wanted=user.wanted, shared=shared | WRITE | RESIZE)
            change.reopen(image, read_only=False)
            self._edge = change.attach(
                None,
                job,
                image,
                wanted=CONSISTENT_READ | WRITE | RESIZE,
                shared=CONSISTENT_READ | WRITE_UNCHANGED,
                tracker=self._tracker,
            )

    @property
    def size(self) -> int:
        return self.node.size

    def grow_to(self, size: int) -> None:
        """Make it at least so large."""
        if self.node.size < size:
            with graph.drained(self._top), graph.alone(self.node):
                self._edge.truncate(size)

    def write(self, offset: int, data: memoryview, /) -> None:
        self._request(lambda: self._edge.write(offset, (data,)))

    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None:
        self._request(lambda: plan.write_runs(self.node, runs, placed))

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        self._request(lambda: self._edge.write_zeroes(offset, length, unmap=unmap))

    def flush(self) -> None:
        """Make what was written durable."""
        self._request(self._edge.flush)

    def _request(self, work: Callable[[], None]) -> None:
        self._tracker.enter()
        try:
            work()
        finally:
            self._tracker.leave()

    def give_back(self) -> None:
        """It is as it was opened before, and what was written is durable.

        Raises StorageError where that fails; then it stays writable, and is written when it is closed.
        """
        with graph.drained(self._top, self.node):
            with graph.Transaction() as change:
                change.detach(self._edge)
                self._share_as_before(change)
            with graph.Transaction() as change:
                change.reopen(self.node, read_only=self._was_read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ending(exc):
            self.give_back()

    def hand_over(self, change: graph.Transaction) -> None:
        """It stays writable, and the job lets go of it, as part of `change`; both are drained."""
        change.detach(self._edge)
        self._share_as_before(change)

    def _share_as_before(self, change: graph.Transaction) -> None:
        for user, shared in self._users.items():
            change.set_permissions(user, wanted=user.wanted, shared=shared)
