"""The workloads whose every request fails once; each is a few steps that meet many moments of an image's life."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import blocklib
from blocklib import KiB, MiB
from tests.damage import COPIED, ImagePath
from tests.encrypted import LUKS, OPEN
from tests.faults.campaign import Rules, Session, Workload, file_options

SIZE: Final = 256 * KiB


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def image(name: str = "top", size: int = SIZE, content: int = 0, **options: Any) -> Callable[[Path], None]:
    """Makes an image; the first `content` bytes of it are noise."""

    def make(folder: Path) -> None:
        blocklib.create(folder / name, size, format="qcow2", options=options)
        if content:
            secret = OPEN if "encrypt.format" in options else {}
            with blocklib.open(folder / name, "r+", cache="unsafe", options=secret) as disk:
                disk.write(0, noise(size, content))

    return make


def together(*makers: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def alone(folder: Path, rules: Mapping[str, Rules]) -> dict[str, Any]:
    return {"driver": "qcow2", "file": file_options(folder / "top", rules.get("top", ()))}


def over_base(folder: Path, rules: Mapping[str, Rules]) -> dict[str, Any]:
    base = {"driver": "qcow2", "file": file_options(folder / "base", rules.get("base", ()))}
    return {**alone(folder, rules), "backing": base}


def with_data_file(folder: Path, rules: Mapping[str, Rules]) -> dict[str, Any]:
    return {**alone(folder, rules), "data-file": file_options(folder / "data", rules.get("data", ()))}


def encrypted(folder: Path, rules: Mapping[str, Rules]) -> dict[str, Any]:
    return {**alone(folder, rules), **OPEN}


def raw(folder: Path, rules: Mapping[str, Rules]) -> dict[str, Any]:
    return {"driver": "raw", "file": file_options(folder / "top", rules.get("top", ()))}


def overlay(**options: Any) -> Callable[[Path], None]:
    """An image over another one."""

    def make(folder: Path) -> None:
        image("base", content=SIZE - 20 * KiB)(folder)
        blocklib.create(folder / "top", SIZE, format="qcow2", backing="base", backing_format="qcow2", options=options)

    return make


# The work -------------------------------------------------------------------------------------------------------------


def allocate(session: Session) -> None:
    session.write(3000, b"a" * 9000)
    session.write(100 * KiB, b"b" * 20_000)
    session.flush()
    session.write(3500, b"c" * 9000)
    session.write(200 * KiB, b"d" * 512)
    session.reopen()
    session.write(90 * KiB, b"e" * 40_000)


def in_batches(session: Session) -> None:
    session.batch(range(0, 64 * KiB, 5000), noise(1, 14 * 700))
    session.runs([(start * KiB, noise(start, 8 * KiB)) for start in (80, 96, 112)])
    session.flush()
    session.batch(range(1000, 64 * KiB, 5000), noise(2, 13 * 700))
    session.runs([(start * KiB, noise(start, 16 * KiB)) for start in (80, 128)])


def give_up(session: Session) -> None:
    session.zero(2048, 9000, unmap=True)
    session.zero(32 * KiB, 16 * KiB)
    session.discard(64 * KiB, 32 * KiB)
    session.flush()
    session.write(66 * KiB, b"a" * 3000)
    session.zero(160 * KiB, 70 * KiB, unmap=True)
    session.flush()
    session.discard(0, 64 * KiB)
    session.write(10 * KiB, b"b" * 10_000)


def snapshots(session: Session) -> None:
    session.write(0, b"a" * 20_000)
    session.snapshot("one")
    session.write(5000, b"b" * 20_000)
    session.snapshot("two")
    session.flush()
    session.write(70_000, b"c" * 5000)
    session.apply("one")
    session.write(7000, b"d" * 700)
    session.delete("two")
    session.reopen()
    session.delete("one")


def bitmaps(session: Session) -> None:
    session.step(
        lambda disk: disk.bitmaps.add("b", granularity=512, persistent=True), done_already=blocklib.UsageError
    )
    session.write(0, b"a" * 20_000)
    session.reopen()
    session.write(30_000, b"b" * 20_000)
    if "b" in session.disk.bitmaps:  # else it could not be stored, and closing has said so
        session.step(lambda disk: disk.bitmaps["b"].clear())
    session.write(60_000, b"c" * 512)
    session.step(
        lambda disk: disk.bitmaps.add("c", granularity=512, persistent=True), done_already=blocklib.UsageError
    )
    session.reopen()
    if "b" in session.disk.bitmaps:
        session.step(lambda disk: disk.bitmaps["b"].remove(), done_already=blocklib.NameNotFoundError)


def resize(session: Session) -> None:
    session.write(SIZE - 5000, b"a" * 5000)
    session.resize(SIZE + 300 * KiB)
    session.write(SIZE + 100 * KiB, b"b" * 3000)
    session.resize(SIZE + 350 * KiB, preallocation="metadata")
    session.resize(SIZE - 3072)
    session.resize(SIZE + 512, preallocation="falloc")
    session.write(SIZE, b"c" * 512)


def grow_tables(session: Session) -> None:
    """Clusters of 512 bytes with counts of 64 bits: a block counts 64 of them, the first table 4096."""
    session.flush()
    session.write(0, b"b" * 90 * KiB)
    session.flush()
    session.write(128 * KiB, b"c" * 40 * KiB)


def grow_l1(session: Session) -> None:
    session.write(0, b"a" * 1000)
    session.resize(3 * MiB)
    session.write(2 * MiB + 900 * KiB, b"b" * 1000)
    session.flush()
    session.resize(5 * MiB)
    session.resize(600 * KiB)


def compress(session: Session) -> None:
    session.compressed(0, noise(1, 2000) + bytes(16 * KiB - 2000))
    session.compressed(32 * KiB, (noise(2, 1000) + bytes(3096)) * 8)
    session.flush()
    session.write(2000, b"a" * 3000)
    session.discard(32 * KiB, 8 * KiB)
    session.flush()
    session.compressed(128 * KiB, b"c" * 16 * KiB)


def amend(**options: Any) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        session.write(0, b"a" * 3000)
        session.step(lambda disk: blocklib.amend(disk, options))
        session.write(10_000, b"b" * 3000)

    return work


def commit(session: Session) -> None:
    session.write(10 * KiB, b"a" * 20_000)
    session.write(SIZE - 9000, b"b" * 9000)
    session.step(lambda disk: blocklib.commit(disk), done_already=blocklib.UsageError)  # the disk is the base by then
    session.write(3 * KiB, b"c" * 512)


def rebase(session: Session) -> None:
    session.write(10 * KiB, b"a" * 5000)
    session.step(lambda disk: blocklib.rebase(disk, None))
    session.write(3 * KiB, b"c" * 512)


def repair(session: Session) -> None:
    session.step(lambda disk: blocklib.repair(disk, "all"))
    session.write(3 * KiB, b"c" * 512)
    session.step(lambda disk: blocklib.repair(disk, "leaks"))


def damaged(folder: Path) -> None:
    """Too high and too low counts, and flags that do not fit."""
    image(content=96 * KiB, cluster_size=4096)(folder)
    editor = ImagePath(folder / "top")
    block, l2 = editor.refcount_block(), editor.l2()
    editor.set(block + 2 * 12, 3, 2)
    editor.set(block + 2 * 14, 0, 2)
    editor.set(block + 2 * 60, 1, 2)
    editor.flip(l2 + 8 * 9, COPIED)


def convert_into(size: int = SIZE, length: int = 100 * KiB, **keywords: Any) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        content = noise(size, length).ljust(size, b"\0")

        def effect(model: bytearray) -> None:
            model[:] = content

        with session.open_other("source") as source:
            session.step(lambda disk: blocklib.convert(source, disk, **keywords), effect)

    return work


def convert_to_new(session: Session) -> None:
    """What is made goes again if the verb fails."""
    session.step(lambda disk: blocklib.convert(disk, session.folder / "new", format="qcow2"), done_already=())
    assert blocklib.check(session.folder / "new").clean


def mirror(session: Session) -> None:
    def request(disk: blocklib.Disk) -> None:
        with session.open_other("copy", "r+") as copy, blocklib.jobs.mirror(disk, copy) as job:
            job.wait(until="ready")
            job.cancel()

    session.write(10 * KiB, b"a" * 5000)
    session.step(request)
    session.write(3 * KiB, b"c" * 512)


SMALL: Final[dict[str, Any]] = {"cluster_size": 4096}
WORKLOADS: Final = (
    Workload("allocating writes", image(**SMALL), alone, allocate),
    Workload("allocating writes, version 2", image(compat="0.10", **SMALL), alone, allocate),
    Workload("batches", image(content=40 * KiB, **SMALL), alone, in_batches),
    Workload("raw", image(), raw, allocate, images=()),
    Workload("over a backing file", overlay(**SMALL), over_base, allocate, ("top", "base"), images=("top", "base")),
    Workload("zeroes and discards", image(content=SIZE, **SMALL), alone, give_up),
    Workload("zeroes over a backing file", overlay(**SMALL), over_base, give_up, ("top", "base"), images=("top", "base")),
    Workload("snapshots", image(content=30 * KiB, **SMALL), alone, snapshots),
    Workload("snapshots, version 2", image(content=30 * KiB, compat="0.10", **SMALL), alone, snapshots),
    Workload("bitmaps", image(content=30 * KiB, **SMALL), alone, bitmaps),
    Workload("resize", image(content=30 * KiB, **SMALL), alone, resize),
    Workload(
        "refcount table growth",
        image(size=3 * MiB, content=1900 * KiB, cluster_size=512, refcount_bits=64),
        alone,
        grow_tables,
    ),
    Workload("L1 growth", image(size=900 * KiB, cluster_size=512), alone, grow_l1),
    Workload("compressed", image(**SMALL), alone, compress),
    Workload("subclusters", image(cluster_size=16 * KiB, extended_l2=True), alone, give_up),
    Workload(
        "subclusters over a backing file",
        overlay(cluster_size=16 * KiB, extended_l2=True),
        over_base,
        allocate,
        ("top", "base"),
        images=("top", "base"),
    ),
    Workload("lazy refcounts", image(lazy_refcounts=True, **SMALL), alone, allocate),
    Workload("lazy refcounts, snapshots", image(lazy_refcounts=True, **SMALL), alone, snapshots),
    Workload("amend refcount_bits", image(content=30 * KiB, **SMALL), alone, amend(refcount_bits=64)),
    Workload("amend down", image(content=30 * KiB, **SMALL), alone, amend(compat="0.10")),
    Workload("amend up", image(content=30 * KiB, compat="0.10", **SMALL), alone, amend(compat="1.1")),
    Workload("amend size", image(content=30 * KiB, **SMALL), alone, amend(lazy_refcounts=True)),
    Workload("commit", overlay(**SMALL), over_base, commit, ("top", "base"), images=("top", "base")),
    Workload("rebase", overlay(**SMALL), over_base, rebase, ("top", "base"), images=("top", "base")),
    Workload("convert", together(image(**SMALL), image("source", content=100 * KiB)), alone, convert_into(), ("top", "source")),
    Workload(
        "convert, compressed",
        together(image(**SMALL), image("source", content=100 * KiB)),
        alone,
        convert_into(compress="zlib"),
        ("top", "source"),
    ),
    Workload("repair", damaged, alone, repair, repairs=True),
    Workload("convert to new", image(content=100 * KiB), alone, convert_to_new),
    Workload(
        "mirror",
        together(image(content=100 * KiB, **SMALL), image("copy", **SMALL)),
        alone,
        mirror,
        ("top", "copy"),
        images=("top", "copy"),
    ),
    Workload("LUKS", image(**SMALL, **LUKS), encrypted, allocate),
    Workload("data file", image(data_file="data", **SMALL), with_data_file, give_up, ("top", "data")),
)
"""Small ones: each request of theirs fails."""
_LARGE: Final = 24 * MiB
LARGE: Final = (
    Workload(
        "convert, large",
        together(image(size=_LARGE), image("source", _LARGE, _LARGE - 5 * KiB)),
        alone,
        convert_into(_LARGE, _LARGE - 5 * KiB),
        ("top", "source"),
    ),
    Workload(
        "mirror, large",
        together(image(size=_LARGE, content=_LARGE - 5 * KiB), image("copy", _LARGE)),
        alone,
        mirror,
        ("top", "copy"),
        images=("top", "copy"),
    ),
)
"""What several threads do at once."""
