"""NBD servers for tests: qemu-nbd and nbdkit as daemons, ready when the call returns and gone when its block ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.programs import Argument, Program


def free_port() -> int:
    """A TCP port of this host that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def kill_server(pid_file: Path) -> None:
    """Kill a server as a crash would, and wait until it is gone."""
    pid = int(pid_file.read_text())
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.waitid(os.P_PIDFD, handle, os.WEXITED) if _is_child(pid) else _wait_for_end(handle)
    finally:
        os.close(handle)
    pid_file.unlink()


def _is_child(pid: int) -> bool:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()


def _wait_for_end(handle: int) -> None:
    import select

    select.select([handle], [], [])


@contextmanager
def serving(start: Program, pid_file: Path, *arguments: Argument) -> Iterator[None]:
    """Run a server that goes to the background when it listens, until the block ends."""
    start(*arguments)
    try:
        yield
    finally:
        if pid_file.exists():
            kill_server(pid_file)


@contextmanager
def qemu_nbd_at(
    qemu_nbd: Program, folder: Path, *arguments: Argument, export: str = "", port: int | None = None
) -> Iterator[str]:
    """qemu-nbd with `arguments`, the image last; gives the URI, of a Unix socket unless there is a `port`."""
    place: list[Argument] = ["-k", folder / "nbd.sock"] if port is None else ["-b", "127.0.0.1", "-p", port]
    name: list[Argument] = ["-x", export] if export else []
    pid_file = folder / "nbd.pid"
    with serving(qemu_nbd, pid_file, "--fork", "-t", "--pid-file", pid_file, *place, *name, *arguments):
        yield uri_of(folder, export, port)


@contextmanager
def nbdkit_at(nbdkit: Program, folder: Path, *arguments: Argument, port: int | None = None) -> Iterator[str]:
    """nbdkit with `arguments`; gives the URI, of a Unix socket unless there is a `port`."""
    place: list[Argument] = ["-U", folder / "nbd.sock"] if port is None else ["-i", "127.0.0.1", "-p", port]
    pid_file = folder / "nbd.pid"
    (folder / "nbd.sock").unlink(missing_ok=True)
    with serving(nbdkit, pid_file, "-P", pid_file, *place, *arguments):
        yield uri_of(folder, "", port)


def uri_of(folder: Path, export: str, port: int | None) -> str:
    """The URI in QEMU's spelling."""
    if port is not None:
        return f"nbd://127.0.0.1:{port}" + (f"/{export}" if export else "")
    return f"nbd+unix://{'/' + export if export else ''}?socket={folder / 'nbd.sock'}"
