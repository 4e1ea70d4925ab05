"""Edges of the block graph: who uses whom, with which permissions; drain, reopen and changes that are all or nothing.

Permissions are QEMU's (``BLK_PERM_*``).  Each edge says what it needs and what it lets others hold; a change that
contradicts an edge raises GraphConflictError and leaves the graph as it was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from blocklib import plan, status
from blocklib.buffers import pieces_of, zero_fill
from blocklib.errors import GraphConflictError, NameNotFoundError
from blocklib.extents import FLAG_ALLOCATED
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED, Filter, Node, PendingChange, Preallocation

if TYPE_CHECKING:
    from blocklib.requests import RequestTracker

ALL: Final = 0xF

PERMISSION_NAMES: Final = {
    CONSISTENT_READ: "consistent read",
    WRITE: "write",
    WRITE_UNCHANGED: "write unchanged",
    RESIZE: "resize",
}

lock: Final = threading.RLock()
"""One graph writer at a time."""

if hasattr(os, "register_at_fork"):
    # So that it is free in the child: a thread that held it elsewhere would not be there to release it.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def permission_names(permissions: int) -> str:
    return ", ".join(name for bit, name in PERMISSION_NAMES.items() if permissions & bit) or "none"


class Edge:
    """A link from a parent (a node, or a Disk at the root) to a node, and the way requests take along it.

    The parent may send any offset and length; what the child needs in alignment is made here.
    """

    __slots__ = ("name", "node", "parent", "shared", "tracker", "wanted")

    def __init__(
        self,
        parent: Node | None,
        name: str,
        node: Node,
        wanted: int,
        shared: int,
        *,
        tracker: RequestTracker | None = None,
    ) -> None:
        self.parent = parent
        self.name = name
        self.node = node
        self.wanted = wanted
        self.shared = shared
        self.tracker = tracker
        """Where requests of a root are counted; None for an edge inside the graph."""

    def __repr__(self) -> str:
        owner = self.parent.name if self.parent is not None else "user"
        return f"<Edge {owner}.{self.name} -> {self.node.name}: {permission_names(self.wanted)}>"

    def describe(self) -> str:
        """Who this is, for an error text."""
        if self.parent is None:
            return f"a user of {self.node.filename or self.node.name}"
        return f"{self.parent.filename or self.parent.name} (as its {self.name})"

    def read(self, offset: int, view: memoryview, event: str | None = "read_aio") -> None:
        """Fill `view` from child `offset`; past the child's end it reads as zero.

        `event` says what this is to whoever stands between (`Node.hear`); None where that has been said.
        """
        node = self.node
        if not node.is_leaf:
            if event is not None:
                node.hear(event)
            inside = max(0, node.size - offset)
            if inside < len(view):
                zero_fill(view[inside:])
                view = view[:inside]
            plan.read(node, offset, view)
        elif node.request_alignment == 1:
            node.preadv(offset, (view,))
        else:
            plan.read_padded(node, offset, view)

    def write(
        self, offset: int, views: Sequence[memoryview | bytes | bytearray], event: str | None = "write_aio"
    ) -> None:
        """Write all of `views`, one after the other, at child `offset`.  Past the end, the child grows or raises ENOSPC.

        `event` as for `read`.
        """
        node = self.node
        if not node.is_leaf:
            if offset + pieces_of(views) > node.size:
                node.grow_to(offset + pieces_of(views))
            if event is not None:
                node.hear(event)
            plan.write(node, offset, memoryview(views[0] if len(views) == 1 else b"".join(views)))
        elif node.request_alignment == 1:
            node.pwritev(offset, views)
        else:
            plan.write_padded(node, offset, views)

    def write_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        """Write `data`, whole units of the child's `compressor`, which made `packed` of them."""
        plan.write_packed(self.node, offset, data, packed, unit)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zero.  Past the end, the child grows or raises StorageError (ENOSPC)."""
        if not self.node.is_leaf and offset + length > self.node.size:
            self.node.grow_to(offset + length)
        plan.write_zeroes(self.node, offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        plan.discard(self.node, offset, length)

    def keep(self, offset: int, data: memoryview, bottom: Node | None = None) -> None:
        """Write `data`, which is what the child reads as at `offset`, where its top image only shows what lies below.

        With `bottom` only what comes from that image of the chain, or from one above it.
        """
        top = status.skip_filters(self.node)
        if "backing" not in top.children:
            return
        top.children["file"].node.hear("cor_write")
        if bottom is None:
            plan.write_unallocated(top, offset, data)
            return
        below = status.backing_below(bottom)
        done = 0
        while done < len(data):
            n, flags, depth, _host_offset, _leaf = status.status_above(top, offset + done, len(data) - done, below)
            if depth and flags & FLAG_ALLOCATED:
                plan.write_unallocated(top, offset + done, data[done : done + n])
            done += n

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, whether it reads as zero by what is known) of a range, ascending and without gaps."""
        for extent in status.extents(self.node, offset, length):
            yield extent.offset, extent.length, extent.zero

    def top_image(self) -> Node:
        """The first image of the child's chain."""
        return status.skip_filters(self.node)

    def find_image(self, name: str | None) -> Node | None:
        """The image of this node name in the child's chain; None for None.  Raises NameNotFoundError."""
        if name is None:
            return None
        for node in chain(self.node):
            if node.name == name:
                return node
        raise NameNotFoundError(f"no image of the chain of {self.node.filename or self.node.name} has the node name {name!r}")

    def free_run(self, offset: int, length: int) -> tuple[int, bool]:
        """(bytes, whether the child's top image has no place for them) of the beginning of a range."""
        return status.free_run(self.node, offset, length)

    def flush(self) -> None:
        self.node.flush()

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        plan.truncate(self.node, size, preallocation)

    @property
    def size(self) -> int:
        return self.node.size


class Transaction:
    """Graph changes that happen together or not at all.  Use it as a context manager, with the roots concerned drained.

    Each change is made at once and remembered; leaving the block claims the permissions (and file locks) of the new
    graph and then commits, or undoes every change if that, or the block, raised.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._pending: list[PendingChange] = []
        self._touched: list[Node] = []
        self._released: list[Node] = []
        self._read_only: dict[Node, bool] = {}
        self._afterwards: list[Callable[[], None]] = []

    def __enter__(self) -> Transaction:
        lock.acquire()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                try:
                    self._claim_permissions()
                except BaseException:
                    self._roll_back()
                    raise
                for change in self._pending:
                    change.commit()
                for action in self._afterwards:
                    action()
                self._close_released()
            else:
                self._roll_back()
        finally:
            lock.release()

    def attach(
        self,
        parent: Node | None,
        name: str,
        node: Node,
        *,
        wanted: int = 0,
        shared: int = ALL,
        tracker: RequestTracker | None = None,
    ) -> Edge:
        """A new edge; for a node as parent the permissions are computed, for a user they are `wanted` and `shared`."""
        if parent is not None and (node is parent or parent in _below(node)):
            raise GraphConflictError(f"{parent.name} would come to stand below itself", other=node.name)
        edge = Edge(parent, name, node, wanted, shared, tracker=tracker)
        if parent is not None:
            if name in parent.children:
                raise GraphConflictError(f"{parent.name} has a child named {name}", other=parent.children[name].node.name)
            parent.children[name] = edge
            self._undo.append(lambda: _forget_child(parent, name))
        node.parents.append(edge)
        self._undo.append(lambda: node.parents.remove(edge))
        self._touch(parent if parent is not None else node)
        self._touch(node)
        return edge

    def detach(self, edge: Edge) -> None:
        """Remove an edge; a node that nobody uses any more is closed when the transaction commits."""
        parent, node = edge.parent, edge.node
        if parent is not None:
            del parent.children[edge.name]
            self._undo.append(lambda: parent.children.__setitem__(edge.name, edge))
        node.parents.remove(edge)
        self._undo.append(lambda: node.parents.append(edge))
        self._touch(node)
        self._released.append(node)

    def redirect(self, edge: Edge, node: Node) -> None:
        """Make `edge` point at another node."""
        old = edge.node
        if edge.parent is not None and edge.parent in (node, *_below(node)):
            raise GraphConflictError(f"{edge.parent.name} would come to stand below itself", other=node.name)
        old.parents.remove(edge)
        self._undo.append(lambda: old.parents.append(edge))
        edge.node = node
        self._undo.append(lambda: setattr(edge, "node", old))
        node.parents.append(edge)
        self._undo.append(lambda: node.parents.remove(edge))
        self._touch(node)
        self._touch(old)
        self._released.append(old)

    def set_permissions(self, edge: Edge, *, wanted: int, shared: int) -> None:
        """Change what a user's edge needs and shares."""
        before = edge.wanted, edge.shared

        def restore() -> None:
            edge.wanted, edge.shared = before

        self._undo.append(restore)
        edge.wanted, edge.shared = wanted, shared
        self._touch(edge.node)

    def reopen(self, node: Node, *, read_only: bool) -> None:
        """Make a node and what stores its bytes writable or read-only."""
        if node.read_only == read_only or node in self._read_only:
            return
        self._read_only[node] = read_only
        for name, edge in node.children.items():
            if name != "backing" and name not in node.written_children:
                self.reopen(edge.node, read_only=read_only)
        self._pending.append(node.prepare_reopen(read_only=read_only))
        self._touch(node)

    def when_done(self, action: Callable[[], None]) -> None:
        """Call `action`, which cannot fail, once the changes are final."""
        self._afterwards.append(action)

    def _touch(self, node: Node) -> None:
        if node not in self._touched:
            self._touched.append(node)

    def _claim_permissions(self) -> None:
        for node in _top_down(self._touched):
            wanted, shared = _cumulative(node)
            read_only = self._read_only.get(node, node.read_only)
            for name, edge in node.children.items():
                before = edge.wanted, edge.shared
                edge.wanted, edge.shared = node.child_permissions(name, wanted, shared, read_only=read_only)
                self._undo.append(lambda edge=edge, before=before: _restore(edge, before))  # type: ignore[misc]
            if node.parents:
                change = node.prepare_permissions(wanted, shared)
                if change is not None:
                    self._pending.append(change)

    def _roll_back(self) -> None:
        for change in reversed(self._pending):
            change.abort()
        for undo in reversed(self._undo):
            undo()

    def _close_released(self) -> None:
        first_error: BaseException | None = None
        for node in self._released:
            if not node.parents:
                try:
                    close_tree(node)
                except Exception as exc:
                    first_error = first_error or exc
        if first_error is not None:
            raise first_error


def close_tree(node: Node, *, abandon: bool = False) -> None:
    """Close a node that nobody uses and release its children; every node is closed, then the first error is raised."""
    first_error: BaseException | None = None
    try:
        if abandon or node.poisoned is not None:
            node.abandon()
            if not abandon:
                node.check_usable()  # raises: what was not flushed is lost
        else:
            node.close()
    except Exception as exc:
        first_error = exc
    for name, edge in list(node.children.items()):
        del node.children[name]
        edge.node.parents.remove(edge)
        if not edge.node.parents:
            try:
                close_tree(edge.node, abandon=abandon)
            except Exception as exc:
                first_error = first_error or exc
    if first_error is not None:
        raise first_error


def _forget_child(parent: Node, name: str) -> None:
    del parent.children[name]


def _restore(edge: Edge, before: tuple[int, int]) -> None:
    edge.wanted, edge.shared = before


def _below(node: Node) -> Iterator[Node]:
    for edge in node.children.values():
        yield edge.node
        yield from _below(edge.node)


def _top_down(nodes: Sequence[Node]) -> list[Node]:
    """`nodes` and everything below them, each after all of its parents among them."""
    ordered: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.children.values():
            visit(edge.node)
        ordered.append(node)

    for node in nodes:
        visit(node)
    ordered.reverse()
    return ordered


def _cumulative(node: Node) -> tuple[int, int]:
    """(wanted, shared) over all users of a node.  Raises GraphConflictError where two of them exclude each other."""
    wanted, shared = 0, ALL
    for edge in node.parents:
        for other in node.parents:
            refused = edge.wanted & ~other.shared
            if other is not edge and refused:
                raise GraphConflictError(
                    f"{node.filename or node.name}: {edge.describe()} needs {permission_names(refused)} access, "
                    f"which {other.describe()} does not allow",
                    other=other.parent.name if other.parent is not None else None,
                    node=node.name,
                )
        wanted |= edge.wanted
        shared &= edge.shared
    return wanted, shared


def roots_above(node: Node) -> list[Edge]:
    """The edges of users from which `node` can be reached."""
    roots: list[Edge] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.parents:
            if edge.parent is None:
                roots.append(edge)
            else:
                visit(edge.parent)

    visit(node)
    return roots


@contextmanager
def drained(*nodes: Node) -> Iterator[None]:
    """No request of any user is inside while the block runs; nests.  Raises UsageError from inside a request."""
    with lock:
        trackers = []
        filters: set[Filter] = set()
        for node in nodes:
            for edge in roots_above(node):
                if edge.tracker is not None and edge.tracker not in trackers:
                    trackers.append(edge.tracker)
                    below = (edge.node, *_below(edge.node))
                    filters.update(found for found in below if isinstance(found, Filter))
    holding = [found for found in filters if found.holds_requests]
    held = []
    try:
        for found in holding:
            found.hurry(True)
        for tracker in trackers:
            tracker.drain()
            held.append(tracker)
        for found in filters:
            found.settle()
        yield
    finally:
        for tracker in held:
            tracker.undrain()
        for found in holding:
            found.hurry(False)


@contextmanager
def alone(node: Node) -> Iterator[None]:
    """As `drained`, and no other thread is alone with the node: two may have drained it at once."""
    with drained(node), node.changing:
        yield


class Loan:
    """A user lets others write to what its edge `root` points at, as part of `change`; it may read until the `end`."""

    def __init__(self, root: Edge, change: Transaction) -> None:
        self._root = root
        self._before = root.wanted, root.shared
        change.set_permissions(root, wanted=root.wanted & CONSISTENT_READ, shared=ALL)

    def end(self, change: Transaction) -> None:
        """As before, as part of `change`; nothing where the user is gone."""
        if self._root in self._root.node.parents:
            wanted, shared = self._before
            change.set_permissions(self._root, wanted=wanted, shared=shared)


@contextmanager
def lent(loans: Iterable[Loan]) -> Iterator[None]:
    """These loans end with the block, in which their borrower is closed: that may still write to what is lent."""
    try:
        yield
    finally:
        with Transaction() as change:
            for loan in loans:
                loan.end(change)


class Claim:
    """The right of one job to change which images a chain has: `images` are its own until `release`."""

    def __init__(self, job: str, images: Iterable[Node]) -> None:
        """Raises GraphConflictError, which names the job that has claimed one of them before."""
        self.job = job
        self._images = tuple(images)
        with lock:
            for image in self._images:
                if image.claim is not None:
                    raise GraphConflictError(
                        f"{image.filename or image.name}: a {image.claim.job} job is at work on its chain, "
                        f"which {job} would change",
                        other=image.claim.job,
                        node=image.name,
                    )
            for image in self._images:
                image.claim = self

    def release(self) -> None:
        """Once is enough."""
        with lock:
            for image in self._images:
                if image.claim is self:
                    image.claim = None


def backing_of(node: Node) -> Node | None:
    """The node below in the backing chain, filters passed through."""
    edge = node.children.get("backing")
    if edge is None and node.is_filter:
        edge = node.children.get("file")
        return backing_of(edge.node) if edge is not None else None
    return edge.node if edge is not None else None


def data_filename(node: Node) -> str | None:
    """The file that the plain data of one image is in, by its name; None where that is not a file."""
    edge = node.data_edge()
    return node.filename if edge is None else data_filename(edge.node) if not edge.node.is_leaf else edge.node.filename


def chain(node: Node) -> list[Node]:
    """The images of a backing chain, top first; a protocol node that an image is stored in is not one of them."""
    nodes: list[Node] = []
    current: Node | None = node
    while current is not None:
        if not current.is_filter:
            nodes.append(current)
        edge = current.children.get("backing")
        if edge is None and current.is_filter:
            edge = current.children.get("file")
        current = edge.node if edge is not None else None
    return nodes
