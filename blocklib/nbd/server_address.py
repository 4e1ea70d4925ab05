"""Where a server listens."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from blocklib.errors import StorageError, UsageError
from blocklib.nbd import wire

_SCHEMES: Final = {"nbd": (False, False), "nbds": (False, True), "nbd+unix": (True, False), "nbds+unix": (True, True)}
"""Scheme -> (a Unix socket, with TLS)."""
_BACKLOG: Final = 128


class Address(NamedTuple):
    """What a URI says."""

    host: str = ""
    port: int = wire.NBD_DEFAULT_PORT
    path: str | None = None
    """Of a Unix socket; then there is no host and no port."""
    name: str = ""
    tls: bool = False


def address_of(text: str) -> Address:
    """The address that a URI names.  Raises UsageError."""
    try:
        parts = urlsplit(text)
        unix, tls = _SCHEMES[parts.scheme]
        name = unquote(parts.path[1:], errors="strict")
        query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict")
        port = parts.port
    except (ValueError, KeyError) as exc:
        raise UsageError(f"{text!r} is no URI to listen at, such as nbd://127.0.0.1:10809/NAME") from exc
    path = query.pop("socket", [""])[-1]
    if query or parts.fragment or parts.username is not None or unix is not bool(path) or (unix and parts.netloc):
        raise UsageError(f"{text!r}: a server takes nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH")
    if unix:
        return Address(path=path, name=name, tls=tls)
    return Address(parts.hostname or "", wire.NBD_DEFAULT_PORT if port is None else port, None, name, tls)


def listen_on(address: Address) -> socket.socket:
    """A socket that listens.  Raises StorageError."""
    if address.path is not None:
        return _listen_on_path(address.path)
    shown = f"{address.host or '*'} port {address.port}"
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as exc:
        raise StorageError(f"{shown}: {getattr(exc, 'strerror', None) or exc}", operation="listen") from exc
    family, _kind, _protocol, _canonical, place = found[0]
    both = not address.host and socket.has_dualstack_ipv6()
    try:
        if both:
            return socket.create_server(("", address.port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(place, family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise StorageError.wrap(exc, "listen", filename=shown) from exc


def _listen_on_path(path: str) -> socket.socket:
    family = getattr(socket, "AF_UNIX", None)
    if family is None:
        raise UsageError("this system has no Unix sockets")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        _remove_left_over(path, family)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except BaseException as exc:
        listener.close()
        if isinstance(exc, OSError):
            reason = exc.strerror or str(exc)  # a path that is too long has no errno
            raise StorageError(f"{path}: cannot listen there: {reason}", errno=exc.errno, operation="listen") from exc
        raise
    return listener


def _remove_left_over(path: str, family: int) -> None:
    """Remove a socket that nobody listens at any more, and nothing else."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.EAGAIN):
                raise


def uri_of(listener: socket.socket, name: str, *, tls: bool) -> str:
    """The URI that clients use for an export at a socket that listens."""
    scheme = "nbds" if tls else "nbd"
    place = listener.getsockname()
    if listener.family == getattr(socket, "AF_UNIX", None):
        path = os.fsdecode(place)
        return f"{scheme}+unix:///{quote(name, safe='')}?socket={quote(path)}"
    host, port = place[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}:{port}/{quote(name, safe='')}"
