"""Where an NBD server is said to be: every text means a server, or is refused."""

from __future__ import annotations

from typing import Any

import pytest

import blocklib
from blocklib.errors import StorageError, UsageError
from blocklib.nbd import uri
from blocklib.nbd.uri import Address


@pytest.mark.parametrize(
    ("text", "address", "export"),
    [
        ("nbd:host:10809:exportname=a b", Address(host="host", port=10809), "a b"),
        ("nbd:unix:/tmp/s", Address(path="/tmp/s"), ""),
        ("nbd:unix:/tmp/\udcd3:exportname=é", Address(path="/tmp/\udcd3"), "é"),
    ],
    ids=ascii,
)
def test_the_old_spelling_means_what_its_uri_means(text: str, address: Address, export: str) -> None:
    found = uri.parse_uri(uri.from_legacy(text))
    assert (found.address, found.export) == (address, export)


@pytest.mark.parametrize(
    "text",
    [
        "nbd:host:" + "9" * 5000,
        "nbd:host:65536",
        "nbd:host:1:exportname=\udcd3",
        "nbd:unix:/tmp/\ud800",
        "nbd:unix:/tmp/s:exportname=" + "x" * 5000,
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_an_old_spelling_that_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        uri.from_legacy(text)


@pytest.mark.parametrize("text", ["nbd://host/\udcd3", "nbd://\ud800/", "nbd+unix:///?socket=/tmp/\ud800"], ids=ascii)
def test_a_uri_with_names_that_nothing_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        uri.parse_uri(text)


@pytest.mark.parametrize(
    "server",
    [
        {"type": "inet", "host": "host", "port": "9" * 5000},
        {"type": "fd", "str": "9" * 5000},
        {"type": "fd", "str": "9" * 30},
        {"type": "unix", "path": "\ud800"},
    ],
    ids=lambda server: ascii(server)[:40],
)
def test_options_that_name_no_server_are_refused(server: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        blocklib.open({"driver": "raw", "file": {"driver": "nbd", "server": server}})


@pytest.mark.parametrize("export", ["\udcd3", "a\0b", "x" * 5000], ids=lambda text: ascii(text)[:10])
def test_an_export_of_a_name_that_none_can_have_is_refused(export: str) -> None:
    server: dict[str, Any] = {"type": "unix", "path": "/nowhere/at/all"}
    with pytest.raises(UsageError, match="name of an export"):
        blocklib.open({"driver": "raw", "file": {"driver": "nbd", "server": server, "export": export}})


@pytest.mark.parametrize("host", ["a..b", "a" * 300])
def test_a_host_of_a_name_that_none_can_have_is_not_found(host: str) -> None:
    with pytest.raises(StorageError, match="no connection"):
        blocklib.open(f"nbd://{host}/", format="raw")
