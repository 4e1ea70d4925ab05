"""From a target to a graph of nodes: what `blocklib.open`, `create` and `info` do before there is a disk.

Names that the caller gives are opened as given; names that an image gives go through the reference policy, one place
(`building`).  Nothing is written to any image before the whole chain has been accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from blocklib.building import FROM_IMAGE, Builder, FromImage, dig, merge_options, spec_of
from blocklib.disk import Disk
from blocklib.errors import (
    OptionError,
    UsageError,
)
from blocklib.node import DetectZeroes, Node
from blocklib.options import CacheMode, OptionValue, cache_flags, common_value
from blocklib.policy import Limits, References, Target, check_references
from blocklib.reports import ImageInfo


def open(
    target: Target,
    mode: Literal["r", "r+"] = "r",
    *,
    format: str | None = None,
    references: References = "deny",
    limits: Limits = Limits(),  # noqa: B008 - immutable
    cache: CacheMode = "writeback",
    discard: Literal["ignore", "unmap"] = "ignore",
    detect_zeroes: DetectZeroes = "off",
    force_share: bool = False,
    backing: Disk | Mapping[str, OptionValue] | FromImage | None = FROM_IMAGE,
    data_file: Disk | Mapping[str, OptionValue] | FromImage = FROM_IMAGE,
    options: Mapping[str, OptionValue] | None = None,
) -> Disk:
    """Open a virtual disk for reading ("r") or for reading and writing ("r+"); never creates.

    `target` is a path, or options in QEMU's names, nested or dotted.  `format` None looks for the magic of a known format;
    raw has none and must be said.  No file but `target` is opened unless `references` allows it ("allow", or a policy of
    `blocklib.policy`), or unless the caller names it as `backing` or `data_file`; ``backing=None`` reads this image alone.
    An open Disk serves as `data_file` for reading only, since a writer tolerates no other: for "r+" give its options.

    Raises PolicyError, LockedError, ImageNotFoundError, StorageError, ImageError (FormatMismatchError, ImageCorruptError,
    ImageLimitError, UnsupportedFeatureError), OptionError, UsageError.
    """
    return open_disk(
        target,
        mode,
        format=format,
        references=references,
        limits=limits,
        cache=cache,
        discard=discard,
        detect_zeroes=detect_zeroes,
        force_share=force_share,
        backing=backing,
        data_file=data_file,
        options=options,
    )


def info(
    target: Target,
    *,
    format: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    force_share: bool = False,
    options: Mapping[str, OptionValue] | None = None,
) -> ImageInfo:
    """One image's metadata.  Opens no file but `target` and asks no policy.

    Raises as `open` does, but also describes images that use features we cannot read yet.
    """
    return image_info(target, format=format, limits=limits, force_share=force_share, options=options)


def open_disk(
    target: Target,
    mode: Literal["r", "r+"] = "r",
    *,
    format: str | None = None,
    references: References = "deny",
    limits: Limits | None = None,
    cache: CacheMode = "writeback",
    discard: Literal["ignore", "unmap"] = "ignore",
    detect_zeroes: DetectZeroes = "off",
    force_share: bool = False,
    backing: Disk | Mapping[str, OptionValue] | FromImage | None = FROM_IMAGE,
    data_file: Disk | Mapping[str, OptionValue] | FromImage | None = FROM_IMAGE,
    options: Mapping[str, OptionValue] | None = None,
    guess_raw: bool = False,
    secrets: Mapping[str, object] | None = None,
    locked: bool = False,
    aio: str = "threads",
) -> Disk:
    """`blocklib.open`, and with `guess_raw` what the command line does: bytes without a known magic are a raw image.

    ``data_file=None`` opens no data file, for who changes nothing but metadata.  `secrets` are those, and the TLS
    credentials, that options, also of images below, may name by their ids.  `locked`: no data will be read, so that
    encrypted images need no secret.  `aio` is for every file of the chain whose options do not say it.
    """
    if mode not in ("r", "r+"):
        raise UsageError(f"mode is 'r' or 'r+', not {mode!r}")
    check_references(references)
    spec, path = spec_of(target)
    merge_options(spec, options or {})
    direct, no_flush, writethrough = cache_flags(cache)
    _set_common(spec, "cache.direct", direct, default=False)
    _set_common(spec, "cache.no-flush", no_flush, default=False)
    _set_common(spec, "discard", discard, default="ignore")
    _set_common(spec, "detect-zeroes", detect_zeroes, default="off")
    _set_common(spec, "force-share", force_share, default=False)
    if not isinstance(backing, FromImage):
        if "backing" in spec:
            raise OptionError("the backing node is given twice: in the target and as backing=", option="backing")
        spec["backing"] = cast("Any", backing)
    if data_file is not None and not isinstance(data_file, FromImage):
        if "data-file" in spec:
            raise OptionError("the data file is given twice: in the target and as data_file=", option="data-file")
        spec["data-file"] = cast("Any", data_file)
    if format is not None:
        _set_common(spec, "driver", format, default=None)
    elif references != "deny" and "driver" not in spec and not guess_raw:
        raise UsageError(
            "where references are allowed, format= must be given: a guessed image could name any file of this host"
        )
    _refuse_contradiction(spec, mode)
    builder = Builder(
        references,
        limits or Limits(),
        guess_raw=guess_raw,
        with_data_file=data_file is not None,
        secrets=secrets,
        locked=locked,
        aio=aio,
    )
    try:
        node = builder.build(spec, path, read_only=mode == "r", inherited={})
        _refuse_equal_names(node)
        # Where auto-read-only has fallen back to reading, the mode of the disk tells.
        disk = Disk(node, "r" if node.read_only else mode, writethrough=writethrough, references=references)
    except BaseException:
        builder.release()
        raise
    try:
        for opened in builder.nodes:
            if not opened.read_only:
                opened.activate()
    except BaseException:
        disk.abandon()
        raise
    return disk


def image_info(
    target: Target,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    force_share: bool = False,
    options: Mapping[str, OptionValue] | None = None,
    guess_raw: bool = False,
) -> ImageInfo:
    """`blocklib.info`: one image's metadata.  Opens no reference and asks no policy; features we cannot read are listed."""
    with open_metadata(
        target, format=format, limits=limits, force_share=force_share, options=options, guess_raw=guess_raw
    ) as disk:
        return disk.info()


def open_metadata(
    target: Target,
    mode: Literal["r", "r+"] = "r",
    *,
    format: str | None = None,
    limits: Limits | None = None,
    force_share: bool = False,
    options: Mapping[str, OptionValue] | None = None,
    guess_raw: bool = False,
) -> Disk:
    """One image as far as its header, for describing, checking and repairing it; its data cannot be read.

    Opens no reference and asks no policy, writes nothing, and takes images with features that we cannot read.
    """
    spec, path = spec_of(target)
    merge_options(spec, options or {})
    if format is not None:
        _set_common(spec, "driver", format, default=None)
    _set_common(spec, "force-share", force_share, default=False)
    _refuse_contradiction(spec, mode)
    builder = Builder("deny", limits or Limits(), guess_raw=guess_raw, metadata_only=True)
    try:
        node = builder.build(spec, path, read_only=mode == "r", inherited={})
        return Disk(node, "r" if node.read_only else mode)
    except BaseException:
        builder.release()
        raise


def _set_common(spec: dict[str, Any], name: str, value: Any, *, default: Any) -> None:
    """Put a keyword's value among the options; both given is an error, unless they agree or the keyword is at its default."""
    if value == default:
        return
    given = dig(spec, name)
    if given is None:
        merge_options(spec, {name: value})
    elif common_value(name, given) != value:
        raise OptionError(f"option {name!r} is given twice: as {given!r} and as {value!r}", option=name)


def _refuse_contradiction(spec: Mapping[str, Any], mode: str) -> None:
    if mode == "r+" and "read-only" in spec and common_value("read-only", spec["read-only"]):
        raise UsageError("mode 'r+' and the option read-only contradict each other")


def _refuse_equal_names(top: Node) -> None:
    """Raises OptionError where two nodes of a graph have the same name."""
    found = {top.name: top}
    todo = [top]
    while todo:
        for edge in todo.pop().children.values():
            node = edge.node
            if found.setdefault(node.name, node) is not node:
                raise OptionError(f"two nodes have the name {node.name!r}", option="node-name", node=node.name)
            todo.append(node)
