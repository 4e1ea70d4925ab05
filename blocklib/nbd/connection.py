"""One connection to a server: a socket with the client's engine on it, for any number of threads at a time.

There is no thread that reads: of those that wait for replies, one receives for all, wakes who is answered, and hands the
task on when its own request is.  A lone thread so pays for one send and one receive a request and no switch.  A connection
that breaks stays broken: every request in flight ends by `ConnectionLost`, or by the RemoteProtocolError that broke it.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from blocklib.errors import BlocklibError, NbdError, RemoteProtocolError, StorageError, UsageError
from blocklib.nbd import wire
from blocklib.nbd.engine import ExportList, Ready, Terms, TlsDue
from blocklib.nbd.engine_client import ClientTransmission, Pending

if TYPE_CHECKING:
    import ssl

    from blocklib.nbd.engine_client_handshake import ClientHandshake
    from blocklib.nbd.uri import Address

Data: TypeAlias = "memoryview | bytes | bytearray"

_DONT_WAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)
_WAIT_FOR_ALL: Final = getattr(socket, "MSG_WAITALL", 0)
_NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
_IOV_MAX: Final = 1024
_JOINED: Final = 1 << 16
"""Through TLS, up to so many bytes are sent as one record rather than as a record each part."""
_REST: Final = 10.0
"""Seconds for a receiver to leave a broken connection, which takes microseconds; a thread that was killed never does."""
_SENDER_LOOKS: Final = 0.1
"""Seconds until a sender that is held up looks whether it is its turn to receive, which would free the server's hands."""


class ConnectionLost(Exception):
    """The connection ended, or nothing came for too long; a request in flight was perhaps done, perhaps not."""


# -- connecting --------------------------------------------------------------------------------------------------------


def dial(address: Address, deadline: float) -> socket.socket:
    """A connected socket.  Raises OSError, TimeoutError at `deadline` (of time.monotonic)."""
    left = max(deadline - time.monotonic(), 0.001)
    if address.fd >= 0:
        sock = socket.socket(fileno=os.dup(address.fd))
        sock.settimeout(left)
        return sock
    if address.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(left)
            sock.connect(address.path)
        except BaseException:
            sock.close()
            raise
        return sock
    try:
        sock = socket.create_connection((address.host, address.port), left)
    except UnicodeError as exc:  # not even the shape of a host's name
        raise socket.gaierror(socket.EAI_NONAME, "no host can have that name") from exc
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def negotiate(
    sock: socket.socket, handshake: ClientHandshake, context: ssl.SSLContext | None, hostname: str | None, deadline: float
) -> tuple[socket.socket, Ready | ExportList]:
    """Go through the handshake; returns the socket to go on with, which TLS has replaced.  Closes it on any error.

    Raises RequestError, RemoteProtocolError, NbdError where TLS fails, OSError, TimeoutError at `deadline`.
    """
    try:
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.sendall(handshake.data_to_send())
            for event in handshake.receive_data(sock.recv(65536)):
                if isinstance(event, TlsDue):
                    assert context is not None
                    sock = _start_tls(sock, context, hostname)
                    handshake.tls_started()
                elif isinstance(event, (Ready, ExportList)):
                    if isinstance(event, ExportList):
                        sock.sendall(handshake.data_to_send())
                    return sock, event
    except BlocklibError:
        _leave_politely(sock, handshake)
        raise
    except BaseException:
        sock.close()
        raise


def _leave_politely(sock: socket.socket, handshake: ClientHandshake) -> None:
    try:
        sock.sendall(handshake.data_to_send())
    except OSError:
        return  # the peer is gone, which is what was wanted
    finally:
        sock.close()


def _start_tls(sock: socket.socket, context: ssl.SSLContext, hostname: str | None) -> socket.socket:
    import ssl

    try:
        return context.wrap_socket(sock, server_hostname=hostname)
    except ssl.SSLCertVerificationError as exc:
        raise NbdError(f"the server's certificate is not accepted: {exc.verify_message}") from exc
    except (ssl.SSLError, ConnectionError) as exc:
        reason = getattr(exc, "reason", None) or os.strerror(exc.errno or errno.ECONNRESET)
        raise NbdError(f"the TLS handshake failed: {reason}") from exc
    except ValueError as exc:  # no host name to be checked against the certificate
        raise UsageError(f"TLS needs the server's name, to be checked against its certificate: tls-hostname ({exc})") from exc


# -- what bytes go through ---------------------------------------------------------------------------------------------


class _PlainStream:
    """A blocking socket: one call receives; sends take what the kernel takes at once."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.socket = sock
        sock.settimeout(None)
        if timeout:
            seconds = int(timeout)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, int((timeout - seconds) * 1_000_000) or 1)
            )

    def receive(self, buffer: memoryview, *, whole: bool) -> int:
        """Bytes received, 0 at the end of the file.  With `whole` all of `buffer` is due.  Raises OSError, TimeoutError."""
        try:
            return self.socket.recv_into(buffer, 0, _WAIT_FOR_ALL if whole else 0)
        except BlockingIOError as exc:
            raise TimeoutError from exc

    def send(self, parts: Sequence[Data]) -> int:
        """Bytes that were taken, perhaps 0.  Raises OSError."""
        try:
            return self.socket.sendmsg(parts[:_IOV_MAX], (), _DONT_WAIT | _NO_SIGNAL)
        except BlockingIOError:
            return 0

    def wait(self, *, read: bool, timeout: float) -> bool:
        """Wait until something can be sent, or with `read` received: whether the latter."""
        return _poll(self.socket, select.POLLOUT | (select.POLLIN if read else 0), timeout)


class _TlsStream:
    """A TLS socket, which must not be used by two threads at once: short calls under a lock, all waiting outside it."""

    def __init__(self, sock: ssl.SSLSocket, timeout: float) -> None:
        self.socket = sock
        sock.settimeout(0)
        self._timeout = timeout
        self._lock = threading.Lock()

    def receive(self, buffer: memoryview, *, whole: bool) -> int:
        while True:
            wanted = self._receive_now(buffer)
            if wanted >= 0:
                return wanted
            if not _poll(self.socket, select.POLLIN if wanted == -1 else select.POLLOUT, self._timeout or None, any_=True):
                raise TimeoutError

    def _receive_now(self, buffer: memoryview) -> int:
        """Bytes received; -1 where the socket must be readable for that, -2 writable."""
        import ssl

        try:
            with self._lock:
                return self.socket.recv_into(buffer)
        except ssl.SSLWantReadError:
            return -1
        except ssl.SSLWantWriteError:
            return -2

    def send(self, parts: Sequence[Data]) -> int:
        import ssl

        data: Data = parts[0]
        if len(parts) > 1 and len(data) < _JOINED:
            total = 0
            small = []
            for part in parts:
                total += len(part)
                if total > _JOINED:
                    break
                small.append(part)
            data = b"".join(small) if len(small) > 1 else data
        try:
            with self._lock:
                return self.socket.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def wait(self, *, read: bool, timeout: float) -> bool:
        return _poll(self.socket, select.POLLOUT | (select.POLLIN if read else 0), timeout)


def _poll(sock: socket.socket, events: int, timeout: float | None, *, any_: bool = False) -> bool:
    """Whether the socket is readable (with `any_`: whether anything happened) before `timeout`."""
    poller = select.poll()
    poller.register(sock, events)
    found = poller.poll(None if timeout is None else timeout * 1000)
    return any(any_ or happened & ~select.POLLOUT for _, happened in found)


# -- the connection ----------------------------------------------------------------------------------------------------


class Connection:
    """A connection in its transmission phase.  `timeout`: seconds without a byte while something is due; 0: none."""

    def __init__(self, sock: socket.socket, ready: Ready, *, timeout: float, epoch: int = 0) -> None:
        import sys

        self.terms: Terms = ready.terms
        self.epoch = epoch
        self._timeout = timeout
        self._engine = ClientTransmission(ready.terms, ready.trailing)
        ssl_module = sys.modules.get("ssl")
        is_tls = ssl_module is not None and isinstance(sock, ssl_module.SSLSocket)
        self._stream: _PlainStream | _TlsStream = _TlsStream(sock, timeout) if is_tls else _PlainStream(sock, timeout)  # type: ignore[arg-type]
        self._sending = threading.Lock()  # one request at a time is put on the wire
        self._state = threading.Lock()  # guards: _users, broken, taking and giving up _receiving, and waiters against waking
        self._receiving = threading.Lock()  # held by the thread that receives
        self._users = 0
        """Requests that somebody has started and not yet waited for: the socket stays open for them."""
        self.broken: BaseException | None = None

    @property
    def n_in_flight(self) -> int:
        """Requests that wait for an answer."""
        return len(self._engine.in_flight)

    def start(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        into: memoryview | None = None,
        data: Sequence[Data] = (),
        contexts: Sequence[int] = (),
    ) -> Pending:
        """Send a request; `wait` must be called for what this returns.  Raises LocalProtocolError, ConnectionLost."""
        self._enter(1)
        try:
            pending = self._engine.request(command, offset, length, flags=flags, into=into, contexts=contexts)
            self._put_on_wire([pending.head, *data] if data else [pending.head])
        except BaseException:
            self._leave(1)
            raise
        return pending

    def start_many(self, command: int, ranges: Sequence[tuple[int, memoryview]]) -> list[Pending]:
        """Send reads or writes together: offset and buffer of each.  `wait` must be called for each.  Raises as `start`."""
        self._enter(len(ranges))
        try:
            request = self._engine.request
            if command == wire.NBD_CMD_READ:
                pendings = [request(command, offset, len(view), into=view) for offset, view in ranges]
                self._put_on_wire([b"".join([pending.head for pending in pendings])])
            else:
                pendings = [request(command, offset, len(view)) for offset, view in ranges]
                parts: list[Data] = []
                for pending, (_, view) in zip(pendings, ranges, strict=True):
                    parts += (pending.head, view)
                self._put_on_wire(parts)
        except BaseException:
            self._leave(len(ranges))
            raise
        return pendings

    def _enter(self, requests: int) -> None:
        with self._state:
            if self.broken is not None:
                raise self._ended()
            self._users += requests

    def _put_on_wire(self, parts: list[Data]) -> None:
        try:
            with self._sending:
                self._send(parts)
        except BaseException as exc:
            if not isinstance(exc, (BlocklibError, ConnectionLost)):
                self._break(exc)  # part of a message may be on its way
            self._rest()
            if isinstance(exc, OSError) and not isinstance(exc, BlocklibError):
                raise self._ended() from exc
            raise

    def _send(self, parts: list[Data]) -> None:
        missing = sum(len(part) for part in parts)
        since = time.monotonic()
        while True:
            n = self._stream.send(parts)
            missing -= n
            if not missing:
                return
            if n:
                parts = _after(parts, n)
                since = time.monotonic()
            self._make_way()
            if self._timeout and time.monotonic() - since > self._timeout:
                raise TimeoutError

    def _make_way(self) -> None:
        """The server takes no more: perhaps because nobody takes its replies.  Wait for room, and receive meanwhile."""
        with self._state:
            if self.broken is not None:
                raise self._ended()
            ours = self._receiving.acquire(blocking=False)
        if not ours:
            self._stream.wait(read=False, timeout=_SENDER_LOOKS)
            return
        try:
            if self._stream.wait(read=True, timeout=_SENDER_LOOKS):
                self._receive()
        finally:
            self._hand_on()

    def wait(self, pending: Pending) -> None:
        """Wait until the request is answered.  Raises RemoteProtocolError, ConnectionLost."""
        try:
            while not pending.answered:
                with self._state:
                    if self.broken is not None:
                        raise self._ended()
                    receives = self._receiving.acquire(blocking=False)
                    if not receives:
                        waiter = threading.Lock()
                        waiter.acquire()
                        pending.waiter = waiter
                if not receives:
                    if not pending.answered:  # else whoever answered it may have come too early to see the waiter
                        waiter.acquire()
                    continue
                try:
                    while not pending.answered:
                        self._receive()
                finally:
                    self._hand_on()
        except BaseException as exc:
            self._break(exc)
            self._rest()
            raise
        finally:
            self._leave(1)

    def give_up(self, pendings: Sequence[Pending], cause: BaseException) -> None:
        """Instead of waiting for these requests: break the connection, so that no buffer of theirs is touched any more."""
        if pendings:
            self._break(cause if isinstance(cause, RemoteProtocolError) else ConnectionLost("requests were given up"))
            self._rest()
            self._leave(len(pendings))

    def _rest(self) -> None:
        """Return when no thread receives on the broken connection: from then on nothing is written into any buffer."""
        if self._receiving.acquire(timeout=_REST):
            self._receiving.release()

    def _receive(self) -> None:
        """Receive once and wake who is answered; only for the thread that holds `_receiving`."""
        try:
            engine = self._engine
            n = self._stream.receive(engine.get_buffer(), whole=engine.in_payload)
            if not n:
                raise ConnectionLost("the server closed the connection")
            finished = engine.buffer_updated(n)
        except BaseException as exc:
            self._break(exc)
            if isinstance(exc, RemoteProtocolError) or not isinstance(exc, (OSError, ConnectionLost)):
                raise
            raise self._ended() from exc
        for pending in finished:
            if pending.waiter is not None:
                with self._state:
                    _wake(pending)

    def _hand_on(self) -> None:
        """Let another thread that waits receive from now on."""
        with self._state:
            self._receiving.release()
            for pending in list(self._engine.in_flight.values()):
                if _wake(pending):
                    return

    def _ended(self) -> BaseException:
        """The error for a request on a broken connection."""
        cause = self.broken
        if isinstance(cause, RemoteProtocolError):
            return RemoteProtocolError(str(cause), node=cause.node)
        if isinstance(cause, ConnectionLost):
            return ConnectionLost(str(cause))
        if isinstance(cause, TimeoutError):
            return ConnectionLost(f"the server gave no sign of life for {self._timeout:g} seconds")
        if isinstance(cause, OSError):
            return ConnectionLost(os.strerror(cause.errno) if cause.errno else str(cause))
        return ConnectionLost("a request was interrupted")

    def _break(self, cause: BaseException) -> None:
        with self._state:
            if self.broken is not None:
                return
            self.broken = cause
            for pending in list(self._engine.in_flight.values()):
                _wake(pending)
            self._shut_down()
            if not self._users:
                self._stream.socket.close()

    def _shut_down(self) -> None:
        """End both directions, so that no thread stays in a call on the socket."""
        try:
            socket.socket.shutdown(self._stream.socket, socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def _leave(self, requests: int) -> None:
        with self._state:
            self._users -= requests
            if self.broken is not None and not self._users:
                self._stream.socket.close()

    def drop(self, why: str) -> None:
        """Give the connection up: requests in flight end by ConnectionLost."""
        self._break(ConnectionLost(why))

    def close(self) -> None:
        """Say good-bye, which ends the session by the rules; nothing may be in flight."""
        if self.broken is None:
            try:
                disconnect = self._engine.request(wire.NBD_CMD_DISC)
                with self._sending:
                    self._stream.send([disconnect.head])
            except OSError as exc:  # the server has gone first
                self._break(exc)
            self.drop("the connection was closed")

    def abandon(self) -> None:
        """Let go of the socket without a word, which is also right in the child of a fork: the connection is the parent's."""
        self.broken = self.broken or ConnectionLost("the connection was given up")
        self._stream.socket.close()


def _wake(pending: Pending) -> bool:
    """Wake the thread that waits for a request, if one does; the connection's `_state` is held."""
    waiter = pending.waiter
    if waiter is None:
        return False
    pending.waiter = None
    waiter.release()
    return True


def _after(parts: Sequence[Data], n: int) -> list[Data]:
    """What is left of `parts` after their first `n` bytes."""
    for index, part in enumerate(parts):
        if n < len(part):
            return [memoryview(part)[n:], *parts[index + 1 :]]
        n -= len(part)
    return []


def explain_os_error(exc: OSError) -> str:
    """What went wrong, in words."""
    if isinstance(exc, TimeoutError) and not exc.errno:
        return "it does not answer"
    if isinstance(exc, socket.gaierror):
        return str(exc.strerror)
    return os.strerror(exc.errno) if exc.errno else str(exc)


def storage_error(exc: OSError, name: str) -> StorageError:
    """The error for a server that cannot be reached."""
    number = errno.ETIMEDOUT if isinstance(exc, TimeoutError) else exc.errno
    if isinstance(exc, socket.gaierror):
        number = errno.EHOSTUNREACH
    return StorageError(
        f"{name}: no connection to the server: {explain_os_error(exc)}", errno=number, operation="connect", node=name
    )
