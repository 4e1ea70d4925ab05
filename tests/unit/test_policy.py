"""Reference policies: what an image may make us open.  Some names are those of known attacks."""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blocklib.errors import (
    ImageCorruptError,
    ImageLimitError,
    ImageNotFoundError,
    OptionError,
    PolicyError,
    StorageError,
    UsageError,
)
from blocklib.policy import (
    AllowList,
    Limits,
    PlainPath,
    Reference,
    References,
    RestrictedFile,
    SameDirectory,
    decide,
    qemu_target,
    resolve_backing_name,
)

NOT_PATHS = [
    'json:{"driver": "file", "filename": "base.qcow2"}',
    "json:{}",
    "nbd://127.0.0.1/x",
    "nbd:unix:/run/x",
    "file:base.qcow2",
    "file:///etc/passwd",
    "fat:rw:/etc",
    "http://host/base.qcow2",
    ":base.qcow2",
    "a:b",
]


def _reference(name: str = "base.qcow2", referrer: str | None = "/images/top.qcow2", **more: Any) -> Reference:
    return replace(Reference("backing", name, "qcow2", referrer, 1), **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    (path / "base.qcow2").write_bytes(b"base")
    return path


# -- the same folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("referrer", "name", "path"),
    [
        ("/images/top.qcow2", "base.qcow2", "/images/base.qcow2"),
        ("/images/top.qcow2", "./base.qcow2", "/images/base.qcow2"),
        ("/images/top.qcow2", "././/base.qcow2", "/images/base.qcow2"),
        ("/images/top.qcow2", "/images/base.qcow2", "/images/base.qcow2"),
        ("/images/top.qcow2", "//images/./base.qcow2", "/images/base.qcow2"),
        ("/images/top.qcow2", "./a:b", "/images/a:b"),
        ("/images/top.qcow2", " base", "/images/ base"),
        ("/images/top.qcow2", "...", "/images/..."),
        ("/images/../other/top.qcow2", "base.qcow2", "/images/../other/base.qcow2"),
        ("top.qcow2", "base.qcow2", "base.qcow2"),
        ("dir/top.qcow2", "base.qcow2", "dir/base.qcow2"),
        ("/top.qcow2", "/base.qcow2", "/base.qcow2"),
        ("json:{}", "base.qcow2", "base.qcow2"),
    ],
)
def test_same_directory_allows_a_name_in_the_folder_of_the_image(referrer: str, name: str, path: str) -> None:
    reference = _reference(name, referrer)
    found = SameDirectory()(reference)
    assert isinstance(found, RestrictedFile)
    assert os.fspath(found) == path
    assert found.reference == reference
    assert "/" not in found.name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "./",
        "/",
        "../base.qcow2",
        "./../base.qcow2",
        "x/../base.qcow2",
        "sub/base.qcow2",
        "base.qcow2/",
        "/etc/passwd",
        "/base.qcow2",
        "/images/../images/base.qcow2",
        "/images/sub/base.qcow2",
        "/Images/base.qcow2",
        "base\0.qcow2",
        *NOT_PATHS,
    ],
)
def test_same_directory_refuses_every_other_name(name: str) -> None:
    assert SameDirectory()(_reference(name)) is None


def test_an_absolute_name_in_the_folder_of_a_relative_image_is_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert SameDirectory()(_reference(str(folder / "base.qcow2"), "top.qcow2")) is not None
    assert SameDirectory()(_reference(str(folder / "base.qcow2"), "sub/top.qcow2")) is None


def test_same_directory_ends_at_its_depth() -> None:
    policy = SameDirectory(max_depth=2)
    assert policy(_reference(depth=2)) is not None
    assert policy(_reference(depth=3)) is None
    assert SameDirectory(max_depth=0)(_reference()) is None


@pytest.mark.parametrize("policy", [SameDirectory(), AllowList(["base.qcow2"])], ids=["same", "list"])
def test_restricted_policies_refuse_what_they_would_have_to_guess(policy: SameDirectory | AllowList) -> None:
    assert policy(_reference(format=None)) is None
    assert policy(_reference(kind="data-file", format=None)) is not None
    assert policy(_reference(referrer=None)) is None


# -- the allow-list ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "name", "path"),
    [
        ("base.qcow2", "base.qcow2", "/images/base.qcow2"),
        ("base.qcow2", "./base.qcow2", "/images/base.qcow2"),
        ("base.qcow2", "/images/base.qcow2", "/images/base.qcow2"),
        ("/images/base.qcow2", "base.qcow2", "/images/base.qcow2"),
        ("/pool/golden.img", "/pool//golden.img", "/pool/golden.img"),
        ("sub/base.qcow2", "sub/./base.qcow2", "/images/sub/base.qcow2"),
        ("../pool/golden.img", "../pool/golden.img", "/images/../pool/golden.img"),
        (Path("base.qcow2"), "base.qcow2", "/images/base.qcow2"),
        ("./a:b", "./a:b", "/images/./a:b"),
    ],
)
def test_an_allow_list_allows_the_path_that_an_entry_means(entry: str | Path, name: str, path: str) -> None:
    found = AllowList(["other.img", entry])(_reference(name))
    assert isinstance(found, RestrictedFile)
    assert os.fspath(found) == path


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("base.qcow2", "other.qcow2"),
        ("base.qcow2", "sub/base.qcow2"),
        ("base.qcow2", "sub/../base.qcow2"),
        ("/pool/golden.img", "/pool/../pool/golden.img"),
        ("/pool/golden.img", "../pool/golden.img"),
        ("../pool/golden.img", "/pool/golden.img"),
        ("golden.img", "/pool/golden.img"),
        ("base.qcow2", "base.qcow2\0"),
        *((name, name) for name in NOT_PATHS if not name.endswith("/")),
    ],
)
def test_an_allow_list_refuses_every_other_name(entry: str, name: str) -> None:
    assert AllowList([entry])(_reference(name)) is None


def test_a_relative_entry_is_looked_for_beside_the_image_that_names_it() -> None:
    policy = AllowList(["base.qcow2"])
    found = policy(_reference(referrer="/pool/middle.qcow2", depth=2))
    assert found is not None
    assert os.fspath(found) == "/pool/base.qcow2"


@pytest.mark.parametrize("names", ["base.qcow2", b"base.qcow2", Path("base.qcow2"), [""], ["dir/"], ["a\0b"]])
def test_an_allow_list_that_cannot_be_meant_is_refused(names: Any) -> None:
    with pytest.raises(UsageError):
        AllowList(names)


# -- opening what a restricted policy found ----------------------------------------------------------------------------


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _found(folder: Path, name: str = "base.qcow2") -> RestrictedFile:
    found = SameDirectory()(_reference(name, str(folder / "top.qcow2")))
    assert found is not None
    return found


def test_a_regular_file_is_opened_close_on_exec(folder: Path) -> None:
    fd = _found(folder).open_fd(os.O_RDONLY)
    try:
        assert os.read(fd, 10) == b"base"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_a_file_is_opened_relative_to_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = SameDirectory()(_reference(referrer="top.qcow2"))
    assert found is not None
    fd = found.open_fd(os.O_RDWR)
    os.close(fd)


def test_opening_never_creates_nor_truncates(folder: Path) -> None:
    with pytest.raises(ImageNotFoundError) as caught:
        _found(folder, "new.qcow2").open_fd(os.O_RDWR | os.O_CREAT)
    assert caught.value.operation == "open"
    assert caught.value.filename == str(folder / "new.qcow2")
    assert not (folder / "new.qcow2").exists()
    os.close(_found(folder).open_fd(os.O_RDWR | os.O_TRUNC))
    assert (folder / "base.qcow2").read_bytes() == b"base"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY], ids=["read", "read-write", "write"])
@pytest.mark.parametrize("kind", ["link", "dangling", "loop", "folder", "fifo", "socket", "device-link"])
def test_what_is_no_regular_file_is_refused_without_waiting(folder: Path, kind: str, flags: int) -> None:
    path = folder / "evil"
    match kind:
        case "link":
            path.symlink_to("base.qcow2")
        case "dangling":
            path.symlink_to("nothing")
        case "loop":
            path.symlink_to("evil")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                # The name of a socket is short, that of a temporary folder is not.
                fd = os.open(folder, os.O_RDONLY)
                server.bind(f"/proc/self/fd/{fd}/evil")
                os.close(fd)
        case "device-link":
            path.symlink_to("/dev/zero")
    before = _open_descriptors()
    with pytest.raises(PolicyError, match=r'references="allow"$') as caught:
        _found(folder, "evil").open_fd(flags)
    assert caught.value.reference.name == "evil"
    assert _open_descriptors() == before


def test_a_file_that_becomes_a_link_while_it_is_opened_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    real_stat = os.stat

    def swap(path: Any, **more: Any) -> os.stat_result:
        result = real_stat(path, **more)
        if path == "base.qcow2":
            (folder / "base.qcow2").unlink()
            (folder / "base.qcow2").symlink_to(tmp_path / "secret")
        return result

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(PolicyError):
        _found(folder).open_fd(os.O_RDONLY)


def test_a_file_that_becomes_a_fifo_while_it_is_opened_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_stat = os.stat

    def swap(path: Any, **more: Any) -> os.stat_result:
        result = real_stat(path, **more)
        if path == "base.qcow2":
            (folder / "base.qcow2").unlink()
            os.mkfifo(folder / "base.qcow2")
        return result

    monkeypatch.setattr(os, "stat", swap)
    before = _open_descriptors()
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with pytest.raises(PolicyError):
            _found(folder).open_fd(flags)
        (folder / "base.qcow2").unlink()
        (folder / "base.qcow2").write_bytes(b"base")
    assert _open_descriptors() == before


def test_a_link_on_the_way_to_the_folder_is_the_callers_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    os.close(_found(tmp_path / "link").open_fd(os.O_RDONLY))


def test_a_folder_that_is_not_there_is_a_storage_error(folder: Path) -> None:
    with pytest.raises(ImageNotFoundError):
        _found(folder / "missing").open_fd(os.O_RDONLY)
    with pytest.raises(StorageError):
        _found(folder / "base.qcow2").open_fd(os.O_RDONLY)
    with pytest.raises(StorageError):
        _found(folder, "x" * 300).open_fd(os.O_RDONLY)


# -- the decision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "reference", "ending"),
    [
        (
            "deny",
            _reference(),
            'references=blocklib.policy.SameDirectory() or references="allow"',
        ),
        (
            "deny",
            _reference("../base.qcow2"),
            "references=blocklib.policy.AllowList(['../base.qcow2']) or references=\"allow\"",
        ),
        ("deny", _reference(format=None), 'backing={"driver": ..., "file.filename": ...} or references="allow"'),
        ("deny", _reference("nbd://h/x"), 'backing={"driver": ..., "file.filename": ...} or references="allow"'),
        (
            "deny",
            _reference("nbd://h/x", kind="data-file"),
            'data_file={"driver": "file", "filename": ...} or references="allow"',
        ),
        (
            SameDirectory(),
            _reference("/pool/x"),
            "references=blocklib.policy.AllowList(['/pool/x']) or references=\"allow\"",
        ),
        (SameDirectory(max_depth=0), _reference(), 'pass references="allow"'),
        (
            AllowList(["x"]),
            _reference(),
            'references=blocklib.policy.SameDirectory() or references="allow"',
        ),
        (lambda _: None, _reference(), 'pass references="allow"'),
    ],
)
def test_a_refusal_ends_with_the_argument_that_allows_it(references: References, reference: Reference, ending: str) -> None:
    with pytest.raises(PolicyError) as caught:
        decide(references, reference)
    text = str(caught.value)
    assert text.endswith(ending)
    assert repr(reference.name) in text
    assert caught.value.reference == reference
    assert caught.value.node == reference.referrer
    assert isinstance(caught.value, PermissionError)


def test_what_the_refusal_proposes_does_allow_it(folder: Path) -> None:
    reference = _reference(referrer=str(folder / "top.qcow2"))
    assert decide(SameDirectory(), reference)
    outside = replace(reference, name="../x.qcow2")
    assert decide(AllowList(["../x.qcow2"]), outside)


def test_a_refusal_says_why() -> None:
    with pytest.raises(PolicyError, match="max_depth is 8"):
        decide(SameDirectory(), _reference(depth=9))
    with pytest.raises(PolicyError, match="not in the list"):
        decide(AllowList(["x"]), _reference())
    with pytest.raises(PolicyError, match="does not say its format"):
        decide(SameDirectory(), _reference(format=None))


def test_what_a_policy_function_answers_is_opened() -> None:
    asked = []

    def policy(reference: Reference) -> Path:
        asked.append(reference)
        return Path("/pool") / Path(reference.name).name

    assert decide(policy, _reference("../../etc/base.qcow2")) == Path("/pool/base.qcow2")
    assert asked == [_reference("../../etc/base.qcow2")]


@pytest.mark.parametrize("references", ["ALLOW", "", None, True, 7, ["base.qcow2"]])
def test_what_is_no_policy_is_a_usage_error(references: Any) -> None:
    with pytest.raises(UsageError):
        decide(references, _reference())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("base.qcow2", PlainPath("/images/base.qcow2")),
        ("../base.qcow2", PlainPath("/images/../base.qcow2")),
        ("/etc/base", PlainPath("/etc/base")),
        ("file:base", PlainPath("base")),
        ("nbd://h/x", "nbd://h/x"),
        ('json:{"driver": "null-co"}', {"driver": "null-co"}),
    ],
)
def test_with_allow_a_name_means_what_it_means_to_qemu(name: str, target: object) -> None:
    assert decide("allow", _reference(name)) == target


def test_a_colon_in_the_folder_is_no_protocol() -> None:
    assert decide("allow", _reference("base", "a:b/top")) == PlainPath("a:b/base")


@pytest.mark.parametrize("name", ["foo:bar", "json:", "json:{", 'json:{"a": 1, "a": 2}', "fat:/etc", "nbd:h"])
def test_with_allow_a_name_that_makes_no_sense_is_the_images_fault(name: str) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        decide("allow", _reference(name))
    assert caught.value.structure == "backing file name"
    assert caught.value.expected
    assert caught.value.found


def test_a_relative_name_needs_a_folder() -> None:
    assert decide("allow", _reference("/base", None)) == PlainPath("/base")
    with pytest.raises(ImageCorruptError):
        decide("allow", _reference("base", None))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("referrer", "name", "full"),
    [
        ("top", "base", "base"),
        ("d/top", "base", "d/base"),
        ("./d//top", "base", "./d//base"),
        ("/abs/d/top", "base", "/abs/d/base"),
        ("/top", "base", "/base"),
        ("d/top", "e/base", "d/e/base"),
        ("d/top", "../base", "d/../base"),
        ("d/top", "./base", "d/./base"),
        ("d/top", "/abs/base", "/abs/base"),
        ("d/top", "//abs/base", "//abs/base"),
        ("d/top", "a:b", "a:b"),
        ("d/top", "./a:b", "d/./a:b"),
        ("d/top", "e/a:b", "d/e/a:b"),
        ("d/top", "file:base", "file:base"),
        ("d/top", "nbd://h/x", "nbd://h/x"),
        ("d/top", 'json:{"driver":"null-co"}', 'json:{"driver":"null-co"}'),
        ("d/top", ":x", ":x"),
        ("d/top", " base", "d/ base"),
        ("d/a:b.q", "base", "d/base"),
        ("./a:b.q", "base", "./base"),
    ],
)
def test_a_full_name_is_what_qemu_computes(referrer: str, name: str, full: str) -> None:
    assert resolve_backing_name(referrer, name) == full


def test_a_name_of_the_command_line_is_read_as_qemu_reads_it() -> None:
    assert qemu_target("disk.img") == PlainPath("disk.img")
    assert qemu_target("./a:b") == PlainPath("./a:b")
    assert qemu_target("json:{}") == {}
    with pytest.raises(UsageError, match=r"unknown protocol 'a'; a file of that name is '\./a:b'"):
        qemu_target("a:b")
    with pytest.raises(OptionError):
        qemu_target("json:")


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        _reference(),
        SameDirectory(max_depth=3),
        AllowList(["base.qcow2", "/pool/golden.img"]),
        Limits(chain_depth=3),
        PlainPath("json:{}"),
        SameDirectory()(_reference()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_immutable_and_survive_pickling(value: Any) -> None:
    copy = pickle.loads(pickle.dumps(value))
    assert copy == value
    assert hash(copy) == hash(value)
    assert repr(copy) == repr(value)
    for name in (one.name for one in dataclasses.fields(value)):
        with pytest.raises(AttributeError):
            setattr(value, name, None)
        with pytest.raises(AttributeError):
            delattr(value, name)


def test_policies_differ_by_what_they_allow() -> None:
    assert SameDirectory(max_depth=3) != SameDirectory()
    assert AllowList(["a"]) != AllowList(["b"])
    assert SameDirectory(1) != PlainPath("x")
    assert repr(SameDirectory()) == "SameDirectory(max_depth=8)"


def test_a_refusal_survives_pickling() -> None:
    with pytest.raises(PolicyError) as caught:
        decide("deny", _reference())
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.reference == caught.value.reference
    assert str(copy) == str(caught.value)


def test_a_limit_is_the_largest_that_is_allowed() -> None:
    limits = Limits(chain_depth=3)
    limits.check("chain_depth", 3, structure="backing chain")
    with pytest.raises(ImageLimitError, match="chain_depth=3") as caught:
        limits.check("chain_depth", 4, structure="backing chain", host_offset=8, node="top.qcow2")
    error = caught.value
    assert (error.structure, error.host_offset, error.node) == ("backing chain", 8, "top.qcow2")
    assert (error.expected, error.found) == ("at most 3", "4")
