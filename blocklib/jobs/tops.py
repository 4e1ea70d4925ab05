"""The filter that a mirror, or a commit, puts above the disk that it copies, to hear of what is written to it.

It is no driver: nobody but a job can make one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from blocklib.copy import CopyState
from blocklib.errors import BlocklibError, GraphConflictError
from blocklib.node import Preallocation
from blocklib.passing import PassingFilter


class Target(Protocol):
    """What a job copies to: a disk."""

    def write(self, offset: int, data: memoryview, /) -> None: ...
    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None: ...


class _CopiedNode(PassingFilter):
    """A disk that a job is copying keeps its size."""

    driver = ""
    sees_writes: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = True

    def __init__(self, job: str, filename: str | None, state: CopyState, *, read_only: bool) -> None:
        super().__init__(None, filename, read_only=read_only)
        self.state = state
        self._job = job

    def check_resize(self, size: int, preallocation: Preallocation) -> None:
        self._refuse_resize()

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self._refuse_resize()

    def _refuse_resize(self) -> None:
        raise GraphConflictError(
            f"{self.filename or self.name}: the disk is being copied by a {self._job} job and keeps its size",
            other=self._job,
            node=self.name,
        )


class MirrorTop(_CopiedNode):
    """Marks what is written, to be copied afterwards; or, with a `target`, writes it there as well before it answers.

    With `copy`, which is given a range (offset, length), what was marked is copied before the answer.  `failed` is told of
    errors of the target, which the writer does not see.
    """

    driver = "mirror"

    def __init__(
        self,
        job: str,
        filename: str | None,
        state: CopyState,
        *,
        read_only: bool,
        target: Target | None = None,
        copy: Callable[[int, int], None] | None = None,
        failed: Callable[[BlocklibError], object],
    ) -> None:
        super().__init__(job, filename, state, read_only=read_only)
        self._target = target
        self._copy = copy
        self._failed = failed

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        length = sum(len(view) for view in views)

        def copy(target: Target) -> None:
            at = offset
            for view in views:
                target.write(at, view)
                at += len(view)

        self._change(offset, length, lambda: super(MirrorTop, self).write_special(offset, place, views), copy)

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        self._change(
            offset,
            len(data),
            lambda: super(MirrorTop, self).pass_packed(offset, data, packed, unit),
            lambda target: target.write(offset, data),
        )

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self._change(
            offset,
            length,
            lambda: super(MirrorTop, self).zero_range(offset, length, unmap=unmap),
            lambda target: target.write_zeroes(offset, length, unmap=unmap),
        )

    def discard_range(self, offset: int, length: int) -> None:
        # What a discarded range reads as is the driver's choice: it is looked at afterwards.
        try:
            super().discard_range(offset, length)
        finally:
            self.state.mark(offset, length)

    def _change(self, offset: int, length: int, change: Callable[[], None], copy: Callable[[Target], None]) -> None:
        if self._target is None:
            try:
                change()
            finally:  # whatever of it has been written
                self.state.mark(offset, length)
            if self._copy is not None:
                try:
                    self._copy(offset, length)
                except BlocklibError as error:  # and it is marked again
                    self._failed(error)
            return
        with self.state.reserved(offset, length):
            try:
                change()
            except BaseException:
                self.state.mark(offset, length)
                raise
            try:
                copy(self._target)
            except BlocklibError as error:
                self.state.mark(offset, length)
                self._failed(error)
