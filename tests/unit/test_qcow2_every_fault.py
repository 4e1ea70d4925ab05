"""One request to the host fails, whichever it is: the caller hears of it, nothing hangs, and nothing is worse than leaked.

Every request of a short session is made to fail once: a write, a barrier or a discard, with EIO or ENOSPC.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from errno import EIO, ENOSPC
from typing import Any, Final

import pytest

from blocklib import batch
from blocklib.disk import Disk
from blocklib.errors import BatchError, BlocklibError, PoisonedError, StorageError
from blocklib.formats.qcow2.node import Qcow2Node
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image

KiB: Final = 1024
SIZE: Final = 256 * KiB
PATIENCE: Final = 60.0

Step = Callable[[Disk], object]
BATCH: Final[Step] = lambda disk: disk.write_batch(range(70_000, 200_000, 9000), b"g" * 15 * 700)  # noqa: E731
STEPS: Final[list[Step]] = [
    lambda disk: disk.write(3000, b"a" * 40_000),
    lambda disk: disk.bitmaps.add("b", granularity=512, persistent=True),
    lambda disk: disk.snapshots.create("one"),
    lambda disk: disk.write(10_000, b"b" * 20_000),
    lambda disk: disk.write_zeroes(2048, 9000, unmap=True),
    lambda disk: disk.flush(),
    lambda disk: disk.snapshots.create("two"),
    lambda disk: disk.discard(16 * KiB, 32 * KiB),
    lambda disk: disk.truncate(SIZE + 128 * KiB),
    lambda disk: disk.write(SIZE, b"c" * 3000),
    lambda disk: disk.write_compressed(128 * KiB, b"d" * 16 * KiB),
    lambda disk: disk.bitmaps["b"].clear(),
    BATCH,
    lambda disk: disk.write_runs([(start * KiB, memoryview(b"f" * 32 * KiB)) for start in (176, 224)]),
    lambda disk: disk.snapshots["two"].delete(),
    lambda disk: disk.flush(),
    lambda disk: disk.snapshots["one"].apply(),
    lambda disk: disk.snapshots["one"].delete(),
    lambda disk: disk.write(70_000, b"e" * 5000),
]
IMAGES: Final[dict[str, dict[str, Any]]] = {
    "subclusters": {"cluster_size": "16k", "extended_l2": "on"},
    "subclusters, lazy refcounts": {"cluster_size": "16k", "extended_l2": "on", "lazy_refcounts": "on"},
    "small clusters": {"cluster_size": 4096, "refcount_bits": 64},
}


class Host(RecordingNode):
    """Requests are counted; one of them fails."""

    def __init__(self, data: bytes, failing: int, errno: int) -> None:
        super().__init__(data=data)
        self.n = 0
        self.failed = ""
        self._failing, self._errno = failing, errno
        self.before_write = lambda _offset, _length: self._count("write")
        self.before_discard = lambda _offset, _length: self._count("discard")
        self.before_barrier = lambda: self._count("barrier")

    def _count(self, kind: str) -> None:
        self.n += 1
        if self.n == self._failing:
            self.failed = kind
            raise StorageError("the host does not want to", errno=self._errno, operation="injected")


def session(host: Host) -> tuple[bool, bool]:
    """Take all steps, each that fails a second time; (whether a caller heard of the fault, whether the image is poisoned)."""
    disk = disk_on(host)
    heard = False
    for step in STEPS:
        for attempt in range(2):
            try:
                step(disk)
                break
            except PoisonedError:
                disk.abandon()
                return heard, True
            except StorageError as exc:
                cause = exc.__cause__ if isinstance(exc, BatchError) else exc
                if not isinstance(cause, StorageError) or (cause.operation != "injected" and step is not BATCH):
                    raise
                heard = True
                assert attempt == 0, "a request fails twice"
                if disk.node.poisoned is None:
                    readable = disk.read(0, disk.size)
                    assert len(readable) == disk.size
            except BlocklibError:
                if attempt:  # what the first attempt has done after all cannot be done again
                    break
                raise
    try:
        disk.close()
    except BlocklibError:
        heard = True
    return heard, False


def in_time(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("errno", [EIO, ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", IMAGES)
def test_whichever_request_fails_the_image_is_sound_and_somebody_hears_of_it(name: str, errno: int) -> None:
    batch.expect(1_000_000, writing=True)
    start = new_image(SIZE, IMAGES[name])
    whole = Host(start, 0, errno)
    assert session(whole) == (False, False)
    assert whole.n > 60
    final = _content(bytes(whole.data))
    for failing in range(1, whole.n + 1):
        host = Host(start, failing, errno)

        def work(host: Host = host, failing: int = failing) -> None:
            heard, poisoned = session(host)
            assert host.failed
            # A discard is only a hint, and a host without room may find it on the second try.
            assert heard or host.failed == "discard" or errno == ENOSPC
            with disk_on(RecordingNode(data=bytes(host.data))) as disk:
                node = disk.node
                assert isinstance(node, Qcow2Node)
                report = node.check()
                assert not report.corruptions, (failing, report.findings)
                for snapshot in disk.snapshots:
                    assert snapshot.name in ("one", "two")
                disk.write(0, b"x" * 100_000)
                disk.snapshots.create("later")
            if not poisoned and not heard:
                assert _content(bytes(host.data)) == final, failing

        in_time(work)


def _content(image: bytes) -> bytes:
    with disk_on(RecordingNode(data=image), writable=False) as disk:
        return disk.read(0, disk.size)
