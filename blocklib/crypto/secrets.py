"""Secrets: passphrases and keys that must be seen nowhere but where they are used.

`Secret` is what a caller holds; `secret_from_properties` makes one as QEMU's ``--object secret`` does.  No text that is
made here, errors included, contains a secret or a part of one, and no error has another one as its cause that might.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from blocklib.errors import OptionError

if TYPE_CHECKING:
    from ssl import SSLContext

_FORMATS: Final = ("raw", "base64")
_KEY_LENGTH: Final = 32
"""Secrets that encrypt other secrets are AES-256 keys."""
_BLOCK_LENGTH: Final = 16
_MAX_LENGTH: Final = 16 << 20
"""Bytes of a secret's file: more is a mistake, such as a device."""


class Secret:
    """A passphrase or key.  Text is taken as UTF-8.  It is shown as ``Secret(***)``, and cannot be pickled."""

    __slots__ = ("_data",)

    def __init__(self, data: str | bytes | bytearray | memoryview) -> None:
        if isinstance(data, str):
            # Not by trying: the error would hold the text, and hang on ours as its context.
            if any("\ud800" <= letter <= "\udfff" for letter in data):
                raise OptionError("a secret given as text must be valid Unicode; give bytes instead")
            self._data = data.encode()
        elif isinstance(data, (bytes, bytearray, memoryview)):
            self._data = bytes(data)
        else:
            raise OptionError(f"a secret is text or bytes, not {type(data).__name__}")

    def reveal(self) -> bytes:
        """The bytes of the secret."""
        return self._data

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        import hmac

        return hmac.compare_digest(self._data, other._data)

    def __hash__(self) -> int:
        return hash(self._data)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, _memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled: that would write it down")


def find_secret(secrets: Mapping[str, object], name: str, option: str) -> Secret:
    """The secret with the id `name`.  Raises OptionError, which does not repeat it: it may be the secret itself."""
    secret = secrets.get(name)
    if not isinstance(secret, Secret):
        text = f"{option} names no secret that was defined; it is a blocklib.Secret, or on the command line the id of one"
        raise OptionError(text, option=option)
    return secret


def find_tls_context(objects: Mapping[str, object], name: str) -> SSLContext:
    """The TLS credentials with the id `name`.  Raises OptionError."""
    import ssl

    found = objects.get(name)
    if not isinstance(found, ssl.SSLContext):
        text = f"tls-creds: there are no TLS credentials with the id {name!r}; in Python it is an ssl.SSLContext"
        raise OptionError(text, option="tls-creds")
    return found


def secret_from_properties(
    properties: Mapping[str, str], others: Mapping[str, Secret], read_file: Callable[[str, int], bytes]
) -> Secret:
    """The secret that an object's properties describe: `data` or `file`, `format`, and `keyid` with `iv`.

    `others` are the secrets defined before it, for `keyid`; `read_file(name, most)` reads a whole file of at most `most`
    bytes.  Raises OptionError, MissingExtraError, and what `read_file` raises.
    """
    known = ("id", "data", "file", "format", "keyid", "iv")
    for name in properties:
        if name not in known:
            raise OptionError(f"a secret has no property {name!r}; there are {', '.join(known)}", option=name, choices=known)
    if ("data" in properties) == ("file" in properties):
        raise OptionError("a secret needs either data or file")
    format = properties.get("format", "raw")
    if format not in _FORMATS:
        raise OptionError(f"the format of a secret is one of {', '.join(_FORMATS)}", option="format", choices=_FORMATS)
    if "data" in properties:
        content = _encoded(properties["data"])
    else:
        content = read_file(properties["file"], _MAX_LENGTH)
    if format == "base64":
        content = _from_base64(content, "the data of the secret")
    if "keyid" not in properties:
        if "iv" in properties:
            raise OptionError("a secret has an iv only with a keyid", option="iv")
        return Secret(content)
    key = others.get(properties["keyid"])
    if key is None:
        raise OptionError("the keyid of a secret names no secret that was defined before it", option="keyid")
    if "iv" not in properties:
        raise OptionError("a secret with a keyid needs an iv", option="iv")
    iv = _from_base64(_encoded(properties["iv"]), "the iv of the secret")
    return Secret(_decrypted(content, key.reveal(), iv))


def _encoded(text: str) -> bytes:
    """Text of a command line as the bytes that were typed.  Raises OptionError."""
    if any("\ud800" <= letter <= "\udc7f" or "\udd00" <= letter <= "\udfff" for letter in text):
        raise OptionError("text of a secret must be valid Unicode")
    return text.encode("utf-8", "surrogateescape")


def _from_base64(text: bytes, what: str) -> bytes:
    import base64

    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError:
        pass
    raise OptionError(f"{what} is not base64")


def _decrypted(content: bytes, key: bytes, iv: bytes) -> bytes:
    """AES-256-CBC with PKCS #7 padding."""
    from blocklib.crypto.ciphers import cipher_classes

    if len(key) != _KEY_LENGTH:
        raise OptionError(f"the key of an encrypted secret has {_KEY_LENGTH} bytes, not {len(key)}", option="keyid")
    if len(iv) != _BLOCK_LENGTH:
        raise OptionError(f"the iv of a secret has {_BLOCK_LENGTH} bytes, not {len(iv)}", option="iv")
    if not content or len(content) % _BLOCK_LENGTH:
        raise OptionError(f"an encrypted secret has a multiple of {_BLOCK_LENGTH} bytes, not {len(content)}")
    library: Any = cipher_classes()
    decryptor = library.Cipher(library.AES(key), library.CBC(iv)).decryptor()
    plain: bytes = decryptor.update(content) + decryptor.finalize()
    padding = plain[-1]
    if not 1 <= padding <= _BLOCK_LENGTH or plain[-padding:] != bytes((padding,)) * padding:
        raise OptionError("a secret could not be decrypted: its key, its iv or its data is wrong")
    return plain[:-padding]
