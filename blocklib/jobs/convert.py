"""convert: copy a disk, or several one after the other, into an image of any format."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Literal

from blocklib import drivers
from blocklib.building import FROM_IMAGE, FromImage
from blocklib.creating import create, opening_options
from blocklib.disk import Disk
from blocklib.errors import (
    ImageExistsError,
    OptionError,
    OutOfRangeError,
    StorageError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklib.jobs.bitmap_copy import copied, refuse_target, stored_bitmaps
from blocklib.jobs.block_copy import BlockCopy, Compression
from blocklib.jobs.control import Control, ProgressCallback, Task
from blocklib.jobs.ends import SECTOR, Concatenation, opened, same_file
from blocklib.jobs.job import Job, started
from blocklib.jobs.runs import (
    COMPARE,
    COPY,
    SKIP,
    Run,
    coalesced,
    in_units,
    runs_above,
    without_equal_zeroes,
    without_small_zeroes,
)
from blocklib.node import check_level
from blocklib.opening import open_disk
from blocklib.options import check_options
from blocklib.policy import resolve_backing_name
from blocklib.records import Record
from blocklib.reports import ConvertResult

if TYPE_CHECKING:
    from blocklib.bitmaps import Bitmap
    from blocklib.node import Compressor
    from blocklib.options import CacheMode, OptionValue
    from blocklib.policy import References, Target

SPARSE_SIZE = 4096
"""Zeroes of fewer bytes are not worth a hole: QEMU's default."""


@started
def convert(
    source: Disk | Target | Sequence[Disk | Target],
    target: Disk | Target,
    *,
    format: str | None = None,
    overwrite: bool = False,
    compress: Literal["zlib", "zstd"] | None = None,
    compress_level: int | None = None,
    threads: int | None = None,
    options: Mapping[str, OptionValue] | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    references: References = "deny",
    cache: CacheMode = "writeback",
    sparse_size: int = SPARSE_SIZE,
    target_is_zero: bool = False,
    unordered: bool = False,
    salvage: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    speed: int = 0,
    auto_finalize: bool = True,
    auto_dismiss: bool = False,
    progress: ProgressCallback | None = None,
) -> Job[ConvertResult]:
    """Copy `source` into `target`; several sources are copied one after the other into one disk.

    A `target` that is a path is created in `format` with its creation `options` (ImageExistsError if it is there, unless
    `overwrite`), and removed again should this fail.  An open Disk, or a block device without `format`, is written into:
    the source has to fit, and what lies behind it stays.

    - `backing`: the new image keeps only what differs from this file; the name is stored as given.  Where an image of the
      source's chain is that very file, what comes from there is not read; elsewhere contents are compared.
    - `references`: may the backing file name others?  `cache`: how a target that is created here is written.
    - `compress`: store compressed clusters, in a format that has them; a new image gets this compression_type.
      `compress_level` goes from 1 to 9 for zlib, to 22 for zstd; without it zlib is fast and within
      6 % of the size of its level 6; levels 1 to 3 are faster still, and up to 13 and 8 % larger.
    - `sparse_size`: zeroes of that many bytes become holes; 0 writes them all, so that the target is fully allocated.
    - `target_is_zero`: the open target reads as zero everywhere, so that zeroes need not be written.
    - `unordered`: write in any order.  `salvage`: what cannot be read becomes zero, and is listed in the result.
    - `bitmaps`: the new image gets the persistent bitmaps of the one source's top image; with `skip_broken_bitmaps` without
      those that are inconsistent, which the result lists.
    - `speed`: bytes a second at most; 0 is no limit.

    Raises UsageError, OutOfRangeError (the target is too small), and what opening, reading and writing raise.
    """
    if compress not in (None, "zlib", "zstd"):
        raise UsageError(f"compress is 'zlib' or 'zstd', not {compress!r}")
    if compress is None and compress_level is not None:
        raise UsageError("compress_level needs compress")
    if compress is not None:
        check_level(compress, compress_level)
    sources: list[Disk | Target] = list(source) if isinstance(source, (list, tuple)) else [source]  # type: ignore[list-item]
    if not sources:
        raise UsageError("nothing to convert")
    if sparse_size < 0 or sparse_size % SECTOR:
        raise UsageError(f"sparse_size is a multiple of {SECTOR}, not {sparse_size}")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads")
    if isinstance(target, Disk):
        if format not in (None, target.node.driver) or overwrite or options or backing is not None:
            raise UsageError("format, overwrite, options and backing are for a target that is created, not for an open disk")
        end: Disk | NewImage = target
    else:
        end = NewImage(
            target,
            format,
            options or {},
            backing=backing,
            backing_format=backing_format,
            overwrite=overwrite,
            references=references,
            cache=cache,
            compress=compress,
        )
        if end.backing is not None and (len(sources) > 1 or target_is_zero):
            raise UsageError("a target with a backing file has one source, and is not zero")
    if bitmaps and len(sources) > 1:
        raise UsageError("bitmaps are copied from one source, not from several")
    if skip_broken_bitmaps and not bitmaps:
        raise UsageError("skip_broken_bitmaps is for a convert with bitmaps")
    task = _Convert(
        sources,
        end,
        bitmaps=bitmaps,
        skip_broken_bitmaps=skip_broken_bitmaps,
        sparse_size=sparse_size,
        target_is_zero=target_is_zero,
        threads=threads,
        unordered=unordered,
        salvage=salvage,
        compress=compress,
        compress_level=compress_level,
    )
    return Job(task, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, progress=progress)


class _Convert(Record, Task[ConvertResult]):
    verb: ClassVar[str] = "convert"

    sources: Sequence[Disk | Target]
    target: Disk | NewImage
    sparse_size: int
    target_is_zero: bool
    threads: int | None
    unordered: bool
    salvage: bool
    bitmaps: bool
    skip_broken_bitmaps: bool
    compress: Literal["zlib", "zstd"] | None
    compress_level: int | None

    def run(self, control: Control) -> ConvertResult:
        began = time.monotonic()
        with ExitStack() as stack:
            source = Concatenation([stack.enter_context(opened(item)) for item in self.sources])
            bitmaps, skipped = self._bitmaps(source)
            new = self.target.make(source.size) if isinstance(self.target, NewImage) else opened(self.target, "r+")
            target = stack.enter_context(new)
            if target.size < source.size:
                raise OutOfRangeError(f"the target has {target.size} bytes, {source.size} are to be copied")
            if self.bitmaps and not target.node.stores_bitmaps:
                raise refuse_target(target.node.filename or target.node.name, target.node.driver)
            control.set_total(source.size)
            with copied(bitmaps, target):
                copy = self._copy(control, source, target)
                target.flush()
            occupied = target.node.allocated_size()
        return ConvertResult(
            bytes_read=copy.bytes_read,
            bytes_written=copy.bytes_written if occupied is None else occupied,
            seconds=time.monotonic() - began,
            unreadable=copy.unreadable,
            skipped_bitmaps=skipped,
        )

    def _bitmaps(self, source: Concatenation) -> tuple[list[Bitmap], tuple[str, ...]]:
        """The bitmaps to copy and the names of those to skip.  Whatever can be refused is, before a target is made."""
        if not self.bitmaps:
            return [], ()
        found = stored_bitmaps(source.disks[0], skip_broken=self.skip_broken_bitmaps)
        target = self.target
        if isinstance(target, NewImage):
            if not target.stores_bitmaps:
                raise refuse_target(target.name, target.driver)
        elif target.size != source.size and found[0]:
            raise UsageError(f"the target has {target.size} bytes, and bitmaps for {source.size} do not fit it")
        return found

    def abort(self) -> None:
        if isinstance(self.target, NewImage):
            self.target.remove()

    def _copy(self, control: Control, source: Concatenation, target: Disk) -> BlockCopy:
        has_backing = isinstance(self.target, NewImage) and self.target.backing is not None
        # A cluster (or subcluster) of the target is data as a whole, so there is no use in leaving out parts of one.
        block = max(self.sparse_size, target.node.data_unit() or 0) if self.sparse_size else 0
        compressor = self._compressor(target) if self.compress is not None else None
        unit = 1
        if compressor is not None:
            unit = compressor.unit
            block = block and unit
        copy = BlockCopy(
            control,
            source,
            target,
            block=block,
            unit=max(unit, target.node.data_unit() or 1),
            zero_known=self.target_is_zero or (isinstance(self.target, NewImage) and self.target.is_zero),
            shown=target if has_backing else None,
            threads=self.threads,
            unordered=self.unordered,
            salvage=self.salvage,
            compression=Compression(compressor, target.write_packed) if compressor is not None else None,
        )
        if has_backing:
            runs = _runs_above_backing(source, target)
        elif self.sparse_size:
            runs = without_small_zeroes(source.runs(), block)
        else:
            runs = coalesced((start, n, COPY) for start, n, _what in source.runs())
        copy.run(in_units(runs, unit))
        return copy

    def _compressor(self, target: Disk) -> Compressor:
        """Raises UnsupportedFeatureError, OptionError where the target does not compress, or not that way."""
        compressor = target.node.compressor(self.compress_level)
        if compressor.kind != self.compress:
            raise OptionError(
                f"{target.node.filename}: its compressed clusters are of the type {compressor.kind}, not {self.compress}",
                option="compress",
                choices=(compressor.kind,),
            )
        return compressor


def _runs_above_backing(source: Concatenation, target: Disk) -> Iterator[Run]:
    """What to do so that `target`, new and empty above its backing file, becomes `source`."""
    disk = source.disks[0]
    chain = disk.chain()
    backing = target.chain()[1]
    same = next((image for image in chain[1:] if same_file(image.filename, backing.filename)), None)
    if same is not None:
        runs = runs_above(disk, 0, disk.size, same, absent=SKIP, absent_zero=COMPARE)
    else:
        immediate = chain[1] if len(chain) > 1 else None
        runs = runs_above(disk, 0, disk.size, immediate, absent=COMPARE, absent_zero=COMPARE)
    shown = Concatenation([target], size=source.size)
    return without_equal_zeroes(runs, source.runs(), shown.runs())


class NewImage:
    """A target that is created, or a block device that is written into."""

    def __init__(
        self,
        target: Target,
        format: str | None,
        options: Mapping[str, OptionValue],
        *,
        backing: str | os.PathLike[str] | None,
        backing_format: str | None,
        overwrite: bool,
        references: References,
        cache: CacheMode,
        compress: Literal["zlib", "zstd"] | None,
    ) -> None:
        self._target = target
        self._format = format
        self._options = {name: value for name, value in options.items() if name != "size"}
        for name, value in (("backing_file", backing), ("backing_fmt", backing_format)):
            if value is not None:
                if self._options.get(name) is not None:
                    raise OptionError(f"{name} is given twice", option=name)
                self._options[name] = os.fspath(value)
        if compress is not None:
            self._compress(compress)
        self._overwrite = overwrite
        self._references = references
        self._cache = cache
        self._is_device = isinstance(target, (str, os.PathLike)) and _is_there(target)
        self._filename = ""
        self._made: list[str] = []
        if format is None and not self._is_device:
            raise UsageError("format= says what is to be created; only an open disk or a block device does without")

    def _compress(self, compress: str) -> None:
        """Raises OptionError, UnsupportedFeatureError for a format or options that compressed clusters exclude."""
        options = self._options
        if self._format in drivers.FORMATS and not drivers.load(self._format).compresses:
            raise UnsupportedFeatureError(
                f"the format {self._format} has no compressed clusters", features=("compressed clusters",)
            )
        for name in ("encryption", "encrypt", "encrypt.format", "data_file"):
            if options.get(name) not in (None, False, "off"):
                raise OptionError(f"compressed clusters and {name} exclude each other", option=name)
        if options.get("preallocation") not in (None, "off"):
            raise OptionError("compressed clusters and preallocation exclude each other", option="preallocation")
        if self._format == "qcow2" and options.setdefault("compression_type", compress) in {"zlib", "zstd"} - {compress}:
            raise OptionError(
                f"compress={compress} and compression_type={options['compression_type']} contradict each other",
                option="compression_type",
            )

    @property
    def backing(self) -> str | None:
        """The backing file's name, as the new image stores it."""
        name = self._options.get("backing_file")
        return str(name) if name is not None else None

    @property
    def is_zero(self) -> bool:
        """Whether all of it reads as zero once it was made."""
        return self.backing is None and not self._is_device

    @property
    def is_removed_after_failure(self) -> bool:
        """Whether `remove` will remove something."""
        return bool(self._made)

    @property
    def name(self) -> str:
        """What is to be created, for people."""
        return os.fspath(self._target) if isinstance(self._target, (str, os.PathLike)) else "the target"

    @property
    def driver(self) -> str:
        return self._format or "raw"

    @property
    def stores_bitmaps(self) -> bool:
        """Whether such an image can store bitmaps.  Raises OptionError."""
        options = check_options(self.driver, self._options, table="create")
        return drivers.load(self.driver).measure_bitmaps({**options, "size": 0}, ()) is not None

    def make(self, size: int, *, with_backing: bool = True) -> Disk:
        """Create it with `size` bytes and open it for writing, with its backing file or without."""
        if not self._is_device or self._format not in (None, "raw"):
            self._create(size)
        backing: Mapping[str, OptionValue] | FromImage | None = FROM_IMAGE if with_backing else None
        if with_backing and self.backing is not None:
            full_name = resolve_backing_name(self._filename, self.backing)
            backing = {"driver": self._options["backing_fmt"], "file": {"driver": "file", "filename": full_name}}
        data_file: Mapping[str, OptionValue] | FromImage = FROM_IMAGE
        if self._data_file is not None:
            data_file = {"driver": "file", "filename": resolve_backing_name(self._filename, self._data_file)}
        return open_disk(
            self._target,
            "r+",
            format=self._format,
            references=self._references,
            cache=self._cache,
            discard="unmap",
            backing=backing,
            data_file=data_file,
            options=opening_options(self._options),
        )

    @property
    def _data_file(self) -> str | None:
        name = self._options.get("data_file")
        return str(name) if name is not None else None

    def _create(self, size: int) -> None:
        format = self._format
        assert format is not None
        try:
            made = create(self._target, size, format=format, options=self._options)
            self._made = [] if self._is_device else [made.filename]
            if self._data_file is not None:
                self._made.append(resolve_backing_name(made.filename, self._data_file))
        except ImageExistsError:
            if not self._overwrite:
                raise
            made = create(self._target, size, format=format, options=self._options, overwrite=True)
        self._filename = made.filename

    def remove(self) -> None:
        """Remove the files that `make` made."""
        while self._made:
            made = self._made.pop()
            try:
                os.unlink(made)
            except OSError as exc:
                raise StorageError.wrap(exc, "unlink", filename=made) from exc


def _is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a target is written into and not made: a block device, or the export that an NBD URL names."""
    if drivers.protocol_of_url(path) is not None:
        return True
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # creating it will say what is wrong
