"""Encrypted images for tests: made with little work for their keys, by QEMU or by us."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from blocklib import Disk, Secret
from blocklib import open as open_disk
from tests.programs import Argument, Program

CODE = "open-sesame"
"""The passphrase; it must never be printed."""
SECRET = Secret(CODE)
OBJECT = ("--object", f"secret,id=s,data={CODE}")
CREATE = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
OPEN: dict[str, Any] = {"encrypt.key-secret": SECRET}
LUKS: dict[str, Any] = {"encrypt.format": "luks", "encrypt.key-secret": SECRET, "encrypt.iter-time": 1}
AES: dict[str, Any] = {"encrypt.format": "aes", "encrypt.key-secret": SECRET}


def qemu_create(qemu_img: Program, *arguments: Argument) -> None:
    """``qemu-img create`` with the secret `s`; its measuring of the processor fails now and then, and is tried again."""
    for _ in range(200):
        done = qemu_img.run("create", "-q", *OBJECT, "-f", "qcow2", *arguments)
        if done.returncode == 0:
            return
        assert "CPU usage" in done.stderr, done.stderr
    raise AssertionError("qemu-img never found out how fast it is")


def image_opts(path: str | os.PathLike[str]) -> str:
    """An encrypted image as QEMU's --image-opts describe it."""
    return f"driver=qcow2,file.filename={os.fspath(path)},encrypt.key-secret=s"


def open_encrypted(path: str | Path, mode: Any = "r", **keywords: Any) -> Disk:
    return open_disk(path, mode, format="qcow2", options={**OPEN, **keywords.pop("options", {})}, **keywords)
