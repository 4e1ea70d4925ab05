"""NBD servers for tests: qemu-nbd and nbdkit, ready when the call returns and gone when its block ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.programs import Argument, Program

_PASS_SOCKET = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
"""Shell: run a program with the socket 3 handed over as systemd does."""


def free_port() -> int:
    """A TCP port of this host that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class NbdKit:
    """A running nbdkit, which got its listening socket from us: clients may connect before it is ready."""

    def __init__(self, nbdkit: Program, folder: Path, *arguments: Argument, port: int | None = None) -> None:
        self.uri = uri_of(folder, "", port)
        if port is not None:
            listener = socket.create_server(("127.0.0.1", port))
        else:
            path = folder / "nbd.sock"
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen()
        with listener:
            words = [nbdkit.path, "-f", *map(str, arguments)]
            self._process = subprocess.Popen(
                ["sh", "-c", f"exec 3<&0 </dev/null; {_PASS_SOCKET}", "sh", *words],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def wait(self) -> int:
        """Wait until it ends by itself: its exit code."""
        return self._process.wait()

    def __enter__(self) -> NbdKit:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextmanager
def nbdkit_at(nbdkit: Program, folder: Path, *arguments: Argument, port: int | None = None) -> Iterator[str]:
    """nbdkit with `arguments`; gives the URI, of a Unix socket unless there is a `port`."""
    with NbdKit(nbdkit, folder, *arguments, port=port) as server:
        yield server.uri


@contextmanager
def qemu_nbd_at(
    qemu_nbd: Program, folder: Path, *arguments: Argument, export: str = "", port: int | None = None
) -> Iterator[str]:
    """qemu-nbd with `arguments`, the image last; gives the URI, of a Unix socket unless there is a `port`."""
    place: list[Argument] = ["-k", folder / "nbd.sock"] if port is None else ["-b", "127.0.0.1", "-p", port]
    name: list[Argument] = ["-x", export] if export else []
    pid_file = folder / "nbd.pid"
    # Its parent waits until the daemon listens and has written its number.
    qemu_nbd("--fork", "-t", "--pid-file", pid_file, *place, *name, *arguments)
    handle = os.pidfd_open(int(pid_file.read_text()))
    try:
        yield uri_of(folder, export, port)
    finally:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [])
        os.close(handle)


def uri_of(folder: Path, export: str, port: int | None) -> str:
    """The URI in QEMU's spelling."""
    if port is not None:
        return f"nbd://127.0.0.1:{port}" + (f"/{export}" if export else "")
    return f"nbd+unix://{'/' + export if export else ''}?socket={folder / 'nbd.sock'}"
