"""Compressed images against QEMU: as small, read as the same by both, and told of in the same words."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, MiB
from blocklib.cli.main import main
from tests.interop.matrix import without_compression
from tests.programs import Program

RAW: dict[str, Any] = {"format": "raw"}
IMAGES = (
    "cluster_size=64k",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=512,compression_type=zstd",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=2M",
    "cluster_size=64k,refcount_bits=1",
    "cluster_size=16k,compat=0.10",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=128k,extended_l2=on,compression_type=zstd",
    "cluster_size=64k,lazy_refcounts=on",
)


def program_text(length: int) -> bytes:
    """Python's own sources, one after the other."""
    out = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        out += path.read_bytes()
    return bytes(out * (length // len(out) + 1))[:length]


def some_disk(size: int) -> bytes:
    """Programs, text, noise and zeroes, in stretches that fit no cluster."""
    choose = random.Random(size)
    text, program = program_text(2 * MiB), Path(blocklib.__file__).parent / "__init__.py"
    machine = Path(os.path.realpath("/proc/self/exe")).read_bytes()[: 4 * MiB] or program.read_bytes()
    out = bytearray()
    while len(out) < size:
        n = choose.randrange(1000, 400 * KiB)
        kind = choose.randrange(5)
        source = text if kind < 2 else machine
        start = choose.randrange(max(1, len(source) - n))
        out += choose.randbytes(n) if kind == 4 else bytes(n) if kind == 3 else source[start : start + n]
    return bytes(out[:size])


@pytest.fixture(scope="module")
def content() -> bytes:
    return some_disk(6 * MiB - 3 * 512)


@pytest.fixture
def source(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "source.raw"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("options", IMAGES)
def test_convert_c_makes_an_image_that_qemu_reads_checks_and_describes_as_we_do(
    options: str, source: Path, tmp_path: Path, qemu_img: Program, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, str(source)]
    assert main([*arguments, str(ours)]) == 0
    qemu_img(*arguments, theirs)
    assert capsys.readouterr() == ("", "")
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", source, ours)
    found = qemu_img.json("check", "-f", "qcow2", ours)
    expected = qemu_img.json("check", "-f", "qcow2", theirs)
    for name in ("allocated-clusters", "compressed-clusters", "total-clusters"):
        assert found.get(name) == expected.get(name)
    report = blocklib.check(ours, format="qcow2")
    assert report.clean
    assert report.compressed_clusters == found["compressed-clusters"]
    assert report.fragmented_clusters == found.get("fragmented-clusters", 0)
    assert report.image_end_offset == found["image-end-offset"]
    mapped = without_compression(qemu_img.json("map", "-f", "qcow2", ours))
    with blocklib.open(ours, format="qcow2") as disk:
        assert [(e["start"], e["length"], e["data"], e["zero"]) for e in mapped] == [
            (e.offset, e.length, e.data, e.zero) for e in disk.extents()
        ]
    with blocklib.open(theirs, format="qcow2") as disk:
        assert disk.read(0, disk.size) == content


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k", "2M"])
@pytest.mark.parametrize("kind", ["text", "mixture"])
def test_the_image_is_within_six_percent_of_what_qemu_makes(
    kind: str, cluster_size: str, tmp_path: Path, qemu_img: Program
) -> None:
    source, ours, theirs = tmp_path / "source.raw", tmp_path / "ours", tmp_path / "theirs"
    source.write_bytes(program_text(6 * MiB) if kind == "text" else some_disk(8 * MiB))
    options = {"cluster_size": cluster_size}
    with blocklib.open(source, format="raw") as disk:
        blocklib.convert(disk, ours, format="qcow2", compress="zlib", options=options)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", source, theirs)
    ends = [qemu_img.json("check", "-f", "qcow2", path)["image-end-offset"] for path in (ours, theirs)]
    assert ends[0] <= 1.06 * ends[1]


def test_qemu_reads_what_write_c_writes_and_goes_on_from_there(
    tmp_path: Path, qemu_img: Program, qemu_io: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    assert main(["io", "-f", "qcow2", "-c", "write -c -P 1 0 192k", "-c", "discard 64k 64k", str(path)]) == 0
    qemu_io("-f", "qcow2", "-c", "write -c -P 2 512k 128k", "-c", "write -P 3 100k 4k", path)
    assert main(["io", "-f", "qcow2", "-c", "write -c -P 4 256k 64k", "-c", "write -P 5 513k 1k", str(path)]) == 0
    capsys.readouterr()
    qemu_img("check", "-q", "-f", "qcow2", path)
    checks = ["-P 1 0 64k", "-P 3 100k 4k", "-P 1 128k 64k", "-P 4 256k 64k", "-P 2 512k 1k", "-P 5 513k 1k", "-P 2 514k 126k"]
    qemu_io("-f", "qcow2", *(word for check in checks for word in ("-c", f"read {check}")), path)


@pytest.mark.parametrize("existing", ["preallocation=metadata", "written"])
def test_a_target_that_has_the_clusters_is_refused_by_both(
    existing: str, source: Path, tmp_path: Path, qemu_img: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target.qcow2"
    if existing == "written":
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, target)
    else:
        qemu_img("create", "-q", "-f", "qcow2", "-o", existing, target, "6M")
    before = target.read_bytes()
    arguments = ["convert", "-c", "-n", "-f", "raw", "-O", "qcow2", str(source), str(target)]
    assert main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert target.read_bytes() == before
    assert qemu_img.run(*arguments).returncode == 1


def test_snapshots_and_compressed_writes_share_host_clusters_and_count_them(
    source: Path, tmp_path: Path, qemu_img: Program, content: bytes
) -> None:
    path = tmp_path / "image.qcow2"
    blocklib.create(path, 8 * MiB, format="qcow2", options={"cluster_size": 4 * KiB})
    pieces = [content[i * MiB : (i + 1) * MiB] for i in range(4)]
    with blocklib.open(path, "r+", format="qcow2", discard="unmap") as disk:
        for number, piece in enumerate(pieces):
            disk.write_compressed(number * MiB, piece)
            disk.snapshots.create(f"s{number}")
            disk.discard(number * MiB, 300 * KiB)
        disk.snapshots["s1"].delete()
        disk.write_compressed(0, pieces[3][: 300 * KiB])
        disk.snapshots["s2"].apply()
        disk.write_compressed(6 * MiB, pieces[0])
        assert disk.read(2 * MiB, MiB) == pieces[2]
        assert disk.read(6 * MiB, MiB) == pieces[0]
    qemu_img("check", "-q", "-f", "qcow2", path)
    assert blocklib.check(path, format="qcow2").clean
