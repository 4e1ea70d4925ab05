"""Every error that blocklib raises, as one tree; each class is also the builtin that a Python user expects.

::

    BlocklibError                     .node: the node's name or path, where one is concerned
     |- UsageError (ValueError)       the caller is at fault
     |   |- OptionError               .option .driver .choices
     |   |- OutOfRangeError           a range outside the disk
     |   |- ReadOnlyError             a write to what was opened for reading
     |   |- ClosedError               the object was closed, or belongs to the process before a fork
     |   |- StalePlanError            the image has changed since the plan was made
     |   `- NameNotFoundError (KeyError)
     |- ImageError                    .structure .host_offset .expected .found: the bytes are at fault
     |   |- FormatMismatchError       not an image of this format
     |   |- ImageCorruptError         a structure contradicts the format or another structure
     |   |- ImageLimitError           more than we are willing to spend on an image
     |   `- UnsupportedFeatureError   .features
     |- PolicyError (PermissionError) .reference: a file named by an image was not allowed
     |- StorageError (OSError)        .errno .operation: the host said no
     |   |- ImageNotFoundError (FileNotFoundError)
     |   |- ImageExistsError (FileExistsError)
     |   |- LockedError (BlockingIOError)   .filename .permission .pid
     |   `- BatchError                .errnos, one per request
     |- NbdError
     |   |- RequestError              this request failed, the connection lives on
     |   |- RemoteProtocolError       the peer broke the protocol; the connection is closed
     |   `- LocalProtocolError        we were about to break it
     |- PoisonedError                 a metadata change was torn, or a flush failed: close and reopen
     |- GraphConflictError            .other: who holds what is wanted
     |- JobError
     |   |- JobStateError             .status .verb
     |   `- JobCancelled
     `- MissingExtraError (ImportError)   .extra
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from blocklib.policy import Reference

__all__ = [
    "BatchError",
    "BlocklibError",
    "ClosedError",
    "FormatMismatchError",
    "GraphConflictError",
    "ImageCorruptError",
    "ImageError",
    "ImageExistsError",
    "ImageLimitError",
    "ImageNotFoundError",
    "JobCancelled",
    "JobError",
    "JobStateError",
    "LocalProtocolError",
    "LockedError",
    "MissingExtraError",
    "NameNotFoundError",
    "NbdError",
    "OptionError",
    "OutOfRangeError",
    "PoisonedError",
    "PolicyError",
    "ReadOnlyError",
    "RemoteProtocolError",
    "RequestError",
    "StalePlanError",
    "StorageError",
    "UnsupportedFeatureError",
    "UsageError",
]


def _rebuild(cls: type[BlocklibError], message: str, state: dict[str, Any]) -> BlocklibError:
    error = cls.__new__(cls, message)
    BlocklibError.__init__(error, message)
    for name, value in state.items():
        setattr(error, name, value)
    return error


class BlocklibError(Exception):
    """The root of the tree.  `node` is the name or path of the node concerned, or None."""

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.node = node

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if isinstance(self, OSError):  # which keeps these outside __dict__
            state.update(errno=self.errno, filename=self.filename)
        return _rebuild, (type(self), self.message, state)


class UsageError(BlocklibError, ValueError):
    """The caller asked for something that makes no sense: fix the call, do not catch this."""


class OptionError(UsageError):
    """An option is unknown, given twice, or has a value outside its choices."""

    def __init__(
        self,
        message: str,
        *,
        option: str | None = None,
        driver: str | None = None,
        choices: Sequence[str] = (),
        node: str | None = None,
    ) -> None:
        super().__init__(message, node=node)
        self.option = option
        self.driver = driver
        self.choices = tuple(choices)


class OutOfRangeError(UsageError):
    """A request reaches outside the disk; nothing was transferred."""


class ReadOnlyError(UsageError):
    """A write was asked of what was opened for reading."""


class ClosedError(UsageError):
    """The object is closed, or was opened before a fork by another process."""


class StalePlanError(UsageError):
    """The image has moved on since the plan was made; nothing was written."""


class NameNotFoundError(UsageError, KeyError):
    """No snapshot, bitmap, export or node has that name."""


class ImageError(BlocklibError):
    """The bytes are at fault: `structure` at `host_offset` held `found` where `expected` was due."""

    def __init__(
        self,
        message: str,
        *,
        structure: str | None = None,
        host_offset: int | None = None,
        expected: str | None = None,
        found: str | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__(message, node=node)
        self.structure = structure
        self.host_offset = host_offset
        self.expected = expected
        self.found = found


class FormatMismatchError(ImageError):
    """The image is not of the format that was asked for."""


class ImageCorruptError(ImageError):
    """A structure of the image contradicts the format, or another structure."""


class ImageLimitError(ImageError):
    """The image asks for more than the limits allow; checked before anything is allocated."""


class UnsupportedFeatureError(ImageError):
    """The image uses `features` that blocklib cannot handle for what was asked."""

    def __init__(
        self,
        message: str,
        *,
        features: Sequence[str] = (),
        structure: str | None = None,
        host_offset: int | None = None,
        expected: str | None = None,
        found: str | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__(
            message, structure=structure, host_offset=host_offset, expected=expected, found=found, node=node
        )
        self.features = tuple(features)


class PolicyError(BlocklibError, PermissionError):
    """An image names another file and the caller has not allowed it; the text ends with what allows it."""

    def __init__(self, message: str, *, reference: Reference, node: str | None = None) -> None:
        super().__init__(message, node=node)
        self.errno = _errno.EACCES
        self.reference = reference


class StorageError(BlocklibError, OSError):
    """A call to the host failed: `operation` ("pread", "fsync", ...) with `errno`."""

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        operation: str | None = None,
        filename: str | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__(message, node=node)
        self.errno = errno
        self.operation = operation
        self.filename = filename

    @classmethod
    def wrap(cls, exc: OSError, operation: str, *, filename: str | None = None, node: str | None = None) -> Self:
        """The same failure as `exc`, in our tree; raise it `from exc`."""
        name = filename if filename is not None else node
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        text = f"{name}: {operation} failed: {reason}" if name else f"{operation} failed: {reason}"
        return cls(text, errno=exc.errno, operation=operation, filename=filename, node=node or filename)


class ImageNotFoundError(StorageError, FileNotFoundError):
    """The file is not there."""


class ImageExistsError(StorageError, FileExistsError):
    """The file is there already and `overwrite` was not said."""


class LockedError(StorageError, BlockingIOError):
    """Another process uses the image in a way that excludes ours; `pid` is a best effort."""

    def __init__(
        self, message: str, *, filename: str, permission: str, pid: int | None = None, node: str | None = None
    ) -> None:
        super().__init__(message, errno=_errno.EAGAIN, operation="lock", filename=filename, node=node)
        self.permission = permission
        self.pid = pid


class BatchError(StorageError):
    """Some requests of a batch failed: `errnos` has one number for each request, 0 where it succeeded."""

    def __init__(self, message: str, *, errnos: Sequence[int], operation: str, node: str | None = None) -> None:
        first = next((number for number in errnos if number), None)
        super().__init__(message, errno=first, operation=operation, node=node)
        self.errnos = tuple(errnos)


class NbdError(BlocklibError):
    """Something went wrong on an NBD connection."""


class RequestError(NbdError):
    """The server refused this request; the connection lives on."""


class RemoteProtocolError(NbdError):
    """The peer broke the protocol; the connection is closed."""


class LocalProtocolError(NbdError):
    """Our side was about to break the protocol."""


class PoisonedError(BlocklibError):
    """A metadata change was torn or a flush failed: the node answers only close(); reopen it."""


class GraphConflictError(BlocklibError):
    """The change would break a permission that `other` relies on."""

    def __init__(self, message: str, *, other: str | None = None, node: str | None = None) -> None:
        super().__init__(message, node=node)
        self.other = other


class JobError(BlocklibError):
    """A job failed for a reason of its own."""


class JobStateError(JobError):
    """`verb` is not allowed while the job is `status`."""

    def __init__(self, message: str, *, status: str, verb: str) -> None:
        super().__init__(message)
        self.status = status
        self.verb = verb


class JobCancelled(JobError):
    """The job was cancelled before it was done."""


class MissingExtraError(BlocklibError, ImportError):
    """A feature needs a package that is not installed; the text is the `pip install` line."""

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message)
        self.extra = extra
