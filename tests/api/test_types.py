"""The usage that mypy checks also runs, and what the types forbid is refused when it runs."""

from __future__ import annotations

import inspect
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB, MiB
from tests.api import usage
from tests.api.images import PATTERN, make_chain, make_disk, make_raw

EXAMPLES = [
    function
    for name, function in vars(usage).items()
    if inspect.isfunction(function)
    and function.__module__ == usage.__name__
    and not inspect.iscoroutinefunction(function)
    and all(one.default is not one.empty for one in inspect.signature(function).parameters.values())
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_the_usage_that_is_type_checked_runs(
    example: Callable[[], object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_disk("disk.qcow2")
    make_chain()
    make_raw("disk.img", 2 * MiB, PATTERN)
    make_raw("json:{}", 512)
    (folder / "pool").mkdir()
    for name in ("base.qcow2", "golden.img"):
        (folder / "pool" / name).hardlink_to(name)
    with tarfile.open("backup.img", "w") as archive:
        archive.add("disk.img")
    example()
    out = capsys.readouterr().out
    assert out or "print" not in inspect.getsource(example)


def test_every_task_that_can_be_done_has_an_example() -> None:
    assert len(EXAMPLES) == 13


def test_the_package_says_that_it_is_typed() -> None:
    assert blocklib.__file__ is not None
    assert Path(blocklib.__file__).with_name("py.typed").is_file()


def test_what_the_types_forbid_is_refused() -> None:
    # `make types` fails where one of these errors is no longer found: an unused "type: ignore" is an error itself.
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with pytest.raises(blocklib.UsageError):
        blocklib.open("disk.qcow2", "w")  # type: ignore[arg-type]
    with pytest.raises(blocklib.UsageError):
        blocklib.open("disk.qcow2", cache="fast")  # type: ignore[arg-type]
    with pytest.raises(blocklib.UsageError):
        blocklib.open("disk.qcow2", discard="maybe")  # type: ignore[arg-type]
    with pytest.raises(blocklib.UsageError):
        blocklib.open("disk.qcow2", format="qcow2", references="maybe")  # type: ignore[arg-type]
    with pytest.raises(blocklib.UsageError):
        blocklib.open(b"disk.qcow2")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        blocklib.open("disk.qcow2", "r", "qcow2")  # type: ignore[call-arg, misc, arg-type, unused-ignore]
    with pytest.raises(TypeError):
        blocklib.create("new.qcow2", 1 * MiB)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        blocklib.create("new.qcow2", 1 * MiB, format="qcow2", cluster_size=4096)  # type: ignore[call-arg]
    with blocklib.open("disk.qcow2", "r+") as disk:
        with pytest.raises(TypeError):
            disk.write(0, "text")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            disk.read(0)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            disk.truncate(2 * MiB, True)  # type: ignore[call-arg, misc, unused-ignore]
        with pytest.raises(AttributeError):
            disk.size = 5  # type: ignore[misc]
        with pytest.raises(AttributeError):
            disk.seek(0)  # type: ignore[attr-defined]
    assert not Path("new.qcow2").exists()
