"""Key slots by amend: what QEMU allows and refuses, what opens the image afterwards, and crashes on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import KiB, Secret, jobs
from blocklib.crypto import luks
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.node import Node
from tests.cli.running import CommandLine
from tests.crash.host import Host
from tests.crash.recording import Drive
from tests.crash.replay import left_by, states
from tests.crash.workload import disk_on
from tests.encrypted import AES, CODE, LUKS, OBJECT, OPEN, image_opts, open_encrypted
from tests.programs import Program

NEW = "new-passphrase"
OBJECTS = (*OBJECT, "--object", f"secret,id=n,data={NEW}", "--object", "secret,id=w,data=wrong")


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocklib.create("disk.qcow2", 64 * KiB, format="qcow2", options=LUKS)
    with open_encrypted("disk.qcow2", "r+") as disk:
        disk.write(0, b"data")


def _amend(options: str, *more: str, key: str = "s", code: int = 0) -> str:
    result = CommandLine("qemu-img").run(
        "amend", *OBJECTS, "--image-opts", "-o", options, *more, image_opts("disk.qcow2")[:-1] + key
    )
    assert result.code == code, result
    for secret in (CODE, NEW):
        assert secret not in result.out + result.err
    assert result.err.count("\n") == code
    return result.err


def _active() -> list[int]:
    slots = blocklib.info("disk.qcow2").format_specific["encrypt"]["slots"]
    return [index for index, slot in enumerate(slots) if slot["active"]]


def _opens(qemu_io: Program, key: str) -> bool:
    """Whether a secret opens the image, which is one question to both programs."""
    opts = image_opts("disk.qcow2")[:-1] + key
    theirs = qemu_io.run(*OBJECTS, "--image-opts", "-c", "read 0 512", opts).returncode == 0
    ours = CommandLine("qemu-io").run(*OBJECTS, "--image-opts", "-c", "read 0 512", opts).code == 0
    assert ours == theirs
    return ours


ADD = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1"


def test_a_secret_is_added_and_the_first_one_erased(qemu_img: Program, qemu_io: Program) -> None:
    assert not _opens(qemu_io, "n")
    _amend(ADD)
    assert _active() == [0, 1]
    assert _opens(qemu_io, "n")
    assert _opens(qemu_io, "s")
    before = Path("disk.qcow2").read_bytes()
    _amend("encrypt.state=inactive,encrypt.old-secret=s", key="n")
    assert _active() == [1]
    assert _opens(qemu_io, "n")
    assert not _opens(qemu_io, "s")
    after = Path("disk.qcow2").read_bytes()
    with blocklib.open("disk.qcow2", options={"encrypt.key-secret": Secret(NEW)}) as disk:
        assert disk.read(0, 4) == b"data"
        assert isinstance(disk.node, Qcow2Node)
        area = int.from_bytes(disk.node.header.extension(0x0537BE77)[:8], "big")  # type: ignore[index]
    material = area + luks.ALIGNMENT
    assert before[material : material + 512] not in after
    qemu_img("check", "--object", f"secret,id=n,data={NEW}", "--image-opts", image_opts("disk.qcow2")[:-1] + "n")


@pytest.mark.parametrize("slot", range(8))
def test_every_slot_can_be_used_and_erased(qemu_io: Program, slot: int) -> None:
    if slot:
        _amend(f"{ADD},encrypt.keyslot={slot}")
        assert _active() == [0, slot]
        assert _opens(qemu_io, "n")
        _amend(f"encrypt.state=inactive,encrypt.keyslot={slot}")
    else:
        _amend(f"{ADD},encrypt.keyslot=0", "--force")
        assert not _opens(qemu_io, "s")
        assert _opens(qemu_io, "n")
        return
    assert _active() == [0]
    assert not _opens(qemu_io, "n")


def test_qemu_opens_and_erases_what_we_added(qemu_img: Program, qemu_io: Program) -> None:
    for slot in (3, 6):
        _amend(f"{ADD},encrypt.keyslot={slot}")
    erase = "encrypt.state=inactive,encrypt.old-secret=n"
    qemu_img("amend", *OBJECTS, "--image-opts", "-o", erase, image_opts("disk.qcow2"))
    assert _active() == [0]
    assert not _opens(qemu_io, "n")


REFUSED = {
    "slot in use": (f"{ADD},encrypt.keyslot=0", "in use"),
    "no such slot": (f"{ADD},encrypt.keyslot=8", "keyslot"),
    "no new secret": ("encrypt.state=active,encrypt.keyslot=1", "new-secret"),
    "no state": ("encrypt.new-secret=n", "state"),
    "an unknown state": ("encrypt.state=open,encrypt.new-secret=n", "state"),
    "an old secret with a new one": (f"{ADD},encrypt.old-secret=s", "old-secret"),
    "what to erase": ("encrypt.state=inactive", "keyslot"),
    "not in use": ("encrypt.state=inactive,encrypt.keyslot=7", "not in use"),
    "erase with a new secret": ("encrypt.state=inactive,encrypt.keyslot=0,encrypt.new-secret=n", "new-secret"),
    "erase with a time": ("encrypt.state=inactive,encrypt.old-secret=s,encrypt.iter-time=5", "iter-time"),
    "another's slot": ("encrypt.state=inactive,encrypt.old-secret=w,encrypt.keyslot=0", "slot 0"),
    "nobody's secret": ("encrypt.state=inactive,encrypt.old-secret=w", "no key slot"),
    "the last slot": ("encrypt.state=inactive,encrypt.keyslot=0", "last key slot"),
    "the last slot by its secret": ("encrypt.state=inactive,encrypt.old-secret=s", "last key slot"),
    "with another change": ("refcount_bits=64,encrypt.state=inactive,encrypt.keyslot=0", "last key slot"),
    "unknown secret": ("encrypt.state=active,encrypt.new-secret=nobody", "new-secret"),
    "what only create has": ("encrypt.format=luks", "encrypt.format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_qemu_refuses_is_refused_and_changes_nothing(qemu_img: Program, name: str) -> None:
    options, part = REFUSED[name]
    before = Path("disk.qcow2").read_bytes()
    assert part in _amend(options, code=1)
    assert Path("disk.qcow2").read_bytes() == before
    assert qemu_img.run("amend", *OBJECTS, "--image-opts", "-o", options, image_opts("disk.qcow2")).returncode == 1


def test_force_erases_the_last_slot() -> None:
    _amend("encrypt.state=inactive,encrypt.keyslot=0", "--force")
    assert _active() == []
    with pytest.raises(blocklib.OptionError, match="key slots"):
        open_encrypted("disk.qcow2")


def test_only_luks_images_have_slots() -> None:
    blocklib.create("plain.qcow2", 64 * KiB, format="qcow2")
    blocklib.create("aes.qcow2", 64 * KiB, format="qcow2", options=AES)
    for name in ("plain.qcow2", "aes.qcow2"):
        before = Path(name).read_bytes()
        with blocklib.open(name, "r+", options=OPEN) as disk, pytest.raises(blocklib.OptionError, match="LUKS"):
            jobs.amend(disk, {"encrypt.state": "active", "encrypt.new-secret": Secret("x")}).wait()
        assert Path(name).read_bytes() == before


def test_all_slots_in_use_leave_no_room() -> None:
    for _ in range(7):
        _amend(ADD)
    assert _active() == list(range(8))
    assert "all key slots" in _amend(ADD, code=1)


def test_a_wrong_or_missing_secret_changes_nothing() -> None:
    before = Path("disk.qcow2").read_bytes()
    assert "key slots" in _amend(ADD, key="w", code=1)
    result = CommandLine().run("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", "disk.qcow2")
    assert (result.code, "encrypt.key-secret" in result.err) == (1, True)
    assert Path("disk.qcow2").read_bytes() == before


def _on(file: Node, mode: str, code: str = CODE) -> blocklib.Disk:
    options: Any = {"encrypt.key-secret": Secret(code)}
    return disk_on(file, writable=mode == "r+", options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"encrypt.state": "active", "encrypt.new-secret": Secret(NEW), "encrypt.iter-time": 1, "encrypt.keyslot": 6},
        {"encrypt.state": "inactive", "encrypt.keyslot": 1},
    ],
    ids=["add", "erase"],
)
def test_a_crash_leaves_the_slots_before_or_after(options: dict[str, object]) -> None:
    """Whatever was not flushed is lost or torn: the first secret opens the image, and no slot says what is not so."""
    _amend("encrypt.state=active,encrypt.new-secret=w,encrypt.iter-time=1,encrypt.keyslot=1")
    start = Path("disk.qcow2").read_bytes()
    host = Host()
    file = host.add("disk", start)
    with _on(file.opened(), "r+") as disk:
        jobs.amend(disk, options).wait()  # type: ignore[arg-type]
    recording = host.recording()
    seen = set()
    for _state, left in left_by(recording, "slots", states(recording, "slots", 100)):
        with _on(Drive(data=left["disk"]), "r") as crashed:
            assert crashed.read(0, 4) == b"data"
            slots = crashed.info().format_specific["encrypt"]["slots"]
            active = tuple(index for index, slot in enumerate(slots) if slot["active"])
        seen.add(active)
        for index, code in ((1, "wrong"), (6, NEW)):
            if index in active:
                with _on(Drive(data=left["disk"]), "r", code) as crashed:
                    assert crashed.read(0, 4) == b"data"
    assert seen == ({(0, 1), (0, 1, 6)} if "encrypt.new-secret" in options else {(0, 1), (0,)})
