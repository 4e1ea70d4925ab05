"""Where compiled kernels are kept: one file of object code a family, beside the package or in the user's cache folder.

Machine code is run without further questions, so it is only taken from a folder whose owner could have changed the program
itself (the owner of the package, or we), and that nobody else can write to.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from contextlib import suppress
from typing import Final

_MAGIC: Final = b"blocklib kernels 1\n"
_HEAD: Final = struct.Struct("<II")  # length and CRC-32 of what follows


class Store:
    """Finds and keeps object code by name; names contain all that the code depends on."""

    def __init__(self, package: str | None = None, user: str | None = None) -> None:
        here = os.path.dirname(__file__)
        self._package = os.path.join(here, "__kernels__") if package is None else package
        self._user = _user_folder() if user is None else user
        self._package_owner = os.stat(__file__).st_uid

    def get(self, name: str) -> dict[str, bytes] | None:
        """The parts that were put under `name`, or None: never anything incomplete, or from a folder others can write to."""
        for folder, owner in ((self._package, self._package_owner), (self._user, _own_id())):
            if not folder or not _is_private(folder, owner):
                continue
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    return _parts(file.read())
            except (OSError, ValueError):
                continue
        return None

    def can_keep(self) -> bool:
        """Whether there is, or can be made, a folder to put something into."""
        return self._folder() is not None

    def put(self, name: str, parts: dict[str, bytes]) -> bool:
        """Keep `parts`; False where that cannot be done."""
        folder = self._folder()
        if folder is None:
            return False
        temporary = os.path.join(folder, f".{name}.{os.getpid()}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(_file(parts))
            os.replace(temporary, os.path.join(folder, name))
        except OSError:  # a full disk, perhaps: the kernels work all the same
            with suppress(OSError):
                os.unlink(temporary)
            return False
        return True

    def _folder(self) -> str | None:
        for folder in (self._package, self._user):
            with suppress(OSError):
                if folder:
                    os.makedirs(folder, mode=0o755 if folder == self._package else 0o700, exist_ok=True)
                    if _is_private(folder, _own_id()) and os.access(folder, os.W_OK):
                        return folder
        return None


def _own_id() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _user_folder() -> str:
    """``~/.cache/blocklib`` of the user whose rights we have, whatever the environment says; "" where there is none."""
    try:
        import pwd

        home = pwd.getpwuid(os.geteuid()).pw_dir
    except (ImportError, KeyError):
        return ""
    return os.path.join(home, ".cache", "blocklib") if os.path.isabs(home) else ""


def _is_private(folder: str, owner: int) -> bool:
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == owner and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _file(parts: dict[str, bytes]) -> bytes:
    content = b"".join(
        struct.pack("<II", len(name.encode()), len(code)) + name.encode() + code for name, code in parts.items()
    )
    return _MAGIC + _HEAD.pack(len(content), zlib.crc32(content)) + content


def _parts(data: bytes) -> dict[str, bytes]:
    """The inverse of `_file`.  Raises ValueError."""
    start = len(_MAGIC) + _HEAD.size
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise ValueError("not a file of kernels")
    length, crc = _HEAD.unpack_from(data, len(_MAGIC))
    content = data[start:]
    if len(content) != length or zlib.crc32(content) != crc:
        raise ValueError("an incomplete file of kernels")
    parts = {}
    position = 0
    while position < length:
        name_length, code_length = struct.unpack_from("<II", content, position)
        position += 8
        name = content[position : position + name_length].decode()
        position += name_length
        parts[name] = content[position : position + code_length]
        position += code_length
    return parts
