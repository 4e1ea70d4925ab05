"""The same rules make the same requests of qemu-io and of ours fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.programs import Program

pytestmark = pytest.mark.requires("qemu-img", "qemu-io")

REQUESTS = (
    "write -P 1 0 4k",
    "write -P 2 64k 4k",
    "read 0 4k",
    "read 64k 4k",
    "flush",
    "write -z 0 64k",
    "discard 64k 64k",
    "write -P 3 1M 512",
    "read 1M 512",
    "flush",
)
ERRORS = tuple(text + mark for text in ("Input/output error", "No space left on device") for mark in ("", " (injected)"))


def outcomes(printed: str) -> list[str]:
    """What became of each request, by the errors and the counts that are printed."""
    found = []
    for line in printed.splitlines():
        if "failed" in line and line.endswith(ERRORS):
            found.append("failed: " + line.removesuffix(" (injected)").rpartition(": ")[2])
        elif line.startswith(("wrote", "read", "discard")) and "bytes" in line:
            found.append(line.partition(" ")[0])
    return found if len(found) > 1 else ["failed to open"]


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "rules",
    [
        pytest.param({}, id="none"),
        {"event": "none", "iotype": "read"},
        {"event": "none", "iotype": "write-zeroes", "errno": "28"},
        {"event": "none", "iotype": "discard"},
        {"event": "read_aio", "once": "on"},
        {"event": "read_aio", "iotype": "read"},
        {"event": "write_aio", "once": "on", "errno": "28"},
        {"event": "none", "iotype": "write", "sector": "2048"},
    ],
    ids=lambda rule: "-".join(rule.values()),
)
def test_the_same_requests_fail(
    tmp_path: Path, qemu_img: Program, qemu_io: Program, driver: str, rules: dict[str, str]
) -> None:
    if driver == "qcow2" and rules.get("iotype") in ("write-zeroes", "discard", "write"):
        pytest.skip("which requests of this kind an image makes of its file is its own affair")
    spelled = "".join(f",file.inject-error.0.{name}={value}" for name, value in rules.items())
    printed = []
    for name in ("theirs", "ours"):
        path = tmp_path / f"{name}.img"
        qemu_img("create", "-q", "-f", driver, path, "2M")
        file = f"file.driver=blkdebug,file.image.driver=file,file.image.filename={path}"
        target = f"driver={driver},discard=unmap,{file}{spelled}"
        arguments = ["-t", "writeback", "--image-opts", target, *(word for request in REQUESTS for word in ("-c", request))]
        if name == "theirs":
            theirs = qemu_io.run(*arguments)
            printed.append(outcomes(theirs.stdout + theirs.stderr))
        else:
            ours = CommandLine("qemu-io").run(*arguments)
            printed.append(outcomes(ours.out + ours.err))
    assert printed[1] == printed[0]
