"""Protocol drivers: the leaves of the graph, which fetch and store bytes; reached by name through `blocklib.drivers`."""

from __future__ import annotations
