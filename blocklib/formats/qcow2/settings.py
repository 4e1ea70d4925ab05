"""How an image is to be used, from the options it was opened with: cache sizes, and what its version cannot do.

Source: QEMU's ``docs/qcow2-cache.txt`` and ``BlockdevOptionsQcow2`` in ``qapi/block-core.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from blocklib.errors import OptionError
from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header

_DEFAULT_L2_CACHE: Final = 32 << 20
_DEFAULT_REFCOUNT_CACHE: Final = 4 << 20
_DEFAULT_SLICE: Final = 1 << 16
_DEFAULT_CLEAN_INTERVAL: Final = 600
_LEAST_REFCOUNT_BLOCKS: Final = 4
"""What the refcount cache keeps when the L2 cache takes what it can of ``cache-size``."""

VERSION_3_OPTIONS: Final = ("lazy-refcounts", "discard-no-unref")
"""What only an image of version 3 can be opened with."""


class Settings(NamedTuple):
    """Bytes of one entry of the L2 cache, of the whole L2 cache, and of the refcount cache; whether counts may wait;
    seconds after which unused tables leave the caches, or 0."""

    slice_length: int
    l2_cache: int
    refcount_cache: int
    lazy_refcounts: bool
    clean_interval: int


def settings_for(options: Mapping[str, Any], header: Header, *, node: str | None) -> Settings:
    """What checked `options` mean for an image.  Raises OptionError where they contradict it or each other."""
    cluster_size = header.geometry().cluster_size
    if header.version == layout.VERSION_2:
        for name in VERSION_3_OPTIONS:
            if options.get(name):
                raise _bad(name, f"{name} needs an image of version 3 (compat=1.1)", node)
    slice_length = options.get("l2-cache-entry-size")
    if slice_length is not None and slice_length > cluster_size:
        raise _bad("l2-cache-entry-size", f"l2-cache-entry-size is at most the cluster size, {cluster_size}", node)
    l2_cache, refcount_cache = _cache_sizes(options, header, node)
    lazy = options.get("lazy-refcounts")
    if lazy is None:
        lazy = bool(header.compatible_features & layout.COMPATIBLE_LAZY_REFCOUNTS)
    interval = options.get("cache-clean-interval")
    return Settings(
        slice_length or min(cluster_size, _DEFAULT_SLICE),
        l2_cache,
        refcount_cache,
        lazy,
        _DEFAULT_CLEAN_INTERVAL if interval is None else interval,
    )


def _cache_sizes(options: Mapping[str, Any], header: Header, node: str | None) -> tuple[int, int]:
    """(L2 cache, refcount cache): of a total, L2 tables get what they can use before refcounts get more than the least."""
    total, l2, refcounts = (options.get(name) for name in ("cache-size", "l2-cache-size", "refcount-cache-size"))
    if total is None:
        return (
            _DEFAULT_L2_CACHE if l2 is None else l2,
            _DEFAULT_REFCOUNT_CACHE if refcounts is None else refcounts,
        )
    if l2 is not None and refcounts is not None:
        raise _bad("cache-size", "of cache-size, l2-cache-size and refcount-cache-size, two at most can be given", node)
    for name, part in (("l2-cache-size", l2), ("refcount-cache-size", refcounts)):
        if part is not None and part > total:
            raise _bad(name, f"{name} may not exceed cache-size", node)
    if l2 is None and refcounts is None:
        geometry = header.geometry()
        usable = geometry.l1_entries_for(header.size) << geometry.cluster_bits
        l2 = max(0, min(usable, total - _LEAST_REFCOUNT_BLOCKS * geometry.cluster_size))
    elif l2 is None:
        l2 = total - refcounts
    return l2, total - l2


def _bad(option: str, text: str, node: str | None) -> OptionError:
    return OptionError(f"{node}: {text}" if node else text, option=option, driver="qcow2", node=node)
