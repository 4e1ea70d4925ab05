"""``inspect``: exit codes, both outputs, standard input, and hostile images."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocklib import Secret
from blocklib import open as open_disk
from tests import foreign
from tests.cli.running import CommandLine
from tests.damage import DAMAGES, IMAGES, ImagePath
from tests.foreign import lay
from tests.programs import Program
from tests.qcow2_bytes import Qcow2Bytes

KEYS = [
    "filename",
    "safe",
    "formats",
    "virtual-size",
    "encrypted",
    "references",
    "features",
    "limits-exceeded",
    "checks",
]


def image(tmp_path: Path, data: bytes | None = None) -> Path:
    path = tmp_path / "upload"
    path.write_bytes(bytes(Qcow2Bytes(cluster_bits=16).bytes) if data is None else data)
    return path


def with_backing(name: bytes) -> bytes:
    made = Qcow2Bytes(cluster_bits=16)
    made.bytes[8:20] = (200).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    made.bytes[200 : 200 + len(name)] = name
    return bytes(made.bytes)


def test_a_safe_file_is_exit_code_0(blocklib: CommandLine, tmp_path: Path) -> None:
    path = image(tmp_path)
    assert blocklib("inspect", path).splitlines() == [
        f"file: {path}",
        "formats: qcow2",
        "virtual size: 512 MiB (536870912 bytes)",
        "checks:",
        "    formats           ok      qcow2",
        "    backing_file      ok      the image has no backing file",
        "    data_file         ok      the image keeps its data itself",
        "    unknown_features  ok      every feature that must be understood is known",
        "    header            ok      the header is well-formed",
        "    limits            ok      nothing beyond the limits",
        "verdict: safe",
    ]


def test_an_unsafe_file_is_exit_code_1_and_the_failed_check_is_told(blocklib: CommandLine, tmp_path: Path) -> None:
    result = blocklib.run("inspect", image(tmp_path, with_backing(b"/etc/\x1b[31mpasswd")))
    assert result.code == 1
    assert result.err == ""
    assert "verdict: UNSAFE\n" in result.out
    assert "names a backing file: /etc/\\x1b[31mpasswd\n" in result.out
    assert "    backing_file      FAILED  " in result.out
    assert "\x1b" not in result.out


def test_json_has_the_same_keys_whatever_is_found(blocklib: CommandLine, tmp_path: Path) -> None:
    assert list(blocklib.json("inspect", image(tmp_path))) == KEYS
    found = blocklib.json("inspect", image(tmp_path, with_backing(b"base")), code=1)
    assert list(found) == KEYS
    assert found["safe"] is False
    assert found["references"] == [{"kind": "backing", "name": "base", "format": None}]
    assert found["checks"]["backing_file"] == {"passed": False, "message": "the image has a backing file, 'base'"}
    raw = blocklib.json("inspect", image(tmp_path, b""))
    assert (raw["formats"], raw["virtual-size"], raw["safe"]) == ([], 0, True)
    both = blocklib.json("inspect", image(tmp_path, lay((0, foreign.GPT), (foreign.ISO_OFFSET, foreign.ISO))), code=1)
    assert both["formats"] == ["iso", "gpt"]


def test_what_was_declared_is_compared(blocklib: CommandLine, tmp_path: Path) -> None:
    path = image(tmp_path)
    blocklib("inspect", "--expect", "qcow2", path)
    blocklib("inspect", "--expect", "raw", path, code=1)
    assert "no such format: 'qcow3'" in blocklib.fails("inspect", "--expect=qcow3", path)
    image(tmp_path, lay((foreign.LENGTH - 512, foreign.vhd_footer())))
    blocklib("inspect", "--expect", "vpc", path)


def test_limits_are_set_by_name(blocklib: CommandLine, tmp_path: Path) -> None:
    path = image(tmp_path)
    blocklib("inspect", "--limit", "virtual_size=512M", "--limit", "snapshots=0", path)
    found = blocklib.json("inspect", "--limit", "virtual_size=511M", path, code=1)
    assert found["limits-exceeded"] == ["virtual_size"]
    for text in ("virtual_size", "size=1G", "virtual_size=much"):
        assert "--limit" in blocklib.fails("inspect", "--limit", text, path)


def test_what_cannot_be_looked_at_is_exit_code_1_with_one_line(blocklib: CommandLine, tmp_path: Path) -> None:
    assert "No such file" in blocklib.fails("inspect", tmp_path / "missing")
    assert "neither a regular file" in blocklib.fails("inspect", tmp_path)
    assert "empty" in blocklib.fails("inspect", "")
    assert "one file name" in blocklib.fails("inspect")


def run_with_input(data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "blocklib", "inspect", *arguments, "-"]
    return subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)


def test_standard_input_is_read_to_its_end() -> None:
    data = bytes(Qcow2Bytes(cluster_bits=16).bytes)
    done = run_with_input(data, "--output=json")
    assert (done.returncode, json.loads(done.stdout)["formats"]) == (0, ["qcow2"])
    done = run_with_input(lay((0, data), (foreign.LENGTH - 512, foreign.vhd_footer())), "--output=json")
    assert (done.returncode, json.loads(done.stdout)["formats"]) == (1, ["qcow2", "vhd"])
    assert run_with_input(b"").returncode == 0


def test_a_file_called_minus_has_a_folder(blocklib: CommandLine, here: Path) -> None:
    (here / "-").write_bytes(bytes(Qcow2Bytes().bytes))
    blocklib("inspect", "./-")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, qemu_img: Program, qemu_io: Program) -> dict[str, ImagePath]:
    folder = tmp_path_factory.mktemp("sound")
    return {name: recipe.make(qemu_img, qemu_io, folder / name.replace(" ", "-")) for name, recipe in IMAGES.items()}


def test_damaged_images_have_a_verdict_and_sound_ones_a_good_one(blocklib: CommandLine, sound: dict[str, ImagePath]) -> None:
    """Every damage of the repair's tests, in this process: never an error, and what is safe can be opened."""
    for name, kept in sound.items():
        found = blocklib.run("inspect", kept.path)
        assert found.code == ("data file" in name), found
    for name, damage in DAMAGES.items():
        copy = sound[damage.image].copy(".damaged")
        damage.apply(copy)
        result = blocklib.run("inspect", "--output=json", copy.path)
        safe = json.loads(result.out)["safe"]
        assert (result.code, result.err) == (1 - safe, ""), name
        if safe:
            secret = IMAGES[damage.image].secret
            key = {"encrypt.key-secret": Secret(secret)} if secret else None
            open_disk(copy.path, format="qcow2", options=key).close()


BOMBS = {
    "tables of 4 billion entries": {"l1_size": (1 << 32) - 1, "nb_snapshots": (1 << 32) - 1, "size": (1 << 63) - 1},
    "clusters of 4 GiB": {"cluster_bits": 32},
    "clusters beyond numbers": {"cluster_bits": (1 << 32) - 1},
    "as many snapshots as are allowed": {"nb_snapshots": 65536, "snapshots_offset": 65536},
    "as many bitmaps as are allowed": {"autoclear_features": 1},
}


MEASURED = """
import sys
from blocklib.cli.main import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(*[line.split()[1] for line in status if line.startswith("VmHWM")], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what memory a process had")
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(60)
def test_a_bomb_costs_little_memory(tmp_path: Path, name: str) -> None:
    made = ImagePath(image(tmp_path))
    for field, value in BOMBS[name].items():
        made.set_field(field, value)
    made.resize(64 << 20)
    if "bitmaps" in name:
        extension = (65535).to_bytes(4, "big") + bytes(4) + (64 << 20).to_bytes(8, "big") + (1 << 16).to_bytes(8, "big")
        made.write(104, (bytes.fromhex("2385287500000018") + extension,))
    command = [sys.executable, "-c", MEASURED, "inspect", str(made.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "UNSAFE" in done.stdout
    assert int(done.stderr) < 64 << 10  # KiB


def test_a_reader_that_goes_is_no_error_of_ours(tmp_path: Path) -> None:
    path = image(tmp_path)
    read, write = os.pipe()
    os.close(read)
    with io.open(write, "wb") as closed:  # noqa: UP020 - a descriptor, not a name
        command = [sys.executable, "-m", "blocklib", "inspect", str(path)]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, b"")
