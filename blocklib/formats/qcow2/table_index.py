"""Where the tables of a cache lie in memory, for kernels that look many entries up at once.

A slot belongs to one table at a time; two that want the same take turns.  What the index says of a table is true as long as
the cache holds it: the cache tells when it lets one go.  A table that is referenced here stays where it is.  Everything runs
under the image's lock; kernels read the slots while they keep the interpreter's lock.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blocklib._fast.pointer import Pointer
from blocklib._fast.work import (
    CLUSTER_BITS,
    EXTERNAL,
    L1_BITS,
    SHAPE_WORDS,
    SLICE_BITS,
    SLICE_LENGTH_BITS,
    SLOT_MASK,
    ZERO_FLAG,
    slot_of,
)

if TYPE_CHECKING:
    from blocklib.formats.qcow2.mapping import Mapping
    from blocklib.formats.qcow2.tables import Table

_MOST_SLOTS: Final = 1 << 16


class TableIndex:
    """Slots for the L2 slices of one mapping, about twice as many as its cache has room for."""

    def __init__(self, mapping: Mapping) -> None:
        self._length_bits = mapping.slice_length.bit_length() - 1
        slots = min(_MOST_SLOTS, 1 << (2 * mapping.cache.max_entries - 1).bit_length())
        self._mask = slots - 1
        shape = array("q", bytes(8 * SHAPE_WORDS))
        shape[CLUSTER_BITS] = mapping.geometry.cluster_bits
        shape[SLICE_BITS] = mapping.geometry.cluster_bits + mapping.slice_entries.bit_length() - 1
        shape[L1_BITS] = mapping.geometry.l1_shift
        shape[SLICE_LENGTH_BITS] = self._length_bits
        shape[SLOT_MASK] = self._mask
        shape[EXTERNAL] = mapping.external
        shape[ZERO_FLAG] = mapping.zero_flag_allowed
        self.shape = Pointer(shape, "q", writable=True)
        """What kernels must know of the mapping; the size of the disk and of its L1 table are the caller's to fill in."""
        self._keys = array("q", bytes(8 * slots))  # host offset of the table, 0 for none
        self._tables = array("Q", bytes(8 * slots))  # where it is in memory
        self._trust = array("Q", bytes(8 * slots))  # where the marks are that say what may be written in place, 0 for none
        self._used = array("B", bytes(slots))  # whether a kernel has used it since the cache looked
        self._pins: list[tuple[Table, Table | None] | None] = [None] * slots
        self._trusted: set[int] = set()  # slots with marks
        self.keys = Pointer(self._keys, "q")
        self.tables = Pointer(self._tables, "Q")
        self.trust = Pointer(self._trust, "Q")
        self.used = Pointer(self._used, "B", writable=True)

    def _slot(self, host_offset: int) -> int:
        return slot_of(host_offset, self._length_bits, self._mask)

    def put(self, host_offset: int, table: Table, marks: Table | None) -> None:
        """The cache has this table; `marks` has a byte for each of its words that may be written in place, if there is one."""
        slot = self._slot(host_offset)
        self._keys[slot] = host_offset
        self._tables[slot] = table.buffer_info()[0]
        self._trust[slot] = marks.buffer_info()[0] if marks is not None else 0
        self._pins[slot] = table, marks
        if marks is not None:
            self._trusted.add(slot)
        self._used[slot] = 1

    def forget(self, host_offset: int) -> None:
        """The cache has let this table go."""
        slot = self._slot(host_offset)
        if self._keys[slot] == host_offset:
            self._keys[slot] = self._tables[slot] = self._trust[slot] = 0
            self._pins[slot] = None

    def forget_all(self) -> None:
        for key in self._keys:
            if key:
                self.forget(key)

    def distrust(self) -> None:
        """What may be written in place must be found out again."""
        for slot in self._trusted:
            self._trust[slot] = 0
            pin = self._pins[slot]
            if pin is not None:
                self._pins[slot] = pin[0], None
        self._trusted.clear()

    def take_used(self, host_offset: int) -> bool:
        """Whether a kernel has used the table since this was last asked."""
        slot = self._slot(host_offset)
        if self._keys[slot] != host_offset or not self._used[slot]:
            return False
        self._used[slot] = 0
        return True
