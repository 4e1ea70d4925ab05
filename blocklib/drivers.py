"""The table of drivers by name: a driver that nobody opens is never imported.

On the ground floor: nothing here may import a driver when it is itself imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from blocklib.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklib.inspection.account import Account, Examination
    from blocklib.node import Node

_FORMATS = {
    "qcow2": "blocklib.formats.qcow2.node:Qcow2Node",
    "raw": "blocklib.formats.raw:RawNode",
}
_PROTOCOLS = {
    "file": "blocklib.protocols.file:FileNode",
    "host_device": "blocklib.protocols.file:HostDeviceNode",
    "memory": "blocklib.protocols.memory:MemoryNode",
    "nbd": "blocklib.protocols.nbd:NbdNode",
    "null-co": "blocklib.protocols.null:NullNode",
}
_FILTERS = {
    "blkdebug": "blocklib.filters.blkdebug:BlkdebugNode",
    "blkverify": "blocklib.filters.blkverify:BlkverifyNode",
    "blklogwrites": "blocklib.filters.blklogwrites:BlkLogWritesNode",
    "compress": "blocklib.filters.compress:CompressNode",
    "copy-before-write": "blocklib.filters.copy_before_write:CopyBeforeWriteNode",
    "copy-on-read": "blocklib.filters.copy_on_read:CopyOnReadNode",
    "throttle": "blocklib.filters.throttle:ThrottleNode",
}
_EXAMINERS = {"qcow2": "blocklib.formats.qcow2.examination:examine"}
_PLACES = _FORMATS | _PROTOCOLS | _FILTERS

FORMATS = tuple(sorted(_FORMATS))
"""Drivers that interpret the bytes of another node, by name."""
PROTOCOLS = tuple(sorted(_PROTOCOLS))
"""Drivers that fetch bytes, by name."""
FILTERS = tuple(sorted(_FILTERS))
"""Drivers that stand between others, by name."""


_SCHEMES = dict.fromkeys(("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"), "nbd")
"""How the URL of a protocol begins -> its driver."""


def protocol_of_url(name: object) -> str | None:
    """The driver for a text that is a URL; None for what is none, and for paths, which may look like one."""
    if not isinstance(name, str):
        return None
    scheme, separator, _ = name.partition("://")
    return _SCHEMES.get(scheme) if separator else None


def names() -> tuple[str, ...]:
    """The names of all drivers, sorted."""
    return tuple(sorted(_PLACES))


def check_name(name: str) -> None:
    """Raises OptionError, with the names there are as its choices, for a driver that is not in the table."""
    if name not in _PLACES:
        known = ", ".join(names())
        raise OptionError(f"unknown driver {name!r}; there are {known}", option="driver", choices=names())


def load(name: str) -> type[Node]:
    """The class of a driver; its module is imported at the first call.  Raises OptionError for an unknown name."""
    check_name(name)
    module, _, attribute = _PLACES[name].partition(":")
    return cast("type[Node]", getattr(import_module(module), attribute))


def examiner(name: str) -> Callable[[bytes, Account], Examination]:
    """What examines the images of a format for `blocklib.inspect`: called with the head of the file."""
    module, _, attribute = _EXAMINERS[name].partition(":")
    return cast("Callable[[bytes, Account], Examination]", getattr(import_module(module), attribute))
