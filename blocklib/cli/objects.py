"""``--object``: secrets, TLS credentials, throttle groups and who is let in, named by ids, in all of QEMU's spellings.

An object that cannot be made ends the command before any image is opened.  What is printed then never repeats a value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from blocklib.cli.session import Failure
from blocklib.errors import BlocklibError, OptionError, StorageError

if TYPE_CHECKING:
    from ssl import SSLContext

    from blocklib.crypto.secrets import Secret
    from blocklib.throttling import ThrottleGroup

Named: TypeAlias = "Secret | SSLContext | ThrottleGroup"
"""What options of images may name: a secret, TLS credentials, or limits."""
Object: TypeAlias = "Named | Callable[[str], bool]"
"""Or whether a distinguished name is let in."""

_KINDS = ("secret", "tls-creds-x509", "tls-creds-psk", "authz-simple", "authz-list", "authz-list-file", "throttle-group")


def objects_of(texts: Sequence[str]) -> dict[str, Object]:
    """What the values of all --object options define, by id.  Raises Failure."""
    objects: dict[str, Object] = {}
    for text in texts:
        properties = _json_properties(text) if text.startswith("{") else _properties(text)
        kind = properties.pop("qom-type", "")
        if kind not in _KINDS:
            shown = f" {kind}" if isinstance(kind, str) and _is_id(kind) else ""
            raise Failure(f"--object{shown}: no such kind of object; there is {', '.join(_KINDS)}")
        name = properties.pop("id", "")
        if not isinstance(name, str) or not _is_id(name):
            raise Failure(f"--object {kind}: needs id=ID, a letter followed by letters, digits, '-', '.' and '_'")
        if name in objects:
            raise Failure(f"--object {kind}: the id {name!r} is given twice")
        try:
            objects[name] = _make(str(kind), properties, objects)
        except BlocklibError as exc:
            raise Failure(f"--object {kind},id={name}: {exc}") from None
    return objects


def divided(objects: Mapping[str, Object]) -> tuple[dict[str, Named], dict[str, Callable[[str], bool]]]:
    """(what options of images may name, who is let in): the objects by their use."""
    secrets: dict[str, Named] = {}
    authorizers: dict[str, Callable[[str], bool]] = {}
    for name, found in objects.items():
        if callable(found):
            authorizers[name] = found
        else:
            secrets[name] = found
    return secrets, authorizers


def _make(kind: str, properties: dict[str, Any], others: Mapping[str, Object]) -> Object:
    if kind == "secret":
        from blocklib.crypto.secrets import Secret, secret_from_properties

        if not all(isinstance(value, str) for value in properties.values()):
            raise Failure("--object secret: its properties are text")
        secrets = {name: other for name, other in others.items() if isinstance(other, Secret)}
        return secret_from_properties(properties, secrets, _read_file)
    if kind.startswith("tls-creds"):
        from blocklib.cli.tls_objects import credentials

        return credentials(kind, properties, others)
    if kind == "throttle-group":
        return _throttle_group(properties)
    from blocklib.cli.tls_objects import rules

    return rules(kind, properties, _read_file)


def _throttle_group(properties: Mapping[str, Any]) -> ThrottleGroup:
    """A group with limits in each of QEMU's spellings: ``x-NAME=N``, ``limits.NAME=N``, or "limits" in JSON.

    Raises OptionError.
    """
    from blocklib.options import flatten
    from blocklib.throttling import ThrottleGroup

    limits: dict[str, int] = {}
    for spelling, value in flatten(properties).items():
        prefix = next((prefix for prefix in ("x-", "limits.") if spelling.startswith(prefix)), "")
        name = spelling.removeprefix(prefix)
        if not prefix and spelling != "limits":
            raise OptionError(f"a throttle group has no property {spelling!r}; there are limits.NAME", option=spelling)
        if spelling == "limits" and value == {}:
            continue
        if name in limits:
            raise OptionError(f"the limit {name} is given twice", option=spelling)
        limits[name] = _whole_number(spelling, value)
    return ThrottleGroup(limits)


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 20:
        return int(value)
    raise OptionError(f"{name!r} is a whole number, not {value!r}", option=name)


def _properties(text: str) -> dict[str, Any]:
    """``KIND,NAME=VALUE,...``; a comma inside a value is doubled."""
    properties: dict[str, Any] = {}
    for index, part in enumerate(part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            if index:
                raise Failure("--object: everything behind the kind of object is NAME=VALUE")
            name, value = "qom-type", name
        properties[name] = value
    return properties


def _json_properties(text: str) -> dict[str, Any]:
    import json

    found = None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        text = ""  # reported below, where the error, which holds the text, is no context of ours
    if not text:
        raise Failure("--object: the text is not JSON")
    if not isinstance(found, dict):
        raise Failure("--object: the JSON is not an object")
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
        raise Failure("--object: a file name contains a NUL character") from None
    if len(content) > most:
        raise Failure(f"--object: {name} has more than {most} bytes")
    return bytes(content)
