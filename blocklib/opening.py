"""From a target to a graph of nodes: what `blocklib.open`, `create` and `info` do before there is a disk.

Names that the caller gives are opened as given; names that an image gives go through the reference policy, one place
(`_Builder.open_reference`).  Nothing is written to any image before the whole chain has been accepted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, Literal, cast

from blocklib import drivers, graph
from blocklib.disk import Disk
from blocklib.errors import (
    BlocklibError,
    FormatMismatchError,
    ImageCorruptError,
    OptionError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklib.node import DetectZeroes, NamedReference, Node
from blocklib.options import CacheMode, OptionValue, cache_flags, check_options, nest
from blocklib.policy import Limits, Reference, References, RestrictedFile, Target, decide
from blocklib.reports import ImageInfo


class FromImage:
    """The type of FROM_IMAGE: the image says which file it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "FROM_IMAGE"


FROM_IMAGE: Final = FromImage()

_URL_PREFIXES = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")
_INHERITED = ("cache.direct", "cache.no-flush", "force-share")
"""Options that a child takes from the node above unless it has its own."""


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
    backing: Disk | Mapping[str, OptionValue] | None | FromImage = FROM_IMAGE,
    data_file: Disk | Mapping[str, OptionValue] | FromImage = FROM_IMAGE,
    options: Mapping[str, OptionValue] | None = None,
) -> Disk:
    """Open a virtual disk for reading ("r") or for reading and writing ("r+"); never creates.

    `target` is a path, or options in QEMU's names, nested or dotted.  `format` None looks for the magic of a known format;
    raw has none and must be said.  No file but `target` is opened unless `references` allows it ("allow", or a policy of
    `blocklib.policy`), or unless the caller names it as `backing`; ``backing=None`` reads this image alone.

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
    backing: Disk | Mapping[str, OptionValue] | None | FromImage = FROM_IMAGE,
    data_file: Disk | Mapping[str, OptionValue] | FromImage = FROM_IMAGE,
    options: Mapping[str, OptionValue] | None = None,
    guess_raw: bool = False,
) -> Disk:
    """`blocklib.open`, and with `guess_raw` what the command line does: bytes without a known magic are a raw image."""
    if mode not in ("r", "r+"):
        raise UsageError(f"mode is 'r' or 'r+', not {mode!r}")
    if not isinstance(data_file, FromImage):
        raise UnsupportedFeatureError("external data files are not supported yet", features=("external data file",))
    spec, path = _spec_of(target)
    _merge_options(spec, options or {})
    direct, no_flush, writethrough = cache_flags(cache)
    _set_common(spec, "cache.direct", direct, default=False)
    _set_common(spec, "cache.no-flush", no_flush, default=False)
    _set_common(spec, "discard", discard, default="ignore")
    _set_common(spec, "detect-zeroes", detect_zeroes, default="off")
    _set_common(spec, "force-share", force_share, default=False)
    read_only = mode == "r"
    if not isinstance(backing, FromImage):
        if "backing" in spec:
            raise OptionError("the backing node is given twice: in the target and as backing=", option="backing")
        spec["backing"] = cast("Any", backing)
    if format is not None:
        _set_common(spec, "driver", format, default=None)
    elif references != "deny" and "driver" not in spec and not guess_raw:
        raise UsageError(
            "where references are allowed, format= must be given: a guessed image could name any file of this host"
        )
    builder = _Builder(references, limits or Limits(), guess_raw=guess_raw)
    try:
        node = builder.build(spec, path, read_only=read_only, inherited={}, depth=0)
        if bool(spec.get("read-only")) and not read_only:
            raise UsageError("mode 'r+' and the option read-only contradict each other")
        disk = Disk(node, mode, writethrough=writethrough, references=references)
    except BaseException:
        builder.release()
        raise
    try:
        if not read_only:
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
    spec, path = _spec_of(target)
    _merge_options(spec, options or {})
    if format is not None:
        _set_common(spec, "driver", format, default=None)
    _set_common(spec, "force-share", force_share, default=False)
    spec["backing"] = None
    builder = _Builder("deny", limits or Limits(), guess_raw=guess_raw, metadata_only=True)
    try:
        node = builder.build(spec, path, read_only=True, inherited={}, depth=0)
        with Disk(node, "r") as disk:
            return disk.info()
    except BaseException:
        builder.release()
        raise


def _spec_of(target: Target) -> tuple[dict[str, Any], str | os.PathLike[str] | None]:
    """(options of the top node, the path given by the caller or None)."""
    if isinstance(target, Mapping):
        return nest(target), None
    if isinstance(target, str) and target.startswith(_URL_PREFIXES):
        raise UnsupportedFeatureError("NBD is not supported yet", features=("nbd",))
    if not isinstance(target, (str, os.PathLike)):
        raise UsageError(f"a target is a path, a URL or options, not {type(target).__name__}")
    return {}, target


def _merge_options(spec: dict[str, Any], options: Mapping[str, OptionValue]) -> None:
    for name, value in nest(options).items():
        if name in spec and isinstance(spec[name], dict) and isinstance(value, dict):
            _merge_options(spec[name], value)
        elif name in spec:
            raise OptionError(f"option {name!r} is given twice", option=name)
        else:
            spec[name] = value


def _set_common(spec: dict[str, Any], name: str, value: Any, *, default: Any) -> None:
    """Put a keyword's value among the options; both given is an error, unless the keyword is at its default."""
    place = spec
    *groups, last = name.split(".")
    for group in groups:
        place = place.setdefault(group, {})
    if last not in place:
        if value != default:
            place[last] = value
    elif value != default and place[last] != value:
        raise OptionError(f"option {name!r} is given twice: as {place[last]!r} and as {value!r}", option=name)


class _Builder:
    """Opens one chain.  `nodes` are the nodes made so far, each after its children."""

    def __init__(
        self, references: References, limits: Limits, *, guess_raw: bool = False, metadata_only: bool = False
    ) -> None:
        self._references = references
        self._limits = limits
        self._guess_raw = guess_raw
        self._metadata_only = metadata_only
        self.nodes: list[Node] = []
        self._files: list[tuple[int, int]] = []

    def release(self) -> None:
        """Close what was opened, after a failure; nothing has been written."""
        for node in reversed(self.nodes):
            if not node.parents and (node.children or node.is_leaf):
                graph.close_tree(node, abandon=True)

    def build(
        self,
        spec: Mapping[str, Any],
        path: str | os.PathLike[str] | None,
        *,
        read_only: bool,
        inherited: Mapping[str, Any],
        depth: int,
        references: References | None = None,
    ) -> Node:
        """Open the node that `spec` (nested options) and `path` (what "file" is, if `spec` does not say) describe."""
        options = dict(spec)
        driver = options.pop("driver", None)
        if driver is not None:
            drivers.check_name(driver)
        if driver in drivers.PROTOCOLS:
            return self._protocol(driver, options, path, read_only=read_only, inherited=inherited)
        own = {name: _dig(options, name) for name in _INHERITED}
        passed_down = {name: inherited.get(name) if value is None else value for name, value in own.items()}
        below = options.pop("file", None)
        if below is None and path is None and "filename" in options:
            below = {"driver": "file", "filename": options.pop("filename")}
        file_node = self._file_child(below, path, read_only=read_only, inherited=passed_down)
        guessed = driver is None
        if driver is None:
            driver = self._probe(file_node)
        node = self._format(driver, options, file_node, read_only=read_only, guessed=guessed)
        self._refuse_loop(node)
        if not self._metadata_only:
            policy = references if references is not None else self._references
            self._open_backing(node, options, passed_down, depth, policy, guessed=guessed)
        return node

    def _protocol(
        self,
        driver: str,
        options: dict[str, Any],
        path: str | os.PathLike[str] | None,
        *,
        read_only: bool,
        inherited: Mapping[str, Any],
    ) -> Node:
        if path is not None:
            options = {**options, "filename": os.fspath(path)}
        for name, value in inherited.items():
            if value is not None and _dig(options, name) is None:
                _set_common(options, name, value, default=None)
        typed = check_options(driver, options)
        if typed.get("read-only"):
            read_only = True
        node = _make(driver, typed, read_only=read_only)
        if isinstance(path, RestrictedFile):
            node.use_opener(path.open_fd)  # type: ignore[attr-defined]
        node.detect_zeroes = typed["detect-zeroes"]
        node.discard_passes = typed["discard"] != "ignore"  # a format asks for it only when it was told to
        self.nodes.append(node)
        node.load()
        return node

    def _file_child(
        self, below: Any, path: str | os.PathLike[str] | None, *, read_only: bool, inherited: Mapping[str, Any]
    ) -> Node:
        """The node that a format node's bytes are in."""
        if isinstance(below, Disk):
            return below.node
        if isinstance(below, str):
            below, path = None, below
        if path is not None:
            return self._protocol("file", dict(below or {}), path, read_only=read_only, inherited=inherited)
        if not isinstance(below, Mapping):
            raise OptionError("the target names no file: give a path, or file.filename", option="file")
        spec = dict(below)
        if "driver" not in spec:
            spec["driver"] = "file"
        return self.build(spec, None, read_only=read_only, inherited=inherited, depth=0)

    def _probe(self, file_node: Node) -> str:
        from blocklib import plan
        from blocklib.probe import PROBE_LENGTH, probe

        start = bytearray(PROBE_LENGTH)
        plan.read(file_node, 0, memoryview(start))
        found = probe(bytes(start))
        if found in drivers.FORMATS:
            return found
        name = file_node.filename or file_node.name
        if found is not None:
            raise UnsupportedFeatureError(
                f"{name}: images of the format {found} are not supported", features=(found,), node=name
            )
        if self._guess_raw:
            return "raw"
        raise FormatMismatchError(
            f"{name}: no known image format; if it is a raw image, say format='raw'",
            structure="magic",
            host_offset=0,
            expected="the magic of a known format",
            found=bytes(start[:4]).hex(),
            node=name,
        )

    def _format(
        self, driver: str, options: dict[str, Any], file_node: Node, *, read_only: bool, guessed: bool
    ) -> Node:
        if driver == "raw" and options.get("backing", FROM_IMAGE) is None:
            del options["backing"]  # "this image alone" says nothing new of an image that has no backing file
        typed = check_options(driver, {**options, "file": {}})
        if typed.get("read-only"):
            read_only = True
        extra: dict[str, Any] = {}
        if driver == "qcow2":
            extra = {"limits": self._limits, "metadata_only": self._metadata_only}
        elif driver == "raw":
            extra = {"guessed": guessed}
        node = _make(driver, typed, read_only=read_only, filename=file_node.filename, **extra)
        node.detect_zeroes = typed["detect-zeroes"]
        node.discard_passes = typed["discard"] == "unmap"
        with graph.Transaction() as change:
            change.attach(node, "file", file_node)
        self.nodes.append(node)
        node.load()
        return node

    def _refuse_loop(self, node: Node) -> None:
        """A chain that comes back to a file it has opened would never end."""
        if node.filename is None:
            return
        try:
            stat = os.stat(node.filename)
        except OSError:
            return  # opened some other way; the depth limit still holds
        identity = (stat.st_dev, stat.st_ino)
        if identity in self._files:
            raise ImageCorruptError(
                f"{node.filename}: the backing chain comes back to this file",
                structure="backing file name",
                expected="a chain without a loop",
                found=node.filename,
                node=node.filename,
            )
        self._files.append(identity)

    def _open_backing(
        self,
        node: Node,
        options: dict[str, Any],
        inherited: Mapping[str, Any],
        depth: int,
        references: References,
        *,
        guessed: bool,
    ) -> None:
        if "backing" in options:
            below = options["backing"]
            if below is None:
                return
            if isinstance(below, Disk):
                backing = below.node
            else:
                path = below if isinstance(below, str) else None
                spec = {} if isinstance(below, str) else dict(below)
                backing = self.build(
                    spec, path, read_only=True, inherited=inherited, depth=depth + 1, references=references
                )
        else:
            named = next((item for item in node.references() if item.kind == "backing"), None)
            if named is None:
                return
            if references == "allow" and guessed and not self._guess_raw:
                references = "deny"
            backing = self.open_reference(node, named, references, inherited, depth + 1)
        with graph.Transaction() as change:
            change.attach(node, "backing", backing)

    def open_reference(
        self, referrer: Node, named: NamedReference, references: References, inherited: Mapping[str, Any], depth: int
    ) -> Node:
        """Open a file that an image names, if the policy lets us."""
        self._limits.check("chain_depth", depth, structure="backing chain", node=referrer.filename)
        target = decide(references, Reference(named.kind, named.name, named.format, referrer.filename, depth))
        spec, path = _spec_of(target)
        if "driver" not in spec and named.format is not None:
            if named.format not in drivers.names():
                raise UnsupportedFeatureError(
                    f"{referrer.filename}: the backing file {named.name!r} has the unknown format {named.format!r}",
                    features=(named.format,),
                    node=referrer.filename,
                )
            spec["driver"] = named.format
        try:
            return self.build(
                spec, path, read_only=True, inherited=inherited, depth=depth, references=self._references
            )
        except BlocklibError as exc:
            exc.add_note(f"while opening the backing file of {referrer.filename}")
            raise


def _make(driver: str, typed: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Node:
    node: Node = drivers.load(driver).from_options(typed, read_only=read_only, **extra)
    return node


def _dig(options: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted option among nested ones, or None."""
    place: Any = options
    for part in name.split("."):
        if not isinstance(place, Mapping) or part not in place:
            return None
        place = place[part]
    return place
