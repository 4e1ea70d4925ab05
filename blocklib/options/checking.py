"""Options against the tables: typed values with defaults, or an error that names what would have been right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from blocklib.drivers import FORMATS
from blocklib.errors import OptionError, UsageError
from blocklib.options.tables import COMMON, Option, Table, options_of
from blocklib.options.text import flatten, nest
from blocklib.sizes import parse_size

CacheMode: TypeAlias = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]

_CACHE_FLAGS: Mapping[str, tuple[bool, bool, bool]] = {
    "none": (True, False, False),
    "writeback": (False, False, False),
    "writethrough": (False, False, True),
    "directsync": (True, False, True),
    "unsafe": (False, True, False),
}
_BOOLEANS = {
    "on": True,
    "off": False,
    "yes": True,
    "no": False,
    "true": True,
    "false": False,
    "y": True,
    "n": False,
}
_MAX_NODE_NAME = 31
_NOT_FLAT = ("node", "choices", "list")
"""Kinds of options that may have parts which are no options of the driver."""


def cache_flags(mode: str) -> tuple[bool, bool, bool]:
    """(direct, no_flush, writethrough) of a cache mode: no page cache, flushes ignored, a flush after each write.

    "off" is an old name of "none".  Raises OptionError.
    """
    flags = _CACHE_FLAGS.get("none" if mode == "off" else mode)
    if flags is None:
        modes = tuple(_CACHE_FLAGS)
        raise OptionError(f"unknown cache mode {mode!r}; there are {', '.join(modes)}", option="cache", choices=modes)
    return flags


# -- names and values --------------------------------------------------------------------------------------------------


def check_options(driver: str, options: Mapping[str, Any], *, table: Table = "open", partial: bool = False) -> dict[str, Any]:
    """Every option of `driver` with its typed value, by dotted name: what `options` gives, else the default.

    `options` may be nested or dotted, and its values typed or text.  Children ("file", "backing") come back as given,
    nested and unchecked: they are another driver's options; a child that was not given is missing from the result,
    because None means "no backing file".  With `partial`, required options may be missing (somebody else adds them).
    Raises OptionError.
    """
    known = options_of(driver, table)
    if table == "create":
        known = options_of("file", table) | known
    given = _own_names(driver, known, options, table)
    values: dict[str, Any] = {}
    for name, option in known.items():
        if name in given:
            values[name] = _typed(driver, option, given[name])
        elif option.required and not partial:
            raise OptionError(f"{driver}: option {name!r} is required", option=name, driver=driver)
        elif option.kind != "node":
            values[name] = option.default
    if table == "open":
        if values["driver"] not in (None, driver):
            raise _bad(driver, known["driver"], values["driver"], f"must be {driver!r} here", (driver,))
        values["driver"] = driver
    return values


def common_value(name: str, value: Any) -> Any:
    """The typed value of an option that every driver has.  Raises OptionError."""
    return _typed("", next(option for option in COMMON if option.name == name), value)


def _own_names(driver: str, known: Mapping[str, Option], options: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The options given, dotted, children aside; all of them are known."""
    nested = nest(options)
    whole = [name for name, option in known.items() if option.kind in _NOT_FLAT and name in nested]
    children = {name: nested.pop(name) for name in whole}
    given: dict[str, Any] = {}
    for name, value in flatten(nested).items():
        if name in known:
            given[name] = value
        elif value != {} or not any(other.startswith(name + ".") for other in known):  # an empty group says nothing
            raise _unknown(driver, name, known, table)
    return given | children


def _unknown(driver: str, name: str, known: Mapping[str, Option], table: Table) -> OptionError:
    if table == "amend" and name.partition(".")[0] in _created_with(driver):
        raise OptionError(
            f"{driver}: the option {name!r} is for new images; it cannot be amended",
            option=name,
            driver=driver,
            choices=sorted(known),
        )
    from difflib import get_close_matches

    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(choices)}"
    return OptionError(f"{driver} has no option {name!r}; {hint}", option=name, driver=driver, choices=choices)


def _created_with(driver: str) -> set[str]:
    """The names, without their parts, of the options that only creating an image knows."""
    names = {*options_of(driver, "create"), *options_of("file", "create")}
    return {name.partition(".")[0] for name in names}


def _text(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _bad(driver: str, option: Option, value: Any, rule: str, choices: tuple[str, ...] = ()) -> OptionError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    text = f"option {option.name!r} {rule}, not {shown}"
    return OptionError(f"{driver}: {text}" if driver else text, option=option.name, driver=driver or None, choices=choices)


def _typed(driver: str, option: Option, value: Any) -> Any:
    match option.kind:
        case "str":
            return _as_str(driver, option, value)
        case "name":
            return _as_node_name(driver, option, value)
        case "bool":
            return _as_bool(driver, option, value)
        case "choice":
            return _as_choice(driver, option, value)
        case "secret":
            return _as_secret(driver, option, value)
        case "throttle-group":
            return _as_throttle_group(driver, option, value)
        case "tls":
            return _as_tls(driver, option, value)
        case "node":
            return _as_child(driver, option, value)
        case "choices":
            return tuple(_as_choice(driver, option, entry) for _name, entry in _entries(driver, option, value))
        case "list":
            return tuple(_as_group(driver, option, name, entry) for name, entry in _entries(driver, option, value))
        case _:
            return _as_number(driver, option, value)


def _as_str(driver: str, option: Option, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _bad(driver, option, value, "is text")
    return text


def _as_node_name(driver: str, option: Option, value: Any) -> str:
    name = _as_str(driver, option, value)
    if (
        not name.isascii()
        or not name[:1].isalpha()
        or not all(letter.isalnum() or letter in "-._" for letter in name)
        or len(name) > _MAX_NODE_NAME
    ):
        rule = f"is a name of at most {_MAX_NODE_NAME} letters, digits, '-', '.' and '_' that begins with a letter"
        raise _bad(driver, option, value, rule)
    return name


def _as_bool(driver: str, option: Option, value: Any) -> bool:
    result = value if isinstance(value, bool) else _BOOLEANS.get(value) if isinstance(value, str) else None
    if result is None:
        raise _bad(driver, option, value, "is 'on' or 'off'", ("on", "off"))
    return result


def _as_choice(driver: str, option: Option, value: Any) -> str:
    text = _text(value)
    choice = dict(option.aliases).get(text, text)
    if choice not in option.choices or not isinstance(value, (str, bool)):
        raise _bad(driver, option, value, f"is one of {', '.join(option.choices)}", option.choices)
    return choice


def _entries(driver: str, option: Option, value: Any) -> list[tuple[str, Any]]:
    """The entries of a list by the name of each, be it given as a list or by numbers: "inject-error.0"."""
    if isinstance(value, Mapping):
        if set(value) != {str(number) for number in range(len(value))}:
            raise _bad(driver, option, value, "is a list, with entries numbered from 0")
        value = [value[str(number)] for number in range(len(value))]
    if not isinstance(value, (list, tuple)):
        raise _bad(driver, option, value, "is a list")
    return [(f"{option.name}.{number}", entry) for number, entry in enumerate(value)]


def _as_group(driver: str, option: Option, name: str, value: Any) -> dict[str, Any]:
    """One entry of a list, checked like the options of a driver."""
    if not isinstance(value, Mapping):
        raise _bad(driver, option._replace(name=name), value, "is a group of options")
    given = flatten(value)
    values: dict[str, Any] = {}
    for item in option.items:
        if item.name in given:
            values[item.name] = _typed(driver, item._replace(name=f"{name}.{item.name}"), given.pop(item.name))
        elif item.required:
            raise OptionError(f"{driver}: option '{name}.{item.name}' is required", option=f"{name}.{item.name}", driver=driver)
        else:
            values[item.name] = item.default
    for unknown in given:
        choices = [f"{name}.{item.name}" for item in option.items]
        text = f"{driver} has no option '{name}.{unknown}'; there are {', '.join(choices)}"
        raise OptionError(text, option=f"{name}.{unknown}", driver=driver, choices=choices)
    return values


def _as_child(driver: str, option: Option, value: Any) -> Any:
    if isinstance(value, (bool, int, float, bytes, list, tuple)) or (value is None and option.required):
        raise _bad(driver, option, value, "is a child: nested options, or the name of a node or file")
    return value


def _as_secret(driver: str, option: Option, value: Any) -> Any:
    from blocklib.crypto.secrets import Secret

    if not isinstance(value, (str, Secret)):  # not shown: it may be a secret in the wrong wrapping
        text = f"option {option.name!r} is a blocklib.Secret, not {type(value).__name__}"
        raise OptionError(f"{driver}: {text}" if driver else text, option=option.name, driver=driver or None)
    return value


def _as_throttle_group(driver: str, option: Option, value: Any) -> Any:
    from blocklib.throttling import ThrottleGroup

    if not isinstance(value, (str, ThrottleGroup)):
        raise _bad(driver, option, value, "is a blocklib.ThrottleGroup")
    return value


def _as_tls(driver: str, option: Option, value: Any) -> Any:
    if not isinstance(value, str):
        import ssl

        if not isinstance(value, ssl.SSLContext):
            raise _bad(driver, option, value, "is an ssl.SSLContext")
    return value


def _as_number(driver: str, option: Option, value: Any) -> int:
    number = _parse_number(driver, option, value)
    if option.choices and str(number) not in option.choices:
        raise _bad(driver, option, value, f"is one of {', '.join(option.choices)}", option.choices)
    in_range = option.minimum <= number <= option.maximum
    if not in_range or (option.power_of_two and number & (number - 1)):
        what = "a power of two" if option.power_of_two else "a number"
        raise _bad(driver, option, value, f"is {what} from {option.minimum} to {option.maximum}")
    return number


def _parse_number(driver: str, option: Option, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (option.kind == "size" or _is_plain_integer(value)):
        try:
            return parse_size(value)
        except UsageError:
            pass
    raise _bad(driver, option, value, "is a size" if option.kind == "size" else "is a number")


def _is_plain_integer(text: str) -> bool:
    """Hexadecimal, or decimal without a leading zero (octal to some, and so to nobody); no unit, no fraction."""
    if text[:2] in ("0x", "0X"):
        return all(letter in "0123456789abcdefABCDEF" for letter in text[2:])
    return text.isascii() and text.isdigit() and (text[0] != "0" or text == "0")


# -- the help text -----------------------------------------------------------------------------------------------------

_TYPE_SHOWN = {"bool": "bool (on/off)", "int": "num", "size": "size", "node": "node"}
_HELP_COLUMN = 22


def describe_options(driver: str, table: Table = "create", *, protocol: str | None = None) -> str:
    """The table that ``qemu-img create -o help`` prints: one line per option, sorted, without a newline at the end.

    With `protocol` (a target was named) the options of that driver are merged into it.
    """
    options = options_of(driver, table)
    if protocol is not None:
        options = options_of(protocol, table) | options
    title = "Supported options:" if protocol is not None else f"Supported {driver} options:"
    lines = [f"Amend options for '{driver}':" if table == "amend" else title]
    for name in sorted(options):
        option = options[name]
        shown = f"{name}=<{_TYPE_SHOWN.get(option.kind, 'str')}>"
        lines.append(f"  {shown:{_HELP_COLUMN}} - {option.help}")
    if table == "create" and protocol is None and driver in FORMATS:
        lines += [
            "",
            "The protocol level may support further options.",
            "Specify the target filename to include those options.",
        ]
    return "\n".join(lines)
