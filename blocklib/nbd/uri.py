"""NBD URIs, as ``doc/uri.md`` of the NetworkBlockDevice project describes them, and where a server is found."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from blocklib.errors import UsageError
from blocklib.nbd import wire

_SCHEMES: Final = {
    "nbd": ("inet", False),
    "nbd+tcp": ("inet", False),
    "nbds": ("inet", True),
    "nbds+tcp": ("inet", True),
    "nbd+unix": ("unix", False),
    "nbds+unix": ("unix", True),
}
_LEGACY: Final = "nbd:"
_LEGACY_EXPORT: Final = ":exportname="


class Address(NamedTuple):
    """Where a server listens: a host and port, a Unix socket's path (a leading NUL: an abstract name), or an open socket."""

    host: str = ""
    port: int = wire.NBD_DEFAULT_PORT
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.fd >= 0:
            return f"socket {self.fd}"
        if self.path:
            return "@" + self.path[1:] if self.path.startswith("\0") else self.path
        return f"{_bracketed(self.host)}:{self.port}"


class NbdUri(NamedTuple):
    """What a URI says.  `tls` True: TLS is demanded."""

    address: Address
    export: str = ""
    tls: bool = False
    tls_hostname: str | None = None
    tls_certificates: str | None = None
    """A folder of x509 files (libnbd's parameter)."""
    tls_verify_peer: bool = True
    tls_psk_file: str | None = None
    tls_username: str | None = None

    def __str__(self) -> str:
        """The URI, in the form that QEMU shows."""
        from urllib.parse import quote

        name = quote(self.export, safe="/")
        if self.address.path:
            shown = "/" + name if name else ""
            return f"nbd{'s' * self.tls}+unix://{shown}?socket={quote(self.address.path, safe='/')}"
        text = f"nbd{'s' * self.tls}://{_bracketed(self.address.host)}:{self.address.port}"
        return f"{text}/{name}" if name else text


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_nbd_uri(text: str) -> bool:
    """Whether `text` begins as an NBD URI does."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in _SCHEMES


def parse_uri(text: str) -> NbdUri:
    """The parts of an NBD URI.  Raises UsageError for what is none; unknown parameters are refused."""
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(text)
        port = parts.port
        host = unquote(parts.hostname or "", errors="strict")
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        parameters = _parameters(parts.query)
    except ValueError as exc:
        raise _bad(text, str(exc)) from exc
    kind, tls = _SCHEMES.get(parts.scheme, ("", False))
    if not kind:
        raise _bad(text, f"its scheme is one of {', '.join(_SCHEMES)}")
    if parts.fragment:
        raise _bad(text, "it has no fragment (#...)")
    try:
        wire.encode_string(export)
    except ValueError as exc:
        raise _bad(text, str(exc)) from exc
    path = parameters.pop("socket", "")
    if kind == "unix":
        if not path:
            raise _bad(text, "the parameter socket= names the Unix socket")
        if parts.netloc:
            raise _bad(text, "a Unix socket has no host: write nbd+unix:///EXPORT?socket=PATH")
        address = Address(path=path)
    else:
        if path:
            raise _bad(text, "socket= is for Unix sockets: nbd+unix:///EXPORT?socket=PATH")
        address = Address(host=host or "localhost", port=wire.NBD_DEFAULT_PORT if port is None else port)
    return _with_tls(text, NbdUri(address, export, tls), parameters, parts.username)


def _parameters(query: str) -> dict[str, str]:
    from urllib.parse import unquote

    found: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name in found:
            raise ValueError(f"{name}= is given twice")
        found[name] = unquote(value, errors="strict")
    return found


def _with_tls(text: str, uri: NbdUri, parameters: dict[str, str], username: str | None) -> NbdUri:
    kind = parameters.pop("tls-type", "x509")
    if kind not in ("x509", "psk"):
        raise _bad(text, f"tls-type= is x509 or psk, not {kind!r}")
    verify = parameters.pop("tls-verify-peer", "1")
    if verify not in ("0", "1"):
        raise _bad(text, f"tls-verify-peer= is 0 or 1, not {verify!r}")
    uri = uri._replace(
        tls_hostname=parameters.pop("tls-hostname", None),
        tls_certificates=parameters.pop("tls-certificates", None),
        tls_psk_file=parameters.pop("tls-psk-file", None),
        tls_username=parameters.pop("tls-username", None) or username,
        tls_verify_peer=verify == "1",
    )
    if parameters:
        raise _bad(text, f"the parameter {next(iter(parameters))!r} is unknown")
    if kind == "psk" and uri.tls_psk_file is None:
        raise _bad(text, "tls-type=psk needs tls-psk-file=")
    return uri


def _bad(text: str, why: str) -> UsageError:
    return UsageError(f"{text!r} is no NBD URI: {why}")


def from_legacy(text: str) -> str:
    """The URI for QEMU's old ``nbd:HOST:PORT[:exportname=NAME]`` and ``nbd:unix:PATH[:exportname=NAME]``."""
    place, _, export = text.removeprefix(_LEGACY).partition(_LEGACY_EXPORT)
    if place.startswith("unix:"):
        address = Address(path=place.removeprefix("unix:"))
    else:
        host, _, port = place.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise _bad(text, "it is nbd:HOST:PORT or nbd:unix:PATH, or has two slashes")
        address = Address(host=host.strip("[]") or "localhost", port=int(port))
    if not address.path and not address.host:
        raise _bad(text, "it names no socket")
    return str(NbdUri(address, export))


def address_of_options(server: dict[str, Any]) -> Address:
    """Where the options ``server.*`` in QEMU's names point to.  Raises UsageError."""
    kind = server.get("type")
    if kind == "inet":
        port = str(server.get("port") or wire.NBD_DEFAULT_PORT)
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise UsageError(f"server.port is a number up to 65535, not {port!r}")
        return Address(host=server.get("host") or "localhost", port=int(port))
    if kind == "unix":
        path = server.get("path")
        if not path:
            raise UsageError("server.path names the Unix socket")
        return Address(path="\0" + path if server.get("abstract") else path)
    number = str(server.get("str") or "")
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"server.str is the number of an open socket, not {number!r}")
    return Address(fd=int(number))
