"""Filters beside QEMU's of the same names: opened with the same options, given the same requests, leaving the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blocklib.cli.main import main
from tests.programs import Program

pytestmark = pytest.mark.requires("qemu-img", "qemu-io")


def _file(name: str, path: Path, format: str = "qcow2") -> str:
    return f"{name}.driver={format},{name}.file.driver=file,{name}.file.filename={path}"


def _commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


class _Pair:
    """The same folder of images twice: one for QEMU, one for us."""

    def __init__(self, folder: Path, qemu_img: Program, qemu_io: Program) -> None:
        self._folders = folder / "theirs", folder / "ours"
        self._qemu_img, self._qemu_io = qemu_img, qemu_io
        for one in self._folders:
            one.mkdir()

    def create(self, name: str, size: str, format: str = "qcow2") -> None:
        for folder in self._folders:
            self._qemu_img("create", "-q", "-f", format, folder / name, size)

    def write(self, name: str, *lines: str, format: str = "qcow2") -> None:
        for folder in self._folders:
            self._qemu_io("-f", format, *_commands(*lines), folder / name)

    def filtered(self, options: str, *lines: str) -> tuple[int, int]:
        """The exit codes of both for a node of `options`, in which {} is the folder."""
        theirs = self._qemu_io.run("--image-opts", options.replace("{}", str(self._folders[0])), *_commands(*lines))
        ours = main(["--image-opts", options.replace("{}", str(self._folders[1])), *_commands(*lines)], program="qemu-io")
        return theirs.returncode, ours

    def maps(self, name: str) -> list[Any]:
        """Where both have data, and what reads as what, for QEMU."""
        found = []
        for folder in self._folders:
            extents = self._qemu_img.json("map", folder / name)
            found.append([{key: extent[key] for key in ("start", "length", "present", "zero", "data")} for extent in extents])
        return found

    def contents(self, name: str) -> list[bytes]:
        found = []
        for folder in self._folders:
            self._qemu_img("convert", "-O", "raw", folder / name, folder / "content")
            found.append((folder / "content").read_bytes())
        return found

    def are_clean(self, name: str) -> bool:
        return all(self._qemu_img.run("check", folder / name).returncode == 0 for folder in self._folders)


@pytest.fixture
def pair(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> _Pair:
    return _Pair(tmp_path, qemu_img, qemu_io)


def test_compress_compresses_the_same_clusters(pair: _Pair, qemu_img: Program, tmp_path: Path) -> None:
    pair.create("disk.qcow2", "1M")
    options = f"driver=compress,{_file('file', Path('{}/disk.qcow2'))}"
    lines = ["write -P 1 0 64k", "write -P 2 65536 1k", "write -P 3 128k 100k", "write -P 4 1000k 24k", "read -P 3 130k 90k"]
    assert pair.filtered(options, *lines) == (0, 0)
    theirs, ours = pair.maps("disk.qcow2")
    assert ours == theirs
    first, second = pair.contents("disk.qcow2")
    assert first == second
    compressed = [qemu_img.json("check", tmp_path / name / "disk.qcow2")["compressed-clusters"] for name in ("theirs", "ours")]
    assert compressed == [5, 5]
    assert pair.are_clean("disk.qcow2")


def test_copy_before_write_keeps_the_same(pair: _Pair) -> None:
    pair.create("disk.qcow2", "1M")
    pair.write("disk.qcow2", "write -P 9 0 700k", "write -z 128k 64k")
    pair.create("target.qcow2", "2M")
    pair.create("target.raw", "1M", "raw")
    for target in (_file("target", Path("{}/target.qcow2")), _file("target", Path("{}/target.raw"), "raw")):
        options = f"driver=copy-before-write,on-cbw-error=break-snapshot,{_file('file', Path('{}/disk.qcow2'))},{target}"
        lines = "write -P 1 70000 512", "write -z 300k 10k", "write -P 2 130k 1k", "read -P 1 70000 512"
        assert pair.filtered(options, *lines) == (0, 0)
    for name in ("disk.qcow2", "target.qcow2", "target.raw"):
        first, second = pair.contents(name)
        assert first == second
    theirs, ours = pair.maps("target.qcow2")
    assert [extent for extent in ours if extent["data"]] == [extent for extent in theirs if extent["data"]]
    assert pair.are_clean("target.qcow2")


@pytest.mark.parametrize(
    "wrong", ["on-cbw-error=ignore", "cbw-timeout=soon", "bitmap.node=nobody,bitmap.name=b", "target.nobody=1"]
)
def test_wrong_options_are_refused_in_one_line(pair: _Pair, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    pair.create("disk.qcow2", "1M")
    pair.create("target.qcow2", "1M")
    files = ",".join(_file(name, Path("{}") / f"{image}.qcow2") for name, image in (("file", "disk"), ("target", "target")))
    assert pair.filtered(f"driver=copy-before-write,{files},{wrong}", "length") == (1, 1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_blkverify_stops_at_the_same_difference(pair: _Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.create("disk.qcow2", "1M")
    pair.create("disk.raw", "1M", "raw")
    both = f"{_file('test', Path('{}/disk.qcow2'))},{_file('raw', Path('{}/disk.raw'), 'raw')}"
    options = f"driver=blkverify,{both}"
    assert pair.filtered(options, "write -P 1 0 64k", "read -P 1 0 64k", "write -P 2 100k 300k", "read 0 1M") == (0, 0)
    pair.write("disk.raw", "write -P 7 5000 10", format="raw")
    capsys.readouterr()
    assert pair.filtered(options, "read 0 64k") == (1, 1)
    assert "5000" in "".join(capsys.readouterr())
    assert pair.filtered(options, "read 8k 64k") == (0, 0)
    assert pair.filtered(f"driver=blkverify,{_file('test', Path('{}/disk.qcow2'))}", "length") == (1, 1)


def test_map_of_a_verified_disk_is_that_of_the_same_child(
    pair: _Pair, qemu_img: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair.create("disk.qcow2", "1M")
    pair.create("disk.raw", "1M", "raw")
    folder = tmp_path / "ours"
    both = f"{_file('test', folder / 'disk.qcow2')},{_file('raw', folder / 'disk.raw', 'raw')}"
    pair.write("disk.raw", "write -P 7 512k 64k", format="raw")
    theirs = qemu_img.json("map", "--image-opts", f"driver=blkverify,{both}")
    capsys.readouterr()
    assert main(["map", "--output=json", "--image-opts", f"driver=blkverify,{both}"]) == 0
    assert json.loads(capsys.readouterr().out) == theirs


@pytest.mark.parametrize("snapshot", [False, True])
def test_copy_on_read_of_the_command_line_fills_the_same_clusters(
    pair: _Pair, snapshot: bool, qemu_img: Program, qemu_io: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.create("base.qcow2", "1M")
    pair.write("base.qcow2", "write -P 3 0 200k", "write -P 4 600k 100k")
    words = ["-C", *(["-s"] if snapshot else []), *_commands("read -P 3 70000 100", "read -P 4 610k 64k"), "top.qcow2"]
    for name in ("theirs", "ours"):
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / name / "top.qcow2")
    qemu_io(*words, cwd=tmp_path / "theirs")
    monkeypatch.chdir(tmp_path / "ours")
    assert main(words, program="qemu-io") == 0
    theirs, ours = pair.maps("top.qcow2")
    assert ours == theirs
    assert pair.are_clean("top.qcow2")
    assert main(["-C", "-r", "-c", "length", "top.qcow2"], program="qemu-io") == 1


def test_only_what_the_same_bitmap_marks_is_kept(pair: _Pair, qemu_img: Program, tmp_path: Path) -> None:
    pair.create("disk.qcow2", "1M")
    pair.create("target.qcow2", "1M")
    pair.write("disk.qcow2", "write -P 9 0 1M")
    for name in ("theirs", "ours"):
        qemu_img("bitmap", "--add", "-g", "64k", tmp_path / name / "disk.qcow2", "since")
    pair.write("disk.qcow2", "write -P 8 128k 64k", "write -P 7 512k 1k")
    files = ",".join(_file(name, Path("{}") / f"{image}.qcow2") for name, image in (("file", "disk"), ("target", "target")))
    options = f"driver=copy-before-write,file.node-name=image,bitmap.node=image,bitmap.name=since,{files}"
    assert pair.filtered(options, "write -P 1 0 1k", "write -P 2 150k 1k", "write -P 3 500k 100k") == (0, 0)
    theirs, ours = pair.maps("target.qcow2")
    assert ours == theirs
    first, second = pair.contents("target.qcow2")
    assert first == second
    assert first[128 << 10 : 192 << 10] == b"\x08" * (64 << 10)
    assert pair.are_clean("target.qcow2")
    assert pair.are_clean("disk.qcow2")
