"""One target under atheris, in a process of its own: ``python -m tests.fuzz.engine TARGET FOUND [ARGUMENTS OF LIBFUZZER]``.

An input that fails is kept in the folder FOUND under a name that says where: one for each place.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any


def _signature(error: BaseException) -> str:
    """Where an error comes from: its type, and the innermost place in blocklib."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/blocklib/" in frame.filename]
    place = frames[-1] if frames and not isinstance(error, AssertionError) else traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)[:40] if isinstance(error, AssertionError) else ""
    digest = hashlib.sha1(f"{place.filename.rpartition('/')[2]}:{place.line}:{text}".encode()).hexdigest()[:8]
    return f"{type(error).__name__.lower()}-{digest}"


def main(target: str, found: Path, arguments: list[str], *, goes_on: bool) -> None:
    atheris: Any = import_module("atheris")  # which is not everywhere
    with atheris.instrument_imports(include=["blocklib", "tests.fuzz"]):
        _import_all()
        from tests.fuzz import targets
    found.mkdir(parents=True, exist_ok=True)

    def one_input(data: bytes) -> None:
        try:
            targets.run(target, data)
        except Exception as error:
            path = found / f"{_signature(error)}.input"
            is_new = not path.exists()
            if is_new or len(data) < path.stat().st_size:
                path.write_bytes(data)
            if is_new:
                print(f"FOUND {path}", file=sys.stderr)
                traceback.print_exc()
                sys.stderr.flush()
            if not goes_on:
                os._exit(77)

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def _import_all() -> None:
    """Whatever targets import later, so that it is instrumented, too."""
    import pkgutil

    import blocklib

    for module in pkgutil.walk_packages(blocklib.__path__, "blocklib."):
        if not module.name.endswith(("__main__", "_fast.compiler", "_fast.elf", "_fast.store")):
            import_module(module.name)


if __name__ == "__main__":
    _arguments = [word for word in sys.argv[3:] if word != "--goes-on"]
    main(sys.argv[1], Path(sys.argv[2]), _arguments, goes_on="--goes-on" in sys.argv)
