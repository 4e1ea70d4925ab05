"""Encrypted guest clusters: the header that protects the key, the cipher between guest and host, and new images.

LUKS: the encryption header pointer names an area with a LUKS 1 header in it, and the IV of a 512-byte sector is its *host*
offset.  AES (legacy): the passphrase itself is the key, and the IV is the *guest* offset [both seen].  Metadata, zero clusters
and compressed clusters are never encrypted.  Sources: sections "Full disk encryption header pointer" and "Data encryption"
of ``docs/interop/qcow2.rst``, and ``QCryptoBlockOpenOptions`` in ``qapi/crypto.json``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from blocklib.crypto import luks
from blocklib.crypto.ciphers import AES_KEY_LENGTHS, SECTOR, SectorCipher
from blocklib.crypto.secrets import Secret
from blocklib.errors import OptionError
from blocklib.extents import FLAG_OFFSET_VALID, FLAG_RECURSE, KIND_DATA, KIND_SPECIAL, Run
from blocklib.formats.qcow2 import layout

if TYPE_CHECKING:
    from blocklib.formats.qcow2.header import Header
    from blocklib.formats.qcow2.node import Qcow2Node

Buffer = bytes | bytearray | memoryview

_PIECE: Final = 2 << 20
"""A write is encrypted in pieces of so many bytes: it needs a copy of what it encrypts."""
_LEGACY_KEY_LENGTH: Final = 16
_POINTER: Final = struct.Struct(layout.ENCRYPTION_EXTENSION_FORMAT)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_encryption(node: Qcow2Node) -> Encryption | Locked | None:
    """What stands between the guest and an image's clusters; None for an image that is not encrypted.

    Raises OptionError for a secret that is missing or wrong, ImageError for a header that makes no sense,
    MissingExtraError.
    """
    method = node.header.crypt_method
    check_format(node)
    if method == layout.CRYPT_NONE:
        return None
    if node.locked:
        return Locked()
    secret = node.options.get("encrypt.key-secret")
    if secret is None:
        raise _bad(node, "the image is encrypted: the option encrypt.key-secret must give its secret")
    if not isinstance(secret, Secret):
        raise _bad(node, "encrypt.key-secret is a blocklib.Secret (on the command line: the id of an --object secret)")
    if method == layout.CRYPT_AES:
        key = secret.reveal()[:_LEGACY_KEY_LENGTH].ljust(_LEGACY_KEY_LENGTH, b"\0")
        return Encryption(SectorCipher(key, "cbc", "plain64"), by_guest=True)
    header = read_luks(node)
    opened = luks.unlock(header, secret.reveal(), lambda offset, length: read_area(node, offset, length))
    if opened is None:
        raise _bad(node, "the secret opens none of the image's key slots")
    _slot, master_key = opened
    return Encryption(header.cipher(master_key), by_guest=False)


def check_format(node: Qcow2Node) -> None:
    """Raises OptionError where the option encrypt.format contradicts the image."""
    wanted = node.options.get("encrypt.format")
    found = _format_name(node.header)
    if wanted is None or wanted == found:
        return
    shown = "not encrypted" if found is None else f"encrypted with {found!r}"
    raise _bad(node, f"the image is {shown}, and encrypt.format says {wanted!r}", "encrypt.format")


def _format_name(header: Header) -> str | None:
    return {layout.CRYPT_AES: "aes", layout.CRYPT_LUKS: "luks"}.get(header.crypt_method)


def _bad(node: Qcow2Node, text: str, option: str = "encrypt.key-secret") -> OptionError:
    return OptionError(f"{node.filename or node.name}: {text}", option=option, driver="qcow2", node=node.filename)


def header_area(header: Header) -> tuple[int, int]:
    """(host offset, length in bytes) of the encryption header; (0, 0) where there is none.  It occupies whole clusters."""
    pointer = header.extension(layout.EXTENSION_ENCRYPTION)
    if pointer is None:
        return 0, 0
    offset, length = _POINTER.unpack(pointer)
    return offset, length


def read_luks(node: Qcow2Node) -> luks.LuksHeader:
    """The LUKS header of an image that has one.  Raises ImageError, StorageError."""
    offset, length = header_area(node.header)
    return luks.parse_luks(
        read_area(node, 0, luks.HEADER_LENGTH),
        length=length,
        most_iterations=node.limits.key_iterations,
        place=offset,
        node=node.filename,
    )


def read_area(node: Qcow2Node, offset: int, length: int) -> bytes:
    """Bytes of the encryption header, from `offset` in it."""
    buffer = bytearray(length)
    node.file.read(header_area(node.header)[0] + offset, memoryview(buffer), "metadata")
    return bytes(buffer)


# -- the data path ----------------------------------------------------------------------------------------------------


class _Hiding:
    """What an encrypted image tells of its data, whether it has its key or not."""

    told: ClassVar[int] = ~(FLAG_OFFSET_VALID | FLAG_RECURSE)
    """The flags of a run that others may see."""

    @staticmethod
    def hidden(run: Run) -> Run:
        """`run` as others see it: nobody but the node can read its data, and nobody is told where it is.

        The child and the place stay in the tuple, for `Encryption.read` alone.
        """
        kind, child, place, length, flags = run
        return KIND_SPECIAL if kind == KIND_DATA else kind, child, place, length, flags & _Hiding.told


class Encryption(_Hiding):
    """The cipher of one image.  Offsets are in bytes; a place is one in the child that holds the data."""

    def __init__(self, cipher: SectorCipher, *, by_guest: bool) -> None:
        self._cipher = cipher
        self._by_guest = by_guest

    def read(self, node: Qcow2Node, offset: int, view: memoryview) -> bool:
        """Fill `view` from an encrypted run; False where the range is none (any more)."""
        kind, child, place, length, _flags = node.resolve(offset, len(view))
        if kind != KIND_SPECIAL or child is None or length < len(view):
            return False
        skip = offset % SECTOR
        span = -(-(skip + length) // SECTOR) * SECTOR
        whole = view if span == length else memoryview(bytearray(span))
        # A sector that is being changed in part must not be seen half old and half new: all of it would be noise.
        held = node.write_ranges.acquire(offset - skip, offset - skip + span, exclusive=False)
        try:
            child.read(place - skip, whole)
        finally:
            node.write_ranges.release(held)
        self._cipher.decrypt(self._sector(offset - skip, place - skip), whole)
        if whole is not view:
            view[:] = whole[skip : skip + length]
        return True

    def write(self, node: Qcow2Node, offset: int, place: int, views: Sequence[Buffer]) -> None:
        """Write `views`, one after the other, to guest `offset`, which lies at `place`.

        Sectors that are written in part are read, changed and written back, apart from other requests for them.
        """
        length = sum(map(len, views))
        skip = offset % SECTOR
        end = offset + length
        first, last = offset - skip, -(-end // SECTOR) * SECTOR
        held = node.write_ranges.acquire(first, last, exclusive=bool(skip) or last != end)
        try:
            whole = list(views)
            if skip:
                whole.insert(0, self._sector_at(node, first, place - skip)[:skip])
            if last != end:
                tail = self._sector_at(node, last - SECTOR, place - offset + last - SECTOR)
                whole.append(tail[end - last :])
            at = 0
            for piece in _pieces(whole):
                start = place - skip + at
                node.data.write(start, (self._cipher.encrypt(self._sector(first + at, start), piece),))
                at += len(piece)
        finally:
            node.write_ranges.release(held)

    def write_zeroes(self, node: Qcow2Node, place: int, length: int) -> None:
        """Make whole clusters that nobody reads yet hold encrypted zeroes; the old method would have to know whose they are."""
        assert not self._by_guest
        node.data.write(place, (self._cipher.encrypt(place // SECTOR, bytes(length)),))

    def _sector_at(self, node: Qcow2Node, offset: int, place: int) -> bytearray:
        buffer = bytearray(SECTOR)
        node.data.read(place, memoryview(buffer))
        self._cipher.decrypt(self._sector(offset, place), memoryview(buffer))
        return buffer

    def _sector(self, offset: int, place: int) -> int:
        return (offset if self._by_guest else place) // SECTOR


class Locked(_Hiding):
    """The data of an image that was opened without its secret."""

    def read(self, node: Qcow2Node, offset: int, view: memoryview) -> bool:
        raise _bad(node, "the image was opened without its secret, so its data cannot be read")

    def write(self, node: Qcow2Node, offset: int, place: int, views: Sequence[Buffer]) -> None:
        raise _bad(node, "the image was opened without its secret, so its data cannot be written")

    def write_zeroes(self, node: Qcow2Node, place: int, length: int) -> None:
        self.write(node, 0, place, ())


def _pieces(views: Sequence[Buffer]) -> Iterator[Buffer]:
    """The bytes of `views` in pieces of _PIECE bytes; only what crosses from one view to the next is copied."""
    waiting = bytearray()
    for data in views:
        view = memoryview(data)
        at = 0
        while at < len(view):
            n = min(_PIECE - len(waiting), len(view) - at)
            if n == _PIECE:
                yield view[at : at + n]
            else:
                waiting += view[at : at + n]
                if len(waiting) == _PIECE:
                    yield waiting
                    waiting = bytearray()
            at += n
    if waiting:
        yield waiting


# -- telling ----------------------------------------------------------------------------------------------------------


def facts(node: Qcow2Node) -> Mapping[str, Any]:
    """What ``info`` says of the encryption, in QEMU's names and order.  Raises ImageError for a header without sense."""
    if node.header.crypt_method == layout.CRYPT_AES:
        return {"format": "aes"}
    header = read_luks(node)
    found: dict[str, Any] = {
        "ivgen-alg": header.iv_generator,
        "hash-alg": header.hash,
        "cipher-alg": header.cipher_algorithm,
        "uuid": header.uuid,
    }
    if header.iv_generator == "essiv":
        found["ivgen-hash-alg"] = header.iv_hash
    found["format"] = "luks"
    found["cipher-mode"] = header.mode
    found["slots"] = [
        {"active": True, "iters": slot.iterations, "key-offset": slot.key_offset, "stripes": slot.stripes}
        if slot.active
        else {"active": False, "key-offset": slot.key_offset}
        for slot in header.slots
    ]
    found["payload-offset"] = header.payload_offset
    found["master-key-iters"] = header.digest_iterations
    return found


# -- new images -------------------------------------------------------------------------------------------------------


class NewArea(NamedTuple):
    """The encryption header of a new image: its length and the parts of it that are not zero, each with its offset in it."""

    length: int
    parts: tuple[tuple[int, bytes], ...]


_LUKS_OPTIONS: Final = (
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
)
_DEFAULT_MILLISECONDS: Final = 2000


def method_for(options: Mapping[str, Any]) -> int:
    """The encryption method that creation options (typed) ask for.  Raises OptionError where they make no sense together."""
    format = options.get("encrypt.format")
    if options.get("encryption"):
        if format is not None:
            raise _refused("encryption", "encryption and encrypt.format exclude each other: they say the same")
        format = "aes"
    given = [name for name in ("encrypt.key-secret", *_LUKS_OPTIONS) if options.get(name) is not None]
    if format is None:
        if given:
            raise _refused("encrypt.format", f"{given[0]} needs encrypt.format")
        return layout.CRYPT_NONE
    if format == "aes":
        for name in given:
            if name in _LUKS_OPTIONS:
                raise _refused(name, f"{name} is for encrypt.format=luks only")
        return layout.CRYPT_AES
    _luks_for(options)
    return layout.CRYPT_LUKS


def area_length(options: Mapping[str, Any]) -> int:
    """Bytes of the encryption header that creation options with encrypt.format=luks ask for."""
    return _luks_for(options).payload_offset


def make_area(options: Mapping[str, Any]) -> NewArea | None:
    """A new encryption header, with a new master key; None where the method needs none.

    Takes about twice the time that encrypt.iter-time says.  Raises OptionError for a secret that is missing, MissingExtraError.
    """
    method = method_for(options)
    if method == layout.CRYPT_NONE:
        return None
    secret = options.get("encrypt.key-secret")
    if secret is None:
        raise _refused("encrypt.key-secret", "an encrypted image needs encrypt.key-secret")
    if not isinstance(secret, Secret):
        text = "encrypt.key-secret is a blocklib.Secret (on the command line: the id of an --object secret)"
        raise _refused("encrypt.key-secret", text)
    if method == layout.CRYPT_AES:
        return None
    header = _luks_for(options)
    master_key = os.urandom(header.key_length)
    seconds = seconds_for(options)
    luks.set_digest(header, master_key, seconds=seconds)
    material = luks.fill_slot(header, 0, master_key, secret.reveal(), seconds=seconds)
    return NewArea(header.payload_offset, ((0, header.pack()), (header.slots[0].key_offset, material)))


def seconds_for(options: Mapping[str, Any]) -> float:
    """How long opening a new key slot shall take."""
    milliseconds: int | None = options.get("encrypt.iter-time")
    return (milliseconds or _DEFAULT_MILLISECONDS) / 1000


def _luks_for(options: Mapping[str, Any]) -> luks.LuksHeader:
    mode = options["encrypt.cipher-mode"] or "xts"
    generator = options["encrypt.ivgen-alg"] or "plain64"
    iv_hash = options["encrypt.ivgen-hash-alg"] or ("sha256" if generator == "essiv" else None)
    hash_name = options["encrypt.hash-alg"] or "sha256"
    key_length = int((options["encrypt.cipher-alg"] or "aes-256").partition("-")[2]) // 8
    for option, name in (("hash-alg", hash_name), ("ivgen-hash-alg", iv_hash)):
        if name is not None and not luks.has_hash(name):
            raise _refused(f"encrypt.{option}", f"this Python has no hash {name!r}")
    if generator == "essiv":
        assert iv_hash is not None
        size = luks.new_hash(iv_hash).digest_size
        if size not in AES_KEY_LENGTHS:
            raise _refused("encrypt.ivgen-hash-alg", f"{iv_hash} has {size} bytes, which is no key of AES: ESSIV needs one")
    if mode == "xts":
        key_length *= 2
    elif key_length == 24:
        raise _refused("encrypt.cipher-alg", f"aes-192 in the mode {mode} has no key material of whole sectors")
    cipher_mode = f"{mode}-{generator}" + (f":{iv_hash}" if iv_hash else "")
    return luks.new_header(key_length=key_length, cipher_mode=cipher_mode, hash_name=hash_name)


def pointer(offset: int, length: int) -> bytes:
    """The data of the header extension that names an encryption header."""
    return _POINTER.pack(offset, length)


def _refused(option: str, text: str) -> OptionError:
    return OptionError(f"qcow2: {text}", option=option, driver="qcow2")
