"""Processes that are killed: the image opens, is sound or leaks, and has what was flushed.

What a killed process had given to the kernel is there; what a lost machine loses is the matter of tests/crash.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.workloads import LARGE, WORKLOADS
from tests.programs import TIMEOUT, find_program

ROOT = Path(__file__).parents[2]
VERBS = (
    "convert",
    "convert to new",
    "convert, large",
    "commit",
    "mirror",
    "repair",
    "rebase",
    "snapshots",
    "resize",
    "amend refcount_bits",
    "bitmaps",
    "nbd allocating writes",
)
ALL = (*(workload.name for workload in (*WORKLOADS, *LARGE) if workload.images), "nbd allocating writes", "nbd batches")


def kill(name: str, folder: Path, kills: int, seed: int) -> None:
    qemu_img = find_program("qemu-img")
    if qemu_img is None:
        print("no qemu-img here: only our own check looks at the images")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killing", folder / "images", name, str(kills), str(seed), qemu_img or ""],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT if kills < 20 else None,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    killed = int(done.stdout)
    print(f"{name}: {killed} of {kills} processes were killed before they had done all")
    assert killed >= kills // 4


@pytest.mark.parametrize("name", VERBS)
def test_a_killed_process_leaves_what_it_flushed(name: str, tmp_path: Path) -> None:
    kill(name, tmp_path, 6, 1)


@pytest.mark.torture
@pytest.mark.parametrize("name", ALL)
def test_torture(name: str, tmp_path: Path) -> None:
    kill(name, tmp_path, 200, 2)
