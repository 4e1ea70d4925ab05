"""Sector-wise encryption: AES in the modes XTS, CBC, CTR and ECB, each 512-byte sector with an IV made of its number.

Few sectors go one by one through the library's modes.  Runs are done as a whole: the IVs of all their sectors, and then all
blocks, are one ECB call each, and numpy does what the mode adds to that; this is four times as fast for 64 KiB.
Sources: IEEE 1619 (XTS), NIST SP 800-38A, and the IV generators as the LUKS on-disk format names them.
"""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from blocklib.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

SECTOR: Final = 512
_BLOCK: Final = 16
_BLOCKS: Final = SECTOR // _BLOCK
_FEW: Final = 8
"""Sectors up to this number are faster one by one."""
_NUMPY_PAYS: Final = 1 << 14
"""Sectors after which importing numpy (0.1 s) has paid for itself, if nobody else has imported it."""
_STEP: Final = 256
"""Sectors of a run that are done at once, so that they stay in the processor's cache."""

MODES: Final = ("xts", "cbc", "ctr", "ecb")
IV_GENERATORS: Final = ("plain", "plain64", "essiv")
AES_KEY_LENGTHS: Final = (16, 24, 32)


@cache
def cipher_classes() -> SimpleNamespace:
    """What we use of the package `cryptography`.  Raises MissingExtraError where it is not installed."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        raise MissingExtraError(
            "encryption needs the package cryptography: pip install 'pyblocklib[encryption]'", extra="encryption"
        ) from None
    return SimpleNamespace(
        Cipher=Cipher, AES=algorithms.AES, XTS=modes.XTS, CBC=modes.CBC, CTR=modes.CTR, ECB=modes.ECB
    )


class SectorCipher:
    """Encrypts and decrypts runs of whole sectors; safe from any thread.

    `key` has the length that AES takes, or for XTS twice that.  `essiv_key` is the hash of the key for ``essiv``.
    """

    def __init__(self, key: bytes, mode: str, iv_generator: str, *, essiv_key: bytes | None = None) -> None:
        self._library = library = cipher_classes()
        half = len(key) // 2 if mode == "xts" else len(key)
        self._key = key
        self._mode = mode
        self._data_key = library.AES(key[:half])
        self._tweak_key = library.AES(key[half:]) if mode == "xts" else None
        self._essiv_key = library.AES(essiv_key) if essiv_key is not None else None
        self._sector_mask = 0xFFFF_FFFF if iv_generator == "plain" else 0xFFFF_FFFF_FFFF_FFFF
        # The library's XTS takes neither AES-192 nor two equal halves.
        self._whole_runs_only = mode == "xts" and (len(key) not in (32, 64) or key[:half] == key[half:])
        self._whole_key = library.AES(key) if mode == "xts" and not self._whole_runs_only else self._data_key
        self._done = 0

    def __repr__(self) -> str:
        return f"<SectorCipher aes {self._mode}>"

    def encrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytearray:
        """`data`, whole sectors from number `sector` on, encrypted."""
        out = bytearray(data)
        self._run(sector, memoryview(out), encrypt=True)
        return out

    def decrypt(self, sector: int, view: memoryview) -> None:
        """Decrypt `view`, whole sectors from number `sector` on, in place."""
        self._run(sector, view, encrypt=False)

    def _run(self, sector: int, view: memoryview, *, encrypt: bool) -> None:
        n = len(view) // SECTOR
        if not self._whole_runs_only and (n <= _FEW or not self._is_numpy_worth(n)):
            self._one_by_one(sector, view, encrypt)
            return
        import numpy as np

        data = np.frombuffer(view, dtype="<u8").reshape(n, _BLOCKS, 2)
        transform: Callable[[int, NDArray[np.uint64], bool], None] = getattr(self, f"_run_{self._mode}")
        for start in range(0, n, _STEP):
            transform(sector + start, data[start : start + _STEP], encrypt)

    def _is_numpy_worth(self, n: int) -> bool:
        self._done += n  # a guess is enough: threads may lose counts
        return "numpy" in sys.modules or self._done >= _NUMPY_PAYS

    # -- sector by sector ---------------------------------------------------------------------------------------------

    def _one_by_one(self, sector: int, view: memoryview, encrypt: bool) -> None:
        library = self._library
        mode_class = getattr(library, self._mode.upper())
        for start in range(0, len(view), SECTOR):
            if self._mode == "ecb":
                mode = mode_class()
            else:
                mode = mode_class(self._iv(sector + start // SECTOR))
            cipher = library.Cipher(self._whole_key, mode)
            context = cipher.encryptor() if encrypt else cipher.decryptor()
            view[start : start + SECTOR] = context.update(view[start : start + SECTOR])

    def _iv(self, sector: int) -> bytes:
        iv = (sector & self._sector_mask).to_bytes(_BLOCK, "little")
        if self._essiv_key is not None:
            iv = self._ecb(self._essiv_key, iv, encrypt=True)
        return iv

    def _ecb(self, key: Any, data: Any, *, encrypt: bool) -> bytes:
        cipher = self._library.Cipher(key, self._library.ECB())
        result: bytes = (cipher.encryptor() if encrypt else cipher.decryptor()).update(data)
        return result

    # -- whole runs: `data` is (sectors, blocks, 2) of uint64, changed in place -----------------------------------------

    def _ecb_blocks(self, key: Any, blocks: NDArray[np.uint64], *, encrypt: bool) -> NDArray[np.uint64]:
        import numpy as np

        cipher = self._library.Cipher(key, self._library.ECB())
        context = cipher.encryptor() if encrypt else cipher.decryptor()
        out = np.empty(blocks.nbytes + _BLOCK, dtype=np.uint8)  # it wants room for one more block
        context.update_into(np.ascontiguousarray(blocks).view(np.uint8).reshape(-1).data, out.data)
        return out[: blocks.nbytes].view("<u8").reshape(blocks.shape)

    def _ivs(self, sector: int, n: int) -> NDArray[np.uint64]:
        import numpy as np

        ivs = np.zeros((n, 2), dtype="<u8")
        ivs[:, 0] = np.arange(n, dtype=np.uint64) + np.uint64(sector)
        ivs[:, 0] &= np.uint64(self._sector_mask)
        return ivs if self._essiv_key is None else self._ecb_blocks(self._essiv_key, ivs, encrypt=True)

    def _run_ecb(self, _sector: int, data: NDArray[np.uint64], encrypt: bool) -> None:
        data[:] = self._ecb_blocks(self._data_key, data, encrypt=encrypt)

    def _run_xts(self, sector: int, data: NDArray[np.uint64], encrypt: bool) -> None:
        tweaks = _powers(self._ecb_blocks(self._tweak_key, self._ivs(sector, len(data)), encrypt=True))
        data ^= tweaks
        data[:] = self._ecb_blocks(self._data_key, data, encrypt=encrypt)
        data ^= tweaks

    def _run_cbc(self, sector: int, data: NDArray[np.uint64], encrypt: bool) -> None:
        before = self._ivs(sector, len(data))
        if encrypt:
            for block in range(_BLOCKS):  # a block needs the one before it, but not other sectors
                before = self._ecb_blocks(self._data_key, data[:, block] ^ before, encrypt=True)
                data[:, block] = before
            return
        plain = self._ecb_blocks(self._data_key, data, encrypt=False)
        plain[:, 0] ^= before
        plain[:, 1:] ^= data[:, :-1]
        data[:] = plain

    def _run_ctr(self, sector: int, data: NDArray[np.uint64], _encrypt: bool) -> None:
        import numpy as np

        start = self._ivs(sector, len(data)).view(">u8").astype(np.uint64)
        counters = np.empty((len(data), _BLOCKS, 2), dtype=">u8")
        low = start[:, 1:] + np.arange(_BLOCKS, dtype=np.uint64)
        counters[:, :, 1] = low
        counters[:, :, 0] = start[:, :1] + (low < start[:, 1:])
        data ^= self._ecb_blocks(self._data_key, counters, encrypt=True)


def _powers(first: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each sector's first tweak times x^0, x^1, ... x^31 in GF(2^128), the polynomial being x^128 + x^7 + x^2 + x + 1.

    What a shift pushes out at the top, fewer than 32 bits, comes back at the bottom times x^7 + x^2 + x + 1.
    """
    import numpy as np

    one = np.uint64(1)
    up = np.arange(_BLOCKS, dtype=np.uint64)
    down = np.uint64(63) - up
    low, high = first[:, :1], first[:, 1:]
    out = high >> one >> down
    powers = np.empty((len(first), _BLOCKS, 2), dtype="<u8")
    powers[:, :, 0] = (low << up) ^ out ^ (out << one) ^ (out << np.uint64(2)) ^ (out << np.uint64(7))
    powers[:, :, 1] = (high << up) | (low >> one >> down)
    return powers
