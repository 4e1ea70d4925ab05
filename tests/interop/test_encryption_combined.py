"""Encryption together with everything else that a qcow2 image can have; threads, random requests, and what is not said."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, Secret, jobs
from tests.cli.running import CommandLine
from tests.encrypted import AES, CODE, LUKS, OBJECT, OPEN, image_opts, open_encrypted
from tests.programs import Program

SIZE = 768 * KiB
METHODS = {"luks": LUKS, "aes": AES}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    return METHODS[request.param]


def _new(path: str, **options: Any) -> None:
    blocklib.create(path, SIZE, format="qcow2", options=options)


def _check(qemu_img: Program, path: str, content: bytes | bytearray) -> None:
    report = qemu_img.json("check", *OBJECT, "--image-opts", image_opts(path))
    assert not any(report.get(name) for name in ("leaks", "corruptions", "check-errors")), report
    assert CommandLine().run("check", path).code == 0
    Path("plain.raw").write_bytes(content)
    qemu_img("compare", "-q", *OBJECT, "--image-opts", image_opts(path), "driver=raw,file.filename=plain.raw")


def _requests(disk: blocklib.Disk, content: bytearray, rnd: random.Random, n: int = 25) -> None:
    """Random requests, aligned to nothing, to a disk and to what it should read as."""
    size = len(content)
    for _ in range(n):
        length = min(size, rnd.choice((1, 5, 511, 512, 700, 4096, 20_000, 150_000)))
        offset = rnd.randrange(size - length + 1)
        if rnd.random() < 0.3:
            offset, length = offset // 512 * 512, -(-length // 512) * 512
            length = min(length, size - offset)
        action = rnd.randrange(6)
        if action < 3:
            data = rnd.randbytes(length)
            disk.write(offset, data)
            content[offset : offset + length] = data
        elif action == 3:
            disk.write_zeroes(offset, length, unmap=rnd.random() < 0.5)
            content[offset : offset + length] = bytes(length)
        elif action == 4:
            disk.write(offset, bytes(length))
            content[offset : offset + length] = bytes(length)
        else:
            assert disk.read(offset, length) == content[offset : offset + length]


@pytest.mark.parametrize(
    "shape",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096, "compat": "0.10"},
        {"extended_l2": True, "cluster_size": 16 * KiB},
        {"extended_l2": True, "cluster_size": 64 * KiB, "refcount_bits": 64},
        {"data_file": "data.img"},
        {"lazy_refcounts": True, "cluster_size": 2048},
        {"preallocation": "metadata"},
        {"preallocation": "falloc", "extended_l2": True},
    ],
    ids=lambda shape: ",".join(f"{name}={value}" for name, value in shape.items()),
)
def test_random_requests_to_every_shape_of_image(
    qemu_img: Program, qemu_io: Program, method: dict[str, Any], shape: dict[str, Any]
) -> None:
    rnd = random.Random(f"{shape}{method['encrypt.format']}")
    _new("disk.qcow2", **method, **shape)
    content = bytearray(SIZE)
    for turn in range(3):
        keywords: dict[str, Any] = {"discard": "unmap", "detect_zeroes": ("off", "on", "unmap")[turn], "references": "allow"}
        with open_encrypted("disk.qcow2", "r+", **keywords) as disk:
            assert disk.read(0, SIZE) == content
            _requests(disk, content, rnd)
            assert disk.read(0, SIZE) == content
            rows = disk.map()
            assert [(row["offset"], row["data"], row["zero"]) for row in rows] == [
                (extent.offset, extent.data, extent.zero) for extent in disk.extents()
            ]
            assert set(rows["host_offset"].tolist()) == {-1}
        offset, length = rnd.randrange(SIZE - 70_000), rnd.randrange(1, 70_000)
        qemu_io(*OBJECT, "--image-opts", "-c", f"write -P 7 {offset} {length}", image_opts("disk.qcow2"))
        content[offset : offset + length] = b"\x07" * length
        _check(qemu_img, "disk.qcow2", content)
        CommandLine()("check", "disk.qcow2")


def test_snapshots_keep_their_content(qemu_img: Program, method: dict[str, Any]) -> None:
    rnd = random.Random(1)
    _new("disk.qcow2", **method, cluster_size=4096)
    content = bytearray(SIZE)
    with open_encrypted("disk.qcow2", "r+") as disk:
        _requests(disk, content, rnd)
        first = bytes(content)
        disk.snapshots.create("first")
        _requests(disk, content, rnd)
        assert disk.read(0, SIZE) == content
    qemu_img("snapshot", *OBJECT, "--image-opts", "-c", "second", image_opts("disk.qcow2"))
    second = bytes(content)
    with open_encrypted("disk.qcow2", "r+") as disk:
        _requests(disk, content, rnd)
    _check(qemu_img, "disk.qcow2", content)
    for name, kept in (("first", first), ("second", second)):
        with open_encrypted("disk.qcow2", options={"snapshot.name": name}) as disk:
            assert disk.read(0, SIZE) == kept
        with open_encrypted("disk.qcow2", "r+") as disk:
            disk.snapshots[name].apply()
            assert disk.read(0, SIZE) == kept
        _check(qemu_img, "disk.qcow2", kept)


def test_bitmaps_see_encrypted_writes(qemu_img: Program) -> None:
    _new("disk.qcow2", **LUKS)
    with open_encrypted("disk.qcow2", "r+") as disk:
        disk.bitmaps.add("b", granularity=64 * KiB, persistent=True)
        disk.write(100, b"x" * 600)
        disk.write(300_000, b"y")
    with open_encrypted("disk.qcow2") as disk:
        assert [tuple(row) for row in disk.bitmaps["b"].dirty_ranges().tolist()] == [(0, 65536), (262144, 65536)]
    content = bytearray(SIZE)
    content[100:700] = b"x" * 600
    content[300_000:300_001] = b"y"
    _check(qemu_img, "disk.qcow2", content)


def test_commit_rebase_resize_and_amend(qemu_img: Program, method: dict[str, Any]) -> None:
    rnd = random.Random(2)
    _new("base.qcow2", **method)
    content = bytearray(SIZE)
    with open_encrypted("base.qcow2", "r+") as disk:
        _requests(disk, content, rnd)
    base: dict[str, Any] = {"driver": "qcow2", "file.filename": "base.qcow2", **OPEN}
    _new("disk.qcow2", **method, cluster_size=4096, backing_file="base.qcow2", backing_fmt="qcow2")
    with open_encrypted("disk.qcow2", "r+", backing=base) as disk:
        _requests(disk, content, rnd)
        jobs.commit(disk, empty=True).wait()
        assert disk.read(0, SIZE) == content
    _check(qemu_img, "base.qcow2", content)
    with open_encrypted("disk.qcow2", "r+", backing=base) as disk:
        _requests(disk, content, rnd)
        jobs.rebase(disk, None).wait()
        disk.truncate(SIZE + 5 * 512)
        content += bytes(5 * 512)
        assert disk.read(0, len(content)) == content
    _check(qemu_img, "disk.qcow2", content)


@pytest.mark.parametrize("snapshot", [False, True])
def test_going_down_to_version_2_keeps_zeroes(qemu_img: Program, snapshot: bool) -> None:
    rnd = random.Random(3)
    _new("base.qcow2")
    with blocklib.open("base.qcow2", "r+") as disk:
        disk.write(0, rnd.randbytes(SIZE))
    _new("disk.qcow2", **LUKS, cluster_size=4096, backing_file="base.qcow2", backing_fmt="qcow2")
    with open_encrypted("disk.qcow2", "r+", references="allow") as disk:
        content = bytearray(disk.read(0, SIZE))
        for offset in range(0, SIZE - 12_000, 40_960):
            disk.write(offset, b"data" * 3000)
            content[offset : offset + 12_000] = b"data" * 3000
            disk.write_zeroes(offset, 8192, unmap=bool(offset % 3))
            content[offset : offset + 8192] = bytes(8192)
        if snapshot:
            disk.snapshots.create("one")
        jobs.amend(disk, {"compat": "0.10"}).wait()
        assert disk.read(0, SIZE) == content
    _check(qemu_img, "disk.qcow2", content)


def test_the_old_method_refuses_to_go_down_with_zero_clusters() -> None:
    _new("disk.qcow2", **AES)
    with open_encrypted("disk.qcow2", "r+") as disk:
        disk.write_zeroes(0, SIZE)
    before = Path("disk.qcow2").read_bytes()
    with open_encrypted("disk.qcow2", "r+") as disk, pytest.raises(blocklib.UnsupportedFeatureError, match="zero clusters"):
        jobs.amend(disk, {"compat": "0.10"}).wait()
    assert Path("disk.qcow2").read_bytes() == before


def test_threads_that_write_parts_of_one_sector_lose_nothing(method: dict[str, Any]) -> None:
    """Each thread has bytes of its own in every sector, which it writes and reads back, beside whole reads."""
    _new("disk.qcow2", **method, cluster_size=4096)
    n_threads, width, rounds = 4, 128, 60
    failures: list[str] = []
    start = threading.Barrier(n_threads)
    with open_encrypted("disk.qcow2", "r+") as disk:

        def work(number: int) -> None:
            rnd = random.Random(number)
            mine: dict[int, bytes] = {}
            start.wait()
            for _ in range(rounds):
                sector = rnd.randrange(24)
                place = sector * 512 + number * width
                data = rnd.randbytes(width)
                disk.write(place, data)
                mine[sector] = data
                whole = disk.read(sector * 512, 512)
                if whole[number * width :][:width] != data:
                    failures.append(f"thread {number}, sector {sector}")
            for sector, data in mine.items():
                if disk.read(sector * 512 + number * width, width) != data:
                    failures.append(f"thread {number}, sector {sector}, in the end")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


# -- what is not said ---------------------------------------------------------------------------------------------------


def _calls() -> list[Callable[[], object]]:
    wrong = {"encrypt.key-secret": Secret("wrong-" + CODE)}
    return [
        lambda: blocklib.open("disk.qcow2"),
        lambda: blocklib.open("disk.qcow2", "r+"),
        lambda: blocklib.open("disk.qcow2", options=wrong),
        lambda: blocklib.open("disk.qcow2", options={"encrypt.key-secret": CODE}),
        lambda: blocklib.open("disk.qcow2", options={"encrypt.key-secret": CODE.encode()}),
        lambda: blocklib.open("disk.qcow2", options={**wrong, "encrypt.format": "aes"}),
        lambda: blocklib.create("new.qcow2", SIZE, format="qcow2", options={**LUKS, "encrypt.key-secret": CODE}),
        lambda: blocklib.create("new.qcow2", SIZE, format="qcow2", options={"encrypt.key-secret": Secret(CODE)}),
        lambda: blocklib.create("new.qcow2", SIZE, format="qcow2", options={**LUKS, "encryption": True}),
        lambda: blocklib.create("new.qcow2", SIZE, format="qcow2", options={**AES, "encrypt.hash-alg": "sha1"}),
        lambda: blocklib.create("new.qcow2", SIZE, format="qcow2", options={**LUKS, "encrypt.cipher-alg": "serpent-256"}),
        lambda: blocklib.create(
            "new.qcow2", SIZE, format="qcow2", options={**LUKS, "compat": "0.10", "preallocation": "metadata"}
        ),
    ]


def test_wrong_and_missing_secrets_are_one_line_that_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    _new("disk.qcow2", **LUKS)
    before = Path("disk.qcow2").read_bytes()
    with caplog.at_level(logging.DEBUG):
        for call in _calls():
            with pytest.raises(blocklib.OptionError) as caught:
                call()
            text = "".join(traceback.format_exception(caught.value))
            assert CODE not in text
            assert "\n" not in str(caught.value)
    assert CODE not in caplog.text
    assert Path("disk.qcow2").read_bytes() == before
    assert not Path("new.qcow2").exists()
    with open_encrypted("disk.qcow2") as disk:
        for shown in (disk, disk.node, disk.info(), disk.chain(), disk.node.options):  # type: ignore[attr-defined]
            assert CODE not in repr(shown)
        assert CODE not in repr(vars(disk.node))


def test_the_command_line_never_prints_a_secret() -> None:
    _new("disk.qcow2", **LUKS)
    before = Path("disk.qcow2").read_bytes()
    command = CommandLine()
    wrong = ("--object", f"secret,id=s,data={CODE}!")
    opts = image_opts("disk.qcow2")
    for words in (
        ("convert", *wrong, "--image-opts", "-O", "raw", opts, "out.raw"),
        ("compare", *wrong, "--image-opts", opts, opts),
        ("map", *wrong, "--image-opts", opts),
        ("map", "disk.qcow2"),
        ("snapshot", *wrong, "--image-opts", "-c", "x", opts),
        ("resize", *wrong, "--image-opts", opts, "2M"),
        ("create", *OBJECT, "-f", "qcow2", "-o", f"encrypt.format=luks,encrypt.key-secret={CODE}", "new.qcow2", "1M"),
        ("create", "--debug", *OBJECT, "-f", "qcow2", "-o", "encrypt.key-secret=s", "new.qcow2", "1M"),
        ("io", "--debug", *wrong, "--image-opts", "-c", "read 0 1", opts),
    ):
        result = command.run(*words)
        assert result.code != 0, words
        named = result.out if words[0] == "create" and f"encrypt.key-secret={CODE}" in " ".join(words) else ""
        assert CODE not in result.err + (result.out if not named else "")
    assert Path("disk.qcow2").read_bytes() == before
    assert not Path("new.qcow2").exists()
    assert not Path("out.raw").exists()


def test_without_the_package_the_extra_is_named() -> None:
    _new("disk.qcow2", **LUKS)
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import blocklib\n"
        "assert blocklib.info('disk.qcow2').encrypted\n"
        f"try: blocklib.open('disk.qcow2', options={{'encrypt.key-secret': blocklib.Secret('{CODE}')}})\n"
        "except blocklib.MissingExtraError as exc: print(exc.extra, exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("encryption ")
    assert "pip install 'pyblocklib[encryption]'" in done.stdout


@pytest.mark.parametrize(
    ("offset", "length"), [(1 << 50, None), (None, 0), (None, 600), (1 << 20, None), (65536, None)], ids=str
)
def test_a_pointer_to_no_encryption_header_is_refused_and_nothing_is_written(offset: int | None, length: int | None) -> None:
    _new("disk.qcow2", **LUKS)
    image = bytearray(Path("disk.qcow2").read_bytes())
    place = image.index(bytes.fromhex("0537be7700000010")) + 8
    for at, value in ((place, offset), (place + 8, length)):
        if value is not None:
            image[at : at + 8] = value.to_bytes(8, "big")
    Path("disk.qcow2").write_bytes(image)
    for call in (
        lambda: open_encrypted("disk.qcow2"),
        lambda: open_encrypted("disk.qcow2", "r+"),
        lambda: blocklib.info("disk.qcow2"),
    ):
        with pytest.raises(blocklib.ImageCorruptError, match="LUKS header"):
            call()
    assert Path("disk.qcow2").read_bytes() == image


def test_an_image_that_was_not_closed_is_repaired_with_its_secret(qemu_img: Program) -> None:
    _new("disk.qcow2", **LUKS)
    with open_encrypted("disk.qcow2", "r+") as disk:
        disk.write(100, b"before")
    image = bytearray(Path("disk.qcow2").read_bytes())
    image[79] |= 1  # incompatible_features: dirty
    Path("disk.qcow2").write_bytes(image)
    with pytest.raises(blocklib.OptionError):
        blocklib.open("disk.qcow2", "r+")
    assert Path("disk.qcow2").read_bytes() == image
    with open_encrypted("disk.qcow2", "r+") as disk:
        disk.write(106, b" and after")
        content = bytearray(SIZE)
        content[100:116] = b"before and after"
        assert disk.read(0, SIZE) == content
    _check(qemu_img, "disk.qcow2", content)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocated_subclusters_of_an_encrypted_overlay_show_what_lies_below(
    preallocation: str, tmp_path: Path, qemu_img: Program
) -> None:
    base, path, copy = tmp_path / "base.raw", tmp_path / "disk.qcow2", tmp_path / "copy.raw"
    content = os.urandom(100 * KiB)
    base.write_bytes(content)
    options = {"cluster_size": 16 * KiB, "extended_l2": True, "preallocation": preallocation, **LUKS}
    blocklib.create(path, format="qcow2", backing=base, backing_format="raw", options=options)
    with open_encrypted(path, "r+", references="allow") as disk:
        assert disk.read(0, disk.size) == content
        disk.truncate(200 * KiB, preallocation=preallocation)  # type: ignore[arg-type]
        disk.write(3000, b"x" * 5000)
    expected = content[:3000] + b"x" * 5000 + content[8000:] + bytes(100 * KiB)
    qemu_img("check", *OBJECT, "--image-opts", image_opts(path))
    qemu_img("convert", *OBJECT, "--image-opts", image_opts(path), "-O", "raw", copy)
    assert copy.read_bytes() == expected
