"""What an image may make us open, and what it may make us spend.

An image can name other files (its backing file, its data file).  Names that the caller gives are trusted, these are
not: a `Reference` is put to a policy, and what the policy answers is opened, or nothing.  `decide` is the one place
where that happens.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from blocklib.drivers import protocol_of_url
from blocklib.errors import (
    ImageCorruptError,
    ImageLimitError,
    ImageNotFoundError,
    PolicyError,
    StorageError,
    UsageError,
)
from blocklib.options import OptionValue, parse_options
from blocklib.records import Record
from blocklib.sizes import MAX_SIZE, MiB

Target: TypeAlias = "str | os.PathLike[str] | Mapping[str, OptionValue]"
"""What can be opened: a path or NBD URL, a path and nothing else, or driver options."""
ReferencePolicy: TypeAlias = "Callable[[Reference], Target | None]"
"""Answers what to open for a reference; None refuses it."""
References: TypeAlias = "Literal['deny', 'allow'] | ReferencePolicy"


class Limits(Record):
    """What one image may cost, checked before anything is allocated for it; defaults are QEMU's where it has any."""

    l1_bytes: int = 32 * MiB
    refcount_table_bytes: int = 8 * MiB
    header_extensions: int = 1024
    """The format allows any number; five kinds are known."""
    snapshots: int = 65536
    bitmaps: int = 8192
    """QEMU allows 65535, each of which is looked at, and written anew when the disk gets another size."""
    bitmap_bytes: int = 1 << 30
    """How long the stored bitmaps of one image may be in memory, together."""
    marked_bytes: int = 64 * MiB
    """What of them is not zero may take; or as much as the image's file, where that is longer."""
    chain_depth: int = 200
    """Images below the top one."""
    virtual_size: int = MAX_SIZE
    cluster_size: int = 2 * MiB
    decompressed_bytes: int = 2 * MiB
    """What one compressed piece may become: a cluster."""
    key_iterations: int = 1 << 27
    """Iterations of PBKDF2 that opening an encrypted image may take in all: some minutes at the most."""

    def check(self, limit: str, value: int, *, structure: str, host_offset: int | None = None, node: str | None = None) -> None:
        """Raises ImageLimitError when `value`, which `structure` asks for, is above the limit of that name."""
        allowed: int = getattr(self, limit)
        if value <= allowed:
            return
        where = f"{node}: " if node else ""
        raise ImageLimitError(
            f"{where}{structure}: {value} is more than the limit {limit}={allowed}",
            structure=structure,
            host_offset=host_offset,
            expected=f"at most {allowed}",
            found=str(value),
            node=node,
        )


class Reference(Record):
    """A file that an image names."""

    kind: str
    """"backing" or "data-file"."""
    name: str
    """As the image spells it."""
    format: str | None
    """The format that the image gives with the name, if any."""
    referrer: str | None
    """The path of the image that holds the name, or None where that is not a file."""
    depth: int
    """1 for what the top image names, 2 for what that one names."""


# -- names -------------------------------------------------------------------------------------------------------------


class PlainPath(Record):
    """A path and nothing else, whatever it looks like: `pathlib.Path` without its price at start-up."""

    path: str

    def __fspath__(self) -> str:
        return self.path


def has_protocol(name: str) -> bool:
    """Whether QEMU reads `name` as `protocol:rest` (a colon before the first slash) and not as a path."""
    return ":" in name.partition("/")[0]


def resolve_backing_name(referrer_filename: str, name: str) -> str:
    """The full name of what an image names, as QEMU computes it and ``qemu-img info`` prints it.

    Relative to the folder of the referrer unless it is absolute or has a protocol (`json:` too); nothing is normalised.
    """
    if name.startswith("/") or has_protocol(name):
        return name
    folder, slash, _ = referrer_filename.rpartition("/")
    return folder + slash + name


def qemu_target(name: str) -> Target:
    """What QEMU opens for a file name: `json:` is options, `nbd://` a URL, `file:` or no protocol a path.

    For names that are trusted (the command line's, and an image's with ``references="allow"``).  Raises OptionError
    for bad `json:`, UsageError for another protocol.
    """
    if not has_protocol(name):
        return PlainPath(name)
    protocol, _, rest = name.partition(":")
    if protocol == "json":
        return parse_options(name)
    if protocol == "file":
        return PlainPath(rest)
    if protocol_of_url(name) is not None:
        return name
    if protocol == "nbd":
        from blocklib.nbd.uri import from_legacy

        return from_legacy(name)
    raise UsageError(f"{name!r}: unknown protocol {protocol!r}; a file of that name is './{name}'")


# -- restricted policies -----------------------------------------------------------------------------------------------


class RestrictedFile(Record):
    """A file that a restricted policy found: `name`, one component, in `directory` ("" is the current one).

    It is a path, for messages and for the references of the image in it, but may be opened only by `open_fd`, which
    follows no link at `name` and accepts only a regular file.  `directory` comes from the caller's own names, so
    links in it are followed.
    """

    directory: str
    name: str
    reference: Reference

    def __fspath__(self) -> str:
        return os.path.join(self.directory, self.name)

    def open_fd(self, flags: int) -> int:
        """A close-on-exec descriptor, opened with `flags` (O_RDWR, O_DIRECT, ...); never creates nor truncates.

        What was opened is checked, not what was there a moment before.  Raises PolicyError for anything but a regular
        file, ImageNotFoundError, StorageError.
        """
        path = os.fspath(self)
        if os.open not in os.supports_dir_fd:
            text = f"{path}: this system cannot open a file without following links"
            raise StorageError(text, errno=errno.ENOTSUP, operation="open", filename=path)
        flags &= ~(os.O_CREAT | os.O_TRUNC)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = -1
        try:
            folder = os.open(self.directory or ".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # Opening a device can do something by itself: what is plainly no file is not even tried.
                mode = os.stat(self.name, dir_fd=folder, follow_symlinks=False).st_mode
                if stat.S_ISREG(mode):
                    fd = os.open(self.name, flags, dir_fd=folder)
                    mode = os.fstat(fd).st_mode
            finally:
                os.close(folder)
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            if exc.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # it became one between the two calls
                raise _refusal(self.reference, "it is not a regular file", [_ALLOW]) from exc
            kind = ImageNotFoundError if exc.errno == errno.ENOENT else StorageError
            raise kind.wrap(exc, "open", filename=path) from exc
        if not stat.S_ISREG(mode):
            if fd >= 0:
                os.close(fd)
            what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            raise _refusal(self.reference, f"it is {what}", [_ALLOW])
        return fd


class SameDirectory(Record):
    """Allows regular files in the folder of the image that names them, `max_depth` images deep.

    A name is taken literally: one component, perhaps after ``./`` or after the folder's own absolute path.  Refused
    are ``..``, other folders, links, whatever QEMU would not read as a path (`json:`, URLs), and a backing file
    without a format, which would have to be guessed from bytes that a guest can write.
    """

    max_depth: int = 8

    def __call__(self, reference: Reference) -> RestrictedFile | None:
        return None if self.objection(reference) else _beside(reference)

    def objection(self, reference: Reference) -> str | None:
        """Why this reference is refused, or None."""
        if reference.depth > self.max_depth:
            return f"it is {reference.depth} images deep and max_depth is {self.max_depth}"
        return _objection_to_name(reference) or (None if _beside(reference) else "it is not in the folder of the image")


def _beside(reference: Reference) -> RestrictedFile | None:
    """The file in the referrer's folder that the reference names, if its name is of that shape."""
    assert reference.referrer is not None
    folder = os.path.dirname(reference.referrer)
    directory, _, leaf = reference.name.rpartition("/")
    parts = _components(directory)
    if leaf in ("", ".", "..") or ".." in parts:
        return None
    is_same = _components(_absolute(folder)) == parts if reference.name.startswith("/") else not parts
    return RestrictedFile(folder, leaf, reference) if is_same else None


class AllowList(Record):
    """Allows the regular files that are listed, however deep in the chain.

    An absolute entry is that file; a relative one is looked for from the folder of the image that names it.  An
    image's name matches when it means the same path; names are taken literally, and ``..`` in one matches only ``..``
    in the entry.  Links in the folders of an entry are followed, a link as the file itself is refused.  A backing
    file without a format is refused.
    """

    names: tuple[str, ...]

    def __init__(self, names: Iterable[str | os.PathLike[str]]) -> None:
        if isinstance(names, (str, bytes, os.PathLike)):
            raise UsageError(f"an allow-list is a list of names: [{names!r}]")
        listed = tuple(os.fspath(name) for name in names)
        for name in listed:
            if not name or "\0" in name or name.endswith("/"):
                raise UsageError(f"{name!r} in an allow-list is not the name of a file")
        super().__init__(listed)

    def __call__(self, reference: Reference) -> RestrictedFile | None:
        return None if self.objection(reference) else self._entry(reference)

    def objection(self, reference: Reference) -> str | None:
        """Why this reference is refused, or None."""
        return _objection_to_name(reference) or (None if self._entry(reference) else "it is not in the list")

    def _entry(self, reference: Reference) -> RestrictedFile | None:
        assert reference.referrer is not None
        folder = os.path.dirname(reference.referrer)
        wanted = _components(_absolute(os.path.join(folder, reference.name)))
        for entry in self.names:
            path = os.path.join(folder, entry)
            if _components(_absolute(path)) == wanted:
                return RestrictedFile(*os.path.split(path), reference)
        return None


def _objection_to_name(reference: Reference) -> str | None:
    """What every restricted policy refuses, whichever files it allows."""
    if reference.referrer is None:
        return "the image that names it is not a file"
    if has_protocol(reference.name):
        return "it is not a plain file name"
    if not reference.name or "\0" in reference.name:
        return "it is not a file name"
    if reference.kind == "backing" and reference.format is None:
        return "the image does not say its format"
    return None


def _components(path: str) -> list[str]:
    """The parts of a path that say something; ".." does, because what it means depends on links."""
    return [part for part in path.split("/") if part not in ("", ".")]


def _absolute(path: str) -> str:
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError as exc:
        raise StorageError.wrap(exc, "getcwd") from exc


# -- the decision ------------------------------------------------------------------------------------------------------

_ALLOW = 'references="allow"'
_OVERRIDES = {
    "backing": 'backing={"driver": ..., "file.filename": ...}',
    "data-file": 'data_file={"driver": "file", "filename": ...}',
}
_KIND_SHOWN = {"backing": "backing file", "data-file": "data file"}


def check_references(references: References) -> None:
    """Raises UsageError for what is neither "deny" nor "allow" nor a policy."""
    if not callable(references) and references not in ("deny", "allow"):
        raise UsageError(f'references is "deny", "allow" or a policy, not {references!r}')


def decide(references: References, reference: Reference) -> Target:
    """What to open for `reference`.

    Raises PolicyError, whose text ends in what would allow it, ImageCorruptError for a name that makes no sense, and
    UsageError for `references` that are no policy; what a policy function raises goes up as it is.
    """
    if isinstance(references, str):
        if references == "allow":
            return _allowed(reference)
        if references == "deny":
            raise _refusal(reference, "references are denied", _suggestions(reference))
    check_references(references)
    assert callable(references)
    target = references(reference)
    if target is not None:
        return target
    if not isinstance(references, (SameDirectory, AllowList)):
        raise _refusal(reference, "the policy refuses it", [_ALLOW])
    policy = type(references).__name__
    hints = [hint for hint in _suggestions(reference) if policy not in hint]
    raise _refusal(reference, f"{policy} refuses it: {references.objection(reference)}", hints)


def _allowed(reference: Reference) -> Target:
    name = reference.name
    if has_protocol(name):
        try:
            return qemu_target(name)
        except UsageError as exc:
            raise _bad_name(reference, "a path, json: or the URL of a protocol we know", str(exc)) from exc
    if reference.referrer is not None:
        return PlainPath(resolve_backing_name(reference.referrer, name))
    if not name.startswith("/"):
        raise _bad_name(reference, "an absolute path: the image that names it is in no folder", repr(name))
    return PlainPath(name)


def _bad_name(reference: Reference, expected: str, found: str) -> ImageCorruptError:
    structure = f"{_KIND_SHOWN.get(reference.kind, reference.kind)} name"
    where = f"{reference.referrer}: " if reference.referrer else ""
    text = f"{where}{structure}: expected {expected}, found {found}"
    return ImageCorruptError(text, structure=structure, expected=expected, found=found, node=reference.referrer)


def _suggestions(reference: Reference) -> list[str]:
    """The arguments that would allow it, the narrowest first."""
    if SameDirectory().objection(reference) is None:
        return ["references=blocklib.policy.SameDirectory()", _ALLOW]
    if _objection_to_name(reference) is None:
        return [f"references=blocklib.policy.AllowList([{reference.name!r}])", _ALLOW]
    override = _OVERRIDES.get(reference.kind)
    return [override, _ALLOW] if override else [_ALLOW]


def _refusal(reference: Reference, reason: str, arguments: Sequence[str]) -> PolicyError:
    kind = _KIND_SHOWN.get(reference.kind, reference.kind)
    where = f"{reference.referrer}: " if reference.referrer else ""
    text = f"{where}the image names the {kind} {reference.name!r}; {reason}; to open it, pass {' or '.join(arguments)}"
    return PolicyError(text, reference=reference, node=reference.referrer)
