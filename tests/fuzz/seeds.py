"""What a target begins with: inputs made by code, and those that were found and kept, as lines of hexadecimal digits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.fuzz import images

FOUND: Final = Path(__file__).parent / "found"
_TEXTS: Final[tuple[tuple[int, str], ...]] = (
    (0, "driver=qcow2,file.driver=file,file.filename=a,,b.qcow2,l2-cache-size=1M,lazy-refcounts=on"),
    (0, 'json:{"driver": "raw", "size": 1048576, "offset": 512, "file": {"driver": "file", "filename": "x"}}'),
    (0, 'json:{"driver": "qcow2", "file.filename": "a", "backing": {"driver": "qcow2", "file": {"driver": "nbd"}}}'),
    (0, "driver=nbd,server.type=inet,server.host=::1,server.port=10809,export=a"),
    (0, "driver=throttle,throttle-group=g,file.filename=a,x-image.limits.bps-total=1"),
    (1, "qcow2 size=1G,cluster_size=4k,compat=1.1,extended_l2=on,refcount_bits=1,lazy_refcounts=on"),
    (1, "qcow2 encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10\0preallocation=metadata,size=64k"),
    (1, "qcow2 backing_file=a,,b,backing_fmt=raw,data_file=d,data_file_raw=on,compression_type=zstd,size=1"),
    (1, "raw size=8E,preallocation=falloc,nocow=on,extent_size_hint=1M"),
    (2, "compat=0.10,refcount_bits=16,lazy_refcounts=off,size=1.5G"),
    (2, "encrypt.state=active,encrypt.new-secret=s,encrypt.keyslot=1,encrypt.iter-time=10"),
    (3, "1.5G"),
    (3, "0x10K"),
    (3, "7E"),
    (3, "18446744073709551615"),
    (4, "nbd://host:10809/export"),
    (4, "nbds+unix:///a%20b?socket=/tmp/s&tls-certificates=/etc/pki&tls-verify-peer=false&tls-hostname=h"),
    (4, "nbds://user@[::1]:1/?tls-psk-file=f"),
    (5, "nbd:unix:/tmp/s:exportname=a"),
    (5, "nbd:127.0.0.1:10809:exportname=x"),
    (6, "file:a"),
    (6, "json:{}"),
    (7, "convert\0-f\0qcow2\0-O\0raw\0-o\0size=1\0--object\0secret,id=s,data=a\0a\0b"),
    (7, "create\0-f\0qcow2\0-b\0base\0-F\0raw\0a\0001G"),
    (7, "map\0--output=json\0--start-offset\0001k\0--max-length=2k\0x"),
    (7, "nbd\0-p\00010809\0-e\0004\0--bitmap=b\0--tls-creds\0t\0x"),
    (7, "dd\0if=a\0of=b\0bs=512\0count=1\0-O\0raw"),
)
_COMMANDS: Final = (
    "write -P 3 0 4k\nread -P 3 0 4k\nread -v -P 0xab -s 2 -l 4 0 512\nflush",
    "write -z -u 0 64k\nwrite -c 64k 64k\ndiscard 4k 4k\nmap\nalloc 0 1M\ninfo\nlength",
    "aio_write -P 5 512 1k 2k\naio_read -P 5 512 3k\naio_flush\nwritev -f 0 512 1024\nreadv -q 0 1k 2k",
    "truncate 1M\ntruncate -m metadata 300k\nhelp\nhelp write\nread -C 100k 64k",
    "write -b 0 512\nread -b 0 512\nwrite -z -n 0 4k\nbreak a b\nresume x\nwait_break x\nremove_break x",
    "close\nopen -r a\nopen -o driver=qcow2 x\nreopen -r\nreopen -w -c none\nreopen -o l2-cache-size=1M\nquit",
)


def _images(most: int) -> Iterator[bytes]:
    """Each image, without damage and with some; each way through the phases."""
    rnd = random.Random("images")
    for number in range(len(images.NAMES)):
        yield bytes((number, 4, 0)) + rnd.randbytes(60)
        yield bytes((number, 0xFC, 0)) + rnd.randbytes(60)
    for number in range(most):
        phases = rnd.choice((1, 3, 4, 4, 5, 7)) | rnd.choice((0, 8, 16, 16, 16, 32, 48)) | rnd.choice((0, 0, 0, 0xC0))
        yield bytes((number, phases, rnd.randrange(1, 4))) + rnd.randbytes(80)


def _headers() -> Iterator[bytes]:
    yield from (images.image(name).data[:600] for name in images.NAMES)
    yield from _images(20)


_MAGICS: Final = (
    (0, b"QFI\xfb\0\0\0\1"),
    (0, b"KDMV\1\0\0\0"),
    (0, b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 1 FLAT \"a\" 0\n"),
    (0, b"vhdxfile"),
    (9, b"conectix\0\0\0\2\0\1\0\0"),
    (0, b"QED\0"),
    (1, b"\x7f\x10\xda\xbe\1\0\1\0"),
    (0, b"LUKS\xba\xbe\0\1"),
    (0, b"WithoutFreeSpace\2\0\0\0"),
    (6, b"CD001\1"),
    (2, bytes(4) + b"\xee" + bytes(59) + b"\x55\xaa"),
    (7, b"regi"),
)


def _inspected() -> Iterator[bytes]:
    rnd = random.Random("inspected")
    for place, magic in _MAGICS:
        for size in (3, 5):
            yield bytes((rnd.randrange(8) << 1, 0, size, 0, place, len(magic) - 1)) + magic
    for number in range(len(images.NAMES)):
        yield bytes((1, 3, number, rnd.randrange(3))) + rnd.randbytes(40)


def _options() -> Iterator[bytes]:
    for kind, text in _TEXTS:
        yield bytes((kind,)) + text.encode()


def _commands() -> Iterator[bytes]:
    for number, text in enumerate(_COMMANDS * 2):
        yield bytes((number | (number & 1) << 7,)) + text.encode()


def _noise() -> Iterator[bytes]:
    rnd = random.Random("noise")
    yield from (bytes((number & 1,)) + rnd.randbytes(rnd.randrange(120)) for number in range(60))


_MADE: Final[dict[str, Callable[[], Iterator[bytes]]]] = {
    "header": _headers,
    "tables": lambda: _images(40),
    "snapshots": lambda: _images(20),
    "bitmaps": lambda: _images(20),
    "luks": lambda: _images(10),
    "inspect": _inspected,
    "nbd-server": _noise,
    "nbd-client": _noise,
    "options": _options,
    "commands": _commands,
}


def made(target: str) -> list[bytes]:
    """The inputs of a target that code makes."""
    return list(_MADE[target]())


def kept(target: str) -> dict[str, bytes]:
    """The inputs of a target that once found a bug, by the names of their files."""
    return {path.stem: bytes.fromhex(path.read_text()) for path in sorted((FOUND / target).glob("*.hex"))}


def keep(target: str, name: str, data: bytes) -> Path:
    """Keep an input, for a regression test and as a seed."""
    path = FOUND / target / f"{name}.hex"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = data.hex()
    path.write_text("".join(text[start : start + 100] + "\n" for start in range(0, len(text), 100)))
    return path


def words(target: str) -> list[str]:
    """What is worth trying in an input of text."""
    if target == "options":
        from blocklib.cli.main import COMMANDS
        from blocklib.options import options_of

        found = {name for driver in ("qcow2", "raw", "file", "nbd", "throttle") for name in options_of(driver)}
        found |= {*options_of("qcow2", "create"), *options_of("raw", "create"), *options_of("qcow2", "amend")}
        return sorted(found | set(COMMANDS) | {"json:{", "nbd+unix://", "?socket=", "on", "off", ".0.", "e9"})
    if target == "commands":
        from blocklib.cli.io_commands import COMMANDS as LINES

        return sorted({name for command in LINES for name in command.names} | {"64k", " -P ", "\\x0a", "1M", "-1"})
    return []
