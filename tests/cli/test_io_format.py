"""Sizes, statistics and dumps as ``io`` prints them; the expected texts were printed by qemu-io 7.2."""

from __future__ import annotations

import pytest

from blocklib.cli.io_format import dump, report_lines, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.500 KiB"),
        (1000448, "977 KiB"),
        (1049088, "1 MiB"),
        (1114112, "1.062 MiB"),
        (5000000000, "4.657 GiB"),
        (1234567890432, "1.123 TiB"),
        (3 << 59, "1.500 EiB"),
        (245.569376, "245.569376 bytes"),
        (0.01127, "0.011270 bytes"),
        (100.003781, "100.003781 bytes"),
        (2.0004, "2 bytes"),
    ],
)
def test_size_text_is_that_of_qemu_io(size: float, text: str) -> None:
    assert size_text(size) == text


def test_report_shows_amount_place_time_and_rates() -> None:
    assert report_lines("wrote", 65536, 1024, 0.5, parsable=False) == [
        "wrote 65536/65536 bytes at offset 1024",
        "64 KiB, 1 ops; 00.50 sec (128 KiB/sec and 2.0000 ops/sec)",
    ]


def test_report_of_more_than_a_minute_shows_a_clock() -> None:
    assert report_lines("read", 1 << 30, 0, 3661.5, parsable=False)[1].startswith("1 GiB, 1 ops; 1:01:01.50 (286.379 KiB")


def test_parsable_report_is_one_line_of_five_fields() -> None:
    assert report_lines("read", 4096, 0, 0.25, parsable=True) == ["4096,1,0:00:00.25,16384.000,4.000"]


def test_report_of_an_immeasurably_short_request_does_not_divide_by_zero() -> None:
    assert "00.00 sec" in report_lines("read", 0, 0, 0.0, parsable=False)[1]


def test_dump_has_sixteen_bytes_a_line_from_the_offset_on() -> None:
    data = memoryview(bytes(range(0x2E, 0x4F)))
    assert dump(data, 0x1_0000_0001).splitlines() == [
        "100000001:  2e 2f 30 31 32 33 34 35 36 37 38 39 3a 3b 3c 3d  ..0123456789....",
        "100000011:  3e 3f 40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d  ...ABCDEFGHIJKLM",
        "100000021:  4e  N",
    ]


def test_dump_pads_short_offsets_to_eight_digits() -> None:
    assert dump(memoryview(b"a_\xff"), 5) == "00000005:  61 5f ff  a.."
