"""What options do: cache modes, discard, detect-zeroes, locks, and every option of the tables."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import Disk, KiB, MiB
from blocklib.options import CacheMode
from blocklib.options.tables import COMMON, CREATE, OPEN
from tests.api.images import PATTERN, ROOT, make_chain, make_disk, make_raw
from tests.nodes import descriptors_of
from tests.programs import Program

O_DIRECT = getattr(os, "O_DIRECT", 0)
MOST_OF_1_MIB = (1 * MiB - 64 * KiB) // 512
"""In the unit of st_blocks; the rest is for what a file system needs itself to describe the holes."""


def _is_direct(name: str) -> bool:
    """Whether our descriptors of a file, all of them, bypass the page cache."""
    flags = {bool(fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT) for fd in descriptors_of(name)}
    assert len(flags) == 1
    return flags.pop()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every fdatasync."""
    found: list[int] = []
    real = os.fdatasync

    def count(fd: int) -> None:
        found.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", count)
    return found


def _needs_direct_io() -> None:
    make_raw("probe", 4096)
    try:
        os.close(os.open("probe", os.O_RDWR | O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder has no direct I/O")
    finally:
        Path("probe").unlink()


# -- cache modes -------------------------------------------------------------------------------------------------------

MODES: dict[CacheMode, tuple[bool, bool, bool]] = {
    # direct, flushes are ignored, a flush after each write
    "none": (True, False, False),
    "writeback": (False, False, False),
    "writethrough": (False, False, True),
    "directsync": (True, False, True),
    "unsafe": (False, True, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["disk.qcow2", "disk.img"])
def test_a_cache_mode_means_what_it_means_in_qemu(name: str, mode: CacheMode, syncs: list[int]) -> None:
    direct, no_flush, writethrough = MODES[mode]
    if direct:
        _needs_direct_io()
    make_disk("disk.qcow2", 64 * MiB)
    make_raw("disk.img", 64 * MiB, PATTERN)
    with blocklib.open(name, "r+", format=name.partition(".")[2].replace("img", "raw"), cache=mode) as disk:
        assert _is_direct(name) == direct
        syncs.clear()
        disk.write(8 * MiB + 777, PATTERN)  # any alignment, whatever direct I/O demands
        assert bool(syncs) == writethrough
        disk.write_zeroes(16 * MiB, 1 * MiB)
        syncs.clear()
        disk.flush()
        assert bool(syncs) == (not no_flush)
        assert disk.read(8 * MiB + 777, 4096) == PATTERN
        assert disk.read(1, 511) == PATTERN[1:512]
    with blocklib.open(name, format=name.partition(".")[2].replace("img", "raw")) as disk:
        assert disk.read(8 * MiB + 777, 4096) == PATTERN


def test_fua_is_durable_when_it_returns(syncs: list[int]) -> None:
    make_raw("disk.img", 1 * MiB)
    with blocklib.open("disk.img", "r+", format="raw") as disk:
        syncs.clear()
        disk.write(0, b"x")
        assert not syncs
        disk.write(0, b"x", fua=True)
        assert syncs


def test_a_cache_mode_reaches_the_backing_files() -> None:
    _needs_direct_io()
    make_chain()
    with blocklib.open("top.qcow2", "r+", format="qcow2", references="allow", cache="none") as disk:
        assert [_is_direct(name) for name in ("top.qcow2", "base.qcow2", "golden.img")] == [True] * 3
        assert disk.read(65535, 2) == b"gb"
    with blocklib.open("top.qcow2", backing={"driver": "raw", "file": "golden.img", "cache.direct": True}):
        assert [_is_direct(name) for name in ("top.qcow2", "golden.img")] == [False, True]
    with blocklib.open(
        "top.qcow2", cache="none", backing={"driver": "raw", "file": "golden.img", "cache.direct": "off"}
    ):
        assert [_is_direct(name) for name in ("top.qcow2", "golden.img")] == [True, False]


@pytest.mark.parametrize("mode", ["none", "directsync"])
def test_a_file_system_without_direct_io_refuses_the_mode(mode: CacheMode, monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk("disk.qcow2", 64 * MiB)
    real = os.open

    def without(path: str, flags: int, *rest: Any, **named: Any) -> int:
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", without)
        with pytest.raises(blocklib.StorageError, match=r"disk\.qcow2: .*cache\.direct.*O_DIRECT") as caught:
            blocklib.open("disk.qcow2", cache=mode)
    assert (caught.value.errno, caught.value.operation) == (errno.EINVAL, "open")


def test_tmpfs_either_has_direct_io_or_says_that_it_has_not() -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no /dev/shm here")
    name = shared / f"blocklib-{os.getpid()}.img"
    try:
        make_raw(name, 1 * MiB, PATTERN)
        try:
            disk = blocklib.open(name, "r+", format="raw", cache="none")
        except blocklib.StorageError as exc:  # Linux before 6.6
            text = str(exc)
        else:
            with disk:
                disk.write(100, PATTERN)
                text = "O_DIRECT" if disk.read(100, 4096) == PATTERN else "other bytes"
        assert "O_DIRECT" in text
    finally:
        name.unlink(missing_ok=True)


# -- discard and detect-zeroes ---------------------------------------------------------------------------------------------


@pytest.fixture
def image(folder: Path) -> Path:
    """A qcow2 image with data in its first two MiB."""
    blocklib.create("image.qcow2", 64 * MiB, format="qcow2")
    with blocklib.open("image.qcow2", "r+") as disk:
        disk.write(0, PATTERN * 512)
    return folder / "image.qcow2"


def _kinds(disk: Disk, offset: int, length: int) -> set[tuple[bool, bool, bool]]:
    """(data, zero, has a place in the file) of what is in a range."""
    return {(one.data, one.zero, one.host_offset is not None) for one in disk.extents(offset, length)}


DATA, ZERO, ZERO_WITH_PLACE = (True, False, True), (False, True, False), (False, True, True)


@pytest.mark.parametrize(
    ("detect", "discard", "expected"),
    [
        ("off", "ignore", DATA),
        ("off", "unmap", DATA),
        ("on", "ignore", ZERO_WITH_PLACE),
        ("on", "unmap", ZERO_WITH_PLACE),
        ("unmap", "unmap", ZERO),
        ("unmap", "ignore", ZERO_WITH_PLACE),
    ],
)
def test_detect_zeroes_makes_zeroes_of_zero_bytes(
    image: Path, detect: Any, discard: Any, expected: tuple[bool, bool, bool]
) -> None:
    with blocklib.open(image, "r+", detect_zeroes=detect, discard=discard) as disk:
        disk.write(0, bytes(1 * MiB))
        disk.write(8 * MiB, bytes(64 * KiB))
        disk.write(1 * MiB, bytes(4095) + b"x")
        assert _kinds(disk, 0, 1 * MiB) == {expected}
        assert _kinds(disk, 8 * MiB, 64 * KiB) == {DATA if detect == "off" else ZERO}
        assert _kinds(disk, 1 * MiB, 64 * KiB) == {DATA}
        assert disk.read(0, 1 * MiB) == bytes(1 * MiB)
        assert disk.read(1 * MiB, 4096) == bytes(4095) + b"x"
    assert blocklib.check(image).clean


@pytest.mark.parametrize(("discard", "expected"), [("ignore", DATA), ("unmap", ZERO)])
def test_discard_is_dropped_unless_it_is_asked_for(
    image: Path, discard: Any, expected: tuple[bool, bool, bool]
) -> None:
    before = image.stat().st_blocks
    with blocklib.open(image, "r+", discard=discard) as disk:
        disk.discard(64 * KiB + 512, 1 * MiB)
        assert _kinds(disk, 0, 128 * KiB) == {DATA}  # a part of a cluster stays
        assert _kinds(disk, 128 * KiB, 960 * KiB) == {expected}
        assert disk.read(0, 4096) == PATTERN
    assert (image.stat().st_blocks < before) == (discard == "unmap")
    assert blocklib.check(image).clean


@pytest.mark.parametrize(("unmap", "discard"), [(False, "unmap"), (True, "ignore"), (True, "unmap")])
def test_write_zeroes_gives_space_back_where_both_say_so(image: Path, unmap: bool, discard: Any) -> None:
    with blocklib.open(image, "r+", discard=discard) as disk:
        disk.write_zeroes(0, 1 * MiB, unmap=unmap)
        assert _kinds(disk, 0, 1 * MiB) == {ZERO if unmap and discard == "unmap" else ZERO_WITH_PLACE}
        assert disk.read(0, 1 * MiB) == bytes(1 * MiB)


def test_a_raw_disk_gets_holes_by_discard() -> None:
    make_raw("disk.img", 1 * MiB, PATTERN * 256)
    before = Path("disk.img").stat().st_blocks
    with blocklib.open("disk.img", "r+", format="raw") as disk:
        disk.discard(0, 512 * KiB)
        assert disk.read(0, 4096) == PATTERN
    with blocklib.open("disk.img", "r+", format="raw", discard="unmap") as disk:
        disk.discard(0, 512 * KiB)
        assert disk.read(512 * KiB, 4096) == PATTERN
    assert Path("disk.img").stat().st_blocks < before


@pytest.mark.parametrize("driver", ["file", "raw"])
def test_discard_ignore_holds_for_a_protocol_too(driver: str) -> None:
    make_raw("disk.img", 1 * MiB, PATTERN * 256)
    before = Path("disk.img").stat().st_blocks
    with blocklib.open("disk.img", "r+", format=driver) as disk:
        disk.discard(0, 512 * KiB)
        assert disk.read(0, 4096) == PATTERN
    assert Path("disk.img").stat().st_blocks > before - MOST_OF_1_MIB // 2


def test_discard_goes_through_a_window_below_a_format(image: Path) -> None:
    before = image.stat().st_blocks
    window: dict[str, Any] = {"driver": "raw", "file": {"driver": "file", "filename": "image.qcow2"}}
    with blocklib.open({"driver": "qcow2", "file": window}, "r+", discard="unmap") as disk:
        disk.discard(0, 1 * MiB)
    assert image.stat().st_blocks <= before - MOST_OF_1_MIB


def test_freed_space_stays_with_the_file_where_that_is_said(image: Path) -> None:
    before = image.stat().st_blocks
    with blocklib.open(image, "r+", discard="unmap", options={"pass-discard-request": False}) as disk:
        disk.discard(0, 1 * MiB)
        assert _kinds(disk, 0, 1 * MiB) == {ZERO}
    assert image.stat().st_blocks > before - MOST_OF_1_MIB
    assert blocklib.check(image).clean


@pytest.mark.parametrize("other", [False, True])
def test_what_becomes_free_without_a_discard_stays_with_the_file_unless_that_is_said(
    image: Path, other: bool, qemu_img: Program
) -> None:
    half = os.urandom(32 * KiB) + bytes(32 * KiB)
    with blocklib.open(image, "r+") as disk:
        disk.write(0, half * 64)
    qemu_img("convert", "-c", "-O", "qcow2", image, "packed.qcow2")
    before = Path("packed.qcow2").stat().st_blocks
    options = {"pass-discard-other": other}
    with blocklib.open("packed.qcow2", "r+", discard="unmap", options=options) as disk:
        disk.write(0, PATTERN * 1024)  # takes new clusters: those of packed data are not written in place
    gained = Path("packed.qcow2").stat().st_blocks - before
    written = 4 * MiB // 512
    assert (gained < written - 1 * MiB // 512) == other
    assert blocklib.check("packed.qcow2").clean


@pytest.mark.parametrize("zeroing", ["discard", "write_zeroes"])
def test_discard_no_unref_keeps_the_clusters_and_gives_their_space_back(
    image: Path, zeroing: str, qemu_img: Program
) -> None:
    length, before = image.stat().st_size, image.stat().st_blocks
    with blocklib.open(image, "r+", discard="unmap", options={"discard-no-unref": True}) as disk:
        (place,) = [one.host_offset for one in disk.extents(0, 2 * MiB)]
        if zeroing == "discard":
            disk.discard(0, 1 * MiB)
        else:
            disk.write_zeroes(0, 1 * MiB, unmap=True)
        assert [(one.zero, one.host_offset) for one in disk.extents(0, 1 * MiB)] == [(True, place)]
        assert disk.read(0, 1 * MiB) == bytes(1 * MiB)
        assert image.stat().st_blocks <= before - MOST_OF_1_MIB
        disk.write(0, PATTERN * 256)
        assert [(one.data, one.host_offset) for one in disk.extents(0, 1 * MiB)] == [(True, place)]
    assert image.stat().st_size == length
    with blocklib.open(image) as disk:
        assert disk.read(0, 2 * MiB) == PATTERN * 512
    qemu_img("check", image)


# -- caches ----------------------------------------------------------------------------------------------------------------


def _cache_sizes(image: Path, **options: object) -> tuple[int, int]:
    """(bytes for L2 tables, bytes for refcount blocks) that options leave an image."""
    named: dict[str, Any] = {name.replace("_", "-"): value for name, value in options.items()}
    with blocklib.open(image, options=named) as disk:
        node: Any = disk.node
        caches = node.mapping.cache, node.refcounts.cache
        assert disk.read(0, 4096) == PATTERN
    l2, refcounts = (cache.max_entries * cache.length for cache in caches)
    return l2, refcounts


def test_the_size_of_both_caches_is_split(image: Path) -> None:
    assert _cache_sizes(image, cache_size="8M", refcount_cache_size="2M") == (6 * MiB, 2 * MiB)
    assert _cache_sizes(image, cache_size="8M", l2_cache_size="1M") == (1 * MiB, 7 * MiB)
    assert _cache_sizes(image, l2_cache_size="3M", refcount_cache_size="2M") == (3 * MiB, 2 * MiB)
    # All L2 tables of 64 MiB fit one cluster; a cache holds at least two tables.
    assert _cache_sizes(image, cache_size="8M") == (128 * KiB, 8 * MiB - 64 * KiB)
    assert _cache_sizes(image, l2_cache_size="1M", l2_cache_entry_size=4096)[0] == 1 * MiB


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"cache-size": "1M", "l2-cache-size": "512k", "refcount-cache-size": "512k"}, "cache-size"),
        ({"cache-size": "1M", "l2-cache-size": "2M"}, "l2-cache-size"),
        ({"cache-size": "1M", "refcount-cache-size": "2M"}, "refcount-cache-size"),
        ({"l2-cache-entry-size": "128k"}, "l2-cache-entry-size"),
    ],
)
def test_cache_sizes_that_contradict_each_other_are_refused_as_by_qemu(
    image: Path, options: dict[str, Any], option: str, qemu_io: Program
) -> None:
    with pytest.raises(blocklib.OptionError) as caught:
        blocklib.open(image, options=options)
    assert caught.value.option == option
    text = ",".join(f"{name}={value}" for name, value in options.items())
    done = qemu_io.run("-c", "quit", "--image-opts", f"driver=qcow2,file.filename={image},{text}")
    assert "can't open" in done.stderr


@pytest.mark.parametrize("option", ["lazy-refcounts", "discard-no-unref"])
def test_what_version_2_has_not_is_refused_for_it(option: str) -> None:
    blocklib.create("old.qcow2", 1 * MiB, format="qcow2", options={"compat": "0.10"})
    with pytest.raises(blocklib.OptionError, match="version 3") as caught:
        blocklib.open("old.qcow2", options={option: "on"})
    assert caught.value.option == option
    blocklib.open("old.qcow2", options={option: "off"}).close()


# -- reading and writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [False, "off", "no"])
def test_not_read_only_is_no_contradiction(image: Path, value: object) -> None:
    with blocklib.open(image, "r+", options={"read-only": value}) as disk:  # type: ignore[dict-item]
        disk.write(0, b"x")
    with blocklib.open({"driver": "qcow2", "file": str(image), "read-only": value}) as disk:  # type: ignore[dict-item]
        assert disk.mode == "r"


@pytest.mark.parametrize("value", [True, "on", "yes"])
def test_read_only_and_writing_contradict_each_other(image: Path, value: object) -> None:
    with pytest.raises(blocklib.UsageError, match="read-only"):
        blocklib.open(image, "r+", options={"read-only": value})  # type: ignore[dict-item]
    with pytest.raises(blocklib.ReadOnlyError):
        blocklib.open(image, "r+", options={"file.read-only": value})  # type: ignore[dict-item]
    with blocklib.open(image, options={"read-only": value}) as disk:  # type: ignore[dict-item]
        assert disk.chain()[0].read_only
    blocklib.open(image, "r+").close()


def test_an_image_in_a_disk_that_is_read_cannot_be_written(image: Path) -> None:
    with blocklib.open(image, format="raw") as outer:
        with pytest.raises(blocklib.ReadOnlyError):
            blocklib.open({"driver": "qcow2", "file": outer}, "r+")
        with blocklib.open({"driver": "qcow2", "file": outer}) as disk:
            assert disk.read(0, 4096) == PATTERN
        assert outer.read(0, 4) == b"QFI\xfb"


@pytest.fixture
def not_writable(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes every opening for writing fail with an errno, as a file system does that is mounted read-only."""
    real = os.open

    def make(number: int) -> None:
        def refuse(path: str, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_ACCMODE == os.O_RDWR and "image.qcow2" in str(path):
                raise OSError(number, os.strerror(number))
            return real(path, flags, *rest, **named)

        monkeypatch.setattr(os, "open", refuse)

    return make


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("format", ["qcow2", "raw", "file"])
def test_auto_read_only_falls_back_to_reading_and_the_mode_tells(
    image: Path, not_writable: Callable[[int], None], number: int, format: str
) -> None:
    with blocklib.open(image, "r+", format=format, options={"auto-read-only": True}) as disk:
        assert disk.mode == "r+"
    not_writable(number)
    with pytest.raises(blocklib.StorageError) as caught:
        blocklib.open(image, "r+", format=format)
    assert caught.value.errno == number
    with blocklib.open(image, "r+", format=format, options={"auto-read-only": "on"}) as disk:
        assert disk.mode == "r"
        assert all(node.read_only for node in disk.chain())
        with pytest.raises(blocklib.ReadOnlyError):
            disk.write(0, b"x")
    if format == "qcow2":
        # Only the file may fall back, and the image in it wants to be written.
        with pytest.raises(blocklib.ReadOnlyError):
            blocklib.open(image, "r+", options={"file.auto-read-only": True})


def test_auto_read_only_hides_no_other_failure(image: Path, not_writable: Callable[[int], None]) -> None:
    not_writable(errno.EIO)
    with pytest.raises(blocklib.StorageError) as caught:
        blocklib.open(image, "r+", options={"auto-read-only": True})
    assert caught.value.errno == errno.EIO
    with pytest.raises(blocklib.ImageNotFoundError):
        blocklib.open("missing.qcow2", "r+", options={"auto-read-only": True})


# -- one option, said once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "option"),
    [
        ({"cache": "none", "options": {"cache.direct": "off"}}, "cache.direct"),
        ({"cache": "unsafe", "options": {"cache": {"no-flush": False}}}, "cache.no-flush"),
        ({"discard": "unmap", "options": {"discard": "ignore"}}, "discard"),
        ({"detect_zeroes": "on", "options": {"detect-zeroes": "unmap"}}, "detect-zeroes"),
        ({"force_share": True, "options": {"force-share": "off"}}, "force-share"),
        ({"format": "raw", "options": {"driver": "qcow2"}}, "driver"),
        ({"backing": None, "options": {"backing.driver": "raw"}}, "backing"),
        ({"options": {"cache.direct": True, "cache": {"direct": True}}}, "cache.direct"),
        ({"options": {"file.filename": "other.qcow2"}}, "filename"),
        ({"options": {"file": "other.qcow2"}}, "file"),
    ],
)
def test_an_option_given_twice_is_refused(image: Path, keywords: dict[str, Any], option: str) -> None:
    with pytest.raises(blocklib.OptionError, match="twice") as caught:
        blocklib.open(image, **keywords)
    assert caught.value.option == option


@pytest.mark.parametrize(
    "keywords",
    [
        {"cache": "unsafe", "options": {"cache.no-flush": "on"}},
        {"cache": "unsafe", "options": {"cache.no-flush": True}},
        {"discard": "unmap", "options": {"discard": "on"}},
        {"detect_zeroes": "unmap", "options": {"detect-zeroes": "unmap"}},
        {"force_share": True, "options": {"force-share": "yes"}},
        {"format": "qcow2", "options": {"driver": "qcow2"}},
        {"options": {"discard": "unmap", "detect-zeroes": "on"}},
    ],
)
def test_a_keyword_and_an_option_may_agree(image: Path, keywords: dict[str, Any]) -> None:
    with blocklib.open(image, **keywords) as disk:
        assert disk.read(0, 4096) == PATTERN


def test_two_nodes_may_not_have_one_name(image: Path) -> None:
    with pytest.raises(blocklib.OptionError, match="'drive0'") as caught:
        blocklib.open(image, options={"node-name": "drive0", "file.node-name": "drive0"})
    assert caught.value.option == "node-name"
    with blocklib.open(image, options={"node-name": "drive0", "file.node-name": "file0"}) as disk:
        assert disk.chain()[0].name == "drive0"


def test_every_option_of_the_tables_is_read_by_somebody() -> None:
    readers = [path for path in (ROOT / "blocklib").rglob("*.py") if path.parent.name not in ("options", "cli")]
    source = "".join(path.read_text() for path in readers)
    tables = [COMMON, *OPEN.values(), *CREATE.values()]
    unread = {option.name for table in tables for option in table if f'"{option.name}"' not in source}
    assert unread <= {"lazy-refcounts"}


# -- locks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[Callable[[str, str, str], int]]:
    """`elsewhere(name, mode, format)` opens an image in another process, which holds it until the test ends; its pid."""
    running: list[subprocess.Popen[str]] = []
    code = (
        "import sys, blocklib\n"
        "with blocklib.open(sys.argv[1], sys.argv[2], format=sys.argv[3]) as disk:\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )

    def start(name: str, mode: str, format: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", code, name, mode, format],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process.pid

    yield start
    for process in running:
        process.communicate("")
        assert process.returncode == 0


@pytest.mark.parametrize("format", ["qcow2", "raw", "file"])
def test_a_second_writer_in_the_same_process_is_refused(image: Path, format: str) -> None:
    with blocklib.open(image, "r+", format=format) as disk:
        with pytest.raises(blocklib.LockedError) as caught:
            blocklib.open(image, "r+", format=format)
        assert (caught.value.filename, caught.value.pid) == (str(image), os.getpid())
        with pytest.raises(blocklib.LockedError):
            blocklib.create(image, 1 * MiB, format="qcow2", overwrite=True)
        assert len(disk.read(0, 512)) == 512
    blocklib.open(image, "r+", format=format).close()


def test_a_qcow2_image_has_many_readers_or_one_writer(image: Path) -> None:
    with blocklib.open(image) as disk, blocklib.open(image) as second:
        assert disk.read(0, 4096) == second.read(0, 4096) == PATTERN
        with pytest.raises(blocklib.LockedError):
            blocklib.open(image, "r+")
    with blocklib.open(image, "r+"):
        with pytest.raises(blocklib.LockedError):
            blocklib.open(image)


def test_a_writer_in_another_process_excludes_us(image: Path, elsewhere: Callable[[str, str, str], int]) -> None:
    pid = elsewhere("image.qcow2", "r+", "qcow2")
    for call in (
        lambda: blocklib.open("image.qcow2"),
        lambda: blocklib.open("image.qcow2", "r+"),
        lambda: blocklib.check("image.qcow2"),
        lambda: blocklib.info("image.qcow2"),
    ):
        with pytest.raises(blocklib.LockedError) as caught:
            call()
        assert (caught.value.filename, caught.value.permission, caught.value.pid) == ("image.qcow2", "write", pid)
    with blocklib.open("image.qcow2", force_share=True) as disk:
        assert disk.read(0, 4096) == PATTERN
    assert blocklib.info("image.qcow2", force_share=True).virtual_size == 64 * MiB
    with pytest.raises(blocklib.UsageError, match="force-share"):
        blocklib.open("image.qcow2", "r+", force_share=True)


def test_a_reader_in_another_process_excludes_writers_only(
    image: Path, elsewhere: Callable[[str, str, str], int]
) -> None:
    pid = elsewhere("image.qcow2", "r", "qcow2")
    with blocklib.open("image.qcow2") as disk:
        assert disk.read(0, 4096) == PATTERN
    with pytest.raises(blocklib.LockedError) as caught:
        blocklib.open("image.qcow2", "r+")
    assert caught.value.pid == pid


def test_a_backing_file_is_locked_while_an_overlay_uses_it() -> None:
    make_chain()
    with blocklib.open("top.qcow2", "r+", format="qcow2", references="allow"):
        blocklib.open("base.qcow2", backing=None).close()
        with pytest.raises(blocklib.LockedError):
            blocklib.open("base.qcow2", "r+", backing=None)


def test_locking_can_be_left_out(image: Path) -> None:
    with blocklib.open(image, "r+"):
        with blocklib.open(image, options={"file.locking": "off"}) as disk:
            assert disk.read(0, 4096) == PATTERN
