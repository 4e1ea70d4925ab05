"""The graph: permissions, changes that are all or nothing, draining."""

from __future__ import annotations

import pytest

from blocklib import graph
from blocklib.errors import GraphConflictError
from blocklib.graph import ALL, Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Node, PendingChange
from blocklib.requests import RequestTracker


class Recorder(Node):
    """A node that remembers what happened to it."""

    driver = "recorder"

    def __init__(self, name: str) -> None:
        super().__init__(name, None, read_only=False)
        self.events: list[str] = []
        self.fail_claim = False

    def close(self) -> None:
        self.events.append("close")

    def abandon(self) -> None:
        self.events.append("abandon")

    def prepare_permissions(self, wanted: int, shared: int) -> PendingChange:
        if self.fail_claim:
            raise GraphConflictError("somebody else has it")
        return PendingChange(
            lambda: self.events.append(f"commit {wanted:x}/{shared:x}"), lambda: self.events.append("abort")
        )


def test_a_user_that_shares_nothing_excludes_another_writer() -> None:
    node = Recorder("base")
    with Transaction() as change:
        first = change.attach(None, "first", node, wanted=WRITE, shared=CONSISTENT_READ)
    with pytest.raises(GraphConflictError) as caught:
        with Transaction() as change:
            change.attach(None, "second", node, wanted=WRITE, shared=ALL)
    assert "write" in str(caught.value)
    assert node.parents == [first]


def test_a_failed_change_leaves_the_graph_and_permissions_as_they_were() -> None:
    top, below = Recorder("top"), Recorder("below")
    with Transaction() as change:
        root = change.attach(None, "root", top, wanted=CONSISTENT_READ)
    below.fail_claim = True
    with pytest.raises(GraphConflictError):
        with Transaction() as change:
            change.set_permissions(root, wanted=WRITE, shared=ALL)
            change.attach(top, "backing", below)
    assert top.children == {}
    assert below.parents == []
    assert root.wanted == CONSISTENT_READ
    assert top.events[-1] == "abort"


def test_an_exception_in_the_block_undoes_every_change() -> None:
    top, old, new = Recorder("top"), Recorder("old"), Recorder("new")
    with Transaction() as change:
        change.attach(None, "root", top)
        edge = change.attach(top, "backing", old)
    with pytest.raises(KeyError):
        with Transaction() as change:
            change.redirect(edge, new)
            raise KeyError("stop")
    assert edge.node is old
    assert old.parents == [edge]
    assert new.parents == []
    assert "close" not in old.events


def test_permissions_reach_every_node_below() -> None:
    top, middle, bottom = Recorder("top"), Recorder("middle"), Recorder("bottom")
    with Transaction() as change:
        change.attach(middle, "file", bottom)
        change.attach(top, "file", middle)
        change.attach(None, "root", top, wanted=CONSISTENT_READ | WRITE | RESIZE, shared=CONSISTENT_READ)
    assert bottom.events[-1] == "commit b/1"


def test_a_node_that_nobody_uses_any_more_is_closed_with_what_only_it_used() -> None:
    top, middle, bottom, other = (Recorder(name) for name in ("top", "middle", "bottom", "other"))
    with Transaction() as change:
        root = change.attach(None, "root", top)
        edge = change.attach(top, "backing", middle)
        change.attach(middle, "backing", bottom)
        change.attach(other, "backing", bottom)
    with Transaction() as change:
        change.detach(edge)
    assert middle.events[-1] == "close"
    assert "close" not in bottom.events
    with Transaction() as change:
        change.detach(root)
    assert top.events[-1] == "close"


def test_a_loop_is_refused() -> None:
    top, below = Recorder("top"), Recorder("below")
    with Transaction() as change:
        change.attach(top, "backing", below)
    with pytest.raises(GraphConflictError):
        with Transaction() as change:
            change.attach(below, "backing", top)
    with pytest.raises(GraphConflictError):
        with Transaction() as change:
            change.attach(top, "file", top)


def test_drained_holds_the_requests_of_every_user_above() -> None:
    top, base = Recorder("top"), Recorder("base")
    upper, lower = RequestTracker(), RequestTracker()
    with Transaction() as change:
        change.attach(top, "backing", base)
        change.attach(None, "root", top, tracker=upper)
        change.attach(None, "root", base, tracker=lower)
    with graph.drained(base):
        assert upper.flags
        assert lower.flags
    with graph.drained(top):
        assert upper.flags
        assert not lower.flags
    assert not upper.flags


def test_chain_follows_backing_edges_only() -> None:
    top, file, base = Recorder("top"), Recorder("file"), Recorder("base")
    with Transaction() as change:
        change.attach(top, "file", file)
        change.attach(top, "backing", base)
    assert graph.chain(top) == [top, base]
