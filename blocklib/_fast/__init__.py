"""Kernels on whole tables, runs and buffers, each in a module beside its definition in plain Python or numpy.

A module here is a *family*: functions for the rest of blocklib to call, which check what they are given and then do the work
by a kernel, or by the definition where a kernel would not pay.  `kernel` says how a kernel is declared and when it pays,
`compiler` and `store` where its object code comes from, `pointer` what may be handed to one.

Nothing here imports the rest of blocklib, and importing it loads neither numpy nor numba.
"""

from __future__ import annotations

from typing import Final

FAMILIES: Final = ("bits", "buffers", "check", "crc32c", "extents", "lookups", "placing", "refcounts", "totals", "transfers")
"""The modules that have kernels."""


def warm() -> float:
    """Compile what is not compiled yet on this machine; the seconds it took."""
    from importlib import import_module
    from time import monotonic

    from blocklib._fast.kernel import Family

    began = monotonic()
    for name in FAMILIES:
        family: Family = import_module(f"{__name__}.{name}").family
        family.load()
    return monotonic() - began
