"""Facts of the machine that a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def facts() -> dict[str, str | int]:
    """Processor, memory, kernel, versions, revision: what a reader needs to judge a ratio."""
    return {
        "processor": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int((_field(Path("/proc/meminfo"), "MemTotal") or "0 kB").split()[0]) // 1024,
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "numpy": version("numpy"),
        "numba": version("numba"),
        "qemu_img": _first_line("qemu-img", "--version"),
        "revision": _first_line("git", "describe", "--always", "--dirty"),
    }


def _field(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    for text in path.read_text().splitlines():
        key, colon, value = text.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "not installed"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"
