"""blkverify: two children that must have the same content, compared as they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from blocklib.buffers import PIECE, first_difference
from blocklib.errors import BlocklibError, ImageCorruptError, OutOfRangeError
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Preallocation
from blocklib.passing import PassingFilter

if TYPE_CHECKING:
    from blocklib.graph import Edge

_SECTOR: Final = 512


class BlkverifyNode(PassingFilter):
    """The child "raw", which is right, and the child "test", which is put to the test; as in QEMU, whose names these are.

    Reads come from both and must be equal, writes and zeroes go to both.  Discards go to neither, since drivers may choose what
    a discarded range reads as.  A difference is an ImageCorruptError that says where it begins.
    """

    driver = "blkverify"
    main_option: ClassVar[str] = "raw"
    sees_reads: ClassVar[bool] = True
    sees_writes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    @property
    def test(self) -> Edge:
        """The child that is put to the test."""
        return self.children["test"]

    def load(self) -> None:
        """Raises OutOfRangeError for children of different sizes."""
        sizes = self.size, self.test.size
        if -(-sizes[0] // _SECTOR) != -(-sizes[1] // _SECTOR):  # a format has whole sectors, a file need not
            raise OutOfRangeError(f"blkverify: raw has {sizes[0]} bytes and test {sizes[1]}", node=self.name)

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        if child_name == "test":
            return CONSISTENT_READ | (wanted & (WRITE | RESIZE)), CONSISTENT_READ
        return wanted | CONSISTENT_READ, shared

    # -- requests -----------------------------------------------------------------------------------------------------

    def read_special(self, offset: int, view: memoryview) -> bool:
        # A write must not come between the two reads.
        held = self.write_ranges.acquire(offset, offset + len(view), exclusive=False)
        try:
            self.file.read(offset, view)
            other = memoryview(bytearray(min(len(view), PIECE)))
            for start in range(0, len(view), len(other) or 1):
                part = view[start : start + len(other)]
                self._compare(offset + start, part, other[: len(part)])
        finally:
            self.write_ranges.release(held)
        return True

    def _compare(self, offset: int, view: memoryview, other: memoryview) -> None:
        self.test.read(offset, other)
        place = first_difference(view, other)
        if place is not None:
            raise ImageCorruptError(
                f"blkverify: {self.filename or self.name}: contents differ at offset {offset + place}: "
                f"{view[place]:#04x} in raw, {other[place]:#04x} in test",
                structure="content of test",
                expected=f"{view[place]:#04x}",
                found=f"{other[place]:#04x}",
                node=self.name,
            )

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self._on_both(offset, sum(len(view) for view in views), lambda edge: edge.write(offset, views))

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self._on_both(offset, length, lambda edge: edge.write_zeroes(offset, length, unmap=unmap))

    def discard_range(self, offset: int, length: int) -> None:
        """Nothing: a hint that may be dropped."""

    def _on_both(self, offset: int, length: int, change: Callable[[Edge], None]) -> None:
        """Make the same change to both, in the same order as all others that touch it."""
        held = self.write_ranges.acquire(offset, offset + length, exclusive=True)
        try:
            try:
                change(self.file)
            except BlocklibError:
                change(self.test)  # so that they differ no more than they must
                raise
            change(self.test)
        finally:
            self.write_ranges.release(held)

    def grow_to(self, end: int) -> None:
        super().grow_to(end)
        if not self.test.node.is_leaf:
            self.test.node.grow_to(end)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        self.test.truncate(size, preallocation)
        super().truncate(size, preallocation)
