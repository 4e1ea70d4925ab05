"""A client of one export: connections, several where the server allows it, and what becomes of requests when one is lost.

Without `reconnect_delay`, losing the connection is the end: every request from then on fails.  With it, requests wait so
many seconds for a new connection and are sent again; all of NBD's are idempotent.  What was written and not yet flushed may
have gone down with the server, so it is kept here (`_Unflushed`) and written again first.  No write is lost silently, and no
flush says that one is durable when that is not known.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from blocklib.errors import BlocklibError, ClosedError, NbdError, RemoteProtocolError, StorageError
from blocklib.nbd import wire
from blocklib.nbd.connection import Connection, ConnectionLost, Data, dial, negotiate, storage_error
from blocklib.nbd.engine import Export, ExportList, Listed, Ready, Terms, TlsMode
from blocklib.nbd.engine_client import Pending
from blocklib.nbd.engine_client_handshake import ClientHandshake

if TYPE_CHECKING:
    import ssl
    from socket import socket

    from blocklib.nbd.uri import Address

_R = TypeVar("_R")

MAX_CONNECTIONS: Final = 4
"""Connections to a server that allows several, when nothing else was said."""
_BUSY: Final = 2
"""Requests in flight on each connection that make another one worth its while."""
_CONNECT_TIMEOUT: Final = 30.0
"""Seconds for connecting and negotiating, when nothing else was said."""
_RETRY_PAUSE: Final = 0.25
_GROUP: Final = 64
"""Requests of a transfer that are sent together; waking up for each would cost more than the request."""
_GROUPS: Final = 2
"""Groups of a transfer on their way at a time."""
_MAX_EFFECT: Final = 1 << 30
"""Bytes that one request without payload is for: a server must not be busy with it for ever."""
_MAX_UNFLUSHED: Final = 64 << 20
"""Bytes of writes that are kept to be written again; more are flushed first."""
_OPERATIONS: Final = {
    wire.NBD_CMD_READ: "read",
    wire.NBD_CMD_WRITE: "write",
    wire.NBD_CMD_FLUSH: "flush",
    wire.NBD_CMD_TRIM: "discard",
    wire.NBD_CMD_CACHE: "cache",
    wire.NBD_CMD_WRITE_ZEROES: "write zeroes",
    wire.NBD_CMD_BLOCK_STATUS: "block status",
}


class _Written(NamedTuple):
    """A change that the server has acknowledged and that no flush has covered."""

    number: int
    command: int
    offset: int
    length: int
    flags: int
    data: bytes


class _Unflushed:
    """The changes since the last flush, in the order of their acknowledgement.  The client's lock guards it."""

    def __init__(self) -> None:
        self._changes: list[_Written] = []
        self._numbers = itertools.count(1)
        self._last = 0
        self.n_bytes = 0

    def add(self, pending: Pending, data: Sequence[Data]) -> None:
        self._last = next(self._numbers)
        flags = pending.flags & ~wire.NBD_CMD_FLAG_PAYLOAD_LEN  # which the next connection may not know
        self._changes.append(
            _Written(self._last, pending.command, pending.offset, pending.length, flags, b"".join(data))
        )
        self.n_bytes += pending.length if data else 64

    @property
    def mark(self) -> int:
        """What a flush that is sent from now on covers."""
        return self._last

    def drop(self, mark: int) -> None:
        """A flush sent after `mark` was taken has succeeded."""
        self._changes = [change for change in self._changes if change.number > mark]
        self.n_bytes = sum(change.length if change.data else 64 for change in self._changes)

    def __iter__(self) -> itertools.chain[_Written]:
        return itertools.chain(self._changes)


class Client:
    """An export of a server, for any number of threads.  Offsets and lengths are bytes inside the export.

    `name` is what errors call it.  `tls` with `hostname` protects every connection; without it none.  `contexts` are the
    metadata contexts to ask for.  Times are seconds: `open_timeout` is how long `open` tries to reach the server (0: once),
    `reconnect_delay` how long requests wait for a lost connection to come back (0: not at all), `request_timeout` how long a
    server may be silent while it owes an answer (0: for ever).
    """

    def __init__(
        self,
        address: Address,
        export: str = "",
        *,
        name: str = "",
        tls: ssl.SSLContext | None = None,
        hostname: str | None = None,
        contexts: Sequence[str] = (wire.BASE_ALLOCATION,),
        open_timeout: float = 0,
        reconnect_delay: float = 0,
        request_timeout: float = 0,
        connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.name = name or str(address)
        self._address = address
        self._export = export
        self._tls = tls
        self._hostname = hostname
        self._contexts = tuple(contexts)
        self._open_timeout = open_timeout
        self._reconnect_delay = reconnect_delay
        self._request_timeout = request_timeout
        self._max_connections = connections
        self._lock = threading.Lock()  # guards: _connections, _epoch, _lost_at, _unflushed, _end; never held across I/O
        self._connecting = threading.Lock()  # one thread connects anew; held across I/O, before _lock
        self._connections: list[Connection] = []
        self._epoch = 0
        """Counts the losses: what was acknowledged before one may be gone."""
        self._lost_at = 0.0
        self._opening_another = False
        self._unflushed: _Unflushed | None = None
        self._end: BlocklibError | None = None
        """Why nothing will ever be answered again."""
        self._closing = threading.Event()
        self.terms = _NO_TERMS

    # -- opening and closing ------------------------------------------------------------------------------------------

    def open(self) -> Terms:
        """Connect and negotiate.

        Raises StorageError where the server cannot be reached, RequestError where it refuses, RemoteProtocolError, NbdError
        where TLS fails.
        """
        deadline = time.monotonic() + self._open_timeout
        while True:
            try:
                connection = self._connect(max(deadline, time.monotonic() + _CONNECT_TIMEOUT), 0)
                break
            except StorageError:
                if time.monotonic() + _RETRY_PAUSE >= deadline or self._closing.wait(_RETRY_PAUSE):
                    raise
        self.terms = connection.terms
        flags = self.terms.export.flags
        if self._reconnect_delay and flags & wire.NBD_FLAG_SEND_FLUSH and not flags & wire.NBD_FLAG_READ_ONLY:
            self._unflushed = _Unflushed()
        if not flags & wire.NBD_FLAG_CAN_MULTI_CONN or self._address.fd >= 0:
            self._max_connections = 1
        self._connections = [connection]
        return self.terms

    def _connect(self, deadline: float, epoch: int) -> Connection:
        tls: TlsMode = "require" if self._tls is not None else "off"
        handshake = ClientHandshake(self._export, tls=tls, contexts=self._contexts)
        sock, ready = _reach(self._address, self.name, handshake, self._tls, self._hostname, deadline)
        assert isinstance(ready, Ready)
        return Connection(sock, ready, timeout=self._request_timeout, epoch=epoch)

    def close(self) -> None:
        """Say good-bye on every connection.  What was written and not flushed is as durable as the server makes it."""
        self._closing.set()
        with self._lock:
            connections, self._connections = self._connections, []
            self._end = self._end or ClosedError(f"{self.name} is closed", node=self.name)
        for connection in connections:
            connection.close()

    def abandon(self) -> None:
        """Let go of the connections without a word."""
        self._closing.set()
        self._end = self._end or ClosedError(f"{self.name} is closed", node=self.name)
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.abandon()

    # -- requests -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`.  Raises StorageError with the server's error, RemoteProtocolError."""
        length = len(view)
        most = self.max_transfer
        if length <= most:
            self._call(wire.NBD_CMD_READ, offset, length, into=view)
            return
        for start in range(0, length, most):
            part = view[start : start + most]
            self._call(wire.NBD_CMD_READ, offset + start, len(part), into=part)

    def write(self, offset: int, parts: Sequence[Data], *, fua: bool = False) -> None:
        """Write `parts`, one after the other.  Raises as `read`."""
        length = sum(len(part) for part in parts)
        if length <= self.max_transfer:
            self._change(wire.NBD_CMD_WRITE, offset, length, wire.NBD_CMD_FLAG_FUA if fua else 0, parts)
            return
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), self.max_transfer):
                piece = view[start : start + self.max_transfer]
                self._change(wire.NBD_CMD_WRITE, offset, len(piece), wire.NBD_CMD_FLAG_FUA if fua else 0, (piece,))
                offset += len(piece)

    def transfer(self, ranges: Sequence[tuple[int, memoryview]], *, writing: bool) -> list[StorageError | None]:
        """Read or write many ranges, each no longer than a request may be, with many requests on their way at a time.

        Gives the error of each, or None.  Raises RemoteProtocolError; no buffer is touched any more when this returns or
        raises.
        """
        results: list[StorageError | None] = [None] * len(ranges)
        again: list[int] = []
        command = wire.NBD_CMD_WRITE if writing else wire.NBD_CMD_READ
        on_their_way: deque[tuple[Connection, range, list[Pending]]] = deque()
        groups = iter(range(first, min(first + _GROUP, len(ranges))) for first in range(0, len(ranges), _GROUP))
        try:
            for group in groups:
                connection = self._connection()
                try:
                    pendings = connection.start_many(command, ranges[group.start : group.stop])
                    on_their_way.append((connection, group, pendings))
                except ConnectionLost:
                    again += group
                if len(on_their_way) == _GROUPS:
                    self._gather(*on_their_way.popleft(), ranges, results, again)
            while on_their_way:
                self._gather(*on_their_way.popleft(), ranges, results, again)
        except BaseException as exc:
            for connection, _group, pendings in on_their_way:
                connection.give_up(pendings, exc)
            if isinstance(exc, RemoteProtocolError):
                self._distrust(exc)
            raise
        for index in again:  # by the way that knows what to do about a lost connection
            offset, view = ranges[index]
            try:
                if writing:
                    self.write(offset, (view,))
                else:
                    self.read(offset, view)
            except StorageError as exc:
                results[index] = exc
        if self._unflushed is not None and self._unflushed.n_bytes > _MAX_UNFLUSHED:
            self.flush()
        return results

    def _gather(
        self,
        connection: Connection,
        group: range,
        pendings: list[Pending],
        ranges: Sequence[tuple[int, memoryview]],
        results: list[StorageError | None],
        again: list[int],
    ) -> None:
        """Wait for a group of requests that were sent together."""
        for number, (index, pending) in enumerate(zip(group, pendings, strict=True)):
            try:
                connection.wait(pending)
                self._check(pending)
                if pending.command == wire.NBD_CMD_WRITE:
                    self._note_change(connection, pending, (ranges[index][1],))
            except ConnectionLost:
                again.append(index)
            except StorageError as exc:
                results[index] = exc
            except BaseException as exc:
                connection.give_up(pendings[number + 1 :], exc)
                raise

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """Make the range read as zero; with `no_hole` its space stays reserved.  Raises as `read`."""
        flags = wire.NBD_CMD_FLAG_NO_HOLE if no_hole else 0
        for start, n in _pieces(offset, length, _MAX_EFFECT):
            self._change(wire.NBD_CMD_WRITE_ZEROES, start, n, flags, ())

    def trim(self, offset: int, length: int) -> None:
        """Tell that the range is not needed.  Raises as `read`."""
        for start, n in _pieces(offset, length, _MAX_EFFECT):
            self._change(wire.NBD_CMD_TRIM, start, n, 0, ())

    def cache(self, offset: int, length: int) -> None:
        """Tell that the range will be needed soon.  Raises as `read`."""
        for start, n in _pieces(offset, length, self.max_transfer):
            self._call(wire.NBD_CMD_CACHE, start, n)

    def flush(self) -> None:
        """Make every write that has returned durable.  Raises as `read`."""
        with self._lock:
            mark = self._unflushed.mark if self._unflushed is not None else 0
        self._call(wire.NBD_CMD_FLUSH)
        with self._lock:
            if self._unflushed is not None:
                self._unflushed.drop(mark)

    def block_status(self, offset: int, length: int, context: str) -> tuple[array[int], array[int]]:
        """(lengths, status flags) of consecutive extents from `offset` on, at least one; the last may reach too far."""

        def ask(connection: Connection) -> tuple[array[int], array[int]]:
            number = connection.terms.context_id(context)
            if number is None:
                raise NbdError(f"{self.name}: the server does not tell {context} any more", node=self.name)
            only = (number,) if connection.terms.export.flags & wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD else ()
            pending = connection.start(wire.NBD_CMD_BLOCK_STATUS, offset, length, contexts=only)
            connection.wait(pending)
            self._check(pending)
            return pending.status[number]

        # Compact requests have 32 bits, and a length must be a multiple of what may be the smallest block.
        if not self.terms.extended:
            length = min(length, (1 << 32) - wire.MAX_MIN_BLOCK)
        return self._persist(ask)

    @property
    def max_transfer(self) -> int:
        """Bytes that one read or write request may have."""
        export = self.terms.export
        most = min(export.max_payload, wire.DEFAULT_MAX_PAYLOAD)
        return most - most % export.min_block

    def _call(self, command: int, offset: int = 0, length: int = 0, *, into: memoryview | None = None) -> None:
        def ask(connection: Connection) -> None:
            pending = connection.start(command, offset, length, into=into)
            connection.wait(pending)
            self._check(pending)

        self._persist(ask)

    def _change(self, command: int, offset: int, length: int, flags: int, data: Sequence[Data]) -> None:
        def ask(connection: Connection) -> None:
            pending = connection.start(command, offset, length, flags=flags, data=data)
            connection.wait(pending)
            self._check(pending)
            self._note_change(connection, pending, data)

        self._persist(ask)
        if self._unflushed is not None and self._unflushed.n_bytes > _MAX_UNFLUSHED:
            self.flush()

    def _note_change(self, connection: Connection, pending: Pending, data: Sequence[Data]) -> None:
        """Keep a change until it is flushed.  Raises ConnectionLost where the answer promises nothing any more."""
        if self._unflushed is None or pending.flags & wire.NBD_CMD_FLAG_FUA:
            return
        with self._lock:
            if connection.epoch != self._epoch:
                raise ConnectionLost("the connection was lost")
            self._unflushed.add(pending, data)

    def _check(self, pending: Pending) -> None:
        """Raises StorageError where the server has answered by an error."""
        if pending.error:
            number = wire.errno_of(pending.error)
            operation = _OPERATIONS[pending.command]
            said = f" ({pending.message})" if pending.message else ""
            raise StorageError(
                f"{self.name}: {operation} of {pending.length} bytes at {pending.offset} failed: {os.strerror(number)}{said}",
                errno=number,
                operation=operation,
                node=self.name,
            )

    # -- connections --------------------------------------------------------------------------------------------------

    def _persist(self, ask: Callable[[Connection], _R]) -> _R:
        """Do a request, again on a new connection where the old one is lost and that is wanted."""
        while True:
            connection = self._connection()
            try:
                return ask(connection)
            except ConnectionLost as exc:
                self._lose(connection, exc)
            except RemoteProtocolError as exc:
                self._distrust(exc)
                raise

    def _connection(self) -> Connection:
        """The connection with the least to do; one more where all are busy and there may be more."""
        connections = self._connections
        if not connections:
            return self._reconnect()
        best = connections[0]
        if self._max_connections == 1:
            return best
        least = best.n_in_flight
        for other in connections[1:]:
            n = other.n_in_flight
            if n < least:
                best, least = other, n
        if least >= _BUSY and len(connections) < self._max_connections and not self._opening_another:
            return self._open_another() or best
        return best

    def _open_another(self) -> Connection | None:
        with self._lock:
            if self._opening_another or len(self._connections) >= self._max_connections:
                return None
            self._opening_another = True
            epoch = self._epoch
        try:
            connection = self._connect(time.monotonic() + _CONNECT_TIMEOUT, epoch)
            self._refuse_other_terms(connection.terms)
        except BlocklibError:  # the one there is does as well
            self._max_connections = 1
            return None
        finally:
            self._opening_another = False
        with self._lock:
            if epoch == self._epoch and self._end is None:
                self._connections = [*self._connections, connection]
                return connection
        connection.close()
        return None

    def _lose(self, connection: Connection, cause: ConnectionLost) -> None:
        """A connection is gone, and the others with it: a server's connections live and die together.

        Raises StorageError where there will be no other.
        """
        with self._lock:
            mine = connection.epoch == self._epoch
            dropped = self._connections if mine else []
            if mine:
                self._connections = []
                self._epoch += 1
                self._lost_at = time.monotonic()
                if not self._reconnect_delay and self._end is None:
                    text = f"{self.name}: the connection was lost: {cause}"
                    self._end = StorageError(text, errno=errno.EIO, operation="nbd", node=self.name)
            end = self._end
        for other in dropped:
            other.drop(str(cause))
        if end is not None:
            raise _again(end) from cause

    def _distrust(self, exc: RemoteProtocolError) -> None:
        """The server does not keep to the protocol: whatever it says from now on is worth nothing."""
        with self._lock:
            connections, self._connections = self._connections, []
            self._end = self._end or RemoteProtocolError(f"{self.name}: {exc}", node=self.name)
        exc.node = exc.node or self.name
        for connection in connections:
            connection.drop(f"the server broke the protocol: {exc}")

    def _reconnect(self) -> Connection:
        """A new connection, for which requests wait until `reconnect_delay` is over.  Raises StorageError, NbdError."""
        with self._connecting:
            while True:
                with self._lock:
                    if self._end is not None:
                        raise _again(self._end)
                    if self._connections:
                        return self._connections[0]
                    epoch, deadline = self._epoch, self._lost_at + self._reconnect_delay
                now = time.monotonic()
                try:
                    connection = self._connect(max(deadline, now + 1), epoch)
                    try:
                        self._refuse_other_terms(connection.terms)
                        self._write_again(connection)
                    except BaseException:
                        connection.drop("the connection was given up")
                        raise
                except (StorageError, ConnectionLost) as exc:
                    if time.monotonic() + _RETRY_PAUSE >= deadline or self._closing.wait(_RETRY_PAUSE):
                        text = f"{self.name}: the connection was lost, and there is no other: {exc}"
                        raise StorageError(text, errno=errno.EIO, operation="nbd", node=self.name) from exc
                    continue
                with self._lock:
                    if self._end is None:
                        self._connections = [connection]
                        return connection
                connection.close()

    def _refuse_other_terms(self, terms: Terms) -> None:
        """Raises NbdError, for good, where the export has become another one."""
        old, new = self.terms, terms
        same = (
            old.export.size == new.export.size
            and not old.export.flags & ~new.export.flags & ~wire.NBD_FLAG_CAN_MULTI_CONN
            and (old.export.flags ^ new.export.flags) & wire.NBD_FLAG_READ_ONLY == 0
            and new.export.min_block <= old.export.min_block
            and new.export.max_payload >= self.max_transfer
            and old.extended <= new.extended
        )
        if not same:
            self._end = NbdError(f"{self.name}: the export has changed while there was no connection", node=self.name)
            raise _again(self._end)

    def _write_again(self, connection: Connection) -> None:
        """Send again what was acknowledged and not flushed.  Raises ConnectionLost; StorageError, for good."""
        with self._lock:
            changes = list(self._unflushed or ())
        for change in changes:
            data = (change.data,) if change.data else ()
            pending = connection.start(change.command, change.offset, change.length, flags=change.flags, data=data)
            connection.wait(pending)
            try:
                self._check(pending)
            except StorageError as exc:
                text = f"{self.name}: writes are lost: they were not flushed, and cannot be repeated: {exc}"
                self._end = StorageError(text, errno=errno.EIO, operation="nbd", node=self.name)
                raise _again(self._end) from exc


_NO_TERMS: Final = Terms(Export("", 0, 0))


def _again(error: BlocklibError) -> BlocklibError:
    """The same error as a new object: one raised twice would collect the tracebacks of all who met it."""
    if isinstance(error, StorageError):
        return type(error)(str(error), errno=error.errno, operation=error.operation, node=error.node)
    return type(error)(str(error), node=error.node)


def _pieces(offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """A range in parts of at most `most` bytes: (offset, length)."""
    return [(offset + done, min(most, length - done)) for done in range(0, length, most)]


def _reach(
    address: Address,
    name: str,
    handshake: ClientHandshake,
    tls: ssl.SSLContext | None,
    hostname: str | None,
    deadline: float,
) -> tuple[socket, Ready | ExportList]:
    try:
        return negotiate(dial(address, deadline), handshake, tls, hostname, deadline)
    except BlocklibError as exc:
        if exc.node is None:
            exc.node = name
        raise
    except OSError as exc:
        raise storage_error(exc, name) from exc


def list_exports(
    address: Address,
    *,
    name: str = "",
    tls: ssl.SSLContext | None = None,
    hostname: str | None = None,
    timeout: float = _CONNECT_TIMEOUT,
) -> tuple[Listed, ...]:
    """The exports that a server tells of.  Raises StorageError, RequestError, RemoteProtocolError, NbdError."""
    handshake = ClientHandshake(tls="require" if tls is not None else "off", listing=True)
    sock, found = _reach(address, name or str(address), handshake, tls, hostname, time.monotonic() + timeout)
    assert isinstance(found, ExportList)
    sock.close()
    return found.exports
