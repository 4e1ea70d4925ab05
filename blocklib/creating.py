"""Making images: `blocklib.create`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from blocklib import drivers, graph
from blocklib.building import FROM_IMAGE, spec_of
from blocklib.errors import (
    BlocklibError,
    ImageExistsError,
    OptionError,
    StorageError,
    UsageError,
)
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Node
from blocklib.opening import image_info, open_disk, open_metadata
from blocklib.options import OptionValue, check_options, nest
from blocklib.policy import PlainPath, Target, has_protocol, resolve_backing_name
from blocklib.reports import ImageInfo

_SIZE_UNIT = 512


def create(
    target: Target,
    size: int | None = None,
    *,
    format: str,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    overwrite: bool = False,
    options: Mapping[str, OptionValue] | None = None,
) -> ImageInfo:
    """Create an image of `size` bytes (rounded up to 512) and return its metadata; nothing stays open or locked.

    `backing` is stored as given, relative to the image's folder; without `size` the new disk is as large as it.
    `options` are the format's creation options in QEMU's names.  A file that exists is replaced only with `overwrite`; a
    block device, or the export that an NBD URL names, is written into.  A data file is made beside the image, where the
    image will look for it, under the same rule; what it held is gone.

    Raises ImageExistsError, OptionError, UsageError, LockedError, StorageError; a file that this call made is removed.
    """
    made: list[str] = []
    try:
        return make_image(
            made,
            target,
            size,
            format=format,
            backing=backing,
            backing_format=backing_format,
            overwrite=overwrite,
            options=options,
        )
    except BaseException:
        remove(made)
        raise


def remove(made: list[str]) -> None:
    """Remove what `make_image` made, the last first."""
    while made:
        os.unlink(made.pop())


def make_image(
    made: list[str],
    target: Target,
    size: int | None,
    *,
    format: str,
    backing: str | os.PathLike[str] | None,
    backing_format: str | None,
    overwrite: bool,
    options: Mapping[str, OptionValue] | None,
) -> ImageInfo:
    """What `create` does; the paths of files that it makes, for who removes them, are added to `made` at once."""
    path = _path_of(target, format)
    typed = _creation_options(format, options or {}, size, backing, backing_format)
    if typed["size"] is None:
        if typed.get("backing_file") is None:
            raise UsageError("a new image needs a size, or a backing file to take it from")
        typed["size"] = _backing_size(path, typed["backing_file"], typed["backing_fmt"])
    drivers.load(format).image_maker(typed)  # refuses what makes no sense before any file is touched
    data_path = typed.get("data_file") and _data_path(path, typed["data_file"])
    if data_path is not None:
        _refuse_data_path(path, data_path, typed.get("backing_file"))
        if _claim(data_path, overwrite=overwrite):
            made.append(data_path)
    if _claim(path, overwrite=overwrite):
        made.append(path)
    _fill(path, format, typed, data_path, empty_first=path not in made)
    return image_info(_target_at(path), format=format)


def _target_at(path: str) -> Target:
    """What `open` takes for the place of a new image."""
    return path if drivers.protocol_of_url(path) is not None else PlainPath(path)


def _path_of(target: Target, format: str) -> str:
    """The path, or URL, of what is to be created; options may say no more than that, and the format again."""
    spec, path = spec_of(target)
    if path is not None:
        return os.fspath(path)
    driver = spec.pop("driver", format)
    below = spec.pop("file", None)
    if below is None:
        if driver in drivers.PROTOCOLS:
            spec["driver"], driver = driver, format
        below, spec = spec, {}
    inner = {"filename": below} if isinstance(below, str) else dict(below) if isinstance(below, Mapping) else {}
    filename = inner.pop("filename", None)
    if driver != format:
        raise OptionError(f"the format is given twice: as {driver!r} and as {format!r}", option="driver")
    if not isinstance(filename, (str, os.PathLike)) or inner.pop("driver", "file") not in ("file", "host_device"):
        raise UsageError("only a file can be created: give a path")
    for name in (*spec, *inner):
        raise OptionError(f"the option {name!r} of a target says nothing of a file that is created", option=name)
    return os.fspath(filename)


def _creation_options(
    format: str,
    options: Mapping[str, OptionValue],
    size: int | None,
    backing: str | os.PathLike[str] | None,
    backing_format: str | None,
) -> dict[str, Any]:
    if format not in drivers.FORMATS:
        raise OptionError(
            f"unknown format {format!r}; there are {', '.join(drivers.FORMATS)}", option="format", choices=drivers.FORMATS
        )
    given = dict(options)
    keywords = {"size": size, "backing_file": os.fspath(backing) if backing is not None else None}
    keywords["backing_fmt"] = backing_format
    for name, value in keywords.items():
        if value is None:
            continue
        if given.get(name) is not None:
            raise OptionError(f"{name} is given twice", option=name, driver=format)
        given[name] = value
    if format == "raw" and given.get("backing_file") is not None:
        raise OptionError("a raw image has no backing file", option="backing_file", driver="raw")
    typed = check_options(format, given, table="create")
    if typed["size"] is not None and typed["size"] < 0:
        raise UsageError(f"a size of {typed['size']} bytes")
    if typed.get("backing_file") is not None and typed.get("backing_fmt") is None:
        raise UsageError("a backing file needs backing_format: guessing it is how a guest names a host file")
    if typed.get("backing_fmt") is not None:
        if typed.get("backing_file") is None:
            raise UsageError("backing_format without a backing file")
        drivers.check_name(typed["backing_fmt"])
    return typed


def _backing_size(path: str, name: str, format: str) -> int:
    full_name = resolve_backing_name(path, name)
    with open_metadata(PlainPath(full_name), format=format) as disk:
        return disk.size


def _data_path(path: str, name: str) -> str:
    """Where the image at `path` looks for a data file of that name.  Raises UsageError for what is no path."""
    if has_protocol(name):
        raise UsageError(f"{name!r}: a data file can be made only as a file; a file of that name is './{name}'")
    return resolve_backing_name(path, name)


def _refuse_data_path(path: str, data_path: str, backing: str | None) -> None:
    """Raises UsageError for a data file that is the new image, or its backing file."""
    if _is_same(path, data_path):
        raise UsageError(f"{data_path}: an image cannot be its own data file")
    if backing is not None and _is_same(resolve_backing_name(path, backing), data_path):
        raise UsageError(f"{data_path}: a file cannot be backing file and data file of one image")


def _empty_data_file(data_path: str, typed: Mapping[str, Any]) -> None:
    size = typed["size"]
    with _OpenFile(data_path) as root:
        if not root.edge.node.is_device:
            root.edge.truncate(0)
            _hint(root.edge.node, typed)
        elif root.edge.size < size:
            raise UsageError(f"{data_path}: the device has {root.edge.size} bytes, the disk {size}")
        root.edge.truncate(-(-size // _SIZE_UNIT) * _SIZE_UNIT)
        root.edge.flush()


def _is_same(path: str, other: str) -> bool:
    """Whether two paths mean one file, whether or not it is there yet."""
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def _claim(path: str, *, overwrite: bool) -> bool:
    """Make the file if there is none; True if this call made it.  Raises ImageExistsError, StorageError."""
    if drivers.protocol_of_url(path) is not None:
        return False
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError as exc:
        import stat

        if overwrite or stat.S_ISBLK(os.stat(path).st_mode):
            return False
        raise ImageExistsError.wrap(exc, "create", filename=path) from exc
    except (OSError, ValueError) as exc:
        if isinstance(exc, ValueError):
            raise UsageError(f"{path!r} is no file name: {exc}") from exc
        raise StorageError.wrap(exc, "create", filename=path) from exc
    return True


def _fill(path: str, format: str, typed: Mapping[str, Any], data_path: str | None, *, empty_first: bool) -> None:
    make = drivers.load(format).image_maker(typed)
    with _OpenFile(path) as root:
        if data_path is not None:  # both are ours by now: an image that is in use costs the data file nothing
            _empty_data_file(data_path, typed)
        if empty_first and not root.edge.node.is_device:
            root.edge.truncate(0)
        if not root.edge.node.is_device:
            _hint(root.edge.node, typed)
        make(root.edge)
    mode = typed["preallocation"]
    if mode == "off" and typed.get("data_file_raw"):
        mode = "metadata"  # what is not mapped would not be part of the data file
    if mode != "off" and format != "raw":
        data_file = FROM_IMAGE if data_path is None else {"driver": "file", "filename": data_path}
        secret = opening_options(typed)
        with open_disk(_target_at(path), "r+", format=format, backing=None, data_file=data_file, options=secret) as disk:
            disk.node.preallocate(mode)


def _hint(file: Node, typed: Mapping[str, Any]) -> None:
    file.take_hints(in_place=typed["nocow"], extent_size=typed["extent_size_hint"] or 0)


def opening_options(options: Mapping[str, Any]) -> dict[str, OptionValue]:
    """What opening an image takes that was made with creation `options`: its secret, if it has one."""
    secret = nest(options).get("encrypt", {}).get("key-secret")
    return {} if secret is None else {"encrypt.key-secret": secret}


class _OpenFile:
    """A plain file, or an export, as an edge of our own while the block lasts.

    Nobody else may even read it, since it is emptied first.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> _OpenFile:
        driver = drivers.protocol_of_url(self._path) or "file"
        options = check_options(driver, {"filename": self._path})
        node: Node = drivers.load(driver).from_options(options, read_only=False)
        node.load()
        wanted = CONSISTENT_READ | WRITE | RESIZE
        try:
            with graph.Transaction() as change:
                self.edge = change.attach(None, "create", node, wanted=wanted, shared=0)
        except BlocklibError:
            graph.close_tree(node, abandon=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with graph.Transaction() as change:
            change.detach(self.edge)

