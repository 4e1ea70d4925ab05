"""Errors by class: each is also the builtin that a Python user expects, with fields instead of text to parse."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklib
from blocklib import GiB, KiB, MiB, Reference, errors
from tests.api.images import PATTERN, make_disk, make_raw, patch, set_incompatible

TREE: list[tuple[str, str, type[BaseException] | None]] = [
    ("BlocklibError", "", None),
    ("UsageError", "BlocklibError", ValueError),
    ("OptionError", "UsageError", ValueError),
    ("OutOfRangeError", "UsageError", ValueError),
    ("ReadOnlyError", "UsageError", ValueError),
    ("ClosedError", "UsageError", ValueError),
    ("StalePlanError", "UsageError", ValueError),
    ("NameNotFoundError", "UsageError", KeyError),
    ("ImageError", "BlocklibError", None),
    ("FormatMismatchError", "ImageError", None),
    ("ImageCorruptError", "ImageError", None),
    ("ImageLimitError", "ImageError", None),
    ("UnsupportedFeatureError", "ImageError", None),
    ("PolicyError", "BlocklibError", PermissionError),
    ("StorageError", "BlocklibError", OSError),
    ("ImageNotFoundError", "StorageError", FileNotFoundError),
    ("ImageExistsError", "StorageError", FileExistsError),
    ("LockedError", "StorageError", BlockingIOError),
    ("BatchError", "StorageError", OSError),
    ("NbdError", "BlocklibError", None),
    ("RequestError", "NbdError", None),
    ("RemoteProtocolError", "NbdError", None),
    ("LocalProtocolError", "NbdError", None),
    ("PoisonedError", "BlocklibError", None),
    ("GraphConflictError", "BlocklibError", None),
    ("JobError", "BlocklibError", None),
    ("JobStateError", "JobError", None),
    ("JobCancelled", "JobError", None),
    ("MissingExtraError", "BlocklibError", ImportError),
]


# -- the tree ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parent", "builtin"), TREE, ids=[name for name, _parent, _builtin in TREE])
def test_a_class_has_its_place_and_its_builtin(name: str, parent: str, builtin: type[BaseException] | None) -> None:
    error = getattr(blocklib, name)
    assert error is getattr(errors, name)
    if parent:
        assert error.__bases__[0] is getattr(blocklib, parent)
    assert issubclass(error, blocklib.BlocklibError)
    if builtin is not None:
        assert issubclass(error, builtin)
    others = {ValueError, KeyError, OSError, ImportError} - {builtin}
    if builtin is None:
        assert not any(issubclass(error, other) for other in others)


def test_the_tree_is_whole() -> None:
    assert {name for name, _parent, _builtin in TREE} == set(errors.__all__)


def test_an_error_is_its_text() -> None:
    assert str(blocklib.NameNotFoundError("no snapshot 'x'")) == "no snapshot 'x'"
    assert str(blocklib.ImageNotFoundError("x: gone", errno=2, filename="x")) == "x: gone"
    assert str(blocklib.PolicyError("no", reference=Reference("backing", "x", None, None, 1))) == "no"


# -- fields ------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_a_file_not_found_error() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        blocklib.open("missing.qcow2")
    error = caught.value
    assert isinstance(error, blocklib.ImageNotFoundError)
    assert (error.errno, error.operation, error.filename, error.node) == (
        errno.ENOENT,
        "open",
        "missing.qcow2",
        "missing.qcow2",
    )
    with pytest.raises(FileNotFoundError):
        blocklib.info("missing.qcow2")
    with pytest.raises(FileNotFoundError):
        blocklib.check("missing.qcow2")
    with pytest.raises(blocklib.StorageError):
        blocklib.open("missing/disk.qcow2")
    with pytest.raises(blocklib.StorageError):
        blocklib.create("missing/disk.qcow2", 1 * MiB, format="qcow2")


def test_an_existing_file_is_a_file_exists_error() -> None:
    make_raw("disk.img", 512, b"mine")
    with pytest.raises(FileExistsError) as caught:
        blocklib.create("disk.img", 1 * MiB, format="raw")
    error = caught.value
    assert isinstance(error, blocklib.ImageExistsError)
    assert (error.errno, error.filename) == (errno.EEXIST, "disk.img")
    assert Path("disk.img").read_bytes()[:4] == b"mine"


def test_a_locked_image_names_the_permission_and_the_holder() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with blocklib.open("disk.qcow2", "r+"):
        with pytest.raises(BlockingIOError) as caught:
            blocklib.open("disk.qcow2", "r+")
    error = caught.value
    assert isinstance(error, blocklib.LockedError)
    assert (error.filename, error.permission, error.pid, error.operation) == ("disk.qcow2", "write", os.getpid(), "lock")
    assert "disk.qcow2" in str(error)
    assert "write" in str(error)


def test_an_option_error_names_option_driver_and_choices() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with pytest.raises(ValueError, match="did you mean 'l2-cache-size'") as caught:
        blocklib.open("disk.qcow2", options={"l2-cache-sise": 1})
    error = caught.value
    assert isinstance(error, blocklib.OptionError)
    assert (error.option, error.driver) == ("l2-cache-sise", "qcow2")
    assert "l2-cache-size" in error.choices

    with pytest.raises(blocklib.OptionError) as by_value:
        blocklib.open("disk.qcow2", options={"detect-zeroes": "perhaps"})
    assert (by_value.value.option, by_value.value.choices) == ("detect-zeroes", ("off", "on", "unmap"))

    calls: list[tuple[str, Callable[[], object]]] = [
        ("driver", lambda: blocklib.open("disk.qcow2", format="qcow3")),
        ("driver", lambda: blocklib.open({"driver": ["qcow2"], "file": "disk.qcow2"})),
        ("format", lambda: blocklib.create("new", 1, format="qcow3")),
        ("cache", lambda: blocklib.open("disk.qcow2", cache="fast")),  # type: ignore[arg-type]
        ("discard", lambda: blocklib.open("disk.qcow2", discard="maybe")),  # type: ignore[arg-type]
        ("detect-zeroes", lambda: blocklib.open("disk.qcow2", detect_zeroes="maybe")),  # type: ignore[arg-type]
        ("cluster_size", lambda: blocklib.create("new", 1, format="qcow2", options={"cluster_size": 1000})),
        ("backing_file", lambda: blocklib.create("new", 1, format="raw", backing="disk.qcow2", backing_format="qcow2")),
        ("preallocation", lambda: blocklib.create("new", 1, format="raw", options={"preallocation": "metadata"})),
        ("size", lambda: blocklib.create("new", 1, format="raw", options={"size": 2})),
        ("offset", lambda: blocklib.open({"driver": "raw", "file": "disk.qcow2", "offset": 1 << 40})),
    ]
    for option, call in calls:
        with pytest.raises(blocklib.OptionError) as found:
            call()
        assert found.value.option == option
    assert not Path("new").exists()


def test_errors_about_the_disk_name_the_node() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    with blocklib.open("disk.qcow2", options={"node-name": "drive0"}) as disk:
        with pytest.raises(blocklib.OutOfRangeError) as outside:
            disk.read(GiB, 1)
        assert outside.value.node == "drive0"
        with pytest.raises(blocklib.ReadOnlyError) as forbidden:
            disk.write(0, b"x")
        assert forbidden.value.node == "drive0"


def test_a_closed_file_of_a_disk_is_a_value_error() -> None:
    make_raw("disk.img", 512)
    with blocklib.open("disk.img", format="raw") as disk:
        file = disk.as_file()
        file.close()
        with pytest.raises(ValueError, match="closed") as caught:
            file.read(1)
    assert isinstance(caught.value, blocklib.ClosedError)


def test_a_host_that_fails_is_an_os_error_with_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    make_raw("disk.img", 64 * KiB)

    def fail(*_arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with blocklib.open("disk.img", "r+", format="raw") as disk, monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail)
        broken.setattr(os, "pwritev", fail)
        for operation, call in (("preadv", lambda: disk.read(0, 1)), ("pwritev", lambda: disk.write(0, b"x"))):
            with pytest.raises(OSError, match=r"disk\.img") as caught:
                call()
            assert isinstance(caught.value, blocklib.StorageError)
            assert (caught.value.errno, caught.value.operation) == (errno.EIO, operation)
            assert caught.value.__cause__ is not None


def test_a_failed_flush_poisons_a_qcow2_image_until_it_is_reopened(monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk("disk.qcow2", 64 * MiB)

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = blocklib.open("disk.qcow2", "r+")
    disk.write(8 * MiB, PATTERN)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        with pytest.raises(blocklib.StorageError):
            disk.flush()
    with pytest.raises(blocklib.PoisonedError):
        disk.flush()
    with pytest.raises(blocklib.PoisonedError):
        disk.write(16 * MiB, PATTERN)
    disk.abandon()
    with blocklib.open("disk.qcow2", "r+") as again:
        again.write(16 * MiB, PATTERN)
        assert again.read(0, 4096) == PATTERN


def test_conflicting_users_of_one_graph_name_each_other() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    with blocklib.open("disk.qcow2", "r+", format="raw") as disk:
        with pytest.raises(blocklib.GraphConflictError, match=r"disk\.qcow2"):
            blocklib.open({"driver": "qcow2", "file": disk})
        assert disk.read(0, 4) == b"QFI\xfb"


# -- bad images --------------------------------------------------------------------------------------------------------

# name, what to do to the file, the class, the field it names, where that is
BAD_IMAGES: list[tuple[str, Callable[[], None], type[blocklib.ImageError], str, int | None]] = [
    ("empty file", lambda: make_raw("bad", 0), blocklib.FormatMismatchError, "magic", 0),
    ("not an image", lambda: make_raw("bad", 4096, PATTERN), blocklib.FormatMismatchError, "magic", 0),
    ("one byte", lambda: make_raw("bad", 1, b"Q"), blocklib.FormatMismatchError, "magic", 0),
    (
        "truncated header",
        lambda: make_raw("bad", 71, b"QFI\xfb\0\0\0\3"),
        blocklib.ImageCorruptError,
        "",
        None,
    ),
    ("version 9", lambda: _patched(4, struct.pack(">I", 9)), blocklib.ImageError, "version", 4),
    ("cluster bits", lambda: _patched(20, struct.pack(">I", 8)), blocklib.ImageError, "cluster_bits", 20),
    ("an L1 table outside", lambda: _patched(40, struct.pack(">Q", 1 << 55)), blocklib.ImageError, "l1", None),
    ("a huge L1 table", lambda: _patched(36, b"\xff\xff\xff\xff"), blocklib.ImageError, "l1", None),
    ("a refcount table outside", lambda: _patched(48, struct.pack(">Q", 1 << 55)), blocklib.ImageError, "refcount", None),
    ("a huge virtual size", lambda: _patched(24, b"\xff" * 8), blocklib.ImageError, "size", 24),
    ("refcount order", lambda: _patched(96, struct.pack(">I", 7)), blocklib.ImageError, "refcount_order", 96),
    ("a backing name outside", lambda: _patched(8, struct.pack(">QI", 1 << 40, 5)), blocklib.ImageError, "backing", None),
    ("a long backing name", lambda: _patched(8, struct.pack(">QI", 512, 4096)), blocklib.ImageError, "backing", None),
]


def _patched(host_offset: int, data: bytes) -> None:
    make_disk("bad", 64 * MiB)
    patch("bad", host_offset, data)


@pytest.mark.parametrize(
    ("spoil", "kind", "structure", "host_offset"),
    [pytest.param(*rest, id=name) for name, *rest in BAD_IMAGES],
)
def test_a_bad_image_names_structure_place_and_what_was_found(
    spoil: Callable[[], None], kind: type[blocklib.ImageError], structure: str, host_offset: int | None
) -> None:
    spoil()
    with pytest.raises(kind) as caught:
        blocklib.open("bad")
    error = caught.value
    assert error.node == "bad"
    assert "bad" in str(error)
    assert error.structure is not None
    assert structure in error.structure.lower()
    if host_offset is not None:
        assert error.host_offset == host_offset
    assert error.expected
    assert error.found
    with pytest.raises(kind):
        blocklib.open("bad", "r+")


@pytest.mark.parametrize("magic", [b"vhdxfile", b"conectix", b"KDMV", b"QED\0", b"QFI\xfb\0\0\0\1"])
def test_an_image_of_a_format_we_lack_is_refused_by_name(magic: bytes) -> None:
    make_raw("disk", 4096, magic)
    with pytest.raises(blocklib.UnsupportedFeatureError) as caught:
        blocklib.open("disk")
    assert caught.value.features == (caught.value.found,)
    assert (caught.value.structure, caught.value.host_offset) == ("magic", 0)
    with blocklib.open("disk", format="raw") as disk:  # what is said is believed
        assert disk.read(0, len(magic)) == magic


def test_a_said_format_that_is_not_there_is_a_format_mismatch() -> None:
    make_raw("disk.img", 1 * MiB, PATTERN)
    with pytest.raises(blocklib.FormatMismatchError) as caught:
        blocklib.open("disk.img", format="qcow2")
    assert "magic" in str(caught.value.structure)
    assert caught.value.host_offset == 0
    assert repr(PATTERN[:4]) in str(caught.value.found)


def test_unknown_incompatible_features_are_named_before_anything_is_read() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    set_incompatible("disk.qcow2", 1 << 40)
    with pytest.raises(blocklib.UnsupportedFeatureError) as caught:
        blocklib.open("disk.qcow2")
    (feature,) = caught.value.features
    assert "40" in feature
    assert caught.value.host_offset == 72


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_what_is_no_file_is_refused(mode: Any) -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name in ("folder", "pipe", "/dev/null", ".", "/"):
        with pytest.raises(blocklib.StorageError) as caught:
            blocklib.open(name, mode, format="raw")
        assert caught.value.operation == "open"
        assert name in str(caught.value)
    with pytest.raises(blocklib.UsageError):
        blocklib.open("a\0b", mode, format="raw")
    with pytest.raises(blocklib.StorageError):
        blocklib.open("", mode, format="raw")
    with pytest.raises(blocklib.StorageError):
        blocklib.open("x" * 300, mode, format="raw")


def test_a_word_that_is_no_choice_changes_nothing() -> None:
    make_disk("disk.qcow2", 8 * MiB)
    before = Path("disk.qcow2").read_bytes()
    with pytest.raises(blocklib.UsageError, match="'leaks' or 'all'"):
        blocklib.repair("disk.qcow2", "leak")  # type: ignore[arg-type]
    with blocklib.open("disk.qcow2", "r+") as disk, pytest.raises(blocklib.UsageError, match="falloc"):
        disk.truncate(9 * MiB, preallocation="ful")  # type: ignore[arg-type]
    assert Path("disk.qcow2").read_bytes() == before


@pytest.mark.parametrize("size", [-1, -512, 1 << 63, 1 << 80])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_size_that_cannot_be_is_refused_and_leaves_no_file(size: int, format: str) -> None:
    with pytest.raises(blocklib.UsageError):
        blocklib.create("new", size, format=format)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"format": "qcow2"}, id="no size and no backing file"),
        pytest.param({"size": 1, "format": "qcow2", "backing": "base.qcow2"}, id="backing file without format"),
        pytest.param({"size": 1, "format": "qcow2", "backing_format": "raw"}, id="backing format without file"),
        pytest.param({"format": "qcow2", "backing": "base.qcow2", "backing_format": "qcow3"}, id="unknown format"),
        pytest.param({"size": 1, "format": "qcow2", "options": {"compat": "0.9"}}, id="bad option"),
    ],
)
def test_what_cannot_be_created_leaves_no_file(arguments: dict[str, Any]) -> None:
    make_disk("base.qcow2", 64 * MiB)
    with pytest.raises(blocklib.UsageError):
        blocklib.create("new.qcow2", **arguments)
    assert not Path("new.qcow2").exists()


def test_a_missing_backing_file_leaves_no_overlay() -> None:
    with pytest.raises(blocklib.ImageNotFoundError):
        blocklib.create("new.qcow2", format="qcow2", backing="missing.qcow2", backing_format="qcow2")
    assert not Path("new.qcow2").exists()


def test_limits_are_checked_by_name() -> None:
    make_disk("disk.qcow2", 64 * MiB)
    narrow = {
        "virtual_size": blocklib.Limits(virtual_size=1 * MiB),
        "cluster_size": blocklib.Limits(cluster_size=4096),
        "l1_bytes": blocklib.Limits(l1_bytes=0),
        "refcount_table_bytes": blocklib.Limits(refcount_table_bytes=0),
    }
    for name, limits in narrow.items():
        with pytest.raises(blocklib.ImageLimitError, match=f"the limit {name}") as caught:
            blocklib.open("disk.qcow2", limits=limits)
        assert name in str(caught.value.expected)
        with pytest.raises(blocklib.ImageLimitError):
            blocklib.info("disk.qcow2", limits=limits)
