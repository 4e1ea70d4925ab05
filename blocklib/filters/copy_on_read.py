"""copy-on-read: what is read from below is kept in the image, so that it is read from there the next time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from blocklib.errors import ReadOnlyError
from blocklib.node import WRITE_UNCHANGED
from blocklib.passing import PassingFilter


class CopyOnReadNode(PassingFilter):
    """The child "file", an image with a backing file, which fills up as it is read.

    With `bottom`, the name of an image of the chain, only what comes from there or from above it is kept.
    """

    driver = "copy-on-read"
    sees_reads: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = True

    def __init__(self, name: str | None, filename: str | None, *, read_only: bool, bottom: str | None = None) -> None:
        super().__init__(name, filename, read_only=read_only)
        self._bottom = bottom

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        return super().from_options(options, read_only=read_only, bottom=options["bottom"], **extra)

    def load(self) -> None:
        """Raises ReadOnlyError above an image that cannot be written, NameNotFoundError where `bottom` is no image of it."""
        if self.file.node.read_only:
            name = self.filename or self.name
            raise ReadOnlyError(f"{name}: copy-on-read writes, and the image is open for reading only", node=self.name)
        self.file.find_image(self._bottom)

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        return wanted | WRITE_UNCHANGED, shared

    def read_special(self, offset: int, view: memoryview) -> bool:
        self.file.read(offset, view)
        self.file.keep(offset, view, self.file.find_image(self._bottom))
        return True
