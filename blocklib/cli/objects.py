"""``--object``: the secrets that options of images name by their ids, in all of QEMU's spellings.

A secret that cannot be made ends the command before any image is opened.  What is printed then never repeats a value.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blocklib.cli.session import Failure
from blocklib.errors import BlocklibError, StorageError

if TYPE_CHECKING:
    from blocklib.crypto.secrets import Secret

_KINDS = ("secret",)


def secrets_of(texts: Sequence[str]) -> dict[str, Secret]:
    """The secrets that the values of all --object options define, by id.  Raises Failure."""
    from blocklib.crypto.secrets import secret_from_properties

    secrets: dict[str, Secret] = {}
    for text in texts:
        properties = _json_properties(text) if text.startswith("{") else _properties(text)
        kind = properties.pop("qom-type", "")
        if kind not in _KINDS:
            shown = f" {kind}" if _is_id(kind) else ""
            raise Failure(f"--object{shown}: no such kind of object; there is {', '.join(_KINDS)}")
        name = properties.pop("id", "")
        if not _is_id(name):
            raise Failure("--object secret: needs id=ID, a letter followed by letters, digits, '-', '.' and '_'")
        if name in secrets:
            raise Failure(f"--object secret: the id {name!r} is given twice")
        try:
            secrets[name] = secret_from_properties(properties, secrets, _read_file)
        except BlocklibError as exc:
            raise Failure(f"--object secret,id={name}: {exc}") from None
    return secrets


def _properties(text: str) -> dict[str, str]:
    """``KIND,NAME=VALUE,...``; a comma inside a value is doubled."""
    properties: dict[str, str] = {}
    for index, part in enumerate(part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            if index:
                raise Failure("--object: everything behind the kind of object is NAME=VALUE")
            name, value = "qom-type", name
        properties[name] = value
    return properties


def _json_properties(text: str) -> dict[str, str]:
    import json

    found = None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        text = ""  # reported below, where the error, which holds the text, is no context of ours
    if not text:
        raise Failure("--object: the text is not JSON")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise Failure("--object: the JSON is not an object whose values are text")
    return found


def _is_id(name: str) -> bool:
    return name.isascii() and name[:1].isalpha() and all(letter.isalnum() or letter in "-._" for letter in name)


def _read_file(name: str, most: int) -> bytes:
    """All of a file, which may be a pipe.  Raises StorageError, Failure for more than `most` bytes."""
    try:
        with open(name, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC)) as file:
            content = bytearray()
            while part := file.read(most + 1 - len(content)):
                content += part
    except OSError as exc:
        raise StorageError.wrap(exc, "read", filename=name) from exc
    except ValueError:
        raise Failure("--object secret: a file name contains a NUL character") from None
    if len(content) > most:
        raise Failure(f"--object secret: {name} has more than {most} bytes")
    return bytes(content)
