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
_ESCAPED: Final = "surrogateescape"
"""How Python holds the bytes of a file name, or an argument, that are no UTF-8."""
_HIGHEST_PORT: Final = 65535
_HIGHEST_DESCRIPTOR: Final = (1 << 31) - 1


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

        name = quote(self.export, safe="/", errors=_ESCAPED)
        if self.address.path:
            shown = "/" + name if name else ""
            path = quote(self.address.path, safe="/", errors=_ESCAPED)
            return f"nbd{'s' * self.tls}+unix://{shown}?socket={path}"
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
    check_export(export)
    path = parameters.pop("socket", "")
    if kind == "unix":
        if not path:
            raise _bad(text, "the parameter socket= names the Unix socket")
        if parts.netloc:
            raise _bad(text, "a Unix socket has no host: write nbd+unix:///EXPORT?socket=PATH")
        address = _checked(Address(path=path))
    else:
        if path:
            raise _bad(text, "socket= is for Unix sockets: nbd+unix:///EXPORT?socket=PATH")
        address = _checked(Address(host=host or "localhost", port=wire.NBD_DEFAULT_PORT if port is None else port))
    return _with_tls(text, NbdUri(address, export, tls), parameters, parts.username)


def _parameters(query: str) -> dict[str, str]:
    from urllib.parse import unquote

    found: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name in found:
            raise ValueError(f"{name}= is given twice")
        found[name] = unquote(value, errors=_ESCAPED)
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
        address = _checked(Address(path=place.removeprefix("unix:")))
    else:
        host, _, digits = place.rpartition(":")
        port = _number(digits, _HIGHEST_PORT)
        if port is None:
            raise _bad(text, "it is nbd:HOST:PORT or nbd:unix:PATH, or has two slashes")
        address = _checked(Address(host=host.strip("[]") or "localhost", port=port))
    if not address.path and not address.host:
        raise _bad(text, "it names no socket")
    return str(NbdUri(address, check_export(export)))


def address_of_options(server: dict[str, Any]) -> Address:
    """Where the options ``server.*`` in QEMU's names point to.  Raises UsageError."""
    kind = server.get("type")
    if kind == "inet":
        digits = str(server.get("port") or wire.NBD_DEFAULT_PORT)
        port = _number(digits, _HIGHEST_PORT)
        if port is None:
            raise UsageError(f"server.port is a number up to {_HIGHEST_PORT}, not {digits!r}")
        return _checked(Address(host=server.get("host") or "localhost", port=port))
    if kind == "unix":
        path = server.get("path")
        if not path:
            raise UsageError("server.path names the Unix socket")
        return _checked(Address(path="\0" + path if server.get("abstract") else path))
    digits = str(server.get("str") or "")
    number = _number(digits, _HIGHEST_DESCRIPTOR)
    if number is None:
        raise UsageError(f"server.str is the number of an open socket, not {digits!r}")
    return Address(fd=number)


def check_export(name: str) -> str:
    """`name`, if it can be the name of an export.  Raises UsageError."""
    try:
        wire.encode_string(name)
    except ValueError as exc:
        raise UsageError(f"{name!r} cannot be the name of an export: {exc}") from exc
    return name


def _checked(address: Address) -> Address:
    """`address`, if its names are some that a system can be asked for.  Raises UsageError."""
    for name in (address.host, address.path):
        try:
            name.encode("utf-8", _ESCAPED)
        except UnicodeEncodeError as exc:
            raise UsageError(f"{name!r} cannot be the name of a host or a socket: {exc.reason}") from exc
    return address


def _number(digits: str, most: int) -> int | None:
    """A decimal number up to `most`, or None where it is none."""
    if not (digits.isascii() and digits.isdigit()) or len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if number <= most else None
