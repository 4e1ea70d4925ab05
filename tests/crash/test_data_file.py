"""A crash of a host with two files: the image and its external data file, each with barriers of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import pytest

from blocklib.disk import Disk
from blocklib.formats.qcow2.create import header_for, write_empty_image
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.graph import Transaction
from blocklib.node import CONSISTENT_READ, RESIZE, WRITE, Preallocation
from blocklib.options import check_options
from tests.crash.recording import SECTOR, Event, RecordingNode, crash_sites
from tests.crash.workload import History, Worker, difference_in, run_workers
from tests.programs import Program

Journal = list[tuple[Literal["write", "barrier"], str]]


class _Log(list[Event]):
    """The log of one file that also tells a journal of all files when something was added."""

    def __init__(self, journal: Journal, name: str) -> None:
        super().__init__()
        self._journal = journal
        self._name = name

    def append(self, event: Event) -> None:
        super().append(event)
        self._journal.append((event[0], self._name))


class _File(RecordingNode):
    def __init__(self, journal: Journal, name: str, data: bytes = b"") -> None:
        super().__init__(data=data)
        self.log = _Log(journal, name)

    def truncate(self, size: int, preallocation: Preallocation = "off") -> None:
        if size < self.size:  # what lay there is gone, and may be there again after a crash
            with self._lock:
                self._change(size, bytes(self.size - size))
                self.size = size
            return
        super().truncate(max(size, len(self.data)))
        self.size = size


class _Host:
    """What `History` needs to know of a host: how much has happened."""

    def __init__(self) -> None:
        self.log: Journal = []


def _empty(sectors: int, options: dict[str, int | str | bool]) -> bytes:
    node = RecordingNode()
    with Transaction() as change:
        edge = change.attach(None, "create", node, wanted=CONSISTENT_READ | WRITE | RESIZE)
    typed = check_options("qcow2", {**options, "data_file": "guest.raw"}, table="create")
    write_empty_image(edge, header_for(sectors * SECTOR, typed))
    return bytes(node.data)


def _disk_on(file: RecordingNode, data: RecordingNode) -> Disk:
    node = Qcow2Node.from_options(check_options("qcow2", {"file": {}}), read_only=False)
    node.discard_passes = True
    with Transaction() as change:
        change.attach(node, "file", file)
    node.load()
    with Transaction() as change:
        change.attach(node, "data-file", data)
    disk = Disk(node, "r+")
    node.activate()
    return disk


@pytest.mark.parametrize("raw", [False, True], ids=["plain", "raw"])
@pytest.mark.parametrize("resizes", [False, True], ids=["fixed", "resizing"])
def test_what_was_flushed_survives_and_the_image_has_at_worst_leaks(
    raw: bool, resizes: bool, tmp_path: Path, qemu_img: Program
) -> None:
    sectors, seed = 1501, 7 + 2 * raw + resizes
    host: Any = _Host()
    start = _empty(sectors, {"cluster_size": 2048, "data_file_raw": raw})
    file = _File(host.log, "image", start)
    data = _File(host.log, "data", bytes(sectors * SECTOR))
    disk = _disk_on(file, data)
    if raw:
        disk.node.preallocate("metadata")
    history = History(host)
    workers = [Worker(disk, history, n, 2, stripe=4, seed=seed, resizes=resizes and not n) for n in range(2 - resizes)]
    run_workers(workers, 120)
    assert difference_in(disk.read(0, disk.size), history.now) is None
    if raw:
        assert bytes(data.data[: disk.size]) == disk.read(0, disk.size)
    history.flush(disk.flush)
    disk.close()

    rnd = random.Random(seed)
    barriers = [position for position, event in enumerate(host.log) if event[0] == "barrier"]
    for _ in range(14):
        cut = min(len(host.log), max(0, rnd.choice(barriers) + rnd.randrange(-6, 7)))
        cuts = {name: sum(1 for _kind, where in host.log[:cut] if where == name) for name in ("image", "data")}
        images = crash_sites(start, file.log, [cuts["image"]])[0].outcomes(rnd, 4)
        contents = crash_sites(bytes(sectors * SECTOR), data.log, [cuts["data"]])[0].outcomes(rnd, 4)
        for number, image in enumerate(images):
            content = contents[number % len(contents)]
            where = f"after {cut} of {len(host.log)} events, outcome {number}"
            _check(tmp_path, image, content, qemu_img, where)
            with _disk_on(RecordingNode(data=image), RecordingNode(data=content)) as crashed:
                difference = difference_in(crashed.read(0, crashed.size), history.allowed(cut))
                assert difference is None, f"{where}: {difference}"


def _check(folder: Path, image: bytes, content: bytes, qemu_img: Program, where: str) -> None:
    path = folder / "crashed.qcow2"
    path.write_bytes(image)
    (folder / "guest.raw").write_bytes(content)
    done = qemu_img.run("check", "-f", "qcow2", path.name, cwd=folder)
    assert done.returncode in (0, 3), f"{where}: {done.stdout}{done.stderr}"


def test_data_is_durable_in_the_data_file_before_an_entry_says_that_it_is_there() -> None:
    host = _Host()
    file = _File(host.log, "image", _empty(256, {"cluster_size": 4096}))
    data = _File(host.log, "data", bytes(256 * SECTOR))
    with _disk_on(file, data) as disk:
        host.log.clear()
        disk.write(8192, b"x" * 4096)
        disk.flush()
        seen = list(host.log)
    assert seen.index(("write", "data")) < seen.index(("barrier", "data"))
    assert seen.index(("barrier", "data")) < len(seen) - 1 - seen[::-1].index(("write", "image"))
