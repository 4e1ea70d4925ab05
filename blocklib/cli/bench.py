"""``bench``: send many requests of one length to an image, a step apart, and tell how long they took."""

from __future__ import annotations

import mmap
import time
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blocklib.cli.common import (
    CACHE_MODES,
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    cache_mode,
    check_objects,
    name_of,
    one_operand,
    open_image,
    size_value,
    warn_of_guess,
)
from blocklib.cli.getopt import Given, Option, Syntax
from blocklib.cli.session import Failure, Session
from blocklib.sizes import MAX_SIZE

if TYPE_CHECKING:
    from blocklib.disk import Disk

SYNTAX = Syntax(
    "FILE",
    "Send requests to an image, as many at a time as the queue is deep, and tell how long all of them took.",
    (
        Option(("-c",), "COUNT", "number of requests (default: 75000)"),
        Option(("-d",), "DEPTH", "requests sent at a time (default: 64)"),
        FORMAT,
        IMAGE_OPTS,
        OBJECT,
        Option(("-i", "--aio"), "MODE", "how files keep requests in flight: threads (default), native, io_uring"),
        Option(("-n", "--native"), None, "short for -i native"),
        Option(("-o",), "OFFSET", "guest offset of the first request (default: 0)"),
        Option(("-s",), "SIZE", "bytes of a request (default: 4k)"),
        Option(("-S",), "STEP", "from one request to the next (default: SIZE); past the end it goes on from the start"),
        Option(("-t",), "CACHE", f"cache mode: {', '.join(CACHE_MODES)}"),
        Option(("-w",), None, "write, instead of reading"),
        Option(("--pattern",), "BYTE", "what to write, from 0 to 255 (default: 0)"),
        Option(("--flush-interval",), "COUNT", "flush after this many writes, once all that were sent are done"),
        Option(("--no-drain",), None, "flush without cutting what is sent at a time"),
        Option(("-q",), None, "accepted, and makes no difference, as with qemu-img"),
        FORCE_SHARE,
    ),
)

_COUNT = 75_000
_DEPTH = 64
_LENGTH = 4096
_MAX = (1 << 31) - 1
"""The largest count, depth, size or step: QEMU's."""
_MOST_BYTES = 64 << 20
"""Bytes of the requests that are sent at a time, if one is not longer."""
_IN_FLIGHT = 64
_STREAM = 1024
"""Past the page cache a file keeps _IN_FLIGHT requests in flight, at most.  To keep it at that all the time, as a queue of that
depth does, it is sent this many."""
_AIO = ("threads", "native", "io_uring")


def run(session: Session, given: Given) -> int:
    check_objects(given)
    count = _number(given, "-c", "number of requests", _COUNT)
    depth = _number(given, "-d", "queue depth", _DEPTH)
    length = _size(given, "-s", "size of a request", _LENGTH)
    step = _size(given, "-S", "step", 0) or length
    offset = size_value(given.last("-o") or "0", "offset of the first request")
    pattern = _number(given, "--pattern", "pattern", 0, most=255)
    interval = _number(given, "--flush-interval", "flush interval", 0)
    writing = given.has("-w")
    aio = "native" if given.has("-n") else given.last("-i") or _AIO[0]
    if aio not in _AIO:
        raise Failure(f"-i {aio}: no such mode; there are {', '.join(_AIO)}")
    if depth == 0:
        raise Failure("queue depth: with none nothing would ever be sent")
    if interval and not writing:
        raise Failure("--flush-interval is for writes (-w)")
    if interval and interval < depth:
        raise Failure(f"--flush-interval={interval}: no more than that would be in flight; the queue depth is {depth}")
    if writing and given.has("-U"):
        raise Failure("-U excludes -w: what another program may be writing is only read")
    cache = cache_mode(given, "-t", "writeback")
    name = name_of(given, one_operand(given))
    with open_image(session, given, name, write=writing, cache=cache, aio=aio) as disk:
        top = disk.chain()[0]
        if writing and name.format is None and not name.is_options and top.driver == "raw":
            warn_of_guess(session, top.filename or top.name)
        print(
            f"Sending {count} {'write' if writing else 'read'} requests, {length} bytes each, {depth} in parallel"
            f" (starting at offset {offset}, step size {step})"
        )
        if interval:
            print(f"Sending flush every {interval} requests")
        if cache in ("none", "directsync") and depth >= _IN_FLIGHT and not interval:
            depth = max(depth, _STREAM)
        at_once = min(depth, count, max(1, _MOST_BYTES // max(length, 1)))
        if at_once > 1:
            from blocklib import batch

            batch.expect(count, writing=writing)
        send = _writer(disk, length, at_once, pattern) if writing else _reader(disk, length, at_once)
        began = time.perf_counter()
        for first, number, flush in batches(count, at_once, interval, drain=not given.has("--no-drain")):
            session.check()
            send(places(disk.size, offset, step, first, number))
            if flush:
                disk.flush()
        print(f"Run completed in {time.perf_counter() - began:3.3f} seconds.")
    return 0


def _number(given: Given, option: str, what: str, default: int, most: int = _MAX) -> int:
    text = given.last(option)
    if text is None:
        return default
    digits, base = (text[2:], 16) if text[:2] in ("0x", "0X") else (text, 10)
    try:
        value = int(digits, base) if digits.isalnum() else -1
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise Failure(f"{option} {text}: the {what} is a whole number from 0 to {most}")
    return value


def _size(given: Given, option: str, what: str, default: int) -> int:
    text = given.last(option)
    value = default if text is None else size_value(text, what)
    if value > _MAX:
        raise Failure(f"{option} {text}: the {what} is at most {_MAX} bytes")
    return value


def batches(count: int, depth: int, interval: int, *, drain: bool) -> Iterator[tuple[int, int, bool]]:
    """(index of the first request, number of requests, whether a flush follows) of what is sent at a time.

    A flush is due whenever the number of requests still to come is a multiple of `interval`, as qemu-img has it.  With
    `drain` nothing is sent together with what comes after the flush.
    """
    first = 0
    while first < count:
        number = min(depth, count - first)
        due = (count - first) % interval or interval if interval else count + 1
        if drain:
            number = min(number, due)
        yield first, number, due <= number < count - first
        first += number


def places(size: int, offset: int, step: int, first: int, number: int) -> array[int]:
    """The guest offsets of `number` requests from the one with the index `first` on.

    Only the very first may begin past the end, and fails; the others go round.
    """
    start = offset + first * step
    round_at = size or MAX_SIZE
    straight = range(start, start + number * step, step) if step else [start] * number
    found = array("q", [place % round_at for place in straight])
    if first == 0:
        found[0] = offset
    return found


def _reader(disk: Disk, length: int, at_once: int) -> Callable[[array[int]], object]:
    buffer = _buffer(length * at_once)
    if at_once == 1:
        return lambda offsets: disk.readinto(offsets[0], buffer)
    return lambda offsets: disk.read_batch(offsets, length, buffer[: length * len(offsets)])


def _writer(disk: Disk, length: int, at_once: int, pattern: int) -> Callable[[array[int]], object]:
    data = _buffer(length * at_once)
    if pattern:
        data[:] = bytes([pattern]) * len(data)
    if at_once == 1:
        return lambda offsets: disk.write(offsets[0], data)
    return lambda offsets: disk.write_batch(offsets, data[: length * len(offsets)])


def _buffer(length: int) -> memoryview:
    """Zeroes at the start of a page: what direct I/O wants."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]
