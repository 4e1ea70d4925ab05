"""create: make a new image; with preallocation that can take as long as copying one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from blocklib.creating import make_image, remove
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.job import Job, started
from blocklib.records import Record
from blocklib.reports import ImageInfo

if TYPE_CHECKING:
    from blocklib.options import OptionValue
    from blocklib.policy import Target


@started
def create(
    target: Target,
    size: int | None = None,
    *,
    format: str,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    overwrite: bool = False,
    options: Mapping[str, OptionValue] | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[ImageInfo]:
    """`blocklib.create` as a job.  What it has begun it does to the end; when it was cancelled, what it made is removed."""
    task = _Create(target, size, format, backing, backing_format, overwrite, options)
    return Job(task, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Create(Record, Task[ImageInfo], frozen=False):
    verb: ClassVar[str] = "create"

    target: Target
    size: int | None
    format: str
    backing: str | os.PathLike[str] | None
    backing_format: str | None
    overwrite: bool
    options: Mapping[str, OptionValue] | None

    def __post_init__(self) -> None:
        self._made: list[str] = []

    def run(self, control: Control) -> ImageInfo:
        if self.size is not None:
            control.set_total(self.size)
        control.pause_point()
        info = make_image(
            self._made,
            self.target,
            self.size,
            format=self.format,
            backing=self.backing,
            backing_format=self.backing_format,
            overwrite=self.overwrite,
            options=self.options,
        )
        control.set_total(info.virtual_size)
        control.advance(info.virtual_size)
        return info

    def abort(self) -> None:
        remove(self._made)
