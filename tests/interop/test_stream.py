"""stream on disks in use: the content stays, the chain gets shorter, and QEMU agrees with both."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB, NameNotFoundError, ReadOnlyError, UsageError, jobs

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 32 * MiB


def _chain(folder: Path, depth: int, options: Mapping[str, int | str] | None = None) -> tuple[list[Path], bytearray]:
    """A chain of images, base first, each with random blocks, some zeroes and its own idea of how long the disk is."""
    rng = random.Random(depth)
    model = bytearray(SIZE)
    paths: list[Path] = []
    for level in range(depth):
        path = folder / f"{level}.qcow2"
        below = paths[-1].name if paths else None
        blocklib.create(path, SIZE, format="qcow2", backing=below, backing_format="qcow2" if below else None, options=options)
        paths.append(path)
        with blocklib.open(path, "r+", format="qcow2", references="allow") as disk:
            for _ in range(25):
                offset, length = rng.randrange(SIZE - 100 * KiB), rng.randrange(1, 100 * KiB)
                data = rng.randbytes(length)
                disk.write(offset, data)
                model[offset : offset + length] = data
            for _ in range(5):
                offset, length = rng.randrange(SIZE // 65536 - 4) * 65536, 65536 * rng.randrange(1, 4)
                disk.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
    return paths, model


@contextmanager
def _writers(disk: blocklib.Disk, model: bytearray, count: int = 3) -> Iterator[None]:
    """Threads that write random blocks, each in its own part of the disk, until the block ends."""
    stop = threading.Event()
    failures: list[BaseException] = []
    part = SIZE // count

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            while not stop.is_set():
                offset, length = number * part + rng.randrange(part - 20000), rng.randrange(1, 20000)
                data = rng.randbytes(length)
                disk.write(offset, data)
                model[offset : offset + length] = data
                assert disk.read(offset, length) == data
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures


def _qemu_chain(path: Path) -> list[str]:
    done = subprocess.run(
        ["qemu-img", "info", "--backing-chain", "--output=json", path], capture_output=True, text=True, check=True
    )
    return [Path(image["filename"]).name for image in json.loads(done.stdout)]


def _qemu_content(path: Path, folder: Path) -> bytes:
    out = folder / "content.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, out], check=True)
    return out.read_bytes()


def _is_clean(path: Path) -> bool:
    return subprocess.run(["qemu-img", "check", path], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "options",
    [None, {"extended_l2": True}, {"cluster_size": 4096}, {"compat": "0.10"}],
    ids=["plain", "subclusters", "4k", "v2"],
)
@pytest.mark.parametrize("base", [None, 0, 1, 2])
def test_a_stream_under_writers_keeps_the_content_and_shortens_the_chain(
    tmp_path: Path, base: int | None, options: Mapping[str, int | str] | None
) -> None:
    paths, model = _chain(tmp_path, 4, options)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        with _writers(disk, model):
            job = jobs.stream(disk, base=None if base is None else disk.chain()[3 - base])
            result = job.wait(timeout=120)
        assert result.backing == (None if base is None else f"{base}.qcow2")
        names = [Path(str(image.filename)).name for image in disk.chain()]
        assert disk.read(0, SIZE) == model
    expected = ["3.qcow2", *([] if base is None else [f"{level}.qcow2" for level in range(base, -1, -1)])]
    assert names == expected
    assert _qemu_chain(paths[-1]) == expected
    assert _qemu_content(paths[-1], tmp_path) == model
    assert all(_is_clean(path) for path in paths)


def test_an_image_in_between_that_is_shorter_keeps_hiding_what_is_behind_its_end(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2"))
    blocklib.create(base, SIZE, format="qcow2")
    with blocklib.open(base, "r+") as disk:
        disk.write(0, b"\xaa" * SIZE)
    blocklib.create(middle, SIZE // 2, format="qcow2", backing="base.qcow2", backing_format="qcow2")
    blocklib.create(top, SIZE, format="qcow2", backing="middle.qcow2", backing_format="qcow2")
    model = b"\xaa" * (SIZE // 2) + bytes(SIZE // 2)
    with blocklib.open(top, "r+", format="qcow2", references="allow") as disk:
        assert disk.read(0, SIZE) == model
        jobs.stream(disk, base=base).wait(timeout=60)
        assert disk.read(0, SIZE) == model
    assert _qemu_content(top, tmp_path) == model
    assert _qemu_chain(top) == ["top.qcow2", "base.qcow2"]


def test_a_cancelled_stream_leaves_the_chain_and_the_content(tmp_path: Path) -> None:
    paths, model = _chain(tmp_path, 3)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        with _writers(disk, model):
            job = jobs.stream(disk, speed=1 * MiB)
            job.cancel()
            with pytest.raises(blocklib.JobCancelled):
                job.wait(timeout=60)
        assert len(disk.chain()) == 3
        assert disk.read(0, SIZE) == model
    assert _qemu_content(paths[-1], tmp_path) == model
    assert all(_is_clean(path) for path in paths)


def test_copy_on_read_fills_the_image_as_it_is_read(tmp_path: Path) -> None:
    paths, model = _chain(tmp_path, 3)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        keeper = disk.insert_filter("copy-on-read", {})
        with _writers(disk, model):
            for offset in range(0, SIZE, 100 * KiB):
                disk.read(offset, min(100 * KiB, SIZE - offset))
        keeper.remove()
        assert disk.read(0, SIZE) == model
        assert not [extent for extent in disk.extents() if extent.depth and extent.present]
    assert _qemu_content(paths[-1], tmp_path) == model
    assert _is_clean(paths[-1])


def test_copy_on_read_down_to_an_image_leaves_what_comes_from_below_it(tmp_path: Path) -> None:
    paths, model = _chain(tmp_path, 3)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        chain = disk.chain()
        keeper = disk.insert_filter("copy-on-read", {"bottom": chain[1].name})
        assert disk.read(0, SIZE) == model
        keeper.remove()
        held = {extent.depth for extent in disk.extents() if extent.present}
        assert held == {0, 2}
        with pytest.raises(NameNotFoundError):
            disk.insert_filter("copy-on-read", {"bottom": "no-such-node"})
    assert _is_clean(paths[-1])


def test_what_cannot_be_streamed_is_refused_at_once(tmp_path: Path) -> None:
    paths, _model = _chain(tmp_path, 2)
    with blocklib.open(paths[-1], format="qcow2", references="allow") as disk:
        with pytest.raises(ReadOnlyError):
            jobs.stream(disk)
        with pytest.raises(ReadOnlyError):
            disk.insert_filter("copy-on-read", {})
    with blocklib.open(paths[0], "r+", format="qcow2") as disk:
        with pytest.raises(UsageError, match="no backing file"):
            jobs.stream(disk)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        with pytest.raises(NameNotFoundError):
            jobs.stream(disk, base=tmp_path / "elsewhere.qcow2")
        with pytest.raises(UsageError, match="backing_file"):
            jobs.stream(disk, backing_file="name")
        assert len(disk.chain()) == 2
