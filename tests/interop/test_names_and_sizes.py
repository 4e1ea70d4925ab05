"""Sizes, option values, format magic and backing names mean to us what they mean to qemu-img."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from blocklib.errors import UsageError
from blocklib.options import check_options, describe_options, parse_create_options
from blocklib.policy import resolve_backing_name
from blocklib.probe import probe
from blocklib.sizes import format_size, parse_size
from tests.programs import Program


def _sizes_to_print() -> list[int]:
    rng = random.Random(1)
    near_units = [
        (base << bits) + step
        for bits in range(0, 60, 10)
        for base in (1, 10, 999, 1000, 1001, 1023, 1024)
        for step in (-1, 0, 1)
        if 0 < (base << bits) + step < 1 << 62
    ]
    return near_units + [int(2 ** rng.uniform(0, 62)) for _ in range(60)]


def test_sizes_are_printed_as_qemu_img_prints_them(qemu_img: Program) -> None:
    for size in _sizes_to_print():
        shown = qemu_img("info", f'json:{{"driver":"null-co","size":{size}}}')
        found = re.search(r"^virtual size: (.*) \((\d+) bytes\)$", shown, re.MULTILINE)
        assert found is not None
        assert found[1] == format_size(int(found[2]))  # which it has rounded up to 512


@pytest.mark.parametrize(
    "text",
    [
        *("1.9999k", "0.0005k", "0.3M", "010k", "1.", "1.k", "0x10", "0x10b", "0x1E", " 1k", "+1k", "1.1E", "1.5G"),
        *("", "k", ".5k", "1.5", "1.5b", "0x", "0x1.8k", "1e3", "1K1", "1 k", "1k ", "-1", "5kb", "5KiB"),
    ],
)
def test_a_size_means_what_it_means_to_qemu_img(qemu_img: Program, tmp_path: Path, text: str) -> None:
    # A cluster size is shown as it was understood, before it is refused for not being a power of two.
    done = qemu_img.run("create", "-f", "qcow2", "-o", f"cluster_size={text}", tmp_path / "x", "1M")
    shown = re.search(r" cluster_size=(\d+)", done.stdout)
    try:
        ours: str | None = str(parse_size(text))
    except UsageError:
        ours = None
    assert ours == (shown[1] if shown else None)


@pytest.mark.parametrize("value", ["on", "off", "yes", "no", "true", "false", "y", "n", "ON", "True", "1", "0", ""])
def test_a_switch_means_what_it_means_to_qemu_img(qemu_img: Program, tmp_path: Path, value: str) -> None:
    option = f"lazy_refcounts={value}"
    path = tmp_path / "x"
    theirs = None
    if qemu_img.run("create", "-f", "qcow2", "-o", option, path, "1M").returncode == 0:
        theirs = qemu_img.json("info", path)["format-specific"]["data"]["lazy-refcounts"]
    try:
        ours = check_options("qcow2", parse_create_options([option]), table="create")["lazy_refcounts"]
    except UsageError:
        ours = None
    assert ours == theirs


@pytest.mark.parametrize("driver", ["qcow2", "raw"])
def test_options_are_described_in_the_layout_of_qemu_img(qemu_img: Program, tmp_path: Path, driver: str) -> None:
    def without_meaning(text: str) -> list[str]:
        return [line.partition(" - ")[0] for line in text.splitlines()]

    alone = without_meaning(qemu_img("create", "-f", driver, "-o", "help"))
    merged = without_meaning(qemu_img("create", "-f", driver, "-o", "help", tmp_path / "x"))
    ours = without_meaning(describe_options(driver))
    assert (ours[0], ours[-3:]) == (alone[0], alone[-3:])
    assert set(ours[1:-3]) <= set(merged)
    ours = without_meaning(describe_options(driver, protocol="file"))
    assert ours == [line for line in merged if line in ours]


def _magics() -> list[bytes]:
    cloop = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
    bochs = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
    vdi = bytes(64) + b"\x7f\x10\xda\xbe"
    return [
        *(b"QFI\xfb" + bytes([0, 0, 0, version]) for version in range(5)),
        *(b"LUKS\xba\xbe\0" + bytes([version]) for version in range(4)),
        *(name + bytes([v, 0, 0, 0]) for name in (b"WithoutFreeSpace", b"WithouFreSpacExt") for v in (1, 2, 3)),
        *(bochs + version.to_bytes(4, "little") for version in (3, 0x10000, 0x20000)),
        *(b"vhdxfile", b"conectix", b"QED\0", b"KDMV", b"COWD", b"koly", cloop, cloop[:-1], vdi),
        *(b"QFI\xfb\0\0\0\3" + vdi[8:], b"conectix" + vdi[8:]),
    ]


@pytest.mark.parametrize("padding", [0, 4096])
def test_magic_is_magic_to_qemu_img(qemu_img: Program, tmp_path: Path, padding: int) -> None:
    """Each magic without a valid header behind it: what qemu-img still opens is raw to it."""
    path = tmp_path / "image"
    for start in _magics():
        path.write_bytes(start + bytes(padding))
        is_raw = qemu_img.run("info", path).returncode == 0
        assert (probe(start + bytes(padding)) is None) == is_raw, start


def test_a_vmdk_descriptor_is_one_to_qemu_img(qemu_img: Program, tmp_path: Path) -> None:
    lines = [b"#x\n", b"  \n", b"\n", b" \r\n", b"\r\n", b"  x\n", b" \t\n", b"  \r\r\n", b"#" + b"y" * 250 + b"\n"]
    lines += [b"version=1\n", b"version=2\r\n", b"version=3", b"version=4\n", b" version=1\n", b"version=1\r\r\n"]
    rng = random.Random(2)
    path = tmp_path / "image"
    for _ in range(60):
        start = b"".join(rng.choices(lines, k=rng.randint(1, 5))) + bytes(rng.choice((0, 1000)))
        path.write_bytes(start)
        is_raw = qemu_img.run("info", path).returncode == 0
        assert (probe(start) is None) == is_raw, start


@pytest.mark.parametrize("referrer", ["top", "d/top", "./d//top"])
def test_a_backing_name_is_resolved_as_qemu_img_resolves_it(
    qemu_img: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, referrer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    names = ["base", "e/base", "../base", "./base", "/abs/base", "//abs/base", "a:b", "./a:b", "d/a:b", ":x", " base"]
    for name in [*names, "file:base", "nbd://h/x", "nbd:h:1", 'json:{"driver":"null-co"}']:
        for path in (referrer, str(tmp_path / referrer)):
            Path(path).unlink(missing_ok=True)
            qemu_img("create", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
            assert qemu_img.json("info", path)["full-backing-filename"] == resolve_backing_name(path, name)
