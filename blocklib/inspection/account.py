"""What an examination is given and what it tells: the words between the reading of a file and those who know its format.

An examination is a generator: it yields `Want`s, each a piece of the file that it needs next, and is sent the bytes; less of
them where the file ends.  So the same examination works on a file and on a stream that cannot seek, if it keeps one rule: a
piece begins within the first `probe.HEAD_LENGTH` bytes, or not before the end of the piece before it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

from blocklib.policy import Limits, Reference
from blocklib.reports import Check


class Want(NamedTuple):
    """A piece of the file, in bytes."""

    offset: int
    length: int


Examination: TypeAlias = Generator[Want, bytes, None]
Ending: TypeAlias = Callable[[int, bytes], None]
"""Called with the length of the file and its last bytes (`probe.TAIL_LENGTH`), once both are known."""


class Account:
    """What was found out about a file as an image of one format."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.virtual_size: int | None = None
        self.references: list[Reference] = []
        self.features: list[str] = []
        self.encrypted = False
        self.exceeded: dict[str, str] = {}
        """Limit -> what asks for more."""
        self.checks: dict[str, Check] = {}
        self.further: list[Examination] = []
        """To be begun as soon as the one that put them here has got its next piece, or is done."""
        self.endings: list[Ending] = []

    def passed(self, name: str, message: str) -> None:
        """A check passed; unless it has failed already."""
        self.checks.setdefault(name, Check(name, True, message))

    def failed(self, name: str, message: str) -> None:
        """A check failed.  One that failed before keeps its first message."""
        known = self.checks.get(name)
        if known is None or known.passed:
            self.checks[name] = Check(name, False, message)

    def exceeds(self, limit: str, message: str) -> None:
        self.exceeded.setdefault(limit, message)

    def names(self, kind: str, name: str, format: str | None) -> None:
        """The image names a file."""
        self.references.append(Reference(kind, name, format, None, 1))
