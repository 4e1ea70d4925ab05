"""stream on disks in use: the content stays, the chain gets shorter, and QEMU agrees with both."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB, NameNotFoundError, ReadOnlyError, UsageError, jobs, plan
from tests.writers import is_clean, make_chain, qemu_chain, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 32 * MiB


@pytest.mark.parametrize(
    "options",
    [None, {"extended_l2": True}, {"cluster_size": 4096}, {"compat": "0.10"}],
    ids=["plain", "subclusters", "4k", "v2"],
)
@pytest.mark.parametrize("base", [None, 0, 1, 2])
def test_a_stream_under_writers_keeps_the_content_and_shortens_the_chain(
    tmp_path: Path, base: int | None, options: Mapping[str, int | str] | None
) -> None:
    paths, model = make_chain(tmp_path, 4, SIZE, options)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        with writing(disk, model):
            job = jobs.stream(disk, base=None if base is None else disk.chain()[3 - base])
            result = job.wait(timeout=120)
        assert result.backing == (None if base is None else f"{base}.qcow2")
        names = [Path(str(image.filename)).name for image in disk.chain()]
        assert disk.read(0, SIZE) == model
    expected = ["3.qcow2", *([] if base is None else [f"{level}.qcow2" for level in range(base, -1, -1)])]
    assert names == expected
    assert qemu_chain(paths[-1]) == expected
    assert qemu_content(paths[-1], tmp_path) == model
    assert all(is_clean(path) for path in paths)


@pytest.mark.parametrize("bottom", [0, 1, 2])
def test_bottom_is_the_last_image_that_is_streamed(tmp_path: Path, bottom: int) -> None:
    paths, model = make_chain(tmp_path, 4, SIZE)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        with pytest.raises(UsageError, match="one of them"):
            jobs.stream(disk, base=disk.chain()[2], bottom=disk.chain()[1])
        with pytest.raises(NameNotFoundError):
            jobs.stream(disk, bottom=disk.chain()[0])
        with writing(disk, model):
            jobs.stream(disk, bottom=disk.chain()[3 - bottom]).wait(timeout=120)
        assert disk.read(0, SIZE) == model
    assert qemu_chain(paths[-1]) == ["3.qcow2", *(f"{level}.qcow2" for level in range(bottom - 1, -1, -1))]
    assert qemu_content(paths[-1], tmp_path) == model
    assert all(is_clean(path) for path in paths)


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
    assert qemu_content(top, tmp_path) == model
    assert qemu_chain(top) == ["top.qcow2", "base.qcow2"]


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"compat": "0.10"}], ids=["plain", "subclusters", "v2"])
def test_zeroes_that_are_kept_are_zeroes_and_no_bytes(tmp_path: Path, options: Mapping[str, int | str]) -> None:
    base, middle, top = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2"))
    blocklib.create(base, SIZE, format="qcow2")
    with blocklib.open(base, "r+") as disk:
        disk.write(0, b"\xaa" * SIZE)
    blocklib.create(middle, SIZE, format="qcow2", backing="base.qcow2", backing_format="qcow2")
    blocklib.create(top, SIZE, format="qcow2", backing="middle.qcow2", backing_format="qcow2", options=options)
    with blocklib.open(middle, "r+", format="qcow2", references="allow") as disk:
        disk.write_zeroes(1 * MiB, 20 * MiB)
    model = bytearray(b"\xaa" * SIZE)
    model[1 * MiB : 21 * MiB] = bytes(20 * MiB)
    with blocklib.open(top, "r+", format="qcow2", references="allow") as disk:
        disk.write(5 * MiB + 3000, b"own")
        model[5 * MiB + 3000 : 5 * MiB + 3003] = b"own"
        jobs.stream(disk, base=base).wait(timeout=60)
        assert disk.read(0, SIZE) == model
        held = sum(extent.length for extent in disk.extents() if extent.depth == 0 and extent.data)
        assert held <= 64 * KiB or "compat" in options  # version 2 has no other zeroes
        kept = sum(extent.length for extent in disk.extents() if extent.depth == 0 and extent.present)
        assert kept == 20 * MiB
    assert qemu_content(top, tmp_path) == model
    assert is_clean(top)


@pytest.mark.parametrize(
    "options",
    [{}, {"extended_l2": True}, {"cluster_size": 4096}, {"compat": "0.10"}],
    ids=["plain", "subclusters", "4k", "v2"],
)
def test_zeroes_fill_only_what_an_image_does_not_hold(tmp_path: Path, options: Mapping[str, int | str]) -> None:
    size = 4 * MiB
    blocklib.create(tmp_path / "base.qcow2", size, format="qcow2")
    path = tmp_path / "top.qcow2"
    blocklib.create(path, size, format="qcow2", backing="base.qcow2", backing_format="qcow2", options=options)
    with blocklib.open(tmp_path / "base.qcow2", "r+") as disk:
        disk.write(0, b"\xaa" * size)
    rng = random.Random(1)
    with blocklib.open(path, "r+", format="qcow2", references="allow") as disk:
        for _ in range(30):
            disk.write(rng.randrange(size - 9000), rng.randbytes(rng.randrange(1, 9000)))
        model = bytearray(disk.read(0, size))
        own = [extent.depth == 0 and extent.present for extent in disk.extents() for _ in range(extent.length)]
        for _ in range(20):
            offset = rng.randrange(60) * 64 * KiB
            length = rng.randrange(1, 5) * 64 * KiB
            plan.fill_zeroes(disk.node, offset, length)
            for byte in range(offset, offset + length):
                if not own[byte]:
                    model[byte] = 0
        assert disk.read(0, size) == model
    assert qemu_content(path, tmp_path) == model
    assert is_clean(path)


def test_a_cancelled_stream_leaves_the_chain_and_the_content(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        with writing(disk, model):
            job = jobs.stream(disk, speed=1 * MiB)
            job.cancel()
            with pytest.raises(blocklib.JobCancelled):
                job.wait(timeout=60)
        assert len(disk.chain()) == 3
        assert disk.read(0, SIZE) == model
    assert qemu_content(paths[-1], tmp_path) == model
    assert all(is_clean(path) for path in paths)


def test_copy_on_read_fills_the_image_as_it_is_read(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        keeper = disk.insert_filter("copy-on-read", {})
        with writing(disk, model):
            for offset in range(0, SIZE, 100 * KiB):
                disk.read(offset, min(100 * KiB, SIZE - offset))
        keeper.remove()
        assert disk.read(0, SIZE) == model
        assert not [extent for extent in disk.extents() if extent.depth and extent.present]
    assert qemu_content(paths[-1], tmp_path) == model
    assert is_clean(paths[-1])


def test_copy_on_read_down_to_an_image_leaves_what_comes_from_below_it(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with blocklib.open(paths[-1], "r+", format="qcow2", references="allow") as disk:
        chain = disk.chain()
        keeper = disk.insert_filter("copy-on-read", {"bottom": chain[1].name})
        assert disk.read(0, SIZE) == model
        keeper.remove()
        held = {extent.depth for extent in disk.extents() if extent.present}
        assert held == {0, 2}
        with pytest.raises(NameNotFoundError):
            disk.insert_filter("copy-on-read", {"bottom": "no-such-node"})
    assert is_clean(paths[-1])


def test_what_cannot_be_streamed_is_refused_at_once(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
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
