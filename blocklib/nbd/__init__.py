"""Network Block Device: the protocol as published in ``doc/proto.md``, client and server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blocklib.nbd.listing import ExportInfo, list_exports
    from blocklib.nbd.server import Server
    from blocklib.nbd.server_limits import ServerLimits
    from blocklib.nbd.tls import psk_context, tls_context

_PLACES = {
    "ExportInfo": "listing",
    "Server": "server",
    "ServerLimits": "server_limits",
    "list_exports": "listing",
    "psk_context": "tls",
    "tls_context": "tls",
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = ["ExportInfo", "Server", "ServerLimits", "list_exports", "psk_context", "tls_context"]
