"""Every feature of qcow2 with every other, under random requests, crashes, snapshots, bitmaps and changes of the image itself.

The model is bytes: of the disk, of each snapshot, of the backing file; and of each bitmap the set of its dirty pieces.  After
each close qemu-img finds no error and no leak.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import blocklib
from blocklib import KiB
from tests.encrypted import LUKS, OBJECT, OPEN
from tests.programs import Program, find_program
from tests.property.chains import first_difference

SECTOR: Final = 512
MAX_SIZE: Final = 700 * KiB
REFUSED: Final = (blocklib.UsageError, blocklib.UnsupportedFeatureError, blocklib.ImageLimitError)
"""What may come of a change that the image's features or limits do not allow; nothing has changed then."""

qemu_img = Program(find_program("qemu-img") or "qemu-img")


@st.composite
def features(draw: st.DrawFn, *, alone: bool = False) -> dict[str, Any]:
    """Creation options that go together; with `alone`, for an image without a backing file or a data file."""
    options: dict[str, Any] = {"cluster_size": draw(st.sampled_from((512, 4096, 1024, 64 * KiB, 16 * KiB)))}
    if draw(st.integers(0, 3)) == 0:
        options["compat"] = "0.10"
    else:
        options["refcount_bits"] = draw(st.sampled_from((16, 1, 64, 2, 8, 4, 32)))
        if draw(st.booleans()):
            options["extended_l2"] = True
            options["cluster_size"] = max(16 * KiB, int(options["cluster_size"]))
        if draw(st.booleans()):
            options["lazy_refcounts"] = True
        if draw(st.integers(0, 3)) == 0:
            options["compression_type"] = "zstd"
        if not alone and draw(st.integers(0, 3)) == 0:
            options["data_file"] = "guest.raw"
            options["data_file_raw"] = draw(st.booleans())
    if draw(st.integers(0, 4)) == 0:
        options |= LUKS
    if draw(st.integers(0, 4)) == 0 and not ("compat" in options and "encrypt.format" in options):
        options["preallocation"] = draw(st.sampled_from(("metadata", "falloc", "full")))
    return options


def open_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "l2-cache-size": st.sampled_from((1, 512, 4096)),
            "l2-cache-entry-size": st.just(512),
            "refcount-cache-size": st.just(1),
            "cache-clean-interval": st.sampled_from((0, 1)),
            "overlap-check": st.sampled_from(("all", "none")),
        },
    )


CACHES = st.sampled_from(("unsafe", "writeback", "none", "writethrough"))
OFFSETS = st.one_of(
    st.integers(0, MAX_SIZE),
    st.builds(
        lambda n, size, delta: max(0, n * size + delta),
        st.integers(0, 40),
        st.sampled_from((512, 2048, 16384, 65536)),
        st.sampled_from((0, 1, -1, 512)),
    ),
)
LENGTHS = st.one_of(st.sampled_from((512, 2048, 4096, 16384, 65536, 131072)), st.integers(1, 3000), st.integers(1, MAX_SIZE))
PICK = st.integers(0, 1 << 16)
SIZES = st.one_of(st.integers(1, MAX_SIZE // SECTOR), st.integers(1, 60)).map(lambda n: n * SECTOR)


@dataclass
class BitmapModel:
    granularity: int
    persistent: bool
    enabled: bool = True
    pieces: set[int] = field(default_factory=set)

    def pieces_of(self, start: int, end: int) -> set[int]:
        return set(range(start // self.granularity, -(-end // self.granularity))) if start < end else set()

    def copy(self) -> BitmapModel:
        return BitmapModel(self.granularity, self.persistent, self.enabled, set(self.pieces))


class FeatureMachine(RuleBasedStateMachine):
    disk: blocklib.Disk | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="features"))
        self.path = self.folder / "disk.qcow2"
        self.stamp = 0
        self.crashed = False
        """What was not flushed may be in a raw data file, and not in the image."""
        self.leaky = False
        """A crash may have left clusters that nobody uses."""
        self.snapshots: dict[str, bytes] = {}
        self.bitmaps: dict[str, BitmapModel] = {}
        self.stored: dict[str, BitmapModel] = {}
        """The bitmaps as the last close has left them."""
        self.versions: list[bytes] = []
        """What a crash may bring back, sector by sector; the last is what there is now."""

    # -- opening and closing ------------------------------------------------------------------------------------------

    @initialize(options=features(), size=SIZES, backed=st.booleans(), base=SIZES, opened=open_options(), cache=CACHES)
    def make(
        self, options: dict[str, Any], size: int, backed: bool, base: int, opened: dict[str, Any], cache: Any
    ) -> None:
        self.options = options
        self.encrypted = "encrypt.format" in options
        self.external = "data_file" in options
        self.base: bytearray | None = None
        if backed and not options.get("data_file_raw"):
            self.base = bytearray(os.urandom(16) * (base // 16))
            (self.folder / "base.raw").write_bytes(self.base)
            if not options.get("extended_l2"):
                options.pop("preallocation", None)
        backing: Any = {"backing": "base.raw", "backing_format": "raw"} if self.base is not None else {}
        blocklib.create(self.path, size, format="qcow2", options=options, **backing)
        self.content = bytearray(size)
        if self.base is not None:
            self.content[: len(self.base)] = self.base[:size]
            self.content = self.content[:size]
        self._durable()
        self.reopen(opened, cache)

    def _open(self, mode: Any = "r", **options: Any) -> blocklib.Disk:
        cache = options.pop("cache", "writeback")
        if self.encrypted:
            options |= OPEN
        return blocklib.open(
            self.path, mode, format="qcow2", references="allow", discard="unmap", cache=cache, options=options
        )

    @rule(opened=open_options(), cache=CACHES)
    def reopen(self, opened: dict[str, Any], cache: Any) -> None:
        self._close()
        self.check()
        self.disk = self._open("r+", cache=cache, **opened)
        self.writethrough = cache == "writethrough"
        self.wrote = False

    def _close(self) -> None:
        if self.disk is None:
            return
        self.disk.close()
        self.disk = None
        self.bitmaps = {name: bitmap for name, bitmap in self.bitmaps.items() if bitmap.persistent}
        self.stored = {name: bitmap.copy() for name, bitmap in self.bitmaps.items()}
        self._durable()

    @rule(opened=open_options(), cache=CACHES)
    def crash(self, opened: dict[str, Any], cache: Any) -> None:
        """The process dies: what it had not flushed may be lost, sector by sector."""
        assert self.disk is not None
        self.disk.abandon()
        self.disk = None
        was_dirty = blocklib.info(self.path, format="qcow2").dirty
        if not was_dirty:
            self._qemu_check(self.path, self.encrypted, codes=(0, 3))
        self.disk = self._open("r+", cache=cache, **opened)
        self.leaky, self.crashed = not was_dirty, True
        found = self.disk.read(0, self.disk.size)
        assert len(found) in {len(version) for version in self.versions}
        for start in range(0, len(found), SECTOR):
            sector = found[start : start + SECTOR]
            assert any(sector == version[start : start + SECTOR] for version in self.versions), start
        self.content = bytearray(found)
        self.writethrough = cache == "writethrough"
        self._bitmaps_after_crash()
        self.wrote = False
        self._durable()

    def _bitmaps_after_crash(self) -> None:
        assert self.disk is not None
        left: dict[str, BitmapModel] = {}
        names = [bitmap.name for bitmap in self.disk.bitmaps]
        assert set(names) == set(self.stored)
        for name in names:
            bitmap, before = self.disk.bitmaps[name], self.stored[name]
            if bitmap.inconsistent:
                bitmap.remove()
                continue
            assert not (before.enabled and self.wrote), f"{name} has missed a write"
            left[name] = before
        self.bitmaps = left

    def _durable(self) -> None:
        self.versions = [bytes(self.content)]

    def _changed(self) -> None:
        if self.versions[-1] != self.content:
            self.versions.append(bytes(self.content))
        if self.writethrough:
            self._durable()

    # -- requests -----------------------------------------------------------------------------------------------------

    def _place(self, offset: int, length: int) -> tuple[int, int]:
        offset %= len(self.content)
        return offset, min(length, len(self.content) - offset)

    def _mark(self, offset: int, length: int) -> None:
        self.wrote = True
        for bitmap in self.bitmaps.values():
            if bitmap.enabled:
                bitmap.pieces |= bitmap.pieces_of(offset, offset + length)

    @rule(offset=OFFSETS, length=LENGTHS, fua=st.booleans())
    def write(self, offset: int, length: int, fua: bool) -> None:
        assert self.disk is not None
        offset, length = self._place(offset, length)
        self.stamp += 1
        data = (self.stamp.to_bytes(3, "big") * (length // 3 + 1))[:length]
        self.disk.write(offset, data, fua=fua)
        self.content[offset : offset + length] = data
        self._mark(offset, length)
        self._changed()
        if fua:
            self._durable()

    @rule(offset=OFFSETS, length=LENGTHS, unmap=st.booleans())
    def zero(self, offset: int, length: int, unmap: bool) -> None:
        assert self.disk is not None
        offset, length = self._place(offset, length)
        self.disk.write_zeroes(offset, length, unmap=unmap)
        self.content[offset : offset + length] = bytes(length)
        self._mark(offset, length)
        self._changed()

    @rule(offset=OFFSETS, length=LENGTHS)
    def discard(self, offset: int, length: int) -> None:
        """Each sector keeps its content, reads as zero, or as what lies below; the last is for version 2 and for raw data."""
        assert self.disk is not None
        offset, length = self._place(offset, length)
        before = bytes(self.content)
        self.disk.discard(offset, length)
        found = self.disk.read(0, len(before))
        for start in range(0, len(before), SECTOR):
            sector = found[start : start + SECTOR]
            if sector != before[start : start + SECTOR]:
                assert offset <= start
                assert min(start + SECTOR, len(before)) <= offset + length
                below = bytes(self.base[start : start + SECTOR]) if self.base is not None else b""
                assert sector in (bytes(len(sector)), below.ljust(len(sector), b"\0")), start
        self.content[:] = found
        self._adopt_marks(before)
        self._changed()

    def _adopt_marks(self, before: bytes) -> None:
        """Where the driver chooses what changes, bitmaps have at least that."""
        assert self.disk is not None
        changed = [
            start for start in range(0, min(len(before), len(self.content)), SECTOR)
            if before[start : start + SECTOR] != self.content[start : start + SECTOR]
        ]  # fmt: skip
        self.wrote = self.wrote or bool(changed)
        for name, bitmap in self.bitmaps.items():
            found = self._found_pieces(name, bitmap)
            assert found >= bitmap.pieces
            if bitmap.enabled:
                assert found >= {start // bitmap.granularity for start in changed}
            else:
                assert found == bitmap.pieces
            bitmap.pieces = found

    def _found_pieces(self, name: str, bitmap: BitmapModel) -> set[int]:
        assert self.disk is not None
        found: set[int] = set()
        for start, length in self.disk.bitmaps[name].dirty_ranges().tolist():
            found |= bitmap.pieces_of(start, start + length)
        return found

    @rule(first=st.integers(0, 40), n=st.integers(1, 4), noise=st.booleans())
    def write_compressed(self, first: int, n: int, noise: bool) -> None:
        assert self.disk is not None
        cluster = int(self.options["cluster_size"])
        clusters = -(-len(self.content) // cluster)
        offset = first % clusters * cluster
        length = min(n * cluster, len(self.content) - offset)
        self.stamp += 1
        data = os.urandom(length) if noise else (self.stamp.to_bytes(3, "big") * (length // 3 + 1))[:length]
        before = bytes(self.content)
        try:
            self.disk.write_compressed(offset, data)
        except blocklib.UnsupportedFeatureError:
            assert self.external or self.encrypted
            return
        except blocklib.StorageError:  # one of the clusters has a place already
            data = self.disk.read(offset, length)
            for start in range(0, length, cluster):  # clusters that had no place may have been written
                piece, old = data[start : start + cluster], before[offset + start : offset + start + cluster]
                assert piece == old or n > 1
        self.content[offset : offset + length] = data
        if data == before[offset : offset + length]:
            self._adopt_marks(before)
        else:
            self._mark(offset, length)
            self._adopt_marks(bytes(self.content))
        self._changed()

    @rule()
    def flush(self) -> None:
        assert self.disk is not None
        self.disk.flush()
        self._durable()

    @rule(size=SIZES, preallocation=st.sampled_from(("off", "off", "metadata", "falloc", "full")))
    def resize(self, size: int, preallocation: Any) -> None:
        assert self.disk is not None
        grows = size > len(self.content)
        try:
            self.disk.truncate(size, shrink=True, preallocation=preallocation if grows else "off")
        except REFUSED:
            assert self.snapshots or (self.encrypted and preallocation != "off")
            assert self.disk.size == len(self.content)
            return
        self.content = self.content[:size] + bytes(max(0, size - len(self.content)))
        for bitmap in self.bitmaps.values():
            bitmap.pieces &= bitmap.pieces_of(0, size)
        self.wrote = True
        self._changed()

    # -- snapshots ----------------------------------------------------------------------------------------------------

    @rule()
    def snapshot(self) -> None:
        assert self.disk is not None
        name = f"s{self.stamp}-{len(self.snapshots)}"
        if name in self.snapshots:
            return
        try:
            self.disk.snapshots.create(name)
        except REFUSED:
            assert self.external or self.options.get("refcount_bits") in (1, 2, 4)
            return
        self.snapshots[name] = bytes(self.content)
        self._durable()

    @precondition(lambda self: self.snapshots)
    @rule(pick=PICK, what=st.sampled_from(("apply", "delete", "read")))
    def with_snapshot(self, pick: int, what: str) -> None:
        assert self.disk is not None
        name = sorted(self.snapshots)[pick % len(self.snapshots)]
        if what == "read":
            self._close()
            self._verify_snapshot(name)
            self.reopen({}, "writeback")
        elif what == "delete":
            self.disk.snapshots[name].delete()
            del self.snapshots[name]
        else:
            before = bytes(self.content)
            try:
                self.disk.snapshots[name].apply()
            except REFUSED:
                assert len(before) != len(self.snapshots[name]) or self.options.get("refcount_bits") in (1, 2, 4)
                return
            self.content = bytearray(self.snapshots[name])
            for bitmap in self.bitmaps.values():
                bitmap.pieces &= bitmap.pieces_of(0, len(self.content))
            self._adopt_marks(before)
            self._durable()

    def _verify_snapshot(self, name: str) -> None:
        with self._open("r", **{"snapshot.name": name}) as past:
            assert not first_difference(past.read(0, past.size), self.snapshots[name]), name
            assert past.size == len(self.snapshots[name])

    # -- bitmaps ------------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from("abc"),
        granularity=st.sampled_from((512, 4096, 64 * KiB)),
        flags=st.tuples(st.booleans(), st.booleans()),
    )
    def add_bitmap(self, name: str, granularity: int, flags: tuple[bool, bool]) -> None:
        assert self.disk is not None
        persistent, enabled = flags
        if name in self.bitmaps:
            return
        try:
            self.disk.bitmaps.add(name, granularity=granularity, persistent=persistent, enabled=enabled)
        except blocklib.UnsupportedFeatureError:
            assert persistent
            assert self.compat == "0.10"
            return
        self.bitmaps[name] = BitmapModel(granularity, persistent, enabled)

    @precondition(lambda self: self.bitmaps)
    @rule(pick=PICK, other=PICK, what=st.sampled_from(("clear", "enable", "disable", "remove", "merge")))
    def change_bitmap(self, pick: int, other: int, what: str) -> None:
        assert self.disk is not None
        names = sorted(self.bitmaps)
        name, source = names[pick % len(names)], names[other % len(names)]
        bitmap = self.bitmaps[name]
        if what == "merge":
            self.disk.bitmaps[name].merge(self.disk.bitmaps[source])
            from_other = self.bitmaps[source]
            for piece in list(from_other.pieces):
                start = piece * from_other.granularity
                bitmap.pieces |= bitmap.pieces_of(start, min(start + from_other.granularity, len(self.content)))
            return
        getattr(self.disk.bitmaps[name], what)()
        if what == "clear":
            bitmap.pieces.clear()
        elif what == "remove":
            del self.bitmaps[name]
        else:
            bitmap.enabled = what == "enable"

    # -- the image itself ---------------------------------------------------------------------------------------------

    @property
    def compat(self) -> str:
        return str(self.options.get("compat", "1.1"))

    @rule(
        changes=st.fixed_dictionaries(
            {},
            optional={
                "compat": st.sampled_from(("0.10", "1.1")),
                "refcount_bits": st.sampled_from((1, 2, 4, 8, 16, 32, 64)),
                "lazy_refcounts": st.booleans(),
            },
        )
    )
    def amend(self, changes: dict[str, Any]) -> None:
        assert self.disk is not None
        try:
            blocklib.amend(self.disk, changes)
        except REFUSED:
            return
        self.options = {**self.options, **changes}
        self._durable()

    @precondition(lambda self: self.base is not None and not self.snapshots)
    @rule()
    def commit(self) -> None:
        assert self.disk is not None
        assert self.base is not None
        if len(self.base) < len(self.content):
            self.base.extend(bytes(len(self.content) - len(self.base)))
        self.base[: len(self.content)] = self.content
        before = bytes(self.content)
        blocklib.commit(self.disk, empty=True)
        self.content = bytearray(before)
        self._adopt_marks(before)
        self._durable()

    @rule(options=features(alone=True), compressed=st.sampled_from((None, "zlib", "zstd")))
    def convert(self, options: dict[str, Any], compressed: Any) -> None:
        assert self.disk is not None
        other = self.folder / "other.qcow2"
        if compressed and ("encrypt.format" in options or "preallocation" in options):
            compressed = None
        if compressed and options.get("compat") == "0.10":
            compressed = "zlib"
        if compressed:
            options.pop("compression_type", None)
        blocklib.convert(self.disk, other, format="qcow2", overwrite=True, options=options, compress=compressed)
        with blocklib.open(other, format="qcow2", options=OPEN if "encrypt.format" in options else {}) as copy:
            assert copy.size == len(self.content)
            assert not first_difference(copy.read(0, copy.size), self.content)
        self._qemu_check(other, "encrypt.format" in options)

    @rule()
    def repair(self) -> None:
        assert self.disk is not None
        before = blocklib.repair(self.disk, "all").before
        assert not before.corruptions
        assert self.leaky or not before.leaks, before.findings
        self.leaky = False
        self._durable()

    # -- looking ------------------------------------------------------------------------------------------------------

    @invariant()
    def it_reads_as_the_model_says(self) -> None:
        if self.disk is None:
            return
        assert self.disk.size == len(self.content)
        assert not first_difference(self.disk.read(0, self.disk.size), self.content)
        assert [snapshot.name for snapshot in self.disk.snapshots] == list(self.snapshots)
        assert {bitmap.name for bitmap in self.disk.bitmaps} == set(self.bitmaps)
        for name, bitmap in self.bitmaps.items():
            assert self._found_pieces(name, bitmap) == bitmap.pieces, name
            assert self.disk.bitmaps[name].enabled == bitmap.enabled

    def _named(self, path: Path, encrypted: bool) -> list[str]:
        name = f"driver=qcow2,file.filename={path}"
        return [*OBJECT, "--image-opts", name + ",encrypt.key-secret=s"] if encrypted else ["-f", "qcow2", str(path)]

    def _qemu_check(self, path: Path, encrypted: bool, codes: tuple[int, ...] = (0,)) -> None:
        qemu_img("check", *self._named(path, encrypted), cwd=self.folder, codes=codes)

    def check(self) -> None:
        self._qemu_check(self.path, self.encrypted, codes=(0, 3) if self.leaky else (0,))
        report = blocklib.check(self.path, format="qcow2")
        assert not report.corruptions
        assert self.leaky or not report.leaks, report.findings
        if self.options.get("data_file_raw") and not self.encrypted and not self.crashed:
            assert not first_difference((self.folder / "guest.raw").read_bytes(), self.content), "the data file"
        if self.base is not None:
            assert not first_difference((self.folder / "base.raw").read_bytes(), self.base), "the backing file"

    def teardown(self) -> None:
        try:
            if self.disk is not None:
                self._close()
                self.check()
                for name in self.snapshots:
                    self._verify_snapshot(name)
                raw = self.folder / "copy.raw"
                qemu_img("convert", *self._named(self.path, self.encrypted), "-O", "raw", raw, cwd=self.folder)
                assert not first_difference(raw.read_bytes(), self.content), "read by QEMU"
        finally:
            if self.disk is not None:
                self.disk.abandon()
            shutil.rmtree(self.folder)


if settings.default is not None and settings.default.max_examples <= 50:  # `make torture` has its own numbers
    FeatureMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=25)
# Reducing a failure to its smallest form takes Hypothesis minutes.
TestFeatureModel = pytest.mark.timeout(900)(pytest.mark.requires("qemu-img")(FeatureMachine.TestCase))
