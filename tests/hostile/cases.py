"""Hostile images by name: an honest image of each kind, damaged in one place.

A case is called "KIND: WHAT=VALUE", such as "snapshots: snapshot 0.l1_size=max", or "KIND: NAME" for the named damages of
`tests.damage`.  ``python -m tests.hostile.cases CASE [COMMAND]`` runs one and prints how it ended.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import blocklib
from tests.damage import DAMAGES, IMAGES, ImagePath, KiB, MiB, Recipe
from tests.hostile.commands import COMMANDS, IMAGE, Trial, Verdict, copy_sparse
from tests.hostile.fields import fields_of, values_of
from tests.hostile.runner import Runner
from tests.programs import Program, find_program

Apply = Callable[[ImagePath], object]

DECOY: Final = "decoy.qcow2"
_RECIPES: Final = IMAGES | {
    "zstd": Recipe(options="compression_type=zstd", commands=("write -P 1 0 256k", "write -c -P 7 1280k 128k")),
    "narrow counts": Recipe(options="refcount_bits=1,cluster_size=4096", commands=("write -P 1 0 256k",)),
    "large clusters": Recipe(options="cluster_size=1M,extended_l2=on", commands=("write -P 1 0 64k", "write -c -P 7 1M 1M")),
}
KINDS: Final = (*_RECIPES, "overlay", "relative data file")


def make_image(kind: str, folder: Path) -> ImagePath:
    """The honest image of a kind, in a folder of its own, beside what it refers to and a file that nobody may open."""
    folder.mkdir(parents=True)
    path = folder / IMAGE
    if kind in _RECIPES:
        qemu_img, qemu_io = find_program("qemu-img"), find_program("qemu-io")
        assert qemu_img is not None
        assert qemu_io is not None
        _RECIPES[kind].make(Program(qemu_img), Program(qemu_io), path)
    elif kind == "overlay":
        _write(folder / "base.qcow2", blocklib.create(folder / "base.qcow2", 6 * MiB, format="qcow2"))
        blocklib.create(path, format="qcow2", backing="base.qcow2", backing_format="qcow2")
        _write(path)
    else:
        blocklib.create(path, 6 * MiB, format="qcow2", options={"data_file": "image.data"})
        _write(path)
    blocklib.create(folder / DECOY, 6 * MiB, format="qcow2")
    return ImagePath(path)


def _write(path: Path, _made: object = None) -> None:
    with blocklib.open(path, "r+", format="qcow2", references="allow") as disk:
        disk.write(64 * KiB, b"\1" * (256 * KiB))
        disk.write_zeroes(512 * KiB, 64 * KiB)


def cases_of(kind: str, image: ImagePath) -> Iterator[tuple[str, Apply]]:
    """Every way to damage an image of this kind."""
    for name, damage in DAMAGES.items():
        if damage.image == kind:
            yield f"{kind}: {name}", damage.apply
    for field in fields_of(image):
        for name, value in values_of(image, field):
            yield f"{kind}: {field.name}={name}", _putting(field.place, value)


def _putting(place: int, value: bytes) -> Apply:
    return lambda image: image.write(place, (value,))


class Workshop:
    """Honest images in `folder`, and a runner; makes a `Trial` of any case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runner = Runner()
        self._images: dict[str, ImagePath] = {}
        self._cases: dict[str, dict[str, Apply]] = {}

    def cases(self, kind: str) -> dict[str, Apply]:
        if kind not in self._cases:
            self._images[kind] = make_image(kind, self.folder / kind.replace(" ", "-"))
            self._cases[kind] = dict(cases_of(kind, self._images[kind]))
        return self._cases[kind]

    def trial(self, case: str, *, trusted: bool = False) -> Trial:
        kind = case.partition(":")[0]
        apply = self.cases(kind)[case]
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in self._images[kind].path.parent.iterdir():
            copy_sparse(path, folder / path.name)
        apply(ImagePath(folder / IMAGE))
        return Trial(self.runner, folder, case, secret=kind == "LUKS", trusted=trusted)

    def verdicts(self, case: str, commands: list[str], *, trusted: bool = False) -> Iterator[Verdict]:
        trial = self.trial(case, trusted=trusted)
        if any(COMMANDS[name].changes for name in commands):
            trial.judge()
        for name in commands:
            yield trial.run(name)
        trial.close()

    def close(self) -> None:
        self.runner.close()


def main() -> None:
    case, *commands = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for verdict in workshop.verdicts(case, commands or list(COMMANDS)):
            print(verdict)
        workshop.close()


if __name__ == "__main__":
    main()
