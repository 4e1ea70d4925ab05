"""Random requests on a disk with bitmaps of several granularities, closed and opened again between, against sets of pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import blocklib
from blocklib import KiB
from tests.programs import Program, find_program

MAX_SIZE = 512 * KiB
GRANULARITIES = st.sampled_from([512, 1024, 4096, 64 * KiB])
PLACES = st.integers(0, MAX_SIZE)
LENGTHS = st.one_of(st.integers(1, 3000), st.integers(1, MAX_SIZE))
NAMES = st.sampled_from(["a", "b", "c"])


class Bitmap:
    """What one bitmap should be."""

    def __init__(self, granularity: int, *, persistent: bool) -> None:
        self.granularity = granularity
        self.persistent = persistent
        self.enabled = True
        self.pieces: set[int] = set()

    def mark(self, start: int, end: int) -> None:
        if start < end:
            self.pieces |= set(range(start // self.granularity, (end - 1) // self.granularity + 1))

    def dirty_bytes(self, size: int) -> list[tuple[int, int]]:
        return [(n * self.granularity, min((n + 1) * self.granularity, size)) for n in sorted(self.pieces)]


class BitmapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.size = 300 * KiB + 512
        self.path = Path(self.folder) / "disk.qcow2"
        blocklib.create(self.path, self.size, format="qcow2", overwrite=True, options={"cluster_size": 1024})
        self.disk = blocklib.open(self.path, "r+", discard="unmap")
        self.model: dict[str, Bitmap] = {}

    folder: Any = None

    def teardown(self) -> None:
        self.disk.close()
        check = find_program("qemu-img")
        if check is not None:
            assert "No errors" in Program(check)("check", self.path)

    def _mark(self, start: int, end: int) -> None:
        for bitmap in self.model.values():
            if bitmap.enabled:
                bitmap.mark(start, end)

    @rule(name=NAMES, granularity=GRANULARITIES, persistent=st.booleans())
    def add(self, name: str, granularity: int, persistent: bool) -> None:
        if name in self.model:
            with pytest.raises(blocklib.UsageError):
                self.disk.bitmaps.add(name)
            return
        self.disk.bitmaps.add(name, granularity=granularity, persistent=persistent)
        self.model[name] = Bitmap(granularity, persistent=persistent)

    @rule(offset=PLACES, length=LENGTHS, how=st.sampled_from(["data", "zeroes", "unmap"]))
    def write(self, offset: int, length: int, how: str) -> None:
        end = min(offset + length, self.size)
        if offset >= end:
            return
        if how == "data":
            self.disk.write(offset, b"x" * (end - offset))
        else:
            self.disk.write_zeroes(offset, end - offset, unmap=how == "unmap")
        self._mark(offset, end)

    @rule(offset=PLACES, length=LENGTHS)
    def discard(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        if offset >= end:
            return
        self.disk.discard(offset, end - offset)
        # Whole clusters only, and the last one where the disk ends.
        self._mark(-(-offset // 1024) * 1024, end if end == self.size else end // 1024 * 1024)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), what=st.sampled_from(["clear", "enable", "disable", "remove"]))
    def change(self, data: st.DataObject, what: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        bitmap = self.model[name]
        getattr(self.disk.bitmaps[name], what)()
        if what == "clear":
            bitmap.pieces.clear()
        elif what == "remove":
            del self.model[name]
        else:
            bitmap.enabled = what == "enable"

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        target, source = (data.draw(st.sampled_from(sorted(self.model))) for _ in range(2))
        self.disk.bitmaps[target].merge(self.disk.bitmaps[source])
        for start, end in self.model[source].dirty_bytes(self.size):
            self.model[target].mark(start, end)

    @rule(size=st.integers(1, MAX_SIZE // 512))
    def resize(self, size: int) -> None:
        self.size = size * 512
        self.disk.truncate(self.size, shrink=True)
        for bitmap in self.model.values():
            bitmap.pieces = {n for n in bitmap.pieces if n * bitmap.granularity < self.size}

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.model = {name: bitmap for name, bitmap in self.model.items() if bitmap.persistent}
        self.disk = blocklib.open(self.path, "r+", discard="unmap")

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @invariant()
    def every_bitmap_is_as_it_should_be(self) -> None:
        assert {bitmap.name for bitmap in self.disk.bitmaps} == set(self.model)
        for name, expected in self.model.items():
            found = self.disk.bitmaps[name]
            assert (found.granularity, found.persistent, found.enabled) == (
                expected.granularity,
                expected.persistent,
                expected.enabled,
            )
            joined: list[list[int]] = []
            for start, end in expected.dirty_bytes(self.size):
                if joined and joined[-1][1] == start:
                    joined[-1][1] = end
                else:
                    joined.append([start, end])
            assert found.dirty_ranges().tolist() == [(start, end - start) for start, end in joined]
            assert found.count == sum(end - start for start, end in joined)


def test_bitmaps_do_what_sets_of_pieces_do(tmp_path: Path) -> None:
    machine = type("Machine", (BitmapMachine,), {"folder": tmp_path})
    test = machine.TestCase  # type: ignore[attr-defined]
    test.settings = settings(max_examples=25, stateful_step_count=20)
    test().runTest()
