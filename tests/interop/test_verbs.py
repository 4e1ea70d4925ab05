"""The long verbs against qemu-img: what one program makes the other reads as the same, and their answers are equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib.sizes import KiB, MiB
from tests.programs import Program

CLUSTERS = ("512", "4k", "64k", "2M")
REFERENCES: Any = {"format": "qcow2", "references": "allow"}


def write_at_random(qemu_io: Program, path: Path, size: int, *, seed: int, count: int = 20) -> None:
    """Data, zero clusters and explicit zeroes, at odd places."""
    rng = random.Random(seed)
    commands: list[str] = []
    for _ in range(count):
        length = min(rng.choice([512, 4096, 65536, 300 * KiB, 700 * KiB]), size)
        offset = rng.randrange(0, size - length + 1) // 512 * 512
        kind = rng.choice([f"-P {rng.randrange(1, 256)}", f"-P {rng.randrange(1, 256)}", "-P 0", "-z", "-z -u"])
        commands += ["-c", f"write {kind} {offset} {length}"]
    qemu_io("-f", "qcow2", *commands, path)


class Chain:
    """Images base <- mid <- top of the given sizes, made by QEMU, in a folder of their own."""

    def __init__(
        self,
        qemu_img: Program,
        qemu_io: Program,
        folder: Path,
        *,
        sizes: Sequence[int] = (4 * MiB, 4 * MiB, 4 * MiB),
        options: str = "cluster_size=64k",
        seed: int = 1,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.qemu_img = qemu_img
        self.base, self.mid, self.top = paths = [folder / f"{name}.qcow2" for name in ("base", "mid", "top")]
        below: Path | None = None
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            backing = [] if below is None else ["-b", below.name, "-F", "qcow2"]
            qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, size)
            write_at_random(qemu_io, path, size, seed=seed * 10 + number)
            below = path

    def content(self, path: Path, *, format: str = "qcow2") -> bytes:
        """What QEMU reads from an image."""
        flat = self.folder / "flat.raw"
        self.qemu_img("convert", "-f", format, "-O", "raw", path, flat)
        data = flat.read_bytes()
        flat.unlink()
        return data

    def check(self, *paths: Path) -> None:
        for path in paths or (self.base, self.mid, self.top):
            self.qemu_img("check", "-q", "-f", "qcow2", path)


MakeChain = Callable[..., Chain]


@pytest.fixture
def make_chain(qemu_img: Program, qemu_io: Program, tmp_path: Path) -> MakeChain:
    def make(name: str = "chain", **more: Any) -> Chain:
        return Chain(qemu_img, qemu_io, tmp_path / name, **more)

    return make


SIZES = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((4 * MiB, 4 * MiB, 4 * MiB), id="equal"),
        pytest.param((2 * MiB, 4 * MiB, 6 * MiB), id="growing"),
        pytest.param((6 * MiB, 4 * MiB, 3 * MiB), id="shrinking"),
        pytest.param((6 * MiB, 2 * MiB, 6 * MiB), id="short-in-between"),
        pytest.param((3 * MiB + 512, 4 * MiB + 1024, 2 * MiB + 1536), id="odd"),
    ],
)


# -- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_convert_reads_what_qemu_wrote_and_qemu_reads_what_it_writes(
    make_chain: MakeChain, qemu_img: Program, tmp_path: Path, cluster_size: str, compat: str
) -> None:
    chain = make_chain(options=f"cluster_size={cluster_size},compat={compat}")
    expected = chain.content(chain.top)
    with blocklib.open(chain.top, **REFERENCES) as disk:
        blocklib.convert(disk, tmp_path / "out.raw", format="raw")
        blocklib.convert(disk, tmp_path / "out.qcow2", format="qcow2", options={"cluster_size": cluster_size, "compat": compat})
    assert (tmp_path / "out.raw").read_bytes() == expected
    assert chain.content(tmp_path / "out.qcow2") == expected
    chain.check(tmp_path / "out.qcow2")


@pytest.mark.parametrize("cluster_size", ["4k", "64k", "2M"])
def test_convert_lays_a_new_image_out_as_qemu_does(
    make_chain: MakeChain, qemu_img: Program, tmp_path: Path, cluster_size: str
) -> None:
    chain = make_chain()
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    with blocklib.open(chain.top, **REFERENCES) as disk:
        blocklib.convert(disk, ours, format="qcow2", options={"cluster_size": cluster_size})
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", chain.top, theirs)
    assert qemu_img.json("map", "-f", "qcow2", ours) == qemu_img.json("map", "-f", "qcow2", theirs)


def test_convert_makes_raw_images_as_sparse_as_qemu_does(make_chain: MakeChain, qemu_img: Program, tmp_path: Path) -> None:
    def data(path: Path) -> list[tuple[int, int]]:
        # QEMU allocates the first block of every new raw file, for its own reasons.
        found = [(entry["start"], entry["length"]) for entry in qemu_img.json("map", "-f", "raw", path) if entry["data"]]
        return [part for part in found if part != (0, 4096)]

    chain = make_chain()
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    with blocklib.open(chain.top, **REFERENCES) as disk:
        blocklib.convert(disk, ours, format="raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", chain.top, theirs)
    assert data(ours) == data(theirs)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_convert_into_preallocated_images(make_chain: MakeChain, tmp_path: Path, preallocation: str) -> None:
    chain = make_chain()
    out = tmp_path / "out.qcow2"
    with blocklib.open(chain.top, **REFERENCES) as disk:
        blocklib.convert(disk, out, format="qcow2", options={"preallocation": preallocation})
    assert chain.content(out) == chain.content(chain.top)
    chain.check(out)


@SIZES
@pytest.mark.parametrize("backing", ["base", "mid"])
def test_convert_with_a_backing_file_keeps_what_differs(make_chain: MakeChain, sizes: Sequence[int], backing: str) -> None:
    chain = make_chain(sizes=sizes)
    expected = chain.content(chain.top)
    out = chain.folder / "out.qcow2"
    with blocklib.open(chain.top, **REFERENCES) as disk:
        blocklib.convert(disk, out, format="qcow2", backing=f"{backing}.qcow2", backing_format="qcow2", references="allow")
    assert chain.content(out) == expected
    chain.check(out)


def test_convert_with_the_same_backing_file_gives_what_qemu_gives(make_chain: MakeChain, qemu_img: Program) -> None:
    chain = make_chain()
    ours, theirs = chain.folder / "ours.qcow2", chain.folder / "theirs.qcow2"
    with blocklib.open(chain.top, **REFERENCES) as disk:
        blocklib.convert(disk, ours, format="qcow2", backing="mid.qcow2", backing_format="qcow2", references="allow")
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", chain.top, theirs)
    assert qemu_img.json("map", "-f", "qcow2", ours) == qemu_img.json("map", "-f", "qcow2", theirs)


def test_convert_with_a_copy_of_the_backing_file_stores_no_more(make_chain: MakeChain, tmp_path: Path) -> None:
    chain = make_chain()
    copy = chain.folder / "copy.raw"
    copy.write_bytes(chain.content(chain.mid))
    outs = [chain.folder / "same.qcow2", chain.folder / "copied.qcow2"]
    with blocklib.open(chain.top, **REFERENCES) as disk:
        for out, backing, format in zip(outs, ("mid.qcow2", "copy.raw"), ("qcow2", "raw"), strict=True):
            blocklib.convert(disk, out, format="qcow2", backing=backing, backing_format=format, references="allow")
    assert chain.content(outs[1]) == chain.content(chain.top)
    own = []
    for out in outs:
        with blocklib.open(out, **REFERENCES) as disk:
            own.append([extent[:2] for extent in disk.extents() if extent.present and extent.depth == 0])
    assert own[0] == own[1]


def test_convert_of_several_images_is_what_qemu_makes_of_them(qemu_img: Program, tmp_path: Path) -> None:
    rng = random.Random(5)
    parts = []
    for number, size in enumerate((70_000, 512, 1_000_001)):
        parts.append(tmp_path / f"part{number}.raw")
        parts[-1].write_bytes(rng.randbytes(size))
    disks = [blocklib.open(part, format="raw") for part in parts]
    blocklib.convert(disks, tmp_path / "ours.raw", format="raw")
    for disk in disks:
        disk.close()
    qemu_img("convert", "-f", "raw", "-O", "raw", *parts, tmp_path / "theirs.raw")
    assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()


def test_convert_into_an_existing_image_replaces_its_content(
    make_chain: MakeChain, qemu_io: Program, qemu_img: Program
) -> None:
    chain = make_chain()
    out = chain.folder / "out.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", out, 8 * MiB)
    qemu_io("-f", "qcow2", "-c", "write -P 77 0 8M", out)
    with blocklib.open(chain.top, **REFERENCES) as disk, blocklib.open(out, "r+", discard="unmap") as target:
        blocklib.convert(disk, target)
    assert chain.content(out) == chain.content(chain.top) + b"\x4d" * 4 * MiB
    chain.check(out)


# -- compare ----------------------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("pair", [("top", "top"), ("top", "mid"), ("base", "top"), ("top", "flat"), ("flat", "base")])
def test_compare_finds_what_qemu_finds(
    make_chain: MakeChain, qemu_img: Program, tmp_path: Path, sizes: Sequence[int], pair: tuple[str, str]
) -> None:
    chain = make_chain(sizes=sizes)
    flat = tmp_path / "flat.qcow2"
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", chain.top, flat)
    first, second = (flat if name == "flat" else chain.folder / f"{name}.qcow2" for name in pair)
    done = qemu_img.run("compare", "-f", "qcow2", "-F", "qcow2", first, second)
    with blocklib.open(first, **REFERENCES) as a, blocklib.open(second, **REFERENCES) as b:
        result = blocklib.compare(a, b)
    assert result.identical == (done.returncode == 0), done.stdout
    if result.offset is not None:
        # QEMU tells the sector, we the byte.
        assert f"Content mismatch at offset {result.offset // 512 * 512}!" in done.stdout
    warned = result.size_mismatch and (result.identical or result.beyond_end)
    assert warned == ("Image size mismatch" in done.stdout)


def test_strict_compare_tells_stored_zeroes_from_absent_ones(qemu_img: Program, qemu_io: Program, tmp_path: Path) -> None:
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path, command in ((a, "write -P 0 1M 64k"), (b, "write -P 0 3M 64k")):
        qemu_img("create", "-q", "-f", "qcow2", path, 4 * MiB)
        qemu_io("-f", "qcow2", "-c", command, path)
    assert qemu_img.run("compare", "-s", a, b).returncode == 1
    assert blocklib.compare(a, b).identical
    result = blocklib.compare(a, b, strict=True)
    assert (result.identical, result.reason, result.offset) == (False, "status", 1 * MiB)
    assert blocklib.compare(a, a, strict=True).identical


# -- measure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "compat=0.10",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "backing_file=mid.qcow2,backing_fmt=qcow2",
    ],
)
def test_measure_gives_the_numbers_of_qemu(
    make_chain: MakeChain, qemu_img: Program, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    chain = make_chain()
    monkeypatch.chdir(chain.folder)
    given = dict(item.split("=") for item in options.split(","))
    for format, path in (("qcow2", chain.top), ("qcow2", chain.base)):
        theirs = qemu_img.json("measure", "-f", format, "-O", "qcow2", "-o", options, path)
        with blocklib.open(path, **REFERENCES) as disk:
            ours = blocklib.measure(disk, format="qcow2", options=given)
        assert (ours.required, ours.fully_allocated) == (theirs["required"], theirs["fully-allocated"])
        assert ours.bitmaps == theirs.get("bitmaps")


def test_measure_of_raw_sources_and_targets_gives_the_numbers_of_qemu(qemu_img: Program, tmp_path: Path) -> None:
    path = tmp_path / "source.raw"
    with path.open("wb") as file:
        file.truncate(9 * MiB + 700)
        file.seek(3 * MiB - 100)
        file.write(b"x" * 200_000)
    for format in ("raw", "qcow2"):
        theirs = qemu_img.json("measure", "-f", "raw", "-O", format, path)
        with blocklib.open(path, format="raw") as disk:
            ours = blocklib.measure(disk, format=format)
        assert (ours.required, ours.fully_allocated, ours.bitmaps) == (
            theirs["required"],
            theirs["fully-allocated"],
            theirs.get("bitmaps"),
        )


# -- commit -----------------------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("cluster_size", ["512", "64k"])
def test_commit_brings_the_backing_file_to_what_the_top_was(
    make_chain: MakeChain, qemu_img: Program, sizes: Sequence[int], cluster_size: str
) -> None:
    chain = make_chain(sizes=sizes, options=f"cluster_size={cluster_size}")
    before = chain.content(chain.top)
    beyond = chain.content(chain.mid)[len(before) :]
    result = blocklib.commit(chain.top, **REFERENCES)
    assert result.base == str(chain.mid)
    assert chain.content(chain.mid) == before + beyond
    assert chain.content(chain.top) == before
    own = [entry for entry in qemu_img.json("map", "-f", "qcow2", chain.top) if entry["depth"] == 0 and entry["present"]]
    assert own == []
    chain.check()


@SIZES
def test_commit_to_a_base_further_down_leaves_the_top_as_it_is(
    make_chain: MakeChain, qemu_img: Program, sizes: Sequence[int]
) -> None:
    chain = make_chain(sizes=sizes)
    before = chain.content(chain.top)
    beyond = chain.content(chain.base)[len(before) :]
    top = chain.top.read_bytes()
    result = blocklib.commit(chain.top, base=chain.base, **REFERENCES)
    assert result.base == str(chain.base)
    assert chain.content(chain.base) == before + beyond
    assert chain.content(chain.top) == before
    assert chain.top.read_bytes() == top
    chain.check()


def test_commit_without_emptying_leaves_the_top_as_it_is(make_chain: MakeChain) -> None:
    chain = make_chain()
    before, top = chain.content(chain.top), chain.top.read_bytes()
    blocklib.commit(chain.top, empty=False, **REFERENCES)
    assert chain.top.read_bytes() == top
    assert chain.content(chain.mid) == before


def test_commit_does_what_qemu_does(make_chain: MakeChain, qemu_img: Program) -> None:
    ours, theirs = make_chain("ours"), make_chain("theirs")
    blocklib.commit(ours.top, **REFERENCES)
    qemu_img("commit", "-q", "-f", "qcow2", theirs.top)
    for name in ("top", "mid"):
        maps = [
            [{key: entry[key] for key in ("start", "length", "depth", "present", "zero", "data")} for entry in found]
            for found in (qemu_img.json("map", "-f", "qcow2", chain.folder / f"{name}.qcow2") for chain in (ours, theirs))
        ]
        assert maps[0] == maps[1]


def test_commit_is_refused_while_qemu_uses_the_backing_file(make_chain: MakeChain, qemu_io: Program) -> None:
    chain = make_chain()
    with blocklib.open(chain.mid, "r+", format="qcow2", references="allow"):
        with pytest.raises(blocklib.BlocklibError):
            blocklib.commit(chain.top, **REFERENCES)


# -- rebase -----------------------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize(
    ("new", "cluster_size"),
    [("base", "64k"), ("base", "512"), ("other", "64k"), ("other", "2M"), ("raw", "4k"), (None, "64k")],
)
def test_rebase_changes_the_backing_file_and_no_byte(
    make_chain: MakeChain, qemu_img: Program, sizes: Sequence[int], cluster_size: str, new: str | None
) -> None:
    chain = make_chain(sizes=sizes, options=f"cluster_size={cluster_size}")
    before = chain.content(chain.top)
    name, format = {"base": "base.qcow2", "other": "other.qcow2", "raw": "other.raw", None: None}[new], "qcow2"
    if new == "other":
        # The same content from another file, but for one place, and longer.
        qemu_img("convert", "-f", "qcow2", "-O", "qcow2", chain.mid, chain.folder / "other.qcow2")
        qemu_img("resize", "-q", "-f", "qcow2", chain.folder / "other.qcow2", 7 * MiB)
    elif new == "raw":
        format = "raw"
        (chain.folder / "other.raw").write_bytes(random.Random(9).randbytes(5 * MiB))
    result = blocklib.rebase(chain.top, name, backing_format=format if name else None, **REFERENCES)
    assert result.backing == name
    info = qemu_img.json("info", "-f", "qcow2", chain.top)
    assert info.get("backing-filename") == name
    assert info.get("backing-filename-format") == (format if name else None)
    assert chain.content(chain.top) == before
    chain.check(chain.top)


def test_rebase_onto_equal_content_copies_nothing(make_chain: MakeChain, qemu_img: Program) -> None:
    chain = make_chain()
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", chain.mid, chain.folder / "other.qcow2")
    assert blocklib.rebase(chain.top, "other.qcow2", backing_format="qcow2", **REFERENCES).bytes_copied == 0
    assert blocklib.rebase(chain.top, "other.qcow2", backing_format="qcow2", **REFERENCES).bytes_copied == 0


@pytest.mark.parametrize("new", ["base.qcow2", "other.qcow2", None])
def test_rebase_stores_no_more_than_qemu_does(make_chain: MakeChain, qemu_img: Program, new: str | None) -> None:
    ours, theirs = make_chain("ours"), make_chain("theirs")
    for chain in (ours, theirs):
        qemu_img("convert", "-f", "qcow2", "-O", "qcow2", chain.base, chain.folder / "other.qcow2")
    blocklib.rebase(ours.top, new, backing_format="qcow2" if new else None, **REFERENCES)
    qemu_img("rebase", "-f", "qcow2", "-b", new or "", *(["-F", "qcow2"] if new else []), theirs.top)
    stored: list[set[int]] = []
    for chain in (ours, theirs):
        with blocklib.open(chain.top, **REFERENCES) as disk:
            own = [extent for extent in disk.extents() if extent.present and extent.depth == 0 and not extent.zero]
        stored.append({at for extent in own for at in range(extent.offset, extent.offset + extent.length, 64 * KiB)})
    assert stored[0] <= stored[1]


def test_unsafe_rebase_writes_the_name_and_opens_nothing(make_chain: MakeChain, qemu_img: Program) -> None:
    chain = make_chain()
    chain.mid.rename(chain.folder / "moved.qcow2")
    blocklib.rebase(chain.top, "elsewhere/gone.qcow2", backing_format="raw", unsafe=True, format="qcow2")
    info = qemu_img.json("info", "-f", "qcow2", "-U", chain.top)
    assert (info["backing-filename"], info["backing-filename-format"]) == ("elsewhere/gone.qcow2", "raw")
    blocklib.rebase(chain.top, "moved.qcow2", backing_format="qcow2", unsafe=True, format="qcow2")
    chain.check(chain.top)


def test_rebase_onto_itself_is_refused(make_chain: MakeChain) -> None:
    chain = make_chain()
    before = chain.top.read_bytes()
    with pytest.raises(blocklib.BlocklibError):
        blocklib.rebase(chain.top, "top.qcow2", backing_format="qcow2", **REFERENCES)
    assert chain.top.read_bytes() == before


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_counts_what_qemu_counts_and_repair_makes_it_clean(make_chain: MakeChain, qemu_img: Program) -> None:
    chain = make_chain()
    with chain.top.open("r+b") as file:
        file.seek(2 * 64 * KiB)  # QEMU puts the first refcount block there, and the header's count first in it
        assert file.read(2) == b"\0\1"
        file.seek(2 * 64 * KiB)
        file.write(b"\0\2")
    done = qemu_img.json("check", "-f", "qcow2", chain.top, codes=(0, 2, 3))
    report = blocklib.check(chain.top)
    assert (report.leaks, report.corruptions) == (done.get("leaks", 0), done.get("corruptions", 0)) == (1, 0)
    plan = blocklib.repair(chain.top, "leaks", dry_run=True)
    assert len(plan.steps) >= 1
    after = blocklib.repair(chain.top, "leaks", expect=plan).after
    assert after is not None
    assert after.clean
    chain.check(chain.top)


def test_check_of_an_overlay_opens_no_backing_file(make_chain: MakeChain) -> None:
    chain = make_chain()
    chain.mid.unlink()
    assert blocklib.check(chain.top).clean
