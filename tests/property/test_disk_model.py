"""A disk over a backing chain against a plain bytearray: whatever is done to it, every byte is as it should be.

After each sequence qemu-img finds every image clean, without as much as a leaked cluster.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import blocklib
from blocklib.places import Places
from tests.programs import Program, find_program
from tests.property.chains import (
    CacheMode,
    ChainImage,
    Change,
    ImageSpec,
    Place,
    build_chain,
    first_difference,
    open_image,
)
from tests.property.strategies import chain_specs, changes, image_specs, places, sizes

MAX_IMAGES: Final = 5


def _direct_io_works(folder: str) -> bool:
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return False
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | flag))
        except OSError:
            return False
    return True


CACHE_MODES: Final[tuple[CacheMode, ...]] = (
    ("writeback", "unsafe", "writethrough", "none", "directsync")
    if _direct_io_works(tempfile.gettempdir())
    else ("writeback", "unsafe", "writethrough")
)


@st.composite
def opened(draw: st.DrawFn) -> dict[str, Any]:
    """Keywords for `open_image`."""
    return {
        "discard": draw(st.sampled_from(("unmap", "ignore"))),
        "detect_zeroes": draw(st.sampled_from(("off", "on", "unmap"))),
        "cache": draw(st.sampled_from(CACHE_MODES)),
        "l2_cache": draw(st.sampled_from((None, 1, 4096))),  # 1: as few tables as the cache can do with
    }


@st.composite
def filled_chains(draw: st.DrawFn) -> tuple[list[ImageSpec], list[list[Change]]]:
    specs = draw(chain_specs(MAX_IMAGES))
    return specs, [draw(st.lists(changes(), max_size=3)) for _ in specs]


class DiskMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="blocklib-model-"))
        self.images: list[ChainImage] = []
        self.disk: blocklib.Disk | None = None
        self.discard_passes = False

    @property
    def top(self) -> ChainImage:
        return self.images[-1]

    def _open(self, how: dict[str, Any]) -> blocklib.Disk:
        self.disk = open_image(self.top, "r+", **how)
        self.places = Places(self.disk.node)
        for _rows in self.places.remember(self.disk.row_windows()):
            pass
        self.discard_passes = how["discard"] == "unmap"
        return self.disk

    def _close(self) -> None:
        disk, self.disk = self.disk, None
        if disk is not None:
            disk.close()

    @initialize(chain=filled_chains(), how=opened())
    def create(self, chain: tuple[list[ImageSpec], list[list[Change]]], how: dict[str, Any]) -> None:
        specs, fills = chain
        self.images = build_chain(self.folder, specs, fills)
        self._open(how)

    @rule(change=changes())
    def change(self, change: Change) -> None:
        assert self.disk is not None
        change.apply(self.disk, self.top, discard_passes=self.discard_passes)

    @rule(place=places())
    def read(self, place: Place) -> None:
        assert self.disk is not None
        offset, length = place.on(self.top.size, self.top.spec.cluster_size)
        found = self.disk.read(offset, length)
        assert not first_difference(found, self.top.content[offset : offset + length])
        buffer = bytearray(length)
        self.disk.read_placed([(offset, memoryview(buffer))], self.places)
        assert not first_difference(buffer, self.top.content[offset : offset + length])

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        assert self.disk is not None
        size = data.draw(sizes(self.top.spec.cluster_size))
        self.disk.truncate(size, shrink=size < self.top.size)
        self.top.resize(size)
        assert self.disk.size == size

    @rule()
    def flush(self) -> None:
        assert self.disk is not None
        self.disk.flush()

    @rule(how=opened())
    def reopen(self, how: dict[str, Any]) -> None:
        self._close()
        self._open(how)

    @precondition(lambda self: len(self.images) < MAX_IMAGES)
    @rule(spec=image_specs(), how=opened())
    def lay_an_overlay_over_it(self, spec: ImageSpec, how: dict[str, Any]) -> None:
        self._close()
        path = self.folder / f"overlay{len(self.images)}.qcow2"
        self.images.append(spec.create(path, self.top))
        self._open(how)

    @precondition(lambda self: len(self.images) > 1)
    @rule(depth=st.integers(1, MAX_IMAGES - 1), empty=st.booleans(), how=opened())
    def commit(self, depth: int, empty: bool, how: dict[str, Any]) -> None:
        """What the closed top holds goes into an image below it; the top reads as before."""
        self._close()
        self._commit(self.top.path, depth, empty)
        self._open(how)

    @precondition(lambda self: len(self.images) > 1)
    @rule(depth=st.integers(1, MAX_IMAGES - 1), empty=st.booleans())
    def commit_while_open(self, depth: int, empty: bool) -> None:
        assert self.disk is not None
        self._commit(self.disk, depth, empty)

    def _commit(self, target: Path | blocklib.Disk, depth: int, empty: bool) -> None:
        base = max(0, len(self.images) - 1 - depth)
        path = self.images[base].path
        if base == len(self.images) - 2:
            blocklib.commit(target, empty=empty, format="qcow2", references="allow")
        else:
            blocklib.commit(target, base=path, empty=False, format="qcow2", references="allow")
        self.images[base].resize(max(self.images[base].size, self.top.size))
        self.images[base].write(0, bytes(self.top.content))
        for image in self.images[base + 1 : -1]:
            image.is_valid = False

    def teardown(self) -> None:
        try:
            self._close()
            for image in self.images:
                self._verify(image)
            if self.images:
                self._verify_with_qemu()
        finally:
            if self.disk is not None:
                self.disk.abandon()
            shutil.rmtree(self.folder)

    def _verify(self, image: ChainImage) -> None:
        if image.is_valid:
            with open_image(image) as disk:
                found = disk.read(0, disk.size)
            assert not first_difference(found, image.content), image.path.name
        if image.spec.format == "qcow2":
            qemu_img("check", "-q", "-f", "qcow2", image.path)

    def _verify_with_qemu(self) -> None:
        copy = self.folder / "converted.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.top.path, copy)
        assert not first_difference(copy.read_bytes(), self.top.content), "read by QEMU"


qemu_img = Program(find_program("qemu-img") or "qemu-img")
# Reducing a failure to its smallest form takes Hypothesis up to five minutes.
TestDiskModel = pytest.mark.timeout(900)(pytest.mark.requires("qemu-img")(DiskMachine.TestCase))
