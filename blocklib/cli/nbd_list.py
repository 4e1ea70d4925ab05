"""``nbd --list``: what a server gives out, laid out as qemu-nbd does, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blocklib.cli.common import wants_json
from blocklib.cli.getopt import Given
from blocklib.cli.output import json_text, printable

if TYPE_CHECKING:
    from ssl import SSLContext

    from blocklib.nbd.listing import ExportInfo


def show(given: Given, tls: SSLContext | None) -> int:
    """List the exports of the server that -b, -p and -k name."""
    from blocklib.cli.nbd import port_of
    from blocklib.nbd.listing import list_exports
    from blocklib.nbd.uri import Address, NbdUri

    as_json = wants_json(given)
    path = given.last("-k") or ""
    address = Address(path=path) if path else Address(host=given.last("-b") or "127.0.0.1", port=port_of(given))
    found = list_exports(str(NbdUri(address)), tls=tls, hostname=given.last("--tls-hostname"))
    if as_json:
        print(json_text([_facts(info) for info in found]))
        return 0
    print(f"exports available: {len(found)}")
    for info in found:
        _print(info)
    return 0


def _facts(info: ExportInfo) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": info.name, "description": info.description}
    if info.size is None:
        return facts
    return {
        **facts,
        "size": info.size,
        "read-only": info.read_only,
        "flags": list(info.flag_names),
        "min-block": info.min_block,
        "opt-block": info.preferred_block,
        "max-block": info.max_block,
        "meta-contexts": list(info.contexts),
    }


def _print(info: ExportInfo) -> None:
    print(f" export: '{printable(info.name)}'")
    if info.description:
        print(f"  description: {printable(info.description)}")
    if info.size is None:
        return
    print(f"  size:  {info.size}")
    print(f"  flags: {info.flags:#x} ( {' '.join(info.flag_names)} )")
    print(f"  min block: {info.min_block}")
    print(f"  opt block: {info.preferred_block}")
    print(f"  max block: {info.max_block}")
    if info.contexts:
        print(f"  available meta contexts: {len(info.contexts)}")
        for name in info.contexts:
            print(f"   {printable(name)}")
