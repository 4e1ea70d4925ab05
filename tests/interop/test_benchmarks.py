"""The benchmarks are runnable: every command of the table is one that its program takes, and the written images are sound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.cases import CASES, QUICK, TABLE, Case
from benchmarks.costs import count
from benchmarks.document import PAGE, plots, sections
from benchmarks.environments import RECIPES_BY_NAME, Images
from benchmarks.measure import Comparison, Result, Runner, Sample
from benchmarks.qcow2_writer import write_image
from benchmarks.report import HEADING, line, missed
from tests.programs import Program

KiB, MiB = 1 << 10, 1 << 20
SMALL = {case.name: case for case in CASES if case in TABLE or (case.name in QUICK and "direct" not in case.name)}


class SmallImages(Images):
    """An image of a MiB under every name, all with the same content, where the real ones take minutes to make."""

    def __getitem__(self, name: str) -> Path:
        assert name in RECIPES_BY_NAME
        path = self.folder / name
        if path.suffix == ".raw":
            path.write_bytes(b"".join((b"y" if number % 3 == 0 else b"\0") * 64 * KiB for number in range(16)))
        elif not path.exists():
            backing = {
                "overlay.qcow2": "../dense-64k.qcow2",
                "over-sixty.qcow2": "../sixty.qcow2",
                "over-middle.qcow2": "middle.qcow2",
                "sixty-over-base.qcow2": "base.qcow2",
                "top-on-copy.qcow2": "base.qcow2",
                "top-on-a.qcow2": "../base-a.qcow2",
            }.get(name)
            if backing and backing.startswith("../"):
                self[backing.removeprefix("../")]
            clusters = np.arange(0, 16, 3, dtype=np.uint64)
            write_image(path, MiB, clusters, backing=backing, fill=[b"y" * 64 * KiB] * len(clusters))
        return path


@pytest.fixture(scope="module")
def small_runner(qemu_img: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(SmallImages(tmp_path_factory.mktemp("images"))) as runner:
        yield runner


def _few_requests(case: Case) -> Case:
    def shortened(steps: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(re.sub(r" -c \d+", " -c 9", step) for step in steps)

    return replace(case, ours=shortened(case.ours), theirs=tuple(shortened(steps) for steps in case.theirs))


@pytest.mark.parametrize("name", SMALL)
def test_both_programs_take_what_a_case_asks_for(small_runner: Runner, name: str) -> None:
    comparison = Comparison(small_runner, _few_requests(SMALL[name]))
    comparison.run_theirs()
    comparison.run_ours()
    result = comparison.result()
    assert result.ours.seconds > 0 < result.theirs.seconds
    assert result.ours.peak_bytes > MiB < result.theirs.peak_bytes
    assert Result.from_json(result.as_json()) == result
    assert line(SMALL[name], result).startswith(name)


def test_every_image_of_a_case_has_a_recipe() -> None:
    commands = [step for case in CASES for steps in (case.ours, *case.theirs) for step in steps]
    named = {name for step in commands for name in re.findall(r"{([^}]+)}", step)}
    named |= {image for case in CASES for _name, image in case.copies}
    assert named <= RECIPES_BY_NAME.keys()
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_result_says_which_targets_it_misses(small_runner: Runner) -> None:
    comparison = Comparison(small_runner, SMALL["check-full"])
    comparison.run_theirs()
    comparison.run_ours()
    result = comparison.result()
    assert missed(replace(SMALL["check-full"], target=1e-9, peak_mib=1), result) == ["SLOWER", "PEAK>1"]
    assert missed(replace(SMALL["check-full"], target=1e9, peak_mib=10_000), result) == []
    assert len(HEADING.split()) == 9


def test_saved_results_become_tables_and_plots() -> None:
    sample = Sample(0.5, 0.25, 3 * MiB)
    results = {case.name: Result(case.name, sample, replace(sample, seconds=1.0), 3, "") for case in CASES}
    costs = {"raw-qcow2": {"ours": {"read": [7, 2 * MiB]}, "theirs": {"seek": [1234, 0]}}}
    made = sections({"cores": 2}, results, {"test_readinto": 4e-6}, costs)
    assert made["machine"] == "- cores: 2\n"
    assert made["targets"].count("| **0.50** |") == len(TABLE)
    assert "| `deflate` | **0.50** | 0.2, 256 MiB | missed |" in made["targets"]
    assert "| `readinto` | 4.00 |" in made["requests"]
    assert "| `raw-qcow2` | blocklib | 7 (2.0 MiB) |" in made["costs"]
    for name in made:
        assert PAGE.read_text().count(f"<!-- begin {name} -->") == PAGE.read_text().count(f"<!-- end {name} -->") == 1
    for name, svg in plots(results).items():
        assert f"(plots/{name})" in PAGE.read_text()
        assert len(ElementTree.fromstring(svg).findall("{*}polyline")) >= 4


def test_calls_on_image_files_are_counted_whether_they_are_interrupted_in_the_log_or_not() -> None:
    lines = [
        '10 pread64(3</images/a>, ""..., 4096, 0) = 4096',
        '11 preadv(3</images/a>, [{iov_base=""..., iov_len=4096}], 1, 0 <unfinished ...>',
        '10 read(4</usr/lib/x>, ""..., 832) = 832',
        '11 <... preadv resumed>) = 512',
        "10 lseek(3</images/a>, 0, SEEK_HOLE) = 65536",
        "10 fdatasync(3</images/a> <unfinished ...>",
        "10 <... fdatasync resumed>) = 0",
        "11 <... lseek resumed>) = 7",
        '10 pwrite64(3</images/a>, ""..., 512, 0) = -1 EIO (Input/output error)',
    ]
    calls, moved = count(lines, "/images")
    assert calls == {"read": 2, "seek": 1, "flush": 1, "write": 1}
    assert (moved["read"], moved["write"]) == (4608, 0)


@pytest.mark.parametrize("cluster_bits", [12, 16, 21])
@pytest.mark.parametrize("backing", [None, "below.qcow2"])
def test_written_images_are_sound(qemu_img: Program, tmp_path: Path, cluster_bits: int, backing: str | None) -> None:
    size = 16 * MiB
    cluster = 1 << cluster_bits
    clusters = np.random.default_rng(1).permutation(size // cluster)[: size // cluster // 2].astype(np.uint64)
    pieces = [bytes([1 + number % 255]) * cluster for number in range(len(clusters))]
    below = bytearray(size)
    if backing is not None:
        below[:MiB] = b"\xff" * MiB
        write_image(tmp_path / backing, size, np.arange(16, dtype=np.uint64), fill=[b"\xff" * MiB])
    write_image(tmp_path / "disk.qcow2", size, clusters, cluster_bits=cluster_bits, backing=backing, fill=pieces)
    report = qemu_img.json("check", tmp_path / "disk.qcow2")
    assert report["check-errors"] == 0
    assert not {"leaks", "corruptions"} & report.keys()
    expected = below
    for number, piece in zip(clusters.tolist(), pieces, strict=True):
        expected[number * cluster : (number + 1) * cluster] = piece
    qemu_img("convert", "-O", "raw", tmp_path / "disk.qcow2", tmp_path / "disk.raw")
    assert (tmp_path / "disk.raw").read_bytes() == expected
