"""Random writes, zeroes, discards, resizes, snapshots, applies and deletes against plain bytes.

After every step qemu-img finds no error and no leak, so all refcounts and copied flags are exact; at the end each snapshot
reads as it should, through blocklib and through QEMU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import blocklib
from blocklib.formats.qcow2.snapshots import tally
from tests.programs import Program

KIB = 1024


@dataclass
class Case:
    options: dict[str, int | str | bool]
    size: int
    backing: bool = False
    compressed: bool = False
    resizes: bool = False
    numpy: bool = False
    """Count with numpy, however little there is."""
    opened: dict[str, int | str | bool] = field(default_factory=dict)


CASES = {
    "version 2": Case({"compat": "0.10", "cluster_size": 4096}, 700 * KIB, compressed=True),
    "small clusters": Case({"cluster_size": 512}, 180 * KIB, resizes=True),
    "small clusters, numpy": Case({"cluster_size": 512}, 180 * KIB, resizes=True, numpy=True, compressed=True),
    "version 2, numpy": Case({"compat": "0.10", "cluster_size": 1024}, 300 * KIB, numpy=True),
    "default clusters": Case({}, 3000 * KIB, compressed=True, resizes=True),
    "over a backing file": Case({"cluster_size": 4096}, 500 * KIB, backing=True, resizes=True),
    "wide refcounts": Case({"cluster_size": 1024, "refcount_bits": 64}, 300 * KIB, numpy=True, compressed=True),
    "four bits": Case({"cluster_size": 2048, "refcount_bits": 4}, 300 * KIB),
    "two bits, numpy": Case({"cluster_size": 2048, "refcount_bits": 2}, 300 * KIB, numpy=True),
    "extended L2 entries": Case({"cluster_size": 16384, "extended_l2": True}, 900 * KIB, compressed=True, resizes=True),
    "extended L2 entries, numpy": Case(
        {"cluster_size": 16384, "extended_l2": True}, 900 * KIB, backing=True, resizes=True, numpy=True
    ),
    "small cache": Case(
        {"cluster_size": 4096}, 9000 * KIB, opened={"l2-cache-size": 4096, "l2-cache-entry-size": 512}, resizes=True
    ),
}


class Machine:
    """One image, what it should hold, and what its snapshots should hold."""

    def __init__(self, case: Case, folder: Path, seed: int, qemu_img: Program, qemu_io: Program) -> None:
        self.case = case
        self.rnd = random.Random(seed)
        self.path = folder / "disk.qcow2"
        self.copy = folder / "copy.raw"
        self.qemu_img = qemu_img
        base = None
        content = bytearray(case.size)
        if case.backing:
            base = folder / "base.raw"
            content[:] = self.rnd.randbytes(case.size)
            base.write_bytes(content)
        backing_format = "raw" if base else None
        blocklib.create(
            self.path, case.size, format="qcow2", backing=base, backing_format=backing_format, options=case.options
        )
        if case.compressed:
            cluster = int(case.options.get("cluster_size", 65536))
            for number in range(0, 12, 2):
                qemu_io("-f", "qcow2", "-c", f"write -c -P {number + 1} {number * cluster} {2 * cluster}", self.path)
                content[number * cluster : (number + 2) * cluster] = bytes((number + 1,)) * (2 * cluster)
        self.content = content
        self.saved: dict[str, bytes] = {}
        self.number = 0
        self.disk = self._open()

    def _open(self, mode: str = "r+", **snapshot: str) -> blocklib.Disk:
        options = {**self.case.opened, **{f"snapshot.{key}": value for key, value in snapshot.items()}}
        return blocklib.open(
            self.path,
            "r+" if mode == "r+" else "r",
            format="qcow2",
            references="allow",
            cache="unsafe",  # nothing crashes here
            discard="unmap",
            options=options,
        )

    def step(self) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (9, self._write),
            (4, self._write_compressed),
            (3, self._zero),
            (2, self._discard),
            (5, self._create),
            (3, self._apply),
            (3, self._delete),
            (1, self._reopen),
        ]
        if self.case.resizes:
            actions.append((2, self._resize))
        self.rnd.choices([action for _, action in actions], [weight for weight, _ in actions])[0]()

    def _place(self) -> tuple[int, int]:
        offset = self.rnd.randrange(len(self.content))
        return offset, min(self.rnd.choice((1, 600, 5000, 40_000)), len(self.content) - offset)

    def _write(self) -> None:
        offset, length = self._place()
        data = self.rnd.randbytes(length)
        self.disk.write(offset, data)
        self.content[offset : offset + length] = data

    def _write_compressed(self) -> None:
        """Whole clusters, which may be allocated already: then the request is refused, and nothing has changed."""
        cluster = int(self.case.options.get("cluster_size", 65536))
        offset = self._place()[0] // cluster * cluster
        data = bytes((self.rnd.randrange(256),)) * min(self.rnd.choice((1, 2, 9)) * cluster, len(self.content) - offset)
        try:
            self.disk.write_compressed(offset, data)
        except blocklib.StorageError as exc:
            if exc.operation != "write compressed":
                raise
            return
        self.content[offset : offset + len(data)] = data

    def _zero(self) -> None:
        offset, length = self._place()
        self.disk.write_zeroes(offset, length, unmap=self.rnd.random() < 0.5)
        self.content[offset : offset + length] = bytes(length)

    def _discard(self) -> None:
        offset, length = self._place()
        self.disk.discard(offset, length)
        self.content[offset : offset + length] = self.disk.read(offset, length)  # the driver's choice

    def _create(self) -> None:
        self.number += 1
        name = f"snapshot {self.number}"
        try:
            assert self.disk.snapshots.create(name).name == name
        except blocklib.ImageLimitError:
            assert self.case.options.get("refcount_bits") in (2, 4)
            return
        self.saved[name] = bytes(self.content)

    def _apply(self) -> None:
        if not self.saved:
            return
        name = self.rnd.choice(list(self.saved))
        try:
            self.disk.snapshots[name].apply()
        except blocklib.ImageLimitError:
            assert self.case.options.get("refcount_bits") in (2, 4)
            return
        self.content = bytearray(self.saved[name])

    def _delete(self) -> None:
        if self.saved:
            name = self.rnd.choice(list(self.saved))
            self.disk.snapshots[name].delete()
            del self.saved[name]

    def _resize(self) -> None:
        cluster = int(self.case.options.get("cluster_size", 65536))
        least = max([cluster, *(len(content) for content in self.saved.values())])
        size = max(least, len(self.content) + self.rnd.choice((-20, -3, 1, 5, 70)) * 1536 // 512 * 512) // 512 * 512
        self.disk.truncate(size, shrink=True)
        self.content = self.content[:size] + bytes(max(0, size - len(self.content)))

    def _reopen(self) -> None:
        self.disk.close()
        self.disk = self._open()

    def verify_all(self) -> None:
        assert [snapshot.name for snapshot in self.disk.snapshots] == list(self.saved)
        self.disk.close()
        for number, (name, content) in enumerate(self.saved.items()):
            with self._open("r", name=name) as past:
                assert past.size == len(content)
                assert past.read(0, past.size) == content, name
                table = past.map()
                assert int(table["length"].sum()) == past.size
            if len(content) == len(self.content):  # QEMU reads a snapshot with the size that the disk has now
                wanted = f"snapshot.name={name}" if number % 2 else name
                self.qemu_img("convert", "-l", wanted, "-O", "raw", self.path, self.copy)
                assert self.copy.read_bytes() == content, name
        self.qemu_img("convert", "-O", "raw", self.path, self.copy)
        assert self.copy.read_bytes() == self.content
        self.disk = self._open()


def run(machine: Machine, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_SMALL", -1 if machine.case.numpy else 1 << 40)
    for _ in range(steps):
        machine.step()
        assert machine.disk.size == len(machine.content)
        assert machine.disk.read(0, machine.disk.size) == machine.content
        machine.disk.flush()
        machine.disk.flush()  # what the first set free is counted so by the second
        machine.qemu_img("check", "-U", "-q", "-f", "qcow2", machine.path)
    machine.verify_all()
    machine.disk.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_image_with_snapshots_is_what_the_model_says(
    case: Case, tmp_path: Path, qemu_img: Program, qemu_io: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Machine(case, tmp_path, 3, qemu_img, qemu_io), 20, monkeypatch)


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_and_so_it_is_after_many_more_steps(
    case: Case, seed: int, tmp_path: Path, qemu_img: Program, qemu_io: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Machine(case, tmp_path, 100 + seed, qemu_img, qemu_io), 400, monkeypatch)
