"""Every job, whatever happens to it, beside guests that go on writing: nothing is lost, and nothing is left behind.

A case is a kind of job and what happens; its seed, which the name of a torture run shows, decides everything else.
"""

from __future__ import annotations

import errno
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import blocklib
from blocklib import JobCancelled, KiB, MiB, StorageError, graph, jobs, nbd
from blocklib.errors import JobStateError
from blocklib.jobs.copy_target import CopyTarget
from tests.jobs_model import Fault, Guests, Moment, busy, put_fault, until
from tests.nbd_servers import qemu_nbd_at
from tests.programs import Program, find_program
from tests.writers import make_chain, qemu_chain, qemu_content

pytestmark = pytest.mark.requires("qemu-img", "qemu-nbd")

SIZE: Final = 6 * MiB
GRANULARITY: Final = 64 * KiB
_PAUSED: Final = ("paused", "standby")


@dataclass(frozen=True)
class Kind:
    """A job, and what it copies to: "new", "existing" or "open" images, or one behind an NBD server, "ours" or "qemu's"."""

    verb: str
    target: str = ""
    sync: str = "full"
    options: tuple[tuple[str, Any], ...] = ()
    base: bool = False
    overlay: bool = False

    @property
    def uses_bitmap(self) -> bool:
        return self.sync in ("incremental", "bitmap")


KINDS: Final = {
    "stream": Kind("stream"),
    "stream-base": Kind("stream", base=True),
    "overlay-stream": Kind("stream", overlay=True),
    "mirror": Kind("mirror", "new"),
    "mirror-blocking": Kind("mirror", "new", options=(("copy_mode", "write-blocking"),)),
    "mirror-top": Kind("mirror", "new", "top"),
    "mirror-top-blocking": Kind("mirror", "new", "top", (("copy_mode", "write-blocking"),)),
    "mirror-none": Kind("mirror", "new", "none"),
    "mirror-existing": Kind("mirror", "existing"),
    "mirror-existing-blocking": Kind("mirror", "existing", options=(("copy_mode", "write-blocking"),)),
    "mirror-open": Kind("mirror", "open"),
    "mirror-nbd": Kind("mirror", "ours"),
    "mirror-qemu-nbd": Kind("mirror", "qemu's", options=(("copy_mode", "write-blocking"),)),
    "mirror-incremental": Kind("mirror", "existing", "incremental"),
    "mirror-bitmap-never": Kind("mirror", "existing", "bitmap", (("bitmap_mode", "never"),)),
    "mirror-bitmap-always": Kind("mirror", "existing", "bitmap", (("bitmap_mode", "always"),)),
    "commit": Kind("commit"),
    "commit-base": Kind("commit", base=True),
    "commit-below": Kind("commit", options=(("top", True),)),
    "backup": Kind("backup", "new"),
    "backup-zlib": Kind("backup", "new", options=(("compress", "zlib"),)),
    "backup-zstd": Kind("backup", "new", options=(("compress", "zstd"),)),
    "backup-top": Kind("backup", "new", "top"),
    "backup-none": Kind("backup", "new", "none"),
    "backup-existing": Kind("backup", "existing"),
    "backup-open": Kind("backup", "open"),
    "backup-nbd": Kind("backup", "ours"),
    "backup-qemu-nbd": Kind("backup", "qemu's"),
    "backup-incremental": Kind("backup", "existing", "incremental"),
    "backup-bitmap-on-success": Kind("backup", "existing", "bitmap", (("bitmap_mode", "on-success"),)),
    "backup-bitmap-never": Kind("backup", "existing", "bitmap", (("bitmap_mode", "never"),)),
    "backup-bitmap-always": Kind("backup", "existing", "bitmap", (("bitmap_mode", "always"),)),
}
EVENTS: Final = (
    "nothing",
    "pauses",
    "speeds",
    "cancel",
    "force",
    *(f"{end}-{policy}" for end in ("source", "target") for policy in ("report", "ignore", "enospc", "stop")),
    "full-report",
    "full-enospc",
)


class _Case:
    """One run: a chain in use, its guests, a job, and what happens to it."""

    def __init__(self, kind: Kind, event: str, folder: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.kind = kind
        self.end, _, self.policy = event.partition("-")
        self.rng = random.Random(seed)
        self.seed = seed
        self.folder = folder
        self.place = folder
        """Where the target is."""
        self.fault: Fault | None = None
        self.states: set[str] = set()
        self.completed = False
        self.base: Any = None
        self.mend: Callable[[], object] = self._mend
        self.target: Any = None
        self.job: Any = None
        self.bitmap: Any = None
        self.ended_within: tuple[Moment, Moment] | None = None

    # -- setting up ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        depth = self.rng.choice([1, 2, 3]) if self.kind.target else 3
        options = self.rng.choice([None, None, {"cluster_size": 4096}, {"extended_l2": True}, {"compat": "0.10"}])
        self.paths, model = make_chain(self.folder, depth, SIZE, options)
        with ExitStack() as stack:
            if self.end == "full":
                self.place = self.folder / "small"
                self.mend = stack.enter_context(_small_file_system(self.place))
            # Entered first, left last: a server outlives the disk that it is a target of.
            opened = stack.enter_context(self._opened_target()) if self.kind.target else None
            disk = stack.enter_context(
                blocklib.open(self.paths[-1], "r+", format="qcow2", references="allow", discard="unmap")
            )
            if self.kind.uses_bitmap:
                self.bitmap = disk.bitmaps.add("changes", granularity=GRANULARITY)
            with busy(disk, model, seed=self.seed) as guests:
                guests.wait_for(self.rng.randrange(10, 60))
                self._work(disk, guests, opened)
            content = guests.content()
            assert disk.read(0, SIZE) == content
            self._check_graph(disk, guests)
        self._check_images(content, guests)

    @contextmanager
    def _opened_target(self) -> Iterator[Any]:
        kind = self.kind
        self.image = self.place / "copy.qcow2"
        if kind.target == "new":
            self.target = self.image
            yield None
            return
        if kind.uses_bitmap:
            with blocklib.open(self.paths[-1], format="qcow2", references="allow") as source:
                blocklib.convert(source, self.image, format="qcow2")
        else:
            blocklib.create(self.image, SIZE, format="qcow2")
            with blocklib.open(self.image, "r+", format="qcow2") as old:
                old.write(SIZE // 2, b"\xee" * MiB)
        if kind.target == "existing":
            self.target = self.image
            yield None
        elif kind.target == "qemu's":
            path = find_program("qemu-nbd")
            assert path is not None
            with qemu_nbd_at(Program(path), self.folder, "--discard=unmap", "-f", "qcow2", self.image) as uri:
                self.target = uri
                yield None
        else:
            with blocklib.open(self.image, "r+", format="qcow2", discard="unmap") as disk:
                self.target = disk
                if kind.target == "open":
                    yield disk
                    if self.fault is not None and self.outcome == "failed":  # perhaps in a flush
                        disk.abandon()
                    return
                with nbd.Server(disk, listen=f"nbd+unix:///?socket={self.folder / 'ours.sock'}") as server:
                    self.target = server.uri
                    yield disk

    # -- the job ------------------------------------------------------------------------------------------------------

    def _work(self, disk: blocklib.Disk, guests: Guests, opened: blocklib.Disk | None) -> None:
        if self.kind.overlay:
            disk.add_overlay(self.folder / "over.qcow2", format="qcow2")
            self.paths.append(self.folder / "over.qcow2")
        if self.end in ("source", "target"):
            self._break(disk, opened)
        self.before = guests.now()
        try:
            self.job = self._start(disk)
        except StorageError:
            # A backup makes its target before it begins; that is no matter of policies.
            assert self.end in ("source", "target", "full")
            self.outcome = "failed"
            return
        self.after = guests.now()
        disturbing = threading.Thread(target=self._disturb, args=(guests,), daemon=True)
        disturbing.start()
        try:
            self._steer(guests)
            self.outcome = self._end()
        finally:
            disturbing.join(60)
            assert not disturbing.is_alive()
            if self.fault is not None:
                self.fault.mended = True
        if self.kind.sync != "none" or self.kind.verb == "mirror":
            if self.ended_within is None:
                self.ended_within = self.before, guests.now()
            self.ended_within = self.ended_within[0], guests.now()
            guests.wait_for(5)

    def _start(self, disk: blocklib.Disk) -> Any:
        kind = self.kind
        speed = self.rng.choice([0, 10 * MiB, 40 * MiB])
        policy: Any = self.policy or "report"
        if kind.verb == "stream":
            self.base = self.rng.choice(disk.chain()[1:]) if kind.base else None
            return jobs.stream(disk, base=self.base, on_error=policy, speed=speed)
        named: dict[str, Any] = dict(kind.options)
        if kind.verb == "commit":
            below = disk.chain()[1:]
            self.base = below[0] if kind.base else below[-1]
            if "top" in named:
                named["top"] = below[0]
            for end in ("source", "target"):
                if self.end in (end, "full"):
                    named[f"on_{end}_error"] = policy
            return jobs.commit(disk, base=self.base, speed=speed, **named)
        if self.end != "source":
            named["on_target_error"] = policy
        if self.end != "target":
            named["on_source_error"] = policy
        if kind.uses_bitmap:
            named["bitmap"] = "changes"
        if kind.target == "existing":
            named["existing"] = True
        if kind.verb == "mirror":
            named["granularity"] = self.rng.choice([4096, GRANULARITY, MiB])
        format = None if kind.target == "open" else "qcow2" if kind.target in ("new", "existing") else "raw"
        make: Any = getattr(jobs, kind.verb)
        return make(disk, self.target, format=format, sync=kind.sync, speed=speed, **named)

    def _break(self, disk: blocklib.Disk, opened: blocklib.Disk | None) -> None:
        """Let something fail soon: of the source's images, or of the target's where we have it, or of the job's own."""
        number = errno.ENOSPC if self.policy == "enospc" else errno.EIO
        # Where the job does not stop, it does not last: the job tries again, or it is the guests who meet it.
        times = self.rng.randrange(1, 4) if self.policy == "ignore" or self.kind.sync == "none" else None
        after = self.rng.randrange(40)
        if self.end == "source":
            self.fault = Fault(("read",), after, number, times)
            put_fault(self.rng.choice(graph.chain(disk.node)), self.fault)
            return
        kinds = ("write", "flush") if self.policy == "report" else ("write",)
        self.fault = Fault(kinds, after, number, times)
        if opened is not None or not self.kind.target:
            place = opened.node if opened is not None else disk.node
            if self.kind.verb == "commit":
                place = graph.chain(place)[1 if self.kind.base else -1]
            put_fault(place, self.fault)
            return
        open_target = CopyTarget.open

        def open_and_break(end: CopyTarget, size: int) -> blocklib.Disk:
            made = open_target(end, size)
            assert self.fault is not None
            if not self.fault.children:  # this is the job, and not the one that is tried at the end
                put_fault(made.node, self.fault)
            return made

        self.patch.setattr(CopyTarget, "open", open_and_break)

    def _mend(self) -> None:
        assert self.fault is not None
        self.fault.mended = True

    def _disturb(self, guests: Guests) -> None:
        """What happens to the job, from another thread, while `_steer` brings it to its end."""
        rng, job = self.rng, self.job
        if self.end == "speeds":
            for _ in range(rng.randrange(1, 5)):
                guests.wait_for(rng.randrange(10))
                _try(lambda: job.set_speed(rng.choice([0, 5 * MiB, 20 * MiB])))
            _try(lambda: job.set_speed(0))
        elif self.end == "pauses":
            for _ in range(rng.randrange(1, 5)):
                guests.wait_for(rng.randrange(10))
                if _try(job.pause) and until(job, lambda: job.status in _PAUSED):
                    guests.wait_for(rng.randrange(10))
                    job.resume()
        elif self.end in ("cancel", "force"):
            guests.wait_for(rng.randrange(1 + rng.randrange(80)))
            self.ended_within = guests.now(), guests.now()
            _try(lambda: job.cancel(force=self.end == "force"))

    def _steer(self, guests: Guests) -> None:
        """Bring the job to its end, and let it go on when it has stopped."""
        job = self.job
        completes = self.kind.sync == "none" or self.rng.random() < 0.5
        asked = False
        for event in job.events():
            self.states.add(event.status)
            if event.status in _PAUSED and job.io_error is not None:
                self.mend()
                _try(job.resume)
            elif event.status == "ready" and not asked and self.end not in ("cancel", "force"):
                if self.kind.sync == "none":
                    guests.wait_for(10)
                    if self.kind.verb == "backup":  # what they write later would show through
                        guests.stop()
                if self.ended_within is None:
                    self.ended_within = guests.now(), guests.now()
                asked = _try(job.complete if completes else job.cancel)
                self.completed = asked and completes

    def _end(self) -> str:
        """ "done", "kept", "cancelled" or "failed", as it is allowed here."""
        try:
            result = self.job.wait(timeout=60)
        except JobCancelled:
            assert self.end in ("cancel", "force")
            return "cancelled"
        except StorageError as error:
            assert self.job.status == "concluded"
            expected = errno.ENOSPC if self.end == "full" or self.policy == "enospc" else errno.EIO
            allowed = ("report", "ignore") if self.kind.verb == "stream" else ("report",)
            # What is pending may still fail: it is too late for stopping.
            assert self.policy in allowed or "pending" in self.states
            if self.fault is not None:
                assert self.fault.hits
            assert expected == error.errno  # noqa: PT017
            return "failed"
        if self.kind.verb == "commit":
            return "done" if "ready" not in self.states or self.completed else "kept"
        return "done" if self.kind.verb != "mirror" or result.pivoted else "kept"

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _check_graph(self, disk: blocklib.Disk, guests: Guests) -> None:
        names = [path.name for path in reversed(self.paths)]
        if self.outcome == "done":
            if self.kind.verb == "stream":
                below = names.index(Path(str(self.base.filename)).name) if self.base is not None else len(names)
                names = names[:1] + names[below:]
            elif self.kind.verb == "commit":
                below = names.index(Path(str(self.base.filename)).name)
                names = names[:1] * ("top" in dict(self.kind.options)) + names[below:]
            elif self.kind.verb == "mirror":
                names = ["copy.qcow2", *{"top": names[1:], "none": names}.get(self.kind.sync, [])]
        self.names = names
        found = [Path(str(image.filename)).name for image in disk.chain()]
        assert found == names or (self.kind.target in ("ours", "qemu's") and self.outcome == "done")
        for node in graph.chain(disk.node):
            assert not any(edge.parent is not None and edge.parent.is_filter for edge in node.parents)
            assert node.claim is None
        assert len(disk.node.parents) == (2 if self.kind.target == "open" and disk.node.name == self.target.node.name else 1)
        jobs.backup(disk, self.folder / "again.qcow2", format="qcow2").wait(timeout=60)
        (self.folder / "again.qcow2").unlink()
        if (self.bitmap is not None and self.outcome != "done") or (self.kind.verb == "backup" and self.bitmap is not None):
            assert not self.bitmap.busy
            self.marks = [(int(row["offset"]), int(row["length"])) for row in self.bitmap.dirty_ranges()]

    def _check_images(self, content: bytes, guests: Guests) -> None:
        kind = self.kind
        fails = self.end in ("source", "target", "full")
        made = kind.target == "new"
        gone = made and self.outcome in ("cancelled", "failed")
        images = [*self.paths, *([self.image] if kind.target and not gone else [])]
        left = {path.name for path in self.folder.glob("*.qcow2")}
        assert left == {image.name for image in images if image.parent == self.folder}
        if self.place != self.folder:
            return  # it is unmounted
        for image in images:
            check = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
            assert check.returncode in ((0, 3) if fails else (0,)), check.stdout
        top = self.folder / self.names[0]
        assert qemu_content(top, self.folder) == content
        if not (kind.target in ("ours", "qemu's", "existing", "open") and self.outcome == "done" and kind.verb == "mirror"):
            assert qemu_chain(top) == self.names
        if not kind.target or gone:
            return
        if kind.verb == "mirror" and self.outcome in ("done", "kept") and kind.sync != "none":
            assert self.ended_within is not None
            stood = self.paths[-1] if self.outcome == "done" else self.image
            assert guests.was_at(qemu_content(stood, self.folder), *self.ended_within)
        shows_through = kind.sync == "none" and self.end in ("cancel", "force")  # what was written after the end
        if kind.verb == "backup" and self.outcome == "done" and not shows_through:
            assert guests.was_at(qemu_content(self.image, self.folder), self.before, self.after)
        if self.bitmap is not None and (kind.verb == "backup" or self.outcome != "done"):
            self._check_marks(content, qemu_content(self.image, self.folder), guests)

    def _check_marks(self, content: bytes, copy: bytes, guests: Guests) -> None:
        """Whatever the next incremental copy would have to bring over is marked; and if this one succeeded, no more."""
        marked = bytearray(SIZE // GRANULARITY)
        for offset, length in self.marks:
            for piece in range(offset // GRANULARITY, -(-(offset + length) // GRANULARITY)):
                marked[piece] = 1
        for piece, is_marked in enumerate(marked):
            part = slice(piece * GRANULARITY, (piece + 1) * GRANULARITY)
            assert is_marked or content[part] == copy[part]
        if self.outcome in ("done", "kept") and "never" not in dict(self.kind.options).values():
            for offset, length in guests.changed_since(self.before):
                for piece in range(offset // GRANULARITY, -(-(offset + length) // GRANULARITY)):
                    marked[piece] = 0
            assert not any(marked)


def _try(act: Callable[[], object]) -> bool:
    """Whether the job was in a state that took it."""
    try:
        act()
    except JobStateError:
        return False
    return True


@contextmanager
def _small_file_system(place: Path) -> Iterator[Callable[[], object]]:
    """A file system with room for half of a copy; gives what makes it larger.  Skips where nothing can be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield lambda: subprocess.run(["mount", "-o", f"remount,size={8 * SIZE}", place], check=True)
    finally:
        subprocess.run(["umount", place], check=True)


def _makes_sense(kind: Kind, event: str) -> bool:
    return not (event.startswith("full") and (not kind.target or kind.uses_bitmap or kind.sync in ("none", "top")))


CASES: Final = [(name, event) for name, kind in KINDS.items() for event in EVENTS if _makes_sense(kind, event)]


def _run(name: str, event: str, folder: Path, seed: int) -> None:
    print(f"{name}, {event}, seed {seed}")
    with pytest.MonkeyPatch.context() as patch:
        _Case(KINDS[name], event, folder, seed, patch).run()


# Every kind and every event, not every pair: that is the campaign.
@pytest.mark.parametrize(("name", "event"), CASES[::23])
def test_a_job_beside_guests_keeps_every_promise_whatever_happens_to_it(tmp_path: Path, name: str, event: str) -> None:
    _run(name, event, tmp_path, 1)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(100, 105))
@pytest.mark.parametrize(("name", "event"), CASES)
def test_every_job_and_everything_that_happens_to_it(tmp_path: Path, name: str, event: str, seed: int) -> None:
    _run(name, event, tmp_path, seed)
