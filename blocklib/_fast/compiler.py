"""From the source of a kernel to something that can be called: numba compiles it once, LLVM links it in every process.

Loading numba and letting it restore a function of its own cache costs a third of a second, more than most commands take.  So
what is kept is the object code that it made, which `elf` brings into a process in less than a millisecond, and llvmlite, where
that cannot, in a seventh of that time; ctypes calls it and releases the interpreter's lock.  See
docs/decisions/0006-kernels-as-object-code.md.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any, Final, NamedTuple

from blocklib._fast import elf

CTYPES: Final = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
}
_FORBIDDEN: Final = ("Py", "numba_", "NRT_")
"""What an external symbol of a kernel must not begin with: it would need the interpreter, its lock or numba at run time."""


class Source(NamedTuple):
    """A kernel before it is compiled.  Types: i32, i64, u64; ``u8*`` and so on for pointers, ``u64**`` for tables of them."""

    function: Any
    result: str
    parameters: tuple[str, ...]
    holds_lock: bool


class External(NamedTuple):
    """A function of the C library that kernels call; `stand_in` does the same where they run as plain Python."""

    name: str
    result: str
    parameters: tuple[str, ...]
    stand_in: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.stand_in(*arguments)


class _Linker:
    """LLVM in this process.  What it holds lives as long as the process."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        self._llvm = llvm
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        features = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
        self.facts = f"{llvm_version()} {features}"

    def link(self, codes: Mapping[str, bytes]) -> None:
        for code in codes.values():
            self._engine.add_object_file(self._llvm.object_file.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, symbol: str) -> int:
        address: int = self._engine.get_function_address(symbol)
        if not address:
            raise LookupError(symbol)
        return address


def llvm_version() -> str:
    """Which LLVM compiles here.  Raises ImportError where none does; loads nothing of it."""
    import llvmlite

    return f"llvmlite {llvmlite.__version__}"


_linker: _Linker | None = None


def needs_llvm() -> bool:
    """Whether bringing object code into the process would load LLVM first."""
    return _linker is None and elf.processor() is None


def linker() -> _Linker:
    """LLVM, loaded at the first call; calls are serialised by the caller.  Raises ImportError."""
    global _linker
    if _linker is None:
        _linker = _Linker()
    return _linker


def store_name(family: str, source: bytes) -> str:
    """The name of a family's object code: it changes with the source, with LLVM and with the processor."""
    own = elf.processor()
    facts = (linker().facts if own is None else f"{llvm_version()} {own}").encode()
    return f"{family}-{zlib.crc32(source):08x}{len(source):x}-{zlib.crc32(facts):08x}{len(facts):x}.kernels"


def link(codes: Mapping[str, bytes], sources: Mapping[str, Source]) -> dict[str, Callable[..., int]]:
    """Bring object code, by symbol, into the process; callables by the names of `sources`.  Raises LookupError.

    Calls are serialised by the caller.
    """
    symbols = {}
    for symbol in codes:
        name, _, rest = symbol.partition(" ")
        symbols[name] = rest
    if symbols.keys() != sources.keys():
        raise LookupError("other kernels than expected")
    addresses = _addresses(codes)
    return {name: _callable(addresses[symbols[name]], source) for name, source in sources.items()}


def _addresses(codes: Mapping[str, bytes]) -> dict[str, int]:
    """Bring object code into the process; the addresses of the symbols of `codes`."""
    if elf.processor() is not None:
        try:
            return elf.load(codes.values())
        except (elf.UnsupportedError, OSError):
            pass  # LLVM can do more
    linker().link(codes)
    names = [symbol.partition(" ")[2] for symbol in codes]
    return {name: linker().address(name) for name in names}


def _callable(address: int, source: Source) -> Callable[..., int]:
    make = ctypes.PYFUNCTYPE if source.holds_lock else ctypes.CFUNCTYPE
    parameters = [CTYPES.get(name, ctypes.c_void_p) for name in source.parameters]
    return make(CTYPES[source.result], *parameters)(address)


def compile_sources(sources: Mapping[str, Source], helpers: Mapping[str, FunctionType]) -> dict[str, bytes]:
    """Object code by "name symbol".  Raises ImportError where numba is not there, RuntimeError where it may not compile."""
    numba: Any = import_module("numba")
    if numba.config.DISABLE_JIT:
        raise RuntimeError("numba is told not to compile")
    replaced = compiled_helpers(helpers)
    codes = {}
    for name, source in sources.items():
        signature = _type(numba, source.result)(*(_type(numba, parameter) for parameter in source.parameters))
        # Inlined into what C calls, a kernel that never fails leaves nothing of the code there that reports failures.
        function = numba.njit(signature, forceinline=True, nogil=True, error_model="numpy", no_cpython_wrapper=True)(
            with_globals(source.function, replaced)
        )
        compiled = next(iter(function.overloads.values()))
        _refuse_interpreter(name, compiled.library)
        codes[f"{name} {compiled.fndesc.llvm_cfunc_wrapper_name}"] = compiled.library._get_compiled_object()
    return codes


def _refuse_interpreter(name: str, library: Any) -> None:
    """Raises RuntimeError where a kernel could raise, allocate or call back: object code alone cannot do that."""
    for function in library._final_module.functions:
        if function.is_declaration and function.name.startswith(_FORBIDDEN):
            raise RuntimeError(f"the kernel {name} needs {function.name}")


def compiled_helpers(helpers: Mapping[str, FunctionType], **options: Any) -> dict[str, Any]:
    """What stands for the helpers of a family where its kernels are compiled."""
    numba: Any = import_module("numba")
    names: dict[str, Any] = {}
    for name, function in helpers.items():  # in the order of their definition: a helper may use an earlier one
        names[name] = numba.njit(nogil=True, error_model="numpy", forceinline=True, **options)(with_globals(function, names))
    return names


def with_globals(function: FunctionType, replaced: Mapping[str, Any]) -> FunctionType:
    """`function` as numba shall see it: unsigned constants, casts and C functions in its own terms."""
    from blocklib._fast.kernel import U64, i64

    numba: Any = import_module("numba")
    names = dict(function.__globals__)
    for name, value in names.items():
        if value is U64:
            names[name] = numba.uint64
        elif value is i64:
            names[name] = numba.int64
        elif isinstance(value, U64):
            names[name] = _unsigned(value)
        elif isinstance(value, External):
            names[name] = numba.types.ExternalFunction(
                value.name, _type(numba, value.result)(*(_type(numba, parameter) for parameter in value.parameters))
            )
    names.update(replaced)
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def _unsigned(value: int) -> Any:
    import numpy as np

    return np.uint64(value)


def _type(numba: Any, name: str) -> Any:
    if name.endswith("*"):
        return numba.types.CPointer(_type(numba, name[:-1]))
    return getattr(numba.types, {"i": "int", "u": "uint"}[name[0]] + name[1:])
