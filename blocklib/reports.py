"""What blocklib answers: frozen values that may be shared between threads, pickled and kept.

Sizes and offsets are bytes; `host_offset` is an offset in the image file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from blocklib.records import Record, field

if TYPE_CHECKING:
    from datetime import datetime

    from blocklib.policy import Reference


class SnapshotInfo(Record):
    """An internal snapshot: its numbers as the image stores them."""

    id: str
    name: str
    created: datetime
    vm_state_size: int
    vm_clock_ns: int
    size: int
    """Of its disk, which may have been resized since."""
    icount: int | None = None
    """Instructions that the guest had executed, where they were counted."""
    created_nsec: int | None = None
    """Nanoseconds behind the whole second of `created`, as stored, which a datetime does not hold."""


class ImageInfo(Record):
    """One image's metadata; nothing the image refers to was opened for it."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None
    """Bytes occupied on the host, or None where that is unknown."""
    cluster_size: int | None = None
    backing_filename: str | None = None
    """As the image spells it."""
    full_backing_filename: str | None = None
    """As it is found from here: relative to the image's own folder."""
    backing_format: str | None = None
    encrypted: bool = False
    dirty: bool | None = False
    """It was not closed; None where nothing can be known of that."""
    snapshots: tuple[SnapshotInfo, ...] = ()
    format_specific: Mapping[str, Any] = field(default_factory=dict)
    """What ``qemu-img info`` prints as "format-specific", in QEMU's names."""


class NodeInfo(Record):
    """One image of a chain."""

    name: str
    driver: str
    filename: str | None
    size: int
    read_only: bool
    data_filename: str | None = None
    """The file that its plain data is in: for an image with an external data file, that one."""


class Progress(Record):
    """How far a long verb is: bytes done of bytes in total, bytes per second, seconds left or None while unknown."""

    done: int
    total: int
    rate: float = 0.0
    eta: float | None = None

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 1.0


class ConvertResult(Record):
    """What a convert moved: bytes read as data, bytes the target occupies, and how long it took."""

    bytes_read: int
    bytes_written: int
    seconds: float
    unreadable: tuple[tuple[int, int], ...] = ()
    """(guest offset, length) of what a salvaging convert could not read; it is zero in the target."""
    skipped_bitmaps: tuple[str, ...] = ()
    """Names of inconsistent bitmaps that were left out."""


class CommitResult(Record):
    """Bytes copied down, the image that received them, and whether the disk continues on it."""

    bytes_copied: int
    base: str | None
    pivoted: bool = False


class RebaseResult(Record):
    """Bytes copied into the overlay, and the backing file it has now."""

    bytes_copied: int
    backing: str | None


class StreamResult(Record):
    """Bytes copied into the top image, and the backing file it has now."""

    bytes_copied: int
    backing: str | None


class MirrorResult(Record):
    """Bytes read and copied, and whether the disk has become the copy."""

    bytes_copied: int
    pivoted: bool


class BackupResult(Record):
    """Bytes read and copied by the job; what writers had to copy first is not counted."""

    bytes_copied: int


class CompareResult(Record):
    """`reason` is None for identical disks, "content" with the first differing guest `offset`; if strict also "size", or
    "status" with the first guest `offset` that is not stored in the same way."""

    identical: bool
    reason: Literal["content", "size", "status"] | None = None
    offset: int | None = None
    size_mismatch: bool = False
    """The sizes differ but the longer one's rest reads as zero (or was not looked at, after a difference)."""
    beyond_end: bool = False
    """`offset` lies past the end of the shorter disk."""


class MeasureResult(Record):
    """Bytes that a new image needs: for the data as it is, and fully allocated."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


class Finding(Record):
    """One thing that a check found: a "leak", a "corruption", or a "check-error" (could not be looked at)."""

    kind: Literal["leak", "corruption", "check-error"]
    structure: str
    host_offset: int | None
    expected: str
    found: str
    repairable: bool = True

    def __str__(self) -> str:
        place = f" at {self.host_offset:#x}" if self.host_offset is not None else ""
        return f"{self.kind}: {self.structure}{place}: expected {self.expected}, found {self.found}"


class CheckReport(Record):
    """What ``qemu-img check`` counts, with every finding beside it."""

    filename: str
    format: str
    findings: tuple[Finding, ...] = ()
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int | None = None
    total_clusters: int | None = None
    allocated_clusters: int | None = None
    fragmented_clusters: int | None = None
    compressed_clusters: int | None = None

    @property
    def clean(self) -> bool:
        """Neither corruptions nor leaks nor anything that could not be checked."""
        return not (self.corruptions or self.leaks or self.check_errors)


class RepairStep(Record):
    """One change that a repair makes."""

    action: str
    structure: str
    host_offset: int | None
    before: str
    after: str

    def __str__(self) -> str:
        place = f" at {self.host_offset:#x}" if self.host_offset is not None else ""
        return f"{self.action}: {self.structure}{place}: {self.before} -> {self.after}"


class RepairReport(Record):
    """What a repair did, or with ``dry_run`` would do: its steps, and the check before and (if it ran) after."""

    steps: tuple[RepairStep, ...]
    before: CheckReport
    after: CheckReport | None = None


class Check(Record):
    """What one check of an inspection found; `message` is one line, whether it passed or not."""

    name: str
    passed: bool
    message: str


class Checks(Mapping[str, Check]):
    """The checks of an inspection by name; cannot be changed."""

    __slots__ = ("_checks",)

    def __init__(self, checks: Iterable[Check] = ()) -> None:
        self._checks = {check.name: check for check in checks}

    def __getitem__(self, name: str) -> Check:
        return self._checks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._checks)

    def __len__(self) -> int:
        return len(self._checks)

    def __hash__(self) -> int:
        return hash(frozenset(self._checks.values()))

    def __repr__(self) -> str:
        return f"Checks({list(self._checks.values())!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Checks, (tuple(self._checks.values()),)


class Inspection(Record):
    """What a file says of itself to somebody who has opened nothing else; see `blocklib.inspect`."""

    formats: tuple[str, ...]
    """Every format whose signature the file has; none is an answer: a raw disk has no signature."""
    virtual_size: int | None
    """Bytes of the disk; None where it cannot be told, or where several formats say different things."""
    references: tuple[Reference, ...] = ()
    """Files that the image names, as it spells them."""
    features: tuple[str, ...] = ()
    """The feature bits that are set, by name; those that we do not know by their number."""
    encrypted: bool = False
    limits_exceeded: tuple[str, ...] = ()
    """Fields of `policy.Limits` that the image asks to go beyond."""
    checks: Checks = field(default_factory=Checks)
    """By name: those of OpenStack's format inspector, and some of our own."""

    @property
    def safe(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks.values())

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks.values() if not check.passed)
