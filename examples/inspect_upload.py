"""A service that takes disk images from strangers: each upload is inspected as it is saved, and kept only if it is safe.

Good images of three formats are kept; a qcow2 image that names the host's password file, one that keeps its data elsewhere, a
VMDK of extents, a disk larger than allowed, a qcow2 image declared raw and a file that is two formats at once are not, and
each refusal says why.  Exit code 0: every upload got the verdict that it deserves.

    python examples/inspect_upload.py
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import blocklib
from blocklib import GiB, KiB, MiB, policy

LIMITS = policy.Limits(virtual_size=100 * GiB, snapshots=16)


class Upload(Protocol):
    """The body of a request: it can be read once, and not be sought in."""

    def read(self, size: int, /) -> bytes: ...


class Refused(Exception):
    """The upload is not wanted; the text says why, by check."""


def receive(stream: Upload, declared: str, folder: Path, name: str) -> tuple[blocklib.Inspection, str]:
    """Save an upload as `name`, and give what it is and its SHA-256.  Raises Refused; nothing is left then."""
    inspector = blocklib.Inspector(expect=declared, limits=LIMITS)
    digest = hashlib.sha256()
    part = folder / f"{name}.part"
    with part.open("xb") as saved:
        while chunk := stream.read(256 * KiB):
            inspector.feed(chunk)
            digest.update(chunk)
            saved.write(chunk)
        os.fsync(saved.fileno())
    verdict = inspector.finish()
    if not verdict.safe:
        part.unlink()
        raise Refused("; ".join(f"{check.name}: {check.message}" for check in verdict.failures))
    part.rename(folder / name)
    return verdict, digest.hexdigest()


def use(path: Path, declared: str) -> int:
    """What the service does with an image later: it says the format, and allows no reference."""
    with blocklib.open(path, format=declared, limits=LIMITS) as disk:
        return sum(extent.length for extent in disk.extents() if extent.data)


def make_uploads(folder: Path) -> dict[str, tuple[str, bytes, str | None]]:
    """Name -> how it is declared, its bytes, and the check that should refuse it."""

    def qcow2(size: int, **options: object) -> bytes:
        path = folder / "image.qcow2"
        blocklib.create(path, size, format="qcow2", overwrite=True, **options)  # type: ignore[arg-type]
        return path.read_bytes()

    good = qcow2(1 * GiB)
    disk = bytearray(4 * MiB)
    disk[446:462] = bytes.fromhex("80000000830000000008000000100000")  # one bootable partition of 2 MiB
    disk[510:512] = b"\x55\xaa"
    iso = bytearray(good.ljust(64 * KiB, b"\0"))
    iso[32769:32774] = b"CD001"
    (folder / "secret").write_bytes(b"root:x:0:0\n".ljust(512, b"\n"))
    descriptor = b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/passwd" 0\n'
    return {
        "qcow2": ("qcow2", good, None),
        "raw": ("raw", bytes(1 * MiB), None),
        "raw-with-partitions": ("raw", bytes(disk), None),
        "names-a-backing-file": ("qcow2", qcow2(1 * MiB, backing=folder / "secret", backing_format="raw"), "backing_file"),
        "keeps-its-data-elsewhere": ("qcow2", qcow2(1 * MiB, options={"data_file": str(folder / "data")}), "data_file"),
        "too-large": ("qcow2", qcow2(200 * GiB), "limits"),
        "declared-raw": ("raw", good, "expected_format"),
        "two-formats": ("qcow2", bytes(iso), "formats"),
        "extents": ("vmdk", descriptor, "descriptor"),
        "cut-off": ("qcow2", good[:1000], "header"),
    }


def main() -> int:
    mistakes = 0
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as store:
        for name, (declared, data, expected) in make_uploads(Path(made)).items():
            try:
                verdict, digest = receive(io.BytesIO(data), declared, Path(store), name)
            except Refused as exc:
                print(f"{name}: refused: {exc}")
                mistakes += expected is None or f"{expected}: " not in str(exc)
            else:
                found = " in ".join(verdict.formats) or "no signature"
                used = use(Path(store) / name, declared)
                print(f"{name}: kept: {found}, {verdict.virtual_size} bytes, {used} of them data, sha256 {digest[:16]}...")
                mistakes += expected is not None
        left = sorted(path.name for path in Path(store).iterdir())
    print(f"in the store: {', '.join(left)}")
    return 1 if mistakes or left != ["qcow2", "raw", "raw-with-partitions"] else 0


if __name__ == "__main__":
    sys.exit(main())
