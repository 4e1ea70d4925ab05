"""LUKS version 1: the partition header, its key slots, and the master key that they protect (bytes only, no I/O).

Source: "LUKS1 On-Disk Format Specification" of the cryptsetup project.  All numbers are big-endian; offsets in the header
are 512-byte sectors from its start, those of this module bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from blocklib.crypto.ciphers import AES_KEY_LENGTHS, IV_GENERATORS, MODES, SECTOR, SectorCipher
from blocklib.errors import ImageCorruptError, ImageError, ImageLimitError, UnsupportedFeatureError

MAGIC: Final = b"LUKS\xba\xbe"
VERSION: Final = 1
_FIELDS: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
HEADER_LENGTH: Final = 592
SLOTS: Final = 8
STRIPES: Final = 4000
SALT_LENGTH: Final = 32
DIGEST_LENGTH: Final = 20
SLOT_ACTIVE: Final = 0x00AC71F3
SLOT_INACTIVE: Final = 0x0000DEAD
ALIGNMENT: Final = 4096
"""Key material and payload begin at multiples of this."""
LEAST_ITERATIONS: Final = 1000
HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


def slot_field_offset(slot: int) -> int:
    """Where in the header the 48 bytes of a key slot begin; its state is the first four."""
    return _FIELDS.size + slot * _SLOT.size


@dataclass(slots=True)
class KeySlot:
    """One way to the master key: the passphrase that `iterations` of PBKDF2 turn into the key of the key material."""

    active: bool
    iterations: int
    salt: bytes = field(repr=False)
    key_offset: int
    """Byte offset of the key material from the start of the header."""
    stripes: int = STRIPES

    def pack(self) -> bytes:
        state = SLOT_ACTIVE if self.active else SLOT_INACTIVE
        return _SLOT.pack(state, self.iterations, self.salt, self.key_offset // SECTOR, self.stripes)


@dataclass(slots=True)
class LuksHeader:
    """The partition header.  The master key is not in it: see `unlock`."""

    cipher_mode: str
    """"xts-plain64", "cbc-essiv:sha256": the mode, the IV generator and its hash."""
    hash: str
    payload_offset: int
    key_length: int
    digest: bytes = field(repr=False)
    digest_salt: bytes = field(repr=False)
    digest_iterations: int
    uuid: str
    slots: list[KeySlot]
    cipher_name: str = "aes"

    @property
    def mode(self) -> str:
        return self.cipher_mode.partition("-")[0]

    @property
    def iv_generator(self) -> str:
        return self.cipher_mode.partition("-")[2].partition(":")[0]

    @property
    def iv_hash(self) -> str | None:
        return self.cipher_mode.partition(":")[2] or None

    @property
    def cipher_algorithm(self) -> str:
        """In QEMU's words: "aes-256"."""
        return f"{self.cipher_name}-{self.key_length * 8 // (2 if self.mode == 'xts' else 1)}"

    @property
    def material_length(self) -> int:
        """Bytes of the key material of one slot."""
        return self.key_length * STRIPES

    def pack(self) -> bytes:
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.cipher_name.encode(),
            self.cipher_mode.encode(),
            self.hash.encode(),
            self.payload_offset // SECTOR,
            self.key_length,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        )
        return fields + b"".join(slot.pack() for slot in self.slots)

    def cipher(self, key: bytes) -> SectorCipher:
        """The cipher of this image, with `key`: that of a slot's material or the master key."""
        essiv_key = None
        if self.iv_generator == "essiv":
            assert self.iv_hash is not None
            essiv_key = new_hash(self.iv_hash, key).digest()
        return SectorCipher(key, self.mode, self.iv_generator, essiv_key=essiv_key)


# Reading ------------------------------------------------------------------------------------------------------------


def parse_luks(data: bytes, *, length: int, most_iterations: int, place: int = 0, node: str | None = None) -> LuksHeader:
    """The header in the first HEADER_LENGTH bytes of an area of `length` bytes, which lies at host offset `place`.

    Everything that work will be done for is checked here, before any is.  Raises ImageCorruptError, ImageLimitError (more
    than `most_iterations` of PBKDF2 for all that opening may have to try), UnsupportedFeatureError.
    """
    fault = _Fault(place, node)
    if len(data) < HEADER_LENGTH or length < HEADER_LENGTH:
        raise fault("length", f"{HEADER_LENGTH} bytes", f"{min(len(data), length)} bytes")
    (
        magic, version, cipher_name, cipher_mode, hash_name, payload_sectors, key_length, digest, digest_salt,
        digest_iterations, uuid,
    ) = _FIELDS.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise fault("magic", repr(MAGIC), repr(magic))
    if version != VERSION:
        raise fault.feature("version", f"LUKS version {version}", "1")
    header = LuksHeader(
        cipher_name=fault.text("cipher name", cipher_name),
        cipher_mode=fault.text("cipher mode", cipher_mode),
        hash=fault.text("hash", hash_name),
        payload_offset=payload_sectors * SECTOR,
        key_length=key_length,
        digest=digest,
        digest_salt=digest_salt,
        digest_iterations=digest_iterations,
        uuid=fault.text("uuid", uuid),
        slots=[],
    )
    for index in range(SLOTS):
        state, iterations, salt, key_sectors, stripes = _SLOT.unpack_from(data, slot_field_offset(index))
        if state not in (SLOT_ACTIVE, SLOT_INACTIVE):
            raise fault(f"key slot {index}", f"state {SLOT_ACTIVE:#x} or {SLOT_INACTIVE:#x}", f"{state:#x}")
        header.slots.append(KeySlot(state == SLOT_ACTIVE, iterations, salt, key_sectors * SECTOR, stripes))
    _check_algorithms(header, fault)
    _check_places(header, length, fault)
    _check_work(header, most_iterations, fault)
    return header


class _Fault:
    """Builds the error for one field of a LUKS header."""

    def __init__(self, place: int, node: str | None) -> None:
        self._place = place
        self._node = node
        self._prefix = f"{node}: " if node else ""

    def __call__(self, name: str, expected: str, found: str, kind: type[ImageError] = ImageCorruptError) -> ImageError:
        return kind(
            f"{self._prefix}LUKS header, {name}: expected {expected}, found {found}",
            structure=f"LUKS header, {name}",
            host_offset=self._place,
            expected=expected,
            found=found,
            node=self._node,
        )

    def feature(self, name: str, feature: str, expected: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"{self._prefix}the encryption with {feature} is not supported; expected {expected}",
            features=(feature,),
            structure=f"LUKS header, {name}",
            host_offset=self._place,
            expected=expected,
            found=feature,
            node=self._node,
        )

    def text(self, name: str, raw: bytes) -> str:
        text, _, _rest = raw.partition(b"\0")
        if not text.isascii() or not (decoded := text.decode("ascii")).isprintable() or text == raw:
            raise self(name, "printable ASCII that ends with a NUL", repr(raw))
        return decoded


def _check_algorithms(header: LuksHeader, fault: _Fault) -> None:
    if header.cipher_name != "aes":
        raise fault.feature("cipher name", f"the cipher {header.cipher_name}", "aes")
    if header.mode not in MODES:
        raise fault.feature("cipher mode", f"the mode {header.mode!r}", ", ".join(MODES))
    if header.iv_generator not in IV_GENERATORS:
        raise fault.feature("cipher mode", f"the IV generator {header.iv_generator!r}", ", ".join(IV_GENERATORS))
    if header.hash not in HASHES or not has_hash(header.hash):
        raise fault.feature("hash", f"the hash {header.hash!r}", ", ".join(HASHES))
    if header.iv_generator == "essiv":
        if header.iv_hash not in HASHES or not has_hash(header.iv_hash):
            raise fault.feature("cipher mode", f"the hash {header.iv_hash!r} for ESSIV", ", ".join(HASHES))
        if new_hash(header.iv_hash).digest_size not in AES_KEY_LENGTHS:
            raise fault.feature("cipher mode", f"the hash {header.iv_hash} for ESSIV", "one as long as a key of AES")
    factor = 2 if header.mode == "xts" else 1
    lengths = [length * factor for length in AES_KEY_LENGTHS]
    if header.key_length not in lengths:
        raise fault("key bytes", f"{' or '.join(map(str, lengths))} for aes-{header.mode}", str(header.key_length))
    if header.material_length % SECTOR:
        raise fault.feature("key bytes", f"aes-192 in mode {header.mode}", "key material of whole sectors")


def _check_places(header: LuksHeader, length: int, fault: _Fault) -> None:
    if not HEADER_LENGTH <= header.payload_offset <= length:
        expected = f"behind the header and inside the {length} bytes of the encryption header"
        raise fault("payload offset", expected, str(header.payload_offset))
    taken = [(0, HEADER_LENGTH)]
    for index, slot in enumerate(header.slots):
        if slot.stripes != STRIPES:
            raise fault(f"key slot {index}", f"{STRIPES} stripes", str(slot.stripes))
        start, end = slot.key_offset, slot.key_offset + header.material_length
        if end > header.payload_offset:
            raise fault(f"key slot {index}", f"key material before the payload at {header.payload_offset}", f"{start}-{end}")
        if any(start < other_end and other_start < end for other_start, other_end in taken):
            raise fault(f"key slot {index}", "key material apart from the header and other slots", f"{start}-{end}")
        taken.append((start, end))


def _check_work(header: LuksHeader, most_iterations: int, fault: _Fault) -> None:
    active = [(index, slot) for index, slot in enumerate(header.slots) if slot.active]
    if not header.digest_iterations:
        raise fault("iterations of the master key digest", "at least 1", "0")
    for index, slot in active:
        if not slot.iterations:
            raise fault(f"key slot {index}", "at least 1 iteration", "0")
    total = sum(slot.iterations for _index, slot in active) + header.digest_iterations * max(1, len(active))
    if total > most_iterations:
        expected = f"at most {most_iterations} iterations in all (the limit key_iterations)"
        raise fault("iterations", expected, str(total), ImageLimitError)


# Hashes -------------------------------------------------------------------------------------------------------------


def new_hash(name: str, data: bytes = b"") -> hashlib._Hash:
    return hashlib.new(name, data, usedforsecurity=False)


def has_hash(name: str) -> bool:
    """Whether this Python knows the hash: ripemd160 is an option of OpenSSL."""
    return name in hashlib.algorithms_available


def derive(hash_name: str, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2."""
    return hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, length)


def iterations_per_second(hash_name: str, length: int, *, seconds: float) -> float:
    """How many iterations of PBKDF2 this machine does in a second of processor time, measured for about `seconds`."""
    import time

    iterations = 1 << 12
    while True:
        before = time.thread_time()
        derive(hash_name, b"password", b"salt" * 8, iterations, length)
        spent = time.thread_time() - before
        if spent >= seconds:
            return iterations / spent
        iterations *= 4 if spent * 4 < seconds else 2


# The anti-forensic splitter -----------------------------------------------------------------------------------------


def _diffuse(hash_name: str, block: bytes) -> bytes:
    """Every piece of the block, as long as a digest, replaced by the hash of its number and itself."""
    size = new_hash(hash_name).digest_size
    return b"".join(
        new_hash(hash_name, index.to_bytes(4, "big") + block[start : start + size]).digest()[: len(block) - start]
        for index, start in enumerate(range(0, len(block), size))
    )


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def split_key(key: bytes, hash_name: str, stripes: int = STRIPES) -> bytes:
    """`key` blown up so that it is lost with any one of `stripes` stripes of its length."""
    parts = [os.urandom(len(key)) for _ in range(stripes - 1)]
    parts.append(_xor(_folded(parts, hash_name, len(key)), key))
    return b"".join(parts)


def merge_key(material: bytes, hash_name: str, stripes: int = STRIPES) -> bytes:
    """The key that `split_key` blew up."""
    length = len(material) // stripes
    parts = [material[start : start + length] for start in range(0, len(material), length)]
    return _xor(_folded(parts[:-1], hash_name, length), parts[-1])


def _folded(parts: Sequence[bytes], hash_name: str, length: int) -> bytes:
    block = bytes(length)
    for part in parts:
        block = _diffuse(hash_name, _xor(block, part))
    return block


# Keys ---------------------------------------------------------------------------------------------------------------


def unlock(
    header: LuksHeader, passphrase: bytes, read: Callable[[int, int], bytes], *, only: int | None = None
) -> tuple[int, bytes] | None:
    """(slot, master key) of the first active slot (or slot `only`) that `passphrase` opens; None where it opens none.

    `read(offset, length)` gives bytes of the area that begins with the header.
    """
    for index, slot in enumerate(header.slots):
        if not slot.active or (only is not None and index != only):
            continue
        key = derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_length)
        material = bytearray(read(slot.key_offset, header.material_length))
        header.cipher(key).decrypt(0, memoryview(material))
        master_key = merge_key(bytes(material), header.hash)
        digest = derive(header.hash, master_key, header.digest_salt, header.digest_iterations, DIGEST_LENGTH)
        if hmac.compare_digest(digest, header.digest):
            return index, master_key
    return None


def fill_slot(header: LuksHeader, index: int, master_key: bytes, passphrase: bytes, *, seconds: float) -> bytes:
    """Make slot `index` active, in memory, so that `passphrase` opens it; returns its key material, which is not in the header.

    Opening will take about `seconds`.
    """
    slot = header.slots[index]
    slot.salt = os.urandom(SALT_LENGTH)
    speed = iterations_per_second(header.hash, header.key_length, seconds=_trial(seconds))
    slot.iterations = _bounded(speed * seconds)
    slot.active = True
    key = derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_length)
    return bytes(header.cipher(key).encrypt(0, split_key(master_key, header.hash)))


def set_digest(header: LuksHeader, master_key: bytes, *, seconds: float) -> None:
    """Make the header recognise `master_key`; checking it takes an eighth of what a slot takes."""
    header.digest_salt = os.urandom(SALT_LENGTH)
    speed = iterations_per_second(header.hash, DIGEST_LENGTH, seconds=_trial(seconds))
    header.digest_iterations = _bounded(speed * seconds / 8)
    header.digest = derive(header.hash, master_key, header.digest_salt, header.digest_iterations, DIGEST_LENGTH)


def _trial(seconds: float) -> float:
    return min(0.1, seconds / 4)


def _bounded(iterations: float) -> int:
    return min(max(LEAST_ITERATIONS, int(iterations)), 0xFFFF_FFFF)


# Making one ---------------------------------------------------------------------------------------------------------


def new_header(*, key_length: int, cipher_mode: str, hash_name: str) -> LuksHeader:
    """A header without a master key; all slots are inactive.  `key_length` is that of the whole key."""
    header = LuksHeader(
        cipher_mode=cipher_mode,
        hash=hash_name,
        payload_offset=0,
        key_length=key_length,
        digest=bytes(DIGEST_LENGTH),
        digest_salt=bytes(SALT_LENGTH),
        digest_iterations=0,
        uuid=_random_uuid(),
        slots=[],
    )
    spacing = -(-header.material_length // ALIGNMENT) * ALIGNMENT
    header.slots = [KeySlot(False, 0, bytes(SALT_LENGTH), ALIGNMENT + index * spacing) for index in range(SLOTS)]
    header.payload_offset = ALIGNMENT + SLOTS * spacing
    return header


def _random_uuid() -> str:
    import uuid

    return str(uuid.uuid4())
