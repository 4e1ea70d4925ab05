"""blocklib: virtual disk images as a Python library.

``open()`` gives a `Disk`; a long verb (``convert``, ``commit``, ...) waits for a job of the same name in `blocklib.jobs`.
Everything is found on first use, so that importing blocklib costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blocklib.errors import (
    BatchError,
    BlocklibError,
    ClosedError,
    FormatMismatchError,
    GraphConflictError,
    ImageCorruptError,
    ImageError,
    ImageExistsError,
    ImageLimitError,
    ImageNotFoundError,
    JobCancelled,
    JobError,
    JobStateError,
    LocalProtocolError,
    LockedError,
    MissingExtraError,
    NameNotFoundError,
    NbdError,
    OptionError,
    OutOfRangeError,
    PoisonedError,
    PolicyError,
    ReadOnlyError,
    RemoteProtocolError,
    RequestError,
    StalePlanError,
    StorageError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklib.sizes import GiB, KiB, MiB, TiB, format_size, parse_size

if TYPE_CHECKING:
    from blocklib import jobs, policy
    from blocklib.bitmaps import Bitmap
    from blocklib.creating import create
    from blocklib.crypto.secrets import Secret
    from blocklib.disk import Disk
    from blocklib.diskfile import DiskFile
    from blocklib.extents import EXTENT_DTYPE, RANGE_DTYPE, Extent
    from blocklib.inspection import Inspector, inspect
    from blocklib.opening import info, open
    from blocklib.options import describe_options, parse_options
    from blocklib.policy import Limits, Reference
    from blocklib.reports import (
        BackupResult,
        Check,
        CheckReport,
        CommitResult,
        CompareResult,
        ConvertResult,
        Finding,
        ImageInfo,
        Inspection,
        MeasureResult,
        MirrorResult,
        NodeInfo,
        Progress,
        RebaseResult,
        RepairReport,
        RepairStep,
        SnapshotInfo,
        StreamResult,
    )
    from blocklib.snapshots import InternalSnapshot
    from blocklib.throttling import ThrottleGroup
    from blocklib.transactions import transaction
    from blocklib.verbs import amend, check, commit, compare, convert, measure, rebase, repair

_PLACES = {
    "Bitmap": "bitmaps",
    "Disk": "disk",
    "DiskFile": "diskfile",
    "EXTENT_DTYPE": "extents",
    "Extent": "extents",
    "Inspector": "inspection",
    "InternalSnapshot": "snapshots",
    "Limits": "policy",
    "RANGE_DTYPE": "extents",
    "Reference": "policy",
    "Secret": "crypto.secrets",
    "ThrottleGroup": "throttling",
    "describe_options": "options",
    "create": "creating",
    "info": "opening",
    "inspect": "inspection",
    "jobs": "",
    "open": "opening",
    "parse_options": "options",
    "policy": "",
    "transaction": "transactions",
    **dict.fromkeys(
        (
            "BackupResult",
            "Check",
            "CheckReport",
            "CommitResult",
            "CompareResult",
            "ConvertResult",
            "Finding",
            "ImageInfo",
            "Inspection",
            "MeasureResult",
            "MirrorResult",
            "NodeInfo",
            "Progress",
            "RebaseResult",
            "RepairReport",
            "RepairStep",
            "SnapshotInfo",
            "StreamResult",
        ),
        "reports",
    ),
    **dict.fromkeys(
        ("amend", "check", "commit", "compare", "convert", "measure", "rebase", "repair"), "verbs"
    ),
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{place}"), name) if place else import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "BackupResult",
    "BatchError",
    "Bitmap",
    "BlocklibError",
    "Check",
    "CheckReport",
    "ClosedError",
    "CommitResult",
    "CompareResult",
    "ConvertResult",
    "Disk",
    "DiskFile",
    "EXTENT_DTYPE",
    "Extent",
    "Finding",
    "FormatMismatchError",
    "GiB",
    "GraphConflictError",
    "ImageCorruptError",
    "ImageError",
    "ImageExistsError",
    "ImageInfo",
    "ImageLimitError",
    "ImageNotFoundError",
    "Inspection",
    "Inspector",
    "InternalSnapshot",
    "JobCancelled",
    "JobError",
    "JobStateError",
    "KiB",
    "Limits",
    "LocalProtocolError",
    "LockedError",
    "MeasureResult",
    "MiB",
    "MirrorResult",
    "MissingExtraError",
    "NameNotFoundError",
    "NbdError",
    "NodeInfo",
    "OptionError",
    "OutOfRangeError",
    "PoisonedError",
    "PolicyError",
    "Progress",
    "RANGE_DTYPE",
    "ReadOnlyError",
    "RebaseResult",
    "Reference",
    "RemoteProtocolError",
    "RepairReport",
    "RepairStep",
    "RequestError",
    "Secret",
    "SnapshotInfo",
    "StalePlanError",
    "StorageError",
    "StreamResult",
    "ThrottleGroup",
    "TiB",
    "UnsupportedFeatureError",
    "UsageError",
    "amend",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "describe_options",
    "format_size",
    "info",
    "inspect",
    "jobs",
    "measure",
    "open",
    "parse_options",
    "parse_size",
    "policy",
    "rebase",
    "repair",
    "transaction",
]
