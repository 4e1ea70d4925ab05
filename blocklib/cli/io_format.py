"""What ``io`` prints: sizes, times, the statistics of a request and dumps of bytes, laid out as qemu-io does."""

from __future__ import annotations

_UNITS = ((1 << 60, "EiB"), (1 << 50, "PiB"), (1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_DUMP_WIDTH = 16
# Of all that can be printed only letters and digits are shown as themselves.
_SHOWN = bytes(byte if chr(byte).isascii() and chr(byte).isalnum() else ord(".") for byte in range(256))


def size_text(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least one: ``1.500 KiB``, ``64 KiB``, ``245.569376 bytes``.

    A fraction that begins with three zeroes is left out.
    """
    factor, unit = next((pair for pair in _UNITS if size >= pair[0]), (1, "bytes"))
    number = f"{size:f}" if factor == 1 else f"{size / factor:.3f}"
    return f"{number.partition('.000')[0]} {unit}"


def report_lines(verb: str, length: int, offset: int, seconds: float, *, parsable: bool) -> list[str]:
    """The statistics of one request that moved all of its `length` bytes in `seconds`."""
    seconds = max(seconds, 1e-9)
    rate, operations = length / seconds, 1 / seconds
    if parsable:
        return [f"{length},1,{_clock(seconds)},{rate:.3f},{operations:.3f}"]
    took = _clock(seconds) if seconds >= 60 else f"{_hundredths(seconds)} sec"
    return [
        f"{verb} {length}/{length} bytes at offset {offset}",
        f"{size_text(length)}, 1 ops; {took} ({size_text(rate)}/sec and {operations:.4f} ops/sec)",
    ]


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02}:{_hundredths(seconds % 60)}"


def _hundredths(seconds: float) -> str:
    whole, part = divmod(int(seconds * 100), 100)
    return f"{whole:02}.{part:02}"


def dump(data: memoryview, offset: int) -> str:
    """`data` as lines of 16 bytes, in hexadecimal and as text, each after its offset; the first byte's is `offset`."""
    lines = []
    for start in range(0, len(data), _DUMP_WIDTH):
        row = bytes(data[start : start + _DUMP_WIDTH])
        lines.append(f"{offset + start:08x}:  {row.hex(' ')}  {row.translate(_SHOWN).decode('ascii')}")
    return "\n".join(lines)
