"""``bench`` sends what qemu-img bench sends, and says so in the same lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blocklib.cli.bench import batches, places
from tests.cli.running import CommandLine
from tests.programs import Program

MiB = 1 << 20


def _timeless(printed: str) -> str:
    return re.sub(r"in \d+\.\d{3} seconds", "in # seconds", printed)


@pytest.fixture
def image(here: Path, blocklib: CommandLine) -> str:
    blocklib("create", "-q", "-f", "qcow2", "disk", "4M")
    blocklib("io", "-c", "write -P 7 0 1M", "-c", "write -P 8 3M 64k", "disk")
    return "disk"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("-c 100", id="count"),
        pytest.param("-c 0", id="none"),
        pytest.param("-c 2000 -d 7", id="depth"),
        pytest.param("-c 0x10 -d 0x2", id="hexadecimal"),
        pytest.param("-c 100 -o 64k -s 1000 -S 12345", id="odd"),
        pytest.param("-c 100 -s 0", id="empty-requests"),
        pytest.param("-c 100 -S 0", id="step-of-nothing-is-the-size"),
        pytest.param("-c 10 -q", id="quiet"),
        pytest.param("-c 10 -U", id="share"),
        pytest.param("-c 100 -i threads", id="threads"),
        pytest.param("-c 10 --no-drain --pattern=9", id="for-writes-only"),
        pytest.param("-c 100 -w", id="write"),
        pytest.param("-c 100 -w --pattern=0xaa", id="pattern"),
        pytest.param("-c 100 -w -t writethrough", id="cache"),
        pytest.param("-c 100 -w -d 8 --flush-interval=8", id="flush"),
        pytest.param("-c 100 -w -d 8 --flush-interval=9 --no-drain", id="flush-undrained"),
    ],
)
def test_it_prints_what_qemu_img_prints(blocklib: CommandLine, qemu_img: Program, image: str, words: str) -> None:
    arguments = ["bench", "-f", "qcow2", *words.split(), image]
    assert _timeless(blocklib(*arguments)) == _timeless(qemu_img(*arguments))


def test_called_as_qemu_img_it_is_the_same_command(qemu_img: Program, image: str) -> None:
    arguments = ["bench", "-f", "qcow2", "-c", "10", image]
    assert _timeless(CommandLine("qemu-img")(*arguments)) == _timeless(qemu_img(*arguments))


def test_it_writes_what_qemu_img_writes(blocklib: CommandLine, qemu_img: Program, here: Path) -> None:
    words = ["-c", "300", "-d", "5", "-s", "3000", "-S", "54321", "-o", "777", "-w", "--pattern=65"]
    for name in ("ours", "theirs"):
        (here / name).write_bytes(bytes(3 * MiB // 2))
    blocklib("bench", "-f", "raw", *words, "ours")
    qemu_img("bench", "-f", "raw", *words, "theirs")
    assert (here / "ours").read_bytes() == (here / "theirs").read_bytes()


@pytest.mark.parametrize("words", ["", "-w"])
def test_requests_past_the_end_fail_in_both(blocklib: CommandLine, qemu_img: Program, image: str, words: str) -> None:
    arguments = ["bench", *words.split(), "-f", "qcow2", "-c", "10", "-o", "4M", image]
    assert qemu_img.run(*arguments).returncode == 1
    assert "outside" in blocklib.fails(*arguments)


def test_a_chain_is_read_through(blocklib: CommandLine, image: str) -> None:
    blocklib("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", "top")
    blocklib("bench", "-w", "--pattern=5", "-c", "64", "-S", "64k", "top")
    blocklib("io", "-c", "read -P 5 0 4k", "-c", "read -P 7 4k 60k", "-c", "read -P 8 3076k 60k", "top")
    assert blocklib("check", "top").startswith("No errors")


def test_images_named_by_options_are_measured(blocklib: CommandLine, image: str) -> None:
    printed = blocklib("bench", "-c", "3", "--image-opts", f"driver=qcow2,file.filename={image}")
    assert printed.startswith("Sending 3 read requests, 4096 bytes each, 64 in parallel")


def test_writing_to_a_guessed_raw_image_warns(blocklib: CommandLine, here: Path) -> None:
    (here / "disk").write_bytes(bytes(MiB))
    assert "taken for a raw image" in blocklib.run("bench", "-c", "3", "-w", "disk").err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("", "one file name"),
        ("a b", "one file name"),
        ("-c x a", "number of requests"),
        ("-c -1 a", "number of requests"),
        ("-c 1k a", "number of requests"),
        ("-d 0 a", "queue depth"),
        ("-d 99999999999 a", "queue depth"),
        ("-s 3G a", "size of a request"),
        ("-s x a", "size of a request"),
        ("-S 3G a", "step"),
        ("-o -5 a", "offset"),
        ("-w --pattern=256 a", "pattern"),
        ("-i fast a", "fast"),
        ("-n a", "cache.direct"),
        ("-t fast a", "fast"),
        ("--flush-interval=64 a", "-w"),
        ("-w --flush-interval=63 a", "63"),
        ("-w -U a", "-U"),
        ("nowhere", "nowhere"),
        ("-f qcow2 a", "qcow2"),
    ],
)
def test_what_cannot_be_measured_is_one_line(blocklib: CommandLine, here: Path, words: str, part: str) -> None:
    (here / "a").write_bytes(bytes(1024))
    assert part in blocklib.fails("bench", *words.split())


def test_a_flush_is_due_whenever_its_multiple_of_requests_is_left() -> None:
    assert list(batches(10, 3, 0, drain=True)) == [(0, 3, False), (3, 3, False), (6, 3, False), (9, 1, False)]
    assert list(batches(10, 2, 4, drain=True)) == [(0, 2, True), (2, 2, False), (4, 2, True), (6, 2, False), (8, 2, False)]
    assert list(batches(7, 3, 3, drain=True)) == [(0, 1, True), (1, 3, True), (4, 3, False)]
    assert list(batches(7, 3, 3, drain=False)) == [(0, 3, True), (3, 3, True), (6, 1, False)]


def test_requests_go_round_at_the_end_and_only_the_first_may_lie_behind_it() -> None:
    assert places(10_240, 0, 3072, 0, 6).tolist() == [0, 3072, 6144, 9216, 2048, 5120]
    assert places(10_240, 20_480, 512, 0, 3).tolist() == [20_480, 512, 1024]
    assert places(0, 0, 512, 0, 2).tolist() == [0, 512]
