"""Looking at what a crash left: opening it, checking it with both programs, reading it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocklib.formats.qcow2 import layout
from blocklib.reports import CheckReport
from tests.crash.recording import Drive
from tests.crash.workload import disk_on
from tests.programs import Program

CLEAN_OR_LEAKS = (0, 3)
"""Exit codes of qemu-img check."""


@dataclass
class Look:
    """One state: where it comes from, and how closely it is looked at."""

    where: str
    folder: Path
    rnd: random.Random
    qemu_img: Program | None
    """None: it is not asked about this state."""
    thorough: bool
    """Whether the image is used further."""

    def check(
        self, file: Drive, *, others: Mapping[str, Drive] | None = None, secret: str | None = None, why: str = ""
    ) -> CheckReport:
        """Both checks of one image: at worst leaks, and in version 2 copied flags that are missing.

        `others` are the files that it names, as they are called in its folder.
        """
        where = f"{self.where}{why}"
        data_file = next(iter(others.values())) if others else None
        with disk_on(file, writable=False, metadata_only=True, data_file=data_file) as disk:
            report = disk.node.check()
        wrong = [str(finding) for finding in report.findings if finding.kind != "leak"]
        if is_version_2(file):
            wrong = [text for text in wrong if "expected copied flag set" not in text]
        assert not wrong, f"{where}: {wrong[:5]}"
        if self.qemu_img is not None:
            path = self.folder / "crashed.qcow2"
            path.write_bytes(file.data)
            for name, other in (others or {}).items():
                (self.folder / name).write_bytes(other.data)
            options: dict[str, Any] = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": path.name}}
            known = []
            if secret is not None:
                options["encrypt"] = {"key-secret": "s"}
                known = ["--object", f"secret,id=s,data={secret}"]
            done = self.qemu_img.run("check", *known, f"json:{json.dumps(options)}", cwd=self.folder)
            errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
            if is_version_2(file) and all("OFLAG_COPIED" in line and "refcount=1" in line for line in errors):
                assert done.returncode in (*CLEAN_OR_LEAKS, 2), f"{where}: {done.returncode}\n{done.stdout}{done.stderr[:2000]}"
            else:
                assert done.returncode in CLEAN_OR_LEAKS, f"{where}: {done.returncode}\n{done.stdout}{done.stderr[:2000]}"
        return report


def is_version_2(file: Drive) -> bool:
    return int.from_bytes(file.data[4:8], "big") == 2


def is_dirty(file: Drive) -> bool:
    """Whether the image says that its counts are not to be believed."""
    place = layout.FIELD_OFFSETS["incompatible_features"]
    features = int.from_bytes(file.data[place : place + 8], "big")
    return not is_version_2(file) and bool(features & layout.INCOMPATIBLE_DIRTY)
