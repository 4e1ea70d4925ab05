"""amend: change what an image is, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from blocklib import graph
from blocklib.building import FROM_IMAGE
from blocklib.disk import Disk
from blocklib.errors import UsageError
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.ends import opened
from blocklib.jobs.job import Job, started
from blocklib.opening import open_disk
from blocklib.options import check_options
from blocklib.records import Record
from blocklib.reports import ImageInfo

if TYPE_CHECKING:
    from blocklib.options import CacheMode, OptionValue
    from blocklib.policy import References, Target


@started
def amend(
    target: Disk | Target,
    options: Mapping[str, OptionValue],
    *,
    format: str | None = None,
    force: bool = False,
    references: References = "deny",
    cache: CacheMode = "writeback",
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[ImageInfo]:
    """Change an image in place, by creation `options` in QEMU's names; gives what the image is afterwards.

    For qcow2: ``compat`` (up and down), ``refcount_bits``, ``lazy_refcounts``, ``size`` (smaller loses data), ``data_file``
    (its name only), ``data_file_raw`` (off only), and ``encrypt.state`` with its like for key slots.  What cannot be is
    refused before anything is written.  The backing file is not opened, and a data file only to change the size, which needs
    `references`.  `force` allows what locks everybody out.

    Raises OptionError, UsageError, UnsupportedFeatureError (version 2 has no such thing), ImageLimitError (counts that do
    not fit), ReadOnlyError, LockedError, PolicyError, StorageError.
    """
    if not options:
        raise UsageError("amend takes options that say what is to change")
    task = _Amend(target, options, format, force, references, cache)
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Amend(Record, Task[ImageInfo]):
    verb: ClassVar[str] = "amend"

    target: Disk | Target
    options: Mapping[str, OptionValue]
    format: str | None
    force: bool
    references: References
    cache: CacheMode

    def run(self, control: Control) -> ImageInfo:
        with self._opened() as disk:
            node = disk.node
            typed = check_options(node.driver, self.options, table="amend")
            with graph.alone(node):
                node.check_amend(typed, force=self.force)
            control.pause_point()  # the last one: what it has begun it does to the end
            size = typed.get("size")
            if size and size != disk.size:
                disk.truncate(size, shrink=True)
            with graph.alone(node):
                telling = _Telling(control)
                node.amend(typed, force=self.force, progress=telling)
                telling.end()
            return disk.info()

    @contextmanager
    def _opened(self) -> Iterator[Disk]:
        if isinstance(self.target, Disk):
            with opened(self.target, "r+") as disk:
                yield disk
            return
        with open_disk(
            self.target,
            "r+",
            format=self.format,
            references=self.references,
            cache=self.cache,
            backing=None,
            data_file=FROM_IMAGE if self.options.get("size") else None,
        ) as disk:
            yield disk


class _Telling:
    """Tells a job how far the work is.  It is not interrupted: what it has begun is not to be left half done."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._done = self._total = 0

    def __call__(self, done: int, total: int) -> None:
        self._control.set_total(total)
        self._control.advance(max(done - self._done, 0))
        self._done, self._total = max(done, self._done), total

    def end(self) -> None:
        """All is done."""
        self(self._total, self._total)
