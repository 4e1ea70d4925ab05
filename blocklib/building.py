"""One chain of nodes out of options: each driver with its children, the files that images name as the policy says.

Names that the caller gives are opened as given; names that an image gives go through the reference policy, one place
(`Builder._open_reference`).  Nothing is written to any image before the whole chain has been accepted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from blocklib import drivers, graph
from blocklib.disk import Disk
from blocklib.errors import (
    BlocklibError,
    FormatMismatchError,
    ImageCorruptError,
    OptionError,
    ReadOnlyError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklib.node import NamedReference, Node
from blocklib.options import OptionValue, check_options, common_value, nest, options_of
from blocklib.policy import Limits, Reference, References, RestrictedFile, Target, decide


class FromImage:
    """The type of FROM_IMAGE: the image says which file it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "FROM_IMAGE"


FROM_IMAGE: Final = FromImage()

_INHERITED = ("cache.direct", "cache.no-flush", "force-share", "auto-read-only")
"""Options that a child takes from the node above unless it has its own."""
_FORMATS_OF_FILES = (*drivers.FORMATS, "file", "host_device")
"""Drivers that an image may name as the format of another file."""


def spec_of(target: Target) -> tuple[dict[str, Any], str | os.PathLike[str] | None]:
    """(options of the top node, the path given by the caller or None)."""
    if isinstance(target, Mapping):
        return nest(target), None
    if not isinstance(target, (str, os.PathLike)):
        raise UsageError(f"a target is a path, a URL or options, not {type(target).__name__}")
    return {}, target


def merge_options(spec: dict[str, Any], options: Mapping[str, OptionValue]) -> None:
    for name, value in nest(options).items():
        if name in spec and isinstance(spec[name], dict) and isinstance(value, dict):
            merge_options(spec[name], value)
        elif name in spec:
            raise OptionError(f"option {name!r} is given twice", option=name)
        else:
            spec[name] = value


class Builder:
    """Opens one chain.  `nodes` are the nodes made so far, each after its children."""

    def __init__(
        self,
        references: References,
        limits: Limits,
        *,
        guess_raw: bool = False,
        metadata_only: bool = False,
        with_data_file: bool = True,
        secrets: Mapping[str, object] | None = None,
        locked: bool = False,
        aio: str = "threads",
    ) -> None:
        self._references = references
        self._limits = limits
        self._guess_raw = guess_raw
        self._metadata_only = metadata_only
        self._with_data_file = with_data_file
        self._secrets = secrets if secrets is not None else {}
        self._locked = locked
        self._aio = aio
        self.nodes: list[Node] = []

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
        above: tuple[Node, ...] = (),
        references: References | None = None,
    ) -> Node:
        """Open the node that `spec` (nested options) and `path` (what "file" is, if `spec` does not say) describe.

        `above` are the images of the chain that it comes below, top first.
        """
        options = nest(spec)
        for name, value in inherited.items():
            if value is not None and dig(options, name) is None:
                merge_options(options, {name: value})
        driver = options.pop("driver", None)
        if driver is not None:
            drivers.check_name(common_value("driver", driver))
            if options.get("backing", FROM_IMAGE) is None and "backing" not in options_of(driver):
                del options["backing"]  # "this image alone" says nothing new of what has no backing file
        if driver in drivers.PROTOCOLS:
            return self._protocol(driver, options, path, read_only=read_only)
        passed_down = {name: dig(options, name) for name in _INHERITED}
        if driver in drivers.FILTERS:
            return self._filter(driver, options, path, read_only=read_only, inherited=passed_down)
        below = options.pop("file", None)
        if below is None and path is None and "filename" in options:
            below = {"driver": "file", "filename": options.pop("filename")}
        # A format asks its file for discards only where it was told to, so the file need not ask again.
        file_node = self._file_child(below, path, read_only=read_only, inherited={**passed_down, "discard": "unmap"})
        guessed = driver is None
        if driver is None:
            driver = self._probe(file_node)
            if driver == "raw" and options.get("backing", FROM_IMAGE) is None:
                del options["backing"]
        node = self._format(driver, options, file_node, read_only=read_only, guessed=guessed)
        if not self._metadata_only:
            policy = references if references is not None else self._references
            if self._with_data_file:
                self._open_data_file(node, options, passed_down, above, policy, guessed=guessed)
            self._open_backing(node, options, passed_down, above, policy, guessed=guessed)
        return node

    def _protocol(
        self,
        driver: str,
        options: dict[str, Any],
        path: str | os.PathLike[str] | None,
        *,
        read_only: bool,
    ) -> Node:
        if path is not None:
            merge_options(options, {"filename": os.fspath(path)})
        if driver in ("file", "host_device"):
            options.setdefault("aio", self._aio)
        typed = check_options(driver, options)
        if isinstance(typed.get("tls-creds"), str):
            from blocklib.crypto.secrets import find_tls_context

            typed["tls-creds"] = find_tls_context(self._secrets, typed["tls-creds"])
        node = _make(driver, typed, read_only=read_only or bool(typed["read-only"]))
        if isinstance(path, RestrictedFile):
            node.use_opener(path.open_fd)  # type: ignore[attr-defined]
        node.detect_zeroes = typed["detect-zeroes"]
        node.discard_passes = typed["discard"] == "unmap"
        self.nodes.append(node)
        node.load()
        return node

    def _file_child(
        self,
        below: Any,
        path: str | os.PathLike[str] | None,
        *,
        read_only: bool,
        inherited: Mapping[str, Any],
        name: str = "file",
    ) -> Node:
        """The node that a format node's bytes, or those of a filter, are in, which the option `name` gives."""
        if path is not None and below is not None and not isinstance(below, Mapping):
            raise OptionError(f"the file is given twice: as the target and as the option {name!r}", option=name)
        if path is None and below is None:
            raise OptionError(f"the target names no file: give a path, or {name}.filename", option=name)
        return self._child(below, path, read_only=read_only, inherited=inherited)

    def _child(
        self, below: Any, path: str | os.PathLike[str] | None, *, read_only: bool, inherited: Mapping[str, Any]
    ) -> Node:
        """The node that a child is given as: an open disk, a path or URL, or options; and `path`, where the target is it."""
        if isinstance(below, Disk):
            return below.root.node
        if isinstance(below, (str, os.PathLike)):
            below, path = None, below
        if path is not None:
            spec = {"driver": drivers.protocol_of_url(path) or "file", **(below or {})}
            return self.build(spec, path, read_only=read_only, inherited=inherited)
        spec = dict(below)
        if "driver" not in spec:
            spec["driver"] = "file"
        return self.build(spec, None, read_only=read_only, inherited=inherited)

    def _filter(
        self,
        driver: str,
        options: dict[str, Any],
        path: str | os.PathLike[str] | None,
        *,
        read_only: bool,
        inherited: Mapping[str, Any],
    ) -> Node:
        """A filter over its child, which does with discards and zeroes what the filter was told to do."""
        main = drivers.load(driver).main_option
        typed = self.filter_options(driver, {**options, main: {}})
        read_only = read_only or bool(typed["read-only"])
        inherited = {**inherited, **{name: dig(options, name) for name in ("discard", "detect-zeroes")}}
        child = self._file_child(options.get(main), path, read_only=read_only, inherited=inherited, name=main)
        read_only = read_only or child.read_only
        others = self.other_children(driver, typed, read_only=read_only, inherited=inherited)
        node = _make(driver, typed, read_only=read_only, filename=child.filename)
        with graph.Transaction() as change:
            change.attach(node, "file", child)
            for name, other in others.items():
                change.attach(node, name, other)
        self.nodes.append(node)
        node.load()
        return node

    def filter_options(self, driver: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The checked options of a filter, with objects in place of the ids that name them.  Raises OptionError."""
        typed = check_options(driver, options)
        if isinstance(typed.get("throttle-group"), str):
            from blocklib.throttling import find_throttle_group

            typed["throttle-group"] = find_throttle_group(self._secrets, typed["throttle-group"])
        return typed

    def other_children(
        self, driver: str, typed: Mapping[str, Any], *, read_only: bool, inherited: Mapping[str, Any]
    ) -> dict[str, Node]:
        """The children that a filter has beside the one whose content it passes on, by name; `typed` are its checked options.

        They are opened to be written if the filter does that whatever its users do (`Node.written_children`), or else as
        "file" is.
        """
        kind = drivers.load(driver)
        cache = {name: inherited.get(name) for name in ("cache.direct", "cache.no-flush")}
        return {
            name: self._child(typed[name], None, read_only=read_only and name not in kind.written_children, inherited=cache)
            for name, option in options_of(driver).items()
            if option.kind == "node" and name != kind.main_option and name in typed
        }

    def _probe(self, file_node: Node) -> str:
        from blocklib import plan
        from blocklib.probe import PROBE_LENGTH, probe_readable

        start = bytearray(min(PROBE_LENGTH, file_node.size))
        plan.read(file_node, 0, memoryview(start))
        name = file_node.filename or file_node.name
        found = probe_readable(memoryview(start), name)
        if found is not None:
            return found
        if self._guess_raw:
            return "raw"
        raise FormatMismatchError(
            f"{name}: no known image format; if it is a raw image, say format='raw'",
            structure="magic",
            host_offset=0,
            expected="the magic of a known format",
            found=repr(bytes(start[:4])) if start else "an empty file",
            node=name,
        )

    def _format(
        self, driver: str, options: dict[str, Any], file_node: Node, *, read_only: bool, guessed: bool
    ) -> Node:
        typed = check_options(driver, {**options, "file": {}})
        if isinstance(typed.get("encrypt.key-secret"), str) and not self._metadata_only and not self._locked:
            from blocklib.crypto.secrets import find_secret

            typed["encrypt.key-secret"] = find_secret(self._secrets, typed["encrypt.key-secret"], "encrypt.key-secret")
        read_only = read_only or bool(typed["read-only"])
        if file_node.read_only and not read_only:
            if not typed["auto-read-only"]:
                name = file_node.filename or file_node.name
                raise ReadOnlyError(f"{name}: the {driver} image in it cannot be written: it is open for reading", node=name)
            read_only = True
        extra: dict[str, Any] = {}
        if driver == "qcow2":
            extra = {"limits": self._limits, "metadata_only": self._metadata_only, "locked": self._locked}
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

    def _open_data_file(
        self,
        node: Node,
        options: Mapping[str, Any],
        inherited: Mapping[str, Any],
        above: tuple[Node, ...],
        references: References,
        *,
        guessed: bool,
    ) -> None:
        """Open the file that the image keeps guest data in, if it has one: the caller's, or the one that it names.

        Raises ImageCorruptError where nobody names one, OptionError where one is given that the image does not use.
        """
        given = options.get("data-file", FROM_IMAGE)
        if not node.needs_data_file:
            if not isinstance(given, FromImage):
                text = f"{node.filename}: a data file is given, but the image keeps its data in itself"
                raise OptionError(text, option="data-file", driver=node.driver, node=node.filename)
            return
        inherited = {**inherited, "discard": "unmap"}
        if isinstance(given, Disk):
            data = given.node
            if data.read_only and not node.read_only:
                raise ReadOnlyError(f"{data.filename or data.name}: the data file is open for reading only", node=data.name)
        elif not isinstance(given, FromImage):
            spec, path = spec_of(given)
            data = self._build_data_file(spec, path, node, inherited)
        else:
            named = next((item for item in node.references() if item.kind == "data-file"), None)
            if named is None:
                raise ImageCorruptError(
                    f"{node.filename}: the image keeps its data in a file that it does not name; data_file= can name it",
                    structure="header extension",
                    expected="the name of the external data file",
                    found="none",
                    node=node.filename,
                )
            if references == "allow" and guessed and not self._guess_raw:
                references = "deny"
            target = decide(references, Reference(named.kind, named.name, None, node.filename, len(above) + 1))
            spec, path = spec_of(target)
            data = self._build_data_file(spec, path, node, inherited)
        _refuse_own_file(node, data)
        with graph.Transaction() as change:
            change.attach(node, "data-file", data)

    def _build_data_file(
        self, spec: dict[str, Any], path: str | os.PathLike[str] | None, node: Node, inherited: Mapping[str, Any]
    ) -> Node:
        """Its bytes as they are: what they look like says nothing, since a guest may have written them."""
        spec.setdefault("driver", "file")
        try:
            return self.build(spec, path, read_only=node.read_only, inherited=inherited, references="deny")
        except BlocklibError as exc:
            exc.add_note(f"while opening the data file of {node.filename}")
            raise

    def _open_backing(
        self,
        node: Node,
        options: dict[str, Any],
        inherited: Mapping[str, Any],
        above: tuple[Node, ...],
        references: References,
        *,
        guessed: bool,
    ) -> None:
        above = (*above, node)
        if "backing" in options:
            below = options["backing"]
            if below is None:
                return
            if isinstance(below, Disk):
                backing = below.node
            elif (named := _named_backing(node, below)) is not None:
                backing = self._open_reference(named, references, inherited, above, below)
            else:
                spec, path = spec_of(below)
                backing = self.build(spec, path, read_only=True, inherited=inherited, above=above, references=references)
        else:
            named = next((item for item in node.references() if item.kind == "backing"), None)
            if named is None:
                return
            if references == "allow" and guessed and not self._guess_raw:
                references = "deny"
            backing = self._open_reference(named, references, inherited, above)
        with graph.Transaction() as change:
            change.attach(node, "backing", backing)

    def _open_reference(
        self,
        named: NamedReference,
        references: References,
        inherited: Mapping[str, Any],
        above: tuple[Node, ...],
        extra: Mapping[str, Any] | None = None,
    ) -> Node:
        """Open the file that the last image `above` names, if the policy lets us, with `extra` options."""
        referrer = above[-1].filename
        self._limits.check("chain_depth", len(above), structure="backing chain", node=referrer)
        _refuse_loop(above)
        target = decide(references, Reference(named.kind, named.name, named.format, referrer, len(above)))
        spec, path = spec_of(target)
        merge_options(spec, extra or {})
        if "driver" not in spec and named.format is not None:
            if named.format not in _FORMATS_OF_FILES:
                raise UnsupportedFeatureError(
                    f"{referrer}: the backing file {named.name!r} has the unknown format {named.format!r}",
                    features=(named.format,),
                    node=referrer,
                )
            spec["driver"] = named.format
        try:
            return self.build(
                spec, path, read_only=True, inherited=inherited, above=above, references=self._references
            )
        except BlocklibError as exc:
            exc.add_note(f"while opening the backing file of {referrer}")
            raise


def _refuse_own_file(node: Node, data: Node) -> None:
    """Raises ImageCorruptError where an image's data file is the image itself: guest data would destroy its tables."""
    if node.filename is None or data.filename is None:
        return
    try:
        if not os.path.samefile(node.filename, data.filename):
            return
    except OSError:
        return  # opened some other way; locks still hold
    raise ImageCorruptError(
        f"{node.filename}: the image names itself as its data file",
        structure="external data file name",
        expected="another file",
        found=data.filename,
        node=node.filename,
    )


def _named_backing(node: Node, options: Any) -> NamedReference | None:
    """The backing file that `node` names, where `options` say something of it but not which file it is; else None."""
    if not isinstance(options, Mapping) or not {"file", "filename"}.isdisjoint(nest(options)):
        return None
    if options.get("driver") not in (None, *drivers.FORMATS):
        return None
    return next((item for item in node.references() if item.kind == "backing"), None)


def _refuse_loop(above: tuple[Node, ...]) -> None:
    """A chain that comes back to a file would never end.  Called before the last image's backing file is opened."""
    filename = above[-1].filename
    if filename is None:
        return
    for node in above[:-1]:
        try:
            if node.filename is None or not os.path.samefile(node.filename, filename):
                continue
        except OSError:
            continue  # opened some other way; the depth limit still holds
        raise ImageCorruptError(
            f"{filename}: the backing chain comes back to this file",
            structure="backing file name",
            expected="a chain without a loop",
            found=filename,
            node=filename,
        )


def _make(driver: str, typed: Mapping[str, Any], *, read_only: bool, **extra: Any) -> Node:
    node: Node = drivers.load(driver).from_options(typed, read_only=read_only, **extra)
    return node


def dig(options: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted option among nested ones, or None."""
    place: Any = options
    for part in name.split("."):
        if not isinstance(place, Mapping) or part not in place:
            return None
        place = place[part]
    return place
