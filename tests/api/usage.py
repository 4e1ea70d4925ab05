"""How the library is used, task by task, as the API page shows it: checked by mypy here, run by test_types.py.

What each call gives is written down with `assert_type`, so that a type that drifts fails `make types`.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, assert_type

import numpy as np
from numpy.typing import NDArray

import blocklib
from blocklib import GiB, KiB, MiB, TiB, jobs, policy


def open_and_read() -> None:
    with blocklib.open("disk.qcow2") as disk:
        assert_type(disk, blocklib.Disk)
        sector = disk.read(0, 512)
        assert_type(sector, bytes)
        buffer = bytearray(1 * MiB)
        disk.readinto(64 * KiB, buffer)
        disk.readinto(64 * KiB, memoryview(buffer)[:512])
        disk.readinto(64 * KiB, np.empty(512, dtype=np.uint8))
        print(disk.size, disk.info().cluster_size)
        assert_type(disk.size, int)
        assert_type(disk.info(), blocklib.ImageInfo)
        assert_type(disk.info().cluster_size, int | None)
        assert_type(disk.mode, Literal["r", "r+"])
    blocklib.open("disk.img", format="raw").close()
    blocklib.open(Path("json:{}"), format="raw").close()


def open_a_chain_safely() -> None:
    disk = blocklib.open("top.qcow2", format="qcow2", references=policy.SameDirectory(max_depth=8))
    disk.close()
    disk = blocklib.open("top.qcow2", format="qcow2", references=policy.AllowList(["base.qcow2", "golden.img"]))
    disk.close()
    disk = blocklib.open("top.qcow2", format="qcow2", references="allow")
    disk.close()
    disk = blocklib.open("top.qcow2", format="qcow2", references=lambda ref: Path("pool") / Path(ref.name).name)
    disk.close()

    def decide(reference: blocklib.Reference) -> str | None:
        assert_type(reference.depth, int)
        return reference.name if reference.depth < 9 and reference.format is not None else None

    disk = blocklib.open("top.qcow2", format="qcow2", references=decide)
    disk.close()
    disk = blocklib.open("top.qcow2", backing={"driver": "raw", "file.filename": "golden.img"})
    disk.close()
    disk = blocklib.open("top.qcow2", backing=None)
    disk.close()
    info = blocklib.info("top.qcow2")
    assert_type(info, blocklib.ImageInfo)
    with blocklib.open("top.qcow2", format="qcow2", references="allow") as disk:
        print(disk)
        for depth, node in enumerate(disk.chain()):
            print(depth, node.name, node.driver, node.filename)
            assert_type(node, blocklib.NodeInfo)
            assert_type(node.filename, str | None)
        assert_type(disk.chain(), tuple[blocklib.NodeInfo, ...])


def create_and_create_an_overlay() -> None:
    info = blocklib.create("new.qcow2", 10 * GiB, format="qcow2")
    assert_type(info, blocklib.ImageInfo)
    blocklib.create(Path("new-top.qcow2"), format="qcow2", backing="new.qcow2", backing_format="qcow2")
    blocklib.create("big.qcow2", 4 * TiB, format="qcow2", options={"cluster_size": 2 * MiB, "preallocation": "metadata"})
    blocklib.create("new.qcow2", 10 * GiB, format="qcow2", overwrite=True)


def write() -> None:
    with blocklib.open("disk.qcow2", "r+") as disk:
        disk.write(1 * MiB, b"hello")
        disk.write(1 * MiB, np.arange(4, dtype=np.uint16))
        disk.write(2 * MiB, bytes(4096), fua=True)
        disk.write_zeroes(1 * GiB, 64 * MiB, unmap=True)
        disk.discard(2 * GiB, 1 * GiB)
        disk.truncate(12 * GiB)
        disk.truncate(10 * GiB, shrink=True)
        disk.flush()


def extents_one_by_one_or_as_a_table() -> None:
    with blocklib.open("top.qcow2", format="qcow2", references="allow") as disk:
        assert_type(disk.extents(0, 1 * GiB), Iterator[blocklib.Extent])
        for extent in disk.extents(0, 1 * GiB):
            if extent.data:
                print(extent.offset, extent.length, extent.depth, extent.host_offset)
            assert_type(extent.host_offset, int | None)
            assert_type(extent.zero or extent.present or extent.compressed, bool)
        table = disk.map()
        array: NDArray[Any] = table
        used = int(table["length"][table["data"]].sum())
        own = table[table["depth"] == 0]
        above = disk.map(base=disk.chain()[1])
        print(used, len(own), len(above), array.dtype == blocklib.EXTENT_DTYPE)


def show(p: blocklib.Progress) -> None:
    print(f"{p.fraction:6.1%} {p.rate / MiB:.0f} MiB/s")
    assert_type(p.done, int)
    assert_type(p.eta, float | None)


def internal_snapshots() -> None:
    with blocklib.open("disk.qcow2", "r+") as disk:
        snapshot = disk.snapshots.create("before-upgrade")
        for snapshot in disk.snapshots:
            print(snapshot.id, snapshot.name, snapshot.created.isoformat())
        first: blocklib.InternalSnapshot = disk.snapshots.by_id("1")
        print("before-upgrade" in disk.snapshots, len(disk.snapshots), first.vm_state_size)
        disk.snapshots["before-upgrade"].apply()
    with blocklib.open("disk.qcow2", options={"snapshot.name": "before-upgrade"}) as past:
        past.read(0, 512)


def convert_with_progress() -> None:
    blocklib.convert("disk.qcow2", "copy.img", format="raw", progress=show)
    with blocklib.open("top.qcow2", format="qcow2", references=policy.SameDirectory()) as source:
        result = blocklib.convert(source, "flat.qcow2", format="qcow2", overwrite=True)
    assert_type(result, blocklib.ConvertResult)
    print(f"{result.bytes_read} {result.bytes_written} in {result.seconds:.1f} s")


def check_and_repair_with_a_plan(answer: str = "yes") -> None:
    report = blocklib.check("disk.qcow2")
    assert_type(report, blocklib.CheckReport)
    print(report.clean, report.corruptions, report.leaks, report.image_end_offset)
    for finding in report.findings:
        print(finding)
        assert_type(finding, blocklib.Finding)
        assert_type(finding.host_offset, int | None)
    plan = blocklib.repair("disk.qcow2", "all", dry_run=True)
    assert_type(plan, blocklib.RepairReport)
    print("\n".join(map(str, plan.steps)))
    if answer == "yes":
        blocklib.repair("disk.qcow2", "all", expect=plan)


def inspect_an_upload() -> None:
    verdict = blocklib.inspect(Path("disk.img"))
    assert_type(verdict, blocklib.Inspection)
    assert_type(verdict.checks["null"], blocklib.Check)
    assert_type(verdict.virtual_size, int | None)
    assert_type(verdict.references, tuple[blocklib.Reference, ...])
    if not verdict.safe:
        raise SystemExit("; ".join(check.message for check in verdict.checks.values() if not check.passed))
    inspector = blocklib.Inspector(expect="raw", limits=policy.Limits(virtual_size=10 * GiB))
    with Path("disk.img").open("rb") as stream, Path("saved.bin").open("wb") as saved:
        while chunk := stream.read(1 * MiB):
            inspector.feed(chunk)
            saved.write(chunk)
    assert_type(inspector.finish(), blocklib.Inspection)
    with Path("saved.bin").open("rb") as stream:
        print(blocklib.inspect(stream).formats)


def a_file_inside() -> None:
    with blocklib.open("backup.img", format="raw") as disk, tarfile.open(fileobj=disk.as_file()) as archive:
        archive.extractall("out", filter="data")
    with blocklib.open("disk.qcow2") as disk:
        part = io.BufferedReader(disk.as_file(offset=1 * MiB, length=512 * MiB), buffer_size=1 * MiB)
        part.seek(0x438)
        print(part.read(2))


async def copy_and_look(disk: blocklib.Disk) -> None:
    first, second = await asyncio.gather(asyncio.to_thread(disk.read, 0, 4096), asyncio.to_thread(disk.read, 1 * GiB, 4096))
    print(first == second)
    job = jobs.convert(disk, "copy.qcow2", format="qcow2")
    assert_type(job, jobs.Job[blocklib.ConvertResult])
    try:
        await asyncio.to_thread(job.wait)
    except asyncio.CancelledError:
        job.cancel()
        raise
    assert_type(job.wait(), blocklib.ConvertResult)
    assert_type(job.progress, blocklib.Progress)


def with_asyncio() -> None:
    with blocklib.open("disk.qcow2") as disk:
        asyncio.run(copy_and_look(disk))


def errors_by_class(name: str = "missing.qcow2") -> None:
    try:
        disk = blocklib.open(name, "r+")
    except blocklib.PolicyError as exc:
        print(exc.reference.kind, exc.reference.name, exc.reference.depth)
    except blocklib.LockedError as exc:
        print(exc.filename, exc.permission, exc.pid)
        assert_type(exc.pid, int | None)
    except blocklib.UnsupportedFeatureError as exc:
        print(exc.features)
        assert_type(exc.features, tuple[str, ...])
    except blocklib.ImageError as exc:
        print(exc.structure, exc.host_offset, exc.expected, exc.found)
        assert_type(exc.structure, str | None)
        assert_type(exc.host_offset, int | None)
    except blocklib.StorageError as exc:
        print(exc.errno, exc.operation, exc.node)
        assert_type(exc.operation, str | None)
    else:
        disk.close()


def options_qemus_way() -> None:
    disk = blocklib.open(
        "disk.qcow2", "r+", cache="writeback", discard="unmap", detect_zeroes="unmap", options={"l2-cache-size": 8 * MiB}
    )
    disk.close()
    disk = blocklib.open(
        {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "disk.qcow2"},
            "backing.driver": "raw",
            "backing.file.filename": "golden.img",
        }
    )
    disk.close()
    disk = blocklib.open(
        blocklib.parse_options('json:{"driver": "raw", "size": 1048576, "file": {"driver": "file", "filename": "disk.img"}}')
    )
    disk.close()
    disk = blocklib.open(blocklib.parse_options("driver=qcow2,file.filename=disk.qcow2,lazy-refcounts=on"))
    disk.close()
    with blocklib.open("golden.img", format="raw") as golden:
        blocklib.open({"driver": "qcow2", "file": "top.qcow2", "backing": golden}).close()
    print(blocklib.describe_options("qcow2"))
    assert_type(blocklib.parse_size("10G"), int)
    assert_type(blocklib.format_size(10 * GiB), str)
