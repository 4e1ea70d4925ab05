"""The client's side of the transmission phase, without a socket.

``tx = ClientTransmission(ready.terms, ready.trailing)``.  ``pending = tx.request(...)`` registers a request and gives what is
to be sent: ``pending.head``, then for a write its data.  Replies come in as in `asyncio.BufferedProtocol`: receive into
``tx.get_buffer()``, which for a long payload is the very buffer that the read is for, and pass the number to
``tx.buffer_updated(n)``, which gives the requests that are answered completely.

Every reply is held against its request: cookie, type, offset, length, order; chunks may neither overlap nor leave a gap; a
status covers what was asked.  Whatever does not fit is a RemoteProtocolError: close the connection; nothing outside the
buffers of the requests in flight has been touched.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Final

from blocklib.buffers import zero_fill
from blocklib.errors import LocalProtocolError, RemoteProtocolError
from blocklib.nbd import wire
from blocklib.nbd.engine import Receiver, Rules, Terms

_INPUT_SIZE: Final = 1 << 16
"""Bytes of replies that one receive may bring; what a long payload still needs is received without passing through."""
_DIRECT: Final = 1 << 14
_MAX_ERROR: Final = 1 << 13
"""Bytes of an error chunk; the longest that the protocol knows has a message of 4096."""
_MAX_ERRORS: Final = 1024
_SPARE_PIECES: Final = 1024
"""A read may arrive in so many separate pieces, and one more for each 512 bytes: "chunks ... SHOULD" be multiples of that."""
_READ, _WRITE = wire.NBD_CMD_READ, wire.NBD_CMD_WRITE
_OFFSET_DATA = wire.NBD_REPLY_TYPE_OFFSET_DATA
_DONE = wire.NBD_REPLY_FLAG_DONE


class Pending:
    """A request in flight, and at last its outcome.  `waiter` is the transport's own."""

    __slots__ = (
        "_ends",
        "_n_errors",
        "_starts",
        "answered",
        "command",
        "contexts",
        "cookie",
        "error",
        "flags",
        "head",
        "into",
        "length",
        "message",
        "missing",
        "offset",
        "status",
        "waiter",
    )

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.head = b""
        """What is sent for it, without the data of a write."""
        self.into: memoryview | None = None
        """Where the data of a read go; after an error, or while in flight, they mean nothing."""
        self.missing = 0
        """Bytes of a read that no chunk has brought yet."""
        self.contexts: frozenset[int] = frozenset()
        """IDs of the contexts whose status is due."""
        self.status: dict[int, tuple[array[int], array[int]]] = {}
        """Context ID -> lengths and status flags of consecutive extents from `offset` on; the last may reach too far."""
        self.answered = False
        self.error = 0
        """An NBD error; 0: success, once the request is answered."""
        self.message = ""
        self.waiter: Any = None
        self._starts: list[int] | None = None
        self._ends: list[int] = []
        self._n_errors = 0

    def __repr__(self) -> str:
        return f"<{wire.command_name(self.command)} {self.offset}+{self.length} cookie={self.cookie:#x}>"

    def cover(self, start: int, end: int) -> None:
        """Note that [start, end) has come.  Raises RemoteProtocolError where a part of it had come before."""
        if start < self.offset or end > self.offset + self.length:
            raise RemoteProtocolError(f"a chunk from {start} to {end} for {self}")
        self.missing -= end - start
        starts, ends = self._starts, self._ends
        if starts is None:
            self._starts, self._ends = [start], [end]
            return
        if self.flags & wire.NBD_CMD_FLAG_DF:
            raise RemoteProtocolError(f"a second chunk for {self}, which must not be fragmented")
        if start == ends[-1]:  # nearly always
            ends[-1] = end
            return
        place = bisect_left(ends, start + 1)  # the first piece that ends behind our start
        if place < len(starts) and starts[place] < end:
            raise RemoteProtocolError(f"two chunks that overlap for {self}")
        joins_before = place > 0 and ends[place - 1] == start
        joins_after = place < len(starts) and starts[place] == end
        if joins_before and joins_after:
            ends[place - 1] = ends[place]
            del starts[place], ends[place]
        elif joins_before:
            ends[place - 1] = end
        elif joins_after:
            starts[place] = start
        else:
            starts.insert(place, start)
            ends.insert(place, end)
            if len(starts) > _SPARE_PIECES + self.length // 512:
                raise RemoteProtocolError(f"{len(starts)} separate pieces for {self}")

    def fail(self, error: int, message: str) -> None:
        """Note an error; the first one counts."""
        self._n_errors += 1
        if self._n_errors > _MAX_ERRORS:
            raise RemoteProtocolError(f"more than {_MAX_ERRORS} errors for {self}")
        if not self.error:
            self.error = error
            self.message = message


class ClientTransmission(Receiver[Pending]):
    """The transmission phase with one server: requests out, each within the rules; replies in, each checked.

    `request` may be called by any thread, also while another one handles what was received; the latter is for one at a
    time.
    """

    def __init__(self, terms: Terms, trailing: bytes = b"") -> None:
        self.terms = terms
        self.rules = Rules(terms)
        self.in_flight: dict[int, Pending] = {}
        """By cookie: what is not answered yet."""
        self._extended = terms.extended
        self._header = wire.EXTENDED_REQUEST if terms.extended else wire.REQUEST
        self._magic = wire.NBD_EXTENDED_REQUEST_MAGIC if terms.extended else wire.NBD_REQUEST_MAGIC
        self._cookies = itertools.count(1)
        self._input = memoryview(bytearray(_INPUT_SIZE + len(trailing)))
        self._input[: len(trailing)] = trailing
        self._start = 0
        self._end = len(trailing)
        self._due: Pending | None = None
        """The request whose payload is arriving."""
        self._due_type = 0
        self._due_done = False
        """The request is answered with this payload."""
        self._sink = None
        self._missing = 0
        """Bytes of the payload that are still to come."""

    # -- requests -----------------------------------------------------------------------------------------------------

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        into: memoryview | None = None,
        contexts: Sequence[int] = (),
    ) -> Pending:
        """Register a request.  A read goes to `into`; a status asks for all contexts, or for those given, if that is offered.

        Raises LocalProtocolError for what the terms do not allow.
        """
        payload = b""
        if command == _WRITE and self._extended:
            flags |= wire.NBD_CMD_FLAG_PAYLOAD_LEN
        broken = self.rules.broken(command, flags, offset, length)
        if broken is not None and command != wire.NBD_CMD_DISC:
            raise LocalProtocolError(f"{wire.command_name(command)}: {broken[1]}")
        cookie = next(self._cookies)
        pending = Pending(command, flags, cookie, offset, length)
        stated = length
        if command == _READ:
            if into is None or len(into) != length or not length:
                raise LocalProtocolError(f"a buffer of {len(into or b'')} bytes for a read of {length}")
            pending.into = into
            pending.missing = length
        elif command == wire.NBD_CMD_BLOCK_STATUS:
            pending.contexts = frozenset(self.terms.contexts)
            if contexts and pending.contexts != frozenset(contexts):
                payload = self._filter(pending, contexts)
                stated = len(payload)
        pending.head = self._header.pack(self._magic, pending.flags, command, cookie, offset, stated) + payload
        if command != wire.NBD_CMD_DISC:
            self.in_flight[cookie] = pending
        return pending

    def _filter(self, pending: Pending, contexts: Sequence[int]) -> bytes:
        """The payload that makes a status request one for some contexts only."""
        if not self.terms.export.flags & wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD or not pending.contexts >= set(contexts):
            raise LocalProtocolError("NBD_CMD_BLOCK_STATUS: the server does not filter contexts, or has not these")
        pending.contexts = frozenset(contexts)
        pending.flags |= wire.NBD_CMD_FLAG_PAYLOAD_LEN
        return wire.status_request_payload(pending.length, sorted(pending.contexts))

    # -- replies ------------------------------------------------------------------------------------------------------

    @property
    def in_payload(self) -> bool:
        """Whether all of `get_buffer` is the rest of one payload, so that waiting for all of it holds nothing up."""
        # A short rest comes with the replies behind it, and is copied: a call for it alone would cost more.
        return self._missing >= _DIRECT and self._start == self._end and self._sink is not None

    def buffer_updated(self, n: int) -> list[Pending]:
        """`n` bytes were received into `get_buffer()`: the requests that are answered now.

        Raises RemoteProtocolError, also for the end of the file (0), wherever it comes: a server may not leave first.
        """
        if n == 0:
            raise RemoteProtocolError("the server closed the connection")
        if self.in_payload:
            self._missing -= n
            if self._missing:
                return []
            finished: list[Pending] = []
            self._finish_payload(finished)
            return finished
        self._end += n
        return self._parse()

    def _parse(self) -> list[Pending]:
        finished: list[Pending] = []
        if self._sink is not None and not self._take_payload(finished):
            return finished
        source = self._input
        while self._end - self._start >= 16:
            (magic,) = wire.MAGIC.unpack_from(source, self._start)
            if magic == wire.NBD_SIMPLE_REPLY_MAGIC and not self._extended:
                _, error, cookie = wire.SIMPLE_REPLY.unpack_from(source, self._start)
                self._start += 16
                complete = self._take_simple(error, cookie, finished)
            elif magic == wire.NBD_STRUCTURED_REPLY_MAGIC and self.terms.structured and not self._extended:
                if self._end - self._start < 20:
                    break
                _, flags, kind, cookie, length = wire.STRUCTURED_REPLY.unpack_from(source, self._start)
                complete = self._take_chunk(20, flags, kind, self._find(cookie), length, finished)
            elif magic == wire.NBD_EXTENDED_REPLY_MAGIC and self._extended:
                if self._end - self._start < 32:
                    break
                _, flags, kind, cookie, offset, length = wire.EXTENDED_REPLY.unpack_from(source, self._start)
                pending = self._find(cookie)
                if offset != pending.offset:
                    raise RemoteProtocolError(f"a reply that says offset {offset} to {pending}")
                complete = self._take_chunk(32, flags, kind, pending, length, finished)
            else:
                raise RemoteProtocolError(f"the magic of a reply is {magic:#x}")
            if not complete:
                break
        return finished

    def _find(self, cookie: int) -> Pending:
        pending = self.in_flight.get(cookie)
        if pending is None:
            raise RemoteProtocolError(f"a reply to a request that is not in flight: cookie {cookie:#x}")
        return pending

    def _take_simple(self, error: int, cookie: int, finished: list[Pending]) -> bool:
        pending = self._find(cookie)
        if error:
            if pending.command == _READ and self.terms.structured:
                raise RemoteProtocolError(f"a simple reply to {pending}")
            pending.fail(error, "")
        elif pending.command == _READ:
            if self.terms.structured:
                raise RemoteProtocolError(f"a simple reply to {pending}")
            pending.missing = 0
            return self._expect(pending, _OFFSET_DATA, True, pending.into, finished)
        self._finish(pending, finished)
        return True

    def _take_chunk(
        self, head: int, flags: int, kind: int, pending: Pending, length: int, finished: list[Pending]
    ) -> bool:
        """One chunk, whose header of `head` bytes is there; False, and nothing taken, where more is needed at once."""
        done = bool(flags & _DONE)
        source, start = self._input, self._start + head
        if kind == _OFFSET_DATA:
            if pending.command != _READ or length < 9:
                raise RemoteProtocolError(f"a data chunk of {length} bytes for {pending}")
            if self._end - start < 8:
                return False
            (offset,) = wire.OFFSET.unpack_from(source, start)
            length -= 8
            pending.cover(offset, offset + length)
            self._start = start + 8
            assert pending.into is not None
            place = offset - pending.offset
            return self._expect(pending, kind, done, pending.into[place : place + length], finished)
        if kind == wire.NBD_REPLY_TYPE_NONE:
            if length or not done:
                raise RemoteProtocolError(f"an empty chunk of {length} bytes, done={done}, for {pending}")
            self._start = start
            self._finish(pending, finished)
            return True
        if kind == wire.NBD_REPLY_TYPE_OFFSET_HOLE:
            if pending.command != _READ or length != 12:
                raise RemoteProtocolError(f"a hole in a chunk of {length} bytes for {pending}")
            if self._end - start < 12:
                return False
            self._take_hole(pending, *wire.OFFSET_HOLE.unpack_from(source, start))
            self._start = start + 12
            if done:
                self._finish(pending, finished)
            return True
        self._start = start
        limit = self._longest_payload(kind, pending)
        if length > limit:
            raise RemoteProtocolError(f"a chunk of type {kind} with {length} bytes for {pending}; there may be {limit}")
        return self._expect(pending, kind, done, memoryview(bytearray(length)), finished)

    def _take_hole(self, pending: Pending, offset: int, length: int) -> None:
        if not length:
            raise RemoteProtocolError(f"a hole of no bytes for {pending}")
        pending.cover(offset, offset + length)
        assert pending.into is not None
        place = offset - pending.offset
        zero_fill(pending.into[place : place + length])

    def _longest_payload(self, kind: int, pending: Pending) -> int:
        """Bytes that a chunk of a kind which is collected before it is looked at may have."""
        if kind & wire.NBD_REPLY_TYPE_FLAG_ERROR:
            return _MAX_ERROR
        wanted = wire.NBD_REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else wire.NBD_REPLY_TYPE_BLOCK_STATUS
        if kind != wanted or pending.command != wire.NBD_CMD_BLOCK_STATUS:
            raise RemoteProtocolError(f"a chunk of type {kind} for {pending}")
        extents = 1 if pending.flags & wire.NBD_CMD_FLAG_REQ_ONE else min(pending.length, wire.MAX_STATUS_EXTENTS)
        return 8 + 16 * extents if self._extended else 4 + 8 * extents

    def _expect(self, pending: Pending, kind: int, done: bool, sink: memoryview | None, finished: list[Pending]) -> bool:
        """Get ready for a payload; False while some of it is still to come."""
        assert sink is not None
        self._due, self._due_type, self._due_done = pending, kind, done
        self._sink = sink
        self._missing = len(sink)
        return self._take_payload(finished)

    def _take_payload(self, finished: list[Pending]) -> bool:
        """Take from the input what it has of the payload; False while some is still to come."""
        sink = self._sink
        assert sink is not None
        n = min(self._missing, self._end - self._start)
        if n:
            place = len(sink) - self._missing
            sink[place : place + n] = self._input[self._start : self._start + n]
            self._start += n
            self._missing -= n
        if self._missing:
            return False
        self._finish_payload(finished)
        return True

    def _finish_payload(self, finished: list[Pending]) -> None:
        pending, kind, sink = self._due, self._due_type, self._sink
        assert pending is not None
        assert sink is not None
        self._due = self._sink = None
        if kind & wire.NBD_REPLY_TYPE_FLAG_ERROR:
            self._take_error(pending, kind, sink)
        elif kind != _OFFSET_DATA:
            self._take_status(pending, sink)
        if self._due_done:
            self._finish(pending, finished)

    def _take_error(self, pending: Pending, kind: int, payload: memoryview) -> None:
        error, message, offset = wire.parse_error_payload(payload, kind)
        if offset is not None and not pending.offset <= offset <= pending.offset + max(pending.length - 1, 0):
            raise RemoteProtocolError(f"an error at {offset} for {pending}")
        pending.fail(error, message)

    def _take_status(self, pending: Pending, payload: memoryview) -> None:
        number, lengths, states = wire.parse_status_payload(payload, extended=self._extended)
        if number not in pending.contexts or number in pending.status:
            raise RemoteProtocolError(f"an unexpected status of context {number} for {pending}")
        if 0 in lengths:
            raise RemoteProtocolError(f"a status extent of no bytes for {pending}")
        total = sum(lengths)
        if total - lengths[-1] >= pending.length:
            raise RemoteProtocolError(f"status extents that go on behind the range of {pending}")
        if pending.flags & wire.NBD_CMD_FLAG_REQ_ONE and (len(lengths) != 1 or total > pending.length):
            raise RemoteProtocolError(f"{len(lengths)} status extents of {total} bytes for {pending}, which wanted one")
        pending.status[number] = (lengths, states)

    def _finish(self, pending: Pending, finished: list[Pending]) -> None:
        """The request is answered: does the answer hold what success promises?"""
        if not pending.error:
            if pending.missing:
                raise RemoteProtocolError(f"success, but {pending.missing} bytes are missing, for {pending}")
            if len(pending.status) != len(pending.contexts):
                raise RemoteProtocolError(f"success, but {len(pending.status)} contexts, for {pending}")
        del self.in_flight[pending.cookie]
        pending.answered = True
        finished.append(pending)
