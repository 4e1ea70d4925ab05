"""Pointers: what kernels are given of a buffer, after it has been looked at.

A kernel checks nothing: one that is handed big-endian integers reads them swapped, and one that is handed a short table reads
what lies behind it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NATIVE: Final = {"b": "bq", "B": "Bc", "H": "H", "I": "IL", "Q": "QL", "q": "ql", "i": "il"}
"""For each type code, the buffer formats that hold such integers where the size is right, too."""
_SIZES: Final = {"b": 1, "B": 1, "H": 2, "I": 4, "i": 4, "Q": 8, "q": 8}


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``, as the stable interface of CPython 3.11 on has it."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


class Pointer:
    """The memory of a buffer as `length` integers of one type; the buffer cannot be resized or freed while this lives.

    Type codes are those of ``array``.  A buffer of bytes may be taken for integers of any size where it is aligned for them.
    """

    __slots__ = ("_as_parameter_", "length", "view")

    def __init__(self, buffer: Buffer | Any, typecode: str, *, writable: bool = False) -> None:
        view = memoryview(buffer)
        size = _SIZES[typecode]
        if not view.c_contiguous:
            raise ValueError("a kernel needs contiguous memory")
        if writable and view.readonly:
            raise ValueError("a kernel is to write into a read-only buffer")
        is_bytes = view.itemsize == 1
        if not is_bytes and (view.itemsize != size or view.format.lstrip("@=") not in tuple(_NATIVE[typecode])):
            raise ValueError(f"a buffer of {view.format!r} where integers of type {typecode!r} are needed")
        if view.nbytes % size:
            raise ValueError(f"{view.nbytes} bytes are no whole number of integers of {size}")
        self._as_parameter_ = _address(view)
        """The address, under the name that ctypes looks for."""
        if self._as_parameter_ % size:
            raise ValueError(f"memory at an address that is no multiple of {size}")
        self.length = view.nbytes // size
        self.view = view if view.ndim == 1 and view.format == typecode else view.cast("B").cast(typecode)  # type: ignore[call-overload]

    @property
    def address(self) -> int:
        """Where the memory begins; 0 for an empty buffer."""
        return self._as_parameter_


def _address(view: memoryview) -> int:
    if not view.nbytes:
        return 0
    if not view.readonly:  # three times as fast
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    raw = _PyBuffer()
    _get_buffer(view, ctypes.byref(raw), 0)
    try:
        address: int = raw.buf
    finally:
        _release_buffer(ctypes.byref(raw))  # the view itself keeps the memory where it is
    return address
