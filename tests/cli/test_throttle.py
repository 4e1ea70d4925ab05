"""Throttle groups on the command line, with qemu-io beside it: what it takes we take, what it refuses we refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import blocklib
from blocklib import MiB
from blocklib.cli.main import main
from blocklib.cli.objects import objects_of
from blocklib.throttling import LIMITS, ThrottleGroup
from tests.cli.io_support import OurIo, commands
from tests.programs import Program


@pytest.fixture
def our_io(capsys: pytest.CaptureFixture[str]) -> OurIo:
    return OurIo(capsys)


_TARGET = "driver=throttle,throttle-group=slow,file.driver=qcow2,file.file.driver=file,file.file.filename="


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1 * MiB, format="qcow2")
    return path


def _group(text: str) -> ThrottleGroup:
    found = objects_of([text])["slow"]
    assert isinstance(found, ThrottleGroup)
    return found


def test_every_limit_has_all_of_its_spellings() -> None:
    limits = {}
    for number, name in enumerate(LIMITS):
        if "total" not in name:
            limits[name] = 5 if name.endswith("-length") else 10**6 * (2 if name.endswith("-max") else 1) + number
    text = "throttle-group,id=slow," + ",".join(f"{{}}{name}={value}" for name, value in limits.items())
    assert len(limits) == 13
    assert _group(text.replace("{}", "x-")).limits == limits
    assert _group(text.replace("{}", "limits.")).limits == limits
    assert _group(json.dumps({"qom-type": "throttle-group", "id": "slow", "limits": limits})).limits == limits
    assert _group("throttle-group,id=slow,x-bps-total=1,limits.iops-read=2").limits == {"bps-total": 1, "iops-read": 2}
    assert _group("throttle-group,id=slow").limits == {}


@pytest.mark.requires("qemu-io")
@pytest.mark.parametrize(
    "limits",
    [
        "x-iops-total=100000",
        "limits.bps-read=100000000,x-iops-write=4000",
        "x-iops-total=10,x-iops-read=1",
        "x-iops-total=1k",
        "x-bps-totl=1",
        "x-iops-total-max-length=5",
        "x-iops-total-max=5",
        "x-iops-total=10,x-iops-total-max=5",
        "x-iops-total=10,x-iops-total-max=50,x-iops-total-max-length=0",
        "x-iops-total=100000,x-iops-total-max=200000,x-iops-total-max-length=3,x-iops-size=4096",
        "x-iops-size=5",
        "x-bps-total=2000000000000000",
        "limits.iops-total=-1",
        "limits=5",
    ],
)
def test_what_qemu_refuses_is_refused_in_one_line(limits: str, image: Path, qemu_io: Program, our_io: OurIo) -> None:
    arguments = ["--object", f"throttle-group,id=slow,{limits}", "--image-opts", f"{_TARGET}{image}"]
    arguments += commands("write -P 7 0 64k", "read -P 7 4k 8k")
    theirs = qemu_io.run(*arguments)
    ours = our_io(*arguments)
    assert ours.code == theirs.returncode
    assert len(ours.err.splitlines()) == (1 if theirs.returncode else 0)


def test_a_group_that_is_not_there_is_named(image: Path, our_io: OurIo) -> None:
    ran = our_io("--image-opts", f"{_TARGET}{image}", *commands("length"))
    assert ran.code == 1
    assert "'slow'" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_group_in_json_throttles_a_bench(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    target = "json:" + json.dumps({"driver": "throttle", "throttle-group": "slow", "file": below})
    assert main(["bench", "--object", "throttle-group,id=slow,x-iops-total=1000000", "-c", "50", "-w", target]) == 0
    assert "Run completed" in capsys.readouterr().out
