"""``nbd``: give out an image over the network, with qemu-nbd's options, or list what another server gives out."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, TypeVar

from blocklib.cli.common import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    cache_mode,
    check_objects,
    name_of,
    open_snapshot,
    target_of,
    warn_of_guess,
)
from blocklib.cli.getopt import Given, Option, Syntax, UsageFailure
from blocklib.cli.session import Failure, Session

if TYPE_CHECKING:
    from ssl import SSLContext

    from blocklib.disk import Disk
    from blocklib.node import DetectZeroes

T = TypeVar("T")

SYNTAX = Syntax(
    "FILE",
    "Give out an image by the NBD protocol until its last client has left, or with --list show what a server gives out.",
    (
        Option(("-p", "--port"), "PORT", "TCP port to listen at, or with --list to connect to (default 10809)"),
        Option(("-b", "--bind"), "HOST", "address to listen at, or to connect to (default 0.0.0.0)"),
        Option(("-k", "--socket"), "PATH", "Unix socket to listen at, or to connect to; the path is absolute"),
        Option(("-e", "--shared"), "NUM", "let NUM clients in at a time (default 1; 0: any number)"),
        Option(("-t", "--persistent"), None, "go on when the last client has left"),
        Option(("-v", "--verbose"), None, "tell of clients that come and go"),
        Option(("-x", "--export-name"), "NAME", "name of the export (default: the empty name)"),
        Option(("-D", "--description"), "TEXT", "description of the export, for people"),
        Option(("-o", "--offset"), "OFFSET", "give out the disk from this guest offset on"),
        Option(("-A", "--allocation-depth"), None, "show in which image of the chain data lives"),
        Option(("-B", "--bitmap"), "NAME", "show this dirty bitmap of the image; may be repeated"),
        Option(("-L", "--list"), None, "list what a server gives out"),
        OBJECT,
        Option(("--tls-creds",), "ID", "demand TLS, with the credentials that --object defines"),
        Option(("--tls-authz",), "ID", "let in whom this --object lets in, by the name in their certificate"),
        Option(("--tls-hostname",), "NAME", "with --list: the name that the server's certificate must have"),
        Option(("-T", "--trace"), "EVENTS", "trace events (not supported)"),
        Option(("--fork",), None, "go on in the background, and return once the server is ready"),
        Option(("--pid-file",), "PATH", "write the number of the server's process to a file"),
        Option(("--selinux-label",), "LABEL", "label of the socket (not supported)"),
        Option(("-c", "--connect"), "DEV", "attach a kernel device (not supported: use nbd-client or QEMU's own qemu-nbd)"),
        Option(("-d", "--disconnect"), None, "detach a kernel device (not supported)"),
        FORMAT,
        Option(("-r", "--read-only"), None, "give out the image for reading only"),
        Option(("-s", "--snapshot"), None, "keep what is written in a temporary overlay, which is lost at the end"),
        Option(("-l", "--load-snapshot"), "SNAPSHOT", "give out an internal snapshot, for reading only"),
        Option(("-n", "--nocache"), None, "bypass the host's page cache: short for --cache=none"),
        Option(("--cache",), "MODE", "none, writeback (default), writethrough, directsync or unsafe"),
        Option(("--aio",), "MODE", "how requests made together are kept in flight: threads (default), native, io_uring"),
        Option(("--discard",), "MODE", "what becomes of discards: ignore (default), or unmap"),
        Option(("--detect-zeroes",), "MODE", "find zeroes in what is written: off (default), on or unmap"),
        IMAGE_OPTS,
        OUTPUT,
    ),
)

_OF_EXPORTS = (
    *("-e", "-t", "-x", "-D", "-o", "-A", "-B", "-f", "-r", "-s", "-l", "-n", "--tls-authz", "--fork", "--pid-file"),
    *("--cache", "--aio", "--discard", "--detect-zeroes", "--image-opts"),
)
"""What --list has no use for."""
_UNSUPPORTED = {
    "-c": "-c/--connect: kernel devices are not supported; nbd-client, or QEMU's own qemu-nbd, attaches an export to one",
    "-d": "-d/--disconnect: kernel devices are not supported; nbd-client, or QEMU's own qemu-nbd, detaches them",
    "-T": "-T: tracing is not supported",
    "--selinux-label": "--selinux-label: labels of sockets are not supported",
}
_AIO = {"threads": "threads", "native": "native", "io_uring": "io_uring"}
_DISCARD: dict[str, Literal["ignore", "unmap"]] = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
_DETECT: dict[str, DetectZeroes] = {"off": "off", "on": "on", "unmap": "unmap"}
_FIRST_PASSED = 3
"""The descriptor that socket activation begins with."""


def prepare(session: Session, given: Given) -> int | None:
    """Before there is a thread or an image: go into the background, if that is wanted.

    In the process that was called: the exit code, once the server is ready or has failed.
    """
    session.serves = not given.has("-L")
    _check(given)
    passed = _passed_socket()
    if passed is not None and (given.has("-p") or given.has("-b") or given.has("-k")):
        raise Failure("the socket comes from whoever has started us: -p, -b and -k do not go with that")
    given.listener = passed
    if not given.has("--fork"):
        return None
    if not hasattr(os, "fork"):
        raise Failure("--fork: this system cannot fork")
    hear, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        with open(hear, "rb") as pipe:
            if pipe.read():
                return 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
    os.close(hear)
    os.setsid()
    given.ready = lambda: _leave_terminal(tell)
    return None


def _leave_terminal(tell: int) -> None:
    """The server is ready: what it could print now is nobody's to read."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    os.write(tell, b"1")
    os.close(tell)


def _check(given: Given) -> None:
    for name, why in _UNSUPPORTED.items():
        if given.has(name):
            raise Failure(why)
    if given.has("-L"):
        for name in _OF_EXPORTS:
            if given.has(name):
                raise Failure(f"--list looks at all exports of another server: {name} does not go with it")
        if given.operands:
            raise Failure("--list takes no file")
        return
    if given.has("--tls-hostname"):
        raise Failure("--tls-hostname is for --list")
    if given.has("--tls-authz") and not given.has("--tls-creds"):
        raise Failure("--tls-authz needs --tls-creds")
    if len(given.operands) != 1:
        raise UsageFailure("expects one file name")
    if given.has("-k") and not os.path.isabs(given.last("-k") or ""):
        raise Failure("-k: the path of the socket must be absolute")
    if given.has("-k") and (given.has("-p") or given.has("-b")):
        raise Failure("-k is a Unix socket, -p and -b are TCP")
    if given.has("-n") and given.has("--cache"):
        raise Failure("-n and --cache exclude each other")
    _one_of(given, "--aio", _AIO, "threads")
    discard = _one_of(given, "--discard", _DISCARD, "ignore")
    if _one_of(given, "--detect-zeroes", _DETECT, "off") == "unmap" and discard != "unmap":
        raise Failure("--detect-zeroes=unmap needs --discard=unmap")


def _passed_socket() -> socket.socket | None:
    """The socket that systemd, or libnbd's tools, listen at for us."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if count != "1":
        raise Failure(f"LISTEN_FDS is {count!r}: one socket is what can be used")
    try:
        listener = socket.socket(fileno=_FIRST_PASSED)
        listening = listener.getsockopt(socket.SOL_SOCKET, getattr(socket, "SO_ACCEPTCONN", 30))
    except OSError as exc:
        raise Failure(f"LISTEN_FDS: descriptor {_FIRST_PASSED} is no socket: {exc.strerror}") from exc
    if not listening:
        raise Failure(f"LISTEN_FDS: descriptor {_FIRST_PASSED} does not listen")
    listener.set_inheritable(False)
    return listener


def run(session: Session, given: Given) -> int:
    check_objects(given)
    if given.has("-L"):
        from blocklib.cli.nbd_list import show

        return show(given, _credentials(given, "client"))
    return _serve(session, given)


def _serve(session: Session, given: Given) -> int:
    from blocklib.nbd.server import Server

    shared = _number(given, "-e", 1)
    with ExitStack() as opened:
        disk = _open(session, given, opened)
        offset = _number(given, "-o", 0)
        if offset > disk.size:
            raise Failure(f"-o {offset}: the disk has {disk.size} bytes")
        if given.has("-v"):
            _tell_of_clients(session)
        server = opened.enter_context(
            Server(
                disk,
                listen=given.listener or _address(given),
                name=given.last("-x") or "",
                description=given.last("-D") or "",
                read_only=True if given.has("-r") else None,
                offset=offset,
                bitmaps=given.all("-B"),
                allocation_depth=given.has("-A"),
                tls=_credentials(given, "server"),
                authorize=_authorizer(given),
                shared=shared,
                persistent=given.has("-t"),
            )
        )
        with session.cancelling(server.stop):
            _write_number(given.last("--pid-file"))
            given.ready()
            server.wait()
    return 0


def _open(session: Session, given: Given, opened: ExitStack) -> Disk:
    """The disk that is given out; closed with `opened`."""
    from blocklib.opening import open_disk

    name = name_of(given, given.operands[0])
    cache = cache_mode(given, "--cache", "none" if given.has("-n") else "writeback")
    if given.has("-l"):
        return opened.enter_context(open_snapshot(session, given, name, cache=cache))
    untrusted = given.has("--untrusted")
    write = not (given.has("-r") or given.has("-s"))
    disk = open_disk(
        target_of(name, untrusted=untrusted),
        "r+" if write else "r",
        format=name.format,
        references="deny" if untrusted else "allow",
        guess_raw=not untrusted,
        cache=cache,
        discard=_one_of(given, "--discard", _DISCARD, "ignore"),
        detect_zeroes=_one_of(given, "--detect-zeroes", _DETECT, "off") if write else "off",
        secrets=given.secrets,
        aio=_one_of(given, "--aio", _AIO, "threads"),
    )
    opened.enter_context(disk)
    if write and name.format is None and not name.is_options and disk.chain()[0].driver == "raw":
        warn_of_guess(session, name.text)
    if given.has("-s"):
        from blocklib.cli.overlay import temporary_overlay

        disk = opened.enter_context(temporary_overlay(disk))
    return disk


def _address(given: Given) -> str:
    """The URI to listen at."""
    from urllib.parse import quote

    path = given.last("-k")
    if path is not None:
        return f"nbd+unix:///?socket={quote(path)}"
    host = given.last("-b") or "0.0.0.0"
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port_of(given)}/"


def port_of(given: Given) -> int:
    """The TCP port of -p."""
    port = _number(given, "-p", 10809)
    if port > 65535:
        raise Failure(f"-p {port}: ports go up to 65535")
    return port


def _number(given: Given, option: str, default: int) -> int:
    text = given.last(option)
    if text is None:
        return default
    try:
        number = int(text, 0) if text.isascii() and text[:1].isdigit() else -1
    except ValueError:
        number = -1
    if number < 0:
        raise Failure(f"{option} {text}: not a number from 0 on")
    return number


def _one_of(given: Given, option: str, choices: dict[str, T], default: str) -> T:
    text = given.last(option) or default
    if text not in choices:
        raise Failure(f"{option} {text}: no such mode; there are {', '.join(choices)}")
    return choices[text]


def _credentials(given: Given, endpoint: str) -> SSLContext | None:
    name = given.last("--tls-creds")
    if name is None:
        return None
    import ssl

    found = given.secrets.get(name)
    if not isinstance(found, ssl.SSLContext):
        raise Failure(f"--tls-creds {name}: no --object defines TLS credentials with this id")
    if (found.protocol == ssl.PROTOCOL_TLS_SERVER) != (endpoint == "server"):
        raise Failure(f"--tls-creds {name}: credentials with endpoint={endpoint} are needed here")
    return found


def _authorizer(given: Given) -> Callable[[str], bool] | None:
    name = given.last("--tls-authz")
    if name is None:
        return None
    if name not in given.authorizers:
        raise Failure(f"--tls-authz {name}: no --object says with this id who is let in")
    return given.authorizers[name]


def _write_number(path: str | None) -> None:
    if path is None:
        return
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as exc:
        raise Failure(f"--pid-file {path}: {exc.strerror}") from exc


def _tell_of_clients(session: Session) -> None:
    """What the server has to tell goes to standard error."""
    import logging

    from blocklib.cli.output import print_error

    class Printer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print_error(session.program, record.getMessage())

    log = logging.getLogger("blocklib.nbd")
    log.addHandler(Printer())
    log.setLevel(logging.INFO)
