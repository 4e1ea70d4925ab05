"""Random changes of a chain in use: jobs, overlays, filters and snapshots one after the other, while writers go on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import MiB, ThrottleGroup, jobs
from blocklib.insertion import InsertedFilter
from tests.writers import is_clean, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 8 * MiB


class _Changes:
    """One disk, and what can be done to its graph; every change ends before the next begins."""

    def __init__(self, folder: Path, disk: blocklib.Disk, rng: random.Random) -> None:
        self._folder = folder
        self._disk = disk
        self._rng = rng
        self._made = 0
        self._group = ThrottleGroup({"iops-total": 20000})
        self._filters: list[InsertedFilter] = []

    def _path(self) -> Path:
        self._made += 1
        return self._folder / f"{self._made}.qcow2"

    def change(self) -> None:
        long = len(self._disk.chain()) > 3
        self._rng.choice(
            [self._stream, self._commit, self._commit_below]
            if long
            else [
                self._overlay,
                self._overlay,
                self._stream,
                self._commit,
                self._commit_cancelled,
                self._commit_below,
                self._mirror,
                self._mirror_cancelled,
                self._backup,
                self._filter,
                self._filter,
                self._remove_filter,
                self._snapshot,
            ]
        )()

    def _overlay(self) -> None:
        self._disk.add_overlay(self._path(), format="qcow2")

    def _stream(self) -> None:
        chain = self._disk.chain()
        if len(chain) > 1:
            below = self._rng.choice([None, *chain[1:]])
            jobs.stream(self._disk, base=below).wait(timeout=60)

    def _commit(self) -> None:
        chain = self._disk.chain()
        if len(chain) > 1:
            job = jobs.commit(self._disk, base=self._rng.choice(chain[1:]))
            job.wait(timeout=60, until="ready")
            self._rng.choice([job.complete, job.complete, job.cancel])()
            job.wait(timeout=60)

    def _commit_cancelled(self) -> None:
        if len(self._disk.chain()) > 1:
            job = jobs.commit(self._disk)
            job.cancel(force=True)
            with pytest.raises(blocklib.JobCancelled):
                job.wait(timeout=60)

    def _commit_below(self) -> None:
        below = self._disk.chain()[1:]
        if len(below) > 1:
            top = self._rng.randrange(len(below) - 1)
            base = self._rng.choice(below[top + 1 :])
            jobs.commit(self._disk, top=below[top], base=base).wait(timeout=60)

    def _mirror(self) -> None:
        sync = self._rng.choice(["full", "top", "none"])
        mode = self._rng.choice(["background", "write-blocking"])
        job = jobs.mirror(self._disk, self._path(), format="qcow2", sync=sync, copy_mode=mode)  # type: ignore[arg-type]
        job.wait(timeout=60, until="ready")
        job.complete()
        job.wait(timeout=60)

    def _mirror_cancelled(self) -> None:
        job = jobs.mirror(self._disk, self._path(), format="qcow2")
        job.cancel(force=True)
        with pytest.raises(blocklib.JobCancelled):
            job.wait(timeout=60)

    def _backup(self) -> None:
        jobs.backup(self._disk, self._path(), format="qcow2").wait(timeout=60)

    def _filter(self) -> None:
        target = {"driver": "memory", "size": SIZE}
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("throttle", {"throttle-group": self._group}),
            ("copy-on-read", {}),
            ("compress", {}),
            ("copy-before-write", {"target": target}),
        ]
        driver, options = self._rng.choice(kinds)
        self._filters.append(self._disk.insert_filter(driver, options))
        if len(self._filters) > 2 or self._rng.random() < 0.3:
            self._remove_filter()

    def _remove_filter(self) -> None:
        if self._filters:
            self._filters.pop(self._rng.randrange(len(self._filters))).remove()

    def _snapshot(self) -> None:
        self._disk.snapshots.create("now").delete()


def _run(folder: Path, seed: int, changes: int) -> None:
    blocklib.create(folder / "0.qcow2", SIZE, format="qcow2")
    model = bytearray(SIZE)
    with blocklib.open(folder / "0.qcow2", "r+", format="qcow2", discard="unmap") as disk:
        graph = _Changes(folder, disk, random.Random(seed))
        with writing(disk, model, 2, seed=seed) as writers:
            for _ in range(changes):
                graph.change()
                writers.wait_for(2)
        assert disk.read(0, SIZE) == model
        top = [Path(str(image.filename)) for image in disk.chain()]
    assert qemu_content(top[0], folder) == model
    assert all(is_clean(path) for path in top)


@pytest.mark.parametrize("seed", range(3))
def test_writers_never_notice_what_happens_to_their_chain(tmp_path: Path, seed: int) -> None:
    _run(tmp_path, seed, 15)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(100, 110))
def test_a_thousand_changes_under_writers(tmp_path: Path, seed: int) -> None:
    _run(tmp_path, seed, 100)
