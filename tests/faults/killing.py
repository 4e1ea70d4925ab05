"""Processes that are killed amid a workload: `python -m tests.faults.killing FOLDER WORKLOAD KILLS SEED QEMU-IMG`.

Half of them die at a request of theirs, which may have been done in part, the others whenever their parent's clock says so.
Each is a fork of this program, which looks at what is left, and asks QEMU-IMG, too, unless that is empty.  The seed says where
they die; the last word printed is a count.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import blocklib
from blocklib import KiB, nbd
from tests.faults.campaign import Session, Workload, assert_possible, count_requests, fresh_copy
from tests.faults.workloads import LARGE, SIZE, WORKLOADS, noise

_LETTERS: Final = {"begun": b"b", "flushed": b"f", "ready": b"r"}


class Told(NamedTuple):
    """What a process said before it died."""

    begun: int
    flushed: int
    """Steps that had been begun when it last said that all is durable."""


class Child:
    """A fork that does `work(tell)`."""

    def __init__(self, work: Callable[[Callable[[str], object]], object]) -> None:
        self._pipe, told = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(told)
            return
        try:
            work(lambda what: os.write(told, _LETTERS[what]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def is_ready(self) -> bool:
        """Wait until it says so; False where it died before."""
        return os.read(self._pipe, 1) == b"r"

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> tuple[bool, Told]:
        """(whether it was killed, what it said)."""
        told = b""
        while part := os.read(self._pipe, 4096):
            told += part
        os.close(self._pipe)
        _pid, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), "a process failed before it was killed"
        flushed = told[: told.rfind(b"f") + 1].count(b"b")
        return code != 0, Told(told.count(b"b"), flushed)


def exit_rule(choose: random.Random, total: int) -> dict[str, Any]:
    rule = {"event": "none", "exit": True, "skip": choose.randrange(total), "errno": 5}
    if choose.random() < 0.5:
        rule["short"] = choose.randrange(1, 9) * 512
    return rule


class Campaign:
    """Kills of one workload."""

    def __init__(self, workload: Workload, folder: Path, seed: int, qemu_img: str | None) -> None:
        self.workload = workload
        self.made = folder / "made"
        self.copy = folder / "copy"
        self.qemu_img = qemu_img
        self.choose = random.Random(f"{seed}/{workload.name}")
        self.made.mkdir(parents=True)
        workload.make(self.made)
        self.totals = {
            part: count_requests(workload, self.made, self.copy, part, truncations=False) for part in workload.parts
        }
        begun = time.monotonic()
        self.reference = Session(workload, fresh_copy(self.made, self.copy))
        workload.work(self.reference)
        self.reference.disk.close()
        self.seconds = time.monotonic() - begun

    def kill(self, *, timed: bool) -> bool:
        """Whether the process was killed before it had done all."""
        part = self.choose.choices(list(self.totals), list(self.totals.values()))[0]
        rules = [] if timed else [exit_rule(self.choose, self.totals[part])]
        fresh_copy(self.made, self.copy)

        def work(tell: Callable[[str], object]) -> None:
            session = Session(self.workload, self.copy, part, rules, tell)
            self.workload.work(session)
            session.disk.close()

        child = Child(work)
        if timed:
            child.kill_after(self.choose.random() * self.seconds)
        killed, told = child.end()
        self._look(told)
        return killed

    def _look(self, told: Told) -> None:
        new = self.copy / "new"
        if new.exists():  # by a verb that makes images: opened or refused
            try:
                blocklib.check(new, format="qcow2")
            except blocklib.ImageError:
                new.unlink()
        session = Session(self.workload, self.copy)
        session.qemu_img = self.qemu_img
        session.judge_what_is_left(told.begun, told.flushed, self.reference)


def kill_server(campaign: Campaign, *, timed: bool) -> bool:
    """A server dies under a client that writes and flushes."""
    workload, copy, choose = campaign.workload, campaign.copy, campaign.choose
    fresh_copy(campaign.made, copy)
    socket = copy / "socket"
    rules = [] if timed else [exit_rule(choose, 100)]

    def serve(tell: Callable[[str], object]) -> None:
        session = Session(workload, copy, "top", rules)
        with nbd.Server(session.disk, listen=f"nbd+unix:///?socket={socket}"):
            tell("ready")
            signal.pause()

    child = Child(serve)
    if not child.is_ready():
        return child.end()[0]
    model = bytearray(campaign.reference.contents[0])
    possible = [bytes(model)]
    writes = random.Random(choose.randrange(1 << 30))
    deadline = time.monotonic() + writes.random() * 0.1
    try:
        with blocklib.open(f"nbd+unix:///?socket={socket}", "r+", format="raw") as disk:
            for number in range(1000):
                if timed and time.monotonic() > deadline:
                    os.kill(child.pid, signal.SIGKILL)
                if number % 7 == 6:
                    disk.flush()
                    possible = [bytes(model)]
                    continue
                offset, length = writes.randrange(SIZE - 20 * KiB), writes.randrange(1, 20 * KiB)
                data = noise(number, length)
                model[offset : offset + length] = data
                possible.append(bytes(model))
                disk.write(offset, data)
            os.kill(child.pid, signal.SIGKILL)
    except (blocklib.BlocklibError, OSError):
        pass  # there is nobody any more
    killed, _told = child.end()
    session = Session(workload, copy)
    session.qemu_img = campaign.qemu_img
    assert_possible(session.read(), possible)
    session.possible = [bytes(session.model)]
    session.end()
    return killed


def main(folder: Path, name: str, kills: int, seed: int, qemu_img: str | None) -> None:
    workload = next(found for found in (*WORKLOADS, *LARGE) if found.name == name.removeprefix("nbd "))
    campaign = Campaign(workload, folder, seed, qemu_img)
    killed = 0
    for number in range(kills):
        try:
            timed = number % 2 == 1
            killed += kill_server(campaign, timed=timed) if name.startswith("nbd ") else campaign.kill(timed=timed)
        except BaseException as exc:
            exc.add_note(f"{name}, seed {seed}, kill {number}")
            raise
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] or None)
