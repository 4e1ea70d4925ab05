"""Locks on image files, seen from QEMU and by QEMU: whoever comes second is refused in both directions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocklib.errors import LockedError
from blocklib.formats.raw import RawNode
from blocklib.graph import ALL
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE
from blocklib.protocols.file import FileNode
from tests.nodes import attached, locked_bytes, used
from tests.programs import Program

SIZE = 1 << 20
PROMPT = "qemu-io> "
READ_WRITE = CONSISTENT_READ | WRITE
FORMAT_SHARES = ALL & ~(WRITE | RESIZE)
"""What a format that keeps metadata lets others do with its file."""


@pytest.fixture
def raw(tmp_path: Path, qemu_img: Program) -> Path:
    path = tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "raw", path, SIZE)
    return path


@pytest.fixture
def qcow2(tmp_path: Path, qemu_img: Program) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


@contextmanager
def held_open(qemu_io: Program, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A qemu-io that has opened an image, takes commands from a pipe, and ends with the block."""
    process = subprocess.Popen(
        [qemu_io.path, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until_prompt(process)
        yield process
    finally:
        process.communicate(timeout=60)


def until_prompt(process: subprocess.Popen[str]) -> str:
    """What qemu-io prints before it asks for a command; it does that only once the image is open."""
    assert process.stdout is not None
    text = ""
    while not text.endswith(PROMPT):
        letter = process.stdout.read(1)
        assert letter, f"qemu-io ended: {text}"
        text += letter
    return text.removesuffix(PROMPT)


def ask(process: subprocess.Popen[str], command: str) -> str:
    """What qemu-io answers to a command."""
    assert process.stdin is not None
    process.stdin.write(command + "\n")
    process.stdin.flush()
    return until_prompt(process)


def opened(path: Path, *, read_only: bool, force_share: bool = False) -> FileNode:
    node = FileNode(None, str(path), read_only=read_only, force_share=force_share)
    node.load()
    return node


def test_both_lock_the_same_bytes(qemu_io: Program, raw: Path, qcow2: Path) -> None:
    cases = [
        (("-f", "raw", raw), READ_WRITE, ALL),
        (("-f", "raw", "-r", raw), CONSISTENT_READ, ALL),
        (("-f", "qcow2", qcow2), READ_WRITE | RESIZE, FORMAT_SHARES),
        (("-f", "qcow2", "-r", qcow2), CONSISTENT_READ, FORMAT_SHARES),
    ]
    for arguments, wanted, shared in cases:
        path = Path(arguments[-1])
        with held_open(qemu_io, *arguments) as process:
            theirs = locked_bytes(path, process.pid)
        with used(opened(path, read_only="-r" in arguments), wanted, shared):
            assert locked_bytes(path) == theirs


@pytest.mark.parametrize("window", ["offset=512", "size=1024"])
def test_both_lock_the_same_bytes_for_a_window(qemu_io: Program, raw: Path, window: str) -> None:
    with held_open(qemu_io, "--image-opts", f"driver=raw,file.filename={raw},{window}") as process:
        theirs = locked_bytes(raw, process.pid)
    name, _, value = window.partition("=")
    node = RawNode.from_options({name: int(value)}, read_only=False)
    with used(attached(node, opened(raw, read_only=False)), READ_WRITE):
        assert locked_bytes(raw) == theirs


@pytest.mark.parametrize(
    ("wanted", "shared", "permission"),
    [
        (CONSISTENT_READ | WRITE, ALL, "write"),
        (CONSISTENT_READ | RESIZE, ALL, "resize"),
        (CONSISTENT_READ, FORMAT_SHARES, "write"),
    ],
)
def test_an_image_that_qemu_writes_is_refused_and_qemu_is_named(
    qemu_io: Program, qcow2: Path, wanted: int, shared: int, permission: str
) -> None:
    node = opened(qcow2, read_only=False)
    with held_open(qemu_io, "-f", "qcow2", qcow2) as process:
        with pytest.raises(LockedError) as caught:
            with used(node, wanted, shared):
                pass
        assert (caught.value.permission, caught.value.pid) == (permission, process.pid)
        assert ask(process, "write 0 512").startswith("wrote 512/512")
    with used(node, wanted, shared):  # the other has gone
        pass


def test_an_image_that_qemu_reads_may_be_read_and_not_written(qemu_io: Program, qcow2: Path) -> None:
    with held_open(qemu_io, "-r", "-f", "qcow2", qcow2) as process:
        with used(opened(qcow2, read_only=True), CONSISTENT_READ, FORMAT_SHARES):
            pass
        node = opened(qcow2, read_only=False)
        with pytest.raises(LockedError) as caught:
            with used(node, READ_WRITE, FORMAT_SHARES):
                pass
        node.close()
        assert caught.value.pid == process.pid


def test_force_share_reads_what_qemu_is_writing(qemu_io: Program, raw: Path, qcow2: Path) -> None:
    with held_open(qemu_io, "-f", "qcow2", qcow2):
        with used(opened(qcow2, read_only=True, force_share=True), CONSISTENT_READ, FORMAT_SHARES) as edge:
            magic = bytearray(4)
            edge.read(0, memoryview(magic))
            assert magic == b"QFI\xfb"


def test_an_image_that_we_write_is_refused_to_qemu(qemu_img: Program, qemu_io: Program, qcow2: Path) -> None:
    with used(opened(qcow2, read_only=False), READ_WRITE | RESIZE, FORMAT_SHARES):
        for refused in (qemu_io.run("-c", "read 0 512", qcow2), qemu_img.run("info", qcow2)):
            assert refused.returncode == 1
            assert "lock" in refused.stderr
        qemu_img("info", "-U", qcow2)
        qemu_io("-r", "-U", "-c", "read 0 512", qcow2)
    qemu_io("-c", "write 0 512", qcow2)


def test_an_image_that_we_read_may_be_read_by_qemu_and_not_written(qemu_img: Program, qemu_io: Program, qcow2: Path) -> None:
    with used(opened(qcow2, read_only=True), CONSISTENT_READ, FORMAT_SHARES):
        qemu_img("info", qcow2)
        qemu_io("-r", "-c", "read 0 512", qcow2)
        refused = qemu_io.run("-c", "write 0 512", qcow2)
        assert refused.returncode == 1
        assert "lock" in refused.stderr


def test_a_raw_disk_has_as_many_writers_as_like(qemu_io: Program, raw: Path) -> None:
    with held_open(qemu_io, "-f", "raw", raw) as process:
        node = attached(RawNode(None, str(raw), read_only=False), opened(raw, read_only=False))
        with used(node, READ_WRITE) as edge:
            edge.write(0, [b"\x07" * 512])
            assert ask(process, "read -P 7 0 512").startswith("read 512/512")
            assert ask(process, "write -P 8 0 512").startswith("wrote 512/512")
            sector = bytearray(512)
            edge.read(0, memoryview(sector))
            assert sector == b"\x08" * 512


def test_no_locks_are_taken_where_locking_is_off(qemu_io: Program, qcow2: Path) -> None:
    node = FileNode(None, str(qcow2), read_only=False, locking="off")
    node.load()
    with used(node, READ_WRITE | RESIZE, FORMAT_SHARES):
        qemu_io("-c", "write 0 512", qcow2)
