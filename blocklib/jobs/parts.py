"""What a format can do besides being a node, reached by name as drivers are, so that no format is loaded before its use."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from blocklib.errors import UnsupportedFeatureError

_PLACES: Final = {
    ("qcow2", "check"): "blocklib.formats.qcow2.check",
    ("qcow2", "create"): "blocklib.formats.qcow2.create",
    ("qcow2", "geometry"): "blocklib.formats.qcow2.geometry",
    ("qcow2", "repair"): "blocklib.formats.qcow2.repair",
}


def part_of(format: str, part: str, *, verb: str) -> Any:
    """The module of `format` that does its `part` of a verb.  Raises UnsupportedFeatureError where it has none."""
    place = _PLACES.get((format, part))
    if place is None:
        raise UnsupportedFeatureError(f"images of the format {format} cannot be {verb}", features=(verb,))
    return import_module(place)
