"""The host itself cuts a write short: a file that may not grow any more takes its beginning, and then nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import blocklib
from blocklib import KiB

PROGRAM = """
import errno, resource, sys
import blocklib
from blocklib import KiB, batch

path, way = sys.argv[1:]
disk = blocklib.open(path, "r+", format="qcow2")
limit = disk.node.children["file"].size + 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
data = b"n" * 512 * KiB
if way == "batch":
    batch.expect(1_000_000, writing=True)

def write():
    if way == "batch":
        disk.write_batch(range(512 * KiB, 1024 * KiB, 4096), data)
    else:
        disk.write(512 * KiB, data)

try:
    write()
except blocklib.StorageError as exc:
    assert exc.errno == errno.EFBIG, exc
    assert exc.node, exc
    assert exc.operation in ("pwritev", "write_batch"), exc.operation
else:
    raise AssertionError("it had no room")
found = disk.read(512 * KiB, 512 * KiB)
assert set(found) <= set(b"n\\0"), set(found)
disk.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write()
disk.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE is tried on Linux only")
@pytest.mark.parametrize("way", ["single", "batch"])
def test_a_file_that_may_not_grow_cuts_a_write_short(tmp_path: Path, way: str) -> None:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 1024 * KiB, format="qcow2")
    command = [sys.executable, "-c", PROGRAM, str(path), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    with blocklib.open(path, format="qcow2") as disk:
        assert disk.read(512 * KiB, 512 * KiB) == b"n" * 512 * KiB
    assert blocklib.check(path, format="qcow2").clean
