"""Locks on image files: which bytes, who excludes whom, and that nothing is left or lost on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocklib import graph
from blocklib.errors import LockedError, StorageError
from blocklib.graph import ALL, Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED
from blocklib.protocols import locks
from blocklib.protocols.file import FileNode
from tests.nodes import descriptors_of, locked_bytes, used

EXCLUSIVE = ALL & ~(WRITE | RESIZE)
"""Shared permissions of an image format that is being written."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def opened(path: Path, *, read_only: bool = True, **options: bool) -> FileNode:
    node = FileNode(None, str(path), read_only=read_only, **options)  # type: ignore[arg-type]
    node.load()
    return node


@contextmanager
def python(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs `code`; it is told to end by closing its standard input."""
    search = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    try:
        yield process
    finally:
        process.communicate(timeout=60)
        assert process.returncode == 0


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLDER = """
import sys
from blocklib.protocols.file import FileNode
from tests.nodes import used
node = FileNode(None, sys.argv[1], read_only=False)
node.load()
with used(node, int(sys.argv[2]), int(sys.argv[3])):
    print("ready", flush=True)
    sys.stdin.read()
"""


# -- which bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "shared", "expected"),
    [
        (0, ALL, set()),
        (CONSISTENT_READ, ALL, {100}),
        (CONSISTENT_READ | WRITE, ALL, {100, 101}),
        (CONSISTENT_READ | WRITE | RESIZE, EXCLUSIVE, {100, 101, 103, 201, 203}),
        (ALL, 0, {100, 101, 102, 103, 200, 201, 202, 203}),
        (WRITE_UNCHANGED, CONSISTENT_READ, {102, 201, 202, 203}),
    ],
)
def test_the_locked_bytes_are_qemus(path: Path, wanted: int, shared: int, expected: set[int]) -> None:
    with used(opened(path, read_only=False), wanted, shared):
        assert locked_bytes(path) == expected
    assert locked_bytes(path) == set()


def test_permissions_are_called_as_in_the_graph() -> None:
    assert dict(enumerate(locks.PERMISSIONS)) == {bit.bit_length() - 1: name for bit, name in graph.PERMISSION_NAMES.items()}


def test_users_of_one_node_share_its_locks(path: Path) -> None:
    node = opened(path, read_only=False)
    with used(node, CONSISTENT_READ):
        with used(node, WRITE, ALL & ~RESIZE):
            assert locked_bytes(path) == {100, 101, 203}
        assert locked_bytes(path) == {100}


def test_only_the_difference_to_what_is_held_is_locked_and_unlocked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    real = locks._set_lock

    def recorded(fd: int, byte: int, *, locked: bool) -> None:
        calls.append((byte, locked))
        real(fd, byte, locked=locked)

    with used(opened(path, read_only=False), CONSISTENT_READ | WRITE, ALL & ~WRITE) as edge:
        monkeypatch.setattr(locks, "_set_lock", recorded)
        with Transaction() as change:
            change.set_permissions(edge, wanted=CONSISTENT_READ | RESIZE, shared=ALL & ~WRITE)
        assert calls == [(103, True), (101, False)]


# -- who excludes whom -------------------------------------------------------------------------------------------------


def test_readers_share(path: Path) -> None:
    with used(opened(path), CONSISTENT_READ, EXCLUSIVE):
        with used(opened(path), CONSISTENT_READ, EXCLUSIVE):
            pass


def test_writers_that_share_writing_share(path: Path) -> None:
    with used(opened(path, read_only=False), WRITE):
        with used(opened(path, read_only=False), WRITE):
            pass


def test_two_nodes_of_one_process_exclude_each_other(path: Path) -> None:
    with used(opened(path, read_only=False), CONSISTENT_READ | WRITE, EXCLUSIVE):
        second = opened(path, read_only=False)
        with pytest.raises(LockedError, match="another node of this process") as caught:
            with used(second, CONSISTENT_READ | WRITE, EXCLUSIVE):
                pass
        assert caught.value.permission == "write"
        assert caught.value.pid == os.getpid()
        assert caught.value.filename == str(path)
        assert isinstance(caught.value, BlockingIOError)
        assert second.parents == []
        second.close()


@pytest.mark.parametrize(
    ("wanted", "shared", "permission"),
    [
        (CONSISTENT_READ | WRITE, ALL, "write"),
        (CONSISTENT_READ | RESIZE, ALL, "resize"),
        (CONSISTENT_READ, ALL & ~WRITE, "write"),
        (0, ALL & ~CONSISTENT_READ, "consistent read"),
    ],
)
def test_the_error_names_the_permission_and_the_other_process(path: Path, wanted: int, shared: int, permission: str) -> None:
    with python(HOLDER, path, CONSISTENT_READ | WRITE, EXCLUSIVE) as other:
        assert said(other) == "ready"
        node = opened(path, read_only=False)
        with pytest.raises(LockedError) as caught:
            with used(node, wanted, shared):
                pass
        node.close()
        assert (caught.value.permission, caught.value.pid) == (permission, other.pid)
        assert f"pid {other.pid}" in str(caught.value)
        assert permission in str(caught.value)
        assert str(path) in str(caught.value)
    with used(opened(path, read_only=False), CONSISTENT_READ | WRITE, EXCLUSIVE):
        pass


def test_a_refused_claim_leaves_the_locks_as_they_were(path: Path) -> None:
    with python(HOLDER, path, RESIZE, ALL & ~RESIZE) as other:
        assert said(other) == "ready"
        with used(opened(path, read_only=False), CONSISTENT_READ) as edge:
            before = locked_bytes(path)
            with pytest.raises(LockedError):
                with Transaction() as change:
                    change.set_permissions(edge, wanted=ALL, shared=0)
            assert locked_bytes(path) == before == {100}
            assert (edge.wanted, edge.shared) == (CONSISTENT_READ, ALL)
            with Transaction() as change:  # what does not conflict still goes
                change.set_permissions(edge, wanted=CONSISTENT_READ | WRITE, shared=ALL)
            assert locked_bytes(path) == {100, 101}


def test_a_change_that_fails_elsewhere_gives_the_new_locks_back(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    with used(opened(other, read_only=False), WRITE, EXCLUSIVE), used(opened(path, read_only=False)) as edge:
        blocked = opened(other, read_only=False)

        def change_both() -> None:
            with Transaction() as change:
                change.set_permissions(edge, wanted=ALL, shared=EXCLUSIVE)
                change.attach(None, "user", blocked, wanted=WRITE)

        with pytest.raises(LockedError):
            change_both()
        blocked.close()
        assert locked_bytes(path) == {100}


def test_a_write_lock_of_another_program_is_a_conflict(path: Path) -> None:
    with path.open("r+b") as file:
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0)
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, request)
        node = opened(path, read_only=False)
        with pytest.raises(LockedError) as caught:
            with used(node, CONSISTENT_READ | WRITE):
                pass
        node.close()
        assert caught.value.permission == "write"


# -- where nothing is locked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"force_share": True}, {"locking": "off"}])
def test_force_share_and_locking_off_neither_lock_nor_look(path: Path, options: dict[str, bool]) -> None:
    with used(opened(path, read_only=False), ALL, 0):
        before = locked_bytes(path)
        with used(opened(path, **options), CONSISTENT_READ, EXCLUSIVE):
            assert locked_bytes(path) == before


def test_where_the_host_has_no_such_locks_there_are_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> bool:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(locks, "_is_locked_elsewhere", unsupported)
    with used(opened(path, read_only=False), ALL, 0):
        assert locked_bytes(path) == set()
    node = FileNode(None, str(path), read_only=True, locking="on")
    with pytest.raises(StorageError, match="locking=on"):
        node.load()
    assert descriptors_of(path) == []


def test_a_host_that_fails_to_lock_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = locks._set_lock

    def fails_at_resize(fd: int, byte: int, *, locked: bool) -> None:
        if byte == 103 and locked:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(fd, byte, locked=locked)

    monkeypatch.setattr(locks, "_set_lock", fails_at_resize)
    node = opened(path, read_only=False)
    with pytest.raises(StorageError) as caught:
        with used(node, ALL):
            pass
    assert (caught.value.errno, caught.value.operation) == (errno.ENOLCK, "lock")
    assert locked_bytes(path) == set()
    node.close()


# -- how long they last ------------------------------------------------------------------------------------------------


def test_another_descriptor_of_the_file_comes_and_goes_without_a_trace(path: Path) -> None:
    with used(opened(path, read_only=False), WRITE, EXCLUSIVE):
        path.read_bytes()
        assert locked_bytes(path) == {101, 201, 203}


def test_a_reopen_carries_the_locks_over(path: Path) -> None:
    node = opened(path)
    with used(node, CONSISTENT_READ, EXCLUSIVE) as edge:
        with Transaction() as change:
            change.reopen(node, read_only=False)
            change.set_permissions(edge, wanted=CONSISTENT_READ | WRITE, shared=EXCLUSIVE)
        assert locked_bytes(path) == {100, 101, 201, 203}
        edge.write(0, [b"x"])
        with Transaction() as change:
            change.set_permissions(edge, wanted=CONSISTENT_READ, shared=ALL)
            change.reopen(node, read_only=True)
        assert locked_bytes(path) == {100}
        assert len(descriptors_of(path)) == 1


def test_a_bare_reopen_carries_the_locks_over(path: Path) -> None:
    node = opened(path)
    with used(node, CONSISTENT_READ, EXCLUSIVE):
        node.prepare_reopen(read_only=False).commit()
        assert locked_bytes(path) == {100, 201, 203}
        node.prepare_reopen(read_only=True).abort()
        assert locked_bytes(path) == {100, 201, 203}


def test_there_is_no_moment_without_locks_during_a_reopen(path: Path) -> None:
    node = opened(path)
    with used(node, CONSISTENT_READ, EXCLUSIVE):
        reopen = node.prepare_reopen(read_only=False)
        claim = node.prepare_permissions(CONSISTENT_READ | WRITE, EXCLUSIVE)
        assert claim is not None
        (old, new) = sorted(descriptors_of(path))
        for fd in (old, new):
            info = Path(f"/proc/self/fdinfo/{fd}").read_text()
            assert sum(line.startswith("lock:") for line in info.splitlines()) == 3  # 100-101, 201, 203
        reopen.commit()
        claim.commit()
        assert locked_bytes(path) == {100, 101, 201, 203}


def test_a_reopen_that_conflicts_leaves_mode_locks_and_descriptor(path: Path) -> None:
    with python(HOLDER, path, CONSISTENT_READ, ALL & ~WRITE) as other:
        assert said(other) == "ready"
        node = opened(path)
        with used(node, CONSISTENT_READ) as edge:

            def become_writable() -> None:
                with Transaction() as change:
                    change.reopen(node, read_only=False)
                    change.set_permissions(edge, wanted=CONSISTENT_READ | WRITE, shared=ALL)

            with pytest.raises(LockedError):
                become_writable()
            assert node.read_only
            assert locked_bytes(path) == {100}
            assert len(descriptors_of(path)) == 1


FORKING = """
import os, sys
from blocklib.protocols.file import FileNode
from tests.nodes import used, locked_bytes
node = FileNode(None, sys.argv[1], read_only=False)
node.load()
ready_read, ready_write = os.pipe()
end_read, end_write = os.pipe()
with used(node, 2, 0b0101):
    child = os.fork()
    if child == 0:
        if sys.argv[2] == "abandon":
            node.abandon()
        os.write(ready_write, b"x")
        os.close(end_write)
        os.read(end_read, 1)
        os._exit(0)
    os.read(ready_read, 1)
    print(sorted(locked_bytes(sys.argv[1])), flush=True)
print(sorted(locked_bytes(sys.argv[1], child)), flush=True)
os.close(end_write)
os.waitpid(child, 0)
"""


def test_a_forked_child_that_lets_go_does_not_unlock_the_parents_file(path: Path) -> None:
    with python(FORKING, path, "abandon") as process:
        assert said(process) == "[101, 201, 203]"
        assert said(process) == "[]"


def test_a_forked_child_does_not_keep_the_file_locked_after_the_parent_closed_it(path: Path) -> None:
    with python(FORKING, path, "idle") as process:
        assert said(process) == "[101, 201, 203]"
        assert said(process) == "[]"
