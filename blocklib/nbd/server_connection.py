"""One client in the transmission phase: requests in, replies out, never waiting for either."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Final

from blocklib.buffers import PIECE, zeroes
from blocklib.errors import RemoteProtocolError
from blocklib.nbd import wire
from blocklib.nbd.engine_server import ServerTransmission
from blocklib.nbd.server_loop import READ, WRITE
from blocklib.nbd.server_work import FileRange, Piece, Worker

if TYPE_CHECKING:
    from blocklib.nbd.engine import Terms
    from blocklib.nbd.engine_server import Request
    from blocklib.nbd.server_export import Exported
    from blocklib.nbd.server_limits import ServerLimits
    from blocklib.nbd.server_loop import Loop
    from blocklib.nbd.server_pool import Pool

_log = logging.getLogger("blocklib.nbd")

_WAITS: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_MOST_PIECES: Final = 512
"""Pieces that one sendmsg takes; systems have a limit, Linux 1024."""
_TURN: Final = 4 << 20
"""Bytes received from one client before the others have their turn."""
_SMALL: Final = 16 << 10
"""A read of at most so many bytes is done at once, by the loop's thread, while storage answers fast."""
_SMALL_AT_ONCE: Final = 64
_MEDIUM: Final = 1 << 20
"""And so is a longer one, or a write, that has at most so many bytes, unless clients of another disk would have to wait."""
_SLOW: Final = 0.000_3
"""Seconds for one small read, on average, that say that storage is slow."""
_SLOW_MEDIUM: Final = 0.004
"""And for one that is longer."""
_SLOW_REQUESTS: Final = 512
"""So many requests go to other threads then, until the next look."""
_TOGETHER: Final = 16
"""Replies without data that wait for each other."""
_SPARE: Final = 2
"""Buffers that one connection keeps for the next writes, 1 MiB each at most."""
_QUICK: Final = frozenset({wire.NBD_CMD_READ, wire.NBD_CMD_WRITE, wire.NBD_CMD_WRITE_ZEROES})
_AHEAD: Final = 2 << 20
"""Bytes of replies that wait for the client to take them, before more is read for it."""


class Connection:
    """Receives in the loop's thread, works there or in the pool, and sends from whichever thread has something to send."""

    def __init__(
        self,
        loop: Loop,
        pool: Pool,
        limits: ServerLimits,
        sock: socket.socket,
        peer: str,
        exported: Exported,
        terms: Terms,
        trailing: bytes,
        closed: Callable[[Connection], object],
        alone: Callable[[], bool],
    ) -> None:
        self.exported = exported
        self.peer = peer
        self._loop = loop
        self._pool = pool
        self._limits = limits
        self._closed_call = closed
        self._alone = alone
        self._sock = sock
        self._fd = sock.fileno()
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._tx = ServerTransmission(terms, trailing, allocate=self._allocate, max_payload=limits.request_bytes)
        self._worker = Worker(exported, self._tx, send_files=not self._tls)
        # Of the loop's thread alone:
        self._waiting: deque[Request] = deque()
        self._finishing = False
        self._slow_requests = 0
        self._replies: list[Piece] = []
        """Replies of this turn, sent together: each sending wakes the client up, which costs more than the request."""
        self._spare: list[bytearray] = []
        """Buffers of writes that are done, for the next ones."""
        # Of all threads:
        self._lock = threading.Lock()  # guards what follows; not held while sending
        self._jobs = 0
        self._job_bytes = 0
        self._output: deque[Piece] = deque()
        self._output_bytes = 0
        self._sending = False
        """A thread is at it, and takes whatever is added to the output meanwhile."""
        self._blocked = False
        """The client does not take more at present: the loop waits until it does."""
        self._stalled = False
        """Requests wait for others to be done, or for the client to take replies."""
        self._dead = False
        self._socket_closed = False
        self._reported = False

    # -- receiving: the loop's thread ---------------------------------------------------------------------------------

    def start(self, unsent: bytes) -> None:
        """Begin, with what the handshake has left to be sent and has received too much."""
        if unsent:
            self._send([unsent])
        try:
            self._waiting.extend(self._tx.pending())
        except RemoteProtocolError as exc:
            self._break(exc)
        self._resume()

    def finish(self) -> None:
        """Take no more requests; refuse those that have not begun, and close once the others are answered."""
        refused = [
            self._tx.error(request, wire.NBD_ESHUTDOWN, "the server is stopping")
            for request in self._waiting
            if request.command != wire.NBD_CMD_DISC
        ]
        self._waiting.clear()
        self._finishing = True
        if refused:
            self._send(refused)
        self._settle()

    def abort(self) -> None:
        """Close at once; what is being done will be done, but nobody hears of it."""
        with self._lock:
            self._dead = True
        self._settle()

    def ready(self, events: int) -> None:
        """The socket can be read or written."""
        if events & WRITE:
            self._resume_sending()
        if events & READ and not self._dead:
            self._receive()

    def fail(self, exc: Exception) -> None:
        self._break(exc)
        self._settle()

    def _receive(self) -> None:
        tx, sock = self._tx, self._sock
        taken = 0
        try:
            while not (self._dead or self._finishing or self._stalled):
                buffer = tx.get_buffer()
                n = sock.recv_into(buffer)
                requests = tx.buffer_updated(n)
                if requests:
                    self._waiting.extend(requests)
                    self._advance()
                taken += n
                if taken >= _TURN:
                    self._loop.call(self._receive)
                    return
                if n < len(buffer) and not self._tls:  # there is no more; TLS may have kept some for itself
                    return
        except _WAITS:
            return
        except (OSError, RemoteProtocolError) as exc:
            self._break(exc)
            self._settle()
        finally:
            self._send_replies()

    def _allocate(self, length: int) -> bytearray:
        """The buffer for what is to be written: one that was used, or a new one, which has to be cleared first."""
        if length > _MEDIUM or length <= _SMALL:
            return bytearray(length)
        for index, buffer in enumerate(self._spare):
            if len(buffer) >= length:
                return self._spare.pop(index)
        return bytearray(1 << (length - 1).bit_length())

    def _send_replies(self) -> None:
        if self._replies:
            replies, self._replies = self._replies, []
            self._send(replies)

    def _resume(self) -> None:
        """Something has changed that requests, or the end, may have waited for."""
        self._advance()
        self._receive()
        self._send_replies()

    def _advance(self) -> None:
        """Begin all requests that there is room for."""
        waiting = self._waiting
        while waiting and not self._dead:
            self._begin_requests()
            with self._lock:
                self._stalled = bool(waiting) and not self._has_room(waiting[0])
            if self._stalled:
                break
        if self._stalled or self._finishing:
            self._send_replies()
        self._settle()

    def _has_room(self, request: Request) -> bool:
        """Whether one more request may begin.  Always so when nothing is in the way that will be gone one day."""
        if request.command == wire.NBD_CMD_READ and self._output_bytes > _AHEAD:
            return False
        buffered = self._job_bytes + self._output_bytes
        return self._jobs < self._limits.requests and (
            not buffered or buffered + _payload(request) <= self._limits.buffered_bytes
        )

    def _begin_requests(self) -> None:
        waiting, fast = self._waiting, self._slow_requests == 0
        longest = (_MEDIUM if self._alone() else _SMALL) if fast else -1
        small: list[Request] = []
        while waiting:
            request = waiting[0]
            command, length = request.command, request.length
            if command == wire.NBD_CMD_READ and length <= _SMALL and fast and not request.error:
                small.append(waiting.popleft())
                if len(small) == _SMALL_AT_ONCE:
                    break
                continue
            if small or not self._has_room(request):
                break
            waiting.popleft()
            if request.error:
                self._send([self._tx.error(request, request.error, request.message)])
            elif command == wire.NBD_CMD_DISC:
                self._finishing = True
            elif command in _QUICK and length <= longest and not request.flags & wire.NBD_CMD_FLAG_FUA:
                begin = perf_counter()
                pieces = self._worker.do(request)
                if perf_counter() - begin > _SLOW_MEDIUM:
                    self._slow_requests = _SLOW_REQUESTS
                    longest = -1
                self._replies += pieces
                if command == wire.NBD_CMD_READ or len(self._replies) >= _TOGETHER:
                    self._send_replies()
                elif command == wire.NBD_CMD_WRITE and length > _SMALL and len(self._spare) < _SPARE:
                    assert request.data is not None
                    self._spare.append(request.data.obj)  # type: ignore[arg-type]
                    request.data = None
            else:
                self._slow_requests = max(0, self._slow_requests - 1)
                with self._lock:
                    self._jobs += 1
                    self._job_bytes += _payload(request)
                self._pool.submit(self._work, request)
        if small:
            begin = perf_counter()
            replies = self._worker.read_small(small)
            if perf_counter() - begin > _SLOW * len(small):
                self._slow_requests = _SLOW_REQUESTS
            self._send([replies])

    def _settle(self) -> None:
        """Wait for what is due next: requests, a client that takes replies, or the end."""
        with self._lock:
            over = self._dead or (self._finishing and not (self._jobs or self._output or self._waiting))
            if over:
                self._dead = True
                self._waiting.clear()
                self._output.clear()
                self._output_bytes = 0
            close = over and not self._sending
            ended = close and not self._jobs
            events = READ if not (over or self._finishing or self._stalled) else 0
            if self._blocked and not over:
                events |= WRITE
        if not self._socket_closed:
            self._loop.watch(self._fd, events, self)
            if close:
                self._socket_closed = True
                self._loop.forget(self._fd)
                self._sock.close()
        if ended and not self._reported:
            self._reported = True
            self._closed_call(self)

    def _break(self, exc: Exception) -> None:
        """The connection is of no more use."""
        if not self._dead:
            _log.info("%s: %s", self.peer, exc)
        with self._lock:
            self._dead = True

    # -- working: a thread of the pool --------------------------------------------------------------------------------

    def _work(self, request: Request) -> None:
        pieces: list[Piece] = [] if self._dead else self._worker.do(request)
        with self._lock:
            self._jobs -= 1
            self._job_bytes -= _payload(request)
            waited_for = self._stalled or self._finishing or self._dead
            sender = self._add_output(pieces)
        if sender:
            self._flush()
        if waited_for:
            self._loop.call(self._resume)

    # -- sending ------------------------------------------------------------------------------------------------------

    def _send(self, pieces: Sequence[Piece]) -> None:
        """Send whole replies, now or when the client takes them."""
        with self._lock:
            sender = self._add_output(pieces)
        if sender:
            self._flush()

    def _add_output(self, pieces: Sequence[Piece]) -> bool:
        """Add to what is to be sent, under the lock; True: it falls to the caller to call `_flush`."""
        if self._dead or not pieces:
            return False
        self._output.extend(pieces)
        self._output_bytes += sum([len(piece) for piece in pieces])
        if self._sending or self._blocked:
            return False
        if self._tls and not self._loop.is_current():  # a TLS connection is for one thread
            self._loop.call(self._resume_sending)
            return False
        self._sending = True
        return True

    def _resume_sending(self) -> None:
        """In the loop's thread: go on, if nobody else does."""
        with self._lock:
            self._blocked = False
            if self._sending or not self._output or self._dead:
                return
            self._sending = True
            waits_for_disk = isinstance(self._output[0], FileRange)
        if waits_for_disk:
            self._pool.submit(Connection._flush, self)
        else:
            self._flush()
        self._settle()

    def _flush(self) -> None:
        """Send until there is no more, or the client takes no more.  The caller has set `_sending`."""
        output = self._output
        more = True
        while more:
            with self._lock:
                pieces = list(islice(output, _MOST_PIECES)) if not self._dead else []
            sent, more = 0, False
            try:
                if pieces:
                    sent, more = self._transmit(pieces)
            except _WAITS:
                pass
            except OSError as exc:
                self._break(exc)
            with self._lock:
                if self._dead:
                    more = False
                else:
                    self._remove_output(sent)
                    self._blocked = bool(output) and not more
                    more = bool(output) and more
                if not more:
                    self._sending = False
                    waited_for = self._dead or self._blocked or self._stalled or self._finishing
        if waited_for:
            self._loop.call(self._resume)

    def _transmit(self, pieces: list[Piece]) -> tuple[int, bool]:
        """(bytes sent, whether the client may take more) of some pieces."""
        first = pieces[0]
        if isinstance(first, FileRange):
            sent = os.sendfile(self._fd, first.fd, first.offset, first.length)
            if not sent:  # the file has become shorter: past its end it reads as zero
                sent = self._sock.send(zeroes(min(first.length, PIECE)))
            return sent, True
        if self._tls:
            few = [piece for piece in pieces[:_FEW] if not isinstance(piece, FileRange)]
            return self._sock.send(first if len(first) > _SMALL else b"".join(few)), True
        in_memory: list[bytes | bytearray | memoryview] = []
        flags = 0
        for piece in pieces:
            if isinstance(piece, FileRange):
                flags = _MORE
                break
            in_memory.append(piece)
        sent = self._sock.sendmsg(in_memory, (), flags)
        return sent, sent == sum([len(piece) for piece in in_memory])

    def _remove_output(self, sent: int) -> None:
        output = self._output
        self._output_bytes -= sent
        while sent:
            piece = output[0]
            if sent < len(piece):
                if isinstance(piece, FileRange):
                    output[0] = FileRange(piece.fd, piece.offset + sent, piece.length - sent)
                else:
                    output[0] = memoryview(piece)[sent:]
                return
            sent -= len(piece)
            output.popleft()


_FEW: Final = 16
"""Pieces that are made one for TLS, if the first is short."""
_MORE: Final = getattr(socket, "MSG_MORE", 0)


def _payload(request: Request) -> int:
    """The bytes of memory that a request takes while it is worked at."""
    return request.length if request.command <= wire.NBD_CMD_WRITE and not request.error else 0
