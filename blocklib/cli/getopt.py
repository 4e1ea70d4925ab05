"""The command line's grammar: what a command accepts, as data; parsed as GNU getopt_long does, and the help made from it.

Short flags combine (``-Uf qcow2``), long ones may be abbreviated and take ``--name=value``, operands may stand anywhere
and ``--`` ends the options: what scripts written for qemu-img rely on.
"""

from __future__ import annotations

import getopt as _getopt
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blocklib.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from ssl import SSLContext

    from blocklib.crypto.secrets import Secret
    from blocklib.throttling import ThrottleGroup


class UsageFailure(Exception):
    """The command line itself is wrong; the hint at the help is added where it is reported."""


class Option(Record):
    """One option: its names ("-f", "--format"), what to call its value (None: a flag), and what it does."""

    names: tuple[str, ...]
    metavar: str | None
    help: str


class Syntax(Record):
    """What one command accepts.  `operands` is how the help spells the rest, `about` what the command does."""

    operands: str
    about: str
    options: tuple[Option, ...]
    signed_operands: bool = False
    """``-10M`` is an operand, not a bundle of flags."""


HELP = Option(("-h", "--help"), None, "show this help and exit")
UNIVERSAL = (
    Option(("--untrusted",), None, "open no file that an image names and guess no format that an image could imitate"),
    Option(("--debug",), None, "show the traceback of an error"),
    HELP,
)
"""What every command accepts."""
_HELP_COLUMN = 26


class Given:
    """A parsed command line.  An option is asked for by its first name, whichever of its names was used."""

    def __init__(
        self, values: dict[str, list[str]], operands: list[str], sequence: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._values = values
        self.operands = operands
        self.sequence = tuple(sequence)
        """(first name, value or "") of every option, in the order of the command line."""
        self.secrets: dict[str, Secret | SSLContext | ThrottleGroup] = {}
        """Secrets, TLS credentials and throttle groups that the --object options define, once a command has asked for it."""
        self.authorizers: dict[str, Callable[[str], bool]] = {}
        """And who is let in."""
        self.listener: socket | None = None
        """A socket that listens already, which our caller has passed on."""
        self.ready: Callable[[], object] = lambda: None
        """To be called by a server once it serves."""

    def has(self, name: str) -> bool:
        return name in self._values

    def last(self, name: str) -> str | None:
        """The value of the last `name`, which overrides those before it; None without one."""
        values = self._values.get(name)
        return values[-1] if values else None

    def all(self, name: str) -> list[str]:
        return self._values.get(name, [])


def parse(syntax: Syntax, arguments: Sequence[str]) -> Given:
    """What `arguments` give for `syntax`.  Raises UsageFailure for what it does not accept."""
    options = syntax.options + UNIVERSAL
    first_name = {name: option.names[0] for option in options for name in option.names}
    short, long = _stdlib_tables(options)
    signed = [text for text in arguments if text[:1] == "-" and text[1:2].isdigit()] if syntax.signed_operands else []
    try:
        found, operands = _getopt.gnu_getopt([text for text in arguments if text not in signed], short, long)
    except _getopt.GetoptError as exc:
        raise UsageFailure(_explain(exc, options)) from None
    values: dict[str, list[str]] = {}
    sequence = [(first_name[name], value) for name, value in found]
    for name, value in sequence:
        values.setdefault(name, []).append(value)
    return Given(values, operands + signed, sequence)


def _stdlib_tables(options: Sequence[Option]) -> tuple[str, list[str]]:
    short: list[str] = []
    long: list[str] = []
    for option in options:
        for name in option.names:
            if name.startswith("--"):
                long.append(name[2:] + ("=" if option.metavar else ""))
            else:
                short.append(name[1:] + (":" if option.metavar else ""))
    return "".join(short), long


def _explain(exc: _getopt.GetoptError, options: Sequence[Option]) -> str:
    """Which option is wrong and how, found in our own table: the standard library says it in prose only."""
    if "--" not in exc.msg:
        known = any(f"-{exc.opt}" in option.names for option in options)
        return f"option '-{exc.opt}' needs a value" if known else f"unknown option '-{exc.opt}'"
    dashed = f"--{exc.opt}"
    matches = {name: option for option in options for name in option.names if name.startswith(dashed)}
    option = matches.get(dashed)
    if option is None:
        if len(matches) > 1:
            return f"option '{dashed}' is short for more than one: {', '.join(sorted(matches))}"
        return f"unknown option '{dashed}'"
    return f"option '{dashed}' needs a value" if option.metavar else f"option '{dashed}' takes no value"


def help_text(spelled: str, syntax: Syntax) -> str:
    """The help of one command, which is called as `spelled`."""
    lines = [f"usage: {spelled} [options] {syntax.operands}", "", syntax.about, "", "options:"]
    for option in syntax.options + UNIVERSAL:
        spelled = ", ".join(option.names)
        if option.metavar:
            spelled += ("=" if option.names[-1].startswith("--") else " ") + option.metavar
        if len(spelled) > _HELP_COLUMN:
            lines.append(f"  {spelled}")
            spelled = ""
        lines.append(f"  {spelled:<{_HELP_COLUMN}}  {option.help}")
    return "\n".join(lines)
