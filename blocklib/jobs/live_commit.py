"""commit of a disk in use: what the images above a base hold is copied into the base, and they leave the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from blocklib import graph, status
from blocklib.copy import CopyState
from blocklib.jobs.chain_images import WrittenImage, overlay_of, shorten
from blocklib.jobs.control import Control, Task
from blocklib.jobs.convergence import DEFAULT_GRANULARITY, Convergence
from blocklib.jobs.dirty_copy import CopiedImage, DirtyCopy, ErrorPolicy, Errors, reading
from blocklib.records import Record
from blocklib.reports import CommitResult

if TYPE_CHECKING:
    from blocklib.disk import Disk
    from blocklib.node import Node

VERB: Final = "commit"


class ActiveCommit(Record, Task[CommitResult], frozen=False):
    """Of the top image, which may be written meanwhile: the disk is to continue on the base."""

    verb: ClassVar[str] = VERB

    disk: Disk
    base: Node
    policies: tuple[ErrorPolicy, ErrorPolicy]

    def claim(self) -> None:
        top = self.disk.node
        self._claim = graph.Claim(self.verb, graph.chain(top))
        end = _Base(top, self.base)
        self._work = Convergence(self.verb, top, end, end, self.policies, base=self.base)

    def run(self, control: Control) -> CommitResult:
        ended = self._work.run(control)
        return CommitResult(ended.bytes_copied, self.base.filename, ended.pivoted)

    def finalize(self, control: Control, result: CommitResult) -> CommitResult:
        copied = self._work.finalize(control, pivots=result.pivoted)
        self._claim.release()
        return CommitResult(result.bytes_copied + copied, result.base, result.pivoted)

    def abort(self) -> None:
        try:
            self._work.abort()
        finally:
            self._claim.release()


class _Base:
    """The base of an active commit: where the copy goes, and what says what there is to copy."""

    is_zero = False
    has_backing = False  # what is below it is open

    def __init__(self, top: Node, base: Node) -> None:
        self._top = top
        self._base = base
        self._old_size = base.size
        self._written: WrittenImage | None = None

    def open(self, size: int) -> WrittenImage:
        written = self._written = WrittenImage(VERB, self._top, self._base)
        try:
            written.grow_to(size)
        except BaseException:
            self.close()
            raise
        return written

    def close(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.give_back()

    def remove(self) -> None:
        """Nothing was made."""

    def become(self, filter: Node) -> None:
        top, base, written = self._top, self._base, self._written
        assert written is not None

        def take_over() -> None:  # what is closed after it may fail, but the disk is the base all the same
            self._written = None
            base.discard_passes, base.detect_zeroes = top.discard_passes, top.detect_zeroes

        with graph.Transaction() as change:
            written.hand_over(change)
            for edge in tuple(filter.parents):
                change.redirect(edge, base)
            change.when_done(take_over)

    def begin(self, state: CopyState) -> None:
        """Everything that is to be copied is found afterwards."""

    def mark(self, state: CopyState) -> None:
        _mark_held(state, self._top, self._base, self._old_size)

    def end(self, state: CopyState, *, succeeded: bool) -> None:
        """There is nobody to be told."""


class IntermediateCommit(Record, Task[CommitResult], frozen=False):
    """Of an image below the top one, and of those between it and the base."""

    verb: ClassVar[str] = VERB

    disk: Disk
    top: Node
    base: Node
    backing_file: str | None
    policies: tuple[ErrorPolicy, ErrorPolicy]

    def __post_init__(self) -> None:
        self._written: WrittenImage | None = None
        self._source: CopiedImage | None = None

    def claim(self) -> None:
        self._claim = graph.Claim(self.verb, graph.chain(self.disk.node))

    def run(self, control: Control) -> CommitResult:
        """Copy what the images hold."""
        top, base = self.top, self.base
        old_size = self._old_size = base.size
        written = self._written = WrittenImage(self.verb, self.disk.node, base)
        written.grow_to(top.size)
        source = self._source = CopiedImage(top, self.verb, base)
        unit = base.data_unit() or 1
        state = CopyState(top.size, max(DEFAULT_GRANULARITY, unit))
        errors = Errors(control, *self.policies)
        while not errors.attempt(lambda: reading(lambda: _mark_held(state, top, base, old_size))):
            control.pause_point()
        done = copied = 0
        while left := state.count():
            control.set_total(done + left)
            copy = DirtyCopy(control, state, source, written, unit=unit)
            errors.attempt(copy.sweep)
            done += copy.bytes_done
            copied += copy.bytes_read
        while not errors.attempt(written.flush):
            control.pause_point()
        return CommitResult(copied, base.filename)

    def finalize(self, control: Control, result: CommitResult) -> CommitResult:
        """Take the images that were committed out of the chain, of which nobody notices anything."""
        written, top = self._written, self.top
        assert written is not None
        overlay = overlay_of(self.disk.node, top)
        with graph.alone(overlay):
            hidden = min(overlay.size, self._old_size) - top.size
            if hidden > 0:  # behind the end of what lies between
                written.write_zeroes(top.size, hidden, unmap=True)
                written.flush()
            self._leave()  # first: it may fail, and then nothing has changed
            shorten(overlay, self.base, self.backing_file)
        self._claim.release()
        return result

    def _leave(self) -> None:
        source, self._source = self._source, None
        written, self._written = self._written, None
        try:
            if source is not None:
                source.release()
        finally:
            if written is not None:
                written.give_back()

    def abort(self) -> None:
        try:
            self._leave()
        finally:
            self._claim.release()


def _mark_held(state: CopyState, top: Node, base: Node, old_size: int) -> None:
    """Mark what the images from `top` down to above `base` hold, and zeroes that only the end of one of them makes."""
    for extent in status.extents(top, 0, top.size, base):
        length = extent.length if extent.present else min(extent.length, old_size - extent.offset) if extent.zero else 0
        if length > 0:
            state.mark(extent.offset, length)
