"""Every filter against the contract of nodes, over a qcow2 image; and every way to open one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

import blocklib
from blocklib import KiB, MiB, OptionError, ThrottleGroup, drivers
from blocklib.cli.main import main
from blocklib.drivers import load
from blocklib.graph import Transaction
from blocklib.node import Node
from blocklib.options import check_options
from blocklib.protocols.memory import MemoryNode
from tests.conformance.test_qcow2 import TestQcow2
from tests.counting import CountingNode


class FilterTests(TestQcow2):
    """Contract of a filter: over a qcow2 image, it is a node like the image itself."""

    driver = ""
    filter_options: ClassVar[dict[str, Any]] = {}

    def others(self, size: int) -> Mapping[str, Node]:
        """The children that the filter has beside the image; new ones, that read as zero."""
        return {}

    def new(self, below: Node, others: Mapping[str, Node]) -> Node:
        kind = load(self.driver)
        given: dict[str, Any] = {**self.filter_options, kind.main_option: {}, **{name: {} for name in others}}
        return kind.from_options(check_options(self.driver, given), read_only=below.read_only, filename=below.filename)

    def image(self, folder: Path, *, read_only: bool) -> Node:
        """The image below."""
        return super().open_again(folder, read_only=read_only)

    def open_again(self, folder: Path, *, read_only: bool) -> Node:  # type: ignore[override]
        below = self.image(folder, read_only=read_only)
        others = self.others(self.size)
        node = self.new(below, others)
        with Transaction() as change:
            change.attach(node, "file", below)
            for name, other in others.items():
                change.attach(node, name, other)
        node.load()
        if not read_only:
            node.activate()
        return node


# The class that is derived from is not to be run again here.
del TestQcow2


class TestBlkdebug(FilterTests):
    driver = "blkdebug"


class TestBlklogwrites(FilterTests):
    driver = "blklogwrites"

    def others(self, size: int) -> Mapping[str, Node]:
        return {"log": MemoryNode(None, 0)}


class TestCompress(FilterTests):
    driver = "compress"


class TestCopyBeforeWrite(FilterTests):
    driver = "copy-before-write"

    def others(self, size: int) -> Mapping[str, Node]:
        return {"target": MemoryNode(None, size)}


class TestCopyBeforeWriteInTime(TestCopyBeforeWrite):
    filter_options: ClassVar[dict[str, Any]] = {"cbw-timeout": 60}


class TestCopyOnRead(FilterTests):
    driver = "copy-on-read"

    def open_again(self, folder: Path, *, read_only: bool) -> Node:  # type: ignore[override]
        return self.image(folder, read_only=True) if read_only else super().open_again(folder, read_only=False)


class TestThrottle(FilterTests):
    driver = "throttle"
    filter_options: ClassVar[dict[str, Any]] = {"throttle-group": ThrottleGroup({"bps-total": 10**12})}


class TestCounting(FilterTests):
    def new(self, below: Node, others: Mapping[str, Node]) -> Node:
        return CountingNode(below.size * 4, read_only=below.read_only, filename=below.filename)


# -- the ways to one ------------------------------------------------------------------------------------------------------

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "blkdebug": {},
    "blklogwrites": {"log.driver": "file", "log.filename": "{}/other.raw"},
    "blkverify": {"test.driver": "raw", "test.file.driver": "file", "test.file.filename": "{}/other.raw"},
    "compress": {},
    "copy-before-write": {"target.driver": "raw", "target.file.driver": "file", "target.file.filename": "{}/other.raw"},
    "copy-on-read": {},
    "throttle": {"throttle-group": "slow"},
}
_GROUP = ThrottleGroup({"iops-total": 10**6})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    blocklib.create(tmp_path / "disk.qcow2", 1 * MiB, format="qcow2")
    blocklib.create(tmp_path / "other.raw", 1 * MiB, format="raw")
    return tmp_path


def _own(driver: str, folder: Path) -> dict[str, Any]:
    """The options of a filter, but for its image."""
    return {name: value.replace("{}", str(folder)) for name, value in _OPTIONS[driver].items()}


def _whole(driver: str, folder: Path) -> dict[str, Any]:
    main_option = load(driver).main_option
    image = {"driver": "qcow2", "file.driver": "file", "file.filename": str(folder / "disk.qcow2")}
    return {"driver": driver, **{f"{main_option}.{name}": value for name, value in image.items()}, **_own(driver, folder)}


def _in_python(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _GROUP if name == "throttle-group" else value for name, value in options.items()}


def _use(disk: blocklib.Disk, driver: str) -> None:
    disk.write(100, b"through a filter")
    assert disk.read(100, 16) == b"through a filter"
    assert disk.size == 1 * MiB
    assert [node.driver for node in disk.chain()] == ["qcow2"]


def test_every_filter_is_here() -> None:
    assert set(_OPTIONS) == set(drivers.FILTERS)


@pytest.mark.parametrize("driver", drivers.FILTERS)
def test_it_is_opened_by_options_and_by_json(driver: str, folder: Path) -> None:
    options = _whole(driver, folder)
    with blocklib.open(_in_python(options), "r+") as disk:
        _use(disk, driver)
    if driver != "throttle":  # whose group has a name only on the command line
        with blocklib.open(blocklib.parse_options("json:" + json.dumps(options)), "r+") as disk:
            _use(disk, driver)
    assert blocklib.check(folder / "disk.qcow2", format="qcow2").clean


@pytest.mark.parametrize("spelling", ["image-opts", "json"])
@pytest.mark.parametrize("driver", drivers.FILTERS)
def test_it_is_opened_on_the_command_line(
    driver: str, spelling: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _whole(driver, folder)
    words = ["io", "--object", "throttle-group,id=slow,x-iops-total=1000000"]
    words += ["-c", "write -P 7 64k 4k", "-c", "read -P 7 64k 4k"]
    if spelling == "json":
        words.append("json:" + json.dumps(options))
    else:
        words += ["--image-opts", ",".join(f"{name}={value}" for name, value in options.items())]
    assert main(words) == 0
    assert "read 4096/4096" in capsys.readouterr().out


@pytest.mark.parametrize("driver", drivers.FILTERS)
def test_it_is_inserted_and_removed(driver: str, folder: Path) -> None:
    with blocklib.open(folder / "disk.qcow2", "r+") as disk:
        inserted = disk.insert_filter(driver, _in_python(_own(driver, folder)))
        assert driver in repr(inserted)
        _use(disk, driver)
        inserted.remove()
        _use(disk, driver)
        assert disk.node.parents[0].parent is None


@pytest.mark.parametrize("driver", drivers.FILTERS)
def test_a_wrong_option_is_one_line(driver: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _in_python(_whole(driver, folder)) | {"nonsense": 1}
    with pytest.raises(OptionError, match="nonsense"):
        blocklib.open(options, "r+")
    with blocklib.open(folder / "disk.qcow2", "r+") as disk:
        with pytest.raises(OptionError, match="nonsense"):
            disk.insert_filter(driver, {**_in_python(_own(driver, folder)), "nonsense": 1})
        with pytest.raises(OptionError, match=load(driver).main_option):
            disk.insert_filter(driver, {**_in_python(_own(driver, folder)), load(driver).main_option: "disk"})
        _use(disk, driver)
    text = ",".join(f"{name}={value}" for name, value in {**_whole(driver, folder), "nonsense": 1}.items())
    assert main(["info", "--object", "throttle-group,id=slow", "--image-opts", text]) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "nonsense" in captured.err


@pytest.mark.parametrize("driver", drivers.FILTERS)
def test_its_options_are_described(driver: str) -> None:
    described = blocklib.describe_options(driver, "open")
    assert f"  {load(driver).main_option}=<node>" in described
    for name in _OPTIONS[driver]:
        assert f"  {name.partition('.')[0]}" in described


@pytest.mark.parametrize("driver", drivers.FILTERS)
def test_it_passes_sizes_flushes_and_batches(driver: str, folder: Path) -> None:
    with blocklib.open(_in_python(_whole(driver, folder)), "r+", discard="unmap") as disk:
        disk.write_batch([0, 128 * KiB, 512], b"1" * 512 + b"2" * 512 + b"3" * 512)
        assert disk.read_batch([512, 0], 512).tobytes() == b"3" * 512 + b"1" * 512
        disk.flush()
        disk.truncate(2 * MiB)
        assert disk.size == 2 * MiB
        disk.write(2 * MiB - 3, b"end")
        assert disk.read(2 * MiB - 4, 4) == b"\0end"
        assert sum(extent.length for extent in disk.extents()) == 2 * MiB


@pytest.mark.parametrize("driver", [driver for driver in drivers.FILTERS if driver != "compress"])
def test_below_a_format_it_lets_the_image_grow(driver: str, tmp_path: Path) -> None:
    image, other = tmp_path / "disk.qcow2", tmp_path / "other.raw"
    blocklib.create(image, 4 * MiB, format="qcow2")
    other.write_bytes(image.read_bytes())
    own = _own(driver, tmp_path)
    if driver == "blkverify":
        own = {"test.driver": "file", "test.filename": str(other)}
    main_option = load(driver).main_option
    below = {"driver": driver, f"{main_option}.driver": "file", f"{main_option}.filename": str(image), **_in_python(own)}
    data = bytes(range(1, 252)) * 8000
    with blocklib.open({"driver": "qcow2", "file": below}, "r+", discard="unmap") as disk:
        disk.write(100_000, data)
        disk.write_zeroes(200_000, 100_000, unmap=True)
        disk.flush()
        disk.snapshots.create("here")
        disk.write(100_000, b"over" * 1000)
        disk.discard(1 * MiB, 1 * MiB)
        disk.truncate(8 * MiB)
        assert disk.read(104_000, 90_000) == data[4000:94_000]
    assert blocklib.check(image, format="qcow2").clean
    with blocklib.open(image) as disk:
        assert disk.read(100_000, 5000) == b"over" * 1000 + data[4000:5000]
        assert disk.read(200_000, 100_000) == bytes(100_000)
    if driver == "blkverify":
        assert blocklib.check(other, format="qcow2").clean
        with blocklib.open(image) as disk, blocklib.open(other) as copy:
            assert disk.read(0, disk.size) == copy.read(0, copy.size)
