"""Filters of every kind, put above a disk and taken away in any order, while writers go on and never notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import MiB, ThrottleGroup, UnsupportedFeatureError, drivers, graph, plan
from blocklib.filters.copy_before_write import CopyBeforeWriteNode
from blocklib.protocols.memory import MemoryNode
from tests.writers import is_clean, make_chain, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 4 * MiB


class _Stack:
    """The filters above one disk; what can be said of what they did is said when they are taken away."""

    def __init__(self, folder: Path, disk: blocklib.Disk, rng: random.Random) -> None:
        self._folder = folder
        self._disk = disk
        self._rng = rng
        self._group = ThrottleGroup({"iops-total": 20000})
        self._made = 0
        self.seen: set[str] = set()
        self._removals: list[Callable[[], None]] = []
        self._inserts: dict[str, Callable[[], None]] = {
            "blkdebug": lambda: self._plain("blkdebug", {"align": 512}),
            "blklogwrites": self._logged,
            "blkverify": self._verified,
            "compress": self._compressed,
            "copy-before-write": self._kept,
            "copy-on-read": lambda: self._plain("copy-on-read", {}),
            "throttle": lambda: self._plain("throttle", {"throttle-group": self._group}),
        }
        assert set(self._inserts) == set(drivers.FILTERS)

    def change(self) -> None:
        """Put one more there, or take any away."""
        if self._removals and self._rng.random() < len(self._removals) / 6:
            self._removals.pop(self._rng.randrange(len(self._removals)))()
        else:
            unseen = sorted(set(self._inserts) - self.seen)
            driver = self._rng.choice(unseen or sorted(self._inserts))
            self.seen.add(driver)
            self._inserts[driver]()

    def clear(self) -> None:
        while self._removals:
            self._removals.pop(self._rng.randrange(len(self._removals)))()

    def _plain(self, driver: str, options: dict[str, Any]) -> None:
        self._removals.append(self._disk.insert_filter(driver, options).remove)

    def _compressed(self) -> None:
        try:
            self._plain("compress", {})
        except UnsupportedFeatureError:  # above a filter that passes nothing compressed, as in QEMU
            self.clear()
            self._plain("compress", {})

    def _content(self) -> bytes:
        """What the disk reads as, while it is drained."""
        content = bytearray(SIZE)
        plan.read(self._disk.node, 0, memoryview(content))
        return bytes(content)

    def _memory(self, content: bytes) -> blocklib.Disk:
        disk = blocklib.Disk(MemoryNode(None, SIZE), "r+")
        disk.write(0, content)
        return disk

    def _logged(self) -> None:
        self._made += 1
        path = self._folder / f"{self._made}.log"
        path.touch()
        self._plain("blklogwrites", {"log": {"driver": "file", "filename": str(path)}})

    def _verified(self) -> None:
        with graph.drained(self._disk.node):
            other = self._memory(self._content())
            verify = self._disk.insert_filter("blkverify", {"test": other})

        def remove() -> None:
            with graph.drained(self._disk.node):
                verify.remove()
                assert other.read(0, SIZE) == self._content()
            other.close()

        self._removals.append(remove)

    def _kept(self) -> None:
        with graph.drained(self._disk.node):
            moment = self._content()
            target = self._memory(b"\xaa" * SIZE)
            timeout = self._rng.choice([0, 60])
            kept = self._disk.insert_filter("copy-before-write", {"target": target, "cbw-timeout": timeout})
        node = kept.node
        assert isinstance(node, CopyBeforeWriteNode)

        def remove() -> None:
            with graph.drained(self._disk.node):
                found = bytearray(target.read(0, SIZE))
                now = self._content()
                for offset, length in node.state.sweep():  # not changed since
                    found[offset : offset + length] = now[offset : offset + length]
                kept.remove()
            target.close()
            assert found == moment

        self._removals.append(remove)


def _run(folder: Path, seed: int, changes: int) -> None:
    paths, model = make_chain(folder, 2, SIZE)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow", discard="unmap") as disk:
        stack = _Stack(folder, disk, random.Random(seed))
        with writing(disk, model, 3, seed=seed) as writers:
            for _ in range(changes):
                stack.change()
                writers.wait_for(2)
            stack.clear()
            writers.wait_for(2)
        assert stack.seen == set(drivers.FILTERS)
        assert disk.node.parents[0].parent is None
        assert disk.read(0, SIZE) == model
    assert qemu_content(paths[-1], folder) == model
    assert all(is_clean(path) for path in paths)


@pytest.mark.parametrize("seed", range(2))
def test_writers_never_notice_the_filters_above_their_disk(tmp_path: Path, seed: int) -> None:
    _run(tmp_path, seed, 20)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(100, 110))
def test_a_thousand_filters_come_and_go_under_writers(tmp_path: Path, seed: int) -> None:
    _run(tmp_path, seed, 200)
