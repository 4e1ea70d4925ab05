"""measure: how large would a new image become?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from blocklib import drivers
from blocklib._fast.extents import units_with_data
from blocklib.errors import OptionError, UsageError
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.ends import opened
from blocklib.jobs.job import Job, started
from blocklib.options import check_options
from blocklib.records import Record
from blocklib.reports import MeasureResult

if TYPE_CHECKING:
    from blocklib._fast.extents import Rows
    from blocklib.disk import Disk
    from blocklib.options import OptionValue
    from blocklib.policy import Target


@started
def measure(
    source: Disk | Target | None = None,
    *,
    size: int | None = None,
    format: str,
    options: Mapping[str, OptionValue] | None = None,
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[MeasureResult]:
    """The bytes that an image of `format` with creation `options` takes: one converted from `source`, or new of `size` bytes.

    Nothing but metadata of the source is read.  Raises UsageError, OptionError, UnsupportedFeatureError.
    """
    if (source is None) == (size is None):
        raise UsageError("measure takes a source or a size")
    if size is not None and size < 0:
        raise UsageError(f"a size of {size} bytes")
    given = {name: value for name, value in (options or {}).items() if name != "size"}
    if format == "raw" and given.get("backing_file") is not None:
        raise OptionError("a raw image has no backing file", option="backing_file", driver="raw")
    task = _Measure(source, size or 0, format, check_options(format, given, table="create"))
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Measure(Record, Task[MeasureResult]):
    verb: ClassVar[str] = "measure"

    source: Disk | Target | None
    size: int
    format: str
    options: Mapping[str, Any]

    def run(self, control: Control) -> MeasureResult:
        if self.source is None:
            return self._result(self.size, [])
        with opened(self.source) as disk:
            control.set_total(disk.size)
            result = self._result(disk.size, _watched(control, disk.row_windows()))
            bitmaps = self._bitmaps(disk)
        return MeasureResult(result.required, result.fully_allocated, bitmaps)

    def _result(self, size: int, windows: Iterable[Rows]) -> MeasureResult:
        def data_bytes(unit: int) -> int:
            if self.source is not None and self.options.get("backing_file") is not None:
                return size  # what the backing file has of it is not looked at, so there is room for all
            return _units_with_data(windows, unit) * unit

        required, fully_allocated = drivers.load(self.format).measure({**self.options, "size": size}, data_bytes)
        return MeasureResult(required, fully_allocated)

    def _bitmaps(self, disk: Disk) -> int | None:
        """What the stored bitmaps of the source take in the new image; None unless both can have some."""
        if not disk.node.stores_bitmaps:
            return None
        stored = [(bitmap.name, bitmap.granularity) for bitmap in disk.bitmaps if bitmap.persistent]
        return drivers.load(self.format).measure_bitmaps({**self.options, "size": disk.size}, stored)


def _watched(control: Control, windows: Iterable[Rows]) -> Iterable[Rows]:
    """The same windows; between them the job may be paused or cancelled."""
    done = 0
    for rows in windows:
        control.pause_point()
        yield rows
        control.advance(rows.end - done)
        done = rows.end


def _units_with_data(windows: Iterable[Rows], unit: int) -> int:
    """How many units of the new image, of a power of two bytes, will hold any data."""
    units = counted = 0
    for rows in windows:
        more, counted = units_with_data(rows, unit.bit_length() - 1, counted)
        units += more
    return units
