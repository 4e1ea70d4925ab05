"""One client in the handshake: who it is, and which export it wants."""

from __future__ import annotations

import logging
import socket
import ssl
from typing import TYPE_CHECKING, Final, Protocol

from blocklib.errors import BlocklibError, RemoteProtocolError
from blocklib.nbd import wire
from blocklib.nbd.engine import Closed, ContextsWanted, Event, ExportWanted, ListExports, Ready, StartTls, TlsDue
from blocklib.nbd.engine_server_handshake import ServerHandshake
from blocklib.nbd.server_loop import READ, WRITE, Loop

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blocklib.nbd.engine import Export, Terms
    from blocklib.nbd.server_export import Exported

_log = logging.getLogger("blocklib.nbd")

_RECEIVED_AT_ONCE: Final = 1 << 14


class House(Protocol):
    """What a negotiation needs of its server."""

    def listed(self) -> Iterable[Exported]: ...

    def find(self, name: str) -> Exported | None: ...

    def tell(self, exported: Exported) -> Export: ...

    def admits(self, sock: ssl.SSLSocket) -> bool: ...

    def transmit(self, negotiation: Negotiation, exported: Exported, terms: Terms, trailing: bytes, unsent: bytes) -> None: ...

    def left(self, negotiation: Negotiation) -> None: ...


class Negotiation:
    """Runs in the loop's thread alone.  It ends by one of `house.transmit`, which takes the socket, and `house.left`."""

    def __init__(
        self, loop: Loop, house: House, sock: socket.socket, peer: str, tls: ssl.SSLContext | None, max_options: int
    ) -> None:
        self.sock = sock
        self.peer = peer
        self._loop = loop
        self._house = house
        self._context = tls
        self._engine = ServerHandshake(tls="off" if tls is None else "require", max_options=max_options)
        self._unsent = b""
        self._starts_tls = False
        """The answer to STARTTLS has to be sent before anything else."""
        self._tls: ssl.SSLSocket | None = None
        self._secured = tls is None
        self._over = False
        self._told: Exported | None = None
        """The export that the client has heard of last."""

    def start(self) -> None:
        self._unsent = self._engine.data_to_send()
        self._go_on()

    def close(self, why: str) -> None:
        """End without transmission."""
        if not self._over:
            self._over = True
            _log.info("%s: %s", self.peer, why)
            self._loop.forget(self.sock.fileno())
            self.sock.close()
            self._house.left(self)

    def ready(self, events: int) -> None:
        if not self._over:
            self._go_on()

    def fail(self, exc: Exception) -> None:
        self.close(f"internal error: {exc}")

    def _go_on(self) -> None:
        """Do what can be done without waiting."""
        try:
            while not self._over:
                if self._unsent:
                    sent = self.sock.send(self._unsent)
                    self._unsent = self._unsent[sent:]
                elif self._starts_tls:
                    self._start_tls()
                elif self._tls is not None and not self._secured:
                    self._tls.do_handshake()
                    if not self._house.admits(self._tls):
                        self.close("its certificate is not authorized")
                        return
                    self._secured = True
                    self._answer(self._engine.tls_started())
                else:
                    self._answer(self._engine.receive_data(self.sock.recv(_RECEIVED_AT_ONCE)))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
            writing = bool(self._unsent) or isinstance(exc, ssl.SSLWantWriteError)
            self._loop.watch(self.sock.fileno(), WRITE if writing else READ, self)
        except (OSError, RemoteProtocolError) as exc:
            self._send_last()
            self.close(str(exc))

    def _send_last(self) -> None:
        """What the engine has to say to a client that broke a rule, if it can be said now."""
        last = self._unsent + self._engine.data_to_send()
        if last:
            try:
                self.sock.send(last)
            except OSError:  # it does not listen; the connection ends in any case
                _log.debug("%s: %d bytes not sent", self.peer, len(last))

    def _start_tls(self) -> None:
        assert self._context is not None
        self._starts_tls = False
        self._loop.forget(self.sock.fileno())  # the same descriptor gets another object
        self.sock = self._tls = self._context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)

    def _answer(self, events: list[Event]) -> None:
        while events:
            events = self._answer_one(events[0])
            if self._over:
                return
        self._unsent += self._engine.data_to_send()

    def _answer_one(self, event: Event) -> list[Event]:
        engine = self._engine
        if isinstance(event, ListExports):
            return engine.send_exports([(exported.name, exported.description) for exported in self._house.listed()])
        if isinstance(event, StartTls):
            return engine.start_tls()
        if isinstance(event, TlsDue):
            self._starts_tls = True
            return []
        if isinstance(event, (ExportWanted, ContextsWanted)):
            exported = self._house.find(event.name)
            if exported is None:
                return engine.refuse(wire.NBD_REP_ERR_UNKNOWN, "there is no such export")
            if isinstance(event, ContextsWanted):
                if event.option == wire.NBD_OPT_LIST_META_CONTEXT:
                    return engine.send_contexts(exported.list_contexts(event.queries))
                return engine.send_contexts(exported.select_contexts(event.queries))
            try:
                told = self._house.tell(exported)
            except BlocklibError as exc:
                return engine.refuse(wire.NBD_REP_ERR_SHUTDOWN, str(exc))
            self._told = exported
            return engine.send_export(told)
        unsent = self._unsent + engine.data_to_send()
        if isinstance(event, Ready):
            exported = self._house.find(event.terms.export.name)
            if exported is None or exported is not self._told:
                self.close("its export has just been removed")
                return []
            self._over = True
            self._house.transmit(self, exported, event.terms, event.trailing, unsent)
            return []
        assert isinstance(event, Closed)
        self._unsent = unsent
        self._send_last()
        self.close(event.reason)
        return []
