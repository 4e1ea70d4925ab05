"""What a server keeps in its own thread: who is coming, who is there, and who has to go."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from blocklib.nbd.server_connection import Connection
from blocklib.nbd.server_loop import READ, Loop
from blocklib.nbd.server_negotiation import Negotiation
from blocklib.nbd.server_pool import Pool
from blocklib.nbd.tls import peer_name

if TYPE_CHECKING:
    from blocklib.nbd.engine import Export, Terms
    from blocklib.nbd.server_export import Exported
    from blocklib.nbd.server_limits import ServerLimits

_log = logging.getLogger("blocklib.nbd")

_ACCEPTED_AT_ONCE: Final = 64
_PAUSE: Final = 0.2
"""Seconds without new clients after the system had no descriptor, or no memory, for one."""
_SEND_BUFFER: Final = 1 << 20
"""Bytes that the system may keep for a client on this host: a reply then needs one system call."""

Authorize = Callable[[str], bool]


class House:
    """The clients of one server.  Methods are for the loop's thread unless they say otherwise."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        limits: ServerLimits,
        *,
        tls: ssl.SSLContext | None,
        authorize: Authorize | None,
        shared: int,
        persistent: bool,
    ) -> None:
        self.loop = Loop()
        self.pool = Pool(limits.threads)
        self.stopped = threading.Event()
        """Nobody is served any more: the server was told to stop, or its last client has left."""
        self.changed = threading.Condition(threading.Lock())
        """Guards `exports` and `clients`; told when a client has left."""
        self.exports: dict[str, Exported] = {}
        self.clients: dict[Exported, int] = {}
        self._listeners = listeners
        self._limits = limits
        self._tls = tls
        self._authorize = authorize
        self._shared = shared
        self._persistent = persistent
        self._negotiations: dict[Negotiation, float] = {}
        """With the moment at which each has to be over, the earliest first."""
        self._clock_runs = False
        self._connections: set[Connection] = set()
        self._accepting = False
        self._stopping = False

    def start(self) -> None:
        """Let clients in, from the loop's own thread.  For the thread that has made us."""
        self.loop.call(self._look_for_clients)
        self.loop.start()

    # -- coming -------------------------------------------------------------------------------------------------------

    def _look_for_clients(self) -> None:
        """Accept while there is room; the others wait in the system's queue."""
        shared, there = self._shared, len(self._connections)
        accepting = there < self._limits.connections and (not shared or there + len(self._negotiations) < shared)
        if accepting != self._accepting and not self._stopping:
            self._accepting = accepting
            for listener in self._listeners:
                self.loop.watch(listener.fileno(), READ if accepting else 0, self)

    def ready(self, events: int) -> None:
        """Somebody knocks at one of the listeners."""
        for listener in self._listeners:
            for _ in range(_ACCEPTED_AT_ONCE):
                if self._stopping or not self._accepting or not self._accept(listener):
                    break

    def fail(self, exc: Exception) -> None:
        self.stop()

    def _accept(self, listener: socket.socket) -> bool:
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno != errno.ECONNABORTED:
                _log.warning("no new client: %s", exc)
                self._accepting = False
                for paused in self._listeners:
                    self.loop.watch(paused.fileno(), 0, self)
                self.loop.call_at(monotonic() + _PAUSE, self._look_for_clients)
            return exc.errno == errno.ECONNABORTED
        if len(self._negotiations) >= self._limits.handshakes:
            next(iter(self._negotiations)).close("others want their turn at the handshake")
        peer = "a local client"
        sock.setblocking(False)
        if sock.family == getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        else:
            peer = f"{address[0]} port {address[1]}"
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        negotiation = Negotiation(self.loop, self, sock, peer, self._tls, self._limits.options)
        self._negotiations[negotiation] = monotonic() + self._limits.handshake_seconds
        self._run_clock()
        negotiation.start()
        self._look_for_clients()
        return True

    def _run_clock(self) -> None:
        """End the handshakes that take too long; one look at the clock at a time."""
        if self._clock_runs or not self._negotiations:
            return
        self._clock_runs = True

        def look() -> None:
            self._clock_runs = False
            now = monotonic()
            for negotiation, end in list(self._negotiations.items()):
                if end > now:
                    break
                negotiation.close("its handshake takes too long")
            self._run_clock()

        self.loop.call_at(next(iter(self._negotiations.values())), look)

    # -- what negotiations ask ----------------------------------------------------------------------------------------

    def listed(self) -> list[Exported]:
        """All exports."""
        with self.changed:
            return list(self.exports.values())

    def find(self, name: str) -> Exported | None:
        with self.changed:
            return self.exports.get(name)

    def tell(self, exported: Exported) -> Export:
        return exported.told(shared=self._shared != 1, max_payload=self._limits.request_bytes)

    def admits(self, sock: ssl.SSLSocket) -> bool:
        """Whether the certificate of a client is one that is let in."""
        if self._authorize is None:
            return True
        name = peer_name(sock)
        return name is not None and self._authorize(name)

    def transmit(self, negotiation: Negotiation, exported: Exported, terms: Terms, trailing: bytes, unsent: bytes) -> None:
        """The handshake is over and the client wants to work."""
        del self._negotiations[negotiation]
        connection = Connection(
            self.loop,
            self.pool,
            self._limits,
            negotiation.sock,
            negotiation.peer,
            exported,
            terms,
            trailing,
            self._has_left,
            self._is_one_disk,
        )
        self._connections.add(connection)
        with self.changed:
            self.clients[exported] = self.clients.get(exported, 0) + 1
        _log.info("%s: uses the export %r", negotiation.peer, exported.name)
        connection.start(unsent)

    def _is_one_disk(self) -> bool:
        """Whether all clients work with one disk, so that nobody is hurt by another's slow storage."""
        return len(self.clients) == 1

    def left(self, negotiation: Negotiation) -> None:
        """A handshake came to nothing."""
        del self._negotiations[negotiation]
        self._look_for_clients()

    # -- going --------------------------------------------------------------------------------------------------------

    def _has_left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        with self.changed:
            left = self.clients[connection.exported] - 1
            if left:
                self.clients[connection.exported] = left
            else:
                del self.clients[connection.exported]
            self.changed.notify_all()
        _log.info("%s: has left", connection.peer)
        if not self._persistent and not self._connections and not self._negotiations:
            self.stop()
        if self._stopping and not self._connections:
            self.stopped.set()
        self._look_for_clients()

    def dismiss(self, exported: Exported) -> None:
        """Let the clients of an export go, which is in `exports` no more."""
        for connection in list(self._connections):
            if connection.exported is exported:
                connection.finish()
        self.loop.call_at(monotonic() + self._limits.stop_seconds, lambda: self._cut_off(exported))

    def _cut_off(self, exported: Exported | None) -> None:
        for connection in list(self._connections):
            if exported is None or connection.exported is exported:
                connection.abort()

    def stop(self) -> None:
        """Let nobody in, and those who are there go once what they have asked for is done."""
        if self._stopping:
            return
        self._stopping = True
        for listener in self._listeners:
            self.loop.forget(listener.fileno())
            listener.close()
        for negotiation in list(self._negotiations):
            negotiation.close("the server is stopping")
        for connection in list(self._connections):
            connection.finish()
        self.loop.call_at(monotonic() + self._limits.stop_seconds, lambda: self._cut_off(None))
        if not self._connections:
            self.stopped.set()
