"""``inspect``: whether a file is what it was declared to be, and names nothing that reading it would open.

Not a command of QEMU's.  Exit code 0 means safe; 1 anything else, an error included: what could not be looked at is not safe.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Any

from blocklib.cli.common import OUTPUT, one_operand, size_value, wants_json
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.output import json_text, printable
from blocklib.cli.session import Failure, Session
from blocklib.sizes import format_size

if TYPE_CHECKING:
    from blocklib.policy import Limits
    from blocklib.reports import Inspection

SYNTAX = Syntax(
    "FILE|-",
    "Tell what a file is, what it names and whether it is safe to hand on: exit code 0 if every check passed, else 1.\n"
    "Nothing but FILE is opened; '-' reads all of standard input.",
    (
        OUTPUT,
        Option(("--expect",), "FORMAT", "the format that the file was declared to be, such as raw, qcow2, iso, vmdk"),
        Option(("--limit",), "NAME=SIZE", "what the image may ask for at most, such as virtual_size=100G; repeatable"),
    ),
)

_UNSAFE = 1
_STDIN = 0
_PATIENCE = 0.1
"""Seconds between two looks whether somebody wants us to stop."""


def run(session: Session, given: Given) -> int:
    from blocklib.inspection import inspect

    as_json = wants_json(given)
    name = one_operand(given)
    if not name:
        raise Failure("a file name is empty")
    expect = given.last("--expect")
    limits = _limits(given.all("--limit"))
    if name == "-":
        found = inspect(_StandardInput(session), expect=expect, limits=limits)
    else:
        found = inspect(name, expect=expect, limits=limits)
    print(json_text(json_of(found, name)) if as_json else "\n".join(human_lines(found, name)))
    return 0 if found.safe else _UNSAFE


class _StandardInput:
    """Reads what there is, and notices an interruption while there is nothing."""

    name = "standard input"

    def __init__(self, session: Session) -> None:
        self._session = session

    def read(self, size: int) -> bytes:
        while True:
            self._session.check()
            if select.select([_STDIN], (), (), _PATIENCE)[0]:
                return os.read(_STDIN, size)


def _limits(texts: list[str]) -> Limits:
    from blocklib.policy import Limits

    values: dict[str, int] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in Limits.record_fields:
            raise Failure(f"--limit {text}: NAME=SIZE is needed, and NAME one of {', '.join(Limits.record_fields)}")
        values[name] = size_value(value, f"--limit {name}")
    return Limits(**values)


def json_of(found: Inspection, name: str) -> dict[str, Any]:
    """`found` with the same keys whatever was found."""
    return {
        "filename": name,
        "safe": found.safe,
        "formats": found.formats,
        "virtual-size": found.virtual_size,
        "encrypted": found.encrypted,
        "references": [{"kind": one.kind, "name": one.name, "format": one.format} for one in found.references],
        "features": found.features,
        "limits-exceeded": found.limits_exceeded,
        "checks": {one.name: {"passed": one.passed, "message": one.message} for one in found.checks.values()},
    }


def human_lines(found: Inspection, name: str) -> list[str]:
    """The facts, and then one line for each check."""
    size = found.virtual_size
    lines = [
        f"file: {printable(name)}",
        f"formats: {', '.join(found.formats) or 'none with a signature'}",
        f"virtual size: {'unknown' if size is None else f'{format_size(size)} ({size} bytes)'}",
    ]
    if found.encrypted:
        lines.append("encrypted: yes")
    for reference in found.references:
        known = f" ({printable(reference.format)})" if reference.format else ""
        lines.append(f"names a {reference.kind} file: {printable(reference.name)}{known}")
    if found.features:
        lines.append(f"features: {', '.join(found.features)}")
    width = max(len(check) for check in found.checks)
    lines.append("checks:")
    for check in found.checks.values():
        lines.append(f"    {check.name:<{width}}  {'ok    ' if check.passed else 'FAILED'}  {printable(check.message)}")
    lines.append("verdict: safe" if found.safe else "verdict: UNSAFE")
    return lines
