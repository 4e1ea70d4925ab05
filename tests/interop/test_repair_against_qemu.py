"""Every named damage, checked and repaired by both programs: the same numbers, and no sector that only QEMU's repair keeps.

Where qemu-img has no answer, since it does not open the image or gives up, the repair has to be right on its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.damage import DAMAGES, IMAGES, NO_DAMAGE, REMAINS, ImagePath
from tests.programs import Argument, Program

NUMBERS = {
    "check-errors": "check_errors",
    "corruptions": "corruptions",
    "leaks": "leaks",
    "image-end-offset": "image_end_offset",
    "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters",
    "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
}
LEFT = ("check-errors", "corruptions", "leaks")
LEAKS = [name for name in DAMAGES if any(word in name for word in ("leak", "too high", "copied flag", "past the end", "less"))]
"""Damages after which something looks leaked, or a flag is wrong."""
EVERY = pytest.mark.parametrize("name", DAMAGES)


class Bench:
    """Damaged copies of the images, and what qemu-img says of them."""

    def __init__(self, qemu_img: Program, qemu_io: Program, folder: Path) -> None:
        self.qemu_img = qemu_img
        self.qemu_io = qemu_io
        self.folder = folder
        self._sound: dict[str, ImagePath] = {}
        self._contents: dict[str, bytes] = {}

    def sound(self, name: str) -> ImagePath:
        if name not in self._sound:
            folder = self.folder / name.replace(" ", "-")
            folder.mkdir()
            self._sound[name] = IMAGES[name].make(self.qemu_img, self.qemu_io, folder / "image.qcow2")
        return self._sound[name]

    def damaged(self, name: str) -> ImagePath:
        image = self.sound(DAMAGES[name].image).copy(".damaged")
        DAMAGES[name].apply(image)
        return image

    def opened(self, image: ImagePath, name: str) -> list[Argument]:
        """The words with which qemu-img opens it."""
        secret = IMAGES[DAMAGES[name].image].secret
        if secret is None:
            return ["-f", "qcow2", image.path]
        options = f"driver=qcow2,file.filename={image.path},encrypt.key-secret=s"
        return ["--object", f"secret,id=s,data={secret}", "--image-opts", options]

    def check(self, image: ImagePath, name: str, *flags: Argument) -> dict[str, Any] | None:
        """What qemu-img prints as JSON; None where it gives up."""
        done = self.qemu_img.run("check", "--output=json", *flags, *self.opened(image, name))
        return json.loads(done.stdout) if done.stdout else None

    def content(self, image: ImagePath, name: str) -> bytes | None:
        """What the guest reads, with zeroes where nothing can be read; None if the image cannot be opened."""
        raw = image.path.with_suffix(".raw")
        done = self.qemu_img.run("convert", "--salvage", *self.opened(image, name), "-O", "raw", raw)
        return None if done.returncode else raw.read_bytes()

    def original(self, name: str) -> bytes:
        recipe = DAMAGES[name].image
        if recipe not in self._contents:
            content = self.content(self.sound(recipe), name)
            assert content is not None
            self._contents[recipe] = content
        return self._contents[recipe]


@pytest.fixture(scope="module")
def bench(qemu_img: Program, qemu_io: Program, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(qemu_img, qemu_io, tmp_path_factory.mktemp("damage"))


def test_there_are_many_kinds_of_damage_and_most_are_repaired() -> None:
    assert set(DAMAGES) > REMAINS | NO_DAMAGE
    assert len(set(DAMAGES) - REMAINS - NO_DAMAGE) >= 120


@EVERY
def test_damage_is_counted_as_qemu_img_counts_it(bench: Bench, name: str) -> None:
    image = bench.damaged(name)
    report = image.check()
    theirs = bench.check(image, name)
    if theirs is None:
        assert name in NO_DAMAGE or not report.clean or image.field("autoclear_features")
        return
    ours = {key: getattr(report, attribute) for key, attribute in NUMBERS.items()}
    assert ours == {key: theirs.get(key, 0) for key in NUMBERS}, "\n".join(map(str, report.findings[:20]))


@EVERY
def test_repaired_damage_is_gone_and_guest_data_that_qemu_keeps_is_kept(bench: Bench, name: str) -> None:
    ours = bench.damaged(name)
    theirs = ours.copy(".theirs")
    after = ours.repair("all").after
    assert after is not None
    found = bench.check(ours, name)
    if name not in NO_DAMAGE:
        assert after.clean == (name not in REMAINS)
        assert found is not None
        compressed_on_metadata = sum(item.expected == "metadata that nothing else uses" for item in after.findings)
        assert [found.get(key, 0) for key in LEFT] == [
            after.check_errors,
            after.corruptions - compressed_on_metadata,
            after.leaks,
        ]
    answer = bench.check(theirs, name, "-r", "all")
    if answer is not None and not any(answer.get(key) for key in LEFT):
        assert found is not None
        assert not any(found.get(key) for key in LEFT)
    kept, original, read = bench.content(theirs, name), bench.original(name), bench.content(ours, name)
    if kept is not None and kept != read:
        assert read is not None
        places = range(0, len(original), 512)
        sectors = [place for place in places if kept[place : place + 512] == original[place : place + 512]]
        assert [place for place in sectors if read[place : place + 512] != original[place : place + 512]] == []


@pytest.mark.parametrize("name", LEAKS)
def test_repairing_leaks_does_what_qemu_img_does(bench: Bench, name: str) -> None:
    ours = bench.damaged(name)
    theirs = ours.copy(".theirs")
    after = ours.repair("leaks").after
    assert after is not None
    answer = bench.check(theirs, name, "-r", "leaks")
    if answer is None:  # QEMU gives up where refcounts have to be rebuilt
        return
    numbers = {
        "check-errors": after.check_errors,
        "corruptions": after.corruptions,
        "leaks": after.leaks,
        "leaks-fixed": after.leaks_fixed,
        "corruptions-fixed": after.corruptions_fixed,
    }
    assert numbers == {key: answer.get(key, 0) for key in numbers}
