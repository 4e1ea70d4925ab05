"""Where a server listens."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final

from blocklib.errors import StorageError, UsageError
from blocklib.nbd.uri import Address, NbdUri

_BACKLOG: Final = 128


def listen_on(address: Address) -> socket.socket:
    """A socket that listens.  Raises StorageError, UsageError."""
    if address.path:
        return _listen_on_path(address.path)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _kind, _protocol, _canonical, place = found[0]
        return socket.create_server(place, family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        text = f"{address}: cannot listen there: {reason}"
        raise StorageError(text, errno=getattr(exc, "errno", None), operation="listen") from exc


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
    place = listener.getsockname()
    if listener.family == getattr(socket, "AF_UNIX", None):
        address = Address(path=os.fsdecode(place))
    else:
        address = Address(host=place[0], port=place[1])
    return str(NbdUri(address, name, tls))
