"""Targets that read what somebody typed: option strings, sizes, URIs, command lines, and the language of qemu-io.

What makes no sense is a BlocklibError, or the command line's UsageFailure or Failure, in one printable line.  No file is opened
but those in the input's own folder.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from blocklib import sizes
from blocklib.cli import getopt, io_requests
from blocklib.cli.getopt import UsageFailure
from blocklib.cli.io_commands import run_line
from blocklib.cli.io_shell import Opening, Shell
from blocklib.cli.main import COMMANDS
from blocklib.cli.session import Failure, Session
from blocklib.disk import Disk
from blocklib.errors import BlocklibError
from blocklib.nbd import uri
from blocklib.options import (
    check_options,
    flatten,
    nest,
    parse_create_options,
    parse_options,
)
from blocklib.policy import qemu_target
from tests.fuzz import images
from tests.fuzz.images import Case
from tests.fuzz.source import Source
from tests.kernels import running

_DRIVERS: Final = ("qcow2", "raw", "file", "nbd", "throttle", "null-co")
_LONGEST: Final = 64 << 10
"""Bytes of a request of qemu-io: what it allows, 2 GiB, says nothing more."""


def options(data: bytes) -> None:
    """Text that becomes options, a size, a URI or the arguments of a command."""
    if not data:
        return
    text = data[1:].decode("utf-8", "surrogateescape")
    with suppress(BlocklibError, UsageFailure, Failure):
        _PARSERS[data[0] % len(_PARSERS)](text)


def _opening(text: str) -> None:
    found = parse_options(text)
    assert nest(flatten(nest(found))) == nest(found)
    driver = found.pop("driver", "qcow2")
    if isinstance(driver, str):
        check_options(driver, found, partial=True)


def _creating(text: str) -> None:
    driver, _, rest = text.partition(" ")
    found = parse_create_options(rest.split("\0"))
    typed = check_options(driver if driver in _DRIVERS else "qcow2", found, table="create")
    if driver == "qcow2" and typed["size"] is not None:
        from blocklib.formats.qcow2.create import header_for
        from blocklib.formats.qcow2.header_write import serialize_header

        serialize_header(header_for(typed["size"], typed))


def _amending(text: str) -> None:
    check_options("qcow2", parse_create_options([text]), table="amend")


def _size(text: str) -> None:
    number = sizes.parse_size(text)
    assert number >= 0
    sizes.format_size(number)


def _uri(text: str) -> None:
    found = uri.parse_uri(text)
    again = uri.parse_uri(str(found))
    assert (again.address, again.export, again.tls) == (found.address, found.export, found.tls), str(found)


def _legacy_uri(text: str) -> None:
    uri.parse_uri(uri.from_legacy(text))


def _reference(text: str) -> None:
    qemu_target(text)


def _arguments(text: str) -> None:
    command, *words = text.split("\0")
    if command not in COMMANDS:
        command = "convert"
    module = import_module(f"blocklib.cli.{command}")
    given = getopt.parse(module.SYNTAX, words)
    for option in module.SYNTAX.options:
        given.has(option.names[0])


_PARSERS: Final[tuple[Callable[[str], None], ...]] = (
    _opening,
    _creating,
    _amending,
    _size,
    _uri,
    _legacy_uri,
    _reference,
    _arguments,
)


# -- qemu-io ---------------------------------------------------------------------------------------------------------------


class _MemoryShell(Shell):
    """Opens a disk in memory, whatever it is told to open."""

    case: Case

    def _open(self, opening: Opening, *, write: bool) -> Disk:
        self._context = self.case.opened(writable=write)
        return self._context.__enter__()


def commands(data: bytes) -> None:
    """Lines in qemu-io's language, on a disk in memory."""
    source = Source(data)
    kind = source.byte()
    image = images.image(images.NAMES[kind % len(images.NAMES)])
    lines = source.rest().decode("utf-8", "surrogateescape").split("\n")[:30]
    session = Session("qemu-io")
    before, io_requests.MAX_REQUEST = io_requests.MAX_REQUEST, _LONGEST
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            running("plain" if kind & 0x20 else "off"),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            suppress(BlocklibError),
        ):
            shell = _MemoryShell(session, image_opts=bool(kind & 0x40), untrusted=False, misaligned=bool(kind & 0x80))
            shell.case = Case(image, image.data)
            with shell:
                shell.open(_OPENING)
                for line in lines:
                    if line.split()[:1] not in (["abort"], ["sigraise"], ["sleep"]) and not _takes_long(line.split()):
                        _run(shell, line, err)
    finally:
        io_requests.MAX_REQUEST = before


_OPENING: Final = Opening({"driver": "qcow2"}, None, {}, True, "writeback", "unmap", False, False, "threads")


def _takes_long(words: list[str]) -> bool:
    """Whether an image may be made so large that preallocating it, which some kinds must be, is work for minutes."""
    if words[:1] != ["truncate"]:
        return False
    for word in words[1:]:
        with suppress(BlocklibError):
            if sizes.parse_size(word) > 64 << 20:
                return True
    return False


def _run(shell: Any, line: str, err: io.StringIO) -> None:
    said = len(err.getvalue())
    succeeded = run_line(shell, line)
    complaint = err.getvalue()[said:]
    assert succeeded or complaint.count("\n") <= 1, f"a complaint of more than one line: {complaint}"
