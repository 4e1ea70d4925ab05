"""The bytes of the NBD protocol: constants, message layouts, and their two directions.

Names and words are those of ``doc/proto.md`` of the NetworkBlockDevice project and of its extension "extended headers";
section titles in quotes refer to that document.  All numbers are big-endian and unsigned.  What a `parse_` function is
given comes from the peer: it raises RemoteProtocolError for what does not fit, and allocates nothing by the peer's word.
"""

from __future__ import annotations

import errno as _errno
import sys
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final

from blocklib.errors import RemoteProtocolError

# -- "Newstyle negotiation" --------------------------------------------------------------------------------------------

NBD_MAGIC: Final = 0x4E42444D41474943
"""INIT_PASSWD, "NBDMAGIC": the first 8 bytes of every server."""
NBD_OPTS_MAGIC: Final = 0x49484156454F5054
""""IHAVEOPT": the server's second magic, and the first 8 bytes of every option."""
NBD_OLDSTYLE_MAGIC: Final = 0x00420281861253
"""cliserv_magic: the second magic of the old style, which is not spoken here."""
NBD_REP_MAGIC: Final = 0x3E889045565A9
NBD_DEFAULT_PORT: Final = 10809

GREETING: Final = Struct(">QQH")
"""S: INIT_PASSWD, IHAVEOPT, handshake flags."""
MAGICS: Final = Struct(">QQ")
"""S: INIT_PASSWD and the second magic, which tells what kind of negotiation follows."""
SERVER_FLAGS: Final = Struct(">H")
CLIENT_FLAGS: Final = Struct(">L")
OPTION: Final = Struct(">QLL")
"""C: IHAVEOPT, option, length of option data."""
OPTION_REPLY: Final = Struct(">QLLL")
"""S: reply magic, option, reply type, length of the reply."""
EXPORT_NAME_REPLY: Final = Struct(">QH")
"""S: size of the export, transmission flags; then 124 zeroes unless NBD_FLAG_C_NO_ZEROES was negotiated."""
EXPORT_NAME_ZEROES: Final = 124

# "Handshake flags", "Client flags"
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1

# "Transmission flags"
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_RESIZE: Final = 1 << 9
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11
NBD_FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

# "Option types"
NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_PEEK_EXPORT: Final = 4
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

_OPTION_NAMES: Final = (
    "0",
    "EXPORT_NAME",
    "ABORT",
    "LIST",
    "PEEK_EXPORT",
    "STARTTLS",
    "INFO",
    "GO",
    "STRUCTURED_REPLY",
    "LIST_META_CONTEXT",
    "SET_META_CONTEXT",
    "EXTENDED_HEADERS",
)

# "Option reply types"
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
"""Bit 31: all error reply types have it, and may carry a message for the user."""
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = NBD_REP_FLAG_ERROR + 10

_REPLY_MEANINGS: Final = {
    NBD_REP_ERR_UNSUP: "the server does not know this option",
    NBD_REP_ERR_POLICY: "the server's policy forbids it",
    NBD_REP_ERR_INVALID: "the server finds the request invalid",
    NBD_REP_ERR_PLATFORM: "the server cannot do it on its platform",
    NBD_REP_ERR_TLS_REQD: "the server demands TLS",
    NBD_REP_ERR_UNKNOWN: "the server has no such export",
    NBD_REP_ERR_SHUTDOWN: "the server is shutting down",
    NBD_REP_ERR_BLOCK_SIZE_REQD: "the server demands that its block sizes are kept",
    NBD_REP_ERR_TOO_BIG: "the request or its reply is too large for the server",
    NBD_REP_ERR_EXT_HEADER_REQD: "the server demands extended headers",
}

# NBD_REP_INFO: information types
NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

INFO_EXPORT: Final = Struct(">HQH")
"""NBD_INFO_EXPORT, size of the export, transmission flags: 12 bytes."""
INFO_BLOCK_SIZE: Final = Struct(">HLLL")
"""NBD_INFO_BLOCK_SIZE, minimum, preferred and maximum: 14 bytes."""

# -- "Transmission" ----------------------------------------------------------------------------------------------------

NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

REQUEST: Final = Struct(">LHHQQL")
"""C: magic, command flags, type, cookie, offset, length: 28 bytes."""
EXTENDED_REQUEST: Final = Struct(">LHHQQQ")
"""C: the same with 64 bits of length: 32 bytes."""
SIMPLE_REPLY: Final = Struct(">LLQ")
"""S: magic, error, cookie: 16 bytes."""
STRUCTURED_REPLY: Final = Struct(">LHHQL")
"""S: magic, reply flags, type, cookie, length of payload: 20 bytes."""
EXTENDED_REPLY: Final = Struct(">LHHQQQ")
"""S: magic, reply flags, type, cookie, offset of the request, length of payload: 32 bytes."""
STRUCTURED_DATA: Final = Struct(">LHHQLQ")
"""S: a structured reply's header and the offset that begins an OFFSET_DATA payload, in one."""
EXTENDED_DATA: Final = Struct(">LHHQQQQ")
"""S: the same with an extended reply's header."""

# "Request types"
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

_COMMAND_NAMES: Final = ("READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS")

# "Command flags"
NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

# "Structured reply flags", "Structured reply types"
NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
NBD_REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_FLAG_ERROR + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = NBD_REPLY_TYPE_FLAG_ERROR + 2

MAGIC: Final = Struct(">L")
"""S: the first field of every reply, which tells its layout."""
OFFSET: Final = Struct(">Q")
"""The start of an OFFSET_DATA payload; the data follow."""
OFFSET_HOLE: Final = Struct(">QL")
"""offset, hole size: 12 bytes."""
ERROR: Final = Struct(">LH")
"""error, message length; the message follows, then, for ERROR_OFFSET, an offset."""
STATUS_ID: Final = Struct(">L")
"""The start of a BLOCK_STATUS payload: metadata context ID; descriptors of 32 bits length, 32 bits flags follow."""
STATUS_EXT_ID: Final = Struct(">LL")
"""The start of a BLOCK_STATUS_EXT payload: metadata context ID, descriptor count; descriptors of twice 64 bits follow."""
STATUS_DESCRIPTOR: Final = Struct(">LL")
STATUS_EXT_DESCRIPTOR: Final = Struct(">QQ")

# "The `base:` metadata namespace", and QEMU's (docs/interop/nbd.txt of QEMU)
BASE_ALLOCATION: Final = "base:allocation"
QEMU_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
"""Status: 0 not allocated, 1 in the top layer, 2 in the layer below, and on."""
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""The name of a bitmap follows."""
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1
NBD_STATE_DIRTY: Final = 1 << 0
"""In a qemu:dirty-bitmap context."""

# "Error values"
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

_NBD_ERRORS: Final = {
    _errno.EPERM: NBD_EPERM,
    _errno.EACCES: NBD_EPERM,
    _errno.EROFS: NBD_EPERM,
    _errno.EIO: NBD_EIO,
    _errno.ENOMEM: NBD_ENOMEM,
    _errno.EINVAL: NBD_EINVAL,
    _errno.ENOSPC: NBD_ENOSPC,
    _errno.EDQUOT: NBD_ENOSPC,  # "SHOULD map the EDQUOT and EFBIG errors to NBD_ENOSPC"
    _errno.EFBIG: NBD_ENOSPC,
    _errno.EOVERFLOW: NBD_EOVERFLOW,
    _errno.ENOTSUP: NBD_ENOTSUP,
    _errno.EOPNOTSUPP: NBD_ENOTSUP,
    _errno.ESHUTDOWN: NBD_ESHUTDOWN,
}
_ERRNOS: Final = {
    NBD_EPERM: _errno.EPERM,
    NBD_EIO: _errno.EIO,
    NBD_ENOMEM: _errno.ENOMEM,
    NBD_EINVAL: _errno.EINVAL,
    NBD_ENOSPC: _errno.ENOSPC,
    NBD_EOVERFLOW: _errno.EOVERFLOW,
    NBD_ENOTSUP: _errno.ENOTSUP,
    NBD_ESHUTDOWN: _errno.ESHUTDOWN,
}

# -- limits ------------------------------------------------------------------------------------------------------------

MAX_STRING: Final = 4096
""""Conventions": a string "MUST be no longer than 4096 bytes"."""
DEFAULT_MAX_PAYLOAD: Final = 1 << 25
""""Size constraints": what every server and client takes in one payload when nothing else was agreed on (32 MiB)."""
MAX_MIN_BLOCK: Final = 1 << 16
MAX_STATUS_EXTENTS: Final = 1 << 20
"""Servers SHOULD NOT send more extents than this in one chunk."""
MIN_DF: Final = 1 << 16
"""Reads up to this length can always be asked for unfragmented."""
MAX_EXPORT_SIZE: Final = (1 << 63) - 1
"""Offsets are signed where files live; a larger export is of no use."""


def option_name(option: int) -> str:
    """The name of an option for messages."""
    return f"NBD_OPT_{_OPTION_NAMES[option]}" if 0 < option < len(_OPTION_NAMES) else f"option {option}"


def command_name(command: int) -> str:
    """The name of a command for messages."""
    return f"NBD_CMD_{_COMMAND_NAMES[command]}" if command < len(_COMMAND_NAMES) else f"command {command}"


def reply_meaning(reply_type: int) -> str:
    """What an error reply to an option means."""
    return _REPLY_MEANINGS.get(reply_type, f"the server answers with error {reply_type - NBD_REP_FLAG_ERROR}")


def nbd_error_of(number: int | None) -> int:
    """The NBD error for a host's errno.  What has no counterpart is NBD_EIO: something failed, and not by the request."""
    return _NBD_ERRORS.get(number or 0, NBD_EIO)


def errno_of(nbd_error: int) -> int:
    """The host's errno for an NBD error; "SHOULD treat an unexpected error value as if it had been NBD_EINVAL"."""
    return _ERRNOS.get(nbd_error, _errno.EINVAL)


# -- strings -----------------------------------------------------------------------------------------------------------


def encode_string(text: str) -> bytes:
    """UTF-8 for the wire.  Raises ValueError for a string that "Conventions" forbids: too long, or with a NUL."""
    data = text.encode()
    if len(data) > MAX_STRING:
        raise ValueError(f"a string of {len(data)} bytes; the protocol allows {MAX_STRING}")
    if b"\0" in data:
        raise ValueError("a string with a NUL character; the protocol forbids it")
    return data


def parse_string(data: bytes | memoryview, what: str) -> str:
    """A string from the peer.  Raises RemoteProtocolError where it is too long, has a NUL or is no UTF-8."""
    if len(data) > MAX_STRING:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes; the protocol allows {MAX_STRING}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError(f"{what} is not UTF-8") from exc
    if "\0" in text:
        raise RemoteProtocolError(f"{what} has a NUL character")
    return text


def encode_message(text: str) -> bytes:
    """A message for the peer's user, which must never fail to be sent: what a string may not hold is replaced or cut."""
    data = text.encode("utf-8", "replace").replace(b"\0", b"?")[:MAX_STRING]
    return data.decode("utf-8", "ignore").encode()  # a character that the cut has split goes


def shown(data: bytes | memoryview) -> str:
    """A message from the peer, fit to be shown: whatever it holds, printable and one line."""
    text = bytes(data[:MAX_STRING]).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# -- handshake messages, both directions -------------------------------------------------------------------------------


def option(number: int, data: bytes = b"") -> bytes:
    """C: one option."""
    return OPTION.pack(NBD_OPTS_MAGIC, number, len(data)) + data


def option_reply(number: int, reply_type: int, data: bytes = b"") -> bytes:
    """S: one reply to an option."""
    return OPTION_REPLY.pack(NBD_REP_MAGIC, number, reply_type, len(data)) + data


def go_data(name: str, infos: Sequence[int]) -> bytes:
    """C: data of NBD_OPT_INFO and NBD_OPT_GO: length of name, name, number of information requests, requests."""
    data = encode_string(name)
    return b"".join(
        (
            len(data).to_bytes(4, "big"),
            data,
            len(infos).to_bytes(2, "big"),
            *(info.to_bytes(2, "big") for info in infos),
        )
    )


def parse_go_data(data: bytes) -> tuple[str, frozenset[int]]:
    """(name, information requests) of NBD_OPT_INFO and NBD_OPT_GO.  Raises RemoteProtocolError."""
    if len(data) < 6:
        raise RemoteProtocolError(f"{len(data)} bytes of option data, too few for a name and requests")
    length = int.from_bytes(data[:4], "big")
    if length > len(data) - 6:
        raise RemoteProtocolError(f"an export name of {length} bytes in {len(data)} bytes of option data")
    name = parse_string(data[4 : 4 + length], "the export name")
    count = int.from_bytes(data[4 + length : 6 + length], "big")
    rest = data[6 + length :]
    if len(rest) != 2 * count:
        raise RemoteProtocolError(f"{count} information requests in {len(rest)} bytes")
    infos = frozenset(int.from_bytes(rest[i : i + 2], "big") for i in range(0, len(rest), 2))
    if len(infos) != count:
        raise RemoteProtocolError("an information request more than once")
    return name, infos


def contexts_data(name: str, queries: Sequence[str]) -> bytes:
    """C: data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: name, number of queries, queries."""
    parts = []
    for text in (name, *queries):
        data = encode_string(text)
        parts += [len(data).to_bytes(4, "big"), data]
    parts.insert(2, len(queries).to_bytes(4, "big"))
    return b"".join(parts)


def parse_contexts_data(data: bytes) -> tuple[str, tuple[str, ...]]:
    """(export name, queries) of the two options.  Raises RemoteProtocolError."""
    place = 0

    def take(length: int) -> bytes:
        nonlocal place
        if length > len(data) - place:
            raise RemoteProtocolError(f"{len(data)} bytes of option data end inside a field of {length}")
        place += length
        return data[place - length : place]

    name = parse_string(take(int.from_bytes(take(4), "big")), "the export name")
    count = int.from_bytes(take(4), "big")
    if count > (len(data) - place) // 4:
        raise RemoteProtocolError(f"{count} queries in {len(data) - place} bytes")
    queries = tuple(parse_string(take(int.from_bytes(take(4), "big")), "a query") for _ in range(count))
    if place != len(data):
        raise RemoteProtocolError(f"{len(data) - place} bytes of option data after the last query")
    return name, queries


def server_data(name: str, description: str) -> bytes:
    """S: data of NBD_REP_SERVER: length of name, name, description."""
    data = encode_string(name)
    return len(data).to_bytes(4, "big") + data + encode_string(description)


def parse_server_data(data: bytes) -> tuple[str, str]:
    """(name, description) of NBD_REP_SERVER.  Raises RemoteProtocolError."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 or length > len(data) - 4:
        raise RemoteProtocolError(f"an export name of {length} bytes in a reply of {len(data)}")
    return parse_string(data[4 : 4 + length], "an export name"), shown(data[4 + length :])


def context_data(context_id: int, name: str) -> bytes:
    """S: data of NBD_REP_META_CONTEXT: context ID, name."""
    return context_id.to_bytes(4, "big") + encode_string(name)


def parse_context_data(data: bytes) -> tuple[int, str]:
    """(context ID, name) of NBD_REP_META_CONTEXT.  Raises RemoteProtocolError."""
    if len(data) < 4:
        raise RemoteProtocolError(f"a metadata context in {len(data)} bytes")
    return int.from_bytes(data[:4], "big"), parse_string(data[4:], "the name of a metadata context")


def check_block_sizes(minimum: int, preferred: int, maximum: int) -> None:
    """Raises RemoteProtocolError for constraints that "Size constraints" forbids."""
    if not 1 <= minimum <= MAX_MIN_BLOCK or minimum & (minimum - 1):
        raise RemoteProtocolError(f"a minimum block size of {minimum}: not a power of two up to {MAX_MIN_BLOCK}")
    if preferred < max(minimum, 512) or preferred & (preferred - 1):
        raise RemoteProtocolError(f"a preferred block size of {preferred}: not a power of two from {max(minimum, 512)}")
    if maximum < preferred:
        raise RemoteProtocolError(f"a maximum payload of {maximum} bytes, less than the preferred block of {preferred}")


# -- transmission payloads ---------------------------------------------------------------------------------------------


def error_payload(nbd_error: int, message: str = "", offset: int | None = None) -> bytes:
    """S: payload of NBD_REPLY_TYPE_ERROR, and with `offset` of NBD_REPLY_TYPE_ERROR_OFFSET."""
    text = encode_message(message)
    return ERROR.pack(nbd_error, len(text)) + text + (b"" if offset is None else OFFSET.pack(offset))


def parse_error_payload(data: bytes | memoryview, reply_type: int) -> tuple[int, str, int | None]:
    """(error, message, offset or None) of an error chunk, also of unknown type.  Raises RemoteProtocolError."""
    trailer = 8 if reply_type == NBD_REPLY_TYPE_ERROR_OFFSET else 0
    if len(data) < 6 + trailer:
        raise RemoteProtocolError(f"an error chunk of {len(data)} bytes")
    nbd_error, length = ERROR.unpack_from(data)
    if length > len(data) - 6 - trailer or length > MAX_STRING:
        raise RemoteProtocolError(f"an error message of {length} bytes in a chunk of {len(data)}")
    if nbd_error == 0:
        raise RemoteProtocolError("an error chunk without an error")
    if reply_type in (NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET) and length != len(data) - 6 - trailer:
        raise RemoteProtocolError(f"an error chunk of {len(data)} bytes with a message of {length}")
    offset = OFFSET.unpack_from(data, 6 + length)[0] if trailer else None
    return nbd_error, shown(data[6 : 6 + length]), offset


def status_payload(context_id: int, extents: Sequence[tuple[int, int]], *, extended: bool) -> bytes:
    """S: payload of NBD_REPLY_TYPE_BLOCK_STATUS, or of its extended form; `extents` are (length, status flags)."""
    numbers = [number for extent in extents for number in extent]
    if extended:
        return STATUS_EXT_ID.pack(context_id, len(extents)) + Struct(f">{len(numbers)}Q").pack(*numbers)
    return STATUS_ID.pack(context_id) + Struct(f">{len(numbers)}L").pack(*numbers)


def parse_status_payload(data: bytes | memoryview, *, extended: bool) -> tuple[int, array[int], array[int]]:
    """(context ID, lengths, status flags) of a block status chunk.

    Raises RemoteProtocolError for another length than it must have.
    """
    head, each = (8, 16) if extended else (4, 8)
    count, rest = divmod(len(data) - head, each)
    if count < 1 or rest:
        raise RemoteProtocolError(f"a block status chunk of {len(data)} bytes")
    if extended:
        context_id, stated = STATUS_EXT_ID.unpack_from(data)
        if stated != count:
            raise RemoteProtocolError(f"a block status chunk says {stated} descriptors and has {count}")
    else:
        (context_id,) = STATUS_ID.unpack_from(data)
    numbers = array("Q" if extended else "I")
    numbers.frombytes(data[head:])
    if sys.byteorder == "little":
        numbers.byteswap()
    return context_id, numbers[::2], numbers[1::2]


def status_request_payload(length: int, context_ids: Iterable[int]) -> bytes:
    """C: payload of NBD_CMD_BLOCK_STATUS with NBD_CMD_FLAG_PAYLOAD_LEN: effect length, context IDs to be answered."""
    return OFFSET.pack(length) + b"".join(context_id.to_bytes(4, "big") for context_id in context_ids)


def parse_status_request_payload(data: bytes | memoryview) -> tuple[int, tuple[int, ...]]:
    """(effect length, context IDs).  Raises RemoteProtocolError where the payload has not 8 + n * 4 bytes."""
    if len(data) < 8 or len(data) % 4:
        raise RemoteProtocolError(f"a block status filter of {len(data)} bytes")
    return OFFSET.unpack_from(data)[0], Struct(f">{len(data) // 4 - 2}L").unpack_from(data, 8)
