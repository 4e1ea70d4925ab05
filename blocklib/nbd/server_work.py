"""One request of a client done: from the request to the pieces of its reply."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from blocklib.buffers import PIECE, zeroes
from blocklib.errors import BlocklibError, ClosedError, OutOfRangeError, ReadOnlyError
from blocklib.extents import FLAG_DATA, FLAG_OFFSET_VALID, FLAG_ZERO
from blocklib.nbd import wire

if TYPE_CHECKING:
    from blocklib.nbd.engine_server import Request, ServerTransmission
    from blocklib.nbd.server_export import Exported

_log = logging.getLogger("blocklib.nbd")

_BY_RUNS: Final = 64 << 10
"""A read of at least so many bytes looks at where they live: zeroes need not be read, plain files can be sent from."""
_MOST_RUNS: Final = 32
"""More runs than these in one read cost more to look at than they save."""
_LEAST_RUN: Final = 16 << 10
"""A shorter run of a plain file, or of zeroes, is read with its neighbours."""


class FileRange:
    """A part of a reply that lies plain in a file that nobody writes."""

    __slots__ = ("fd", "length", "offset")

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self.fd = fd
        self.offset = offset
        self.length = length

    def __len__(self) -> int:
        return self.length


Piece: TypeAlias = bytes | bytearray | memoryview | FileRange
_Do: TypeAlias = "Callable[[Request], list[Piece]]"


class Worker:
    """Does the requests of one client.  Safe from any thread."""

    def __init__(self, exported: Exported, tx: ServerTransmission, *, send_files: bool) -> None:
        self._exported = exported
        self._disk = exported.disk
        self._base = exported.offset
        self._tx = tx
        self._send_files = send_files and exported.read_only
        self._contexts = {number: exported.context(name) for number, name in tx.terms.contexts.items()}
        self._by_command: dict[int, _Do] = {
            wire.NBD_CMD_READ: self._read,
            wire.NBD_CMD_WRITE: self._write,
            wire.NBD_CMD_FLUSH: self._flush,
            wire.NBD_CMD_TRIM: self._trim,
            wire.NBD_CMD_CACHE: self._cache,
            wire.NBD_CMD_WRITE_ZEROES: self._write_zeroes,
            wire.NBD_CMD_BLOCK_STATUS: self._block_status,
        }

    def do(self, request: Request) -> list[Piece]:
        """Do the request and give its reply, which may be an error; never raises."""
        try:
            return self._by_command[request.command](request)
        except (BlocklibError, OSError, MemoryError) as exc:
            return [self._error(request, exc)]
        except Exception as exc:  # a fault of ours must not take the other requests with it
            _log.exception("internal error at %r", request)
            return [self._error(request, exc)]

    def read_small(self, requests: list[Request]) -> memoryview:
        """The replies to some short reads, one behind the other."""
        tx, readinto, base = self._tx, self._disk.readinto, self._base
        view = memoryview(bytearray(sum([request.length for request in requests]) + 64 * len(requests)))
        end = 0
        for request in requests:
            head = tx.read_head(request)
            start = end + len(head)
            stop = start + request.length
            try:
                readinto(base + request.offset, view[start:stop])
            except (BlocklibError, OSError) as exc:
                head = self._error(request, exc)
                if end + len(head) > len(view):  # a long message
                    grown = memoryview(bytearray(len(view) + len(head)))
                    grown[:end] = view[:end]
                    view = grown
                start = stop = end + len(head)
            view[end:start] = head
            end = stop
        return view[:end]

    def _error(self, request: Request, exc: Exception) -> bytes:
        _log.debug("%r: %s", request, exc)
        return self._tx.error(request, _nbd_error(exc), str(exc))

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self, request: Request) -> list[Piece]:
        if request.length >= _BY_RUNS:
            pieces = self._read_runs(request)
            if pieces is not None:
                return pieces
        return [self._tx.read_head(request), self._read_plain(request.offset, request.length)]

    def _read_plain(self, offset: int, length: int) -> memoryview:
        view = memoryview(bytearray(length))
        self._disk.readinto(self._base + offset, view)
        return view

    def _read_runs(self, request: Request) -> list[Piece] | None:
        """The reply made run by run, where that saves reading anything; else None."""
        if not self._exported.may_pass:
            return None  # what filters reads has to see them all
        in_chunks = self._tx.structured and not request.flags & wire.NBD_CMD_FLAG_DF
        if not in_chunks and not self._send_files:
            return None
        statuses = self._disk.statuses(self._base + request.offset, request.length, most=_MOST_RUNS)
        if statuses is None:
            return None
        tx = self._tx
        runs: list[tuple[int, int, int, int]] = []  # offset, length, descriptor or -1 for zeroes or -2, offset in the file
        offset = request.offset
        worth = False
        for length, flags, _depth, host_offset, leaf in statuses:
            fd = -2
            if length >= _LEAST_RUN:
                if flags & FLAG_ZERO:
                    fd = -1
                elif self._send_files and leaf is not None and flags & (FLAG_DATA | FLAG_OFFSET_VALID) == _PLAIN:
                    fd = self._exported.descriptor_of(leaf)
                worth = worth or fd != -2
            if runs and fd == -2 and runs[-1][2] == -2:
                runs[-1] = (runs[-1][0], runs[-1][1] + length, -2, 0)
            else:
                runs.append((offset, length, fd, host_offset))
            offset += length
        if not worth:
            return None
        pieces: list[Piece] = []
        if not in_chunks or (len(runs) == 1 and runs[0][2] != -1):
            pieces.append(tx.read_head(request))
            for offset, length, fd, host_offset in runs:
                self._add_content(pieces, offset, length, fd, host_offset)
            return pieces
        for index, (offset, length, fd, host_offset) in enumerate(runs):
            done = index == len(runs) - 1
            if fd == -1:
                pieces.append(tx.hole(request, offset, length, done=done))
            else:
                pieces.append(tx.data_head(request, offset, length, done=done))
                self._add_content(pieces, offset, length, fd, host_offset)
        return pieces

    def _add_content(self, pieces: list[Piece], offset: int, length: int, fd: int, host_offset: int) -> None:
        if fd >= 0:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, host_offset, length, os.POSIX_FADV_WILLNEED)
            pieces.append(FileRange(fd, host_offset, length))
        elif fd == -1:
            while length:
                pieces.append(zeroes(min(length, PIECE)))
                length -= len(pieces[-1])
        else:
            pieces.append(self._read_plain(offset, length))

    def _cache(self, request: Request) -> list[Piece]:
        """Bring the range into the caches that reading goes through."""
        offset, rest = self._base + request.offset, request.length
        view = memoryview(bytearray(min(rest, PIECE)))
        while rest:
            part = view[: min(rest, PIECE)]
            self._disk.readinto(offset, part)
            offset += len(part)
            rest -= len(part)
        return [self._tx.done(request)]

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, request: Request) -> list[Piece]:
        assert request.data is not None
        fua = bool(request.flags & wire.NBD_CMD_FLAG_FUA)
        self._disk.write(self._base + request.offset, request.data, fua=fua)
        return [self._tx.done(request)]

    def _flush(self, request: Request) -> list[Piece]:
        if not self._exported.read_only:
            self._disk.flush()
        return [self._tx.done(request)]

    def _trim(self, request: Request) -> list[Piece]:
        self._disk.discard(self._base + request.offset, request.length)
        return self._changed(request)

    def _write_zeroes(self, request: Request) -> list[Piece]:
        self._disk.write_zeroes(
            self._base + request.offset,
            request.length,
            unmap=not request.flags & wire.NBD_CMD_FLAG_NO_HOLE,
            fallback=not request.flags & wire.NBD_CMD_FLAG_FAST_ZERO,
        )
        return self._changed(request)

    def _changed(self, request: Request) -> list[Piece]:
        if request.flags & wire.NBD_CMD_FLAG_FUA:
            self._disk.flush()
        return [self._tx.done(request)]

    # -- where the data is --------------------------------------------------------------------------------------------

    def _block_status(self, request: Request) -> list[Piece]:
        last = request.contexts[-1]
        return [
            self._tx.status(request, number, self._contexts[number](request.offset, request.length), done=number == last)
            for number in request.contexts
        ]


_PLAIN: Final = FLAG_DATA | FLAG_OFFSET_VALID


def _nbd_error(exc: Exception) -> int:
    if isinstance(exc, MemoryError):
        return wire.NBD_ENOMEM
    if isinstance(exc, ReadOnlyError):
        return wire.NBD_EPERM
    if isinstance(exc, OutOfRangeError):  # the disk has become smaller
        return wire.NBD_EINVAL
    if isinstance(exc, ClosedError):
        return wire.NBD_ESHUTDOWN
    number = exc.errno if isinstance(exc, OSError) else errno.EIO
    return wire.nbd_error_of(number)
