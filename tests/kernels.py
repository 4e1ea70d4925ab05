"""The three ways to run a kernel: compiled as users run it, as plain Python, and compiled with bounds checks."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from blocklib._fast import compiler
from blocklib._fast.kernel import Kernel
from blocklib._fast.pointer import Pointer
from blocklib._fast.work import SLICE_LENGTH_BITS

WAYS = ("compiled", "plain", "checked")


class Tables:
    """What a kernel is given of several tables: where each of them is, 0 for None."""

    def __init__(self, tables: Sequence[array[int] | None]) -> None:
        self.tables = tables
        self.addresses = array("Q", [table.buffer_info()[0] if table is not None else 0 for table in tables])
        self._as_parameter_ = Pointer(self.addresses, "Q").address


def way(kernel: Kernel, name: str) -> Callable[..., int]:
    """`kernel` in one of the WAYS; all take Pointers and integers."""
    if name == "compiled":
        return kernel.loaded()
    if name == "plain":
        return lambda *arguments: int(kernel.function(*(_view(one) for one in arguments)))
    return _checked(kernel)


def _checked(kernel: Kernel) -> Callable[..., int]:
    checked = _checked_function(kernel)
    return lambda *arguments: int(checked(*(_array(one) for one in arguments)))


@cache
def _checked_function(kernel: Kernel) -> Callable[..., int]:
    helpers = compiler.compiled_helpers(kernel.family.helpers, boundscheck=True)
    compiled: Any = numba.njit(boundscheck=True, error_model="numpy")
    checked: Callable[..., int] = compiled(compiler.with_globals(kernel.function, helpers))
    return checked


@cache
def checked_everywhere(kernel: Kernel) -> Callable[..., int]:
    """`kernel` with bounds checks, for the arguments that the library itself gives it: tables of a cache are addresses there.

    They become arrays in the same call, which keeps the interpreter's lock: no other thread changes them meanwhile.
    """
    parameters = kernel.family._sources()[kernel.name].parameters
    if not any(parameter.endswith("**") for parameter in parameters):
        return _checked(kernel)
    names = [f"a{number}" for number in range(len(parameters))]
    length = "a1 + 1" if parameters[1] == "i64" else f"1 << a1[{SLICE_LENGTH_BITS}]"  # a mask, or the shape of a mapping
    given = [
        {"u64**": f"words({name}, {length})", "u8**": f"bytes({name}, {length})"}.get(parameter, name)
        for name, parameter in zip(names, parameters, strict=True)
    ]
    scope = {"kernel": _checked_function(kernel), "words": _tables(types.uint64), "bytes": _tables(types.uint8)}
    exec(f"def run({', '.join(names)}): return kernel({', '.join(given)})", scope)  # numba has no call with any number of types
    run = numba.njit(scope["run"])
    return lambda *arguments: int(run(*(_array(one) for one in arguments)))


@cache
def _tables(item: types.Type) -> Callable[..., Any]:
    """A compiled function (addresses, length) -> arrays of `item`; where there is no table, an empty one."""

    def pointer(_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(item)(address), generate  # type: ignore[no-untyped-call]

    as_pointer: Any = intrinsic(pointer)

    @numba.njit
    def tables(addresses: Any, length: Any) -> Any:
        return [carray(as_pointer(address), (length if address else 0,)) for address in addresses]

    compiled: Callable[..., Any] = tables
    return compiled


def _view(argument: Any) -> Any:
    if isinstance(argument, Tables):
        return argument.tables
    return argument.view if isinstance(argument, Pointer) else argument


def _array(argument: Any) -> Any:
    if isinstance(argument, Tables):
        width = next(table.itemsize for table in argument.tables if table is not None)
        return tuple(np.frombuffer(table or bytearray(width), dtype=f"u{width}") for table in argument.tables)
    return np.frombuffer(argument.view, dtype=np.dtype(argument.view.format)) if isinstance(argument, Pointer) else argument
