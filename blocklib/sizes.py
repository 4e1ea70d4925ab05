"""Sizes as text: what qemu-img accepts (``1.5G``, ``64k``, ``0x200``) and what it prints (``10 GiB``).

On the ground floor: imports only the errors.
"""

from __future__ import annotations

from blocklib.errors import UsageError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

MAX_SIZE = (1 << 63) - 1
"""The largest size or offset in bytes: what fits a signed 64-bit file offset."""

_UNITS = {"b": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB, "p": 1 << 50, "e": 1 << 60}
_DECIMAL_DIGITS = frozenset("0123456789")
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_PRINTED_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
# No number below 2**63 needs more; int() and float() of very long texts take more than linear time.
_MAX_TEXT = 64


def parse_size(text: str) -> int:
    """Bytes from text: decimal or hexadecimal, with one of the suffixes b, k, M, G, T, P, E (powers of 1024, any case).

    A decimal may have a fraction if its unit is larger than a byte; it is rounded to the nearest byte.  Raises
    UsageError for anything else: negative, empty, `KiB`, exponents, more than 2**63 - 1.
    """
    body = text.lstrip(" \t").removeprefix("+")
    if len(body) > _MAX_TEXT:
        raise _not_a_size(text[:_MAX_TEXT] + "...")
    is_hex = body[:2] in ("0x", "0X")
    digits, rest = _split_digits(body[2:], _HEX_DIGITS) if is_hex else _split_digits(body, _DECIMAL_DIGITS)
    if not digits:
        raise _not_a_size(text)
    fraction = ""
    if rest.startswith(".") and not is_hex:
        fraction, rest = _split_digits(rest[1:], _DECIMAL_DIGITS)
    unit = _UNITS.get(rest.lower()) if rest else 1
    if unit is None or (unit == 1 and fraction.strip("0")):
        raise _not_a_size(text)
    size = int(digits, 16 if is_hex else 10) * unit
    if fraction:
        size += int(float(f"0.{fraction}") * unit + 0.5)
    if size > MAX_SIZE:
        raise UsageError(f"size {text!r} is too large: at most {MAX_SIZE} bytes")
    return size


def _split_digits(text: str, allowed: frozenset[str]) -> tuple[str, str]:
    end = 0
    while end < len(text) and text[end] in allowed:
        end += 1
    return text[:end], text[end:]


def _not_a_size(text: str) -> UsageError:
    return UsageError(f"{text!r} is not a size: a number of bytes, or one with a suffix k, M, G, T, P or E")


def format_size(size: int) -> str:
    """Three significant digits and a binary unit, as ``qemu-img info`` prints: 10737418240 is ``10 GiB``.

    The unit changes at 1000, not 1024, of the one below: 1000 bytes are ``0.977 KiB``.
    """
    exponent = 0
    while exponent < len(_PRINTED_UNITS) - 1 and size >= 1000 << (10 * exponent):
        exponent += 1
    return f"{size / (1 << (10 * exponent)):.3g} {_PRINTED_UNITS[exponent]}B"
