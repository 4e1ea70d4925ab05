"""``nbd``: the server as a program, beside qemu-nbd."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB, nbd
from tests.cli.running import CommandLine
from tests.programs import Argument, Program

OURS = [sys.executable, "-m", "blocklib", "nbd"]


@pytest.fixture
def image(here: Path) -> Path:
    blocklib.create(here / "a.qcow2", 4 * MiB, format="qcow2")
    with blocklib.open(here / "a.qcow2", "r+") as disk:
        disk.write(64 * KiB, b"\1" * (64 * KiB))
    return here / "a.qcow2"


@contextmanager
def running(*arguments: Argument) -> Iterator[subprocess.Popen[bytes]]:
    """Our server in the background, from when it is ready; what it leaves open is ended."""
    Path("ready").unlink(missing_ok=True)
    os.mkfifo("ready")
    ready = os.open("ready", os.O_RDONLY | os.O_NONBLOCK)
    words = [*OURS, "--pid-file=ready", *(str(argument) for argument in arguments)]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            select.select([ready, process.stderr.fileno()], [], [], 60)
            assert os.read(ready, 100) == b"%d\n" % process.pid, process.stderr.read()
            yield process
        finally:
            process.kill()
            os.close(ready)


@contextmanager
def running_qemu_nbd(program: Program, *arguments: Argument) -> Iterator[None]:
    program("--fork", "--pid-file=theirs.pid", *arguments)
    try:
        yield
    finally:
        os.kill(int(Path("theirs.pid").read_text()), signal.SIGTERM)


def ended(process: subprocess.Popen[bytes]) -> int:
    return process.wait(timeout=60)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_server_and_leaves_no_socket(image: Path, here: Path, end: signal.Signals) -> None:
    with running("-t", "-k", here / "s", image) as process:
        assert (here / "s").is_socket()
        process.send_signal(end)
        assert ended(process) == 0
        assert not (here / "s").exists()


def test_the_server_ends_with_its_last_client(image: Path, here: Path, nbdinfo: Program) -> None:
    with running("-k", here / "s", "-f", "qcow2", image) as process:
        uri = f"nbd+unix:///?socket={here / 's'}"
        assert "exports available" in CommandLine("qemu-nbd")("-L", "-k", here / "s")  # who only asks is no client
        assert process.poll() is None
        assert nbdinfo("--size", uri).strip() == str(4 * MiB)
        assert ended(process) == 0


def test_what_clients_write_is_in_the_image_when_the_server_has_ended(image: Path, here: Path, qemu_io: Program) -> None:
    with running("-k", here / "s", "-f", "qcow2", image) as process:
        qemu_io("-f", "raw", "-c", "write -P 7 1M 64k", f"nbd+unix:///?socket={here / 's'}")
        assert ended(process) == 0
    with blocklib.open(image) as disk:
        assert disk.read(1 * MiB, 64 * KiB) == b"\7" * (64 * KiB)


def test_fork_returns_when_the_server_is_ready(image: Path, here: Path, nbdinfo: Program) -> None:
    words = [*OURS, "--fork", "--pid-file", "pid", "-t", "-k", str(here / "s"), str(image)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    number = int(Path("pid").read_text())
    process = os.pidfd_open(number)
    try:
        assert nbdinfo("--size", f"nbd+unix:///?socket={here / 's'}").strip() == str(4 * MiB)
    finally:
        os.kill(number, signal.SIGTERM)
    assert select.select([process], [], [], 60)[0]
    os.close(process)
    assert not (here / "s").exists()


def test_fork_tells_of_a_server_that_could_not_start(here: Path) -> None:
    words = [*OURS, "--fork", "-k", str(here / "s"), "missing.qcow2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "missing.qcow2" in done.stderr


def test_a_socket_that_the_caller_listens_at_is_used(image: Path, nbdinfo: Program) -> None:
    printed = json.loads(nbdinfo("--json", "--", "[", *OURS, "-f", "qcow2", "-r", image, "]"))
    assert printed["exports"][0]["export-size"] == 4 * MiB
    assert printed["exports"][0]["is_read_only"] is True


def test_a_temporary_overlay_keeps_the_image_as_it_was(image: Path, here: Path, qemu_io: Program) -> None:
    before = image.read_bytes()
    with running("-s", "-k", here / "s", image) as process:
        commands = ("write -P 7 1M 64k", "read -P 7 1M 64k", "read -P 1 64k 64k")
        words = [word for command in commands for word in ("-c", command)]
        assert "failed" not in qemu_io("-f", "raw", *words, f"nbd+unix:///?socket={here / 's'}")
        assert ended(process) == 0
    assert image.read_bytes() == before


def test_a_snapshot_a_bitmap_and_an_offset_are_served(image: Path, here: Path) -> None:
    with blocklib.open(image, "r+") as disk:
        disk.snapshots.create("old")
        disk.bitmaps.add("dirty", persistent=True)
        disk.write(1 * MiB, b"\5" * (64 * KiB))
    with running("-l", "old", "-o", 64 * KiB, "-k", here / "s", image) as process:
        with blocklib.open(f"nbd+unix:///?socket={here / 's'}", format="raw") as remote:
            assert remote.size == 4 * MiB - 64 * KiB
            assert remote.read(0, 4096) == b"\1" * 4096
            assert remote.read(1 * MiB - 64 * KiB, 4096) == bytes(4096)
        assert ended(process) == 0
    with running("-B", "dirty", "-A", "-x", "name", "-D", "words", "-r", "-e", 2, "-t", "-k", here / "s", image):
        (info,) = nbd.list_exports(f"nbd+unix:///?socket={here / 's'}")
        assert (info.name, info.description, info.read_only) == ("name", "words", True)
        assert info.contexts == ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:dirty")


def test_list_prints_what_qemu_nbd_prints(image: Path, here: Path, qemu_nbd: Program) -> None:
    options = ("-A", "-x", "an export", "-D", "for people", "-e", 3, "-t", "-k", here / "s", "-f", "qcow2", image)
    with running_qemu_nbd(qemu_nbd, *options):
        assert CommandLine("qemu-nbd")("--list", "--socket", here / "s") == qemu_nbd("-L", "-k", here / "s")
        (told,) = json.loads(CommandLine()("nbd", "--list", "--output=json", "-k", here / "s"))
        assert told["name"] == "an export"
        assert told["size"] == 4 * MiB
        assert told["meta-contexts"] == ["base:allocation", "qemu:allocation-depth"]
    with running(*options):
        theirs = qemu_nbd("-L", "-k", here / "s").splitlines()
        assert CommandLine("qemu-nbd")("-L", "-k", here / "s").splitlines()[:3] == theirs[:3]
        assert theirs[-2:] == ["   base:allocation", "   qemu:allocation-depth"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("-c", "/dev/nbd0", "a.qcow2"), "kernel"),
        (("-d", "/dev/nbd0"), "kernel"),
        (("-k", "relative", "a.qcow2"), "absolute"),
        (("-p", "70000", "a.qcow2"), "65535"),
        (("-p", "x", "a.qcow2"), "-p x"),
        (("-e", "-1", "a.qcow2"), "-e -1"),
        (("-L", "a.qcow2"), "no file"),
        (("-L", "-x", "name"), "-x"),
        ((), "one file name"),
        (("a.qcow2", "b.qcow2"), "one file name"),
        (("--cache=odd", "a.qcow2"), "odd"),
        (("--aio=odd", "a.qcow2"), "odd"),
        (("--discard=odd", "a.qcow2"), "odd"),
        (("--detect-zeroes=unmap", "a.qcow2"), "--discard=unmap"),
        (("--tls-creds=nobody", "a.qcow2"), "nobody"),
        (("--tls-authz=nobody", "a.qcow2"), "--tls-creds"),
        (("--tls-hostname=h", "a.qcow2"), "--list"),
        (("-B", "nothing", "-p", "0", "a.qcow2"), "nothing"),
        (("-l", "nothing", "a.qcow2"), "nothing"),
        (("-o", "8388608", "a.qcow2"), "8388608"),
        (("--selinux-label=x", "a.qcow2"), "label"),
        (("-T", "x", "a.qcow2"), "tracing"),
        (("--object", "tls-creds-x509,id=t,dir=/nowhere,endpoint=server", "--tls-creds", "t", "a.qcow2"), "/nowhere"),
        (("--object", "tls-creds-x509,id=t,dir=x,verify-peer=perhaps", "a.qcow2"), "verify-peer"),
        (("--object", "tls-creds-anon,id=t", "a.qcow2"), "tls-creds-anon"),
        (("--object", "authz-simple,id=t", "a.qcow2"), "identity"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(image: Path, arguments: tuple[str, ...], word: str) -> None:
    assert word in CommandLine("qemu-nbd").fails(*arguments)


def test_rules_say_who_is_let_in() -> None:
    from blocklib.cli.objects import divided, objects_of

    rules = [{"match": "CN=a", "policy": "deny"}, {"match": "CN=*", "policy": "allow", "format": "glob"}]
    listed = json.dumps({"qom-type": "authz-list", "id": "l", "rules": rules})
    _secrets, admits = divided(objects_of([listed, "authz-simple,id=s,identity=CN=a,,O=b"]))
    assert [admits["l"](name) for name in ("CN=a", "CN=b", "O=b")] == [False, True, False]
    assert [admits["s"](name) for name in ("CN=a,O=b", "CN=a")] == [True, False]


def test_rules_may_come_from_a_file(here: Path) -> None:
    from blocklib.cli.objects import divided, objects_of

    Path("rules").write_text('{"policy": "allow", "rules": [{"match": "CN=x", "policy": "deny"}]}')
    _secrets, admits = divided(objects_of(["authz-list-file,id=f,filename=rules"]))
    assert [admits["f"](name) for name in ("CN=x", "CN=y")] == [False, True]


def test_every_option_of_qemu_nbd_is_known(qemu_nbd: Program) -> None:
    option = r"^ +(?:(-\w), )?(--[\w-]+)"
    theirs = {name for pair in re.findall(option, qemu_nbd("--help"), re.MULTILINE) for name in pair if name}
    ours = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", CommandLine("qemu-nbd")("--help")))
    assert theirs - ours == {"-V", "--version"}  # known to every program
