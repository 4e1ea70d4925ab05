"""Both directions over every feature of qcow2 and their combinations: each program goes on where the other stopped."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.interop.features import FeatureCase, FeatureImage, Runner, Tools, every_legal_pair, random_legal_cases
from tests.programs import Argument, Program
from tests.property.chains import first_difference


@pytest.fixture
def tools(qemu_img: Program, qemu_io: Program) -> dict[str, Tools]:
    return {
        "qemu": Tools("qemu", _patient(qemu_img), qemu_io),
        "blocklib": Tools("blocklib", CommandLine("qemu-img"), CommandLine("qemu-io")),
    }


def _patient(qemu_img: Program) -> Runner:
    """qemu-img, asked again where it could not measure how fast the machine hashes because others kept it busy."""

    def run(*arguments: Argument) -> str:
        for _ in range(20):
            done = qemu_img.run(*arguments)
            if "Unable to get accurate CPU usage" not in done.stderr:
                break
        assert done.returncode == 0, f"qemu-img {arguments}: {done.stderr}"
        return done.stdout

    return run


def assert_agreed(image: FeatureImage, tools: dict[str, Tools]) -> None:
    """Both programs read what was written, now and in each snapshot, find no fault and describe it alike."""
    for reader in tools.values():
        assert not first_difference(image.read(reader), image.content), reader.name
        for name, content in image.snapshots.items():
            assert not first_difference(image.read(reader, name), content), (reader.name, name)
    theirs, ours = (dict(image.what_it_says(reader)) for reader in tools.values())
    assert ours == theirs
    if image.case.data_file == "raw":
        assert not first_difference((image.folder / "data.raw").read_bytes()[: image.case.size], image.content)


@pytest.mark.parametrize("maker", ["qemu", "blocklib"])
@pytest.mark.parametrize("case", every_legal_pair(), ids=str)
def test_each_program_goes_on_where_the_other_stopped(
    case: FeatureCase, maker: str, tools: dict[str, Tools], tmp_path: Path
) -> None:
    first = tools[maker]
    second = next(each for each in tools.values() if each is not first)
    choose = random.Random(f"{case} {maker}")
    image = FeatureImage(case, tmp_path)
    image.create(first, choose)
    if case.compression != "none":
        image.compress(first, choose)
    if case.bitmaps != "none":
        image.add_bitmap(first, "bitmap0", disabled=case.bitmaps == "disabled")
    image.write(first, choose)
    if case.snapshots:
        image.take_snapshot(first, "one")
        image.write(first, choose)
    image.discard(first, choose)
    assert_agreed(image, tools)
    image.write(second, choose)
    if case.snapshots:
        image.take_snapshot(second, "two")
        image.write(second, choose, 3)
        if case.bitmaps != "none":
            image.remove_bitmap(second, "bitmap0")  # neither program applies a snapshot under a bitmap
        image.apply_snapshot(second, "one")
        image.write(second, choose, 3)
        assert_agreed(image, tools)
        image.delete_snapshot(second, "one")
    image.discard(second, choose)
    assert_agreed(image, tools)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(100))
def test_each_program_goes_on_with_random_combinations(seed: int, tools: dict[str, Tools], tmp_path: Path) -> None:
    for case in random_legal_cases(seed, 10):
        for maker in tools:
            folder = tmp_path / "images"
            folder.mkdir()
            test_each_program_goes_on_where_the_other_stopped(case, maker, tools, folder)
            shutil.rmtree(folder)
