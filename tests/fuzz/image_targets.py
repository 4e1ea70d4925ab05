"""Targets that damage an image, in memory, and ask everything of it.

Whatever comes of a damaged image is a BlocklibError.  What only looks changes nothing; the next check finds what a repair says
is left, and where that is nothing, a second repair has nothing to do; and an image in which a check finds nothing wrong keeps
what is written to it and is as sound afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, Final

import pytest

from blocklib import graph
from blocklib.crypto import luks as luks_format
from blocklib.disk import Disk
from blocklib.errors import BlocklibError, PoisonedError
from blocklib.formats.qcow2.header import header_span, parse_header
from blocklib.formats.qcow2.header_write import serialize_header
from blocklib.formats.qcow2.snapshots import tally
from blocklib.inspection import Inspector
from blocklib.options import check_options
from blocklib.policy import Limits
from blocklib.reports import CheckReport, Inspection
from tests.encrypted import SECRET
from tests.fuzz import images
from tests.fuzz.images import Case, Image
from tests.fuzz.source import Source
from tests.kernels import running

_MOST_READ: Final = 1 << 20
_MOST_REQUESTS: Final = 24


# -- the targets -----------------------------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    """The header as bytes, and an image whose header and extensions are damaged."""
    _parse(data)
    _image(data, images.NAMES, ("header", "extension"))


def tables(data: bytes) -> None:
    _image(data, images.NAMES, ("L1", "L2", "refcount"))


def snapshots(data: bytes) -> None:
    _image(data, _WITH_SNAPSHOTS, ("snapshot", "L1", "L2", "refcount block"))


def bitmaps(data: bytes) -> None:
    _image(data, _WITH_BITMAPS, ("bitmap", "extension 0x23852875", "refcount block"))


def luks(data: bytes) -> None:
    _image(data, ("LUKS", "LUKS subclusters", "AES"), ("LUKS", "extension", "header", "L2"))


_WITHOUT_SNAPSHOTS: Final = ("bare", "narrow counts", "data file", "raw data file")
_WITH_SNAPSHOTS: Final = tuple(name for name in images.NAMES if name not in _WITHOUT_SNAPSHOTS)
_WITH_BITMAPS: Final = tuple(name for name in images.NAMES if name not in ("bare", "version 2"))


def inspect(data: bytes) -> None:
    """A file on its way, in pieces of any size, that is an image or looks like one of another format."""
    source = Source(data)
    kind, piece = source.byte(), source.chosen((1 << 20, 100_000, 4097, 512))
    if kind & 1:
        image = images.image(source.chosen(images.NAMES))
        content = images.damaged(image, source, list(image.places.values()))
    else:
        content = _disguised(source)
    expect = (None, "qcow2", "raw", "vmdk", "vhd", "gpt", "iso", "vhdx")[kind >> 1 & 7]
    found = [_inspected(content, expect, size) for size in (piece, len(content) or 1)]
    assert found[0] == found[1], "an inspection depends on how a stream is cut"
    assert not found[0].limits_exceeded or not found[0].safe
    if found[0].safe and found[0].formats == ("qcow2",) and kind & 1:
        with Case(image, content).opened(writable=False, metadata_only=True) as disk:
            assert disk.size == found[0].virtual_size // 512 * 512  # type: ignore[operator]


_PLACES: Final = (0, 0x40, 446, 510, 512, 1024, 0x8001, 0x10000, 0x30000, -512, -1024, -1536)


def _disguised(source: Source) -> bytes:
    """A file of some size with bytes of the input at places where formats look for theirs."""
    size = (0, 100, 512, 2048, 70_000, 300_000)[source.byte() % 6] + source.byte()
    content = bytearray(size)
    while not source.is_empty:
        place = source.chosen(_PLACES) % (size or 1)
        part = source.take(source.byte() % 100 + 1)
        content[place : place + len(part)] = part
    return bytes(content)


def _inspected(content: bytes, expect: str | None, piece: int) -> Inspection:
    inspector = Inspector(expect=expect)
    for start in range(0, len(content), piece):
        inspector.feed(content[start : start + piece])
    return inspector.finish()


def _parse(data: bytes) -> None:
    with suppress(BlocklibError):
        found = parse_header(data[: header_span(data[:4096])], limits=Limits(), file_length=1 << 20)
        again = serialize_header(found)
        assert parse_header(again, limits=Limits(), file_length=1 << 20) == found


# -- what is asked of an image ---------------------------------------------------------------------------------------------


def _image(data: bytes, names: Sequence[str], kinds: tuple[str, ...]) -> None:
    source = Source(data)
    image = images.image(source.chosen(names))
    phases = source.byte()
    case = Case(image, images.damaged(image, source, image.of_kind(*kinds)), unusual=bool(phases & 32))
    with running("plain" if phases & 0xC0 == 0xC0 else "off"), _patched(counts_by_tables=bool(phases & 32)):
        before = case.state
        if phases & 16:
            with suppress(BlocklibError):
                _look(case)
        report = _checked(case, rehearses=bool(phases & 8))
        assert case.state == before, "an image that was only looked at has changed"
        if phases & 1 and report is not None:
            report = _repair(case, "all" if phases & 2 else "leaks", report)
        if phases & 4:
            _use(case, source, report)


_derive, _merge_key = lru_cache(200)(luks_format.derive), lru_cache(20)(luks_format.merge_key)


@contextmanager
def _patched(*, counts_by_tables: bool) -> Iterator[None]:
    """While the block runs, what takes long to compute of a password is computed once for each header.

    With `counts_by_tables` snapshots are counted as those of large disks are.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(luks_format, "derive", _derive)
        patch.setattr(luks_format, "merge_key", _merge_key)
        patch.setattr(luks_format, "iterations_per_second", lambda *_work, seconds: 100_000.0)
        if counts_by_tables:
            patch.setattr(tally, "_SMALL", -1)
        yield


def _look(case: Case) -> None:
    """Everything that only reads."""
    with suppress(BlocklibError), case.opened(writable=False, metadata_only=True) as disk:
        disk.info()
    with case.opened(writable=False) as disk:
        disk.info()
        for request in (
            lambda: disk.read(0, min(disk.size, _MOST_READ)),
            lambda: disk.read(max(0, disk.size - 5000), min(disk.size, 5000)),
            lambda: disk.map(0, min(disk.size, _MOST_READ)),
            lambda: list(disk.extents(0, min(disk.size, _MOST_READ))),
            lambda: [list(bitmap.dirty_ranges()) for bitmap in disk.bitmaps if disk.size < _MOST_READ],
            lambda: disk.snapshots.read_vm_state(0, 512),
        ):
            with suppress(BlocklibError):
                request()
        names = [snapshot.name for snapshot in disk.snapshots]
    for name in names[:3]:
        with suppress(BlocklibError), case.opened(writable=False, options={"snapshot.name": name}) as disk:
            disk.read(0, min(disk.size, _MOST_READ))


def _checked(case: Case, *, rehearses: bool = False) -> CheckReport | None:
    """What a check finds; None where the image is refused.  Repairs that are rehearsed with it change nothing."""
    try:
        with case.opened(writable=False, metadata_only=True) as disk:
            report = disk.node.check()
            if rehearses:
                disk.node.repair("leaks", dry_run=True)
                disk.node.repair("all", dry_run=True)
            return report
    except BlocklibError:
        return None


def _repair(case: Case, what: Any, before: CheckReport) -> CheckReport | None:
    """What a check finds after a repair."""
    try:
        with case.opened(writable=True, metadata_only=True) as disk:
            plan = disk.node.repair(what, dry_run=True)
            done = disk.node.repair(what, expect=plan)
    except BlocklibError:
        return _checked(case)
    after = _checked(case)
    assert after is not None, "a repaired image is refused"
    assert done.after is not None
    assert _numbers(after) == _numbers(done.after), "a repair says what a check does not find"
    if before.corruptions == before.check_errors == 0:
        assert after.clean, f"leaks are left, or corruptions new, after a repair: {after.findings}"
    if what == "all" and after.clean:
        state = case.state
        with suppress(BlocklibError), case.opened(writable=True, metadata_only=True) as disk:
            again = disk.node.repair(what)
            assert not again.steps, f"a second repair finds more to do: {again.steps}"
            assert case.state == state, "a second repair has changed the image"
    return after


def _numbers(report: CheckReport) -> tuple[int, int, int]:
    return report.corruptions, report.leaks, report.check_errors


def _use(case: Case, source: Source, report: CheckReport | None) -> None:
    """Requests that write; what they make of a sound image is known."""
    sound = report is not None and report.clean
    undamaged = case.host.content == case.image.data
    written: Written | None = None
    closed = False
    with suppress(BlocklibError):
        with case.opened(writable=True) as disk:
            written = Written(disk, case.image, source, sound=sound)
            for _ in range(_MOST_REQUESTS):
                if source.is_empty:
                    break
                written.request()
            written.compare()
        closed = True
    if not sound or written is None:
        return
    after = _checked(case)
    assert after is not None, "an image that was sound is refused after it was used"
    assert not after.corruptions, f"a sound image has become corrupt: {after.findings}"
    if closed and undamaged and not written.failed:  # otherwise counts behind the end of the file may have been wrong
        assert after.clean, f"a sound image that was closed has leaks: {after.findings}"
    if closed and written.content is not None:
        with case.opened(writable=False) as disk:
            assert disk.read(0, disk.size) == bytes(written.content), "a closed disk reads otherwise than the open one did"


class Written:
    """A disk that is written to by an input's requests.  `content` is what it must read as, None where that is not known."""

    def __init__(self, disk: Disk, image: Image, source: Source, *, sound: bool) -> None:
        self.disk = disk
        self._image = image
        self._source = source
        self.content: bytearray | None = None
        self.failed = False
        self._kept: dict[str, bytearray | None] = {}
        if sound:
            self._learn()

    def _learn(self) -> None:
        self.content = None
        if self.disk.size <= _MOST_READ:
            with suppress(BlocklibError):
                self.content = bytearray(self.disk.read(0, self.disk.size))

    def compare(self) -> None:
        if self.content is None:
            return
        assert self.disk.size == len(self.content)
        assert self.disk.read(0, self.disk.size) == bytes(self.content), "a disk does not read as it was written"

    def request(self) -> None:
        """The next one.  What a failed one has done is looked up."""
        what = self._source.chosen(_REQUESTS)
        try:
            what(self)
        except PoisonedError:
            self.failed = True
            self.content = None
        except BlocklibError:
            self.failed = True
            if self.content is not None:
                self._learn()

    def _range(self, most: int) -> tuple[int, int]:
        size = self.disk.size
        kind = self._source.byte()
        length = max(min(self._source.short() % most + 1, size), 1)
        room = min(size, _MOST_READ) - length
        offset = self._source.short() << 2 if kind & 3 else self._source.byte() << self._image.cluster_bits
        offset = offset % (max(room, 0) + 1)
        if kind & 4:
            offset, length = offset & ~511, max(length & ~511, min(512, size))
        if kind & 8:
            offset = max(size - length, 0)
        return offset, length

    def _set(self, offset: int, data: bytes) -> None:
        if self.content is not None:
            self.content[offset : offset + len(data)] = data

    def write(self) -> None:
        offset, length = self._range(20_000)
        data = bytes((self._source.byte() | 1,)) * length
        self.disk.write(offset, data)
        self._set(offset, data)
        if offset >> 9 == offset + length - 1 >> 9:
            assert self.disk.read(offset, length) == data, "a sector does not read as it was written"

    def write_many(self) -> None:
        n = self._source.byte() % 40 + 1
        start, length = self._range(3000)
        length = max(length, 1)  # also where the disk has nothing: then the batch is refused
        size = self.disk.size
        offsets = [(start + i * (length + self._source.byte())) % (max(size - length, 0) + 1) for i in range(n)]
        offsets = list({offset // length: offset // length * length for offset in offsets}.values())
        from array import array

        data = b"".join(bytes((i & 255,)) * length for i in range(len(offsets)))
        self.disk.write_batch(array("q", offsets), data)
        for i, offset in enumerate(offsets):
            self._set(offset, data[i * length : (i + 1) * length])
        found = bytearray(len(data))
        self.disk.read_batch(array("q", offsets), length, out=found)
        assert self.content is None or found == data, "a batch does not read as it was written"

    def write_compressed(self) -> None:
        offset, length = self._range(70_000)
        cluster = 1 << self._image.cluster_bits
        offset = offset & -cluster
        length = min(-(-length // cluster) * cluster, self.disk.size - offset)
        data = bytes((self._source.byte(), 1, 2)) * (length // 3 + 1)
        self.disk.write_compressed(offset, data[:length])
        self._set(offset, data[:length])

    def zero(self) -> None:
        offset, length = self._range(60_000)
        self.disk.write_zeroes(offset, length, unmap=bool(self._source.byte() & 1))
        self._set(offset, bytes(length))

    def discard(self) -> None:
        offset, length = self._range(60_000)
        self.disk.discard(offset, length)
        if self.content is not None:  # it may read as before, as zeroes, or as the backing file
            self.content[offset : offset + length] = self.disk.read(offset, length)

    def read(self) -> None:
        offset, length = self._range(60_000)
        data = self.disk.read(offset, length)
        assert self.content is None or data == self.content[offset : offset + length], "a range reads otherwise than before"

    def flush(self) -> None:
        self.disk.flush()

    def look(self) -> None:
        length = min(self.disk.size, _MOST_READ)
        table = self.disk.map(0, length)
        assert int(table["length"].sum()) == length
        assert sum(extent.length for extent in self.disk.extents(0, length)) == length
        self.disk.info()

    def create_snapshot(self) -> None:
        snapshot = self.disk.snapshots.create(f"s{self._source.byte() % 4}")
        self._kept[snapshot.id] = None if self.content is None else bytearray(self.content)

    def _snapshot(self) -> Any:
        found = list(self.disk.snapshots)
        return found[self._source.byte() % len(found)] if found else None

    def apply_snapshot(self) -> None:
        if (snapshot := self._snapshot()) is None:
            return
        kept = self._kept.get(snapshot.id)
        snapshot.apply()
        if self.content is None:
            return
        if kept is None:
            self._learn()
        else:
            self.content = bytearray(kept)
            self.compare()

    def delete_snapshot(self) -> None:
        if (snapshot := self._snapshot()) is not None:
            self._kept.pop(snapshot.id, None)
            snapshot.delete()

    def vm_state(self) -> None:
        self.disk.snapshots.write_vm_state(self._source.byte() << 9, b"v" * (512 * (self._source.byte() % 20 + 1)))
        self.disk.snapshots.read_vm_state(0, 512)

    def bitmap(self) -> None:
        kind = self._source.byte()
        found = list(self.disk.bitmaps)
        number = (kind >> 3) % (len(found) + 1)
        bitmap = found[number] if number < len(found) else None
        if bitmap is None:
            granularity = 512 << self._source.byte() % 8
            self.disk.bitmaps.add(f"b{kind}", granularity=granularity, persistent=bool(kind & 1))
            return
        match kind & 7:
            case 0:
                bitmap.remove()
            case 1:
                bitmap.clear()
            case 2:
                bitmap.enable()
            case 3:
                bitmap.disable()
            case 4:
                bitmap.merge(*found)
            case _:
                assert bitmap.count == sum(int(length) for length in bitmap.dirty_ranges()["length"])

    def resize(self) -> None:
        size = (self._source.short() << 5) + 512 & ~511
        self.disk.truncate(size, shrink=True)
        if self.content is not None:
            del self.content[size:]
            self.content += bytes(size - len(self.content))
            if self._image.has_backing:
                self._learn()

    def write_runs(self) -> None:
        offset, length = self._range(3000)
        runs: list[tuple[int, memoryview]] = []
        for _ in range(self._source.byte() % 30 + 1):
            if offset + length > self.disk.size:
                break
            runs.append((offset, memoryview(bytes((self._source.byte(),)) * length)))
            offset += length + (self._source.byte() << 4)
        self.disk.write_runs(runs)
        for start, data in runs:
            self._set(start, bytes(data))

    def amend(self) -> None:
        kind = self._source.byte()
        options: dict[str, Any] = {}
        match kind % 5:
            case 0:
                options["refcount_bits"] = 1 << (kind >> 4) % 7
            case 1 | 2:
                options["compat"] = "1.1" if kind & 16 else "0.10"
            case 3:
                options["lazy_refcounts"] = bool(kind & 16)
            case _ if kind & 16:
                options |= {"encrypt.state": "active", "encrypt.new-secret": SECRET, "encrypt.iter-time": 1}
            case _:
                options |= {"encrypt.state": "inactive", "encrypt.keyslot": (kind >> 5) % 3}
        node = self.disk.node
        typed = check_options("qcow2", options, table="amend")
        with graph.alone(node):
            node.check_amend(typed)
            node.amend(typed)

    def reopen(self) -> None:
        for read_only in (True, False):
            with graph.Transaction() as change:
                change.reopen(self.disk.node, read_only=read_only)

    def make_empty(self) -> None:
        node = self.disk.node
        if self._source.byte() & 1 and node.names_backing:
            with graph.alone(node):
                node.make_empty()
            if self.content is not None:
                self._learn()

    def change_backing(self) -> None:
        name = self._source.chosen((None, "base.raw", "a" * 600, "a" * 1023, "b"))
        node = self.disk.node
        if (name is None) != node.names_backing:
            with graph.alone(node):
                node.change_backing(name, "raw" if name else None)

    def check(self) -> None:
        with graph.alone(self.disk.node):
            report = self.disk.node.check()
        assert self.content is None or not report.corruptions, f"an open image has become corrupt: {report.findings}"

    def repair(self) -> None:
        with graph.alone(self.disk.node):
            self.disk.node.repair("all")


_REQUESTS: Final[tuple[Callable[[Written], None], ...]] = (
    Written.write,
    Written.write,
    Written.write_many,
    Written.write_compressed,
    Written.zero,
    Written.discard,
    Written.read,
    Written.flush,
    Written.look,
    Written.create_snapshot,
    Written.apply_snapshot,
    Written.delete_snapshot,
    Written.vm_state,
    Written.bitmap,
    Written.bitmap,
    Written.resize,
    Written.amend,
    Written.write_runs,
    Written.reopen,
    Written.make_empty,
    Written.change_backing,
    Written.check,
    Written.repair,
)
