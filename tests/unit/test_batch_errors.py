"""Errors of many requests at once: none is lost because it did not come again."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from blocklib import batch
from blocklib.disk import Disk
from blocklib.errors import BatchError, PoisonedError
from blocklib.protocols.memory import MemoryNode
from tests.crash.recording import RecordingNode
from tests.crash.workload import disk_on, new_image


class PassingTrouble(MemoryNode):
    """One transfer of it fails."""

    def __init__(self, size: int, failing: int, number: int) -> None:
        super().__init__(None, size)
        self.failing, self.number = failing, number

    def transfer(self, offsets: Any, addresses: Any, lengths: Any, results: Any, *, writing: bool) -> None:
        super().transfer(offsets, addresses, lengths, results, writing=writing)
        if self.failing >= 0:
            self.failing -= len(results)
            if self.failing < 0:
                results[0] = self.number


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("writing", [False, True])
def test_an_error_that_passes_has_been_one(writing: bool, number: int) -> None:
    """But for a full host, which may have got room meanwhile."""
    batch.expect(1_000_000, writing=True)
    node = PassingTrouble(1 << 20, 0, number)
    with Disk(node, "r+") as disk:
        data = bytearray(b"x" * 64 * 512)
        offsets = range(0, 64 * 8192, 8192)
        request = (lambda: disk.write_batch(offsets, data)) if writing else (lambda: disk.read_batch(offsets, 512, data))
        if number == errno.ENOSPC:
            request()
        else:
            with pytest.raises(BatchError) as caught:
                request()
            assert set(caught.value.errnos) == {0, number}
            request()
        assert disk.read(0, 512) == (b"x" * 512 if writing else bytes(512))


def test_a_poisoned_node_says_so() -> None:
    batch.expect(1_000_000, writing=True)
    disk = disk_on(RecordingNode(data=new_image(1 << 20, {})))
    disk.node.poison("for a test")
    with pytest.raises(PoisonedError):
        disk.write_batch(range(0, 1 << 19, 65536), b"x" * 8 * 512)
    disk.abandon()
