"""The half of a qcow2 node that serves many requests at once: it loads what does the work when it is first asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from blocklib.node import Node

if TYPE_CHECKING:
    from blocklib._fast.work import Work
    from blocklib.formats.qcow2.node import Qcow2Node
    from blocklib.node import WriteTicket


class BatchNode(Node):
    def find_batch(self, work: Work) -> bool:
        from blocklib.formats.qcow2 import batch

        return batch.find(cast("Qcow2Node", self), work)

    def place_batch(self, work: Work) -> bool:
        from blocklib.formats.qcow2 import batch

        return batch.place(cast("Qcow2Node", self), work)

    def reserve_batch(self, work: Work, most_bytes: int, alignment: int) -> WriteTicket | None:
        from blocklib.formats.qcow2 import batch

        return batch.reserve(cast("Qcow2Node", self), work, most_bytes, alignment)
