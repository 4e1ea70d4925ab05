"""What commands share: opening images as qemu-img does, values of options, running jobs, and errors as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from blocklib.cli.getopt import Given, Option, UsageFailure
from blocklib.cli.output import print_error
from blocklib.cli.session import Failure, Session
from blocklib.errors import BlocklibError, UsageError
from blocklib.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from blocklib.cli.progress import Reporter
    from blocklib.disk import Disk
    from blocklib.jobs import Job
    from blocklib.options import CacheMode, OptionValue
    from blocklib.policy import Target

R = TypeVar("R")

CACHE_MODES: tuple[CacheMode, ...] = ("none", "writeback", "writethrough", "directsync", "unsafe")
SECRET_OPTIONS = ("encrypt.key-secret", "encrypt.new-secret", "encrypt.old-secret")
"""Options whose values are ids of --object secrets."""
_POLL = 0.1
"""Seconds between two looks at the progress of a job; its end is seen at once."""

FORMAT = Option(("-f", "--format"), "FMT", "format of the image; without it, guessed from the first bytes")
IMAGE_OPTS = Option(("--image-opts",), None, "file names are options (driver=...,file.filename=...), not names")
OBJECT = Option(("--object",), "OBJECTDEF", "define an object that options name, such as secret,id=ID,data=TEXT")
FORCE_SHARE = Option(("-U", "--force-share"), None, "read even if another program is writing the image")
OUTPUT = Option(("--output",), "human|json", "print for people (default) or as JSON")
SOURCE_CACHE = Option(("-T",), "CACHE", f"cache mode for images that are read: {', '.join(CACHE_MODES)}")
TARGET_CACHE = Option(("-t",), "CACHE", f"cache mode for the image that is written: {', '.join(CACHE_MODES)}")
QUIET = Option(("-q",), None, "print nothing but errors")


# -- values of options ------------------------------------------------------------------------------------------------


def one_operand(given: Given) -> str:
    """The one file name of a command that takes one."""
    if len(given.operands) != 1:
        raise UsageFailure("expects one file name")
    return given.operands[0]


def wants_json(given: Given) -> bool:
    """Which of the two outputs is asked for."""
    kind = given.last("--output") or "human"
    if kind not in ("human", "json"):
        raise Failure(f"--output takes 'human' or 'json', not '{kind}'")
    return kind == "json"


def size_value(text: str, what: str) -> int:
    """A size in bytes, with qemu-img's suffixes."""
    try:
        return parse_size(text)
    except UsageError as exc:
        raise Failure(f"{what}: {exc}") from exc


def cache_mode(given: Given, option: str, default: CacheMode, *, code: int = 1) -> CacheMode:
    """The cache mode that `option` names; `off` is an old name of `none`.  An unknown one fails with exit `code`."""
    text = given.last(option)
    if text is None:
        return default
    for mode in CACHE_MODES:
        if text == mode or (text == "off" and mode == "none"):
            return mode
    raise Failure(f"{option} {text}: no such cache mode; there are {', '.join(CACHE_MODES)}", code=code)


def check_objects(given: Given) -> None:
    """Make what --object defines, for what opens and creates images later.  Raises Failure."""
    if given.has("--object"):
        from blocklib.cli.objects import divided, objects_of

        given.secrets, given.authorizers = divided(objects_of(given.all("--object")))


def with_secrets(given: Given, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """`options` of one image, with the secrets themselves in place of the ids that name them.  Raises OptionError."""
    found = dict(options)
    for name in SECRET_OPTIONS:
        value = found.get(name)
        if isinstance(value, str):
            from blocklib.crypto.secrets import find_secret

            found[name] = find_secret(given.secrets, value, name)
    return found


# -- opening images ---------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """An image as the command line names it."""

    text: str
    format: str | None
    is_options: bool
    """`text` is driver=...,file.filename=..., not a file name."""


def name_of(given: Given, text: str, format_option: str = "-f", *, code: int = 1) -> Name:
    """`text` with what the command line says about all its images.  A contradiction ends the command with `code`."""
    stated = given.last(format_option)
    if given.has("--image-opts") and stated is not None:
        raise Failure(f"--image-opts and {format_option} exclude each other: the options say the driver", code=code)
    return Name(text, stated, given.has("--image-opts"))


def target_of(name: Name, *, untrusted: bool = False) -> Target:
    """What `blocklib.open` is to open for `name`.  Raises OptionError, UsageError.

    A name is read as qemu-img reads it, ``json:{...}`` and ``file:`` included; with `untrusted` as the library does.
    """
    from blocklib.options import parse_options
    from blocklib.policy import qemu_target

    if name.is_options:
        return parse_options(name.text)
    if not name.text:
        raise Failure("a file name is empty")
    return name.text if untrusted else qemu_target(name.text)


def open_image(
    session: Session,
    given: Given,
    name: Name,
    *,
    write: bool = False,
    cache: CacheMode = "writeback",
    discard: Literal["ignore", "unmap"] = "ignore",
    share: bool = True,
    alone: bool = False,
    snapshot: Mapping[str, str] | None = None,
    with_data_file: bool = True,
    locked: bool = False,
    aio: str = "threads",
) -> Disk:
    """Open an image with its chain as qemu-img does; with --untrusted as the library does, which opens no reference.

    Without `share`, -U is for other images of the command line.  `alone`: without what is below it.  `snapshot`: options
    that name the snapshot to be read.  Without `with_data_file`, only metadata is going to be touched.  `locked`: no data
    will be read, so that no secret is needed.  `aio`: how the files of the chain keep requests in flight.
    """
    from blocklib.building import FROM_IMAGE
    from blocklib.opening import open_disk

    untrusted = given.has("--untrusted")
    return open_disk(
        target_of(name, untrusted=untrusted),
        "r+" if write else "r",
        format=name.format,
        references="deny" if untrusted else "allow",
        guess_raw=not untrusted,
        cache=cache,
        discard=discard,
        force_share=share and given.has("-U"),
        backing=None if alone else FROM_IMAGE,
        data_file=FROM_IMAGE if with_data_file else None,
        options=snapshot,
        secrets=given.secrets,
        locked=locked,
        aio=aio,
    )


def open_snapshot(session: Session, given: Given, name: Name, *, cache: CacheMode = "writeback") -> Disk:
    """Open the snapshot that -l names, to be read, or the image itself where there is no -l.

    Its text is ``snapshot.id=ID,snapshot.name=NAME``, either or both, or else an ID, or else a name.
    """
    from blocklib.errors import NameNotFoundError
    from blocklib.options import parse_options

    text = given.last("-l")
    if text is None:
        return open_image(session, given, name, cache=cache)
    if text.startswith("snapshot."):
        parsed = parse_options(text)
        parts = parsed.pop("snapshot")
        options = {f"snapshot.{key}": value for key, value in parts.items()} if isinstance(parts, Mapping) else {}
        strings = {key: value for key, value in options.items() if isinstance(value, str)}
        if parsed or strings != options or not strings.keys() <= {"snapshot.id", "snapshot.name"}:
            raise Failure(f"-l {text}: what says which snapshot is snapshot.id, snapshot.name, or both")
        return open_image(session, given, name, cache=cache, snapshot=strings)
    try:
        return open_image(session, given, name, cache=cache, snapshot={"snapshot.id": text})
    except NameNotFoundError:
        return open_image(session, given, name, cache=cache, snapshot={"snapshot.name": text})


def warn_of_guess(session: Session, filename: str) -> None:
    """Say what follows from a format that was guessed, for an image that is written."""
    print_error(
        session.program,
        f"warning: {filename} was taken for a raw image, so writes that would make it look like another format fail"
        " (-f raw says that it is raw)",
    )


# -- jobs and errors --------------------------------------------------------------------------------------------------


def run_job(session: Session, start: Callable[[], Job[R]], report: Reporter) -> R:
    """The result of the job that `start` starts, shown by `report` while it runs, cancelled when the user interrupts."""
    with start() as job, session.cancelling(job.cancel):
        while True:
            try:
                result = job.wait(timeout=_POLL)
            except TimeoutError:
                if job.status != "concluded":
                    report(job.progress)
                    continue
                result = job.wait()
            report.show(job.progress)
            return result


def explain(exc: BlocklibError) -> str:
    """`exc` in one line that names the image concerned."""
    node = exc.node
    text = str(exc)
    if node and not node.startswith("#") and node not in text:
        text = f"{node}: {text}"
    return "; ".join([text, *getattr(exc, "__notes__", ())])
