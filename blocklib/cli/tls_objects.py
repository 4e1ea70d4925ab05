"""``--object`` for TLS: whose certificate or key is used, and which peers are let in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from blocklib.cli.session import Failure
from blocklib.crypto.secrets import find_secret
from blocklib.nbd.tls import psk_context, tls_context

if TYPE_CHECKING:
    from ssl import SSLContext

    from blocklib.nbd.tls import Endpoint

_WORDS = {"yes": True, "on": True, "true": True, "y": True, "no": False, "off": False, "false": False, "n": False}
_X509 = ("dir", "endpoint", "verify-peer", "passwordid", "sanity-check", "priority")
_PSK = ("dir", "endpoint", "username", "verify-peer", "priority")
_MOST_RULES = 1 << 20
"""Bytes of a file of rules."""


def credentials(kind: str, properties: Mapping[str, Any], others: Mapping[str, object]) -> SSLContext:
    """TLS credentials: ``tls-creds-x509`` or ``tls-creds-psk``.  Raises Failure, and what making them raises."""
    _check_names(kind, properties, _X509 if kind == "tls-creds-x509" else _PSK)
    if "priority" in properties:
        raise Failure(f"--object {kind}: priority is in the language of GnuTLS, which is not used here")
    directory = _text(kind, properties, "dir")
    end = _word(kind, properties, "endpoint", ("client", "server"), "client")
    endpoint: Endpoint = "server" if end == "server" else "client"
    verify = _flag(kind, properties, "verify-peer")
    if kind == "tls-creds-psk":
        user = _text(kind, properties, "username") if "username" in properties else None
        return psk_context(directory, endpoint=endpoint, username=user)
    _flag(kind, properties, "sanity-check")  # OpenSSL looks at a certificate when it loads it
    password: bytes | None = None
    if "passwordid" in properties:
        password = find_secret(others, _text(kind, properties, "passwordid"), "passwordid").reveal()
    return tls_context(directory, endpoint=endpoint, verify_peer=verify, password=password)


def rules(kind: str, properties: Mapping[str, Any], read_file: Callable[[str, int], bytes]) -> Callable[[str], bool]:
    """Who is let in: ``authz-simple``, ``authz-list`` or ``authz-list-file``.  Raises Failure, and what reading raises."""
    if kind == "authz-simple":
        _check_names(kind, properties, ("identity",))
        identity = _text(kind, properties, "identity")
        return lambda name: name == identity
    if kind == "authz-list-file":
        _check_names(kind, properties, ("filename", "refresh"))
        _flag(kind, properties, "refresh")
        filename = _text(kind, properties, "filename")
        content = read_file(filename, _MOST_RULES)
        import json

        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            raise Failure(f"--object {kind}: {filename} is not JSON") from None
        if not isinstance(found, dict):
            raise Failure(f"--object {kind}: {filename} holds no rules")
        properties = found
    _check_names(kind, properties, ("policy", "rules"))
    return _list_of_rules(kind, properties)


def _list_of_rules(kind: str, properties: Mapping[str, Any]) -> Callable[[str], bool]:
    policies = ("allow", "deny")
    default = _word(kind, properties, "policy", policies, "deny") == "allow"
    found = properties.get("rules", [])
    if not isinstance(found, list) or not all(isinstance(rule, dict) for rule in found):
        raise Failure(f"--object {kind}: rules is a list of objects, in JSON")
    made: list[tuple[str, bool, bool]] = []
    for rule in found:
        _check_names(kind, rule, ("match", "policy", "format"))
        match = _text(kind, rule, "match")
        allows = _word(kind, rule, "policy", policies, None) == "allow"
        made.append((match, allows, _word(kind, rule, "format", ("exact", "glob"), "exact") == "glob"))

    def admits(name: str) -> bool:
        from fnmatch import fnmatchcase

        for match, allows, is_glob in made:
            if fnmatchcase(name, match) if is_glob else name == match:
                return allows
        return default

    return admits


def _check_names(kind: str, properties: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in properties:
        if name not in known:
            raise Failure(f"--object {kind}: there is no property {name!r}; there are {', '.join(known)}")


def _text(kind: str, properties: Mapping[str, Any], name: str) -> str:
    value = properties.get(name)
    if not isinstance(value, str) or not value:
        raise Failure(f"--object {kind}: needs {name}=TEXT")
    return value


def _word(kind: str, properties: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str | None) -> str:
    value = properties.get(name, default)
    if value not in choices:
        raise Failure(f"--object {kind}: {name} is one of {', '.join(choices)}")
    return str(value)


def _flag(kind: str, properties: Mapping[str, Any], name: str) -> bool:
    value = properties.get(name, True)
    if isinstance(value, bool):
        return value
    if value not in _WORDS:
        raise Failure(f"--object {kind}: {name} is yes or no")
    return _WORDS[value]
