"""Printing: text that is safe on a terminal, JSON laid out as qemu-img does it, nested facts for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_INDENT = 4
_WORDS = 1 << 10
"""Names, numbers and signs of JSON that are printed together."""
# What would move the cursor, change colours or reorder text: C0 and C1 controls, line separators, bidirectional marks.
_UNSAFE = frozenset(
    [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)


def printable(text: str) -> str:
    """`text` with control characters written as escapes: names come from images, and an image may be hostile."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(character) if ord(character) in _UNSAFE else character for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def print_error(program: str, text: str) -> None:
    """One line on standard error, whatever `text` contains."""
    sys.stdout.flush()
    print(f"{program}: {printable(text)}", file=sys.stderr, flush=True)


def json_text(value: Any) -> str:
    """`value` as JSON in ASCII, four spaces a level.  Bytes of a name that are no UTF-8 become U+FFFD, as in qemu-img."""
    return "".join(json_parts(value))


def json_parts(value: Any) -> Iterator[str]:
    """`json_text` in parts, for what an image can make long."""
    import json
    from itertools import islice

    words = json.JSONEncoder(indent=_INDENT).iterencode(_without_surrogates(value))
    while part := "".join(islice(words, _WORDS)):
        yield part


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in value)
    if isinstance(value, Mapping):
        return {key: _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_without_surrogates(item) for item in value]
    return value


def fact_lines(facts: Mapping[str, Any], depth: int) -> list[str]:
    """Nested facts as indented lines, ``lazy refcounts: false``: how qemu-img prints what is specific to a format."""
    lines: list[str] = []
    for key, value in facts.items():
        lines += _fact(key.replace("-", " "), value, depth)
    return lines


def _fact(label: str, value: Any, depth: int) -> list[str]:
    margin = " " * (_INDENT * depth)
    if isinstance(value, Mapping):
        return [f"{margin}{label}:", *fact_lines(value, depth + 1)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        lines = [f"{margin}{label}:"]
        for index, item in enumerate(value):
            lines += _fact(f"[{index}]", item, depth + 1)
        return lines
    if isinstance(value, bool):
        return [f"{margin}{label}: {'true' if value else 'false'}"]
    return [f"{margin}{label}: {printable(str(value))}"]
