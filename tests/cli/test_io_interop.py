"""``blocklib io`` beside the real qemu-io: the same commands on equal images print the same lines and end alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.io_support import OurIo, commands, run_process, without_times
from tests.programs import Program

MiB = 1 << 20

READING = (
    "read 0 64k",
    "r 512 1",
    "read -v 65530 40",
    "read -q 0 4k",
    "read -vq 0 16",
    "read -C 0 4k",
    "read -p 0 16",
    "read 0 -q 16",
    "read -- 0 16",
    "read 0 0",
    "read 1M 0",
    "read 1048577 0",
    "read 1048575 2",
    "read 2M 512",
    "read 1.5k 1",
    "read 1. 1",
    "read 0x1F 1K",
    "read +5 010",
    "read  0   16",
    "read 7E 1",
    "read -P 0x11 0 64k",
    "read -P 0x11 64k 64k",
    "read -P 021 0 1k",
    "read -P 17 -P 0x22 128k 64k",
    "read -v -P 1 0 16",
    "read -q -P 1 0 16",
    "read -C -P 1 0 16",
    "read -P 0x22 -s 64k 64k 128k",
    "read -P 0x22 -s 60k 64k 128k",
    "read -P 0x11 -l 64k 0 128k",
    "read -P 0x11 -s 512 -l 65k 0 128k",
    "read -P 0 -s 20 0 20",
    "readv 0 16 16",
    "readv -v 65530 5 6 7",
    "readv -P 0x11 0 1k 1k",
    "readv -P 1 0 16 16",
    "readv -C 0 512 512",
    "readv -q 0 16",
    "readv 0 0",
    "readv 2M 512",
    "length",
    "l",
    "info",
    "i",
    "flush",
    "map",
    "alloc 0",
    "alloc 0 1M",
    "a 1000 1000",
    "alloc 100k 100k",
    "alloc 0 2M",
    "alloc 2M 1",
    "alloc 1M",
    "alloc 0 0",
    "sleep 1",
    "sleep 0x1",
    "",
    "   ",
)
WRITING = (
    "write 0 64k",
    "w -P 3 100 1000",
    "write -q 4k 4k",
    "write -C 8k 4k",
    "write -f 12k 512",
    "write -s pattern 16k 100",
    "write -p 0 1",
    "write 1048570 16",
    "write 2M 1",
    "write 1M 0",
    "write 1048577 0",
    "write -z 100k 80k",
    "write -z 100 100",
    "write -z -u 256k 128k",
    "write -zf 1k 1k",
    "write -z 2M 1",
    "write -z -n 512k 64k",
    "write -zqu 0 512",
    "write -c 0 64k",
    "write -c 4k 4k",
    "write -c -z 0 64k",
    "writev 600k 16 16",
    "writev -P 7 700k 1k 2k 3k",
    "writev -f 0 512",
    "writev -C 0 512",
    "writev -q 0 512",
    "writev 2M 16 16",
    "discard 256k 256k",
    "discard -C 0 64k",
    "discard -q 0 1",
    "d 100 1",
    "discard 2M 512",
    "discard 0 0",
    "flush",
    "map",
    "info",
    "truncate 2M",
    "length",
    "truncate 512k",
    "t 1M",
    "truncate -m off 1M",
)
ASYNCHRONOUS = (
    "aio_read 0 16",
    "aio_read -v 0 16 16",
    "aio_read -qv 0 16",
    "aio_read -C -v -P 1 0 16",
    "aio_read -P 1 100 16",
    "aio_read -i 0 16",
    "aio_read 2M 16",
    "aio_write 0 16 16",
    "aio_write -P 9 1k 1k",
    "aio_write -q 0 16",
    "aio_write -C 0 16",
    "aio_write -f 0 16",
    "aio_write -i 0 16",
    "aio_write 2M 16",
    "aio_write -z 2M 16",
)
WRONG = (
    "bogus",
    "read",
    "read 0",
    "read 0 1 2",
    "read x 1",
    "read 0 x",
    "read -1 1",
    "read 0 -1",
    "read --foo 0 1",
    "read -Z 0 1",
    "read 0 1 -P",
    "read -P",
    "read -P 256 0 1",
    "read -P x 0 1",
    "read -P 0x 0 1",
    "read -P 08 0 1",
    "read -P 1k 0 1",
    "read -P -1 0 1",
    "read 1.5 1",
    "read .5k 1",
    "read 1e3 1",
    "read 1kb 1",
    "read '' 1",
    "read 8E 1",
    "read 0 2G",
    "read 0 2147483137",
    "read\t0 1",
    "read -s 10 0 20",
    "read -l 5 0 10",
    "read -P 0 -s 10 -l 20 0 20",
    "read -P 0 -l 30 0 20",
    "read -P 0 -s 30 0 20",
    "read -P 0 -s x 0 10",
    "readv 0",
    "readv 0 x",
    "readv 0 1G 1G",
    "write 0",
    "write 0 x",
    "write -P 300 0 16",
    "write -P 1 -z 0 16",
    "write -s pattern -z 0 16",
    "write -u 0 16",
    "write -n 0 16",
    "write 0 3G",
    "write -z 0 2G",
    "write -s nowhere 0 16",
    "write -s empty 0 16",
    "writev -z 0 16",
    "writev 0",
    "aio_read x 16",
    "aio_read 0",
    "aio_read -P x 0 16",
    "aio_write -u 0 16",
    "aio_write -z 0 16 16",
    "aio_flush x",
    "alloc",
    "alloc x",
    "alloc -1 1",
    "alloc 0 1k 1",
    "discard 0",
    "discard 0 3G",
    "discard -z 0 1",
    "truncate",
    "truncate x",
    "truncate -m nonsense 1M",
    "truncate -m falloc 512k",
    "length x",
    "map x",
    "flush x",
    "help nonsense",
    "sleep",
    "sleep x",
    "sleep -1",
    "sigraise",
    "sigraise x",
    "sigraise 100",
    "break a b",
    "resume x",
    "remove_break x",
    "open",
    "open nowhere",
    "reopen -r -w",
    "reopen -c nonsense",
    "reopen -o driver=qcow2",
    "reopen -o nonsense=1",
    "reopen x",
)


@pytest.fixture
def our_io(capsys: pytest.CaptureFixture[str]) -> OurIo:
    return OurIo(capsys)


@pytest.fixture(params=["raw", "qcow2", "qcow2-4k", "chain"])
def images(request: pytest.FixtureRequest, tmp_path: Path, qemu_img: Program, qemu_io: Program) -> tuple[Path, Path, str]:
    """Two folders with equal images called ``disk`` of 1 MiB, and their format."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    disk = theirs / "disk"
    image_format = "raw" if request.param == "raw" else "qcow2"
    options = ["-o", "cluster_size=4k"] if request.param == "qcow2-4k" else []
    if request.param == "chain":
        qemu_img("create", "-f", "raw", theirs / "base", "512k")
        qemu_io("-f", "raw", theirs / "base", *commands("write -P 0x11 0 128k", "write -P 0x44 256k 256k"))
        qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "raw", theirs / "middle", "768k")
        qemu_io("-f", "qcow2", theirs / "middle", *commands("write -P 0x22 128k 64k", "write -z 320k 64k"))
        qemu_img("create", "-f", "qcow2", "-b", "middle", "-F", "qcow2", disk, "1M")
        filling = commands("write -P 0x33 192k 64k", "write -z 384k 64k", "discard 448k 64k")
    else:
        qemu_img("create", "-f", image_format, *options, disk, "1M")
        filling = commands("write -P 0x11 0 128k", "write -P 0x22 128k 64k", "write -z 512k 64k", "write -P 9 800k 4k")
    qemu_io("-f", image_format, disk, *filling)
    (theirs / "pattern").write_bytes(b"abc")
    (theirs / "empty").touch()
    shutil.copytree(theirs, ours)
    return theirs, ours, image_format


Both = Callable[..., None]


@pytest.fixture
def same(images: tuple[Path, Path, str], qemu_io: Program, our_io: OurIo, monkeypatch: pytest.MonkeyPatch) -> Both:
    """Run both with the same arguments on equal images, and compare standard output and exit code."""
    theirs, ours, _ = images
    monkeypatch.chdir(ours)

    def compare(*arguments: str) -> None:
        expected = qemu_io.run(*arguments, cwd=theirs)
        found = our_io(*arguments)
        assert found.out == without_times(expected.stdout)
        assert (found.code, found.err) == (expected.returncode, expected.stderr)

    return compare


def test_reading_prints_the_same(images: tuple[Path, Path, str], same: Both) -> None:
    same("-r", "-f", images[2], "disk", *commands(*READING))


def test_each_reading_command_ends_alike(images: tuple[Path, Path, str], qemu_io: Program, our_io: OurIo) -> None:
    theirs, ours, image_format = images
    failing = {line for line in READING if "-P 1 " in line or "7E" in line}
    for line in sorted(failing | {"read -P 0x22 -s 60k 64k 128k", "read 2M 512", "readv 2M 512"}):
        expected = qemu_io.run("-f", image_format, theirs / "disk", "-c", line)
        assert our_io("-f", image_format, ours / "disk", "-c", line).code == expected.returncode, line


def test_writing_prints_the_same_and_leaves_the_same_bytes(
    images: tuple[Path, Path, str], same: Both, qemu_img: Program
) -> None:
    theirs, ours, image_format = images
    same("-f", image_format, "disk", *commands(*WRITING))
    qemu_img("compare", "-f", image_format, "-F", image_format, theirs / "disk", ours / "disk")
    if image_format != "raw":
        qemu_img("check", "-f", image_format, ours / "disk")


def test_asynchronous_requests_answer_when_they_are_waited_for(images: tuple[Path, Path, str], same: Both) -> None:
    for line in ASYNCHRONOUS:
        same("-f", images[2], "disk", *commands(line, "length", "aio_flush", "length"))


def test_asynchronous_zeroes_are_written(images: tuple[Path, Path, str], our_io: OurIo) -> None:
    # Not compared: qemu-io 7.2 takes the time of these from the start of the machine.
    done = our_io("-f", images[2], images[1] / "disk", *commands("aio_write -zu 0 64k", "aio_flush", "read -P 0 0 64k"))
    assert done.code == 0
    assert done.out.splitlines()[0] == "wrote 65536/65536 bytes at offset 0"


@pytest.mark.parametrize("line", WRONG)
def test_wrong_commands_fail_in_one_line(line: str, tmp_path: Path, qemu_io: Program, our_io: OurIo) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    (tmp_path / "empty").touch()
    arguments = ["-f", "raw", str(disk), *commands(line.replace("empty", str(tmp_path / "empty")), "length")]
    expected = qemu_io.run(*arguments)
    found = our_io(*arguments)
    assert found.code == expected.returncode == 1
    assert found.out == "1 MiB\n", "the commands after it are still run"
    assert len(found.err.splitlines()) == 1
    assert found.err.startswith("qemu-io: ")


@pytest.mark.parametrize("line", ["write 0 1", "write -z 0 1", "writev 0 1", "aio_write 0 1", "discard 0 1", "truncate 1"])
def test_read_only_images_refuse_writes(line: str, images: tuple[Path, Path, str], qemu_io: Program, our_io: OurIo) -> None:
    theirs, ours, image_format = images
    expected = qemu_io.run("-r", "-f", image_format, theirs / "disk", "-c", line)
    found = our_io("-r", "-f", image_format, ours / "disk", "-c", line)
    assert (found.code, found.out) == (expected.returncode, expected.stdout) == (1, "")
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["length", "read 0 1", "map", "aio_flush", "close", "reopen", "break a b"])
def test_commands_need_an_open_file(name: str, qemu_io: Program, our_io: OurIo) -> None:
    expected = qemu_io.run("-c", name)
    found = our_io("-c", name)
    assert (found.code, found.out) == (expected.returncode, expected.stdout) == (1, "")
    assert len(found.err.splitlines()) == 1


def test_open_and_close_in_a_script(images: tuple[Path, Path, str], same: Both) -> None:
    image_format = images[2]
    same(
        *commands(
            f"open -o driver={image_format} disk",
            "length",
            "write -P 1 0 512",
            "close",
            f"open -r -o driver={image_format},file.filename=disk",
            "read -P 1 0 512",
            "close",
            f"o -s -n -o driver={image_format} disk",
            "write -P 2 0 4k",
            "read -P 2 0 4k",
            "c",
            f"open -t directsync -d off -k -n -o driver={image_format} disk",
            "read -P 1 0 512",
            "quit",
            "length",
        )
    )


def test_open_again_needs_close(images: tuple[Path, Path, str], qemu_io: Program, our_io: OurIo) -> None:
    theirs, ours, image_format = images
    lines = commands("open disk", "length")
    expected = qemu_io.run("-f", image_format, "disk", *lines, cwd=theirs)
    found = our_io("-f", image_format, ours / "disk", *lines)
    assert (found.code, found.out) == (expected.returncode, expected.stdout) == (1, "1 MiB\n")


def test_reopen_changes_what_may_be_done(images: tuple[Path, Path, str], same: Both) -> None:
    same(
        "-f",
        images[2],
        "disk",
        *commands("reopen", "write 0 1", "reopen -c none", "read 0 1", "reopen -r", "reopen -w", "write 0 1"),
    )


def test_options_in_place_of_a_name(images: tuple[Path, Path, str], same: Both) -> None:
    image_format = images[2]
    node = f"driver={image_format},file.filename=disk"
    same("--image-opts", node, "-c", "length", "-c", "read -v 0 16")
    same("--image-opts", *commands(f"open -r {node}", "length"))
    same(f'json:{{"driver": "{image_format}", "file": {{"driver": "file", "filename": "disk"}}}}', "-c", "length")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-n"], id="no-cache"),
        pytest.param(["-n", "-m"], id="misaligned"),
        pytest.param(["-t", "directsync"], id="cache"),
        pytest.param(["-t", "off"], id="old-cache-name"),
        pytest.param(["--nocache", "--aio=native"], id="long"),
        pytest.param(["-i", "threads", "-k", "-n"], id="native-aio"),
        pytest.param(["-i", "io_uring"], id="io_uring"),
        pytest.param(["--disc", "ignore"], id="abbreviated"),
        pytest.param(["--object", "secret,id=x,data=abc"], id="object"),
    ],
)
def test_options_of_the_program(arguments: list[str], images: tuple[Path, Path, str], same: Both) -> None:
    same(*arguments, "-f", images[2], "disk", *commands("write -P 8 513 1025", "read -P 8 513 1025", "read -v 500 30"))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["nowhere"], id="no-such-file"),
        pytest.param(["-f", "nonsense", "disk"], id="no-such-format"),
        pytest.param(["-t", "nonsense", "disk"], id="no-such-cache-mode"),
        pytest.param(["-d", "nonsense", "disk"], id="no-such-discard-mode"),
        pytest.param(["-i", "nonsense", "disk"], id="no-such-aio-mode"),
        pytest.param(["-k", "-f", "raw", "disk"], id="native-aio-through-the-page-cache"),
        pytest.param(["-U", "-f", "raw", "disk"], id="shared-writer"),
        pytest.param(["--image-opts", "-f", "raw", "driver=raw,file.filename=disk"], id="format-twice"),
        pytest.param(["--object", "nonsense,id=x", "-f", "raw", "disk"], id="no-such-object"),
    ],
)
def test_what_cannot_be_opened_ends_the_program(
    arguments: list[str], tmp_path: Path, qemu_io: Program, our_io: OurIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").write_bytes(bytes(MiB))
    expected = qemu_io.run(*arguments, "-c", "length", cwd=tmp_path)
    found = our_io(*arguments, "-c", "length")
    assert (found.code, found.out) == (expected.returncode, expected.stdout) == (1, "")
    assert len(found.err.splitlines()) == 1


def test_a_guessed_raw_image_is_warned_about(tmp_path: Path, qemu_io: Program, our_io: OurIo) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    expected = qemu_io.run(disk, "-c", "length")
    found = our_io(disk, "-c", "length")
    assert (found.code, found.out) == (expected.returncode, expected.stdout) == (0, "1 MiB\n")
    assert "raw" in found.err
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize(
    "script",
    [
        "",
        "length",
        "length\n",
        "length\n\n  \nread 0 1\nread 0 2M\nquit\nlength\n",
        "length\nq",
        "  length  \naio_read 0 1\nlength\n",
    ],
)
def test_a_script_on_standard_input_is_prompted_for(script: str, tmp_path: Path, qemu_io: Program) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    expected = qemu_io.run("-f", "raw", disk, input=script)
    found = run_process("-f", "raw", disk, script=script)
    assert (found.code, found.out) == (expected.returncode, without_times(expected.stdout))


def test_help_lists_the_same_commands(qemu_io: Program, our_io: OurIo) -> None:
    def names(text: str) -> list[str]:
        return [line.split()[0] for line in text.splitlines() if " -- " in line]

    assert names(our_io("-c", "help").out) == names(qemu_io("-c", "help"))


@pytest.mark.parametrize("options", [["cluster_size=512"], ["compat=0.10"], ["cluster_size=2M", "refcount_bits=1"]])
@pytest.mark.parametrize("size", ["0", "512M", "513M", "5G"])
def test_info_and_map_of_empty_images(
    options: list[str], size: str, tmp_path: Path, qemu_img: Program, qemu_io: Program, our_io: OurIo
) -> None:
    disk = tmp_path / "disk"
    qemu_img("create", "-f", "qcow2", "-o", ",".join(options), disk, size)
    arguments = ["-r", "-f", "qcow2", str(disk), *commands("info", "map", "length")]
    assert our_io(*arguments).out == qemu_io(*arguments)


def test_a_crash_leaves_a_clean_image_for_qemu(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> None:
    disk = tmp_path / "disk"
    qemu_img("create", "-f", "qcow2", disk, "8M")
    lines = commands("write -P 1 0 1M", "flush", "write -P 2 2M 1M", "abort")
    done = run_process("-f", "qcow2", disk, *lines)
    assert done.code < 0
    assert qemu_img.run("check", disk).returncode in (0, 3), "leaks at worst"
    qemu_io("-f", "qcow2", disk, "-c", "read -P 1 0 1M")
    assert disk.stat().st_size > MiB
