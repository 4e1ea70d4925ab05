"""Text and dotted names into nested dicts, and back.  Nothing here knows which options exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from blocklib.errors import OptionError

if TYPE_CHECKING:
    import os
    from ssl import SSLContext

    from blocklib.crypto.secrets import Secret
    from blocklib.disk import Disk
    from blocklib.throttling import ThrottleGroup

OptionValue: TypeAlias = (
    "str | int | bool | os.PathLike[str] | Disk | Secret | SSLContext | ThrottleGroup | Mapping[str, OptionValue]"
    " | Sequence[OptionValue] | None"
)
"""What an option may be given as."""

JSON_PREFIX = "json:"
# Each backing file is one level of nesting, so this is a longer chain than any limit allows.
MAX_NESTING = 256


# -- nested and dotted -------------------------------------------------------------------------------------------------


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options as nested dicts: ``{"cache.direct": True}`` becomes ``{"cache": {"direct": True}}``.

    `options` may be nested, dotted or both.  Only mappings are copied; lists and other objects are values.  Raises
    OptionError for an option that is given twice (also: once as a value and once by its parts), an empty part of a
    name, and nesting deeper than MAX_NESTING (a mapping that contains itself, for one).
    """
    tree: dict[str, Any] = {}
    _merge(tree, options, "", 0)
    return tree


def flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with dotted names and no nesting but empty mappings: the inverse of `nest`, same errors."""
    return dict(_leaves(nest(options), ""))


def _merge(tree: dict[str, Any], options: Mapping[str, Any], prefix: str, depth: int) -> None:
    for key, value in options.items():
        if not isinstance(key, str):
            raise OptionError(f"the name of an option is text, not {key!r}", option=repr(key))
        name = prefix + key
        *groups, last = key.split(".")
        if not last or not all(groups):
            raise OptionError(f"option {name!r}: a part of the name is empty", option=name)
        if depth + len(groups) >= MAX_NESTING:
            raise OptionError(f"options are nested deeper than {MAX_NESTING} levels", option=name[:80])
        level = tree
        for group in groups:
            level = _group(level, group, name)
        if isinstance(value, Mapping):
            _merge(_group(level, last, name), value, name + ".", depth + len(groups) + 1)
        elif last in level:
            raise _given_twice(name)
        else:
            level[last] = value


def _group(level: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    group = level.setdefault(key, {})
    if not isinstance(group, dict):
        raise _given_twice(name)
    return group


def _given_twice(name: str) -> OptionError:
    return OptionError(f"option {name!r} is given twice", option=name)


def _leaves(tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# -- text --------------------------------------------------------------------------------------------------------------


def parse_options(text: str) -> dict[str, OptionValue]:
    """Options from ``json:{...}`` or from ``key=value,dotted.key=...``, as nested dicts ready for ``blocklib.open``.

    In the second form ``,,`` is a comma inside a value, and a key without ``=`` is on.  Values stay text there, and
    are typed where they are used.  Raises OptionError for text that is neither, and for an option given twice.
    """
    if text.startswith(JSON_PREFIX):
        return nest(_parse_json(text.removeprefix(JSON_PREFIX)))
    options: dict[str, str] = {}
    for key, value in _parse_pairs(text):
        if key in options:
            raise _given_twice(key)
        options[key] = value
    return nest(options)


def parse_create_options(texts: Sequence[str]) -> dict[str, str]:
    """The options of ``-o a=b,c=d``, repeated or not, in the order given; the last of the same name counts.

    Values are text; `check_options` types them.  Raises OptionError for an empty list or an empty part of one, as
    qemu-img.
    """
    options: dict[str, str] = {}
    for text in texts:
        _check_list(text)
        options.update(_parse_pairs(text))
    return options


def asks_for_help(texts: Sequence[str]) -> bool:
    """Whether one of the parts of ``-o`` lists is ``help`` (or ``?``).  Raises as `parse_create_options`."""
    for text in texts:
        _check_list(text)
    return any(part in ("help", "?") for text in texts for part in _split_commas(text))


def _check_list(text: str) -> None:
    if not all(_split_commas(text)):
        raise OptionError(f"invalid list of options: {text!r}")


def _split_commas(text: str) -> list[str]:
    """The parts between single commas, with the doubled ones made single."""
    parts = [""]
    index = 0
    while index < len(text):
        comma = text.find(",", index)
        if comma < 0:
            comma = len(text)
        parts[-1] += text[index:comma]
        if text[comma : comma + 2] == ",,":
            parts[-1] += ","
            index = comma + 2
        else:
            if comma < len(text):
                parts.append("")
            index = comma + 1
    return parts


def _parse_pairs(text: str) -> Iterable[tuple[str, str]]:
    parts = _split_commas(text)
    if not parts[-1]:  # QEMU allows one comma at the end, and no options at all
        parts.pop()
    for part in parts:
        key, equals, value = part.partition("=")
        if not key:
            raise OptionError(f"an option without a name in {text!r}")
        yield key, value if equals else "on"


def _parse_json(text: str) -> dict[str, Any]:
    import json

    try:
        # The keys of each object are looked at here, because a dict has forgotten the ones that were there twice.
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise OptionError(f"options are nested deeper than {MAX_NESTING} levels") from None
    except OptionError:
        raise
    except ValueError as exc:  # also an integer of more digits than Python converts
        raise OptionError(f"the text after {JSON_PREFIX!r} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise OptionError(f"the text after {JSON_PREFIX!r} is not a JSON object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _given_twice(key)
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise OptionError(f"{name} is not a value that JSON has")
