"""Sizes as text: accepted as qemu-img accepts them, printed as it prints them (numbers recorded from qemu-img 7.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib.errors import UsageError
from blocklib.sizes import MAX_SIZE, GiB, KiB, MiB, TiB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("512B", 512),
        ("1k", KiB),
        ("64K", 64 * KiB),
        ("1M", MiB),
        ("1.5G", 3 * GiB // 2),
        ("10t", 10 * TiB),
        ("1P", 1024 * TiB),
        ("7E", 7 << 60),
        ("0x10", 16),
        ("0X1f", 31),
        ("0x10k", 16 * KiB),
        ("0x10b", 0x10B),
        ("0x1E", 30),
        ("010k", 10 * KiB),
        (" 1k", KiB),
        ("\t1k", KiB),
        ("+1k", KiB),
        ("1.", 1),
        ("1.k", KiB),
        ("1.0", 1),
        ("1.0b", 1),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_a_size_is_a_number_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0.0004k", 0),
        ("0.0005k", 1),
        ("0.3k", 307),
        ("0.3M", 314573),
        ("1.9999k", 2048),
        ("1.00000001G", 1073741835),
        ("0.1M", 104858),
        ("2.6M", 2726298),
        ("1.1E", 1268213655067531680),
    ],
)
def test_a_fraction_is_rounded_to_the_nearest_byte_as_qemu_rounds_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "k",
        ".5k",
        "-1",
        "-0",
        "- 1k",
        "1.5",
        "1.5b",
        "0x",
        "0xg",
        "0x1.8k",
        "00x10",
        "1e3",
        "1.5e3",
        "5kb",
        "5KiB",
        "1Y",
        "1 k",
        "1k ",
        "1_000",
        "1,5k",
        "inf",
        "nan",
        "1.infk",
        "1.-5k",
        "٣k",
        "²",
        "1k\n",
        "\0",
    ],
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize("text", ["8E", str(MAX_SIZE + 1), "0x8000000000000000", "9" * 30, "9" * 1_000_000])
def test_what_no_file_offset_can_hold_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@given(st.integers(0, MAX_SIZE))
def test_the_plain_number_of_bytes_is_a_size(size: int) -> None:
    assert parse_size(str(size)) == parse_size(hex(size)) == parse_size(f"{size}b") == size


@given(st.text(max_size=12))
def test_any_text_gives_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) <= MAX_SIZE
    except UsageError:
        pass


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023, "0.999 KiB"),
        (KiB, "1 KiB"),
        (193 * KiB, "193 KiB"),
        (200704, "196 KiB"),
        (1023000, "999 KiB"),
        (1023590, "1e+03 KiB"),
        (1023999, "1e+03 KiB"),
        (1024000, "0.977 MiB"),
        (3 * GiB // 2, "1.5 GiB"),
        (10 * GiB, "10 GiB"),
        (10 * GiB - 512, "10 GiB"),
        (1 << 50, "1 PiB"),
        (7 << 60, "7 EiB"),
        (MAX_SIZE, "8 EiB"),
    ],
)
def test_a_size_is_printed_with_three_digits_and_the_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text
