"""The raw format: the bytes of a file as they are, or a window of them.  In the room of formats."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from blocklib.buffers import zeroes
from blocklib.errors import OptionError, ReadOnlyError, StorageError, UsageError
from blocklib.extents import FLAG_OFFSET_VALID, FLAG_RAW, KIND_DATA, Run
from blocklib.node import RESIZE, Node, Preallocation, WriteRun

if TYPE_CHECKING:
    from blocklib._fast.work import Work
    from blocklib.graph import Edge
    from blocklib.tracking import ExportedBitmaps

_SECTOR: Final = 512


class RawNode(Node):
    """The child "file" from `offset` on, for `size` bytes or up to its end (rounded up to 512 bytes, as in QEMU).

    A raw image that was `guessed`, because its first bytes had no magic, refuses every write that would give it one:
    else a guest could turn its disk into an image that names a file of the host, for whoever guesses next.
    """

    driver = "raw"

    def __init__(
        self,
        name: str | None,
        filename: str | None,
        *,
        read_only: bool,
        offset: int = 0,
        size: int | None = None,
        guessed: bool = False,
    ) -> None:
        super().__init__(name, filename, read_only=read_only)
        self.offset = offset
        self.guessed = guessed
        self._window = size
        self._first_sector = threading.Lock()  # looking at what a write would make of it, and writing it, are one step

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Self:
        """A node from options in QEMU's names: "offset" and "size", in bytes."""
        return cls(
            options.get("node-name"),
            extra.pop("filename", None),
            read_only=read_only,
            offset=options.get("offset") or 0,
            size=options.get("size"),
            **extra,
        )

    @classmethod
    def image_maker(cls, options: Mapping[str, Any]) -> Callable[[Edge], None]:
        def make(file: Edge) -> None:
            file.truncate(-(-options["size"] // _SECTOR) * _SECTOR, options["preallocation"])
            file.flush()

        return make

    @classmethod
    def measure(cls, options: Mapping[str, Any], data_bytes: Callable[[int], int]) -> tuple[int, int]:
        size = -(-options["size"] // _SECTOR) * _SECTOR
        return size, size

    @property
    def _file(self) -> Edge:
        return self.children["file"]

    def load(self) -> None:
        """Fit the window into the file.  Raises OptionError where it does not."""
        available = self._file.size - self.offset
        if available < 0:
            raise self._bad_option("offset", f"offset {self.offset} lies past the end of the file ({self._file.size})")
        if self._window is None:
            self._follow_file()
            return
        if self._window % _SECTOR:
            raise self._bad_option("size", f"size {self._window} is not a multiple of {_SECTOR}")
        if self._window > available:
            end = self.offset + self._window
            raise self._bad_option("size", f"the window ends at {end}, the file at {self._file.size}")
        self.size = self._window

    def _follow_file(self) -> None:
        """Reach to the end of the file: a file's last sector may be short, and what it lacks reads as zero."""
        size = self._file.size - self.offset
        self.size = -(-size // _SECTOR) * _SECTOR if self._file.node.is_leaf else size

    def _bad_option(self, option: str, text: str) -> OptionError:
        return OptionError(f"{self.filename or self.name}: {text}", option=option, driver=self.driver, node=self.name)

    def child_permissions(self, child_name: str, wanted: int, shared: int, *, read_only: bool) -> tuple[int, int]:
        """What our users want and share; nobody else may resize a file that we show a window of."""
        if self.offset or self._window is not None:
            shared &= ~RESIZE
        return wanted, shared

    def resolve(self, offset: int, length: int) -> Run:
        return KIND_DATA, self._file, self.offset + offset, length, FLAG_RAW | FLAG_OFFSET_VALID

    def hear(self, event: str) -> None:
        self._file.node.hear(event)

    @property
    def exported(self) -> ExportedBitmaps | None:
        """Those of the file, where it begins where we do."""
        return None if self.offset else self._file.node.exported

    def flush(self) -> None:
        """Raises StorageError; once it has, the node is poisoned: nobody knows what of the writes before it is durable."""
        self.check_usable()
        try:
            super().flush()
        except StorageError:
            self.poison("a flush failed, and what was written before it may be lost")
            raise

    def info_facts(self) -> Mapping[str, Any]:
        return self._file.node.info_facts()

    def find_batch(self, work: Work) -> bool:
        from blocklib._fast import lookups

        lookups.pass_through(work, self.offset, self.size)
        return True

    def layout(self) -> object:
        return self.offset

    # -- changing -----------------------------------------------------------------------------------------------------

    def grow_to(self, end: int) -> None:
        """The file grows with the write.  Raises StorageError where a window of fixed size, or a device, ends before."""
        if self._window is not None or self._file.node.is_device:
            super().grow_to(end)
        with self.changing:
            self.size = max(self.size, -(-end // _SECTOR) * _SECTOR)

    def place_batch(self, work: Work) -> bool:
        return not self.guessed and self.poisoned is None and self.find_batch(work)

    def prepare_write(self, offset: int, length: int) -> WriteRun:
        if self.poisoned is not None:
            self.check_usable()
        if self.guessed and offset < _SECTOR:
            return None, self.offset + offset, min(length, _SECTOR - offset), None
        return self._file, self.offset + offset, length, None

    def write_special(self, offset: int, place: int, views: Sequence[memoryview]) -> None:
        """Write inside the first sector of a guessed image.  Raises ReadOnlyError where that would change the guess."""
        from blocklib.probe import probe

        with self._first_sector:
            start = bytearray(_SECTOR)
            self._file.read(self.offset, memoryview(start))
            data = b"".join(views)
            start[offset : offset + len(data)] = data
            found = probe(bytes(start))
            if found is not None:
                raise ReadOnlyError(
                    f"{self.filename or self.name}: this write would make the image look like {found}, which the next "
                    "opening would believe; its format was guessed to be raw: say format=raw to allow such writes",
                    node=self.name,
                )
            self._file.write(place, (data,))

    def zero_range(self, offset: int, length: int, *, unmap: bool) -> None:
        if self.guessed and self._is_part_of_first_sector(offset, length):
            n = min(length, _SECTOR - offset)
            self.write_special(offset, self.offset + offset, (zeroes(n),))
            offset, length = offset + n, length - n
        self._file.write_zeroes(self.offset + offset, length, unmap=unmap)

    def discard_range(self, offset: int, length: int) -> None:
        if self.guessed and self._is_part_of_first_sector(offset, length):
            n = min(length, _SECTOR - offset)  # may read as zero afterwards, and a discard is only a hint
            offset, length = offset + n, length - n
        self._file.discard(self.offset + offset, length)

    def _is_part_of_first_sector(self, offset: int, length: int) -> bool:
        """Whether the range begins or ends inside it; one that covers it all leaves zeroes, and those have no magic."""
        return offset < _SECTOR and (offset > 0 or length < _SECTOR)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        """Change the length of the file.  Raises UsageError for a window of fixed size and for a device."""
        name = self.filename or self.name
        if self._window is not None:
            raise UsageError(f"{name}: its size is fixed by the option size={self._window}", node=self.name)
        end = self.offset + size
        self._file.truncate(end, preallocation)
        if self._file.size != end:
            raise UsageError(f"{name}: the size of a device cannot be changed", node=self.name)
        self._follow_file()
