"""throttle: requests wait until the limits of their group allow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from blocklib.passing import PassingFilter
from blocklib.throttling import Member, ThrottleGroup


class ThrottleNode(PassingFilter):
    """The child "file", as fast as `group` lets it be.  Zeroes and discards count as writes of their length, as in QEMU."""

    driver = "throttle"
    sees_reads: ClassVar[bool] = True
    sees_writes: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = True
    holds_requests: ClassVar[bool] = True

    def __init__(self, name: str | None, filename: str | None, *, read_only: bool, group: ThrottleGroup) -> None:
        super().__init__(name, filename, read_only=read_only)
        self.group = group
        self._member = Member()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """A node from options in QEMU's names: "throttle-group" is the group, or limits of its own."""
        return super().from_options(options, read_only=read_only, group=options["throttle-group"], **extra)

    def hurry(self, hurried: bool) -> None:
        self.group.hurry(self._member, hurried)

    def read_special(self, offset: int, view: memoryview) -> bool:
        self.group.wait(self._member, len(view), is_write=False)
        return super().read_special(offset, view)

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        self.group.wait(self._member, sum(len(view) for view in views), is_write=True)
        super().write_special(offset, place, views)

    def pass_packed(self, offset: int, data: memoryview, packed: Sequence[bytes | None], unit: int) -> None:
        self.group.wait(self._member, len(data), is_write=True)
        super().pass_packed(offset, data, packed, unit)

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        self.group.wait(self._member, length, is_write=True)
        super().zero_range(offset, length, unmap=unmap)

    def discard_range(self, offset: int, length: int) -> None:
        self.group.wait(self._member, length, is_write=True)
        super().discard_range(offset, length)
