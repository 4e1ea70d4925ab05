"""The LUKS header as bytes: what qemu-img wrote, round trips, and headers that ask for too much or make no sense."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable

import pytest

from blocklib.crypto import luks
from blocklib.crypto.luks import HEADER_LENGTH, LuksHeader, merge_key, parse_luks, split_key
from blocklib.errors import ImageCorruptError, ImageError, ImageLimitError, UnsupportedFeatureError

LENGTH = 2068480
MOST = 1 << 27

# The fields and slot 0 of a header by qemu-img 7.2: aes-256, xts, plain64, sha256; the passphrase is "abc".
FIELDS = bytes.fromhex(
    "4c554b53babe000161657300000000000000000000000000000000000000000000000000000000007874732d706c61696e363400"
    "000000000000000000000000000000000000000073686132353600000000000000000000000000000000000000000000000000"
    "0000000fc800000040496e172292fca42d982db2b08d1598eed7b245b049c29c48d697a011e791905eecd30215b2898417ef61"
    "0d9fa56bdca3c17e907300002d3436363337666231632d353436322d343534612d613034622d34343162626263623465656400"
    "00000000ac71f30000b30568ebbbccf0b76e4c1aac0b76ee6c20541fd036a7c1665390e356ee0efbb0d42000000008"
    "00000fa0"
)


def _made(passphrase: bytes = b"abc") -> tuple[LuksHeader, bytes, bytes]:
    """A small header with one slot, its master key, and the whole area."""
    header = luks.new_header(key_length=32, cipher_mode="cbc-essiv:sha256", hash_name="sha256")
    key = os.urandom(32)
    luks.set_digest(header, key, seconds=0.001)
    material = luks.fill_slot(header, 0, key, passphrase, seconds=0.001)
    area = bytearray(header.payload_offset)
    area[:HEADER_LENGTH] = header.pack()
    area[header.slots[0].key_offset :][: len(material)] = material
    start = header.slots[0].key_offset
    area[start : start + len(material)] = material
    return header, key, bytes(area)


def _parse(data: bytes, *, length: int | None = None, most: int = MOST) -> LuksHeader:
    return parse_luks(data, length=LENGTH if length is None else length, most_iterations=most)


def test_a_header_of_qemu_img_is_read_and_written_back() -> None:
    spacing = 258048
    slots = b"".join(
        struct.pack(">II32sII", luks.SLOT_INACTIVE, 0, bytes(32), (4096 + index * spacing) // 512, 4000)
        for index in range(1, 8)
    )
    data = FIELDS + slots
    header = _parse(data)
    assert (header.cipher_algorithm, header.mode, header.iv_generator, header.iv_hash) == ("aes-256", "xts", "plain64", None)
    assert (header.hash, header.key_length, header.payload_offset) == ("sha256", 64, LENGTH)
    assert (header.digest_iterations, header.uuid) == (11572, "6637fb1c-5462-454a-a04b-441bbbcb4eed")
    assert [slot.active for slot in header.slots] == [True] + 7 * [False]
    assert (header.slots[0].iterations, header.slots[0].key_offset) == (45829, 4096)
    assert header.pack() == data


def test_a_new_header_is_laid_out_as_qemu_img_does() -> None:
    header = luks.new_header(key_length=64, cipher_mode="xts-plain64", hash_name="sha256")
    assert header.payload_offset == LENGTH
    assert [slot.key_offset for slot in header.slots] == [4096 + index * 258048 for index in range(8)]


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 32, 48, 64, 33])
def test_a_split_key_is_merged_again(hash_name: str, length: int) -> None:
    key = os.urandom(length)
    material = split_key(key, hash_name, 5)
    assert len(material) == 5 * length
    assert merge_key(material, hash_name, 5) == key
    spoilt = bytearray(material)
    spoilt[length] ^= 1
    assert merge_key(bytes(spoilt), hash_name, 5) != key


def test_the_splitter_diffuses_each_piece_with_its_number() -> None:
    # Two stripes, so that the merged key is the diffused first stripe XOR the second one.
    first, second = os.urandom(50), os.urandom(50)
    pieces = [first[:32], first[32:]]
    diffused = b"".join(hashlib.sha256(struct.pack(">I", index) + piece).digest() for index, piece in enumerate(pieces))
    expected = bytes(a ^ b for a, b in zip(diffused, second))
    assert merge_key(first + second, "sha256", 2) == expected


def test_a_passphrase_opens_its_slot_and_another_none() -> None:
    header, key, area = _made()
    parsed = _parse(area, length=len(area))
    read = lambda offset, length: area[offset : offset + length]  # noqa: E731
    assert parsed == header
    assert luks.unlock(parsed, b"abc", read) == (0, key)
    assert luks.unlock(parsed, b"abd", read) is None
    assert luks.unlock(parsed, b"abc", read, only=1) is None


def test_a_header_does_not_show_digests_or_salts() -> None:
    header, _key, _area = _made()
    assert header.digest.hex() not in repr(header)
    assert "digest=" not in repr(header)
    assert "salt" not in repr(header)


def _put(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda area: area[:offset] + data + area[offset + len(data) :]


def _slot(index: int, field: int, value: int) -> Callable[[bytes], bytes]:
    return _put(luks.slot_field_offset(index) + field, struct.pack(">I", value))


@pytest.mark.parametrize(
    ("change", "kind", "structure"),
    [
        pytest.param(_put(0, b"LUKX"), ImageCorruptError, "magic", id="magic"),
        pytest.param(_put(6, b"\0\2"), UnsupportedFeatureError, "version", id="version 2"),
        pytest.param(_put(8, b"serpent\0"), UnsupportedFeatureError, "cipher name", id="serpent"),
        pytest.param(_put(8, b"twofish\0"), UnsupportedFeatureError, "cipher name", id="twofish"),
        pytest.param(_put(8, b"cast5\0"), UnsupportedFeatureError, "cipher name", id="cast5"),
        pytest.param(_put(8, b"a\x1b[2J\0"), ImageCorruptError, "cipher name", id="terminal codes"),
        pytest.param(_put(8, b"a" * 32), ImageCorruptError, "cipher name", id="no NUL"),
        pytest.param(_put(40, b"lrw-plain64\0"), UnsupportedFeatureError, "cipher mode", id="mode"),
        pytest.param(_put(40, b"cbc-benbi\0"), UnsupportedFeatureError, "cipher mode", id="iv generator"),
        pytest.param(_put(40, b"cbc-essiv:sha1\0"), UnsupportedFeatureError, "cipher mode", id="essiv length"),
        pytest.param(_put(40, b"cbc-essiv\0"), UnsupportedFeatureError, "cipher mode", id="essiv without hash"),
        pytest.param(_put(72, b"whirlpool\0"), UnsupportedFeatureError, "hash", id="hash"),
        pytest.param(_put(72, b"shake_128\0"), UnsupportedFeatureError, "hash", id="hash without a digest size"),
        pytest.param(_put(108, struct.pack(">I", 31)), ImageCorruptError, "key bytes", id="key bytes"),
        pytest.param(_put(108, struct.pack(">I", 0)), ImageCorruptError, "key bytes", id="no key"),
        pytest.param(_put(108, struct.pack(">I", 24)), UnsupportedFeatureError, "key bytes", id="aes-192-cbc"),
        pytest.param(_put(108, struct.pack(">I", 0xFFFFFFFF)), ImageCorruptError, "key bytes", id="huge key"),
        pytest.param(_put(104, struct.pack(">I", 0)), ImageCorruptError, "payload offset", id="payload in header"),
        pytest.param(_put(104, struct.pack(">I", 0xFFFFFFFF)), ImageCorruptError, "payload offset", id="payload far"),
        pytest.param(_put(164, struct.pack(">I", 0)), ImageCorruptError, "iterations of the", id="no digest iterations"),
        pytest.param(_put(164, struct.pack(">I", 0xFFFFFFFF)), ImageLimitError, "iterations", id="digest iterations"),
        pytest.param(_slot(0, 0, 1), ImageCorruptError, "key slot 0", id="state"),
        pytest.param(_slot(0, 4, 0), ImageCorruptError, "key slot 0", id="no iterations"),
        pytest.param(_slot(0, 4, 0xFFFFFFFF), ImageLimitError, "iterations", id="iterations"),
        pytest.param(_slot(3, 44, 0xFFFFFFFF), ImageCorruptError, "key slot 3", id="stripes of an inactive slot"),
        pytest.param(_slot(0, 44, 1), ImageCorruptError, "key slot 0", id="one stripe"),
        pytest.param(_slot(0, 40, 0), ImageCorruptError, "key slot 0", id="material in the header"),
        pytest.param(_slot(0, 40, 0xFFFFFFFF), ImageCorruptError, "key slot 0", id="material far"),
        pytest.param(_slot(1, 40, 9), ImageCorruptError, "key slot 1", id="material in another slot"),
        pytest.param(lambda area: area[:HEADER_LENGTH - 1], ImageCorruptError, "length", id="short"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused_before_any_work(
    change: Callable[[bytes], bytes], kind: type[ImageError], structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _header, _key, area = _made()
    monkeypatch.setattr(luks, "derive", None)
    with pytest.raises(ImageError) as caught:
        _parse(change(area), length=len(area))
    assert type(caught.value) is kind
    assert caught.value.structure is not None
    assert caught.value.structure.startswith(f"LUKS header, {structure}")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_all_active_slots_count_for_the_limit_of_iterations() -> None:
    _header, _key, area = _made()
    for index in range(8):
        area = _slot(index, 0, luks.SLOT_ACTIVE)(_slot(index, 4, 1000)(area))
    area = _put(164, struct.pack(">I", 10))(area)
    _parse(area, length=len(area), most=8080)
    with pytest.raises(ImageLimitError):
        _parse(area, length=len(area), most=8079)


def test_iterations_grow_with_the_time_that_opening_may_take() -> None:
    assert luks._bounded(0) == luks.LEAST_ITERATIONS
    assert luks._bounded(1e20) == 0xFFFFFFFF
    assert luks.iterations_per_second("sha256", 64, seconds=0.001) > 1000
