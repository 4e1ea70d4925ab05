"""How kernels are declared, and the one place that decides whether a kernel pays.

A kernel is a function in the subset of Python that numba compiles.  It gets pointers and integers, indexes pointers with
non-negative integers, raises nothing, allocates nothing, and answers by its result and by what it writes.  The same source
runs in three ways: compiled; as plain Python, where a pointer is a memoryview; and, in tests, compiled with bounds checks.

Unsigned constants are `U64`; `U64(x)` and `i64(x)` are casts.  In a kernel, unsigned and signed must not be mixed: COPIED is
bit 63.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, TypeVar

_START_LINKER_NS: Final = 45_000_000
"""What it costs to bring LLVM, where it is needed, into a process that has not used a kernel yet (measured: 38 to 50 ms)."""
_LINK_NS: Final = 1_500_000
"""And a family's object code."""
_COMPILE_NS: Final = 3_000_000_000
"""And to compile a family that was never used on this machine, if that cannot be kept."""
_INVEST_NS: Final = 300_000_000
"""What must have been passed up before a family is compiled that can be kept: others will need it, too."""


def _log(text: str) -> None:
    import logging

    logging.getLogger("blocklib").warning("%s", text)


tell: Callable[[str], None] = _log
"""What a user must know of kernels, one line: that they are compiled now, or why they are not used."""


def is_off() -> bool:
    """Whether numba is told not to compile: then what it has compiled before is not run either, and definitions do the work.

    The switch is numba's own, ``NUMBA_DISABLE_JIT=1``; but numba is not loaded where the object code is kept.
    """
    return os.environ.get("NUMBA_DISABLE_JIT", "").strip().lstrip("0").isdigit()


class U64(int):
    """An unsigned constant of a kernel, and the cast to one."""


def i64(value: int) -> int:
    """In a kernel: the cast to a signed integer."""
    return int(value)


_loading = threading.Lock()  # guards LLVM and what families have loaded: one thread loads, the others wait


def _after_fork() -> None:
    global _loading
    _loading = threading.Lock()  # a thread that is gone may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_F = TypeVar("_F", bound=Callable[..., Any])


class Kernel:
    """One kernel of a family.  `worth(saving)` gives what to call, or None where the definition is the better choice."""

    __slots__ = ("_compiled", "family", "function", "name")

    def __init__(self, family: Family, function: FunctionType) -> None:
        self.family = family
        self.function = function
        self.name = function.__name__
        self._compiled: Callable[..., int] | None = None

    def worth(self, saving: int) -> Callable[..., int] | None:
        """The kernel for a piece of work that takes it `saving` nanoseconds less than the definition; None: use that.

        Savings that were passed up add up.  Once they reach what it costs to load the kernel it is loaded, so that many
        small pieces of work never pay much more than the better choice for all of them would have.
        """
        if self._compiled is None:
            self._compiled = self.family.worth(self.name, saving)
        return self._compiled

    def loaded(self) -> Callable[..., int]:
        """The kernel, whatever it costs.  Raises RuntimeError where it cannot be had."""
        if self._compiled is None:
            self._compiled = self.family.load().get(self.name)
            if self._compiled is None:
                raise RuntimeError(f"the kernels of {self.family.name} cannot be compiled here")
        return self._compiled


class Family:
    """The kernels of one module; they are compiled, kept and loaded together."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.name = module.rpartition(".")[2]
        self.kernels: dict[str, Kernel] = {}
        self.helpers: dict[str, FunctionType] = {}
        self._declared: dict[str, tuple[str, bool]] = {}
        self._loaded: dict[str, Callable[..., int]] | None = None
        self._kept: dict[str, bytes] | None = None
        self._passed_up = 0

    def kernel(self, signature: str, *, holds_lock: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
        """Declare a kernel: ``i64(u64*, i64)``.

        With `holds_lock` it keeps the interpreter's lock, which is what makes it safe to read tables that other threads
        change; without, it may only be given what nobody changes, and other threads run meanwhile.
        """

        def declare(function: Callable[..., Any]) -> Kernel:
            assert isinstance(function, FunctionType)
            kernel = self.kernels[function.__name__] = Kernel(self, function)
            self._declared[function.__name__] = signature, holds_lock
            return kernel

        return declare

    def helper(self, function: _F) -> _F:
        """Declare a function that the kernels of the family, and later helpers, call."""
        assert isinstance(function, FunctionType)
        self.helpers[function.__name__] = function
        return function

    def worth(self, name: str, saving: int) -> Callable[..., int] | None:
        if self._loaded is None:
            self._passed_up += saving  # a lost update between threads only makes it load a little later
            if self._passed_up < _LINK_NS or not _loading.acquire(blocking=False):
                return None  # while another thread loads or compiles, the definitions do
            try:
                if self._loaded is None:
                    if self._passed_up < self._cost():
                        return None
                    self._loaded = self._load()
            finally:
                _loading.release()
        return self._loaded.get(name)

    def _cost(self) -> int:
        if self._loaded is not None:
            return 0
        from blocklib._fast import compiler
        from blocklib._fast.store import Store

        if compiler.needs_llvm() and self._passed_up < _START_LINKER_NS:
            return _START_LINKER_NS
        try:
            if self._stored():
                return _LINK_NS
        except ImportError:
            self._loaded = {}
            return 0
        return _INVEST_NS if Store().can_keep() else _COMPILE_NS

    def _source(self) -> bytes:
        import sys

        from blocklib._fast import compiler

        modules = {self.module, *(function.__module__ for function in self.helpers.values())}
        paths = [sys.modules[name].__file__ for name in sorted(modules)]
        content = b""
        for path in (*paths, __file__, compiler.__file__):
            assert path is not None
            with open(path, "rb") as file:
                content += file.read()
        return content

    def _stored(self) -> dict[str, bytes]:
        """The object code that is kept, looked for once; empty where there is none."""
        from blocklib._fast import compiler
        from blocklib._fast.store import Store

        if self._kept is None:
            try:
                self._kept = Store().get(compiler.store_name(self.name, self._source())) or {}
            except OSError:  # installed without its source
                self._kept = {}
        return self._kept

    def load(self) -> dict[str, Callable[..., int]]:
        """All kernels by name, from the store or compiled now; none where there is no compiler."""
        with _loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> dict[str, Callable[..., int]]:
        from blocklib._fast import compiler
        from blocklib._fast.store import Store

        if is_off():
            return {}
        sources = self._sources()
        try:
            codes = self._stored()
            if codes:
                return compiler.link(codes, sources)
            if Store().can_keep():
                tell("compiling kernels, once on this machine; this takes some seconds")
                codes = self._compile_and_keep()
                for other in _others(self):
                    other._compile_and_keep()
            else:
                tell(f"compiling the kernels for {self.name}, in every process: there is no folder to keep them in")
                codes = compiler.compile_sources(sources, self.helpers)
            return compiler.link(codes, sources)
        except Exception as error:  # whatever a compiler of another version finds: there are definitions
            tell(f"the kernels for {self.name} are not used: {type(error).__name__}: {error}")
            return {}

    def _compile_and_keep(self) -> dict[str, bytes]:
        from blocklib._fast import compiler
        from blocklib._fast.store import Store

        codes = self._stored()
        if not codes:
            codes = self._kept = compiler.compile_sources(self._sources(), self.helpers)
            Store().put(compiler.store_name(self.name, self._source()), codes)
        return codes

    def _sources(self) -> dict[str, Any]:
        from blocklib._fast.compiler import Source

        sources = {}
        for name, (signature, holds_lock) in self._declared.items():
            result, _, rest = signature.partition("(")
            parameters = tuple(part.strip() for part in rest.rstrip(")").split(","))
            sources[name] = Source(self.kernels[name].function, result, parameters, holds_lock)
        return sources


def _others(family: Family) -> list[Family]:
    """All families but this one: who waits for a compiler once does not want to wait for it again."""
    from importlib import import_module

    import blocklib._fast as room

    return [import_module(f"{room.__name__}.{name}").family for name in room.FAMILIES if name != family.name]
