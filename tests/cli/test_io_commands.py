"""``blocklib io`` by itself: what it refuses, how it ends, and what a script can rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.cli.io_requests import c_integer
from tests.cli.io_support import AS_QEMU_IO, OurIo, commands, run_process


@pytest.fixture
def our_io(capsys: pytest.CaptureFixture[str]) -> OurIo:
    return OurIo(capsys)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x11" * MiB)
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, MiB, format="qcow2")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("+10", 10),
        ("0x0A", 10),
        ("012", 10),
        ("0", 0),
        ("00", 0),
        ("08", None),
        ("0x", None),
        ("", None),
        ("-1", None),
        ("1_0", None),
        ("1k", None),
        ("٣", None),
        ("9" * 65, None),
    ],
)
def test_c_integer_reads_what_strtol_reads(text: str, value: int | None) -> None:
    assert c_integer(text) == value


@pytest.mark.parametrize(
    "line",
    [
        "write -c -f 0 64k",
        "write -c 100 64k",
        "break a b",
        "wait_break a",
        "open -C disk",
    ],
)
def test_what_is_not_supported_is_refused_by_name(line: str, our_io: OurIo) -> None:
    done = our_io("--image-opts", "driver=memory,size=1M", "-c", line)
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["-T", "enable=*"], ["--trace=x"]])
def test_options_that_are_not_supported_end_the_program(arguments: list[str], raw: Path, our_io: OurIo) -> None:
    done = our_io(*arguments, "-f", "raw", raw, "-c", "length")
    assert (done.code, done.out) == (1, "")
    assert "not supported" in done.err


def test_two_file_names_are_refused(raw: Path, our_io: OurIo) -> None:
    assert our_io("-f", "raw", raw, raw, "-c", "length").code == 1


def test_a_failing_command_does_not_stop_the_script(our_io: OurIo) -> None:
    done = our_io("--image-opts", "driver=memory,size=1M", *commands("write -P 7 0 4k", "read 2M 1", "read -P 7 0 4k"))
    assert done.code == 1
    assert done.out.splitlines()[2:4] == ["read failed: Input/output error", "read 4096/4096 bytes at offset 0"]


def test_quit_ends_the_script(our_io: OurIo) -> None:
    done = our_io(*commands("quit", "bogus"))
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_pattern_that_differs_far_into_a_large_range_is_found(raw: Path, our_io: OurIo) -> None:
    done = our_io("-f", "raw", raw, *commands("write -q -P 0x12 1000000 1", "read -P 0x11 0 1M"))
    assert done.code == 1
    assert done.out.splitlines()[0] == f"Pattern verification failed at offset 0, {MiB} bytes"
    assert our_io("-f", "raw", raw, "-c", "read -P 0x11 0 1000000").code == 0


def test_a_source_file_is_repeated(raw: Path, tmp_path: Path, our_io: OurIo) -> None:
    (tmp_path / "source").write_bytes(bytes(range(10)))
    for flags in ([], ["-m"]):
        assert our_io("-f", "raw", *flags, raw, "-c", f"write -s {tmp_path / 'source'} 5 25").code == 0
        assert raw.read_bytes()[:31] == b"\x11" * 5 + bytes(range(10)) * 2 + bytes(range(5)) + b"\x11"


def test_discard_gives_space_back_unless_it_is_ignored(qcow2: Path, our_io: OurIo) -> None:
    our_io(qcow2, "-c", "write 0 1M")
    full = qcow2.stat().st_blocks
    our_io("-d", "ignore", qcow2, "-c", "discard 0 1M")
    assert qcow2.stat().st_blocks >= full
    our_io(qcow2, *commands("discard 0 1M", "flush"))
    assert qcow2.stat().st_blocks < full


def test_zeroes_without_fallback_fail_where_bytes_would_be_written(qcow2: Path, our_io: OurIo) -> None:
    done = our_io(qcow2, *commands("write -q -P 5 0 256k", "write -z -n 64k 65k", "read -q -P 5 0 256k", "write -z -n 64k 64k"))
    assert done.out.splitlines()[:2] == ["write failed: Operation not supported", "wrote 65536/65536 bytes at offset 65536"]
    assert done.code == 1


def test_what_is_written_with_snapshot_is_lost_and_leaves_no_file(
    raw: Path, tmp_path: Path, our_io: OurIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    lines = commands("write -q -P 9 0 64k", "read -q -P 9 0 64k", "read -q -P 0x11 64k 64k", "info", "reopen")
    done = our_io("-s", "-f", "raw", raw, *lines)
    assert done.out.startswith("format name: qcow2\n")
    assert (done.code, len(done.err.splitlines())) == (1, 1), "reopening would lose it"
    assert not list(temporary.iterdir())
    assert raw.read_bytes() == b"\x11" * MiB


def test_a_failed_reopen_leaves_the_disk_open(qcow2: Path, our_io: OurIo) -> None:
    done = our_io(qcow2, *commands("reopen -o nonsense=1", "write -q 0 1", "reopen -r", "write -q 0 1", "length"))
    assert done.out == "1 MiB\n"
    assert len(done.err.splitlines()) == 2


def test_a_damaged_image_says_what_is_wrong(qcow2: Path, our_io: OurIo) -> None:
    our_io(qcow2, "-c", "write 0 64k")
    image = bytearray(qcow2.read_bytes())
    l1_offset = int.from_bytes(image[40:48], "big")
    image[l1_offset + 6] |= 2  # the place of the first L2 table is not a multiple of the cluster size
    qcow2.write_bytes(image)
    done = our_io("-r", qcow2, "-c", "read 0 64k")
    assert (done.code, done.out) == (1, "read failed: Input/output error\n")
    assert "L1 entry" in done.err
    assert len(done.err.splitlines()) == 1


def test_untrusted_opens_no_backing_file(qcow2: Path, tmp_path: Path, our_io: OurIo) -> None:
    overlay = tmp_path / "overlay.qcow2"
    blocklib.create(overlay, format="qcow2", backing=qcow2, backing_format="qcow2")
    assert our_io(overlay, "-c", "length").code == 0
    for arguments in (["--untrusted", str(overlay), "-c", "length"], ["--untrusted", "-c", f"open {overlay}"]):
        done = our_io(*arguments)
        assert (done.code, done.out) == (1, "")
        assert len(done.err.splitlines()) == 1


def test_a_full_disk_is_told_with_the_reason_of_the_host(raw: Path) -> None:
    code = (
        "import resource, sys; from blocklib.cli.main import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MiB}, {MiB}));"
        "sys.exit(main(sys.argv[1:], program='qemu-io'))"
    )
    qcow2 = raw.with_suffix(".qcow2")
    blocklib.create(qcow2, 8 * MiB, format="qcow2")
    done = subprocess.run(
        [sys.executable, "-c", code, qcow2, "-c", "write 0 2M"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "write failed: File too large\n"
    assert done.returncode == 1


def test_abort_ends_the_process_without_closing(qcow2: Path) -> None:
    done = run_process("-f", "qcow2", qcow2, *commands("write -q -P 3 0 64k", "length", "abort", "length"))
    assert done.code == -signal.SIGABRT
    assert done.out == "1 MiB\n", "what was printed before is not lost"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_sigraise_sends_a_signal(number: int) -> None:
    assert run_process(*commands(f"sigraise {number}", "sleep 10000")).code == -number


def test_sigraise_of_an_interrupt_ends_with_130(qcow2: Path) -> None:
    done = run_process(qcow2, *commands("write -q -P 3 0 64k", f"sigraise {int(signal.SIGINT)}", "sleep 20000"))
    assert (done.code, done.out, len(done.err.splitlines())) == (130, "", 1)
    with blocklib.open(qcow2) as disk:
        assert disk.read(0, 64 * KiB) == b"\x03" * 64 * KiB, "the image was closed as it should be"


def test_an_interrupt_ends_the_wait_for_a_line(qcow2: Path) -> None:
    process = subprocess.Popen(
        [*AS_QEMU_IO, qcow2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(len("qemu-io> ")) == "qemu-io> "
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130  # with standard input still open
        assert process.stderr is not None
        assert len(process.stderr.read().splitlines()) == 1


def test_names_with_odd_bytes_survive(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/disk\xff"
    Path(os.fsdecode(name)).write_bytes(bytes(MiB))
    done = subprocess.run(
        AS_QEMU_IO, input=b"open -r -o driver=raw " + name + b"\nlength\n", capture_output=True, timeout=60, check=False
    )
    assert done.stdout == b"qemu-io> qemu-io> 1 MiB\nqemu-io> "


def test_help_tells_about_each_command(our_io: OurIo) -> None:
    names = [line.split()[0] for line in our_io("-c", "help").out.splitlines() if " -- " in line]
    done = our_io(*commands(*(f"help {name}" for name in names)))
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines() if " -- " in line] == names
    assert our_io("-c", "help r").out.startswith("r [-bCpqv] [-P pattern] [-s off] [-l len] off len -- ")


def test_reading_and_writing_import_no_heavy_package(qcow2: Path) -> None:
    lines = commands("write -P 5 0 64k", "read -P 5 0 64k", "map", "info", "alloc 0 1M", "discard 0 64k", "flush")
    code = (
        "import sys; from blocklib.cli.main import main; code = main(sys.argv[1:], program='qemu-io');"
        "heavy = {'argparse', 'asyncio', 'logging', 'numba', 'numpy', 'pathlib', 'rich', 'tempfile'};"
        "sys.exit(code or ' '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, qcow2, *lines],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stderr) == (0, "")
