"""Sector ciphers against published vectors, against the library's own modes, and one path against the other."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from blocklib.crypto import ciphers
from blocklib.crypto.ciphers import SECTOR, SectorCipher

COMBINATIONS = [
    (mode, length * (2 if mode == "xts" else 1), generator)
    for mode in ciphers.MODES
    for length in ciphers.AES_KEY_LENGTHS
    for generator in ciphers.IV_GENERATORS
]
RUNS = (1, ciphers._FEW, ciphers._FEW + 1, 600)
"""Sectors: one by one, up to the last number for that, whole runs, and whole runs in more than one step."""


def _cipher(mode: str, key_length: int, generator: str, seed: int = 1) -> SectorCipher:
    rng = random.Random(seed)
    return SectorCipher(
        rng.randbytes(key_length), mode, generator, essiv_key=rng.randbytes(32) if generator == "essiv" else None
    )


@pytest.mark.parametrize("sectors", RUNS)
@pytest.mark.parametrize(("mode", "key_length", "generator"), COMBINATIONS)
def test_a_run_is_encrypted_as_its_sectors_are(mode: str, key_length: int, generator: str, sectors: int) -> None:
    cipher = _cipher(mode, key_length, generator)
    data = random.Random(sectors).randbytes(sectors * SECTOR)
    start = (1 << 32) - 3  # where "plain" begins anew and "plain64" does not
    whole = cipher.encrypt(start, data)
    one_by_one = b"".join(
        bytes(cipher.encrypt(start + index, data[index * SECTOR : (index + 1) * SECTOR])) for index in range(sectors)
    )
    assert whole == one_by_one
    cipher.decrypt(start, memoryview(whole))
    assert whole == data


def _reference(mode: str, key: bytes, iv: bytes, data: bytes) -> bytes:
    made: modes.XTS | modes.CBC | modes.CTR
    made = modes.XTS(iv) if mode == "xts" else modes.CBC(iv) if mode == "cbc" else modes.CTR(iv)
    return Cipher(algorithms.AES(key), made).encryptor().update(data)


@pytest.mark.parametrize("sectors", [1, 40])
@pytest.mark.parametrize(("mode", "key_length"), [("xts", 32), ("xts", 64), ("cbc", 16), ("cbc", 24), ("ctr", 32)])
def test_each_sector_is_one_message_whose_iv_is_its_number(mode: str, key_length: int, sectors: int) -> None:
    key = os.urandom(key_length)
    data = os.urandom(sectors * SECTOR)
    first = 1 << 33
    expected = b"".join(
        _reference(mode, key, (first + i).to_bytes(16, "little"), data[i * SECTOR : (i + 1) * SECTOR])
        for i in range(sectors)
    )
    assert SectorCipher(key, mode, "plain64").encrypt(first, data) == expected


@pytest.mark.parametrize("sectors", [1, 40])
def test_essiv_encrypts_the_number_with_the_hash_of_the_key(sectors: int) -> None:
    key, salt = os.urandom(32), os.urandom(32)
    data = os.urandom(sectors * SECTOR)
    ecb = Cipher(algorithms.AES(salt), modes.ECB()).encryptor()
    expected = b"".join(
        _reference("cbc", key, ecb.update((7 + i).to_bytes(16, "little")), data[i * SECTOR : (i + 1) * SECTOR])
        for i in range(sectors)
    )
    assert SectorCipher(key, "cbc", "essiv", essiv_key=salt).encrypt(7, data) == expected


def test_ctr_counts_past_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    key, salt = os.urandom(32), os.urandom(32)
    iv = os.urandom(8) + (0xFFFF_FFFF_FFFF_FFF0).to_bytes(8, "big")  # its low half runs over inside the sector
    # No number makes this IV, so it is put where IVs come from.
    cipher = SectorCipher(key, "ctr", "essiv", essiv_key=salt)
    monkeypatch.setattr(cipher, "_iv", lambda _sector: iv)
    monkeypatch.setattr(cipher, "_ivs", lambda _sector, n: np.frombuffer(iv * n, dtype="<u8").reshape(n, 2))
    data = os.urandom(SECTOR)
    expected = _reference("ctr", key, iv, data)
    assert cipher.encrypt(0, data) == expected
    assert cipher.encrypt(0, data * 40) == expected * 40


def test_xts_vector_of_ieee_1619() -> None:
    # Vector 4: a data unit of 512 bytes with the number 0; only its first and last blocks are quoted.
    key = bytes.fromhex("27182818284590452353602874713526" + "31415926535897932384626433832795")
    plain = bytes(range(256)) * 2
    expected_start = bytes.fromhex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c")
    for sectors in (1, 40):
        assert SectorCipher(key, "xts", "plain64").encrypt(0, plain * sectors).startswith(expected_start)


def test_xts_takes_equal_halves_that_the_library_refuses() -> None:
    cipher = SectorCipher(bytes(32), "xts", "plain64")
    data = os.urandom(SECTOR)
    out = cipher.encrypt(3, data)
    cipher.decrypt(3, memoryview(out))
    assert out == data


def test_a_cipher_does_not_show_its_key() -> None:
    assert repr(_cipher("xts", 64, "plain64")) == "<SectorCipher aes xts>"
