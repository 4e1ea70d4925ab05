"""One request of a workload fails, whichever it is: what must be true then, for any workload.

A workload is done by a `Session`, which keeps what its disk must read as.  Files stand below the filter blkdebug; those that
flushes would go to are told to ignore them, since what a lost machine loses is the matter of tests/crash.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pytest

import blocklib
from blocklib.disk import Disk
from blocklib.errors import BlocklibError, PoisonedError, StorageError
from blocklib.filters.blkdebug import BlkdebugNode
from blocklib.node import Node

Effect = Callable[[bytearray], object]
Rules = Sequence[Mapping[str, Any]]


class Fault(NamedTuple):
    """What becomes of the request."""

    name: str
    errno: int
    short: int | None = None

    def rule(self, number: int, *, truncations: bool) -> dict[str, Any]:
        rule: dict[str, Any] = {"event": "none", "once": True, "skip": number, "errno": self.errno}
        if self.short is not None:
            rule["short"] = self.short
        if truncations:
            rule["iotype"] = "truncate"
        return rule


FAULTS: Final = (
    Fault("EIO", errno.EIO),
    Fault("ENOSPC", errno.ENOSPC),
    Fault("short, then EIO", errno.EIO, 512),
    Fault("short, then ENOSPC", errno.ENOSPC, 1536),
)
OPERATIONS: Final = frozenset({"read", "write", "write-zeroes", "discard", "flush", "truncate"})


class EndedError(Exception):
    """The image is poisoned: the session is over."""


def file_options(path: Path, rules: Rules = ()) -> dict[str, Any]:
    """A file whose requests fail by rules."""
    image = {"driver": "file", "filename": str(path), "cache.no-flush": True}
    return {"driver": "blkdebug", "inject-error": list(rules), "image": image}


@dataclass(frozen=True)
class Workload:
    """`make` makes the files of a folder; `work` does what is to be done with the disk that `target` describes."""

    name: str
    make: Callable[[Path], None]
    target: Callable[[Path, Mapping[str, Rules]], dict[str, Any]]
    work: Callable[[Session], None]
    parts: tuple[str, ...] = ("top",)
    """The files of the folder, each by the name that `target` is given rules for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ("top",)
    """Those of the files that are qcow2 images, and have to be sound afterwards."""
    repairs: bool = False
    """They are damaged before: afterwards it must be possible to repair them."""


class Session:
    """The work on one copy of the files, with a fault in one of them."""

    def __init__(
        self,
        workload: Workload,
        folder: Path,
        part: str = "",
        rules: Rules = (),
        tell: Callable[[str], object] = lambda _what: None,
    ) -> None:
        """`tell` hears "begun" before each step, and "flushed" when all that was done before is durable."""
        self.workload = workload
        self.tell = tell
        self.qemu_img: str | None = None
        """The program that looks at what is left, too."""
        self.folder = folder
        self.part = part
        self.rules = rules
        self.errno = rules[0]["errno"] if rules else 0
        self.errors: list[StorageError] = []
        self.nodes: list[BlkdebugNode] = []
        self.snapshots: dict[str, bytes] = {}
        self.poisoned = False
        self.disk = self._open()
        self.model = bytearray(self.read())
        self.possible: list[bytes] = [bytes(self.model)]
        """What the disk may read as after a crash: as at the last flush, or as any time since."""
        self.contents: list[bytes] = [bytes(self.model)]
        """What it was at the beginning, and what each step was to make of it."""

    # -- opening and closing ------------------------------------------------------------------------------------------

    def _open(self) -> Disk:
        for attempt in range(2):
            try:
                return self.open_with({} if attempt or self.errors or not self.rules else {self.part: self.rules_now()})
            except StorageError as exc:
                self._note(exc)
        raise AssertionError("it cannot be opened again")

    def rules_now(self) -> Rules:
        """The rules for a file that is opened again: requests that were made before count."""
        before = sum(node.matched[0] for node in self.nodes)
        return [{**rule, "skip": max(rule["skip"] - before, 0)} for rule in self.rules]

    def open_other(self, name: str, mode: Literal["r", "r+"] = "r", **options: Any) -> Disk:
        """Another image of the folder; its requests may be those that fail."""
        rules = self.rules_now() if self.part == name and not self.errors else ()
        try:
            disk = blocklib.open({"driver": "qcow2", "file": file_options(self.folder / name, rules), **options}, mode)
        except StorageError as exc:
            self._note(exc)
            return self.open_other(name, mode, **options)
        self._keep_nodes(disk)
        return disk

    def _keep_nodes(self, disk: Disk) -> None:
        self.nodes += (node for node in _below(disk.node) if isinstance(node, BlkdebugNode) and node.matched)

    def open_with(self, rules: Mapping[str, Rules]) -> Disk:
        """The disk of the workload; its faulty node, if it has one, is kept."""
        target = self.workload.target(self.folder, rules)
        disk = blocklib.open(target, "r+", references="allow", discard="unmap", **self.workload.options)
        if rules:
            self._keep_nodes(disk)
        return disk

    def reopen(self) -> None:
        try:
            self.disk.close()
            self._is_durable()
        except StorageError as exc:  # then it is closed all the same, and something may be lost
            self._note(exc)
        self.disk = self._open()
        self._adopt()

    def _adopt(self) -> None:
        """Take the disk as it is found, if it may be so."""
        found = self.read()
        assert_possible(found, self.possible)
        self.model[:] = found

    def read(self) -> bytes:
        """All of the disk."""
        try:
            return self.disk.read(0, self.disk.size)
        except StorageError as exc:
            self._note(exc)
            return self.disk.read(0, self.disk.size)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(
        self,
        request: Callable[[Disk], object],
        effect: Effect | None = None,
        *,
        done_already: type[BlocklibError] | tuple[type[BlocklibError], ...] = (),
    ) -> None:
        """Make a request, once more if it fails; `effect` is what it does to the content.

        With `done_already` that error says on the second attempt that the first one had done it after all.
        """
        before, after = bytes(self.model), bytearray(self.model)
        if effect is not None:
            effect(after)
        self.contents.append(bytes(after))
        self.tell("begun")
        for attempt in range(2):
            try:
                request(self.disk)
                break
            except PoisonedError:
                self._refuses_everything(after)
            except StorageError as exc:
                self._note(exc)  # which takes one error and no more
                if _is_poisoned(self.disk.node):
                    self._refuses_everything(after)
                self.possible.append(bytes(after))
                assert_possible(self.disk.read(0, self.disk.size), [before, bytes(after)])
            except done_already:
                assert attempt == 1
                break
        self.model[:] = after
        self.possible.append(bytes(after))

    def write(self, offset: int, data: bytes) -> None:
        self.step(lambda disk: disk.write(offset, data), lambda content: _put(content, offset, data))

    def zero(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.step(
            lambda disk: disk.write_zeroes(offset, length, unmap=unmap), lambda content: _put(content, offset, bytes(length))
        )

    def discard(self, offset: int, length: int) -> None:
        """Of whole clusters."""
        self.step(lambda disk: disk.discard(offset, length), lambda content: _put(content, offset, bytes(length)))

    def batch(self, offsets: Sequence[int], data: bytes) -> None:
        length = len(data) // len(offsets)

        def effect(content: bytearray) -> None:
            for number, offset in enumerate(offsets):
                _put(content, offset, data[number * length : (number + 1) * length])

        self.step(lambda disk: disk.write_batch(offsets, data), effect)

    def runs(self, runs: Sequence[tuple[int, bytes]]) -> None:
        def effect(content: bytearray) -> None:
            for offset, data in runs:
                _put(content, offset, data)

        self.step(lambda disk: disk.write_runs([(offset, memoryview(data)) for offset, data in runs]), effect)

    def compressed(self, offset: int, data: bytes) -> None:
        self.step(lambda disk: disk.write_compressed(offset, data), lambda content: _put(content, offset, data))

    def resize(self, size: int, **keywords: Any) -> None:
        def effect(content: bytearray) -> None:
            if size < len(content):
                del content[size:]
            content.extend(bytes(size - len(content)))

        self.step(lambda disk: disk.truncate(size, shrink=True, **keywords), effect)

    def flush(self) -> None:
        self.step(lambda disk: disk.flush())
        self._is_durable()

    def _is_durable(self) -> None:
        self.possible = [bytes(self.model)]
        self.tell("flushed")

    def snapshot(self, name: str) -> None:
        kept = self.snapshots.setdefault(name, bytes(self.model))
        assert kept == self.model
        self.step(lambda disk: disk.snapshots.create(name), done_already=blocklib.UsageError)

    def apply(self, name: str) -> None:
        def effect(content: bytearray) -> None:
            content[:] = self.snapshots[name]

        self.step(lambda disk: disk.snapshots[name].apply(), effect)

    def delete(self, name: str) -> None:
        self.step(lambda disk: disk.snapshots[name].delete(), done_already=blocklib.NameNotFoundError)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _note(self, exc: StorageError) -> None:
        """An error has reached the caller: it says what it was, and there is only one."""
        self.errors.append(exc)
        assert len(self.errors) == 1, f"it fails twice: {self.errors}"
        assert exc.errno == self.errno, exc
        assert exc.node, exc
        cause = exc.__cause__ if isinstance(exc, blocklib.BatchError) else exc
        assert isinstance(cause, StorageError)
        assert cause.operation in OPERATIONS or "injected" not in str(cause), cause.operation

    def _refuses_everything(self, after: bytearray) -> None:
        """No flush pretends anything, whatever comes."""
        self.poisoned = True
        self.possible.append(bytes(after))
        for node in tuple(_below(self.disk.node)):
            for _ in range(2 if node.poisoned is not None else 0):
                with pytest.raises(PoisonedError):
                    node.flush()
        if self.disk.node.poisoned is not None:
            for request in (self.disk.flush, lambda: self.disk.write(0, b"x")):
                with pytest.raises(PoisonedError):
                    request()
        with pytest.raises(BlocklibError):
            self.disk.close()
        raise EndedError

    def end(self) -> None:
        """Close the disk, and look at what is left."""
        if not self.disk.closed:
            try:
                self.disk.close()
                self.possible = [bytes(self.model)]
            except PoisonedError:
                self.poisoned = True
            except StorageError as exc:
                self._note(exc)
        self._assert_sound()
        with self.open_with({}) as disk:
            assert_possible(disk.read(0, disk.size), self.possible)
            names = [snapshot.name for snapshot in disk.snapshots]
            disk.write(disk.size // 2, b"life goes on")
            disk.flush()
        self._assert_sound()
        for name in names:
            self._assert_snapshot(name)

    def judge_what_is_left(self, begun: int, flushed: int, reference: Session) -> None:
        """The same of a session in another process, which was killed when it had begun so many steps, and flushed so many.

        `reference` has done the same, to its end.
        """
        self.possible = reference.contents[flushed : begun + 1]
        self.snapshots = reference.snapshots
        self.disk.abandon()
        self.end()

    def _assert_sound(self) -> None:
        """Nothing worse than leaks, once a dirty image has been opened for writing."""
        for name in self.workload.images:
            path = self.folder / name
            if blocklib.info(path, format="qcow2").dirty:
                self.open_with({}).close()
            if self.workload.repairs:
                blocklib.repair(path, "all", format="qcow2")
            report = blocklib.check(path, format="qcow2")
            wrong = [finding for finding in report.findings if finding.kind != "leak"]
            if blocklib.info(path, format="qcow2").format_specific["compat"] == "0.10":
                # Where no bit says that something has been cut short, a flag may be missing: it costs a copy.
                wrong = [finding for finding in wrong if finding.expected != "copied flag set"]
            assert not wrong, (name, wrong)
            assert not report.check_errors
            self._ask_qemu(name)

    def _ask_qemu(self, name: str) -> None:
        """What QEMU finds: leaks at worst.  It is not asked for secrets, nor of version 2, where it minds missing flags."""
        facts = blocklib.info(self.folder / name, format="qcow2")
        if self.qemu_img is None or facts.encrypted or facts.format_specific["compat"] == "0.10":
            return
        command = [self.qemu_img, "check", "-q", "-f", "qcow2", name]
        done = subprocess.run(command, cwd=self.folder, check=False, capture_output=True)
        assert done.returncode in (0, 3), done.stdout + done.stderr

    def _assert_snapshot(self, name: str) -> None:
        target = self.workload.target(self.folder, {})
        with blocklib.open(
            {**target, "snapshot.name": name}, format=None, references="allow", **self.workload.options
        ) as disk:
            assert disk.read(0, disk.size) == self.snapshots[name]


def _put(content: bytearray, offset: int, data: bytes) -> None:
    content[offset : offset + len(data)] = data


def _below(node: Node) -> Iterator[Node]:
    yield node
    for edge in node.children.values():
        yield from _below(edge.node)


def _is_poisoned(node: Node) -> bool:
    return any(found.poisoned is not None for found in _below(node))


def assert_possible(found: bytes, contents: Sequence[bytes]) -> None:
    """Each sector is as in one of `contents`, or turns from one into another, and the size is that of one."""
    assert len(found) in {len(content) for content in contents}
    if found in contents:
        return
    for start in range(0, len(found), 512):
        sector = found[start : start + 512]
        choices = {content[start : start + 512].ljust(len(sector), b"\0") for content in contents}
        if sector not in choices:  # a short write may have ended in the middle of it
            begun = max(_common(sector, choice) for choice in choices)
            left = max(_common(sector[::-1], choice[::-1]) for choice in choices)
            assert begun + left >= len(sector), f"the sector at {start} reads {sector[:16]!r}"


def _common(first: bytes, second: bytes) -> int:
    return next((index for index, (one, other) in enumerate(zip(first, second)) if one != other), min(len(first), len(second)))


def fresh_copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


class Outcome(NamedTuple):
    """How one session with a fault went."""

    fault: str
    part: str
    number: int
    operation: str | None
    """Which operation the caller was told of."""
    poisoned: bool


def count_requests(workload: Workload, made: Path, folder: Path, part: str, *, truncations: bool) -> int:
    """How many requests a session makes of a file, with nothing wrong."""
    rule = {**Fault("none", 0).rule(0, truncations=truncations), "once": False}
    session = Session(workload, fresh_copy(made, folder), part, [rule])
    workload.work(session)
    session.end()
    assert not session.errors
    return sum(node.matched[0] for node in session.nodes)


def run_one(
    workload: Workload,
    made: Path,
    folder: Path,
    part: str,
    fault: Fault,
    number: int,
    *,
    truncations: bool,
    qemu_img: str | None = None,
) -> Outcome:
    """A session in which that request of that file fails."""
    session = Session(workload, fresh_copy(made, folder), part, [fault.rule(number, truncations=truncations)])
    session.qemu_img = qemu_img
    try:
        workload.work(session)
    except EndedError:
        pass
    session.end()
    error = session.errors[0] if session.errors else None
    return Outcome(fault.name, part, number, error.operation if error else None, session.poisoned)
