"""Encrypted images between QEMU and blocklib: each reads what the other wrote, over ciphers, cluster sizes and chains."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import blocklib
from blocklib import KiB, MiB
from tests.cli.running import CommandLine
from tests.encrypted import AES, CODE, CREATE, LUKS, OBJECT, OPEN, image_opts, open_encrypted, qemu_create
from tests.programs import Program

SIZE = 1 * MiB + 3 * 512

CIPHERS = {
    "default": {},
    "aes-128": {"cipher-alg": "aes-128"},
    "aes-192": {"cipher-alg": "aes-192"},
    "cbc": {"cipher-mode": "cbc"},
    "cbc-128-essiv": {"cipher-mode": "cbc", "cipher-alg": "aes-128", "ivgen-alg": "essiv"},
    "cbc-essiv-md5": {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
    "xts-essiv": {"ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
    "xts-plain": {"ivgen-alg": "plain", "ivgen-hash-alg": "sha1"},
    "ctr": {"cipher-mode": "ctr", "ivgen-alg": "essiv"},
    "ecb": {"cipher-mode": "ecb"},
    "sha1": {"hash-alg": "sha1"},
    "sha512": {"hash-alg": "sha512"},
    "md5": {"hash-alg": "md5"},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def of_qemu(tmp_path_factory: pytest.TempPathFactory, qemu_img: Program) -> Path:
    """An empty image by qemu-img; to be copied, for making it takes seconds."""
    path = tmp_path_factory.mktemp("qemu") / "disk.qcow2"
    qemu_create(qemu_img, "-o", CREATE, path, SIZE)
    return path


def _options(choices: dict[str, str], *more: str) -> str:
    return ",".join([CREATE, *(f"encrypt.{name}={value}" for name, value in choices.items()), *more])


def _pieces(seed: str, size: int = SIZE) -> Iterator[tuple[int, int, int]]:
    """(offset, length, byte): aligned and unaligned, inside one sector and over many clusters."""
    rng = random.Random(seed)
    for length in (1, 7, 511, 512, 513, 4096, 70_000, 300_000, 16):
        offset = rng.randrange(size - length)
        if length in (512, 4096):
            offset -= offset % 512
        yield offset, length, rng.randrange(1, 256)


def _exchange(qemu_io: Program, path: str, seed: str, *, base: bytes | None = None) -> bytearray:
    """Write by turns, and let each read all of it; what the disk must read as."""
    with open_encrypted(path, references="allow") as disk:
        size = disk.size
        content = bytearray(disk.read(0, size))
    assert content == (base or bytes(size)).ljust(size, b"\0")[:size]
    for turn in range(2):
        if turn:
            with open_encrypted(path, "r+", references="allow") as disk:
                for offset, length, byte in _pieces(f"{seed} ours", size):
                    disk.write(offset, bytes((byte,)) * length)
                    content[offset : offset + length] = bytes((byte,)) * length
                assert disk.read(0, size) == content
        else:
            writes = []
            for offset, length, byte in _pieces(f"{seed} theirs", size):
                writes += ["-c", f"write -P {byte} {offset} {length}"]
                content[offset : offset + length] = bytes((byte,)) * length
            qemu_io(*OBJECT, "--image-opts", *writes, image_opts(path))
            with open_encrypted(path, references="allow") as disk:
                assert disk.read(0, size) == content
                for offset, length, _byte in _pieces(f"{seed} reads", size):
                    assert disk.read(offset, length) == content[offset : offset + length]
    return content


def _check(qemu_img: Program, path: str, content: bytes | bytearray) -> None:
    """qemu-img finds the image clean and reads `content` from it."""
    report = qemu_img.json("check", *OBJECT, "--image-opts", image_opts(path))
    assert not any(report.get(name) for name in ("leaks", "corruptions", "check-errors")), report
    Path("plain.raw").write_bytes(content)
    qemu_img("compare", "-q", *OBJECT, "--image-opts", image_opts(path), "driver=raw,file.filename=plain.raw")


def test_an_image_of_qemu_is_read_and_written(qemu_img: Program, qemu_io: Program, of_qemu: Path) -> None:
    shutil.copy(of_qemu, "disk.qcow2")
    _check(qemu_img, "disk.qcow2", _exchange(qemu_io, "disk.qcow2", "qemu"))


@pytest.mark.parametrize("name", CIPHERS)
def test_qemu_reads_and_writes_an_image_of_ours(qemu_img: Program, qemu_io: Program, name: str) -> None:
    options = {f"encrypt.{option}": value for option, value in CIPHERS[name].items()}
    blocklib.create("disk.qcow2", SIZE, format="qcow2", options={**LUKS, **options})
    _check(qemu_img, "disk.qcow2", _exchange(qemu_io, "disk.qcow2", name))


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 2 * MiB])
@pytest.mark.parametrize("format", ["luks", "aes", "aes by qemu"])
def test_every_cluster_size_and_both_versions(
    qemu_img: Program, qemu_io: Program, cluster_size: int, compat: str, format: str
) -> None:
    if format == "aes by qemu":
        shape = f"encryption=on,encrypt.key-secret=s,cluster_size={cluster_size},compat={compat}"
        qemu_create(qemu_img, "-o", shape, "disk.qcow2", SIZE)
    else:
        options = {**(LUKS if format == "luks" else AES), "cluster_size": cluster_size, "compat": compat}
        blocklib.create("disk.qcow2", SIZE, format="qcow2", options=options)
    _check(qemu_img, "disk.qcow2", _exchange(qemu_io, "disk.qcow2", f"{cluster_size}{compat}{format}"))


@pytest.mark.parametrize("encrypted", ["overlay", "base", "both"])
def test_chains_of_encrypted_and_plain_images(qemu_img: Program, qemu_io: Program, encrypted: str) -> None:
    base = random.Random(encrypted).randbytes(600_064)
    in_base = encrypted in ("base", "both")
    blocklib.create("base.qcow2", len(base), format="qcow2", options=LUKS if in_base else {})
    with blocklib.open("base.qcow2", "r+", options=OPEN) as disk:
        disk.write(0, base)
    name = 'json:{"driver":"qcow2","file.filename":"base.qcow2","encrypt.key-secret":"s"}' if in_base else "base.qcow2"
    overlay: dict[str, Any] = LUKS if encrypted in ("overlay", "both") else {}
    blocklib.create("disk.qcow2", SIZE, format="qcow2", options={**overlay, "backing_file": name, "backing_fmt": "qcow2"})
    content = bytearray(base.ljust(SIZE, b"\0"))
    qemu_io(*OBJECT, "--image-opts", "-c", "write -P 9 100 70000", image_opts("disk.qcow2"))
    content[100:70_100] = b"\x09" * 70_000
    below: Any = {"driver": "qcow2", "file.filename": "base.qcow2", **OPEN}
    with open_encrypted("disk.qcow2", "r+", backing=below) as disk:
        assert disk.read(0, SIZE) == content
        disk.write(599_999, b"end of the base")
        content[599_999:600_014] = b"end of the base"
        disk.write_zeroes(200_000, 100_000)
        content[200_000:300_000] = bytes(100_000)
        assert disk.read(0, SIZE) == content
    _check(qemu_img, "disk.qcow2", content)
    command = CommandLine()
    command("compare", "-q", *OBJECT, "--image-opts", image_opts("disk.qcow2"), "driver=raw,file.filename=plain.raw")
    if in_base:  # the image says which file it is, the options say its secret
        spelled = "driver=qcow2,file.filename=named.qcow2,encrypt.key-secret=s,backing.encrypt.key-secret=s"
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "named.qcow2", len(base))
        command("compare", "-q", *OBJECT, "--image-opts", spelled, "driver=qcow2,file.filename=base.qcow2,encrypt.key-secret=s")


def test_info_equals_that_of_qemu_img(qemu_img: Program) -> None:
    command = CommandLine()
    for choices in CIPHERS.values():
        options = {**LUKS, **{f"encrypt.{name}": value for name, value in choices.items()}}
        blocklib.create("disk.qcow2", SIZE, format="qcow2", overwrite=True, options=options)
        assert command("info", "disk.qcow2") == qemu_img("info", "disk.qcow2")
        assert command("info", "--output=json", "disk.qcow2") == qemu_img("info", "--output=json", "disk.qcow2")
    for compat in ("0.10", "1.1"):
        blocklib.create("disk.qcow2", SIZE, format="qcow2", overwrite=True, options={**AES, "compat": compat})
        assert command("info", "disk.qcow2") == qemu_img("info", "disk.qcow2")
        assert command.json("info", "disk.qcow2") == qemu_img.json("info", "disk.qcow2")


def test_map_tells_of_encrypted_data_as_qemu_img_does(qemu_img: Program, qemu_io: Program) -> None:
    blocklib.create("disk.qcow2", 8 * MiB, format="qcow2", options=LUKS)
    writes = ("write -P 1 64k 200k", "write -z 128k 64k", "write -P 1 6M 1M", "write -z 7M 128k", "write -z -u 6M 64k")
    qemu_io(*OBJECT, "--image-opts", *(word for write in writes for word in ("-c", write)), image_opts("disk.qcow2"))
    command = CommandLine()
    for opts in ((*OBJECT, "--image-opts", image_opts("disk.qcow2")),):
        assert command.json("map", *opts) == qemu_img.json("map", *opts)
        assert qemu_img.run("map", *opts).returncode == 1
        command.fails("map", *opts)
    with open_encrypted("disk.qcow2") as disk:
        rows = disk.map()
        assert [tuple(row) for row in rows.tolist()] == [
            (*extent[:3], -1 if extent.host_offset is None else extent.host_offset, *extent[4:])
            for extent in disk.extents()
        ]


@pytest.mark.parametrize("target", ["luks", "aes", "plain"])
def test_convert_between_encrypted_and_plain(qemu_img: Program, target: str) -> None:
    command = CommandLine()
    content = random.Random(target).randbytes(400_000).ljust(SIZE, b"\0")
    Path("plain.raw").write_bytes(content)
    options = {"luks": CREATE, "aes": "encrypt.format=aes,encrypt.key-secret=s", "plain": "compat=1.1"}[target]
    command("convert", "-f", "raw", *OBJECT, "-O", "qcow2", "-o", CREATE, "plain.raw", "one.qcow2")
    command("convert", *OBJECT, "--image-opts", "-O", "qcow2", "-o", options, image_opts("one.qcow2"), "two.qcow2")
    for path in ("one.qcow2", "two.qcow2"):
        _check(qemu_img, path, content)
    command("convert", *OBJECT, "--image-opts", "-O", "raw", image_opts("two.qcow2"), "back.raw")
    assert Path("back.raw").read_bytes() == content


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_a_preallocated_image_reads_as_zero(qemu_img: Program, qemu_io: Program, preallocation: str) -> None:
    blocklib.create("disk.qcow2", SIZE, format="qcow2", options={**LUKS, "preallocation": preallocation})
    _check(qemu_img, "disk.qcow2", bytes(SIZE))
    size = Path("disk.qcow2").stat().st_size
    _exchange(qemu_io, "disk.qcow2", preallocation)
    assert Path("disk.qcow2").stat().st_size == size
    with open_encrypted("disk.qcow2", "r+") as disk:
        disk.truncate(2 * MiB, preallocation=preallocation)  # type: ignore[arg-type]
        assert disk.read(SIZE, 2 * MiB - SIZE) == bytes(2 * MiB - SIZE)


@pytest.mark.parametrize(
    ("cluster_size", "name", "size", "required", "fully_allocated"),
    [
        # What qemu-img 7.2 measure prints; asked again it takes seconds to find out how fast it is.
        (65536, "default", "1G", 2490368, 1076232192),
        (512, "default", "1G", 23453696, 1097195520),
        (65536, "cbc-128-essiv", "1G", 983040, 1074724864),
    ],
)
def test_measure_counts_the_encryption_header(
    cluster_size: int, name: str, size: str, required: int, fully_allocated: int
) -> None:
    options = _options(CIPHERS[name], f"cluster_size={cluster_size}")
    found = CommandLine().json("measure", *OBJECT, "-O", "qcow2", "-o", options, "--size", size)
    assert found == {"required": required, "fully-allocated": fully_allocated}


def test_a_time_of_zero_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocklib.formats.qcow2.encryption._DEFAULT_MILLISECONDS", 10)
    options: dict[str, Any] = {"encrypt.format": "luks", "encrypt.key-secret": blocklib.Secret("k"), "encrypt.iter-time": 0}
    blocklib.create("zero.qcow2", 1 << 20, format="qcow2", options=options)
    with blocklib.open("zero.qcow2", options={"encrypt.key-secret": blocklib.Secret("k")}) as disk:
        assert disk.read(0, 512) == bytes(512)


def test_a_new_image_is_laid_out_as_that_of_qemu_img(qemu_img: Program, of_qemu: Path) -> None:
    theirs = qemu_img.json("info", of_qemu)["format-specific"]["data"]
    line = CommandLine()("create", *OBJECT, "-f", "qcow2", "-o", CREATE, "ours.qcow2", SIZE)
    assert line.startswith("Formatting 'ours.qcow2', fmt=qcow2 encrypt.format=luks encrypt.key-secret=s ")
    assert "encrypt.iter-time=10 cluster_size=65536 " in line
    ours = qemu_img.json("info", "ours.qcow2")["format-specific"]["data"]
    for facts in (theirs, ours):
        for changing in ("uuid", "master-key-iters"):
            del facts["encrypt"][changing]
        del facts["encrypt"]["slots"][0]["iters"]
    assert theirs == ours
    assert of_qemu.read_bytes()[:512] == Path("ours.qcow2").read_bytes()[:512]


# -- secrets ------------------------------------------------------------------------------------------------------------


def _encrypted_secret(text: bytes, key: bytes, iv: bytes) -> bytes:
    padding = 16 - len(text) % 16
    return Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor().update(text + bytes((padding,)) * padding)


def test_secrets_mean_the_same_to_qemu_io_in_every_form(qemu_img: Program, qemu_io: Program) -> None:
    blocklib.create("disk.qcow2", 64 * KiB, format="qcow2", options=LUKS)
    Path("raw").write_text(CODE)
    Path("newline").write_text(CODE + "\n")
    coded = base64.b64encode(CODE.encode()).decode()
    Path("coded").write_text(coded + "\n")
    key, iv = os.urandom(32), os.urandom(16)
    Path("key").write_text(base64.b64encode(key).decode())
    Path("sealed").write_bytes(_encrypted_secret(CODE.encode(), key, iv))
    sealed = base64.b64encode(Path("sealed").read_bytes()).decode()
    iv_text = base64.b64encode(iv).decode()
    master = "secret,id=k,format=base64,file=key"
    forms = [
        [f"secret,id=s,data={CODE}"],
        [f"secret,id=s,data={coded},format=base64"],
        ["secret,id=s,file=raw"],
        ["secret,id=s,file=coded,format=base64"],
        [master, f"secret,id=s,data={sealed},format=base64,keyid=k,iv={iv_text}"],
        [master, f"secret,id=s,file=sealed,keyid=k,iv={iv_text}"],
        [json.dumps({"qom-type": "secret", "id": "s", "data": CODE})],
        # and what is wrong
        ["secret,id=s,file=newline"],
        [f"secret,id=s,data={coded}"],
        [f"secret,id=s,data={CODE}!"],
        [f"secret,id=other,data={CODE}"],
        [master, f"secret,id=s,data={sealed},format=base64,keyid=k,iv={base64.b64encode(bytes(16)).decode()}"],
        [f"secret,id=s,data={sealed},format=base64,keyid=k,iv={iv_text}"],
        ["secret,id=s,file=missing"],
        [f"secret,id=s,data={CODE},format=base64"],
        ["secret,id=s"],
    ]
    ours = CommandLine("qemu-io")
    before = Path("disk.qcow2").read_bytes()
    for number, objects in enumerate(forms):
        words = [word for text in objects for word in ("--object", text)]
        theirs = qemu_io.run(*words, "--image-opts", "-c", "read 0 1k", image_opts("disk.qcow2"))
        result = ours.run(*words, "--image-opts", "-c", "read 0 1k", image_opts("disk.qcow2"))
        assert (result.code, theirs.returncode) == ((0, 0) if number < 7 else (1, 1)), (objects, result, theirs)
        assert CODE not in result.out + result.err
        assert result.err.count("\n") == (number >= 7)
    assert Path("disk.qcow2").read_bytes() == before
