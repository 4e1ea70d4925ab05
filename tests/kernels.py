"""The three ways to run a kernel: compiled as users run it, as plain Python, and compiled with bounds checks."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np

from blocklib._fast import compiler
from blocklib._fast.kernel import Kernel
from blocklib._fast.pointer import Pointer

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


@cache
def _checked(kernel: Kernel) -> Callable[..., int]:
    helpers = compiler.compiled_helpers(kernel.family.helpers, boundscheck=True)
    compiled: Any = numba.njit(boundscheck=True, error_model="numpy")
    checked = compiled(compiler.with_globals(kernel.function, helpers))
    return lambda *arguments: int(checked(*(_array(one) for one in arguments)))


def _view(argument: Any) -> Any:
    if isinstance(argument, Tables):
        return argument.tables
    return argument.view if isinstance(argument, Pointer) else argument


def _array(argument: Any) -> Any:
    if isinstance(argument, Tables):
        width = next(table.itemsize for table in argument.tables if table is not None)
        return tuple(np.frombuffer(table or bytearray(width), dtype=f"u{width}") for table in argument.tables)
    return np.frombuffer(argument.view, dtype=np.dtype(argument.view.format)) if isinstance(argument, Pointer) else argument
