"""TLS credentials for both sides, from folders laid out as QEMU's ``tls-creds-x509`` and libnbd's ``tls-certificates``.

A folder holds ``ca-cert.pem``, perhaps ``ca-crl.pem``, and ``server-cert.pem`` with ``server-key.pem`` or ``client-cert.pem``
with ``client-key.pem``.  Pre-shared keys are in a file ``keys.psk`` of lines ``USERNAME:HEXADECIMAL KEY``.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

from blocklib.errors import StorageError, UnsupportedFeatureError, UsageError

Endpoint: TypeAlias = Literal["client", "server"]
Password: TypeAlias = str | bytes | None

_MOST_KEY_FILE: Final = 1 << 20
_PSK_USER: Final = "qemu"
"""Who a client is that does not say a name, as with QEMU."""

# The attributes of a name, as GnuTLS and so QEMU write them; others have their numbers in dotted form.
_SHORT_NAMES: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "givenName": "givenName",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "serialNumber": "serialNumber",
    "stateOrProvinceName": "ST",
    "streetAddress": "street",
    "surname": "surName",
    "title": "title",
    "userId": "UID",
}
_ESCAPED: Final = frozenset(',+"\\<>;')


def tls_context(
    directory: str | os.PathLike[str],
    *,
    endpoint: Endpoint = "client",
    verify_peer: bool = True,
    password: Password = None,
) -> ssl.SSLContext:
    """Credentials from a folder of x509 certificates: TLS 1.2 or later.

    With `verify_peer` a server demands a certificate of each client that its CA has signed, and a client checks the server's
    and the host's name in it.  A client needs no certificate of its own unless the server demands one.  `password` opens an
    encrypted private key.  Raises UsageError, StorageError for a file that is missing or no certificate.
    """
    if endpoint not in ("client", "server"):
        raise UsageError(f"endpoint is 'client' or 'server', not {endpoint!r}")
    folder = os.fspath(directory)
    context = _new_context(endpoint)
    authority = os.path.join(folder, "ca-cert.pem")
    if verify_peer:
        _load(authority, lambda: context.load_verify_locations(authority))
        revoked = os.path.join(folder, "ca-crl.pem")
        if os.path.exists(revoked):
            _load(revoked, lambda: context.load_verify_locations(revoked))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.verify_mode = ssl.CERT_REQUIRED
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate = os.path.join(folder, f"{endpoint}-cert.pem")
    key = os.path.join(folder, f"{endpoint}-key.pem")
    if endpoint == "server" or os.path.exists(certificate) or os.path.exists(key):
        # Without one, OpenSSL would ask the terminal for it.
        secret = password if password is not None else b""
        for name in (certificate, key):
            if not os.path.exists(name):
                raise StorageError(f"{name}: there is no such file, which TLS needs", operation="open", filename=name)
        _load(certificate, lambda: context.load_cert_chain(certificate, key, secret))
    return context


def psk_context(
    directory: str | os.PathLike[str], *, endpoint: Endpoint = "client", username: str | None = None
) -> ssl.SSLContext:
    """Credentials from pre-shared keys: `directory` has a file ``keys.psk``, or is such a file.

    A client is `username`, by default "qemu".  Raises UnsupportedFeatureError where Python's ssl module has no pre-shared
    keys (before 3.13), StorageError, UsageError for a file that makes no sense.
    """
    if endpoint not in ("client", "server"):
        raise UsageError(f"endpoint is 'client' or 'server', not {endpoint!r}")
    context = _new_context(endpoint)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    set_callback: Callable[..., None] | None = getattr(context, f"set_psk_{endpoint}_callback", None)
    if set_callback is None or not getattr(ssl, "HAS_PSK", False):
        raise UnsupportedFeatureError(
            "TLS with pre-shared keys needs Python 3.13 or later, with an OpenSSL that has them; certificates work with any",
            features=("tls-psk",),
        )
    path = os.fspath(directory)
    if os.path.isdir(path):
        path = os.path.join(path, "keys.psk")
    keys = _read_keys(path)
    context.set_ciphers("PSK")
    if endpoint == "server":
        set_callback(lambda identity: keys.get(identity or "", b""))
        return context
    user = username if username is not None else _PSK_USER
    if user not in keys:
        raise UsageError(f"{path}: there is no key of {user!r}")
    set_callback(lambda _hint: (user, keys[user]))
    return context


def peer_name(sock: ssl.SSLSocket) -> str | None:
    """The distinguished name of the peer's certificate, as GnuTLS and so QEMU's authz objects spell it; None without one."""
    certificate: Any = sock.getpeercert()
    if not certificate:
        return None
    return ",".join(
        "+".join(f"{_SHORT_NAMES.get(name, name)}={_escaped(value)}" for name, value in part)
        for part in certificate.get("subject", ())
    )


def _new_context(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if endpoint == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def _load(name: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as exc:
        reason = exc.reason.lower().replace("_", " ") if exc.reason else "it holds no certificate"
        raise StorageError(f"{name}: TLS cannot use it: {reason}", operation="open", filename=name) from exc
    except OSError as exc:
        raise StorageError.wrap(exc, "open", filename=name) from exc


def _read_keys(path: str) -> dict[str, bytes]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_KEY_FILE + 1)
    except OSError as exc:
        raise StorageError.wrap(exc, "open", filename=path) from exc
    except UnicodeDecodeError:
        text = ""
    keys = {}
    for line in text[:_MOST_KEY_FILE].splitlines():
        user, colon, digits = line.rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not colon or not key:
            raise UsageError(f"{path}: a line is not USERNAME:KEY with a key in hexadecimal digits")
        keys[user] = key
    if not keys or len(text) > _MOST_KEY_FILE:
        raise UsageError(f"{path}: holds no keys, or too many")
    return keys


def _escaped(value: str) -> str:
    text = "".join("\\" + letter if letter in _ESCAPED else letter for letter in value)
    return "\\" + text if text[:1] in ("#", " ") else text
