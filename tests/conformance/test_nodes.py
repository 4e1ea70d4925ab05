"""Every driver that can be written against the contract of nodes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from blocklib.errors import StorageError
from blocklib.filters.blkdebug import BlkdebugNode
from blocklib.filters.blklogwrites import BlkLogWritesNode
from blocklib.formats.raw import RawNode
from blocklib.graph import Transaction
from blocklib.node import Node
from blocklib.options import check_options
from blocklib.protocols import host
from blocklib.protocols.file import FileNode, HostDeviceNode
from blocklib.protocols.memory import MemoryNode
from tests.conformance.node_tests import NodeTests
from tests.nodes import attached, loop_device


class TestFile(NodeTests):
    direct = False

    def make(self, folder: Path) -> Node:
        with (folder / "disk").open("wb") as file:
            file.truncate(self.size)
        return self.open_again(folder, read_only=False)

    def open_again(self, folder: Path, *, read_only: bool) -> FileNode:
        node = FileNode(None, str(folder / "disk"), read_only=read_only, direct=self.direct)
        try:
            node.load()
        except StorageError as exc:
            if self.direct and exc.errno == errno.EINVAL:
                pytest.skip("the file system of the tests has no direct I/O")
            raise
        return node


class TestFileWithDirectIo(TestFile):
    direct = True


class TestFileWithoutFallocate(TestFile):
    @pytest.fixture(autouse=True)
    def _old_file_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: int) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(host, "fallocate", unsupported)


class TestFileWithDirectIoAndWithoutFallocate(TestFileWithoutFallocate):
    direct = True


class TestMemory(NodeTests):
    def make(self, folder: Path) -> Node:
        return MemoryNode(None, self.size)


class TestMemoryThatInsistsOnAlignment(NodeTests):
    def make(self, folder: Path) -> Node:
        return MemoryNode(None, self.size, alignment=4096)


class TestRawOverFile(TestFile):
    is_exact = False

    def make(self, folder: Path) -> Node:
        return self._raw(super().make(folder))

    def open_again(self, folder: Path, *, read_only: bool) -> Node:  # type: ignore[override]
        return self._raw(super().open_again(folder, read_only=read_only))

    def _raw(self, file: Node) -> Node:
        if isinstance(file, RawNode):
            return file
        file.discard_passes = True
        return attached(RawNode(None, file.filename, read_only=file.read_only), file)


class TestRawOverFileWithDirectIo(TestRawOverFile):
    direct = True


class TestRawOverMemory(NodeTests):
    is_exact = False

    def make(self, folder: Path) -> Node:
        return attached(RawNode(None, None, read_only=False), MemoryNode(None, self.size))


class TestRawWindowThatIsAlignedToNothing(NodeTests):
    is_exact = False

    def make(self, folder: Path) -> Node:
        memory = MemoryNode(None, self.size + 777, alignment=512)
        return attached(RawNode(None, None, read_only=False, offset=777), memory)


class TestRawWindowOfFixedSize(NodeTests):
    can_resize = False

    def make(self, folder: Path) -> Node:
        memory = MemoryNode(None, self.size + 5000)
        return attached(RawNode(None, None, read_only=False, offset=3, size=self.size), memory)


class TestRawThatWasGuessed(NodeTests):
    is_exact = False

    def make(self, folder: Path) -> Node:
        return attached(RawNode(None, None, read_only=False, guessed=True), MemoryNode(None, self.size))


class TestWriteLog(NodeTests):
    sector_size = 512

    def make(self, folder: Path) -> Node:
        memory = MemoryNode(None, self.size)
        memory.discard_passes = True
        node = BlkLogWritesNode(None, None, read_only=False, sector_size=self.sector_size)
        with Transaction() as change:
            change.attach(node, "log", MemoryNode(None))
        return attached(node, memory)


class TestWriteLogInLargeSectors(TestWriteLog):
    sector_size = 4096


class TestBlockDevice(NodeTests):
    can_resize = False
    direct = False

    @pytest.fixture(autouse=True)
    def _device(self, tmp_path: Path) -> Iterator[None]:
        with loop_device(tmp_path / "backing", self.size) as self.path:
            yield

    def make(self, folder: Path) -> Node:
        return self.open_again(folder, read_only=False)

    def open_again(self, folder: Path, *, read_only: bool) -> Node:
        node = HostDeviceNode(None, self.path, read_only=read_only, direct=self.direct)
        node.load()
        return node


class TestBlockDeviceWithDirectIo(TestBlockDevice):
    direct = True


class TestBlkdebug(NodeTests):
    limits: ClassVar[Mapping[str, int]] = {}

    def make(self, folder: Path) -> Node:
        options = check_options("blkdebug", {"image": {}, **self.limits})
        return attached(BlkdebugNode.from_options(options, read_only=False), MemoryNode(None, self.size))


class TestBlkdebugWithLimits(TestBlkdebug):
    limits = {  # noqa: RUF012
        "align": 512,
        "max-transfer": 4096,
        "opt-write-zero": 1024,
        "max-write-zero": 8192,
        "opt-discard": 2048,
        "max-discard": 4096,
    }
