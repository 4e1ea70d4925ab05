"""Printing: names that could drive a terminal, names that are no text, and qemu-img's layouts."""

from __future__ import annotations

import json

import pytest

from blocklib.cli.output import fact_lines, json_text, print_error, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("disk.qcow2", "disk.qcow2"),
        ("dürr 磁.raw", "dürr 磁.raw"),
        ("a\nb", r"a\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("x\u202egnp.exe", r"x\u202egnp.exe"),
        ("bytes \udcff", "bytes \udcff"),
    ],
)
def test_control_characters_of_a_name_do_not_reach_the_terminal(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_an_error_is_one_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("blocklib", "first\nsecond")
    assert capsys.readouterr().err == "blocklib: first\\nsecond\n"


def test_json_is_laid_out_with_four_spaces() -> None:
    assert json_text({"a": 1, "b": [True]}) == '{\n    "a": 1,\n    "b": [\n        true\n    ]\n}'


def test_json_has_no_lone_surrogates() -> None:
    assert json.loads(json_text({"name": ["inv\udcff", "ü"]})) == {"name": ["inv\ufffd", "ü"]}


def test_facts_are_nested_by_indentation() -> None:
    facts = {
        "compat": "1.1",
        "lazy-refcounts": False,
        "refcount-bits": 16,
        "bitmaps": [{"flags": ["auto"], "name": "b1"}, {"flags": [], "name": "b2"}],
        "encrypt": {"format": "luks"},
    }
    assert fact_lines(facts, 1) == [
        "    compat: 1.1",
        "    lazy refcounts: false",
        "    refcount bits: 16",
        "    bitmaps:",
        "        [0]:",
        "            flags:",
        "                [0]: auto",
        "            name: b1",
        "        [1]:",
        "            flags:",
        "            name: b2",
        "    encrypt:",
        "        format: luks",
    ]
