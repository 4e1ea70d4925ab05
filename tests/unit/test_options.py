"""Options: text and dotted names into nested dicts, typed values, errors that name what would be right."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib import drivers
from blocklib.errors import OptionError
from blocklib.options import (
    asks_for_help,
    cache_flags,
    check_options,
    common_value,
    describe_options,
    flatten,
    nest,
    options_of,
    parse_create_options,
    parse_options,
)
from blocklib.options.tables import COMMON, CREATE, OPEN, Table
from blocklib.options.text import MAX_NESTING
from blocklib.throttling import ThrottleGroup

_NAMES = st.text(string.ascii_lowercase + "-_", min_size=1, max_size=6)
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=2))
_TREES = st.recursive(
    st.dictionaries(_NAMES, _LEAVES, max_size=4),
    lambda children: st.dictionaries(_NAMES, st.one_of(_LEAVES, children), max_size=4),
    max_leaves=12,
)


# -- nested and dotted -------------------------------------------------------------------------------------------------


@given(_TREES)
def test_nesting_undoes_flattening(tree: dict[str, Any]) -> None:
    flat = flatten(tree)
    assert nest(flat) == nest(tree) == tree
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_dotted_and_nested_names_mix() -> None:
    mixed = {"driver": "qcow2", "file": {"driver": "file"}, "file.filename": "x", "backing.file.filename": "y"}
    expected = {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}, "backing": {"file": {"filename": "y"}}}
    assert nest(mixed) == expected
    assert flatten(mixed) == {
        "driver": "qcow2",
        "file.driver": "file",
        "file.filename": "x",
        "backing.file.filename": "y",
    }


def test_nesting_leaves_the_argument_alone() -> None:
    inner = {"driver": "file"}
    given_options = {"file": inner, "file.filename": "x"}
    assert nest(given_options)["file"] == {"driver": "file", "filename": "x"}
    assert inner == {"driver": "file"}


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"file.filename": "a", "file": {"filename": "b"}}, "file.filename"),
        ({"file": {"filename": "b"}, "file.filename": "a"}, "file.filename"),
        ({"file": "name", "file.filename": "a"}, "file.filename"),
        ({"file.filename": "a", "file": "name"}, "file"),
        ({"backing": None, "backing.driver": "raw"}, "backing.driver"),
        ({"a": {"b.c": 1}, "a.b": {"c": 2}}, "a.b.c"),
    ],
)
def test_an_option_given_twice_is_refused(options: dict[str, Any], option: str) -> None:
    for function in (nest, flatten):
        with pytest.raises(OptionError, match="twice") as caught:
            function(options)
        assert caught.value.option == option


@pytest.mark.parametrize("name", ["", ".", ".a", "a.", "a..b"])
def test_an_empty_part_of_a_name_is_refused(name: str) -> None:
    with pytest.raises(OptionError):
        nest({name: 1})
    with pytest.raises(OptionError):
        nest({"file": {name: 1}})


def test_a_name_that_is_not_text_is_refused() -> None:
    with pytest.raises(OptionError):
        nest({7: 1})  # type: ignore[dict-item]


def test_options_that_contain_themselves_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["backing"] = loop
    with pytest.raises(OptionError, match="nested"):
        nest(loop)


def test_a_chain_as_long_as_the_limit_may_be_spelled_out() -> None:
    chain: dict[str, Any] = {"driver": "raw"}
    for _ in range(201):
        chain = {"driver": "qcow2", "backing": chain}
    assert nest(chain) == chain
    with pytest.raises(OptionError, match="nested"):
        nest({".".join("b" * (MAX_NESTING + 1)): 1})


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        (
            "driver=qcow2,file.filename=disk.qcow2,lazy-refcounts=on",
            {"driver": "qcow2", "file": {"filename": "disk.qcow2"}, "lazy-refcounts": "on"},
        ),
        ("driver=qcow2,lazy-refcounts", {"driver": "qcow2", "lazy-refcounts": "on"}),
        ("filename=a,,b", {"filename": "a,b"}),
        ("filename=a,,,driver=file", {"filename": "a,", "driver": "file"}),
        ("filename=,,,,", {"filename": ",,"}),
        ("filename=a=b", {"filename": "a=b"}),
        ("filename=,driver=file", {"filename": "", "driver": "file"}),
        ("driver=file,", {"driver": "file"}),
        (
            'json:{"driver": "raw", "size": 1048576, "file": {"driver": "file", "filename": "disk.img"}}',
            {"driver": "raw", "size": 1048576, "file": {"driver": "file", "filename": "disk.img"}},
        ),
        ('json:{"file.filename": "x", "backing": null}', {"file": {"filename": "x"}, "backing": None}),
    ],
)
def test_options_are_parsed_as_qemu_parses_them(text: str, options: dict[str, Any]) -> None:
    assert parse_options(text) == options


@given(st.dictionaries(_NAMES, st.text(max_size=10), min_size=1))
def test_any_value_can_be_written_with_doubled_commas(options: dict[str, str]) -> None:
    text = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in options.items())
    assert parse_options(text) == options


@given(_TREES)
def test_json_gives_what_it_says(tree: dict[str, Any]) -> None:
    assert parse_options("json:" + json.dumps(tree)) == tree


@pytest.mark.parametrize(
    "text",
    [
        "=x",
        "driver=raw,=x",
        ",driver=raw",
        "driver=raw,,,,,=x,=",
        "driver=raw,driver=raw",
        "file=x,file.driver=raw",
        "json:",
        "json:7",
        'json:["driver"]',
        'json:{"driver"}',
        'json:{"driver": "raw"',
        'json:{"driver": "raw", "driver": "raw"}',
        'json:{"file": {"x": 1, "x": 2}}',
        'json:{"file.x": 1, "file": {"x": 2}}',
        'json:{"size": NaN}',
        'json:{"size": Infinity}',
        'json:{"size": ' + "9" * 5000 + "}",
        "json:" + '{"a":' * 100_000,
        "json:" + '{"a":' * 300 + "1" + "}" * 300,
    ],
)
def test_text_that_makes_no_sense_is_an_option_error(text: str) -> None:
    with pytest.raises(OptionError):
        parse_options(text)


def test_create_options_are_joined_and_the_last_one_counts() -> None:
    texts = ["cluster_size=4k,backing_file=a,,b", "lazy_refcounts", "cluster_size=8k"]
    assert parse_create_options(texts) == {"cluster_size": "8k", "backing_file": "a,b", "lazy_refcounts": "on"}
    assert parse_create_options([]) == {}


@pytest.mark.parametrize("text", ["", ",", "size=1,", ",size=1", "size=1,help,"])
def test_a_list_of_create_options_has_no_empty_part(text: str) -> None:
    with pytest.raises(OptionError, match="invalid list"):
        parse_create_options([text])
    with pytest.raises(OptionError, match="invalid list"):
        asks_for_help([text])


@pytest.mark.parametrize(
    ("texts", "asks"),
    [
        (["help"], True),
        (["size=1,help"], True),
        (["size=1", "?"], True),
        (["help=on"], False),
        (["backing_file=help"], False),
        (["backing_file=a,,help"], False),
        ([], False),
    ],
)
def test_help_is_a_part_of_its_own(texts: list[str], asks: bool) -> None:
    assert asks_for_help(texts) is asks


# -- the tables --------------------------------------------------------------------------------------------------------


_SOME: Mapping[str, Any] = {"throttle-group": ThrottleGroup()}
"""A value for options of kinds that take no text."""


def _tables() -> list[tuple[Table, str]]:
    return [("open", driver) for driver in OPEN] + [("create", driver) for driver in CREATE]


def test_every_driver_has_a_table() -> None:
    assert sorted(OPEN) == sorted(drivers.names())
    assert set(CREATE) <= set(drivers.names())


@pytest.mark.parametrize(("table", "driver"), _tables())
def test_a_table_agrees_with_itself(table: Table, driver: str) -> None:
    rows = (*COMMON, *OPEN[driver]) if table == "open" else CREATE[driver]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert row.help
        assert "\n" not in row.help
        assert {choice for _, choice in row.aliases} <= set(row.choices)
        assert bool(row.choices) or row.kind != "choice"
        if row.default is not None:
            whole = {"bool": "on" if row.default else "off", "choices": row.default, "list": row.default}
            spelled = whole.get(row.kind, str(row.default))
            required = {other.name: _SOME.get(other.kind, "x") for other in rows if other.required}
            assert check_options(driver, {**required, row.name: spelled}, table=table)[row.name] == row.default


def test_options_come_out_typed_with_defaults_filled_in() -> None:
    values = check_options(
        "qcow2",
        {"file.filename": "x", "cache": {"direct": "on"}, "l2-cache-size": "1.5M", "lazy-refcounts": True},
    )
    assert values["driver"] == "qcow2"
    assert values["file"] == {"filename": "x"}
    assert values["cache.direct"] is True
    assert values["cache.no-flush"] is None
    assert values["l2-cache-size"] == 3 << 19
    assert values["lazy-refcounts"] is True
    assert values["detect-zeroes"] == "off"
    assert values["pass-discard-request"] is True
    assert values.keys() | {"backing", "data-file"} == options_of("qcow2").keys()


def test_a_child_that_was_not_given_differs_from_no_child() -> None:
    assert "backing" not in check_options("qcow2", {"file": "x"})
    assert check_options("qcow2", {"file": "x", "backing": None})["backing"] is None


@pytest.mark.parametrize("child", [{"driver": "raw", "file.filename": "x"}, "node0", Path("x"), object()])
def test_children_are_not_looked_into(child: object) -> None:
    found = check_options("qcow2", {"file": child})["file"]
    assert found == (nest(child) if isinstance(child, dict) else child)


@pytest.mark.parametrize("child", [7, True, None, ["x"], 1.5, b"x"])
def test_what_cannot_be_a_child_is_refused(child: object) -> None:
    with pytest.raises(OptionError) as caught:
        check_options("raw", {"file": child})
    assert caught.value.option == "file"


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        *[("lazy-refcounts", text, True) for text in ("on", "yes", "true", "y", True)],
        *[("lazy-refcounts", text, False) for text in ("off", "no", "false", "n", False)],
        ("discard", "unmap", "unmap"),
        ("discard", "on", "unmap"),
        ("discard", "off", "ignore"),
        ("detect-zeroes", True, "on"),
        ("detect-zeroes", False, "off"),
        ("l2-cache-size", 8 << 20, 8 << 20),
        ("l2-cache-size", "8M", 8 << 20),
        ("l2-cache-size", 0, 0),
        ("l2-cache-entry-size", "0x200", 512),
        ("node-name", "drive-0.top_1", "drive-0.top_1"),
    ],
)
def test_a_value_may_be_typed_or_text(name: str, value: object, typed: object) -> None:
    found = check_options("qcow2", {"file": "x", name: value})[name]
    assert found == typed
    assert type(found) is type(typed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lazy-refcounts", bad) for bad in (1, 0, None, "1", "ON", "", "maybe", ["on"], 1.0)],
        *[("discard", bad) for bad in ("foo", None, 1, "")],
        *[("detect-zeroes", bad) for bad in ("true", 1, None)],
        *[("l2-cache-size", bad) for bad in (-1, "-1", "garbage", True, None, 1.5, "8E", 1 << 63)],
        *[("l2-cache-entry-size", bad) for bad in (256, 513, "4M", 0)],
        *[("node-name", bad) for bad in ("", "#x", "0x", "a b", "ä", "a" * 32, 7, None)],
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_option(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        check_options("qcow2", {"file": "x", name: value})
    assert caught.value.option == name
    assert caught.value.driver == "qcow2"
    assert name in str(caught.value)


@pytest.mark.parametrize(("value", "typed"), [(8, 8), ("8", 8), ("0x10", 16)])
def test_a_number_may_be_typed_or_text(value: object, typed: int) -> None:
    assert check_options("qcow2", {"refcount_bits": value}, table="create")["refcount_bits"] == typed


@pytest.mark.parametrize(
    "bad", ["1k", "0x1k", "0x", "01", "²", "", "1.0", " ", "eight", -1, 0, 3, 1 << 32, None, True]
)
def test_a_bad_number_is_refused_by_the_name_of_its_option(bad: object) -> None:
    with pytest.raises(OptionError) as caught:
        check_options("qcow2", {"refcount_bits": bad}, table="create")
    assert caught.value.option == "refcount_bits"


def test_an_option_that_every_driver_has_can_be_typed_without_one() -> None:
    assert common_value("read-only", "off") is False
    assert common_value("discard", "on") == "unmap"
    with pytest.raises(OptionError, match=r"^option 'cache\.direct' is 'on' or 'off', not 7") as caught:
        common_value("cache.direct", 7)
    assert (caught.value.option, caught.value.driver) == ("cache.direct", None)


def test_a_bad_choice_names_the_choices() -> None:
    with pytest.raises(OptionError, match="off, metadata, falloc, full") as caught:
        check_options("qcow2", {"preallocation": "some"}, table="create")
    assert caught.value.choices == ("off", "metadata", "falloc", "full")
    with pytest.raises(OptionError) as caught:
        check_options("qcow2", {"lazy_refcounts": "1"}, table="create")
    assert caught.value.choices == ("on", "off")


def test_a_long_value_does_not_make_a_long_error() -> None:
    with pytest.raises(OptionError) as caught:
        check_options("null-co", {"size": "9" * 100_000})
    assert len(str(caught.value)) < 300


def test_an_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(OptionError, match="did you mean 'lazy-refcounts'") as caught:
        check_options("qcow2", {"file": "x", "lazy-refcount": True})
    assert (caught.value.option, caught.value.driver) == ("lazy-refcount", "qcow2")
    assert "lazy-refcounts" in caught.value.choices
    with pytest.raises(OptionError, match=r"did you mean 'cache\.direct'"):
        check_options("file", {"filename": "x", "cache": {"driect": True}})
    with pytest.raises(OptionError, match=r"there are .*filename"):
        check_options("file", {"filename": "x", "zzz": True})


def test_a_group_is_not_an_option() -> None:
    with pytest.raises(OptionError):
        check_options("file", {"filename": "x", "cache": True})
    assert check_options("file", {"filename": "x", "cache": {}})["cache.direct"] is None


def test_the_file_name_may_be_a_path() -> None:
    assert check_options("file", {"filename": Path("dir/x")})["filename"] == "dir/x"
    with pytest.raises(OptionError):
        check_options("file", {"filename": b"x"})


def test_a_required_option_is_missed_unless_somebody_else_adds_it() -> None:
    with pytest.raises(OptionError, match="'file' is required") as caught:
        check_options("qcow2", {})
    assert caught.value.option == "file"
    assert check_options("qcow2", {"l2-cache-size": 1}, partial=True)["l2-cache-size"] == 1


def test_another_driver_than_the_one_asked_for_is_refused() -> None:
    assert check_options("raw", {"driver": "raw", "file": "x"})["driver"] == "raw"
    with pytest.raises(OptionError) as caught:
        check_options("raw", {"driver": "qcow2", "file": "x"})
    assert caught.value.option == "driver"


def test_an_unknown_driver_is_refused() -> None:
    for driver, table in (("vmdk", "open"), ("vmdk", "create"), ("null-co", "create")):
        with pytest.raises(OptionError) as caught:
            check_options(driver, {}, table=table)  # type: ignore[arg-type]
        assert caught.value.option == "driver"
        assert "raw" in caught.value.choices


# -- creating ----------------------------------------------------------------------------------------------------------


def test_create_options_have_the_defaults_of_qemu_img() -> None:
    assert check_options("qcow2", {}, table="create") == {
        "backing_file": None,
        "backing_fmt": None,
        "cluster_size": 65536,
        "compat": "1.1",
        "compression_type": "zlib",
        "data_file": None,
        "data_file_raw": False,
        "extended_l2": False,
        "encrypt.cipher-alg": None,
        "encrypt.cipher-mode": None,
        "encrypt.format": None,
        "encrypt.hash-alg": None,
        "encrypt.iter-time": None,
        "encrypt.ivgen-alg": None,
        "encrypt.ivgen-hash-alg": None,
        "encrypt.key-secret": None,
        "encryption": False,
        "extent_size_hint": None,
        "lazy_refcounts": False,
        "nocow": False,
        "preallocation": "off",
        "refcount_bits": 16,
        "size": None,
    }
    assert check_options("raw", {"size": "1G"}, table="create") == {
        "extent_size_hint": None,
        "nocow": False,
        "preallocation": "off",
        "size": 1 << 30,
    }


@pytest.mark.parametrize(("given_compat", "compat"), [("v2", "0.10"), ("0.10", "0.10"), ("v3", "1.1"), ("1.1", "1.1")])
def test_a_version_has_two_names(given_compat: str, compat: str) -> None:
    assert check_options("qcow2", {"compat": given_compat}, table="create")["compat"] == compat


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("compat", value) for value in ("2", "V2", "1.0", 2)],
        *[("cluster_size", value) for value in ("256", "3k", "4M", "0", -512)],
        *[("refcount_bits", value) for value in ("3", "0", "128", "-8", "8k", "08", "8.0", 65, True)],
        ("preallocation", "on"),
        ("compression_type", "lz4"),
    ],
)
def test_a_bad_value_for_creating_is_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        check_options("qcow2", {name: value}, table="create")
    assert caught.value.option == name


def test_raw_has_no_metadata_to_preallocate() -> None:
    with pytest.raises(OptionError) as caught:
        check_options("raw", {"preallocation": "metadata"}, table="create")
    assert caught.value.choices == ("off", "falloc", "full")


# -- telling -----------------------------------------------------------------------------------------------------------


def test_options_are_described_in_the_layout_of_qemu_img() -> None:
    lines = describe_options("qcow2").split("\n")
    assert lines[0] == "Supported qcow2 options:"
    assert lines[-3:] == [
        "",
        "The protocol level may support further options.",
        "Specify the target filename to include those options.",
    ]
    table = lines[1:-3]
    # What stands before the meaning is qemu-img's, to the space.
    assert [line[: line.index(" - ") + 3] for line in table] == [
        "  backing_file=<str>     - ",
        "  backing_fmt=<str>      - ",
        "  cluster_size=<size>    - ",
        "  compat=<str>           - ",
        "  compression_type=<str> - ",
        "  data_file=<str>        - ",
        "  data_file_raw=<bool (on/off)> - ",
        "  encrypt.cipher-alg=<str> - ",
        "  encrypt.cipher-mode=<str> - ",
        "  encrypt.format=<str>   - ",
        "  encrypt.hash-alg=<str> - ",
        "  encrypt.iter-time=<num> - ",
        "  encrypt.ivgen-alg=<str> - ",
        "  encrypt.ivgen-hash-alg=<str> - ",
        "  encrypt.key-secret=<str> - ",
        "  encryption=<bool (on/off)> - ",
        "  extended_l2=<bool (on/off)> - ",
        "  lazy_refcounts=<bool (on/off)> - ",
        "  preallocation=<str>    - ",
        "  refcount_bits=<num>    - ",
        "  size=<size>            - ",
    ]


def test_with_a_target_the_options_of_its_protocol_are_among_them() -> None:
    lines = describe_options("raw", protocol="file").split("\n")
    assert [line.partition("=")[0] for line in lines] == [
        "Supported options:",
        "  extent_size_hint",
        "  nocow",
        "  preallocation",
        "  size",
    ]


@pytest.mark.parametrize(("table", "driver"), _tables())
def test_every_option_is_described(table: Table, driver: str) -> None:
    text = describe_options(driver, table)
    assert all(f"  {name}=<" in text for name in options_of(driver, table))


# -- cache modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "direct", "no_flush", "writethrough"),
    [
        ("none", True, False, False),
        ("off", True, False, False),
        ("writeback", False, False, False),
        ("writethrough", False, False, True),
        ("directsync", True, False, True),
        ("unsafe", False, True, False),
    ],
)
def test_a_cache_mode_is_three_flags(mode: str, direct: bool, no_flush: bool, writethrough: bool) -> None:
    assert cache_flags(mode) == (direct, no_flush, writethrough)


def test_an_unknown_cache_mode_names_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        cache_flags("fast")
    assert caught.value.choices == ("none", "writeback", "writethrough", "directsync", "unsafe")
