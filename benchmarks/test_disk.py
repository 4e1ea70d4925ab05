"""Requests inside one process, single and by the batch, beside the system call that none can do without."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blocklib
from benchmarks.environments import Images
from blocklib import GiB, KiB, MiB

LENGTH = 4 * KiB
# Every block of the first 64 MiB once, in no order; a few L2 entries' worth, so that the page cache is all that is read.
OFFSETS = [index * 6553 % (64 * MiB // LENGTH) * LENGTH for index in range(64 * MiB // LENGTH)]
ROUNDS, ITERATIONS = 50, 2000

pytestmark = pytest.mark.benchmark(group="one request of 4 KiB from the page cache")


@pytest.fixture
def offsets() -> Iterator[int]:
    return cycle(OFFSETS)


@pytest.fixture
def batches() -> Callable[[int], Iterator[array[int]]]:
    """Offsets by the batch, again and again."""
    return lambda depth: cycle([array("q", OFFSETS[first : first + depth]) for first in range(0, len(OFFSETS), depth)])


@pytest.fixture
def writable(images: Images, tmp_path: Path) -> Iterator[blocklib.Disk]:
    """An overlay of 1 GiB whose first 64 MiB are its own."""
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, GiB, format="qcow2")
    with blocklib.open(path, "r+") as disk:
        for offset in range(0, 64 * MiB, MiB):
            disk.write(offset, bytes(MiB))
        disk.flush()
        yield disk


def test_preadv(benchmark: BenchmarkFixture, images: Images, offsets: Iterator[int]) -> None:
    buffer = [bytearray(LENGTH)]
    file = os.open(images["dense-64k.qcow2"], os.O_RDONLY)
    benchmark.pedantic(lambda: os.preadv(file, buffer, next(offsets)), rounds=ROUNDS, iterations=ITERATIONS)
    os.close(file)


@pytest.mark.parametrize("image", ["dense-64k.qcow2", "depth-8.qcow2", "depth-64.qcow2"])
def test_readinto(benchmark: BenchmarkFixture, images: Images, offsets: Iterator[int], image: str) -> None:
    buffer = bytearray(LENGTH)
    with blocklib.open(images[image], format="qcow2", references="allow") as disk:
        benchmark.pedantic(lambda: disk.readinto(next(offsets), buffer), rounds=ROUNDS, iterations=ITERATIONS)


def test_read(benchmark: BenchmarkFixture, images: Images, offsets: Iterator[int]) -> None:
    with blocklib.open(images["dense-64k.qcow2"]) as disk:
        benchmark.pedantic(lambda: disk.read(next(offsets), LENGTH), rounds=ROUNDS, iterations=ITERATIONS)


def test_write(benchmark: BenchmarkFixture, writable: blocklib.Disk, offsets: Iterator[int]) -> None:
    data = bytes(LENGTH)
    benchmark.pedantic(lambda: writable.write(next(offsets), data), rounds=ROUNDS, iterations=ITERATIONS)


@pytest.mark.parametrize("image", ["dense-64k.qcow2", "depth-8.qcow2", "depth-64.qcow2"])
@pytest.mark.parametrize("depth", [64, 1024])
def test_read_batch(
    benchmark: BenchmarkFixture, images: Images, batches: Callable[[int], Iterator[array[int]]], image: str, depth: int
) -> None:
    batch = batches(depth)
    out = bytearray(depth * LENGTH)
    with blocklib.open(images[image], format="qcow2", references="allow") as disk:
        benchmark.extra_info["requests"] = depth
        benchmark.pedantic(lambda: disk.read_batch(next(batch), LENGTH, out), rounds=ROUNDS, iterations=20)


@pytest.mark.parametrize("depth", [64, 1024])
def test_write_batch(
    benchmark: BenchmarkFixture, writable: blocklib.Disk, batches: Callable[[int], Iterator[array[int]]], depth: int
) -> None:
    batch = batches(depth)
    data = bytes(depth * LENGTH)
    benchmark.extra_info["requests"] = depth
    benchmark.pedantic(lambda: writable.write_batch(next(batch), data), rounds=ROUNDS, iterations=20)
