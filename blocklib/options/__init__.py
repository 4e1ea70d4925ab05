"""Options in QEMU's names: one table per driver, for ``open()``, ``-o``, ``--image-opts``, ``json:{}`` and the help.

`tables` says which options there are, `text` turns text and dotted names into nested dicts and back, `checking` gives
typed values or an OptionError that names what would have been right.
"""

from __future__ import annotations

from blocklib.options.checking import CacheMode, cache_flags, check_options, common_value, describe_options
from blocklib.options.tables import Option, options_of
from blocklib.options.text import OptionValue, asks_for_help, flatten, nest, parse_create_options, parse_options

__all__ = [
    "CacheMode",
    "Option",
    "OptionValue",
    "asks_for_help",
    "cache_flags",
    "check_options",
    "common_value",
    "describe_options",
    "flatten",
    "nest",
    "options_of",
    "parse_create_options",
    "parse_options",
]
