"""The server's side of the transmission phase, without a socket.

``tx = ServerTransmission(ready.terms, ready.trailing)``.  Bytes come in as in `asyncio.BufferedProtocol`: receive into
``tx.get_buffer()``, which for a long payload is the rest of the request's own buffer, and pass the number to
``tx.buffer_updated(n)``, which gives the requests that are complete; ``tx.pending()`` gives those that came with
`trailing`.  A request with `error` set breaks a rule: do nothing and send ``tx.error(request, request.error,
request.message)``.  Replies are bytes to be sent; payload is put behind `read_head` and `data_head` by the caller, from
wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from blocklib.errors import LocalProtocolError, RemoteProtocolError
from blocklib.nbd import wire
from blocklib.nbd.engine import Receiver, Rules, Terms

_INPUT_SIZE: Final = 1 << 16
"""Bytes of requests and short payloads that one receive may bring."""
_READ, _WRITE, _DISC = wire.NBD_CMD_READ, wire.NBD_CMD_WRITE, wire.NBD_CMD_DISC
_PAYLOAD_LEN = wire.NBD_CMD_FLAG_PAYLOAD_LEN


class Request:
    """One request of a client, with its payload.  `offset` and `length` are bytes of the export, inside it unless `error`."""

    __slots__ = ("command", "contexts", "cookie", "data", "error", "flags", "length", "message", "offset")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.data: memoryview | None = None
        """What is to be written."""
        self.contexts: tuple[int, ...] = ()
        """IDs of the metadata contexts to be answered."""
        self.error = 0
        """An NBD error, where a rule is broken: nothing is to be done, the error is to be sent."""
        self.message = ""

    def __repr__(self) -> str:
        text = f"<{wire.command_name(self.command)} {self.offset}+{self.length} flags={self.flags:#x} cookie={self.cookie:#x}"
        return f"{text} error={self.error} {self.message}>" if self.error else text + ">"


class ServerTransmission(Receiver[Request]):
    """The transmission phase with one client: requests in, each checked against every rule; replies out.

    `allocate` gives the buffer for a payload of so many bytes, when its header has arrived.  A payload of more than
    `max_payload` bytes (by default what the export advertises, and 32 MiB at least) ends the connection.  Not safe for threads,
    except that replies may be built anywhere.
    """

    def __init__(
        self,
        terms: Terms,
        trailing: bytes = b"",
        *,
        allocate: Callable[[int], bytearray | memoryview] = bytearray,
        max_payload: int | None = None,
    ) -> None:
        self.terms = terms
        self.structured = terms.structured
        self.extended = terms.extended
        export = terms.export
        self._max_payload = max_payload or max(export.max_payload, wire.DEFAULT_MAX_PAYLOAD)
        self._rules = Rules(terms)
        self._allocate = allocate
        self._header = wire.EXTENDED_REQUEST if terms.extended else wire.REQUEST
        self._magic = wire.NBD_EXTENDED_REQUEST_MAGIC if terms.extended else wire.NBD_REQUEST_MAGIC
        self._input = memoryview(bytearray(_INPUT_SIZE + len(trailing)))
        self._input[: len(trailing)] = trailing
        self._start = 0
        self._end = len(trailing)
        self._due: Request | None = None
        """The request whose payload is arriving, or being skipped."""
        self._sink = None
        """Its buffer, or None where the payload is skipped."""
        self._missing = 0
        """Bytes of the payload that are still to come."""
        self._disconnected = False

    # -- input --------------------------------------------------------------------------------------------------------

    @property
    def in_payload(self) -> bool:
        return self._start == self._end and self._sink is not None and self._missing > 0

    def buffer_updated(self, n: int) -> list[Request]:
        """`n` bytes were received into `get_buffer()`: the requests that are complete now, in their order.

        0 is the end of the file: in the middle of a message RemoteProtocolError, else as if the client had disconnected.
        """
        if n == 0:
            return self._end_of_file()
        if self.in_payload:
            self._missing -= n
            if self._missing:
                return []
            return self._finish_payload([])
        self._end += n
        return self.pending()

    def _end_of_file(self) -> list[Request]:
        if self._start != self._end or self._due is not None:
            raise RemoteProtocolError("the client closed the connection in the middle of a message")
        if self._disconnected:
            return []
        self._disconnected = True
        return [Request(_DISC, 0, 0, 0, 0)]

    def pending(self) -> list[Request]:
        """The requests that are complete in what has been received so far, `trailing` included."""
        requests: list[Request] = []
        unpack_from, header_size = self._header.unpack_from, self._header.size
        rules = self._rules
        size, max_transfer, misaligned, read_flags = rules.size, rules.max_transfer, rules.misaligned, rules.flags_of[_READ]
        if self._due is not None and not self._take_payload(requests):
            return requests
        while self._end - self._start >= header_size:
            magic, flags, command, cookie, offset, length = unpack_from(self._input, self._start)
            if magic != self._magic:
                raise RemoteProtocolError(f"the magic of a request is {magic:#x}")
            if self._disconnected:  # "A client MUST NOT send anything to the server after sending an NBD_CMD_DISC"
                raise RemoteProtocolError("a request after NBD_CMD_DISC")
            self._start += header_size
            request = Request(command, flags, cookie, offset, length)
            if (
                command == _READ
                and not flags & ~read_flags
                and 0 < length <= max_transfer
                and offset + length <= size
                and not (offset | length) & misaligned
            ):
                requests.append(request)
            elif command == _DISC:
                self._disconnected = True
                requests.append(request)
            elif command == _WRITE or flags & _PAYLOAD_LEN:
                if not self._expect_payload(request):
                    requests.append(request)
                elif not self._take_payload(requests):
                    break
            else:
                self._check(request)
                requests.append(request)
        return requests

    def _expect_payload(self, request: Request) -> bool:
        """Get ready for the payload of a request, if it has one, and check the request."""
        length = request.length
        has_payload = bool(request.flags & _PAYLOAD_LEN) if self.extended else request.command == _WRITE
        if not has_payload:
            if self.extended:
                _fail(request, wire.NBD_EINVAL, "NBD_CMD_WRITE without NBD_CMD_FLAG_PAYLOAD_LEN")
            else:
                self._check(request)
            return False
        if length > self._max_payload:
            raise RemoteProtocolError(f"{wire.command_name(request.command)} with a payload of {length} bytes")
        if request.command == _WRITE:
            self._check(request)
        elif request.command != wire.NBD_CMD_BLOCK_STATUS or not self._allows_filter:
            _fail(request, wire.NBD_EINVAL, f"{wire.command_name(request.command)} has no payload")
        elif length > 8 + 4 * len(self.terms.contexts):
            _fail(request, wire.NBD_EINVAL, f"a block status filter of {length} bytes")
        self._due = request
        self._missing = length
        self._sink = None if request.error or not length else memoryview(self._allocate(length)).cast("B")[:length]
        return True

    @property
    def _allows_filter(self) -> bool:
        return bool(self._rules.flags_of.get(wire.NBD_CMD_BLOCK_STATUS, 0) & _PAYLOAD_LEN)

    def _take_payload(self, requests: list[Request]) -> bool:
        """Take from the input what it has of the payload; False while some is still to come."""
        n = min(self._missing, self._end - self._start)
        if self._sink is not None and n:
            place = len(self._sink) - self._missing
            self._sink[place : place + n] = self._input[self._start : self._start + n]
        self._start += n
        self._missing -= n
        if self._missing:
            return False
        self._finish_payload(requests)
        return True

    def _finish_payload(self, requests: list[Request]) -> list[Request]:
        request, sink = self._due, self._sink
        assert request is not None
        self._due = self._sink = None
        if request.command == _WRITE:
            request.data = sink if sink is not None else memoryview(b"")
        elif not request.error:
            self._filter_status(request, sink if sink is not None else memoryview(b""))
        requests.append(request)
        return requests

    def _filter_status(self, request: Request, payload: memoryview) -> None:
        """NBD_CMD_BLOCK_STATUS with a payload: the effect length, and which contexts are wanted."""
        try:
            length, ids = wire.parse_status_request_payload(payload)
        except RemoteProtocolError as exc:
            _fail(request, wire.NBD_EINVAL, str(exc))
            return
        request.length = length
        request.flags &= ~_PAYLOAD_LEN
        if len(set(ids)) != len(ids) or not self.terms.contexts.keys() >= set(ids) or not ids:
            _fail(request, wire.NBD_EINVAL, "unknown or repeated metadata contexts")
        else:
            self._check(request)
            request.contexts = ids

    def _check(self, request: Request) -> None:
        """Set `error` where the request breaks a rule; and give a status request the contexts it asks for."""
        broken = self._rules.broken(request.command, request.flags, request.offset, request.length)
        if broken is not None:
            _fail(request, *broken)
        elif request.command == wire.NBD_CMD_BLOCK_STATUS:
            request.contexts = tuple(self.terms.contexts)

    # -- output -------------------------------------------------------------------------------------------------------

    def read_head(self, request: Request) -> bytes:
        """What comes before the data of a whole read, `request.length` bytes of them, all in one chunk."""
        if not self.structured:
            return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)
        length = request.length
        if not length:  # a content chunk describes at least one byte
            return self.done(request)
        return self._data_head(request, request.offset, length, wire.NBD_REPLY_FLAG_DONE)

    def data_head(self, request: Request, offset: int, length: int, *, done: bool = False) -> bytes:
        """What comes before `length` bytes of data that lie at `offset`, a part of what was asked for."""
        self._check_chunk(request, offset, length)
        return self._data_head(request, offset, length, wire.NBD_REPLY_FLAG_DONE if done else 0)

    def _data_head(self, request: Request, offset: int, length: int, flags: int) -> bytes:
        kind = wire.NBD_REPLY_TYPE_OFFSET_DATA
        if self.extended:
            return wire.EXTENDED_DATA.pack(
                wire.NBD_EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length + 8, offset
            )
        return wire.STRUCTURED_DATA.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length + 8, offset)

    def hole(self, request: Request, offset: int, length: int, *, done: bool = False) -> bytes:
        """A chunk that says: here are zeroes."""
        self._check_chunk(request, offset, length)
        return self._chunk(request, wire.NBD_REPLY_TYPE_OFFSET_HOLE, wire.OFFSET_HOLE.pack(offset, length), done)

    def _check_chunk(self, request: Request, offset: int, length: int) -> None:
        if not self.structured or request.command != _READ:
            raise LocalProtocolError("a content chunk, where only a simple reply is possible")
        if length < 1 or offset < request.offset or offset + length > request.offset + request.length:
            raise LocalProtocolError(f"a chunk of {length} bytes at {offset} for {request}")
        if request.flags & wire.NBD_CMD_FLAG_DF and length != request.length:
            raise LocalProtocolError(f"a chunk of {length} bytes for {request}, which must not be fragmented")

    def done(self, request: Request) -> bytes:
        """The request has succeeded, and there is no (further) payload."""
        if self.extended or (self.structured and request.command in (_READ, wire.NBD_CMD_BLOCK_STATUS)):
            return self._chunk(request, wire.NBD_REPLY_TYPE_NONE, b"", True)
        return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, nbd_error: int, message: str = "", *, offset: int | None = None) -> bytes:
        """The request has failed, at `offset` if that is known.  Always the end of its reply."""
        if not self.structured:
            return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, nbd_error, request.cookie)
        kind = wire.NBD_REPLY_TYPE_ERROR if offset is None else wire.NBD_REPLY_TYPE_ERROR_OFFSET
        return self._chunk(request, kind, wire.error_payload(nbd_error, message, offset), True)

    def status(
        self, request: Request, context_id: int, extents: Iterable[tuple[int, int]], *, done: bool = False
    ) -> bytes:
        """The status of one context from `request.offset` on: (length, status flags) of consecutive extents.

        Equal neighbours are joined, and the whole is cut as the request (NBD_CMD_FLAG_REQ_ONE) and the protocol demand;
        extents beyond the cut are not asked for.  Raises LocalProtocolError where there is no extent at all.
        """
        kept = _cut_extents(extents, request, extended=self.extended)
        if not kept or request.command != wire.NBD_CMD_BLOCK_STATUS or not self.structured:
            raise LocalProtocolError(f"{len(kept)} status extents for {request}")
        kind = wire.NBD_REPLY_TYPE_BLOCK_STATUS_EXT if self.extended else wire.NBD_REPLY_TYPE_BLOCK_STATUS
        return self._chunk(request, kind, wire.status_payload(context_id, kept, extended=self.extended), done)

    def _chunk(self, request: Request, kind: int, payload: bytes, done: bool) -> bytes:
        flags = wire.NBD_REPLY_FLAG_DONE if done else 0
        if self.extended:
            head = wire.EXTENDED_REPLY.pack(
                wire.NBD_EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(payload)
            )
        else:
            head = wire.STRUCTURED_REPLY.pack(
                wire.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload)
            )
        return head + payload


def _fail(request: Request, error: int, message: str) -> None:
    if not request.error:
        request.error = error
        request.message = message


def _cut_extents(extents: Iterable[tuple[int, int]], request: Request, *, extended: bool) -> list[tuple[int, int]]:
    """What of `extents` may be sent in one chunk: see "NBD_REPLY_TYPE_BLOCK_STATUS"."""
    only_one = bool(request.flags & wire.NBD_CMD_FLAG_REQ_ONE)
    longest = request.length if only_one else (1 << 63) - 1
    if not extended:
        longest = min(longest, (1 << 32) - wire.MAX_MIN_BLOCK)
    kept: list[tuple[int, int]] = []
    total = 0
    for length, flags in extents:
        if length < 1:
            raise LocalProtocolError(f"a status extent of {length} bytes")
        joined = bool(kept) and kept[-1][1] == flags
        if joined:
            length += kept.pop()[0]
        elif kept:
            total += kept[-1][0]
            # "the sum of the length fields of the first N-1 extents MUST be less than the requested length"
            if only_one or total >= request.length or len(kept) == wire.MAX_STATUS_EXTENTS:
                break
        kept.append((min(length, longest), flags))
        if length >= longest or total + length >= request.length:
            break
    return kept
