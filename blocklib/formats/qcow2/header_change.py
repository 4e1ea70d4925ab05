"""Changing the header of an open image: the file has the new one or the old one, and so has the node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklib.errors import BlocklibError
from blocklib.records import replace

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.header_write import HeaderWrite
    from blocklib.formats.qcow2.node import Qcow2Node


def copy(header: Header) -> Header:
    """The same header, which changes of the other one leave alone."""
    return replace(header, extensions=list(header.extensions))


def plan(node: Qcow2Node, header: Header) -> HeaderWrite:
    """How `header` would replace the one in the file.  Raises UsageError where it does not fit."""
    return _plan(header, _first_cluster(node))


def rewrite(node: Qcow2Node) -> None:
    """Bring the node's header to the file, by one atomic write of its first sector where that can be.

    Raises StorageError, and UsageError for what does not fit: then file and node have the header that the file had before.
    Where that cannot be brought about the image is poisoned.
    """
    first = None
    try:
        on_disk = _first_cluster(node)
        change = _plan(node.header, on_disk)
        for host_offset, data in change.rest:
            node.file.write(host_offset, (data,), "metadata")
        if change.rest:
            node.writeback.barrier()
        first = on_disk[: len(change.first)]
        node.file.write(0, (change.first,), "metadata")
    except BlocklibError:
        node.header = copy(node.stored_header)
        if first is not None:
            _write_back(node, first)
        raise
    except BaseException:
        node.poison("changing the header was interrupted")
        raise
    node.header.extensions = change.header.extensions
    node.header.backing_file_offset = change.header.backing_file_offset
    node.header.backing_file_size = change.header.backing_file_size
    node.stored_header = copy(node.header)


def switch(node: Qcow2Node) -> None:
    """`rewrite`, durably."""
    rewrite(node)
    try:
        node.writeback.barrier()
    except BlocklibError:  # which has poisoned the image
        raise
    except BaseException:
        node.poison("changing the header was interrupted")
        raise


def reload(node: Qcow2Node) -> None:
    """Take everything from the file again, after changes that went around the caches; nothing in them waits to be written.

    Raises StorageError, once all is there all the same, or with the image poisoned.
    """
    try:
        node.load()
    except BaseException:
        try:
            node.load()  # what was in the way may have passed
        except BaseException:
            node.poison("its tables could not be read again after a change")
        raise


def _first_cluster(node: Qcow2Node) -> bytes:
    on_disk = bytearray(min(node.geometry.cluster_size, node.file.size))
    node.file.read(0, memoryview(on_disk), "metadata")
    return bytes(on_disk)


def _plan(header: Header, on_disk: bytes) -> HeaderWrite:
    from blocklib.formats.qcow2.header_write import plan_rewrite

    return plan_rewrite(header, on_disk)


def _write_back(node: Qcow2Node, first: bytes) -> None:
    """A write that failed may have changed the header: make it what it was."""
    try:
        node.file.write(0, (first,), "metadata")
    except BaseException:
        node.poison("changing the header was interrupted")
