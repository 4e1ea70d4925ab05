"""Which options there are: one table per driver for opening, creating and amending, in the names of QEMU's QAPI schema.

A default of None means that nothing is assumed when the option is not given: who opens the node takes the value from
the node above, from the image or from the caller's keywords.  Sizes and offsets are bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from blocklib.drivers import check_name
from blocklib.errors import OptionError
from blocklib.options.faults import EVENTS, IO_TYPES, PERMISSIONS
from blocklib.sizes import MAX_SIZE, GiB, MiB

Kind: TypeAlias = Literal[
    "str", "name", "bool", "int", "size", "choice", "node", "secret", "throttle-group", "tls", "choices", "list"
]
"""`name` is the name of a node; `secret` a Secret and `tls` an ssl.SSLContext, or the id of one; `throttle-group` a
ThrottleGroup, or the id of one; `choices` is a list of choices, `list` one of groups of options; `node` is a child: nested
options, a name of a node or file, an open disk, or None."""
Table: TypeAlias = Literal["open", "create", "amend"]


class Option(NamedTuple):
    """One option of one driver; `name` is dotted, `help` one line."""

    name: str
    kind: Kind
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    """What a `choice` may be; for an `int`, the numbers that make sense, as text."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Other spellings of choices: (spelling, choice)."""
    minimum: int = 0
    maximum: int = MAX_SIZE
    power_of_two: bool = False
    required: bool = False
    items: tuple[Any, ...] = ()
    """The options, each an Option, of one entry of a `list`."""


_UINT32 = (1 << 32) - 1
_WEEK = 7 * 24 * 3600
_PREALLOCATED_FILE = ("off", "falloc", "full")

COMMON: tuple[Option, ...] = (
    Option("driver", "str", "Name of the driver"),
    Option("node-name", "name", "Name of the node in the graph"),
    Option(
        "discard",
        "choice",
        "What becomes of discard requests: passed on, or dropped",
        choices=("ignore", "unmap"),
        aliases=(("off", "ignore"), ("on", "unmap")),
    ),
    Option(
        "detect-zeroes",
        "choice",
        "Whether writes of zero bytes become write-zeroes requests, and those may unmap",
        default="off",
        choices=("off", "on", "unmap"),
    ),
    Option("cache.direct", "bool", "Bypass the page cache of the host (O_DIRECT)"),
    Option("cache.no-flush", "bool", "Ignore flushes: faster, and not safe against a crash of the host"),
    Option("read-only", "bool", "Open for reading only"),
    Option("auto-read-only", "bool", "Fall back to reading only where writing is not permitted"),
    Option("force-share", "bool", "Take no locks and accept writers elsewhere; needs read-only"),
)

_FILE: tuple[Option, ...] = (
    Option("filename", "str", "Path of the file or device, taken literally", required=True),
    Option(
        "locking",
        "choice",
        "Whether to lock the file against other programs; auto: where the host has locks on open files",
        default="auto",
        choices=("auto", "on", "off"),
    ),
    Option(
        "aio",
        "choice",
        "How requests made together are kept on their way; native (with cache.direct): whatever is best here",
        default="threads",
        choices=("threads", "native", "io_uring"),
    ),
)

_NBD: tuple[Option, ...] = (
    Option("filename", "str", "NBD URI of the export, instead of server.* and export"),
    Option("server.type", "choice", "How the server is reached", choices=("inet", "unix", "fd")),
    Option("server.host", "str", "Its host, for inet"),
    Option("server.port", "str", "Its port, for inet (default: 10809)"),
    Option("server.path", "str", "Path of its socket, for unix"),
    Option("server.abstract", "bool", "The path is an abstract name"),
    Option("server.str", "str", "Number of an open socket, for fd"),
    Option("host", "str", "Old name of server.host"),
    Option("port", "str", "Old name of server.port"),
    Option("path", "str", "Old name of server.path"),
    Option("export", "str", "Name of the export (default: the empty one)"),
    Option("tls-creds", "tls", "TLS credentials; with them nothing is said in clear text"),
    Option("tls-hostname", "str", "Name that the server's certificate must have (default: its host)"),
    Option("x-dirty-bitmap", "str", "Metadata context to be shown instead of base:allocation"),
    Option("reconnect-delay", "int", "Seconds that requests wait for a lost connection to come back", default=0, maximum=_WEEK),
    Option("open-timeout", "int", "Seconds that opening waits for the server to appear", default=0, maximum=_WEEK),
    Option("request-timeout", "int", "Seconds of silence until a server is given up; 0: never", default=300, maximum=_WEEK),
    Option("connections", "int", "Most connections to a server that allows several", default=4, minimum=1, maximum=64),
)

_QCOW2: tuple[Option, ...] = (
    Option("file", "node", "The node or file that holds the image", required=True),
    Option("backing", "node", "The backing node instead of the one the image names; null for none at all"),
    Option("data-file", "node", "The node or file that holds the guest's data instead of the one the image names"),
    Option("lazy-refcounts", "bool", "Reference counts may wait for the close; default: what the image says"),
    Option("pass-discard-request", "bool", "Where discard is unmap, discard in the file what becomes free", default=True),
    Option("pass-discard-other", "bool", "Discard in the file what becomes free for any other reason", default=False),
    Option("pass-discard-snapshot", "bool", "Discard in the file what becomes free with a deleted snapshot", default=True),
    Option("discard-no-unref", "bool", "Keep the clusters of discarded ranges, without their space", default=False),
    Option("cache-size", "size", "Memory for both metadata caches together"),
    Option("l2-cache-size", "size", "Memory for the cache of L2 tables"),
    Option(
        "l2-cache-entry-size",
        "size",
        "How much of an L2 table is loaded at once; a power of two, at most the cluster size",
        minimum=512,
        maximum=2 * MiB,
        power_of_two=True,
    ),
    Option("refcount-cache-size", "size", "Memory for the cache of refcount blocks"),
    Option(
        "cache-clean-interval",
        "int",
        "Seconds after which unused tables leave the caches; 0: never (default: 600)",
        maximum=_UINT32,
    ),
    Option("snapshot.id", "str", "Read the snapshot with this ID instead of the present state"),
    Option("snapshot.name", "str", "Read the snapshot of this name instead of the present state"),
    Option(
        "overlap-check",
        "choice",
        "Which structures of the image no write may hit: none, constant (those in known places), cached (default), all",
        choices=("none", "constant", "cached", "all"),
    ),
    Option(
        "overlap-check.template",
        "choice",
        "The same, to be combined with the single ones",
        choices=("none", "constant", "cached", "all"),
    ),
    Option("overlap-check.main-header", "bool", "No write may hit the header"),
    Option("overlap-check.active-l1", "bool", "No write may hit the active L1 table"),
    Option("overlap-check.active-l2", "bool", "No write may hit an active L2 table"),
    Option("overlap-check.refcount-table", "bool", "No write may hit the refcount table"),
    Option("overlap-check.refcount-block", "bool", "No write may hit a refcount block"),
    Option("overlap-check.snapshot-table", "bool", "No write may hit the snapshot table"),
    Option("overlap-check.inactive-l1", "bool", "No write may hit the L1 table of a snapshot"),
    Option("overlap-check.inactive-l2", "bool", "No write may hit an L2 table of a snapshot; they are read for that"),
    Option("overlap-check.bitmap-directory", "bool", "No write may hit the bitmap directory"),
    Option("encrypt.format", "choice", "How the image must be encrypted; default: as it says", choices=("aes", "luks")),
    Option("encrypt.key-secret", "secret", "The secret that opens an encrypted image"),
)

_INT32 = (1 << 31) - 1
_RULE: tuple[Option, ...] = (
    Option("event", "choice", "What has to happen first; none: nothing", choices=EVENTS, required=True),
    Option("state", "int", "The state that the rules must be in; 0: any", default=0, maximum=_INT32),
)
_BLKDEBUG: tuple[Option, ...] = (
    Option("image", "node", "The node whose requests fail", required=True),
    Option("align", "size", "Alignment that requests get", minimum=1, maximum=_INT32, power_of_two=True),
    Option("max-transfer", "size", "Most bytes of a request that reads or writes", minimum=1, maximum=_INT32),
    Option("opt-write-zero", "size", "Unit of requests for zeroes", minimum=1, maximum=_INT32),
    Option("max-write-zero", "size", "Most bytes of a request for zeroes", minimum=1, maximum=_INT32),
    Option("opt-discard", "size", "Unit of discards", minimum=1, maximum=_INT32),
    Option("max-discard", "size", "Most bytes of a discard", minimum=1, maximum=_INT32),
    Option(
        "inject-error",
        "list",
        "Requests that fail, wait, or are the last",
        default=(),
        items=(
            *_RULE,
            Option("iotype", "choice", "Kind of request; default: all but truncate", choices=IO_TYPES),
            Option("errno", "int", "Error number that the request gets; 0: none", default=errno.EIO, maximum=4095),
            Option("sector", "int", "512 bytes that the request must touch, by number", maximum=MAX_SIZE // 512),
            Option("once", "bool", "Act once, and never again", default=False),
            Option("immediately", "bool", "Fail when the event happens, before any request", default=False),
            Option("skip", "int", "How many requests that it is right for pass before the first", default=0, maximum=MAX_SIZE),
            Option("every", "int", "Act on each n-th request from then on", default=1, minimum=1, maximum=MAX_SIZE),
            Option("latency-ms", "int", "Milliseconds that the request waits before anything", default=0, maximum=_INT32),
            Option("short", "size", "Bytes that are moved all the same, from the beginning of the request"),
            Option("exit", "bool", "The process is killed then", default=False),
        ),
    ),
    Option(
        "set-state",
        "list",
        "Events that change the state",
        default=(),
        items=(*_RULE, Option("new_state", "int", "The state afterwards", required=True, minimum=1, maximum=_INT32)),
    ),
    Option("take-child-perms", "choices", "Permissions to take besides", default=(), choices=PERMISSIONS),
    Option("unshare-child-perms", "choices", "Permissions not to share with others", default=(), choices=PERMISSIONS),
)

OPEN: Mapping[str, tuple[Option, ...]] = {
    "blkdebug": _BLKDEBUG,
    "file": _FILE,
    "host_device": _FILE,
    "memory": (Option("size", "size", "Size of the disk", default=0),),
    "nbd": _NBD,
    "null-co": (
        Option("size", "size", "Size of the disk", default=1 * GiB),
        Option("read-zeroes", "bool", "Reads give zeroes; otherwise their buffers are left alone", default=False),
    ),
    "qcow2": _QCOW2,
    "raw": (
        Option("file", "node", "The node or file that holds the bytes", required=True),
        Option("offset", "size", "Where in it the disk begins", default=0),
        Option("size", "size", "Size of the disk; default: up to the end of the file"),
    ),
    "blklogwrites": (
        Option("file", "node", "The node whose changes are logged", required=True),
        Option("log", "node", "The node or file that the log is written to", required=True),
        Option(
            "log-sector-size",
            "size",
            "Sector size of a new log and of its entries; a power of two (default: 512)",
            minimum=512,
            maximum=8 * MiB,
            power_of_two=True,
        ),
        Option("log-append", "bool", "Go on with the log that is there", default=False),
        Option(
            "log-super-update-interval",
            "int",
            "Entries after which the superblock, which counts them, is written; every flush writes it too",
            default=4096,
            minimum=1,
        ),
    ),
    "blkverify": (
        Option("raw", "node", "The node that is right", required=True),
        Option("test", "node", "The node that is compared with it", required=True),
    ),
    "compress": (Option("file", "node", "The image whose new clusters are written compressed", required=True),),
    "copy-before-write": (
        Option("file", "node", "The node whose present content is kept", required=True),
        Option("target", "node", "Where what is about to be overwritten is copied to first", required=True),
        Option("bitmap.node", "str", "Node name of the image that has the bitmap (default: the top one)"),
        Option("bitmap.name", "str", "The dirty bitmap that marks what is kept; default: all of the disk"),
        Option(
            "on-cbw-error",
            "choice",
            "What fails where the copy fails: the write that waits for it (default), or the copy as a whole",
            default="break-guest-write",
            choices=("break-guest-write", "break-snapshot"),
        ),
        Option("cbw-timeout", "int", "Seconds after which a copy counts as failed; 0: never", default=0, maximum=_UINT32),
    ),
    "copy-on-read": (
        Option("file", "node", "The image that keeps what is read from below it", required=True),
        Option("bottom", "str", "Node name of the last image of the chain whose data is kept"),
    ),
    "throttle": (
        Option("file", "node", "The node that is throttled", required=True),
        Option("throttle-group", "throttle-group", "The limits, and who shares them", required=True),
    ),
}
"""What each driver takes when opened, beside COMMON."""

_SIZE = Option("size", "size", "Virtual disk size in bytes")
_CREATE_FILE: tuple[Option, ...] = (
    Option("extent_size_hint", "size", "Extents to ask the file system for (XFS); 0: none", maximum=4 * GiB - 1),
    Option("nocow", "bool", "Write in place where the file system would copy (btrfs)", default=False),
    Option(
        "preallocation",
        "choice",
        f"How much of the file is allocated beforehand ({', '.join(_PREALLOCATED_FILE)}; default: off)",
        default="off",
        choices=_PREALLOCATED_FILE,
    ),
    _SIZE,
)

_HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
_CREATE_ENCRYPTED: tuple[Option, ...] = (
    Option("encryption", "bool", "Old name of encrypt.format=aes (default: off)", default=False),
    Option("encrypt.format", "choice", "Encrypt the image (luks; aes, for old programs, is weak)", choices=("aes", "luks")),
    Option("encrypt.key-secret", "secret", "Id of the secret that will open the image"),
    Option(
        "encrypt.cipher-alg",
        "choice",
        "Cipher (aes-128, aes-192, aes-256; default: aes-256)",
        choices=("aes-128", "aes-192", "aes-256"),
    ),
    Option(
        "encrypt.cipher-mode",
        "choice",
        "Mode of the cipher (xts, cbc, ctr, ecb; default: xts)",
        choices=("xts", "cbc", "ctr", "ecb"),
    ),
    Option(
        "encrypt.ivgen-alg",
        "choice",
        "What a sector's IV is made of (plain, plain64, essiv; default: plain64)",
        choices=("plain", "plain64", "essiv"),
    ),
    Option("encrypt.ivgen-hash-alg", "choice", "Hash for essiv (default: sha256)", choices=_HASHES),
    Option("encrypt.hash-alg", "choice", "Hash that protects the key (default: sha256)", choices=_HASHES),
    Option(
        "encrypt.iter-time",
        "int",
        "Milliseconds that opening a key slot shall take (default, and 0: 2000)",
        maximum=3_600_000,
    ),
)

CREATE: Mapping[str, tuple[Option, ...]] = {
    "file": _CREATE_FILE,
    "qcow2": (
        Option("backing_file", "str", "Image that shows through where this one holds no data"),
        Option("backing_fmt", "str", "Format of the backing file"),
        Option(
            "cluster_size",
            "size",
            "Unit of allocation: a power of two from 512 to 2M (default: 64k)",
            default=65536,
            minimum=512,
            maximum=2 * MiB,
            power_of_two=True,
        ),
        Option(
            "compat",
            "choice",
            "Version of the format: 0.10 (or v2), 1.1 (or v3; default)",
            default="1.1",
            choices=("0.10", "1.1"),
            aliases=(("v2", "0.10"), ("v3", "1.1")),
        ),
        Option(
            "compression_type",
            "choice",
            "How compressed clusters are packed (zlib, zstd; default: zlib)",
            default="zlib",
            choices=("zlib", "zstd"),
        ),
        Option("data_file", "str", "File that holds the guest's data, each byte at its guest offset"),
        Option("data_file_raw", "bool", "Keep the data file readable as a raw image (default: off)", default=False),
        Option("extended_l2", "bool", "Divide clusters into 32 subclusters (default: off)", default=False),
        *_CREATE_ENCRYPTED,
        Option("lazy_refcounts", "bool", "Postpone updates of reference counts (default: off)", default=False),
        Option(
            "preallocation",
            "choice",
            "How much is allocated beforehand (off, metadata, falloc, full; default: off)",
            default="off",
            choices=("off", "metadata", "falloc", "full"),
        ),
        Option(
            "refcount_bits",
            "int",
            "Bits per reference count (1, 2, 4, 8, 16, 32, 64; default: 16)",
            default=16,
            choices=("1", "2", "4", "8", "16", "32", "64"),
        ),
        _SIZE,
    ),
    "raw": (_SIZE,),
}
"""What each driver takes when an image is created; a format also takes what it leaves to the file."""

_CHANGED_BY_AMEND = (
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "encrypt.iter-time",
    "lazy_refcounts",
    "refcount_bits",
    "size",
)

AMEND: Mapping[str, tuple[Option, ...]] = {
    "qcow2": (
        *(option._replace(default=None) for option in CREATE["qcow2"] if option.name in _CHANGED_BY_AMEND),
        Option("encrypt.state", "choice", "What a key slot becomes (active, inactive)", choices=("active", "inactive")),
        Option("encrypt.new-secret", "secret", "Id of the secret that an active key slot is for"),
        Option("encrypt.old-secret", "secret", "Id of the secret whose key slots are erased"),
        Option("encrypt.keyslot", "int", "Which key slot (0 to 7)", maximum=7),
    ),
}
"""What of an image can be changed later; None: stays as it is."""


def options_of(driver: str, table: Table = "open") -> dict[str, Option]:
    """The options of a driver by name.  Raises OptionError for an unknown driver, or one that creates nothing."""
    check_name(driver)
    if table == "open":
        return {option.name: option for option in (*COMMON, *OPEN[driver])}
    if table == "amend":
        if driver not in AMEND:
            raise OptionError(
                f"images of the format {driver} cannot be amended", option="driver", driver=driver, choices=sorted(AMEND)
            )
        return {option.name: option for option in AMEND[driver]}
    if driver not in CREATE:
        able = ", ".join(sorted(CREATE))
        raise OptionError(
            f"driver {driver!r} creates no files; these do: {able}",
            option="driver",
            driver=driver,
            choices=sorted(CREATE),
        )
    return {option.name: option for option in CREATE[driver]}
