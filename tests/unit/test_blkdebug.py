"""blkdebug: rules say which request fails, when and how, below a format and above it."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

import blocklib
from blocklib import KiB, MiB, NameNotFoundError, OptionError, StorageError, UsageError
from blocklib.disk import Disk
from blocklib.filters.blkdebug import BlkdebugNode
from blocklib.options.faults import EVENTS

Rule = Mapping[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    blocklib.create(path, 4 * MiB, format="qcow2")
    return path


def below(path: Path, rules: Sequence[Rule] = (), mode: Literal["r", "r+"] = "r+", **options: Any) -> Disk:
    """A qcow2 image whose file fails."""
    file: dict[str, Any] = {"driver": "blkdebug", "inject-error": rules, "image": str(path), **options}
    return blocklib.open({"driver": "qcow2", "file": file}, mode)


def filter_of(disk: Disk) -> BlkdebugNode:
    node = disk.node.children["file"].node
    assert isinstance(node, BlkdebugNode)
    return node


def top_of(disk: Disk) -> BlkdebugNode:
    """The filter that stands above the images."""
    edge = disk.node.parents[0]
    assert isinstance(edge.parent, BlkdebugNode)
    return edge.parent


# Which request -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "operation"),
    [
        ("cluster_alloc_space", "write"),
        ("write_aio", "write"),
        ("pwritev", "write"),
        ("refblock_update_part", "write"),
        ("l2_alloc_write", "write"),
        ("l1_update", "write"),
        ("flush_to_disk", "flush"),
        ("flush_to_os", "write"),
        ("cluster_alloc", "read"),  # of the refcount block
    ],
)
def test_an_event_of_the_image_makes_the_next_request_fail(path: Path, event: str, operation: str) -> None:
    disk = below(path, [{"event": event, "once": True, "errno": errno.ENOSPC}])
    with pytest.raises(StorageError) as caught:
        disk.write(0, b"x" * 70_000)
        disk.flush()
    assert (caught.value.errno, caught.value.operation, caught.value.node) == (errno.ENOSPC, operation, str(path))
    disk.abandon()


def test_metadata_is_no_data(path: Path) -> None:
    with below(path) as disk:
        disk.write(0, b"x" * 512)
    disk = below(path, [{"event": "read_aio", "once": True}], "r")  # opening reads the header and tables
    with pytest.raises(StorageError, match="injected"):
        disk.read(0, 512)
    assert disk.read(0, 512) == b"x" * 512
    disk.close()
    disk = below(path, [{"event": "l2_load", "once": True}], "r")
    with pytest.raises(StorageError, match="injected"):
        disk.read(0, 512)
    assert disk.read(0, 512) == b"x" * 512
    disk.close()


def test_an_event_can_fail_before_any_request(path: Path) -> None:
    with below(path, [{"event": "cluster_alloc", "immediately": True, "once": True}]) as disk:
        with pytest.raises(StorageError) as caught:
            disk.write(0, b"x" * 512)
        assert caught.value.operation == "cluster_alloc"
        disk.write(0, b"x" * 512)
    assert blocklib.check(path).clean


@pytest.mark.parametrize("iotype", ["read", "write", "write-zeroes", "discard", "flush", "truncate"])
def test_a_kind_of_request_fails_alone(tmp_path: Path, iotype: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * 64 * KiB)
    rule: dict[str, Any] = {"event": "none", "iotype": iotype}
    target: dict[str, Any] = {"driver": "blkdebug", "inject-error": [rule], "image": {"driver": "file", "filename": str(path)}}
    with blocklib.open(target, "r+", discard="unmap") as disk:
        requests: dict[str, Callable[[], object]] = {
            "read": lambda: disk.read(0, 512),
            "write": lambda: disk.write(0, b"x"),
            "write-zeroes": lambda: disk.write_zeroes(0, 4096),
            "discard": lambda: disk.discard(0, 4096),
            "truncate": lambda: disk.truncate(128 * KiB),
            "flush": lambda: disk.flush(),
        }
        failing = requests.pop(iotype)
        for request in requests.values():
            request()
        with pytest.raises(StorageError) as caught:
            failing()
        assert caught.value.operation == iotype


def test_truncations_fail_only_where_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    target: dict[str, Any] = {"driver": "blkdebug", "inject-error": [{"event": "none"}], "image": str(path)}
    disk = blocklib.open(target, "r+")
    disk.truncate(1024)
    with pytest.raises(StorageError):
        disk.read(0, 1)
    disk.abandon()


def test_only_requests_that_touch_the_sector_fail(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * KiB))
    target: dict[str, Any] = {"driver": "blkdebug", "inject-error": [{"event": "none", "sector": 3}], "image": str(path)}
    with blocklib.open(target) as disk:
        disk.read(0, 1536)
        disk.read(2048, 512)
        for offset, length in ((1535, 2), (2047, 1), (0, 4096)):
            with pytest.raises(StorageError):
                disk.read(offset, length)


def test_every_nth_request_after_the_first_ones_fails(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * KiB))
    rule: dict[str, Any] = {"event": "none", "skip": 2, "every": 3}
    outcomes = ""
    with blocklib.open({"driver": "blkdebug", "inject-error": [rule], "image": str(path)}) as disk:
        for _ in range(12):
            try:
                disk.read(0, 1)
                outcomes += "."
            except StorageError:
                outcomes += "x"
    assert outcomes == "..x..x..x..x"


def test_a_state_joins_rules(path: Path) -> None:
    """The second write of data fails, as in QEMU's example."""
    changes: list[Any] = [{"event": "write_aio", "state": 1, "new_state": 2}]
    with below(path, [{"event": "write_aio", "state": 2, "once": True}], "r+", **{"set-state": changes}) as disk:
        disk.write(0, b"x")
        assert filter_of(disk).state == 2
        with pytest.raises(StorageError):
            disk.write(0, b"y")
        assert disk.read(0, 1) == b"x"


# What happens then ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [0, 1, 700, 4096])
def test_a_short_write_moves_its_beginning_and_fails(tmp_path: Path, moved: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * 8192)
    rule: dict[str, Any] = {"event": "none", "iotype": "write", "once": True, "short": moved}
    with blocklib.open({"driver": "blkdebug", "inject-error": [rule], "image": str(path)}, "r+") as disk:
        with pytest.raises(StorageError):
            disk.write(1024, b"n" * 4096)
        assert disk.read(0, 8192) == b"o" * 1024 + b"n" * moved + b"o" * (7168 - moved)


def test_a_short_read_fails(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * 8192)
    rule: dict[str, Any] = {"event": "none", "iotype": "read", "once": True, "short": 100}
    with blocklib.open({"driver": "blkdebug", "inject-error": [rule], "image": str(path)}) as disk:
        buffer = bytearray(4096)
        with pytest.raises(StorageError):
            disk.readinto(0, buffer)
        assert buffer == b"o" * 100 + bytes(3996)
        disk.readinto(0, buffer)
        assert buffer == b"o" * 4096


def test_a_request_waits_and_a_drain_does_not(path: Path) -> None:
    hour = 3_600_000
    with blocklib.open(path, "r+") as disk:
        options: dict[str, Any] = {"inject-error": [{"event": "none", "iotype": "write", "errno": 0, "latency-ms": hour}]}
        inserted = disk.insert_filter("blkdebug", options)
        thread = threading.Thread(target=lambda: disk.write(0, b"late"))
        thread.start()
        while thread.is_alive():
            with pytest.raises(UsageError):  # too small; but the disk was drained for it
                disk.truncate(1 * MiB)
        inserted.remove()
        assert disk.read(0, 4) == b"late"


def test_the_process_is_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * 1024)
    rules = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.exit=on,inject-error.0.short=512"
    target = f"driver=blkdebug,image.driver=file,image.filename={path},{rules}"
    code = f"import blocklib; blocklib.open(blocklib.parse_options({target!r}), 'r+').write(0, b'n' * 1024); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-9, ""), done.stderr
    assert path.read_bytes() == b"n" * 512 + b"o" * 512


def test_a_thread_stops_at_a_breakpoint_until_it_is_told_to_go_on(path: Path) -> None:
    with below(path) as disk:
        node = filter_of(disk)
        node.break_at("write_aio", "A")
        with pytest.raises(UsageError):
            node.break_at("write_aio", "A")
        thread = threading.Thread(target=lambda: disk.write(0, b"late"))
        thread.start()
        node.wait_break("A", 60)
        assert thread.is_alive()
        assert disk.read(0, 4) == bytes(4)
        node.resume("A")
        thread.join()
        assert disk.read(0, 4) == b"late"
        with pytest.raises(TimeoutError):
            node.wait_break("A", 0)
        with pytest.raises(NameNotFoundError):
            node.resume("A")


def test_a_drain_takes_who_stopped_at_a_breakpoint_along(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        inserted = disk.insert_filter("blkdebug", {})
        node = inserted.node
        assert isinstance(node, BlkdebugNode)
        node.break_at("pwritev", "A")
        thread = threading.Thread(target=lambda: disk.write(0, b"late"))
        thread.start()
        node.wait_break("A", 60)
        inserted.remove()
        thread.join()
        assert disk.read(0, 4) == b"late"


# Where it stands ------------------------------------------------------------------------------------------------------


def test_it_comes_and_goes_above_a_live_disk(path: Path) -> None:
    with blocklib.open(path, "r+") as disk:
        disk.write(0, b"x" * 512)
        inserted = disk.insert_filter("blkdebug", {"inject-error": [{"event": "none"}]})
        with pytest.raises(StorageError):
            disk.read(0, 512)
        inserted.remove()
        assert disk.read(0, 512) == b"x" * 512


def test_events_reach_through_other_filters(path: Path) -> None:
    file: dict[str, Any] = {"driver": "blkdebug", "image": str(path), "inject-error": [{"event": "l2_load"}]}
    throttle: dict[str, Any] = {"driver": "throttle", "throttle-group": blocklib.ThrottleGroup(), "file": file}
    with below(path) as disk:
        disk.write(0, b"x")
    with blocklib.open({"driver": "qcow2", "file": throttle}) as disk, pytest.raises(StorageError):
        disk.read(0, 1)


def test_a_batch_meets_faults_one_by_one(path: Path) -> None:
    with below(path, [{"event": "write_aio", "once": True, "skip": 2}]) as disk:
        with pytest.raises(blocklib.BatchError) as caught:
            disk.write_batch(range(0, 5 * 65536, 65536), b"x" * 5 * 512)
        assert [bool(number) for number in caught.value.errnos].count(True) == 1


@pytest.mark.parametrize("align", [512, 4096, 65536])
def test_unaligned_writes_change_nothing_around_them(tmp_path: Path, align: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * 100_000)
    with blocklib.open({"driver": "blkdebug", "align": align, "image": str(path)}, "r+") as disk:
        disk.write(70_001, b"n" * 29_000)
        disk.write(5, b"n")
        disk.write_zeroes(1000, 10_000)
        assert disk.read(99_000, 1000) == b"n" + b"o" * 999
    expected = bytearray(b"o" * 100_000)
    expected[70_001:99_001] = b"n" * 29_000
    expected[5:6] = b"n"
    expected[1000:11_000] = bytes(10_000)
    assert path.read_bytes() == expected


def test_a_read_modify_write_has_its_events(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * 8192)
    for event in ("pwritev_rmw_head", "pwritev_rmw_tail"):
        rule: dict[str, Any] = {"event": event, "once": True}
        target: dict[str, Any] = {"driver": "blkdebug", "align": 512, "inject-error": [rule], "image": str(path)}
        with blocklib.open(target, "r+") as disk:
            with pytest.raises(StorageError) as caught:
                disk.write(5, b"n" * 1024)
            assert caught.value.operation == "read"
    assert path.read_bytes() == b"o" * 8192


def test_large_requests_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * KiB))
    limits: dict[str, Any] = {"max-transfer": 4096, "max-write-zero": 8192, "opt-write-zero": 4096}
    rule: dict[str, Any] = {"event": "none", "errno": 0}
    seen: list[tuple[str, int, int]] = []
    with blocklib.open({"driver": "blkdebug", "image": str(path), "inject-error": [rule], **limits}, "r+") as disk:
        node = top_of(disk)
        with pytest.MonkeyPatch.context() as patch:
            request = node._request

            def noted(iotype: str, offset: int, length: int, work: Any) -> None:
                seen.append((iotype, offset, length))
                request(iotype, offset, length, work)

            patch.setattr(node, "_request", noted)
            disk.write(100, b"x" * 10_000)
            disk.write_zeroes(2048, 16_384)
            disk.read(0, 5000)
    assert seen == [
        *(("write", offset, n) for offset, n in ((100, 4096), (4196, 4096), (8292, 1808))),
        *(("write-zeroes", offset, n) for offset, n in ((2048, 2048), (4096, 8192), (12288, 4096), (16384, 2048))),
        *(("read", offset, n) for offset, n in ((0, 4096), (4096, 904))),
    ]


# Options --------------------------------------------------------------------------------------------------------------


def test_rules_are_given_as_a_list_or_by_number(path: Path) -> None:
    for text in (
        f'json:{{"driver": "blkdebug", "inject-error": [{{"event": "none", "errno": 28}}], "image": "{path}"}}',
        f"driver=blkdebug,inject-error.0.event=none,inject-error.0.errno=28,image={path}",
        f"driver=blkdebug,inject-error.0.event=none,inject-error.0.errno=28,image.filename={path}",
    ):
        with blocklib.open(blocklib.parse_options(text)) as disk, pytest.raises(StorageError) as caught:
            disk.read(0, 1)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inject-error": [{"event": "lunch"}]}, "'inject-error.0.event' is one of none"),
        ({"inject-error": [{}]}, "'inject-error.0.event' is required"),
        ({"inject-error": [{"event": "none"}, {"event": "none", "wait": 1}]}, "no option 'inject-error.1.wait'"),
        ({"inject-error": [{"event": "none", "errno": -1}]}, "'inject-error.0.errno' is a number from 0 to"),
        ({"inject-error": {"1": {"event": "none"}}}, "numbered from 0"),
        ({"inject-error": "none"}, "is a list"),
        ({"inject-error": ["none"]}, "'inject-error.0' is a group"),
        ({"inject-error": [{"event": "none", "errno": 0, "short": 1}]}, "errno cannot be 0"),
        ({"set-state": [{"event": "none"}]}, "'set-state.0.new_state' is required"),
        ({"align": 3}, "a power of two"),
        ({"align": 4096, "max-transfer": 512}, "not a multiple of align"),
        ({"take-child-perms": ["sell"]}, "'take-child-perms' is one of"),
        ({"file": "x"}, "no option 'file'"),
    ],
)
def test_what_makes_no_sense_is_refused(path: Path, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        blocklib.open({"driver": "blkdebug", "image": str(path), **options})


def test_permissions_can_be_taken_and_kept(path: Path) -> None:
    with below(path, (), "r", **{"unshare-child-perms": ["write"]}) as disk:
        edge = filter_of(disk).children["file"]
        assert not edge.shared & 2


def test_each_event_can_be_named(path: Path) -> None:
    for event in EVENTS:
        below(path, [{"event": event, "sector": 1 << 40}], "r").close()


# What others do with it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6))
def test_opening_says_what_has_failed(path: Path, number: int) -> None:
    for skip in (number, number + 1):
        try:
            below(path, [{"event": "none", "skip": skip, "errno": errno.ENODEV}], "r").close()
        except StorageError as exc:
            assert exc.errno == errno.ENODEV  # noqa: PT017 - the last of these numbers is behind the last request


def test_no_flush_of_a_raw_disk_pretends_anything_after_one_has_failed(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    rule: dict[str, Any] = {"event": "flush_to_disk", "once": True}
    file: dict[str, Any] = {"driver": "blkdebug", "image": str(path), "inject-error": [rule]}
    disk = blocklib.open({"driver": "raw", "file": file}, "r+")
    disk.write(0, b"x")
    with pytest.raises(StorageError):
        disk.flush()
    for request in (disk.flush, lambda: disk.write(0, b"y"), disk.close):
        with pytest.raises(blocklib.PoisonedError):
            request()
    with blocklib.open(path, format="raw") as again:
        assert again.read(0, 1) == b"x"
