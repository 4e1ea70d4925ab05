"""A program that is killed in the middle of its work: what it flushed is there, and at worst clusters have leaked.

A killed process loses what it had not yet given to the kernel; what a lost machine loses is the matter of tests/crash.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import blocklib
from blocklib import KiB
from tests.interop.crashing import STEPS, steps
from tests.programs import TIMEOUT, Program
from tests.property.chains import ChainImage, ImageSpec, build_chain, noise, open_image

ROOT = Path(__file__).parents[2]
WITHIN_FLUSHES = 6
BETWEEN_FLUSHES = 2


class Flushed(NamedTuple):
    """A flush of the crashing program: how many steps it made durable, its first write, and the first write after it."""

    steps: int
    first_write: int
    stop_write: int


def run(image: ChainImage, seed: int, write: int) -> tuple[int, list[Flushed]]:
    """(exit code, flushes) of the crashing program."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.crashing", str(image.path), str(seed), str(write)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, [Flushed(*map(int, line.split())) for line in done.stdout.splitlines()]


def moments_to_die(seed: int, flushes: list[Flushed]) -> list[int]:
    """Numbers of writes: most are those of flushes, where the order matters, some are between them."""
    choose = random.Random(seed)
    within = [write for flush in flushes for write in range(flush.first_write, flush.stop_write)]
    between = sorted({*range(1, flushes[-1].stop_write)} - {*within})
    return [*choose.sample(within, WITHIN_FLUSHES), *choose.sample(between, BETWEEN_FLUSHES)]


def make_image(folder: Path, spec: ImageSpec) -> ChainImage:
    folder.mkdir()
    base, top = build_chain(folder, [ImageSpec(spec.size - 5 * KiB, "raw"), spec], [(), ()])
    with blocklib.open(base.path, "r+", format="raw") as disk:
        disk.write(0, noise(7, base.size))
    base.write(0, noise(7, base.size))
    top.write(0, bytes(base.content))
    return top


def assert_flushed_content_is_there(image: ChainImage, seed: int, durable: int) -> None:
    """Each byte is as the last durable step left it (-1: as before the first), or as one of the steps after it would."""
    with open_image(image) as disk:
        found = np.frombuffer(disk.read(0, disk.size), np.uint8)
    explained = found == np.frombuffer(image.content, np.uint8) if durable < 0 else np.zeros(len(found), bool)
    for number, step in enumerate(steps(seed)):
        if step is not None:
            step.note(image, discard_passes=True)
        if number >= durable or number == STEPS - 1:
            explained |= found == np.frombuffer(image.content, np.uint8)
    assert explained.all(), f"byte {int(np.argmin(explained))}"


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(ImageSpec(600 * KiB, cluster_size=4 * KiB), id="4k"),
        pytest.param(ImageSpec(60 * KiB, cluster_size=512, refcount_bits=64), id="512-refcount64"),
        pytest.param(ImageSpec(60 * KiB, cluster_size=512, compat="0.10"), id="512-v2"),
        pytest.param(ImageSpec(3000 * KiB, cluster_size=64 * KiB, refcount_bits=1), id="64k-refcount1"),
    ],
)
def test_a_killed_program_leaves_what_it_flushed_and_at_worst_leaks(spec: ImageSpec, tmp_path: Path, qemu_img: Program) -> None:
    seed = spec.cluster_size + spec.refcount_bits
    image = make_image(tmp_path / "alive", spec)
    code, flushes = run(image, seed, 0)
    assert code == 0
    assert_flushed_content_is_there(image, seed, STEPS)
    qemu_img("check", "-q", image.path)
    for write in moments_to_die(seed, flushes):
        image = make_image(tmp_path / str(write), spec)
        code, flushes = run(image, seed, write)
        assert code == -signal.SIGKILL
        qemu_img("check", "-q", image.path, codes=(0, 3))
        assert_flushed_content_is_there(image, seed, flushes[-1].steps if flushes else -1)
        with open_image(image, "r+") as disk:
            disk.write(0, b"life goes on")
        qemu_img("check", "-q", image.path, codes=(0, 3))
