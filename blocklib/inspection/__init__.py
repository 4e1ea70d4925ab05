"""What a service must know of a file before it touches it: `inspect`, and `Inspector` for a stream on its way elsewhere.

Nothing but the file is opened, no format need be said, and no content is an error: what is malformed is a failed check.
Memory is bounded whatever the file says: the head, the tail, and the few tables that the header points at, each up to a
limit.  A path and a stream, in chunks of any size, give the same answer, since both run the same examinations: see `account`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol, cast

from blocklib import probe
from blocklib.drivers import examiner
from blocklib.errors import ImageNotFoundError, OptionError, StorageError, UsageError
from blocklib.inspection.account import Account, Examination, Want
from blocklib.inspection.disks import SECTOR, examine_boot_sector, examine_luks_disk, size_of_raw
from blocklib.policy import Limits
from blocklib.reports import Check, Checks, Inspection
from blocklib.sizes import MAX_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from blocklib.buffers import AnyBuffer

_CHUNK: Final = 1 << 20
_ALIASES: Final = {"vpc": "vhd"}
EXPECTABLE: Final = ("raw", *probe.SIGNATURES)
"""What a file may be declared as; "vpc" is "vhd", too."""
_INSIDE: Final = {"raw": {"gpt"}, "iso": {"gpt"}, "vhd": {"gpt", "iso"}}
"""Expected format -> signatures of what the disk in it may hold, which then do not count as a second format."""
_DISKS: Final = ("raw", "iso", "gpt")
"""What is a disk as it stands: its virtual size is the length of the file."""
_WITHOUT_CHECKS: Final = ("raw", "iso", "vhd", "vhdx", "vdi")
_ORDER: Final = (
    "formats", "expected_format", "banned", "backing_file", "data_file", "unknown_features", "descriptor", "footer", "version",
    "mbr", "null", "header", "snapshots", "bitmaps", "encryption", "limits",
)  # fmt: skip


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes | bytearray | memoryview | None: ...


def inspect(
    source: str | os.PathLike[str] | Readable,
    *,
    expect: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Inspection:
    """What a service must know of a file before it does anything with it.

    `source` is a path, whatever it looks like, of a regular file or a block device; or a stream, which is read from where it
    is to its end, and need not be able to seek.  Nothing else is opened, and nothing is locked.  `expect` is the format that
    the file was declared to be, from `EXPECTABLE`: what it then proves to be is one check more.  Malformed content is a failed
    check, not an error.

    Raises ImageNotFoundError, StorageError (also for what is no file or block device), UsageError.
    """
    inspector = Inspector(expect=expect, limits=limits)
    if isinstance(source, (str, os.PathLike)):
        return inspector._inspect_file(os.fspath(source))
    if not hasattr(source, "read"):
        raise UsageError(f"a path or a stream is needed, not {type(source).__name__}")
    while True:
        try:
            chunk = source.read(_CHUNK)
        except OSError as exc:
            raise StorageError.wrap(exc, "read", filename=getattr(source, "name", None)) from exc
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise UsageError(f"a stream of bytes that waits for them is needed: this one gave {type(chunk).__name__}")
        if not chunk:
            return inspector.finish()
        inspector.feed(chunk)


class Inspector:
    """`inspect` for bytes that pass by: `feed` them all, in order and in chunks of any size, and `finish`.

    Some MiB are kept at the most.  For one thread at a time.
    """

    def __init__(self, *, expect: str | None = None, limits: Limits = Limits()) -> None:  # noqa: B008 - immutable
        if expect is not None:
            expect = _ALIASES.get(expect, expect)
            if expect not in EXPECTABLE:
                text = f"no such format: {expect!r}; there are {', '.join(EXPECTABLE)}"
                raise OptionError(text, option="expect", choices=EXPECTABLE)
        self._expect = expect
        self._limits = limits
        self._head = bytearray()
        self._tail = b""
        self._length = 0
        self._work: _Work | None = None
        self._answer: Inspection | None = None

    def feed(self, chunk: AnyBuffer) -> None:
        """The next bytes of the file.  Raises UsageError after `finish`."""
        if self._answer is not None:
            raise UsageError("this inspection is finished: a new file needs a new Inspector")
        with memoryview(cast("Buffer", chunk)) as given, given.cast("B") as view:
            start = self._length
            self._length += len(view)
            self._tail = (self._tail + bytes(view[-probe.TAIL_LENGTH :]))[-probe.TAIL_LENGTH :]
            if self._work is None:
                self._head += view[: probe.HEAD_LENGTH - len(self._head)]
                if len(self._head) < probe.HEAD_LENGTH:
                    return
                self._work = _Work(bytes(self._head), self._limits)
            self._work.pass_by(start, view)

    def finish(self) -> Inspection:
        """The answer, for the bytes that were fed: they are all there are."""
        if self._answer is None:
            work = self._work or _Work(bytes(self._head), self._limits)
            while work.waiting:
                work.go_on(work.waiting.pop())
            self._answer = self._conclude(work, self._length, self._tail)
            self._work = None
            self._head.clear()
        return self._answer

    def _inspect_file(self, path: str) -> Inspection:
        """The same for a file, of which only what is needed is read."""
        fd, length = _open(path)
        try:
            work = _Work(_read(fd, Want(0, probe.HEAD_LENGTH), length), self._limits)
            while work.waiting:
                capture = work.waiting.pop()
                if capture.missing:
                    capture.data = bytearray(_read(fd, capture.want, length))
                work.go_on(capture)
            tail_length = min(probe.TAIL_LENGTH, length)
            tail = _read(fd, Want(length - tail_length, tail_length), length)
        except OSError as exc:
            raise StorageError.wrap(exc, "read", filename=path) from exc
        finally:
            os.close(fd)
        return self._conclude(work, length, tail)

    # -- the answer ---------------------------------------------------------------------------------------------------

    def _conclude(self, work: _Work, length: int, tail: bytes) -> Inspection:
        formats = probe.matches(work.head, tail)
        accounts = {name: work.account(name) for name in formats or ("raw",)}
        for name, account in accounts.items():
            if name in _DISKS:
                account.virtual_size = size_of_raw(length)
            for end in account.endings:
                end(length, tail)
        as_expected = self._is_as_expected(formats, work.head)
        if as_expected and self._expect in accounts:
            accounts = {self._expect: accounts[self._expect]}
        sizes = {account.virtual_size for account in accounts.values()}
        checks = [_judge_formats(formats, len(accounts))]
        if self._expect is not None:
            checks.append(_judge_expected(self._expect, formats, as_expected))
        told = list(accounts.values())
        checks += _joined_checks(told)
        exceeded: dict[str, str] = {}
        for account in told:
            if (account.virtual_size or 0) > min(self._limits.virtual_size, MAX_SIZE):
                account.exceeds("virtual_size", f"a disk of {account.virtual_size} bytes")
            exceeded = account.exceeded | exceeded
        names = tuple(sorted(exceeded))
        checks.append(_judge_limits(names, exceeded))
        return Inspection(
            formats=formats,
            virtual_size=sizes.pop() if len(sizes) == 1 else None,
            references=tuple([reference for account in told for reference in account.references]),
            features=tuple([feature for account in told for feature in account.features]),
            encrypted=any(account.encrypted for account in told),
            limits_exceeded=names,
            checks=Checks(sorted(checks, key=lambda check: _ORDER.index(check.name))),
        )

    def _is_as_expected(self, formats: tuple[str, ...], head: bytes) -> bool:
        """Whether the file is what it was declared to be, and nothing else beside what a disk may hold."""
        expect = self._expect
        if expect is None or (expect not in formats and expect != "raw"):
            return False
        inside = _INSIDE.get(expect, set())
        if expect == "vhd" and probe.has_vhd_footer(head[:SECTOR]):
            inside = set()  # not of fixed size: the disk does not begin where the file does
        return set(formats) - {expect} <= inside


def _judge_formats(formats: tuple[str, ...], counted: int) -> Check:
    if counted > 1:
        text = f"{' and '.join(formats)}: {len(formats)} formats match, so that two programs may read two different disks"
        return Check("formats", False, text)
    return Check("formats", True, f"{' in '.join(reversed(formats))}" if formats else "no signature: raw, or no image")


def _judge_expected(expect: str, formats: tuple[str, ...], as_expected: bool) -> Check:
    if as_expected:
        return Check("expected_format", True, f"declared as {expect}, and it is")
    found = " and ".join(formats) or "no signature"
    return Check("expected_format", False, f"declared as {expect}; found: {found}")


def _judge_limits(names: tuple[str, ...], exceeded: dict[str, str]) -> Check:
    if names:
        return Check("limits", False, "; ".join(f"{name}: {exceeded[name]}" for name in names))
    return Check("limits", True, "nothing beyond the limits")


def _joined_checks(accounts: Sequence[Account]) -> list[Check]:
    """The checks of all accounts; of two with one name, one that failed."""
    found: dict[str, Check] = {}
    for account in accounts:
        for name, check in account.checks.items():
            if name not in found or found[name].passed:
                found[name] = check
    return list(found.values())


class _Capture:
    """A piece of the file that an examination waits for."""

    __slots__ = ("account", "data", "task", "want")

    def __init__(self, account: Account, task: Examination, want: Want, head: bytes) -> None:
        self.account = account
        self.task = task
        self.want = want
        self.data = bytearray(head[want.offset : want.offset + want.length])

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        return self.want.length - len(self.data)


class _Work:
    """The examinations of one file that begins with `head`: one account for each format, and what they wait for."""

    def __init__(self, head: bytes, limits: Limits) -> None:
        self.head = head
        self.waiting: list[_Capture] = []
        self._limits = limits
        self._accounts: dict[str, Account] = {}
        for name in probe.matches(head):
            self.account(name)

    def account(self, name: str) -> Account:
        """The account of a format; the first call begins its examination."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(self._limits)
            self._begin(name, account)
        return account

    def _begin(self, name: str, account: Account) -> None:
        if name == "qcow2":
            self._advance(account, examiner(name)(self.head, account), None)
        elif name == "gpt":
            examine_boot_sector(self.head, account)
        elif name == "luks":
            examine_luks_disk(self.head, account)
        else:
            if name in _WITHOUT_CHECKS:
                account.passed("null", "there is nothing that OpenStack's inspector checks in this format")
            if name not in _DISKS:
                from blocklib.inspection import containers

                task = containers.examine(name, self.head, account)
                if task is not None:
                    self._advance(account, task, None)

    def go_on(self, capture: _Capture) -> None:
        """Give an examination the piece that it waits for, or what the file holds of it."""
        self._advance(capture.account, capture.task, bytes(capture.data))

    def _advance(self, account: Account, task: Examination, data: bytes | None) -> None:
        try:
            want = next(task) if data is None else task.send(data)
        except StopIteration:
            pass
        else:
            self.waiting.append(_Capture(account, task, want, self.head))
        further, account.further = account.further, []
        for another in further:
            self._advance(account, another, None)

    def pass_by(self, start: int, view: memoryview) -> None:
        """The bytes from `start` on are here, and will not come again."""
        still: list[_Capture] = []
        while self.waiting:
            capture = self.waiting.pop()
            if capture.missing:
                skip = capture.want.offset + len(capture.data) - start
                assert skip >= 0, "an examination wants what has gone by"
                capture.data += view[skip : skip + capture.missing]
            if capture.missing:
                still.append(capture)
            else:
                self.go_on(capture)
        self.waiting = still


# -- files ---------------------------------------------------------------------------------------------------------------


def _open(path: str) -> tuple[int, int]:
    """A descriptor for reading, and the length in bytes.  Never waits, as opening a pipe would."""
    flags = os.O_RDONLY
    for name in ("O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        _check_kind(path, os.stat(path))  # before opening, which some devices take for an order
        fd = os.open(path, flags)
    except FileNotFoundError as exc:
        raise ImageNotFoundError.wrap(exc, "open", filename=path) from exc
    except ValueError as exc:  # a NUL byte, or text that has no bytes
        raise UsageError(f"{path!r} cannot be the name of a file: {exc}", node=path) from exc
    except OSError as exc:
        if isinstance(exc, StorageError):
            raise
        raise StorageError.wrap(exc, "open", filename=path) from exc
    try:
        _check_kind(path, os.fstat(fd))
        return fd, os.lseek(fd, 0, os.SEEK_END)
    except BaseException:
        os.close(fd)
        raise


def _check_kind(path: str, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return
    number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
    text = f"{path}: neither a regular file nor a block device: nothing else is inspected by name"
    raise StorageError(text, errno=number, operation="open", filename=path, node=path)


def _read(fd: int, want: Want, length: int) -> bytes:
    """A piece of a file of `length` bytes, or what it holds of it."""
    data = bytearray()
    end = min(want.offset + want.length, length)
    while want.offset + len(data) < end:
        piece = os.pread(fd, end - want.offset - len(data), want.offset + len(data))
        if not piece:
            break
        data += piece
    return bytes(data)
