"""Copying a disk in use until both are equal, keeping them so, and ending in one moment: mirror and commit of the top image."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from blocklib import graph
from blocklib.copy import CopyState
from blocklib.errors import BlocklibError, OutOfRangeError
from blocklib.jobs.convert import SPARSE_SIZE
from blocklib.jobs.dirty_copy import CopiedImage, DirtyCopy, ErrorPolicy, Errors, Placement, plain_errors, reading
from blocklib.jobs.tops import MirrorTop, Target
from blocklib.sizes import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blocklib.jobs.control import Control
    from blocklib.node import Node

DEFAULT_GRANULARITY: Final = 64 * KiB
_SMALL_REST: Final = 16 * MiB
"""What may be left to copy while nobody can write: with no more than that, a job is ready."""
_IDLE_SECONDS: Final = 0.1


class Copy(Target, Protocol):
    """What the copy is written to."""

    @property
    def node(self) -> Node: ...
    @property
    def size(self) -> int: ...
    def write_runs(self, runs: Sequence[tuple[int, memoryview]], /, *, placed: Callable[[], None]) -> None: ...
    def flush(self) -> None: ...


class End(Protocol):
    """Where the copy goes."""

    @property
    def is_zero(self) -> bool:
        """Whether it reads as zero everywhere to begin with."""

    @property
    def has_backing(self) -> bool:
        """Whether something that is not open shows through it."""

    def open(self, size: int, /) -> Copy:
        """Make or open it, for so many bytes."""

    def close(self) -> None:
        """Undo `open`, unless a disk has become the copy."""

    def remove(self) -> None:
        """Remove what was made, unless a disk has become it."""

    def become(self, filter: Node, /) -> None:
        """Let all who use the disk, which they reach through `filter`, use the copy.  The graph is drained."""


class Beginning(Protocol):
    """What is copied to begin with."""

    def begin(self, state: CopyState, /) -> None:
        """At the instant from which on writes are noticed; the disk is drained."""

    def mark(self, state: CopyState, /) -> None:
        """Mark what else is to be copied; requests may be on their way."""

    def end(self, state: CopyState, /, *, succeeded: bool) -> None:
        """The copy has ended, or failed."""


class Ended(NamedTuple):
    """Bytes that were read and copied, and whether the disk has become the copy."""

    bytes_copied: int
    pivoted: bool


class Convergence:
    """Copies `top`, a disk's top image, which may be written meanwhile, to `end`.

    With `base` only what the images above that hold.
    """

    def __init__(
        self,
        job: str,
        top: Node,
        end: End,
        beginning: Beginning,
        policies: tuple[ErrorPolicy, ErrorPolicy],
        *,
        base: Node | None = None,
        blocking: bool = False,
        granularity: int | None = None,
        in_flight: int | None = None,
        unmap: bool = True,
    ) -> None:
        self._job = job
        self._top = top
        self._base = base
        self._end = end
        self._beginning = beginning
        self._blocking = blocking
        self._granularity = granularity
        self._in_flight = in_flight
        self._unmap = unmap
        self._policies = policies
        self._failures: list[BlocklibError] = []
        self._state: CopyState | None = None
        self._source: CopiedImage | None = None
        self._placement: Placement | None = None
        self._target: Copy | None = None

    def run(self, control: Control) -> Ended:
        """Copy until little is left and the end was asked for.  Raises OutOfRangeError where the target is too small."""
        top = self._top
        target = self._target = self._end.open(top.size)
        if target.size < top.size:
            raise OutOfRangeError(f"the target has {target.size} bytes, the disk {top.size}")
        granularity = self._granularity or max(DEFAULT_GRANULARITY, target.node.data_unit() or 1)
        if self._end.has_backing:  # a cluster over a backing file, which is not open, is copied as a whole or not at all
            granularity = max(granularity, target.node.cluster_size() or 1)
        state = self._state = CopyState(top.size, granularity)
        source = self._source = CopiedImage(top, self._job, self._base)
        self._begin(control, state, source, target)
        errors = Errors(control, *self._policies)
        while not errors.attempt(lambda: reading(lambda: self._beginning.mark(state))):
            control.pause_point()
        return self._copy(control, errors, state, source, target)

    def _begin(self, control: Control, state: CopyState, source: CopiedImage, target: Copy) -> None:
        """From now on what is written is marked, or copied."""
        top = self._top
        around = self._new_copy(control, state, source, target)
        self._filter = MirrorTop(
            self._job,
            top.filename,
            state,
            read_only=top.read_only,
            target=target if self._blocking and not self._end.has_backing else None,
            copy=around.copy_around if self._blocking and self._end.has_backing else None,
            failed=self._failures.append,
        )
        with graph.alone(top):
            self._placement = Placement(self._filter, top)
            self._beginning.begin(state)

    def _copy(self, control: Control, errors: Errors, state: CopyState, source: CopiedImage, target: Copy) -> Ended:
        # A writer of ours may have put something there already.
        zero_known = self._end.is_zero and not self._blocking
        done = copied = 0
        swept = False
        while True:
            left = state.count()
            with control.changed:
                ready = control.status == "ready"
                if not ready and left <= (_SMALL_REST if swept else 0):
                    control.become("ready")
                    ready = True
                ending = ready and (control.completing or control.keeping)
            if ending and left <= _SMALL_REST:
                # Here an error may still stop the job, or make it try again; in `finalize` it is too late for that.
                rest = self._new_copy(control, state, source, target)
                if errors.attempt(partial(self._equal, rest, target)):
                    return Ended(copied + rest.bytes_read, control.completing)
                copied += rest.bytes_read
                control.pause_point()
                continue
            control.set_total(done + left)
            if left:
                copy = self._new_copy(control, state, source, target, zero_known=zero_known)
                swept = errors.attempt(copy.sweep) or swept
                done += copy.bytes_done
                copied += copy.bytes_read
                zero_known = False  # what is copied again may have been something else before
            else:
                control.pause_point()
                with control.changed:  # who steers the job wakes it at once; what is written meanwhile can wait
                    if not (control.completing or control.keeping or control.stop_requested):
                        control.clock.wait(control.changed, _IDLE_SECONDS)
            self._raise_failures(errors)

    def _new_copy(
        self, control: Control, state: CopyState, source: CopiedImage, target: Copy, *, zero_known: bool = False
    ) -> DirtyCopy:
        unit = target.node.data_unit() or 1
        block = max(unit, SPARSE_SIZE) if zero_known else 0
        return DirtyCopy(
            control,
            state,
            source,
            target,
            block=block,
            zero_known=zero_known,
            unit=unit,
            in_flight=self._in_flight,
            unmap=self._unmap,
        )

    def _equal(self, rest: DirtyCopy, target: Copy) -> None:
        """Make both equal for a moment, in which nobody writes."""
        with graph.alone(self._top):
            rest.finish()
            target.flush()

    def _raise_failures(self, errors: Errors) -> None:
        while self._failures:
            failure = self._failures.pop()

            def fail(failure: BlocklibError = failure) -> None:
                raise failure

            errors.attempt(fail)

    def finalize(self, control: Control, *, pivots: bool) -> int:
        """Copy what was written since, and end in the same moment; the bytes read."""
        state, source, target = self._state, self._source, self._target
        assert state is not None
        assert source is not None
        assert target is not None
        copied = 0
        with plain_errors():
            while state.count() > _SMALL_REST:
                copy = self._new_copy(control, state, source, target)
                copy.sweep()
                copied += copy.bytes_read
            rest = self._new_copy(control, state, source, target)
            with graph.alone(self._top):
                if state.any():
                    rest.finish()
                    target.flush()
                if pivots:
                    self._end.become(self._filter)
                self._take_away()
        self._forget_source()
        self._beginning.end(state, succeeded=True)
        self._end.close()
        return copied + rest.bytes_read

    def _take_away(self) -> None:
        placement, self._placement = self._placement, None
        if placement is not None:
            placement.take_away()

    def _forget_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.release()

    def abort(self) -> None:
        """Undo what was done, as far as it was."""
        with ExitStack() as stack:  # all of it, in reverse order, whatever fails
            stack.callback(self._end.remove)
            stack.callback(self._end.close)
            if self._state is not None:
                stack.callback(self._beginning.end, self._state, succeeded=False)
            stack.callback(self._forget_source)
            if self._placement is not None:
                stack.enter_context(graph.alone(self._top))
                stack.callback(self._take_away)
