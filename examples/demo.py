"""The main job on real input: a file system goes through a chain of qcow2 images and comes out identical.

`make demo` runs it.  Each step is one that an administrator would do with qemu-img; the commands are run as shown, and
the writes between them go through the library.  Beside all that, a plain bytearray gets the same writes, and at the end
the converted image must equal it byte for byte.  Exit code 0: it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import blocklib
from blocklib import KiB, MiB, policy

IMAGE_SIZE = 96 * MiB
GROWTH = 8 * MiB
SHOWN_LINES = 12
BLOCKLIB = Path(sys.executable).with_name("blocklib")

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """Something came out wrong; the text says what."""


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{escape(text)}[/]")


def say(text: str) -> None:
    console.print(f"  {escape(text)}")


def run(*command: str, folder: Path, shown_lines: int = 0) -> str:
    """Show the command, run it in `folder`, show the first lines that it prints, and return all of them."""
    console.print(f"  [bold]$ {escape(' '.join(command))}[/]", end="")
    program = str(BLOCKLIB) if command[0] == "blocklib" else shutil.which(command[0], path=search_path()) or command[0]
    begin = time.perf_counter()
    done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, check=False)
    console.print(f"  [dim]{time.perf_counter() - begin:.2f} s[/]")
    lines = done.stdout.splitlines()
    for line in lines[:shown_lines]:
        console.print(f"  [dim]{escape(line)}[/]")
    if len(lines) > shown_lines > 0:
        console.print(f"  [dim]... {len(lines) - shown_lines} lines more[/]")
    if done.returncode:
        raise DemoError(f"{command[0]} ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def search_path() -> str:
    """PATH, and the folders where Debian keeps mkfs, which an ordinary user's PATH leaves out."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def without_source(folder: str, names: list[str]) -> list[str]:
    """What not to copy from the standard library: installed packages, and all that is not Python source."""
    packages = {"__pycache__", "site-packages", "dist-packages"}
    here = Path(folder)
    return [name for name in names if name in packages or not (name.endswith(".py") or (here / name).is_dir())]


def make_source(folder: Path) -> str:
    """Make `disk.raw` from the Python standard library on this machine; say what it is."""
    tree = folder / "tree"
    shutil.copytree(sysconfig.get_path("stdlib"), tree, ignore=without_source)
    files = [path for path in tree.rglob("*") if path.is_file()]
    say(f"{len(files):,} files, {sum(path.stat().st_size for path in files) / MiB:.1f} MiB: Python's standard library")
    if shutil.which("mkfs.ext4", path=search_path()):
        size = f"{IMAGE_SIZE // MiB}M"
        run("mkfs.ext4", "-q", "-F", "-L", "demo", "-d", "tree", "disk.raw", size, folder=folder)
        return "an ext4 file system"
    say("mkfs.ext4 is not here, so the disk holds a tar archive instead")
    with tarfile.open(folder / "disk.raw", "w") as archive:
        archive.add(tree, "tree")
    os.truncate(folder / "disk.raw", IMAGE_SIZE)
    return "a tar archive"


def write_at_random(image: Path, expected: bytearray, seed: int, count: int) -> None:
    """Write the same to the image, through the library, and to the bytearray: any offset and length, some zeroes."""
    rng = random.Random(seed)
    begin = time.perf_counter()
    written = 0
    with blocklib.open(image, "r+", format="qcow2", references=policy.SameDirectory()) as disk:
        say(repr(disk))
        if disk.size != len(expected):
            raise DemoError(f"{image.name} is {disk.size} bytes long, and should be {len(expected)}")
        for _ in range(count):
            length = rng.choice((1, 511, 512, 4 * KiB, 5000, 64 * KiB, 200_000))
            offset = rng.randrange(disk.size - length)
            if rng.random() < 0.2:
                disk.write_zeroes(offset, length)
                expected[offset : offset + length] = bytes(length)
            else:
                data = rng.randbytes(length)
                disk.write(offset, data)
                expected[offset : offset + length] = data
            written += length
        disk.flush()
    seconds = time.perf_counter() - begin
    say(f"{count} writes at random offsets, aligned to nothing: {written / MiB:.1f} MiB in {seconds:.2f} s")


def check(image: str, folder: Path) -> str:
    """blocklib's verdict on the image, and qemu-img's where it is installed; say who was asked."""
    run("blocklib", "check", "-f", "qcow2", image, folder=folder, shown_lines=1)
    if not shutil.which("qemu-img"):
        return "blocklib"
    run("qemu-img", "check", "-f", "qcow2", image, folder=folder, shown_lines=1)
    return "blocklib and qemu-img"


def compare(raw: Path, expected: bytearray) -> str:
    """Raise DemoError unless the file holds exactly `expected`; return the digest that both have."""
    found = raw.read_bytes()
    if found == expected:
        return hashlib.sha256(found).hexdigest()
    if len(found) != len(expected):
        raise DemoError(f"{raw.name} is {len(found)} bytes long, and should be {len(expected)}")
    first = next(offset for offset in range(len(found)) if found[offset] != expected[offset])
    raise DemoError(f"{raw.name} differs from what was written, first at offset {first}")


def demo(folder: Path) -> str:
    """All steps, in `folder`; return the line that says what was verified."""
    heading("1. A disk with real content")
    what = make_source(folder)
    expected = bytearray((folder / "disk.raw").read_bytes())

    heading("2. Convert it to qcow2")
    run("blocklib", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2", folder=folder)
    run("blocklib", "compare", "-f", "raw", "-F", "qcow2", "disk.raw", "base.qcow2", folder=folder, shown_lines=1)
    with blocklib.open(folder / "base.qcow2") as disk, disk.as_file() as file:
        file.seek(0x438)
        if what == "an ext4 file system" and file.read(2) != b"\x53\xef":
            raise DemoError("the file system's magic number is not where it should be")

    heading("3. Put an overlay on it, and write into the overlay")
    run("blocklib", "create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "monday.qcow2", folder=folder)
    write_at_random(folder / "monday.qcow2", expected, seed=1, count=150)

    heading("4. A second overlay, grown, and written into")
    run("blocklib", "create", "-f", "qcow2", "-b", "monday.qcow2", "-F", "qcow2", "tuesday.qcow2", folder=folder)
    run("blocklib", "resize", "-f", "qcow2", "tuesday.qcow2", f"+{GROWTH // MiB}M", folder=folder, shown_lines=1)
    expected.extend(bytes(GROWTH))
    write_at_random(folder / "tuesday.qcow2", expected, seed=2, count=150)

    heading("5. Look at the chain")
    run("blocklib", "info", "--backing-chain", "tuesday.qcow2", folder=folder, shown_lines=60)
    run("blocklib", "map", "tuesday.qcow2", folder=folder, shown_lines=SHOWN_LINES)

    heading("6. Take Monday out of the chain: rebase keeps what the guest sees")
    run("blocklib", "rebase", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "tuesday.qcow2", folder=folder)
    (folder / "monday.qcow2").unlink()
    check("tuesday.qcow2", folder)

    heading("7. Commit Tuesday into the base")
    run("blocklib", "commit", "-f", "qcow2", "tuesday.qcow2", folder=folder, shown_lines=1)
    judges = check("base.qcow2", folder)

    heading("8. A bad day: a bitmap notes what it touches, and an internal snapshot takes it back")
    run("blocklib", "snapshot", "-c", "before", "base.qcow2", folder=folder)
    run("blocklib", "bitmap", "--add", "-f", "qcow2", "base.qcow2", "touched", folder=folder)
    write_at_random(folder / "base.qcow2", bytearray(expected), seed=3, count=100)
    with blocklib.open(folder / "base.qcow2", "r+") as disk:
        touched = disk.bitmaps["touched"]
        say(f"the bitmap counts {touched.count / MiB:.1f} MiB in {len(touched.dirty_ranges())} ranges")
        touched.remove()
    run("blocklib", "snapshot", "-a", "before", "base.qcow2", folder=folder)
    run("blocklib", "snapshot", "-l", "base.qcow2", folder=folder, shown_lines=4)
    check("base.qcow2", folder)

    heading("9. Compress it, convert it back to raw, and compare")
    run("blocklib", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "base.qcow2", "small.qcow2", folder=folder)
    sizes = [(folder / name).stat().st_blocks * 512 / MiB for name in ("base.qcow2", "small.qcow2")]
    say(f"{sizes[0]:.1f} MiB have become {sizes[1]:.1f} MiB")
    run("blocklib", "convert", "-f", "qcow2", "-O", "raw", "small.qcow2", "final.raw", folder=folder)
    digest = compare(folder / "final.raw", expected)
    say(f"sha256 {digest}")
    return (
        f"Verified: {what} of {IMAGE_SIZE // MiB} MiB went through a chain of three images, and all {len(expected):,}"
        f" bytes are what plain Python says they must be; {judges} found the image clean."
    )


def main() -> int:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="blocklib-demo-") as folder:
        try:
            verdict = demo(Path(folder))
        except (DemoError, blocklib.BlocklibError, OSError) as error:
            console.print(f"\n[bold red]Failed:[/] {escape(str(error))}")
            return 1
    console.print(f"\n[bold green]{escape(verdict)}[/] [dim]{time.perf_counter() - begin:.1f} s[/]")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
