"""The grammar of the API: position first, flags by keyword, defaults that are promises, nothing that returns a count."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blocklib
from blocklib import Disk, KiB, Limits, MiB, jobs
from blocklib.node import DetectZeroes
from blocklib.options import CacheMode
from tests.api.images import PATTERN, make_disk, make_raw

_REQUIRED = inspect.Parameter.empty
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD = inspect.Parameter.KEYWORD_ONLY

OPEN = {
    "format": None,
    "references": "deny",
    "limits": Limits(),
    "cache": "writeback",
    "discard": "ignore",
    "detect_zeroes": "off",
    "force_share": False,
    "backing": "FROM_IMAGE",
    "data_file": "FROM_IMAGE",
    "options": None,
}
CREATE = {"format": _REQUIRED, "backing": None, "backing_format": None, "overwrite": False, "options": None}
CONVERT = {
    "format": None,
    "overwrite": False,
    "compress": None,
    "compress_level": None,
    "threads": None,
    "options": None,
    "progress": None,
}


def _plain(value: object) -> object:
    """A default, comparable: the sentinel that has no other name by its repr."""
    return repr(value) if repr(value) == "FROM_IMAGE" else value


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        pytest.param(blocklib.open, {"target": _REQUIRED, "mode": "r"}, OPEN, id="open"),
        pytest.param(blocklib.create, {"target": _REQUIRED, "size": None}, CREATE, id="create"),
        pytest.param(Disk.read, {"offset": _REQUIRED, "length": _REQUIRED}, {}, id="read"),
        pytest.param(Disk.readinto, {"offset": _REQUIRED, "buffer": _REQUIRED}, {}, id="readinto"),
        pytest.param(Disk.write, {"offset": _REQUIRED, "data": _REQUIRED}, {"fua": False}, id="write"),
        pytest.param(Disk.discard, {"offset": _REQUIRED, "length": _REQUIRED}, {}, id="discard"),
        pytest.param(Disk.flush, {}, {}, id="flush"),
        pytest.param(Disk.close, {}, {}, id="close"),
        pytest.param(Disk.chain, {}, {}, id="chain"),
        pytest.param(Disk.info, {}, {}, id="disk-info"),
        pytest.param(Disk.extents, {"offset": 0, "length": None}, {"base": None}, id="extents"),
        pytest.param(Disk.map, {"offset": 0, "length": None}, {"base": None}, id="map"),
        pytest.param(Disk.as_file, {"offset": 0, "length": None}, {}, id="as_file"),
        pytest.param(blocklib.inspect, {"source": _REQUIRED}, {"expect": None, "limits": Limits()}, id="inspect"),
        pytest.param(blocklib.Inspector.feed, {"chunk": _REQUIRED}, {}, id="feed"),
        pytest.param(blocklib.Inspector.finish, {}, {}, id="finish"),
        pytest.param(blocklib.parse_options, {"text": _REQUIRED}, {}, id="parse_options"),
        pytest.param(blocklib.parse_size, {"text": _REQUIRED}, {}, id="parse_size"),
    ],
)
def test_a_signature_is_that_of_the_page(
    function: Callable[..., Any], positional: dict[str, Any], keywords: dict[str, Any]
) -> None:
    parameters = [one for name, one in inspect.signature(function).parameters.items() if name != "self"]
    assert {one.name: _plain(one.default) for one in parameters if one.kind == _POSITIONAL} == positional
    assert {one.name: _plain(one.default) for one in parameters if one.kind == _KEYWORD} == keywords
    assert all(one.kind in (_POSITIONAL, _KEYWORD) for one in parameters)


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        pytest.param(blocklib.convert, ["source", "target"], CONVERT, id="convert"),
        pytest.param(blocklib.check, ["target"], {}, id="check"),
        pytest.param(blocklib.repair, ["target", "what"], {"dry_run": False, "expect": None}, id="repair"),
        pytest.param(blocklib.info, ["target"], {"format": None, "options": None}, id="info"),
        pytest.param(Disk.write_zeroes, ["offset", "length"], {"unmap": False}, id="write_zeroes"),
        pytest.param(Disk.truncate, ["size"], {"shrink": False}, id="truncate"),
    ],
)
def test_a_signature_has_at_least_what_the_page_says(
    function: Callable[..., Any], positional: list[str], keywords: dict[str, Any]
) -> None:
    parameters = {name: one for name, one in inspect.signature(function).parameters.items() if name != "self"}
    assert [name for name, one in parameters.items() if one.kind == _POSITIONAL] == positional
    for name, default in keywords.items():
        assert parameters[name].kind == _KEYWORD
        assert _plain(parameters[name].default) == default


LONG_VERBS = ("amend", "check", "commit", "compare", "convert", "measure", "rebase", "repair")
CHAIN_VERBS = ("backup", "mirror", "stream")
STEERED = {"speed", "auto_finalize", "auto_dismiss"}


@pytest.mark.parametrize("verb", LONG_VERBS)
def test_a_long_verb_is_a_job_of_the_same_arguments(verb: str) -> None:
    waited = inspect.signature(getattr(blocklib, verb)).parameters
    started = inspect.signature(getattr(jobs, verb)).parameters
    for name in waited.keys() & started.keys():
        assert (waited[name].kind, waited[name].default) == (started[name].kind, started[name].default)
    assert "progress" in waited
    assert started.keys() >= STEERED
    assert waited.keys() - started.keys() <= {"progress"}


@pytest.mark.parametrize("verb", CHAIN_VERBS)
def test_a_job_on_a_chain_in_use_is_steered_like_any_other(verb: str) -> None:
    assert {*STEERED, "progress"} <= inspect.signature(getattr(jobs, verb)).parameters.keys()


def test_choices_are_literals_in_qemus_spelling() -> None:
    hints = {name: one.annotation for name, one in inspect.signature(blocklib.open).parameters.items()}
    assert typing.get_args(eval(hints["mode"], vars(typing))) == ("r", "r+")
    assert typing.get_args(eval(hints["discard"], vars(typing))) == ("ignore", "unmap")
    assert (hints["cache"], hints["detect_zeroes"]) == ("CacheMode", "DetectZeroes")
    assert set(typing.get_args(CacheMode)) == {"none", "writeback", "writethrough", "directsync", "unsafe"}
    assert typing.get_args(DetectZeroes) == ("off", "on", "unmap")


@pytest.mark.parametrize("mode", ["w", "a", "x", "rb", "r+b", "", None])
def test_there_are_two_modes_and_neither_creates(mode: Any) -> None:
    with pytest.raises(blocklib.UsageError, match="r\\+"):
        blocklib.open("new.qcow2", mode, format="qcow2")
    with pytest.raises(blocklib.ImageNotFoundError):
        blocklib.open("new.qcow2", "r+", format="qcow2")
    assert not Path("new.qcow2").exists()


def test_a_transfer_is_whole_and_returns_no_count() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    buffer = bytearray(4096)
    with blocklib.open("disk.qcow2", "r+", discard="unmap") as disk:
        nothing = [
            disk.readinto(0, buffer),  # type: ignore[func-returns-value]
            disk.write(0, b"x"),  # type: ignore[func-returns-value]
            disk.write_zeroes(0, 1),  # type: ignore[func-returns-value]
            disk.discard(0, 65536),  # type: ignore[func-returns-value]
            disk.truncate(2 * MiB),  # type: ignore[func-returns-value]
            disk.flush(),  # type: ignore[func-returns-value]
            disk.close(),  # type: ignore[func-returns-value]
            disk.close(),  # type: ignore[func-returns-value]
        ]
    assert nothing == [None] * len(nothing)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (1 * MiB, 1), (0, 1 * MiB + 1), (2 * MiB, 0), (1 << 80, 1), (0, 1 << 62)]
)
def test_what_reaches_outside_the_disk_raises_and_transfers_nothing(offset: int, length: int) -> None:
    make_raw("disk.img", 1 * MiB, PATTERN)
    with blocklib.open("disk.img", "r+", format="raw", discard="unmap") as disk:
        calls: list[Callable[[], object]] = [
            lambda: disk.read(offset, length),
            lambda: disk.write_zeroes(offset, length),
            lambda: disk.discard(offset, length),
            lambda: disk.extents(offset, length),
            lambda: disk.map(offset, length),
            lambda: disk.as_file(offset, length),
        ]
        if 0 <= length < 1 << 30:
            buffer = bytearray(b"\xaa") * length
            calls += [lambda: disk.write(offset, buffer), lambda: disk.readinto(offset, buffer)]
        for call in calls:
            with pytest.raises(blocklib.OutOfRangeError):
                call()
        if 0 <= length < 1 << 30:
            assert buffer == bytearray(b"\xaa") * length
        assert disk.read(0, 4096) == PATTERN


def test_a_request_of_no_bytes_is_allowed_up_to_the_end() -> None:
    make_raw("disk.img", 1 * MiB)
    with blocklib.open("disk.img", "r+", format="raw", discard="unmap") as disk:
        assert disk.read(1 * MiB, 0) == b""
        disk.readinto(1 * MiB, bytearray())
        disk.write(1 * MiB, b"")
        disk.write_zeroes(1 * MiB, 0)
        disk.discard(1 * MiB, 0)
        assert list(disk.extents(1 * MiB)) == []
        assert len(disk.map(1 * MiB)) == 0


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(bytearray(64), id="bytearray"),
        pytest.param(memoryview(bytearray(66))[1:65], id="memoryview"),
        pytest.param(np.zeros(8), id="doubles"),
        pytest.param(np.zeros((4, 4), dtype=np.int32), id="two dimensions"),
        pytest.param(np.zeros(16, dtype=">u4"), id="other byte order"),
        pytest.param(np.zeros(4, dtype=[("a", "<u8"), ("b", ">u8")]), id="records"),
    ],
)
def test_any_contiguous_buffer_is_filled_and_written(buffer: Any) -> None:
    make_raw("disk.img", 1 * MiB, PATTERN)
    with blocklib.open("disk.img", "r+", format="raw") as disk:
        disk.readinto(0, buffer)
        assert memoryview(buffer).tobytes() == PATTERN[:64]
        disk.write(777, buffer)
        assert disk.read(777, 64) == PATTERN[:64]


@pytest.mark.parametrize("kind", [int, np.int64, np.uint64, np.int32, np.uint8])
def test_numbers_of_numpy_are_numbers(kind: Callable[[int], Any]) -> None:
    make_disk("disk.qcow2", 3 << 30)
    with blocklib.open("disk.qcow2", "r+", discard="unmap") as disk:
        assert disk.read(kind(16), kind(100)) == PATTERN[16:116]
        disk.write(kind(200), b"xyz")
        buffer = bytearray(3)
        disk.readinto(kind(200), buffer)
        assert buffer == b"xyz"
        disk.write_zeroes(kind(200), kind(3))
        disk.discard(kind(0), kind(100))
        assert sum(extent.length for extent in disk.extents(kind(0), kind(100))) == 100
        assert disk.map(kind(0), kind(100))["length"].sum() == 100
        assert disk.as_file(kind(16), kind(4)).read() == PATTERN[16:20]
        if kind is np.int32:
            with pytest.raises(blocklib.OutOfRangeError):  # their sum is not one of its kind
                largest: Any = kind(2**31 - 1)
                disk.read(largest, largest)


@pytest.mark.parametrize("number", [1.0, "1", None, b"1", [1]])
def test_what_is_no_whole_number_is_refused_before_anything_happens(number: Any) -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    before = Path("disk.qcow2").read_bytes()
    with blocklib.open("disk.qcow2", "r+", discard="unmap") as disk:
        calls: list[Callable[[], object]] = [
            lambda: disk.read(number, 1),
            lambda: disk.read(0, number),
            lambda: disk.readinto(number, bytearray(1)),
            lambda: disk.write(number, b"x"),
            lambda: disk.write_zeroes(number, 1),
            lambda: disk.write_zeroes(0, number),
            lambda: disk.discard(number, 1),
            lambda: disk.discard(0, number),
            lambda: disk.truncate(number),
            lambda: disk.extents(number),
            lambda: disk.map(number),
            lambda: disk.as_file(number),
        ]
        for call in calls:
            with pytest.raises(TypeError):
                call()
    assert Path("disk.qcow2").read_bytes() == before


def test_a_buffer_that_cannot_be_filled_is_refused() -> None:
    make_raw("disk.img", 1 * MiB)
    with blocklib.open("disk.img", "r+", format="raw") as disk:
        with pytest.raises(blocklib.UsageError, match="writable"):
            disk.readinto(0, b"constant")
        with pytest.raises(blocklib.UsageError, match="contiguous"):
            disk.readinto(0, memoryview(bytearray(64))[::2])
        with pytest.raises(blocklib.UsageError, match="contiguous"):
            disk.write(0, memoryview(bytearray(64))[::2])


def test_reading_is_the_default_and_writing_must_be_asked_for() -> None:
    make_disk("disk.qcow2", 1 * MiB + 64 * KiB)
    before = Path("disk.qcow2").read_bytes()
    with blocklib.open("disk.qcow2") as disk:
        calls: list[Callable[[], object]] = [
            lambda: disk.write(0, b"x"),
            lambda: disk.write_zeroes(0, 512),
            lambda: disk.discard(0, 512),
            lambda: disk.truncate(2 * MiB),
        ]
        for call in calls:
            with pytest.raises(blocklib.ReadOnlyError, match="r\\+"):
                call()
        disk.flush()
    assert Path("disk.qcow2").read_bytes() == before


def test_a_name_that_looks_like_options_is_a_file_name() -> None:
    text = 'json:{"driver": "raw", "file": {"driver": "file", "filename": "disk.img"}}'
    make_raw("disk.img", 1 * MiB)
    for name in (text, "driver=raw,file.filename=disk.img", "file:disk.img", "disk.img,driver=raw"):
        with pytest.raises(blocklib.ImageNotFoundError):
            blocklib.open(name, format="raw")
        with pytest.raises(blocklib.ImageNotFoundError):
            blocklib.info(name, format="raw")
    blocklib.open(blocklib.parse_options(text)).close()


def test_a_disk_is_shown_on_one_line_whatever_its_name() -> None:
    make_raw("line\nend.img", 1 * MiB)
    with blocklib.open("line\nend.img", format="raw") as disk:
        assert repr(disk) == r"<Disk r 1 MiB: line\nend.img (raw)>"


def test_options_that_name_a_new_file_say_no_more_than_that() -> None:
    ways: list[dict[str, Any]] = [
        {"file": "disk.qcow2"},
        {"filename": "disk.qcow2"},
        {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}},
        {"driver": "qcow2", "file.filename": Path("disk.qcow2")},
        {"driver": "file", "filename": "disk.qcow2"},
    ]
    for target in ways:
        assert blocklib.create(target, 1 * MiB, format="qcow2", overwrite=True).filename == "disk.qcow2"
        blocklib.open("disk.qcow2").close()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"driver": "raw", "file.filename": "new"}, "driver"),
        ({"driver": "qcow2", "file.filename": "new", "lazy-refcounts": True}, "lazy-refcounts"),
        ({"driver": "file", "filename": "new", "cache.direct": True}, "cache"),
    ]
    for target, option in wrong:
        with pytest.raises(blocklib.OptionError) as caught:
            blocklib.create(target, 1 * MiB, format="qcow2")
        assert caught.value.option == option
    no_files: list[dict[str, Any]] = [
        {},
        {"driver": "memory", "size": 1},
        {"driver": "qcow2", "file": {"driver": "null-co"}},
    ]
    for target in no_files:
        with pytest.raises(blocklib.UsageError, match="only a file"):
            blocklib.create(target, 1 * MiB, format="qcow2")
    assert not Path("new").exists()


@pytest.mark.parametrize("target", [b"disk.img", 3, None, ["disk.img"]])
def test_a_target_of_another_type_is_refused(target: Any) -> None:
    make_raw("disk.img", 1 * MiB)
    with pytest.raises(blocklib.UsageError, match="target"):
        blocklib.open(target, format="raw")
    with pytest.raises(blocklib.UsageError, match="target"):
        blocklib.create(target, 1 * MiB, format="raw")
