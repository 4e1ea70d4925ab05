"""The grammar of the command line: what GNU getopt_long accepts, we accept."""

from __future__ import annotations

import pytest

from blocklib.cli.getopt import Option, Syntax, UsageFailure, help_text, parse

SYNTAX = Syntax(
    "FILE",
    "Do something.",
    (
        Option(("-f", "--format"), "FMT", "the format"),
        Option(("-U", "--force-share"), None, "share"),
        Option(("--output",), "KIND", "how to print"),
        Option(("--object",), "DEF", "an object"),
        Option(("-q",), None, "quiet"),
    ),
)
SIGNED = Syntax("FILE SIZE", "Resize.", (Option(("--shrink",), None, "shrink"),), signed_operands=True)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-f", "qcow2", "-U", "a"], id="apart"),
        pytest.param(["-Ufqcow2", "a"], id="combined"),
        pytest.param(["-Uf", "qcow2", "a"], id="combined-value-apart"),
        pytest.param(["--format=qcow2", "--force-share", "a"], id="long"),
        pytest.param(["--format", "qcow2", "--force", "a"], id="abbreviated"),
        pytest.param(["a", "-U", "-f", "qcow2"], id="operands-first"),
        pytest.param(["-U", "a", "-f", "raw", "-f", "qcow2"], id="last-one-counts"),
    ],
)
def test_one_meaning_has_many_spellings(arguments: list[str]) -> None:
    given = parse(SYNTAX, arguments)
    assert given.last("-f") == "qcow2"
    assert given.has("-U")
    assert not given.has("-q")
    assert given.operands == ["a"]


def test_all_values_of_a_repeated_option_are_kept() -> None:
    given = parse(SYNTAX, ["--object", "a", "--object=b"])
    assert given.all("--object") == ["a", "b"]
    assert given.all("-f") == []
    assert given.last("-f") is None


def test_two_dashes_end_the_options() -> None:
    assert parse(SYNTAX, ["-q", "--", "-U"]).operands == ["-U"]


def test_one_dash_is_an_operand() -> None:
    assert parse(SYNTAX, ["-"]).operands == ["-"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--bogus", "unknown option '--bogus'"),
        ("-k", "unknown option '-k'"),
        ("-1", "unknown option '-1'"),
        ("-f", "option '-f' needs a value"),
        ("--format", "option '--format' needs a value"),
        ("--form", "option '--format' needs a value"),
        ("--force-share=yes", "option '--force-share' takes no value"),
        ("--o=json", "option '--o' is short for more than one: --object, --output"),
    ],
)
def test_a_wrong_option_is_named(argument: str, message: str) -> None:
    with pytest.raises(UsageFailure) as caught:
        parse(SYNTAX, [argument])
    assert str(caught.value) == message


@pytest.mark.parametrize("arguments", [["a", "-10M", "--shrink"], ["--shrink", "a", "-10M"], ["a", "--shrink", "-10M"]])
def test_a_negative_size_is_an_operand_where_sizes_have_signs(arguments: list[str]) -> None:
    given = parse(SIGNED, arguments)
    assert given.operands == ["a", "-10M"]
    assert given.has("--shrink")


def test_the_help_lists_every_option_and_what_all_commands_accept() -> None:
    text = help_text("blocklib demo", SYNTAX)
    assert text.startswith("usage: blocklib demo [options] FILE\n")
    for spelled in ("-f, --format=FMT", "-U, --force-share ", "-q ", "--untrusted", "--debug", "-h, --help"):
        assert spelled in text
    assert max(map(len, text.splitlines())) < 120
