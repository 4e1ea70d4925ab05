"""A process that is killed while a job rearranges its chain under guests: what was flushed is there, images leak at worst."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import blocklib
from tests.interop.killed_jobs import ENDED, ENDING, GUESTS, JOURNAL_LENGTH, KINDS, SIZE, WORKING, Journal
from tests.jobs_model import STRIPE, Guest
from tests.writers import make_chain, qemu_content

pytestmark = pytest.mark.requires("qemu-img")

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


def _kill_amid(kind: str, folder: Path, seed: int) -> Journal:
    """Run the program in `folder` and kill it at some moment after its job has begun to work."""
    rng = random.Random(seed)
    (folder / "journal").write_bytes(bytes(JOURNAL_LENGTH))
    journal = Journal(folder / "journal")
    command = [sys.executable, "-m", "tests.interop.killed_jobs", kind, str(seed)]
    # Its modules are found from the root; its images are in its folder.
    with (folder / "errors").open("w") as errors:
        program = subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": "/"}, stderr=errors)
    try:
        deadline = time.monotonic() + PATIENCE
        wanted = rng.choice([WORKING, WORKING, WORKING, ENDING, ENDED])
        while journal.phase < wanted and program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)  # another process changes it: nothing can be waited for
        time.sleep(rng.random() * (0.5 if wanted == WORKING else 0.02))
    finally:
        program.kill()
        code = program.wait()
    assert code == -9, (folder / "errors").read_text()
    assert journal.phase >= wanted
    return journal


def _is_allowed(content: bytes, initial: bytes, journal: Journal, seed: int) -> bool:
    """Whether each byte is one that a guest wrote there last before its last flush, or later."""
    found = np.frombuffer(content, np.uint8)
    for number in range(GUESTS):
        guest = Guest(number, GUESTS, SIZE, seed * 100 + number)
        requests = [guest.invent()[0] for _ in range(journal.begun[number])]
        state = np.frombuffer(initial, np.uint8).copy()
        for offset, data in requests[: journal.flushed[number]]:
            state[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        fine = found == state
        for offset, data in requests[journal.flushed[number] :]:
            fine[offset : offset + len(data)] |= found[offset : offset + len(data)] == np.frombuffer(data, np.uint8)
        if not all(fine[start : start + STRIPE].all() for start in guest.stripes):
            return False
    return True


def _run(kind: str, folder: Path, seed: int) -> None:
    print(f"{kind}, seed {seed}")
    paths, model = make_chain(folder, 3, SIZE)
    copy = folder / "copy.qcow2"
    if kind == "backup-incremental":
        with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
            disk.bitmaps.add("changes", persistent=True)
            blocklib.convert(disk, copy, format="qcow2")
    journal = _kill_amid(kind, folder, seed)
    top = folder / "over.qcow2" if kind == "overlay" else paths[-1]
    continues = {"mirror": copy, "mirror-blocking": copy, "mirror-top": copy, "commit": paths[0]}.get(kind, top)
    allowed = {WORKING: [top], ENDING: [top, continues], ENDED: [continues]}[journal.phase]
    assert any(_is_allowed(qemu_content(path, folder), bytes(model), journal, seed) for path in allowed)
    for image in folder.glob("*.qcow2"):
        check = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
        assert check.returncode in (0, 3), f"{image.name}: {check.stdout}{check.stderr}"
    if kind == "backup-incremental":  # nobody can take it for what was written since
        with blocklib.open(paths[-1], format="qcow2", references="allow") as disk:
            assert disk.bitmaps["changes"].inconsistent
    # What is left can be worked on: nothing is locked, and the chain is whole.
    with blocklib.open(allowed[-1] if journal.phase != ENDING else top, "r+", format="qcow2", references="allow") as disk:
        disk.write(0, b"goes on")
        assert disk.read(0, 7) == b"goes on"


@pytest.mark.parametrize("kind", ["mirror", "commit", "backup-compressed"])
def test_a_job_that_is_killed_loses_nothing_that_was_flushed(tmp_path: Path, kind: str) -> None:
    _run(kind, tmp_path, 1)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(100, 120))
@pytest.mark.parametrize("kind", KINDS)
def test_every_job_is_killed_at_many_moments(tmp_path: Path, kind: str, seed: int) -> None:
    _run(kind, tmp_path, seed)
