"""Changing what an image is: its version, refcount width, lazy refcounts, and what its header says of a data file.

Everything that could be refused is refused before the first write (`check`).  Each change ends in one atomic write of the
header, so that a crash leaves the image before or after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from blocklib.errors import OptionError, UnsupportedFeatureError, UsageError
from blocklib.formats.qcow2 import data_file, header_change, key_slots, layout
from blocklib.formats.qcow2.create import VERSIONS
from blocklib.formats.qcow2.header import Header, feature_name_table
from blocklib.formats.qcow2.settings import VERSION_3_OPTIONS
from blocklib.formats.qcow2.snapshots.table import table_bytes
from blocklib.records import replace

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_VM_STATE_V2 = (1 << 32) - 1
"""What the field of a version 2 snapshot entry can say of its VM state."""


def check(node: Qcow2Node, options: Mapping[str, Any], *, force: bool = False) -> key_slots.Change | None:
    """What the options mean for the key slots of the image; changes nothing.

    Raises OptionError, UsageError or UnsupportedFeatureError for what the image cannot become.
    `options` are checked amend options: None where an option was not given.
    """
    node.check_usable()
    node.check_writable()
    _check_names(node, options)
    version = _version_after(node, options)
    width = _width_after(node, options)
    size = options["size"]
    if size and size % layout.SIZE_UNIT:
        raise _bad(node, "size", f"the size is a multiple of {layout.SIZE_UNIT}, not {size}")
    if version == layout.VERSION_2:
        if width != 16:
            given = options["refcount_bits"] is not None
            raise _bad(node, "refcount_bits" if given else "compat", "compat=0.10 needs refcount_bits=16")
        if options["lazy_refcounts"]:
            raise _bad(node, "lazy_refcounts", "lazy refcounts need compat=1.1")
        for name in VERSION_3_OPTIONS:
            if node.options.get(name):
                raise _bad(node, "compat", f"the image is open with the option {name}, which needs compat=1.1")
        if node.header.version != layout.VERSION_2:
            _check_downgrade(node, size or node.size)
    if width != node.geometry.refcount_bits:
        from blocklib.formats.qcow2.refcount_width import check_counts

        node.writeback.finish()
        check_counts(node, width)
    header_change.plan(node, _header_after(node.header, version, options))  # raises where it does not fit
    return key_slots.plan(node, options, force=force)


def amend(
    node: Qcow2Node, options: Mapping[str, Any], progress: Callable[[int, int], object], *, force: bool = False
) -> None:
    """Make the changes that `check` has accepted; durable on return.  The caller has drained the node."""
    slots = check(node, options, force=force)
    with node.writeback.exact_counts():
        node.writeback.finish()
        version, width = _version_after(node, options), _width_after(node, options)
        if slots is not None:  # first: that the secret which opened the image still does is known only now
            key_slots.change(node, options, slots)
        if version > node.header.version:
            _upgrade(node)
        if width != node.geometry.refcount_bits:
            from blocklib.formats.qcow2.refcount_width import change_width

            change_width(node, width, progress)
        _change_bits_and_names(node, options)
        if version < node.header.version:
            _downgrade(node, progress)
        header_change.reload(node)


# -- what is refused ---------------------------------------------------------------------------------------------------


def _bad(node: Qcow2Node, option: str, text: str) -> OptionError:
    return OptionError(f"{node.filename}: {text}", option=option, driver="qcow2", node=node.filename)


def _version_after(node: Qcow2Node, options: Mapping[str, Any]) -> int:
    compat = options["compat"]
    return node.header.version if compat is None else VERSIONS[compat]


def _width_after(node: Qcow2Node, options: Mapping[str, Any]) -> int:
    width: int | None = options["refcount_bits"]
    return node.geometry.refcount_bits if width is None else width


def _check_names(node: Qcow2Node, options: Mapping[str, Any]) -> None:
    header = node.header
    for option, present in (("backing_file", header.backing_name), ("backing_fmt", header.backing_format)):
        if options[option] not in (None, present):
            raise _bad(node, option, "amend does not change the backing file; rebase does")
    name = options["data_file"]
    if name is not None:
        if not data_file.is_external(header):
            raise _bad(node, "data_file", "the image has no external data file, and cannot be given one")
        try:
            replace(header, extensions=[]).data_file_name = name
        except UsageError as exc:
            raise _bad(node, "data_file", str(exc)) from exc
    if options["data_file_raw"] and not data_file.is_raw(header):
        raise _bad(node, "data_file_raw", "data_file_raw is for new images: nobody knows what the data file holds")


def _check_downgrade(node: Qcow2Node, size: int) -> None:
    header = node.header
    reasons = []
    if data_file.is_external(header):
        reasons.append("an external data file")
    if header.incompatible_features & layout.INCOMPATIBLE_EXTENDED_L2:
        reasons.append("extended L2 entries")
    if header.extension(layout.EXTENSION_BITMAPS) is not None:
        reasons.append("bitmaps")
    if header.crypt_method == layout.CRYPT_AES:
        from blocklib.formats.qcow2.zero_expansion import has_zero

        if has_zero(node):
            reasons.append("zero clusters, which the old encryption cannot store in their place")
    if any(entry.vm_state_size > _VM_STATE_V2 or entry.disk_size not in (None, size) for entry in node.snapshots):
        reasons.append("snapshots of another size, or with a VM state of 4 GiB or more")
    if header.compression_type != layout.COMPRESSION_DEFLATE and not reasons:
        from blocklib.formats.qcow2.zero_expansion import has_compressed

        if has_compressed(node):
            reasons.append(f"clusters compressed with {layout.COMPRESSION_NAMES[header.compression_type]}")
    if reasons:
        raise UnsupportedFeatureError(
            f"{node.filename}: version 2 (compat=0.10) has no {', '.join(reasons)}",
            features=reasons,
            structure="header",
            expected="only what version 2 has",
            found=", ".join(reasons),
            node=node.filename,
        )


# -- what becomes of the header ----------------------------------------------------------------------------------------


def _header_after(header: Header, version: int, options: Mapping[str, Any]) -> Header:
    """The header that `options` make of `header`, but for where its tables are."""
    after = replace(header, extensions=list(header.extensions))
    if version > header.version:
        _to_version_3(after)
    _set_bits_and_names(after, options)
    if version < header.version:
        _to_version_2(after)
    return after


def _to_version_3(header: Header) -> None:
    header.version = layout.VERSION_3
    header.header_length = layout.HEADER_V3_LENGTH
    header.set_extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table())


def _to_version_2(header: Header) -> None:
    header.version = layout.VERSION_2
    header.header_length = layout.HEADER_V2_LENGTH
    header.incompatible_features = header.compatible_features = header.autoclear_features = 0
    header.compression_type = layout.COMPRESSION_DEFLATE
    header.unknown_fields = b""
    header.set_extension(layout.EXTENSION_FEATURE_NAMES, None)


def _set_bits_and_names(header: Header, options: Mapping[str, Any]) -> None:
    lazy = options["lazy_refcounts"]
    if lazy is not None and header.version >= layout.VERSION_3:
        header.compatible_features &= ~layout.COMPATIBLE_LAZY_REFCOUNTS
        header.compatible_features |= layout.COMPATIBLE_LAZY_REFCOUNTS if lazy else 0
    if options["data_file_raw"] is False:
        header.autoclear_features &= ~layout.AUTOCLEAR_RAW_EXTERNAL
    if options["data_file"] is not None:
        header.data_file_name = options["data_file"]


# -- the changes -------------------------------------------------------------------------------------------------------


def _upgrade(node: Qcow2Node) -> None:
    header = node.header
    replaced = None
    data = table_bytes(node.snapshots, version=layout.VERSION_3, disk_size=header.size)
    if node.snapshots and data != table_bytes(node.snapshots, version=layout.VERSION_2, disk_size=header.size):
        # Version 3 demands of each snapshot the size of its disk.
        geometry = node.geometry
        replaced = header.snapshots_offset >> geometry.cluster_bits, geometry.clusters_for(
            sum(entry.length for entry in node.snapshots)
        )
        n = geometry.clusters_for(len(data))
        first, _n = node.retry(lambda: node.refcounts.allocate(n, exactly=True))
        node.file.write(first << geometry.cluster_bits, (data, bytes((n << geometry.cluster_bits) - len(data))), "metadata")
        node.writeback.flush()
        header.snapshots_offset = first << geometry.cluster_bits
    _to_version_3(header)
    header_change.switch(node)
    if replaced is not None:
        with node.lock:
            node.writeback.freed.append(replaced)
        node.writeback.finish()


def _change_bits_and_names(node: Qcow2Node, options: Mapping[str, Any]) -> None:
    before = replace(node.header, extensions=list(node.header.extensions))
    _set_bits_and_names(node.header, options)
    if node.header != before:
        header_change.switch(node)


def _downgrade(node: Qcow2Node, progress: Callable[[int, int], object]) -> None:
    """Version 2 has no zero clusters: they become absent ones or zeroes that are stored.  Then the header switches."""
    from blocklib.formats.qcow2.zero_expansion import expand_zero_clusters

    expand_zero_clusters(node, progress)
    node.writeback.finish()
    _to_version_2(node.header)
    header_change.switch(node)


def change_backing(node: Qcow2Node, name: str | None, format: str | None) -> None:
    """Name another backing file in the header; durable on return.  Raises UsageError for a name that does not fit."""
    node.check_usable()
    header = node.header
    with node.writeback.structure:
        node.writeback.flush()
        header.backing_name, header.backing_format = name, format
        header_change.switch(node)
