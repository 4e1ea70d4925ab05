"""Eight threads on an overlay whose tables are all in memory, while clusters are discarded and used again.

The recipe under which other implementations have mixed up the data of guests; run with kernels as users have them, with kernels
that check their bounds, and with none, where the definitions do all the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from blocklib import KiB, batch
from tests.kernels import running
from tests.programs import Program
from tests.property.chains import first_difference
from tests.property.test_threads import SECTOR, THREADS, Owner, assert_clean, make_overlay, open_overlay, run_together

IMAGES: Final[dict[str, dict[str, Any]]] = {
    "64k": {"cluster_size": 64 * KiB},
    "4k": {"cluster_size": 4 * KiB},
    "subclusters": {"cluster_size": 16 * KiB, "extended_l2": True},
}


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Which kernels the process has; where it has some, they are used whatever the size of the work."""
    before = sys.getswitchinterval()
    with running(request.param):
        if request.param != "off":
            batch.expect(1_000_000, writing=True)
        sys.setswitchinterval(1e-5)
        yield
    sys.setswitchinterval(before)


def stress(options: dict[str, Any], seconds: float, folder: Path, qemu_img: Program) -> int:
    """Rounds of eight threads until the time is over; the whole disk is compared after each.  Returns how many there were."""
    cluster_size = options["cluster_size"]
    part = 5 * cluster_size + 3 * SECTOR + 40 * KiB
    path = make_overlay(folder, THREADS * part, options)
    rounds = 0
    with open_overlay(path, "r+") as disk:
        content = disk.read(0, disk.size)
        end = time.monotonic() + seconds
        while not rounds or time.monotonic() < end:
            owners = [
                Owner(disk, number, number * part, bytearray(content[number * part :][:part]), cluster_size, True, 40, rounds)
                for number in range(THREADS)
            ]
            run_together(*(owner.work for owner in owners))
            content = b"".join(owner.content for owner in owners)
            assert not first_difference(disk.read(0, disk.size), content), f"round {rounds}"
            rounds += 1
    assert_clean(path, content, qemu_img)
    return rounds


# Compiling kernels with bounds checks takes longer than to run them: here one test in one process does, below all do.
@pytest.mark.parametrize(
    ("kernels", "name"),
    [*((kernels, name) for kernels in ("compiled", "off") for name in IMAGES), ("checked", "64k")],
    indirect=["kernels"],
)
@pytest.mark.usefixtures("kernels")
def test_discarded_and_reused_clusters_keep_their_content_under_eight_threads(
    name: str, tmp_path: Path, qemu_img: Program
) -> None:
    stress(IMAGES[name], 5 / len(IMAGES), tmp_path, qemu_img)


@pytest.mark.torture
@pytest.mark.parametrize("kernels", ["compiled", "checked", "off"], indirect=True)
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.usefixtures("kernels")
def test_the_same_for_a_minute(name: str, tmp_path: Path, qemu_img: Program) -> None:
    print(f"{stress(IMAGES[name], 60, tmp_path, qemu_img)} rounds of 8 x 40 steps")
