"""The dirty bitmaps of an export, as `disk.bitmaps` shows them: qemu-nbd's and our own server's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB, jobs, nbd
from blocklib.bitmaps import ExportedBitmap
from tests.cli.running import CommandLine
from tests.nbd_servers import nbdkit_at, qemu_nbd_at
from tests.programs import Program

SIZE = 8 * MiB
WRITES = ((0, 64 * KiB), (1 * MiB, 128 * KiB), (3 * MiB + 65536, 5), (SIZE - 70 * KiB, 70 * KiB))


@pytest.fixture
def image(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> Path:
    """A qcow2 image with a bitmap of fine pieces, one of coarse pieces, and one without marks."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    qemu_io("-f", "qcow2", "-c", "write -P 1 0 4M", path)
    for name, granularity in (("fine", 512), ("coarse", 256 * KiB), ("empty", 65536)):
        qemu_img("bitmap", "--add", "-g", granularity, path, name)
        if name == "empty":
            qemu_img("bitmap", "--disable", path, name)
    commands = [word for offset, length in WRITES for word in ("-c", f"write -P 2 {offset} {length}")]
    qemu_io("-f", "qcow2", *commands, path)
    return path


@pytest.fixture(params=["qemu-nbd", "blocklib"])
def served(request: pytest.FixtureRequest, tmp_path: Path, image: Path, qemu_nbd: Program) -> Iterator[str]:
    names = ("fine", "coarse", "empty")
    if request.param == "qemu-nbd":
        # One client only: everything is told on one connection.
        with qemu_nbd_at(qemu_nbd, tmp_path, "-r", "-f", "qcow2", *(f"-B{name}" for name in names), image) as uri:
            yield uri
        return
    with (
        blocklib.open(image, format="qcow2") as disk,
        nbd.Server(disk, listen=f"nbd+unix:///?socket={tmp_path / 'ours.sock'}", bitmaps=names) as server,
    ):
        yield server.uri


def ranges(bitmap: blocklib.Bitmap, *part: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = bitmap.dirty_ranges(*part).tolist()
    return found


def test_the_bitmaps_of_an_export_are_those_of_the_image(served: str, image: Path) -> None:
    with blocklib.open(image, format="qcow2", force_share=True) as local, blocklib.open(served, format="raw") as remote:
        assert sorted(bitmap.name for bitmap in remote.bitmaps) == ["coarse", "empty", "fine"]
        assert len(remote.bitmaps) == 3
        assert "fine" in remote.bitmaps
        assert "other" not in remote.bitmaps
        for bitmap in remote.bitmaps:
            assert isinstance(bitmap, blocklib.Bitmap)
            known = local.bitmaps[bitmap.name]
            assert ranges(bitmap) == ranges(known)
            assert bitmap.count == known.count
            for part in ((0, 1), (1 * MiB + 1, 100), (100, 2 * MiB), (SIZE - 1, 50), (SIZE, 1), (5, 0)):
                assert ranges(bitmap, *part) == ranges(known, *part), part
        with pytest.raises(blocklib.NameNotFoundError):
            remote.bitmaps["other"]
        assert remote.read(1 * MiB, 4) == b"\2" * 4  # the map of data is still told


def test_a_bitmap_of_the_server_can_be_merged_and_not_be_changed(served: str, image: Path) -> None:
    with blocklib.open(served, format="raw") as remote:
        bitmap = remote.bitmaps["fine"]
        assert isinstance(bitmap, ExportedBitmap)
        assert repr(bitmap) == "<Bitmap 'fine': of the server>"
        states = (bitmap.persistent, bitmap.enabled, bitmap.recording, bitmap.inconsistent, bitmap.busy)
        assert not any(states)
        own = remote.bitmaps.add("own", granularity=512, enabled=False)
        own.merge(bitmap, remote.bitmaps["empty"])
        assert ranges(own) == ranges(bitmap)
        assert "own" in remote.bitmaps
        assert len(remote.bitmaps) == 4
        for change in (bitmap.clear, bitmap.enable, bitmap.disable, bitmap.remove, lambda: bitmap.merge(own)):
            with pytest.raises(blocklib.ReadOnlyError, match="merge it into one of your own"):
                change()
        with pytest.raises(blocklib.ReadOnlyError), blocklib.transaction() as change_all:
            bitmap.clear(transaction=change_all)
        with pytest.raises(blocklib.UsageError, match="the server has a bitmap 'fine'"):
            remote.bitmaps.add("fine")
        with pytest.raises(blocklib.UsageError):
            bitmap.dirty_ranges(-1)
        with pytest.raises(TypeError, match="pickled"):
            bitmap.__reduce__()
    with pytest.raises(blocklib.ClosedError):
        _ = bitmap.count


def test_an_increment_is_copied_from_what_the_server_says(served: str, image: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.qcow2"
    blocklib.create(full, SIZE, format="qcow2")
    with blocklib.open(full, "r+", format="qcow2") as disk:
        disk.write(0, b"\1" * (4 * MiB))
    with blocklib.open(served, format="raw") as remote:
        increment = remote.bitmaps.add("increment", granularity=65536, enabled=False)
        increment.merge(remote.bitmaps["fine"])
        target = tmp_path / "increment.qcow2"
        options = {"sync": "incremental", "bitmap": "increment", "backing": full, "backing_format": "qcow2"}
        jobs.backup(remote, target, format="qcow2", **options).wait()  # type: ignore[arg-type]
        with pytest.raises(blocklib.ReadOnlyError):
            jobs.backup(remote, tmp_path / "no", format="qcow2", sync="incremental", bitmap="fine").wait()
        with blocklib.open(target, format="qcow2", references="allow") as copy:
            assert copy.read(0, SIZE) == remote.read(0, SIZE)


def test_a_filter_does_not_hide_them_and_a_window_does(served: str) -> None:
    with blocklib.open(served, format="raw") as remote:
        throttle = remote.insert_filter("throttle", {"throttle-group": blocklib.ThrottleGroup({})})
        assert remote.bitmaps["fine"].count
        throttle.remove()
    with blocklib.open(served, format="raw", options={"offset": 65536}) as remote:
        assert len(remote.bitmaps) == 0


def test_what_the_server_marks_meanwhile_is_seen_at_the_next_use(image: Path, tmp_path: Path) -> None:
    listen = f"nbd+unix:///?socket={tmp_path / 'ours.sock'}"
    with (
        blocklib.open(image, "r+", format="qcow2") as disk,
        nbd.Server(disk, listen=listen, bitmaps=("fine",), read_only=True) as server,
        blocklib.open(server.uri, format="raw") as remote,
    ):
        bitmap = remote.bitmaps["fine"]
        before = bitmap.count
        disk.write(5 * MiB, b"x" * 1024)
        assert bitmap.count == before + 1024
        assert (5 * MiB, 1024) in ranges(bitmap)


def test_bitmap_on_the_command_line_merges_what_a_server_marks(served: str, image: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.qcow2"
    cli = CommandLine()
    cli("create", "-q", "-f", "qcow2", own, SIZE)
    cli("bitmap", "--add", "-g", 512, "--merge", "fine", "-b", served, "-F", "raw", own, "copy")
    with (
        blocklib.open(own, format="qcow2") as copy,
        blocklib.open(image, format="qcow2", force_share=True) as local,
    ):
        assert ranges(copy.bitmaps["copy"]) == ranges(local.bitmaps["fine"])


def test_a_server_without_bitmaps_shows_none(tmp_path: Path, nbdkit: Program) -> None:
    with nbdkit_at(nbdkit, tmp_path, "memory", "1M") as uri, blocklib.open(uri, format="raw") as remote:
        assert list(remote.bitmaps) == []
        assert repr(remote.bitmaps) == "<Bitmaps []>"
        assert remote.bitmaps.add("own").count == 0
