"""The qcow2 driver against the contract of nodes: versions, cluster sizes, refcount widths, and over a backing file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import blocklib
from blocklib.drivers import load
from blocklib.formats.qcow2.node import Qcow2Node
from blocklib.graph import Transaction
from blocklib.node import Node
from blocklib.options import check_options
from tests.conformance.node_tests import NodeTests


class TestQcow2(NodeTests):
    is_exact = False
    options: ClassVar[dict[str, Any]] = {}
    node_options: ClassVar[dict[str, Any]] = {}

    def make(self, folder: Path) -> Node:
        blocklib.create(folder / "disk", self.size, format="qcow2", options=self.options)
        return self.open_again(folder, read_only=False)

    def open_again(self, folder: Path, *, read_only: bool) -> Qcow2Node:
        file = load("file").from_options(check_options("file", {"filename": str(folder / "disk")}), read_only=read_only)
        file.load()
        options = check_options("qcow2", {"file": {}, **self.node_options})
        node = Qcow2Node.from_options(options, read_only=read_only, filename=file.filename)
        with Transaction() as change:
            change.attach(node, "file", file)
        node.load()
        if node.needs_data_file:
            data = load("file").from_options(check_options("file", {"filename": str(folder / "data")}), read_only=read_only)
            data.load()
            with Transaction() as change:
                change.attach(node, "data-file", data)
        return node


class TestQcow2OfVersion2(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"compat": "0.10"}


class TestQcow2WithTheSmallestClustersAndCounts(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 512, "refcount_bits": 1}


class TestQcow2WithTheLargestClustersAndCounts(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"cluster_size": "2M", "refcount_bits": 64}


class TestQcow2WithATinyCache(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 512}
    node_options: ClassVar[dict[str, Any]] = {"l2-cache-size": 1024, "l2-cache-entry-size": 512}


class TestQcow2WithADataFile(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"data_file": "data"}


class TestQcow2WithARawDataFile(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"data_file": "data", "data_file_raw": True, "cluster_size": 4096}


class TestQcow2WithSubclusters(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"extended_l2": True, "cluster_size": "16k"}


class TestQcow2WithSubclustersInARawDataFile(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"extended_l2": True, "data_file": "data", "data_file_raw": True}


class TestQcow2WithPreallocatedSubclusters(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"extended_l2": True, "preallocation": "falloc"}


class TestQcow2WithARawDataFileAndSubclusters(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"data_file": "data", "data_file_raw": True, "extended_l2": True}


class TestQcow2Preallocated(TestQcow2):
    options: ClassVar[dict[str, Any]] = {"preallocation": "metadata"}
