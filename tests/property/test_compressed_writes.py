"""Compressed writes among plain writes, discards, zeroes and flushes, against a bytearray; clean for qemu-img at the end."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.errors import StorageError
from tests.programs import Program
from tests.property.chains import first_difference

WIDTHS = (1, 2, 4, 8, 64)
IMAGES = (
    *(pytest.param({"cluster_size": 4096, "refcount_bits": bits}, 2 * MiB, id=f"4k-refcount{bits}") for bits in WIDTHS),
    pytest.param({"cluster_size": 512}, 300 * KiB + 512, id="512"),
    pytest.param({"cluster_size": 512, "compression_type": "zstd", "refcount_bits": 32}, 200 * KiB, id="512-zstd"),
    pytest.param({"cluster_size": 64 * KiB}, 8 * MiB - 5 * 512, id="64k"),
    pytest.param({"cluster_size": 64 * KiB, "compression_type": "zstd"}, 8 * MiB, id="64k-zstd"),
    pytest.param({"cluster_size": 2 * MiB, "refcount_bits": 16}, 24 * MiB + 512, id="2M"),
    pytest.param({"cluster_size": 16 * KiB, "extended_l2": True}, 4 * MiB, id="16k-subclusters"),
    pytest.param({"cluster_size": 8 * KiB, "compat": "0.10"}, 2 * MiB, id="8k-v2"),
    pytest.param({"cluster_size": 4 * KiB, "lazy_refcounts": True}, 2 * MiB, id="4k-lazy-refcounts"),
)


def some_bytes(choose: random.Random, length: int) -> bytes:
    """Text, noise, a mixture, or zeroes."""
    kind = choose.randrange(8)
    if kind == 0:
        return choose.randbytes(length)
    if kind == 1:
        return bytes(length)
    if kind == 2:
        part = choose.randrange(length)
        return choose.randbytes(part) + bytes((choose.randrange(256),)) * (length - part)
    word = choose.randbytes(choose.randrange(1, 300))
    return (word * (length // len(word) + 1))[:length]


def write_at_random(disk: blocklib.Disk, model: bytearray, seed: int, n: int, first: int, stop: int) -> tuple[int, int]:
    """`n` requests to guest bytes [first, stop), whole clusters; how many compressed writes were done, and how many refused."""
    choose = random.Random(seed)
    unit = disk.node.cluster_size() or 0
    done = refused = 0
    for _ in range(n):
        kind = choose.random()
        start = choose.randrange(first, stop) // unit * unit
        end = min(stop, start + unit * choose.choice((1, 1, 2, 3, 17)))
        if kind < 0.5:
            end = min(end, start + max(unit, 2 * MiB))  # what is written in one step or not at all
            data = some_bytes(choose, end - start)
            before = bytes(model[start:end])
            model[start:end] = data
            try:
                disk.write_compressed(start, data, level=choose.choice((None, 1, 6)))
                done += 1
            except StorageError as exc:
                if exc.operation != "write compressed":
                    raise
                model[start:end] = before
                refused += 1
        elif kind < 0.65:
            offset = choose.randrange(start, end)
            data = some_bytes(choose, min(end - offset, choose.randrange(1, 3 * unit)))
            disk.write(offset, data)
            model[offset : offset + len(data)] = data
        elif kind < 0.85:  # with discard=unmap and no backing file whole clusters read as zero
            disk.discard(start, end - start)
            model[start:end] = bytes(end - start)
        elif kind < 0.9:
            disk.write_zeroes(start, end - start, unmap=choose.random() < 0.5)
            model[start:end] = bytes(end - start)
        elif kind < 0.95:
            disk.flush()
        else:
            assert disk.read(start, end - start) == model[start:end]
    return done, refused


def _without(content: bytes | bytearray, bitmap: blocklib.Bitmap) -> bytearray:
    """`content` with zeroes where the bitmap is dirty."""
    rest = bytearray(content)
    for offset, length in bitmap.dirty_ranges().tolist():
        rest[offset : offset + length] = bytes(min(length, len(rest) - offset))
    return rest


@pytest.mark.parametrize(("options", "size"), IMAGES)
def test_compressed_writes_agree_with_a_model_and_the_image_is_clean(
    options: dict[str, Any], size: int, tmp_path: Path, qemu_img: Program
) -> None:
    path = tmp_path / "image.qcow2"
    blocklib.create(path, size, format="qcow2", options=options)
    model = bytearray(size)
    done = refused = 0
    for seed in range(3):
        with blocklib.open(path, "r+", format="qcow2", discard="unmap") as disk:
            before = bytes(model)
            if options.get("compat") != "0.10":
                bitmap = disk.bitmaps.add(f"since {seed}", persistent=True, granularity=512)
            one = write_at_random(disk, model, seed, 40, 0, size)
            done, refused = done + one[0], refused + one[1]
            assert not first_difference(disk.read(0, size), model)
            if options.get("compat") != "0.10":
                assert not first_difference(_without(before, bitmap), _without(model, bitmap))
        assert blocklib.check(path, format="qcow2").clean
        qemu_img("check", "-q", "-f", "qcow2", path)
    assert done
    assert refused
    raw = tmp_path / "image.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert not first_difference(raw.read_bytes(), model)


@pytest.mark.parametrize("bits", [2, 16])
def test_threads_that_compress_into_the_same_host_clusters_lose_nothing(bits: int, tmp_path: Path, qemu_img: Program) -> None:
    path = tmp_path / "image.qcow2"
    size, n_threads = 8 * MiB, 6
    blocklib.create(path, size, format="qcow2", options={"cluster_size": 4 * KiB, "refcount_bits": bits})
    model = bytearray(size)
    failures: list[BaseException] = []
    with blocklib.open(path, "r+", format="qcow2", discard="unmap") as disk:

        def work(number: int) -> None:
            part = size // n_threads // (4 * KiB) * (4 * KiB)
            try:
                write_at_random(disk, model, number, 60, number * part, (number + 1) * part)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert not first_difference(disk.read(0, size), model)
    qemu_img("check", "-q", "-f", "qcow2", path)
    with blocklib.open(path, format="qcow2") as disk:
        assert not first_difference(disk.read(0, size), model)
