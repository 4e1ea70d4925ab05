"""A server that gives out disks over the network: `blocklib.nbd.Server`."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from blocklib.errors import BlocklibError, ClosedError, NameNotFoundError, UsageError
from blocklib.nbd.server_address import listen_on, uri_of
from blocklib.nbd.server_export import Exported
from blocklib.nbd.server_house import Authorize, House
from blocklib.nbd.server_limits import ServerLimits
from blocklib.nbd.uri import Address, NbdUri, parse_uri

if TYPE_CHECKING:
    from blocklib.disk import Disk


class Server:
    """Serves disks to NBD clients, from its construction to `close`; as a context manager it closes itself.

    `listen` is a URI: ``nbd://HOST:PORT/NAME`` (port 0: any that is free; without one, 10809),
    ``nbd+unix:///NAME?socket=PATH``, or a socket that listens already.  `disk` becomes the first export, under NAME; the
    other arguments for it are those of `add`.

    With `tls`, a context of `tls_context` or any other for a server, nothing is told to a client before it speaks TLS, and
    `authorize` may look at the distinguished name in its certificate.  `shared` clients are let in at a time, 0 as many as
    `limits` allows; unless it is 1, they are told that several connections see the same disk.  Without `persistent` the
    server stops by itself when its last client has left.

    The disks stay open when the server closes, and must not be closed before.  Every method is safe from any thread.
    Raises UsageError, StorageError where the address cannot be listened at.
    """

    def __init__(
        self,
        disk: Disk | None = None,
        *,
        listen: str | socket.socket,
        name: str | None = None,
        description: str = "",
        read_only: bool | None = None,
        offset: int = 0,
        length: int | None = None,
        bitmaps: Iterable[str] = (),
        allocation_depth: bool = False,
        tls: ssl.SSLContext | None = None,
        authorize: Authorize | None = None,
        shared: int = 0,
        persistent: bool = True,
        limits: ServerLimits = ServerLimits(),  # noqa: B008 - immutable
    ) -> None:
        wanted = parse_uri(listen) if isinstance(listen, str) else NbdUri(Address())
        if wanted.tls and tls is None:
            raise UsageError(f"{listen}: TLS needs tls=, a context with the server's certificate")
        if authorize is not None and tls is None:
            raise UsageError("authorize= looks at certificates, so it needs tls=")
        if shared < 0:
            raise UsageError(f"{shared} clients")
        self._pid = os.getpid()
        self._closed = False
        first: Exported | None = None
        if disk is not None:
            first = Exported(
                disk,
                wanted.export if name is None else name,
                description=description,
                read_only=read_only,
                offset=offset,
                length=length,
                bitmaps=bitmaps,
                allocation_depth=allocation_depth,
            )
        try:
            self._listener = listen_on(wanted.address) if isinstance(listen, str) else listen
            self._listener.setblocking(False)
        except BaseException:
            if first is not None:
                first.close()
            raise
        self._path = wanted.address.path
        self._name = first.name if first is not None else wanted.export
        self._uri = uri_of(self._listener, self._name, tls=tls is not None)
        self._house = House(
            [self._listener], limits, tls=tls, authorize=authorize, shared=shared, persistent=persistent
        )
        if first is not None:
            self._house.exports[first.name] = first
        self._house.start()

    @property
    def uri(self) -> str:
        """The URI of the first export, with the port that is really used."""
        return self._uri

    @property
    def exports(self) -> tuple[str, ...]:
        """The names of all exports."""
        return tuple(exported.name for exported in self._house.listed())

    def add(
        self,
        disk: Disk,
        name: str,
        *,
        description: str = "",
        read_only: bool | None = None,
        offset: int = 0,
        length: int | None = None,
        bitmaps: Iterable[str] = (),
        allocation_depth: bool = False,
    ) -> None:
        """Give out `disk` as `name`, read-only if `read_only` or if the disk is; `length` bytes of it from guest `offset` on.

        `bitmaps` names those that clients may see (``qemu:dirty-bitmap:NAME``), which nobody changes or removes meanwhile;
        `allocation_depth` shows in which image of the chain data lives (``qemu:allocation-depth``).  Raises UsageError for a
        name that is taken or that the protocol forbids, OutOfRangeError, NameNotFoundError for a bitmap.
        """
        self._check()
        exported = Exported(
            disk,
            name,
            description=description,
            read_only=read_only,
            offset=offset,
            length=length,
            bitmaps=bitmaps,
            allocation_depth=allocation_depth,
        )
        with self._house.changed:
            taken = name in self._house.exports
            if not taken:
                self._house.exports[name] = exported
        if taken:
            exported.close()
            raise UsageError(f"there is an export named {name!r} already")

    def remove(self, name: str) -> None:
        """Take an export away: its clients' requests in flight are finished, then they are disconnected and the disk flushed.

        Raises NameNotFoundError, and what flushing raises.
        """
        self._check()
        house = self._house
        with house.changed:
            exported = house.exports.pop(name, None)
        if exported is None:
            raise NameNotFoundError(f"there is no export named {name!r}")
        house.loop.call(lambda: house.dismiss(exported))
        with house.changed:
            house.changed.wait_for(lambda: exported not in house.clients)
        _release([exported])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nobody is served any more: the last client of a server that is not persistent has left, or `stop` was
        called and the clients are gone.  False where that takes longer than `timeout` seconds."""
        self._check()
        return self._house.stopped.wait(timeout)

    def stop(self) -> None:
        """Begin to stop, and return at once; may be called from a signal handler.  `close` does the rest."""
        self._house.loop.call(self._house.stop)

    def close(self) -> None:
        """Stop: no new clients, requests in flight are finished and answered, clients disconnected, disks flushed.

        A client that does not take its replies is given a few seconds.  Later calls do nothing.  Raises what flushing raises.
        """
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:  # the threads are our parent's, and so is the name of the socket
            self._listener.close()
            return
        house = self._house
        house.loop.call(house.stop)
        house.stopped.wait()
        house.pool.end()
        house.loop.call(house.loop.end)
        house.loop.join()
        self._listener.close()
        if self._path:
            _unlink(self._path)
        with house.changed:
            exports = list(house.exports.values())
            house.exports.clear()
        _release(exports)

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the server is closed")
        if os.getpid() != self._pid:
            raise ClosedError("the server belongs to the process that forked this one")

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BlocklibError as failure:
            if exc is None:
                raise
            exc.add_note(f"closing the server failed as well: {failure}")

    def __reduce__(self) -> Any:
        raise TypeError("a server cannot be pickled")

    def __repr__(self) -> str:
        return f"<Server {'closed' if self._closed else self._uri}>"


def _release(exports: Iterable[Exported]) -> None:
    """Flush what clients have written and let go of the disks.  Raises the first error, with the others as notes."""
    first: BlocklibError | None = None
    for exported in exports:
        exported.close()
        if exported.read_only or exported.disk.closed:
            continue
        try:
            exported.disk.flush()
        except BlocklibError as exc:
            if first is None:
                first = exc
            else:
                first.add_note(str(exc))
    if first is not None:
        raise first


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:  # somebody has tidied up
        return
