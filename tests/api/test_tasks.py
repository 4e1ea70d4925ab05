"""The tasks of the API page, one test each: what a user types, on real images.

Names, defaults, return types and error fields are promises; the lines are those of the page as far as a test allows.
Tasks whose parts do not exist yet are not here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import blocklib
from blocklib import GiB, KiB, MiB, TiB, jobs, policy
from tests.api.images import PATTERN, make_chain, make_disk, make_raw, patch, set_incompatible
from tests.programs import Program


def test_task_1_open_and_read() -> None:
    make_disk("disk.qcow2")
    make_raw("disk.img", 1 * MiB, PATTERN)
    make_raw("json:{}", 1 * MiB, PATTERN)
    with blocklib.open("disk.qcow2") as disk:
        sector = disk.read(0, 512)
        assert type(sector) is bytes
        assert sector == PATTERN[:512]
        buffer = bytearray(1 * MiB)
        assert disk.readinto(64 * KiB, buffer) is None  # type: ignore[func-returns-value]
        assert buffer[960 * KiB :][:4096] == PATTERN
        assert disk.size == 10 * GiB
        info = disk.info()
        assert isinstance(info, blocklib.ImageInfo)
        assert info.cluster_size == 64 * KiB
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.cluster_size = 1  # type: ignore[misc]
        with pytest.raises(blocklib.OutOfRangeError):
            disk.read(10 * GiB - 511, 512)
        assert disk.mode == "r"
    blocklib.open("disk.img", format="raw").close()
    with pytest.raises(blocklib.FormatMismatchError, match="format='raw'"):
        blocklib.open("disk.img")
    blocklib.open(Path("json:{}"), format="raw").close()


def test_task_2_open_a_chain_safely(folder: Path) -> None:
    make_chain()
    content = b"g" * (64 * KiB) + b"b" * (64 * KiB) + b"t" * (64 * KiB) + b"g" * (64 * KiB)

    disk = blocklib.open("top.qcow2", format="qcow2", references=policy.SameDirectory(max_depth=8))
    with disk:
        assert disk.read(0, 256 * KiB) == content
    disk = blocklib.open("top.qcow2", format="qcow2", references=policy.AllowList(["base.qcow2", "golden.img"]))
    with disk:
        assert disk.read(0, 256 * KiB) == content
    disk = blocklib.open("top.qcow2", format="qcow2", references="allow")
    with disk:
        assert disk.read(0, 256 * KiB) == content

    pool = folder / "pool"
    pool.mkdir()
    for name in ("base.qcow2", "golden.img"):
        os.link(name, pool / name)
    disk = blocklib.open("top.qcow2", format="qcow2", references=lambda ref: pool / Path(ref.name).name)
    with disk:
        assert disk.read(0, 256 * KiB) == content
        assert [node.filename for node in disk.chain()][1:] == [str(pool / "base.qcow2"), str(pool / "golden.img")]

    disk = blocklib.open("top.qcow2", backing={"driver": "raw", "file.filename": "golden.img"})
    with disk:
        assert disk.read(64 * KiB, 64 * KiB) == b"g" * (64 * KiB)
    disk = blocklib.open("top.qcow2", backing=None)
    with disk:
        assert disk.read(0, 128 * KiB) == bytes(128 * KiB)

    info = blocklib.info("top.qcow2")
    assert (info.backing_filename, info.backing_format) == ("base.qcow2", "qcow2")

    with blocklib.open("top.qcow2", format="qcow2", references="allow") as disk:
        assert repr(disk) == "<Disk r 10 GiB: top.qcow2 (qcow2) -> base.qcow2 (qcow2) -> golden.img (raw)>"
        assert str(disk) == repr(disk)
        seen = []
        for depth, node in enumerate(disk.chain()):
            assert isinstance(node, blocklib.NodeInfo)
            seen.append((depth, bool(node.name), node.driver, node.filename))
        assert seen == [
            (0, True, "qcow2", "top.qcow2"),
            (1, True, "qcow2", "base.qcow2"),
            (2, True, "raw", "golden.img"),
        ]


def test_task_3_create_and_create_an_overlay(folder: Path) -> None:
    info = blocklib.create("disk.qcow2", 10 * GiB, format="qcow2")
    assert isinstance(info, blocklib.ImageInfo)
    assert (info.filename, info.format, info.virtual_size, info.cluster_size) == ("disk.qcow2", "qcow2", 10 * GiB, 64 * KiB)
    blocklib.open("disk.qcow2", "r+").close()  # nothing stayed open or locked

    (folder / "images").mkdir()
    blocklib.create("images/base.qcow2", 3 * GiB, format="qcow2")
    info = blocklib.create("images/top.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2")
    assert info.virtual_size == 3 * GiB
    assert info.backing_filename == "base.qcow2"
    assert info.full_backing_filename == "images/base.qcow2"

    info = blocklib.create(
        "big.qcow2", 4 * TiB, format="qcow2", options={"cluster_size": 2 * MiB, "preallocation": "metadata"}
    )
    assert (info.virtual_size, info.cluster_size) == (4 * TiB, 2 * MiB)
    with blocklib.open("big.qcow2") as disk:
        assert all(extent.present for extent in disk.extents())

    with pytest.raises(blocklib.ImageExistsError):
        blocklib.create("disk.qcow2", 1 * GiB, format="qcow2")
    assert blocklib.info("disk.qcow2").virtual_size == 10 * GiB
    blocklib.create("disk.qcow2", 1 * GiB, format="qcow2", overwrite=True)
    assert blocklib.info("disk.qcow2").virtual_size == 1 * GiB


def test_task_4_write(qemu_img: Program) -> None:
    make_disk("disk.qcow2")
    with blocklib.open("disk.qcow2", "r+") as disk:
        disk.write(1 * MiB, b"hello")
        with pytest.raises(blocklib.OutOfRangeError):
            disk.write(10 * GiB - 4, b"hello")
        disk.write(2 * MiB, bytes(4096), fua=True)
        disk.write_zeroes(1 * GiB, 64 * MiB, unmap=True)
        disk.discard(2 * GiB, 1 * GiB)
        disk.truncate(12 * GiB)
        assert disk.size == 12 * GiB
        with pytest.raises(blocklib.UsageError, match="shrink=True"):
            disk.truncate(10 * GiB)
        assert disk.size == 12 * GiB
        disk.flush()
        assert disk.read(1 * MiB, 5) == b"hello"
    with blocklib.open("disk.qcow2", "r+") as disk:
        assert disk.read(1 * MiB, 8) == b"hello" + PATTERN[5:8]
        assert disk.read(1 * GiB, 4096) == bytes(4096)
        disk.truncate(10 * GiB, shrink=True)
    assert blocklib.info("disk.qcow2").virtual_size == 10 * GiB
    qemu_img("check", "disk.qcow2")


def test_task_5_extents_one_by_one_or_as_a_table() -> None:
    make_chain()
    with blocklib.open("top.qcow2", format="qcow2", references="allow") as disk:
        extents = disk.extents(0, 1 * GiB)
        assert isinstance(extents, Iterator)
        found = []
        end = 0
        for extent in extents:
            assert isinstance(extent, blocklib.Extent)
            assert isinstance(extent, tuple)
            assert extent.offset == end
            end += extent.length
            for flag in (extent.data, extent.zero, extent.present, extent.compressed):
                assert type(flag) is bool
            if extent.data:
                found.append((extent.offset, extent.length, extent.depth, extent.host_offset is not None))
            else:
                assert extent.zero
        assert end == 1 * GiB
        assert found == [
            (0, 64 * KiB, 2, True),
            (64 * KiB, 64 * KiB, 1, True),
            (128 * KiB, 64 * KiB, 0, True),
            (192 * KiB, MiB - 192 * KiB, 2, True),
        ]

        table = disk.map()
        assert isinstance(table, np.ndarray)
        assert table.ndim == 1
        assert table.dtype == blocklib.EXTENT_DTYPE
        assert set(blocklib.Extent._fields) == set(table.dtype.names or ())
        used = int(table["length"][table["data"]].sum())
        assert used == 1 * MiB
        own = table[table["depth"] == 0]
        assert own["offset"].tolist() == [128 * KiB]
        above = disk.map(base=disk.chain()[1])
        assert above[above["present"]]["offset"].tolist() == [128 * KiB]
        names = list(blocklib.Extent._fields)
        rows = [tuple(-1 if field is None else field for field in extent) for extent in disk.extents()]
        assert rows == table[names].tolist()


def test_task_6_convert_with_progress() -> None:
    make_disk("disk.qcow2")
    make_chain()
    shown: list[tuple[float, float, float | None]] = []

    def show(p: blocklib.Progress) -> None:
        print(f"{p.fraction:6.1%} {p.rate / MiB:.0f} MiB/s")
        assert 0 <= p.done <= p.total
        shown.append((p.fraction, p.rate, p.eta))

    result = blocklib.convert("disk.qcow2", "disk.img", format="raw", progress=show)
    assert isinstance(result, blocklib.ConvertResult)
    assert result.seconds > 0
    assert shown[-1][0] == 1.0
    with blocklib.open("disk.img", format="raw") as disk:
        assert disk.size == 10 * GiB
        assert disk.read(1 * MiB, 4096) == PATTERN

    with blocklib.open("top.qcow2", format="qcow2", references=policy.SameDirectory()) as source:
        blocklib.convert(source, "flat.qcow2", format="qcow2")
        with pytest.raises(blocklib.ImageExistsError):
            blocklib.convert(source, "flat.qcow2", format="qcow2")
        blocklib.convert(source, "flat.qcow2", format="qcow2", overwrite=True)
        assert not source.closed
    with blocklib.open("flat.qcow2") as disk:
        assert len(disk.chain()) == 1
        assert disk.read(0, 192 * KiB) == b"g" * (64 * KiB) + b"b" * (64 * KiB) + b"t" * (64 * KiB)

    class StopError(Exception):
        pass

    def stop(_progress: blocklib.Progress) -> None:
        raise StopError

    with pytest.raises(StopError):
        blocklib.convert("disk.qcow2", "stopped.img", format="raw", progress=stop)
    assert not Path("stopped.img").exists()


def test_task_12_check_and_repair_with_a_plan() -> None:
    make_disk("disk.qcow2")
    report = blocklib.check("disk.qcow2")
    assert isinstance(report, blocklib.CheckReport)
    assert report.clean
    assert (report.corruptions, report.leaks, report.findings) == (0, 0, ())
    assert report.image_end_offset == Path("disk.qcow2").stat().st_size
    # A leak: entry 100 of the refcount block, in the third cluster, counts a cluster that nobody uses.
    patch("disk.qcow2", 2 * 65536 + 100 * 2, b"\0\1")
    patch("disk.qcow2", 101 * 65536 - 1, b"\0")

    report = blocklib.check("disk.qcow2")
    assert not report.clean
    assert (report.corruptions, report.leaks) == (0, 1)
    for finding in report.findings:
        assert isinstance(finding, blocklib.Finding)
        assert finding.kind == "leak"
        assert finding.host_offset == 100 * 65536
        assert all(text in str(finding) for text in (finding.structure, finding.expected, finding.found))
    before = Path("disk.qcow2").read_bytes()
    plan = blocklib.repair("disk.qcow2", "all", dry_run=True)
    assert isinstance(plan, blocklib.RepairReport)
    assert plan.before == report
    assert plan.after is None
    assert "\n".join(map(str, plan.steps))
    assert Path("disk.qcow2").read_bytes() == before
    done = blocklib.repair("disk.qcow2", "all", expect=plan)
    assert done.steps == plan.steps
    assert done.after is not None
    assert done.after.clean
    assert blocklib.check("disk.qcow2").clean
    with pytest.raises(blocklib.StalePlanError):
        blocklib.repair("disk.qcow2", "all", expect=plan)


def test_task_13_inspect_an_upload() -> None:
    make_chain()
    verdict = blocklib.inspect(Path("top.qcow2"))
    assert isinstance(verdict, blocklib.Inspection)
    assert not verdict.safe
    with pytest.raises(SystemExit, match=r"^the image has a backing file, 'base\.qcow2'$"):
        raise SystemExit("; ".join(check.message for check in verdict.checks.values() if not check.passed))
    assert [reference.name for reference in verdict.references] == ["base.qcow2"]
    assert {"backing_file", "data_file", "unknown_features"} < set(verdict.checks)

    make_disk("upload.bin")
    inspector = blocklib.Inspector()
    with Path("upload.bin").open("rb") as stream, Path("saved.bin").open("wb") as saved:
        while chunk := stream.read(1 * MiB):
            inspector.feed(chunk)
            saved.write(chunk)
    verdict = inspector.finish()
    assert verdict == blocklib.inspect(Path("saved.bin"))
    assert verdict.safe
    assert (verdict.formats, verdict.virtual_size, verdict.encrypted) == (("qcow2",), 10 * GiB, False)
    with Path("upload.bin").open("rb") as stream:
        assert blocklib.inspect(stream) == verdict
    assert blocklib.inspect("upload.bin", limits=policy.Limits(virtual_size=1 * GiB)).limits_exceeded == ("virtual_size",)


def test_task_14_a_file_inside_archives_partitions(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text("from the archive")
    blocklib.create("backup.qcow2", 64 * MiB, format="qcow2")
    with blocklib.open("backup.qcow2", "r+") as disk, tarfile.open(fileobj=disk.as_file(), mode="w") as archive:
        archive.add("in/a.txt")
    with blocklib.open("backup.qcow2") as disk, tarfile.open(fileobj=disk.as_file()) as archive:
        archive.extractall("out", filter="data")
    assert (folder / "out" / "in" / "a.txt").read_text() == "from the archive"

    blocklib.create("vm.qcow2", 1 * GiB, format="qcow2")
    with blocklib.open("vm.qcow2", "r+") as disk:
        disk.write(1 * MiB + 0x438, b"\x53\xef")
    with blocklib.open("vm.qcow2") as disk:
        part = io.BufferedReader(disk.as_file(offset=1 * MiB, length=512 * MiB), buffer_size=1 * MiB)
        part.seek(0x438)
        assert part.read(2) == b"\x53\xef"
        part.close()
        assert not disk.closed
        assert disk.read(1 * MiB + 0x438, 2) == b"\x53\xef"


def test_task_16_asyncio() -> None:
    make_disk("vm.qcow2")

    async def copy_and_look(disk: blocklib.Disk) -> None:
        first, second = await asyncio.gather(
            asyncio.to_thread(disk.read, 0, 4096), asyncio.to_thread(disk.read, 1 * GiB, 4096)
        )
        assert (first, second) == (PATTERN, bytes(4096))
        job = jobs.convert(disk, "copy.qcow2", format="qcow2")
        try:
            await asyncio.to_thread(job.wait)
        except asyncio.CancelledError:
            job.cancel()
            raise

    with blocklib.open("vm.qcow2") as disk:
        asyncio.run(copy_and_look(disk))
    with blocklib.open("copy.qcow2") as copy:
        assert copy.read(1 * MiB, 4096) == PATTERN


def _open_as_task_17(name: str) -> tuple[object, ...]:
    """The ladder of task 17; what each branch prints."""
    try:
        disk = blocklib.open(name, "r+")
    except blocklib.PolicyError as exc:
        return exc.reference.kind, exc.reference.name, exc.reference.depth
    except blocklib.LockedError as exc:
        return exc.filename, exc.permission, exc.pid
    except blocklib.UnsupportedFeatureError as exc:
        return exc.features
    except blocklib.ImageError as exc:
        return exc.structure, exc.host_offset, exc.expected, exc.found
    except blocklib.StorageError as exc:
        return exc.errno, exc.operation, exc.node
    disk.close()
    return ()


def test_task_17_errors_by_class() -> None:
    make_disk("vm.qcow2")
    assert _open_as_task_17("vm.qcow2") == ()
    make_chain()
    assert _open_as_task_17("top.qcow2") == ("backing", "base.qcow2", 1)
    with blocklib.open("vm.qcow2", "r+"):
        assert _open_as_task_17("vm.qcow2") == ("vm.qcow2", "write", os.getpid())
        with pytest.raises(BlockingIOError):
            blocklib.open("vm.qcow2")
        with blocklib.open("vm.qcow2", force_share=True) as reader:
            assert reader.read(0, 4096) == PATTERN
    make_disk("new.qcow2")
    set_incompatible("new.qcow2", 1 << 40)
    (feature,) = _open_as_task_17("new.qcow2")
    assert "40" in str(feature)
    make_disk("bad.qcow2")
    patch("bad.qcow2", 20, (33).to_bytes(4, "big"))
    structure, host_offset, expected, found = _open_as_task_17("bad.qcow2")
    assert "cluster_bits" in str(structure)
    assert host_offset == 20
    assert "21" in str(expected)
    assert "33" in str(found)
    assert _open_as_task_17("missing.qcow2") == (2, "open", "missing.qcow2")


def test_task_18_options_qemus_way() -> None:
    make_disk("disk.qcow2")
    make_raw("golden.img", 10 * GiB, b"g" * MiB)
    make_raw("disk.img", 2 * MiB, PATTERN)
    disk = blocklib.open(
        "disk.qcow2", "r+", cache="none", discard="unmap", detect_zeroes="unmap", options={"l2-cache-size": 8 * MiB}
    )
    with disk:
        assert disk.read(0, 4096) == PATTERN
    disk = blocklib.open(
        {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "disk.qcow2"},
            "backing.driver": "raw",
            "backing.file.filename": "golden.img",
        }
    )
    with disk:
        assert [node.driver for node in disk.chain()] == ["qcow2", "raw"]
        assert disk.read(512 * KiB, 1) == b"g"
    disk = blocklib.open(
        blocklib.parse_options('json:{"driver": "raw", "size": 1048576, "file": {"driver": "file", "filename": "disk.img"}}')
    )
    with disk:
        assert (disk.size, disk.read(0, 4096)) == (1 * MiB, PATTERN)
    disk = blocklib.open(blocklib.parse_options("driver=qcow2,file.filename=disk.qcow2,lazy-refcounts=on"))
    with disk:
        assert disk.read(0, 4096) == PATTERN
    text = blocklib.describe_options("qcow2")
    assert text.startswith("Supported qcow2 options:\n")
    assert "cluster_size=<size>" in text
