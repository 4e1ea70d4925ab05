"""copy-before-write: what is about to be overwritten is copied first, so that the copy is the disk of one instant."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from blocklib.buffers import PIECE
from blocklib.copy import CopyState
from blocklib.errors import BlocklibError, GraphConflictError, OptionError, OutOfRangeError, ReadOnlyError, StorageError
from blocklib.node import CONSISTENT_READ, WRITE, WRITE_UNCHANGED, Preallocation
from blocklib.passing import PassingFilter
from blocklib.sizes import KiB
from blocklib.tracking import tracking_of

if TYPE_CHECKING:
    from blocklib.graph import Edge

_LEAST_GRANULARITY: Final = 64 * KiB


class CopyBeforeWriteNode(PassingFilter):
    """The child "file", which is copied to the child "target" piece by piece, each before it is changed for the first time.

    `state` says what is still as it was when the filter came to stand there, and has not been copied: all of the disk, or what
    a bitmap marks.  A job that copies it besides works from the same state.  Where a copy fails, the write that waits for it
    fails; or, if the filter `breaks_snapshot`, the copy is of no use any more, and `failure` says why.
    """

    driver = "copy-before-write"
    sees_writes: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = True

    state: CopyState

    def __init__(
        self,
        name: str | None,
        filename: str | None,
        *,
        read_only: bool,
        breaks_snapshot: bool = False,
        timeout: float = 0,
        bitmap: tuple[str | None, str] | None = None,
        job: str | None = None,
    ) -> None:
        """`bitmap` is (node name or None for the top image, name).  With `job`, which marks what is to be copied, nothing is at
        first, and the disk keeps its size."""
        super().__init__(name, filename, read_only=read_only)
        self.breaks_snapshot = breaks_snapshot
        self.failure: BlocklibError | None = None
        self._timeout = timeout
        self._bitmap = bitmap
        self._job = job
        self._behind: set[threading.Thread] = set()  # copies that nobody waits for any more
        self._lock = threading.Lock()  # guards it

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """Raises OptionError for a bitmap without a name."""
        node, name = options["bitmap.node"], options["bitmap.name"]
        if name is None and node is not None:
            raise OptionError(f"{cls.driver}: bitmap.node needs bitmap.name", option="bitmap.name", driver=cls.driver)
        return super().from_options(
            options,
            read_only=read_only,
            breaks_snapshot=options["on-cbw-error"] == "break-snapshot",
            timeout=options["cbw-timeout"],
            bitmap=(node, name) if name is not None else None,
            **extra,
        )

    @property
    def target(self) -> Edge:
        """The child that is copied to."""
        return self.children["target"]

    def load(self) -> None:
        """Raises OutOfRangeError for a target that is smaller, GraphConflictError, ReadOnlyError; NameNotFoundError, UsageError
        (the bitmap)."""
        target = self.target.node
        name = target.filename or target.name
        if self.target.top_image() is self.file.top_image():
            raise GraphConflictError(f"{name}: a disk is not copied onto itself", other=target.name)
        if target.size < self.size:
            raise OutOfRangeError(f"{name}: the target has {target.size} bytes, the disk {self.size}", node=target.name)
        if target.read_only and not self.read_only:
            raise ReadOnlyError(f"{name}: the target is open for reading only", node=target.name)
        # A cluster of the target is copied as a whole, and never completed with what is below the target.
        self.state = CopyState(self.size, max(_LEAST_GRANULARITY, target.cluster_size() or 1))
        if self._bitmap is not None:
            tracking = tracking_of(self.file.find_image(self._bitmap[0]) or self.file.top_image())
            self.state.merge(tracking.copy(tracking.get(self._bitmap[1])))
        elif self._job is None:
            self.state.mark(0, self.size)

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        if child_name == "target":
            return 0 if read_only else WRITE, CONSISTENT_READ | WRITE_UNCHANGED
        return wanted | CONSISTENT_READ, shared

    # -- before something changes -------------------------------------------------------------------------------------

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self._keep(offset, sum(len(view) for view in views))
        super().write_special(offset, place, views)

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        self._keep(offset, len(data))
        super().pass_packed(offset, data, packed, unit)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self._keep(offset, length)
        super().zero_range(offset, length, unmap=unmap)

    def discard_range(self, offset: int, length: int) -> None:
        self._keep(offset, length)
        super().discard_range(offset, length)

    def check_resize(self, size: int, preallocation: Preallocation) -> None:
        if self._job is not None:
            raise GraphConflictError(
                f"{self.filename or self.name}: the disk is being copied by a {self._job} job and keeps its size",
                other=self._job,
                node=self.name,
            )

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        if size < self.size:
            self._keep(size, self.size - size)
        super().truncate(size, preallocation)

    def _keep(self, offset: int, length: int) -> None:
        """Copy what of a range is still to be copied.  Raises what that raises, unless the snapshot may break."""
        length = min(length, self.state.size - offset)
        if self.failure is not None or length <= 0 or not self.state.concerns(offset, length):
            return
        try:
            if self._timeout:
                self._copy_in_time(offset, length)
            else:
                self._copy(offset, length)
        except BlocklibError as error:
            if not self.breaks_snapshot:
                raise
            self.failure = error

    def _copy(self, offset: int, length: int) -> None:
        granularity = self.state.granularity
        buffer = memoryview(bytearray(min(PIECE, (length // granularity + 2) * granularity)))
        with self.state.taken(offset, length) as taken:
            for start, n in taken:
                for position in range(start, start + n, len(buffer)):
                    self._copy_part(position, min(len(buffer), start + n - position), buffer)

    def _copy_part(self, offset: int, length: int, buffer: memoryview) -> None:
        for start, n, is_zero in self.file.runs(offset, length):
            if is_zero:
                self.target.write_zeroes(start, n, unmap=True)
            else:
                view = buffer[:n]
                self.file.read(start, view)
                self.target.write(start, (view,))

    # -- for so long and no longer ------------------------------------------------------------------------------------

    def _copy_in_time(self, offset: int, length: int) -> None:
        """The same, by a thread that goes on for itself after the timeout.  Raises StorageError (ETIMEDOUT) then."""
        failures: list[BaseException] = []
        thread = threading.Thread(target=lambda: _noting(lambda: self._copy(offset, length), failures), daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            with self._lock:
                self._behind = {other for other in self._behind if other.is_alive()} | {thread}
            raise StorageError(
                f"{self.filename or self.name}: {length} bytes at {offset} were not copied in {self._timeout} seconds",
                errno=errno.ETIMEDOUT,
                operation="copy before write",
                node=self.name,
            )
        if failures:
            raise failures[0]

    def settle(self) -> None:
        with self._lock:
            behind, self._behind = self._behind, set()
        for thread in behind:
            thread.join()

    def close(self) -> None:
        self.settle()

    def abandon(self) -> None:
        self.settle()


def _noting(work: Callable[[], None], failures: list[BaseException]) -> None:
    try:
        work()
    except BaseException as error:  # raised again by who waits, if anybody still does
        failures.append(error)
