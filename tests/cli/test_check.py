"""``check`` finds, prints and exits as qemu-img does, and repairs what it can."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blocklib.cli.check import exit_code, human_lines, json_of, repaired_lines
from blocklib.reports import CheckReport
from tests.cli.images import chain
from tests.cli.running import CommandLine
from tests.damage import DAMAGES, IMAGES
from tests.programs import Program

CLUSTER = 65536


def test_checking_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, any_image: str) -> None:
    for flags in ([], ["--output=json"], ["-q"]):
        theirs = qemu_img.run("check", *flags, any_image)
        ours = blocklib.run("check", *flags, any_image)
        assert (ours.code, ours.out) == (theirs.returncode, theirs.stdout)
        assert bool(ours.err) == bool(theirs.stderr)


def _refcount_block(file: Path) -> int:
    with file.open("rb") as image:
        image.seek(48)
        (table,) = struct.unpack(">Q", image.read(8))
        image.seek(table)
        (block,) = struct.unpack(">Q", image.read(8))
    assert isinstance(block, int)
    return block


def _set_refcount(file: Path, cluster: int, count: int) -> None:
    place = _refcount_block(file) + 2 * cluster
    with file.open("r+b") as image:
        image.seek(place)
        image.write(struct.pack(">H", count))


def _leak(file: Path) -> None:
    """Two clusters at the end that nothing refers to."""
    clusters = -(-file.stat().st_size // CLUSTER)
    with file.open("r+b") as image:
        image.truncate((clusters + 2) * CLUSTER)
    _set_refcount(file, clusters, 1)
    _set_refcount(file, clusters + 1, 1)


def _lose_a_count(file: Path) -> None:
    """A data cluster whose count says that it is free."""
    _set_refcount(file, 5, 0)


def _both(file: Path) -> None:
    _leak(file)
    _lose_a_count(file)


Damage = Callable[[Path], None]
FAULTS = [
    pytest.param(_leak, 3, id="leak"),
    pytest.param(_lose_a_count, 2, id="corruption"),
    pytest.param(_both, 2, id="both"),
]


@pytest.fixture
def image(qemu_img: Program, qemu_io: Program, here: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "image.qcow2", "4M")
    qemu_io("-f", "qcow2", "-c", "write -P 1 0 256k", "-c", "write -P 2 2M 64k", "image.qcow2")
    return here / "image.qcow2"


@pytest.mark.parametrize(("damage", "code"), FAULTS)
def test_damage_is_counted_as_qemu_img_counts_it(
    blocklib: CommandLine, qemu_img: Program, image: Path, damage: Damage, code: int
) -> None:
    damage(image)
    for flags in ([], ["--output=json"], ["-q"], ["-U"], ["-T", "none"]):
        theirs = qemu_img.run("check", *flags, image)
        ours = blocklib.run("check", *flags, image)
        assert theirs.returncode == code
        assert (ours.code, ours.out) == (code, theirs.stdout)
        assert ours.err.count("\n") == theirs.stderr.count("\n")


def test_every_finding_is_named_on_standard_error(blocklib: CommandLine, image: Path) -> None:
    _leak(image)
    lines = blocklib.run("check", image).err.splitlines()
    assert all(re.fullmatch(r"leak: .* at 0x[0-9a-f]+: expected 0, found 1", line) for line in lines)
    assert len(lines) == 2


@pytest.mark.parametrize(("damage", "_code"), FAULTS)
def test_repairing_everything_leaves_a_clean_image(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, image: Path, damage: Damage, _code: int
) -> None:
    damage(image)
    printed = blocklib("check", "-r", "all", image)
    assert printed.startswith("The following inconsistencies were found and repaired:\n\n    ")
    assert "Double checking the fixed image now...\nNo errors were found on the image.\n" in printed
    qemu_img("check", image)
    qemu_io("-f", "qcow2", "-c", "read -P 1 0 256k", "-c", "read -P 2 2M 64k", image)


def test_repairing_leaks_is_that_of_qemu_img(blocklib: CommandLine, qemu_img: Program, image: Path) -> None:
    _leak(image)
    twin = image.with_name("twin.qcow2")
    twin.write_bytes(image.read_bytes())
    assert blocklib("check", "-r", "leaks", image) == qemu_img("check", "-r", "leaks", twin)
    _leak(image)
    _leak(twin)
    ours, theirs = blocklib.json("check", "-r", "leaks", image), qemu_img.json("check", "-r", "leaks", twin)
    assert ours.pop("filename") == str(image)
    assert theirs.pop("filename") == str(twin)
    assert ours == theirs
    assert ours["leaks-fixed"] == 2


def test_repairing_leaks_leaves_corruption_for_the_exit_code(blocklib: CommandLine, image: Path) -> None:
    _both(image)
    report = blocklib.json("check", "-r", "leaks", image, code=2)
    assert report["leaks-fixed"] == 2
    assert report["corruptions"] == 2


def test_an_overlay_is_checked_without_its_chain(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path
) -> None:
    chain(qemu_img, qemu_io)
    (here / "middle.qcow2").unlink()
    blocklib("check", "--untrusted", "top.qcow2")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 1, "file name"),
        (["a", "b"], 1, "file name"),
        (["nowhere"], 1, "nowhere"),
        (["a"], 63, "format"),
        (["--output=json", "a"], 63, "format"),
        (["-q", "-f", "raw", "a"], 63, "format"),
        (["-f", "qcow2", "a"], 1, "a"),
        (["-r", "some", "a"], 1, "-r some"),
        (["-T", "some", "a"], 1, "-T some"),
        (["--output=xml", "a"], 1, "xml"),
        (["-U", "-r", "all", "image.qcow2"], 1, "image.qcow2"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_its_own_exit_code(
    blocklib: CommandLine, image: Path, here: Path, arguments: list[str], code: int, part: str
) -> None:
    (here / "a").write_bytes(bytes(1024))
    assert part in blocklib.fails("check", *arguments, code=code)


def test_a_plan_says_what_a_repair_would_do_and_changes_nothing(blocklib: CommandLine, image: Path) -> None:
    _both(image)
    before = image.read_bytes()
    planned = blocklib.run("check", "-r", "all", "--plan", image)
    assert planned.code == 2
    lines = planned.out.splitlines()
    assert lines[0] == "The repair would take these steps:"
    assert "Nothing was changed." in lines
    told = [line.strip() for line in lines if line.startswith("    ")]
    plan = blocklib.json("check", "-r", "all", "--plan", image, code=2)["plan"]
    assert [step["action"] for step in plan] == ["raise refcounts", "lower refcounts"]
    assert all(step["host-offset"] == _refcount_block(image) for step in plan)
    assert image.read_bytes() == before
    done = blocklib.run("check", "-r", "all", image)
    assert done.code == 0
    assert done.err.splitlines()[-len(told) :] == told
    assert blocklib("check", "-r", "all", "--plan", image).startswith("There is nothing to repair.\n")


def test_a_plan_needs_a_repair(blocklib: CommandLine, image: Path) -> None:
    assert "-r" in blocklib.fails("check", "--plan", image, code=1)


@pytest.mark.parametrize("recipe", ["extended L2", "data file", "LUKS", "bitmaps"])
def test_images_with_every_feature_are_checked_without_what_they_name(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, recipe: str
) -> None:
    made = IMAGES[recipe].make(qemu_img, qemu_io, here / "image.qcow2")
    if recipe == "LUKS":
        report = blocklib.json("check", made.path)
        assert report["allocated-clusters"] == 8
        return
    theirs = [qemu_img("check", made.path), qemu_img("check", "--output=json", made.path)]
    (here / "image.data").unlink(missing_ok=True)
    assert [blocklib("check", made.path), blocklib("check", "--output=json", made.path)] == theirs


@pytest.mark.parametrize(
    "name", ["snapshot table past the end", "refcount table past the end", "refcount block lost", "bitmap in use"]
)
def test_named_damage_ends_with_the_same_exit_code_and_is_repaired(
    blocklib: CommandLine, qemu_img: Program, qemu_io: Program, here: Path, name: str
) -> None:
    made = IMAGES[DAMAGES[name].image].make(qemu_img, qemu_io, here / "image.qcow2")
    DAMAGES[name].apply(made)
    theirs = qemu_img.run("check", "--output=json", made.path)
    ours = blocklib.run("check", "--output=json", made.path)
    assert (ours.code, ours.out) == (theirs.returncode, theirs.stdout)
    assert blocklib.run("check", "-r", "all", made.path).code == 0
    qemu_img("check", made.path)


def _report(**counts: Any) -> CheckReport:
    return CheckReport("a", "qcow2", **counts)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (_report(), 0),
        (_report(leaks=1), 3),
        (_report(corruptions=1, leaks=1, check_errors=1), 2),
        (_report(check_errors=1, leaks=1), 1),
    ],
)
def test_the_worst_finding_decides_the_exit_code(report: CheckReport, code: int) -> None:
    assert exit_code(report) == code


def test_what_was_repaired_comes_before_the_state_after_it() -> None:
    report = _report(leaks_fixed=2, corruptions_fixed=1)
    assert repaired_lines(report)[2:4] == ["    2 leaked clusters", "    1 corruptions"]
    assert repaired_lines(_report()) == []
    assert json_of(report)["leaks-fixed"] == 2
    assert human_lines(_report(check_errors=3))[1].startswith("3 ")
