"""The three ways to run a kernel: compiled as users run it, as plain Python, and compiled with bounds checks.

`way` is one kernel; `running` is all of a process, which ``pytest --kernels=...`` does for a whole run.
"""

from __future__ import annotations

import ctypes
import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NoReturn

import pytest

from blocklib._fast import compiler
from blocklib._fast import work as w
from blocklib._fast.kernel import Family, Kernel, is_off
from blocklib._fast.pointer import Pointer

WAYS: Final = ("compiled", "plain", "checked")
RUNS: Final = ("compiled", "off", "plain", "checked")
"""What `running` knows: the ways, and none at all, where the definitions do the work."""


class Tables:
    """What a kernel is given of several tables: where each of them is, 0 for None."""

    def __init__(self, tables: Sequence[array[int] | None]) -> None:
        self.tables = tables
        self.addresses = array("Q", [table.buffer_info()[0] if table is not None else 0 for table in tables])
        self._as_parameter_ = Pointer(self.addresses, "Q").address


def way(kernel: Kernel, name: str) -> Callable[..., int]:
    """`kernel` in one of the WAYS; all take Pointers and integers.  Skips the test where numba is told not to compile."""
    if name != "plain" and is_off():
        pytest.skip("nothing is compiled here: NUMBA_DISABLE_JIT is set")
    if name == "compiled":
        return kernel.loaded()
    if name == "plain":
        return lambda *arguments: int(kernel.function(*(_view(one) for one in _with_tables(kernel, arguments))))
    return _checked(kernel)


@cache
def _checked(kernel: Kernel) -> Callable[..., int]:
    import numba

    helpers = compiler.compiled_helpers(kernel.family.helpers, boundscheck=True)
    _parameters, holds_lock = _declared(kernel)
    compiled: Any = numba.njit(boundscheck=True, error_model="numpy", nogil=not holds_lock)
    checked = compiled(compiler.with_globals(kernel.function, helpers))
    return lambda *arguments: int(checked(*(_array(one) for one in _with_tables(kernel, arguments))))


def _view(argument: Any) -> Any:
    if isinstance(argument, Tables):
        return argument.tables
    return argument.view if isinstance(argument, Pointer) else argument


def _array(argument: Any) -> Any:
    import numpy as np

    if isinstance(argument, Tables):
        width = next(table.itemsize for table in argument.tables if table is not None)
        return tuple(np.frombuffer(table or bytearray(width), dtype=f"u{width}") for table in argument.tables)
    if isinstance(argument, AddressedTables):
        return argument.boxed()
    if not isinstance(argument, Pointer):
        return argument
    dtype = np.dtype(argument.view.format)
    return np.frombuffer(argument.view, dtype=dtype) if argument.length else np.empty(0, dtype=dtype)


# -- tables by their addresses ---------------------------------------------------------------------------------------------


class AddressedTables:
    """Tables of which only the addresses are known, and that each has `entries` unsigned integers of `width` bytes."""

    def __init__(self, addresses: memoryview, entries: int, width: int) -> None:
        self.addresses = addresses
        self.entries = entries
        self.width = width

    def __getitem__(self, number: int) -> memoryview[int]:
        address = self.addresses[number]
        if not address:
            raise IndexError(number)
        table = memoryview((_UNSIGNED[self.width] * self.entries).from_address(address)).cast("B")
        return table.cast("Q") if self.width == 8 else table

    def boxed(self) -> Any:
        """The same for compiled code."""
        import numpy as np

        make = _tables_for_numba()
        return make(np.frombuffer(self.addresses, dtype=np.uint64), self.entries, np.zeros(0, dtype=f"u{self.width}"))


_UNSIGNED: Final = {1: ctypes.c_uint8, 8: ctypes.c_uint64}


def _entries_of_shape(arguments: Sequence[Any]) -> int:
    shape: memoryview[int] = arguments[1].view
    return 1 << (shape[w.SLICE_BITS] - shape[w.CLUSTER_BITS])


def _entries_of_mask(arguments: Sequence[Any]) -> int:
    return int(arguments[1]) + 1


_ENTRIES: Final[dict[str, Callable[[Sequence[Any]], int]]] = {
    "_look_up": _entries_of_shape,
    "_look_up_places": _entries_of_shape,
    "_classify": _entries_of_mask,
    "_link": _entries_of_mask,
}
"""How many entries the tables have that a kernel gets, by its other arguments."""


def _declared(kernel: Kernel) -> tuple[list[str], bool]:
    """The types of the parameters, and whether the kernel keeps the interpreter's lock."""
    signature, holds_lock = kernel.family._declared[kernel.name]
    return [part.strip() for part in signature.partition("(")[2].rstrip(")").split(",")], holds_lock


def _with_tables(kernel: Kernel, arguments: Sequence[Any]) -> list[Any]:
    """The arguments, with tables where a parameter is a pointer to pointers."""
    parameters, _ = _declared(kernel)
    return [
        AddressedTables(one.view, _ENTRIES[kernel.name](arguments), int(kind.strip("u*")) // 8)
        if kind.endswith("**") and isinstance(one, Pointer)
        else one
        for one, kind in zip(arguments, parameters)
    ]


@cache
def _tables_for_numba() -> Callable[..., Any]:
    """What makes a structure for compiled code that gives a table by its number, as an array, whose bounds are checked."""
    from importlib import import_module

    from numba.core import cgutils, types
    from numba.extending import intrinsic, overload

    numba: Any = import_module("numba")
    structref: Any = import_module("numba.experimental.structref")

    class TablesType(types.StructRef):
        def preprocess_fields(self, fields: Any) -> Any:
            literal: Any = types.unliteral
            return tuple((name, literal(kind)) for name, kind in fields)

    structref.register(TablesType)

    class TablesProxy(structref.StructRefProxy):  # type: ignore[misc]
        def __new__(cls, addresses: Any, entries: int, like: Any) -> Any:
            return structref.StructRefProxy.__new__(cls, addresses, entries, like)

    structref.define_proxy(TablesProxy, TablesType, ["addresses", "entries", "like"])

    def _pointer_of(_context: Any, address: Any) -> Any:
        def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], cgutils.voidptr_t)

        return types.voidptr(address), code

    pointer_of: Any = intrinsic(_pointer_of)

    @overload(operator.getitem)
    def get(tables: Any, number: Any) -> Any:
        if not isinstance(tables, TablesType):
            return None

        def table(tables: Any, number: Any) -> Any:
            address = tables.addresses[number]
            return numba.carray(pointer_of(address), (tables.entries if address != 0 else 0,), tables.like.dtype)

        return table

    return TablesProxy


# -- all of a process ------------------------------------------------------------------------------------------------------


@contextmanager
def running(name: str) -> Iterator[None]:
    """While the block runs, all kernels run in one of the RUNS, however little there is for them to do.

    As "plain" they do not keep the interpreter's lock, which some rely on: for one thread.
    """
    if name == "compiled":
        yield
        return

    def loaded(kernel: Kernel) -> Callable[..., int]:
        return way(kernel, name)

    def refuse(kernel: Kernel) -> NoReturn:
        raise RuntimeError(f"the kernels of {kernel.family.name} are off")

    with pytest.MonkeyPatch.context() as patch:
        if name == "off":
            patch.setattr(Kernel, "worth", lambda _kernel, _saving: None)
            patch.setattr(Kernel, "loaded", refuse)
            patch.setattr(Family, "load", lambda _family: {})
        else:
            patch.setattr(Kernel, "worth", lambda kernel, _saving: loaded(kernel))
            patch.setattr(Kernel, "loaded", loaded)
            patch.setattr(Family, "load", lambda family: {key: loaded(one) for key, one in family.kernels.items()})
        yield
