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


LONG_VERBS = ("check", "commit", "compare", "convert", "measure", "rebase", "repair")


@pytest.mark.parametrize("verb", LONG_VERBS)
def test_a_long_verb_is_a_job_of_the_same_arguments(verb: str) -> None:
    waited = inspect.signature(getattr(blocklib, verb)).parameters
    started = inspect.signature(getattr(jobs, verb)).parameters
    for name in waited.keys() & started.keys():
        assert (waited[name].kind, waited[name].default) == (started[name].kind, started[name].default)
    assert "progress" in waited
    assert {"speed", "auto_finalize"} <= started.keys()
    assert waited.keys() - started.keys() <= {"progress"}


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


@pytest.mark.parametrize("target", [b"disk.img", 3, None, ["disk.img"]])
def test_a_target_of_another_type_is_refused(target: Any) -> None:
    make_raw("disk.img", 1 * MiB)
    with pytest.raises(blocklib.UsageError, match="target"):
        blocklib.open(target, format="raw")
    with pytest.raises(blocklib.UsageError, match="target"):
        blocklib.create(target, 1 * MiB, format="raw")
