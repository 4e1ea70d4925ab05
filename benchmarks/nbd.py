"""Our NBD server beside qemu-nbd: ``python -m benchmarks.nbd IMAGE.raw IMAGE.qcow2``, two images of the same content.

Both servers run at the same time and are asked in turn, over Unix sockets; their start does not count.  nbdcopy reads each
image and writes the raw one into new images, fio reads 4 KiB at random places over four connections.  Medians, and the ratio
of ours to theirs: times, so less is better.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = {"ours": [sys.executable, "-m", "blocklib", "nbd"], "qemu-nbd": ["qemu-nbd"]}
COPY_TARGETS = {"from": 1.0, "to": 1.2}
RANDOM_TARGET = 1.5
CONNECTIONS, DEPTH = 4, 16
"""Together 64 requests on their way."""


@contextmanager
def serving(program: list[str], folder: Path, *arguments: str) -> Iterator[str]:
    """The URI of a server that runs in the background."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        number = Path(own, "pid")
        words = [*program, "--fork", "-t", "-e", "16", "-k", f"{own}/socket", "--pid-file", str(number), *arguments]
        subprocess.run(words, check=True)
        process = os.pidfd_open(int(number.read_text()))
        try:
            yield f"nbd+unix:///?socket={own}/socket"
        finally:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            select.select([process], [], [], 60)
            os.close(process)


def seconds(*words: str) -> float:
    begin = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def seconds_of_random_reads(uri: str) -> float:
    """Seconds for one 4 KiB read, on average."""
    words = ["fio", "--name=random", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k", f"--iodepth={DEPTH}"]
    words += [f"--numjobs={CONNECTIONS}", "--thread", "--runtime=2", "--time_based", "--group_reporting"]
    printed = subprocess.run([*words, "--output-format=json"], check=True, capture_output=True, text=True).stdout
    return 1 / float(json.loads(printed[printed.index("{") :])["jobs"][0]["read"]["iops"])


def compare(about: str, target: float, rounds: int, work: Callable[[str], float], uris: dict[str, str]) -> None:
    """Do `work` with both servers in turn and print what came of it."""
    found: dict[str, list[float]] = {name: [] for name in uris}
    for _ in range(rounds):
        for name, uri in uris.items():
            found[name].append(work(uri))
    ours, theirs = (statistics.median(found[name]) for name in PROGRAMS)
    print(f"{about:<40} {ours:10.6f} s {theirs:10.6f} s   ratio {ours / theirs:.2f} (target {target:.1f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the NBD server beside qemu-nbd.")
    parser.add_argument("raw", type=Path)
    parser.add_argument("qcow2", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    images = {"raw": given.raw, "qcow2": given.qcow2}
    with tempfile.TemporaryDirectory() as folder:
        for kind, image in images.items():
            with ExitStack() as servers:
                uris = {
                    name: servers.enter_context(serving(program, Path(folder), "-r", "-f", kind, str(image)))
                    for name, program in PROGRAMS.items()
                }
                compare(
                    f"nbdcopy from {kind}",
                    COPY_TARGETS["from"],
                    given.rounds,
                    lambda uri: seconds("nbdcopy", uri, "null:"),
                    uris,
                )
                compare(f"random 4 KiB reads of {kind}", RANDOM_TARGET, 3, seconds_of_random_reads, uris)
        size = given.raw.stat().st_size
        for kind in images:
            with ExitStack() as servers:
                uris = {}
                for name, program in PROGRAMS.items():
                    new = f"{folder}/{name}.{kind}"
                    subprocess.run(["qemu-img", "create", "-q", "-f", kind, new, str(size)], check=True)
                    uris[name] = servers.enter_context(serving(program, Path(folder), "-f", kind, new))
                compare(
                    f"nbdcopy to {kind}",
                    COPY_TARGETS["to"],
                    given.rounds,
                    lambda uri: seconds("nbdcopy", str(given.raw), uri),
                    uris,
                )


if __name__ == "__main__":
    main()
