"""commit on disks in use: the content stays, the chain gets shorter, and QEMU agrees with both."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import (
    GraphConflictError,
    JobCancelled,
    KiB,
    LockedError,
    MiB,
    NameNotFoundError,
    ReadOnlyError,
    StorageError,
    ThrottleGroup,
    UsageError,
    jobs,
)
from tests.writers import is_clean, make_chain, qemu_chain, qemu_content, writing

pytestmark = pytest.mark.requires("qemu-img")

SIZE = 8 * MiB
SUBCLUSTERS, SMALL, OLD = {"extended_l2": True}, {"cluster_size": 4096}, {"compat": "0.10"}


def _open(path: Path) -> blocklib.Disk:
    return blocklib.open(path, "r+", format="qcow2", references="allow", discard="unmap")


def _names(disk: blocklib.Disk) -> list[str]:
    return [Path(str(image.filename)).name for image in disk.chain()]


def _chain_down_from(level: int) -> list[str]:
    return [f"{number}.qcow2" for number in range(level, -1, -1)]


@pytest.mark.parametrize(
    ("base", "options"), [(0, None), (1, None), (3, None), (0, SUBCLUSTERS), (1, SMALL), (1, OLD)]
)
def test_the_disk_continues_on_the_base_under_writers(
    tmp_path: Path, base: int, options: Mapping[str, int | str] | None
) -> None:
    paths, model = make_chain(tmp_path, 5, SIZE, options)
    with _open(paths[-1]) as disk:
        with writing(disk, model) as writers:
            job = jobs.commit(disk, base=disk.chain()[4 - base])
            job.wait(timeout=120, until="ready")
            assert job.status == "ready"
            writers.wait_for(30)
            job.complete()
            result = job.wait(timeout=120)
            assert result.pivoted
            assert result.base == str(paths[base])
            writers.wait_for(30)
        assert _names(disk) == _chain_down_from(base)
        assert [image.read_only for image in disk.chain()] == [False] + [True] * base
        assert disk.read(0, SIZE) == model
        assert len(disk.node.parents) == 1
        assert disk.node.claim is None
    assert qemu_chain(paths[base]) == _chain_down_from(base)
    assert qemu_content(paths[base], tmp_path) == model
    assert all(is_clean(path) for path in paths)


def test_without_a_base_everything_goes_into_the_last_image(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with _open(paths[-1]) as disk, writing(disk, model):
        result = blocklib.commit(disk)
        assert result.pivoted
        assert _names(disk) == ["0.qcow2"]
    assert qemu_content(paths[0], tmp_path) == model


def test_a_cancelled_commit_of_the_top_image_leaves_both_with_the_content_of_that_moment(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with _open(paths[-1]) as disk:
        with writing(disk, model):
            job = jobs.commit(disk)
            job.wait(timeout=120, until="ready")
        moment = bytes(model)
        job.cancel()
        assert not job.wait(timeout=60).pivoted
        disk.write(0, b"later")
        assert _names(disk) == _chain_down_from(2)
        assert [image.read_only for image in disk.chain()] == [False, True, True]
        assert disk.read(5, SIZE - 5) == moment[5:]
    assert qemu_content(paths[0], tmp_path) == moment
    assert qemu_content(paths[2], tmp_path)[5:] == moment[5:]
    assert all(is_clean(path) for path in paths)


def test_a_commit_that_is_cancelled_early_leaves_the_chain_and_the_content(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 4, SIZE)
    with _open(paths[-1]) as disk:
        for top in (None, paths[2]):
            with writing(disk, model):
                job = jobs.commit(disk, top=top, base=paths[0], speed=1 * MiB)
                for event in job.events():
                    if event.status == "running":
                        break
                job.cancel(force=True)
                with pytest.raises(JobCancelled):
                    job.wait(timeout=60)
            assert _names(disk) == _chain_down_from(3)
            assert [image.read_only for image in disk.chain()] == [False, True, True, True]
            assert disk.read(0, SIZE) == model
            assert len(disk.node.parents) == 1
    assert qemu_content(paths[-1], tmp_path) == model
    assert all(is_clean(path) for path in paths)


@pytest.mark.parametrize(
    ("top", "base", "options"),
    [(1, 0, None), (2, 1, None), (3, 2, None), (2, 0, None), (3, 0, None), (3, 1, SUBCLUSTERS), (2, 0, SMALL), (3, 1, OLD)],
)
def test_images_in_between_leave_the_chain_under_writers(
    tmp_path: Path, top: int, base: int, options: Mapping[str, int | str] | None
) -> None:
    paths, model = make_chain(tmp_path, 5, SIZE, options)
    with _open(paths[-1]) as disk:
        with writing(disk, model):
            chain = disk.chain()
            result = jobs.commit(disk, top=chain[4 - top], base=paths[base]).wait(timeout=120)
        assert not result.pivoted
        expected = [f"{level}.qcow2" for level in (4, 3, 2, 1, 0) if level > top or level <= base]
        assert _names(disk) == expected
        assert [image.read_only for image in disk.chain()] == [False] + [True] * (len(expected) - 1)
        assert disk.read(0, SIZE) == model
        disk.write(0, b"goes on")
        model[:7] = b"goes on"
    assert qemu_chain(paths[-1]) == expected
    assert qemu_content(paths[-1], tmp_path) == model
    assert all(is_clean(path) for path in paths)


def test_the_name_of_the_base_can_be_given(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    (tmp_path / "link.qcow2").symlink_to("0.qcow2")
    with _open(paths[-1]) as disk:
        jobs.commit(disk, top=paths[1], backing_file="link.qcow2").wait(timeout=60)
        assert disk.info().backing_filename == "link.qcow2"
        assert disk.info().backing_format == "qcow2"
        assert _names(disk) == ["2.qcow2", "0.qcow2"]
    assert qemu_chain(paths[-1]) == ["2.qcow2", "link.qcow2"]
    assert qemu_content(paths[-1], tmp_path) == model


def test_a_base_in_another_folder_is_named_by_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    blocklib.create(tmp_path / "below" / "base.qcow2", SIZE, format="qcow2")
    for name, backing in (("middle", "base.qcow2"), ("top", "below/middle.qcow2")):
        folder = tmp_path / "below" if name == "middle" else tmp_path
        blocklib.create(folder / f"{name}.qcow2", format="qcow2", backing=backing, backing_format="qcow2")
    with _open(tmp_path / "top.qcow2") as disk:
        jobs.commit(disk, top=tmp_path / "below" / "middle.qcow2").wait(timeout=60)
    assert blocklib.info(tmp_path / "top.qcow2").backing_filename == str(tmp_path / "below" / "base.qcow2")


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("active", [True, False])
def test_a_shorter_base_grows(tmp_path: Path, format: str, active: bool) -> None:
    base, middle, top = (tmp_path / name for name in ("base.img", "middle.qcow2", "top.qcow2"))
    blocklib.create(base, SIZE // 4 + 512, format=format)
    with blocklib.open(base, "r+", format=format) as disk:
        disk.write(0, b"\xaa" * disk.size)
    blocklib.create(middle, SIZE // 2, format="qcow2", backing="base.img", backing_format=format)
    blocklib.create(top, SIZE, format="qcow2", backing="middle.qcow2", backing_format="qcow2")
    with blocklib.open(middle, "r+", format="qcow2", references="allow") as disk:
        disk.write(SIZE // 4, b"\xbb" * MiB)
    with _open(top) as disk:
        model = bytearray(disk.read(0, SIZE))
        with writing(disk, model):
            if active:
                blocklib.commit(disk)
            else:
                blocklib.commit(disk, top=middle)
        assert disk.chain()[-1].size == (SIZE if active else SIZE // 2)
        assert disk.read(0, SIZE) == model
    end = base if active else top
    if not active or format == "qcow2":
        assert qemu_content(end, tmp_path) == model
        assert is_clean(end)
    else:
        assert base.read_bytes() == model
    assert is_clean(top)


@pytest.mark.parametrize("active", [True, False])
def test_what_the_end_of_an_image_in_between_hides_stays_hidden(tmp_path: Path, active: bool) -> None:
    base, middle, top = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2"))
    blocklib.create(base, SIZE, format="qcow2")
    with blocklib.open(base, "r+") as disk:
        disk.write(0, b"\xaa" * SIZE)
    blocklib.create(middle, SIZE // 2 + 512, format="qcow2", backing="base.qcow2", backing_format="qcow2")
    blocklib.create(top, SIZE - 64 * KiB, format="qcow2", backing="middle.qcow2", backing_format="qcow2")
    model = bytearray(b"\xaa" * (SIZE // 2 + 512) + bytes(SIZE // 2 - 64 * KiB - 512))
    with _open(top) as disk:
        assert disk.read(0, disk.size) == model
        with writing(disk, model):
            blocklib.commit(disk, top=None if active else middle)
        assert disk.read(0, len(model)) == model
        assert disk.size == (SIZE if active else SIZE - 64 * KiB)  # a base that is larger keeps its size, as with QEMU
        if active:
            assert disk.read(len(model), 64 * KiB) == b"\xaa" * 64 * KiB
    for path in (base, top):
        assert is_clean(path)
    if not active:
        assert qemu_chain(top) == ["top.qcow2", "base.qcow2"]
        assert qemu_content(top, tmp_path) == model


def test_the_disk_may_grow_while_images_below_it_are_committed(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2"))
    blocklib.create(base, SIZE, format="qcow2")
    with blocklib.open(base, "r+") as disk:
        disk.write(0, b"\xaa" * SIZE)
    for path, below in ((middle, base), (top, middle)):
        blocklib.create(path, SIZE // 2, format="qcow2", backing=below.name, backing_format="qcow2")
    with blocklib.open(middle, "r+", format="qcow2", references="allow") as disk:
        disk.write(0, b"\xbb" * (2 * MiB))
    with _open(top) as disk:
        job = jobs.commit(disk, top=middle, speed=1 * MiB)
        disk.truncate(SIZE)
        job.set_speed(0)
        job.wait(timeout=60)
        model = b"\xbb" * (2 * MiB) + b"\xaa" * (SIZE // 2 - 2 * MiB) + bytes(SIZE // 2)
        assert disk.read(0, SIZE) == model
    assert qemu_content(top, tmp_path) == model
    assert is_clean(base)


def test_filters_stay_above_the_disk(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with _open(paths[-1]) as disk:
        throttle = disk.insert_filter("throttle", {"throttle-group": ThrottleGroup({"iops-total": 100000})})
        with writing(disk, model):
            blocklib.commit(disk, top=paths[1])
            blocklib.commit(disk)
        assert _names(disk) == ["0.qcow2"]
        throttle.remove()
        assert disk.read(0, SIZE) == model
    assert qemu_content(paths[0], tmp_path) == model


def test_the_base_takes_over_what_the_disk_was_opened_with(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
    with _open(paths[-1]) as disk:
        blocklib.commit(disk)
        disk.write(0, b"x" * SIZE)
        disk.flush()
        before = paths[0].stat().st_blocks
        disk.discard(0, SIZE)
        disk.flush()
        assert paths[0].stat().st_blocks < before // 2


def test_a_second_job_on_the_chain_is_refused_and_names_the_first(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 3, SIZE)
    with _open(paths[-1]) as disk:
        for top in (None, paths[1]):
            with jobs.commit(disk, top=top, speed=1):
                for second in (
                    lambda: jobs.commit(disk),
                    lambda: jobs.commit(disk, top=paths[1]),
                    lambda: jobs.stream(disk),
                    lambda: disk.add_overlay(tmp_path / "new.qcow2", format="qcow2"),
                ):
                    with pytest.raises(GraphConflictError, match="commit") as caught:
                        second()
                    assert caught.value.other == "commit"
        blocklib.commit(disk)
        with jobs.mirror(disk, tmp_path / "copy.qcow2", format="qcow2") as job:
            job.wait(timeout=60, until="ready")
            with pytest.raises(UsageError, match="no backing file"):
                jobs.commit(disk)


def test_a_base_that_another_disk_reads_through_is_refused(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 2, SIZE)
    with blocklib.open(paths[0], format="qcow2") as base:
        with blocklib.open(paths[1], "r+", format="qcow2", backing=base) as disk:
            other = tmp_path / "other.qcow2"
            blocklib.create(other, SIZE, format="qcow2", backing="0.qcow2", backing_format="qcow2")
            with blocklib.open(other, "r+", format="qcow2", backing=base):
                with pytest.raises(GraphConflictError):
                    jobs.commit(disk).wait(timeout=60)
                assert disk.read(0, SIZE) == model
                assert disk.node.claim is None


def test_a_disk_keeps_its_size_while_its_top_image_is_committed(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 2, SIZE)
    with _open(paths[-1]) as disk:
        with jobs.commit(disk) as job:
            job.wait(timeout=60, until="ready")
            with pytest.raises(GraphConflictError, match="commit"):
                disk.truncate(2 * SIZE)
        disk.truncate(2 * SIZE)


def test_what_cannot_be_committed_is_refused_at_once(tmp_path: Path) -> None:
    paths, _model = make_chain(tmp_path, 3, SIZE)
    with blocklib.open(paths[-1], format="qcow2", references="allow") as disk, pytest.raises(ReadOnlyError):
        jobs.commit(disk)
    with _open(paths[0]) as disk, pytest.raises(UsageError, match="no backing file"):
        jobs.commit(disk)
    with _open(paths[-1]) as disk:
        with pytest.raises(NameNotFoundError):
            jobs.commit(disk, base=tmp_path / "elsewhere.qcow2")
        with pytest.raises(NameNotFoundError):
            jobs.commit(disk, top=tmp_path / "elsewhere.qcow2")
        with pytest.raises(NameNotFoundError):
            jobs.commit(disk, base=disk.chain()[0])
        for base in disk.chain()[1:2]:
            with pytest.raises(UsageError, match="below the top"):
                jobs.commit(disk, top=paths[1], base=base)
        with pytest.raises(UsageError, match="below the top"):
            jobs.commit(disk, top=paths[0], base=paths[1])
        with pytest.raises(UsageError, match="backing_file"):
            jobs.commit(disk, backing_file="name")
        with pytest.raises(UsageError, match="on_target_error"):
            jobs.commit(disk, on_target_error="never")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="top"):
            jobs.commit(disk, top=paths[1], empty=True)
        assert disk.node.claim is None
        assert len(disk.chain()) == 3


def test_a_name_that_does_not_fit_leaves_the_chain(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    with _open(paths[-1]) as disk:
        with pytest.raises(UsageError):
            jobs.commit(disk, top=paths[1], backing_file="x" * 2000).wait(timeout=60)
        assert _names(disk) == _chain_down_from(2)
        assert disk.read(0, SIZE) == model
        assert [image.read_only for image in disk.chain()] == [False, True, True]
        blocklib.commit(disk, top=paths[1])
    assert qemu_content(paths[2], tmp_path) == model


def test_a_base_that_another_chain_holds_fails_the_job_and_nothing_else(tmp_path: Path) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE)
    other = tmp_path / "other.qcow2"
    blocklib.create(other, SIZE, format="qcow2", backing="0.qcow2", backing_format="qcow2")
    with _open(paths[-1]) as disk, writing(disk, model):
        with _open(other):
            for top in (None, paths[1]):
                with pytest.raises(LockedError):
                    jobs.commit(disk, top=top).wait(timeout=60)
        assert _names(disk) == _chain_down_from(2)
        blocklib.commit(disk)
        assert _names(disk) == ["0.qcow2"]
    assert qemu_content(paths[0], tmp_path) == model


class _Failing:
    """A method of a file that fails from its n-th call on, until it is mended."""

    def __init__(self, disk: blocklib.Disk, depth: int, method: str, good: int, number: int) -> None:
        node = disk.node
        for _ in range(depth):
            node = node.children["backing"].node
        self._file = node.children["file"].node
        self._method = method
        self._call = getattr(self._file, method)
        self._left = good
        self._number = number
        setattr(self._file, method, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise StorageError("the test says no", errno=self._number, operation="test")
        return self._call(*arguments, **named)

    def mend(self) -> None:
        setattr(self._file, self._method, self._call)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("good", [0, 7])
@pytest.mark.parametrize("end", ["source", "target"])
@pytest.mark.parametrize("policy", ["report", "stop", "ignore", "enospc"])
def test_what_becomes_of_a_job_whose_images_fail_is_as_it_was_told(
    tmp_path: Path, policy: Any, end: str, good: int, active: bool
) -> None:
    paths, model = make_chain(tmp_path, 3, SIZE // 2)
    with _open(paths[-1]) as disk:
        failing = (
            _Failing(disk, 1, "preadv", good, errno.EIO)
            if end == "source"
            else _Failing(disk, 2, "pwritev", good, errno.ENOSPC if policy == "enospc" else errno.EIO)
        )
        job = jobs.commit(disk, top=None if active else paths[1], **{f"on_{end}_error": policy})
        if policy in ("stop", "enospc") and not (policy == "enospc" and end == "source"):
            for event in job.events():
                if event.status == "paused":
                    break
            assert isinstance(job.io_error, StorageError)
        elif policy == "ignore":
            with pytest.raises(TimeoutError):
                job.wait(timeout=0.2)
        else:
            with pytest.raises(StorageError, match="says no"):
                job.wait(timeout=60)
        failing.mend()
        disk.write(100, b"not held up")
        model[100:111] = b"not held up"
        if job.status == "paused":
            job.resume()
        if job.status != "concluded":
            if active:
                job.wait(timeout=60, until="ready")
                job.complete()
            assert job.wait(timeout=60).pivoted is active
            assert _names(disk) == (["0.qcow2"] if active else ["2.qcow2", "0.qcow2"])
        else:
            assert _names(disk) == _chain_down_from(2)
        assert disk.read(0, disk.size) == model
        assert disk.node.claim is None
    assert qemu_content(paths[2], tmp_path)[200:] == model[200:]
    assert all(is_clean(path) for path in paths)
