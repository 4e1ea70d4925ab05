"""rebase: give an overlay another backing file, or none, and keep what it reads as."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, ClassVar

from blocklib import graph
from blocklib.disk import Disk
from blocklib.errors import UnsupportedFeatureError, UsageError
from blocklib.jobs.block_copy import BlockCopy
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.ends import Concatenation, opened, same_file
from blocklib.jobs.job import Job, started
from blocklib.jobs.runs import COMPARE, SKIP, Run, coalesced, runs_above, runs_of, without_equal_zeroes, zipped
from blocklib.opening import open_disk
from blocklib.policy import PlainPath, qemu_target, resolve_backing_name
from blocklib.records import Record
from blocklib.reports import RebaseResult

if TYPE_CHECKING:
    from ssl import SSLContext

    from blocklib.crypto.secrets import Secret
    from blocklib.node import Node
    from blocklib.policy import References, Target
    from blocklib.throttling import ThrottleGroup


@started
def rebase(
    target: Disk | Target,
    backing: str | os.PathLike[str] | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    format: str | None = None,
    references: References = "deny",
    secrets: Mapping[str, Secret | SSLContext | ThrottleGroup] | None = None,
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[RebaseResult]:
    """Make `backing` (None: nothing) the backing file of `target`; the name is stored as given, relative to its folder.

    What `target` does not hold itself is compared between the old chain and the new one, and copied into `target` where it
    differs, so that it reads as before.  With `unsafe` only the name changes and neither chain is opened: right where the
    same image was moved, and loses data everywhere else.

    A `target` that is opened here needs `references` to open its old chain, and so does the new backing file for what
    it names.  With ``references="allow"`` a name is read as one in an image is, ``json:{...}`` included, whose options name
    `secrets` by their ids: so is an encrypted image opened.  When it is cancelled, `target` has its old backing file and
    reads as before.

    Raises UsageError, PolicyError, UnsupportedFeatureError (not an overlay's format), LockedError, StorageError.
    """
    if backing is not None and backing_format is None:
        raise UsageError("a backing file needs backing_format: guessing it is how a guest names a host file")
    if backing is None and backing_format is not None:
        raise UsageError("backing_format without a backing file")
    name = os.fspath(backing) if backing is not None else None
    task = _Rebase(target, name, backing_format, unsafe, format, references, secrets)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Rebase(Record, Task[RebaseResult]):
    verb: ClassVar[str] = "rebase"

    target: Disk | Target
    backing: str | None
    backing_format: str | None
    unsafe: bool
    format: str | None
    references: References
    secrets: Mapping[str, Secret | SSLContext | ThrottleGroup] | None

    def run(self, control: Control) -> RebaseResult:
        copied = 0
        with ExitStack() as stack:
            top = stack.enter_context(self._opened_target())
            node = top.node
            if not node.supports_backing:
                raise UnsupportedFeatureError(f"images of the format {node.driver} have no backing file")
            new = None
            if not self.unsafe:
                if self.backing is not None:
                    new = stack.enter_context(self._opened_backing(node, self.backing))
                control.set_total(top.size)
                copied = _copy_differences(control, top, new)
                top.flush()
            with graph.alone(node), graph.Transaction() as change:
                if isinstance(self.target, Disk) and not self.unsafe:
                    _exchange_backing(change, node, new)
                node.change_backing(self.backing, self.backing_format)
        return RebaseResult(bytes_copied=copied, backing=self.backing)

    def _opened_target(self) -> AbstractContextManager[Disk]:
        if self.unsafe and not isinstance(self.target, Disk):
            return open_disk(self.target, "r+", format=self.format, backing=None)
        return opened(self.target, "r+", format=self.format, references=self.references)

    def _opened_backing(self, node: Node, name: str) -> Disk:
        full_name = resolve_backing_name(node.filename or "", name)
        target = qemu_target(full_name) if self.references == "allow" else PlainPath(full_name)
        return open_disk(target, format=self.backing_format, references=self.references, secrets=self.secrets)


def _exchange_backing(change: graph.Transaction, node: Node, new: Disk | None) -> None:
    """Let an overlay that stays open read through its new chain."""
    edge = node.children.get("backing")
    if edge is not None:
        change.detach(edge)
    if new is not None:
        change.attach(node, "backing", new.node)


def _copy_differences(control: Control, top: Disk, new: Disk | None) -> int:
    """Copy into `top` what reads differently through `new`; the bytes copied."""
    shown = Concatenation([new] if new is not None else [], size=top.size)
    runs = without_equal_zeroes(_runs_in_question(top, new), runs_of(top, 0, top.size), shown.runs())
    block = top.node.data_unit() or 0
    copy = BlockCopy(control, top, top, block=block, unit=block or 1, shown=shown)
    copy.run(runs)
    return copy.bytes_written


def _runs_in_question(top: Disk, new: Disk | None) -> Iterator[Run]:
    """What `top` does not hold itself, to COMPARE; what comes from the very file that `new` is, is the same."""
    chain = top.chain()
    immediate = chain[1] if len(chain) > 1 else None
    absent = runs_above(top, 0, top.size, immediate, absent=COMPARE, absent_zero=COMPARE)
    filename = new.node.filename if new is not None else None
    same = next((image for image in chain[1:] if same_file(image.filename, filename)), None)
    if same is None:
        return coalesced((start, n, COMPARE if what == COMPARE else SKIP) for start, n, what in absent)
    between = runs_above(top, 0, top.size, same, absent=SKIP, absent_zero=COMPARE)
    return coalesced(
        (start, n, COMPARE if own == COMPARE and what != SKIP else SKIP) for start, n, own, what in zipped(absent, between)
    )
