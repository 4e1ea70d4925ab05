"""Snapshots made by one program and used by the other, in turn, on images of every kind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import blocklib
from tests.programs import Program

SIZE = 3 << 20
OPTIONS = (
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=2M",
    "refcount_bits=8",
    "refcount_bits=64,cluster_size=4k",
    "compression_type=zstd",
    "lazy_refcounts=on",
    "extended_l2=on,cluster_size=32k",
    "preallocation=metadata",
)


class Pair:
    """One image that both programs change in turn, and the bytes that it and its snapshots should have."""

    def __init__(self, path: Path, qemu_img: Program, qemu_io: Program, seed: int) -> None:
        self.path = path
        self.qemu_img = qemu_img
        self.qemu_io = qemu_io
        self.rnd = random.Random(seed)
        self.content = bytearray(SIZE)
        self.saved: dict[str, bytes] = {}

    def write(self, ours: bool) -> None:
        commands = []
        for _ in range(4):
            offset = self.rnd.randrange(SIZE // 512) * 512
            length = min(self.rnd.choice((512, 70_144, 400 * 1024)), SIZE - offset)
            byte = self.rnd.randrange(0, 256)
            self.content[offset : offset + length] = bytes((byte,)) * length
            commands += ["-c", f"write -P {byte} {offset} {length}" if byte % 5 else f"write -z {offset} {length}"]
            if not byte % 5:
                self.content[offset : offset + length] = bytes(length)
        if ours:
            with blocklib.open(self.path, "r+", format="qcow2", cache="unsafe") as disk:
                for command in commands[1::2]:
                    *_, offset_text, length_text = command.split()
                    offset, length = int(offset_text), int(length_text)
                    disk.write(offset, self.content[offset : offset + length])
        else:
            self.qemu_io("-f", "qcow2", *commands, self.path)
        with blocklib.open(self.path, format="qcow2") as disk:  # where two of them met, the last has won
            self.content[:] = disk.read(0, SIZE)

    def change(self, ours: bool, verb: str, name: str) -> None:
        if not ours:
            self.qemu_img("snapshot", {"create": "-c", "apply": "-a", "delete": "-d"}[verb], name, self.path)
        else:
            with blocklib.open(self.path, "r+", format="qcow2", cache="unsafe") as disk:
                if verb == "create":
                    disk.snapshots.create(name)
                else:
                    getattr(disk.snapshots[name], verb)()
        if verb == "create":
            self.saved[name] = bytes(self.content)
        elif verb == "apply":
            self.content[:] = self.saved[name]
        else:
            del self.saved[name]
        self.qemu_img("check", "-q", "-f", "qcow2", self.path)

    def compare(self, folder: Path) -> None:
        for name, content in [*self.saved.items(), (None, bytes(self.content))]:
            options = {} if name is None else {"snapshot.name": name}
            with blocklib.open(self.path, format="qcow2", options=options) as disk:
                assert disk.read(0, SIZE) == content, name
            wanted = [] if name is None else ["-l", name]
            self.qemu_img("convert", "-f", "qcow2", *wanted, "-O", "raw", self.path, folder / "raw")
            assert (folder / "raw").read_bytes() == content, name
        listed = self.qemu_img.json("info", self.path).get("snapshots", [])
        infos = blocklib.info(self.path).snapshots
        assert [(entry["id"], entry["name"]) for entry in listed] == [(info.id, info.name) for info in infos]
        assert [info.name for info in infos] == list(self.saved)


@pytest.mark.parametrize("options", OPTIONS)
def test_both_programs_change_one_image_in_turn(
    options: str, tmp_path: Path, qemu_img: Program, qemu_io: Program
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    kind = "" if "preallocation" in options else "-c"  # QEMU does not compress over what has its place already
    qemu_io("-f", "qcow2", "-c", f"write {kind} -P 9 0 2M", path)
    pair = Pair(path, qemu_img, qemu_io, OPTIONS.index(options))
    pair.content[: 2 << 20] = b"\x09" * (2 << 20)
    for number, verb in enumerate(("create", "create", "apply", "create", "delete", "create", "apply", "delete", "delete")):
        ours = bool(number % 2) ^ bool(OPTIONS.index(options) % 2)
        pair.write(not ours)
        name = f"s{number}" if verb == "create" else pair.rnd.choice(list(pair.saved))
        pair.change(ours, verb, name)
    pair.compare(tmp_path)
