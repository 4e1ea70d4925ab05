"""The commands of ``io`` that move bytes: reads, writes, discards, flushes and changes of size.

Asynchronous requests run at once, in the order given, and only answer later: what they do is the same, and what is
printed does not depend on which of them is faster.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from blocklib.cli.common import explain
from blocklib.cli.getopt import Given, Option, UsageFailure
from blocklib.cli.io_format import dump, report_lines
from blocklib.cli.io_shell import Shell
from blocklib.cli.session import Failure
from blocklib.errors import BlocklibError, OutOfRangeError, StorageError, UnsupportedFeatureError, UsageError
from blocklib.sizes import parse_size

if TYPE_CHECKING:
    from blocklib.node import Preallocation

MAX_REQUEST = (1 << 31) - 512
"""Bytes of the largest request that qemu-io makes."""
_DEFAULT_PATTERN = 0xCD
_PIECE = 1 << 16
_SECTOR = 512
_PREALLOCATION_MODES: tuple[Preallocation, ...] = ("off", "metadata", "falloc", "full")
_DIGITS = {8: "01234567", 10: "0123456789", 16: "0123456789abcdef"}

PARSABLE = Option(("-C",), None, "print statistics for programs: bytes,requests,time,bytes per second,requests per second")
QUIET = Option(("-q",), None, "print no statistics")
DUMP = Option(("-v",), None, "print the bytes that were read")
VERIFY = Option(("-P",), "pattern", "fail unless all bytes that were read are this one")
FILL = Option(("-P",), "pattern", f"write this byte (default: {_DEFAULT_PATTERN:#x})")
FUA = Option(("-f",), None, "make the data durable before the command ends (force unit access)")
ZEROES = Option(("-z",), None, "write zeroes, without sending them where the image can do that")
UNMAP = Option(("-u",), None, "with -z: give the space back")
INVALID = Option(("-i",), None, "only pretend to make a request that is refused")
VM_STATE = Option(("-b",), None, "use the VM state instead of the disk, in whole sectors")
IGNORED = Option(("-p",), None, "ignored")
READ = (
    VM_STATE,
    PARSABLE,
    IGNORED,
    QUIET,
    DUMP,
    VERIFY,
    Option(("-s",), "off", "with -P: look only at the bytes from here, counted from the first one read"),
    Option(("-l",), "len", "with -P: look only at this many bytes"),
)
WRITE = (
    VM_STATE,
    Option(("-c",), None, "write whole clusters compressed"),
    PARSABLE,
    FUA,
    Option(("-n",), None, "with -z: fail where zeroes would have to be sent"),
    IGNORED,
    QUIET,
    UNMAP,
    ZEROES,
    FILL,
    Option(("-s",), "source_file", "write the bytes of this file, again and again"),
)


# -- arguments --------------------------------------------------------------------------------------------------------


def size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as exc:
        raise Failure(str(exc)) from exc


def c_integer(text: str) -> int | None:
    """What C's strtol reads with base 0: ``10``, ``0x0a`` and ``012`` are ten.  None for anything else."""
    digits = text.removeprefix("+").lower()
    base = 10
    if digits.startswith("0x"):
        digits, base = digits[2:], 16
    elif digits.startswith("0") and len(digits) > 1:
        digits, base = digits[1:], 8
    if not digits or len(digits) > 64 or digits.strip(_DIGITS[base]):
        return None
    return int(digits, base)


def _pattern(given: Given) -> int | None:
    text = given.last("-P")
    if text is None:
        return None
    value = c_integer(text)
    if value is None or value > 0xFF:
        raise Failure(f"'{text}' is not a byte: a number from 0 to 255")
    return value


def _range(given: Given) -> tuple[int, int]:
    """The offset and the length of a request with one buffer."""
    offset, length = (size(text) for text in given.operands)
    return offset, length


def _check_length(length: int) -> None:
    if length > MAX_REQUEST:
        raise Failure(f"{length} bytes are more than the {MAX_REQUEST} that one request may have")


def _vector(given: Given) -> tuple[int, int]:
    """The offset and the length of all buffers of a request together."""
    offset, *lengths = (size(text) for text in given.operands)
    _check_length(sum(lengths))
    return offset, sum(lengths)


def _check_vm_state(given: Given, offset: int, length: int) -> None:
    """Raises Failure for what cannot be done with the VM state."""
    for option in ("-z", "-f"):
        if given.has(option):
            raise Failure(f"-b and {option} exclude each other")
    for what, value in (("offset", offset), ("length", length)):
        if value % _SECTOR:
            raise Failure(f"-b: the {what}, {value}, is no multiple of {_SECTOR}")


# -- making a request -------------------------------------------------------------------------------------------------


def _seconds(shell: Shell, label: str, request: Callable[[], None]) -> float | None:
    """How long `request` took; None, with the reason said, when it failed.  What the caller did wrong is raised."""
    started = time.perf_counter()
    try:
        request()
    except BlocklibError as exc:
        if isinstance(exc, UsageError) and not isinstance(exc, OutOfRangeError):
            raise
        if not isinstance(exc, (OutOfRangeError, StorageError)):
            shell.complain(explain(exc))
        number = (exc.errno if isinstance(exc, StorageError) else None) or errno.EIO
        shell.say(f"{label} failed: {os.strerror(number)}")
        return None
    return time.perf_counter() - started


def _report(shell: Shell, given: Given, verb: str, offset: int, length: int, seconds: float) -> None:
    if not given.has("-q"):
        for line in report_lines(verb, length, offset, seconds, parsable=given.has("-C")):
            shell.say(line)


# -- reading ----------------------------------------------------------------------------------------------------------


def read(shell: Shell, given: Given) -> bool:
    if given.last("-P") is None and (given.has("-s") or given.has("-l")):
        raise UsageFailure("-s and -l need -P")
    offset, length = _range(given)
    _check_length(length)
    start = size(given.last("-s") or "0")
    count = size(given.last("-l") or str(max(0, length - start)))
    if start + count > length:
        raise Failure("the bytes to be verified reach beyond those that are read")
    if given.has("-b"):
        _check_vm_state(given, offset, length)
    return _read(shell, given, "read", offset, length, start, count)


def readv(shell: Shell, given: Given) -> bool:
    offset, length = _vector(given)
    return _read(shell, given, "readv", offset, length, 0, length)


def aio_read(shell: Shell, given: Given) -> bool:
    offset, length = _vector(given)
    if given.has("-i"):
        shell.say("injecting invalid read request")
        return True
    with shell.answering_later():
        _read(shell, given, "readv", offset, length, 0, length)
    return True  # the request was made; how it ended is only printed


def _read(shell: Shell, given: Given, label: str, offset: int, length: int, start: int, count: int) -> bool:
    """Read, and verify `count` bytes from `start` on if there is a pattern."""
    pattern = _pattern(given)
    disk = shell.need_disk()
    buffer = shell.buffer(length)

    def request() -> None:
        if given.has("-b"):
            buffer[:] = disk.snapshots.read_vm_state(offset, length)
        else:
            disk.readinto(offset, buffer)

    seconds = _seconds(shell, label, request)
    if seconds is None:
        return False
    holds = pattern is None or _is_filled(buffer[start : start + count], pattern)
    if not holds:
        shell.say(f"Pattern verification failed at offset {offset + start}, {count} bytes")
    if given.has("-v") and not given.has("-q") and length:
        shell.say(dump(buffer, offset))
    _report(shell, given, "read", offset, length, seconds)
    return holds


def _is_filled(view: memoryview, byte: int) -> bool:
    """Whether all of `view` is `byte`.  In pieces of bytes: comparing those is memcmp, comparing views is not."""
    expected = bytes((byte,)) * min(len(view), _PIECE)
    for start in range(0, len(view), _PIECE):
        part = bytes(view[start : start + _PIECE])
        if part != expected[: len(part)]:
            return False
    return True


# -- writing ----------------------------------------------------------------------------------------------------------


def write(shell: Shell, given: Given) -> bool:
    if given.has("-c") and given.has("-f"):
        raise UsageFailure("-c and -f exclude each other")
    zeroes = given.has("-z")
    if sum((zeroes, given.has("-P"), given.has("-s"))) > 1:
        raise UsageFailure("-z, -P and -s exclude each other")
    if not zeroes and (given.has("-u") or given.has("-n")):
        raise UsageFailure("-u and -n need -z")
    offset, length = _range(given)
    if not given.has("-n"):
        _check_length(length)
    if given.has("-b"):
        _check_vm_state(given, offset, length)
    if zeroes:
        return _write_zeroes(shell, given, "write", offset, length)
    if given.has("-c") and not given.has("-b"):
        return _write_compressed(shell, given, offset, length)
    return _write(shell, given, "write", offset, length)


def writev(shell: Shell, given: Given) -> bool:
    offset, length = _vector(given)
    return _write(shell, given, "writev", offset, length)


def aio_write(shell: Shell, given: Given) -> bool:
    if given.has("-u") and not given.has("-z"):
        raise UsageFailure("-u needs -z")
    if given.has("-z") and len(given.operands) != 2:
        raise UsageFailure("-z takes one length")
    offset, length = _vector(given)
    if given.has("-i"):
        shell.say("injecting invalid write request")
        return True
    with shell.answering_later():
        (_write_zeroes if given.has("-z") else _write)(shell, given, "aio_write", offset, length)
    return True  # as in aio_read


def _write(shell: Shell, given: Given, label: str, offset: int, length: int) -> bool:
    disk = shell.need_disk()
    data = _data(shell, given, length)

    def request() -> None:
        if given.has("-b"):
            disk.snapshots.write_vm_state(offset, data)
        else:
            disk.write(offset, data, fua=given.has("-f"))

    return _written(shell, given, label, offset, length, request)


def _write_compressed(shell: Shell, given: Given, offset: int, length: int) -> bool:
    for name, value in (("offset", offset), ("length", length)):
        if value % _SECTOR:
            raise Failure(f"{name} {value}: compressed writes are whole sectors of {_SECTOR} bytes")
    disk = shell.need_disk()
    data = _data(shell, given, length)
    cluster_size = disk.node.cluster_size() or 1

    def request() -> None:
        if offset % cluster_size or (length % cluster_size and offset + length != disk.size):
            raise StorageError("only whole clusters are compressed", errno=errno.EINVAL, operation="write")
        try:
            disk.write_compressed(offset, data)
        except UnsupportedFeatureError as exc:
            raise StorageError(str(exc), errno=errno.ENOTSUP, operation="write") from exc

    return _written(shell, given, "write", offset, length, request)


def _write_zeroes(shell: Shell, given: Given, label: str, offset: int, length: int) -> bool:
    disk = shell.need_disk()
    _pattern(given)  # means nothing here, but must be one

    def request() -> None:
        disk.write_zeroes(offset, length, unmap=given.has("-u"), fallback=not given.has("-n"))
        if given.has("-f"):
            disk.flush()

    return _written(shell, given, label, offset, length, request)


def _written(shell: Shell, given: Given, label: str, offset: int, length: int, request: Callable[[], None]) -> bool:
    seconds = _seconds(shell, label, request)
    if seconds is None:
        return False
    _report(shell, given, "wrote", offset, length, seconds)
    return True


def _data(shell: Shell, given: Given, length: int) -> memoryview:
    """What a write writes: the pattern, or the bytes of a file, repeated until there are enough."""
    source = given.last("-s")
    if source is None:
        pattern = _pattern(given)
        piece = bytes((_DEFAULT_PATTERN if pattern is None else pattern,))
    else:
        piece = _bytes_of(source, length)
    if not shell.misaligned:
        return memoryview(piece * -(-length // len(piece)))[:length]
    buffer = shell.buffer(length)
    buffer[:] = (piece * -(-length // len(piece)))[:length]
    return buffer


def _bytes_of(path: str, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(max(1, length))
    except OSError as exc:
        raise Failure(f"{path}: {exc.strerror}") from exc
    if not data:
        raise Failure(f"{path}: the file is empty")
    return data


# -- the rest ---------------------------------------------------------------------------------------------------------


def discard(shell: Shell, given: Given) -> bool:
    disk = shell.need_disk()
    offset, length = _range(given)
    _check_length(length)
    seconds = _seconds(shell, "discard", lambda: disk.discard(offset, length))
    if seconds is None:
        return False
    _report(shell, given, "discard", offset, length, seconds)
    return True


def flush(shell: Shell, given: Given) -> bool:
    shell.need_disk().flush()
    return True


def truncate(shell: Shell, given: Given) -> bool:
    disk = shell.need_disk()
    mode = given.last("-m") or "off"
    for preallocation in _PREALLOCATION_MODES:
        if mode == preallocation:
            disk.truncate(size(given.operands[0]), shrink=True, preallocation=preallocation)
            return True
    raise Failure(f"-m {mode}: no such preallocation; there are {', '.join(_PREALLOCATION_MODES)}")
