"""Dispatch: programs and commands by name, help, version, and how any failure ends."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from blocklib.cli import main as main_module
from blocklib.cli.main import COMMANDS, main
from tests.cli.running import CommandLine
from tests.programs import Program

MODULE = [sys.executable, "-W", "error", "-m", "blocklib"]
SCRIPT = "import sys\nfrom blocklib.cli.main import main\nsys.exit(main())\n"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start in another folder find the package, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(main_module.__file__).parents[2]))


def _run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, check=False)


# -- help and version -------------------------------------------------------------------------------------------------


def test_help_lists_every_command(blocklib: CommandLine) -> None:
    printed = blocklib("--help")
    assert blocklib("-h") == printed
    for command, about in COMMANDS.items():
        assert re.search(rf"^  {command} +{about}$", printed, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(blocklib: CommandLine, command: str) -> None:
    printed = blocklib(command, "--help")
    assert printed.startswith(f"usage: blocklib {command} [options] ")
    assert "--untrusted" in printed


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("inspect", "io", "nbd")])
def test_every_option_of_qemu_img_is_accepted(blocklib: CommandLine, qemu_img: Program, command: str) -> None:
    (synopsis,) = re.findall(rf"^  {command} (.*)$", qemu_img("--help"), re.MULTILINE)
    ours = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", blocklib(command, "--help")))
    theirs = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", synopsis))
    assert theirs - ours == set()


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version_is_one_line(blocklib: CommandLine, flag: str) -> None:
    assert re.fullmatch(r"blocklib \S.*\n", blocklib(flag))


def test_called_as_qemu_img_the_version_begins_as_its_own() -> None:
    assert re.match(r"qemu-img version 7\.2\.\d+ \(blocklib ", CommandLine("qemu-img")("--version"))


# -- wrong command lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no command given (see 'blocklib --help')"),
        (["nothing"], "unknown command 'nothing' (see 'blocklib --help')"),
        (["--nothing"], "unknown option '--nothing' (see 'blocklib --help')"),
        (["info", "--nothing"], "unknown option '--nothing' (see 'blocklib info --help')"),
        (["info", "-f"], "option '-f' needs a value (see 'blocklib info --help')"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_hint(blocklib: CommandLine, arguments: list[str], line: str) -> None:
    assert blocklib.fails(*arguments) == line


def test_errors_begin_with_the_name_the_program_was_called_by(here: Path) -> None:
    assert "nowhere" in CommandLine("qemu-img").fails("info", "nowhere")


# -- failures ---------------------------------------------------------------------------------------------------------


def _broken(*_arguments: object) -> int:
    raise ZeroDivisionError("first\nsecond")


def test_a_mistake_of_ours_is_one_line_too(blocklib: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocklib.cli.info.run", _broken)
    result = blocklib.run("info", "a")
    assert result.code == 1
    assert result.err == "blocklib: internal error: ZeroDivisionError: first\\nsecond (--debug shows where)\n"


def test_debug_shows_the_traceback(blocklib: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocklib.cli.info.run", _broken)
    result = blocklib.run("info", "--debug", "a")
    assert result.code == 1
    assert "Traceback (most recent call last):" in result.err
    assert "in _broken" in result.err


def test_a_name_with_control_characters_stays_on_its_line(blocklib: CommandLine, here: Path) -> None:
    assert r"no\nwhere\x1b" in blocklib.fails("info", "no\nwhere\x1b")


# -- as a process -----------------------------------------------------------------------------------------------------


def test_python_runs_the_package_as_blocklib(here: Path) -> None:
    done = _run(*MODULE, "info", "nowhere", cwd=here)
    assert done.returncode == 1
    assert done.stderr.startswith("blocklib: nowhere: ")


@pytest.mark.parametrize(
    ("link", "words", "prefix"),
    [("qemu-img", ["info"], "qemu-img: "), ("qemu-io", [], "qemu-io: "), ("blocklib", ["info"], "blocklib: ")],
)
def test_a_link_behaves_as_the_program_of_its_name(here: Path, link: str, words: list[str], prefix: str) -> None:
    script = here / "script"
    script.write_text(f"#!{sys.executable}\n{SCRIPT}")
    script.chmod(0o755)
    (here / link).symlink_to(script)
    done = _run(str(here / link), *words, "--bogus", "nowhere", cwd=here)
    assert done.returncode == 1
    assert done.stderr.startswith(prefix)
    assert done.stderr.endswith(f"(see '{' '.join([link, *words])} --help')\n")


def test_names_that_are_no_text_pass_through(here: Path) -> None:
    name = os.fsdecode(b"\xff.raw")
    (here / name).write_bytes(bytes(512))
    done = subprocess.run([*MODULE, "info", name], capture_output=True, check=False)
    assert done.stdout.startswith(b"image: \xff.raw\n")
    assert done.stderr == b""


def test_a_reader_that_goes_away_ends_the_run_in_silence(blocklib: CommandLine, here: Path) -> None:
    blocklib("create", "-q", "-f", "raw", "image", "1M")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MODULE, "info", "image"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_no_reason_to_fail(blocklib: CommandLine, here: Path) -> None:
    blocklib("create", "-q", "-f", "raw", "image", "1M")
    before = (here / "image").read_bytes()
    code = "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
    done = _run(sys.executable, "-c", code, *MODULE, "resize", "image", "2M", cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (here / "image").read_bytes() == before + bytes(1 << 20)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_one_line(blocklib: CommandLine, here: Path) -> None:
    blocklib("create", "-q", "-f", "raw", "image", "1M")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*MODULE, "info", "image"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "blocklib: output: No space left on device\n")


def _throttled_convert(here: Path) -> subprocess.Popen[str]:
    """A convert that takes long, and has begun."""
    (here / "image").write_bytes(b"x" * (4 << 20))
    process = subprocess.Popen(
        [*MODULE, "convert", "--progress=json", "-r", "1M", "-f", "raw", "-O", "qcow2", "image", "copy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("{")
    return process


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupt_ends_the_work_and_leaves_no_half_image(here: Path, times: int) -> None:
    with _throttled_convert(here) as process:
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "blocklib: interrupted"
    assert "Traceback" not in err
    assert not (here / "copy").exists()
    assert (here / "image").stat().st_size == 4 << 20


def test_an_interrupted_commit_leaves_both_images_consistent(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path
) -> None:
    blocklib("create", "-q", "-f", "qcow2", "base", "4M")
    blocklib("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    qemu_io("-f", "qcow2", "-c", "write -P 5 0 4M", "top")
    process = subprocess.Popen([*MODULE, "commit", "--progress=json", "-r", "1M", "top"], stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("{")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    for name in ("base", "top"):
        qemu_img("check", name)
    qemu_io("-f", "qcow2", "-c", "read -P 5 0 4M", "top")


def test_a_signal_asks_how_far_the_work_is(here: Path) -> None:
    with _throttled_convert(here) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        asked = next(line for line in process.stderr if not line.startswith("{"))
        assert re.fullmatch(r"    \(\d+\.\d\d/100%\)\n", asked)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_signals_are_left_alone_afterwards(blocklib: CommandLine, here: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)
    blocklib("create", "-q", "-f", "raw", "image", "1M")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)) == before


def test_an_interrupt_before_the_work_begins_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_command: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blocklib.cli.main._load", interrupted)
    with redirect_stderr(io.StringIO()) as err:
        assert main(["info", "a"], program="blocklib") == 130
    assert err.getvalue() == ""


def test_a_command_imports_neither_other_commands_nor_what_only_they_need(blocklib: CommandLine, here: Path) -> None:
    blocklib("create", "-q", "-f", "qcow2", "image", "64M")
    code = "import sys; from blocklib.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = _run(sys.executable, "-c", code, "info", "--output=json", "image", cwd=here)
    assert done.returncode == 0
    imported = set(done.stderr.split())
    assert "blocklib.cli.info" in imported
    assert not {"argparse", "rich", "asyncio", "numpy", "numba", "blocklib.jobs"} & imported
    assert not {f"blocklib.cli.{command}" for command in COMMANDS if command != "info"} & imported
