"""What the commands of ``io`` work on: the disk that is open, and the answers that are still to be shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from blocklib.cli.common import cache_mode, warn_of_guess
from blocklib.cli.getopt import Given, Option
from blocklib.cli.output import print_error
from blocklib.cli.session import Failure, Session
from blocklib.errors import BlocklibError

if TYPE_CHECKING:
    from ssl import SSLContext

    from blocklib.crypto.secrets import Secret
    from blocklib.disk import Disk
    from blocklib.options import CacheMode, OptionValue
    from blocklib.policy import Target
    from blocklib.throttling import ThrottleGroup

READ_ONLY = Option(("-r", "--read-only"), None, "open for reading only")
SNAPSHOT = Option(("-s", "--snapshot"), None, "keep what is written in a temporary overlay, which is lost at the end")
NO_CACHE = Option(("-n", "--nocache"), None, "bypass the host's page cache: short for -t none")
COPY_ON_READ = Option(("-C", "--copy-on-read"), None, "copy what is read from below into the image")
NATIVE_AIO = Option(("-k", "--native-aio"), None, "short for -i native")
AIO = Option(("-i", "--aio"), "MODE", "how requests made together are kept in flight: threads (default), native, io_uring")
CACHE = Option(("-t", "--cache"), "MODE", "none, writeback, writethrough (default), directsync or unsafe")
DISCARD = Option(("-d", "--discard"), "MODE", "what becomes of discards: ignore, or unmap (default)")

OPENING = (READ_ONLY, SNAPSHOT, NO_CACHE, COPY_ON_READ, NATIVE_AIO, AIO, CACHE, DISCARD)
"""What the program and its command ``open`` both accept."""

_AIO_MODES = ("threads", "native", "io_uring")
_DISCARD_MODES: Mapping[str, Literal["ignore", "unmap"]] = {
    "ignore": "ignore",
    "off": "ignore",
    "unmap": "unmap",
    "on": "unmap",
}


class Opening(NamedTuple):
    """How a disk is opened, kept to open it again in another way."""

    target: Target
    format: str | None
    options: Mapping[str, OptionValue]
    write: bool
    cache: CacheMode
    discard: Literal["ignore", "unmap"]
    force_share: bool
    snapshot: bool
    aio: str
    copy_on_read: bool = False


def opening_of(given: Given, target: Target, image_format: str | None, options: Mapping[str, OptionValue]) -> Opening:
    """`target` opened as the flags in `given` say.  Raises Failure for values that there are not."""
    aio = "native" if given.has("-k") else given.last("-i") or "threads"
    if aio not in _AIO_MODES:
        raise Failure(f"-i {aio}: no such mode; there are {', '.join(_AIO_MODES)}")
    discard = given.last("-d") or "unmap"
    if discard not in _DISCARD_MODES:
        raise Failure(f"-d {discard}: no such mode; there are ignore and unmap")
    if given.has("-U") and not given.has("-r"):
        raise Failure("-U needs -r: what another program may be writing is only read")
    return Opening(
        target=target,
        format=image_format,
        options=options,
        write=not given.has("-r"),
        cache=cache_mode(given, "-t", "none" if given.has("-n") else "writethrough"),
        discard=_DISCARD_MODES[discard],
        force_share=given.has("-U"),
        snapshot=given.has("-s"),
        aio=aio,
        copy_on_read=given.has("-C"),
    )


class Shell:
    """The state between commands.  Leaving it as a context manager shows what is pending and closes the disk."""

    def __init__(
        self,
        session: Session,
        *,
        image_opts: bool,
        untrusted: bool,
        misaligned: bool,
        secrets: Mapping[str, Secret | SSLContext | ThrottleGroup] | None = None,
    ) -> None:
        self.session = session
        self._secrets = secrets
        self.image_opts = image_opts
        """The command ``open`` takes options for a file name."""
        self.untrusted = untrusted
        self.misaligned = misaligned
        self.disk: Disk | None = None
        self._base: Disk | None = None
        """What a temporary overlay stands on."""
        self.opening: Opening | None = None
        self.finished = False
        """The command ``quit`` was given."""
        self._late: list[str] = []
        self._deferring = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.settle()
        try:
            self.close()
        except BlocklibError as error:
            if exc is None:
                raise
            exc.add_note(str(error))

    # -- printing -----------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self._deferring:
            self._late.append(text)
        else:
            print(text)

    def complain(self, text: str) -> None:
        """One line on standard error."""
        print_error(self.session.program, text)

    @contextmanager
    def answering_later(self) -> Iterator[None]:
        """What is said in the block is shown by `settle`: the answers of asynchronous requests."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def settle(self) -> None:
        """Show the answers of asynchronous requests, in the order in which these were made."""
        for text in self._late:
            print(text)
        self._late.clear()

    # -- memory -------------------------------------------------------------------------------------------------------

    def buffer(self, length: int) -> memoryview:
        """`length` zero bytes to read into, at an odd address if the program was called with -m."""
        if self.misaligned:
            return memoryview(bytearray(length + 1))[1:]
        return memoryview(bytearray(length))

    # -- the disk -----------------------------------------------------------------------------------------------------

    def need_disk(self) -> Disk:
        if self.disk is None:
            raise Failure("no file is open ('help open' tells how to open one)")
        return self.disk

    def open(self, opening: Opening) -> None:
        """Open the disk.  Raises Failure when one is open already, and what opening raises."""
        if self.disk is not None:
            raise Failure("a file is open already ('close' closes it)")
        self.disk = self._with_overlay(opening) if opening.snapshot else self._open(opening, write=opening.write)
        self.opening = opening
        if opening.copy_on_read:
            try:
                self.disk.insert_filter("copy-on-read", {})
            except BlocklibError:
                self.close()
                raise

    def _open(self, opening: Opening, *, write: bool) -> Disk:
        from blocklib.opening import open_disk

        disk = open_disk(
            opening.target,
            "r+" if write else "r",
            format=opening.format,
            references="deny" if self.untrusted else "allow",
            guess_raw=not self.untrusted,
            cache=opening.cache,
            discard=opening.discard,
            force_share=opening.force_share,
            options=opening.options or None,
            secrets=self._secrets,
            aio=opening.aio,
        )
        if write and opening.format is None and not isinstance(opening.target, Mapping):
            top = disk.chain()[0]
            if top.driver == "raw":
                warn_of_guess(self.session, top.filename or top.name)
        return disk

    def _with_overlay(self, opening: Opening) -> Disk:
        """A temporary overlay on the disk."""
        from blocklib.cli.overlay import temporary_overlay

        base = self._open(opening, write=False)
        try:
            overlay = temporary_overlay(base, write=opening.write)
        except BaseException:
            base.close()
            raise
        self._base = base
        return overlay

    def reopen(self, opening: Opening) -> None:
        """Close the disk and open it again; if that fails, it is open as before and the error is raised."""
        before = self.opening
        self.close()
        try:
            self.open(opening)
        except BlocklibError:
            if before is not None:
                self.open(before)
            raise

    def close(self) -> None:
        """Close the disk, if one is open."""
        disk, base = self.disk, self._base
        self.disk = self._base = self.opening = None
        try:
            if disk is not None:
                disk.close()
        finally:
            if base is not None:
                base.close()
